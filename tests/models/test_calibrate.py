"""Platt scaling by Newton equals the maximum of the likelihood, and refuses what cannot be calibrated."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from models import calibrate
from proto.errors import ArtifactRejected


def test_it_finds_the_line_that_made_the_labels() -> None:
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 20_000)
    label = (rng.random(20_000) < calibrate.sigmoid(0.6 * margin - 0.8)).astype(np.int8)
    platt = calibrate.fit(margin, label)
    assert platt.a == pytest.approx(0.6, abs=0.03)
    assert platt.b == pytest.approx(-0.8, abs=0.05)


def test_it_agrees_with_an_unpenalised_logistic_regression() -> None:
    rng = np.random.default_rng(1)
    margin = rng.normal(0, 1, 5_000)
    label = (rng.random(5_000) < calibrate.sigmoid(1.5 * margin + 0.2)).astype(np.int8)
    other = LogisticRegression(C=1e9, tol=1e-10).fit(margin[:, None], label)
    platt = calibrate.fit(margin, label)
    # Platt's targets are smoothed by one part in the number of rows of a class.
    assert platt.a == pytest.approx(other.coef_[0, 0], rel=0.01)
    assert platt.b == pytest.approx(other.intercept_[0], abs=0.01)


def test_separable_data_stay_finite() -> None:
    platt = calibrate.fit(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0, 0, 1, 1]))
    assert 0 < platt.a < 50


@pytest.mark.parametrize("label", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_one_class_is_refused(label: list[int]) -> None:
    with pytest.raises(ArtifactRejected, match="both classes"):
        calibrate.fit(np.arange(4.0), np.array(label))


def test_a_model_that_ranks_the_wrong_way_is_refused() -> None:
    with pytest.raises(ArtifactRejected, match="turn the order"):
        calibrate.fit(np.arange(100.0), (np.arange(100) < 50).astype(np.int8))


def test_sigmoid_does_not_overflow() -> None:
    np.testing.assert_array_equal(calibrate.sigmoid(np.array([-1e4, 0.0, 1e4])), [0.0, 0.5, 1.0])
