"""How fast lost state comes back: all keys are removed, then every partition is rebuilt from its topics, and once more from a snapshot.

    python -m bench.rebuild [--events 400000] [--json]

Scores are those of the fallback: the model is not asked when state is rebuilt. The rate per CPU second counts everything this process
does (fetching, decoding, histories, comparing with what was emitted, writing to Redis), not the servers.
"""

from __future__ import annotations

import argparse
import gc
import json
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.generate import generate
from features.facts import TOPICS
from features.history import digest
from features.redis_store import RedisStore
from streams.log import KafkaLog
from streams.main import GC_THRESHOLDS
from streams.metrics import Metrics, Parts
from streams.rebuild import Restorer, RestoreSettings
from streams.settings import load
from streams.snapshot import Snapshots, take
from streams.stack import from_settings, up
from streams.state_store import open_store
from streams.topics import client_config, producer_config
from streams.training import decoder
from streams.trial import Trial, stop


def states(store: RedisStore, partitions: int) -> dict[str, tuple[str, bytes]]:
    """Every customer's digest and main."""
    found = {}
    for partition in range(partitions):
        names = list(store.customers(partition))
        for name, state in zip(names, store.load(partition, names), strict=True):
            assert state is not None
            found[name] = digest(state), state.main
    return found


def lose(address: str, namespace: str) -> None:
    """Remove every key of a namespace."""
    from redis import Redis

    with Redis.from_url(address) as redis:
        keys = list(redis.scan_iter(match=f"{namespace}:*", count=5_000))
        for first in range(0, len(keys), 5_000):
            redis.unlink(*keys[first : first + 5_000])


def restore(restorer: Restorer, store: RedisStore, partitions: int) -> tuple[float, float, int]:
    """Wall and CPU seconds until every partition stands again, and the events its counters speak of."""
    wall, cpu = time.perf_counter(), time.process_time()
    events = 0
    for partition in range(partitions):
        claim = restorer.restore(store.claim(partition, secrets.token_hex(16)))
        events += claim.counters["events"]
    return time.perf_counter() - wall, time.process_time() - cpu, events


def measure(events: int, customers: int) -> dict[str, Any]:
    """The whole run; the figures as one flat object."""
    settings = load()
    gc.set_threshold(*GC_THRESHOLDS)  # as in a worker
    started = up(settings)
    try:
        trial = Trial(settings, started.endpoints.kafka, started.endpoints.redis, "rebuild")
        own = trial.settings
        trial.command("topics", "create", "--json")
        generate(events, customers=customers, seed=7, prefix=own.topic_prefix, config=producer_config(own))
        with tempfile.TemporaryDirectory() as scratch:
            process = trial.start(Path(scratch) / "worker.log", "--until-idle", "2")
            process.wait(timeout=600)
            summary = stop(process)
            if process.returncode:
                raise SystemExit((Path(scratch) / "worker.log").read_text(encoding="utf-8")[-3000:])
            store = open_store(own, trial.redis)
            before = states(store, own.partitions)
            snapshots = Snapshots(Path(scratch) / "snapshots", own.namespace)
            began = time.perf_counter()
            paths = [take(store, snapshots, partition, time.time_ns() // 1_000_000) for partition in range(own.partitions)]
            took = time.perf_counter() - began
            size = sum(path.stat().st_size for path in paths)
            source = KafkaLog(client_config(own), timeout_s=30)
            metrics, parts = Metrics(), Parts()
            names = RestoreSettings(
                inputs=[own.prefixed(topic) for topic in TOPICS],
                scores=own.prefixed("churn-scores"),
                dead_letters=own.prefixed("churn-dead-letters"),
                alerts=own.prefixed("churn-alerts"),
                max_facts=own.max_facts_in_memory,
            )
            restorer = Restorer(names, store, source, decoder(own), metrics, None, parts)
            lose(trial.redis, own.namespace)
            wall, cpu, restored = restore(restorer, store, own.partitions)
            after = states(store, own.partitions)
            lose(trial.redis, own.namespace)
            restorer = Restorer(names, store, source, decoder(own), metrics, snapshots)
            quick_wall, quick_cpu, _ = restore(restorer, store, own.partitions)
            again = states(store, own.partitions)
            source.close()
            store.close()
        samples = [sample for metric in metrics.registry.collect() for sample in metric.samples]
        differences = sum(sample.value for sample in samples if sample.name == "churn_restore_differences_total")
    finally:
        if started.started:
            from_settings(settings).down(started.started)
    return {
        "events": summary["events_in"],
        "restored_events": restored,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "events_per_second": round(restored / wall),
        "events_per_cpu_second": round(restored / cpu),
        "cpu_us_per_event_by_part": {name: round(1e6 * seconds / restored, 2) for name, seconds in parts.cpu.items()},
        "customers": len(before),
        "different_states": sum(before.get(name) != after.get(name) for name in before.keys() | after.keys()),
        "different_states_from_snapshot": sum(before.get(name) != again.get(name) for name in before.keys() | again.keys()),
        "differences_reported": int(differences),
        "snapshot_seconds": round(took, 2),
        "snapshot_bytes_per_customer": round(size / len(before)),
        "from_snapshot_seconds": round(quick_wall, 2),
        "from_snapshot_customers_per_second": round(len(before) / quick_wall),
        "from_snapshot_cpu_seconds": round(quick_cpu, 2),
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    figures = measure(arguments.events, arguments.customers)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
