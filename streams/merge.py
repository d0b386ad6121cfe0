"""Batches of one partition: the input topics merged by event time, each read no further than the others allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from features.facts import NONE, OFFSET, PROFILE, TIME, TOPICS
from features.store import Claim
from proto.errors import ChainBroken

if TYPE_CHECKING:
    from streams.codec import Records

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
Offsets = Mapping[str, int]

RECORD_BYTES: Final = 640
"""What a waiting record takes besides its key and value (measured): the client's message, its row, its texts."""
MAX_CUSTOMERS: Final = 1_000
"""Most customers of one batch: the store applies them in one call."""


def merge_keys(time: IntArray, accepted: npt.NDArray[np.bool_], floor_ms: int = -1) -> IntArray:
    """Running maximum of the accepted event times of one topic, in offset order, and at least `floor_ms`.

    A late record keeps its place in the topic instead of jumping the queue, and a record we could not read never moves time.
    floor_ms: newest event time the partition has handled before. Every key of the records that were left is at least that, so
    with this floor the keys are those of one merge from the beginning, wherever it was cut into batches.
    """
    keys: IntArray = np.maximum.accumulate(np.where(accepted, time, floor_ms))
    return np.maximum(keys, floor_ms)


def order(key: IntArray, topic: IntArray, offset: IntArray) -> npt.NDArray[np.intp]:
    """Positions in merge order: by key, then topic index, then offset."""
    return np.lexsort((offset, topic, key))


