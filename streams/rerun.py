"""A partition's history told again: its records in their recorded order through the one kernel, beside what was emitted for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson

from features.facts import NONE, SILENCE, TIME, TOPICS
from features.history import Histories
from features.store import CustomerState, Offsets
from proto.errors import BadUsage, Reason
from streams.codec import Decoder
from streams.emitted import LETTER, SCORE, Emitted, Outputs
from streams.evaluate import CRASHED, REJECTED
from streams.log import Log
from streams.merge import Batch, placed
from streams.metrics import Parts
from streams.recorded import Recorded
from streams.silence import emitted_batch, parted
from streams.snapshot import Snapshots

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]

EVER: Final = 2**62


@dataclass(frozen=True, slots=True)
class Topics:
    """Full names; `inputs` in topic-index order."""

    inputs: Sequence[str]
    scores: str
    dead_letters: str
    alerts: str
    features: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Instants [from_ms, to_ms) of a partition's time: the newest event time handled up to and including a record."""

    from_ms: int = -EVER
    to_ms: int = EVER


@dataclass(frozen=True, slots=True)
class Base:
    """Where a telling begins: behind these offsets, with these customers (none at the beginning of the topics)."""

    applied: Offsets
    watermark_ms: int = -1
    states: Mapping[str, CustomerState] = field(default_factory=dict)


def base(source: Log, inputs: Sequence[str], partition: int, snapshots: Snapshots | None, span: Span) -> Base:
    """The latest snapshot before the span behind which every record is still there, or the beginning of the topics.

    Raises BadUsage when history before the span is gone: deleted by retention, or never on the topics because it came from files.
    """
    lows = [source.ends(topic, partition)[0] for topic in inputs]
    for snapshot in snapshots.good(partition) if snapshots is not None else ():
        stand = snapshot.stand
        if stand.watermark_ms < span.from_ms and all(stand.applied[name] >= low - 1 for name, low in zip(TOPICS, lows, strict=True)):
            return Base(stand.applied, stand.watermark_ms, dict(snapshot.customers()))
    filled = snapshots is not None and snapshots.backfill(partition) is not None
    if filled or any(lows):
        gone = [f"{topic} begins at {low}" for topic, low in zip(inputs, lows, strict=True) if low]
        why = f"records were deleted ({', '.join(gone)})" if gone else "it was filled from files"
        raise BadUsage(
            f"partition {partition}: history cannot be told from its beginning, {why}, and there is no snapshot "
            "before the range; begin the range after one (`churnstream snapshot list`)"
        )
    return Base(dict.fromkeys(TOPICS, -1))


@dataclass(frozen=True, slots=True)
class Told:
    """A handled stretch of n records inside the span, k of them with a vector, all aligned with `rows`.

    Nothing of it is noted as anybody's last score yet. place: the row of `block` that holds the emitted score, -1 when there is none.
    """

    batch: Batch
    block: Emitted | None
    outcome: ByteArray  # (n,)
    customers: Sequence[str]
    rows: IntArray
    at: IntArray
    late: BoolArray
    vectors: FloatArray
    place: IntArray
    time_ms: int = -1  # the partition's time with its first record

    @property
    def sources(self) -> tuple[IntArray, IntArray]:
        """What each score is made for: topic index, offset."""
        return self.batch.topic[self.rows], self.batch.offset[self.rows]

    def pick(self, which: BoolArray | slice) -> Told:
        """Of the scores only these."""
        chosen = np.arange(len(self.rows))[which]
        return Told(
            self.batch,
            self.block,
            self.outcome,
            [self.customers[i] for i in chosen.tolist()],
            self.rows[chosen],
            self.at[chosen],
            self.late[chosen],
            self.vectors[chosen],
            self.place[chosen],
        )


