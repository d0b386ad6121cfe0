"""The way of a batch: intent, facts into histories, vectors, scores, outputs acknowledged, state applied. No Kafka, no Faust.

The same code runs under the Faust agent, in replay and in a simulation: store, models, sink and clock are passed in.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from features.facts import KIND, OFFSET, PROFILE, SILENCE, SOURCES, TOPICS
from features.history import Histories, Outcome
from features.store import Apply, Claim, CustomerWrite, Intent, Offsets, Standing, Store
from proto.errors import BadUsage, Fenced, InvariantBroken, Reason, StateDamaged, StoreWentBack
from streams.evaluate import CRASHED, REJECTED, Rules, evaluate, score, set_aside
from streams.feature_log import feature_records
from streams.merge import Batch, TickStand, watermark
from streams.metrics import COUNTERS, Metrics, Parts, residue
from streams.outbox import Outbox, Record
from streams.scores import Model, Scored, alert_records, score_records, together
from streams.silence import COUNTERS as TICKS
from streams.silence import Roster, Slice, stand
from streams.snapshot import Keeper

log = logging.getLogger(__name__)

CRASH_VARIABLE: Final = "CHURNSTREAM_CRASH_AT"
"""Test only: "<place>:<n>" ends the process at once when the place is reached for the n-th time, "<place>:<n>:hang" stays there."""
CRASH_PLACES: Final = (
    "after_claim",  # the store knows the new owner, nothing was read
    "after_intent",
    "after_compute",  # nothing of the batch has been given to the producer
    "half_produced",  # half of a batch's scores are with the broker
    "after_produce",  # everything is with the broker; in exactly_once not yet committed
    "before_apply",
    "after_apply",
    "transaction_begun",  # exactly_once only, as the next one
    "transaction_committed",
    "before_hint",  # the group is about to be told the offsets
    "on_revoke",  # partitions are to be given up, none is released
    "on_stop",  # asked to stop, the last batch is applied
)

ATTEMPTS: Final = 2
"""So often a batch is begun as a whole; then record by record, to learn which one ends the process."""
TRIES: Final = 2
"""So often a record may end the process before it is given up: once may be a coincidence."""

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]


COMPARE_PATIENCE_S: Final = 1.0
"""How long a look at the store waits for the batch at work."""


class Models(Protocol):
    """Where the engine gets its model; asked only between two batches."""

    def current(self) -> Model:
        """The model in force now (the fallback when none is)."""
        ...

    def by_digest(self, digest: str) -> Model:
        """The model of an open intent; "" is the fallback. Raises ArtifactRejected when it cannot be had."""
        ...


class Sink(Protocol):
    """Where outputs go at least once; `flush` returns when all are acknowledged."""

    def scores(self, partition: int, records: list[Record]) -> None: ...

    def dead_letters(self, partition: int, records: list[Record]) -> None: ...

    def alerts(self, partition: int, records: list[Record]) -> None: ...

    def features(self, partition: int, records: list[Record]) -> None: ...

    def flush(self) -> None: ...


@runtime_checkable
class Transactions(Protocol):
    """Where outputs go exactly once."""

    def claim(self, partition: int) -> None:
        """Begin to become the only one that commits outputs of the partition; done before its first batch comes."""
        ...

    def transact(self, outputs: Mapping[int, tuple[Outbox, Offsets]]) -> set[int]:
        """Commit outputs with the offsets they come from; returns the partitions another worker has claimed."""
        ...

    def revoke(self, partition: int) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """max_facts: bound of facts in memory over all partitions; reasons_top: reasons of a score; alert_hysteresis: how far
    (probability) below a threshold a band is left again; feature_log: whether vectors are emitted with their scores; tick_ms: from
    tick to tick at which the silent are scored, 0 for none."""

    max_facts: int
    reasons_top: int
    alert_hysteresis: float = 0.02
    feature_log: bool = False
    tick_ms: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What an item did: new offsets of the partitions applied, partitions lost to another worker, counts of this item, and
    partitions whose stored state is not what was applied: they are to be claimed again, and restored."""

    applied: Mapping[int, Offsets]
    fenced: Sequence[int]
    counters: Mapping[str, int]
    broken: Sequence[int] = ()
    ticks: Mapping[int, TickStand] = field(default_factory=dict)  # of partitions that had a slice of the silent


