"""Silence: at each tick of a partition's time its customers are scored again though nothing happened, in slices between batches.

A tick is an instant that every partition passes in its own time: the newest event time handled, moved on by the broker's clock when
nothing waits. Where a slice lies among the records, its outputs say (cut, at); so it is told again like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from features.facts import DAY_MS, KIND, NONE, OFFSET, SILENCE, SOURCES, TIME, TOPICS, WIDTH
from features.history import Histories
from features.store import MAX_CUSTOMERS, CustomerState, digests
from features.window import HORIZON_MS, HOUR_MS
from streams.emitted import Emitted
from streams.merge import Batch, TickStand

IntArray = npt.NDArray[np.int64]

PERIODS: Final = {"off": 0, "hourly": HOUR_MS, "daily": DAY_MS, "weekly": 7 * DAY_MS}
SLICE: Final = MAX_CUSTOMERS
"""Scores of one slice at most: so long may a batch of events be held up."""
OFFSETS: Final = MAX_CUSTOMERS
"""Offsets of the source `silence` that each slice takes, used or not; one that was cut off and adopted takes those it used."""
SOURCE: Final = SOURCES[SILENCE]
COUNTERS: Final = ("silence", "tick_ms", "tick_place", "arrived_ms")
"""Kept with the counters of a partition, because all of them are moved by adding: scores made at ticks; where the ticks stand
(`stand`); append time of the newest batch, from which the broker's clock moves time on."""


def stand(counters: Mapping[str, int]) -> TickStand:
    """Where the ticks of a partition stand by its counters."""
    return TickStand(counters.get("tick_ms", 0), counters.get("tick_place", 0))


def place_of(customer: str) -> int:
    """Where a customer comes in a slice: by digest, > 0, below 2**62."""
    return int(_places([customer])[0])


def _places(customers: Sequence[str]) -> IntArray:
    found: IntArray = (np.frombuffer(digests(customers), "<u8") >> np.uint64(2)).astype(np.int64) | 1
    return found


@dataclass(slots=True)
class Roster:
    """Who of a partition may still be due at a tick: name, place and newest event time of each customer."""

    period_ms: int
    _where: dict[str, int] = field(default_factory=dict)
    _names: list[str] = field(default_factory=list)
    _place: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    _newest: IntArray = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def of(cls, period_ms: int, customers: Sequence[str], load: Callable[[Sequence[str]], Sequence[CustomerState | None]]) -> Roster:
        """Of all customers of a partition as they are stored, read in parts."""
        roster = cls(period_ms)
        for first in range(0, len(customers), MAX_CUSTOMERS):
            names = customers[first : first + MAX_CUSTOMERS]
            part = Histories(max_facts=2**62)
            part.load(names, load(names))
            roster.note(names, part.newest_ms(names))
        return roster

    def note(self, customers: Sequence[str], newest_ms: IntArray) -> None:
        """These (distinct) customers have this newest event time now."""
        new = [customer for customer in customers if customer not in self._where]
        if new:
            first = len(self._names)
            self._names += new
            self._where.update(zip(new, range(first, first + len(new)), strict=True))
            self._place = np.concatenate([self._place, _places(new)])
            self._newest = np.concatenate([self._newest, np.full(len(new), NONE, np.int64)])
        self._newest[[self._where[customer] for customer in customers]] = newest_ms

    def due(self, at_ms: int, after: int = 0) -> npt.NDArray[np.intp]:
        """Who is scored at a tick, behind a place, in order: whoever had an event that the tick before this one saw in a window."""
        there = (self._newest <= at_ms) & (self._newest > at_ms - self.period_ms - HORIZON_MS) & (self._place > after)
        rows = np.flatnonzero(there)
        found: npt.NDArray[np.intp] = rows[np.argsort(self._place[rows], kind="stable")]
        return found

    def slice(self, before: TickStand, until_ms: int) -> Slice:
        """What comes next of the ticks up to `until_ms`, at most SLICE scores."""
        now, room = before, SLICE
        names: list[str] = []
        at: list[IntArray] = []
        while room:
            if not now.place:
                tick = now.tick_ms + self.period_ms
                if tick > until_ms:
                    break
                reach = (self._newest <= until_ms) & (self._newest > tick - self.period_ms - HORIZON_MS)
                if not reach.any():  # nobody can be due at any of them
                    now = TickStand(until_ms, 0)
                    break
                now = TickStand(tick, 0)
            rows = self.due(now.tick_ms, now.place)
            some = rows[:room]
            names += [self._names[row] for row in some.tolist()]
            at.append(np.full(len(some), now.tick_ms, np.int64))
            room -= len(some)
            now = TickStand(now.tick_ms, int(self._place[some[-1]]) if len(some) < len(rows) else 0)
        return Slice(names, np.concatenate(at) if at else np.empty(0, np.int64), before, now)


