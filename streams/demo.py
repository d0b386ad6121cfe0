"""The demo: one shop's invoices as its history, a model from it, and the rest of its life scored live."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from proto.errors import ChurnError
from streams.console import Console
from streams.settings import Settings
from streams.trial import Trial

DATA: Final = Path(__file__).parent.parent / "data" / "online_retail_ii" / "invoices.csv.gz"
SPLIT: Final = "2010-12-01"
BATCH: Final = "500"
"""Events per partition and batch: small, so that the 10,000 events of the backlog make many batches to take a rate from."""
WAIT_S: Final = 60.0
RISKIEST: Final = 10


@dataclass(slots=True)
class ScoreReader:
    """Follows the score topic from its beginning in a thread: when each score came, by the broker's and by our clock."""

    client: Mapping[str, Any]
    topic: str
    append_ms: list[int] = field(default_factory=list)
    seen_ns: dict[str, int] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    last: dict[str, Any] = field(default_factory=dict)
    fallbacks: int = 0
    failure: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._thread = threading.Thread(target=self._run, name="scores", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read no further. Raises what stopped the reading before."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)
        if self.failure is not None:
            raise self.failure

    def wait_for(self, scores: int, worker: subprocess.Popen[str]) -> None:
        """Until so many scores have come. Raises ChurnError when the worker ends or nothing comes for a minute."""
        seen, moved = len(self.append_ms), time.monotonic()
        while len(self.append_ms) < scores:
            if self.failure is not None:
                raise self.failure
            if worker.poll() is not None:
                raise ChurnError(f"the worker ended with code {worker.returncode} at {len(self.append_ms)} of {scores} scores")
            if len(self.append_ms) != seen:
                seen, moved = len(self.append_ms), time.monotonic()
            elif time.monotonic() - moved > WAIT_S:
                raise ChurnError(f"no score for {WAIT_S:g} s at {seen} of {scores}")
            time.sleep(0.02)

    def _run(self) -> None:
        from confluent_kafka import Consumer, TopicPartition

        try:
            consumer = Consumer(
                {
                    **self.client,
                    "group.id": "churnstream-demo-reader",
                    "enable.auto.commit": False,
                    "auto.offset.reset": "earliest",
                    "fetch.wait.max.ms": 5,
                }
            )
            try:
                partitions = consumer.list_topics(self.topic, timeout=10).topics[self.topic].partitions
                consumer.assign([TopicPartition(self.topic, number, 0) for number in partitions])
                while not self._stop.is_set():
                    for message in consumer.consume(1_000, 0.002) or ():
                        if message.error() is None:
                            self._take(message.value() or b"", message.timestamp()[1], time.time_ns())
            finally:
                consumer.close()
        except Exception as error:
            self.failure = error

    def _take(self, value: bytes, append_ms: int, now_ns: int) -> None:
        import orjson

        score = orjson.loads(value)
        self.append_ms.append(append_ms)
        self.seen_ns[score["event_id"]] = now_ns
        self.models.add(score["model_version"])
        self.fallbacks += score["fallback"]
        self.last = score


def backlog_rate(append_ms: Sequence[int]) -> float:
    """Scores per second by the broker's clock, the first batch left out: it holds the warm-up.

    A batch's scores arrive within a few milliseconds; the rate counts from the last score of the first 10 % on.
    """
    times = np.sort(np.asarray(append_ms, np.int64))
    start = len(times) // 10
    seconds = (times[-1] - times[start]) / 1_000
    return float((len(times) - 1 - start) / seconds) if seconds > 0 else float("nan")


def run(console: Console, *, keep: bool, rate: float, tail: int) -> dict[str, Any]:
    """The whole demo; returns the summary. Raises ChurnError naming the step that failed."""
    from streams.publishing import own_keys
    from streams.settings import load
    from streams.stack import from_settings, up

    begin = time.monotonic()
    settings = load()
    console.say("1/7 starting Kafka and Redis")
    started = up(settings)
    trial = Trial(
        settings,
        started.endpoints.kafka,
        started.endpoints.redis,
        "demo",
        {"CHURN_CURRENCY": "GBP", "CHURN_BATCH_MAX_EVENTS": BATCH, **own_keys(settings.data_dir / "keys" / "demo", "demo")},
    )
    if started.started:
        console.say(f"    {' and '.join(started.started)} up in {started.seconds:.1f} s")
    try:
        summary = _run(console, trial, rate=rate, tail=tail)
    except BaseException:
        if started.started:
            from_settings(settings).down(started.started)
        raise
    summary["seconds"] = round(time.monotonic() - begin, 1)
    _report(console, summary)
    if keep:
        console.say("everything still runs. To look around, in this shell:")
        for key, value in trial.environment.items():
            console.say(f"    export {key}={value}")
        console.say("    churnstream worker &            # goes on scoring what is fed")
        console.say("    churnstream tail --count 5      # the last scores")
        console.say("    churnstream state show 13085    # one customer")
        console.say("    churnstream stack down          # when done")
    elif started.started:
        from_settings(settings).down(started.started)
    return summary


def _run(console: Console, trial: Trial, *, rate: float, tail: int) -> dict[str, Any]:
    from proto.events import epoch_ms
    from streams.feed import Pace, Record, events, load_mapping, send
    from streams.topics import client_config

    settings, begin = trial.settings, time.monotonic()

    def say(line: str) -> None:
        console.say(f"{time.monotonic() - begin:6.1f} s  {line}")

    split_ms = epoch_ms(f"{SPLIT}T00:00:00Z")
    records = [record for record in events([DATA], load_mapping("online_retail_ii")) if isinstance(record, Record)]
    past = [record for record in records if record.event_ms < split_ms]
    rest = [record for record in records if record.event_ms >= split_ms]
    client = client_config(settings)

    def feed(part: Sequence[Record], pace: Pace, *, note_times: bool = False) -> Any:
        progress = _Progress(console, len(part))
        return send(
            part,
            client,
            settings.topic_prefix,
            pace,
            timeout_s=settings.dependency_timeout_s,
            note_times=note_times,
            on_progress=progress.show,
        )

    trial.command("topics", "create", "--json")
    log = settings.data_dir / "demo-worker.log"
    reader = ScoreReader(client, settings.prefixed("churn-scores"))
    reader.start()
    try:
        say(f"2/7 {len(past):,} invoices before {SPLIT} fill the histories (scores are fallbacks until there is a model)")
        with trial.worker(log) as worker:
            feed(past, Pace())
            reader.wait_for(len(past), worker)
        say("3/7 training a model on them and publishing it")
        trained = trial.command("models", "train", "--from-topics", "--split", SPLIT, "--publish", "--json")
        say(f"    model {trained['version']} in {trained['seconds']:.1f} s")
        before_tail = len(rest) - tail
        say(f"4/7 a backlog of {before_tail:,} invoices, then a worker that knows histories (Redis) and model (topic)")
        feed(rest[:before_tail], Pace())
        with trial.worker(log) as worker:
            reader.wait_for(len(past) + before_tail, worker)
            per_second = backlog_rate(reader.append_ms[len(past) :])
            say(f"    {per_second:,.0f} scores/s, state and acknowledgements included")
            say(f"5/7 the last {tail:,} at {rate:g} a second")
            sent = feed(rest[before_tail:], Pace(per_second=rate), note_times=True)
            reader.wait_for(len(records), worker)
    finally:
        reader.stop()
    latency = np.sort([(reader.seen_ns[event_id] - due) / 1e6 for event_id, due in sent.intended_ns.items()])
    say("6/7 counting what went in and out, from the stored state")
    counters = _counters(settings)
    say("7/7 judging the scores by what happened next")
    judged = trial.command("models", "evaluate", "--from-topics", "--split", SPLIT, "--scores", "--json")
    return {
        "events_in": counters["events"],
        "scores": counters["scores"],
        "dead_letters": counters["dead_letters"],
        "duplicates": counters["duplicates"],
        "profile_facts": counters["profile_facts"],
        "residue": counters["events"] - counters["scores"] - counters["dead_letters"] - counters["duplicates"] - counters["profile_facts"],
        "score_records": len(reader.append_ms),
        "fallback_scores": reader.fallbacks,
        "customers": counters["customers"],
        "events_per_second": round(per_second),
        "latency_ms_p50": round(float(np.quantile(latency, 0.5)), 2),
        "latency_ms_p99": round(float(np.quantile(latency, 0.99)), 2),
        "latency_events": len(latency),
        **{key: judged[key] for key in ("auc", "auc_interval", "auc_events", "auc_baseline", "snapshot_rows", "base_rate")},
        "model_version": trained["version"],
        "train_seconds": trained["seconds"],
        "riskiest": _riskiest(settings),
    }


@dataclass(slots=True)
class _Progress:
    """A line about every second on a terminal, every tenth of the whole elsewhere."""

    console: Console
    total: int
    _last: float = 0.0
    _tenths: int = 0

    def show(self, events: int, event_ms: int) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime(event_ms / 1_000))
        if sys.stderr.isatty():
            now = time.monotonic()
            if now - self._last > 0.2 or events == self.total:
                self._last = now
                end = "\n" if events == self.total else ""
                print(f"\r    {events:>7,} of {self.total:,} sent, shop time {day}", end=end, file=sys.stderr, flush=True)
        elif events * 10 // max(1, self.total) > self._tenths:
            self._tenths = events * 10 // self.total
            self.console.say(f"    {events:>7,} of {self.total:,} sent, shop time {day}")


