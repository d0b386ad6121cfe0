"""Rows are what live scoring would have seen then, and labels only what is complete."""

import numpy as np
import pytest

from features.catalog import N_FEATURES, NAMES
from features.facts import ID, KIND, KINDS, OFFSET, TIME, WIDTH
from features.history import Histories, vectors
from features.window import DAY_MS
from models.dataset import EVENT, SNAPSHOT, Rows, build, concatenate
from models.labels import Label
from tests.models.shop import START, purchases, rhythms

LABEL = Label(days=30, active_days=60)
AGE = NAMES.index("purchase_age_days")
CUTOFFS = [START + day * DAY_MS for day in (60, 90, 120, 150)]


def test_a_snapshot_is_the_kernel_over_what_was_known() -> None:
    shop = rhythms(customers=30, days=200)
    rows = build(shop.customers, shop.facts, LABEL, CUTOFFS)
    assert len(rows) > 30
    names = np.array(shop.customers)
    for x, at, who in zip(rows.x, rows.at.tolist(), rows.customer.tolist(), strict=True):
        own = shop.facts[(names == rows.names[who]) & (shop.facts[:, TIME] <= at)]
        np.testing.assert_array_equal(x.view(np.uint32), vectors(own, None, at).view(np.uint32))


def test_event_rows_are_what_scoring_gave() -> None:
    shop = rhythms(customers=30, days=200)
    rows = build(shop.customers, shop.facts, LABEL, [], events=(START, START + 200 * DAY_MS))
    step = Histories(create=True).step(shop.customers, shop.facts)
    np.testing.assert_array_equal(rows.x.view(np.uint32), step.vectors.view(np.uint32))
    np.testing.assert_array_equal(rows.at, step.at)
    assert set(rows.kind.tolist()) == {EVENT}


def test_where_snapshots_interrupt_the_stream_changes_nothing_else() -> None:
    shop = rhythms(customers=20, days=200)
    whole = build(shop.customers, shop.facts, LABEL, CUTOFFS, events=(START, START + 400 * DAY_MS))
    more_cutoffs = build(shop.customers, shop.facts, LABEL, [*CUTOFFS, *(c + 1 for c in CUTOFFS)], events=(START, START + 400 * DAY_MS))
    extra = np.isin(more_cutoffs.at, [c + 1 for c in CUTOFFS]) & (more_cutoffs.kind == SNAPSHOT)
    assert more_cutoffs.where(~extra).digest() == whole.digest()


def test_what_arrived_later_is_not_in_a_snapshot() -> None:
    """A late purchase is in the label's knowledge and in later rows, never in a row from before it arrived."""
    t = START + 100 * DAY_MS
    rows = [("a", t - 20 * DAY_MS, "payment"), ("b", t + 1, "payment"), ("a", t - 5 * DAY_MS, "payment"), ("b", t + 80 * DAY_MS, "payment")]
    shop = purchases(rows)
    found = build(shop.customers, shop.facts, LABEL, [t, t + 10 * DAY_MS])
    own = found.where(found.customer == 0)
    assert own.at.tolist() == [t, t + 10 * DAY_MS]
    assert own.x[:, AGE].tolist() == [20.0, 15.0]  # at first the late purchase was not known


def test_a_fact_at_the_instant_belongs_to_the_snapshot() -> None:
    t = START + 100 * DAY_MS
    shop = purchases([("a", t, "payment"), ("b", t + 1, "payment"), ("a", t + 90 * DAY_MS, "payment")])
    found = build(shop.customers, shop.facts, LABEL, [t])
    assert found.customer.tolist() == [0]
    assert found.x[0, AGE] == 0.0


def test_inactive_customers_give_no_row() -> None:
    t = START + 100 * DAY_MS
    shop = purchases([("old", t - 60 * DAY_MS, "payment"), ("new", t - 60 * DAY_MS + 1, "payment"), ("x", t + 40 * DAY_MS, "payment")])
    found = build(shop.customers, shop.facts, LABEL, [t])
    assert [found.names[i] for i in found.customer] == ["new"]
    refund = purchases([("old", t - 70 * DAY_MS, "payment"), ("old", t - 1, "refund"), ("x", t + 40 * DAY_MS, "payment")])
    assert len(build(refund.customers, refund.facts, LABEL, [t], events=(t - 1, t - 1))) == 0


def test_a_label_that_is_not_over_is_unknown() -> None:
    t = START + 100 * DAY_MS
    shop = purchases([("a", t - 1, "payment"), ("b", t - 1, "payment"), ("a", t + 29 * DAY_MS, "payment")])
    assert build(shop.customers, shop.facts, LABEL, [t]).y.tolist() == [-1, -1]
    assert build(shop.customers, shop.facts, LABEL, [t], known_to_ms=t + 30 * DAY_MS).y.tolist() == [0, 1]


def test_duplicates_and_events_too_late_are_no_purchases() -> None:
    """What live scoring set aside is not learnt from either."""
    t = START + 200 * DAY_MS
    days = (0, 1, 120, 20)  # in order of arrival
    shop = purchases([("a", t + day * DAY_MS, "payment") for day in days])
    found = build(shop.customers, shop.facts, Label(10, 60), [t + 2 * DAY_MS])
    assert found.y.tolist() == [1]  # the purchase of day 20 came 100 days late
    again = shop.facts[[0, 1, 1, 2]]
    rows = build(["a"] * 4, again, Label(10, 60), [], events=(START, t + 130 * DAY_MS))
    assert len(rows) == 3


def test_logins_give_rows_but_no_labels() -> None:
    t = START + 100 * DAY_MS
    facts = np.zeros((3, WIDTH), np.int64)
    facts[:, TIME] = t - 10, t, t + 40 * DAY_MS
    facts[:, OFFSET] = facts[:, ID] = [1, 2, 3]
    facts[:, KIND] = KINDS["payment"], KINDS["login"], KINDS["login"]
    rows = build(["a"] * 3, facts, LABEL, [], events=(t - 10, t))
    assert (rows.at.tolist(), rows.y.tolist()) == ([t - 10, t], [1, 1])


def test_partitions_put_together_keep_their_customers_apart() -> None:
    shop = rhythms(customers=20, days=200)
    odd = np.array([int(name) % 2 == 1 for name in shop.customers])
    end = int(shop.facts[:, TIME].max())
    parts = [
        build([n for n, keep in zip(shop.customers, mask, strict=True) if keep], shop.facts[mask], LABEL, CUTOFFS, known_to_ms=end)
        for mask in (odd, ~odd)
    ]
    together, whole = concatenate(parts), build(shop.customers, shop.facts, LABEL, CUTOFFS)
    assert _contents(together) == _contents(whole)


def _contents(rows: Rows) -> set[tuple[str, int, int, bytes]]:
    return {(rows.names[c], int(t), int(y), x.tobytes()) for c, t, y, x in zip(rows.customer, rows.at, rows.y, rows.x, strict=True)}


def test_nothing_gives_no_rows() -> None:
    empty = build([], np.empty((0, WIDTH), np.int64), LABEL, CUTOFFS, events=(0, 1))
    assert len(empty) == len(concatenate([])) == 0
    assert empty.x.shape == (0, N_FEATURES)


@pytest.mark.parametrize("cutoffs", [[], CUTOFFS[::-1], CUTOFFS * 2])
def test_cutoffs_may_come_in_any_order(cutoffs: list[int]) -> None:
    shop = rhythms(customers=10, days=200)
    found = build(shop.customers, shop.facts, LABEL, cutoffs)
    assert found.digest() == build(shop.customers, shop.facts, LABEL, sorted(set(cutoffs))).digest()