def placed(plan: IntArray, topic: IntArray, offset: IntArray) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Where records lie in a plan (`Merge`): the first planned record whose cut covers each, and whether it is that record itself.

    A planned record is the last of those its cut covers and the one before does not.
    """
    place = np.empty(len(offset), np.int64)
    emitted = np.zeros(len(offset), np.bool_)
    for index in range(len(TOPICS)):
        these = np.flatnonzero(topic == index)
        cuts = plan[:, index]
        place[these] = found = np.searchsorted(cuts, offset[these])
        inside = found < len(plan)
        at = found[inside]
        emitted[these[inside]] = (cuts[at] == offset[these[inside]]) & (plan[at, -1] == index)
    return place, emitted


def watermark(before_ms: int, facts: IntArray, reason: ByteArray) -> int:
    """Newest event time of the accepted records so far."""
    times = facts[reason == 0, TIME]
    return max(before_ms, int(times.max())) if len(times) else before_ms


@dataclass(frozen=True, slots=True)
class Slice:
    """What one fetch brought of one (topic, partition): its columns, and the messages they came from, in offset order."""

    records: Records
    messages: Sequence[Any]  # kept for the original bytes of a record that becomes a dead letter


@dataclass(slots=True)
class Buffer:
    """Records of one (topic, partition) that wait to be merged.

    position: the next offset we have not seen; end: the high watermark as far as known. Behind `end` the topic may still
    bring records that come first, so a merge has to wait for it; at `end` it never waits.
    """

    topic: int
    position: int = 0
    end: int = 0
    bytes: int = 0
    count: int = 0
    paused: bool = False
    _slices: deque[Slice] = field(default_factory=deque)
    _head: int = 0  # records of the first slice that are already taken

    def add(self, piece: Slice) -> None:
        """Append records whose offsets follow those seen so far."""
        records = piece.records
        if not len(records.offset):
            return
        self._slices.append(piece)
        self.count += len(records.offset)
        self.bytes += int(records.size.sum())
        self.reach(int(records.offset[-1]) + 1)

    def reach(self, position: int, end: int = -1) -> None:
        """Nothing below `position` is still to come (also where offsets are missing); `end` is a newer high watermark."""
        self.position = max(self.position, position)
        self.end = max(self.end, self.position, end)

    @property
    def held(self) -> int:
        """Memory the waiting records take, bytes."""
        return self.bytes + self.count * RECORD_BYTES

    @property
    def open(self) -> bool:
        """Whether more records are known to exist beyond our position."""
        return self.position < self.end

    def first(self, limit: int) -> Iterator[tuple[Slice, int, int]]:
        """The first `limit` waiting records as (slice, start, stop)."""
        start = self._head
        for piece in self._slices:
            if limit <= 0:
                return
            stop = min(len(piece.records.offset), start + limit)
            yield piece, start, stop
            limit -= stop - start
            start = 0

    def drop(self, count: int) -> None:
        """Forget the first `count` waiting records: a batch has taken them."""
        self.count -= count
        while count:
            records = self._slices[0].records
            stop = min(len(records.offset), self._head + count)
            self.bytes -= int(records.size[self._head : stop].sum())
            count -= stop - self._head
            if stop == len(records.offset):
                self._slices.popleft()
                self._head = 0
            else:
                self._head = stop


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of one partition in merge order; n of them. `former` and `to` are the offsets before and after, per topic."""

    partition: int
    nonce: str
    former: Offsets
    to: Offsets
    facts: IntArray  # (n, WIDTH)
    topic: IntArray  # (n,) topic index
    append_ms: IntArray  # (n,) when the broker wrote it
    reason: ByteArray  # (n,) proto.errors.Reason, 0 accepted
    customer: list[str]
    event_id: list[str]
    detail: Mapping[int, str]  # of rejected records, by position in the batch
    messages: list[Any]
    recovered: bool = False  # the batch of an open intent

    def __len__(self) -> int:
        return len(self.customer)

    @property
    def offset(self) -> IntArray:
        """Source offsets, shape (n,)."""
        offsets: IntArray = self.facts[:, OFFSET]
        return offsets

    def part(self, first: int, end: int) -> Batch:
        """Records [first, end) as a batch of their own; `end` = n takes the offsets up to where this batch ends."""
        cuts = self.cuts()
        former = self.former if first == 0 else dict(zip(TOPICS, cuts[first - 1].tolist(), strict=True))
        to = self.to if end == len(self) else dict(zip(TOPICS, cuts[end - 1].tolist(), strict=True))
        return replace(self.pick(np.arange(first, end)), former=former, to=to)

    def pick(self, rows: npt.NDArray[np.intp]) -> Batch:
        """These records in this order, between the same offsets."""
        picks = rows.tolist()
        return replace(
            self,
            facts=self.facts[rows],
            topic=self.topic[rows],
            append_ms=self.append_ms[rows],
            reason=self.reason[rows],
            customer=[self.customer[i] for i in picks],
            event_id=[self.event_id[i] for i in picks],
            detail={k: self.detail[i] for k, i in enumerate(picks) if i in self.detail} if self.detail else {},
            messages=[self.messages[i] for i in picks],
        )

    def keys(self, floor_ms: int) -> IntArray:
        """The merge key of each record, for a batch that holds the records of each topic in offset order."""
        keys = np.empty(len(self), np.int64)
        for index in range(len(TOPICS)):
            these = np.flatnonzero(self.topic == index)
            keys[these] = merge_keys(self.facts[these, TIME], self.reason[these] == 0, floor_ms)
        return keys

    def cuts(self) -> IntArray:
        """Per record and topic the highest offset handled up to and including it, -1 when none; shape (n, topics)."""
        cut = np.empty((len(self), len(TOPICS)), np.int64)
        for index, name in enumerate(TOPICS):
            np.maximum.accumulate(np.where(self.topic == index, self.offset, self.former[name]), out=cut[:, index])
        return cut


