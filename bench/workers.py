"""Several workers share one backlog: total rate, and how evenly they share.

    python -m bench.workers [--events 400000] [--workers 2] [--partitions 8] [--json]

All on this machine with embedded Kafka and Redis. The workers wait with their partitions when the backlog is laid on the topics at once,
several times faster than it can be scored; the rate is by the broker's clock from then on. Fairness is the fewest by the most scores of
a worker: 1 is even, and with customers drawn by a power law partitions are not equal. One worker alone takes the same backlog first;
`times_one` is what the others add, which cannot reach the number of workers where the servers need the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from bench import generate
from bench.model import Fitted, fit
from bench.peers import workload
from bench.peers.__main__ import own_servers
from bench.peers.engines import Ours, Running, consumer
from bench.peers.throughput import append_times
from features.facts import TOPICS
from streams.settings import Settings, load
from streams.topics import MODELS, client_config

SEED: Final = 7
WAIT_S: Final = 90.0


def measure(base: Settings, model: Fitted, scratch: Path, workers: int, events: int) -> dict[str, Any]:
    """The backlog through so many workers. Raises SystemExit when one of them fails or something is left."""
    run = f"workers-{time.time_ns() // 1_000_000}"
    settings = base.model_copy(update={"topic_prefix": f"{run}."})
    workload.create_topics(settings, (*TOPICS, MODELS))
    engine = Ours("workers", model)
    running = [engine.start(settings, run, scratch)]
    try:
        for number in range(1, workers):
            running.append(engine.join(settings, run, scratch / f"{run}-{number}.log"))
        _until_shared(settings, run, running)
        config = {**client_config(settings), "partitioner": "murmur2_random"}
        generate.send(workload.events(events, SEED, None), prefix=settings.topic_prefix, config=config)
        loaded_ms = time.time() * 1e3
        _until_scored(settings, running, events)
        for worker in running:
            worker.stop()
        summaries = [_summary(worker) for worker in running]
        times = append_times(settings, running[0].scores)
    finally:
        for worker in running:
            worker.stop()
        engine.clean(settings, run)
    scores = [summary["scores"] for summary in summaries]
    if sum(scores) != events or len(times) != events:
        raise SystemExit(f"{workers} workers scored {scores}, {len(times):,} records, of {events:,} events")
    backlog = times[times >= loaded_ms]
    return {
        "workers": workers,
        "scores": scores,
        "backlog": len(backlog),
        "scores_per_second": round(len(backlog) / ((times.max() - loaded_ms) / 1e3)),
        "events_per_cpu_second": round(events / sum(summary["cpu_seconds"] for summary in summaries)),
        "fairness": round(min(scores) / max(scores), 3),
    }


def _until_shared(settings: Settings, run: str, running: list[Running]) -> None:
    """Wait until every worker has partitions."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    admin, group = AdminClient(client_config(settings)), settings.topic_prefix + run
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            members = admin.describe_consumer_groups([group])[group].result(10).members
        except KafkaException:  # not there yet
            members = []
        if sum(bool(member.assignment.topic_partitions) for member in members) == len(running):
            return
        for worker in running:
            worker.check()
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(members)} of {len(running)} workers have partitions after {WAIT_S:g} s")
        time.sleep(0.1)


def _until_scored(settings: Settings, running: list[Running], events: int) -> None:
    from confluent_kafka import TopicPartition

    client = consumer(settings)
    places = [TopicPartition(running[0].scores, number) for number in range(settings.partitions)]
    deadline = time.monotonic() + WAIT_S + events / 2_000
    try:
        while sum(client.get_watermark_offsets(place, timeout=10, cached=False)[1] for place in places) < events:
            for worker in running:
                worker.check()
            if time.monotonic() > deadline:
                raise SystemExit(f"{events:,} events were not scored in time: {running[0].tail()}")
            time.sleep(0.1)
    finally:
        client.close()


def _summary(worker: Running) -> dict[str, Any]:
    if worker.process.returncode:
        raise SystemExit(f"a worker ended with code {worker.process.returncode}: {worker.tail()}")
    summary: dict[str, Any] = json.loads(worker.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1])
    return summary


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.workers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=400_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--partitions", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    given = parser.parse_args()
    with own_servers(load(), partitions=given.partitions) as (settings, _, scratch):
        sample = workload.replay(settings, min(given.events, 100_000), SEED, None).sample()
        model = fit(sample, trees=200, depth=6, not_low=workload.NOT_LOW)
        one = measure(settings, model, scratch, 1, given.events)
        print(one, file=sys.stderr, flush=True)
        more = measure(settings, model, scratch, given.workers, given.events)
        print(more, file=sys.stderr, flush=True)
    figures = {
        **more,
        "events": given.events,
        "partitions": given.partitions,
        "times_one": round(more["scores_per_second"] / one["scores_per_second"], 3),
        "cpu_per_event_times_one": round(one["events_per_cpu_second"] / more["events_per_cpu_second"], 3),
        "one": one,
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
