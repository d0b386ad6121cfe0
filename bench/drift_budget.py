"""False pages of all detectors together on streams that do not drift, and how soon they see one that does.

    python -m bench.drift_budget [--quick] [--fault raw] --json

Streams of 40 series in two segments, 60 events an hour: with cycles of day and week, with tails without a variance, with persistence
(hours and days), each many times 28 days of baseline and then months without any drift. A page is a finding after seven days without
one. The upper end of the rate is that of a Poisson count at 95 %. --fault raw takes out cycle, persistence and the correction for many
tests: the check must then fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2

from drift.baseline import Baseline, fit
from drift.monitor import Monitor
from drift.policy import Pager
from drift.series import Series, Tally, edges_of
from features.window import DAY_MS, HOUR_MS

FAMILIES: Final = ("seasonal", "heavy-tailed", "autocorrelated")
SERIES: Final = 40
EVENTS: Final = 60
BASE_DAYS: Final = 28
SIZES: Final = (0.1, 0.2, 0.35, 0.5, 1.0)
"""Planted shifts, in standard deviations of a single value (Pareto: on the log scale)."""
Floats = npt.NDArray[np.float64]


def days(family: str, rng: np.random.Generator, count: int, shift: Floats | None = None) -> Iterator[tuple[Any, Floats, Any]]:
    """(instants, values (n, SERIES), segments) of one day after the other; shift (SERIES,) is added to every value."""
    hour_phase, week_phase = rng.uniform(0, 2 * np.pi, SERIES), rng.uniform(0, 2 * np.pi, SERIES)
    depth = 1.0 if family == "seasonal" else 0.3
    slow, fast = np.zeros(SERIES), np.zeros(SERIES)
    for day in range(count):
        # Persistent levels: a mood of days and one of hours.
        if family == "autocorrelated":
            slow = 0.6 * slow + rng.normal(0, 0.15 * np.sqrt(1 - 0.6**2), SERIES)
        load = EVENTS * (1 + 0.6 * np.sin(2 * np.pi * (np.arange(24) - 9) / 24)) * (0.6 if day % 7 >= 5 else 1.0)
        counts = rng.poisson(load)
        hour = np.repeat(np.arange(24), counts)
        levels = np.empty((24, SERIES))
        for h in range(24):
            if family == "autocorrelated":
                fast = 0.9 * fast + rng.normal(0, 0.15 * np.sqrt(1 - 0.9**2), SERIES)
            levels[h] = slow + fast + depth * (np.sin(2 * np.pi * h / 24 + hour_phase) + 0.5 * np.sin(2 * np.pi * day / 7 + week_phase))
        values = rng.normal(0, 1, (len(hour), SERIES)) + levels[hour]
        if shift is not None:
            values += shift
        if family == "heavy-tailed":
            values = np.exp(2.5 * values)  # no moment of use: the mean of a million values is one of them
        yield day * DAY_MS + hour * HOUR_MS + rng.integers(0, HOUR_MS, len(hour)), values, rng.integers(1, 3, len(hour))


def baseline(family: str, world: int) -> tuple[Baseline, Tally]:
    """28 days of a world, and the tally that goes on counting by its bins."""
    first = list(days(family, np.random.default_rng([world, 1]), BASE_DAYS))
    edges = edges_of(np.concatenate([values for _, values, _ in first[:7]]))
    tally = Tally.of(edges, 2, HOUR_MS)
    for at, values, segment in first:
        tally.add(at, values, segment)
    slots = tally.close(2**62)
    series = [Series(f"f{i}", "feature") for i in range(SERIES)]
    starts, counts = np.array([at for at, _ in slots]), np.array([c for _, c in slots])
    base = fit(series, ("a", "b"), edges, starts, counts)
    return base, Tally.of(edges, 2, base.block_ms)


def watch(family: str, world: int, length: int, fault: bool, shift: Floats | None = None, calm: int = 0) -> Iterator[tuple[int, Any]]:
    """(event count so far, finding) of `length` days behind the baseline; the shift begins after `calm` of them."""
    base, tally = baseline(family, world)
    monitor = Monitor(base, raw=fault)
    # The same generator as the baseline's: the world goes on, it does not begin anew.
    going_on = days(family, np.random.default_rng([world, 1]), BASE_DAYS + length)
    events = 0
    for day, (at, values, segment) in enumerate(going_on):
        if day < BASE_DAYS:
            continue
        if shift is not None and day >= BASE_DAYS + calm:
            values = values * np.exp(2.5 * shift) if family == "heavy-tailed" else values + shift  # noqa: PLW2901 - the day, shifted
        tally.add(at, values, segment)
        for start, counts in tally.close((day + 1) * DAY_MS):
            events += int(counts[0, 0].sum())
            for finding in monitor.update(start, counts):
                yield events, finding


def false_pages(family: str, worlds: int, length: int, fault: bool) -> dict[str, Any]:
    """Pages and findings of quiet streams."""
    pages = findings = 0
    by: dict[str, int] = {}
    for world in range(worlds):
        pager = Pager()
        for _, finding in watch(family, 100 + world, length, fault):
            pager.note("", finding.at_ms, 1)
            findings += 1
            by[f"{finding.detector}/{finding.window}"] = by.get(f"{finding.detector}/{finding.window}", 0) + 1
        pages += pager.pages
    months = worlds * length / 30
    return {
        "months": round(months, 1),
        "pages": pages,
        "pages_per_30_days": round(pages / months, 4),
        "upper_95": round(float(chi2.ppf(0.95, 2 * pages + 2)) / 2 / months, 4),
        "findings": findings,
        "by_detector": by,
    }


def delays(family: str, worlds: int, length: int, fault: bool) -> dict[str, Any]:
    """How many events, and days, after its beginning a shift is found, by its size: median over series and worlds, share found."""
    calm = 7
    shift = np.tile(SIZES, SERIES // len(SIZES))
    events: dict[float, list[float]] = {size: [] for size in SIZES}
    times: dict[float, list[float]] = {size: [] for size in SIZES}
    for world in range(worlds):
        first: dict[str, tuple[int, int]] = {}
        begin_ms = (BASE_DAYS + calm) * DAY_MS
        for seen, finding in watch(family, 500 + world, length, fault, shift, calm):
            if finding.at_ms > begin_ms and finding.series not in first:
                first[finding.series] = seen, finding.at_ms
        for i, size in enumerate(shift.tolist()):
            seen, at = first.get(f"f{i}", (0, 0))
            a_day = EVENTS * 24 * (5 + 2 * 0.6) / 7
            events[size].append(seen - calm * a_day if at else np.inf)
            times[size].append((at - begin_ms) / DAY_MS if at else np.inf)
    return {
        str(size): {
            "found": round(float(np.isfinite(times[size]).mean()), 3),
            "median_days": None if np.isinf(median := float(np.median(times[size]))) else round(median, 2),
            "median_events": None if np.isinf(median := float(np.median(events[size]))) else round(median),
        }
        for size in SIZES
    }


def main() -> int:
    """Run; 0 when the upper end of the rate of false pages is within the budget in every family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the months")
    parser.add_argument("--fault", choices=("raw",), help="leave out what keeps the budget")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    cpu = time.process_time()
    worlds, length = (3, 122) if args.quick else (12, 122)
    families = {family: false_pages(family, worlds, length, bool(args.fault)) for family in FAMILIES}
    curve = {family: delays(family, 1 if args.quick else 2, 60, bool(args.fault)) for family in FAMILIES}
    pages, months = sum(f["pages"] for f in families.values()), sum(f["months"] for f in families.values())
    worst = max(f["pages_per_30_days"] for f in families.values())
    upper = float(chi2.ppf(0.95, 2 * pages + 2)) / 2 / months
    report = {
        "families": families,
        "delay": curve,
        "months": round(months, 1),
        "pages": pages,
        "pages_per_30_days": round(pages / months, 4),
        "upper_95": round(upper, 4),
        "worst_family": worst,
        "detectors": SERIES * 3 * 7,
        "fault": args.fault,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "ok": upper <= 1.0 and worst <= 1.0,
    }
    for family, found in families.items():
        print(
            f"{family}: {found['pages']} pages in {found['months']} months (upper 95 %: {found['upper_95']} per 30 days)", file=sys.stderr
        )
    print(json.dumps(report) if args.json else json.dumps(report, indent=2))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