def tally(outcomes: Sequence[int]) -> dict[str, int]:
    """The counters of a batch from how often each outcome occurred in it; outcomes[i] belongs to code i."""
    dead_letters = outcomes[Outcome.TOO_LATE] + outcomes[Outcome.AMOUNT_RANGE] + outcomes[REJECTED]
    return {
        "events": sum(outcomes),
        "scores": outcomes[Outcome.SCORED],
        "dead_letters": dead_letters,
        "duplicates": outcomes[Outcome.DUPLICATE] + outcomes[Outcome.DUPLICATE_CONFLICT],
        "duplicate_conflicts": outcomes[Outcome.DUPLICATE_CONFLICT],
        "profile_facts": outcomes[Outcome.PROFILE],
    }


@dataclass(slots=True)
class Partition:
    """One owned partition."""

    number: int
    nonce: str
    applied: dict[str, int]
    intent: Intent | None
    watermark_ms: int
    counters: dict[str, int]
    histories: Histories
    model: str = ""  # digest of the model of the last score
    ready: bool = False  # restored: what is stored is what was applied
    roster: Roster | None = None  # made with the first tick


def _model(work: _Work) -> str:
    """What the state says of models: whose the last score was. A batch without scores leaves no trace of its model in the outputs."""
    return work.model.digest if work.counters.get("scores") or work.counters.get("silence") else work.partition.model


@dataclass(slots=True)
class _Refused:
    """Partitions of an item that go no further: another worker has them, or their stored state is not what was applied."""

    fenced: list[int] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    damaged: set[int] = field(default_factory=set)  # those of `broken` of which something is missing

    def __contains__(self, partition: int) -> bool:
        return partition in self.fenced or partition in self.broken

    @contextmanager
    def noted(self, partition: int) -> Iterator[None]:
        """Note a refusal and go on behind the block. A store that is ahead of us is no refusal: somebody else writes there."""
        try:
            yield
        except Fenced as error:
            log.warning("%s", error)
            self.fenced.append(partition)
        except (StoreWentBack, StateDamaged) as error:
            log.error("%s", error)
            if partition not in self.broken:
                self.broken.append(partition)
            if isinstance(error, StateDamaged):
                self.damaged.add(partition)


@dataclass(slots=True)
class _Work:
    """A batch on its way through the engine."""

    batch: Batch
    partition: Partition
    model: Model
    intent: Intent
    counters: dict[str, int] = field(default_factory=dict)
    customers: list[str] = field(default_factory=list)
    watermark_ms: int = -1
    slice: Slice | None = None
    outputs: Outbox = field(default_factory=Outbox)


