"""Every metric of the worker by name, and the clock that says where the time of an event goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version as installed
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from features.facts import TOPICS

OUTCOMES: Final = ("score", "profile_fact", "duplicate", "duplicate_conflict", "dead_letter")
COUNTERS: Final = ("events", "scores", "dead_letters", "duplicates", "duplicate_conflicts", "profile_facts")
"""Keys of the counters stored with a partition. `duplicates` counts conflicts as well; `duplicate_conflicts` says how many of them."""

_LATENCY_SECONDS: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 300.0)
_BATCH_EVENTS: Final = (1, 10, 100, 500, 1_000, 2_000, 4_000, 10_000)


def residue(counters: Mapping[str, int]) -> int:
    """Events in minus everything they may have become: 0, or the accounting is broken."""
    ends = counters["scores"] + counters["dead_letters"] + counters["duplicates"] + counters["profile_facts"]
    return counters["events"] - ends


class Accounting(Collector):
    """The counters of the owned partitions and their residue, worked out at every scrape.

    `counters` says them per partition; a dictionary it gives is not changed afterwards.
    """

    def __init__(self) -> None:
        self.counters: Callable[[], Mapping[int, Mapping[str, int]]] = dict

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        left = GaugeMetricFamily(
            "churn_accounting_residue",
            "Events minus scores, dead letters, duplicates, profile facts; 0 or a fault.",
            labels=["partition"],
        )
        records = CounterMetricFamily(
            "churn_partition_records", "Records of a partition since its beginning, and what became of them.", labels=["partition", "what"]
        )
        for partition, counters in sorted(self.counters().items()):
            left.add_metric([str(partition)], residue(counters))
            for name in COUNTERS:
                records.add_metric([str(partition), name], counters[name])
        yield left
        yield records


class Metrics:
    """The metrics of one worker process, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        events = Counter(
            "churn_events", "Input records handled, by topic and what became of them.", ["type", "outcome"], registry=self.registry
        )
        self.events = {(topic, outcome): events.labels(topic, outcome) for topic in TOPICS for outcome in OUTCOMES}
        self.latency = Histogram(
            "churn_score_latency_seconds", "Broker append time to acknowledged score.", buckets=_LATENCY_SECONDS, registry=self.registry
        )
        self.dead_letters = Counter("churn_dlq", "Records set aside, by reason.", ["reason"], registry=self.registry)
        self.model = Gauge("churn_model_info", "The model in force (value 1).", ["version", "sha"], registry=self.registry)
        self.accounting = Accounting()
        self.registry.register(self.accounting)
        self.paused = Gauge("churn_paused", "1 while nothing is handled: too many dead letters.", registry=self.registry)
        self.stalled = Gauge(
            "churn_stalled_seconds",
            "For how long records have waited and none was applied; the worker then ends.",
            registry=self.registry,
        )
        self.applied = Gauge("churn_applied_offset", "Highest offset handled.", ["topic", "partition"], registry=self.registry)
        self.lag = Gauge("churn_lag_records", "Records known to exist and not yet handled.", ["partition"], registry=self.registry)
        self.batch = Histogram("churn_batch_events", "Events of one batch.", buckets=_BATCH_EVENTS, registry=self.registry)
        self.alerts = Counter("churn_alerts", "Customers that moved to another alert band.", registry=self.registry)
        self.late = Counter("churn_events_late", "Scored events older than their customer's newest.", registry=self.registry)
        self.unconverted = Counter(
            "churn_amounts_unconverted", "Amounts left out for want of a rate; their events are counted.", registry=self.registry
        )
        self.fallbacks = Counter(
            "churn_fallback_scores", "Scores made without a model, or where it failed on the vector.", registry=self.registry
        )
        self.silence = Counter("churn_silence_scores", "Scores made at ticks, of customers nothing happened to.", registry=self.registry)
        self.fenced = Counter("churn_batches_fenced", "Batches refused because another worker owns the partition.", registry=self.registry)
        self.resent = Counter("churn_batches_resent", "Items sent again because Faust cleared its queue.", registry=self.registry)
        self.restored = Counter(
            "churn_restored_records", "Records handled again to restore state, by way.", ["way"], registry=self.registry
        )
        self.restore_differences = Counter(
            "churn_restore_differences",
            "What restored state and outputs disagree on: vector, score_missing, letter_missing, cut.",
            ["what"],
            registry=self.registry,
        )
        self.snapshots = Counter(
            "churn_snapshots", "Snapshots of partitions, by outcome: taken, failed.", ["outcome"], registry=self.registry
        )
        self.snapshot_time = Gauge(
            "churn_snapshot_timestamp_seconds", "When the newest snapshot was taken by this worker.", ["partition"], registry=self.registry
        )
        self.rebuilding = Gauge("churn_rebuilding", "1 while the state of a partition is rebuilt.", ["partition"], registry=self.registry)
        self.store_filled = Gauge(
            "churn_store_memory_ratio", "Memory in use by maxmemory of the fullest Redis server, 0 without a limit.", registry=self.registry
        )
        self.store_writable = Gauge("churn_store_writable", "0 while a Redis server refuses writes for its disk.", registry=self.registry)
        self.rejected_models = Counter(
            "churn_models_rejected",
            "Models, and decisions about them, that were refused, by what was wrong: signature, artifact.",
            ["what"],
            registry=self.registry,
        )
        for what in ("signature", "artifact"):
            self.rejected_models.labels(what)
        self.model_since = Gauge(
            "churn_model_since_timestamp_seconds", "When the model in force was taken into use here.", registry=self.registry
        )
        Gauge("churn_build_info", "Version of the service (value 1).", ["version"], registry=self.registry).labels(
            installed("churnstream")
        ).set(1)
        ProcessCollector(registry=self.registry)

    def model_in_force(self, version: str, digest: str) -> None:
        """Name the one model that scores from now on."""
        self.model.clear()
        self.model.labels(version, digest[:16]).set(1)
        self.model_since.set_to_current_time()

    def forget_partition(self, partition: int) -> None:
        """Drop the gauges of a partition that went to another worker."""
        self.lag.remove_by_labels({"partition": str(partition)})
        self.applied.remove_by_labels({"partition": str(partition)})

    def serve(self, port: int) -> Any:
        """Answer /metrics on every interface; returns the server, which has shutdown()."""
        server, _ = start_http_server(port, registry=self.registry)
        return server


