"""What an event costs as things grow: history, customers, late share, trees, features asked, partitions, customers beyond the memory.

    python -m bench.scaling [--full] [--only CURVE ...] [--events 60000] [--json]

CPU microseconds per event, or per row of a model. The first five curves are the parts themselves in this process (histories and model);
the last two are real workers with embedded Kafka and Redis on a backlog of --events. --full goes on to 100,000 facts a customer, a
million customers and 1,000 trees. Workers on the same machine: `python -m bench.workers`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench import generate
from bench.history import BATCH, facts
from bench.model import fit
from bench.peers import workload
from bench.peers.__main__ import own_servers
from bench.peers.engines import Ours
from features.facts import ID, OFFSET, TIME, TOPICS
from features.history import Histories
from features.window import HORIZON_MS
from streams.settings import Settings, load
from streams.topics import MODELS, client_config

Curve = dict[str, dict[str, float]]
REPEATS: Final = 5
ROWS: Final = 4_096
MINUTE_MS: Final = 60_000
LEAST_FACTS: Final = 100_000
"""The smallest bound of facts in memory a worker accepts."""


def cpu_us(call: Callable[[], object], events: int, repeats: int = REPEATS) -> float:
    """Median CPU microseconds per event of a call that handles so many; the first call is a warm-up."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append((time.process_time() - begin) / events * 1e6)
    return round(statistics.median(times), 3)


def history(full: bool) -> Curve:
    """Facts of one customer in the window: an event in order, and one late fact inserted in the middle."""
    lengths = (10, 100, 1_000, 10_000, *((100_000,) if full else ()))
    return {f"{n:,}": {"in_order_us": in_order_us(n), "late_us": late_us(n)} for n in lengths}


def in_order_us(kept: int) -> float:
    """Batches that follow on, with `kept` facts in the window throughout."""
    gap = HORIZON_MS // kept
    histories = Histories(create=True)
    feed(histories, ["c"], facts(2 * kept, gap), partial(in_turn, 1))
    first = 2 * kept

    def batches() -> None:
        nonlocal first
        feed(histories, ["c"], facts(10 * BATCH, gap, first), partial(in_turn, 1))
        first += 10 * BATCH

    return cpu_us(batches, 10 * BATCH)


