"""Has the worker become slower? Its CPU time for a short backlog by that of a reference loop, against the last accepted ratio.

    python -m bench.guard [--accept] [--prove] [--pairs 3] [--json]

The worker is the real one, with embedded Kafka and Redis. Seconds differ from machine to machine and from hour to hour; the ratio to a
loop of similar work (JSON, dicts, numpy, memory) run just before and after differs less. Noise: CPU seconds instead of wall, the median
of several pairs, and more pairs before anything is called a regression. Red (exit code 1) above 1.15 times the accepted ratio.

--accept stores the ratio measured now in bench/guard.json; do it with the commit that is meant to change it.
--prove also measures a worker that is slower on purpose and fails unless it is caught. BENCH_GUARD_SLOWER=1, for tests only, makes the
measured worker that one: batches of a hundred events, so that every fixed cost of a batch counts forty times.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from bench.model import fit
from bench.peers import workload
from bench.peers.__main__ import own_servers
from bench.peers.engines import Ours
from streams.settings import load

ACCEPTED: Final = Path(__file__).parent / "guard.json"
SLOWER_VARIABLE: Final = "BENCH_GUARD_SLOWER"
SLOWER: Final = {"CHURN_BATCH_MAX_EVENTS": "100"}
LIMIT: Final = 1.15
EVENTS: Final = 80_000
SEED: Final = 7
PAIRS: Final = 3
MORE: Final = 3
"""A median above the limit is believed after this many times the pairs."""


def reference_seconds() -> float:
    """CPU seconds of the loop: always the same work, about a second's worth."""
    rows = [{"event_id": f"e{i:08d}", "customer_id": f"c{i % 997:06d}", "at": i * 17, "amount": i % 977 / 100} for i in range(20_000)]
    texts = [orjson.dumps(row) for row in rows]
    numbers = np.arange(1 << 20, dtype=np.int64)
    places = np.random.default_rng(5).permutation(len(numbers))
    begin = time.process_time()
    for _ in range(12):
        totals: dict[str, list[float]] = {}
        for text in texts:
            row = orjson.loads(text)
            totals.setdefault(row["customer_id"], []).append(row["amount"])
        lines = [b'{"id":%b,"n":%d,"sum":%.17g}' % (name.encode(), len(found), sum(found)) for name, found in totals.items()]
        b"".join(lines)
        for _ in range(4):
            np.cumsum(numbers[places] & 1023)
        np.argsort(places[: 1 << 18], kind="stable")
    return time.process_time() - begin


@dataclass(frozen=True, slots=True)
class Verdict:
    """The median ratio of the worker to the loop, all ratios, and whether it is above the limit."""

    ratio: float
    ratios: tuple[float, ...]
    accepted: float

    @property
    def times_accepted(self) -> float:
        """The ratio by the accepted one."""
        return self.ratio / self.accepted

    @property
    def red(self) -> bool:
        """A regression."""
        return self.times_accepted > LIMIT


def judge(pair: Callable[[], float], accepted: float, pairs: int) -> Verdict:
    """Measure pairs until the median is within the limit, at most MORE times as many: noise passes, a regression stays."""
    ratios: list[float] = []
    for _ in range(MORE):
        ratios += [pair() for _ in range(pairs)]
        verdict = Verdict(statistics.median(ratios), tuple(ratios), accepted)
        if not verdict.red:
            break
    return verdict


def worker_seconds(base: Mapping[str, str], settings: Any, model: Any, scratch: Path) -> float:
    """CPU seconds of one worker from its first to its last batch of the backlog. Raises SystemExit when it does not score all of it."""
    run = f"guard-{time.time_ns() // 1_000_000}"
    engine = Ours("guard", model, variables=base)
    running = engine.start(settings, run, scratch, "--until-idle", "1")
    try:
        running.process.wait(120)
    except subprocess.TimeoutExpired:
        running.stop()
        raise SystemExit(f"the worker did not get through {EVENTS:,} events in 120 s: {running.tail()}") from None
    finally:
        engine.clean(settings, run)
    lines = running.log.read_text(encoding="utf-8", errors="replace").splitlines()
    summary = json.loads(lines[-1]) if running.process.returncode == 0 else {}
    if summary.get("scores") != EVENTS:
        raise SystemExit(f"the worker scored {summary.get('scores')} of {EVENTS:,} events: {running.tail()}")
    return float(summary["cpu_seconds"])


def main() -> int:
    """Exit code 0 within the limit, 1 a regression (or one seeded and not caught)."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accept", action="store_true", help="store the measured ratio in bench/guard.json")
    parser.add_argument("--prove", action="store_true", help="also measure a worker made slower: it must be caught")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of loop and worker (count)")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    given = parser.parse_args()
    accepted = float(json.loads(ACCEPTED.read_text(encoding="utf-8"))["ratio"]) if ACCEPTED.is_file() else 0.0
    if not accepted and not given.accept:
        parser.error(f"{ACCEPTED}: no ratio was accepted yet; --accept stores one")
    chosen = SLOWER if os.environ.get(SLOWER_VARIABLE) else {}
    with own_servers(load()) as (settings, _, scratch):
        workload.preload(settings, EVENTS, SEED, None)
        sample = workload.replay(settings, EVENTS, SEED, None).sample()
        model = fit(sample, trees=200, depth=6, not_low=workload.NOT_LOW)

        def pair(variables: Mapping[str, str]) -> float:
            loops = [reference_seconds()]
            seconds = worker_seconds(variables, settings, model, scratch)
            loops.append(reference_seconds())
            ratio = seconds / statistics.mean(loops)
            print(f"worker {seconds:.2f} s, loop {loops[0]:.2f} and {loops[1]:.2f} s: {ratio:.3f}", file=sys.stderr, flush=True)
            return ratio

        if given.accept:
            ratios = [pair(chosen) for _ in range(2 * given.pairs + 1)]
            accepted = round(statistics.median(ratios), 4)
            entry = {"ratio": accepted, "ratios": [round(r, 4) for r in ratios], "date": datetime.now(UTC).date().isoformat()}
            ACCEPTED.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
        verdict = judge(lambda: pair(chosen), accepted, given.pairs)
        seeded = Verdict(slow := pair(SLOWER), (slow,), accepted) if given.prove else None
    figures = {
        "times_accepted": round(verdict.times_accepted, 4),
        "ratio": round(verdict.ratio, 4),
        "accepted": accepted,
        "ratios": [round(r, 4) for r in verdict.ratios],
        "limit": LIMIT,
        "ok": not verdict.red,
    }
    if seeded is not None:
        figures |= {"seeded_times_accepted": round(seeded.times_accepted, 4), "seeded_caught": seeded.red}
    print(json.dumps(figures))
    if verdict.red:
        print(f"slower than accepted: {verdict.times_accepted:.2f} times the CPU per event (limit {LIMIT})", file=sys.stderr)
    return int(verdict.red or (seeded is not None and not seeded.red))


if __name__ == "__main__":
    sys.exit(main())
