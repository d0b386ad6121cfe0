"""Scores against what became of the customers: quality with intervals, an estimate before that, and the money."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drift.series import Floats, Ints
from features.window import DAY_MS

DRAWS: Final = 400
BLIND: Final = (
    "This is what the model expects of itself, from its own scores. It cannot see concept drift: if the same customers now leave for other "
    "reasons, it stays as it is. Only labels show that."
)
CHURNED, STAYED, UNKNOWN = 1, 0, -1


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of n customers and instants: customer (n,) as a number, at (n,) epoch ms, probability (n,)."""

    customer: Ints
    at: Ints
    probability: Floats

    def one_per_period(self, period_ms: int) -> "Scored":
        """The last score of each customer in each period: a busy customer is not counted a hundred times."""
        order = np.lexsort((self.at, self.customer))
        key = np.column_stack([self.customer[order], self.at[order] // period_ms])
        last = np.append((key[1:] != key[:-1]).any(axis=1), True) if len(order) else np.zeros(0, np.bool_)
        kept = order[last]
        return Scored(self.customer[kept], self.at[kept], self.probability[kept])


@dataclass(frozen=True, slots=True)
class Labels:
    """What is known of k outcomes: customer (k,), at (k,) epoch ms, churned (k,)."""

    customer: Ints
    at: Ints
    churned: npt.NDArray[np.bool_]


def labelled(scores: Scored, labels: Labels, horizon_ms: int, known_to_ms: int) -> Ints:
    """CHURNED, STAYED or UNKNOWN (n,) of each score: whether its customer churned in (at, at + horizon].

    A score is mature when the horizon lies behind `known_to_ms`. A "stayed" says that the customer was still there at its instant: a mature
    score is STAYED when one comes at the end of its horizon or later, or when somebody's outcomes are complete; a customer without any
    outcome, or whose churn lies before the score, is UNKNOWN.
    """
    order = np.lexsort((labels.at, labels.customer))
    customer, at, churned = labels.customer[order], labels.at[order], labels.churned[order]
    found = np.full(len(scores.at), UNKNOWN, np.int64)
    first = np.searchsorted(customer, scores.customer, "left")
    last = np.searchsorted(customer, scores.customer, "right")
    for i, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        begin = int(scores.at[i])
        if a == b or begin + horizon_ms > known_to_ms:
            continue
        times, gone = at[a:b], churned[a:b]
        if (gone & (times <= begin)).any():
            continue
        within = gone & (times > begin) & (times <= begin + horizon_ms)
        if within.any():
            found[i] = CHURNED
        elif (times >= begin + horizon_ms).any():  # stayed, or churned later
            found[i] = STAYED
    return found


def auc(y: npt.NDArray[np.integer], p: Floats) -> float:
    """Area under the ROC curve, ties by half; NaN when one class is missing."""
    ones = int((y == 1).sum())
    if ones in (0, len(y)):
        return float("nan")
    _, where, counts = np.unique(p, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[where]
    return float((ranks[y == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(y) - ones)))


def _measures(y: Ints, p: Floats, threshold: float) -> dict[str, float]:
    flagged = p >= threshold
    return {
        "auc": auc(y, p),
        "precision": float(y[flagged].mean()) if flagged.any() else float("nan"),
        "recall": float(flagged[y == 1].mean()) if (y == 1).any() else float("nan"),
        "calibration": float(p.mean() - y.mean()),
        "brier": float(((p - y) ** 2).mean()),
    }


def quality(y: Ints, p: Floats, customer: Ints, threshold: float, rng: np.random.Generator, draws: int = DRAWS) -> dict[str, Any]:
    """AUC, precision and recall at a threshold, calibration (mean score minus share that churned), Brier; each {value, low, high}.

    Intervals are 95 % by bootstrap over customers, since scores of one customer are not independent. None where it cannot be said.
    """
    names, where = np.unique(customer, return_inverse=True)
    rows = np.argsort(where, kind="stable")
    bounds = np.searchsorted(where[rows], np.arange(len(names) + 1))
    value = _measures(y, p, threshold) if len(y) else dict.fromkeys(("auc", "precision", "recall", "calibration", "brier"), float("nan"))
    sampled: dict[str, list[float]] = {name: [] for name in value}
    for _ in range(draws if len(names) > 1 else 0):
        drawn = rng.integers(0, len(names), len(names))
        lengths = bounds[drawn + 1] - bounds[drawn]
        # The rows of each drawn customer, one after the other.
        place = np.repeat(bounds[drawn] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(lengths.sum())
        these = rows[place]
        for name, one in _measures(y[these], p[these], threshold).items():
            sampled[name].append(one)
    return {name: _interval(value[name], np.array(sampled[name])) for name in value}


def _interval(value: float, sampled: Floats) -> dict[str, float | None]:
    sampled = sampled[np.isfinite(sampled)]
    low, high = np.quantile(sampled, (0.025, 0.975)) if len(sampled) >= 20 else (np.nan, np.nan)
    return {k: None if np.isnan(x) else round(float(x), 5) for k, x in (("value", value), ("low", low), ("high", high))}


def expected(p: Floats, threshold: float, rng: np.random.Generator, draws: int = DRAWS) -> dict[str, Any]:
    """AUC, precision, recall as the scores themselves promise, before labels: outcomes are drawn from them. With the plain statement."""
    if not len(p):
        return {"statement": BLIND}
    found = [_measures((rng.random(len(p)) < p).astype(np.int64), p, threshold) for _ in range(draws)]
    values = {name: np.array([one[name] for one in found]) for name in ("auc", "precision", "recall")}
    return {**{name: _interval(float(np.nanmean(v)), v) for name, v in values.items()}, "statement": BLIND}


@dataclass(frozen=True, slots=True)
class Treated:
    """m interventions: customer (m,), at (m,), treatment or hold-out (m,), churned afterwards (m,) CHURNED, STAYED, UNKNOWN; money."""

    customer: Ints
    at: Ints
    treatment: npt.NDArray[np.bool_]
    churned: Ints
    value_minor: Floats  # a year of the customer, NaN = not stated
    cost_minor: Floats


def interventions(treated: Treated, rng: np.random.Generator, draws: int = DRAWS) -> dict[str, Any]:
    """Churn of treatment and hold-out, what the intervention prevents, revenue saved and return; intervals by bootstrap over customers.

    Only against a hold-out of the same campaign is it an effect. Money is minor units; revenue saved = fewer churned x mean yearly value.
    """
    known = treated.churned >= 0
    arm, y = treated.treatment[known], treated.churned[known]
    value, cost = treated.value_minor[known], np.nan_to_num(treated.cost_minor[known])
    n, m = int(arm.sum()), int((~arm).sum())
    report: dict[str, Any] = {
        "treated": n,
        "held_out": m,
        "unknown": int((~known).sum()),
        "evidence": "randomised" if m else "none: no hold-out",
    }
    if not n or not m:
        return report

    def measure(rows: Ints) -> tuple[float, float, float, float, float]:
        a, b = y[rows][arm[rows]], y[rows][~arm[rows]]
        if not len(a) or not len(b):
            return np.nan, np.nan, np.nan, np.nan, np.nan
        effect = float(b.mean() - a.mean())
        worth = value[rows][arm[rows]]
        mean_value = float(np.nanmean(worth)) if np.isfinite(worth).any() else np.nan
        saved = effect * n * mean_value
        spent = float(cost[rows][arm[rows]].mean()) * n
        return float(a.mean()), float(b.mean()), effect, saved, (saved - spent) / spent if spent > 0 else np.nan

    everything = measure(np.arange(len(y)))
    sampled = np.array([measure(rng.integers(0, len(y), len(y))) for _ in range(draws)])
    names = ("churn_treated", "churn_held_out", "churn_prevented", "revenue_saved_minor", "return_on_cost")
    return report | {name: _interval(one, sampled[:, i]) for i, (name, one) in enumerate(zip(names, everything, strict=True))}


def at_risk(p: Floats, value_minor: Floats, threshold: float) -> dict[str, Any]:
    """Revenue of a year that the scores expect to be lost, and that of the customers above the threshold; minor units.

    The interval is that of independent departures: what chance alone makes of right probabilities.
    """
    known = np.isfinite(value_minor)
    p, value = p[known], value_minor[known]
    lost, spread = float((p * value).sum()), float(np.sqrt((p * (1 - p) * value**2).sum()))
    return {
        "customers": len(p),
        "expected_loss_minor": {"value": round(lost), "low": round(max(lost - 1.96 * spread, 0)), "high": round(lost + 1.96 * spread)},
        "above_threshold_minor": round(float(value[p >= threshold].sum())),
        "evidence": "estimated from the scores",
    }


def by_month(y: Ints, p: Floats, at: Ints, customer: Ints, threshold: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Quality by stretches of 30 days of the scores, those with at least 50 labels."""
    month = at // (30 * DAY_MS)
    found = []
    for one in np.unique(month).tolist():
        which = month == one
        if which.sum() >= 50:
            begin = {"from_ms": one * 30 * DAY_MS, "labels": int(which.sum())}
            found.append(begin | quality(y[which], p[which], customer[which], threshold, rng, 200))
    return found
