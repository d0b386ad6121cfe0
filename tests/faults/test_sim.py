"""The simulation: a sample of seeds holds, a seed is a run, and its checker sees what it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from bench.faults.cli import main
from bench.faults.sim import Run, simulate
from bench.faults.sim_broker import Log, Message
from bench.faults.sim_campaign import builds, campaign, read, run, sources, sources_digest
from bench.faults.sim_redis import Broken
from bench.faults.sim_worker import DEAD_LETTERS, SCORES

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = Path(os.environ.get("CHURN_DATA_DIR") or ROOT / ".churnstream").resolve()
SAMPLE = 600
"""Half a minute of processor time; 50,000 seeds are a command (docs/reliability.md)."""
PIECES = 4
"""Of the sample, so that several cores share it."""


@pytest.mark.parametrize("piece", range(PIECES))
def test_a_sample_of_seeds_holds(piece: int) -> None:
    each = SAMPLE // PIECES
    tally = run(piece * each, (piece + 1) * each)
    assert tally.first_violation is None
    assert tally.seeds == each
    assert len(tally.faults) > 10
    assert tally.raw_duplicates > 0


def test_the_same_seed_is_the_same_run_in_another_process(tmp_path: Path) -> None:
    here = [simulate(seed).digest for seed in range(8)]
    assert len(set(here)) == len(here)
    code = "from bench.faults.sim import simulate; print(*[simulate(seed).digest for seed in range(8)])"
    environment = {**os.environ, "CHURN_DATA_DIR": str(SHARED_DATA)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == here


@cache
def calm() -> int:
    """A seed without a fault, that holds, and has enough to be spoiled."""
    return next(seed for seed in range(100) if not (found := simulate(seed)).violation and not found.faults and found.scores > 20)


def spoil(log: Log, position: int, change: Callable[[bytes], bytes]) -> None:
    message = log.messages[position]
    log.messages[position] = Message(message.place, message.at, change(message.value() or b""), message.key())


def drop(log: Log, position: int) -> None:
    del log.messages[position], log.offsets[position]


def swap(log: Log) -> None:
    """Exchange the first record with the next one of the same topic."""
    topics = [json.loads(message.value() or b"")["source"]["topic"] for message in log.messages]
    other = topics.index(topics[0], 1)
    log.messages[0], log.messages[other] = log.messages[other], log.messages[0]


def invent(log: Log) -> None:
    """A record of an input record that does not exist."""
    record = json.loads(log.messages[-1].value() or b"")
    record["source"]["offset"] += 1_000
    record.pop("cut", None)
    log.append(b"k", json.dumps(record).encode(), 0)


@pytest.mark.parametrize(
    ("invariant", "what"),
    [
        ("I1", lambda run: drop(run.broker.log(SCORES, 0), -1)),
        ("I1", lambda run: drop(run.broker.log(DEAD_LETTERS, 0), -1)),
        ("I2", lambda run: invent(run.broker.log(DEAD_LETTERS, 0))),
        ("I2", lambda run: run.broker.log(SCORES, 0).append(b"k", (run.broker.log(SCORES, 0).messages[2].value() or b"") + b" ", 0)),
        ("I3", lambda run: run.redis.state[0].chunks.clear() or run.redis.state[0].mains.popitem()),
        ("I4", lambda run: spoil(run.broker.log(SCORES, 0), -1, lambda value: value.replace(b'"fallback":true', b'"fallback":false'))),
        ("I5", lambda run: swap(run.broker.log(SCORES, 0))),
    ],
    ids=["score lost", "dead letter lost", "score of nothing", "copy differs", "customer lost", "score changed", "order"],
)
def test_the_checker_sees(invariant: str, what: Callable[[Run], object]) -> None:
    broken = Run(calm(), at_rest=what).outcome()
    assert broken.invariant == invariant, broken.violation


def test_a_campaign_goes_on_where_it_was_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = tmp_path / "ledger.jsonl"
    first = campaign(0, 5, ledger=ledger, processes=1, stop=False)
    with ledger.open("a") as file:
        file.write('{"commit": "", "sour')  # cut off by a crash
    again = campaign(0, 5, ledger=ledger, processes=1, stop=False)
    assert again.seconds == first.seconds, "a slice in the ledger is not run again"
    assert (again.seeds, again.events, again.faults) == (5, first.events, first.faults)
    assert len(ledger.read_text().splitlines()) == 2
    (build,) = builds(read(ledger))
    assert (build["seeds"], build["violations"], build["sources"]) == (5, 0, sources_digest())
    assert main(["simulate", "--seeds", "0..5", "--ledger", str(ledger), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["seeds"], report["violations"], report["first_violation"]) == (5, 0, None)


def test_a_build_is_named_by_what_runs_in_a_simulation() -> None:
    names = sources().keys()
    assert {"streams.engine", "streams.rebuild", "features.kernel", "bench.faults.sim_check", "proto.errors"} <= names
    assert not {"streams.cli", "streams.main", "bench.faults.report"} & names


def test_broken_names_its_invariant() -> None:
    assert str(Broken("I1", "text")) == "I1: text"
