"""Vectors by hand: every operation, every edge, and the same answer whichever way a history came together."""

import math
from itertools import count
from random import Random

import numpy as np
import numpy.typing as npt
import pytest

from features.aggregate import DISTINCT_CELLS, ROW_WIDTH, TOTAL_CELLS, contribution, distinct_column
from features.carry import BASE, CARRY_WIDTH
from features.catalog import ATTRIBUTE, CATALOG, N_FEATURES, NAMES, Field, Op
from features.facts import DAY_MS, ID, KIND, KINDS, LEVEL, NONE, OFFSET, PROFILE, TIME, VALUE, WIDTH, A, D, pack_profile, pack_ticket
from features.history import Histories, Outcome, vectors
from features.index import INDEX_WIDTH, find, put, rehash, remove, room_for
from features.vector import HOURS_COS, HOURS_SIN, WEEKDAYS_COS, WEEKDAYS_SIN
from features.window import D90, H1, HOUR_MS, LIFE, WINDOW_MS

IntArray = npt.NDArray[np.int64]
NOON = 1_700_049_600_000  # 2023-11-15T12:00:00Z, a Wednesday
_SERIAL = count(1)


def fact(
    kind: str, time: int, *, offset: int | None = None, id: int | None = None, value: int = NONE, level: int = 0, **texts: int
) -> list[int]:
    serial = next(_SERIAL)
    row = [0] * WIDTH
    row[TIME], row[KIND], row[VALUE], row[LEVEL] = time, KINDS[kind], value, level
    row[OFFSET] = serial if offset is None else offset
    row[ID] = serial * 0x9E3779B97F4A7C15 % 2**63 if id is None else id
    for name, digest in texts.items():
        row["abcd".index(name) + A] = digest
    return row


def table(*rows: list[int]) -> IntArray:
    return np.array(rows, np.int64).reshape(len(rows), WIDTH)


def value(name: str, rows: list[list[int]], at: int = NOON) -> float:
    return float(vectors(table(*rows), None, at)[NAMES.index(name)])


def days_ago(days: float) -> int:
    return NOON - round(days * DAY_MS)


def pay(days: float, amount: int = 1000, **more: int) -> list[int]:
    return fact("payment", days_ago(days), value=amount, **more)


def ticket(kind: str, days: float, priority: int = 0, csat: int | None = None, nps: int | None = None, **more: int) -> list[int]:
    return fact(kind, days_ago(days), level=pack_ticket(priority, csat, nps), **more)


