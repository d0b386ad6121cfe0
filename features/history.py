"""All customers of one partition in memory: facts sorted by event time, running totals, and what of it the store lacks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from features.aggregate import ROW_WIDTH
from features.carry import CARRY_WIDTH, empty
from features.catalog import N_FEATURES
from features.facts import KIND, OFFSET, TIME, TOPICS, WIDTH
from features.index import INDEX_WIDTH, MAX_LOAD, rehash, room_for
from features.kernel import (
    COUNTS,
    DIRTY,
    END,
    ENTRIES,
    ENTRIES_OF_A_FACT,
    KEPT,
    NEWEST,
    PLACE_WIDTH,
    TAIL,
    TOP,
    USED,
    Table,
    demand,
    forget,
    make_room,
    note_scores,
    peek,
    read,
    repack,
    repacked_rows,
    replay,
    reset,
    reset_all,
    step,
    write,
    written_size,
)
from features.state import ALERT_SHIFT, BAND_MASK, CHUNK, SOURCE_SHIFT, Customer, damage, decode, encode, join
from features.store import CustomerState, CustomerWrite, Offsets, digests
from features.window import D90
from proto.errors import StateDamaged

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)

MAX_FACTS: Final = 2_000_000
"""Default bound of `Histories`: 0.6 to 0.8 GB, 300 to 400 bytes per fact with its entries of the index."""
CUSTOMER_WEIGHT: Final = 8
"""A customer weighs as many facts in the bound: 2.4 KB of totals, carry, vector and name."""
_EVICT_TO: Final = 0.9
_MOST_SINCE: Final = 100_000  # digests kept as Python numbers before they join the array: 60 bytes each instead of 8
_NEUTRAL: Final = empty()
_MASK: Final = np.uint8(BAND_MASK)
_SHIFT: Final = np.uint8(ALERT_SHIFT)
_SOURCE: Final = np.uint8(SOURCE_SHIFT)
_FLOORS: Final = np.full(BAND_MASK + 1, np.inf)


class Outcome(IntEnum):
    """What became of one fact."""

    SCORED = 0
    PROFILE = 1  # taken in; profile facts have no score of their own
    DUPLICATE = 2
    DUPLICATE_CONFLICT = 3  # the id of a kept fact with other content
    TOO_LATE = 4
    AMOUNT_RANGE = 5  # the customer's lifetime sum of money would exceed 2**62
    SKIPPED = 6  # the caller said so


@dataclass(frozen=True, slots=True)
class Step:
    """A handled batch of n facts, k of them scored."""

    outcome: ByteArray  # (n,) Outcome
    at: IntArray  # (n,) the customer's newest event time afterwards (ms); NONE when skipped, or when still without facts
    late: BoolArray  # (n,) taken in before the customer's newest fact
    rows: IntArray  # (k,) indices of the SCORED facts
    vectors: FloatArray  # (k, N_FEATURES)


class Noted(NamedTuple):
    """What k scores replaced: band and alert band before each (0 when there was none), the source of the score before each (index
    into SOURCES, -1 when none is known; offset), and the alert band after it; shape (k,)."""

    former: ByteArray
    former_alert: ByteArray
    former_source: npt.NDArray[np.int8]
    former_offset: IntArray
    alert: ByteArray


def _table(slots: int, rows: int, places: int) -> Table:
    """Arrays for so many slots, arena rows and index places; slots need `reset` before use."""
    return Table(
        facts=np.empty((rows, WIDTH), np.int64),
        marks=np.empty(rows, np.uint8),
        entries=np.zeros((places, INDEX_WIDTH), np.int64),
        places=np.zeros((slots, PLACE_WIDTH), np.int64),
        totals=np.empty((slots, ROW_WIDTH), np.int64),
        carry=np.empty((slots, CARRY_WIDTH), np.int64),
        vectors=np.empty((slots, N_FEATURES), np.float32),
        probability=np.empty(slots, np.float32),
        band=np.zeros(slots, np.uint8),
        score_at=np.empty(slots, np.int64),
        score_offset=np.empty(slots, np.int64),
        counts=np.zeros(COUNTS, np.int64),
    )


def _longer(array: npt.NDArray[Scalar], length: int) -> npt.NDArray[Scalar]:
    longer = np.zeros((length, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


def _plain(facts: IntArray) -> IntArray:
    """The form the compiled functions take: int64, C order, writeable."""
    return np.require(facts, np.int64, ["C", "W"])


class _Known:
    """Who has state in the store: a sorted array of digests, and those that came since."""

    def __init__(self, listed: bytes) -> None:
        self._sorted: npt.NDArray[np.uint64] = np.sort(np.frombuffer(listed, "<u8"))
        self._since: set[int] = set()

    def check(self, customers: Sequence[str], states: Sequence[CustomerState | None]) -> None:
        """Raises StateDamaged unless exactly those who are known have a state."""
        asked = np.frombuffer(digests(customers), "<u8")
        places = np.searchsorted(self._sorted, asked)
        listed = np.zeros(len(asked), np.bool_)
        inside = places < len(self._sorted)
        listed[inside] = self._sorted[places[inside]] == asked[inside]
        for customer, digest, among, state in zip(customers, asked.tolist(), listed.tolist(), states, strict=True):
            if (among or digest in self._since) != (state is not None):
                what = "stored, and not in the list of customers" if state is not None else "known, and nothing of it is stored"
                raise StateDamaged(f"customer {customer!r} is {what}; rebuild the partition")

    def add(self, customers: Iterable[str]) -> None:
        """Note that these are stored now."""
        self._since.update(np.frombuffer(digests(customers), "<u8").tolist())
        if len(self._since) > _MOST_SINCE:
            self._sorted = np.sort(np.concatenate([self._sorted, np.fromiter(self._since, np.uint64, len(self._since))]))
            self._since.clear()


class Histories:
    """All customers of one partition, a write-through cache of their stored state.

    max_facts: the bound `evict` keeps; a customer counts as CUSTOMER_WEIGHT facts. create: whether `step` makes customers
    it does not know (offline use); without it each must have been loaded. known: digests of the customers the store holds
    (Claim.customers), so that one whose state is gone is noticed; None = nobody looks. One thread at a time.
    """

    def __init__(self, *, max_facts: int = MAX_FACTS, create: bool = False, known: bytes | None = None) -> None:
        if max_facts <= 0:
            raise ValueError(f"the bound of facts in memory must be positive, got {max_facts}")
        self.max_facts = max_facts
        self._create = create
        self._known = None if known is None else _Known(known)
        self.clear()

    def clear(self) -> None:
        """Forget everybody, changes not taken included. Who is known stays: those of a failed write count as stored."""
        self._new: set[str] = set()  # in memory, and nothing of them stored yet
        self._slots: dict[str, int] = {}
        self._names: list[str | None] = []
        self._free: list[int] = []
        self._batch = 0
        self._t = _table(16, 1024, 64)
        self._scratch = np.empty((1, ROW_WIDTH), np.int64)
        self._out = np.empty(0, np.uint8)

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __contains__(self, customer: str) -> bool:
        return customer in self._slots

    @property
    def kept_facts(self) -> int:
        """Kept facts of all customers in memory."""
        return int(self._t.counts[KEPT])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays (not of the names); what has never been touched is not resident."""
        return sum(array.nbytes for array in self._t) + self._out.nbytes

    def missing(self, customers: Iterable[str]) -> list[str]:
        """Those not in memory, each once, in the order first seen."""
        return [customer for customer in dict.fromkeys(customers) if customer not in self._slots]

    def ensure(self, customers: Iterable[str]) -> None:
        """Make those not in memory customers without facts."""
        missing = self.missing(customers)
        self._new_slots(missing)
        self._new.update(missing)

    def load(self, customers: Sequence[str], states: Sequence[CustomerState | None]) -> None:
        """Take in stored customers not in memory; None is one the store holds nothing of. All in, or none when one is damaged.

        Raises ChainBroken (unknown format, damage) naming the customer, StateDamaged for one that is known and has no state,
        or has state and is not known; ValueError for one already in memory.
        """
        if len(customers) != len(states):
            raise ValueError(f"{len(customers)} customers, but {len(states)} states")
        known = [customer for customer in customers if customer in self._slots]
        if known or len(set(customers)) != len(customers):
            raise ValueError(f"customer {known[0]!r} is in memory already" if known else "a customer is to be loaded twice")
        if self._known is not None:
            self._known.check(customers, states)
        slots = self._new_slots(customers)
        self._new.update(customer for customer, state in zip(customers, states, strict=True) if state is None)
        stored = [position for position, state in enumerate(states) if state is not None]
        if not stored:
            return
        found = [state for state in states if state is not None]
        buffer, bounds, firsts = join(found)
        history = np.empty((CHUNK * int(np.diff(firsts).max()), WIDTH), np.int64)
        these = slots[stored]
        done = 0
        while True:
            entries = int(len(self._t.entries) * MAX_LOAD)
            done, length = (int(x) for x in read(self._t, these, done, self._batch, buffer, bounds, firsts, history, entries))
            if length < 0:
                for customer in customers:
                    self._drop(customer)
                raise damage(length, customers[stored[done]], found[done].main)
            if done == len(these):
                return
            self._grow_index(length)
            self._grow_arena(2 * length + CHUNK)

    def step(self, customers: Sequence[str], facts: IntArray, skip: BoolArray | None = None) -> Step:
        """Handle facts (n, WIDTH) of customers (n) in this order; rows with skip[i] are not looked at.

        Raises KeyError for a customer not in memory (unless `create`), before anything changes.
        """
        n = len(customers)
        facts = _plain(facts)
        if facts.shape != (n, WIDTH):
            raise ValueError(f"{n} customers need facts of shape {(n, WIDTH)}, got {facts.shape}")
        ignore = np.zeros(n, np.bool_) if skip is None else np.require(skip, np.bool_, ["C", "W"])
        if ignore.shape != (n,):
            raise ValueError(f"skip must have shape {(n,)}, got {ignore.shape}")
        slots = self._batch_slots(customers, ignore)
        self._batch += 1
        self._make_room(slots, (~ignore).astype(np.int64))
        outcome, at, late = np.empty(n, np.uint8), np.empty(n, np.int64), np.empty(n, np.bool_)
        rows, vectors = np.empty(n, np.int64), np.empty((n, N_FEATURES), np.float32)
        k = step(self._t, slots, facts, ignore, self._batch, outcome, at, late, rows, vectors)
        return Step(outcome, at, late, rows[:k], vectors[:k])

    def vectors_at(self, customers: Sequence[str], at_ms: int | IntArray) -> FloatArray:
        """Vectors (len(customers), N_FEATURES) at a later time, one for all or one each; changes nothing.

        Raises KeyError for a customer not in memory, ValueError for a time before the customer's newest event time.
        """
        slots = self._of(customers)
        at = np.ascontiguousarray(np.broadcast_to(np.asarray(at_ms, np.int64), slots.shape)).copy()
        early = np.flatnonzero(at < self._t.places[slots, NEWEST])
        if len(early):
            first = early[0]
            newest = self._t.places[slots[first], NEWEST]
            raise ValueError(f"customer {customers[first]!r} cannot be looked at as of {at[first]}: the newest event is of {newest}")
        vectors = np.empty((len(slots), N_FEATURES), np.float32)
        peek(self._t, slots, at, self._scratch, vectors)
        return vectors

    def newest_ms(self, customers: Sequence[str]) -> IntArray:
        """Newest event time of each customer, NONE without facts."""
        newest: IntArray = self._t.places[self._of(customers), NEWEST]
        return newest

    def last_vectors(self, customers: Sequence[str]) -> FloatArray:
        """Vector of each customer's last scored event, all NaN when there was none."""
        vectors: FloatArray = self._t.vectors[self._of(customers)]
        return vectors

    def note_scores(
        self,
        customers: Sequence[str],
        probability: FloatArray,
        band: ByteArray,
        at_ms: IntArray,
        source: IntArray,
        offset: IntArray,
        floors: DoubleArray = _FLOORS,
    ) -> Noted:
        """Remember each score as its customer's last, in this order; a customer may occur again.

        source, offset: what each was made for (features.facts.SOURCES).
        floors: per band code the probability below which a customer alerted at that band falls back, shape (4,); by default
        the alert band follows the band of every score.
        """
        slots = self._of(customers)
        former, alert = np.empty(len(slots), np.uint8), np.empty(len(slots), np.uint8)
        former_offset = np.empty(len(slots), np.int64)
        note_scores(
            self._t,
            slots,
            np.require(probability, np.float32, ["C", "W"]),
            np.require(band, np.uint8, ["C", "W"]),
            np.require(at_ms, np.int64, ["C", "W"]),
            np.require(source, np.int64, ["C", "W"]),
            np.require(offset, np.int64, ["C", "W"]),
            np.require(floors, np.float64, ["C", "W"]),
            former,
            former_offset,
            alert,
        )
        return Noted(former & _MASK, former >> _SHIFT & _MASK, (former >> _SOURCE).astype(np.int8) - np.int8(1), former_offset, alert)

    def restore_scores(
        self,
        customers: Sequence[str],
        probability: FloatArray,
        band: ByteArray,
        alert_band: ByteArray,
        at_ms: IntArray,
        source: IntArray,
        offset: IntArray,
    ) -> None:
        """Take over scores that were made before, each with its alert band; the last one of a customer stays."""
        slots = self._of(customers)
        t = self._t
        t.probability[slots] = probability
        t.band[slots] = band | alert_band << _SHIFT | (source + 1).astype(np.uint8) << _SOURCE
        t.score_at[slots] = at_ms
        t.score_offset[slots] = offset
        t.places[slots, DIRTY] = 1

    def alert_bands(self, customers: Sequence[str]) -> ByteArray:
        """Band each customer was last alerted at; 0 when it never had a score."""
        bands: ByteArray = self._t.band[self._of(customers)] >> _SHIFT & _MASK
        return bands

    def last_scores(self, customers: Sequence[str]) -> tuple[FloatArray, ByteArray, IntArray]:
        """Probability, band and event time (ms) of each customer's last score; NaN, 0 and NONE when there was none."""
        slots = self._of(customers)
        return self._t.probability[slots], self._t.band[slots] & _MASK, self._t.score_at[slots]

    def changes(self, customers: Sequence[str]) -> list[CustomerWrite]:
        """What the store lacks of these (distinct) customers: main, changed closed chunks, chunk numbers that left.

        The next call assumes that this one's result was stored; after a failed write, begin anew.
        """
        slots = self._of(customers)
        count, bound = (int(x) for x in written_size(self._t, slots))
        if len(self._out) < bound:
            self._out = np.empty(bound, np.uint8)
        pieces, summary = np.empty((count, 2), np.int64), np.empty((len(slots), 3), np.int64)
        size = write(self._t, slots, self._out, pieces, summary)
        data = self._out[:size].tobytes()
        numbers, ends = pieces[:, 0].tolist(), pieces[:, 1].tolist()
        writes = []
        piece, begin = 0, 0
        for customer, (chunks, first_left, end_left) in zip(customers, summary.tolist(), strict=True):
            main = data[begin : ends[piece]]
            begin = ends[piece]
            piece += 1
            closed: tuple[tuple[int, bytes], ...] = ()
            if chunks:
                bounds = [begin, *ends[piece : piece + chunks]]
                closed = tuple((numbers[piece + i], data[bounds[i] : bounds[i + 1]]) for i in range(chunks))
                piece += chunks
                begin = bounds[-1]
            dropped = tuple(range(first_left, end_left)) if end_left > first_left else ()
            writes.append(CustomerWrite(customer, main, closed, dropped, customer in self._new))
        if self._new:
            stored = self._new.intersection(customers)
            self._new -= stored
            if self._known is not None:
                self._known.add(stored)
        return writes

    @property
    def over(self) -> bool:
        """Whether the bound is exceeded and `evict` would forget somebody."""
        return self.kept_facts + CUSTOMER_WEIGHT * len(self._slots) > self.max_facts

    def evict(self) -> int:
        """Forget the least recently used customers when over the bound, down to 90 % of it; returns how many.

        Only those without changes waiting for `changes`. Call it between two batches, after the changes were stored.
        """
        weight = self.kept_facts + CUSTOMER_WEIGHT * len(self._slots)
        if weight <= self.max_facts:
            return 0
        places = self._t.places
        slots = np.fromiter(self._slots.values(), np.int64, len(self._slots))
        slots = slots[places[slots, DIRTY] == 0]
        slots = slots[np.argsort(places[slots, USED], kind="stable")]
        weights = np.cumsum(places[slots, END] - places[slots, TAIL + D90] + CUSTOMER_WEIGHT)
        enough = int(np.searchsorted(weights, weight - int(_EVICT_TO * self.max_facts))) + 1
        leaving = [self._names[slot] for slot in slots[:enough].tolist()]
        for customer in leaving:
            assert customer is not None
            self._drop(customer)
        return len(leaving)

    def forget(self, customers: Iterable[str]) -> None:
        """Forget these customers, changes not taken included; those not in memory are ignored."""
        for customer in customers:
            if customer in self._slots:
                self._drop(customer)

    def facts(self, customer: str) -> IntArray:
        """Copy of the kept facts in order, shape (n, WIDTH). Raises KeyError."""
        slot = self._slots[customer]
        kept: IntArray = self._t.facts[self._t.places[slot, TAIL + D90] : self._t.places[slot, END]].copy()
        return kept

    def carry(self, customer: str) -> IntArray:
        """Copy of the carry row, shape (CARRY_WIDTH,). Raises KeyError."""
        carry: IntArray = self._t.carry[self._slots[customer]].copy()
        return carry

    def state(self, customer: str) -> CustomerState:
        """The whole customer as bytes. Raises KeyError.

        `main` is what `changes` would write; a stored closed chunk may still hold facts that have left meanwhile.
        """
        slot = self._slots[customer]
        t = self._t
        return encode(
            Customer(
                self.facts(customer),
                self.carry(customer),
                t.vectors[slot].copy(),
                float(t.probability[slot]),
                int(t.band[slot]) & BAND_MASK,
                int(t.score_at[slot]),
                int(t.band[slot]) >> ALERT_SHIFT & BAND_MASK,
                (int(t.band[slot]) >> SOURCE_SHIFT) - 1,
                int(t.score_offset[slot]),
            )
        )

    def digest(self, customer: str) -> str:
        """Digest of the customer's facts and carry, as `digest` gives for the stored state. Raises KeyError."""
        return _digest(self.facts(customer), self.carry(customer))

    def _of(self, customers: Sequence[str]) -> IntArray:
        return np.fromiter(map(self._slots.__getitem__, customers), np.int64, len(customers))

    def _batch_slots(self, customers: Sequence[str], ignore: BoolArray) -> IntArray:
        get = self._slots.get
        slots = np.fromiter([get(customer, -1) for customer in customers], np.int64, len(customers))
        unknown = np.flatnonzero((slots < 0) & ~ignore)
        if len(unknown):
            if not self._create:
                raise KeyError(customers[unknown[0]])
            self.ensure([customers[i] for i in unknown.tolist()])
            for i in unknown.tolist():
                slots[i] = self._slots[customers[i]]
        slots[ignore] = 0  # never looked at
        return slots

    def _new_slots(self, customers: Sequence[str]) -> IntArray:
        """Slots for customers not in memory, without facts."""
        slots = np.empty(len(customers), np.int64)
        for i, customer in enumerate(customers):
            if self._free:
                slot = self._free.pop()
                self._names[slot] = customer
            else:
                slot = len(self._names)
                self._names.append(customer)
                if slot == len(self._t.places):
                    self._grow_slots(2 * slot)
            self._slots[customer] = slot
            slots[i] = slot
        reset_all(self._t, slots, _NEUTRAL)
        self._t.places[slots, USED] = self._batch
        return slots

    def _drop(self, customer: str) -> None:
        slot = self._slots.pop(customer)
        self._new.discard(customer)
        forget(self._t, slot)
        self._names[slot] = None
        self._free.append(slot)

    def _make_room(self, slots: IntArray, counts: IntArray) -> None:
        self._grow_index(int(counts.sum()))
        rows = int(demand(self._t, slots, counts))
        if int(self._t.counts[TOP]) + rows > len(self._t.facts):
            self._repack(0)
        make_room(self._t, slots)

    def _grow_slots(self, slots: int) -> None:
        t = self._t
        self._t = t._replace(
            places=_longer(t.places, slots),
            totals=_longer(t.totals, slots),
            carry=_longer(t.carry, slots),
            vectors=_longer(t.vectors, slots),
            probability=_longer(t.probability, slots),
            band=_longer(t.band, slots),
            score_at=_longer(t.score_at, slots),
            score_offset=_longer(t.score_offset, slots),
        )

    def _grow_index(self, facts: int) -> None:
        """Room for the entries of so many more facts."""
        entries = int(self._t.counts[ENTRIES]) + facts * ENTRIES_OF_A_FACT
        if entries > len(self._t.entries) * MAX_LOAD:
            larger = np.zeros((room_for(entries), INDEX_WIDTH), np.int64)
            rehash(self._t.entries, larger)
            self._t = self._t._replace(entries=larger)

    def _grow_arena(self, rows: int) -> None:
        """So many free rows at the top."""
        if int(self._t.counts[TOP]) + rows > len(self._t.facts):
            self._repack(rows)

    def _repack(self, extra: int) -> None:
        """A new arena without gaps, half as large again as what it holds: the next repack is as many facts away."""
        rows = int(repacked_rows(self._t)) + extra
        rows += rows // 2 + 1024
        facts, marks = np.empty((rows, WIDTH), np.int64), np.empty(rows, np.uint8)
        repack(self._t, facts, marks)
        self._t = self._t._replace(facts=facts, marks=marks)


