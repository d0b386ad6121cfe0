"""History from files into the state before the first start: no score is made of it, and the live topics go on from there.

A fact of a file has no offset. It gets one below every real one: in (topic, partition) with n rows the numbers -(n + 1) to -2, in file
order. So it comes before the topic's first record where times are equal, every cut covers it (a cut is never below
-1: what came from files was known from the beginning), and it is never mistaken for a record.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from features.facts import ID, KIND, OFFSET, TIME, TOPICS, WIDTH
from features.history import Histories, Outcome
from features.store import MAX_CUSTOMERS, Claim, Store
from proto.errors import BadInput, BadUsage
from streams.codec import Decoder, RawMessage, Records
from streams.feed import BadRow, Record
from streams.log import Log
from streams.partitioner import murmur2
from streams.rebuild import Draft, Position
from streams.snapshot import Snapshots, Stand
from streams.training import Facts, FileMessage

IntArray = npt.NDArray[np.int64]

STEP: Final = 4_000
"""Facts handled at once."""
PIECE: Final = 5_000
"""Rows decoded at once."""


@dataclass(slots=True)
class Rows:
    """All rows of the files, decoded, by partition and topic. `bad` rows were no events."""

    by_place: dict[tuple[int, int], list[Records]] = field(default_factory=dict)
    bad: int = 0
    first_bad: str = ""


@dataclass(slots=True)
class Filled:
    """What a back-fill did, or would do: facts by what became of them, customers, the newest event time."""

    facts: int = 0
    live: int = 0  # left to the topic, where they are as well
    duplicates: int = 0
    too_late: int = 0
    refused: int = 0  # rows the codec refuses, and sums out of range
    customers: int = 0
    newest_ms: int = -1
    gap_ms: int | None = None  # between the newest fact and the first live record; negative when they overlap

    def add(self, other: Filled) -> None:
        """The sum over partitions."""
        for name in ("facts", "live", "duplicates", "too_late", "refused", "customers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.newest_ms = max(self.newest_ms, other.newest_ms)
        gaps = [gap for gap in (self.gap_ms, other.gap_ms) if gap is not None]
        self.gap_ms = max(gaps, default=None)


def read(rows: Iterable[Record | BadRow], decoder: Decoder, partitions: int, on_bad: Callable[[BadRow], None]) -> Rows:
    """Decode all rows by the partition and topic their event would be in."""
    found = Rows()
    waiting: dict[tuple[int, int], list[RawMessage]] = {}
    counts: dict[tuple[int, int], int] = {}

    def decode(place: tuple[int, int]) -> None:
        partition, topic = place
        found.by_place.setdefault(place, []).append(decoder.decode(topic, partition, waiting[place]))
        waiting[place] = []

    for row in rows:
        if isinstance(row, BadRow):
            found.bad += 1
            found.first_bad = found.first_bad or f"{row.place}: {row.why}"
            on_bad(row)
            continue
        place = murmur2(row.key) % partitions, TOPICS.index(row.topic)
        counts[place] = counts.get(place, 0) + 1
        messages = waiting.setdefault(place, [])
        messages.append(FileMessage(row, counts[place] - 1))
        if len(messages) == PIECE:
            decode(place)
    for place, messages in waiting.items():
        if messages:
            decode(place)
    return found


@dataclass(frozen=True, slots=True)
class Live:
    """What the live topics of a partition hold now: where they begin, ids of all their events, the first event time."""

    lows: dict[str, int]
    ids: IntArray
    first_ms: int | None


def live(source: Log, inputs: Sequence[str], decoder: Decoder, partition: int, *, ids: bool) -> Live:
    """Look at the live topics of a partition. ids: whether to read all their events; else only where they begin."""
    lows: dict[str, int] = {}
    found: list[IntArray] = []
    first_ms: int | None = None
    for index, (topic, name) in enumerate(zip(inputs, TOPICS, strict=True)):
        low, high = source.ends(topic, partition)
        lows[name] = low
        for messages in source.read(topic, partition, low, high if ids else min(high, low + 1)):
            records = decoder.decode(index, partition, messages)
            good = records.facts[records.reason == 0]
            found.append(good[:, ID].copy())
            if len(good):
                first_ms = min(int(good[:, TIME].min()), first_ms if first_ms is not None else int(good[0, TIME]))
    return Live(lows, np.unique(np.concatenate(found)) if found else np.empty(0, np.int64), first_ms)


def facts_of(rows: Rows, partition: int) -> Facts:
    """The facts of a partition in order of time, with offsets below every real one. A file says nothing about when a row was learnt."""
    customers: list[str] = []
    facts: list[IntArray] = []
    rejected = 0
    for topic in range(len(TOPICS)):
        records = rows.by_place.get((partition, topic), [])
        count = sum(map(len, records))
        for part in records:
            good = np.flatnonzero(part.reason == 0)
            some = part.facts[good]
            some[:, OFFSET] -= count + 1
            facts.append(some)
            customers += [part.customer[i] for i in good.tolist()]
            rejected += len(part) - len(good)
    if not facts:
        return Facts([], np.empty((0, WIDTH), np.int64))
    together = np.concatenate(facts)
    ranks = np.lexsort((together[:, OFFSET], together[:, KIND] >> 3, together[:, TIME]))
    return Facts([customers[i] for i in ranks.tolist()], together[ranks], rejected)


def refuse_state(look: Claim) -> None:
    """Raises BadUsage when the partition holds state already."""
    if not (look.fresh or look.rebuilding):
        raise BadUsage(
            f"partition {look.partition} holds state already (offsets {dict(look.applied)}): a back-fill comes before the first start; "
            "use another namespace (CHURN_NAMESPACE)"
        )


def fill(
    store: Store,
    snapshots: Snapshots,
    partition: int,
    facts: Facts,
    there: Live,
    *,
    max_facts: int,
    now_ms: int,
    dry_run: bool = False,
) -> Filled:
    """Make the state of one partition from its facts, leave a snapshot, and let the live topics begin behind it."""
    result = Filled(refused=facts.rejected)
    rows, customers = facts.facts, facts.customers
    if len(rows):
        here = np.isin(rows[:, ID], there.ids)
        result.live = int(np.count_nonzero(here))
        if here.any():
            kept = np.flatnonzero(~here)
            rows, customers = rows[kept], [customers[i] for i in kept.tolist()]
    nonce = secrets.token_hex(16)
    draft = None
    if not dry_run:
        snapshots.note_backfill(partition, done=False)
        store.claim(partition, nonce)
        draft = Draft(store, partition, nonce, max_facts)
    histories = Histories(create=True) if draft is None else draft.histories
    for first in range(0, len(rows), STEP):
        names, some = customers[first : first + STEP], rows[first : first + STEP]
        if draft is not None and (missing := histories.missing(names)):
            histories.load(missing, draft.load(missing))
        outcome = histories.step(names, some).outcome
        counts = np.bincount(outcome, minlength=len(Outcome)).tolist()
        result.facts += counts[Outcome.SCORED] + counts[Outcome.PROFILE]
        result.duplicates += counts[Outcome.DUPLICATE] + counts[Outcome.DUPLICATE_CONFLICT]
        result.too_late += counts[Outcome.TOO_LATE]
        result.refused += counts[Outcome.AMOUNT_RANGE]
        if draft is not None:
            draft.changed(names)
    if len(rows):
        result.newest_ms = int(rows[:, TIME].max())
        result.gap_ms = None if there.first_ms is None else there.first_ms - result.newest_ms
    if draft is None:
        result.customers = len(histories)
        return result
    draft.write()
    result.customers = len(draft.stored)
    # Where the live topics begin now: should retention take their first records before a worker comes, it will say so.
    # No watermark: the order of the live records is their own, as if there had been nothing before.
    position = Position({name: there.lows[name] - 1 for name in TOPICS}, "", -1, {"backfilled": result.facts})
    writer = snapshots.begin(partition)
    try:
        names = sorted(draft.stored)
        for first in range(0, len(names), MAX_CUSTOMERS):
            page = names[first : first + MAX_CUSTOMERS]
            for customer, state in zip(page, store.load(partition, page), strict=True):
                if state is None:
                    raise BadInput(f"partition {partition}: a customer just written is not there; somebody else writes to this namespace")
                writer.add(customer, state)
        stand = Stand(partition, position.applied, "", -1, position.counters, writer.count, now_ms)
        writer.finish(stand)
    except BaseException:
        writer.abandon()
        raise
    draft.finish(position)
    store.release(partition, nonce)
    snapshots.note_backfill(partition, done=True)
    return result
