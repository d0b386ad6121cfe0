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
from features.history import MAX_FACTS, Histories, Step, vectors
from features.store import CustomerState, CustomerWrite
from features.window import WINDOW_MS
from proto.errors import StateDamaged

CUSTOMERS: Final = 200
"""Customers of a world."""
HOT_SAMPLE: Final = 0.1
"""Share of a hot customer's events whose vector the oracle works out as well; the kernel works out all of them."""
SHOWN: Final = 20
"""Mismatches reported one by one; all are counted. After so many worlds with one, verification stops."""
_SILENCES: Final = np.array([0, 1, DAY_MS, 400 * DAY_MS, *(length + edge for length in WINDOW_MS for edge in (-1, 0, 1))], np.int64)


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


class Service:
    """`Histories` as a worker would use it, with the shelf for a store; now and then everything is forgotten and read back."""

    def __init__(self, customers: Sequence[str], rng: np.random.Generator) -> None:
        self.customers = customers
        self.shelf = Shelf()
        self.reloads = self.evictions = 0
        self._rng = rng
        # Half of the worlds have room for few facts, so that customers are evicted all the time.
        self._max_facts = 3_000 if rng.integers(2) else MAX_FACTS
        self.histories = Histories(max_facts=self._max_facts)

    def recall(self, names: Sequence[str]) -> None:
        """Have these customers in memory. Raises StateDamaged."""
        missing = self.histories.missing(names)
        self.histories.load(missing, [self.shelf.get(name) for name in missing])

    def step(self, names: Sequence[str], facts: npt.NDArray[np.int64], skip: npt.NDArray[np.bool_]) -> Step:
        """Handle a batch and store its changes. Raises StateDamaged."""
        self.recall(names)
        step = self.histories.step(names, facts, skip)
        for write in self.histories.changes(list(dict.fromkeys(names))):
            self.shelf.put(write)
        self.evictions += self.histories.evict()
        if self._rng.random() < 0.15:
            self.histories = Histories(max_facts=self._max_facts)
            self.reloads += 1
        return step


