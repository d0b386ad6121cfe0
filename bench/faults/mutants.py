"""Deliberately broken builds: the campaign has to catch each of them, or it proves nothing.

    churnstream-faults mutants --json
    churnstream-faults mutants --only M2,M8

A mutant is an edit of the product's sources that has to fit exactly once, so one that no longer fits fails here instead of
quietly being tested no more. It is planted into a copy of the package concerned; the simulation (or a small check of its own,
where the fault lives outside of what is simulated) runs against the copy, and must turn red within a bounded number of seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns
from time import perf_counter
from typing import Any, Final

from bench.faults.sim_campaign import commit, sources_digest

ROOT: Final = Path(__file__).resolve().parents[2]
COMMITTED: Final = Path(__file__).parent / "mutants.jsonl"
"""The runs of which docs/reliability.md reports the last."""
SEEDS: Final = 2_000
"""No mutant may survive so many seeds."""
TIMEOUT_S: Final = 600
COMPILED: Final = "from features.compiled import"


@dataclass(frozen=True, slots=True)
class Edit:
    """file below the root; text as it is; text with the fault."""

    file: str
    text: str
    wrong: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """name: number in the list of mutants; what is broken; which invariants may show it; check: module to run instead of the simulation."""

    name: str
    what: str
    edits: tuple[Edit, ...]
    shows: frozenset[str]
    check: str = ""


def mutant(name: str, what: str, *edits: Edit, shows: set[str], check: str = "") -> Mutant:
    return Mutant(name, what, edits, frozenset(shows), check)


ENGINE, INGEST, MERGE = "streams/engine.py", "streams/ingest.py", "streams/merge.py"
STORE, WIRE = "features/memory_store.py", "bench/faults/sim_redis.py"
FIRST_ENDS_HERE: Final = """\
        if not batch.counters:
            return None
        for name, count in batch.counters.items():
"""
TWO_COMMANDS: Final = """\
        from dataclasses import replace

        def first() -> None:
            self._server.store.apply([replace(batch, counters={}) for batch in batches])

        self._server.call(self._host, "apply states", batches[0].partition, first)
        batches = [replace(batch, customers=()) for batch in batches]
