"""Exact contributions: XGBoost's own, and those of the definition itself on forests small enough to try every coalition."""

from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xgboost

from bench.small_model import vectors
from features.catalog import N_FEATURES
from models import export
from models.graph import Forest
from scoring.treeshap import ROWS, TreeShap

TOLERANCE = 1e-5


def fitted(depth: int, trees: int, **parameters: Any) -> tuple[Forest, npt.NDArray[np.float64], xgboost.Booster, npt.NDArray[np.float32]]:
    """A booster of random data with its forest, shares and vectors."""
    x = vectors(2_000, depth)
    y = np.nan_to_num(x[:, 0]) * np.nan_to_num(x[:, 1]) + np.nan_to_num(x[:, 2]) > 0.2
    settings = {"objective": "binary:logistic", "max_depth": depth, "eta": 0.3, "nthread": 1, "min_child_weight": 0.0, **parameters}
    booster = xgboost.train(settings, xgboost.DMatrix(x, label=y), trees)
    forest = export.forest_of(booster, np.arange(N_FEATURES))
    return forest, export.shares(forest, export.covers(booster)), booster, x


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(1, {}), (2, {}), (3, {}), (4, {}), (6, {}), (8, {}), (0, {"max_leaves": 20, "grow_policy": "lossguide"}), (6, {"gamma": 2.0})],
)
def test_contributions_are_those_of_xgboost(depth: int, parameters: dict[str, Any]) -> None:
    forest, share, booster, x = fitted(depth, 30, **parameters)
    found = TreeShap(forest, share, N_FEATURES).contributions(x)
    theirs = booster.predict(xgboost.DMatrix(x), pred_contribs=True)
    assert np.abs(theirs[:, :-1]).max() > 0.3
    assert np.abs(found - theirs[:, :-1]).max() < TOLERANCE


def test_a_wrong_share_is_seen() -> None:
    forest, share, booster, x = fitted(4, 5)
    wrong = share.copy()
    wrong[forest.root[0]] = 1 - wrong[forest.root[0]]
    theirs = booster.predict(xgboost.DMatrix(x), pred_contribs=True)
    assert np.abs(TreeShap(forest, wrong, N_FEATURES).contributions(x) - theirs[:, :-1]).max() > TOLERANCE


def answer(forest: Forest, share: npt.NDArray[np.float64], node: int, row: npt.NDArray[np.float32], known: frozenset[int]) -> float:
    """What a tree says when only some features are known: the definition."""
    feature = int(forest.feature[node])
    if feature < 0:
        return float(forest.weight[node])
    yes, no = int(forest.yes[node]), int(forest.no[node])
    if feature in known:
        value = row[feature]
        goes_yes = bool(forest.missing_yes[node]) if np.isnan(value) else bool(value < forest.value[node])
        return answer(forest, share, yes if goes_yes else no, row, known)
    part = float(share[node])
    return part * answer(forest, share, yes, row, known) + (1 - part) * answer(forest, share, no, row, known)


def test_contributions_are_those_of_the_definition() -> None:
    forest, share, _, x = fitted(4, 3)
    found = TreeShap(forest, share, N_FEATURES).contributions(x[:20])
    for row, contributions in zip(x[:20], found, strict=True):
        expected = np.zeros(N_FEATURES)
        for first, last in zip(forest.root, [*forest.root[1:], forest.n_nodes], strict=True):
            players = sorted({int(f) for f in forest.feature[first:last] if f >= 0})
            d = len(players)
            for j in players:
                others = [p for p in players if p != j]
                for size in range(d):
                    weight = factorial(size) * factorial(d - 1 - size) / factorial(d)
                    for known in combinations(others, size):
                        with_it = answer(forest, share, int(first), row, frozenset({*known, j}))
                        expected[j] += weight * (with_it - answer(forest, share, int(first), row, frozenset(known)))
        assert np.abs(contributions - expected).max() < 1e-6


def test_a_row_does_not_depend_on_its_batch() -> None:
    forest, share, _, x = fitted(6, 20)
    shap = TreeShap(forest, share, N_FEATURES)
    whole = shap.contributions(x[: 2 * ROWS + 7])
    for first, size in ((0, 1), (5, 3), (ROWS - 1, 2), (17, ROWS + 1)):
        np.testing.assert_array_equal(shap.contributions(x[first : first + size]), whole[first : first + size])
    assert shap.contributions(x[:0]).shape == (0, N_FEATURES)
