"""Labels to the millisecond, against the sentence that defines them."""

import numpy as np
import pytest

from features.facts import NONE
from features.window import DAY_MS
from models.labels import Label, Purchases, is_purchase
from tests.models.shop import START, purchases, rhythms

T = START + 100 * DAY_MS
LABEL = Label(days=30, active_days=60)


@pytest.mark.parametrize(
    ("time", "churned"),
    [(T, True), (T + 1, False), (T + 30 * DAY_MS, False), (T + 30 * DAY_MS + 1, True)],
)
def test_the_label_looks_at_the_open_left_closed_right_span(time: int, churned: bool) -> None:
    shop = purchases([("a", time, "payment")])
    found = Purchases(np.zeros(1, np.int64), shop.facts).churned(np.array([0]), np.array([T]), LABEL)
    assert found.tolist() == [churned]


@pytest.mark.parametrize(
    ("time", "active"),
    [(T - 60 * DAY_MS, False), (T - 60 * DAY_MS + 1, True), (T, True), (T + 1, False), (NONE, False)],
)
def test_activity_looks_back_the_same_way(time: int, active: bool) -> None:
    assert LABEL.active(np.array([time]), np.array([T])).tolist() == [active]
    if time != NONE:
        table = Purchases(np.zeros(1, np.int64), purchases([("a", time, "payment")]).facts)
        assert table.active(np.array([0]), np.array([T]), LABEL).tolist() == [active]


@pytest.mark.parametrize(
    ("kind", "bought"),
    [("payment", True), ("renewal", True), ("upgrade", True), ("downgrade", True), ("refund", False), ("failed_payment", False),
     ("cancellation", False), ("login", False), ("opened", False), ("profile", False)],
)  # fmt: skip
def test_only_money_that_comes_in_is_a_purchase(kind: str, bought: bool) -> None:
    assert is_purchase(purchases([("a", T, kind)]).facts).tolist() == [bought]


def test_a_label_is_mature_when_its_whole_time_is_over() -> None:
    assert LABEL.mature(np.array([T, T + 1]), T + 30 * DAY_MS).tolist() == [True, False]


def test_purchases_of_others_do_not_count() -> None:
    shop = purchases([("a", T + 1, "payment")])
    found = Purchases(np.array([1]), shop.facts).churned(np.array([0, 1, 2]), np.full(3, T), LABEL)
    assert found.tolist() == [True, False, True]


def test_many_labels_equal_a_search_by_hand() -> None:
    shop = rhythms(customers=40)
    names = sorted(set(shop.customers))
    who = np.array([names.index(name) for name in shop.customers])
    table = Purchases(who, shop.facts)
    rng = np.random.default_rng(0)
    customer, at = rng.integers(0, len(names), 500), START + rng.integers(0, 420 * DAY_MS, 500)
    found = table.churned(customer, at, LABEL)
    for c, t, answer in zip(customer.tolist(), at.tolist(), found.tolist(), strict=True):
        times = shop.facts[who == c, 0]
        assert answer == (not np.any((times > t) & (times <= t + 30 * DAY_MS)))


@pytest.mark.parametrize(("days", "active"), [(0, 1), (1, 0), (-1, 5)])
def test_a_label_without_days_is_refused(days: int, active: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        Label(days, active)
