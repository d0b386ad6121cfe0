"""Rounds by the hundred: which fault comes when, the ledger, and what to do when the ground itself gives way."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from bench.faults import ledger
from bench.faults.nemesis import FAULTS, Fault
from bench.faults.nursery import Fresh, Nursery, Starter
from bench.faults.rounds import Outcome, Shelf, run_round
from bench.faults.servers import Ground, NotUp
from streams.settings import Settings

MODES: Final = ("at_least_once", "exactly_once") if "delivery" in Settings.model_fields else ("at_least_once",)
FRESH_GROUND_AFTER: Final = 60
"""Rounds on one set of servers; a broker that has seen thousands of topics is another broker."""


def deck(seed: str) -> list[Fault]:
    """Every fault as often as its share, shuffled: the schedule of a campaign, repeated when it is longer."""
    cards = [fault for fault in FAULTS.values() for _ in range(fault.share)]
    random.Random(f"deck {seed}").shuffle(cards)
    return cards


def commit() -> str:
    """The commit these sources are at; with "+" when they are changed."""
    root = Path(__file__).parent.parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def run(
    *,
    seed: str,
    rounds: int,
    faults: Sequence[str] = (),
    mode: str | None = None,
    events: int | None = None,
    fresh: bool = False,
    book: Path,
    home: Path,
    say: Callable[[str], None],
) -> list[ledger.Line]:
    """Run what of the rounds 0 to `rounds` of a seed is not in the ledger yet; returns the lines of all of them.

    faults: only these, in turn. fresh: worker processes start as in production instead of by fork. home: directory for servers and logs.
    """
    cards = [FAULTS[name] for name in faults] or deck(seed)
    picks = [cards[i % len(cards)] for i in range(rounds)]
    wanted = {f"{seed}:{fault.name}:{i // len(cards)}" if faults else f"{seed}:{i}": fault for i, fault in enumerate(picks)}
    there = {line["seed"]: line for line in ledger.read(book)}
    left = [(key, fault) for key, fault in wanted.items() if key not in there]
    at = commit()
    left.sort(key=lambda item: (item[1].nodes, item[1].fresh or fresh))  # rounds on the same ground together
    while left:
        kind = left[0][1].nodes, left[0][1].fresh or fresh
        part = list(takewhile(lambda item, kind=kind: (item[1].nodes, item[1].fresh or fresh) == kind, left))[:FRESH_GROUND_AFTER]  # type: ignore[misc]  # the default binds this turn's value, which mypy cannot type
        left = left[len(part) :]
        try:
            _rounds(part, mode, events, at, kind[1], book, home, say)
        except NotUp as error:
            # Not the product's doing, so no round of it: its turn comes again on new servers.
            done = {line["seed"] for line in ledger.read(book)}
            again = [item for item in part if item[0] not in done]
            say(f"new servers: {error}")
            if len(again) == len(part):
                raise
            left = again + left
    return [line for line in ledger.read(book) if line["seed"] in wanted]


def _rounds(
    part: Sequence[tuple[str, Fault]],
    mode: str | None,
    events: int | None,
    at: str,
    fresh: bool,
    book: Path,
    home: Path,
    say: Callable[[str], None],
) -> None:
    shelf = Shelf(home.parent / "models")
    with ExitStack() as stack:
        ground = stack.enter_context(Ground(home / "ground", nodes=part[0][1].nodes))
        starter: Starter = Fresh() if fresh else stack.enter_context(Nursery())
        shelf.fill(Settings(kafka_bootstrap_servers=ground.kafka, replication=ground.nodes))
        for key, fault in part:
            draw = random.Random(f"round {key}")
            chosen = mode or (draw.choice(MODES) if fault.mode is None else fault.mode)
            count = events or (fault.events if draw.random() > 0.08 or fault.events > 3_000 else 20_000)
            outcome = run_round(ground, starter, fault, key, events=count, mode=chosen, shelf=shelf, commit=at, directory=home / "round")
            ledger.append(book, outcome.line())
            say(_line(outcome))
            if outcome.violations:
                _keep(home, key)


def _line(outcome: Outcome) -> str:
    verdict = "; ".join(outcome.violations[:3]) if outcome.violations else "ok"
    recovered = f" recovered {outcome.recover_s:.1f} s" if outcome.recover_s is not None else ""
    return (
        f"{outcome.seed} {outcome.fault} {outcome.mode} {outcome.events} events {outcome.seconds:.1f} s{recovered}"
        f" duplicates {outcome.raw_duplicates}: {verdict}"
    )


def _keep(home: Path, key: str) -> None:
    """The logs of a violated round."""
    target = home.parent / "failed" / key.replace(":", "_")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(home / "round", target, ignore=shutil.ignore_patterns("data", "backup"))


def to_stderr(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def figures(lines: Sequence[ledger.Line], book: Path) -> dict[str, Any]:
    """What `run` says at its end: figures of its rounds, and the totals of the ledger."""
    total = ledger.summary(ledger.read(book))
    return {
        **ledger.summary(lines),
        "ledger": {key: total[key] for key in ("rounds", "violated", "events", "rounds_of_20000_events")},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `run`."""
    ledger.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=10, help="rounds 0 to N of the seed; those in the ledger are not run again")
    parser.add_argument("--fault", action="append", default=[], choices=FAULTS, metavar="NAME", help="only this one; may be given again")
    parser.add_argument("--events", type=int, help="records a round")
    parser.add_argument("--fresh", action="store_true", help="start workers as in production instead of by fork")
    parser.add_argument("--each", type=int, metavar="N", help="every fault (or each --fault) N times, instead of --rounds")
    parser.add_argument("--anew", action="store_true", help="run them all, whatever a ledger holds: a ledger of its own, begun empty")


def main(arguments: argparse.Namespace) -> int:
    """Run; the figures as one JSON object on the last line. 1 when a round was violated."""
    book = arguments.ledger or ledger.home() / "ledger.jsonl"
    if arguments.anew:
        book = ledger.home() / f"anew{arguments.lane}.jsonl"
        book.unlink(missing_ok=True)
    faults = arguments.fault or (sorted(FAULTS) if arguments.each else [])
    lines = run(
        seed=arguments.seed,
        rounds=len(faults) * arguments.each if arguments.each else arguments.rounds,
        faults=faults,
        mode=arguments.mode,
        events=arguments.events,
        fresh=arguments.fresh,
        book=book,
        home=ledger.home() / f"lane{arguments.lane}",
        say=to_stderr,
    )
    found = figures(lines, book)
    print(json.dumps(found))
    return int(bool(found["violated"]))
