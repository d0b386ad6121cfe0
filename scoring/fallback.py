"""The score when there is no model: one stated probability, the band "unknown", and the flag that says so."""

from typing import Final

import numpy as np
import numpy.typing as npt

from features.catalog import LAYOUT_HASH
from models.session import Vectors
from scoring.bands import UNKNOWN


class Fallback:
    """Stands where a Scorer stands, with the same surface; digest, name and versions are empty.

    probability: what every event gets; a setting of the business, between 0 and 1.
    """

    fallback: Final = True
    digest: Final = ""
    name: Final = ""
    version: Final = ""
    threshold_version: Final = ""
    reasons_method: Final = "treeshap"
    edges: tuple[float, ...] = ()
    layout_hash: Final = LAYOUT_HASH

    def __init__(self, probability: float) -> None:
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"a fallback probability lies between 0 and 1, got {probability}")
        self._probability = np.float32(probability)

    def score(self, vectors: Vectors) -> Vectors:
        """The stated probability for each vector, float32 of shape (k,)."""
        return np.full(len(vectors), self._probability, np.float32)

    def bands(self, probability: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        """UNKNOWN for each, uint8 of shape (k,)."""
        return np.full(len(probability), UNKNOWN, np.uint8)

    def reasons(self, vectors: Vectors, band: npt.NDArray[np.uint8], former: npt.NDArray[np.uint8], top: int = 3) -> list[bytes]:
        """No reasons, as JSON: nothing was weighed."""
        return [b"[]"] * len(vectors)
