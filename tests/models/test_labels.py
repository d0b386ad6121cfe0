"""Labels to the millisecond, against the sentence that defines them."""

from pathlib import Path

import numpy as np
import pytest

from features.facts import KIND, KINDS, LEVEL, NONE, TIME, pack_profile
from features.window import DAY_MS
from models import labels
from models.dataset import build
from models.labels import DEFINITIONS, Label, Outcomes, of_kinds
from proto.errors import BadInput
from tests.models.shop import START, purchases, rhythms

T = START + 100 * DAY_MS
LABEL = Label(days=30, active_days=60)


@pytest.mark.parametrize(
    ("time", "churned"),
    [(T, True), (T + 1, False), (T + 30 * DAY_MS, False), (T + 30 * DAY_MS + 1, True)],
)
def test_the_label_looks_at_the_open_left_closed_right_span(time: int, churned: bool) -> None:
    shop = purchases([("a", time, "payment")])
    found = Outcomes(np.zeros(1, np.int64), shop.facts, LABEL).churned(np.array([0]), np.array([T]))
    assert found.tolist() == [churned]


@pytest.mark.parametrize(
    ("time", "active"),
    [(T - 60 * DAY_MS, False), (T - 60 * DAY_MS + 1, True), (T, True), (T + 1, False), (NONE, False)],
)
def test_activity_looks_back_the_same_way(time: int, active: bool) -> None:
    assert LABEL.active(np.array([time]), np.array([T])).tolist() == [active]
    if time != NONE:
        table = Outcomes(np.zeros(1, np.int64), purchases([("a", time, "payment")]).facts, LABEL)
        assert table.active(np.array([0]), np.array([T])).tolist() == [active]


@pytest.mark.parametrize(
    ("kind", "bought"),
    [("payment", True), ("renewal", True), ("upgrade", True), ("downgrade", True), ("refund", False), ("failed_payment", False),
     ("cancellation", False), ("login", False), ("opened", False), ("profile", False)],
)  # fmt: skip
def test_only_money_that_comes_in_is_a_purchase(kind: str, bought: bool) -> None:
    assert of_kinds(purchases([("a", T, kind)]).facts, LABEL.events).tolist() == [bought]


def test_a_label_is_mature_when_its_whole_time_is_over() -> None:
    assert LABEL.mature(np.array([T, T + 1]), T + 30 * DAY_MS).tolist() == [True, False]


def test_purchases_of_others_do_not_count() -> None:
    shop = purchases([("a", T + 1, "payment")])
    found = Outcomes(np.array([1]), shop.facts, LABEL).churned(np.array([0, 1, 2]), np.full(3, T))
    assert found.tolist() == [True, False, True]


def test_many_labels_equal_a_search_by_hand() -> None:
    shop = rhythms(customers=40)
    names = sorted(set(shop.customers))
    who = np.array([names.index(name) for name in shop.customers])
    table = Outcomes(who, shop.facts, LABEL)
    rng = np.random.default_rng(0)
    customer, at = rng.integers(0, len(names), 500), START + rng.integers(0, 420 * DAY_MS, 500)
    found = table.churned(customer, at)
    for c, t, answer in zip(customer.tolist(), at.tolist(), found.tolist(), strict=True):
        times = shop.facts[who == c, 0]
        assert answer == (not np.any((times > t) & (times <= t + 30 * DAY_MS)))


