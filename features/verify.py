"""The kernel against the oracle over seeded hostile histories, in several processes; a case is one whole vector compared as bytes.

A world (features/cases.py) runs through `Histories` in its batches. Between batches the customers' changes go to a shelf of
encoded states, the histories are sometimes forgotten and read back, and sometimes evicted: so the vectors compared come from
kept facts and carry, from memory and from bytes. At the end each customer is asked again from all its facts at once, at a
later instant, and as it was known at an earlier event; its state must be that of a run without any of the disturbance.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features import oracle
from features.carry import BASE
from features.cases import HOT_FACTS, World, world
from features.catalog import LAYOUT_HASH, NAMES
from features.facts import DAY_MS, KIND, OFFSET, TOPICS, WIDTH
from features.history import Histories, vectors
from features.store import CustomerState, CustomerWrite
from features.window import WINDOW_MS

CUSTOMERS: Final = 200
"""Customers of a world."""
HOT_SAMPLE: Final = 0.1
"""Share of a hot customer's events whose vector the oracle works out as well; the kernel works out all of them."""
SHOWN: Final = 20
"""Mismatches reported one by one; all are counted."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference. check: what was asked; what: "outcome", "at", "late" or a feature name; values as text."""

    check: str
    world: int
    customer: str
    position: int
    what: str
    oracle: str
    kernel: str


@dataclass(slots=True)
class Found:
    """What one world, or all of them, came to.

    cases: vectors compared with the oracle's. checks: comparisons by what was asked. hot_events: scored events of hot
    customers, of which hot_sampled had an oracle vector. histories_over_1000_facts: customers that once kept more facts.
    """

    worlds: int = 0
    cases: int = 0
    events: int = 0
    histories: int = 0
    histories_over_1000_facts: int = 0
    hot_events: int = 0
    hot_sampled: int = 0
    reloads: int = 0
    evictions: int = 0
    mismatches: int = 0
    checks: dict[str, int] = field(default_factory=dict)
    mismatches_by: dict[str, int] = field(default_factory=dict)
    first_mismatches: list[Mismatch] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.checks, other.checks), (self.mismatches_by, other.mismatches_by)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        self.first_mismatches = (self.first_mismatches + other.first_mismatches)[:SHOWN]


_COUNTS: Final = (
    "worlds",
    "cases",
    "events",
    "histories",
    "histories_over_1000_facts",
    "hot_events",
    "hot_sampled",
    "reloads",
    "evictions",
    "mismatches",
)


class _Comparer:
    """Counts comparisons of one world and writes down what differs."""

    def __init__(self, index: int, customers: Sequence[str]) -> None:
        self.found = Found(worlds=1, histories=len(customers))
        self.index = index
        self.customers = customers

    def equal(self, check: str, customer: int, position: int, what: str, right: object, got: object) -> None:
        """Compare two plain values."""
        self.found.checks[check] = self.found.checks.get(check, 0) + 1
        if right != got:
            self._differ(check, customer, position, what, str(right), str(got))

    def vector(self, check: str, customer: int, position: int, right: bytes, got: npt.NDArray[np.float32]) -> None:
        """Compare the bytes of two vectors; a difference names each feature that has one."""
        self.found.checks[check] = self.found.checks.get(check, 0) + 1
        if right == got.tobytes():
            return
        expected = np.frombuffer(right, "<f4")
        if got.shape != expected.shape or got.dtype != np.float32:
            self._differ(check, customer, position, "layout", f"{expected.dtype}{expected.shape}", f"{got.dtype}{got.shape}")
            return
        wrong = np.flatnonzero(expected.view(np.uint32) != np.ascontiguousarray(got).view(np.uint32))
        for column in wrong.tolist():
            self._differ(check, customer, position, NAMES[column], _text(expected[column]), _text(got[column]), count=0)
        self.found.mismatches += 1

    def _differ(self, check: str, customer: int, position: int, what: str, right: str, got: str, count: int = 1) -> None:
        self.found.mismatches += count
        self.found.mismatches_by[what] = self.found.mismatches_by.get(what, 0) + 1
        if len(self.found.first_mismatches) < SHOWN:
            self.found.first_mismatches.append(Mismatch(check, self.index, self.customers[customer], position, what, right, got))


def _text(value: np.float32) -> str:
    return f"{float(value)!r} (0x{int(value.view(np.uint32)):08x})"