@dataclass(slots=True)
class Merge:
    """The buffers of one owned partition and where the next batch starts.

    watermark_ms: newest event time of the accepted records before them, -1 when none. forced: offsets of an open intent; the
    first batch then is exactly what lies up to them. The order of a batch is a pure function of its records and the watermark,
    and of the plan of a forced one: records that were emitted, in the order in which that was, as (cut of each topic ...,
    index of the source topic), shape (n, topics + 1).
    """

    partition: int
    nonce: str
    applied: dict[str, int]
    watermark_ms: int = -1
    forced: Offsets | None = None
    plan: IntArray | None = None
    buffers: tuple[Buffer, ...] = field(default_factory=lambda: tuple(Buffer(index) for index in range(len(TOPICS))))

    @classmethod
    def of(cls, claim: Claim) -> Merge:
        """The merge of a partition just claimed (and restored): an open intent or a plan forces its first batch."""
        applied = {name: claim.applied.get(name, -1) for name in TOPICS}
        forced = None if claim.intent is None else {name: claim.intent.to.get(name, -1) for name in TOPICS}
        plan = None
        if claim.plan:
            plan = np.array(claim.plan, np.int64)
            forced = dict(zip(TOPICS, plan[-1].tolist(), strict=False))
        return cls(claim.partition, claim.nonce, applied, claim.watermark_ms, forced, plan)

    @property
    def caught_up(self) -> bool:
        """Whether nothing waits and nothing more is known to exist."""
        return not any(buffer.count or buffer.open for buffer in self.buffers)

    @property
    def lag(self) -> int:
        """Offsets between what was handed out and the known ends."""
        return sum(max(0, b.end - 1 - self.applied[TOPICS[b.topic]]) for b in self.buffers if b.count or b.open)

    def satisfied(self, events: int) -> bool:
        """Whether reading more would not make the next batches of up to `events` records any better."""
        return all((buffer.count >= events or not buffer.open) and not self.needs(buffer) for buffer in self.buffers)

    def needs(self, buffer: Buffer) -> bool:
        """Whether an open intent or a plan cannot be taken before this buffer has read on, whatever it holds already."""
        return self.forced is not None and buffer.position <= self.forced[TOPICS[buffer.topic]]

    def force(self, to: Offsets, plan: IntArray | None) -> None:
        """The next batch is what lies up to these offsets, in the order of the plan when there is one."""
        self.forced, self.plan = to, plan

    def take(self, max_events: int, max_customers: int = MAX_CUSTOMERS, until: Offsets | None = None) -> Batch | None:
        """The next batch, removed from the buffers; None when there is nothing that may go yet. Nothing beyond `until` is taken.

        Raises ChainBroken when the records of an open intent are no longer all there.
        """
        if self.forced is not None:
            return self._take_forced(self.forced)
        if until is None:
            windows = [list(buffer.first(max_events)) for buffer in self.buffers]
            more = [buffer.open or buffer.count > _count(window) for buffer, window in zip(self.buffers, windows, strict=True)]
        else:
            lasts = [until[TOPICS[buffer.topic]] for buffer in self.buffers]
            windows = [list(_until(buffer, last, max_events)) for buffer, last in zip(self.buffers, lasts, strict=True)]
            more = [
                (buffer.open and buffer.position <= last) or _count(window) == max_events
                for buffer, last, window in zip(self.buffers, lasts, windows, strict=True)
            ]
        if not any(windows):
            return None
        columns = _Columns.of(self.buffers, windows, self.watermark_ms)
        # The next record of a topic that has more sorts behind that topic's last known one: whatever sorts before it is final.
        bound = min(
            ((columns.last_key(buffer.topic), buffer.topic) for buffer, some in zip(self.buffers, more, strict=True) if some),
            default=None,
        )
        ranks = order(columns.key, columns.topic, columns.facts[:, OFFSET])
        if bound is not None:
            key, topic = columns.key, columns.topic
            final = int(np.count_nonzero((key < bound[0]) | ((key == bound[0]) & (topic <= bound[1]))))
            ranks = ranks[:final]
        ranks = columns.within(ranks[:max_events], max_customers)
        return self._batch(columns, ranks, recovered=False) if len(ranks) else None

    def _take_forced(self, to: Offsets) -> Batch | None:
        if any(self.needs(buffer) for buffer in self.buffers):
            return None
        windows = [list(_until(buffer, to[TOPICS[buffer.topic]], buffer.count)) for buffer in self.buffers]
        if not any(windows):
            raise ChainBroken(
                f"partition {self.partition}: the records of an open batch (offsets {dict(self.applied)} to {dict(to)}) are gone"
            )
        columns = _Columns.of(self.buffers, windows, self.watermark_ms)
        offset = columns.facts[:, OFFSET]
        if self.plan is None:
            ranks = order(columns.key, columns.topic, offset)
        else:
            place, emitted = placed(self.plan, columns.topic, offset)
            # What lies before a planned record had no output: repetitions, which change nothing, and profiles, which could take away
            # what they repeat. Repetitions first, then, whatever the order was.
            ranks = np.lexsort((offset, columns.topic, columns.key, columns.topic == PROFILE >> 3, emitted, place))
        self.forced = self.plan = None
        # Compaction may have removed the very last record meanwhile; the batch still ends where the intent says.
        return self._batch(columns, ranks, recovered=True, to=to)

    def _batch(self, columns: _Columns, ranks: npt.NDArray[np.intp], *, recovered: bool, to: Offsets | None = None) -> Batch:
        facts, topic = columns.facts[ranks], columns.topic[ranks]
        taken = np.bincount(topic, minlength=len(TOPICS)).tolist()
        former = dict(self.applied)
        reached = dict(former)
        for buffer, count in zip(self.buffers, taken, strict=True):
            if count:
                reached[TOPICS[buffer.topic]] = int(facts[topic == buffer.topic, OFFSET][-1])
                buffer.drop(count)
        if to is not None:
            reached = dict(to)
        self.applied = reached
        reason = columns.reason[ranks]
        self.watermark_ms = watermark(self.watermark_ms, facts, reason)
        picks = ranks.tolist()
        customer, event_id, messages = columns.customer, columns.event_id, columns.messages
        detail = columns.detail
        return Batch(
            partition=self.partition,
            nonce=self.nonce,
            former=former,
            to=dict(reached),
            facts=facts,
            topic=topic,
            append_ms=columns.append_ms[ranks],
            reason=reason,
            customer=[customer[i] for i in picks],
            event_id=[event_id[i] for i in picks],
            detail={k: detail[i] for k, i in enumerate(picks) if i in detail} if detail else {},
            messages=[messages[i] for i in picks],
            recovered=recovered,
        )


