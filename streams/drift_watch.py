"""The drift watch as a process of its own: reads scores, features and inputs beside the workers, says what has moved."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import faust
import orjson
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from faust.types.streams import StreamT
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from drift.budget import Budget
from features.facts import TOPICS
from proto.errors import BadUsage, DependencyUnreachable
from streams.agents import faust_app
from streams.drift_state import BASELINE, STATE, latest
from streams.drift_webhook import Webhook
from streams.drifting import FEATURES, Reference, Watcher
from streams.log import KafkaLog
from streams.settings import Settings
from streams.topics import DRIFT, DRIFT_STATE, MODEL_MAX_BYTES
from streams.topics import FEATURES as FEATURE_TOPIC
from streams.topics import SCORES as SCORE_TOPIC
from streams.training import decoder

log = logging.getLogger(__name__)

FETCH: Final = 5_000
POLL_S: Final = 0.2
STORE_S: Final = 10.0
"""State is written with every verdict, and at least so often while there is something new."""
LAGGING_S: Final = 0.05
"""A pause between two pieces: the watch may be late, the workers beside it may not."""


@dataclass(slots=True, eq=False)
class Piece:
    """What goes through the channel: messages of one poll, and the future that says they are done with."""

    messages: list[Message]
    done: asyncio.Future[None]


class Meters:
    """The metrics of the watch, on a registry of their own. No customer in a label."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.verdicts = Counter("churn_drift_verdicts", "Verdicts, by kind and nature.", ["kind", "nature"], registry=self.registry)
        self.records = Counter("churn_drift_records", "Records looked at.", registry=self.registry)
        self.distance = Gauge(
            "churn_drift_score_distance", "Of the scores from the baseline.", ["measure", "window"], registry=self.registry
        )
        self.episodes = Gauge("churn_drift_open_episodes", "Episodes that are not over.", registry=self.registry)
        self.watermark = Gauge("churn_drift_watermark_seconds", "Event time up to which was looked.", registry=self.registry)
        self.covered = Gauge("churn_coverage_ratio", "Active customers with a fresh score by a model.", ["segment"], registry=self.registry)
        self.unsent = Gauge("churn_drift_webhooks_waiting", "Verdicts the webhook has not taken yet.", registry=self.registry)


