"""Faults planted into the text of the real kernel, one at a time: verification must see each of them, and none without one.

A fault is a replacement that has to fit exactly once, so a kernel whose text changes under it fails here instead of quietly
being tested no more. Compiling takes longer than verifying, so a copy of the sources is compiled once with every fault in it behind
a switch (`if PLANTED[0] == number: the fault, else: the text as it is`), and one process verifies it with each switch in turn.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
WORLDS = 2
"""At most so many worlds of 200 customers, some 3,500 vectors each."""
SWITCH = """

import numpy as np

# Over a megabyte: Numba then reads the array where it lies. A small one would be compiled in as a constant.
PLANTED = np.zeros(200_000, np.int64)
"""
VERIFY = """
import json, sys
import features
from features.compiled import PLANTED
from features.verify import Found, check_world, report
for number in map(int, sys.argv[2:]):
    PLANTED[0] = number
    total = Found()
    for index in range(int(sys.argv[1])):
        total.add(check_world(11, index))
        if total.mismatches:
            break
    print(json.dumps({"file": features.__file__, "number": number, **report(total, 11, 0.0)}), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """name; edits (file, text as it is, text with the fault); shows: where it must be seen: features, or what else is compared."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    shows: frozenset[str]


def fault(name: str, *edits: tuple[str, str, str], shows: set[str]) -> Fault:
    return Fault(name, edits, frozenset(shows))


KERNEL, AGGREGATE, VECTOR = "kernel.py", "aggregate.py", "vector.py"
FAULTS = (
    fault(
        "left edge closed",
        (KERNEL, "while i < end and facts[i, TIME] <= edge:", "while i < end and facts[i, TIME] < edge:"),
        shows={"event_count_1h", "login_count_7d", "purchase_count_30d"},
    ),
    fault(
        "right edge open: the event being scored is left out",
        (
            KERNEL,
            "        _accept(t, s, batch, j, now)\n",
            "        evaluate(t.totals, s, now, vectors, scored)\n        _accept(t, s, batch, j, now)\n",
        ),
        (KERNEL, "        outcome[j] = SCORED\n        evaluate(t.totals, s, now, vectors, scored)\n", "        outcome[j] = SCORED\n"),
        shows={"event_count_1h", "purchase_count_24h", "login_count_24h"},
    ),
    fault(
        "sums in float64",
        (
            AGGREGATE,
            "rows[r, ADDS[k, 1]] += contribution(facts, i, ADDS[k, 2])",
            "rows[r, ADDS[k, 1]] = np.int64(np.float64(rows[r, ADDS[k, 1]]) + np.float64(contribution(facts, i, ADDS[k, 2])))",
        ),
        shows={"spend_minor_sum_24h", "spend_minor_sum_7d", "spend_minor_sum_30d", "spend_minor_sum_90d", "spend_minor_change_30d"},
    ),
    fault(
        "missed eviction",
        (KERNEL, "= facts[i, TIME] + LENGTHS[window] if i < end else NEVER", "= NEVER"),
        shows={"event_count_1h", "login_count_7d", "active_days_30d"},
    ),
    fault(
        "late fact appended, not inserted",
        (KERNEL, "p = _position(facts, start, end, batch, j)", "p = end"),
        shows={"event_count_1h", "event_count_24h", "login_count_7d", "purchase_count_7d", "order"},
    ),
    fault(
        "duplicate counted",
        (KERNEL, "known = find(t.entries, s * OWNERS + IDS, batch[j, ID])", "known = -1"),
        shows={"outcome", "event_count_1h", "spend_minor_sum_life"},
    ),
    fault(
        "ties reordered: the last purchase",
        (
            AGGREGATE,
            "if topic == rows[r, at + 2] and offset < rows[r, at + 3]:",
            "if topic == rows[r, at + 2] and offset > rows[r, at + 3]:",
        ),
        shows={"last_purchase_minor"},
    ),
    fault(
        "ties reordered: the history",
        (KERNEL, "return bool(left[i, OFFSET] < right[j, OFFSET])", "return bool(left[i, OFFSET] > right[j, OFFSET])"),
        shows={"order"},
    ),
    fault(
        "0 instead of NaN",
        (VECTOR, "return np.nan if below == 0.0 else above / below", "return 0.0 if below == 0.0 else above / below"),
        shows={"spend_minor_mean_90d", "csat_mean_90d"},
    ),
    fault(
        "time zone",
        (VECTOR, "HOURS_SIN[(at // HOUR_MS) % 24]", "HOURS_SIN[(at // HOUR_MS + 1) % 24]"),
        (AGGREGATE, "return int(facts[i, TIME] // DAY_MS + 1)", "return int((facts[i, TIME] + 3_600_000) // DAY_MS + 1)"),
        shows={"hour_sin", "active_days_7d"},
    ),
    fault(
        "wrong customer",
        (
            KERNEL,
            "        outcome[j] = SCORED\n        evaluate(t.totals, s, now",
            "        outcome[j] = SCORED\n        evaluate(t.totals, slots[max(j - 1, 0)], now",
        ),
        shows={"event_count_1h", "tenure_days"},
    ),
)


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit of one fault: the whole statements it touches, lines [first, last) of the source, and their text with the fault."""

    number: int
    first: int
    last: int
    lines: Sequence[str]


def edits_of(file: str, source: str, faults: Sequence[Fault]) -> list[Edit]:
    """The edits of all faults in a file, by their first line. Raises AssertionError when one does not fit exactly once."""
    lines = source.splitlines(keepends=True)
    found = []
    for number, what in enumerate(faults, 1):
        for _, text, wrong in (edit for edit in what.edits if edit[0] == file):
            assert source.count(text) == 1, f"{what.name}: {text!r} stands {source.count(text)} times in {file}, the fault no longer fits"
            at = source.index(text)
            first = source.count("\n", 0, at)
            last = source.count("\n", 0, at + len(text.rstrip("\n"))) + 1
            # A compound statement goes with all that belongs to it.
            while last < len(lines) and lines[last].strip() and _indent(lines[last]) > _indent(lines[first]):
                last += 1
            begin = sum(map(len, lines[:first]))
            changed = source[begin:at] + wrong + source[at + len(text) : sum(map(len, lines[:last]))]
            found.append(Edit(number, first, last, changed.splitlines(keepends=True)))
    return sorted(found, key=lambda edit: (edit.first, edit.number))


def switched(file: str, source: str, faults: Sequence[Fault]) -> str:
    """The source with every fault in it behind its switch."""
    lines = source.splitlines(keepends=True)
    out: list[str] = []
    done = 0
    edits = edits_of(file, source, faults)
    while edits:
        first, last = edits[0].first, edits[0].last
        here = [edit for edit in edits if edit.first < last]
        assert all((edit.first, edit.last) == (first, last) for edit in here), f"{file}:{first + 1}: two faults overlap"
        pad = " " * _indent(lines[first])
        out += lines[done:first]
        for word, edit in zip(("if", *["elif"] * len(here)), here, strict=False):
            out += [f"{pad}{word} PLANTED[0] == {edit.number}:\n", *(f"    {line}" for line in edit.lines)]
        out += [f"{pad}else:\n", *(f"    {line}" for line in lines[first:last])]
        done, edits = last, edits[len(here) :]
    return "".join([*out, *lines[done:]])


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def plant(faults: Sequence[Fault], into: Path) -> Path:
    """A copy of the sources with the faults in it."""
    for package in ("features", "proto"):
        copytree(ROOT / package, into / package, ignore=ignore_patterns("__pycache__"))
    compiled = into / "features" / "compiled.py"
    compiled.write_text(compiled.read_text(encoding="utf-8") + SWITCH, encoding="utf-8")
    for file in sorted({file for what in faults for file, _, _ in what.edits}):
        path = into / "features" / file
        source = path.read_text(encoding="utf-8")
        text = switched(file, source, faults)
        assert text.count("from features.compiled import kernel") == 1, f"{file}: the switch is imported with the decorator"
        path.write_text(
            text.replace("from features.compiled import kernel", "from features.compiled import PLANTED, kernel"), encoding="utf-8"
        )
    return into


def verified(copy: Path, numbers: Sequence[int]) -> dict[int, dict[str, object]]:
    """What verification says with each of these switches set; 0 sets none.

    A planted fault may write beyond its arrays, and end the process while a later one is tried: the rest is tried in a fresh one.
    """
    environment = {**os.environ, "PYTHONPATH": str(copy), "CHURN_DATA_DIR": str(copy / "data")}
    found: dict[int, dict[str, object]] = {}
    while left := [number for number in numbers if number not in found]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore::numba.NumbaWarning", "-c", VERIFY, str(WORLDS), *map(str, left)],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        new = {line["number"]: line for line in map(json.loads, done.stdout.splitlines())}
        assert done.returncode == 0 or (new and done.returncode == -signal.SIGSEGV), f"after {sorted(found | new)}:\n{done.stderr[-3000:]}"
        found |= new
    assert all(Path(str(line["file"])).is_relative_to(copy) for line in found.values()), (
        "the copy was to be verified, not the sources beside it"
    )
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Mapping[str, object]]:
    """Of each fault by its number what verification found; 0 is no fault, asked last so that a switch is seen to go off again."""
    copy = plant(FAULTS, tmp_path_factory.mktemp("planted"))
    return verified(copy, [*range(1, len(FAULTS) + 1), 0])


def test_the_copy_with_no_switch_set_passes(found: Mapping[int, Mapping[str, object]]) -> None:
    assert found[0]["mismatches"] == 0, found[0]["first_mismatches"]
    assert isinstance(found[0]["cases"], int)
    assert found[0]["cases"] > 5_000


@pytest.mark.parametrize("number", range(1, len(FAULTS) + 1), ids=[what.name for what in FAULTS])
def test_a_planted_fault_is_seen(number: int, found: Mapping[int, Mapping[str, object]]) -> None:
    what, said = FAULTS[number - 1], found[number]
    assert isinstance(said["mismatches"], int)
    assert said["mismatches"] > 0
    seen = said["mismatches_by"]
    assert isinstance(seen, dict)
    assert what.shows & seen.keys(), seen


def test_a_fault_that_no_longer_fits_is_an_error() -> None:
    source = (ROOT / "features" / KERNEL).read_text(encoding="utf-8")
    gone = fault("gone", (KERNEL, "this text is not there", "pass"), shows={"order"})
    with pytest.raises(AssertionError, match="no longer fits"):
        switched(KERNEL, source, [gone])
