"""Properties of histories and vectors over generated lives: equal to the oracle, and to themselves however they came together."""

from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import oracle
from features.facts import DAY_MS, ID, KIND, KINDS, LEVEL, NONE, OFFSET, TIME, TOPICS, VALUE, WIDTH, A, B, C, D, pack_profile, pack_ticket
from features.history import Histories, Outcome, digest, vectors
from features.verify import Shelf, check_world, verify
from features.window import HORIZON_MS, HOUR_MS, WINDOW_MS

IntArray = npt.NDArray[np.int64]
Moves = list[Any]  # nested tuples as the strategies below draw them
START = 1_700_049_600_000  # 2023-11-15T12:00:00Z

# A life is a list of moves; each says where the next fact lies in time, relative to those before it, and what it is.
_EDGE = st.sampled_from((-1, 0, 1))
_ANYWHEN = st.one_of(
    st.tuples(
        st.just("on"),
        st.one_of(st.integers(0, 3), st.integers(0, 2 * HOUR_MS), st.integers(0, 40 * DAY_MS), st.integers(0, 900 * DAY_MS)),
        st.just(0),
    ),
    st.tuples(st.just("after"), st.integers(0, 50), st.tuples(st.sampled_from(WINDOW_MS), _EDGE)),
    st.tuples(st.just("late"), st.one_of(st.integers(0, 2 * HOUR_MS), st.integers(0, 91 * DAY_MS)), st.just(0)),
    st.tuples(st.just("late edge"), st.sampled_from(WINDOW_MS), _EDGE),
    st.tuples(st.just("tie"), st.integers(0, 50), st.just(0)),
    st.tuples(st.just("midnight"), st.sampled_from((HOUR_MS, DAY_MS)), _EDGE),
    st.tuples(st.just("again"), st.integers(0, 50), st.sampled_from((OFFSET, OFFSET, VALUE, TIME, A, C))),
)
_VALUES = st.one_of(st.just(NONE), st.integers(0, 3), st.integers(0, 10**15), st.just(10**15), st.just(2**60))
_TEXTS = st.tuples(*[st.sampled_from((0, 1, 2, 3, -1, 2**62, 2**40))] * 4)
_LEVELS = st.tuples(
    st.integers(0, 4),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(0, 10),
    st.none() | st.integers(1, 30_000),
    st.none() | st.booleans(),
)
_MOVES = st.tuples(_ANYWHEN, st.sampled_from(sorted(KINDS)), _VALUES, _LEVELS, _TEXTS)
LIVES = st.lists(_MOVES, min_size=1, max_size=60)
WITHIN_GRACE = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3), st.integers(0, HORIZON_MS - 1), st.sampled_from([w + e for w in WINDOW_MS[:-1] for e in (-1, 0, 1)])),
        st.sampled_from(sorted(KINDS)),
        _VALUES,
        _LEVELS,
        _TEXTS,
    ),
    min_size=2,
    max_size=40,
)


def row_of(
    time: int, kind: str, value: int, level: tuple[int, int | None, int | None, int | None, bool | None], texts: tuple[int, ...]
) -> list[int]:
    row = [0] * WIDTH
    topic = KINDS[kind] >> 3
    row[TIME], row[KIND], row[VALUE] = time, KINDS[kind], value
    if topic == 1 and value == 2**60:
        row[VALUE] = 10**9  # 60 of them may not overflow a sum that has no rule of its own
    if topic == 2:
        row[LEVEL] = pack_ticket(*level[:3])
        row[VALUE] = NONE if value == NONE else value % 10**9
    if topic == 3:
        row[LEVEL] = pack_profile(*level[3:])
        row[VALUE] = NONE if value == NONE else value % 30_000
    row[A], row[B], row[C], row[D] = texts
    return row


