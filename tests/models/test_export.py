"""The exported graph gives what the trainer's trees give, whatever the batch."""

import numpy as np
import pytest
import xgboost

from bench.small_model import PLATT, small, vectors
from features.catalog import N_FEATURES
from models import calibrate, export, graph
from models.session import BATCHES, Session
from proto.errors import ArtifactRejected


def test_the_graph_scores_like_xgboost_with_platt_in_float64() -> None:
    model = small()
    apart = np.abs(Session(model.onnx).probabilities(model.x) - PLATT.probabilities(model.margin()))
    assert apart.max() < 1e-6


def test_folding_equals_scaling_the_margin_afterwards() -> None:
    model = small()
    plain = graph.write(export.forest_of(model.booster, model.columns), N_FEATURES)
    unfolded = Session(plain).probabilities(model.x).astype(np.float64)
    margin = np.log(unfolded) - np.log1p(-unfolded)
    assert np.abs(Session(model.onnx).probabilities(model.x) - calibrate.sigmoid(PLATT.a * margin + PLATT.b)).max() < 1e-5


def test_written_and_read_again_the_forest_is_the_same() -> None:
    forest = small().forest
    again = graph.read(graph.write(forest, N_FEATURES), N_FEATURES)
    for name in ("root", "feature", "value", "yes", "no", "missing_yes", "weight"):
        np.testing.assert_array_equal(getattr(forest, name), getattr(again, name))
    assert forest.base == again.base


def test_columns_left_out_of_training_cannot_move_a_score() -> None:
    model = small()
    other = model.x.copy()
    unused = np.setdiff1d(np.arange(N_FEATURES), model.columns)
    other[:, unused] = 1e6
    session = Session(model.onnx)
    np.testing.assert_array_equal(session.probabilities(model.x), session.probabilities(other))


def test_a_row_scores_the_same_bits_in_every_batch_size_and_place() -> None:
    session = Session(small().onnx)
    x = vectors(1_030, seed=9)
    assert session.batch_dependent_rows(x) == 0
    alone = np.concatenate([session.probabilities(x[i : i + 1]) for i in range(64)])
    np.testing.assert_array_equal(alone, session.probabilities(x)[:64])
    np.testing.assert_array_equal(session.probabilities(x[::-1])[::-1], session.probabilities(x))
    assert set(BATCHES) >= {1, 2, 3, 7, 16, 50, 513, 1000}


def test_no_rows_give_no_scores() -> None:
    assert Session(small().onnx).probabilities(np.empty((0, N_FEATURES), np.float32)).shape == (0,)


def fitted(gamma: float, rounds: int) -> xgboost.Booster:
    x = vectors(500, seed=3)
    y = np.nan_to_num(x[:, 0]) > 0
    return xgboost.train({"objective": "binary:logistic", "max_depth": 2, "gamma": gamma, "eta": 1.0}, xgboost.DMatrix(x, label=y), rounds)


def test_trees_of_a_single_leaf_are_exported_beside_others() -> None:
    booster = fitted(gamma=60, rounds=6)
    forest = export.forest_of(booster, np.arange(N_FEATURES))
    sizes = np.diff(np.append(forest.root, forest.n_nodes))
    assert sizes.min() == 1 < sizes.max()
    x = vectors(200, seed=4)
    session = Session(graph.write(graph.read(graph.write(forest, N_FEATURES), N_FEATURES), N_FEATURES))
    assert np.abs(session.probabilities(x) - booster.predict(xgboost.DMatrix(x))).max() < 1e-6
    assert len(export.covers(booster)) == forest.n_nodes


def test_trees_that_ask_nothing_are_refused() -> None:
    x = vectors(200, seed=3)
    flat = xgboost.train({"objective": "binary:logistic", "gamma": 1e9}, xgboost.DMatrix(x, label=np.arange(200) % 2), 3)
    with pytest.raises(ArtifactRejected, match="never ask"):
        export.forest_of(flat, np.arange(N_FEATURES))
    with pytest.raises(ArtifactRejected, match="never ask"):
        export.forest_of(fitted(gamma=1e9, rounds=3), np.arange(N_FEATURES))
