"""Compiled trees against ONNX Runtime, bit by bit; and what happens when they are not the same."""

from dataclasses import replace

import numpy as np
import pytest

from bench.small_model import small
from features.catalog import N_FEATURES
from models import graph
from models.artifact import unpack
from models.graph import Forest
from models.session import Session
from scoring.scorer import Scorer
from scoring.trees import ROWS, Trees
from tests.scoring.test_treeshap import fitted


@pytest.mark.parametrize(
    ("depth", "trees", "parameters"),
    [(6, 60, {}), (1, 3, {}), (9, 20, {}), (0, 20, {"max_leaves": 30, "grow_policy": "lossguide"}), (4, 30, {"gamma": 20.0})],
)
def test_probabilities_are_those_of_the_runtime_to_the_bit(depth: int, trees: int, parameters: dict[str, object]) -> None:
    forest, _, _, x = fitted(depth, trees, **parameters)
    compiled, session = Trees(forest, N_FEATURES), Session(graph.write(forest, N_FEATURES))
    assert compiled.agrees(session, x)
    x = x[: 2 * ROWS + 3]
    whole = compiled.probabilities(x)
    assert whole.tobytes() == session.probabilities(x).tobytes()
    for first, size in ((0, 1), (5, 3), (ROWS - 1, 2), (17, ROWS + 1), (3, 0)):
        assert compiled.probabilities(x[first : first + size]).tobytes() == whole[first : first + size].tobytes()


def _other(forest: Forest, fault: str) -> Forest:
    leaves, asks = np.flatnonzero(forest.feature < 0), np.flatnonzero(forest.feature >= 0)
    weight, value, missing_yes = forest.weight.copy(), forest.value.copy(), forest.missing_yes.copy()
    match fault:
        case "order":  # the same trees from the back to the front
            rest = np.append(forest.root, forest.n_nodes)
            order = np.concatenate([np.arange(a, b) for a, b in zip(rest[-2::-1], rest[:0:-1], strict=True)])
            place = np.empty(forest.n_nodes, np.int32)
            place[order] = np.arange(forest.n_nodes)
            moved = {name: getattr(forest, name)[order] for name in ("feature", "value", "missing_yes", "weight")}
            yes, no = (np.where(forest.feature < 0, -1, place[child])[order].astype(np.int32) for child in (forest.yes, forest.no))
            return replace(forest, root=place[forest.root[::-1]], yes=yes, no=no, **moved)
        case "weight":
            weight[leaves] = np.nextafter(weight[leaves], np.float32(1))
        case "threshold":
            value[asks[0]] = np.nextafter(value[asks[0]], np.float32(np.inf))
        case "missing":
            missing_yes[asks[0]] = not missing_yes[asks[0]]
    return replace(forest, weight=weight, value=value, missing_yes=missing_yes)


@pytest.mark.parametrize("fault", ["order", "weight", "threshold", "missing"])
def test_another_order_of_additions_or_one_other_threshold_is_seen(fault: str) -> None:
    forest, _, _, x = fitted(4, 40)
    session = Session(graph.write(forest, N_FEATURES))
    assert not Trees(_other(forest, fault), N_FEATURES).agrees(session, x[:64])


def test_a_model_whose_trees_do_not_agree_is_scored_by_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = unpack(small().envelope)
    assert isinstance(Scorer(artifact)._evaluator, Trees)
    monkeypatch.setattr("scoring.scorer.Trees", lambda forest, n: Trees(_other(forest, "threshold"), n))
    scorer = Scorer(artifact)
    assert isinstance(scorer._evaluator, Session)
    assert scorer.score(small().x).tobytes() == Session(artifact.onnx).probabilities(small().x).tobytes()


def test_vectors_of_another_width_are_refused() -> None:
    forest, _, _, x = fitted(2, 3)
    with pytest.raises(ValueError, match="columns"):
        Trees(forest, N_FEATURES).probabilities(x[:, :-1])
