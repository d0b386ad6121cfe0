"""The claims ledger: every figure we state, measured again by its command and compared with its floor and its target.

    python -m bench.claims [--issue NAME] [--id ID] [--quick] [--ledger bench/claims.toml]

An entry names a command that prints one JSON object as its last line and the key of the figure in it. Below the floor the claim has
failed (exit code 1). Between floor and target the target is missed: listed with the reason that the ledger must give. Each distinct
command runs once, however many figures are read from it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LEDGER = Path(__file__).parent / "claims.toml"


class LedgerInvalid(Exception):
    """The ledger itself is wrong: exit code 4."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One entry of the ledger.

    key: dotted path into the command's last line; a number in the path indexes a list.
    direction: ">=" or "<=" with a number as floor and target, "==" with any value, "in" with a range "0.72..0.85" (both ends in).
    quick: a shorter command for --quick, quick_floor: the floor that holds for it when it differs. timeout_s: for one run of the command.
    reason: why the floor falls short of the target; needed when it does.
    """

    id: str
    issue: str
    statement: str
    command: str
    key: str
    direction: str
    target: Any
    floor: Any
    date: date
    quick: str = ""
    quick_floor: Any = None
    reason: str = ""
    timeout_s: float = 1800.0

    def holds(self, value: Any, bound: Any) -> bool:
        """Whether a measured value meets a bound. A value of another type does not."""
        if self.direction == "==":
            return type(value) is type(bound) and bool(value == bound)
        if not _number(value):
            return False
        match self.direction:
            case ">=":
                return bool(value >= bound)
            case "<=":
                return bool(value <= bound)
            case _:
                low, high = _range(bound)
                return bool(low <= value <= high)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one claim came to: the value (None when there is none) and an error text ("" when it was measured)."""

    claim: Claim
    value: Any
    floor: Any
    error: str

    @property
    def reason(self) -> str:
        """Why the target is missed."""
        return self.claim.reason or f"a quick run, whose floor is {self.floor}"

    @property
    def failed(self) -> bool:
        """Not measured, or beyond the floor."""
        return bool(self.error) or not self.claim.holds(self.value, self.floor)

    @property
    def missed(self) -> bool:
        """Measured and within the floor, but short of the target."""
        return not self.failed and not self.claim.holds(self.value, self.claim.target)


def read_ledger(path: Path) -> list[Claim]:
    """The entries. Raises LedgerInvalid naming the entry and what is wrong with it."""
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8")).get("claim", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise LedgerInvalid(f"{path}: {error}") from error
    known = {f.name for f in fields(Claim)}
    required = ("id", "issue", "statement", "command", "key", "direction", "target", "floor", "date")
    claims: list[Claim] = []
    for number, entry in enumerate(entries, 1):
        name = f"{path.name}: claim {entry.get('id', number)}"
        if unknown := set(entry) - known:
            raise LedgerInvalid(f"{name}: unknown field {', '.join(sorted(unknown))}")
        if missing := [field for field in required if field not in entry]:
            raise LedgerInvalid(f"{name}: missing {', '.join(missing)}")
        claim = Claim(**entry)
        _check(claim, name)
        if any(claim.id == other.id for other in claims):
            raise LedgerInvalid(f"{name}: the id is there twice")
        claims.append(claim)
    return claims


def _check(claim: Claim, name: str) -> None:
    if claim.direction not in (">=", "<=", "==", "in"):
        raise LedgerInvalid(f"{name}: direction {claim.direction!r} is none of >= <= == in")
    for field in ("target", "floor", "quick_floor"):
        bound = getattr(claim, field)
        if bound is None:
            continue
        if claim.direction in (">=", "<=") and not _number(bound):
            raise LedgerInvalid(f"{name}: {field} needs a number")
        if claim.direction == "in":
            _range(bound, f"{name}: {field}")
    short = claim.floor != claim.target if claim.direction in ("==", "in") else not claim.holds(claim.floor, claim.target)
    if short and not claim.reason.strip():
        raise LedgerInvalid(f"{name}: the floor falls short of the target, so the entry needs a reason")


