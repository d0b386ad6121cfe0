"""A scripted Kafka: logs with holes, one consumer group with eager rebalances, and the client classes the product uses.

The product's own Ingest and KafkaSink run against these classes; they stand where confluent_kafka's stand. Every call takes
part in the schedule. What real Kafka leaves open is drawn from the seed: how much one fetch brings and of which topic, how
far the broker is with what was queued, what of it still arrives after the sender died.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any, Final, Protocol

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from bench.faults.sim_schedule import Killed, Scheduler
from proto.errors import DependencyUnreachable, InvariantBroken
from streams.codec import RawMessage

SESSION_MS: Final = 6_000
"""A member not heard of for so long is out of the group."""
IDLE_POLL_MS: Final = 4_000
"""An idle poll of the product returns after 0.1 s; here less often, since nothing depends on it and each one costs steps."""

Place = tuple[str, int]
"""Topic and partition."""


OPEN, COMMITTED, ABORTED = "open", "committed", "aborted"


@dataclass(slots=True, eq=False)
class Transaction:
    """Records of one producer that become visible together, with the group's offsets."""

    state: str = OPEN
    places: set[Place] = field(default_factory=set)
    offsets: dict[Place, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Message:
    """A record, or an error, as the client gives it. Never changed (a frozen data class takes three times as long to make)."""

    place: Place
    at: int
    body: bytes | None = None
    customer: bytes | None = None
    append_ms: int = 0
    problem: KafkaError | None = None
    writer: str = ""  # of outputs: which process wrote it, at which step of the run
    step: int = 0
    transaction: Transaction | None = None
    number: int = -1  # of inputs: which of the arrivals it is

    @property
    def committed(self) -> bool:
        """Whether a reader of committed records sees it."""
        return self.transaction is None or self.transaction.state == COMMITTED

    def error(self) -> KafkaError | None:
        return self.problem

    def topic(self) -> str:
        return self.place[0]

    def partition(self) -> int:
        return self.place[1]

    def offset(self) -> int:
        return self.at

    def key(self) -> bytes | None:
        return self.customer

    def value(self) -> bytes | None:
        return self.body

    def timestamp(self) -> tuple[int, int]:
        return 2, self.append_ms

    def headers(self) -> None:
        return None


@dataclass(slots=True)
class Log:
    """One partition of a topic. Offsets may be missing, also the last ones before `end`."""

    place: Place
    messages: list[Message] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    low: int = 0
    end: int = 0

    def append(
        self,
        key: bytes | None,
        value: bytes | None,
        append_ms: int,
        writer: str = "",
        step: int = 0,
        transaction: Transaction | None = None,
        number: int = -1,
    ) -> int:
        """Write one record; its offset."""
        self.messages.append(Message(self.place, self.end, value, key, append_ms, None, writer, step, transaction, number))
        self.offsets.append(self.end)
        self.end += 1
        return self.end - 1

    def skip(self, offsets: int) -> None:
        """A hole, as transaction markers and compaction leave them."""
        self.end += offsets

    @property
    def stable(self) -> int:
        """End of what a reader of committed records may see."""
        return next((m.at for m in self.messages if m.transaction is not None and m.transaction.state == OPEN), self.end)

    def first(self, offset: int) -> int:
        """Position in `messages` of the first record at or after the offset."""
        return bisect_left(self.offsets, offset)


class Host(Protocol):
    """What a client needs to know of the process it lives in."""

    @property
    def schedule(self) -> Scheduler: ...
    @property
    def broker(self) -> Broker: ...
    @property
    def name(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def frozen(self) -> bool: ...
    @property
    def nudged(self) -> bool:
        """Whether the reading thread has something to do beside waiting for records."""
        ...


class Broker:
    """All logs, and the coordinator of the one group."""

    def __init__(self, schedule: Scheduler, topics: Sequence[str], outputs: Sequence[str], partitions: int, random: Random) -> None:
        self.schedule, self.topics, self.partitions, self.random = schedule, list(topics), partitions, random
        self.logs = {(topic, number): Log((topic, number)) for topic in [*topics, *outputs] for number in range(partitions)}
        self.down = False
        self.fetch = random.choice([2, 6, 40])  # most records of one slice
        self.committed: dict[Place, int] = {}
        self.members: dict[int, Member] = {}
        self.generation = 0
        self.rebalancing = False
        self._joined = 0
        self._epochs: dict[str, int] = {}
        self._open: dict[str, Transaction] = {}

    def log(self, topic: str, partition: int) -> Log:
        return self.logs[topic, partition]

    # -- transactions

    def fence(self, identity: str) -> int:
        """A new epoch of a transactional id: whoever had an older one can commit no more, what it had open is aborted."""
        if (transaction := self._open.get(identity)) is not None:
            self.end(identity, transaction, ABORTED)
        self._epochs[identity] = self._epochs.get(identity, 0) + 1
        return self._epochs[identity]

    def owns(self, identity: str, epoch: int) -> bool:
        """Whether this is the newest epoch."""
        return self._epochs.get(identity) == epoch

    def begun(self, identity: str, transaction: Transaction, timeout_ms: int) -> None:
        """The first record or offset of a transaction came; one that is open for too long is aborted, and its producer fenced."""
        if self._open.get(identity) is not transaction:
            self._open[identity] = transaction

            def expire() -> None:
                if transaction.state == OPEN:
                    self.schedule.note(f"transaction of {identity} timed out")
                    self.fence(identity)

            self.schedule.at(timeout_ms, expire)

    def end(self, identity: str, transaction: Transaction, state: str) -> None:
        """Write the markers: each takes an offset."""
        transaction.state = state
        if self._open.get(identity) is transaction:
            del self._open[identity]
        for place in transaction.places:
            self.logs[place].skip(1)
        if state == COMMITTED:
            self.committed |= transaction.offsets

    # -- the group

    def join(self, consumer: Consumer) -> Member:
        """A new member; everybody has to give up what it holds and join again."""
        self._joined += 1
        member = Member(self._joined, consumer)
        self.members[member.number] = member
        self.rebalance()
        member.joined = True
        return member

    def rebalance(self) -> None:
        self.rebalancing = True
        for member in self.members.values():
            member.joined = False
            member.todo = None

    def remove(self, member: Member) -> None:
        """The member left, or was not heard of for too long."""
        if self.members.pop(member.number, None) is not None:
            member.evicted = True
            self.rebalance()

    def assign_when_all_joined(self) -> None:
        """The range assignor over co-partitioned topics: the same numbers of every topic to one member."""
        if not self.rebalancing or not all(member.joined for member in self.members.values()):
            return
        self.rebalancing = False
        self.generation += 1
        members = [self.members[number] for number in sorted(self.members)]
        each, more = divmod(self.partitions, max(1, len(members)))
        start = 0
        for position, member in enumerate(members):
            count = each + (position < more)
            member.todo = list(range(start, start + count))
            start += count

    def silent(self, host: Host) -> None:
        """The process stopped answering now; the coordinator notices later, unless it is heard of again."""
        for member in list(self.members.values()):
            if member.consumer.host is host:
                beats = member.beats

                def check(member: Member = member, beats: int = beats) -> None:
                    if member.beats == beats and not (host.alive and not host.frozen):
                        self.remove(member)

                self.schedule.at(SESSION_MS + self.random.randrange(500), check)


class LogReader:
    """Stands for streams.log.KafkaLog: a stretch of one partition."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """As in streams.log.Log."""
        self._reach(f"ends of {topic}[{partition}]")
        log = self._host.broker.log(topic, partition)
        return log.low, log.stable

    def read(self, topic: str, partition: int, start: int, stop: int) -> Generator[list[RawMessage], None, None]:
        """As in streams.log.Log."""
        log = self._host.broker.log(topic, partition)
        position, last = log.first(start), log.first(stop)
        if start < stop and not log.low <= start <= log.end:
            raise InvariantBroken(f"{topic}[{partition}]: offset {start} is not in the topic")
        while position < last:
            self._reach(f"read {topic}[{partition}]")
            until = min(last, position + 1 + self._host.broker.random.randrange(4 * self._host.broker.fetch))
            piece: list[RawMessage] = [message for message in log.messages[position:until] if message.committed]
            if piece:
                yield piece
            position = until

    def _reach(self, what: str) -> None:
        self._host.schedule.step(what)
        broker = self._host.broker
        if broker.down and not self._host.schedule.wait(lambda: not broker.down, 10_000):
            raise DependencyUnreachable(f"Kafka: {what}")


@dataclass(slots=True, eq=False)
class Member:
    """One member of the group."""

    number: int
    consumer: Consumer
    joined: bool = False
    evicted: bool = False
    todo: list[int] | None = None
    beats: int = 0


class Consumer:
    """Stands for confluent_kafka.Consumer."""

    def __init__(self, config: Mapping[str, Any], logger: object = None) -> None:
        self.host: Host = config["sim.host"]
        self._broker, self._schedule = self.host.broker, self.host.schedule
        self._random = self._broker.random
        self._topics: list[str] = []
        self._member: Member | None = None
        self._owned: list[int] = []
        self._positions: dict[Place, int] = {}
        self._known_end: dict[Place, int] = {}
        self._told_end: dict[Place, int] = {}
        self._paused: set[Place] = set()
        self._closed = False

    def list_topics(self, timeout: float = -1.0) -> Any:
        self._schedule.step("metadata")
        self._answer(timeout)
        partitions = dict.fromkeys(range(self._broker.partitions))
        return SimpleNamespace(topics={name: SimpleNamespace(error=None, partitions=partitions) for name in self._broker.topics})

    def subscribe(self, topics: list[str], **callbacks: Callable[[Any, list[TopicPartition]], None]) -> None:
        self._topics, self._callbacks = topics, callbacks

    def poll(self, timeout: float) -> Message | None:
        self._schedule.step("poll")
        if self._serve():
            return None
        found = self._next(1)
        if not found and timeout > 0:
            self._schedule.wait(self._something, max(IDLE_POLL_MS, int(timeout * 1_000)))
            if self._serve():
                return None
            found = self._next(1)
        return found[0] if found else None

    def consume(self, number: int, timeout: float) -> list[Message]:
        self._schedule.step("consume")
        found: list[Message] = []
        for _ in range(self._random.randrange(4)):
            found += self._next(min(number - len(found), 1 + self._random.randrange(self._broker.fetch)))
        return found

    def assign(self, places: list[TopicPartition]) -> None:
        self._positions = {(place.topic, place.partition): place.offset for place in places}
        self._paused.clear()
        self._told_end.clear()

    def incremental_assign(self, places: list[TopicPartition]) -> None:
        self._positions |= {(place.topic, place.partition): place.offset for place in places}

    def get_watermark_offsets(self, place: TopicPartition, timeout: float = -1.0, cached: bool = False) -> tuple[int, int]:
        log = self._broker.log(place.topic, place.partition)
        if cached:
            return log.low, self._known_end.get((place.topic, place.partition), -1001)
        self._schedule.step("watermarks")
        self._answer(timeout)
        return log.low, log.end

    def pause(self, places: list[TopicPartition]) -> None:
        self._paused |= {(place.topic, place.partition) for place in places}

    def resume(self, places: list[TopicPartition]) -> None:
        self._paused -= {(place.topic, place.partition) for place in places}

    def commit(self, offsets: list[TopicPartition], asynchronous: bool = True) -> None:
        self._schedule.step("commit hint")
        if self._broker.down:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        for place in offsets:
            self._broker.committed[place.topic, place.partition] = place.offset

    def consumer_group_metadata(self) -> tuple[Member | None, int]:
        return self._member, self._broker.generation

    def committed(self, places: list[TopicPartition], timeout: float = -1.0) -> list[TopicPartition]:
        return [TopicPartition(p.topic, p.partition, self._broker.committed.get((p.topic, p.partition), -1001)) for p in places]

    def close(self) -> None:
        self._schedule.step("leave")
        if self._closed:
            return
        self._closed = True
        member = self._member
        if member is not None:
            if self._owned:
                self._give_up("on_lost" if member.evicted else "on_revoke")
            self._broker.remove(member)

    def _answer(self, timeout: float) -> None:
        """Wait while the broker is down."""
        if self._broker.down and not self._schedule.wait(lambda: not self._broker.down, int(timeout * 1_000) if timeout >= 0 else 60_000):
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    def _something(self) -> bool:
        member = self._member
        if self.host.nudged or (not self._broker.down and any(map(self._brings, self._positions.items()))):
            return True
        if member is None or self._broker.down:
            return member is None
        if member.evicted or member.todo is not None:
            return True
        return self._broker.rebalancing and (not member.joined or all(other.joined for other in self._broker.members.values()))

    def _serve(self) -> bool:
        """Take part in the group; whether a callback ran."""
        broker = self._broker
        if broker.down:
            return False
        if self._member is None:
            self._member = broker.join(self)
        member = self._member
        member.beats += 1
        if member.evicted:
            if self._owned:
                self._give_up("on_lost")
            self._member = broker.join(self)
            return True
        if broker.rebalancing and not member.joined:
            if self._owned:
                self._give_up("on_revoke")
            if not member.evicted:
                member.joined = True
            return True
        broker.assign_when_all_joined()
        if member.todo is not None:
            self._owned, member.todo = member.todo, None
            self._schedule.note(f"assigned {self._owned}")
            places = [TopicPartition(topic, number) for topic in self._topics for number in self._owned]
            self._callbacks["on_assign"](self, places)
            return True
        return False

    def _give_up(self, how: str) -> None:
        owned, self._owned = self._owned, []
        self._positions.clear()
        self._schedule.note(f"{how} {owned}")
        self._callbacks[how](self, [TopicPartition(topic, number) for topic in self._topics for number in owned])

    def _ready(self) -> list[Place]:
        """Where a fetch brings something: records, or the news that there are none."""
        return [] if self._broker.down else [place for place, _ in filter(self._brings, self._positions.items())]

    def _brings(self, position: tuple[Place, int]) -> bool:
        place, at = position
        return (self._broker.logs[place].end > at or self._told_end.get(place) != at) and place not in self._paused

    def _next(self, number: int) -> list[Message]:
        ready = self._ready()
        if not ready or number <= 0:
            return []
        place = ready[self._random.randrange(len(ready))]
        log = self._broker.logs[place]
        position = self._positions[place]
        first = log.first(position)
        messages = log.messages[first : first + number]
        # The high watermark comes with a fetch, and may be old by the time it is looked at.
        if self._random.random() < 0.8:
            self._known_end[place] = log.end
        if messages:
            self._positions[place] = messages[-1].at + 1
            return list(messages)
        self._positions[place] = log.end  # only holes are left
        self._told_end[place] = log.end
        self._known_end[place] = log.end
        return [Message(place, log.end, problem=KafkaError(KafkaError._PARTITION_EOF))]


@dataclass(slots=True)
class Producer:
    """Stands for confluent_kafka.Producer: idempotent, in order per partition, delivering at its own pace."""

    host: Host
    queues: dict[Place, list[tuple[bytes, bytes, Callable[[Any, Any], None] | None]]] = field(default_factory=dict)
    identity: str = ""  # transactional.id
    timeout_ms: int = 0
    _epoch: int = 0
    _transaction: Transaction | None = None
    _timer: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], logger: object = None) -> Producer:
        """Called as confluent_kafka.Producer is."""
        identity = config.get("transactional.id", "")
        producer = cls(config["sim.host"], identity=identity, timeout_ms=config.get("transaction.timeout.ms", 0))
        producer.host.schedule.note("producer")
        made: list[Producer] = producer.host.producers  # type: ignore[attr-defined]  # only of simulated processes
        made.append(producer)
        return producer

    def produce_batch(
        self,
        topic: str,
        records: list[dict[str, Any]],
        partition: int = -1,
        on_delivery: Callable[[Any, Any], None] | None = None,
        **_: object,
    ) -> int:
        self.host.schedule.step(f"produce {len(records)} to {topic}[{partition}]")
        queue = self.queues.setdefault((topic, partition), [])
        for record in records:
            key, value = record["key"], record["value"]
            queue.append((key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key, value, on_delivery))
        self._linger()
        return len(records)

    def poll(self, _timeout: float) -> int:
        return 0

    def flush(self, timeout: float = -1.0) -> int:
        schedule = self.host.schedule
        until = schedule.now_ms + int(timeout * 1_000)
        while any(self.queues.values()):
            schedule.step("flush")
            if self.host.broker.down:
                if not schedule.wait(lambda: not self.host.broker.down, max(0, until - schedule.now_ms)):
                    self._give_up()
                    break
            else:
                self._deliver()
        return sum(map(len, self.queues.values()))

    def purge(self) -> None:
        self.queues.clear()

    def init_transactions(self, timeout: float) -> None:
        self._reach("init transactions", timeout)
        self._epoch = self.host.broker.fence(self.identity)
        self.host.schedule.step("answer")

    def begin_transaction(self) -> None:
        self._transaction = Transaction()

    def send_offsets_to_transaction(self, places: list[TopicPartition], group: tuple[Member | None, int], timeout: float) -> None:
        self._reach("offsets to transaction", timeout)
        self._check()
        member, generation = group
        broker, transaction = self.host.broker, self._transaction
        if member is None or broker.members.get(member.number) is not member or generation != broker.generation:
            self.host.schedule.note(f"not of generation {broker.generation}: {generation}")
            raise KafkaException(KafkaError(KafkaError.ILLEGAL_GENERATION, "no member of this generation", False, False, True))
        assert transaction is not None
        broker.begun(self.identity, transaction, self.timeout_ms)
        transaction.offsets |= {(place.topic, place.partition): place.offset for place in places}
        self.host.schedule.step("answer")

    def commit_transaction(self, timeout: float) -> None:
        while any(self.queues.values()):
            self._reach("flush", timeout)
            self._check()
            self._deliver()
        self._reach("commit transaction", timeout)
        self._check()
        self._end(COMMITTED)
        self.host.schedule.step("answer")

    def abort_transaction(self, timeout: float) -> None:
        self.queues.clear()
        self._reach("abort transaction", timeout)
        self._check()
        self._end(ABORTED)

    def _end(self, state: str) -> None:
        if self._transaction is not None and self._transaction.state == OPEN:
            self.host.broker.end(self.identity, self._transaction, state)
        self._transaction = None

    def _check(self) -> None:
        if not self.host.broker.owns(self.identity, self._epoch):
            raise KafkaException(KafkaError(KafkaError._FENCED, "fenced by another producer", True))

    def _reach(self, what: str, timeout: float) -> None:
        schedule, broker = self.host.schedule, self.host.broker
        schedule.step(f"{what} {self.identity}")
        if broker.down and not schedule.wait(lambda: not broker.down, int(timeout * 1_000)):
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, what, False, True))

    def left_in_flight(self) -> Iterator[Callable[[], None]]:
        """What the dead process had sent and the broker not yet written: any first part of each queue, to be written later."""
        random = self.host.broker.random
        for place, queue in self.queues.items():
            if sent := queue[: random.randrange(len(queue) + 1)]:
                yield partial(self._write, place, sent)
        self.queues = {}

    def _give_up(self) -> None:
        """The delivery timeout is over: some of it may have been written all the same."""
        for place, queue in self.queues.items():
            written = self.host.broker.random.randrange(len(queue) + 1)
            self._write(place, queue[:written])
            for _, _, report in queue:
                if report is not None:
                    report(KafkaError(KafkaError._MSG_TIMED_OUT), None)
            queue.clear()

    def _linger(self) -> None:
        if not self._timer:
            self._timer = True
            self.host.schedule.at(2 + self.host.broker.random.randrange(20), self._tick)

    def _tick(self) -> None:
        """The client's own thread sends on."""
        self._timer = False
        if not self.host.alive:
            return
        if self.host.frozen or self.host.broker.down:
            if any(self.queues.values()):
                self._timer = True
                self.host.schedule.at(300, self._tick)
            return
        self._deliver()
        if any(self.queues.values()):
            self._linger()

    def _deliver(self) -> None:
        random = self.host.broker.random
        for place, queue in self.queues.items():
            if queue and (count := random.randrange(len(queue) + 2)):
                self._write(place, queue[:count])
                del queue[:count]

    def _write(self, place: Place, records: Sequence[tuple[bytes, bytes, object]]) -> None:
        broker, transaction = self.host.broker, self._transaction
        log = broker.logs[place]
        if records and self.identity:
            if transaction is None or not broker.owns(self.identity, self._epoch):
                return  # refused by the broker
            broker.begun(self.identity, transaction, self.timeout_ms)
            transaction.places.add(place)
        for key, value, _ in records:
            log.append(key, value, self.host.schedule.now_ms, self.host.name, self.host.schedule.steps, transaction)
        if records:
            self.host.schedule.note(f"{self.host.name} wrote {len(records)} to {place[0]}[{place[1]}], now at {log.end}")


__all__ = ["SESSION_MS", "Broker", "Consumer", "Host", "Killed", "Log", "LogReader", "Member", "Message", "Place", "Producer"]
