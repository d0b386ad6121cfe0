"""Every figure of scores against labels, each with a bootstrap interval over customers; and the curves a report draws."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS: Final = 20
TOP: Final = 0.1
DRAWS: Final = 300
FIGURES: Final = (
    "auc", "pr_auc", "ks", "lift_top_decile", "capture_top_decile", "brier", "log_loss", "ece", "precision", "recall", "f1", "f2",
)  # fmt: skip
"""lift_top_decile: churned share of the highest tenth over that of all; capture_top_decile: share of the churned in it. ece: expected
calibration error over 20 bins of equally many rows. precision to f2: at the contact threshold. Log loss in nats, the rest in [0, 1]."""


class Scored:
    """Scores (n,) and labels (n,) prepared once, so that the figures of a reweighted sample are a few sums."""

    def __init__(self, y: npt.NDArray[np.integer], score: Floats, contact: float) -> None:
        self.y = y.astype(np.float64)
        self.score = score.astype(np.float64)
        levels, self._level = np.unique(-self.score, return_inverse=True)
        self._levels = len(levels)
        clipped = np.clip(self.score, 1e-15, 1 - 1e-15)
        self._log_loss = -(self.y * np.log(clipped) + (1 - self.y) * np.log1p(-clipped))
        self._called = self.score >= contact
        self._bin = np.empty(len(y), np.int64)
        for number, part in enumerate(np.array_split(np.argsort(self.score, kind="stable"), BINS)):
            self._bin[part] = number

    def curve(self, weight: Floats | None = None) -> tuple[Floats, Floats]:
        """Churned and stayed rows at or above each level of score, highest first (levels,)."""
        w = np.ones(len(self.y)) if weight is None else weight
        hits = np.bincount(self._level, w * self.y, self._levels)
        rest = np.bincount(self._level, w * (1 - self.y), self._levels)
        return np.cumsum(hits), np.cumsum(rest)

    def figures(self, weight: Floats | None = None) -> dict[str, float]:
        """All FIGURES of the rows, each counted `weight` (n,) times; NaN where one class is missing."""
        w = np.ones(len(self.y)) if weight is None else weight
        found, false = self.curve(w)
        churned, stayed = float(found[-1]), float(false[-1])
        total = churned + stayed
        if not (churned and stayed):
            return dict.fromkeys(FIGURES, float("nan"))
        hits, called = np.diff(found, prepend=0.0), found + false
        precision_at = np.divide(found, called, out=np.ones(len(called)), where=called > 0)
        last = min(int(np.searchsorted(called, TOP * total)), len(called) - 1)
        predicted = np.bincount(self._bin, w * self.score, BINS)
        observed = np.bincount(self._bin, w * self.y, BINS)
        tp, picked = float((w * self.y)[self._called].sum()), float(w[self._called].sum())
        precision, recall = tp / picked if picked else 0.0, tp / churned
        return {
            "auc": float(np.sum(np.diff(false, prepend=0.0) * (found - hits / 2)) / (churned * stayed)),
            "pr_auc": float(np.sum(precision_at * hits) / churned),
            "ks": float(np.max(np.abs(found / churned - false / stayed))),
            "lift_top_decile": float(precision_at[last] / (churned / total)),
            "capture_top_decile": float(found[last] / churned),
            "brier": float(np.sum(w * (self.score - self.y) ** 2) / total),
            "log_loss": float(np.sum(w * self._log_loss) / total),
            "ece": float(np.abs(predicted - observed).sum() / total),
            "precision": precision,
            "recall": recall,
            "f1": _f(precision, recall, 1.0),
            "f2": _f(precision, recall, 2.0),
        }


def _f(precision: float, recall: float, beta: float) -> float:
    below = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / below if below else 0.0


@dataclass(frozen=True, slots=True)
class Draws:
    """Bootstrap weights of rows: whole customers drawn with replacement, since one is in several rows that go together."""

    customer: Ints
    count: int = DRAWS
    seed: int = 0

    def weights(self) -> Any:
        """Row weights (n,) of one draw after the other; the same ones every time."""
        rng = np.random.default_rng(self.seed)
        who = np.unique(self.customer, return_inverse=True)[1]
        people = int(who.max()) + 1
        for _ in range(self.count):
            yield np.bincount(rng.integers(0, people, people), minlength=people).astype(np.float64)[who]


def measure(y: npt.NDArray[np.integer], score: Floats, customer: Ints, contact: float, draws: int = DRAWS) -> dict[str, list[float | None]]:
    """Of each figure its value and the ends of its 95 % interval; null where it has none."""
    scored = Scored(y, score, contact)
    value = scored.figures()
    drawn = [scored.figures(weight) for weight in Draws(customer, draws).weights()] if len(y) else []
    found: dict[str, list[float | None]] = {}
    for name in FIGURES:
        known = [figures[name] for figures in drawn if not np.isnan(figures[name])]
        low, high = np.quantile(known, (0.025, 0.975)) if known else (np.nan, np.nan)
        found[name] = [None if np.isnan(x) else round(float(x), 4) for x in (value[name], low, high)]
    return found


def difference(y: npt.NDArray[np.integer], score: Floats, other: Floats, customer: Ints, draws: int = DRAWS) -> tuple[float, float, float]:
    """AUC of `score` less that of `other` on the same rows, with the ends of its paired 95 % bootstrap interval over customers."""
    one, two = Scored(y, score, 0.5), Scored(y, other, 0.5)

    def apart(weight: Floats | None) -> float:
        areas = []
        for scored in (one, two):
            found, false = scored.curve(weight)
            hits = np.diff(found, prepend=0.0)
            areas.append(float(np.sum(np.diff(false, prepend=0.0) * (found - hits / 2)) / (found[-1] * false[-1])))
        return areas[0] - areas[1]

    low, high = np.nanquantile([apart(weight) for weight in Draws(customer, draws).weights()], (0.025, 0.975))
    return apart(None), float(low), float(high)


def calibration(y: npt.NDArray[np.integer], score: Floats, bins: int = BINS) -> list[dict[str, float]]:
    """Per bin of equally many rows, lowest scores first: rows, mean score, churned share."""
    parts = [part for part in np.array_split(np.argsort(score, kind="stable"), bins) if len(part)]
    return [{"rows": len(part), "score": round(float(score[part].mean()), 4), "churned": round(float(y[part].mean()), 4)} for part in parts]


def thinned(x: Floats, y: Floats, points: int = 200) -> list[list[float]]:
    """A curve (n,) as at most so many points, both ends kept."""
    at = np.unique(np.linspace(0, len(x) - 1, min(len(x), points)).astype(np.intp))
    return [[round(float(a), 5), round(float(b), 5)] for a, b in zip(x[at], y[at], strict=True)]