@dataclass(slots=True)
class Rerun:
    """Tells one partition. applied: the offsets up to which outputs are complete; None = up to the newest output there is.

    recorded: in the order of the outputs; else in the order of the merge, up to `applied` or the end, without a look at them.
    """

    source: Log
    topics: Topics
    decoder: Decoder
    partition: int
    span: Span
    base: Base
    applied: Offsets | None = None
    recorded: bool = True
    parts: Parts = field(default_factory=Parts)
    tick_ms: int = 0  # stretches end where time passes a tick, when there are any
    watch: Callable[[Histories, Batch], None] | None = None  # called before a batch is taken in, which then has each customer once
    outputs: Outputs = field(init=False)
    histories: Histories = field(init=False)
    handled: int = 0

    def __post_init__(self) -> None:
        self.histories = Histories(max_facts=EVER, create=not self.base.states)
        t = self.topics
        self.outputs = Outputs(self.source, t.scores, t.dead_letters, t.alerts, self.partition, keep=True)
        if self.recorded:
            self.outputs.look()

    def __iter__(self) -> Iterator[Told]:
        """What lies inside the span, in stretches; what comes before it is handled on the way, with the scores it had."""
        time = self.base.watermark_ms
        for batch, block in self._batches():
            if block is not None and len(batch) and batch.topic[0] == SILENCE:
                told = self._silent(batch, block)
                if time >= self.span.to_ms:
                    return
                if time >= self.span.from_ms:
                    yield told
                else:
                    self.restore(told)
                continue
            self.handled += len(batch)
            times = np.maximum.accumulate(np.where(batch.reason == 0, batch.facts[:, TIME], NONE))
            times = np.maximum(times, time)
            first, end = (int(np.searchsorted(times, bound)) for bound in (self.span.from_ms, self.span.to_ms))
            if first:
                self.restore(self._told(batch.part(0, first) if first < len(batch) else batch, block))
            if first < end:
                ticks = times[first:end] // self.tick_ms if self.tick_ms else np.zeros(0, np.int64)
                edges = [first, *(first + 1 + np.flatnonzero(np.diff(ticks))).tolist(), end]
                for begin, stop in pairwise(edges):
                    inside = batch if stop - begin == len(batch) else batch.part(begin, stop)
                    if self.watch is None:
                        yield replace(self._told(inside, block), time_ms=int(times[begin]))
                    else:
                        for part in _each_once(inside):
                            self.watch(self.histories, part)
                            yield self._told(part, block)
            if end < len(batch):
                return
            time = int(times[-1])

    def restore(self, told: Told) -> None:
        """Note the emitted scores as their customers' last."""
        block = told.block
        if block is None:
            return
        told = told if (told.place >= 0).all() else told.pick(told.place >= 0)
        there = told.place
        self.histories.restore_scores(told.customers, *block.last_scores(there))

    def _batches(self) -> Iterator[tuple[Batch, Emitted | None]]:
        t = self.topics
        inputs = Recorded(
            self.source,
            t.inputs,
            self.decoder,
            self.partition,
            self.base.applied,
            self.base.watermark_ms,
            self.outputs.complete,
            parts=self.parts,
        )
        if self.recorded:
            most = EVER if self.applied is None else sum(self.applied.values())
            for piece in self.outputs.after(self.base.applied):
                settled = piece.pick(piece.key <= most)
                for handled, silent in parted(settled):
                    yield from inputs.batches(handled)
                    if len(silent):
                        yield emitted_batch(self.partition, silent), silent
                if len(settled) < len(piece):
                    break
            if self.applied is None:
                return
        to = inputs.ends if self.applied is None else self.applied
        yield from ((batch, None) for batch in inputs.up_to({name: max(to[name], inputs.merge.applied[name]) for name in TOPICS}))

    def _silent(self, batch: Batch, block: Emitted) -> Told:
        """Silence scores, each with its vector at the instant of its tick; nothing is taken in."""
        n = len(batch)
        if self.base.states:
            missing = self.histories.missing(batch.customer)
            self.histories.load(missing, [self.base.states.get(name) for name in missing])
        with self.parts.part("kernel"):
            vectors = self.histories.vectors_at(batch.customer, block.at)
        rows, outcome = np.arange(n), np.zeros(n, np.uint8)
        return Told(batch, block, outcome, batch.customer, rows, block.at, np.zeros(n, np.bool_), vectors, rows)

    def _told(self, batch: Batch, block: Emitted | None) -> Told:
        n = len(batch)
        place = np.full(n, -1, np.int64)
        if block is not None:
            found, emitted = placed(block.plan, batch.topic, batch.offset)
            found = np.minimum(found, len(block) - 1)
            place[emitted] = found[emitted]
            batch = _given_up(batch, block, place)
            place[(place >= 0) & (block.kind[place] != SCORE)] = -1
        accepted = batch.reason == Reason.ACCEPTED
        picks = np.flatnonzero(accepted)
        whole = len(picks) == n
        customers = batch.customer if whole else [batch.customer[i] for i in picks.tolist()]
        if self.base.states:
            with self.parts.part("load"):
                missing = self.histories.missing(customers)
                self.histories.load(missing, [self.base.states.get(name) for name in missing])
        with self.parts.part("kernel"):
            step = self.histories.step(customers, batch.facts if whole else batch.facts[picks])
        outcome = np.full(n, REJECTED, np.uint8)
        outcome[picks] = step.outcome
        rows = picks[step.rows]
        scored = customers if len(rows) == len(customers) else [customers[i] for i in step.rows.tolist()]
        return Told(batch, block, outcome, scored, rows, step.at[step.rows], step.late[step.rows], step.vectors, place[rows])


def _each_once(batch: Batch) -> Iterator[Batch]:
    """The batch in parts that have each customer once."""
    seen: set[str] = set()
    first = 0
    for i, customer in enumerate(batch.customer):
        if customer in seen:
            yield batch.part(first, i)
            first, seen = i, set()
        seen.add(customer)
    yield batch.part(first, len(batch))


def _given_up(batch: Batch, block: Emitted, place: IntArray) -> Batch:
    """With the records that ended their workers rejected: no replay of values can find that out."""
    letters = np.flatnonzero((place >= 0) & (block.kind[place] == LETTER) & (batch.reason == 0))
    crashed = [i for i in letters.tolist() if orjson.loads(block.record[place[i]])["reason"] == "crash"]
    if not crashed:
        return batch
    batch.reason[crashed] = Reason.CRASH
    return replace(batch, detail={**batch.detail, **dict.fromkeys(crashed, CRASHED)})
