"""This product and its peers on the same topics, in one go.

    python -m bench.peers [--quick] [--peers DIR] [--events N] [--runs N] [--only NAME ...] [--write] [--json]

First the peers are made ready, the backlog is laid on the topics and replayed in one thread: that gives the vectors our models are
fitted on and what our scores have to be. Then every engine takes the backlog, one after the other, round by round; then the ladder of
rates. What cannot be prepared or dies is skipped with the reason. The budget drops later rounds and ladders, never the first round
nor our own first ladders.

Ours runs with all features, 200 trees of depth 6, exact reasons where a score is not low or has moved, and the delivery protocol;
`churnstream_24` asks only the 24 columns nearest to the peers', though all are computed, since the layout is one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.model import fit
from bench.peers import latency, report, throughput, workload
from bench.peers.engines import Died, Engine, Ours, Peer
from bench.peers.prepare import prepare
from bench.peers.throughput import Place
from streams.settings import Settings, load

ROOT: Final = Path(__file__).parent.parent.parent
PEERS: Final = ROOT.parent / "shared" / "peers"
RESULTS: Final = Path(__file__).parent / "results.json"
README: Final = ROOT / "bench" / "README.md"
SEED: Final = 7
TREES, DEPTH = 200, 6
RATES: Final = (500, 2_000, 5_000, 10_000)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. Peers by name; a ladder per engine: (engine, rates, runs)."""

    events: int
    runs: int
    peers: tuple[str, ...]
    once: tuple[str, ...]  # peers that take the backlog in the first round only
    ladders: tuple[tuple[str, tuple[int, ...], int], ...]
    slow_s: float
    seconds: float
    warm_s: float
    budget_s: float


FULL: Final = Plan(
    events=1_200_000,
    runs=3,
    peers=("ks_batch_alo_1", "ks_alo_1", "flink_heap_alo_1", "faust_take_best", "quix", "faust_plain"),
    once=("ks_batch_eos_1",),
    ladders=(
        (report.OURS, RATES, 3),
        (report.OURS_EOS, RATES, 3),
        ("ks_batch_alo_1", RATES, 1),
        ("ks_alo_1_l5", RATES, 1),
        ("flink_heap_alo_1", RATES, 1),
        ("faust_take_best", RATES[:2], 1),
        ("quix", RATES[:2], 1),
        ("faust_plain", RATES[:1], 1),
    ),
    slow_s=12.0,
    seconds=8.0,
    warm_s=2.0,
    budget_s=27 * 60,
)
QUICK: Final = Plan(
    events=150_000,
    runs=1,
    peers=FULL.peers,
    once=(),
    ladders=((report.OURS, (2_000, 10_000), 1), (report.OURS_EOS, (2_000,), 1)),
    slow_s=5.0,
    seconds=4.0,
    warm_s=1.0,
    budget_s=360.0,
)


@dataclass(slots=True)
class Race:
    """One go: engines, rows so far, reasons for what is missing."""

    plan: Plan
    peers: Path | None
    place: Place
    engines: dict[str, Engine]
    expected: dict[str, Any]
    skipped: dict[str, str]
    begin: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    ladders: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """Rounds of the backlog, then the ladders; what does not fit into the budget is left out and said."""
        names = [name for name in self.engines if self._in_backlog(name)]
        last = 0.0
        for number in range(self.plan.runs):
            began = time.monotonic()
            if number and self._elapsed() + last + self._ladders_s(1) > self.plan.budget_s:
                _say(f"round {number + 1} is left out: {self._elapsed() / 60:.0f} minutes are gone")
                break
            for name in names[number % len(names) :] + names[: number % len(names)]:  # interleaved, and none is always the first
                if name not in self.skipped and not (number and name in self.plan.once):
                    self._backlog(name)
            last = time.monotonic() - began
        for number in range(max((runs for _, _, runs in self.plan.ladders), default=0)):
            for name, rates, runs in self.plan.ladders:
                if name not in self.engines or name in self.skipped or number >= runs:
                    continue
                asked = number == 0 and name.startswith(report.OURS)  # the claims read these
                if not asked and self._elapsed() + self._ladder_s(rates) > self.plan.budget_s:
                    _say(f"{name}: ladder {number + 1} is left out: {self._elapsed() / 60:.0f} minutes are gone")
                    continue
                self._ladder(name, rates)

    def _in_backlog(self, name: str) -> bool:
        return name.startswith(report.OURS) or name in self.plan.peers or name in self.plan.once

    def _backlog(self, name: str) -> None:
        engine = self.engines[name]
        try:
            row = throughput.measure(engine, self.place, self.plan.events, self.expected.get(name))
        except Died as error:
            self.skipped[name] = str(error)
            _say(f"{name}: {error}")
            return
        self.rows.append(row)
        _say(
            f"{name}: {row['scores_per_second']:,}/s, {row['events_per_cpu_second']:,} per CPU-second "
            f"({row['second_half_events_per_cpu_second']:,} in the second half), others used {row['others_cores']} cores"
        )

    def _ladder(self, name: str, rates: Sequence[int]) -> None:
        try:
            rows = latency.measure(self.engines[name], self.place, rates, self.plan.seconds, self.plan.warm_s, self.peers)
        except Died as error:
            self.skipped[name] = str(error)
            _say(f"{name}: {error}")
            return
        self.ladders += rows
        for row in rows:
            end = ", saturated" if row["saturated"] else ""
            _say(f"{name} at {row['rate']:,}/s: p50 {row['p50_ms']}, p99 {row['p99_ms']}, p99.9 {row['p999_ms']} ms{end}")

    def _elapsed(self) -> float:
        return time.monotonic() - self.begin

    def _ladder_s(self, rates: Sequence[int]) -> float:
        return 20.0 + len(rates) * (self.plan.seconds + self.plan.warm_s + 1.0)

    def _ladders_s(self, runs: int) -> float:
        return sum(self._ladder_s(rates) * min(runs, of) for name, rates, of in self.plan.ladders if name in self.engines)