"""

MUTANTS: Final = (
    mutant(
        "M1",
        "the offsets are stored by a second command",
        Edit(STORE, "        for name, count in batch.counters.items():\n", FIRST_ENDS_HERE),
        Edit(WIRE, "        batches = list(batches)\n", TWO_COMMANDS),
        shows={"I1", "I2", "I3", "I4", "I5", "I9"},
    ),
    mutant(
        "M2",
        "the store does not look at the nonce",
        Edit(STORE, "        if found.meta.owner != nonce:\n            raise fenced(partition)\n", ""),
        shows={"I6", "I7"},
    ),
    mutant(
        "M3",
        "offsets are committed when a batch is taken, and work begins where they stand",
        Edit(
            INGEST,
            "        self._drained.set()\n        return [",
            "        self._drained.set()\n"
            "        self.applied({batch.partition: batch.to for batch in taken if batch is not None})\n"
            "        return [",
        ),
        Edit(
            INGEST,
            "                self.owner.restored(claim)\n",
            "                places = [TopicPartition(topic, claim.partition) for topic in self.settings.topics]\n"
            "                ends = [place.offset - 1 for place in consumer.committed(places)]\n"
            "                told = {name: max(claim.applied[name], end) for name, end in zip(TOPICS, ends, strict=True)}\n"
            "                claim = __import__('dataclasses').replace(claim, applied=told)\n"
            "                self.owner.restored(claim)\n",
        ),
        shows={"I1", "I3", "I7"},
    ),
    mutant(
        "M4",
        "an item whose processing fails is taken for done, as Faust's take does",
        Edit(
            "streams/agents.py",
            "                item.result.set_exception(error)\n",
            "                item.result.set_result(Result({}, [], {}))\n",
        ),
        shows={"I1"},
        check="bench.faults.mutants_take",
    ),
    mutant(
        "M5",
        "records that cannot be read are skipped without a dead letter",
        Edit(
            ENGINE,
            "            work.outputs.dead_letters.extend(self._dead_letters(batch, outcome))\n",
            "            work.outputs.dead_letters.extend(self._dead_letters(batch, outcome)[:0])\n",
        ),
        shows={"I1"},
    ),
    mutant(
        "M6",
        "windows end at the wall clock",
        Edit(
            ENGINE,
            "        return evaluate(work.partition.histories, work.model, rules, customers, facts, self.parts.part)\n",
            "        from streams.evaluate import score\n"
            "        step = work.partition.histories.step(customers, facts)\n"
            "        rows, of = step.rows, [customers[i] for i in step.rows.tolist()]\n"
            "        step.vectors[:] = work.partition.histories.vectors_at(of, self._clock_ms())\n"
            "        where = work.partition.histories, work.model, rules\n"
            "        from features.facts import KIND, OFFSET\n"
            "        sources = facts[rows, KIND] >> 3, facts[rows, OFFSET]\n"
            "        then = step.at[rows], step.late[rows], step.vectors, sources\n"
            "        return step.outcome, score(*where, of, rows, *then, self.parts.part)\n",
        ),
        shows={"I4"},
    ),
    mutant(
        "M7",
        "sums in single-precision floating point",
        Edit(
            "features/aggregate.py",
            "rows[r, ADDS[k, 1]] += contribution(facts, i, ADDS[k, 2])",
            "rows[r, ADDS[k, 1]] = np.int64(np.float32(rows[r, ADDS[k, 1]]) + np.float32(contribution(facts, i, ADDS[k, 2])))",
        ),
        shows={"I3", "I4"},
    ),
    mutant(
        "M8",
        "state is applied before the outputs are acknowledged",
        Edit(ENGINE, "                self._sink.flush()\n", "                pass\n"),
        shows={"I1", "I2", "I5"},
    ),
    mutant(
        "M9",
        "a model is taken into service whatever feature layout it was made for",
        Edit(
            "models/artifact.py", "    if manifest.layout_hash != layout_hash:\n", "    if manifest.layout_hash != layout_hash and False:\n"
        ),
        shows={"I4"},
    ),
    mutant(
        "M10",
        "what is buffered survives a revocation and is used after the next assignment",
        Edit(
            INGEST,
            "                self._merges.pop(partition, None)\n                self._waiting.pop(partition, None)\n",
            "                self._waiting.pop(partition, None)\n",
        ),
        Edit(
            INGEST,
            "                merge = self._merge(consumer, claim)\n",
            "                merge = self._merges.get(claim.partition) or self._merge(consumer, claim)\n"
            "                merge.nonce = claim.nonce\n",
        ),
        shows={"I1", "I2", "I3", "I7"},
    ),
    mutant(
        "M11",
        "offsets are counted on by one per record, as if there were no holes",
        Edit(
            MERGE,
            "                reached[TOPICS[buffer.topic]] = int(facts[topic == buffer.topic, OFFSET][-1])\n",
            "                reached[TOPICS[buffer.topic]] += count\n",
        ),
        shows={"I1", "I2", "I3", "I5", "I7", "I9"},
    ),
    mutant(
        "M12",
        "the reader hands out what it has handed out before",
        Edit("streams/reader.py", "        if offset <= self.seen.get(place, -1):\n            return False\n", ""),
        shows={"I2"},
    ),
    mutant(
        "M13",
        "a snapshot says one offset too many",
        Edit(
            "streams/snapshot.py",
            "    return Stand(claim.partition, dict(claim.applied),",
            "    return Stand(claim.partition, {name: offset + (offset >= 0) for name, offset in claim.applied.items()},",
        ),
        shows={"I1", "I2", "I3", "I4", "I5", "I7", "I9"},
    ),
    mutant(
        "M14",
        "an empty store is taken for a new beginning",
        Edit(
            "streams/rebuild.py",
            "        self._wanted = wanted\n",
            "        self._wanted = wanted\n        if claim.fresh:\n            return claim\n",
        ),
        shows={"I1", "I2", "I3", "I4", "I5", "I7", "I9"},
    ),
)


def plant(what: Mutant, into: Path) -> None:
    """Packages that hold the edited files and find everything else in the sources. Raises ValueError when an edit does not fit once.

    A compiled function is inlined into those that call it, so a fault in one goes into a whole copy, to be compiled anew.
    """
    for file in sorted({edit.file for edit in what.edits}):
        source = (ROOT / file).read_text("utf-8")
        if COMPILED in source:
            copytree(ROOT / "features", into / "features", ignore=ignore_patterns("__pycache__"))
        package = Path(file).parent
        while package.name and not (into / package / "__init__.py").exists():
            (into / package).mkdir(parents=True, exist_ok=True)
            text = (ROOT / package / "__init__.py").read_text("utf-8") + f"\n__path__.append({str(ROOT / package)!r})\n"
            (into / package / "__init__.py").write_text(text, "utf-8")
            package = package.parent
        for edit in what.edits:
            if edit.file == file:
                if (times := source.count(edit.text)) != 1:
                    raise ValueError(f"{what.name}: {edit.text!r} stands {times} times in {file}, the mutant no longer fits")
                source = source.replace(edit.text, edit.wrong)
        (into / file).write_text(source, "utf-8")


def caught(what: Mutant, seeds: int) -> dict[str, Any]:
    """Run the simulation (or the mutant's own check) against the copy until something turns red."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        copy = Path(directory)
        plant(what, copy)
        began = perf_counter()
        command = [sys.executable, "-m", "bench.faults.cli", "simulate", "--seeds", f"0..{seeds}", "--stop", "--json"]
        if what.check:
            command = [sys.executable, "-m", what.check]
        compiled = (copy / "features" / "compiled.py").exists()
        data = copy / "data" if compiled else Path(os.environ.get("CHURN_DATA_DIR") or ROOT / ".churnstream")
        environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{ROOT}", "CHURN_DATA_DIR": str(data.resolve())}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        lines = done.stdout.splitlines()
        try:
            report = json.loads(lines[-1])
        except (IndexError, ValueError):
            raise RuntimeError(f"{what.name}: no report: {done.stderr[-2_000:]}") from None
        violation = report.get("first_violation")
        invariant = violation["invariant"] if violation else ""
        return {
            "mutant": what.name,
            "what": what.what,
            "caught": invariant in what.shows,
            "invariant": invariant,
            "seed": violation["seed"] if violation else None,
            "seeds": report["seeds"],
            "seconds": round(perf_counter() - began, 1),
            "said": violation["what"][:300] if violation else "",
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mutants`."""
    parser.add_argument("--only", default="", metavar="M1,M2", help="these alone")
    parser.add_argument(
        "--max-seeds", type=int, default=SEEDS, metavar="N", help=f"a mutant that survives so many is not caught (default {SEEDS})"
    )
    parser.add_argument("--ledger", type=Path, metavar="FILE", help="file the report is appended to, as one line of JSON")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")


def main(arguments: argparse.Namespace) -> int:
    """Run `mutants`; 1 when one was not caught."""
    chosen = [what for what in MUTANTS if not arguments.only or what.name in arguments.only.split(",")]
    results = []
    for what in chosen:
        result = caught(what, arguments.max_seeds)
        results.append(result)
        words = (
            f"{result['invariant']} at seed {result['seed']}"
            if result["caught"]
            else f"NOT CAUGHT ({result['invariant'] or 'nothing'} turned red)"
        )
        print(f"{what.name:4} {words:32} {result['seconds']:6} s  {what.what}", file=sys.stderr)
    report = summary(results)
    if arguments.ledger is not None:
        line = {"commit": commit(), "sources": sources_digest(), **report}
        with arguments.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if arguments.json:
        print(json.dumps(report))
    return int(report["caught"] < report["mutants"])


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run."""
    return {
        "mutants": len(results),
        "caught": sum(result["caught"] for result in results),
        "not_caught": [result["mutant"] for result in results if not result["caught"]],
        "seconds": round(sum(result["seconds"] for result in results), 1),
        "results": results,
    }
