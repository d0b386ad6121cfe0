"""The oracle against answers worked out by hand: it is trusted because each rule is checked here on its own."""

import ast
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from features import oracle
from features.cases import HOT_FACTS, world
from features.catalog import CATALOG, NAMES, Op
from features.facts import DAY_MS, ID, KIND, KINDS, LEVEL, NONE, OFFSET, TIME, VALUE, WIDTH, A, C, pack_profile, pack_ticket
from features.window import HOUR_MS, WINDOW_MS

ROOT = Path(__file__).resolve().parents[2]
NOON = 1_700_049_600_000  # 2023-11-15T12:00:00Z, a Wednesday


def fact(kind: str, time: int, *, id: int = 0, offset: int = 0, value: int = NONE, level: int = 0, **columns: int) -> list[int]:
    row = [0] * WIDTH
    row[TIME], row[KIND], row[OFFSET], row[VALUE], row[LEVEL] = time, KINDS[kind], offset, value, level
    row[ID] = id or hash((kind, time, offset)) | 1
    for name, digest in columns.items():
        row[{"a": 5, "b": 6, "c": 7, "d": 8}[name]] = digest
    return row


def history(*rows: list[int]) -> oracle.History:
    result = oracle.History()
    for row in rows:
        result.handle(row)
    return result


def value(of: oracle.History, name: str, at: int | None = None) -> float:
    found: float = dict(zip(NAMES, struct.unpack(f"<{len(NAMES)}f", of.vector(at)), strict=True))[name]
    return found


def float32(number: float) -> float:
    return float(np.float32(number))


@pytest.mark.parametrize(
    ("name", "length"), [("event_count_1h", WINDOW_MS[0]), ("login_count_24h", WINDOW_MS[1]), ("login_count_7d", WINDOW_MS[2])]
)
def test_a_window_leaves_its_left_edge_out_and_takes_its_right_edge_in(name: str, length: int) -> None:
    def counted(age_ms: int) -> float:
        return value(history(fact("login", NOON - age_ms, offset=1), fact("login", NOON, offset=2)), name)

    assert counted(length + 1) == 1
    assert counted(length) == 1
    assert counted(length - 1) == 2
    assert counted(0) == 2


@pytest.mark.parametrize(("later_ms", "count"), [(90 * DAY_MS - 1, 2), (90 * DAY_MS, 1)])
def test_ninety_days_to_the_millisecond(later_ms: int, count: int) -> None:
    h = history(fact("login", NOON), fact("login", NOON + later_ms))
    assert value(h, "login_count_90d") == count
    assert len(h.kept()) == count


def test_a_fact_is_too_late_at_ninety_days_and_not_a_millisecond_earlier() -> None:
    h = history(fact("login", NOON))
    assert h.handle(fact("login", NOON - 90 * DAY_MS)) == oracle.Handled(oracle.TOO_LATE, NOON, False)
    assert h.handle(fact("login", NOON - 90 * DAY_MS + 1)) == oracle.Handled(oracle.SCORED, NOON, True)


def test_a_kept_fact_again_is_a_duplicate_or_a_conflict_whatever_its_offset() -> None:
    first = fact("payment", NOON, id=7, offset=1, value=100)
    h = history(first)
    again, other = list(first), list(first)
    again[OFFSET] = other[OFFSET] = 9
    other[VALUE] = 101
    assert h.handle(again).outcome == oracle.DUPLICATE
    assert h.handle(other).outcome == oracle.DUPLICATE_CONFLICT
    assert value(h, "purchase_count_life") == 1


def test_a_duplicate_is_recognised_before_it_is_too_late_but_only_among_kept_facts() -> None:
    first = fact("login", NOON, id=7)
    moved = fact("login", NOON - 200 * DAY_MS, id=7)
    h = history(first)
    assert h.handle(moved).outcome == oracle.DUPLICATE_CONFLICT
    h.handle(fact("login", NOON + 90 * DAY_MS))
    assert h.handle(first).outcome == oracle.TOO_LATE
    assert h.handle(fact("login", NOON + 90 * DAY_MS, id=7)).outcome == oracle.SCORED


