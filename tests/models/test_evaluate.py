"""Figures against scikit-learn's, ties included; the interval draws customers."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from models import evaluate


@pytest.mark.parametrize("decimals", [1, 6])
def test_figures_equal_those_of_scikit_learn(decimals: int) -> None:
    rng = np.random.default_rng(decimals)
    label = rng.integers(0, 2, 2_000)
    score = np.clip(np.round(0.3 * label + rng.random(2_000) * 0.7, decimals), 0.01, 0.99)
    found = evaluate.measure(label, score, np.arange(2_000), draws=5)
    assert found.auc == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert found.average_precision == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert found.brier == pytest.approx(brier_score_loss(label, score), abs=1e-12)
    assert found.log_loss == pytest.approx(log_loss(label, score), abs=1e-12)


def test_a_draw_weighs_rows_as_copies_of_them_would() -> None:
    rng = np.random.default_rng(0)
    label, score, customer = rng.integers(0, 2, 300), np.round(rng.random(300), 1), rng.integers(0, 40, 300)
    slow = []
    again = np.random.default_rng(7)
    for _ in range(50):
        times = np.bincount(again.integers(0, 40, 40), minlength=40)[customer]
        slow.append(roc_auc_score(np.repeat(label, times), np.repeat(score, times)))
    low, high = evaluate.auc_interval(label, score, customer, np.random.default_rng(7), 50)
    assert (low, high) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))), abs=1e-12)


def test_repeated_rows_of_a_customer_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 400)
    score = 0.2 * label + rng.random(400)
    customer = np.arange(400)
    once = evaluate.auc_interval(label, score, customer, np.random.default_rng(1), 400)
    tenfold = evaluate.auc_interval(np.tile(label, 10), np.tile(score, 10), np.tile(customer, 10), np.random.default_rng(1), 400)
    assert tenfold == pytest.approx(once, abs=1e-9)


def test_one_class_has_no_area() -> None:
    found = evaluate.measure(np.ones(5, np.int8), np.linspace(0, 1, 5), np.arange(5))
    assert np.isnan(found.auc)
    assert found.as_dict()["auc"] is None
