"""The consumer of one worker: reads the input topics of its partitions, decodes, and hands out merged batches."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from features.facts import TOPICS
from features.store import Claim
from proto.errors import DependencyUnreachable, Fenced, InvariantBroken, StoreWentBack
from streams.codec import Decoder, RawMessage
from streams.log import watermarks
from streams.merge import Batch, Merge, Slice, Ticks, TickStand
from streams.metrics import Parts
from streams.partitioner import murmur2
from streams.silence import stand

log = logging.getLogger(__name__)

FETCH: Final = 5_000
"""Most messages of one call of consume."""
IDLE_S: Final = 0.1
"""How long one wait for a first message may take; also how soon a stop is seen."""
AGAIN_S: Final = 3.0
"""How long a refused partition rests: by then a worker that was cut off has heard from the group, or the group from us. Also the least
time between two claims of one that is refused again and again."""
JOIN_S: Final = 8.0
"""How long the group may leave us without an assignment before we are behind. A worker that hangs makes all others wait until its watchdog
ends it and its session (6 s) is over; their own watchdogs must not end them before."""
SAMPLE: Final = 3
"""Keys of one fetch of a (topic, partition) whose partition is checked."""


class Owner(Protocol):
    """What owns the state of partitions: the engine."""

    def assign(self, partition: int, nonce: str) -> Claim:
        """Become the only writer of the partition; returns where it stands."""
        ...

    def restored(self, claim: Claim) -> None:
        """Go on from a claim as it was restored; nothing when the partition has been given up meanwhile."""
        ...

    def revoke(self, partitions: Sequence[int], *, lost: bool) -> None:
        """Give partitions up; returns only when nothing of them is in flight."""
        ...


Restore = Callable[[Claim, Callable[[], bool]], Claim]
"""Brings a claimed partition to where its outputs say it stood; the second argument says whether the partition is still wanted."""


class Misrouted(InvariantBroken):
    """A key lies in a partition where murmur2 does not put it, or the topics have different partition counts."""


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """What the consumer needs to know. `topics` are full names in topic-index order; buffer_bytes per (topic, partition)."""

    client: Mapping[str, Any]
    group_id: str
    topics: Sequence[str]
    batch_max_events: int
    linger_s: float
    buffer_bytes: int
    timeout_s: float
    tick_ms: int = 0  # from tick to tick at which the silent are scored, 0 for none


@dataclass(slots=True)
class Ingest:
    """A thread around one librdkafka consumer. `take` is for another thread; `ready` is called when there may be something to take.

    `restore` runs in a thread of its own, one partition after the other: it may take minutes, and the group must hear from us
    all the while. A partition is read from when it is restored; the others are not held up.
    """

    settings: IngestSettings
    decoder: Decoder
    owner: Owner
    ready: Callable[[], None]
    reached: Callable[[str], None] = lambda _: None  # crash points of tests
    unconverted: Callable[[int], None] = lambda amounts: None  # told of amounts whose currency has no rate
    restore: Restore = lambda claim, _: claim
    clock_s: Callable[[], float] = time.monotonic
    wall_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    parts: Parts = field(default_factory=Parts)
    merging: Parts = field(default_factory=Parts)  # of the thread that calls `take`
    failure: BaseException | None = None
    assignments: int = 0
    _merges: dict[int, Merge] = field(default_factory=dict)
    _dropped: dict[int, float] = field(default_factory=dict)  # assigned, but not ours to handle; when to claim it again
    _claimed: dict[int, float] = field(default_factory=dict)  # when each partition was claimed last
    _left_out: float | None = None  # since when the group owes us an assignment
    _waiting: dict[int, Claim] = field(default_factory=dict)  # claimed and not restored yet
    _restored: SimpleQueue[Claim | BaseException] = field(default_factory=SimpleQueue)
    _to_restore: SimpleQueue[Claim | None] = field(default_factory=SimpleQueue)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)
    _drained: threading.Event = field(default_factory=threading.Event)
    _commits: dict[tuple[str, int], int] = field(default_factory=dict)
    _thread: threading.Thread | None = None
    _partitions: int = 0

    def start(self) -> None:
        """Start reading in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read nothing more; commits, gives the partitions up and leaves the group. Call it with no batch in flight."""
        self._stop.set()
        self._drained.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end of the thread; whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def take(self) -> list[Batch]:
        """One merged batch of every partition that has one, removed from the buffers. Raises what stopped the reading."""
        if self.failure is not None:
            raise self.failure
        with self._lock, self.merging.part("merge"):
            now_ms = self.wall_ms() if self.settings.tick_ms else -1
            taken = [merge.take(self.settings.batch_max_events, now_ms=now_ms) for merge in self._merges.values()]
        self._drained.set()
        return [batch for batch in taken if batch is not None]

    def applied(self, offsets: Mapping[int, Mapping[str, int]]) -> None:
        """Note applied offsets per partition; they are committed to the group as a hint for lag tools."""
        with self._lock:
            for partition, topics in offsets.items():
                for name, offset in topics.items():
                    if offset >= 0 and name in TOPICS:
                        self._commits[self.settings.topics[TOPICS.index(name)], partition] = offset + 1

    def ticked(self, stands: Mapping[int, TickStand]) -> None:
        """Slices of the silent that are done: where the ticks of their partitions stand."""
        with self._lock:
            for partition, stand in stands.items():
                if merge := self._merges.get(partition):
                    merge.ticked(stand)
        if stands:
            self.ready()

    def drop(self, partition: int, *, again_s: float = AGAIN_S) -> None:
        """Forget what is buffered of a partition that is not ours as we knew it; until it is again, or the group says that it is not, we
        are behind.

        again_s: claim it again when the group still says that it is ours so many seconds later. Whoever has claimed it meanwhile
        was slow to learn that it had lost it.
        """
        with self._lock:
            merge, waiting = self._merges.pop(partition, None), self._waiting.pop(partition, None)
            if merge is not None or waiting is not None:
                self._dropped[partition] = max(self.clock_s() + again_s, self._claimed.get(partition, 0.0) + AGAIN_S)

    def behind(self) -> bool:
        """Whether records are known to exist that this worker should handle and has not been handed.

        Also when the group has assigned nothing yet, or has taken everything away and not assigned anew, be it no partition at all, for
        JOIN_S: a client that does not get back into its group after the loss of its coordinator would look idle for ever.
        """
        with self._lock:
            left_out = self._left_out is not None and self.clock_s() > self._left_out + JOIN_S
            return left_out or bool(self._dropped) or any(merge.lag for merge in self._merges.values())

    def lags(self) -> dict[int, int]:
        """Records known to exist and not handed out yet, per owned partition."""
        with self._lock:
            return {partition: merge.lag for partition, merge in self._merges.items()}

    @property
    def caught_up(self) -> bool:
        """Whether everything known of the owned partitions has been handed out, and there has been an assignment."""
        with self._lock:
            away = self._waiting or self._dropped
            return self.assignments > 0 and not away and all(merge.caught_up for merge in self._merges.values())

    # -- the thread

    def _run(self) -> None:
        self._left_out = self.clock_s()
        threading.Thread(target=self._restore_all, name="restore", daemon=True).start()
        try:
            self._read()
        except BaseException as error:
            log.error("reading stopped: %s", error)
            self.failure = error
        self._to_restore.put(None)
        self.ready()

    def _restore_all(self) -> None:
        while (claim := self._to_restore.get()) is not None:
            wanted = partial(self._wants, claim)
            if not wanted():
                continue
            try:
                self._restored.put(self.restore(claim, wanted))
            except (Fenced, StoreWentBack) as error:
                log.warning("%s", error)
                with self._lock:
                    # Claimed by another, and the group has not said so yet; or the store has lost what was restored so far.
                    if self._waiting.get(claim.partition) is claim:
                        del self._waiting[claim.partition]
                        self._dropped[claim.partition] = self.clock_s() + AGAIN_S
            except BaseException as error:
                self._restored.put(error)

    def _wants(self, claim: Claim) -> bool:
        with self._lock:
            waiting = self._waiting.get(claim.partition)
            return waiting is not None and waiting.nonce == claim.nonce and not self._stop.is_set()

    def _read(self) -> None:
        s = self.settings
        consumer = Consumer(
            {
                # Fetching: small enough to bound memory, large enough for few requests on a backlog.
                "queued.max.messages.kbytes": 16_384,
                "queued.min.messages": 20_000,
                "fetch.wait.max.ms": 100,
                "fetch.message.max.bytes": 4 << 20,
                "max.partition.fetch.bytes": 4 << 20,
                "topic.metadata.refresh.interval.ms": 60_000,
                "reconnect.backoff.max.ms": 1_000,
                **s.client,
                "group.id": s.group_id,
                "group.protocol": "classic",
                "partition.assignment.strategy": "range",
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "heartbeat.interval.ms": 1_000,
                "session.timeout.ms": 6_000,
            },
            logger=log,
        )
        try:
            self._partitions = self._count_partitions(consumer)
            consumer.subscribe(
                list(s.topics), on_assign=_callback(self._on_assign), on_revoke=_callback(self._on_revoke), on_lost=_callback(self._on_lost)
            )
            index = {name: i for i, name in enumerate(s.topics)}
            while not self._stop.is_set():
                self._claim_again()
                self._begin_restored(consumer)
                self._watch_ends(consumer)
                self._commit(consumer)
                self._drained.clear()
                if self._full():
                    # Enough is decoded ahead for every partition. Not asking leaves the rest in the client's own bounded
                    # queue, which costs nothing; pausing would throw its prefetched messages away. A rebalance is served
                    # inside poll, so one message is still asked for now and then.
                    self._drained.wait(IDLE_S)
                    self._fetch(consumer, index, wait_s=0.0, more=0)
                else:
                    self._balance(consumer)
                    self._fetch(consumer, index, wait_s=IDLE_S, more=FETCH)
            self._commit(consumer, final=True)
        finally:
            # Leaves the group; on_revoke runs inside and gives the partitions up.
            consumer.close()

    def _count_partitions(self, consumer: Consumer) -> int:
        try:
            known = consumer.list_topics(timeout=self.settings.timeout_s).topics
        except KafkaException as error:
            raise DependencyUnreachable(f"Kafka: no metadata within {self.settings.timeout_s:g} s: {error.args[0]}") from error
        missing = [name for name in self.settings.topics if name not in known or known[name].error is not None]
        if missing:
            raise DependencyUnreachable(f"Kafka: no topic {', '.join(missing)}; run `churnstream topics create`")
        counts = {name: len(known[name].partitions) for name in self.settings.topics}
        if len(set(counts.values())) != 1:
            raise Misrouted(
                f"the input topics have different partition counts ({counts}): a customer's events would lie apart; recreate them alike"
            )
        return next(iter(counts.values()))

    def _fetch(self, consumer: Consumer, index: Mapping[str, int], *, wait_s: float, more: int) -> None:
        groups: dict[tuple[str, int], list[Any]] = {}
        with self.parts.part("consume"):
            first = consumer.poll(wait_s)
            if first is None:
                return
            messages = [first, *consumer.consume(more, self.settings.linger_s)] if more else [first]
            for message in messages:
                error = message.error()
                place: Any = message.topic(), message.partition()  # never None where it is read: only of errors of no partition
                if error is None:
                    groups.setdefault(place, []).append(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    self._at_end(index[place[0]], place[1], message.offset() or 0)
                else:
                    self._broken(error, place)
        for (topic, partition), group in groups.items():
            if partition in self._merges:
                self._check_keys(topic, partition, group)
                with self.parts.part("decode"):
                    piece = Slice(self.decoder.decode(index[topic], partition, group), group)
                self.unconverted(piece.records.unconverted)
                with self._lock:
                    if merge := self._merges.get(partition):
                        merge.buffers[index[topic]].add(piece)
        self.ready()

    def _at_end(self, topic: int, partition: int, offset: int) -> None:
        with self._lock:
            if merge := self._merges.get(partition):
                merge.buffers[topic].reach(offset)

    def _broken(self, error: KafkaError, place: tuple[str, int]) -> None:
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise InvariantBroken(
                f"{place[0]}[{place[1]}]: the stored offset is not in the topic ({error.str()}): "
                "it was recreated or its retention is too short; nothing is skipped silently"
            )
        if error.fatal() or error.code() in (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED):
            raise DependencyUnreachable(f"Kafka: {error.str()}")
        log.warning("kafka: %s", error.str())

    def _check_keys(self, topic: str, partition: int, messages: Sequence[RawMessage]) -> None:
        for message in messages[:SAMPLE]:
            key = message.key()
            if not key:
                continue
            if (belongs := murmur2(key) % self._partitions) != partition:
                raise Misrouted(
                    f"{topic}[{partition}] offset {message.offset()}: its key belongs into partition {belongs} of {self._partitions}; "
                    "the producer must use murmur2 (librdkafka: partitioner=murmur2_random)"
                )

    def _watch_ends(self, consumer: Consumer) -> None:
        """Take over the high watermarks that came with the last fetches."""
        with self._lock:
            buffers = [(partition, buffer) for partition, merge in self._merges.items() for buffer in merge.buffers]
        for partition, buffer in buffers:
            marks = consumer.get_watermark_offsets(TopicPartition(self.settings.topics[buffer.topic], partition), cached=True)
            if marks[1] > buffer.end:
                with self._lock:
                    buffer.reach(buffer.position, marks[1])

    def _full(self) -> bool:
        events = 2 * self.settings.batch_max_events
        with self._lock:
            merges = list(self._merges.values())
            waiting = sum(buffer.count for merge in merges for buffer in merge.buffers)
            return waiting > events and all(merge.satisfied(events) for merge in merges)

    def _balance(self, consumer: Consumer) -> None:
        """Pause a (topic, partition) at the byte bound, resume it at half: others may still need to read on.

        What an open intent still needs is read beyond the bound: it was taken by a worker whose bound, or batch, may have been larger.
        """
        bound = self.settings.buffer_bytes
        with self._lock:
            buffers = [(partition, b, merge.needs(b)) for partition, merge in self._merges.items() for b in merge.buffers]
            full = [(p, b) for p, b, needed in buffers if not b.paused and b.held >= bound and not needed]
            free = [(p, b) for p, b, needed in buffers if b.paused and (b.held <= bound // 2 or needed)]
            for _, buffer in full:
                buffer.paused = True
            for _, buffer in free:
                buffer.paused = False
        if full:
            consumer.pause([TopicPartition(self.settings.topics[b.topic], p) for p, b in full])
        if free:
            consumer.resume([TopicPartition(self.settings.topics[b.topic], p) for p, b in free])

    def _commit(self, consumer: Consumer, *, final: bool = False) -> None:
        with self._lock:
            if not self._commits:
                return
            offsets = [
                TopicPartition(topic, partition, offset)
                for (topic, partition), offset in self._commits.items()
                if partition in self._merges
            ]
            self._commits.clear()
        if offsets:
            self.reached("before_hint")
            try:
                if final:
                    consumer.commit(offsets=offsets, asynchronous=False)
                else:
                    consumer.commit(offsets=offsets)
            except KafkaException as error:
                # A hint for lag tools only: where to start is stored with the state.
                log.debug("commit: %s", error)

    # -- called by the client inside poll, in this thread

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        partitions = sorted({tp.partition for tp in assigned})
        if len(assigned) != len(partitions) * len(TOPICS):
            raise Misrouted(f"assigned {sorted((tp.topic, tp.partition) for tp in assigned)}: not the same partitions of every input topic")
        # Nothing is read before the partitions are restored, and that must not keep the group waiting.
        consumer.assign([])
        for partition in partitions:
            self._claim(partition)
        self.assignments += 1
        self._left_out = None
        log.info("assigned partitions %s", partitions)
        self.ready()

    def _claim(self, partition: int) -> None:
        claim = self.owner.assign(partition, secrets.token_hex(16))
        with self._lock:
            self._dropped.pop(partition, None)
            self._claimed[partition] = self.clock_s()
            self._waiting[partition] = claim
        self._to_restore.put(claim)

    def _claim_again(self) -> None:
        """Claim the dropped partitions whose time has come; the group has not taken them from us."""
        now_s = self.clock_s()
        with self._lock:
            due = [partition for partition, at_s in self._dropped.items() if at_s <= now_s]
        for partition in due:
            log.warning("partition %d: claimed again", partition)
            self._claim(partition)

    def _begin_restored(self, consumer: Consumer) -> None:
        """Read the partitions that have been restored since."""
        begun = []
        while True:
            try:
                claim = self._restored.get_nowait()
            except Empty:
                break
            if isinstance(claim, BaseException):
                raise claim
            if self._wants(claim):
                merge = self._merge(consumer, claim)
                if merge is None:
                    with self._lock:
                        del self._waiting[claim.partition]
                        self._dropped[claim.partition] = self.clock_s() + AGAIN_S
                    continue
                self.owner.restored(claim)
                with self._lock:
                    if self._waiting.pop(claim.partition, None) is not None:  # else dropped meanwhile
                        self._merges[claim.partition] = merge
                        begun.append(claim.partition)
        if begun:
            with self._lock:
                buffers = [(partition, buffer) for partition, merge in self._merges.items() for buffer in merge.buffers]
            # The whole assignment anew: the client knows no other way in this protocol. What it has fetched ahead is fetched again.
            consumer.assign([TopicPartition(self.settings.topics[buffer.topic], p, buffer.position) for p, buffer in buffers])
            for _, buffer in buffers:
                buffer.paused = False
            log.info("reading partitions %s", begun)
            self.ready()

    def _merge(self, consumer: Consumer, claim: Claim) -> Merge | None:
        """The merge of a partition with its buffers at the first record to read; None when that was deleted since the restore.

        Either this worker was frozen meanwhile, and others have handled what is gone: the next poll says so. Or nobody has: then the
        claim is made again, and it is for the restore to find a way or to say that there is none.
        """
        s = self.settings
        ticks = Ticks(s.tick_ms, stand(claim.counters), claim.counters.get("arrived_ms", 0)) if s.tick_ms else None
        merge = Merge.of(claim, ticks)
        for buffer, topic in zip(merge.buffers, s.topics, strict=True):
            low, high = watermarks(consumer, topic, claim.partition, s.timeout_s)
            start = merge.applied[TOPICS[buffer.topic]] + 1
            if start < low:
                log.warning("%s[%d]: what follows offset %d was deleted unread; claimed again soon", topic, claim.partition, start - 1)
                return None
            if start > high:
                raise InvariantBroken(
                    f"{topic}[{claim.partition}]: handled up to offset {start - 1}, but the topic ends at {high}: recreated or truncated"
                )
            buffer.reach(start, high)
        return merge

    def _on_revoke(self, consumer: Consumer, revoked: list[TopicPartition], *, lost: bool = False) -> None:
        partitions = sorted({tp.partition for tp in revoked})
        with self._lock:
            for partition in partitions:
                self._merges.pop(partition, None)
                self._waiting.pop(partition, None)
                self._dropped.pop(partition, None)
            self._left_out = self.clock_s()
        self.owner.revoke(partitions, lost=lost)
        log.info("%s partitions %s", "lost" if lost else "gave up", partitions)
        self.ready()

    def _on_lost(self, consumer: Consumer, lost: list[TopicPartition]) -> None:
        self._on_revoke(consumer, lost, lost=True)


def _callback(handle: Callable[[Consumer, list[TopicPartition]], None]) -> Callable[[Consumer, list[TopicPartition]], None]:
    """What the client may call. A KafkaException out of a callback leaves poll as an object that no `except` catches: the thread
    would end without a failure, and a worker without partitions is never behind."""

    def call(consumer: Consumer, partitions: list[TopicPartition]) -> None:
        try:
            handle(consumer, partitions)
        except KafkaException as error:
            raise DependencyUnreachable(f"Kafka: {error.args[0].str()}") from error

    return call
