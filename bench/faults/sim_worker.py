"""One worker process in the simulation: the product's Ingest, Engine, Merge, Decoder and KafkaSink, put together as streams/main.py does.

What is left out is Faust (its channel hands over one item at a time, which the loop here does too) and the metrics server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

import streams.engine
import streams.ingest
import streams.rebuild
import streams.recorded
import streams.sink
import streams.snapshot
from bench.faults.sim_broker import Broker, Consumer, LogReader, Message, Place, Producer
from bench.faults.sim_redis import Client, ModelRedis
from bench.faults.sim_schedule import Event, Lock, Pool, Queue, Scheduler, Threads
from bench.small_model import repacked, small
from features.facts import KIND, OFFSET, TOPICS
from features.history import Histories, Step
from features.store import Claim
from proto.errors import ArtifactRejected, ChurnError
from scoring.fallback import Fallback
from scoring.scorer import load
from streams.codec import Decoder, Records
from streams.engine import Engine, EngineSettings, Result
from streams.ingest import Ingest, IngestSettings
from streams.merge import Batch
from streams.metrics import Parts
from streams.outbox import Tail
from streams.rebuild import Restorer, RestoreSettings
from streams.scores import Model
from streams.sink import KafkaSink, SinkSettings, Transactions, settle
from streams.snapshot import Snapshots, Snapshotter

SCORES: Final = "churn-scores"
DEAD_LETTERS: Final = "churn-dead-letters"
ALERTS: Final = "churn-alerts"
PROGRESS_MS: Final = 60_000
IDLE_MS: Final = 5_000
STOP_MS: Final = 10_000
GLANCES_MS: Final = (1_000, 7_000, 25_000)
"""How often the store is looked at while nothing happens; often costs steps, seldom leaves the finding to the next batch."""


@cache
def models() -> dict[str, Model]:
    """The fallback and two published models, by digest."""
    made: list[Model] = [Fallback(0.5), *(load(small(12, 3, seed).envelope) for seed in (0, 1))]
    return {model.digest: model for model in made}


@cache
def foreign_model() -> Model | None:
    """A model made for another feature layout, as the gates let it through: None, since they must not."""
    try:
        return load(repacked(layout_hash="0" * 32))
    except ArtifactRejected:
        return None


@cache
def decoder() -> Decoder:
    return Decoder(currency="EUR", rates={"USD": Decimal("0.9")}, future_ms=300_000, max_bytes=1_000_000, digest_key=b"k")


class Slices:
    """The decoder's verdicts on whole topics, handed out slice by slice.

    Decoding slices of one or two records takes a fifth of a run's time, and whether a record's verdict depends on its neighbours is no
    question of delivery. Some runs decode every slice all the same.
    """

    def __init__(self) -> None:
        self._whole: dict[Place, Records] = {}
        self._row: dict[int, int] = {}

    def prepare(self, topic: int, partition: int, messages: Sequence[Message]) -> None:
        """All there will ever be of a (topic, partition), in any order. Times of arrival will be others; no event time is near a limit."""
        self._whole[TOPICS[topic], partition] = decoder().decode(topic, partition, messages)
        self._row |= {message.number: row for row, message in enumerate(messages)}

    def decode(self, topic: int, partition: int, messages: Sequence[Any]) -> Records:
        """As streams.codec.Decoder does."""
        whole = self._whole[TOPICS[topic], partition]
        rows = [self._row[message.number] for message in messages]
        facts = whole.facts[rows]
        facts[:, OFFSET] = offset = np.array([message.at for message in messages], np.int64)
        return Records(
            topic=topic,
            partition=partition,
            offset=offset,
            append_ms=np.array([message.append_ms for message in messages], np.int64),
            size=whole.size[rows],
            facts=facts,
            customer=[whole.customer[row] for row in rows],
            event_id=[whole.event_id[row] for row in rows],
            reason=whole.reason[rows],
            detail={i: whole.detail[row] for i, row in enumerate(rows) if row in whole.detail},
            raw={i: whole.raw[row] for i, row in enumerate(rows) if row in whole.raw},
        )


class Silence:
    """Metrics nobody reads: anything can be asked of it."""

    def __getattr__(self, name: str) -> Silence:
        return self

    def __getitem__(self, key: object) -> Silence:
        return self

    def __call__(self, *_: object) -> Silence:
        return self


_SILENCE: Final[Any] = Silence()


class Untimed(Parts):
    """Where the time goes is not asked."""

    def part(self, name: str) -> AbstractContextManager[None]:  # type: ignore[override]  # a context manager, as the decorated one gives
        """As in Parts."""
        return _NO_CONTEXT


_NO_CONTEXT: Final = nullcontext()
_UNTIMED: Final = Untimed()


@dataclass(slots=True)
class Shelf:
    """The models a process knows and the one in force; each process learns of a switch in its own time."""

    now: str = ""
    foreign: Model | None = None

    def current(self) -> Model:
        return self.foreign or models()[self.now]

    def by_digest(self, digest: str) -> Model:
        if (foreign := foreign_model()) is not None and foreign.digest == digest:
            return foreign
        if digest not in models():
            raise ArtifactRejected(f"no model {digest}")
        return models()[digest]


class Mortal(Histories):
    """Histories on which some records end the process, as a fault in native code does."""

    def __init__(self, world: World, **settings: Any) -> None:
        super().__init__(**settings)
        self._world = world

    def step(self, customers: Sequence[str], facts: npt.NDArray[np.int64], skip: npt.NDArray[np.bool_] | None = None) -> Step:
        """As in Histories."""
        if self._world.deadly:
            kinds, offsets = facts[:, KIND].tolist(), facts[:, OFFSET].tolist()
            if not self._world.deadly.isdisjoint(zip(customers, (kind >> 3 for kind in kinds), offsets, strict=True)):
                process: Any = self._world.schedule.current.process
                process.kill()
                self._world.schedule.step("fault in native code")
        return super().step(customers, facts, skip)


@dataclass(slots=True)
class _Clock:
    """What the code under simulation takes for the module time."""

    schedule: Scheduler

    def sleep(self, seconds: float) -> None:
        self.schedule.sleep(int(seconds * 1_000))

    def monotonic(self) -> float:
        return self.schedule.now_ms / 1_000

    def monotonic_ns(self) -> int:
        return self.schedule.now_ms * 1_000_000 + self.schedule.steps


@contextmanager
def clients_of_the_simulation(world: World) -> Iterator[None]:
    """Put the scripted client classes where the product's modules import Kafka's, and give nonces that repeat."""
    nonces = SimpleNamespace(token_hex=lambda _size: world.nonce())
    changes: list[tuple[Any, str, Any]] = [
        (streams.ingest, "Consumer", Consumer),
        (streams.ingest, "secrets", nonces),
        (streams.ingest, "threading", Threads(world.schedule)),
        (streams.sink, "Producer", Producer.of),
        (streams.sink, "ThreadPoolExecutor", lambda _one, name: Pool(world.schedule, name)),
        (streams.sink, "time", _Clock(world.schedule)),
        (streams.snapshot, "threading", Threads(world.schedule)),
        (streams.snapshot, "time", _Clock(world.schedule)),
        (streams.engine, "Histories", partial(Mortal, world)),
        (streams.rebuild, "Histories", partial(Mortal, world)),
        # Sizes a small world never reaches, so that it meets their edges too.
        *((streams.rebuild if name == "MARGIN" else streams.recorded, name, value) for name, value in world.pieces.items()),
    ]
    former = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in former:
            setattr(module, name, value)


@dataclass(slots=True)
class World:
    """What all processes of a run share."""

    schedule: Scheduler
    broker: Broker
    redis: ModelRedis
    batch: int
    max_facts: int
    pieces: Mapping[str, int]
    """Constants of streams/rebuild.py and streams/recorded.py by name: how much is read back and handled at once."""
    exactly_once: bool
    snapshots: Snapshots | None
    decoder: Any
    """Decoder or Slices."""
    tick_ms: int = 0
    """From tick to tick at which the silent are scored; 0 for none."""
    deadly: set[tuple[str, int, int]] = field(default_factory=set)
    """Customer, topic index and offset of records that end whoever handles them."""
    nonces: int = 0
    unexpected: list[str] = field(default_factory=list)
    """Errors that end a process although nothing that happened explains them."""
    explained: set[str] = field(default_factory=set)
    """Names of the errors that the faults of this run may end a process with."""

    def nonce(self) -> str:
        self.nonces += 1
        return f"{self.nonces:032x}"


class Process:
    """A worker from start to end."""

    def __init__(self, world: World, name: str, model: str) -> None:
        self.world, self.name = world, name
        self.schedule, self.broker = world.schedule, world.broker
        self.alive, self.frozen, self.stopping, self.reading = True, False, False, True
        self.producers: list[Producer] = []
        self.shelf = Shelf(model)
        self.failure: BaseException | None = None
        self._drain = Event(self.schedule)
        self._wake = Event(self.schedule)
        self._moved_ms = self.schedule.now_ms
        client: Mapping[str, Any] = {"sim.host": self}
        outputs = SinkSettings(client, SCORES, DEAD_LETTERS, 30.0, ALERTS)
        self.sink: KafkaSink | Transactions = KafkaSink(outputs)
        if world.exactly_once:
            self.sink = Transactions(outputs, "group")
        settings = EngineSettings(world.max_facts, 3, tick_ms=world.tick_ms)
        store = Client(world.redis, self)
        self.engine = Engine(settings, store, self.shelf, self.sink, lambda: self.schedule.now_ms, _SILENCE)
        self.engine.parts = _UNTIMED
        self.snapshotter: Snapshotter | None = None
        if world.snapshots is not None:
            self.snapshotter = self.engine.keeper = Snapshotter(
                world.snapshots,
                Client(world.redis, self),
                Client(world.redis, self),
                self.schedule.random.choice([0.01, 0.1, 5.0]),
                _SILENCE,
                clock=lambda: self.schedule.now_ms / 1_000,
                page=self.schedule.random.choice([1, 2, 100]),
            )
            self.snapshotter._queue = Queue(self.schedule)  # type: ignore[assignment]  # as below
        self.engine._lock = Lock(self.schedule)  # type: ignore[assignment]  # one that hands over instead of blocking the thread
        self.ingest = Ingest(
            IngestSettings(client, "group", TOPICS, world.batch, 0.005, 1 << 14, 10.0, world.tick_ms),
            world.decoder,
            self.engine,
            self._wake.set,
            parts=_UNTIMED,
            merging=_UNTIMED,
        )
        log = LogReader(self)
        restorer = Restorer(
            RestoreSettings(TOPICS, SCORES, DEAD_LETTERS, ALERTS, world.max_facts, world.batch, whole=world.exactly_once),
            Client(world.redis, self),
            log,
            world.decoder,
            _SILENCE,
            world.snapshots,
            _UNTIMED,
        )

        def restore(claim: Claim, wanted: Callable[[], bool]) -> Claim:
            settle(claim, self.sink, Tail(log, SCORES, DEAD_LETTERS))
            return restorer.restore(claim, wanted)

        self.ingest.restore = restore
        self._restored = Queue(self.schedule)
        self.ingest._restored = self._restored  # type: ignore[assignment]  # as above
        self.ingest._to_restore = Queue(self.schedule)  # type: ignore[assignment]  # as above
        self.ingest.wall_ms = lambda: self.schedule.now_ms
        self.ingest.clock_s = lambda: self.schedule.now_ms / 1_000
        self.ingest._lock = Lock(self.schedule)  # type: ignore[assignment]  # as above
        self.ingest._stop = Event(self.schedule)  # type: ignore[assignment]  # as above
        self.ingest._drained = Event(self.schedule)  # type: ignore[assignment]  # as above
        self.schedule.note(f"{name} starts")
        self.schedule.spawn(f"{name} ingest", self, self._read)
        self.schedule.spawn(f"{name} feed", self, self._feed)
        self.schedule.spawn(f"{name} watch", self, self._watch)
        self.schedule.spawn(f"{name} glance", self, self._glance)
        if self.snapshotter is not None:
            self.schedule.spawn(f"{name} snapshot", self, self.snapshotter._run)

    @property
    def nudged(self) -> bool:
        """Whether the reading thread has something to do beside waiting for records."""
        return self.stopping or bool(self._restored.items)

    # -- what happens to it

    def kill(self) -> None:
        """kill -9: nothing it still does counts; what it had sent may still arrive."""
        if not self.alive:
            return
        self.schedule.note(f"{self.name} killed")
        self._end()
        self.schedule.kill(self)

    def freeze(self, frozen: bool) -> None:
        """SIGSTOP and SIGCONT."""
        if self.alive:
            self.schedule.note(f"{self.name} {'frozen' if frozen else 'thawed'}")
            self.frozen = frozen
            self.schedule.freeze(self, frozen)
            if frozen:
                self.broker.silent(self)

    def stop(self) -> None:
        """SIGTERM: finish the item in work, send no other, commit, leave."""
        self.schedule.note(f"{self.name} told to stop")
        self._drain.set()
        self._wake.set()

    def _end(self) -> None:
        self.alive = False
        if self.snapshotter is not None and self.snapshotter._job is not None:
            self.snapshotter._job.writer._stream.close()  # the operating system does; the file stays as it is
        self.broker.silent(self)
        for producer in self.producers:
            for arrive in producer.left_in_flight():
                self.schedule.at(self.broker.random.choice([0, 0, 20, 400]), arrive)

    # -- its threads

    def _read(self) -> None:
        self.ingest._run()
        self.reading = False

    def _feed(self) -> None:
        try:
            self._feed_until_drained()
        except Exception as error:
            self.failure = error
            self.schedule.note(f"{self.name} failed: {type(error).__name__}: {error}")
        # As streams/main.py does, also after a failure: nothing is in flight, give up what is owned, within a bound.
        self.stopping = True
        self.ingest.stop()
        self.schedule.wait(lambda: not self.reading, STOP_MS)
        for failure in (error for error in (self.failure, self.ingest.failure) if error is not None):
            if type(failure).__name__ not in self.world.explained:
                self.world.unexpected.append(f"{type(failure).__name__}: {failure}")
        self.schedule.note(f"{self.name} ended")
        self._end()
        self.schedule.kill(self)

    def _feed_until_drained(self) -> None:
        random = self.schedule.random
        coming: list[Batch] | None = None
        while not self._drain.is_set():
            batches = self._take() if coming is None else coming
            coming = None
            if self._drain.is_set():
                return
            if batches:
                # The next item is merged while this one is worked on: here before it or after it.
                if random.random() < 0.5:
                    coming = self._take()
                self._on_result(self.engine.process(batches))
            else:
                self._wake.wait(IDLE_MS / 1_000)

    def _take(self) -> list[Batch]:
        self.schedule.step("take")
        self._wake.clear()
        return self.ingest.take()

    def _on_result(self, result: Result) -> None:
        self._moved_ms = self.schedule.now_ms
        self.ingest.applied(result.applied)
        self.ingest.ticked(result.ticks)
        for partition in result.fenced:
            self.ingest.drop(partition)
        for partition in result.broken:
            self.ingest.drop(partition, again_s=0.0)

    def _glance(self) -> None:
        """What streams/state_store.py does beside looking after the server's health."""
        store, every_ms = Client(self.world.redis, self), self.schedule.random.choice(GLANCES_MS)
        while True:
            self.schedule.sleep(every_ms)
            try:
                lost = self.engine.compare(store.standings)
            except ChurnError:
                continue
            for partition in lost.fenced:
                self.ingest.drop(partition)
            for partition in lost.broken:
                self.ingest.drop(partition, again_s=0.0)

    def _watch(self) -> None:
        """The watchdog of streams/main.py on the virtual clock."""
        while True:
            self.schedule.sleep(IDLE_MS)
            if not self.ingest.behind():
                self._moved_ms = self.schedule.now_ms
            elif self.schedule.now_ms > self._moved_ms + PROGRESS_MS:
                self.schedule.note(f"{self.name} does not get on")
                self.kill()
