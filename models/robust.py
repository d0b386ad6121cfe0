"""How scores stand up to bad data: every value a little off, a source silent, a burst of events."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.catalog import CATALOG, Op
from features.window import D7, H1, H24
from models.dataset import FloatArray
from models.evaluate import auc
from models.measures import Floats

NOISE: Final = 0.05
SPIKE: Final = 10.0
ALL_EVENTS: Final = "all events"
SOURCES: Final = ("transactions", "logins", "support-tickets", "customer-profiles")
_COUNTS: Final = {
    Op.TOTAL,
    Op.RATE,
    Op.PER_MINUTE,
    Op.BEFORE,
    Op.CHANGE,
    Op.DISTINCT,
    Op.KNOWN,
    Op.PROFILE_KNOWN,
    Op.OPEN_TICKETS,
    Op.PRODUCT,
}
"""What is 0 where nothing ever came; everything else is unknown then."""
_RECENT: Final = {H1, H24, D7}


def noisy(x: FloatArray, seed: int = 0) -> FloatArray:
    """Every value off by a factor of its own, log-normal with a spread of NOISE; zeros and missing values stay."""
    factor = np.exp(np.random.default_rng(seed).normal(0, NOISE, x.shape))
    return np.asarray(x * factor, np.float32)


def silent(x: FloatArray, source: str) -> FloatArray:
    """As if nothing of a source had ever come: its counts 0, its ages, means and ratios unknown."""
    changed = x.copy()
    for column, feature in enumerate(CATALOG):
        if feature.source == source:
            changed[:, column] = 0.0 if feature.op in _COUNTS else np.nan
    return changed


def spiked(x: FloatArray) -> FloatArray:
    """As if everything of the last 7 days and less had come SPIKE times."""
    changed = x.copy()
    for column, feature in enumerate(CATALOG):
        if feature.op in {Op.TOTAL, Op.RATE, Op.PER_MINUTE} and feature.wa in _RECENT:
            changed[:, column] *= np.float32(SPIKE)
    return changed


def robustness(score: Callable[[FloatArray], Floats], x: FloatArray, y: npt.NDArray[np.integer]) -> dict[str, Any]:
    """AUC on vectors (n, features) as they are and under each fault, and how many rows keep the side of 0.5 they were on."""
    plain = score(x)
    found: dict[str, Any] = {"auc": round(auc(y, plain), 4), "faults": {}}
    faults = {"noise": noisy(x), "spike": spiked(x), **{f"without {source}": silent(x, source) for source in SOURCES}}
    for name, vectors in faults.items():
        changed = score(vectors)
        found["faults"][name] = {
            "auc": round(auc(y, changed), 4),
            "mean_score": round(float(changed.mean()), 4),
            "largest_shift": round(float(np.abs(changed - plain).max()), 4),
            "finite": bool(np.isfinite(changed).all()),
        }
    return found
