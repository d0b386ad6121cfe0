"""What a retention campaign would have been worth at each threshold, on rows whose outcome is known; and thresholds by constraint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.measures import Draws, Floats, Ints
from proto.errors import BadInput

THRESHOLDS: Final = tuple(round(0.02 * step, 2) for step in range(1, 50))
DRAWS: Final = 300


@dataclass(frozen=True, slots=True)
class Campaign:
    """What an offer costs and brings, in one currency. success: share of the contacted churners who stay because of it; capacity: contacts
    of one campaign, 0 = no bound; budget: money of one campaign, None = no bound."""

    cost: float
    success: float
    capacity: int = 0
    budget: float | None = None

    @property
    def contacts(self) -> int | None:
        """The bound on contacts that follows from capacity and budget; None = none."""
        bounds = [self.capacity] if self.capacity else []
        if self.budget is not None and self.cost > 0:
            bounds.append(int(self.budget / self.cost))
        return min(bounds, default=None)


def contacted(score: Floats, at: Ints, threshold: float, most: int | None) -> npt.NDArray[np.bool_]:
    """Who is contacted: scores (n,) from the threshold on, at each instant the highest `most` of them (None = all)."""
    chosen: npt.NDArray[np.bool_] = score >= threshold
    if most is not None:
        for instant in np.unique(at).tolist():
            here = np.flatnonzero(chosen & (at == instant))
            if len(here) > most:
                chosen[here[np.argsort(-score[here], kind="stable")[most:]]] = False
    return chosen


def over_thresholds(
    y: npt.NDArray[np.integer], score: Floats, at: Ints, customer: Ints, benefit: Floats, campaign: Campaign, draws: int = DRAWS
) -> list[dict[str, Any]]:
    """Per threshold, means of a campaign at one instant: contacts, offers' cost, saved revenue and what is left of it with its interval.

    benefit: revenue kept when the customer stays (n,). The interval is a bootstrap over customers.
    """
    instants = len(np.unique(at))
    chosen = np.stack([contacted(score, at, threshold, campaign.contacts) for threshold in THRESHOLDS])
    gain = campaign.success * benefit * y - campaign.cost
    saved = campaign.success * benefit * y
    drawn = np.array([chosen @ (weight * gain) for weight in Draws(customer, draws).weights()]) / instants
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    found = []
    for i, threshold in enumerate(THRESHOLDS):
        count = int(chosen[i].sum())
        found.append(
            {
                "threshold": threshold,
                "contacts": round(count / instants, 1),
                "churned": round(float(y[chosen[i]].sum()) / instants, 1),
                "cost": round(campaign.cost * count / instants, 2),
                "saved_revenue": round(float(saved[chosen[i]].sum()) / instants, 2),
                "net": round(float(gain[chosen[i]].sum()) / instants, 2),
                "net_interval": [round(float(low[i]), 2), round(float(high[i]), 2)],
            }
        )
    return found


def by_group(
    y: npt.NDArray[np.integer], score: Floats, at: Ints, groups: Sequence[str], benefit: Floats, campaign: Campaign, threshold: float
) -> list[dict[str, Any]]:
    """The campaign at one threshold, by group."""
    instants = len(np.unique(at))
    chosen = contacted(score, at, threshold, campaign.contacts)
    names = np.array(groups)
    found = []
    for name in np.unique(names).tolist():
        here = chosen & (names == name)
        saved = float((campaign.success * benefit * y)[here].sum()) / instants
        cost = campaign.cost * float(here.sum()) / instants
        found.append(
            {
                "group": name,
                "contacts": round(float(here.sum()) / instants, 1),
                "cost": round(cost, 2),
                "saved_revenue": round(saved, 2),
                "net": round(saved - cost, 2),
            }
        )
    return found


def by_constraint(y: npt.NDArray[np.integer], score: Floats, recall: float, precision: float) -> dict[str, Any]:
    """The threshold of the highest recall among those that reach both; where none does, how far either goes with the other held."""
    if not (y == 1).any():
        raise BadInput("what-if: nobody churned among the judged rows")
    order = np.argsort(-score, kind="stable")
    hits, called = np.cumsum(y[order]).astype(np.float64), np.arange(1, len(order) + 1)
    last = np.append(np.diff(score[order]) != 0, True)
    reached_recall, reached_precision = (hits / hits[-1])[last], (hits / called)[last]
    levels = score[order][last]
    both = (reached_recall >= recall) & (reached_precision >= precision)
    if both.any():
        chosen = int(np.flatnonzero(both)[np.argmax(reached_recall[both])])
        return {
            "feasible": True,
            "threshold": round(float(levels[chosen]), 4),
            "recall": round(float(reached_recall[chosen]), 4),
            "precision": round(float(reached_precision[chosen]), 4),
        }
    precise, complete = reached_precision >= precision, reached_recall >= recall
    return {
        "feasible": False,
        "best_recall_at_precision": round(float(reached_recall[precise].max()), 4) if precise.any() else None,
        "best_precision_at_recall": round(float(reached_precision[complete].max()), 4) if complete.any() else None,
    }