class Engine:
    """All owned partitions and what happens to their batches. `process` is called by one thread; assign and revoke may
    come from another and wait until no item is in work."""

    def __init__(
        self,
        settings: EngineSettings,
        store: Store,
        models: Models,
        sink: Sink | Transactions,
        clock_ms: Callable[[], int],
        metrics: Metrics,
        reached: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings, self._store, self._models = settings, store, models
        # Outputs are either acknowledged before the state is applied, or kept with the state and committed after it.
        self._transactions = sink if isinstance(sink, Transactions) else None
        self._sink = None if isinstance(sink, Transactions) else sink
        self._clock_ms, self._metrics, self._reached = clock_ms, metrics, reached
        self._partitions: dict[int, Partition] = {}
        self._lock = threading.Lock()
        self._fenced: Counter[int] = Counter()
        self._model_digest: str | None = None
        self.model_version = ""
        self.began: tuple[float, float] | None = None  # perf_counter and CPU seconds of the process at the first item
        self.parts = Parts()
        self.totals: Counter[str] = Counter()
        self.keeper: Keeper | None = None
        self.items = 0
        self.largest_batch = 0

    # -- ownership

    def assign(self, partition: int, nonce: str) -> Claim:
        """Become the only writer of the partition under this nonce."""
        with self._lock:
            claim = self._store.claim(partition, nonce)
            self._reached("after_claim")
            if self._transactions is not None:
                self._transactions.claim(partition)
            self._own(claim)
            return claim

    def restored(self, claim: Claim) -> None:
        """Go on from the claim as the Restorer left it; nothing when the partition has been given up meanwhile."""
        with self._lock:
            partition = self._partitions.get(claim.partition)
            if partition is not None and partition.nonce == claim.nonce:
                self._own(claim)
                self._partitions[claim.partition].ready = True

    def _own(self, claim: Claim) -> None:
        self._partitions[claim.partition] = Partition(
            number=claim.partition,
            nonce=claim.nonce,
            applied={name: claim.applied.get(name, -1) for name in (SOURCES if self._settings.tick_ms else TOPICS)},
            intent=claim.intent,
            watermark_ms=claim.watermark_ms,
            counters={name: claim.counters.get(name, 0) for name in (*COUNTERS, *(TICKS if self._settings.tick_ms else ()))},
            histories=Histories(max_facts=max(1, self._settings.max_facts // (len(self._partitions) + 1)), known=claim.customers),
            model=claim.model,
        )
        self._share_memory()

    def revoke(self, partitions: Sequence[int], *, lost: bool) -> None:
        """Give partitions up. Waits for the item in work; a lost partition is already another's, so nothing is released."""
        with self._lock:
            self._reached("on_revoke")
            for number in partitions:
                if self.keeper is not None:
                    self.keeper.given_up(number)
                partition = self._partitions.pop(number, None)
                self._fenced.pop(number, None)
                self._metrics.forget_partition(number)
                if self._transactions is not None:
                    self._transactions.revoke(number)
                if partition is not None and not lost:
                    self._store.release(number, partition.nonce)
            self._share_memory()

    def compare(self, standings: Callable[[Sequence[int]], Sequence[Standing]]) -> Result:
        """Give up the partitions whose state was lost or went back though no batch has come that would find out.

        standings: reads the store over a connection of its own, so that no batch is held up. From any thread. A partition that stands
        where it should under another owner is left to the group, or to its next batch.
        """
        before = {number: (p.nonce, p.applied) for number, p in list(self._partitions.items()) if p.ready}
        found = standings(list(before)) if before else []
        fenced: list[int] = []
        gone: list[int] = []
        if not self._lock.acquire(timeout=COMPARE_PATIENCE_S):
            return Result({}, [], {}, [])  # a batch is at work, or waits for the store: it will see for itself
        try:
            for (number, seen), standing in zip(before.items(), found, strict=True):
                partition = self._partitions.get(number)
                if partition is None or (partition.nonce, partition.applied) != seen:
                    continue  # a batch was applied meanwhile, and knows better
                behind = any(standing.applied.get(name, offset) < offset for name, offset in partition.applied.items())
                if behind or (standing.nonce == partition.nonce and not standing.whole):
                    what = f"holds {dict(standing.applied)}" if behind else "has lost customers"
                    log.error("partition %d: %s was applied, the store %s", number, partition.applied, what)
                    (fenced if standing.nonce not in ("", partition.nonce) else gone).append(number)
                    self._drop(number)
        finally:
            self._lock.release()
        return Result({}, fenced, {}, gone)

    @property
    def owned(self) -> list[int]:
        """Numbers of the owned partitions."""
        return sorted(self._partitions)

    def accounts(self) -> dict[int, Mapping[str, int]]:
        """Counters of each owned partition since its beginning. From any thread."""
        return {number: partition.counters for number, partition in list(self._partitions.items())}

    def residues(self) -> dict[int, int]:
        """Accounting residue of each owned partition since its beginning; 0 unless something is badly wrong."""
        return {number: residue(partition.counters) for number, partition in self._partitions.items()}

    # -- one item

    def process(self, batches: Sequence[Batch]) -> Result:
        """Take batches of different partitions all the way. On any error but Fenced the engine must not be used again."""
        with self._lock:
            self.items += 1
            if self.began is None:
                self.began = (time.perf_counter(), time.process_time())
            refused = _Refused()
            works = [work for batch in batches if (work := self._intend(batch, refused)) is not None]
            self._reached("after_intent")
            for work in works:
                with refused.noted(work.batch.partition):
                    self._compute(work)
                    self._reached("after_compute")
                    if self._sink is not None:
                        # They travel while the next partition is computed.
                        self._queue(self._sink, work)
            works = [work for work in works if work.batch.partition not in refused]
            if self._sink is not None:
                with self.parts.part("ack"):
                    self._sink.flush()
                self._reached("after_produce")
            done = self._apply(works, refused)
            self._reached("after_apply")
            if self._transactions is not None and done:
                with self.parts.part("commit"):
                    lost = self._transactions.transact({work.batch.partition: (work.outputs, work.batch.to) for work in done})
                # Whoever has claimed a lost partition finds the outputs with its state.
                refused.fenced += sorted(lost)
                done = [work for work in done if work.batch.partition not in lost]
            for number in refused.fenced:
                self._lose(number)
            for number in refused.broken:
                self._drop(number)
            counters: Counter[str] = Counter()
            for work in done:
                self._observe(work.batch, work.partition)
                counters.update(work.counters)
            self.totals.update(counters)
            applied = {work.batch.partition: work.partition.applied for work in done}
            ticks = {work.batch.partition: work.slice.now for work in done if work.slice is not None}
            return Result(applied, refused.fenced, dict(counters), refused.broken, ticks)

    def _intend(self, batch: Batch, refused: _Refused) -> _Work | None:
        partition = self._partitions.get(batch.partition)
        if partition is None or partition.nonce != batch.nonce:
            return None  # given up since it was merged; its next owner reads it again
        if dict(batch.former) != partition.applied:
            raise InvariantBroken(f"partition {batch.partition}: a batch that follows {batch.former} came after {partition.applied}")
        intent = partition.intent
        if intent is not None:
            if not batch.recovered or dict(batch.to) != dict(intent.to):
                raise InvariantBroken(f"partition {batch.partition}: expected the open batch up to {intent.to}, got {batch.to}")
            model = self._models.by_digest(intent.model)
            intent = _once_more(intent)
        else:
            model = self._models.current()
            if model.digest != self._model_digest:
                self._model_digest, self.model_version = model.digest, model.version
                self._metrics.model_in_force(model.version, model.digest)
            intent = Intent(batch.to, model.digest, self._clock_ms(), tick_ms=batch.tick_ms)
        # States are read before the intent, also before one that is open is written again: once it is accepted, nobody has
        # written since. Read after it, a worker that was suspended in between would take the states its successor has already
        # made of this batch (or those of a store that went back) for the ones before it, and emit what follows from them.
        due: Slice | None = None
        with refused.noted(batch.partition):
            if batch.tick_ms >= 0:
                due = self._due(partition, batch.tick_ms)
                batch = due.batch(batch)
            with self.parts.part("load"):
                missing = partition.histories.missing(
                    customer for customer, reason in zip(batch.customer, batch.reason.tolist(), strict=True) if not reason
                )
                states = self._store.load(batch.partition, missing) if missing else []
            with self.parts.part("intend"):
                self._store.intend(batch.partition, batch.nonce, batch.former, intent)
            if missing:
                with self.parts.part("load"):
                    partition.histories.load(missing, states)
        if batch.partition in refused.damaged:
            # Nothing of the batch was emitted. The next claim finds the mark and rebuilds (streams/rebuild.py).
            with refused.noted(batch.partition):
                self._store.begin_rebuild(batch.partition, batch.nonce)
        if batch.partition in refused:
            return None
        return _Work(_without(batch, intent.given_up), partition, model, intent, slice=due)

    def _due(self, partition: Partition, tick_ms: int) -> Slice:
        """The next of the silent. Who there is, is read from the store once after a claim, and then noted with every batch."""
        with self.parts.part("ticks"):
            if partition.roster is None:
                number, store = partition.number, self._store
                names = list(store.customers(number))
                partition.roster = Roster.of(self._settings.tick_ms, names, lambda some: store.load(number, some))
            return partition.roster.slice(stand(partition.counters), tick_ms)

    def _compute_silent(self, work: _Work, due: Slice) -> None:
        """Vectors at the ticks, scores, output records; nothing is taken in."""
        batch, model, part = work.batch, work.model, self.parts.part
        rows = np.arange(len(batch))
        rules = Rules(self._models.by_digest(""), self._settings.reasons_top, self._settings.alert_hysteresis)
        with part("kernel"):
            vectors = work.partition.histories.vectors_at(due.customers, due.at)
        sources = np.full(len(batch), SILENCE, np.int64), batch.offset
        late = np.zeros(len(batch), np.bool_)
        scored = score(work.partition.histories, model, rules, due.customers, rows, due.at, late, vectors, sources, part)
        with part("encode"):
            self._encode(work, scored)
        work.customers = list(dict.fromkeys(due.customers))
        work.watermark_ms = work.partition.watermark_ms
        work.counters = due.counters
        self._metrics.silence.inc(len(batch))

    def _encode(self, work: _Work, scored: Scored) -> None:
        batch, model = work.batch, work.model
        records = score_records(batch, model, work.intent.scored_at_ms, scored)
        alerts = alert_records(batch, model, self._settings.alert_hysteresis, work.intent.scored_at_ms, scored)
        work.outputs = Outbox(records, alerts)
        if self._settings.feature_log:
            work.outputs.features.extend(feature_records(batch, scored))
        self._metrics.alerts.inc(len(alerts))
        self._metrics.fallbacks.inc(len(scored.rows) - int(np.count_nonzero(scored.band)))

    def _compute(self, work: _Work) -> None:
        """Facts into the histories, vectors, scores, output records."""
        if work.slice is not None:
            self._compute_silent(work, work.slice)
            return
        batch, part = work.batch, self.parts.part
        accepted = batch.reason == Reason.ACCEPTED
        everything = bool(accepted.all())
        picks = None if everything else np.flatnonzero(accepted)
        facts = batch.facts if picks is None else batch.facts[picks]
        customers = batch.customer if picks is None else [batch.customer[i] for i in picks.tolist()]
        if work.intent.attempts <= ATTEMPTS:
            accepted_outcome, scored = self._evaluate(work, customers, facts)
        else:
            accepted_outcome, scored = self._evaluate_singly(work, customers, facts)
        outcome = np.full(len(batch), REJECTED, np.uint8)
        outcome[accepted] = accepted_outcome
        with part("encode"):
            if picks is not None:
                scored = replace(scored, rows=picks[scored.rows])
            self._encode(work, scored)
            work.outputs.dead_letters.extend(self._dead_letters(batch, outcome))
        work.customers = list(dict.fromkeys(customers))
        # A record given up has moved time in the merge, and moves it wherever it is merged again.
        decoded = np.where(batch.reason == Reason.CRASH, Reason.ACCEPTED, batch.reason)
        work.watermark_ms = watermark(work.partition.watermark_ms, batch.facts, decoded)
        work.counters = self._count(batch, outcome)
        if self._settings.tick_ms:
            arrived = work.partition.counters["arrived_ms"]
            work.counters["arrived_ms"] = max(0, int(batch.append_ms.max(initial=0)) - arrived)
        self._metrics.late.inc(int(np.count_nonzero(scored.late)))

    def _evaluate(self, work: _Work, customers: list[str], facts: IntArray) -> tuple[ByteArray, Scored]:
        """Facts into the histories, and what follows; `rows` of the result are positions among these facts."""
        rules = Rules(self._models.by_digest(""), self._settings.reasons_top, self._settings.alert_hysteresis)
        return evaluate(work.partition.histories, work.model, rules, customers, facts, self.parts.part)

    def _evaluate_singly(self, work: _Work, customers: list[str], facts: IntArray) -> tuple[ByteArray, Scored]:
        """The same, one record after the other, each written into the intent first: the next owner learns which one ended us."""
        batch, intent = work.batch, work.intent
        log.warning("partition %d: a batch begun %d times is handled record by record", batch.partition, intent.attempts)
        outcomes, pieces = [], []
        for i in range(len(facts)):
            place = int(facts[i, KIND]) >> 3, int(facts[i, OFFSET])
            times = intent.trying[2] if intent.trying is not None and intent.trying[:2] == place else 0
            self._store.intend(batch.partition, batch.nonce, batch.former, replace(intent, trying=(*place, times + 1)))
            outcome, scored = self._evaluate(work, customers[i : i + 1], facts[i : i + 1])
            outcomes.append(outcome)
            pieces.append(replace(scored, rows=scored.rows + i))
        self._store.intend(batch.partition, batch.nonce, batch.former, replace(intent, trying=None))
        if not pieces:
            return self._evaluate(work, customers, facts)
        return np.concatenate(outcomes), together(pieces)

    def _queue(self, sink: Sink, work: _Work) -> None:
        partition, outputs = work.batch.partition, work.outputs
        with self.parts.part("produce"):
            half = len(outputs.scores) // 2
            # Scores last: their tail says what was emitted, so what belongs to a score should not come after it.
            if outputs.features:
                sink.features(partition, outputs.features)
            sink.alerts(partition, outputs.alerts)
            sink.scores(partition, outputs.scores[:half])
            self._reached("half_produced")
            sink.scores(partition, outputs.scores[half:])
            sink.dead_letters(partition, outputs.dead_letters)

    def _dead_letters(self, batch: Batch, outcome: npt.NDArray[np.uint8]) -> list[Record]:
        letters = []
        for reason, letter in set_aside(batch, outcome):
            self._metrics.dead_letters.labels(reason.name.lower()).inc()
            letters.append(letter)
        return letters

    def _count(self, batch: Batch, outcome: npt.NDArray[np.uint8]) -> dict[str, int]:
        by_topic = np.zeros((len(TOPICS), REJECTED + 1), np.int64)
        np.add.at(by_topic, (batch.topic, outcome), 1)
        for topic, counts in zip(TOPICS, by_topic.tolist(), strict=True):
            ends = {
                "score": counts[Outcome.SCORED],
                "profile_fact": counts[Outcome.PROFILE],
                "duplicate": counts[Outcome.DUPLICATE],
                "duplicate_conflict": counts[Outcome.DUPLICATE_CONFLICT],
                "dead_letter": counts[Outcome.TOO_LATE] + counts[Outcome.AMOUNT_RANGE] + counts[REJECTED],
            }
            for name, count in ends.items():
                if count:
                    self._metrics.events[topic, name].inc(count)
        return tally(by_topic.sum(axis=0).tolist())

    def _apply(self, works: Sequence[_Work], refused: _Refused) -> list[_Work]:
        done = []
        with self.parts.part("state"):
            changes = [self._change(work) for work in works]
        self._reached("before_apply")
        with self.parts.part("apply"):
            if self.keeper is not None:
                for work in works:
                    self.keeper.before_apply(work.batch.partition, work.customers)
            self._store_all(changes, refused)
        for work in works:
            batch, partition = work.batch, work.partition
            if batch.partition in refused:
                continue
            partition.applied = dict(batch.to)
            partition.intent = None
            partition.watermark_ms = work.watermark_ms
            partition.model = _model(work)
            # All at once: a scrape in another thread sees the counters of one moment.
            partition.counters = {name: count + work.counters.get(name, 0) for name, count in partition.counters.items()}
            left = residue(partition.counters)
            if left:
                raise InvariantBroken(
                    f"partition {batch.partition}: {left} events are neither scored nor accounted for: {partition.counters}"
                )
            if partition.roster is not None and work.slice is None:
                partition.roster.note(work.customers, partition.histories.newest_ms(work.customers))
            partition.histories.evict()
            done.append(work)
        return done

    def _change(self, work: _Work) -> Apply:
        batch = work.batch
        writes: list[CustomerWrite] = work.partition.histories.changes(work.customers)
        return Apply(
            partition=batch.partition,
            nonce=batch.nonce,
            former=batch.former,
            to=batch.to,
            model=_model(work),
            watermark_ms=work.watermark_ms,
            counters=work.counters,
            customers=writes,
            outbox=b"" if self._transactions is None else work.outputs.pack(),
        )

    def _store_all(self, changes: Sequence[Apply], refused: _Refused) -> None:
        """Apply all batches in one round trip. Raises ChainBroken when a store is ahead of us: somebody else writes there."""
        try:
            self._store.apply(changes)
        except (Fenced, StoreWentBack, StateDamaged):
            # One of them was refused, and it matters which: asked one by one, what is already in is recognised and accepted.
            for change in changes:
                with refused.noted(change.partition):
                    self._store.apply([change])

    def _observe(self, batch: Batch, partition: Partition) -> None:
        if self.keeper is not None:
            self.keeper.applied(
                Claim(
                    batch.partition,
                    partition.nonce,
                    0,
                    partition.applied,
                    None,
                    partition.model,
                    partition.watermark_ms,
                    dict(partition.counters),
                )
            )
        number = str(batch.partition)
        self.largest_batch = max(self.largest_batch, len(batch))
        self._metrics.batch.observe(len(batch))
        for topic, offset in partition.applied.items():
            self._metrics.applied.labels(topic, number).set(offset)
        if len(batch) and batch.tick_ms < 0:
            # One observation a batch, of its oldest record: a histogram update per event would cost more than its score.
            self._metrics.latency.observe(max(0, self._clock_ms() - int(batch.append_ms.min())) / 1_000)

    def _drop(self, number: int) -> None:
        if self.keeper is not None:
            self.keeper.given_up(number)
        self._partitions.pop(number, None)
        if self._transactions is not None:
            self._transactions.revoke(number)

    def _lose(self, number: int) -> None:
        self._metrics.fenced.inc()
        self._drop(number)
        self._fenced[number] += 1
        if self._fenced[number] > 1:
            raise Fenced(f"partition {number}: refused twice; this worker has lost touch with its group")

    def _share_memory(self) -> None:
        for partition in self._partitions.values():
            partition.histories.max_facts = max(1, self._settings.max_facts // len(self._partitions))


def _once_more(intent: Intent) -> Intent:
    """The intent of a batch that is begun again. A record that ended its worker twice when it was handled alone is given up."""
    if intent.trying is not None and intent.trying[2] >= TRIES:
        topic, offset, _ = intent.trying
        log.error("%s offset %d: given up, workers end when they handle it", TOPICS[topic], offset)
        intent = replace(intent, trying=None, given_up=(*intent.given_up, (topic, offset)))
    return replace(intent, attempts=intent.attempts + 1)


def _without(batch: Batch, given_up: Sequence[tuple[int, int]]) -> Batch:
    if not given_up:
        return batch
    detail = dict(batch.detail)
    for topic, offset in given_up:
        for row in np.flatnonzero((batch.topic == topic) & (batch.offset == offset)).tolist():
            batch.reason[row] = Reason.CRASH
            detail[row] = CRASHED
    return replace(batch, detail=detail)


def crash_point(text: str, before: Mapping[str, Callable[[], None]]) -> Callable[[str], None]:
    """What the parts of a worker tell where they are: it ends the process at the place that `text` names, "" at none.

    before: what to do first at a place, so that it is what its name says. Raises BadUsage for an unknown place.
    """
    place, number, then = (*text.split(":"), "", "")[:3]
    if place and place not in CRASH_PLACES:
        raise BadUsage(f"{CRASH_VARIABLE}={text}: no such place; there are {', '.join(CRASH_PLACES)}")
    left = int(number or 1)

    def reached(here: str) -> None:
        nonlocal left
        if here == place:
            left -= 1
            if left == 0:
                before.get(place, lambda: None)()
                if then == "hang":
                    threading.Event().wait()
                os._exit(70)

    return reached


assert len(TOPICS) - 1 == PROFILE >> 3
