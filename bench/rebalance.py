"""Faust's own consumer rebalances again and again in mid-stream: no batch is lost, every event has one score.

    python -m bench.rebalance [--rebalances 10] [--hold 0.05] [--fault no-resend] [--json]

A worker process on real Kafka and Redis; a second member of its control group joins and leaves, and events are fed, until there
were enough rebalances and at least one of them has emptied a queue with an item in it.
In the worker the takers of Faust's queues are slow (`--hold` seconds before they take), because an agent that waits takes an item
at once, and a rebalance would almost never meet one in its queue. `--fault no-resend` takes the sending again away: the item is
lost, and the run must fail. Exit 1 when a batch was lost, an event has not exactly one score or the residue is not 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import orjson

from bench.generate import SPAN_MS, START_MS, generate
from proto.errors import ChurnError
from streams.settings import Settings, load
from streams.stack import from_settings, up
from streams.topics import client_config, producer_config
from streams.trial import Trial, stop

IDLE_S: Final = 3.0
"""The worker ends when nothing came for so long."""
PATIENCE_S: Final = 30.0
RUN_S: Final = 300.0
PIECE: Final = 6_000
"""Events fed for every joining and leaving; the worker is not through with them before it ends."""
REBALANCED: Final = "the control consumer has rebalanced"
FAULTS: Final = ("no-resend",)


# --- the worker process


def work(hold_s: float, fault: str) -> int:
    """The worker of this process to its end: real but for the slow takers and the fault. Prints the figures; returns the exit code."""
    import faust
    from mode.utils.queues import FlowControlQueue

    from streams.agents import Feeder, Item
    from streams.engine import Result
    from streams.stack import endpoints

    main: Any = import_module("streams.main")  # where the names are looked up that are replaced here
    queues: Any = FlowControlQueue
    apps: list[faust.App] = []
    feeders: list[Counted] = []

    class Counted(Feeder):
        """The feeder, with the results it got counted."""

        results = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            feeders.append(self)

        async def _result(self, item: Item) -> Result:
            result = await super()._result(item)
            self.results += 1
            return result

    class Once(Counted):
        """Sends an item once, as one would without knowing what a rebalance does."""

        async def _send(self, item: Item) -> None:
            await self._channel.put(item)  # type: ignore[arg-type]  # a channel takes any value

    make_app, take = main.faust_app, queues.get

    def kept(*arguments: Any) -> faust.App:
        app: faust.App = make_app(*arguments)
        app.on_partitions_assigned.connect(noted)
        apps.append(app)
        return app

    async def noted(*_: Any, **__: Any) -> None:
        print(REBALANCED, file=sys.stderr, flush=True)

    async def late(queue: FlowControlQueue[Any]) -> Any:
        await asyncio.sleep(hold_s)
        return await take(queue)

    if fault:
        main.Watchdog.start = lambda _: None  # it would end the worker before the feeder says what it lost
    main.faust_app = kept
    main.Feeder = Once if fault == "no-resend" else Counted
    if hold_s:
        queues.get = late
    settings = load()
    where = endpoints(settings)
    main.log_to_stderr(settings.log_level)
    summary: dict[str, Any] = {}
    try:
        worker = main.Worker(settings, client_config(settings, where.kafka), where.redis, until_idle_s=IDLE_S)
        summary = worker.run()
        summary["resent_metric"] = worker._metrics.registry.get_sample_value("churn_batches_resent_total")
    except ChurnError as error:
        summary["error"] = str(error)
    feeder = feeders[0]
    # Rebalances as Faust counts them; the first is the start.
    summary |= {"rebalances": apps[0].rebalancing_count - 1, "items": feeder.progress.items, "items_resent": feeder.progress.resent}
    summary["batches_lost"] = feeder.progress.items - feeder.results
    print(json.dumps(summary), flush=True)
    return int("error" in summary)


# --- the run around it


async def disturb(settings: Settings, kafka: str, worker: subprocess.Popen[str], log: Path, rebalances: int, hold_s: float) -> int:
    """Let a second member join and leave the worker's control group, and feed, until it is enough; returns the events fed."""
    from streams.agents import faust_app

    group = group_of(log, worker)
    control = f"{settings.topic_prefix}control-{group.rsplit('-', 1)[1]}"
    config = producer_config(settings)
    begin = time.monotonic()
    pieces = 1
    while worker.poll() is None:
        said = text_of(log)
        # The first assignment is the start.
        if said.count(REBALANCED) > rebalances and (not hold_s or "sent again" in said):
            break
        if time.monotonic() - begin > RUN_S:
            raise ChurnError(f"not enough rebalances within {RUN_S:g} s")
        feed(settings, config, pieces)
        pieces += 1
        app = faust_app(group, kafka, settings.kafka, control, lambda _: None)
        joined = asyncio.Event()

        async def assigned(*_: Any, joined: asyncio.Event = joined, **__: Any) -> None:
            joined.set()

        app.on_partitions_assigned.connect(assigned)
        await app.start()
        with suppress(TimeoutError):
            await asyncio.wait_for(joined.wait(), PATIENCE_S)
        await app.stop()
    return pieces * PIECE