def vectors(facts: IntArray, carry: IntArray | None, at_ms: int, cut: Offsets | None = None) -> FloatArray:
    """The vector of one customer as a pure function of its history, shape (N_FEATURES,).

    facts: accepted facts (no duplicates), shape (n, WIDTH), any order: the whole life, or the kept ones with the `carry` of
    those that left. at_ms: not before the newest of them. cut: use only facts with offset <= cut[topic] ("known then"; a
    topic not named: none); it says nothing about what is in the carry.
    Raises ValueError when a fact happened after at_ms.
    """
    known = _plain(facts)
    if cut is not None:
        highest = np.array([cut.get(topic, -1) for topic in TOPICS], np.int64)
        known = known[known[:, OFFSET] <= highest[known[:, KIND] >> 3]]
    n = len(known)
    if n and known[:, TIME].max() > at_ms:
        raise ValueError(f"a fact of {known[:, TIME].max()} lies after {at_ms}, the time to look from")
    known = _plain(known[np.lexsort((known[:, OFFSET], known[:, KIND] >> 3, known[:, TIME]))])
    table = _table(1, n, room_for(n * ENTRIES_OF_A_FACT))
    reset(table, 0, _NEUTRAL)
    if carry is not None:
        table.carry[0] = carry
    replay(table, 0, known, n)
    result = np.empty((1, N_FEATURES), np.float32)
    peek(table, np.zeros(1, np.int64), np.array([at_ms], np.int64), np.empty((1, ROW_WIDTH), np.int64), result)
    vector: FloatArray = result[0]
    return vector


def digest(state: CustomerState) -> str:
    """Digest of the logical state of a stored customer (kept facts and carry), however it was batched and chunked."""
    customer = decode(state)
    return _digest(customer.facts, customer.carry)


def _digest(facts: IntArray, carry: IntArray) -> str:
    content = blake2b(digest_size=16)
    content.update(len(facts).to_bytes(8, "little"))
    content.update(np.ascontiguousarray(facts, "<i8").tobytes())
    content.update(np.ascontiguousarray(carry, "<i8").tobytes())
    return content.hexdigest()
