"""A partition just claimed, brought to where its outputs say it stood: adopted, rebuilt, or refused with a clear error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from features.facts import OFFSET, PROFILE, TOPICS
from features.history import Histories, Outcome
from features.store import MAX_CUSTOMERS, Apply, Claim, CustomerState, CustomerWrite, Intent, Store, broken, fenced
from proto.errors import Fenced, InvariantBroken, StateDamaged
from streams.codec import Decoder
from streams.emitted import LETTER, MARGIN, SCORE, Emitted, Outputs, together
from streams.engine import tally
from streams.evaluate import REJECTED
from streams.log import Log
from streams.merge import Batch, placed, watermark
from streams.metrics import Metrics, Parts
from streams.recorded import Recorded
from streams.scores import crossed, vector_hashes
from streams.snapshot import Snapshot, Snapshots

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

PROFILES: Final = PROFILE >> 3
_LETTERS: Final = (Outcome.TOO_LATE, Outcome.AMOUNT_RANGE, REJECTED)
_SAY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class RestoreSettings:
    """Full topic names, `inputs` in topic-index order. max_facts bounds the facts in memory; largest_batch: records of one batch.

    incomplete: rebuild even when records are gone that no snapshot holds. whole: a batch's outputs come in one transaction (delivery
    exactly_once), so those of an open batch are out only when the store has lost what it made of them.
    """

    inputs: Sequence[str]
    scores: str
    dead_letters: str
    alerts: str
    max_facts: int = 2_000_000
    largest_batch: int = 4_000
    incomplete: bool = False
    whole: bool = False


@dataclass(slots=True)
class Position:
    """Where a partition stands."""

    applied: dict[str, int]
    model: str
    watermark_ms: int
    counters: dict[str, int]


class Draft:
    """The state of a partition being made anew: in memory as far as it fits, the rest in the store already.

    Nothing of it counts before `finish`; a worker that dies before that leaves a partition marked as being rebuilt.
    """

    def __init__(self, store: Store, partition: int, nonce: str, max_facts: int, parts: Parts | None = None) -> None:
        self._store, self._partition, self._nonce = store, partition, nonce
        self._parts = Parts() if parts is None else parts
        self._dirty: dict[str, None] = {}
        self.histories = Histories(max_facts=max_facts)
        self.stored: set[str] = set()
        store.begin_rebuild(partition, nonce)

    def take_over(self, customers: Sequence[CustomerWrite]) -> None:
        """Customers as they are in a snapshot, at most MAX_CUSTOMERS."""
        self._store.restore(self._partition, self._nonce, customers)
        self.stored.update(write.customer for write in customers)

    def load(self, customers: Sequence[str]) -> list[CustomerState | None]:
        """What is stored of customers that are not in memory."""
        there = [customer for customer in customers if customer in self.stored]
        found = dict(zip(there, self._store.load(self._partition, there), strict=True)) if there else {}
        return [found.get(customer) for customer in customers]

    def changed(self, customers: Iterable[str]) -> None:
        """These were changed in memory; when that is full, everything is written and the least used forgotten."""
        self._dirty.update(dict.fromkeys(customers))
        if self.histories.over:
            self.write()
            self.histories.evict()

    def write(self) -> None:
        """Store what has changed."""
        with self._parts.part("store"):
            customers = list(self._dirty)
            for first in range(0, len(customers), MAX_CUSTOMERS):
                self._store.restore(self._partition, self._nonce, self.histories.changes(customers[first : first + MAX_CUSTOMERS]))
        self.stored.update(customers)
        self._dirty.clear()

    def finish(self, position: Position) -> None:
        """The state is whole and stands here."""
        self.write()
        self._store.finish_rebuild(self._partition, self._nonce, position.applied, position.model, position.watermark_ms, position.counters)


@dataclass(slots=True)
class Restorer:
    """Decides, from a claim and the tail of the output partition, where work goes on. Emits nothing.

    One thread at a time; with a store of its own where the engine's is used by another thread.
    """

    settings: RestoreSettings
    store: Store
    log: Log
    decoder: Decoder
    metrics: Metrics = field(default_factory=Metrics)
    snapshots: Snapshots | None = None
    parts: Parts = field(default_factory=Parts)
    _wanted: Callable[[], bool] = lambda: True

    def restore(self, claim: Claim, wanted: Callable[[], bool] = lambda: True) -> Claim:
        """The claim as work has to go on from it: whole state, `applied` not before anything that is complete in the outputs.

        Call it after every claim, before the first record is read; make the merge with `Merge.of(result)` and give the result
        to the engine (`Engine.restored`). Raises Fenced, StoreUnavailable, DependencyUnreachable, and InvariantBroken when the
        state cannot be rebuilt from what is there. wanted: whether anybody still waits; when not, Fenced is raised soon.
        """
        self._wanted = wanted
        s = self.settings
        outputs = Outputs(self.log, s.scores, s.dead_letters, s.alerts, claim.partition, margin=max(MARGIN, s.largest_batch))
        with self.parts.part("look"):
            outputs.look()
        try:
            return self._restored(claim, outputs)
        except InvariantBroken:
            # What looks like a loss to a worker that was frozen since its claim may be what its successors have done meanwhile.
            if self.store.standings([claim.partition])[0].nonce != claim.nonce:
                raise fenced(claim.partition) from None
            raise

    def _restored(self, claim: Claim, outputs: Outputs) -> Claim:
        why = self._lost(claim, outputs)
        if why:
            claim = self._rebuild(claim, outputs, why)
        elif claim.fresh and claim.intent is None:
            claim = self._begun(claim)
        try:
            return self._settled(claim, outputs)
        except StateDamaged as error:
            claim = self._rebuild(claim, outputs, str(error))
            return self._settled(claim, outputs)

    def go_on(self, partition: int) -> None:
        """Raises Fenced when the partition was given up meanwhile."""
        if not self._wanted():
            raise Fenced(f"partition {partition} was given up while it was restored")

    # -- what to do

    def _lost(self, claim: Claim, outputs: Outputs) -> str:
        """Why the state has to be rebuilt, "" when it is whole."""
        if claim.rebuilding:
            return "a rebuild was begun and not finished"
        if claim.damaged:
            return claim.damaged
        if claim.fresh and claim.intent is None and outputs.ever:  # with one it is the very first batch that was cut off
            return "the store is empty, but scores were emitted"
        if claim.fresh and self.snapshots is not None and self.snapshots.of(claim.partition):
            return "the store is empty, but there is a snapshot"
        if claim.fresh and claim.intent is None:
            return ""
        for topic, name in zip(self.settings.inputs, TOPICS, strict=True):
            low, applied = self.log.ends(topic, claim.partition)[0], claim.applied[name]
            if applied < low - 1:
                return f"{topic}[{claim.partition}] begins at {low}, what follows offset {applied} is deleted"
        return ""

    def _begun(self, claim: Claim) -> Claim:
        """The claim of a partition nobody has worked on, at the beginnings of its topics.

        They are part of the state: an offset of -1 alone would not tell a topic that had lost its first records before anybody came
        from one that lost them after the store went back to before they were handled.
        """
        applied = {name: self.log.ends(topic, claim.partition)[0] - 1 for topic, name in zip(self.settings.inputs, TOPICS, strict=True)}
        if applied == dict(claim.applied):
            return claim
        self.store.apply([Apply(claim.partition, claim.nonce, claim.applied, applied, "", -1, {}, ())])
        return self.store.claim(claim.partition, claim.nonce)

    def _base(self, partition: int) -> tuple[Snapshot | None, Position]:
        """Where to rebuild from: the latest snapshot behind which every record is still there, or the beginning.

        Raises InvariantBroken when records are deleted that no snapshot holds.
        """
        ends = [self.log.ends(topic, partition) for topic in self.settings.inputs]
        for snapshot in self.snapshots.good(partition) if self.snapshots is not None else ():
            stand = snapshot.stand
            places = [stand.applied[name] for name in TOPICS]
            if all(place < high for place, (_, high) in zip(places, ends, strict=True)) and all(
                place >= low - 1 for place, (low, _) in zip(places, ends, strict=True)
            ):
                return snapshot, Position(dict(stand.applied), stand.model, stand.watermark_ms, dict(stand.counters))
            log.error("snapshot left out: %s: it stands at %s, the topics hold %s", snapshot.path, stand.applied, ends)
        filled = self.snapshots.backfill(partition) if self.snapshots is not None else None
        if filled is not None and not self.settings.incomplete:
            what = (
                "was begun and not finished: run `churnstream backfill` again"
                if not filled
                else "is part of its state, and no snapshot is good"
            )
            raise InvariantBroken(f"partition {partition}: a back-fill from files {what}; the topics alone do not hold what the files did")
        gone = [f"{topic} begins at {low}" for topic, (low, _) in zip(self.settings.inputs, ends, strict=True) if low > 0]
        if gone and not self.settings.incomplete:
            where = f"in {self.snapshots.place(partition)}" if self.snapshots is not None else "(CHURN_SNAPSHOT_DIR is not set)"
            raise InvariantBroken(
                f"partition {partition}: its state is lost, records in between were deleted unread ({', '.join(gone)}), and there is no "
                f"good snapshot {where}. Nothing is scored from half a history. Bring back a snapshot; or start afresh in another "
                "namespace with `churnstream backfill` from files; or accept what is left: CHURN_REBUILD_INCOMPLETE=true"
            )
        return None, Position({name: low - 1 for name, (low, _) in zip(TOPICS, ends, strict=True)}, "", -1, {})

    def _settled(self, claim: Claim, outputs: Outputs) -> Claim:
        newest = outputs.newest()
        if newest is None or _covers(claim.applied, newest):
            return claim
        if claim.intent is not None and _covers(claim.intent.to, newest) and not self.settings.whole:
            return claim  # a crash in mid-batch: the open batch is repeated
        return self._adopt(claim, outputs)

    # -- rebuilding

    def _rebuild(self, claim: Claim, outputs: Outputs, why: str) -> Claim:
        partition, nonce = claim.partition, claim.nonce
        log.warning("partition %d: its state is rebuilt: %s", partition, why)
        self.metrics.rebuilding.labels(str(partition)).set(1)
        snapshot, base = self._base(partition)
        draft = Draft(self.store, partition, nonce, self.settings.max_facts, self.parts)
        if snapshot is not None:
            with self.parts.part("snapshot"):
                for some in snapshot.writes():
                    self.go_on(partition)
                    draft.take_over(some)
            log.info("partition %d: %d customers from %s", partition, len(draft.stored), snapshot.path)
        replay = _Replay(self, partition, base, draft.histories, draft.load, outputs, whole=outputs.complete)
        # The outputs of the last batch may be incomplete: it is adopted record by record once the state is stored.
        end = outputs.newest_key - 2 * self.settings.largest_batch
        began = said = time.monotonic()
        handled = 0
        with closing(replay.recorded):
            for piece in outputs.after(base.applied):
                kept = piece.pick(piece.key <= end)
                for batch, block in replay.recorded.batches(kept):
                    done = replay.handle(batch, block)
                    replay.move(batch, done, block)
                    draft.changed(done.customers)
                    handled += len(batch)
                if time.monotonic() - said > _SAY_S:
                    said = time.monotonic()
                    log.info("partition %d: %d records handled again, %d a second", partition, handled, handled / (said - began))
                if len(kept) < len(piece):
                    break
        draft.finish(replay.position)
        self.metrics.rebuilding.labels(str(partition)).set(0)
        self.metrics.restored.labels("rebuilt").inc(handled)
        log.warning("partition %d: rebuilt from %d records in %.1f s", partition, handled, time.monotonic() - began)
        claim = self.store.claim(partition, nonce)
        if dict(claim.applied) != replay.position.applied:
            raise broken(partition, replay.position.applied, claim.applied)  # it went back since the end of the rebuild
        return claim

    # -- adopting

    def _adopt(self, claim: Claim, outputs: Outputs) -> Claim:
        """Take over what was emitted beyond the applied offsets; what its batch still lacks of outputs is left as a plan."""
        partition, nonce = claim.partition, claim.nonce
        log.warning("partition %d: outputs beyond the stored offsets %s are adopted", partition, dict(claim.applied))
        position = Position(dict(claim.applied), claim.model, claim.watermark_ms, dict(claim.counters))
        histories = Histories(max_facts=self.settings.max_facts, known=claim.customers)
        replay = _Replay(self, partition, position, histories, lambda names: self.store.load(partition, names), outputs, whole=True)
        replay.expected = (*outputs.last_keys(), outputs.newest_key - 2 * self.settings.largest_batch)
        left: list[Emitted] = []
        with closing(replay.recorded):
            for piece in outputs.after(claim.applied):
                if left:
                    left.append(piece)
                    continue
                for batch, block in replay.recorded.batches(piece):
                    if not self._adopt_batch(replay, batch, block, nonce):
                        left.append(piece)
                        break
        self.metrics.restore_differences.labels("cut").inc(outputs.conflicts)
        claim = self.store.claim(partition, nonce)
        if dict(claim.applied) != replay.position.applied:
            raise broken(partition, replay.position.applied, claim.applied)  # it went back again since the last apply
        return self._planned(claim, together(left)) if left else claim

    def _adopt_batch(self, replay: _Replay, batch: Batch, block: Emitted | None, nonce: str) -> bool:
        """Apply a batch in parts of few enough customers; whether all its outputs are there, else only what comes before."""
        if replay.at_the_end(batch):
            batch = _ordered(replay, batch, block)
        for part in _parts(batch):
            done = replay.handle(part, block)
            if done.missing is not None:
                # Nothing of this part is stored yet: forgotten and loaded again, it is as if it had never been handled.
                replay.histories.forget(done.customers)
                if done.missing:
                    before = part.part(0, done.missing)
                    self._apply(replay, before, block, replay.handle(before, block), nonce)
                return False
            self._apply(replay, part, block, done, nonce)
        return True

    def _apply(self, replay: _Replay, batch: Batch, block: Emitted | None, done: _Handled, nonce: str) -> None:
        former = dict(replay.position.applied)
        replay.move(batch, done, block)
        position = replay.position
        with self.parts.part("store"):
            self.store.apply(
                [
                    Apply(
                        partition=batch.partition,
                        nonce=nonce,
                        former=former,
                        to=position.applied,
                        model=position.model,
                        watermark_ms=position.watermark_ms,
                        counters=done.counters,
                        customers=replay.histories.changes(done.customers),
                    )
                ]
            )
        replay.histories.evict()
        self.metrics.restored.labels("adopted").inc(len(batch))

    def _planned(self, claim: Claim, left: Emitted) -> Claim:
        """The claim with what is left to do again: as the batch that it was, with its model and clock where a score tells them."""
        applied = np.array([claim.applied[name] for name in TOPICS], np.int64)
        left = left.pick(left.offset > applied[left.plan[:, -1]])
        scores = np.flatnonzero(left.kind != LETTER)
        intent = None
        if len(scores):
            first = scores[0]
            others = (left.model[scores] != left.model[first]) | (left.scored_at[scores] != left.scored_at[first])
            if others.any():
                # One batch has one clock and one model. What follows it will be emitted a second time, and the first wins.
                end = int(scores[np.argmax(others)])
                log.error("partition %d: outputs are missing before the last batch; %d are made again", claim.partition, len(left) - end)
                left = left.pick(slice(0, end))
            intent = Intent(left.cut(-1), str(left.model[first]), int(left.scored_at[first]))
        log.warning("partition %d: the last batch lacks outputs; %d records of it are handled again", claim.partition, len(left))
        return replace(claim, plan=tuple(map(tuple, left.plan.tolist())), intent=intent)


@dataclass(frozen=True, slots=True)
class _Handled:
    """What handling a batch again gave.

    missing: the first record whose output is not there, though it belongs to the last batch. unexplained: others without the
    output they should have, by what is missing; apart: rows of the block whose vector is not the emitted one.
    """

    customers: list[str]
    counters: dict[str, int]
    model: str | None
    missing: int | None
    unexplained: Mapping[str, int]
    apart: Sequence[int]


@dataclass(slots=True)
class _Replay:
    """The inputs of a partition from a position on, handled in the order of its outputs.

    expected: places in the order of the newest score, dead letter and alert, and the place from which an output behind these
    counts as missing; None where none can be.
    """

    restorer: Restorer
    partition: int
    position: Position
    histories: Histories
    load: Callable[[Sequence[str]], list[CustomerState | None]]
    outputs: Outputs
    whole: bool  # every output from the position on is still there
    expected: tuple[float, float, float, float] | None = None
    recorded: Recorded = field(init=False)

    def __post_init__(self) -> None:
        r = self.restorer
        self.recorded = Recorded(
            r.log,
            r.settings.inputs,
            r.decoder,
            self.partition,
            self.position.applied,
            self.position.watermark_ms,
            whole=self.whole,
            go_on=lambda: r.go_on(self.partition),
            parts=r.parts,
        )

    def at_the_end(self, batch: Batch) -> bool:
        """Whether outputs of the batch may be missing."""
        return self.expected is not None and sum(batch.to.values()) > self.expected[3]

    def handle(self, batch: Batch, block: Emitted | None) -> _Handled:
        """Take the records of a batch into the histories, with the scores that were emitted for them."""
        part = self.restorer.parts.part
        n = len(batch)
        offset = batch.facts[:, OFFSET]
        rejected = batch.reason != 0
        place, emitted = np.zeros(n, np.int64), np.zeros(n, np.bool_)
        scored, lettered = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        if block is not None:
            with part("order"):
                place, emitted = placed(block.plan, batch.topic, offset)
                place = np.minimum(place, len(block) - 1)
                scored = emitted & (block.kind[place] == SCORE)
                lettered = emitted & (block.kind[place] == LETTER)
        if self.outputs.unplaced:
            places = zip(batch.topic.tolist(), offset.tolist(), strict=True)
            lettered |= np.fromiter((one in self.outputs.unplaced for one in places), np.bool_, n)
        # A record with a dead letter has no effect, and neither has one that is no fact.
        ignore = rejected | lettered
        picks = np.flatnonzero(~ignore) if ignore.any() else None
        customers = batch.customer if picks is None else [batch.customer[i] for i in picks.tolist()]
        histories = self.histories
        with part("load"):
            missing = histories.missing(customers)
            if missing:
                histories.load(missing, self.load(missing))
        with part("kernel"):
            step = histories.step(customers, batch.facts if picks is None else batch.facts[picks])
        outcome = np.full(n, REJECTED, np.uint8)
        if picks is None:
            outcome[:] = step.outcome
        else:
            outcome[picks] = step.outcome
        rows = step.rows if picks is None else picks[step.rows]
        model: str | None = None
        apart: list[int] = []
        alerted = np.zeros(n, np.bool_)
        if block is not None:
            told = scored[rows]
            positions, vectors = step.rows, step.vectors
            if not told.all():
                rows, positions, vectors = rows[told], positions[told], vectors[told]
            if len(rows):
                there = place[rows]
                names = customers if len(rows) == len(customers) else [customers[i] for i in positions.tolist()]
                with part("scores"):
                    if self.at_the_end(batch):
                        alerted[rows] = _crossings(names, histories.alert_bands(names), block.alert[there])
                    histories.restore_scores(names, block.probability[there], block.band[there], block.alert[there], block.at[there])
                model = str(block.model[there[-1]])
                with part("compare"):
                    apart = _apart(vectors, step.at[positions], block, there)
        first_missing, unexplained = self._missing(batch, outcome, scored, lettered, alerted)
        counters = tally(np.bincount(outcome, minlength=REJECTED + 1).tolist())
        return _Handled(list(dict.fromkeys(customers)), counters, model, first_missing, unexplained, apart)

    def _missing(
        self, batch: Batch, outcome: npt.NDArray[np.uint8], scored: BoolArray, lettered: BoolArray, alerted: BoolArray
    ) -> tuple[int | None, dict[str, int]]:
        """The first record that the last batch still owes an output, and how many others lack theirs."""
        no_score = (outcome == Outcome.SCORED) & ~scored
        no_letter = np.isin(outcome, _LETTERS) & ~lettered
        if not (no_score.any() or no_letter.any() or alerted.any()):
            return None, {}
        lost = np.zeros(len(batch), np.bool_)
        if self.expected is not None:
            last_score, last_letter, last_alert, zone = self.expected
            keys = batch.cuts().sum(axis=1)
            owed = (no_score & (keys > last_score)) | (no_letter & (keys > last_letter)) | (alerted & (keys > last_alert))
            lost = owed & (keys > zone)
        others = {"score_missing": no_score & ~lost, "letter_missing": no_letter & ~lost}
        unexplained = {what: int(np.count_nonzero(rows)) for what, rows in others.items() if rows.any()}
        return int(np.argmax(lost)) if lost.any() else None, unexplained

    def move(self, batch: Batch, done: _Handled, block: Emitted | None) -> None:
        """The batch is part of the state now; what restored state and outputs disagree on is said."""
        differences = self.restorer.metrics.restore_differences
        for what, count in done.unexplained.items():
            log.error("partition %d: %d records up to %s without the output they should have: %s", self.partition, count, batch.to, what)
            differences.labels(what).inc(count)
        if done.apart and block is not None:
            log.error(
                "partition %d: %d vectors are not the emitted ones, the first that of %s offset %d; what was emitted stays in force",
                self.partition,
                len(done.apart),
                TOPICS[block.plan[done.apart[0], -1]],
                block.offset[done.apart[0]],
            )
            differences.labels("vector").inc(len(done.apart))
        position = self.position
        counters = dict(position.counters)
        for name, count in done.counters.items():
            counters[name] = counters.get(name, 0) + count
        self.position = Position(
            applied=dict(batch.to),
            model=position.model if done.model is None else done.model,
            watermark_ms=watermark(position.watermark_ms, batch.facts, batch.reason),
            counters=counters,
        )


def _crossings(customers: Sequence[str], stored: npt.NDArray[np.uint8], alert: npt.NDArray[np.uint8]) -> BoolArray:
    """Which scores have an alert, in this order. stored: the alert band of each customer before all of them; alert: with each."""
    last: dict[str, int] = {}
    former = np.empty_like(alert)
    for i, (customer, before, now) in enumerate(zip(customers, stored.tolist(), alert.tolist(), strict=True)):
        former[i] = last.get(customer, before)
        last[customer] = now
    return crossed(former, alert)


def _apart(vectors: npt.NDArray[np.float32], at: IntArray, block: Emitted, there: IntArray) -> list[int]:
    """Rows of the block, among `there`, whose vector or instant is not what was found."""
    found, expected = vector_hashes(vectors), block.vector_hash[there].tolist()
    if found == expected and np.array_equal(at, block.at[there]):
        return []
    pairs = zip(found, expected, at.tolist(), block.at[there].tolist(), there.tolist(), strict=True)
    return [row for one, other, now, then, row in pairs if (other and one != other) or now != then]


def _covers(offsets: Mapping[str, int], other: Mapping[str, int]) -> bool:
    return all(offsets.get(name, -1) >= offset for name, offset in other.items())


def _ordered(replay: _Replay, batch: Batch, block: Emitted | None) -> Batch:
    """A batch near the end in an order that explains its outputs; nothing is kept of the trial.

    A record without an output there may also be one whose dead letter was not written any more, and then it was a profile that
    made it late: so profiles come where the merge puts them, or first.
    """
    place = np.zeros(len(batch), np.int64)
    emitted = np.zeros(len(batch), np.bool_)
    if block is not None:
        place, emitted = placed(block.plan, batch.topic, batch.offset)
    key = batch.keys(replay.position.watermark_ms)
    for profiles in (None, np.zeros(len(batch), np.bool_), batch.topic != PROFILES):
        tried = batch if profiles is None else batch.pick(np.lexsort((batch.offset, batch.topic, key, profiles, emitted, place)))
        done = replay.handle(tried, block)
        replay.histories.forget(done.customers)
        if not done.unexplained:
            return tried
    return batch


def _parts(batch: Batch) -> Iterator[Batch]:
    """The batch in parts of at most MAX_CUSTOMERS customers."""
    seen: set[str] = set()
    first = 0
    for i, customer in enumerate(batch.customer):
        seen.add(customer)
        if len(seen) > MAX_CUSTOMERS:
            yield batch.part(first, i)
            first, seen = i, {customer}
    yield batch.part(first, len(batch))
