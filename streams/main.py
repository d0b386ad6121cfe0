"""The worker put together: the only place where concrete classes meet, and where the process lives and ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import secrets
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from features.facts import TOPICS
from features.redis_store import RedisStore
from features.store import Claim
from proto.errors import BadInput, DependencyUnreachable, MemoryOutgrown
from scoring.fallback import Fallback
from scoring.reasons import Money
from scoring.scorer import load as load_model
from streams.agents import Feeder, faust_app, scoring_agent
from streams.breaker import Breaker
from streams.codec import Decoder, exponent_of
from streams.engine import CRASH_VARIABLE, Engine, EngineSettings, Result, crash_point
from streams.ingest import Ingest, IngestSettings
from streams.log import KafkaLog
from streams.metrics import Metrics
from streams.outbox import Tail
from streams.rebuild import Restorer, RestoreSettings
from streams.reload import Reload, ReloadSettings
from streams.settings import Settings
from streams.sink import KafkaSink, SinkSettings, Transactions, settle
from streams.snapshot import Snapshots, Snapshotter
from streams.state_store import StoreWatch, open_store
from streams.topics import ALERTS, DEAD_LETTERS, FEATURES, SCORES

log = logging.getLogger(__name__)

STOP_S: Final = 10.0
"""A stop that takes longer ends hard: nothing is lost, the open intent repeats the batch."""
RESULT_S: Final = 5.0
"""How much longer than the watchdog, which ends a worker that lags at once, the feeder waits for the result of an item."""
EXIT_HARD: Final = 1
GC_THRESHOLDS: Final = (100_000, 20, 20)


def log_to_stderr(level: str) -> None:
    """Log lines of the process to stderr; libraries only from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("streams").setLevel(level)


def create_control_topic(admin: AdminClient, name: str, replication: int, timeout_s: float) -> None:
    """The one topic Faust reads, of this process alone. Short-lived: a worker that is killed leaves it behind, empty."""
    topic = NewTopic(name, 1, replication, config={"retention.ms": "60000", "segment.ms": "60000"})
    try:
        admin.create_topics([topic], request_timeout=timeout_s)[name].result(timeout_s + 1)
    except KafkaException as error:
        raise DependencyUnreachable(f"Kafka: the control topic {name} could not be made: {error.args[0].str()}") from error


def delete_topic(admin: AdminClient, name: str, timeout_s: float) -> None:
    """Delete a topic; that it stays is no reason to fail."""
    try:
        admin.delete_topics([name], request_timeout=timeout_s)[name].result(timeout_s + 1)
    except (KafkaException, TimeoutError) as error:
        log.warning("control topic %s stays behind: %s", name, error)


def resident_mb() -> int:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


@dataclass(slots=True)
class Watchdog:
    """Ends the process when it does not get on, from a thread of its own: it must not depend on a loop that may hang.

    Times are seconds of the monotonic clock.
    """

    behind: Callable[[], bool]
    timeout_s: float
    stalled_s: float = 0.0  # for how long records have waited
    _moved_at: float = field(default_factory=time.monotonic)
    _stop_by: float | None = None
    _done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def moved(self) -> None:
        """A batch was applied."""
        self._moved_at = time.monotonic()

    def stopping(self) -> None:
        """From now on the process has STOP_S to end."""
        self._stop_by = self._stop_by or time.monotonic() + STOP_S

    def done(self) -> None:
        """Watch no longer."""
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(0.25):
            now = time.monotonic()
            self.stalled_s = now - self._moved_at
            if self._stop_by is not None:
                if now > self._stop_by:
                    log.critical("not stopped within %g s: ending hard", STOP_S)
                    os._exit(EXIT_HARD)
            elif not self.behind():
                self._moved_at, self.stalled_s = now, 0.0
            elif now > self._moved_at + self.timeout_s:
                log.critical(
                    "records wait, or the group does not take us in, and none was applied for %g s: ending, to be started afresh",
                    self.timeout_s,
                )
                os._exit(EXIT_HARD)


