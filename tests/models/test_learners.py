"""Every learner that is served is one tree graph that says what the library says; the comparison never looks ahead."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from bench.small_model import vectors
from features.catalog import N_FEATURES
from features.window import DAY_MS
from models import graph, trees
from models.calibrate import Platt
from models.compete import Slice, compete, slices
from models.dataset import SNAPSHOT, Rows
from models.labels import Label
from models.learners import LEARNERS, Columns, Fitted, Learner, boosted
from models.session import Session
from models.split import Split
from models.trees import of_scorecard
from proto.errors import BadInput
from tests.models.shop import START

PLATT = Platt(1.3, -0.4)
COLUMNS = np.array([0, 3, 6, 9, 40, 77])
SPLIT = Split(START + 300 * DAY_MS, START + 90 * DAY_MS, START + 420 * DAY_MS, Label(30, 90))


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Snapshots over 300 days; the risk depends on two columns, and on one of them being known."""
    n, rng = 4_000, np.random.default_rng(5)
    x = vectors(n, 5)
    x[rng.random(n) < 0.3, 40] = 7.0  # a value that many share
    risk = np.nan_to_num(x[:, 3]) - np.nan_to_num(x[:, 6]) * np.isnan(x[:, 9]) + rng.logistic(size=n)
    at = START + np.sort(rng.integers(90, 270, n)) * DAY_MS
    kind, profile = np.full(n, SNAPSHOT, np.uint8), np.zeros((n, 4), np.int64)
    return Rows(x, (risk > 1.2).astype(np.int8), at, np.arange(n), kind, profile, tuple(map(str, range(n))), SPLIT.end)


def hard(rows: Rows) -> np.ndarray:
    """Vectors on the edges of every tree: fitted values and their neighbours, nothing known, the corners."""
    x = rows.x[:600]
    corners = np.stack([np.full(N_FEATURES, v, np.float32) for v in (np.nan, 0.0, 7.0, 3e38, -3e38)])
    return np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf)), corners])


def assert_exact(fitted: Fitted, x: np.ndarray) -> None:
    assert fitted.grown is not None
    grown = trees.scaled(fitted.grown, PLATT)
    onnx = graph.write(grown.forest, N_FEATURES)
    session = Session(onnx)
    expected = PLATT.probabilities(fitted.margin(x))
    assert np.max(np.abs(session.probabilities(x) - expected)) < 5e-6
    assert session.batch_dependent_rows(x[:400]) == 0
    found = graph.read(onnx, N_FEATURES)
    assert set(found.feature[found.feature >= 0]) <= set(COLUMNS.tolist())
    # What passes a node is what passes its children: reasons rest on it.
    asks = grown.forest.feature >= 0
    both = grown.cover[grown.forest.yes[asks]] + grown.cover[grown.forest.no[asks]]
    np.testing.assert_allclose(both, grown.cover[asks], rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, learner in LEARNERS.items() if learner.servable and name not in ("xgboost-d4", "xgboost")])
def test_its_trees_say_what_the_library_says(rows: Rows, name: str) -> None:
    assert_exact(LEARNERS[name].fit(rows, COLUMNS), hard(rows))


def test_a_network_learns_and_is_not_served(rows: Rows) -> None:
    fitted = LEARNERS["mlp"].fit(rows, COLUMNS)
    assert fitted.grown is None
    assert Slice(rows, rows).auc(fitted.margin(rows.x)) > 0.65
    assert np.isfinite(fitted.margin(hard(rows))).all()


def test_early_stopping_ends_before_the_last_round_and_fits_everything(rows: Rows) -> None:
    fitted = LEARNERS["xgboost"].fit(rows, COLUMNS)
    assert 1 < fitted.settings["rounds"] < 500


def test_a_bin_begins_at_its_edge_and_missing_is_a_bin_of_its_own() -> None:
    edge = np.array([1.0, 2.0], np.float32)
    points = np.array([10.0, 20.0, 30.0, 40.0])
    grown = of_scorecard([edge], [points], [np.ones(4)], np.array([2]), 0.0)
    x = np.full((6, N_FEATURES), np.nan, np.float32)
    x[:, 2] = 0.9, 1.0, np.nextafter(np.float32(2), np.float32(0)), 2.0, np.nan, -3e38
    reached = grown.forest.weight[[leaf_of(grown.forest, row) for row in x]]
    assert reached.tolist() == [10.0, 20.0, 20.0, 30.0, 40.0, 10.0]


def leaf_of(forest: graph.Forest, row: np.ndarray) -> int:
    node = int(forest.root[0])
    while forest.feature[node] >= 0:
        value = row[forest.feature[node]]
        yes = forest.missing_yes[node] if np.isnan(value) else value < forest.value[node]
        node = int(forest.yes[node] if yes else forest.no[node])
    return node


FAST = (boosted("trees", depth=2, rounds=15), LEARNERS["logistic"])


def test_ensembles_are_one_graph_and_at_least_as_good_as_the_worst_member(rows: Rows) -> None:
    chain = slices(rows, SPLIT, 30 * DAY_MS, 3)
    found = {one.name: one for one in compete(chain, rows, COLUMNS, FAST, ensembles=True)}
    assert set(found) == {"trees", "logistic", "average", "stack"}
    worst = min(found[name].auc for name in ("trees", "logistic"))
    for name in ("average", "stack"):
        assert found[name].auc > worst - 0.01
        assert len(found[name].aucs) == 3
        assert_exact(found[name].whole(), hard(rows))
    assert "stack" not in {one.name for one in compete(chain[-1:], rows, COLUMNS, FAST, ensembles=True)}


def test_the_chain_is_fitted_on_the_past_with_a_gap(rows: Rows) -> None:
    seen: list[tuple[int, int]] = []

    def spy(part: Rows, columns: Columns) -> Fitted:
        seen.append((int(part.at.min()), int(part.at.max())))
        return Fitted(lambda x: np.nan_to_num(x[:, 3]).astype(np.float64), None, {})

    chain = slices(rows, SPLIT, 30 * DAY_MS, 3)
    compete(chain, rows, COLUMNS, (Learner("spy", "none", spy, servable=False),), ensembles=False)
    assert len(seen) == 3
    for (_, newest), part in zip(seen, chain, strict=True):
        assert newest + SPLIT.label.horizon_ms <= part.late.at.min()
    ends: Sequence[int] = [int(part.late.at.max()) for part in chain]
    assert list(ends) == sorted(ends)
    assert ends[-1] <= SPLIT.train_last
    overlap = [np.intersect1d(a.late.customer, b.late.customer).size for a, b in pairwise(chain)]
    assert overlap == [0, 0]


def test_equal_rows_give_an_equal_learner(rows: Rows) -> None:
    for name in ("forest", "logistic"):
        first, again = (LEARNERS[name].fit(rows, COLUMNS).grown for _ in range(2))
        assert first is not None
        assert again is not None
        assert graph.write(first.forest, N_FEATURES) == graph.write(again.forest, N_FEATURES)


def test_a_chain_without_both_classes_at_its_end_is_refused(rows: Rows) -> None:
    late = rows.at >= SPLIT.train_last - 30 * DAY_MS
    with pytest.raises(BadInput, match="late part"):
        slices(rows.where(~late | (rows.y == 0)), SPLIT, 30 * DAY_MS, 2)