@dataclass(frozen=True, slots=True)
class Slice:
    """Who is scored as of when, shape (k,), and where the ticks stand before and behind it."""

    customers: list[str]
    at: IntArray
    before: TickStand
    now: TickStand

    @property
    def counters(self) -> dict[str, int]:
        """What it adds to the partition's."""
        ticks = {"tick_ms": self.now.tick_ms - self.before.tick_ms, "tick_place": self.now.place - self.before.place}
        return {"silence": len(self.customers), **ticks}

    def batch(self, batch: Batch) -> Batch:
        """The slice as a batch of k records, between the offsets of the empty one it was asked for with."""
        return _batch(batch, self.customers, self.at, batch.former[SOURCE] + 1 + np.arange(len(self.customers), dtype=np.int64))


def _batch(batch: Batch, customers: list[str], at: IntArray, offset: IntArray) -> Batch:
    k = len(customers)
    facts = np.zeros((k, WIDTH), np.int64)
    facts[:, TIME], facts[:, OFFSET], facts[:, KIND] = at, offset, SILENCE << 3
    return replace(
        batch,
        facts=facts,
        topic=np.full(k, SILENCE, np.int64),
        append_ms=np.zeros(k, np.int64),
        reason=np.zeros(k, np.uint8),
        customer=customers,
        event_id=[""] * k,
        messages=[None] * k,
    )


# -- told again


class Attendance:
    """Who should have been scored at the ticks of a partition that is told again. histories: everybody that was handled so far;
    before: where the ticks stood then."""

    def __init__(self, period_ms: int, histories: Histories, before: TickStand) -> None:
        self._histories = histories
        self._roster = Roster(period_ms)
        names = list(histories)
        self._roster.note(names, histories.newest_ms(names))
        self._stand = before

    def note(self, customers: Sequence[str]) -> None:
        """These were handled."""
        names = list(dict.fromkeys(customers))
        self._roster.note(names, self._histories.newest_ms(names))

    def passed(self, time_ms: int) -> list[tuple[str, int]]:
        """Customers and ticks of which there is no score, though a record that comes next moves time to here: it waits for them."""
        until = time_ms // self._roster.period_ms * self._roster.period_ms
        found: list[tuple[str, int]] = []
        while self._stand.tick_ms < until:
            due = self._roster.slice(self._stand, until)
            found += zip(due.customers, due.at.tolist(), strict=True)
            self._stand = due.now
        return found

    def missing(self, block: Emitted) -> list[tuple[str, int]]:
        """Customers and ticks of which there should be a score before the end of these, and is none."""
        found: list[tuple[str, int]] = []
        number = block.offset // OFFSETS
        bounds = [0, *(np.flatnonzero(number[1:] != number[:-1]) + 1).tolist(), len(block)]
        for first, end in pairwise(bounds):
            rest = list(zip(block.customer[first:end].tolist(), block.at[first:end].tolist(), strict=True))
            # Of one number are also two slices, when the store went back to the first and there was no number between them.
            while rest:
                due = self._roster.slice(self._stand, rest[-1][1])
                expected = list(zip(due.customers, due.at.tolist(), strict=True))
                there = set(rest)
                places = [k for k, one in enumerate(expected) if one in there]
                found += [one for one in expected[: places[-1] + 1 if places else len(expected)] if one not in there]
                more = [one for one in rest if one not in expected] if places else []
                # A slice that was cut off goes on behind its last score.
                whole = not expected or (bool(places) and places[-1] + 1 == len(expected))
                self._stand = due.now if whole else TickStand(rest[-1][1], place_of(rest[-1][0]))
                rest = more if whole else []
        return found


def emitted_batch(partition: int, block: Emitted) -> Batch:
    """Silence scores of one cut, as they were emitted, as a batch that handles no record."""
    cut = block.cut(0)
    nothing = np.empty((0, WIDTH), np.int64), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8)
    return _batch(Batch(partition, "", cut, cut, *nothing, [], [], {}, []), block.customer.tolist(), block.at, block.offset)


def parted(piece: Emitted) -> Iterator[tuple[Emitted, Emitted]]:
    """Emitted records as pairs: what was emitted for records, then the silence scores that came after it, all of one cut.

    The first part ends with the first silence score, because the records up to its cut come before it, with outputs or without.
    """
    silent = piece.plan[:, -1] == SILENCE
    if not silent.any():
        yield piece, piece.pick(slice(0, 0))
        return
    keys = piece.key
    edges = np.flatnonzero((silent[1:] != silent[:-1]) | (silent[1:] & (keys[1:] != keys[:-1]))) + 1
    bounds = [0, *edges.tolist(), len(piece)]
    first = 0
    for begin, end in pairwise(bounds):
        if silent[begin]:
            yield piece.pick(slice(first, begin + 1)), piece.pick(slice(begin, end))
            first = end
    if first < len(piece):
        yield piece.pick(slice(first, None)), piece.pick(slice(0, 0))


def stood(block: Emitted, former: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Behind emitted silence scores: the offset of the source, and what to add to the counters of `former`.

    Whether the tick was finished the outputs do not say: it goes on behind the last of them, and finds nobody or the rest.
    """
    last, tick_ms = int(block.offset[-1]), int(block.at[-1])
    ticks = {"tick_ms": tick_ms - former.get("tick_ms", 0), "tick_place": place_of(block.customer[-1]) - former.get("tick_place", 0)}
    return {SOURCE: last}, {"silence": len(block), **ticks}


assert len(TOPICS) == SILENCE