def test_the_sum_of_money_stops_at_two_to_the_62_and_the_refused_fact_changes_nothing() -> None:
    h = history(fact("payment", NOON, value=2**61), fact("refund", NOON, value=2**61 - 1, offset=1))
    assert h.handle(fact("cancellation", NOON + 1, value=2)) == oracle.Handled(oracle.AMOUNT_RANGE, NOON, False)
    assert h.handle(fact("login", NOON + 1, value=2**40)).outcome == oracle.SCORED
    assert h.handle(fact("cancellation", NOON + 1, value=1)).outcome == oracle.SCORED


def test_profile_facts_move_time_and_replace_the_former_profile_whole() -> None:
    h = history(fact("profile", NOON, value=19_000, level=pack_profile(20_000, True), a=5))
    assert h.handle(fact("profile", NOON + 5, offset=1, level=pack_profile(None, False))) == oracle.Handled(
        oracle.IS_PROFILE, NOON + 5, False
    )
    assert math.isnan(value(h, "signup_days"))
    assert math.isnan(value(h, "contract_days_left"))
    assert value(h, "consent_given") == 0.0
    h.handle(fact("profile", NOON - 5, offset=2, value=19_000, level=pack_profile(20_000, True)))
    assert math.isnan(value(h, "signup_days"))  # arrived later, but is older
    assert value(h, "profile_update_count_90d") == 3


def test_the_last_of_two_purchases_in_one_millisecond_is_the_one_with_the_higher_offset() -> None:
    one, two = fact("payment", NOON, value=10, offset=1), fact("renewal", NOON, value=20, offset=2)
    assert value(history(one, two), "last_purchase_minor") == value(history(two, one), "last_purchase_minor") == 20


def test_an_absent_amount_counts_as_a_purchase_and_does_not_replace_the_last_amount() -> None:
    h = history(fact("payment", NOON, value=10), fact("payment", NOON + 1))
    assert (value(h, "purchase_count_life"), value(h, "last_purchase_minor"), value(h, "spend_minor_mean_life")) == (2, 10, 5)


def test_ratings() -> None:
    h = history(
        fact("satisfaction", NOON, level=pack_ticket(0, 4, 0)),
        fact("satisfaction", NOON + 1, level=pack_ticket(3, None, 9)),
        fact("opened", NOON + 2, level=pack_ticket(4, 1, None)),
    )
    assert (value(h, "csat_last"), value(h, "csat_mean_90d"), value(h, "csat_last_per_mean")) == (1, 2.5, float32(0.4))
    assert (value(h, "nps_last"), value(h, "nps_mean_life"), value(h, "ticket_urgent_count_30d"), value(h, "csat_known")) == (9, 4.5, 1, 1)


def test_distinct_values_of_one_window_ignore_absent_ones_and_count_utc_days() -> None:
    h = history(
        fact("payment", NOON - 12 * HOUR_MS - 1, a=3),
        fact("payment", NOON - 12 * HOUR_MS, a=3),
        fact("payment", NOON, a=-4),
        fact("payment", NOON, offset=1),
    )
    assert (value(h, "products_distinct_30d"), value(h, "purchase_days_life"), value(h, "active_days_7d")) == (2, 2, 2)


def test_pauses_between_purchase_days() -> None:
    h = history(*(fact("payment", NOON + days * DAY_MS) for days in (0, 3, 6)), fact("login", NOON + 12 * DAY_MS))
    assert (value(h, "purchase_mean_gap_days"), value(h, "purchase_age_days"), value(h, "purchase_age_per_gap")) == (3, 6, 2)
    assert (value(h, "purchase_tenure_days"), value(h, "purchase_rate_life")) == (12, 0.25)


