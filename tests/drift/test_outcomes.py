"""Outcomes: who is labelled when, and whether the intervals hold what they promise."""

import numpy as np
import numpy.typing as npt
import pytest

from drift.outcomes import CHURNED, STAYED, UNKNOWN, Labels, Scored, Treated, at_risk, auc, expected, interventions, labelled, quality
from features.window import DAY_MS

H = 30 * DAY_MS


def days(*values: int) -> npt.NDArray[np.int64]:
    return np.array([value * DAY_MS for value in values], np.int64)


def test_a_score_is_labelled_when_its_horizon_is_over_and_not_before() -> None:
    labels = Labels(np.array([1, 2, 3]), days(40, 100, 100), np.array([True, False, True]))
    cases = [
        (1, 20, CHURNED),
        (1, 5, STAYED),
        (1, 50, UNKNOWN),
        (1, 10, CHURNED),
        (2, 20, STAYED),
        (2, 80, UNKNOWN),
        (3, 70, CHURNED),
        (4, 20, UNKNOWN),
    ]
    scores = Scored(np.array([c for c, _, _ in cases]), days(*(d for _, d, _ in cases)), np.full(len(cases), 0.5))
    assert labelled(scores, labels, H, 100 * DAY_MS).tolist() == [y for _, _, y in cases]


def test_a_busy_customer_counts_once_a_day_with_the_last_score() -> None:
    scores = Scored(np.array([1, 1, 2, 1]), np.array([5, 9, 7, DAY_MS + 1]), np.array([0.1, 0.2, 0.3, 0.4]))
    assert sorted(scores.one_per_period(DAY_MS).probability.tolist()) == [0.2, 0.3, 0.4]


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(1)
    y, p = rng.integers(0, 2, 200), np.round(rng.random(200), 1)
    pairs = p[y == 1][:, None] - p[y == 0][None, :]
    assert auc(y, p) == pytest.approx(float(((pairs > 0) + 0.5 * (pairs == 0)).mean()))


def test_intervals_of_quality_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    covered = {"calibration": 0, "precision": 0}
    for _ in range(40):
        who = np.repeat(np.arange(150), 4)
        p = np.repeat(rng.beta(2, 3, 150), 4)
        y = (rng.random(150) < p[::4]).astype(np.int64).repeat(4)  # one fate per customer
        found = quality(y, p, who, 0.5, rng, 60)
        truth = {"calibration": 0.0, "precision": float(p[p >= 0.5].mean())}
        for name in covered:
            covered[name] += found[name]["low"] <= truth[name] <= found[name]["high"]
    assert min(covered.values()) >= 33  # 95 % of 40 are 38; taking rows for customers would give about 25


def test_the_estimate_before_labels_is_right_for_a_calibrated_model_and_blind_to_concept_drift() -> None:
    rng = np.random.default_rng(3)
    p = rng.beta(1, 3, 3_000)
    promised = expected(p, 0.5, rng, 40)
    right = quality((rng.random(3_000) < p).astype(np.int64), p, np.arange(3_000), 0.5, rng, 50)
    drifted = quality((rng.random(3_000) < p[::-1]).astype(np.int64), p, np.arange(3_000), 0.5, rng, 50)
    assert promised["auc"]["value"] == pytest.approx(right["auc"]["value"], abs=0.02)
    assert drifted["auc"]["value"] < 0.55 < promised["auc"]["low"]
    assert "cannot see concept drift" in promised["statement"]


def test_an_intervention_is_measured_against_its_hold_out_and_money_follows() -> None:
    rng = np.random.default_rng(4)
    arm = rng.random(4_000) < 0.8
    churned = (rng.random(4_000) < np.where(arm, 0.2, 0.3)).astype(np.int64)
    n = np.arange(4_000)
    found = interventions(Treated(n, n, arm, churned, np.full(4_000, 10_000.0), np.full(4_000, 300.0)), rng, 200)
    assert found["churn_prevented"]["low"] < 0.1 < found["churn_prevented"]["high"]
    assert found["revenue_saved_minor"]["value"] == pytest.approx(found["churn_prevented"]["value"] * arm.sum() * 10_000, rel=1e-3)
    assert found["return_on_cost"]["value"] == pytest.approx(found["churn_prevented"]["value"] * 10_000 / 300 - 1, rel=1e-3)
    assert "churn_prevented" not in interventions(Treated(n, n, arm | True, churned, np.ones(4_000), np.ones(4_000)), rng)


def test_revenue_at_risk_is_the_expectation_and_its_chance() -> None:
    found = at_risk(np.array([0.5, 0.1, 0.9]), np.array([1_000.0, 2_000.0, np.nan]), 0.5)
    assert found["expected_loss_minor"]["value"] == 700
    assert found["above_threshold_minor"] == 1_000
