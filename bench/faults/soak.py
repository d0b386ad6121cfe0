"""The soak: one deployment, a steady stream, a fault every 5 to 20 s; at the end all invariants and the slope of memory.

The stream covers 90 days of event time every three minutes, so that facts leave as fast as they come and a worker's memory can stand still.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.faults import campaign, ledger
from bench.faults.nemesis import FAULTS, IMPATIENT, Fault, calm, nothing
from bench.faults.nursery import Nursery
from bench.faults.rounds import Crew, Feeder, Mix, Observer, Outcome, Round, Shelf, _bounds, _check, _clean, stream
from bench.faults.servers import Ground
from features.window import HORIZON_MS
from streams.settings import Settings

START_MS: Final = 1_300_000_000_000
WINDOW_S: Final = 180.0
"""Seconds of the soak in which 90 days of event time pass."""
WARM_UP_S: Final = 300.0
PAUSE_S: Final = (5.0, 20.0)
WORKERS: Final = 2
MILD: Final = {
    *("kafka_latency", "kafka_narrow", "kafka_slice", "kafka_slow", "redis_latency", "redis_slice", "redis_slow"),
    *("corrupt_model", "graceful", "kill"),  # of the worker that is not spared
}
"""What the spared worker lives through: its memory has to be watched for long, and a worker that is fenced or cut off ends by design."""


def mixed() -> list[Fault]:
    """The faults that can be done to a deployment that goes on, each way of doing harm once: no special stream, servers or preparation."""
    fit = [
        f for f in FAULTS.values() if f.nodes == 1 and f.prepare is None and f.stream is calm and not f.holes and f.inject is not nothing
    ]
    return list({fault.inject: fault for fault in reversed(fit)}.values())


def run(*, seed: str, minutes: float, per_second: float, mode: str, mild: bool, warm_up_s: float, book: Path, home: Path) -> dict[str, Any]:
    """Soak for so long; the figures, which also go to the ledger. home: directory for servers and logs.

    mild: only what a worker lives through. warm_up_s: seconds of a worker's life that do not count for the slope of its memory.
    """
    faults = [fault for fault in mixed() if not mild or fault.name in MILD]
    shelf = Shelf(home.parent / "models")
    fault = Fault("soak", lambda this: None, "all mixed", workers=WORKERS, proxied=("redis", "kafka"), variables=IMPATIENT)
    count = int(minutes * 60 * per_second)
    mix = Mix(start_ms=START_MS, customers=500, span_ms=int(HORIZON_MS / (WINDOW_S * per_second)))
    with ExitStack() as stack:
        ground = stack.enter_context(Ground(home / "ground"))
        nursery = stack.enter_context(Nursery())
        shelf.fill(Settings(kafka_bootstrap_servers=ground.kafka, replication=ground.nodes))
        this = Round(ground, fault, f"soak {seed}", count, mode, shelf, home / "round")
        this.rollback = any(fault.rollback for fault in faults)
        this.open()
        this.publish(shelf.envelopes[0])
        outcome = Outcome(
            f"soak {seed}", "soak", mode, count, WORKERS, campaign.commit(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        )
        this.feeder = Feeder(this.settings, list(stream(int.from_bytes(seed.encode()[-6:], "little"), count, mix)))
        this.crew = Crew(nursery, this.environment, home / "round")
        this.crew.most_starts = 10_000
        this.crew.spared = {0}  # one lives through it all, so there is a memory to watch
        this.observer = Observer(ground.redis.port, this.settings, this.feeder, this.crew, every_s=0.25)
        begin = time.monotonic()
        try:
            done = _soak(this, faults, minutes, per_second)
            if not this.until(lambda: (look := this.observer.last()) is not None and look.lag(this.feeder.ends) == 0):
                outcome.violations.append("I7 progress: still behind after the last fault")
            this.until(this.crew.settled, 20.0)
            stopped = this.crew.stop()
        except BaseException:
            this.crew.kill()
            raise
        finally:
            this.observer.stop()
        outcome.violations += [f"graceful stop: exit code {code} after {s:.1f} s" for code, s, _ in stopped if code != 0 or s > 10]
        _check(this, outcome, stopped=all(code == 0 for code, _, _ in stopped))
        _bounds(this, outcome)
        _clean(this)
    outcome.restarts = this.crew.started - WORKERS
    outcome.seconds = round(time.monotonic() - begin, 1)
    slope, life_s, level_mb = memory(this.observer.rss, warm_up_s)
    outcome.facts |= this.facts | {
        "faults": dict(done),
        "minutes": minutes,
        "mild": mild,
        "rss_slope_percent_per_hour": slope,
        "rss_watched_s": life_s,
        "rss_mb": level_mb,
        "worst_pause_s": round(this.observer.longest_pause(0, float("inf")), 2),
    }
    ledger.append(book, outcome.line())
    figures: dict[str, Any] = json.loads(outcome.line())
    return {"violations": [], **figures, **figures.pop("facts"), "faults_done": sum(done.values())}


def _soak(this: Round, faults: Sequence[Fault], minutes: float, per_second: float) -> Counter[str]:
    """Of these faults one after another until the time is over; how often each came."""
    this.crew.scale(WORKERS)
    this.until(lambda: this.crew.holding() == WORKERS)
    this.feeder.begin(per_second)
    end = time.monotonic() + minutes * 60
    done: Counter[str] = Counter()
    while time.monotonic() < end:
        fault = this.random.choice(faults)
        campaign.to_stderr(f"{(end - time.monotonic()) / 60:.1f} min left: {fault.name}")
        fault.inject(this)
        this.crew.scale(WORKERS)
        done[fault.name] += 1
        this.wait(this.random.uniform(*PAUSE_S))
    this.feeder.finish()
    return done


def memory(series: Sequence[tuple[int, float, float]], warm_up_s: float) -> tuple[float | None, float, float | None]:
    """Slope of the resident memory of the worker that lived longest, % per hour by least squares after the warm-up; seconds, mean MB."""
    lives: dict[int, list[tuple[float, float]]] = {}
    for worker, moment, mb in series:
        lives.setdefault(worker, []).append((moment, mb))
    longest = max(lives.values(), key=lambda life: life[-1][0] - life[0][0], default=[])
    part = np.array([(moment, mb) for moment, mb in longest if moment >= longest[0][0] + warm_up_s])
    if len(part) < 10:
        return None, 0.0, None
    slope, _ = np.polyfit(part[:, 0] - part[0, 0], part[:, 1], 1)
    level = float(part[:, 1].mean())
    return round(float(slope) * 3_600 / level * 100, 2), round(float(part[-1, 0] - part[0, 0]), 1), round(level, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `soak`."""
    ledger.add_arguments(parser)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--per-second", type=float, default=200.0, help="records a second")
    parser.add_argument("--warm-up", type=float, default=WARM_UP_S, help="seconds that do not count for the slope of memory")
    parser.add_argument("--mild", action="store_true", help="only what a worker lives through, so that its memory is watched to the end")


def main(arguments: argparse.Namespace) -> int:
    """Soak; the figures as one JSON object on the last line. 1 when anything was violated."""
    figures = run(
        seed=arguments.seed,
        minutes=arguments.minutes,
        per_second=arguments.per_second,
        mode=arguments.mode or "at_least_once",
        mild=arguments.mild,
        warm_up_s=arguments.warm_up,
        book=arguments.ledger or ledger.home() / "soak.jsonl",
        home=ledger.home() / f"lane{arguments.lane}",
    )
    print(json.dumps(figures))
    return int(bool(figures["violations"]))