def late_us(kept: int) -> float:
    """A step of one fact into the middle of `kept` facts."""
    gap = HORIZON_MS // kept
    histories = Histories(create=True)
    feed(histories, ["c"], facts(kept, gap), partial(in_turn, 1))
    number = 0

    def one() -> None:
        nonlocal number
        fact = facts(1, gap, kept // 2)
        fact[0, TIME] += gap // 2 + number
        fact[0, OFFSET], fact[0, ID] = kept + number, -1 - number
        number += 1
        assert histories.step(["c"], fact).late[0]

    return cpu_us(one, 1, 25)


def customers(full: bool) -> Curve:
    """Customers in memory, ten facts each, events of any of them: the step, and the memory of the histories."""
    found: Curve = {}
    random = np.random.default_rng(3)
    for count in (1_000, 10_000, 100_000, *((1_000_000,) if full else ())):
        names = [f"c{i:07d}" for i in range(count)]
        histories = Histories(create=True, max_facts=1 << 40)
        gap = HORIZON_MS // (20 * count)
        feed(histories, names, facts(10 * count, gap), partial(in_turn, count))
        first = 10 * count

        def batches(histories: Histories = histories, names: list[str] = names, gap: int = gap) -> None:
            nonlocal first
            feed(histories, names, facts(5 * BATCH, gap, first), lambda _, n: random.integers(0, len(names), n))
            first += 5 * BATCH

        found[f"{count:,}"] = {"step_us": cpu_us(batches, 5 * BATCH), "bytes_per_customer": round(histories.nbytes / count)}
    return found


def in_turn(count: int, first: int, n: int) -> npt.NDArray[np.int64]:
    """One customer after the other."""
    return (first + np.arange(n)) % count


def feed(histories: Histories, names: list[str], rows: npt.NDArray[np.int64], whose: Callable[[int, int], npt.NDArray[np.int64]]) -> None:
    """Step through rows in batches; `whose(first, n)` gives the customers of rows first..first+n."""
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        histories.step([names[i] for i in whose(first, len(part)).tolist()], part)


def late(full: bool) -> Curve:
    """Share of events up to an hour late, among a thousand customers with an event a minute each: the step."""
    count, found = 1_000, {}
    names = [f"c{i:04d}" for i in range(count)]
    for share in (0.0, 0.02, 0.1, 0.5):
        random = np.random.default_rng(4)
        histories = Histories(create=True)
        first = 0

        def batches(n: int = 50 * BATCH, histories: Histories = histories, random: Any = random, share: float = share) -> None:
            nonlocal first
            rows = facts(n, MINUTE_MS // count, first)
            rows[:, TIME] -= np.where(random.random(n) < share, random.integers(0, 60 * MINUTE_MS, n), 0)
            feed(histories, names, rows, partial(in_turn, count))
            first += n

        batches()
        found[f"{share:.0%}"] = {"step_us": cpu_us(batches, 50 * BATCH, 3)}
    return found


def trees(full: bool) -> Curve:
    """Trees of depth 6 over all features: a row's score, and its exact reasons where they are asked for."""
    return models([(str(n), {"trees": n}) for n in (10, 50, 200, 500, *((1_000,) if full else ()))])


def features(full: bool) -> Curve:
    """Features a model of 200 trees asks; all are computed in any case, since the layout is one."""
    n = len(sample()[0])
    return models([(str(k), {"trees": 200, "columns": np.linspace(0, n - 1, k).astype(int).tolist()}) for k in (12, 24, 53, n)])


_sample: list[npt.NDArray[np.float32]] = []


def sample() -> npt.NDArray[np.float32]:
    """Vectors to fit on and to score."""
    if not _sample:
        _sample.append(workload.replay(load(), 30_000, 7, None).vectors)
    return _sample[0]


def models(sizes: Iterable[tuple[str, dict[str, Any]]]) -> Curve:
    """Score and reasons per row of models of several sizes."""
    from scoring.scorer import load as load_model

    x = np.ascontiguousarray(sample()[-ROWS:])
    high = np.full(ROWS, 3, np.uint8)
    found: Curve = {}
    for name, size in sizes:
        scorer = load_model(fit(sample(), depth=6, **size).envelope)
        found[name] = {
            "score_us": cpu_us(partial(scorer.score, x), ROWS),
            "reasons_us": cpu_us(partial(scorer.reasons, x, high, high), ROWS, 3),
        }
    return found


def worker_us(settings: Settings, engine: Ours, scratch: Path, events: int, people: int) -> dict[str, float]:
    """A real worker over a backlog of `people` customers: its CPU per event and the rate."""
    run = f"scaling-{time.time_ns() // 1_000_000}"
    own = settings.model_copy(update={"topic_prefix": f"{run}."})
    workload.create_topics(own, (*TOPICS, MODELS))
    config = {**client_config(own), "partitioner": "murmur2_random"}
    generate.generate(events, customers=people, seed=7, prefix=own.topic_prefix, config=config)
    running = engine.start(own, run, scratch, "--until-idle", "1")
    try:
        running.process.wait(300)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"the worker did not get through {events:,} events in 300 s: {running.tail()}") from None
    finally:
        running.stop()
        engine.clean(own, run)
    lines = running.log.read_text(encoding="utf-8", errors="replace").splitlines()
    summary = json.loads(lines[-1]) if running.process.returncode == 0 else {}
    if summary.get("scores") != events:
        raise SystemExit(f"the worker scored {summary.get('scores')} of {events:,} events: {running.tail()}")
    return {"worker_us": round(1e6 * summary["cpu_seconds"] / events, 1), "events_per_second": summary["events_per_second"]}


def partitions(full: bool, events: int) -> Curve:
    """Partitions of one worker."""
    model = fit(sample(), trees=200, depth=6, not_low=workload.NOT_LOW)
    found: Curve = {}
    for count in (1, 4, 16, *((64,) if full else ())):
        with own_servers(load(), partitions=count) as (settings, _, scratch):
            found[str(count)] = worker_us(settings, Ours("scaling", model), scratch, events, workload.CUSTOMERS)
    return found


def memory(full: bool, events: int) -> Curve:
    """Customers that fit into the worker's memory, or do not and come from Redis; four times the events, the smallest bound there is."""
    engine = Ours("scaling", fit(sample(), trees=200, depth=6, not_low=workload.NOT_LOW))
    bounded = replace(engine, variables={"CHURN_MAX_FACTS_IN_MEMORY": str(LEAST_FACTS)})
    found: Curve = {}
    with own_servers(load()) as (settings, _, scratch):
        for people in (20_000, 200_000, *((1_000_000,) if full else ())):
            for name, one in (("in memory", engine), ("bounded", bounded)):
                found[f"{people:,} {name}"] = worker_us(settings, one, scratch, 4 * events, people)
    return found


PARTS: Final[dict[str, Callable[[bool], Curve]]] = {
    "history": history,
    "customers": customers,
    "late": late,
    "trees": trees,
    "features": features,
}
WORKERS: Final[dict[str, Callable[[bool, int], Curve]]] = {"partitions": partitions, "memory": memory}


def table(curve: Curve) -> list[str]:
    """A curve as lines of Markdown."""
    columns = list(next(iter(curve.values())))
    head = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    return head + [f"| {point} | " + " | ".join(f"{row[column]:,}" for column in columns) + " |" for point, row in curve.items()]


def main() -> None:
    """Run from the command line; tables on stderr, the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser("python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the far end of each curve too")
    parser.add_argument("--only", nargs="+", default=[], choices=[*PARTS, *WORKERS], metavar="CURVE", help=", ".join([*PARTS, *WORKERS]))
    parser.add_argument("--events", type=int, default=60_000, help="backlog of the curves with workers")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    given = parser.parse_args()
    curves: dict[str, Curve] = {}
    for name in given.only or (*PARTS, *WORKERS):
        curve = curves[name] = PARTS[name](given.full) if name in PARTS else WORKERS[name](given.full, given.events)
        about = (PARTS.get(name) or WORKERS[name]).__doc__ or ""
        print("\n".join([f"\n{name}: {about}", *table(curve)]), file=sys.stderr, flush=True)
    flat: dict[str, float] = {}
    for name, column in (("history", "in_order_us"), ("customers", "step_us"), ("late", "step_us"), ("partitions", "worker_us")):
        if name in curves:
            values = [row[column] for row in curves[name].values()]
            flat[f"{name}_times"] = round(values[-1] / values[0], 2)
    print(json.dumps({**flat, **curves}))


if __name__ == "__main__":
    main()
