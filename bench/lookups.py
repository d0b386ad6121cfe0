"""GetScore under open-loop load beside a worker that scores: lookups per second, latencies, CPU of each.

    python -m bench.lookups [--rate 1000] [--events-per-second 5000] [--seconds 20] [--customers 5000] [--json]

Kafka, Redis, worker, lookup service, the producer of events and the caller share the machine. Lookups begin at fixed times whatever became
of those before, and each latency counts from the time its lookup was due: what waits in the caller counts too. Customers are drawn at
random.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.backlog import cpu_seconds
from bench.generate import NAMES, SPAN_MS, START_MS, events, generate, send
from bench.model import publish_model
from streams.settings import Settings, load
from streams.stack import from_settings, up
from streams.topics import client_config, producer_config
from streams.trial import Trial, stop

HISTORY = 60_000
SLICE_S = 0.05
WARM_S = 2.0


def feed(settings: Settings, per_second: int, seconds: float, customers: int, after: int) -> None:
    """Produce events at a steady rate, in event time behind so many others."""
    count = int(per_second * seconds)
    stream = list(events(count, customers=customers, seed=after, start_ms=START_MS + after * SPAN_MS))
    step = max(1, int(per_second * SLICE_S))
    from confluent_kafka import Producer

    begin = time.monotonic()
    producer = Producer({"linger.ms": 5, **producer_config(settings)})
    for first in range(0, count, step):
        time.sleep(max(0.0, begin + first / per_second - time.monotonic()))
        for topic, customer, value in stream[first : first + step]:
            producer.produce(settings.topic_prefix + NAMES[topic], value, customer)
        producer.poll(0)
    producer.flush(30)


async def ask(address: str, rate: int, seconds: float, customers: int) -> dict[str, Any]:
    """Open-loop GetScore; latencies in ms from when each was due."""
    import grpc

    from proto.churn.v1 import churn_pb2 as pb

    random = np.random.default_rng(3)
    count = int(rate * (seconds + WARM_S))
    chosen = [f"c{number:06d}" for number in random.integers(0, customers, count).tolist()]
    latency = np.full(count, np.nan)
    failed = unknown = 0
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/churn.v1.ChurnService/GetScore",
            request_serializer=pb.GetScoreRequest.SerializeToString,
            response_deserializer=pb.GetScoreResponse.FromString,
        )

        async def one(number: int, due: float) -> None:
            nonlocal failed, unknown
            try:
                answer = await call(pb.GetScoreRequest(customer_id=chosen[number]), timeout=5)
                unknown += answer.score.status == pb.STATUS_UNKNOWN
            except grpc.RpcError:
                failed += 1
                return
            latency[number] = (time.perf_counter() - due) * 1_000

        begin = time.perf_counter() + 0.2
        running = set()
        for number in range(count):
            due = begin + number / rate
            if (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            task = asyncio.create_task(one(number, due))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)
        ended = time.perf_counter()
    measured = latency[int(rate * WARM_S) :]
    done = measured[~np.isnan(measured)]
    return {
        "lookups_per_second": round(len(done) / (ended - begin - WARM_S)),
        "failed": failed,
        "unknown": unknown,
        **{f"ms_{name}": round(float(np.percentile(done, percent)), 2) for name, percent in (("p50", 50), ("p90", 90), ("p99", 99))},
        "ms_max": round(float(done.max()), 2),
    }


def measure(rates: Sequence[int], per_second: int, seconds: float, customers: int, trees: int, depth: int) -> dict[str, Any]:
    """The whole run; the figures as one flat object, of the first rate, and a list of all."""
    settings = load()
    started = up(settings)
    processes: list[subprocess.Popen[str]] = []
    try:
        trial = Trial(settings, started.endpoints.kafka, started.endpoints.redis, "bench", {"CHURN_SERVE_CLOCK": "stream"})
        own = trial.settings
        trial.command("topics", "create", "--json")
        generate(HISTORY, customers=customers, seed=7, prefix=own.topic_prefix, config=producer_config(own))
        send(  # everybody is known
            ((1, f"c{number:06d}", login(number)) for number in range(customers)), prefix=own.topic_prefix, config=producer_config(own)
        )
        publish_model(own, trees=trees, depth=depth)
        with tempfile.TemporaryDirectory() as scratch, open(Path(scratch) / "serve.log", "w") as log:
            worker = trial.start(Path(scratch) / "worker.log")
            processes.append(worker)
            wait_for(own, HISTORY + customers)
            environment = os.environ | trial.environment
            command = ["-c", "from streams.cli import main; main()", "serve", "--grpc-port", "0", "--rest-port", "0", "--json"]
            served = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
            processes.append(served)
            assert served.stdout is not None
            address = json.loads(served.stdout.readline())["grpc"]
            runs = [run(trial, address, rate, per_second, seconds, customers, worker.pid, served.pid) for rate in rates]
            served.terminate()
            served.wait(20)
            summary = stop(worker)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        if started.started:
            from_settings(settings).down(started.started)
    best = max((one["rate"] for one in runs if one["ms_p99"] < 10 and not one["failed"]), default=0)
    return {
        **runs[0],
        "highest_rate_with_p99_below_10_ms": best,
        "runs": runs,
        "events_scored": summary.get("scores"),
        "residue": summary.get("residue"),
        "load_average": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
    }


def run(trial: Trial, address: str, rate: int, per_second: int, seconds: float, customers: int, worker: int, served: int) -> dict[str, Any]:
    """One rate, with events beside it."""
    environment = os.environ | trial.environment
    here = [sys.executable, "-m", "bench.lookups", "--seconds", str(seconds), "--customers", str(customers)]
    lasts = seconds + WARM_S + 1.0
    after = ["--events-per-second", str(per_second), "--seconds", str(lasts), "--after", str(scores(trial.settings))]
    feeding = subprocess.Popen([*here, "--part", "feed", *after], env=environment)
    before, began, scored = (cpu_seconds(worker), cpu_seconds(served)), time.monotonic(), scores(trial.settings)
    asked = subprocess.run(
        [*here, "--part", "ask", "--address", address, "--rate", str(rate)], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    wall = time.monotonic() - began
    used = cpu_seconds(worker) - before[0], cpu_seconds(served) - before[1]
    feeding.wait(60)
    lookups = rate * (seconds + WARM_S)
    return {
        "rate": rate,
        **found,
        "worker_events_per_second": round((scores(trial.settings) - scored) / (time.monotonic() - began)),
        "worker_cpu_share": round(used[0] / wall, 3),
        "service_cpu_share": round(used[1] / wall, 3),
        "service_cpu_us_per_lookup": round(1e6 * used[1] / lookups),
    }


def login(number: int) -> bytes:
    """A first event of a customer."""
    body = {"event_id": f"first-{number}", "customer_id": f"c{number:06d}", "kind": "login", "event_time": START_MS + number}
    return json.dumps(body).encode()


def scores(settings: Settings) -> int:
    """Records on the score topic."""
    from confluent_kafka import Consumer, TopicPartition

    name = settings.prefixed("churn-scores")
    consumer = Consumer({**client_config(settings), "group.id": "bench-count"})
    try:
        ends = [consumer.get_watermark_offsets(TopicPartition(name, number), timeout=10)[1] for number in range(settings.partitions)]
    finally:
        consumer.close()
    return sum(ends)


def wait_for(settings: Settings, count: int, timeout_s: float = 120) -> None:
    """Until the backlog is scored, nearly: late and repeated events have no score of their own."""
    deadline, last, still = time.monotonic() + timeout_s, -1, 0
    while time.monotonic() < deadline and still < 6:
        found = scores(settings)
        still = still + 1 if found == last and found > 0.9 * count else 0
        last = found
        time.sleep(0.25)


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, nargs="+", default=[1_000], help="lookups per second; several are measured one after the other")
    parser.add_argument("--events-per-second", type=int, default=5_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--customers", type=int, default=5_000)
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--part", choices=("feed", "ask"), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--after", type=int, default=HISTORY, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    a = arguments
    if a.part == "feed":
        feed(load(), a.events_per_second, a.seconds, a.customers, a.after)
        return
    if a.part == "ask":
        figures = asyncio.run(ask(a.address, a.rate[0], a.seconds, a.customers))
    else:
        figures = measure(a.rate, a.events_per_second, a.seconds, a.customers, a.trees, a.depth)
        for name, value in figures.items():
            print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
