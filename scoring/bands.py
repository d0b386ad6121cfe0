"""Bands: the business word for a probability, by the two thresholds of the model's manifest."""

from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from models.artifact import Thresholds


class Band(IntEnum):
    """What a probability is called. UNKNOWN marks a score no model gave."""

    LOW = 0
    MEDIUM = 1
    HIGH = 2
    UNKNOWN = 3


BAND_NAMES: Final = tuple(band.name.lower() for band in Band)


def bands(probability: npt.NDArray[np.floating], thresholds: Thresholds) -> npt.NDArray[np.uint8]:
    """Band of each probability, uint8 of the same shape. An edge belongs to the higher band."""
    # In float64, where every float32 probability is exact: one comparison for every reader of the score.
    edges = np.array([thresholds.medium, thresholds.high])
    return np.searchsorted(edges, probability.astype(np.float64), side="right").astype(np.uint8)