class Shelf:
    """Encoded states of customers, as a store would hold them."""

    def __init__(self) -> None:
        self._main: dict[str, bytes] = {}
        self._chunks: dict[str, dict[int, bytes]] = {}

    def put(self, write: CustomerWrite) -> None:
        self._main[write.customer] = write.main
        chunks = self._chunks.setdefault(write.customer, {})
        for number in write.dropped:
            chunks.pop(number, None)
        chunks.update(write.chunks)

    def get(self, customer: str) -> CustomerState | None:
        if customer not in self._main:
            return None
        return CustomerState(self._main[customer], tuple(chunk for _, chunk in sorted(self._chunks[customer].items())))


@dataclass(slots=True)
class Run:
    """What the kernel said about a world: by event, and the row of `vectors` for each scored event (-1 for the others)."""

    outcome: npt.NDArray[np.uint8]
    at: npt.NDArray[np.int64]
    late: npt.NDArray[np.bool_]
    row: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32]
    histories: Histories
    shelf: Shelf
    reloads: int
    evictions: int


def run(w: World, rng: np.random.Generator) -> Run:
    """The world through `Histories`, batch by batch, with states going to a shelf and back."""
    n = len(w.owner)
    outcome, late = np.zeros(n, np.uint8), np.zeros(n, np.bool_)
    at, row = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    blocks: list[npt.NDArray[np.float32]] = []
    rows = 0
    tight = bool(rng.integers(2))  # half of the worlds have room for few facts, so that customers are evicted all the time

    def fresh() -> Histories:
        return Histories(max_facts=3_000) if tight else Histories()

    histories, shelf = fresh(), Shelf()
    reloads = evictions = start = 0
    for end in w.batches:
        names = [w.customers[c] for c in w.owner[start:end].tolist()]
        missing = histories.missing(names)
        histories.load(missing, [shelf.get(name) for name in missing])
        step = histories.step(names, w.facts[start:end], w.skip[start:end])
        outcome[start:end], at[start:end], late[start:end] = step.outcome, step.at, step.late
        row[start + step.rows] = rows + np.arange(len(step.rows))
        blocks.append(step.vectors.copy())
        rows += len(step.rows)
        for write in histories.changes(list(dict.fromkeys(names))):
            shelf.put(write)
        evictions += histories.evict()
        if rng.random() < 0.15:
            histories = fresh()
            reloads += 1
        start = end
    return Run(outcome, at, late, row, np.concatenate(blocks), histories, shelf, reloads, evictions)


def check_world(seed: int, index: int, customers: int = CUSTOMERS, hot_sample: float = HOT_SAMPLE) -> Found:
    """Everything this module asks about one world."""
    w = world(seed, index, customers)
    rng = np.random.Generator(np.random.PCG64([seed, index, 1]))
    answer = run(w, rng)
    compare = _Comparer(index, w.customers)
    found = compare.found
    found.events, found.reloads, found.evictions = len(w.owner), answer.reloads, answer.evictions
    lives = [oracle.History() for _ in w.customers]
    most_kept = [0] * len(lives)
    scored: list[list[int]] = [[] for _ in lives]
    sampled = rng.random(len(w.owner)) < hot_sample
    for position, (owner, row) in enumerate(zip(w.owner.tolist(), w.facts.tolist(), strict=True)):
        got = int(answer.outcome[position])
        if w.skip[position]:
            compare.equal("step", owner, position, "outcome", oracle.SKIPPED, got)
            continue
        life = lives[owner]
        handled = life.handle(row)
        compare.equal("step", owner, position, "outcome", handled.outcome, got)
        compare.equal("step", owner, position, "at", handled.at, int(answer.at[position]))
        compare.equal("step", owner, position, "late", handled.late, bool(answer.late[position]))
        compare.equal("step", owner, position, "scored", handled.outcome == oracle.SCORED, bool(answer.row[position] >= 0))
        if handled.outcome != oracle.SCORED or answer.row[position] < 0:
            continue
        scored[owner].append(position)
        if w.hot[owner]:
            found.hot_events += 1
            # A hot customer's kept facts are counted now and then: often enough to see the bound passed.
            if len(scored[owner]) % 50 == 0:
                most_kept[owner] = max(most_kept[owner], len(life.kept()))
            if not sampled[position]:
                continue
            found.hot_sampled += 1
        found.cases += 1
        compare.vector("step", owner, position, life.vector(), answer.vectors[answer.row[position]])
    found.histories_over_1000_facts = sum(kept > HOT_FACTS for kept in most_kept)
    _ask_again(w, answer, lives, scored, compare, rng)
    return found