@pytest.mark.parametrize(("days", "active"), [(0, 1), (1, 0), (-1, 5)])
def test_a_label_without_days_is_refused(days: int, active: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        Label(days, active)


CANCELS = Label(30, 60, kind="event", events=("cancellation",), active_by=("payment", "login"), unless=("cancellation",), gap_days=5)


@pytest.mark.parametrize(
    ("after_days", "answer"),
    [(0.5, -1), (5, -1), (5.001, 1), (35, 1), (35.001, 0)],  # in the gap nobody could act; then the horizon
)
def test_an_event_counts_in_its_horizon_and_not_in_the_gap(after_days: float, answer: int) -> None:
    shop = purchases([("a", T - 1, "payment"), ("a", T + int(after_days * DAY_MS), "cancellation"), ("b", T + 90 * DAY_MS, "payment")])
    assert build(shop.customers, shop.facts, CANCELS, [T]).y.tolist() == [answer]


def test_who_has_cancelled_is_not_asked_again() -> None:
    shop = purchases([("a", T - 9, "payment"), ("b", T - 9, "payment"), ("b", T - 8, "cancellation"), ("c", T + 90 * DAY_MS, "payment")])
    rows = build(shop.customers, shop.facts, CANCELS, [T])
    assert [rows.names[i] for i in rows.customer] == ["a"]
    table = Outcomes(np.array([0, 1, 1, 2]), shop.facts, CANCELS)
    assert table.active(np.array([0, 1]), np.array([T, T])).tolist() == [True, False]


def test_an_event_already_seen_is_no_answer_before_the_whole_horizon_is_over() -> None:
    """Else early answers would all be "churned"."""
    shop = purchases([("a", T - 1, "payment"), ("a", T + 6 * DAY_MS, "cancellation")])
    assert build(shop.customers, shop.facts, CANCELS, [T]).y.tolist() == [-1]
    assert build(shop.customers, shop.facts, CANCELS, [T], known_to_ms=T + 35 * DAY_MS).y.tolist() == [1]


@pytest.mark.parametrize(("paid_days", "answer"), [(None, 1), (20, 0), (44, 0), (46, 1)])
def test_a_contract_that_ends_without_money_until_the_grace_is_over_is_churn(paid_days: int | None, answer: int) -> None:
    label = Label(60, 90, kind="expiry", events=("renewal",), active_by=("login",), grace_days=14)
    events = [("a", T - 5, "profile"), ("a", T - 4, "login"), ("b", T - 4, "login"), ("a", T + 200 * DAY_MS, "login")]
    if paid_days is not None:
        events.insert(3, ("a", T + paid_days * DAY_MS, "renewal"))
    shop = purchases(events)
    end_day = T // DAY_MS + 30  # the last day; the contract is over at its end
    shop.facts[shop.facts[:, KIND] == KINDS["profile"], LEVEL] = pack_profile(end_day, None)
    rows = build(shop.customers, shop.facts, label, [T, T + 40 * DAY_MS])
    # Neither b, who has no contract, nor a once the contract is over.
    assert list(zip(rows.customer.tolist(), rows.at.tolist(), rows.y.tolist(), strict=True)) == [(0, T, answer)]
    assert rows.known_to_ms == int(shop.facts[:, TIME].max())


def test_two_definitions_of_the_same_facts_stand_side_by_side() -> None:
    shop = rhythms(customers=40)
    first, second = (build(shop.customers, shop.facts, label, [T]) for label in (Label(30, 60), Label(90, 60)))
    np.testing.assert_array_equal(first.x, second.x)
    assert set(np.flatnonzero(second.y == 1)) < set(np.flatnonzero(first.y == 1))
    assert len({label.name for label in (Label(30, 60), Label(90, 60), CANCELS, Label(30, 60, version=2))}) == 4


def test_every_shipped_definition_loads_and_the_first_one_is_the_default() -> None:
    found = {name: labels.load(name) for name in labels.shipped()}
    assert {path.stem for path in DEFINITIONS.glob("*.toml")} == set(found)
    assert found["no-purchase-90d"] == Label()
    assert {label.kind for label in found.values()} == {"inactivity", "event", "expiry"}
    assert len({label.name for label in found.values()}) == len(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("days = 90", "days = 0"), "days: "),
        (('"payment", ', '"gift", '), "events.0: "),
        (("version = 1", ""), "version: "),
        (("version = 1", "version = 1\ncolour = 2"), "colour: "),
        (("version = 1", "version = 1\ngrace_days = 3"), "only an expiry"),
        (("version = 1", "version = "), "Invalid value"),
    ],
)
def test_a_definition_that_is_none_is_refused_by_name(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_text((DEFINITIONS / "no-purchase-90d.toml").read_text().replace(*change, 1))
    with pytest.raises(BadInput, match=r"own\.toml.*" + message):
        labels.load(str(path))


def test_an_unknown_definition_is_told_the_known_ones() -> None:
    with pytest.raises(BadInput, match="no-purchase-90d, not-renewed-60d"):
        labels.load("nothing")