_LOOKUP_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class LookupMetrics:
    """The metrics of a lookup process, on a registry of their own. models: where its follower of the model topic counts."""

    def __init__(self, models: Metrics) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "churn_lookups", "Lookups by method and outcome (OK, or why not).", ["method", "outcome"], registry=self.registry
        )
        self._seconds = Histogram(
            "churn_lookup_seconds", "Time of a lookup in the service.", ["method"], buckets=_LOOKUP_SECONDS, registry=self.registry
        )
        self.state_reads = Counter("churn_lookup_state_reads", "Round trips to the store; one for all who wait.", registry=self.registry)
        self.staleness = Gauge(
            "churn_lookup_staleness_seconds",
            "Staleness bound of a partition's state as a lookup would say it; NaN: not known.",
            ["partition"],
            registry=self.registry,
        )
        self.model = Gauge("churn_model_info", "The model in force (value 1).", ["version", "sha"], registry=self.registry)
        self.registry.register(models.rejected_models)

    def note(self, method: str, outcome: str, seconds: float) -> None:
        """A call ended."""
        self._calls.labels(method, outcome).inc()
        self._seconds.labels(method).observe(seconds)


@dataclass(slots=True)
class Parts:
    """Seconds spent by part of the way of an event; one object per thread, since the CPU clock is per thread."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body under `name`."""
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
            self.cpu[name] = self.cpu.get(name, 0.0) + time.thread_time() - cpu