class DriftWatch:
    """One watch of a deployment; a second one takes over from the first, which then ends."""

    def __init__(
        self,
        settings: Settings,
        client: dict[str, Any],
        *,
        afresh: bool = False,
        until_idle_s: float | None = None,
        pause_s: float = LAGGING_S,
    ) -> None:
        self._settings, self._client, self._until_idle_s, self._pause_s = settings, client, until_idle_s, pause_s
        prefixed = settings.prefixed
        self._topics = [*(prefixed(topic) for topic in TOPICS), prefixed(SCORE_TOPIC), prefixed(FEATURE_TOPIC)]
        self._drift, self._state = prefixed(DRIFT), prefixed(DRIFT_STATE)
        self._log = KafkaLog(client, timeout_s=settings.dependency_timeout_s)
        self._group = f"{settings.topic_prefix}{settings.group_id}-drift"
        self._producer = Producer(
            {
                "message.max.bytes": MODEL_MAX_BYTES,
                "compression.type": "none",  # the state is compressed already
                **client,
                "transactional.id": self._group,
                "enable.idempotence": True,
            },
            logger=log,
        )
        self._transact(self._producer.init_transactions, settings.dependency_timeout_s)  # fences the watch that was here before
        stored = latest(self._log, self._state)
        if BASELINE not in stored:
            raise BadUsage(f"{self._state} holds no baseline; make one with `churnstream drift baseline`")
        reference = Reference.from_bytes(stored[BASELINE])
        self.watcher = Watcher(reference, decoder(settings), settings.drift_grace_ms, Budget(settings.drift_pages))
        self.unsent: list[dict[str, Any]] = []
        if STATE in stored and not afresh:
            head, _, body = stored[STATE].partition(b"\n")
            self.watcher.restore(body)
            self.unsent = orjson.loads(head)
        secret = settings.drift_webhook_secret.get_secret_value().encode()
        self._webhook = Webhook(settings.drift_webhook_url, secret) if settings.drift_webhook_url else None
        self.meters = Meters()
        self.verdicts = 0
        self._consumer = Consumer(
            {
                "queued.max.messages.kbytes": 16_384,
                "fetch.wait.max.ms": 100,
                **client,
                "group.id": self._group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
            },
            logger=log,
        )
        self._stored_at = time.monotonic()
        self._dirty = False
        self._idle_since = time.monotonic()
        self.cpu_seconds = 0.0

    # -- the loop, on Faust

    def run(self) -> dict[str, Any]:
        """Watch until told to stop (or idle); returns the summary."""
        return asyncio.run(self._main())

    async def _main(self) -> dict[str, Any]:
        s = self._settings
        loop = asyncio.get_running_loop()
        name = f"{s.topic_prefix}drift-{secrets.token_hex(6)}"
        control = f"{s.topic_prefix}control-{name.rsplit('-', 1)[1]}"
        admin = AdminClient(self._client, logger=log)
        from streams.main import create_control_topic, delete_topic

        stopping = asyncio.Event()
        server = start_http_server(s.metrics_port, registry=self.meters.registry)[0] if s.metrics_port else None
        await loop.run_in_executor(None, create_control_topic, admin, control, s.replication, s.dependency_timeout_s)
        app = faust_app(
            name, str(self._client["bootstrap.servers"]), s.kafka, control, lambda command: stopping.set() if command == "drain" else None
        )
        channel: Any = app.channel(value_type=None, maxsize=1)
        pool = ThreadPoolExecutor(1, "drift")
        watch_agent(app, channel, self.process, pool)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        await loop.run_in_executor(pool, self.assign)
        await app.start()
        log.info("drift watch %s started", name)
        try:
            while not stopping.is_set():
                messages = await loop.run_in_executor(None, self.poll)
                await self._through(channel, Piece(messages, loop.create_future()))
                if self._until_idle_s is not None and time.monotonic() - self._idle_since >= self._until_idle_s:
                    break
                await asyncio.sleep(LAGGING_S)
            await loop.run_in_executor(pool, self.store, [])
        finally:
            await app.stop()
            await loop.run_in_executor(None, delete_topic, admin, control, 2.0)
            self._consumer.close()
            self._log.close()
            if server is not None:
                server.shutdown()
        return self.summary()

    async def _through(self, channel: Any, piece: Piece) -> None:
        """Through the agent. A rebalance of Faust's own consumer empties channels without a word: then it is sent again."""
        while not piece.done.done():
            queues = [subscriber.queue for subscriber in channel._subscribers]
            if queues and not any(queue.qsize() for queue in queues):
                await channel.put(piece)
            await asyncio.wait([piece.done], timeout=0.5)
        piece.done.result()

    # -- its parts, each in a thread of its own

    def assign(self) -> None:
        """All partitions of all sources, from where the state stands; the beginning where it knows nothing."""
        known = self._consumer.list_topics(timeout=self._settings.dependency_timeout_s).topics
        places = []
        for source, topic in enumerate(self._topics):
            if topic not in known:
                if source == FEATURES:
                    continue
                raise DependencyUnreachable(f"Kafka: no topic {topic}; run `churnstream topics create`")
            for partition in sorted(known[topic].partitions):
                low, _ = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=self._settings.dependency_timeout_s)
                start = max(self.watcher.positions.get((source, partition), low), low)
                places.append(TopicPartition(topic, partition, start))
        self._consumer.assign(places)

    def poll(self) -> list[Message]:
        """What there is, ends of partitions included."""
        first = self._consumer.poll(POLL_S)
        return [] if first is None else [first, *self._consumer.consume(FETCH - 1, 0)]

    def process(self, messages: list[Message]) -> None:
        """Take messages in, say what follows from them, store."""
        begin = time.thread_time()
        pieces: dict[tuple[int, int], list[Any]] = {}
        ends = []
        for message in messages:
            source = self._topics.index(str(message.topic()))
            place = source, int(message.partition() or 0)
            if (error := message.error()) is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    ends.append(place)
                elif error.fatal() or error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
                    raise DependencyUnreachable(f"Kafka: {message.topic()}[{message.partition()}]: {error.str()}")
                continue
            pieces.setdefault(place, []).append(message)
        # Profiles first: they say who belongs to which segment.
        for (source, partition), piece in sorted(pieces.items(), key=lambda item: item[0][0] != len(TOPICS) - 1):
            self.watcher.take(source, partition, piece)
        for place in ends:
            self.watcher.ended(*place)
        if pieces:
            self._idle_since, self._dirty = time.monotonic(), True
            self.meters.records.inc(sum(map(len, pieces.values())))
        verdicts = self.watcher.advance(time.time_ns() // 1_000_000)
        if verdicts or (self._dirty and time.monotonic() - self._stored_at > STORE_S):
            self.store(verdicts)
        elif self.unsent:
            self._send()
        self._measure()
        self.cpu_seconds += time.thread_time() - begin

    def store(self, verdicts: list[dict[str, Any]]) -> None:
        """Verdicts, state and offsets in one transaction; then the webhook. All of it comes again, or none."""
        if not (verdicts or self._dirty):
            return
        if self._webhook is not None:
            self.unsent += verdicts
        body = orjson.dumps(self.unsent) + b"\n" + self.watcher.state()
        self._producer.begin_transaction()
        for verdict in verdicts:
            self._producer.produce(self._drift, orjson.dumps(verdict), verdict["key"].encode(), partition=0)
        self._producer.produce(self._state, body, STATE, partition=0)
        read = sorted(self.watcher.positions.items())
        offsets = [TopicPartition(self._topics[source], partition, offset) for (source, partition), offset in read]
        if offsets:
            self._transact(self._producer.send_offsets_to_transaction, offsets, self._consumer.consumer_group_metadata())
        self._transact(self._producer.commit_transaction, self._settings.dependency_timeout_s)
        self._stored_at, self._dirty = time.monotonic(), False
        self.verdicts += len(verdicts)
        for verdict in verdicts:
            nature = verdict["causes"][0]["nature"] if verdict["causes"] else "none"
            self.meters.verdicts.labels(verdict["kind"], nature).inc()
            log.warning("%s: %s", verdict["kind"], verdict["summary"])
        self._send()

    def _send(self) -> None:
        """What the webhook has not taken yet, in order; what it takes is remembered with the next state."""
        while self._webhook is not None and self.unsent and self._webhook.send(self.unsent[0]):
            self.unsent.pop(0)
            self._dirty = True

    def _transact(self, call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except KafkaException as error:
            if error.args[0].code() in (KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH):
                raise BadUsage("another drift watch of this deployment has taken over") from error
            raise DependencyUnreachable(f"Kafka: the drift watch could not write: {error.args[0].str()}") from error

    def _measure(self) -> None:
        for window, distances in self.watcher.distances.items():
            for measure, values in zip(("psi", "ks"), distances, strict=True):
                self.meters.distance.labels(measure, window).set(float(values[0, 0]))
        self.meters.episodes.set(len(self.watcher.open_episodes))
        self.meters.watermark.set(max(self.watcher.watermark_ms, 0) / 1_000)
        self.meters.unsent.set(len(self.unsent))
        names = ("all", *self.watcher.reference.baseline.segments)
        for name, (covered, active) in zip(names, self.watcher.coverage() if self._settings.metrics_port else (), strict=False):
            if active:
                self.meters.covered.labels(name).set(covered / active)

    def summary(self) -> dict[str, Any]:
        """What was done since the start."""
        return {
            "records": self.watcher.records_read,
            "scores": self.watcher.scores_read,
            "verdicts": self.verdicts,
            "open_episodes": [episode.key for episode in self.watcher.open_episodes],
            "watermark_ms": self.watcher.watermark_ms,
            "webhooks_waiting": len(self.unsent),
            "cpu_seconds": round(self.cpu_seconds, 3),
        }


def watch_agent(app: faust.App, channel: Any, process: Callable[[list[Message]], None], pool: ThreadPoolExecutor) -> None:
    """The agent: one piece at a time, in a thread of its own, so that Faust's loop stays live."""

    @app.agent(channel, name="drift", concurrency=1)
    async def watch(pieces: StreamT[Piece]) -> AsyncIterator[None]:
        async for piece in pieces:
            if not piece.done.done():
                try:
                    await asyncio.get_running_loop().run_in_executor(pool, process, piece.messages)
                except Exception as error:
                    piece.done.set_exception(error)  # to the loop, which ends the process; raised here, Faust would go on
                else:
                    piece.done.set_result(None)
            yield
