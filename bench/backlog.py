"""One worker against a backlog: scores per second, CPU seconds by part and by process, bytes per customer.

    python -m bench.backlog [--events 600000] [--trees 200] [--depth 6] [--not-low 0.21]
        [--delivery exactly_once | both] [--json]

Kafka, Redis and the worker share the machine. The model is as large as the peers' (200 trees of depth 6), trained on vectors of a
stream like the measured one; its probabilities mean nothing. `--not-low` is the share of vectors above its medium threshold; those and
those that moved to another band carry reasons (`share_explained`). The rate counts from the broker's clock on the score topic, from the
score at 10 % of the backlog on, so that start and warm-up are outside. With `--delivery both` the same backlog is measured in both
modes, one after the other, and `exactly_once_share` is the rate of exactly_once by that of at_least_once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.generate import generate
from bench.model import NOT_LOW, publish_model
from streams.settings import load
from streams.stack import from_settings, up
from streams.topics import client_config, producer_config
from streams.trial import Trial, stop


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def append_times(client: dict[str, Any], topic: str, expected: int, timeout_s: float) -> tuple[np.ndarray, dict[str, int], int]:
    """Append time of every score (ms), how many fell into each band, and how many carry reasons."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({**client, "group.id": "bench-reader", "enable.auto.commit": False, "auto.offset.reset": "earliest"})
    times: list[int] = []
    bands: dict[str, int] = {}
    explained = 0
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        deadline = time.monotonic() + timeout_s
        while len(times) < expected and time.monotonic() < deadline:
            for message in consumer.consume(5_000, 0.5):
                if message.error() is None:
                    value = message.value() or b""
                    times.append(message.timestamp()[1])
                    start = value.index(b'"band":"') + 8
                    band = value[start : value.index(b'"', start)].decode()
                    bands[band] = bands.get(band, 0) + 1
                    explained += b'"reasons":[]' not in value
    finally:
        consumer.close()
    return np.sort(np.array(times, np.int64)), bands, explained


def measure(events: int, customers: int, trees: int, depth: int, not_low: float, delivery: str) -> dict[str, Any]:
    """The whole run; the figures as one flat object."""
    from features.redis_store import RedisStore, redis_bytes

    settings = load()
    started = up(settings)
    try:
        servers = {server.name: server.pid for server in from_settings(settings).status()}
        trial = Trial(settings, started.endpoints.kafka, started.endpoints.redis, "bench", {"CHURN_DELIVERY": delivery})
        own = trial.settings
        trial.command("topics", "create", "--json")
        generate(events, customers=customers, seed=7, prefix=own.topic_prefix, config=producer_config(own))
        digest = publish_model(own, trees=trees, depth=depth, not_low=not_low)
        before = {name: cpu_seconds(pid) for name, pid in servers.items()}
        with tempfile.TemporaryDirectory() as scratch:
            process = trial.start(Path(scratch) / "worker.log", "--until-idle", "2")
            process.wait(timeout=600)
            used = {name: cpu_seconds(pid) - before[name] for name, pid in servers.items()}
            summary = stop(process)
            if process.returncode:
                raise SystemExit((Path(scratch) / "worker.log").read_text(encoding="utf-8")[-3000:])
        times, bands, explained = append_times(client_config(own), own.prefixed("churn-scores"), summary["scores"], 60)
        first = len(times) // 10
        seconds = (times[-1] - times[first]) / 1_000
        million = 1e6 / summary["events_in"]
        store = redis_bytes(RedisStore(trial.redis, namespace=trial.name), range(own.partitions))
    finally:
        if started.started:
            from_settings(settings).down(started.started)
    return {
        "delivery": delivery,
        "events": summary["events_in"],
        "scores": len(times),
        "residue": summary["residue"],
        "scores_per_second": round(float((len(times) - 1 - first) / seconds)),
        "worker_events_per_second": summary["events_per_second"],
        "worker_cpu_seconds_per_million": round(summary["cpu_seconds"] * million, 2),
        "events_per_cpu_second": round(summary["events_in"] / summary["cpu_seconds"]),
        "kafka_cpu_seconds_per_million": round(used.get("kafka", 0.0) * million, 2),
        "redis_cpu_seconds_per_million": round(used.get("redis", 0.0) * million, 2),
        "cpu_seconds_per_million_by_part": {k: round(v * million, 2) for k, v in summary["parts_cpu_seconds"].items()},
        "wall_seconds_per_million_by_part": {k: round(v * million, 2) for k, v in summary["parts_wall_seconds"].items()},
        "share_explained": round(explained / len(times), 4),
        "bands": bands,
        "model": {"digest": digest, "trees": trees, "depth": depth},
        "worker_max_rss_mb": summary["max_rss_mb"],
        "customers": store["customers"],
        "redis_value_bytes_p50": store["value_bytes_p50"],
        "redis_value_bytes_p99": store["value_bytes_p99"],
        "redis_memory_bytes_p50": store["memory_bytes_p50"],
        "redis_memory_bytes_p99": store["memory_bytes_p99"],
        "cores": os.cpu_count(),
    }


def both(events: int, customers: int, trees: int, depth: int, not_low: float) -> dict[str, Any]:
    """At least once, exactly once, and what the second costs."""
    one, two = (measure(events, customers, trees, depth, not_low, delivery) for delivery in ("at_least_once", "exactly_once"))
    names = ("scores_per_second", "events_per_cpu_second", "worker_cpu_seconds_per_million")
    return {
        "exactly_once_share": round(two["scores_per_second"] / one["scores_per_second"], 3),
        "exactly_once_share_per_cpu_second": round(two["events_per_cpu_second"] / one["events_per_cpu_second"], 3),
        "residue": abs(one["residue"]) + abs(two["residue"]),
        **{f"{name}_{figures['delivery']}": figures[name] for figures in (one, two) for name in names},
        "at_least_once": one,
        "exactly_once": two,
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=600_000)
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--not-low", type=float, default=NOT_LOW, help="share of vectors above the medium threshold")
    parser.add_argument("--delivery", choices=("at_least_once", "exactly_once", "both"), default="at_least_once")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    size = (arguments.events, arguments.customers, arguments.trees, arguments.depth, arguments.not_low)
    figures = both(*size) if arguments.delivery == "both" else measure(*size, arguments.delivery)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