def _ask_again(
    w: World, answer: Run, lives: Sequence[oracle.History], scored: Sequence[list[int]], compare: _Comparer, rng: np.random.Generator
) -> None:
    """All facts at once, kept facts and carry, a later instant, what was known at an earlier event, and the state of an undisturbed run."""
    histories = answer.histories
    missing = histories.missing(w.customers)
    histories.load(missing, [answer.shelf.get(name) for name in missing])
    known = [customer for customer, life in enumerate(lives) if life.newest is not None]
    newest = np.array([lives[c].newest for c in known], np.int64)
    steps = np.array([0, 1, DAY_MS, 400 * DAY_MS, *WINDOW_MS, *(length - 1 for length in WINDOW_MS), *(length + 1 for length in WINDOW_MS)])
    later = newest + rng.choice(steps, size=len(known))
    peeked = histories.vectors_at([w.customers[c] for c in known], later)
    again = histories.vectors_at([w.customers[c] for c in known], newest)  # looking ahead must have changed nothing
    cuts = _cuts(w)
    undisturbed = _undisturbed(w)
    for place, customer in enumerate(known):
        life = lives[customer]
        compare.vector("later", customer, -1, life.vector(int(later[place])), peeked[place])
        right = life.vector()
        compare.vector("newest", customer, -1, right, again[place])
        compare.found.cases += 2
        facts = np.array([fact.row for fact in life.facts], np.int64).reshape(-1, WIDTH)
        compare.vector("full", customer, -1, right, vectors(facts, None, int(newest[place])))
        name = w.customers[customer]
        kept, carry = histories.facts(name), histories.carry(name)
        # The order of ties shows in few features, so the kept facts themselves are compared too.
        compare.equal("kept facts", customer, -1, "order", [fact.row for fact in life.kept()], [tuple(row) for row in kept.tolist()])
        compare.equal("kept facts", customer, -1, "left", len(life.facts) - len(kept), int(carry[BASE]))
        compare.vector("kept and carry", customer, -1, right, vectors(kept, carry, int(newest[place])))
        compare.equal("undisturbed", customer, -1, "digest", undisturbed.digest(name), histories.digest(name))
        compare.found.cases += 2
        if scored[customer]:
            position = scored[customer][int(rng.integers(len(scored[customer])))]
            cut = {name: int(cuts[topic, position]) for topic, name in enumerate(TOPICS)}
            then = vectors(facts, None, int(answer.at[position]), cut)
            # Compared with the vector given at that event, which is compared with the oracle's above.
            compare.vector("known then", customer, position, answer.vectors[answer.row[position]].tobytes(), then)


def _undisturbed(w: World) -> Histories:
    """The same stream in one batch, with nothing forgotten or read back."""
    histories = Histories(create=True)
    histories.step([w.customers[c] for c in w.owner.tolist()], w.facts, w.skip)
    return histories


def _cuts(w: World) -> npt.NDArray[np.int64]:
    """The cut after each event, shape (topics, n): highest offset handled per topic, -1 when none."""
    topic = w.facts[:, KIND] >> 3
    seen = [np.where(topic == index, w.facts[:, OFFSET], -1) for index in range(len(TOPICS))]
    return np.maximum.accumulate(np.stack(seen), axis=1)


def verify(cases: int, seed: int, processes: int, progress: Callable[[int], None] | None = None) -> Found:
    """Compare until at least `cases` vectors are compared; worlds count in their order, so the result depends on `cases` and `seed` only.

    progress: called with the number of cases so far.
    """
    total = Found()
    for found in _worlds(seed, processes):
        total.add(found)
        if progress is not None:
            progress(total.cases)
        if total.cases >= cases:
            break
    return total


def _worlds(seed: int, processes: int) -> Iterator[Found]:
    if processes <= 1:
        index = 0
        while True:
            yield check_world(seed, index)
            index += 1
    # Spawned, not forked: the parent may have threads, and each child loads the compiled kernel from the cache.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting: list[Future[Found]] = []
        index = 0
        try:
            while True:
                while len(waiting) < 2 * processes:
                    waiting.append(pool.submit(check_world, seed, index))
                    index += 1
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def report(found: Found, seed: int, seconds: float) -> dict[str, Any]:
    """The result as plain values, for `--json`."""
    return {
        **{name: getattr(found, name) for name in _COUNTS},
        "checks": found.checks,
        "mismatches_by": dict(sorted(found.mismatches_by.items(), key=lambda item: -item[1])),
        "first_mismatches": [{name: getattr(one, name) for name in Mismatch.__slots__} for one in found.first_mismatches],
        "seed": seed,
        "seconds": round(seconds, 1),
        "layout_hash": LAYOUT_HASH,
    }
