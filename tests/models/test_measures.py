"""Figures, gates of safety and tuning against slow or seeded counterparts."""

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from features.catalog import N_FEATURES, NAMES
from models import fairness, measures, robust, safety
from models.calibrate import sigmoid
from models.dataset import SNAPSHOT, Rows
from models.policy import Policy, load
from models.safety import Rival
from proto.errors import BadInput


def scored(n: int = 4_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    margin = rng.normal(-1.5, 1.5, n)
    return (rng.random(n) < sigmoid(margin)).astype(np.int8), np.round(sigmoid(margin), 2)  # with ties


def test_figures_are_those_of_scikit_learn() -> None:
    y, score = scored()
    found = measures.Scored(y, score, 0.4).figures()
    called = score >= 0.4
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(y, score))
    assert found["pr_auc"] == pytest.approx(metrics.average_precision_score(y, score))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(y, score))
    assert found["log_loss"] == pytest.approx(metrics.log_loss(y, np.clip(score, 1e-15, 1 - 1e-15)))
    assert found["precision"] == pytest.approx(metrics.precision_score(y, called))
    assert found["recall"] == pytest.approx(metrics.recall_score(y, called))
    assert (found["f1"], found["f2"]) == pytest.approx((metrics.f1_score(y, called), metrics.fbeta_score(y, called, beta=2)))
    fpr, tpr, _ = metrics.roc_curve(y, score)
    assert found["ks"] == pytest.approx(np.max(tpr - fpr))
    top = np.sort(score)[::-1][len(y) // 10 - 1]
    assert found["capture_top_decile"] == pytest.approx(y[score >= top].sum() / y.sum())


def test_a_weight_of_two_is_a_row_twice_and_intervals_hold_the_value() -> None:
    y, score = scored(500)
    weight = np.random.default_rng(1).integers(0, 3, 500)
    again = measures.Scored(np.repeat(y, weight), np.repeat(score, weight), 0.4).figures()
    weighted = measures.Scored(y, score, 0.4).figures(weight.astype(np.float64))
    same = [name for name in measures.FIGURES if name != "ece"]  # its bins are those of the whole sample
    assert [weighted[name] for name in same] == pytest.approx([again[name] for name in same])
    for value, low, high in measures.measure(y, score, np.arange(500), 0.4, draws=50).values():
        assert low is not None
        assert high is not None
        assert value is not None
        assert low < high
        assert low - 0.02 <= value <= high + 0.02


def rows_of(seed: int = 0, n: int = 3_000) -> Rows:
    """Rows whose risk follows the age of the last purchase."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, N_FEATURES), np.float32)
    x[:, NAMES.index("purchase_age_days")] = rng.exponential(30, n)
    x[:, NAMES.index("login_count_7d")] = rng.poisson(2, n)
    y = (rng.random(n) < risk(x)).astype(np.int8)
    group = rng.integers(1, 4, (n, 4))
    return Rows(x, y, np.zeros(n, np.int64), np.arange(n), np.full(n, SNAPSHOT, np.uint8), group, tuple(map(str, range(n))), 0)


def risk(x: np.ndarray) -> np.ndarray:
    margin = x[:, NAMES.index("purchase_age_days")] / 20 - 0.5 * np.minimum(x[:, NAMES.index("login_count_7d")], 3) - 1
    return sigmoid(np.nan_to_num(margin.astype(np.float64)))


EXACT = {"onnx_parity_max": 1e-7, "threshold_flips": 0, "batch_dependent_rows": 0}


def test_a_sound_model_passes_and_each_sabotage_is_refused_by_its_own_gate() -> None:
    test, policy = rows_of(), Policy(source=0.55)
    sound = safety.measure(test, risk, 0.5, EXACT, policy, rival=Rival("old", "0" * 64, np.full(3_000, 0.5)))
    assert [row.gate for row in sound.gates if not row.passed] == []

    def unfair(x: np.ndarray) -> np.ndarray:  # one group of three is hardly ever found
        return np.asarray(np.where(test.profile[:, 3] == 1, 0.2, 1.0) * risk(x))

    def hot(x: np.ndarray) -> np.ndarray:  # a burst turns the order round
        return np.asarray(np.where(x[:, NAMES.index("login_count_7d")] > 9, 1 - risk(x), risk(x)))

    def failed(score: object, rival: Rival | None = None) -> list[str]:
        found = safety.measure(test, score, 0.5, EXACT, policy, rival=rival)  # type: ignore[arg-type]  # called as one
        return [row.gate for row in found.gates if not row.passed]

    assert failed(unfair) == ["fairness_age_band"]
    assert "robust_spike" in failed(hot)
    assert "robust_finite" in failed(lambda x: np.where(np.isnan(x[:, 0]), np.nan, risk(x)))  # a silent source gives no probability
    better = Rival("better", "1" * 64, np.clip(risk(test.x) + 0.3 * (test.y - 0.5), 0, 1))
    assert failed(risk, better) == ["better_than_champion"]
    assert failed(risk, Rival("same", "1" * 64, risk(test.x))) == ["better_than_champion"]  # as good is not better


def test_groups_are_compared_by_recall_and_small_ones_are_not_judged() -> None:
    y = np.array([1] * 100 + [0] * 100 + [1] * 100 + [0] * 100 + [1])
    group = np.array([1] * 200 + [2] * 200 + [3])
    score = np.concatenate([np.repeat([0.9, 0.1], [80, 120]), np.repeat([0.9, 0.1], [50, 150]), [0.1]])
    found = fairness.differences(y, score, 0.5, group, np.arange(401), 50)
    assert (found["equal_opportunity"], found["demographic_parity"], found["groups"]) == (pytest.approx(0.3), pytest.approx(0.15), 2)
    low, high = found["interval"]
    assert 0.1 < low < 0.3 < high < 0.5
    listed = fairness.by_group(y, score, 0.5, group, {1: "young"}, 50)
    assert [(entry["group"], entry["judged"]) for entry in listed] == [("young", True), ("#000002", True), ("#000003", False)]


def test_faults_change_what_they_say() -> None:
    x = rows_of(n=50).x + 1
    spiked, silent = robust.spiked(x), robust.silent(x, "logins")
    assert np.array_equal(spiked[:, NAMES.index("login_count_7d")], 10 * x[:, NAMES.index("login_count_7d")])
    assert np.array_equal(spiked[:, NAMES.index("purchase_age_days")], x[:, NAMES.index("purchase_age_days")])
    assert np.all(silent[:, NAMES.index("login_count_7d")] == 0)
    assert np.isnan(silent[:, NAMES.index("login_age_days")]).all()
    assert np.array_equal(silent[:, NAMES.index("purchase_age_days")], x[:, NAMES.index("purchase_age_days")])


def test_a_policy_file_changes_bounds_and_says_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "gates.toml"
    file.write_text('recall_contact = 0.5\nprotected = ["region"]\n')
    assert (load(file).recall_contact, load(file).auc, load(file).protected) == (0.5, 0.85, ("region",))
    file.write_text("recall_contact = 2\n")
    with pytest.raises(BadInput, match="recall_contact"):
        load(file)
    with pytest.raises(BadInput, match="No such file"):
        load(tmp_path / "none.toml")
