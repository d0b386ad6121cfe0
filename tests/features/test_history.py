"""Customers of a partition in memory: what becomes of each fact, what goes to the store, and what comes back."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from random import Random
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest

from features.carry import BASE
from features.catalog import N_FEATURES, NAMES
from features.facts import DAY_MS, ID, KIND, KINDS, MAX_AMOUNT_MINOR, NONE, OFFSET, TIME, VALUE, WIDTH, A
from features.history import CUSTOMER_WEIGHT, Histories, Outcome, Step, digest, vectors
from features.kernel import ENTRIES, KEPT
from features.state import CHUNK, decode
from features.store import CustomerState, CustomerWrite, digests
from features.window import HORIZON_MS, HOUR_MS
from proto.errors import ChainBroken, StateDamaged

IntArray = npt.NDArray[np.int64]
NOON = 1_700_049_600_000  # 2023-11-15T12:00:00Z
_SERIAL = count(1)


def fact(kind: str, time: int, *, offset: int | None = None, id: int | None = None, value: int = NONE, **texts: int) -> list[int]:
    serial = next(_SERIAL)
    row = [0] * WIDTH
    row[TIME], row[KIND], row[VALUE] = time, KINDS[kind], value
    row[OFFSET] = serial if offset is None else offset
    row[ID] = serial * 0x9E3779B97F4A7C15 % 2**63 if id is None else id
    for name, text in texts.items():
        row["abcd".index(name) + A] = text
    return row


def table(*rows: list[int]) -> IntArray:
    return np.array(rows, np.int64).reshape(len(rows), WIDTH)


def handle(histories: Histories, *rows: list[int], customer: str = "c") -> Step:
    return histories.step([customer] * len(rows), table(*rows))


def outcomes(step: Step) -> list[Outcome]:
    return [Outcome(code) for code in step.outcome.tolist()]


@dataclass
class Shelf:
    """The store as far as customers are concerned."""

    mains: dict[str, bytes] = field(default_factory=dict)
    chunks: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def put(self, writes: Sequence[CustomerWrite]) -> None:
        for write in writes:
            self.mains[write.customer] = write.main
            chunks = self.chunks.setdefault(write.customer, {})
            chunks.update(write.chunks)
            for number in write.dropped:
                del chunks[number]

    def get(self, customer: str) -> CustomerState | None:
        if customer not in self.mains:
            return None
        return CustomerState(self.mains[customer], tuple(chunk for _, chunk in sorted(self.chunks[customer].items())))


def random_stream(seed: int, n: int, customers: int) -> tuple[list[str], IntArray]:
    """Facts of several customers: half in order, some late, some again (same or other content), some far too late, jumps of months."""
    rng = Random(seed)
    names: list[str] = []
    rows: list[list[int]] = []
    clock = dict.fromkeys(range(customers), NOON)
    for _ in range(n):
        who = min(rng.randrange(customers), rng.randrange(customers))
        clock[who] += rng.choice([0, 1, HOUR_MS, *[5 * HOUR_MS] * 6, DAY_MS * 40 if rng.random() < 0.1 else 0])
        dice = rng.random()
        mine = [row for name, row in zip(names, rows, strict=True) if name == f"{who:03d}"]
        if mine and dice < 0.1:
            row = list(rng.choice(mine[-50:]))
            row[OFFSET] = next(_SERIAL)
            if dice < 0.03:
                row[VALUE] = 77
        else:
            late = rng.choice([0, 0, 0, rng.randrange(3 * DAY_MS), rng.randrange(100 * DAY_MS)])
            kind = rng.choice(list(KINDS))
            row = fact(kind, clock[who] - late, value=rng.randrange(1000), **{c: rng.randrange(6) for c in "abcd"})
        names.append(f"{who:03d}")
        rows.append(row)
    return names, table(*rows)


# What becomes of a fact


def test_each_outcome() -> None:
    login = fact("login", NOON, id=1)
    again = [*login[:OFFSET], 999, *login[OFFSET + 1 :]]
    conflict = list(again)
    conflict[A] = 5
    step = handle(
        Histories(create=True),
        login,
        fact("profile", NOON),
        again,
        conflict,
        fact("login", NOON - HORIZON_MS),
        fact("login", NOON - HORIZON_MS + 1),
        fact("payment", NOON, value=2**62),
        fact("payment", NOON, value=1),
    )
    assert outcomes(step) == [
        Outcome.SCORED,
        Outcome.PROFILE,
        Outcome.DUPLICATE,
        Outcome.DUPLICATE_CONFLICT,
        Outcome.TOO_LATE,
        Outcome.SCORED,
        Outcome.SCORED,
        Outcome.AMOUNT_RANGE,
    ]
    assert step.rows.tolist() == [0, 5, 6]
    assert step.vectors.shape == (3, N_FEATURES)
    assert step.late.tolist() == [False] * 5 + [True] + [False] * 2
    assert step.at.tolist() == [NOON] * 8


@pytest.mark.parametrize("column", [c for c in range(WIDTH) if c not in (OFFSET, ID)])
def test_a_duplicate_with_any_other_content_is_a_conflict(column: int) -> None:
    first = fact("opened", NOON, value=3)
    other = list(first)
    other[column] += 1
    histories = Histories(create=True)
    before = handle(histories, first)
    digest_before = histories.digest("c")
    step = handle(histories, other)
    assert outcomes(step) == [Outcome.DUPLICATE_CONFLICT]
    assert step.at.tolist() == [NOON], "a duplicate never moves time"
    assert histories.digest("c") == digest_before
    assert histories.vectors_at(["c"], NOON)[0].tobytes() == before.vectors[0].tobytes()


def test_a_duplicate_is_one_only_while_its_fact_is_kept() -> None:
    old = fact("login", NOON, id=7)
    histories = Histories(create=True)
    handle(histories, old)
    # One millisecond before the old one leaves it is a duplicate; as it leaves with the newest fact it is too late.
    assert outcomes(handle(histories, fact("login", NOON + HORIZON_MS - 1), old)) == [Outcome.SCORED, Outcome.DUPLICATE]
    assert outcomes(handle(histories, fact("login", NOON + HORIZON_MS), old)) == [Outcome.SCORED, Outcome.TOO_LATE]
    again = fact("login", NOON + HORIZON_MS, id=7)
    assert outcomes(handle(histories, again, again)) == [Outcome.SCORED, Outcome.DUPLICATE]


def test_ids_and_values_of_other_customers_do_not_mix() -> None:
    histories = Histories(create=True)
    rows = table(*[fact("payment", NOON, id=7, a=1, value=5) for _ in range(3)])
    step = histories.step(["a", "b", "c"], rows)
    assert outcomes(step) == [Outcome.SCORED] * 3
    assert len({vector.tobytes() for vector in step.vectors}) == 1
    histories.forget(["a"])
    assert outcomes(histories.step(["a", "b"], rows[:2])) == [Outcome.SCORED, Outcome.DUPLICATE]


def test_the_money_of_a_whole_life_is_bounded() -> None:
    histories = Histories(create=True)
    times = [NOON + i * 100 * DAY_MS for i in range(4)]  # each leaves before the next comes: the carry remembers its money
    kinds = ["payment", "refund", "cancellation", "failed_payment"]
    step = handle(histories, *[fact(k, t, value=2**60) for k, t in zip(kinds, times, strict=True)])
    assert outcomes(step) == [Outcome.SCORED] * 4
    assert outcomes(handle(histories, fact("payment", times[-1], value=1))) == [Outcome.AMOUNT_RANGE]
    assert outcomes(handle(histories, fact("payment", times[-1], value=0), fact("payment", times[-1]))) == [Outcome.SCORED] * 2
    assert outcomes(handle(histories, fact("login", times[-1], value=MAX_AMOUNT_MINOR))) == [Outcome.SCORED], "no money"


def test_skipped_rows_are_not_looked_at() -> None:
    histories = Histories()
    histories.ensure(["c"])
    rows = table(fact("login", NOON), fact("login", NOON + 1), fact("login", NOON + 2))
    rows[1] = NONE
    step = histories.step(["c", "", "c"], rows, np.array([False, True, False]))
    assert outcomes(step) == [Outcome.SCORED, Outcome.SKIPPED, Outcome.SCORED]
    assert step.rows.tolist() == [0, 2]
    assert "" not in histories


def test_a_customer_who_was_not_loaded_is_refused_before_anything_changes() -> None:
    histories = Histories()
    histories.ensure(["c"])
    with pytest.raises(KeyError, match="stranger"):
        histories.step(["c", "stranger"], table(fact("login", NOON), fact("login", NOON)))
    assert histories.kept_facts == 0
    assert histories.missing(["x", "c", "x", "y"]) == ["x", "y"]


def test_arguments_that_do_not_fit_are_refused() -> None:
    histories = Histories(create=True)
    with pytest.raises(ValueError, match="need facts of shape"):
        histories.step(["c"], table())
    with pytest.raises(ValueError, match="skip must have shape"):
        histories.step(["c"], table(fact("login", NOON)), np.zeros(2, np.bool_))
    with pytest.raises(ValueError, match="must be positive"):
        Histories(max_facts=0)
    assert histories.step([], table()).vectors.shape == (0, N_FEATURES)


# The same, whichever way it is cut into batches, evicted and read back


@pytest.mark.parametrize("seed", range(6))
def test_eviction_and_reading_back_change_nothing(seed: int) -> None:
    names, rows = random_stream(seed, 900, 7)
    rng = Random(seed)
    whole = Histories(create=True)
    expected = whole.step(names, rows)
    histories, shelf, evicted = Histories(max_facts=60), Shelf(), 0
    begin, scored = 0, 0
    while begin < len(names):
        end = min(len(names), begin + rng.choice([1, 5, 100]))
        batch = names[begin:end]
        missing = histories.missing(batch)
        histories.load(missing, [shelf.get(name) for name in missing])
        step = histories.step(batch, rows[begin:end])
        assert step.outcome.tolist() == expected.outcome[begin:end].tolist()
        assert step.at.tolist() == expected.at[begin:end].tolist()
        assert step.vectors.tobytes() == expected.vectors[scored : scored + len(step.rows)].tobytes()
        scored += len(step.rows)
        shelf.put(histories.changes(list(dict.fromkeys(batch))))
        evicted += histories.evict()
        begin = end
    assert evicted > 20
    assert {Outcome(code) for code in expected.outcome.tolist()} >= {Outcome.DUPLICATE, Outcome.DUPLICATE_CONFLICT, Outcome.TOO_LATE}
    for name in whole:
        state = shelf.get(name)
        assert state is not None
        assert state.main == whole.state(name).main
        assert digest(state) == whole.digest(name)


@pytest.mark.parametrize("size", [1, 7, 64, 500])
def test_batches_of_any_size_give_the_same(size: int) -> None:
    names, rows = random_stream(11, 500, 5)
    whole, parts = Histories(create=True), Histories(create=True)
    expected = whole.step(names, rows)
    vectors = [parts.step(names[i : i + size], rows[i : i + size]).vectors for i in range(0, len(names), size)]
    assert np.concatenate(vectors).tobytes() == expected.vectors.tobytes()
    assert {name: parts.digest(name) for name in parts} == {name: whole.digest(name) for name in whole}


@pytest.mark.parametrize("seed", range(4))
def test_a_history_shuffled_within_an_hour_with_duplicates_ends_the_same(seed: int) -> None:
    rng = Random(seed)
    rows = [fact(rng.choice(list(KINDS)), NOON + i * 7 * 60_000, value=i, a=i % 5) for i in range(400)]
    mixed = sorted(rows + rng.sample(rows, 40), key=lambda row: row[TIME] + rng.randrange(HOUR_MS))
    straight, shuffled = Histories(create=True), Histories(create=True)
    handle(straight, *rows)
    assert outcomes(handle(shuffled, *mixed)).count(Outcome.DUPLICATE) == 40
    assert shuffled.digest("c") == straight.digest("c")
    assert shuffled.vectors_at(["c"], NOON + 9 * DAY_MS).tobytes() == straight.vectors_at(["c"], NOON + 9 * DAY_MS).tobytes()


def test_many_customers_and_facts_outgrow_every_array() -> None:
    histories, single = Histories(create=True), Histories(create=True)
    names = [f"{i % 700:04d}" for i in range(7_000)]
    rows = table(*[fact("payment", NOON + i * HOUR_MS, value=i, a=i, b=i) for i in range(7_000)])
    for begin in range(0, 7_000, 350):
        histories.step(names[begin : begin + 350], rows[begin : begin + 350])
    assert len(histories) == 700
    for name in ("0000", "0001", "0333", "0699"):
        mine = [i for i, other in enumerate(names) if other == name]
        single.step([name] * len(mine), rows[mine])
        assert histories.digest(name) == single.digest(name)
        assert histories.vectors_at([name], 2**42).tobytes() == single.vectors_at([name], 2**42).tobytes()


# Looking later


@pytest.mark.parametrize("seed", range(3))
def test_looking_later_equals_an_event_then_and_changes_nothing(seed: int) -> None:
    names, rows = random_stream(20 + seed, 300, 3)
    histories, undisturbed = Histories(create=True), Histories(create=True)
    histories.step(names, rows)
    undisturbed.step(names, rows)
    before = {name: histories.state(name) for name in histories}
    for name in histories:
        newest = int(histories.newest_ms([name])[0])
        for later in (0, 1, HOUR_MS, 7 * DAY_MS, 90 * DAY_MS - 1, 90 * DAY_MS):
            seen = histories.vectors_at([name], newest + later)[0]
            assert seen.tobytes() == vectors(histories.facts(name), histories.carry(name), newest + later).tobytes()
    assert {name: histories.state(name) for name in histories} == before
    more = table(*[fact("login", NOON + 400 * DAY_MS, id=i) for i in range(3)])
    others = sorted(histories)
    assert histories.step(others, more).vectors.tobytes() == undisturbed.step(others, more).vectors.tobytes()


def test_many_customers_are_looked_at_in_one_call() -> None:
    names, rows = random_stream(5, 400, 9)
    histories = Histories(create=True)
    histories.step(names, rows)
    everybody = list(histories)
    at = histories.newest_ms(everybody) + np.arange(len(everybody)) * DAY_MS
    together = histories.vectors_at(everybody, at)
    assert together.tobytes() == b"".join(histories.vectors_at([n], int(t)).tobytes() for n, t in zip(everybody, at, strict=True))
    with pytest.raises(ValueError, match="cannot be looked at as of"):
        histories.vectors_at(everybody, at - np.where(np.arange(len(at)) == 3, 3 * DAY_MS + 1, 0))
    with pytest.raises(KeyError):
        histories.vectors_at(["nobody"], NOON)


# What goes to the store


def test_an_event_in_order_rewrites_main_and_nothing_else() -> None:
    histories = Histories(create=True)
    written: list[list[int]] = []
    for i in range(3 * CHUNK):
        handle(histories, fact("login", NOON + i))
        (write,) = histories.changes(["c"])
        assert not write.dropped
        written.append([number for number, _ in write.chunks])
    assert [i for i, numbers in enumerate(written) if numbers] == [CHUNK - 1, 2 * CHUNK - 1, 3 * CHUNK - 1]
    assert [numbers for numbers in written if numbers] == [[0], [1], [2]]


def test_a_late_event_rewrites_the_chunks_from_its_place_on() -> None:
    histories = Histories(create=True)
    handle(histories, *[fact("login", NOON + 10 * i) for i in range(4 * CHUNK)])
    assert [number for number, _ in histories.changes(["c"])[0].chunks] == [0, 1, 2, 3]
    handle(histories, fact("login", NOON + 10 * (2 * CHUNK) + 1))
    assert [number for number, _ in histories.changes(["c"])[0].chunks] == [2, 3]
    assert histories.changes(["c"])[0].chunks == ()


def test_chunks_whose_facts_all_left_are_dropped_once() -> None:
    histories, shelf = Histories(create=True), Shelf()
    handle(histories, *[fact("login", NOON + i) for i in range(2 * CHUNK + 10)])
    shelf.put(histories.changes(["c"]))
    handle(histories, fact("login", NOON + HORIZON_MS + CHUNK))  # the first 65 leave
    (write,) = histories.changes(["c"])
    assert (write.chunks, write.dropped) == ((), (0,))
    assert histories.carry("c")[BASE] == CHUNK + 1
    shelf.put([write])
    handle(histories, fact("login", NOON + 3 * HORIZON_MS))  # everything leaves
    (write,) = histories.changes(["c"])
    assert write.dropped == (1,)
    shelf.put([write])
    assert shelf.chunks["c"] == {}
    state = shelf.get("c")
    assert state == histories.state("c")
    assert histories.changes(["c"])[0].dropped == ()


def test_writes_of_many_customers_are_those_of_each() -> None:
    names, rows = random_stream(3, 1500, 4)
    together, alone = Histories(create=True), Histories(create=True)
    together.step(names, rows)
    alone.step(names, rows)
    everybody = sorted(together)
    assert together.changes(everybody) == [write for name in everybody for write in alone.changes([name])]


def test_a_known_customer_without_state_is_never_taken_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.history._MOST_SINCE", 5)  # so that digests join the array in between
    shelf = Shelf()
    old = [f"old{i}" for i in range(7)]
    first = Histories(create=True)
    first.step(old, table(*[fact("login", NOON) for _ in old]))
    shelf.put(first.changes(old))
    histories = Histories(known=digests(old))
    seen: list[str] = []
    for i in range(20):
        names = [f"new{i}", old[i % 7]] if i < 7 else [f"new{i}"]
        histories.load(names, [shelf.get(name) for name in names])
        histories.step(names, table(*[fact("login", NOON) for _ in names]))
        writes = histories.changes(names)
        assert [write.new for write in writes] == [True, False][: len(names)]
        assert [write.new for write in histories.changes(names)] == [False] * len(names)
        shelf.put(writes)
        seen += names
    histories.forget(seen)
    for lost in ("old0", "old6", "new0", "new19"):
        among = sorted({lost, "old3", "new7", "nobody yet"})
        with pytest.raises(StateDamaged, match=f"'{lost}' is known, and nothing of it is stored"):
            histories.load(among, [None if name == lost else shelf.get(name) for name in among])
        assert len(histories) == 0
    histories.load(sorted(set(seen)), [shelf.get(name) for name in sorted(set(seen))])
    assert len(histories) == 27


def test_state_of_a_customer_nobody_knows_is_a_sign_of_damage() -> None:
    shelf = Shelf()
    first = Histories(create=True)
    handle(first, fact("login", NOON), customer="a")
    shelf.put(first.changes(["a"]))
    for known in (digests(["b"]), b""):
        with pytest.raises(StateDamaged, match="'a' is stored, and not in the list"):
            Histories(known=known).load(["a"], [shelf.get("a")])
    Histories().load(["a"], [shelf.get("a")])  # nobody looks
    Histories(known=digests(["a"])).load(["a"], [shelf.get("a")])


def test_a_customer_forgotten_before_it_was_stored_is_new_again() -> None:
    histories = Histories(known=b"")
    for _ in range(2):
        histories.load(["a"], [None])
        handle(histories, fact("login", NOON), customer="a")
        histories.forget(["a"])
    histories.load(["a"], [None])
    assert histories.changes(["a"])[0].new


def test_a_damaged_state_is_refused_by_name_and_nobody_stays() -> None:
    names, rows = random_stream(3, 300, 3)
    source = Histories(create=True)
    source.step(names, rows)
    good, bad = source.state("000"), source.state("001")
    broken = CustomerState(bad.main[:-1] + bytes([bad.main[-1] ^ 1]), bad.chunks)
    histories = Histories()
    with pytest.raises(ChainBroken, match="'001'"):
        histories.load(["000", "new", "001"], [good, None, broken])
    assert list(histories) == []
    assert histories.kept_facts == 0
    histories.load(["000", "new", "001"], [good, None, bad])
    assert [histories.digest(n) for n in ("000", "001")] == [source.digest("000"), source.digest("001")]
    assert len(histories.facts("new")) == 0
    with pytest.raises(ValueError, match="in memory already"):
        histories.load(["000"], [good])
    with pytest.raises(ValueError, match="loaded twice"):
        histories.load(["x", "x"], [None, None])


def test_last_scores_stay_with_their_customer() -> None:
    histories = Histories(create=True)
    handle(histories, fact("login", NOON), customer="a")
    handle(histories, fact("login", NOON), customer="b")
    assert [x.tolist()[0] for x in histories.last_scores(["a"])[1:]] == [0, NONE]
    assert np.isnan(histories.last_scores(["a"])[0][0])
    scores = np.array([0.1, 0.2, 0.9], np.float32), np.array([1, 2, 3], np.uint8), np.array([5, 6, 7], np.int64)
    sources = np.array([0, 2, 4]), np.array([17, 5, 300])
    noted = histories.note_scores(["a", "b", "a"], *scores, *sources)
    assert [x.tolist() for x in noted] == [[0, 0, 1], [0, 0, 1], [-1, -1, 0], [-1, -1, 17], [1, 2, 3]]
    loaded = Histories()
    loaded.load(["a"], [histories.state("a")])
    for held in (histories, loaded):
        probability, band, at = held.last_scores(["a"])
        assert (probability[0], band[0], at[0]) == (np.float32(0.9), 3, 7)
        one = decode(held.state("a"))
        assert (one.alert_band, one.source, one.source_offset) == (3, 4, 300)
    floors = np.array([np.inf, -np.inf, 0.2, 0.5])
    lower = np.array([0.5, 0.49, 0.2, 0.19], np.float32), np.array([2, 2, 1, 1], np.uint8), np.arange(4)
    noted = loaded.note_scores(["a"] * 4, *lower, np.arange(4), np.arange(4), floors)
    assert [x.tolist() for x in noted[:2]] == [[3, 2, 2, 1], [3, 3, 2, 2]]
    assert [x.tolist() for x in noted[2:]] == [[4, 0, 1, 2], [300, 0, 1, 2], [3, 2, 2, 1]]  # 0.2 lies between float32 0.2 and the floor
    loaded.restore_scores(["a", "a"], lower[0][:2], lower[1][:2], np.array([1, 3], np.uint8), np.arange(2), np.arange(2), np.arange(2))
    assert decode(loaded.state("a")).alert_band == 3
    assert loaded.last_scores(["a"])[1].tolist() == [2]
    assert loaded.last_vectors(["a"]).tobytes() == histories.last_vectors(["a"]).tobytes()


# Bounded memory


def test_the_least_recently_used_leave_and_leave_nothing_behind() -> None:
    histories = Histories(max_facts=10 * (CUSTOMER_WEIGHT + 20), create=True)
    names = [f"{i:02d}" for i in range(20)]
    for name in names:
        handle(histories, *[fact("login", NOON + i, a=i, b=i, c=i, d=i) for i in range(20)], customer=name)
    assert histories.evict() == 0, "nobody's changes were taken"
    histories.changes(names[:15])
    handle(histories, fact("login", NOON + 20), customer="00")
    histories.changes(["00"])
    assert histories.evict() == 12
    assert sorted(histories) == ["00", *names[13:]]
    histories.changes(names[15:])
    assert histories.evict() == 0, "within the bound"
    histories.forget(list(histories))
    counts = histories._t.counts
    assert (len(histories), counts[KEPT], counts[ENTRIES]) == (0, 0, 0)
    assert not histories._t.entries[:, 1].any()


def test_memory_stays_bounded_while_customers_come_and_go() -> None:
    histories = Histories(max_facts=5_000)
    sizes = []
    for turn in range(60):
        names = [f"{turn}-{i}" for i in range(40)]
        histories.load(names, [None] * 40)
        histories.step(names * 5, table(*[fact("payment", NOON + i, a=i) for i in range(200)]))
        histories.changes(names)
        histories.evict()
        sizes.append(histories.nbytes)
        assert histories.kept_facts + CUSTOMER_WEIGHT * len(histories) <= 5_000
    assert sizes[-1] == sizes[30]


# Cost


def seconds_per_event(kept: int) -> float:
    histories = Histories(create=True)
    step = HORIZON_MS // kept
    rng = np.random.default_rng(7)

    def rows(first: int, n: int) -> IntArray:
        facts = np.zeros((n, WIDTH), np.int64)
        facts[:, TIME] = NOON + np.arange(first, first + n) * step
        facts[:, OFFSET] = np.arange(first, first + n)
        facts[:, KIND] = rng.choice([KINDS["payment"], KINDS["login"], KINDS["feature_use"], KINDS["opened"]], n)
        facts[:, VALUE] = 5
        facts[:, A : A + 4] = rng.integers(1, 50, (n, 4))
        facts[:, ID] = rng.integers(1, 2**62, n)
        return facts

    histories.step(["c"] * kept, rows(0, kept))
    best = np.inf
    for turn in range(8):
        batch = rows(kept + 1000 * turn, 1000)
        before = perf_counter()
        histories.step(["c"] * 1000, batch)
        best = min(best, (perf_counter() - before) / 1000)
        assert abs(histories.kept_facts - kept) <= 1
    return best


def test_an_event_in_order_costs_the_same_however_long_the_history() -> None:
    assert seconds_per_event(10_000) <= 2 * seconds_per_event(100)


def test_a_late_event_among_ten_thousand_facts_takes_less_than_a_millisecond() -> None:
    histories = Histories(create=True)
    handle(histories, *[fact("login", NOON + i * HORIZON_MS // 10_001, a=i % 50, b=i) for i in range(10_000)])
    times = []
    for i in range(40):
        late = table(fact("login", NOON + DAY_MS * 2 * i + 1, a=i))
        before = perf_counter()
        histories.step(["c"], late)
        times.append(perf_counter() - before)
    assert histories.kept_facts == 10_040
    assert float(np.median(times)) <= 1e-3
    assert all(a[TIME] <= b[TIME] for a, b in pairwise(histories.facts("c").tolist()))


def test_names_of_features_match_the_columns_of_a_step() -> None:
    step = handle(Histories(create=True), fact("payment", NOON, value=250))
    row = dict(zip(NAMES, step.vectors[0].tolist(), strict=True))
    assert (row["spend_minor_sum_life"], row["purchase_count_24h"], row["hour_cos"]) == (250, 1, -1)