def _counters(settings: Settings) -> dict[str, int]:
    """Accounting over all partitions, from the store, and the number of customers there."""
    from streams.state_store import open_store

    store = open_store(settings, settings.redis_url.get_secret_value())
    total = dict.fromkeys(("events", "scores", "dead_letters", "duplicates", "profile_facts", "customers"), 0)
    for partition in range(settings.partitions):
        for name, count in store.look(partition).counters.items():
            if name in total:
                total[name] += count
        total["customers"] += sum(1 for _ in store.customers(partition))
    return total


def _riskiest(settings: Settings) -> list[dict[str, Any]]:
    """The customers most at risk, all evaluated at the last event time, from the stored state and the published model."""
    from features.catalog import NAMES
    from features.history import Histories
    from models import registry
    from scoring.reasons import Money
    from scoring.scorer import Scorer
    from streams.codec import exponent_of
    from streams.state_store import open_store
    from streams.topics import MODELS, client_config

    store = open_store(settings, settings.redis_url.get_secret_value())
    artifact = registry.read(client_config(settings), settings.prefixed(MODELS)).champion()
    model = Scorer(artifact, money=Money(settings.currency, exponent_of(settings.currency)))
    names: list[str] = []
    loaded = []
    for partition in range(settings.partitions):
        customers = list(store.customers(partition))
        histories = Histories()
        histories.load(customers, store.load(partition, customers))
        loaded.append((customers, histories))
        names += customers
    at = max(int(histories.newest_ms(customers).max()) for customers, histories in loaded)
    vectors = np.concatenate([histories.vectors_at(customers, at) for customers, histories in loaded])
    # The question is asked of customers who still buy: the label's population.
    days = float(artifact.manifest.label["active_days"])  # type: ignore[arg-type]  # an integer, by models.train
    active = np.flatnonzero(vectors[:, NAMES.index("purchase_age_days")] < days)
    names, vectors = [names[row] for row in active.tolist()], vectors[active]
    probability = model.score(vectors)
    order = np.argsort(-probability, kind="stable")[:RISKIEST]
    reasons = model.explain(vectors[order], settings.reasons_top)
    return [
        {"customer_id": names[row], "probability": round(float(probability[row]), 4), "reasons": [reason["text"] for reason in why]}
        for row, why in zip(order.tolist(), reasons, strict=True)
    ]


def _report(console: Console, summary: Mapping[str, Any]) -> None:
    console.table(
        ("customer", "probability", "why"),
        [(row["customer_id"], f"{row['probability']:.3f}", "; ".join(row["reasons"])) for row in summary["riskiest"]],
        title="Most at risk among the customers who bought in the last 180 days, at the end of the data",
    )
    low, high = summary["auc_interval"]
    console.say(
        f"{summary['events_in']:,} events in = {summary['scores']:,} scores + {summary['dead_letters']} dead letters + "
        f"{summary['duplicates']} duplicates + {summary['profile_facts']} profile facts (residue {summary['residue']})"
    )
    console.say(
        f"{summary['events_per_second']:,} scores/s from the backlog; event to score p50 {summary['latency_ms_p50']} ms, "
        f"p99 {summary['latency_ms_p99']} ms at a steady rate"
    )
    console.say(
        f"AUC {summary['auc']:.3f} [{low:.3f}, {high:.3f}] on {summary['snapshot_rows']:,} snapshots after {SPLIT} "
        f"(recency alone {summary['auc_baseline']:.3f}); model {summary['model_version']}; {summary['seconds']} s in all"
    )
