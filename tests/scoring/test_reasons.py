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
from scoring.treeshap import MOST_POINTS
from scoring.wording import strongest

GBP = Money("GBP", 2)


def test_contributions_and_bias_add_up_to_the_margin() -> None:
    model = small()
    reasons = Reasons(unpack(model.envelope))
    margin = reasons.contributions(model.x).sum(axis=1) + reasons.bias
    assert np.abs(margin - (PLATT.a * model.margin() + PLATT.b)).max() < 1e-5
    score = Scorer(unpack(model.envelope)).score(model.x)
    assert np.abs(sigmoid(margin) - score).max() < 1e-6


@pytest.mark.parametrize(("most_points", "method"), [(MOST_POINTS, "treeshap"), (0, "saabas")])
def test_contributions_are_those_of_xgboost_before_folding(most_points: int, method: str) -> None:
    model = small()
    reasons = Reasons(unpack(model.envelope), most_points=most_points)
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


def test_compiled_reasons_are_those_of_python_to_the_byte() -> None:
    """Every feature with values of every size, both signs, ties of every rounding, and those the compiled code leaves to Python."""
    reasons = Reasons(unpack(small().envelope), money=GBP)
    random = np.random.default_rng(5)
    size = 10.0 ** random.uniform(-4, 17, 200)
    values = [0.0, -0.0, 1.0, -1.0, 0.125, 1.25, 2.5, 10.5, 11.5, 0.005, 0.995, 9.96, 1e15, 3e38, np.nan, 12_345.5, -1e-6, 0.345]
    values += [*(size * random.choice([-1, 1], 200)), *np.round(size[:100]), *random.integers(0, 400, 100) / 4]
    vectors = np.repeat(np.array(values, np.float32)[:, np.newaxis], N_FEATURES, axis=1)
    left = 0
    for first in range(0, N_FEATURES, 3):
        chosen = np.tile(np.arange(first, first + 3) % N_FEATURES, (len(vectors), 1))
        amounts = random.normal(0, 1, chosen.shape) * 10.0 ** random.integers(-9, 3, chosen.shape)
        expected = [orjson.dumps(row) for row in reasons._python(vectors, chosen, amounts)]
        found = reasons._wording.write(chosen, np.take_along_axis(vectors, chosen, axis=1).astype(np.float64), amounts)
        left += found.count(None)
        assert [text for text in found if text is not None] == [e for e, text in zip(expected, found, strict=True) if text is not None]
    assert 0 < left < 0.2 * len(vectors) * N_FEATURES / 3


def test_written_reasons_are_the_top_ones() -> None:
    model = small()
    reasons = Reasons(unpack(model.envelope), money=GBP)
    x = model.x[:200].copy()
    x[:50, model.columns] = np.float32(2e15)
    for top in (0, 1, 3, 200):
        assert reasons.written(x, top) == [orjson.dumps(row) for row in reasons.top(x, top)]
    assert reasons.written(x[:0], 3) == []


def test_the_strongest_contributions_are_those_of_a_stable_sort() -> None:
    random = np.random.default_rng(2)
    contributions = random.integers(-4, 5, (300, 12)) / 2.0
    contributions[:5] = 0.0
    for top in (1, 3, 12, 20):
        chosen, amounts = strongest(contributions, top)
        for row, features, sizes in zip(contributions, chosen, amounts, strict=True):
            expected = [f for f in np.argsort(-np.abs(row), kind="stable").tolist() if row[f]][:top]
            assert features.tolist() == expected + [-1] * (top - len(expected))
            assert sizes.tolist() == [row[f] for f in expected] + [0.0] * (top - len(expected))


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