def life_of(moves: Moves) -> IntArray:
    """Facts in arrival order, shape (n, WIDTH); offsets grow with it."""
    rows: list[list[int]] = []
    newest = START
    for serial, ((where, size, extra), kind, value, level, texts) in enumerate(moves):
        back = rows[-1 - size % len(rows)] if rows else None
        if where == "again" and back is not None and isinstance(extra, int):
            row = list(back)
            if extra != OFFSET:
                row[extra] = 5 if row[extra] == NONE else row[extra] ^ 1
        else:
            match where:
                case "on":
                    time = newest + size
                case "late" | "late edge":
                    time = newest - size + (extra if isinstance(extra, int) else 0)
                case "midnight":
                    time = (newest // size + 1) * size + (extra if isinstance(extra, int) else 0)
                case "after" if back is not None and isinstance(extra, tuple):
                    time = back[TIME] + extra[0] + extra[1]
                case _:
                    time = newest if back is None else back[TIME]
            row = row_of(time, kind, value, level, texts)
            row[ID] = serial + 1
        row[OFFSET] = 10 * serial
        rows.append(row)
        newest = max(newest, row[TIME])
    return np.array(rows, np.int64)


def told(facts: IntArray) -> tuple[oracle.History, list[tuple[int, int, bool, bytes]]]:
    """What the oracle says of a life, event by event."""
    life = oracle.History()
    said = []
    for row in facts.tolist():
        handled = life.handle(row)
        said.append((handled.outcome, handled.at, handled.late, life.vector() if handled.outcome == oracle.SCORED else b""))
    return life, said


def heard(histories: Histories, customer: str, facts: IntArray) -> list[tuple[int, int, bool, bytes]]:
    """What the kernel says of it."""
    step = histories.step([customer] * len(facts), facts)
    given = {int(row): step.vectors[k].tobytes() for k, row in enumerate(step.rows.tolist())}
    return [(int(step.outcome[i]), int(step.at[i]), bool(step.late[i]), given.get(i, b"")) for i in range(len(facts))]


def accepted(life: oracle.History) -> IntArray:
    return np.array([fact.row for fact in life.facts], np.int64).reshape(-1, WIDTH)


def test_outcomes_have_the_same_numbers_here_and_there() -> None:
    assert [
        oracle.SCORED,
        oracle.IS_PROFILE,
        oracle.DUPLICATE,
        oracle.DUPLICATE_CONFLICT,
        oracle.TOO_LATE,
        oracle.AMOUNT_RANGE,
        oracle.SKIPPED,
    ] == [
        Outcome.SCORED,
        Outcome.PROFILE,
        Outcome.DUPLICATE,
        Outcome.DUPLICATE_CONFLICT,
        Outcome.TOO_LATE,
        Outcome.AMOUNT_RANGE,
        Outcome.SKIPPED,
    ]


@settings(max_examples=400, deadline=None)
@given(LIVES)
def test_every_event_of_any_life_is_what_the_oracle_says(moves: Moves) -> None:
    facts = life_of(moves)
    assert heard(Histories(create=True), "c", facts) == told(facts)[1]


@settings(max_examples=150, deadline=None)
@given(LIVES, st.lists(st.integers(0, 60), max_size=4), st.booleans())
def test_batches_and_reloads_in_the_middle_change_nothing(moves: Moves, cuts: list[int], reload: bool) -> None:
    facts = life_of(moves)
    histories, shelf = Histories(create=True), Shelf()
    said: list[tuple[int, int, bool, bytes]] = []
    ends = sorted({min(cut, len(facts)) for cut in cuts} | {len(facts)})
    for start, end in zip([0, *ends], ends, strict=False):
        said += heard(histories, "c", facts[start:end])
        if end and "c" in histories:
            for write in histories.changes(["c"]):
                shelf.put(write)
            if reload:
                histories = Histories(create=True)
                histories.load(["c"], [shelf.get("c")])
    assert said == told(facts)[1]
    whole = Histories(create=True)
    whole.step(["c"] * len(facts), facts)
    assert histories.digest("c") == whole.digest("c") == digest(whole.state("c"))


@settings(max_examples=150, deadline=None)
@given(LIVES)
def test_kept_facts_and_carry_say_what_the_full_history_says(moves: Moves) -> None:
    facts = life_of(moves)
    life, _ = told(facts)
    histories = Histories(create=True)
    histories.step(["c"] * len(facts), facts)
    assert life.newest is not None
    kept = histories.facts("c")
    assert kept.tolist() == [list(fact.row) for fact in life.kept()]
    full = vectors(accepted(life), None, life.newest).tobytes()
    assert full == vectors(kept, histories.carry("c"), life.newest).tobytes() == life.vector()


@settings(max_examples=150, deadline=None)
@given(LIVES, st.one_of(st.integers(0, 3), st.integers(0, 400 * DAY_MS), st.sampled_from([w + e for w in WINDOW_MS for e in (-1, 0, 1)])))
def test_silence_is_the_same_history_seen_later(moves: Moves, silence_ms: int) -> None:
    facts = life_of(moves)
    life, _ = told(facts)
    histories = Histories(create=True)
    histories.step(["c"] * len(facts), facts)
    assert life.newest is not None
    before = histories.digest("c")
    assert histories.vectors_at(["c"], life.newest + silence_ms)[0].tobytes() == life.vector(life.newest + silence_ms)
    assert histories.digest("c") == before


@settings(max_examples=100, deadline=None)
@given(LIVES)
def test_what_was_known_then_is_the_history_up_to_the_cut(moves: Moves) -> None:
    facts = life_of(moves)
    life, said = told(facts)
    everything = accepted(life)
    cut = dict.fromkeys(TOPICS, -1)
    for row, (outcome, at, _, vector) in zip(facts.tolist(), said, strict=True):
        cut[TOPICS[row[KIND] >> 3]] = row[OFFSET]
        if outcome == oracle.SCORED:
            known = [fact for fact in life.facts if fact.row[OFFSET] <= cut[TOPICS[fact.row[KIND] >> 3]]]
            assert vectors(everything, None, at, cut).tobytes() == oracle.vector(known, at) == vector


@settings(max_examples=200, deadline=None)
@given(WITHIN_GRACE, st.randoms(use_true_random=False), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 200 * DAY_MS))
def test_arrival_order_and_repetition_within_grace_do_not_show_in_the_end(
    moves: Moves, random: Random, again: list[int], after_ms: int
) -> None:
    rows = [row_of(START + time, *rest) for time, *rest in moves]
    for serial, row in enumerate(rows):
        row[OFFSET], row[ID] = 10 * serial, serial + 1
        row[VALUE] = min(row[VALUE], 10**15)  # at the bound of the sum the order does matter: who comes last is refused
    end = max(row[TIME] for row in rows) + after_ms
    last = row_of(end, "login", NONE, (0, None, None, None, None), (0, 0, 0, 0))
    last[OFFSET], last[ID] = 10**6, 10**6
    shuffled = rows + [list(rows[i % len(rows)]) for i in again]
    random.shuffle(shuffled)
    results = []
    for arrived in (rows, sorted(rows, key=lambda row: row[TIME]), shuffled):
        histories = Histories(create=True)
        step = histories.step(["c"] * (len(arrived) + 1), np.array([*arrived, last], np.int64))
        results.append((step.vectors[-1].tobytes(), histories.digest("c"), histories.vectors_at(["c"], end + 1)[0].tobytes()))
    assert results[0] == results[1] == results[2]