class Worker:
    """One worker process from start to end."""

    def __init__(self, settings: Settings, client: dict[str, Any], redis_url: str, *, until_idle_s: float | None = None) -> None:
        self._settings, self._client, self._redis_url, self._until_idle_s = settings, client, redis_url, until_idle_s
        self._metrics = Metrics()
        self._outgrown = ""  # why memory is no longer enough
        self._last = (0.0, 0.0)  # perf_counter and CPU seconds of the process when the last item was applied

    def run(self) -> dict[str, Any]:
        """Work until told to stop (or idle); returns the summary. Raises what ended it otherwise."""
        return asyncio.run(self._main())

    async def _main(self) -> dict[str, Any]:
        s = self._settings
        loop = asyncio.get_running_loop()
        metrics = self._metrics
        server = metrics.serve(s.metrics_port) if s.metrics_port else None
        # What may pass is waited for as long as the watchdog waits for an applied batch: nothing is lost meanwhile.
        store = open_store(s, self._redis_url, patience_s=s.progress_timeout_s)
        money = Money(s.currency, exponent_of(s.currency))
        reload = Reload(
            ReloadSettings(self._client, s.prefixed("churn-models"), s.dependency_timeout_s),
            lambda envelope: load_model(envelope, money=money),
            Fallback(s.fallback_probability),
            metrics,
        )
        inputs = [s.prefixed(topic) for topic in TOPICS]
        ingest: Ingest
        outputs = SinkSettings(
            self._client,
            s.prefixed(SCORES),
            s.prefixed(DEAD_LETTERS),
            s.progress_timeout_s,
            s.prefixed(ALERTS),
            s.prefixed(FEATURES),
        )
        sink: KafkaSink | Transactions = KafkaSink(outputs)
        if s.delivery == "exactly_once":
            sink = Transactions(outputs, s.topic_prefix + s.group_id, lambda place: reached(place))  # noqa: PLW0108 - made below, from this one
        reached = crash_point(os.environ.get(CRASH_VARIABLE, ""), dict.fromkeys(("half_produced", "after_produce"), sink.flush))
        engine = Engine(
            EngineSettings(s.max_facts_in_memory, s.reasons_top, s.alert_hysteresis, s.feature_log),
            store,
            reload,
            sink,
            lambda: time.time_ns() // 1_000_000,
            metrics,
            reached,
        )

        name = f"{s.topic_prefix}churnstream-{secrets.token_hex(6)}"
        control = f"{s.topic_prefix}control-{name.rsplit('-', 1)[1]}"
        admin = AdminClient(self._client, logger=log)
        await asyncio.gather(
            loop.run_in_executor(None, create_control_topic, admin, control, s.replication, s.dependency_timeout_s),
            loop.run_in_executor(None, reload.start),
        )

        decoder = Decoder(
            currency=s.currency,
            rates=s.rates,
            future_ms=s.future_allowance_ms,
            max_bytes=s.max_event_bytes,
            digest_key=s.digest_key.get_secret_value().encode(),
        )
        source = KafkaLog(self._client, timeout_s=s.dependency_timeout_s)
        snapshots = Snapshots(s.snapshot_dir, s.namespace, s.snapshot_keep) if s.snapshot_dir is not None else None
        restorer = Restorer(
            RestoreSettings(
                inputs=inputs,
                scores=s.prefixed(SCORES),
                dead_letters=s.prefixed(DEAD_LETTERS),
                alerts=s.prefixed(ALERTS),
                max_facts=s.max_facts_in_memory // 4,
                largest_batch=s.batch_max_events,
                incomplete=s.rebuild_incomplete,
                whole=s.delivery == "exactly_once",
            ),
            open_store(s, self._redis_url, patience_s=s.progress_timeout_s),  # of its own: it works in another thread
            source,
            decoder,
            metrics,
            snapshots,
        )
        tail = Tail(source, s.prefixed(SCORES), s.prefixed(DEAD_LETTERS))

        def restore(claim: Claim, wanted: Callable[[], bool]) -> Claim:
            settle(claim, sink, tail)
            return restorer.restore(claim, wanted)

        snapshotter = None
        if snapshots is not None:
            copying = open_store(s, self._redis_url, patience_s=s.progress_timeout_s)
            snapshotter = engine.keeper = Snapshotter(snapshots, store, copying, s.snapshot_interval_s, metrics)
            snapshotter.start()

        feeder: Feeder
        app = faust_app(
            name, str(self._client["bootstrap.servers"]), s.kafka, control, lambda command: feeder.drain() if command == "drain" else None
        )
        channel: Any = app.channel(value_type=None, maxsize=1)
        ingest = Ingest(
            IngestSettings(
                self._client,
                s.topic_prefix + s.group_id,
                inputs,
                s.batch_max_events,
                s.batch_linger_ms / 1_000,
                s.buffer_bytes,
                s.dependency_timeout_s,
            ),
            decoder,
            engine,
            lambda: feeder.wake(),  # noqa: PLW0108 - the feeder is made below, it needs this consumer
            reached,
            metrics.unconverted.inc,
            restore,
        )
        watchdog = Watchdog(lambda: not feeder.progress.paused and ingest.behind(), s.progress_timeout_s)
        metrics.stalled.set_function(lambda: watchdog.stalled_s)
        metrics.accounting.counters = engine.accounts
        breaker = Breaker(s.dead_letter_limit)

        def on_result(result: Result) -> None:
            if result.applied:
                watchdog.moved()
            if why := breaker.note(result.counters.get("events", 0), result.counters.get("dead_letters", 0), time.monotonic()):
                log.critical(
                    "paused: %s. That is rather the fault of a producer than of its data: look at them with `churnstream dlq list`, start "
                    "this worker again when that is over; CHURN_DEAD_LETTER_LIMIT=1 lets everything pass",
                    why,
                )
                feeder.pause(why)
                metrics.paused.set(1)
            self._last = (time.perf_counter(), time.process_time())
            ingest.applied(result.applied)
            for partition in result.fenced:
                ingest.drop(partition)
            for partition in result.broken:
                ingest.drop(partition, again_s=0.0)

        def glance(store: RedisStore) -> None:
            lost = engine.compare(store.standings)
            for partition in lost.fenced:
                ingest.drop(partition)
            for partition in lost.broken:
                ingest.drop(partition, again_s=0.0)

        store_watch = StoreWatch(open_store(s, self._redis_url, patience_s=0), metrics, glance=glance)
        feeder = Feeder(channel, ingest.take, lambda: ingest.caught_up, on_result, result_timeout_s=s.progress_timeout_s + RESULT_S)
        scoring_agent(app, channel, engine.process, lambda: feeder.progress)

        def stop() -> None:
            watchdog.stopping()  # from here on: the item in work may be what hangs
            feeder.drain()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        watchdog.start()
        store_watch.start()
        try:
            ingest.start()  # joins its group in the second that Faust's start takes
            await app.start()
            await app.add_runtime_dependency(feeder)
            log.info("worker %s started", name)
            # Every message is an object the cycle collector looks at, and none of ours is in a cycle: look rarely, and never
            # again at what the imports left.
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLDS)
            await self._until_done(feeder, ingest)
            watchdog.stopping()
            reached("on_stop")
            # Between two batches: nothing is in flight, so what was applied is committed and the partitions are given up.
            ingest.stop()
            await loop.run_in_executor(None, ingest.join, STOP_S)
        finally:
            watchdog.stopping()
            store_watch.stop()
            if snapshotter is not None:
                await loop.run_in_executor(None, snapshotter.stop)
            reloading = loop.run_in_executor(None, reload.stop)
            await app.stop()
            await loop.run_in_executor(None, delete_topic, admin, control, 2.0)
            await reloading
            if server is not None:
                server.shutdown()
            watchdog.done()
        if feeder.progress.failure is not None:
            raise feeder.progress.failure
        if self._outgrown:
            raise MemoryOutgrown(self._outgrown)
        if ingest.failure is not None:
            raise ingest.failure
        log.info("worker %s stopped", name)
        if self._until_idle_s is not None and feeder.progress.paused:
            raise BadInput(f"paused before all was handled: {feeder.progress.paused}")
        return self._summary(engine, ingest, feeder)

    async def _until_done(self, feeder: Feeder, ingest: Ingest) -> None:
        loop = asyncio.get_running_loop()
        resent = 0
        while not feeder.ended.is_set():
            await asyncio.wait([asyncio.ensure_future(feeder.ended.wait())], timeout=0.1)
            self._metrics.resent.inc(feeder.progress.resent - resent)
            resent = feeder.progress.resent
            for partition, lag in ingest.lags().items():
                self._metrics.lag.labels(str(partition)).set(lag)
            idle_since = feeder.progress.idle_since
            if self._until_idle_s is not None and feeder.progress.paused:
                feeder.drain()
            if (limit := self._settings.memory_limit_mb) and (now := resident_mb()) > limit and not self._outgrown:
                self._outgrown = (
                    f"resident memory is {now} MB, above CHURN_MEMORY_LIMIT_MB={limit}: stopped before the system ends it hard; start it "
                    "afresh, and lower CHURN_MAX_FACTS_IN_MEMORY or CHURN_BUFFER_BYTES when that comes again"
                )
                log.critical("%s", self._outgrown)
                feeder.drain()
            if self._until_idle_s is not None and idle_since is not None and loop.time() - idle_since >= self._until_idle_s:
                feeder.drain()

    def _summary(self, engine: Engine, ingest: Ingest, feeder: Feeder) -> dict[str, Any]:
        totals = engine.totals
        events = totals["events"]
        wall = max(self._last[0] - engine.began[0], 1e-9) if engine.began else 0.0
        cpu = self._last[1] - engine.began[1] if engine.began else 0.0
        return {
            "events_in": events,
            **{name: totals[name] for name in ("scores", "dead_letters", "duplicates", "duplicate_conflicts", "profile_facts")},
            "residue": sum(abs(x) for x in engine.residues().values()),
            "seconds": round(wall, 3),
            "events_per_second": round(events / wall, 1) if wall else 0.0,
            "cpu_seconds": round(cpu, 3),
            "items": engine.items,
            "items_resent": feeder.progress.resent,
            "largest_batch": engine.largest_batch,
            "max_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "model_version": engine.model_version,
            "parts_cpu_seconds": {k: round(v, 4) for p in (ingest.parts, ingest.merging, engine.parts) for k, v in p.cpu.items()},
            "parts_wall_seconds": {k: round(v, 4) for p in (ingest.parts, ingest.merging, engine.parts) for k, v in p.wall.items()},
        }