def feed(settings: Settings, config: dict[str, Any], piece: int) -> None:
    """One piece of the stream; later pieces are later events."""
    generate(PIECE, customers=500, seed=piece, prefix=settings.topic_prefix, config=config, start_ms=START_MS + piece * PIECE * SPAN_MS)


def text_of(log: Path) -> str:
    """What the worker has said so far."""
    return log.read_text(encoding="utf-8")


def group_of(log: Path, worker: subprocess.Popen[str]) -> str:
    """The worker's control group, as it says at its start."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and worker.poll() is None:
        for line in text_of(log).splitlines():
            if line.endswith(" started") and " worker " in line:
                return line.split()[-2]
        time.sleep(0.05)
    raise ChurnError(f"the worker did not start:\n{text_of(log)[-3000:]}")


def scored(client: dict[str, Any], topic: str) -> Counter[tuple[str, int, int]]:
    """How many records the score topic has of each source."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

    consumer = Consumer({**client, "group.id": "rebalance-reader", "enable.auto.commit": False, "enable.partition.eof": True})
    found: Counter[tuple[str, int, int]] = Counter()
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        ended = 0
        while ended < len(partitions):
            for message in consumer.consume(5_000, 1.0):
                error = message.error()
                if error is None:
                    source = orjson.loads(message.value() or b"")["source"]
                    found[source["topic"], source["partition"], source["offset"]] += 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended += 1
                else:
                    raise ChurnError(f"{topic}: {error.str()}")
    finally:
        consumer.close()
    return found


def measure(settings: Settings, kafka: str, redis: str, *, rebalances: int, hold_s: float, fault: str) -> dict[str, Any]:
    """One run on servers that answer; the figures, `failures` empty when all is well."""
    trial = Trial(settings, kafka, redis, "rebalance")
    own = trial.settings
    trial.command("topics", "create", "--json")
    feed(own, producer_config(own), 0)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "worker.log"
        with log.open("w") as stream:
            worker = subprocess.Popen(
                [sys.executable, "-m", "bench.rebalance", "--worker", "--hold", str(hold_s), "--fault", fault],
                # Small batches: many items, so that every rebalance meets one.
                env=os.environ | trial.environment | {"CHURN_BATCH_MAX_EVENTS": "25", "CHURN_PROGRESS_TIMEOUT_S": "10"},
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        try:
            events = asyncio.run(disturb(own, kafka, worker, log, rebalances, hold_s))
            worker.wait(PATIENCE_S)
        finally:
            summary = stop(worker)
        said = text_of(log)[-3000:]
    scores = scored(client_config(own), own.prefixed("churn-scores"))
    figures = {
        name: summary.get(name)
        for name in ("rebalances", "items", "items_resent", "resent_metric", "events_in", "scores", "residue", "batches_lost")
    }
    failures = [
        text
        for text, bad in (
            (f"the worker ended with code {worker.returncode}: {summary.get('error') or said}", worker.returncode != 0),
            ("a batch was lost", figures["batches_lost"] != 0),
            (f"{events - len(scores)} events have no score", len(scores) != events),
            ("an event has two scores", any(count > 1 for count in scores.values())),
            ("the residue is not 0", figures["residue"] != 0),
            (f"only {figures['rebalances']} rebalances", (figures["rebalances"] or 0) < rebalances),
            ("the metric counts other items", figures["resent_metric"] != figures["items_resent"]),
            ("no rebalance met an item in its queue", hold_s > 0 and not figures["items_resent"]),
        )
        if bad
    ]
    return {**figures, "events": events, "events_scored_once": sum(count == 1 for count in scores.values()), "failures": failures}


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rebalances", type=int, default=10, help="fewest that must happen")
    parser.add_argument("--hold", type=float, default=0.05, metavar="SECONDS", help="how late an item is taken from its queue")
    parser.add_argument("--fault", choices=("", *FAULTS), default="")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    if arguments.worker:
        sys.exit(work(arguments.hold, arguments.fault))
    settings = load()
    started = up(settings)
    try:
        figures = measure(
            settings,
            started.endpoints.kafka,
            started.endpoints.redis,
            rebalances=arguments.rebalances,
            hold_s=arguments.hold,
            fault=arguments.fault,
        )
    finally:
        if started.started:
            from_settings(settings).down(started.started)
    print(json.dumps(figures))
    sys.exit(bool(figures["failures"]))


if __name__ == "__main__":
    main()