@contextmanager
def own_servers(settings: Settings, *, partitions: int = workload.PARTITIONS) -> Iterator[tuple[Settings, dict[str, int], Path]]:
    """Embedded Kafka and Redis of this benchmark alone, never those of the environment: it empties Redis between the runs."""
    from pydantic import SecretStr

    from streams.stack import Stack

    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=settings.data_dir) as scratch:
        stack = Stack(Path(scratch) / "stack", timeout_s=settings.stack_timeout_s)
        with stack as where:
            own = {"kafka_bootstrap_servers": where.kafka, "redis_url": SecretStr(where.redis), "topic_prefix": "bench."}
            pids = {server.name: server.pid for server in stack.status()}
            yield settings.model_copy(update={**own, "partitions": partitions}), pids, Path(scratch).resolve()


def go(plan: Plan, directory: Path | None, only: Sequence[str]) -> dict[str, Any]:
    """All of it; the result as one object."""
    from redis import Redis

    begin, base = time.monotonic(), load()
    wanted = [name for name in dict.fromkeys((*plan.peers, *plan.once, *(name for name, _, _ in plan.ladders))) if name[:5] != "churn"]
    wanted = [name for name in wanted if not only or name in only]
    engines: dict[str, Engine] = {}
    skipped = dict.fromkeys(wanted, "no directory of peers (--peers DIR)") if directory is None else {}
    peers = None
    if directory is not None and wanted:
        _say(f"preparing {', '.join(wanted)}")
        peers = prepare(directory, base.data_dir / "peers", wanted)
        skipped |= peers.skipped
        for name, reason in peers.skipped.items():
            _say(f"{name} is skipped: {reason}")
    with own_servers(base) as (settings, servers, scratch), Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        seconds = workload.preload(settings, plan.events, SEED, directory)
        _say(f"{plan.events:,} events on the topics in {seconds:.0f} s; replaying them for models and expected scores")
        replay = workload.replay(settings, plan.events, SEED, directory)
        sample = replay.sample()
        full = fit(sample, trees=TREES, depth=DEPTH, not_low=workload.NOT_LOW)
        nearest = fit(sample, trees=TREES, depth=DEPTH, not_low=workload.NOT_LOW, columns=workload.NEAREST)
        ours = (Ours(report.OURS, full), Ours(report.OURS_24, nearest), Ours(report.OURS_EOS, full, "exactly_once"))
        engines |= {engine.name: engine for engine in ours if not only or engine.name in only}
        if peers is not None:
            engines |= {name: Peer(name, command, peers.model) for name, command in peers.commands.items()}
        scores = replay.scores(full.session)
        expected: dict[str, np.ndarray] = {report.OURS: scores, report.OURS_EOS: scores, report.OURS_24: replay.scores(nearest.session)}
        customers, in_memory = replay.customers, round(replay.bytes_in_memory / replay.customers)
        del replay
        race = Race(plan, directory, Place(settings, servers, redis, scratch, plan.slow_s), engines, expected, skipped, begin)
        race.run()
    through = {key[0]: row for key, row in report.medians(race.rows, ("engine",)).items()}
    ladders: dict[str, dict[int, dict[str, Any]]] = {}
    for (name, rate), row in report.medians(race.ladders, ("engine", "rate")).items():
        ladders.setdefault(name, {})[rate] = row
    return {
        **report.flat(through, ladders),
        "date": datetime.now(UTC).date().isoformat(),
        "minutes": round((time.monotonic() - begin) / 60, 1),
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
        "events": plan.events,
        "stream": "the peers' generator" if directory is not None else "our generator (no peers)",
        "customers": customers,
        "bytes_in_memory_per_customer": in_memory,
        "throughput": through,
        "latency": ladders,
        "skipped": race.skipped,
        "runs": race.rows + race.ladders,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Run from the command line; the result as one JSON object on the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="minutes: a short backlog, one run, two rates")
    parser.add_argument("--peers", type=Path, help="directory of the peers; the default is ../shared/peers where it is")
    parser.add_argument("--events", type=int, help="length of the backlog (count)")
    parser.add_argument("--runs", type=int, help="rounds of the backlog (count)")
    parser.add_argument("--seconds", type=float, help="length of each rate of the ladder (s)")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="what does not fit is left out; the default is 27, quick 6")
    parser.add_argument("--only", nargs="+", default=[], metavar="ENGINE", help="only these engines")
    parser.add_argument("--no-latency", action="store_true", help="only the backlog")
    parser.add_argument("--write", action="store_true", help="write bench/peers/results.json and the measured part of bench/README.md")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    given = parser.parse_args()
    plan = QUICK if given.quick else FULL
    changes: dict[str, Any] = {name: value for name in ("events", "runs", "seconds") if (value := getattr(given, name)) is not None}
    if given.budget is not None:
        changes["budget_s"] = given.budget * 60
    if given.no_latency:
        changes["ladders"] = ()
    if given.peers is not None and not (given.peers / "run.py").is_file():
        parser.error(f"--peers {given.peers}: no run.py there")
    directory = given.peers or (PEERS if (PEERS / "run.py").is_file() else None)
    result = go(replace(plan, **changes), directory.resolve() if directory else None, given.only)
    text = report.markdown(result)
    print(text, file=sys.stderr)
    if given.write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        report.write(README, text)
    print(json.dumps({name: value for name, value in result.items() if name != "runs"}))


if __name__ == "__main__":
    main()