def _count(window: Sequence[tuple[Slice, int, int]]) -> int:
    return sum(stop - start for _, start, stop in window)


def _until(buffer: Buffer, last: int, limit: int) -> Iterator[tuple[Slice, int, int]]:
    """The first `limit` waiting records with offset <= last."""
    for piece, start, stop in buffer.first(limit):
        inside = int(np.searchsorted(piece.records.offset[start:stop], last, side="right"))
        if inside:
            yield piece, start, start + inside


@dataclass(frozen=True, slots=True)
class _Columns:
    """Waiting records of all topics, topic after topic."""

    facts: IntArray
    topic: IntArray
    key: IntArray
    append_ms: IntArray
    reason: ByteArray
    customer: list[str]
    event_id: list[str]
    detail: dict[int, str]
    messages: list[Any]
    counts: list[int]  # records per topic

    @classmethod
    def of(cls, buffers: Sequence[Buffer], windows: Sequence[Sequence[tuple[Slice, int, int]]], floor_ms: int) -> _Columns:
        pieces = [piece for window in windows for piece in window]
        customer: list[str] = []
        event_id: list[str] = []
        messages: list[Any] = []
        detail: dict[int, str] = {}
        for piece, start, stop in pieces:
            records = piece.records
            if records.detail:
                base = len(customer) - start
                detail.update((base + i, text) for i, text in records.detail.items() if start <= i < stop)
            customer += records.customer[start:stop]
            event_id += records.event_id[start:stop]
            messages += piece.messages[start:stop]
        counts = [sum(stop - start for _, start, stop in window) for window in windows]
        facts = np.concatenate([p.records.facts[a:b] for p, a, b in pieces])
        reason = np.concatenate([p.records.reason[a:b] for p, a, b in pieces])
        key = np.empty(len(facts), np.int64)
        start = 0
        for count in counts:
            stop = start + count
            key[start:stop] = merge_keys(facts[start:stop, TIME], reason[start:stop] == 0, floor_ms)
            start = stop
        return cls(
            facts=facts,
            topic=np.repeat(np.array([buffer.topic for buffer in buffers], np.int64), counts),
            key=key,
            append_ms=np.concatenate([p.records.append_ms[a:b] for p, a, b in pieces]),
            reason=reason,
            customer=customer,
            event_id=event_id,
            detail=detail,
            messages=messages,
            counts=counts,
        )

    def last_key(self, topic: int) -> int:
        """The merge key of the last known record of a topic, NONE when there is none."""
        stop = sum(self.counts[: topic + 1])
        return int(self.key[stop - 1]) if self.counts[topic] else NONE

    def within(self, ranks: npt.NDArray[np.intp], max_customers: int) -> npt.NDArray[np.intp]:
        """The longest start of `ranks` with at most `max_customers` different customers among the accepted records."""
        reason, customer = self.reason, self.customer
        picks = ranks[reason[ranks] == 0].tolist()
        if len(picks) <= max_customers or len({customer[i] for i in picks}) <= max_customers:
            return ranks
        seen: set[str] = set()
        for position, i in enumerate(ranks.tolist()):
            if reason[i] == 0:
                seen.add(customer[i])
                if len(seen) > max_customers:
                    return ranks[:position]
        return ranks