NAN = math.nan
LOGIN, USE = "login", "feature_use"
EXAMPLES: list[tuple[str, list[list[int]], float]] = [
    # TOTAL, with the window's name in the feature's
    ("purchase_count_24h", [pay(0.5), pay(1.5)], 1),
    ("spend_minor_sum_7d", [pay(6, 250), pay(0, 50), pay(8, 7)], 300),
    ("spend_minor_sum_life", [pay(1000, 5), pay(0, 3), fact("refund", NOON, value=100)], 8),
    ("purchase_count_life", [fact(k, NOON) for k in ("payment", "renewal", "upgrade", "downgrade", "failed_payment", "refund")], 4),
    # RATIO
    ("spend_minor_mean_90d", [pay(1, 100), pay(2, 301)], 200.5),
    ("spend_minor_mean_90d", [fact(LOGIN, NOON)], NAN),
    ("refund_share_life", [pay(1, 400), fact("refund", NOON, value=100)], 0.25),
    ("ticket_wait_seconds_mean_90d", [fact("opened", NOON, value=30), fact("resolved", NOON), fact("reopened", NOON, value=0)], 15),
    ("usage_ms_per_session_30d", [fact(USE, NOON, value=500), fact("page_view", NOON, value=250)], 375),
    # SHARE
    ("payment_consistency_90d", [pay(1), pay(2), pay(3), fact("failed_payment", NOON)], 0.75),
    ("payment_consistency_90d", [fact(LOGIN, NOON)], NAN),
    # TREND
    ("spend_trend_30d_90d", [pay(1, 300), pay(60, 600)], (300 / 30) / (900 / 90)),
    ("spend_trend_30d_90d", [fact(LOGIN, NOON)], NAN),
    # BEFORE and CHANGE
    ("spend_minor_prev_30d", [pay(1, 10), pay(31, 20), pay(61, 40)], 20),
    ("spend_minor_change_30d", [pay(1, 10), pay(31, 25), pay(61, 40)], -15),
    ("login_count_change_7d", [fact(LOGIN, days_ago(d)) for d in (0, 1, 2, 8)], 2),
    # RATE and PER_MINUTE
    ("login_rate_30d", [fact(LOGIN, days_ago(d)) for d in (0, 1, 29)], 0.1),
    ("events_per_minute_1h", [fact(LOGIN, NOON), fact(USE, NOON - HOUR_MS + 1), fact(LOGIN, NOON - HOUR_MS)], 2 / 60),
    # AGE and TENURE
    ("purchase_age_days", [pay(40), pay(2.5), fact(LOGIN, NOON)], 2.5),
    ("purchase_age_days", [fact(LOGIN, NOON)], NAN),
    ("problem_age_hours", [fact("outage", NOON - 5 * HOUR_MS)], 5),
    ("problem_age_hours", [fact(LOGIN, NOON)], NAN),
    ("purchase_tenure_days", [pay(400), pay(2)], 400),
    ("purchase_tenure_days", [fact(LOGIN, NOON)], NAN),
    # MEAN_GAP, AGE_PER_GAP
    ("purchase_mean_gap_days", [pay(30), pay(20), pay(10), pay(10)], 10),
    ("purchase_mean_gap_days", [pay(30.1), pay(30)], NAN),
    ("purchase_age_per_gap", [pay(30), pay(20), pay(10)], 1),
    ("purchase_age_per_gap", [pay(1)], NAN),
    # DISTINCT, DISTINCT_RATIO
    ("products_distinct_30d", [pay(1, a=7), pay(2, a=7), pay(3, a=8), pay(4), pay(31, a=9)], 2),
    ("active_days_7d", [fact(LOGIN, days_ago(0)), fact("opened", days_ago(0.4)), fact(LOGIN, days_ago(0.6)), pay(6.9)], 3),
    ("purchase_days_life", [pay(500), pay(500), pay(100), pay(0)], 3),
    ("feature_adoption_7d_90d", [fact(USE, days_ago(1), c=1), fact(USE, days_ago(20), c=2), fact(USE, days_ago(80), c=3)], 1 / 3),
    ("feature_adoption_7d_90d", [fact(USE, NOON)], NAN),
    # LAST, KNOWN, LAST_PER_MEAN
    ("last_purchase_minor", [pay(3, 9), pay(2, 5), pay(1, NONE), fact("refund", NOON, value=7)], 5),
    ("last_purchase_minor", [pay(1, NONE)], NAN),
    ("csat_last", [ticket("satisfaction", 2, csat=4), ticket("opened", 1)], 4),
    ("csat_known", [ticket("opened", 1)], 0),
    ("csat_known", [ticket("satisfaction", 900, csat=1)], 1),
    ("nps_last", [ticket("satisfaction", 2, nps=0)], 0),
    ("nps_mean_life", [ticket("satisfaction", 2, nps=0), ticket("satisfaction", 1, nps=9)], 4.5),
    ("csat_mean_90d", [ticket("satisfaction", 2, csat=5), ticket("satisfaction", 1, csat=2)], 3.5),
    ("last_purchase_per_mean", [pay(2, 10), pay(1, 30)], 1.5),
    ("last_purchase_per_mean", [pay(2, 0)], NAN),
    ("last_purchase_per_mean", [fact(LOGIN, NOON)], NAN),
    # ZSCORE: expected 30 / 30 * 1 = 1
    ("activity_anomaly_24h_30d", [fact(LOGIN, days_ago(0.5))] * 4 + [fact(LOGIN, days_ago(9))] * 26, 3 / math.sqrt(2)),
    # hour and weekday of 12:00 on a Wednesday
    ("hour_sin", [], math.sin(math.pi)),
    ("hour_cos", [], -1),
    ("weekday_sin", [], math.sin(2 * math.pi * 2 / 7)),
    ("weekday_cos", [], math.cos(2 * math.pi * 2 / 7)),
    # profile: the newest one replaces the whole former one
    ("profile_known", [], 0),
    ("profile_known", [fact("profile", days_ago(700))], 1),
    ("signup_days", [fact("profile", NOON, value=NOON // DAY_MS - 10)], 10.5),
    ("signup_days", [fact("profile", days_ago(1), value=19_000), fact("profile", NOON)], NAN),
    ("contract_days_left", [fact("profile", NOON, level=pack_profile(NOON // DAY_MS + 3, None))], 2.5),
    ("contract_days_left", [fact("profile", NOON)], NAN),
    ("consent_given", [fact("profile", NOON, level=pack_profile(None, True))], 1),
    ("consent_given", [fact("profile", NOON, level=pack_profile(None, False))], 0),
    ("consent_given", [fact("profile", NOON)], NAN),
    ("profile_update_count_90d", [fact("profile", NOON), fact("profile", days_ago(1))], 2),
    ("event_count_1h", [fact("profile", NOON)], 0),
    ("tenure_days", [fact("profile", days_ago(9)), fact(LOGIN, days_ago(4))], 4),
    # PRODUCT, OPEN_TICKETS, PER_LIFE_DAY
    ("tickets_times_failures_30d", [ticket("opened", 1), ticket("opened", 2), *[fact("failed_payment", NOON)] * 3], 6),
    ("ticket_open_count", [ticket("opened", 400), ticket("opened", 2), ticket("resolved", 1), ticket("reopened", 0)], 2),
    ("ticket_open_count", [ticket("resolved", 1)], 0),
    ("ticket_urgent_count_30d", [ticket("opened", 1, p) for p in (1, 2, 3, 4)] + [ticket("resolved", 1, 4)], 2),
    ("ticket_categories_distinct_90d", [ticket("opened", 1, b=1), ticket("resolved", 1, b=1), ticket("opened", 1, b=2)], 2),
    ("purchase_rate_life", [pay(200), pay(100)], 0.01),
    ("purchase_rate_life", [pay(0)], NAN),
    ("purchase_rate_life", [fact(LOGIN, NOON)], NAN),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "expected"), EXAMPLES)
def test_an_operation_gives_what_a_person_would_work_out(name: str, rows: list[list[int]], expected: float) -> None:
    assert np.array(value(name, rows)).tobytes() == np.array(float(np.float32(expected))).tobytes() or value(name, rows) == np.float32(
        expected
    )


def test_every_operation_has_an_example() -> None:
    shown = {CATALOG[NAMES.index(name)].op for name, _, _ in EXAMPLES}
    assert set(Op) - shown == set()


def test_every_feature_of_a_customer_nothing_is_known_of_is_a_number_or_the_one_nan() -> None:
    bits = vectors(table(), None, NOON).view(np.uint32)
    nans = np.isnan(vectors(table(), None, NOON))
    assert nans.any()
    assert set(bits[nans].tolist()) == {0x7FC00000}


@pytest.mark.parametrize(
    ("window", "name"),
    [
        (0, "failed_login_count_1h"),
        (1, "failed_login_count_24h"),
        (2, "action_count_7d"),
        (4, "payment_failure_count_30d"),
        (4, "devices_distinct_30d"),
        (6, "purchase_count_90d"),
        (6, "purchase_days_90d"),
    ],
)
def test_the_left_edge_is_out_and_the_right_edge_is_in(window: int, name: str) -> None:
    kind = {"failed": "failed_login", "action": USE, "payment": "failed_payment", "devices": LOGIN}.get(
        name.split("_", maxsplit=1)[0], "payment"
    )
    length = WINDOW_MS[window]

    def counted(age_ms: int, *, step: bool) -> float:
        rows = table(fact(kind, NOON - age_ms, a=1), fact(kind, NOON, a=2))
        if step:
            return float(Histories(create=True).step(["c", "c"], rows).vectors[1, NAMES.index(name)])
        return float(vectors(rows, None, NOON)[NAMES.index(name)])

    for step in (False, True):
        assert [counted(age, step=step) for age in (length + 1, length, length - 1)] == [1, 1, 2]


def test_a_later_value_stands_for_one_already_seen_until_it_leaves_itself() -> None:
    histories = Histories(create=True)
    column = NAMES.index("products_distinct_30d")
    rows = table(pay(40, a=7), pay(20, a=7), pay(20, a=8), fact(LOGIN, NOON), fact(LOGIN, days_ago(-10)), fact(LOGIN, days_ago(-10) + 1))
    assert histories.step(["c"] * 6, rows).vectors[:, column].tolist() == [1, 1, 2, 2, 0, 0]


def test_a_late_value_counts_only_where_no_newer_one_does() -> None:
    histories = Histories(create=True)
    thirty, ninety = NAMES.index("products_distinct_30d"), NAMES.index("products_distinct_90d")
    rows = table(pay(20, a=7), fact(LOGIN, NOON), pay(25, a=7), pay(50, a=8), pay(10, a=8), pay(70, a=8))
    seen = histories.step(["c"] * 6, rows).vectors
    assert seen[:, thirty].tolist() == [1, 1, 1, 1, 2, 2]
    assert seen[:, ninety].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("seed", range(4))
def test_ties_are_ordered_by_topic_and_offset_however_they_arrive(seed: int) -> None:
    rows = [
        fact("payment", NOON, offset=5, value=1),
        fact("payment", NOON, offset=6, value=2),
        fact("profile", NOON, offset=3, level=pack_profile(None, True)),
        fact("profile", NOON, offset=4, level=pack_profile(None, False)),
        ticket("satisfaction", 0, csat=1, offset=1),
        ticket("satisfaction", 0, csat=2, offset=2),
    ]
    ordered = [rows[i] for i in (0, 1, 4, 5, 2, 3)]
    Random(seed).shuffle(rows)
    histories = Histories(create=True)
    histories.step(["c"] * 6, table(*rows))
    assert histories.facts("c").tolist() == ordered
    now = histories.vectors_at(["c"], NOON)[0]
    assert [now[NAMES.index(n)] for n in ("last_purchase_minor", "csat_last", "consent_given")] == [2, 2, 0]


def test_at_a_virtual_clock_never_goes_back() -> None:
    step = Histories(create=True).step(["c", "c"], table(fact(LOGIN, NOON), pay(3)))
    assert step.at.tolist() == [NOON, NOON]
    assert step.late.tolist() == [False, True]
    assert step.vectors[1, NAMES.index("purchase_age_days")] == 3


def random_life(rng: Random, n: int, *, shuffle_ms: int = 0) -> IntArray:
    """Facts of one customer in arrival order, made to collide: few values, steps of exactly a window or 1 ms beside it."""
    rows, time = [], NOON
    steps = [0, 0, 1, 1000, HOUR_MS // 2, *[w + d for w in WINDOW_MS for d in (-1, 0, 1)], *[DAY_MS // 3] * 20, *[HOUR_MS] * 20]
    for _ in range(n):
        time += rng.choice(steps)
        kind = rng.choice(list(KINDS))
        late = rng.choice([0] * 6 + [shuffle_ms and rng.randrange(shuffle_ms), shuffle_ms and rng.choice(WINDOW_MS)])
        code = KINDS[kind]
        amount = NONE if rng.random() < 0.2 else rng.choice([0, 1, 999, 10**15, rng.randrange(10**6)])
        level = pack_ticket(rng.randrange(5), rng.choice([None, 1, 5]), rng.choice([None, 0, 10])) if code >> 3 == 2 else 0
        if code == PROFILE:
            amount, level = rng.choice([NONE, 18_000]), pack_profile(rng.choice([None, 20_000]), rng.choice([None, True, False]))
        rows.append(fact(kind, time - late, value=amount, level=level, **{c: rng.randrange(5) for c in "abcd"}))
    return table(*rows)


def accepted(step_outcome: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return step_outcome <= Outcome.PROFILE


@pytest.mark.parametrize("seed", range(12))
def test_running_totals_equal_the_history_evaluated_from_scratch(seed: int) -> None:
    rng = Random(seed)
    life = random_life(rng, 300, shuffle_ms=40 * DAY_MS)
    step = Histories(create=True).step(["c"] * len(life), life)
    taken = accepted(step.outcome)
    for k, row in enumerate(step.rows.tolist()):
        known = life[: row + 1][taken[: row + 1]]
        assert vectors(known, None, int(step.at[row])).tobytes() == step.vectors[k].tobytes(), f"seed {seed}, fact {row}"


@pytest.mark.parametrize("seed", range(12))
def test_kept_facts_and_carry_say_all_the_history_says(seed: int) -> None:
    rng = Random(100 + seed)
    life = random_life(rng, 300, shuffle_ms=20 * DAY_MS)
    histories = Histories(create=True)
    taken = accepted(histories.step(["c"] * len(life), life).outcome)
    kept, carry = histories.facts("c"), histories.carry("c")
    assert carry[BASE] > 0
    assert carry[BASE] + len(kept) == taken.sum()
    newest = int(histories.newest_ms(["c"])[0])
    for at in (newest, newest + 1, newest + HOUR_MS, newest + 29 * DAY_MS, newest + 90 * DAY_MS, newest + 4000 * DAY_MS):
        full = vectors(life[taken], None, at).tobytes()
        assert vectors(kept, carry, at).tobytes() == full
        assert histories.vectors_at(["c"], at)[0].tobytes() == full


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_facts_handed_in_does_not_matter(seed: int) -> None:
    life = random_life(Random(seed), 100)
    at = int(life[:, TIME].max())
    mixed = life[np.random.default_rng(seed).permutation(len(life))]
    assert vectors(mixed, None, at).tobytes() == vectors(life, None, at).tobytes()


def test_a_cut_leaves_out_what_was_learnt_later() -> None:
    rows = table(pay(2, offset=5), pay(1, offset=6), fact(LOGIN, NOON, offset=5))
    known = vectors(rows, None, NOON, {"transactions": 5, "logins": 4, "support-tickets": -1, "customer-profiles": -1})
    assert known.tobytes() == vectors(rows[:1], None, NOON).tobytes()
    assert vectors(rows, None, NOON, {}).tobytes() == vectors(table(), None, NOON).tobytes()


def test_nothing_is_evaluated_before_it_happened() -> None:
    with pytest.raises(ValueError, match="lies after"):
        vectors(table(fact(LOGIN, NOON)), None, NOON - 1)


def test_the_tables_of_hour_and_weekday_are_those_of_the_mathematical_library() -> None:
    for n, sines, cosines in ((24, HOURS_SIN, HOURS_COS), (7, WEEKDAYS_SIN, WEEKDAYS_COS)):
        assert np.abs(sines - [math.sin(2 * math.pi * k / n) for k in range(n)]).max() < 1e-15
        assert np.abs(cosines - [math.cos(2 * math.pi * k / n) for k in range(n)]).max() < 1e-15


def test_each_cell_of_a_totals_row_has_one_meaning() -> None:
    cells = [*TOTAL_CELLS.values(), *DISTINCT_CELLS.values()]
    assert sorted(cells) == list(range(CARRY_WIDTH, ROW_WIDTH))
    with pytest.raises(ValueError, match="products are counted per window only"):
        distinct_column(ATTRIBUTE["products"], LIFE)
    assert distinct_column(ATTRIBUTE["products"], D90) in DISTINCT_CELLS.values()
    assert (0, H1) in TOTAL_CELLS


def test_what_a_fact_adds_to_a_measure() -> None:
    rows = table(fact("satisfaction", NOON, value=9, level=pack_ticket(3, 4, 0)), fact("satisfaction", NOON))
    added = {field: [contribution(rows, i, int(field)) for i in (0, 1)] for field in Field}
    assert added == {
        Field.ONE: [1, 1],
        Field.VALUE: [9, 0],
        Field.VALUE_KNOWN: [1, 0],
        Field.CSAT: [4, 0],
        Field.CSAT_KNOWN: [1, 0],
        Field.NPS: [0, 0],
        Field.NPS_KNOWN: [1, 0],
        Field.URGENT: [1, 0],
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_index_is_a_dictionary(seed: int) -> None:
    rng = Random(seed)
    index = np.zeros((room_for(38), INDEX_WIDTH), np.int64)
    assert len(index) == 64
    truth: dict[tuple[int, int], int] = {}
    for turn in range(20_000):
        owner, number = rng.randrange(3), rng.choice([rng.randrange(30), -rng.randrange(30)])
        place = find(index, owner, number)
        assert (place >= 0) == ((owner, number) in truth)
        if place >= 0:
            assert index[place, 2] == truth[owner, number]
        if rng.random() < 0.5 and len(truth) < 60:  # fuller than a real one, to make the runs long
            put(index, place if place >= 0 else ~place, owner, number, turn)
            truth[owner, number] = turn
        elif place >= 0:
            remove(index, place)
            del truth[owner, number]
    larger = np.zeros((128, INDEX_WIDTH), np.int64)
    rehash(index, larger)
    for held in (index, larger):
        assert (held[:, 1] != 0).sum() == len(truth)
        assert all(held[find(held, owner, number), 2] == time for (owner, number), time in truth.items())


def test_a_vector_has_a_column_per_row_of_the_catalog() -> None:
    assert vectors(table(), None, 0).shape == (N_FEATURES,)
    assert vectors(table(), None, 0).dtype == np.float32
    assert D == A + 3
