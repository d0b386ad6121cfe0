"""Faults planted into the text of the real kernel, one at a time: verification must see each of them, and none without one.

A fault is a replacement that has to fit exactly once, so a kernel whose text changes under it fails here instead of
quietly being tested no more. Each copy is compiled and verified in a process of its own.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

import pytest

from features.compiled import CACHE_DIRECTORY, cache_directory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WORLDS = 2
"""At most so many worlds of 200 customers, some 3,500 vectors each."""
VERIFY = """
import json, sys
import features
from features.verify import Found, check_world, report
total = Found()
for index in range(int(sys.argv[1])):
    total.add(check_world(11, index))
    if total.mismatches:
        break
print(json.dumps({"file": features.__file__, **report(total, 11, 0.0)}))
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """name; edits (file, text as it is, text with the fault); shows: where it must be seen: features, or what else is compared."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    shows: frozenset[str]


def fault(name: str, *edits: tuple[str, str, str], shows: set[str]) -> Fault:
    return Fault(name, edits, frozenset(shows))


UNTOUCHED = ("index", "state")
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
            "        _accept(t, s, batch, j, now)\n        if",
            "        evaluate(t.totals, s, now, vectors, scored)\n        _accept(t, s, batch, j, now)\n        if",
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


def plant(what: Fault, into: Path) -> None:
    """Edit the copy. Raises AssertionError when an edit does not fit exactly once."""
    for file, text, wrong in what.edits:
        path = into / "features" / file
        source = path.read_text(encoding="utf-8")
        assert source.count(text) == 1, f"{what.name}: {text!r} stands {source.count(text)} times in {file}, the fault no longer fits"
        path.write_text(source.replace(text, wrong), encoding="utf-8")


def copied(into: Path) -> Path:
    for package in ("features", "proto"):
        copytree(ROOT / package, into / package, ignore=ignore_patterns("__pycache__"))
    return into


def _share_machine_code(copy: Path) -> None:
    """Give the copy the compiled functions of modules no fault touches: half of the time of a compilation.

    They call nothing of the others; if they did, a fault would at worst be seen less, and its test fail.
    """
    there = cache_directory(copy / "features", copy / "data")
    for module in UNTOUCHED:
        import_module(f"features.{module}")  # compiled, if nobody has done it yet
        own = _machine_code(CACHE_DIRECTORY, ROOT / "features" / f"{module}.py")
        theirs = _machine_code(there, copy / "features" / f"{module}.py")
        theirs.mkdir(parents=True, exist_ok=True)
        for file in own.glob(f"{module}.*"):
            copy2(file, theirs)


def _machine_code(cache: Path, source: Path) -> Path:
    """Where Numba keeps what it compiled from a source file."""
    locator = import_module("numba.core.caching").UserProvidedCacheLocator
    return cache / str(locator.get_suitable_cache_subpath(str(source)))


def verified(copy: Path) -> dict[str, object]:
    """What verification says about the sources in `copy`, run with their own compiler cache."""
    _share_machine_code(copy)
    environment = {**os.environ, "PYTHONPATH": str(copy), "CHURN_DATA_DIR": str(copy / "data")}
    done = subprocess.run(
        [sys.executable, "-c", VERIFY, str(WORLDS)], cwd=copy, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert Path(str(found["file"])).is_relative_to(copy), "the copy was to be verified, not the sources beside it"
    return found


def test_the_copy_without_a_fault_passes(tmp_path: Path) -> None:
    found = verified(copied(tmp_path))
    assert found["mismatches"] == 0, found["first_mismatches"]
    assert isinstance(found["cases"], int)
    assert found["cases"] > 5_000


@pytest.mark.parametrize("what", FAULTS, ids=lambda what: what.name)
def test_a_planted_fault_is_seen(what: Fault, tmp_path: Path) -> None:
    copy = copied(tmp_path)
    plant(what, copy)
    found = verified(copy)
    assert isinstance(found["mismatches"], int)
    assert found["mismatches"] > 0
    seen = found["mismatches_by"]
    assert isinstance(seen, dict)
    assert what.shows & seen.keys(), seen


def test_every_fault_fits_the_kernel_as_it_is(tmp_path: Path) -> None:
    for number, what in enumerate(FAULTS):
        plant(what, copied(tmp_path / str(number)))
