"""Reasons add up to the margin, are XGBoost's own, and read like sentences."""

import numpy as np
import orjson
import pytest
import xgboost

from bench.small_model import PLATT, small
from features.catalog import N_FEATURES, NAMES
from models.artifact import unpack
from models.calibrate import sigmoid
from scoring.bands import HIGH, LOW, MEDIUM, UNKNOWN
from scoring.reasons import Money, Reasons, expected_values
from scoring.scorer import Scorer
from scoring.treeshap import MAX_BYTES

GBP = Money("GBP", 2)


def test_contributions_and_bias_add_up_to_the_margin() -> None:
    model = small()
    reasons = Reasons(unpack(model.envelope))
    margin = reasons.contributions(model.x).sum(axis=1) + reasons.bias
    assert np.abs(margin - (PLATT.a * model.margin() + PLATT.b)).max() < 1e-5
    score = Scorer(unpack(model.envelope)).score(model.x)
    assert np.abs(sigmoid(margin) - score).max() < 1e-6


@pytest.mark.parametrize(("max_bytes", "method"), [(MAX_BYTES, "treeshap"), (0, "saabas")])
def test_contributions_are_those_of_xgboost_before_folding(max_bytes: int, method: str) -> None:
    model = small()
    reasons = Reasons(unpack(model.envelope), max_bytes=max_bytes)
    assert reasons.method == method
    found = reasons.contributions(model.x) / PLATT.a
    matrix = xgboost.DMatrix(model.x[:, model.columns])
    theirs = model.booster.predict(matrix, pred_contribs=True, approx_contribs=method == "saabas")
    assert np.abs(found[:, model.columns] - theirs[:, :-1]).max() < 1e-5
    assert reasons.bias == pytest.approx(PLATT.a * theirs[0, -1] + PLATT.b, abs=1e-5)
    unused = np.setdiff1d(np.arange(N_FEATURES), model.columns)
    assert not found[:, unused].any()


def test_the_top_reasons_are_the_strongest_either_way() -> None:
    model = small()
    reasons = Reasons(unpack(model.envelope))
    contributions = reasons.contributions(model.x[:50])
    for row, found in enumerate(reasons.top(model.x[:50], 3)):
        strongest = np.sort(np.abs(contributions[row]))[::-1][:3]
        np.testing.assert_allclose([abs(r["contribution"]) for r in found], strongest, atol=1e-6)
        for reason in found:
            column = NAMES.index(reason["feature"])
            assert reason["text"].endswith("raises the risk" if contributions[row, column] > 0 else "lowers the risk")
            value = model.x[row, column]
            assert (reason["value"] is None) == bool(np.isnan(value))
            assert reason["value"] is None or reason["value"] == value


def test_unknown_values_are_null_in_json() -> None:
    model = small()
    scorer = Scorer(unpack(model.envelope))
    nothing = np.full((1, N_FEATURES), np.nan, np.float32)
    (found,) = scorer.reasons(nothing, np.array([HIGH], np.uint8), np.array([UNKNOWN], np.uint8))
    assert b"NaN" not in found
    assert all(reason["value"] is None for reason in orjson.loads(found))
    assert len(orjson.loads(found)) == 3


@pytest.mark.parametrize(
    ("band", "former", "explained"),
    [
        (LOW, UNKNOWN, False),
        (LOW, LOW, False),
        (LOW, MEDIUM, True),
        (LOW, HIGH, True),
        (MEDIUM, LOW, True),
        (MEDIUM, MEDIUM, True),
        (HIGH, UNKNOWN, True),
    ],
)
def test_a_score_is_explained_when_it_is_not_low_or_has_moved(band: int, former: int, explained: bool) -> None:
    model = small()
    scorer = Scorer(unpack(model.envelope))
    bands, formers = np.array([band] * 2, np.uint8), np.array([former] * 2, np.uint8)
    assert [found != b"[]" for found in scorer.reasons(model.x[:2], bands, formers)] == [explained] * 2


@pytest.mark.parametrize(
    ("feature", "value", "text"),
    [
        ("purchase_age_days", 83.4, "time since the last purchase: 83 days"),
        ("purchase_age_days", 1.0, "time since the last purchase: 1 day"),
        ("purchase_age_days", 0.52, "time since the last purchase: 0.52 days"),
        ("purchase_age_days", np.nan, "time since the last purchase: never"),
        ("purchase_count_90d", 3, "purchases in the last 90 days: 3"),
        ("spend_minor_sum_90d", 123450, "spending in the last 90 days: 1,234.50 GBP"),
        ("purchase_trend_30d_90d", 0.45, "purchases of the last 30 days against the 90-day pace: 0.45"),
        ("purchase_age_per_gap", np.nan, "current pause compared with the customer's usual one: unknown"),
        ("profile_known", 1.0, "a customer profile is known: yes"),
        ("failed_login_share_7d", 0.25, "share of logins that failed in the last 7 days: 25 %"),
    ],
)
def test_a_reason_reads_like_a_sentence(feature: str, value: float, text: str) -> None:
    reasons = Reasons(unpack(small().envelope), money=GBP)
    assert reasons.text(NAMES.index(feature), value) == text


def test_every_feature_has_a_sentence_for_any_value() -> None:
    reasons = Reasons(unpack(small().envelope), money=GBP)
    for column in range(N_FEATURES):
        for value in (0.0, 1.0, -3.25, 1e15, np.nan):
            assert ": " in reasons.text(column, value)


def test_amounts_follow_the_currency() -> None:
    assert Money("JPY", 0).text(1500) == "1,500 JPY"
    assert Money("KWD", 3).text(1500) == "1.500 KWD"
    assert Money().text(150) == "1.50"


def test_expected_values_of_a_tree_lie_between_its_leaves() -> None:
    model = small()
    expected = expected_values(model.forest, model.tables.share)
    ends = np.append(model.forest.root[1:], model.forest.n_nodes)
    for start, end in zip(model.forest.root, ends, strict=True):
        leaves = model.forest.weight[start:end][model.forest.feature[start:end] < 0]
        assert leaves.min() <= expected[start] <= leaves.max()
