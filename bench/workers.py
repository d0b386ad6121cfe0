"""Several workers share one backlog: total rate, and how evenly they share.

    python -m bench.workers [--events 400000] [--workers 2] [--partitions 8] [--json]

All on this machine with embedded Kafka and Redis. The workers start together on a backlog that lies there; the rate is by the broker's
clock from the score at 10 % on. Fairness is the fewest by the most scores of a worker: 1 is even, and with customers drawn by a power law
partitions are not equal. One worker alone takes the same backlog first; `times_one` is what the others add, which cannot reach the
number of workers where the servers need the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.model import Fitted, fit
from bench.peers import workload
from bench.peers.__main__ import own_servers
from bench.peers.engines import Ours, Running
from bench.peers.throughput import append_times
from streams.settings import Settings, load

SEED = 7


def measure(settings: Settings, model: Fitted, scratch: Path, workers: int, events: int) -> dict[str, Any]:
    """The backlog through so many workers. Raises SystemExit when one of them fails or something is left."""
    run = f"workers-{time.time_ns() // 1_000_000}"
    engine = Ours("workers", model)
    running = [engine.start(settings, run, scratch, "--until-idle", "3")]
    for number in range(1, workers):
        running.append(engine.join(settings, run, scratch / f"{run}-{number}.log", "--until-idle", "3"))
    try:
        summaries = [_summary(worker) for worker in running]
        times = np.sort(append_times(settings, running[0].scores))
    finally:
        for worker in running:
            worker.stop()
        engine.clean(settings, run)
    scores = [summary["scores"] for summary in summaries]
    if sum(scores) != events or len(times) != events:
        raise SystemExit(f"{workers} workers scored {scores}, {len(times):,} records, of {events:,} events")
    first = events // 10
    cpu = sum(summary["cpu_seconds"] for summary in summaries)
    return {
        "workers": workers,
        "scores": scores,
        "scores_per_second": round((events - 1 - first) / ((times[-1] - times[first]) / 1e3)),
        "events_per_cpu_second": round(events / cpu),
        "fairness": round(min(scores) / max(scores), 3),
    }


def _summary(worker: Running) -> dict[str, Any]:
    try:
        worker.process.wait(300)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"a worker did not end within 300 s: {worker.tail()}") from None
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
        workload.preload(settings, given.events, SEED, None)
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