@settings(max_examples=60, deadline=None)
@given(st.lists(LIVES, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_customers_do_not_show_in_each_other(lives: list[Moves], random: Random) -> None:
    each = [life_of(moves) for moves in lives]  # ids, values and times of all are alike
    order = [c for c, facts in enumerate(each) for _ in range(len(facts))]
    random.shuffle(order)
    taken = [0] * len(each)
    stream = []
    for c in order:
        stream.append(each[c][taken[c]])
        taken[c] += 1
    histories = Histories(create=True)
    step = histories.step([f"c{c}" for c in order], np.array(stream))
    given = dict(zip(step.rows.tolist(), (vector.tobytes() for vector in step.vectors), strict=True))
    for c, facts in enumerate(each):
        places = [place for place, owner in enumerate(order) if owner == c]
        assert [(int(step.outcome[p]), int(step.at[p]), bool(step.late[p]), given.get(p, b"")) for p in places] == told(facts)[1]


@pytest.mark.parametrize("index", range(3))
def test_a_hostile_world_with_hot_customers_equals_the_oracle(index: int) -> None:
    found = check_world(7, index)
    assert found.mismatches == 0, found.first_mismatches
    assert found.histories_over_1000_facts >= 0.01 * found.histories
    assert found.cases > 2_500
    assert min(found.checks[check] for check in ("full", "later", "newest", "kept and carry", "undisturbed", "known then")) > 150


def test_the_result_does_not_depend_on_the_number_of_processes() -> None:
    assert verify(3_000, 5, 1) == verify(3_000, 5, 2)