class _Check:
    """One world on its way through kernel and oracle."""

    def __init__(self, seed: int, index: int, customers: int, hot_sample: float) -> None:
        self.w = world(seed, index, customers)
        self.rng = np.random.Generator(np.random.PCG64([seed, index, 1]))
        self.service = Service(self.w.customers, self.rng)
        self.compare = _Comparer(index, self.w.customers)
        self.lives = [oracle.History() for _ in self.w.customers]
        self.most_kept = [0] * customers
        self.sampled = self.rng.random(len(self.w.owner)) < hot_sample
        # Per customer its scored events: position in the stream, `at`, and the kernel's vector.
        self.scored: list[list[tuple[int, int, bytes]]] = [[] for _ in self.w.customers]

    def run(self) -> Found:
        """All batches, then the questions at the end; not past a batch in which something differed: what follows from it is no news."""
        found, start = self.compare.found, 0
        try:
            for end in self.w.batches:
                names = [self.w.customers[c] for c in self.w.owner[start:end].tolist()]
                self._batch(start, self.service.step(names, self.w.facts[start:end], self.w.skip[start:end]))
                start = end
                if found.mismatches:
                    break
            else:
                self._ask_again()
        except StateDamaged as error:
            self.compare.equal("reload", 0, start, "state", "readable", str(error))
        found.events, found.reloads, found.evictions = start, self.service.reloads, self.service.evictions
        found.histories_over_1000_facts = sum(kept > HOT_FACTS for kept in self.most_kept)
        return found

    def _batch(self, start: int, step: Step) -> None:
        w, compare, found = self.w, self.compare, self.compare.found
        end = start + len(step.outcome)
        vector_of = {start + row: k for k, row in enumerate(step.rows.tolist())}
        said = zip(step.outcome.tolist(), step.at.tolist(), step.late.tolist(), strict=True)
        told = zip(w.owner[start:end].tolist(), w.facts[start:end].tolist(), w.skip[start:end].tolist(), strict=True)
        for position, ((owner, row, skip), (outcome, at, late)) in enumerate(zip(told, said, strict=True), start):
            if skip:
                compare.equal("step", owner, position, "outcome", oracle.SKIPPED, outcome)
                continue
            life = self.lives[owner]
            handled = life.handle(row)
            compare.equal("step", owner, position, "outcome", handled.outcome, outcome)
            compare.equal("step", owner, position, "at", handled.at, at)
            compare.equal("step", owner, position, "late", handled.late, late)
            compare.equal("step", owner, position, "scored", handled.outcome == oracle.SCORED, position in vector_of)
            if handled.outcome != oracle.SCORED or position not in vector_of:
                continue
            got = step.vectors[vector_of[position]]
            self.scored[owner].append((position, at, got.tobytes()))
            if w.hot[owner]:
                found.hot_events += 1
                # A hot customer's kept facts are counted now and then: often enough to see the bound passed.
                if len(self.scored[owner]) % 50 == 0:
                    self.most_kept[owner] = max(self.most_kept[owner], len(life.kept()))
                if not self.sampled[position]:
                    continue
                found.hot_sampled += 1
            found.cases += 1
            compare.vector("step", owner, position, life.vector(), got)

    def _ask_again(self) -> None:
        """All facts at once, kept facts and carry, a later instant, what was known at an earlier event, an undisturbed run."""
        w, compare, rng, lives = self.w, self.compare, self.rng, self.lives
        self.service.recall(w.customers)
        histories = self.service.histories
        known = [customer for customer, life in enumerate(lives) if life.newest is not None]
        names = [w.customers[customer] for customer in known]
        newest = np.array([lives[customer].newest for customer in known], np.int64)
        later = newest + rng.choice(_SILENCES, size=len(known))
        peeked = histories.vectors_at(names, later)
        again = histories.vectors_at(names, newest)  # looking ahead must have changed nothing
        cuts = _cuts(w)
        undisturbed = _undisturbed(w)
        for place, (customer, name) in enumerate(zip(known, names, strict=True)):
            life, now = lives[customer], int(newest[place])
            right = life.vector()
            facts = np.array([fact.row for fact in life.facts], np.int64).reshape(-1, WIDTH)
            kept, carry = histories.facts(name), histories.carry(name)
            compare.vector("later", customer, -1, life.vector(int(later[place])), peeked[place])
            compare.vector("newest", customer, -1, right, again[place])
            compare.vector("full", customer, -1, right, vectors(facts, None, now))
            compare.vector("kept and carry", customer, -1, right, vectors(kept, carry, now))
            compare.found.cases += 4
            # The order of ties shows in few features, so the kept facts themselves are compared too.
            compare.equal("kept facts", customer, -1, "order", [fact.row for fact in life.kept()], [tuple(row) for row in kept.tolist()])
            compare.equal("kept facts", customer, -1, "left", len(life.facts) - len(kept), int(carry[BASE]))
            compare.equal("undisturbed", customer, -1, "digest", undisturbed.digest(name), histories.digest(name))
            if self.scored[customer]:
                position, at, given = self.scored[customer][int(rng.integers(len(self.scored[customer])))]
                cut = {topic: int(cuts[number, position]) for number, topic in enumerate(TOPICS)}
                # Compared with the vector given at that event, which is compared with the oracle's above.
                compare.vector("known then", customer, position, given, vectors(facts, None, at, cut))


def check_world(seed: int, index: int, customers: int = CUSTOMERS, hot_sample: float = HOT_SAMPLE) -> Found:
    """Everything this module asks about one world."""
    return _Check(seed, index, customers, hot_sample).run()


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
    total, differing = Found(), 0
    for found in _worlds(seed, processes):
        total.add(found)
        differing += found.mismatches > 0
        if progress is not None:
            progress(total.cases)
        if total.cases >= cases or differing >= SHOWN:
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
