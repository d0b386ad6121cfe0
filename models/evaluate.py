"""How good scores are: ranking (AUC, average precision), probabilities (Brier, log loss), with an interval over customers."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

DRAWS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures over n rows. Rates and areas lie in [0, 1]; log loss is in nats; NaN where one class is missing."""

    rows: int
    customers: int
    base_rate: float
    mean_score: float
    auc: float
    auc_interval: tuple[float, float]
    average_precision: float
    brier: float
    log_loss: float

    def as_dict(self) -> dict[str, object]:
        """JSON types, rounded to 4 decimals; null for NaN."""
        figures = {name: getattr(self, name) for name in ("base_rate", "mean_score", "auc", "average_precision", "brier", "log_loss")}
        rounded: dict[str, object] = {name: _rounded(value) for name, value in figures.items()}
        return {"rows": self.rows, "customers": self.customers, **rounded, "auc_interval": [_rounded(edge) for edge in self.auc_interval]}


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def measure(
    label: npt.NDArray[np.integer], score: npt.NDArray[np.floating], customer: IntArray, *, seed: int = 0, draws: int = DRAWS
) -> Metrics:
    """All figures of scores (n,) against labels 0 or 1 (n,); customer (n,) groups the rows that are drawn together."""
    y = label.astype(np.float64)
    p = score.astype(np.float64)
    clipped = np.clip(p, 1e-15, 1 - 1e-15)
    both = 0 < y.sum() < len(y)
    return Metrics(
        rows=len(y),
        customers=len(np.unique(customer)),
        base_rate=float(y.mean()) if len(y) else float("nan"),
        mean_score=float(p.mean()) if len(y) else float("nan"),
        auc=auc(label, score),
        auc_interval=auc_interval(label, score, customer, np.random.default_rng(seed), draws) if both else (float("nan"), float("nan")),
        average_precision=average_precision(label, score),
        brier=float(np.mean((p - y) ** 2)) if len(y) else float("nan"),
        log_loss=float(-np.mean(y * np.log(clipped) + (1 - y) * np.log1p(-clipped))) if len(y) else float("nan"),
    )


def auc(label: npt.NDArray[np.integer], score: npt.NDArray[np.floating]) -> float:
    """Area under the ROC curve: the chance that a churned row scores above a stayed one, ties counting half. NaN with one class."""
    level = np.unique(score, return_inverse=True)[1]
    y = label.astype(np.float64)
    churned, stayed = np.bincount(level, y), np.bincount(level, 1 - y)
    total = float(churned.sum() * stayed.sum())
    return float(churned @ (np.cumsum(stayed) - stayed / 2)) / total if total else float("nan")


def average_precision(label: npt.NDArray[np.integer], score: npt.NDArray[np.floating]) -> float:
    """Area under precision over recall, as a sum of steps; rows with equal scores enter together. NaN without a churned row."""
    levels, level = np.unique(-score, return_inverse=True)
    hits = np.bincount(level, label.astype(np.float64), len(levels))
    if not hits.sum():
        return float("nan")
    precision = np.cumsum(hits) / np.cumsum(np.bincount(level, minlength=len(levels)))
    return float(np.sum(precision * hits) / hits.sum())


def calibration_error(label: npt.NDArray[np.integer], score: npt.NDArray[np.floating], bins: int = 20) -> float:
    """Expected calibration error: mean distance of score and churned share over bins of equally many rows; NaN without rows."""
    order = np.argsort(score, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    apart = [len(part) * abs(float(score[part].mean()) - float(label[part].mean())) for part in parts]
    return sum(apart) / len(order) if len(order) else float("nan")


def threshold_for(label: npt.NDArray[np.integer], score: npt.NDArray[np.floating], precision: float) -> float:
    """The lowest score from which on the rows (n,) reach a precision; where none does, that of the best precision over 20 rows or more."""
    order = np.argsort(-score, kind="stable")
    found = np.cumsum(label[order]) / np.arange(1, len(order) + 1)
    # Rows with equal scores enter together; the first few rows say little.
    last = np.append(np.diff(score[order]) != 0, True) & (np.arange(1, len(order) + 1) >= 20)
    if not last.any():
        return 0.5
    good = np.flatnonzero(last & (found >= precision))
    chosen = good[-1] if len(good) else np.flatnonzero(last)[np.argmax(found[last])]
    return float(score[order][chosen])


def auc_interval(
    label: npt.NDArray[np.integer], score: npt.NDArray[np.floating], customer: IntArray, rng: np.random.Generator, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % bootstrap interval of the AUC, drawing whole customers, since one is in several rows that go together."""
    who = np.unique(customer, return_inverse=True)[1]
    people = int(who.max()) + 1
    # Sorted once by score: a draw then is one running sum of the stayed, read where each row's equals begin and end.
    order = np.argsort(score, kind="stable")
    y, who, sorted_score = label[order].astype(np.float64), who[order], score[order]
    begin = np.searchsorted(sorted_score, sorted_score, side="left")
    end = np.searchsorted(sorted_score, sorted_score, side="right")
    below = np.zeros(len(y) + 1)
    areas = []
    for _ in range(draws):
        weight = np.bincount(rng.integers(0, people, people), minlength=people).astype(np.float64)[who]
        churned = weight * y
        np.cumsum(weight - churned, out=below[1:])
        total = churned.sum() * below[-1]
        areas.append(churned @ (below[begin] + below[end]) / 2 / total if total else np.nan)
    low, high = np.nanquantile(areas, (0.025, 0.975))
    return float(low), float(high)
