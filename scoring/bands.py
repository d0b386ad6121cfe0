"""Bands: the business word for a probability, by the two thresholds of the model's manifest."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from models.artifact import Thresholds
from proto.scores import BANDS

UNKNOWN: Final = BANDS.index("unknown")
LOW: Final = BANDS.index("low")
MEDIUM: Final = BANDS.index("medium")
HIGH: Final = BANDS.index("high")
"""Codes: positions in proto.scores.BANDS. UNKNOWN marks a score no model gave, and "no score yet"."""


def bands(probability: npt.NDArray[np.floating], thresholds: Thresholds) -> npt.NDArray[np.uint8]:
    """Band code of each probability, uint8 of the same shape. An edge belongs to the higher band; NaN is UNKNOWN."""
    # In float64, where every float32 probability is exact: one comparison for every reader of the score.
    edges = np.array([thresholds.medium, thresholds.high])
    codes = np.array([LOW, MEDIUM, HIGH], np.uint8)
    found = codes[np.searchsorted(edges, probability.astype(np.float64), side="right")]
    return np.where(np.isnan(probability), np.uint8(UNKNOWN), found)


def floors(edges: Sequence[float], hysteresis: float) -> npt.NDArray[np.float64]:
    """Per band code the probability below which a customer alerted at that band may be alerted at a lower one, shape (4,).

    edges: of the medium and the high band, empty for a fallback. hysteresis: how far below the edge; half the edge at most,
    so that every alert can end.
    """
    below = [edge - min(hysteresis, edge / 2) for edge in edges] or [np.inf, np.inf]
    return np.array([np.inf, -np.inf, *below])
