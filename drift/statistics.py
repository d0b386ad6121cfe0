"""Distances between histograms, and the thresholds a budget of false alarms allows them."""

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

PAD: Final = 0.5
"""Half a count per bin: an empty bin would make the logarithm infinite."""


def shares(counts: npt.NDArray[np.number], pad: float = PAD) -> Floats:
    """Counts (..., bins) as shares that sum to 1, padded."""
    padded = counts + pad
    found: Floats = padded / padded.sum(axis=-1, keepdims=True)
    return found


def psi(expected: npt.NDArray[np.number], observed: npt.NDArray[np.number]) -> Floats:
    """Population stability index of histograms over the same bins, in nats, >= 0.

    expected, observed: counts or shares (..., bins); the expected ones are scaled to the observed total, so both are padded alike.
    Custom reads below 0.10 as stable, above 0.25 as shifted. Source: Siddiqi, Credit Risk Scorecards (2006).

    >>> float(psi(np.array([50, 50]), np.array([50, 50])))
    0.0
    """
    if expected.shape[-1] != observed.shape[-1]:
        raise ValueError(f"histograms of {expected.shape[-1]} and {observed.shape[-1]} bins cannot be compared")
    total = observed.sum(axis=-1, keepdims=True)
    known = np.maximum(expected.sum(axis=-1, keepdims=True), 1e-12)
    e, o = shares(expected / known * total), shares(observed)
    found: Floats = ((o - e) * np.log(o / e)).sum(axis=-1)
    return found


def ks(expected: npt.NDArray[np.number], observed: npt.NDArray[np.number]) -> Floats:
    """Largest distance of two distribution functions over the same ordered bins, in [0, 1]; 0 where one of them is empty.

    expected, observed: counts or shares (..., bins). On bins it is at most the distance on the values themselves.
    """
    a, b = expected.sum(axis=-1, keepdims=True), observed.sum(axis=-1, keepdims=True)
    distance = np.abs(np.cumsum(expected / np.maximum(a, 1e-12), axis=-1) - np.cumsum(observed / np.maximum(b, 1e-12), axis=-1))
    found: Floats = np.where((a > 0) & (b > 0), distance, 0.0).max(axis=-1)
    return found


def threshold(samples: Floats, alpha: float, floor: float, days: npt.NDArray[np.floating] | float) -> Floats:
    """What a distance exceeds with probability alpha at most, by a Student distribution of its square root.

    samples: distances (n, ...) of windows of the baseline, NaN = not measured. days: independent days behind them, one number or (...):
    degrees of freedom plus one, since windows within a day, or days of a slow series, are not independent. Never below `floor`, which
    is what is worth a look at all; inf where fewer than three windows were measured. The root of a distance is about normal where its
    logarithm has a long tail towards 0.
    """
    from scipy.stats import t

    roots = np.sqrt(samples)
    known = np.isfinite(roots)
    n = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, roots, 0).sum(axis=0) / n
    spread = np.sqrt(np.where(known, (roots - mean) ** 2, 0).sum(axis=0) / np.maximum(n - 1, 1))
    # A prediction of one further value: the mean is estimated too.
    free = np.maximum(np.minimum(n, days), 2)
    limit = (mean + t.isf(alpha, free - 1) * spread * np.sqrt(1 + 1 / free)) ** 2
    found: Floats = np.maximum(np.where(known.sum(axis=0) >= 3, limit, np.inf), floor)
    return found