def test_trends_changes_and_anomalies() -> None:
    h = history(*(fact("login", NOON - days * DAY_MS) for days in (20, 10, 9, 1, 0)))
    assert (value(h, "login_count_prev_7d"), value(h, "login_count_change_7d"), value(h, "login_rate_30d")) == (2, 0, float32(5 / 30))
    assert value(h, "login_trend_7d_30d") == float32((2 / 7) / (5 / 30))
    assert value(h, "activity_anomaly_24h_30d") == float32((1 - 5 / 30) / math.sqrt(5 / 30 + 1))


def test_the_clock_on_the_wall_is_utc_and_weeks_begin_on_monday() -> None:
    h = history(fact("login", NOON))
    assert (value(h, "hour_cos"), value(h, "weekday_sin")) == (-1.0, float32(math.sin(2 * math.pi * 2 / 7)))


def test_open_tickets_never_fall_below_zero() -> None:
    assert value(history(fact("resolved", NOON)), "ticket_open_count") == 0
    assert value(history(fact("opened", NOON), fact("reopened", NOON), fact("resolved", NOON + 1)), "ticket_open_count") == 1


def test_silence_is_the_same_history_seen_later() -> None:
    h = history(fact("login", NOON))
    assert value(h, "login_age_days", NOON + 100 * DAY_MS) == 100
    assert value(h, "login_count_90d", NOON + 90 * DAY_MS - 1) == 1
    assert value(h, "login_count_90d", NOON + 90 * DAY_MS) == 0


def test_nothing_known_is_the_canonical_quiet_nan() -> None:
    data = history(fact("profile", NOON)).vector()
    for index, feature in enumerate(CATALOG):
        if math.isnan(struct.unpack_from("<f", data, 4 * index)[0]):
            assert struct.unpack_from("<I", data, 4 * index) == (0x7FC00000,), feature.name
    assert math.isnan(value(history(fact("profile", NOON)), "purchase_age_days"))


def test_every_operation_of_the_catalog_has_an_answer() -> None:
    assert {feature.op for feature in CATALOG} <= set(oracle._OPERATIONS) == set(Op)


def test_hostile_worlds_hold_what_they_promise() -> None:
    w = world(3, 0)
    again = world(3, 0)
    assert (w.facts == again.facts).all()
    assert w.facts.shape != world(4, 0).facts.shape or (w.facts != world(4, 0).facts).any()
    histories = [oracle.History() for _ in w.customers]
    most_kept = [0] * len(w.customers)
    outcomes, lates = [0] * 7, 0
    for owner, row, skip in zip(w.owner.tolist(), w.facts.tolist(), w.skip.tolist(), strict=True):
        if skip:
            continue
        handled = histories[owner].handle(row)
        outcomes[handled.outcome] += 1
        lates += handled.late
        if w.hot[owner]:
            most_kept[owner] = max(most_kept[owner], len(histories[owner].kept()))
    assert sum(kept > HOT_FACTS for kept in most_kept) >= 0.01 * len(w.customers)
    assert min(outcomes[:6]) >= 5, outcomes
    assert lates > 500
    assert w.skip.sum() > 10
    for topic in range(4):
        offsets = w.facts[w.facts[:, KIND] >> 3 == topic, OFFSET]
        assert (offsets[1:] > offsets[:-1]).all()
    assert (w.facts[:, A] == 0).any()
    assert (w.facts[:, C] == 0).any()


def test_only_verification_reads_the_oracle_and_the_oracle_reads_only_tables() -> None:
    allowed = {"features/verify.py"}
    packages = ("proto", "features", "models", "drift", "scoring", "streams")
    readers = {
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if any("oracle" in name.split(".") for name in _imports(path))
    }
    assert readers <= allowed
    assert {name for name in _imports(ROOT / "features/oracle.py") if name.startswith("features")} == {
        "features.catalog",
        "features.facts",
        "features.window",
    }


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "features" else set()
    return names