def measure(claims: list[Claim], *, quick: bool = False) -> list[Outcome]:
    """Run each distinct command once and compare, in the order of the ledger."""
    results: dict[str, dict[str, Any] | str] = {}
    outcomes = []
    for claim in claims:
        short = quick and bool(claim.quick)
        command = claim.quick if short else claim.command
        if command not in results:
            results[command] = run(command, max(c.timeout_s for c in claims if command in (c.command, c.quick)))
        result = results[command]
        floor = claim.quick_floor if short and claim.quick_floor is not None else claim.floor
        if isinstance(result, str):
            outcomes.append(Outcome(claim, None, floor, result))
            continue
        try:
            outcomes.append(Outcome(claim, _at(result, claim.key), floor, ""))
        except (KeyError, IndexError, TypeError, ValueError):
            outcomes.append(Outcome(claim, None, floor, f"the last line of the command has no {claim.key}"))
    return outcomes


def run(command: str, timeout_s: float) -> dict[str, Any] | str:
    """The JSON object on the last line of a command's stdout, or a text that says why there is none."""
    _say(f"$ {command}")
    begin = time.monotonic()
    # As in a new shell: a `make` that knows it runs inside another one ends with a line about directories.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # A session of its own, so that a command that hangs is stopped with all it started.
    with subprocess.Popen(
        command, shell=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=timeout_s)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"the command did not end within {timeout_s:g} s"
            raise
    _say(f"  {time.monotonic() - begin:.1f} s, exit code {process.returncode}")
    lines = out.strip().splitlines()
    if process.returncode:
        return f"the command failed with exit code {process.returncode}"
    try:
        value = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        value = None
    return value if isinstance(value, dict) else "the last line of the command is no JSON object"


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 all within their floors, 1 a claim failed, 2 nothing selected, 4 the ledger is invalid."""
    parser = argparse.ArgumentParser(prog="claims", description="Measure every figure we state and compare it with its floor and target.")
    parser.add_argument("--issue", help="only the claims of this issue (case does not matter)")
    parser.add_argument("--id", help="only this claim")
    parser.add_argument("--quick", action="store_true", help="the shorter command where an entry has one")
    parser.add_argument("--ledger", type=Path, default=LEDGER)
    options = parser.parse_args(argv)
    try:
        ledger = read_ledger(options.ledger)
    except LedgerInvalid as error:
        _say(f"claims: {error}")
        return 4
    chosen = [
        c for c in ledger if (not options.issue or c.issue.lower() == options.issue.lower()) and (not options.id or c.id == options.id)
    ]
    if not chosen:
        _say(f"claims: no entry for issue {options.issue!r} id {options.id!r}; issues: {', '.join(sorted({c.issue for c in ledger}))}")
        return 2
    outcomes = measure(chosen, quick=options.quick)
    for o in outcomes:
        verdict = "FAILED" if o.failed else "missed target" if o.missed else "ok"
        _say(f"{verdict:>13}  {o.claim.id:<32} {o.error or o.value}  (floor {o.claim.direction} {o.floor}, target {o.claim.target})")
    failed = [o for o in outcomes if o.failed]
    summary = {
        "checked": len(outcomes),
        "quick": options.quick,
        "failed": [{"id": o.claim.id, "value": o.value, "floor": o.floor, "error": o.error} for o in failed],
        "missed_targets": [
            {"id": o.claim.id, "value": o.value, "target": o.claim.target, "reason": o.reason} for o in outcomes if o.missed
        ],
        "values": {o.claim.id: o.value for o in outcomes},
    }
    print(json.dumps(summary), flush=True)
    return 1 if failed else 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _range(text: Any, name: str = "range") -> tuple[float, float]:
    low, dots, high = str(text).partition("..")
    try:
        bounds = float(low), float(high)
    except ValueError:
        bounds = (1.0, 0.0)
    if not dots or bounds[0] > bounds[1]:
        raise LedgerInvalid(f'{name}: needs a range such as "0.72..0.85", got {text!r}')
    return bounds


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
