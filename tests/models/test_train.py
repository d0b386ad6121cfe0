"""From rows to a published model: it learns, it repeats itself, and its gates refuse what should not pass."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bench.small_model import small
from features.catalog import CATALOG, N_FEATURES, NAMES, Op
from features.window import DAY_MS
from models import baseline, gates, train
from models.artifact import unpack
from models.calibrate import sigmoid
from models.dataset import SNAPSHOT, Rows, build
from models.evaluate import auc
from models.labels import Label
from models.learners import boosted, direction
from models.session import Session
from models.split import Split
from models.train import Options
from proto.errors import ArtifactRejected, BadInput
from scoring.scorer import load
from tests.models.shop import START, rhythms

LABEL = Label(days=30, active_days=90)
SPLIT = Split(START + 300 * DAY_MS, START + 90 * DAY_MS, START + 420 * DAY_MS, LABEL)
OPTIONS = Options(learners=(boosted("small", depth=2, rounds=20),))


@pytest.fixture(scope="module")
def rows() -> Rows:
    shop = rhythms(customers=600)
    cutoffs = [*SPLIT.train_cutoffs(), *SPLIT.test_cutoffs()]
    return build(shop.customers, shop.facts, LABEL, cutoffs, events=(SPLIT.first, SPLIT.train_last), known_to_ms=SPLIT.end)


def figures(parts: Any) -> Any:
    """Of the test rows, as of Metrics.as_dict."""
    return parts["test"]


def test_it_learns_calibrates_and_beats_recency(rows: Rows) -> None:
    trained = train.train(rows, SPLIT, OPTIONS)
    test, alone = figures(trained.manifest.metrics), figures(trained.manifest.baseline["metrics"])
    assert 0.6 < test["auc"] < 0.95
    assert test["auc"] > alone["auc"]
    low, high = test["auc_interval"]
    assert low < test["auc"] < high
    assert trained.manifest.gates["threshold_flips"] == 0
    scorer = load(trained.envelope, digest=trained.digest)
    snapshots = rows.where((rows.at >= SPLIT.at) & (rows.kind == SNAPSHOT) & (rows.y >= 0))
    assert auc(snapshots.y, scorer.score(snapshots.x)) == pytest.approx(test["auc"], abs=1e-3)


def test_equal_rows_give_equal_bytes(rows: Rows) -> None:
    assert train.train(rows, SPLIT, OPTIONS).envelope == train.train(rows, SPLIT, OPTIONS).envelope


def test_rows_after_the_training_range_cannot_move_the_model(rows: Rows) -> None:
    """Labels and vectors of the gap and of the test are noise here, and the trees stay the same."""
    later = rows.at > SPLIT.train_last
    y = np.where(later & (rows.y >= 0), 1 - rows.y, rows.y).astype(np.int8)
    x = np.where(later[:, None], np.float32(7), rows.x)
    shuffled = np.random.default_rng(0).permutation(int(later.sum()))
    x[later] = rows.x[later][shuffled]
    clean, noisy = train.train(rows, SPLIT, OPTIONS), train.train(replace(rows, x=x, y=y), SPLIT, OPTIONS)
    assert clean.manifest.onnx_sha256 == noisy.manifest.onnx_sha256
    assert clean.manifest.metrics["test"] != noisy.manifest.metrics["test"]


def test_without_a_mature_test_the_model_is_judged_on_the_late_slice(rows: Rows) -> None:
    early = rows.where(rows.at < SPLIT.at)
    manifest = train.train(early, SPLIT, OPTIONS).manifest
    assert set(manifest.metrics) == {"validation"}


def planted(rows: Rows, noise: float) -> Rows:
    """A feature that knows the label."""
    x = rows.x.copy()
    x[:, NAMES.index("ticket_count_30d")] = rows.y + noise * np.random.default_rng(0).normal(size=len(rows))
    return replace(rows, x=x)


def test_a_feature_that_knows_the_label_sounds_the_alarm(rows: Rows) -> None:
    with pytest.raises(ArtifactRejected, match="leak"):
        train.train(planted(rows, 0.1), SPLIT, OPTIONS)
    trained = train.train(planted(rows, 0.1), SPLIT, replace(OPTIONS, allow_high_auc=True))
    assert figures(trained.manifest.metrics)["auc"] > 0.95


def test_too_few_rows_are_said(rows: Rows) -> None:
    with pytest.raises(BadInput, match="both churned and stayed"):
        train.train(rows.where(rows.at > SPLIT.train_last - 10 * DAY_MS), SPLIT, OPTIONS)


def test_columns_without_information_or_bound_to_the_calendar_are_left_out(rows: Rows) -> None:
    columns, dropped = train.columns_of(rows.x)
    assert {"purchase_tenure_days", "tenure_days", "signup_days"} == set(dropped["calendar"])
    assert {"hour_sin", "weekday_cos"} < set(dropped["clock"])
    assert "login_count_7d" in dropped["constant"]
    names = {NAMES[column] for column in columns}
    assert {"purchase_age_days", "purchase_count_90d"} < names
    assert len(names) + sum(len(left) for left in dropped.values()) == N_FEATURES
    with pytest.raises(BadInput, match="nothing can be learnt"):
        train.columns_of(np.zeros((5, N_FEATURES), np.float32))


def test_a_longer_silence_never_lowers_the_risk(rows: Rows) -> None:
    """Monotone by constraint, in the exported graph."""
    session = Session(unpack(train.train(rows, SPLIT, OPTIONS).envelope).onnx)
    x = np.repeat(rows.x[:50], 30, axis=0)
    x[:, NAMES.index("purchase_age_days")] = np.tile(np.linspace(0, 120, 30, dtype=np.float32), 50)
    assert np.all(np.diff(session.probabilities(x).reshape(50, 30), axis=1) >= 0)


def test_directions_belong_to_features_of_the_catalog() -> None:
    up = {feature.name for column, feature in enumerate(CATALOG) if direction(column) == 1}
    down = {feature.name for column, feature in enumerate(CATALOG) if direction(column) == -1}
    assert up == {"purchase_age_days", "purchase_age_per_gap"}
    assert {"purchase_count_30d", "spend_minor_sum_life", "purchase_days_life"} < down
    assert all(CATALOG[NAMES.index(name)].op is not Op.CHANGE for name in down)


def test_the_gate_refuses_a_graph_that_is_not_the_trainers() -> None:
    model = small()
    session = Session(model.onnx)
    expected = sigmoid(0.8 * model.margin() - 0.3)
    assert gates.check_scores(session, model.x, expected, (0.3, 0.6)).parity < 1e-6
    with pytest.raises(ArtifactRejected, match="apart"):
        gates.check_scores(session, model.x, expected + 2e-5, (0.3, 0.6))
    # An edge between the two: as near as they are, they fall on different sides of it.
    row = int(np.argmax(np.abs(session.probabilities(model.x) - expected)))
    between = (float(session.probabilities(model.x)[row]) + expected[row]) / 2
    with pytest.raises(ArtifactRejected, match="another band"):
        gates.check_scores(session, model.x, expected, (between,))
    with pytest.raises(ArtifactRejected, match="learnt nothing"):
        gates.check_scores(session, model.x[:1], expected[:1], (0.3, 0.6))


def test_the_auc_alarm() -> None:
    gates.check_auc(0.95, "test")
    with pytest.raises(ArtifactRejected, match="leak"):
        gates.check_auc(0.951, "test")
    gates.check_auc(0.99, "test", allow=True)
    with pytest.raises(ArtifactRejected, match="one class"):
        gates.check_auc(float("nan"), "test", allow=True)


def test_the_baseline_is_recency_alone(rows: Rows) -> None:
    snapshots = rows.where((rows.kind == SNAPSHOT) & (rows.y >= 0))
    fitted = baseline.fit(snapshots.x, snapshots.y)
    assert fitted.slope > 0
    assert fitted.parity < 1e-6
    recency = snapshots.x[:, NAMES.index("purchase_age_days")]
    assert auc(snapshots.y, fitted.score(snapshots.x)) == pytest.approx(auc(snapshots.y, recency), abs=1e-6)
    never = np.full((1, N_FEATURES), np.nan, np.float32)
    assert fitted.score(never)[0] > 0.99
