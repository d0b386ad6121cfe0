"""A backlog through one engine: rate, CPU, memory, network, from its first score to its last; start-up stands apart."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench.peers.engines import Died, Engine, Ours, consumer, remove_state
from bench.peers.meter import Meter, Reading
from bench.peers.workload import index_of
from streams.settings import Settings

LOOK_S: Final = 0.1
FIRST_S: Final = 120.0
STILL_S: Final = 1.0
STUCK_S: Final = 20.0
EQUAL_WITHIN: Final = 1e-4
"""As the peers' workload has it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is: the deployment with the backlog, the servers' pids, a Redis client, a scratch directory.

    slow_s: how long a slow engine is measured (s).
    """

    settings: Settings
    servers: dict[str, int]
    redis: Any
    scratch: Path
    slow_s: float


@dataclass(frozen=True, slots=True)
class Out:
    """The score topic of a run as read to its end: place of each event in the stream, its score, append time (ms), whether explained."""

    index: npt.NDArray[np.int64]
    score: npt.NDArray[np.float64]
    append_ms: npt.NDArray[np.int64]
    explained: int


def measure(engine: Engine, place: Place, events: int, expected: npt.NDArray[np.float32] | None) -> dict[str, Any]:
    """One run. expected: what our scores have to be, to count how many are. Raises Died when the engine does not get through."""
    run = f"{engine.name.replace('_', '-')}-{time.time_ns() // 1_000_000}"
    idle_bytes = place.redis.info("memory")["used_memory"]
    running = engine.start(place.settings, run, place.scratch)
    meter = Meter(running.process.pid, place.servers, place.redis)
    try:
        readings = _watch(engine, place, running, meter, events)
        memory = place.redis.info("memory")["used_memory"] - idle_bytes
        running.stop()
        out = _read(place.settings, running.scores)
        sizes = _redis(place, run) if isinstance(engine, Ours) else {}
    finally:
        running.stop()
        engine.clean(place.settings, run)
        remove_state(place.scratch, run)
    unique = np.unique(out.index)
    first, last = readings[0], readings[-1]
    ended = next(r for r in readings if r[0] == last[0])
    scale = len(out.index) / last[0]  # markers of transactions count in the end offsets
    whole = ended[1].since(first[1])
    scored = (ended[0] - first[0]) * scale
    middle = readings[readings.index(ended) // 2]
    half, half_scored = ended[1].since(middle[1]), (ended[0] - middle[0]) * scale
    row = {
        "engine": engine.name,
        "events": events,
        "scores": len(out.index),
        "unique": len(unique),
        "complete": len(unique) == events,
        "scores_per_second": round(scored / whole.at_s),
        "events_per_cpu_second": round(scored / whole.engine),
        "second_half_scores_per_second": round(half_scored / half.at_s),
        "second_half_events_per_cpu_second": round(half_scored / half.engine) if half.engine else 0,
        "wall_s": round(whole.at_s, 2),
        "cpu_s": round(whole.engine, 2),
        "broker_cpu_s_per_million": round(1e6 * whole.broker / scored, 2),
        "redis_cpu_s_per_million": round(1e6 * whole.redis / scored, 2),
        "others_cores": round((whole.machine - whole.engine - whole.broker - whole.redis) / whole.at_s, 2),
        "startup_s": round(float(out.append_ms.min()) / 1e3 - running.started_ns / 1e9, 2),
        "peak_rss_mb": round(meter.peak_mb),
        "network_bytes_per_event": round(whole.network / scored),
        "redis_network_bytes_per_event": round(whole.redis_network / scored),
        "redis_bytes": memory,
        "share_explained": round(out.explained / len(out.index), 4),
        **sizes,
    }
    if expected is not None:
        apart = np.abs(expected[out.index] - out.score)
        row["agree"] = round(float(np.mean(apart < EQUAL_WITHIN)), 5)
        row["equal"] = round(float(np.mean(expected[out.index] == out.score.astype(np.float32))), 5)
    return row


def _watch(engine: Engine, place: Place, running: Any, meter: Meter, events: int) -> list[tuple[int, Reading]]:
    """(end offsets in sum, counters) from the first score on."""
    from confluent_kafka import TopicPartition

    client = consumer(place.settings)
    readings: list[tuple[int, Reading]] = []
    begin = moved = time.monotonic()
    still_s = 3.0 if engine.exactly_once else STILL_S
    try:
        while True:
            time.sleep(LOOK_S)
            running.check()
            topics = [TopicPartition(running.scores, number) for number in range(place.settings.partitions)]
            ends = [client.get_watermark_offsets(topic, timeout=10, cached=False)[1] for topic in topics]
            count = sum(ends)
            reading = meter.read()
            if not count:
                if reading.at_s - begin > FIRST_S:
                    raise Died(f"no score within {FIRST_S:g} s: {running.tail()}")
                continue
            if not readings or count != readings[-1][0]:
                moved = reading.at_s
            readings.append((count, reading))
            still = reading.at_s - moved
            if (count >= events and still > still_s) or still > STUCK_S:
                return readings
            if engine.slow and reading.at_s - readings[0][1].at_s > place.slow_s:
                return readings
    finally:
        client.close()


def _read(settings: Settings, topic: str) -> Out:
    index: list[int] = []
    score: list[float] = []
    append: list[int] = []
    explained = 0
    for message in _messages(settings, topic):
        value: bytes = message.value()
        index.append(index_of(_text(value, b'"event_id":"', b'"').decode()))
        score.append(float(_text(value, b'"probability":' if b'"probability":' in value else b'"score":', b",")))
        append.append(message.timestamp()[1])
        explained += b'"reasons":[{' in value
    return Out(np.array(index, np.int64), np.array(score), np.array(append, np.int64), explained)


def append_times(settings: Settings, topic: str) -> npt.NDArray[np.int64]:
    """Append time (ms) of each record of a topic, as a read_committed reader sees them."""
    return np.fromiter((message.timestamp()[1] for message in _messages(settings, topic)), np.int64)


def _messages(settings: Settings, topic: str) -> Iterator[Any]:
    """All records of a topic up to its end now."""
    from confluent_kafka import KafkaError, TopicPartition

    ended = 0
    client = consumer(settings, **{"enable.partition.eof": True})
    try:
        client.assign([TopicPartition(topic, number, 0) for number in range(settings.partitions)])
        while ended < settings.partitions:
            messages = client.consume(10_000, 5.0)
            if not messages:
                raise SystemExit(f"reading {topic}: nothing for 5 s and {ended} of {settings.partitions} partitions at their end")
            for message in messages:
                if (error := message.error()) is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended += 1
                else:
                    raise SystemExit(f"reading {topic}: {error.str()}")
    finally:
        client.close()


def _text(value: bytes, before: bytes, after: bytes) -> bytes:
    start = value.index(before) + len(before)
    return value[start : value.index(after, start)]


def _redis(place: Place, run: str) -> dict[str, Any]:
    from features.redis_store import RedisStore, redis_bytes

    found = redis_bytes(RedisStore(place.settings.redis_url.get_secret_value(), namespace=run), range(place.settings.partitions))
    names = ("customers", "value_bytes_p50", "memory_bytes_p50", "memory_bytes_p99")
    return {f"redis_{name}": round(found[name]) for name in names}
