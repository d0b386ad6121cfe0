"""The gate table: what is required, reached, and attainable; nobody is better than the oracle."""

import numpy as np
import pytest

from models import attainable, evaluate
from models.attainable import Part, Row
from models.calibrate import sigmoid
from proto.errors import ArtifactRejected


def worlds(rows: int, seed: int) -> tuple[Part, np.ndarray]:
    """Two hidden columns decide; returns them with labels, and the true probability."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, 2)).astype(np.float32)
    p = sigmoid(2.0 * hidden[:, 0].astype(np.float64) * (hidden[:, 1] > 0) - 1.5)
    return Part(hidden, (rng.random(rows) < p).astype(np.int8)), p


def test_the_oracle_comes_near_to_the_truth() -> None:
    (early, _), (late, _), (test, p) = (worlds(8_000, seed) for seed in range(3))
    score = attainable.oracle(early, late, test).test
    assert evaluate.auc(test.y, score) > evaluate.auc(test.y, p) - 0.01
    assert evaluate.calibration_error(test.y, score) < 0.03


def test_the_observer_reaches_what_one_of_two_causes_can_tell() -> None:
    """Who sees the first column only can at best rank by it; taught by the oracle, few rows bring the observer there."""
    (early, _), (late, _), (test, p) = (worlds(4_000, seed) for seed in range(3))
    known = attainable.oracle(early, late, test)
    half = [Part(part.seen[:, :1], part.y) for part in (early, late, test)]
    score = attainable.observer(half[0], half[1], half[2], known)
    best = evaluate.auc(test.y, test.seen[:, 0])
    assert best - 0.01 < evaluate.auc(test.y, score.test) < evaluate.auc(test.y, p) - 0.02


def test_figures_by_hand() -> None:
    y = np.array([1, 0, 1, 1, 0, 0])
    found = attainable.figures(y, np.array([0.9, 0.8, 0.7, 0.3, 0.2, 0.1]), contact=0.7, high=0.85)
    assert found["precision_high"] == 1.0
    assert found["precision_contact"] == found["recall_contact"] == pytest.approx(2 / 3)
    assert found["f1_contact"] == pytest.approx(2 / 3)
    assert found["auc"] == pytest.approx(7 / 9)


@pytest.mark.parametrize(
    ("reached", "told", "strict", "verdict"),
    [
        (0.9, 0.95, False, "met"),
        (0.8, 0.95, False, "failed"),  # attainable, and not reached
        (0.78, 0.8, False, "not attainable: required 0.85, oracle 0.960, from events 0.800; within 0.03 of it"),
        (0.78, 0.8, True, "not attainable: required 0.85, oracle 0.960, from events 0.800; strict"),
        (0.7, 0.8, False, "not attainable: required 0.85, oracle 0.960, from events 0.800; too far below"),
        (0.8, None, False, "failed"),  # real data: nobody knows, nothing is excused
    ],
)
def test_a_gate_is_met_or_excused_or_failed(reached: float, told: float | None, strict: bool, verdict: str) -> None:
    row = Row("auc", 0.85, reached, None if told is None else 0.96, told, strict=strict)
    assert row.verdict == verdict
    assert row.passed == (verdict == "met" or verdict.endswith("of it"))


def test_what_the_oracle_reaches_excuses_nothing_by_itself() -> None:
    """Only the observer's figure does: the oracle sees what no event tells."""
    assert not Row("auc", 0.85, 0.8, 0.82).passed


def test_an_error_has_to_lie_below_its_bound_whatever_the_oracle_does() -> None:
    assert Row("calibration_error", 0.02, 0.01, 0.05, 0.05, at_most=True).passed
    assert not Row("calibration_error", 0.02, 0.03, 0.05, 0.05, at_most=True).passed


def test_a_model_better_than_the_oracle_has_seen_the_future() -> None:
    attainable.check_not_above(0.9, 0.9, 0.005)
    with pytest.raises(ArtifactRejected, match="look for the leak"):
        attainable.check_not_above(0.91, 0.9, 0.005)


def test_the_threshold_is_the_lowest_that_reaches_the_precision() -> None:
    score = np.repeat(np.linspace(1, 0, 10), 10)
    y = np.zeros(100, np.int8)
    y[:30], y[30:40:2], y[50] = 1, 1, 1
    found = evaluate.threshold_for(y, score, 0.8)
    assert y[score >= found].mean() >= 0.8
    assert y[score >= np.unique(score)[np.unique(score) < found].max()].mean() < 0.8
    assert evaluate.threshold_for(y * 0, score, 0.8) == pytest.approx(1.0 - 1 / 9)  # none does: 20 rows at least


def test_calibration_error_is_the_distance_of_score_and_share() -> None:
    y = np.array([1, 0] * 500)
    assert evaluate.calibration_error(y, np.full(1000, 0.5)) == pytest.approx(0.0)
    assert evaluate.calibration_error(y, np.full(1000, 0.7)) == pytest.approx(0.2)
