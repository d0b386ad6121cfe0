"""A campaign by hand, its bounds, and constraints that can and cannot be met."""

from typing import Any

import numpy as np
import pytest

from models import what_if
from models.what_if import Campaign

Y = np.array([1, 0, 1, 0, 1, 0, 0, 0])
SCORE = np.array([0.9, 0.7, 0.5, 0.1, 0.8, 0.6, 0.4, 0.2])
AT = np.array([1, 1, 1, 1, 2, 2, 2, 2])
WHO = np.arange(8)
WORTH = np.full(8, 100.0)


def at(threshold: float, campaign: Campaign) -> dict[str, Any]:
    table = what_if.over_thresholds(Y, SCORE, AT, WHO, WORTH, campaign, draws=40)
    return next(entry for entry in table if entry["threshold"] == threshold)


def test_money_by_hand() -> None:
    found = at(0.5, Campaign(cost=5, success=0.5))
    # Two instants: 5 contacts, 3 of them churn: 150 saved, 25 spent.
    assert (found["contacts"], found["churned"], found["cost"], found["saved_revenue"], found["net"]) == (2.5, 1.5, 12.5, 75.0, 62.5)
    low, high = found["net_interval"]
    assert low < 62.5 < high


def test_capacity_and_budget_keep_the_highest_of_each_instant() -> None:
    assert what_if.contacted(SCORE, AT, 0.5, 1).tolist() == [True, False, False, False, True, False, False, False]
    for campaign in (Campaign(5, 0.5, capacity=1), Campaign(5, 0.5, budget=9.99), Campaign(5, 0.5, capacity=3, budget=5)):
        assert (campaign.contacts, at(0.5, campaign)["contacts"]) == (1, 1.0)


def test_a_budget_below_one_offer_contacts_nobody() -> None:
    assert at(0.5, Campaign(5, 0.5, budget=4))["contacts"] == 0


def test_groups_add_up_to_the_whole() -> None:
    campaign = Campaign(5, 0.5)
    parts = what_if.by_group(Y, SCORE, AT, ["a", "b"] * 4, WORTH, campaign, 0.5)
    assert sum(part["net"] for part in parts) == pytest.approx(at(0.5, campaign)["net"])


def test_constraints_are_met_with_the_highest_recall_or_called_infeasible() -> None:
    assert what_if.by_constraint(Y, SCORE, 0.6, 1.0) == {"feasible": True, "threshold": 0.8, "recall": 0.6667, "precision": 1.0}
    assert what_if.by_constraint(Y, SCORE, 0.6, 0.6) == {"feasible": True, "threshold": 0.5, "recall": 1.0, "precision": 0.6}
    no = what_if.by_constraint(Y, SCORE, 0.9, 0.9)
    assert no == {"feasible": False, "best_recall_at_precision": 0.6667, "best_precision_at_recall": 0.6}
