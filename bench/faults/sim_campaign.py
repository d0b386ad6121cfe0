"""Many seeds: in slices, on all cores, with a ledger that lets a campaign be interrupted and added up.

    churnstream-faults simulate --count 2000 --json
    churnstream-faults simulate --seeds 0..50000 --ledger bench/faults/simulation.jsonl --json
    churnstream-faults simulate --seeds 17 --trace

The ledger has one JSON line per finished slice: its seeds, the commit, a digest of the sources that ran, what was found. A slice
that is in it with the same sources is not run again, so the same command goes on where it was stopped, and sums everything up.
What does not run in a simulation (docs, other commands) does not change the digest.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
COMMITTED: Final = Path(__file__).parent / "simulation.jsonl"
"""The seeds that docs/reliability.md reports."""
SHOWN: Final = 50
COLLECT: Final = 25
"""Seeds between two collections of garbage; left to itself it takes a tenth of the time."""
SLICE: Final = 1_000
"""Seeds of one line of the ledger: a minute of work is lost with an interruption."""


@dataclass(slots=True)
class Tally:
    """What some seeds came to; `first_violation` names the lowest seed that broke something, and `violations` counts them all.

    seconds: of the processor.
    """

    first_seed: int
    end_seed: int
    seeds: int = 0
    violations: int = 0
    seconds: float = 0.0
    events: int = 0
    scores: int = 0
    raw_duplicates: int = 0
    steps: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    violations_by: dict[str, int] = field(default_factory=dict)
    violating_seeds: list[int] = field(default_factory=list)
    first_violation: dict[str, Any] | None = None
    trace_digest: str = ""

    def add(self, other: Tally) -> None:
        """Take over another tally's sums."""
        for name in ("seeds", "violations", "seconds", "events", "scores", "raw_duplicates", "steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults = dict(Counter(self.faults) + Counter(other.faults))
        self.violations_by = dict(Counter(self.violations_by) + Counter(other.violations_by))
        self.violating_seeds = sorted(self.violating_seeds + other.violating_seeds)
        mine, theirs = self.first_violation, other.first_violation
        if theirs is not None and (mine is None or theirs["seed"] < mine["seed"]):
            self.first_violation = theirs


def run(first: int, end: int, *, stop: bool = False) -> Tally:
    """Run the seeds first..end-1; with `stop` no further than the first violation."""
    from bench.faults.sim import simulate

    gc.collect()
    gc.freeze()
    gc.disable()
    tally = Tally(first, end)
    faults: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    digest = blake2b(digest_size=16)
    began = process_time()
    for seed in range(first, end):
        if not seed % COLLECT:
            gc.collect()
        outcome = simulate(seed)
        tally.seeds += 1
        tally.events += outcome.events
        tally.scores += outcome.scores
        tally.raw_duplicates += outcome.raw_duplicates
        tally.steps += outcome.steps
        faults += outcome.faults
        digest.update(outcome.digest.encode())
        if outcome.violation:
            tally.violations += 1
            broken[outcome.invariant] += 1
            tally.violating_seeds.append(seed)
            if tally.first_violation is None:
                again = f"churnstream-faults simulate --seeds {seed} --trace"
                tally.first_violation = {"seed": seed, "invariant": outcome.invariant, "what": outcome.violation[:2_000], "replay": again}
            if stop:
                break
    gc.enable()
    gc.unfreeze()
    tally.seconds = round(process_time() - began, 3)
    tally.faults, tally.violations_by, tally.trace_digest = dict(faults), dict(broken), digest.hexdigest()
    return tally


def sources() -> dict[str, Path]:
    """All our modules that a simulation imports, directly or not, by name."""
    found: dict[str, Path] = {}
    todo = ["bench.faults.sim"]
    while todo:
        name = todo.pop()
        base = ROOT.joinpath(*name.split("."))
        path = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if name in found or not path.is_file():
            continue
        found[name] = path
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def sources_digest() -> str:
    """Digest of all sources that a simulation runs; the same digest gives the same runs."""
    digest = blake2b(digest_size=8)
    for name, path in sorted(sources().items()):
        digest.update(f"{name} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """The commit checked out here, "" when that cannot be told."""
    head = ROOT / ".git"
    if head.is_file():  # a further working tree
        head = Path(head.read_text().partition(":")[2].strip())
    try:
        name = (head / "HEAD").read_text().strip()
        if not name.startswith("ref: "):
            return name
        for place in (head, head.parent.parent):
            if (ref := place / name[5:]).is_file():
                return ref.read_text().strip()
    except OSError:
        pass
    return ""


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a ledger; one cut off by a crash is left out."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def _tally(line: Mapping[str, Any]) -> Tally:
    return Tally(**{part.name: line[part.name] for part in fields(Tally)})


def _done(ledger: Path | None, digest: str) -> dict[tuple[int, int], Tally]:
    tallies = [] if ledger is None else [_tally(line) for line in read(ledger) if line["sources"] == digest]
    return {(tally.first_seed, tally.end_seed): tally for tally in tallies}


def builds(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a ledger added up by build (sources), in their order: commit, versions, and the figures of `summary`."""
    totals: dict[str, tuple[Mapping[str, Any], dict[tuple[int, int], Tally]]] = {}
    for line in lines:
        _, slices = totals.setdefault(line["sources"], (line, {}))
        slices[line["first_seed"], line["end_seed"]] = _tally(line)
    found = []
    for line, slices in totals.values():
        total = Tally(min(first for first, _ in slices), max(end for _, end in slices))
        for tally in slices.values():
            total.add(tally)
        found.append({**summary(total), "commit": line["commit"], "sources": line["sources"], "versions": line["versions"]})
    return found


def versions() -> dict[str, str]:
    """Of the interpreter and of the packages that a simulated number depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "numba", "onnxruntime", "confluent-kafka")}}


def _slices(first: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(first, end, SLICE):
        yield start, min(end, start + SLICE)


def campaign(first: int, end: int, *, ledger: Path | None, processes: int, stop: bool) -> Tally:
    """All seeds first..end-1, those in the ledger not again."""
    digest, revision, with_versions = sources_digest(), commit(), versions()
    done = _done(ledger, digest)
    total = Tally(first, end)
    wanted = []
    for piece in _slices(first, end):
        if piece in done:
            total.add(done[piece])
        else:
            wanted.append(piece)

    def finished(tally: Tally) -> None:
        total.add(tally)
        if ledger is not None:
            line = {"commit": revision, "sources": digest, "versions": with_versions, **asdict(tally)}
            with ledger.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        pace = f"{1e3 * tally.seconds / max(1, tally.seeds):.0f} ms a seed"
        print(f"{total.seeds} of {end - first} seeds, {total.violations} violations, {pace}", file=sys.stderr, flush=True)

    if stop or processes == 1 or len(wanted) <= 1:
        for piece in wanted:
            finished(run(*piece, stop=stop))
            if stop and total.violations:
                break
    else:
        with ProcessPoolExecutor(min(processes, len(wanted)), mp_context=get_context("spawn")) as pool:
            for done_slice in as_completed([pool.submit(run, *piece) for piece in wanted]):
                finished(done_slice.result())
    return total


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `simulate`."""
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seeds", metavar="A..B", help="seeds A to B-1, or one seed A")
    seeds.add_argument("--count", type=int, default=2_000, metavar="N", help="seeds 0 to N-1 (default 2000)")
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="JSON lines of finished slices; what is in it is not run again")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: one a core")
    parser.add_argument("--ticks", action="store_true", help="score the silent too, at ticks of a day, a week or 30 days; no ledger")
    parser.add_argument("--stop", action="store_true", help="end with the first violation")
    parser.add_argument("--trace", action="store_true", help="show every step; for one seed")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Run `simulate`; 1 when an invariant was broken."""
    if arguments.seeds:
        low, _, high = arguments.seeds.partition("..")
        first, end = int(low), int(high) if high else int(low) + 1
    else:
        first, end = 0, arguments.count
    if arguments.ticks:
        if arguments.ledger:
            raise SystemExit("--ticks: these worlds are others than those of the ledger")
        os.environ["CHURN_SIM_TICKS"] = "1"
    if arguments.trace:
        from bench.faults.sim import simulate

        outcome = simulate(first)
        print("\n".join(outcome.trace))
        print(f"seed {first}: {outcome.violation or 'every invariant holds'}; trace {outcome.digest}")
        return int(bool(outcome.violation))
    total = campaign(first, end, ledger=arguments.ledger, processes=arguments.processes, stop=arguments.stop)
    report = summary(total)
    if arguments.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name}: {value}")
    return int(bool(total.violations))


def summary(total: Tally) -> dict[str, Any]:
    """The figures of a campaign."""
    return {
        "seeds": total.seeds,
        "violations": total.violations,
        "seconds": round(total.seconds, 1),
        "events": total.events,
        "scores": total.scores,
        "raw_duplicates": total.raw_duplicates,
        "steps": total.steps,
        "ms_per_seed": round(1e3 * total.seconds / max(1, total.seeds), 1),
        "faults": dict(sorted(total.faults.items())),
        "faults_injected": sum(total.faults.values()),
        "violations_by": total.violations_by,
        "violating_seeds": total.violating_seeds[:SHOWN],
        "first_violation": total.first_violation,
        "sources": sources_digest(),
        "commit": commit(),
    }


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options from a command line."""
    parser = argparse.ArgumentParser(prog="churnstream-faults simulate", description=__doc__)
    add_arguments(parser)
    return parser.parse_args(arguments)
