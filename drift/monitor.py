"""The detectors of all series and segments, fed with one closed block after another."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from river.drift import ADWIN

from drift.baseline import POOL_EVENTS, Baseline
from drift.budget import ADWIN_SLACK, DAYS, Budget
from drift.series import ALL, BINS, MISSING, MONDAY_MS, Floats, Ints
from drift.statistics import ks, psi, threshold
from features.window import DAY_MS

Detector = Literal["adwin", "psi", "ks"]
Window = Literal["block", "day", "week", "adaptive"]

CLIP: Final = 4.0
"""Standard deviations to each side that are mapped on [0, 1]: one wild block must not move a mean."""
KEPT: Final = 2_048
"""Values a detector holds at most; beyond it only the newer half stays, so its state is bounded and can be told again."""
PSI_FLOOR: Final = 0.10
KS_FLOOR: Final = 0.10
LEVEL_FLOOR: Final = 0.03
"""Distances (PSI, KS) and shifts of the mean rank below these are nobody's business, however certain they are."""
MEMORY: Final = 7.0
"""Independent days a series needs, to be held against them."""
MIN_LENGTH: Final = 5
"""Values on each side of a cut ADWIN considers."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A detector says that something has moved. before, after: mean rank expected by the cycle and found, in [0, 1]."""

    at_ms: int
    series: str
    segment: str
    detector: Detector
    window: Window
    statistic: float
    threshold: float
    before: float
    after: float
    since_ms: int
    events: int


@dataclass(slots=True)
class _Row:
    """One detector: what it has been fed since its last cut, and what waits for the next value."""

    adwin: ADWIN
    values: list[float] = field(default_factory=list)
    shifts: list[float] = field(default_factory=list)  # residuals of the same values, mean rank
    ends: list[int] = field(default_factory=list)
    weight: int = 0
    total: float = 0.0
    blocks: int = 0
    last: float | None = None


def bounded(z: float) -> float:
    """A standardised value in [0, 1]; 0.5 is the middle."""
    return min(max(0.5 + z / (2 * CLIP), 0.0), 1.0)


class Monitor:
    """Watches what `baseline` describes within `budget`. Everything it knows is a function of the blocks it was given."""

    def __init__(self, baseline: Baseline, budget: Budget | None = None, *, raw: bool = False) -> None:
        """raw: leave out cycle, persistence and correction for many tests; only to show what they are for."""
        self.baseline, self.budget, self._raw = baseline, budget or Budget(), raw
        b = baseline
        self._shape = b.sigma.shape
        self._names = (ALL, *b.segments)
        self._tested = ~b.ageing & (b.memory >= MEMORY)
        rows = int(self._tested.sum())
        per_month = DAYS * DAY_MS / b.block_ms
        longer = 0 if b.block_ms >= DAY_MS else 2 * DAYS
        tests = rows * 2 * (per_month + longer)
        alpha = 0.01 if raw else self.budget.alpha(self.budget.windows, tests)
        self.delta = 0.002 if raw else self.budget.alpha(ADWIN_SLACK * self.budget.adwin, rows * per_month)
        self._limit = {
            ("psi", "block"): threshold(b.block_psi, alpha, PSI_FLOOR, b.memory),
            ("ks", "block"): threshold(b.block_ks, alpha, KS_FLOOR, b.memory),
            ("psi", "day"): threshold(b.day_psi, alpha, PSI_FLOOR, b.memory),
            ("ks", "day"): threshold(b.day_ks, alpha, KS_FLOOR, b.memory),
        }
        self._levels = b.level(b.expected)  # by cell
        self._rows = {place: _Row(self._adwin()) for place in np.ndindex(self._shape) if self._tested[place]}
        for place, row in self._rows.items():
            seeds = b.seeds[(slice(None), *place)]
            self._restart(row, [bounded(float(z)) for z in seeds[np.isfinite(seeds)]], at=b.until_ms)
        self._day: int = -1
        self._counts = np.zeros((*self._shape, BINS), np.int64)
        self._wanted = np.zeros((*self._shape, BINS))
        self._week: deque[tuple[int, Ints, Floats]] = deque(maxlen=7)
        self.reached_ms = -1
        self._over: dict[str, npt.NDArray[np.bool_]] = {"psi": np.zeros(self._shape, np.bool_), "ks": np.zeros(self._shape, np.bool_)}
        self.distances: dict[str, Floats] = {}  # of the newest window of each length, (2, S, G + 1): PSI, KS

    # -- blocks in

    def update(self, start_ms: int, counts: npt.NDArray[np.integer]) -> list[Finding]:
        """The findings of a closed block that begins at `start_ms`, with counts (S, G + 1, BINS). In order, gaps are allowed."""
        if start_ms < self.reached_ms:
            raise ValueError(f"the block at {start_ms} comes after {self.reached_ms} was reached")
        b = self.baseline
        found = []
        day = (start_ms - MONDAY_MS) // DAY_MS
        if b.block_ms < DAY_MS and self._day >= 0 and day != self._day:
            found += self._close_day()
        self._day = day
        cell = b.cell(start_ms)
        n = counts.sum(axis=-1)
        expected = b.expected[cell] * n[..., None]
        self.reached_ms = start_ms + b.block_ms
        found += self._compare("block", start_ms, counts, expected)
        self._counts += counts
        self._wanted += expected
        if b.block_ms >= DAY_MS:
            self._week.append((start_ms, counts.astype(np.int64), expected))
        return found + self._levels_moved(start_ms, cell, counts)

    def limits(self, detector: Literal["psi", "ks"], window: Literal["block", "day"]) -> Floats:
        """Thresholds (S, G + 1) of a distance within the budget."""
        return self._limit[detector, window]

    def _close_day(self) -> list[Finding]:
        start = self._day * DAY_MS + MONDAY_MS
        found = self._compare("day", start, self._counts, self._wanted)
        self._week.append((start, self._counts, self._wanted))
        self._counts, self._wanted = np.zeros_like(self._counts), np.zeros_like(self._wanted)
        if len(self._week) == self._week.maxlen:
            days = list(self._week)
            counts, wanted = sum((one[1] for one in days), np.zeros_like(self._counts)), sum((one[2] for one in days), 0 * self._wanted)
            found += self._compare("week", days[0][0], counts, wanted)
        return found

    def _compare(self, window: Window, start_ms: int, counts: npt.NDArray[np.integer], expected: Floats) -> list[Finding]:
        """PSI and KS of a window against their thresholds; a week is held to those of a day, since it strays less."""
        if self._raw:
            expected = np.broadcast_to(self.baseline.expected.mean(axis=0), counts.shape) * counts.sum(axis=-1)[..., None]
        known = counts.sum(axis=-1)
        distance = np.stack([psi(expected, counts), ks(expected, counts)])
        self.distances[window] = np.where(known >= POOL_EVENTS, distance, np.nan)
        found: list[Finding] = []
        before, after = self.baseline.level(expected), self.baseline.level(counts)
        kinds: tuple[Detector, Detector] = ("psi", "ks")
        for detector, values in zip(kinds, self.distances[window], strict=True):
            limit = self._limit[detector, "block" if window == "block" else "day"]
            with np.errstate(invalid="ignore"):
                over = (values > limit) & self._tested
            if window == "block" and not self._raw:
                # One block may be one busy customer; two in a row are not.
                over, self._over[detector] = over & self._over[detector], over
            found += [
                Finding(
                    self.reached_ms, self.baseline.series[s].name, self._names[g], detector, window, float(values[s, g]),
                    float(limit[s, g]), _plain(before[s, g]), _plain(after[s, g]), start_ms, int(known[s, g]),
                )
                for s, g in np.argwhere(over).tolist()
            ]  # fmt: skip
        return found

    def _levels_moved(self, start_ms: int, cell: int, counts: npt.NDArray[np.integer]) -> list[Finding]:
        b = self.baseline
        expected = self._levels.mean(axis=0) if self._raw else self._levels[cell]
        residual = b.level(counts) - expected
        known = counts[..., :MISSING].sum(axis=-1)
        found = []
        for (s, g), row in self._rows.items():
            row.blocks += 1
            if n := int(known[s, g]):
                row.weight += n
                row.total += n * float(residual[s, g])
            if row.weight < POOL_EVENTS or (row.blocks < b.hold[s, g] and not self._raw):
                continue
            value = row.total / row.weight
            persistence = 0.0 if self._raw else float(b.phi[s, g])
            shock = value - persistence * (row.last if row.last is not None else 0.0)
            row.weight, row.total, row.blocks, row.last = 0, 0.0, 0, value
            if finding := self._feed(row, (s, g), start_ms, value, bounded(shock / float(b.sigma[s, g])), float(expected[s, g])):
                found.append(finding)
        return found

    def _feed(self, row: _Row, place: tuple[int, int], start_ms: int, shift: float, value: float, level: float) -> Finding | None:
        """One value into ADWIN; the finding when it cuts its window and the shift is worth one."""
        row.values.append(value)
        row.shifts.append(shift)
        row.ends.append(start_ms)
        row.adwin.update(value)
        if not row.adwin.drift_detected:
            if len(row.values) > KEPT:
                self._shorten(row, KEPT // 2)
            return None
        width = max(int(row.adwin.width), MIN_LENGTH)
        old, new = row.shifts[:-width], row.shifts[-width:]
        before, after = float(np.mean(old)) if old else 0.0, float(np.mean(new))
        since = row.ends[-width] if len(row.ends) >= width else row.ends[0]
        self._shorten(row, width)
        if abs(after - before) < LEVEL_FLOOR:
            return None
        s, g = place
        return Finding(
            self.reached_ms, self.baseline.series[s].name, self._names[g], "adwin", "adaptive", abs(after - before), LEVEL_FLOOR,
            level + before, level + after, since, width,
        )  # fmt: skip

    # -- state

    def _adwin(self) -> ADWIN:
        return ADWIN(delta=self.delta, clock=1, min_window_length=MIN_LENGTH)

    def _shorten(self, row: _Row, keep: int) -> None:
        shifts, ends = row.shifts[-keep:], row.ends[-keep:]
        self._restart(row, row.values[-keep:], at=0)
        row.shifts, row.ends = shifts, ends

    def _restart(self, row: _Row, values: list[float], *, at: int) -> None:
        """A detector that has seen just these values: told again they give the same one, so they are its whole state."""
        row.adwin = self._adwin()
        for value in values:
            row.adwin.update(value)
        row.values, row.shifts, row.ends = list(values), [0.0] * len(values), [at] * len(values)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as arrays and plain values."""
        rows = list(self._rows.values())
        week = list(self._week)
        return {
            "lengths": np.array([len(row.values) for row in rows], np.int64),
            "values": np.array([v for row in rows for v in row.values]),
            "shifts": np.array([v for row in rows for v in row.shifts]),
            "ends": np.array([v for row in rows for v in row.ends], np.int64),
            "pools": np.array([(row.weight, row.total, row.blocks, np.nan if row.last is None else row.last) for row in rows]),
            "day": np.array([self._day, self.reached_ms], np.int64),
            "over": np.stack([self._over["psi"], self._over["ks"]]),
            "counts": self._counts,
            "wanted": self._wanted,
            "week_at": np.array([at for at, _, _ in week], np.int64),
            "week_counts": np.array([c for _, c, _ in week]).reshape(len(week), *self._counts.shape).astype(np.int64),
            "week_wanted": np.array([w for _, _, w in week]).reshape(len(week), *self._counts.shape),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken, under the same baseline and budget. Raises ValueError for one of another baseline."""
        rows = list(self._rows.values())
        if len(state["lengths"]) != len(rows) or state["counts"].shape != self._counts.shape:
            raise ValueError("the stored detectors are those of another baseline")
        stops = np.cumsum(state["lengths"]).tolist()
        for row, start, stop, pool in zip(rows, [0, *stops], stops, state["pools"].tolist(), strict=False):
            self._restart(row, state["values"][start:stop].tolist(), at=0)
            row.shifts, row.ends = state["shifts"][start:stop].tolist(), state["ends"][start:stop].tolist()
            row.weight, row.total, row.blocks = int(pool[0]), pool[1], int(pool[2])
            row.last = None if np.isnan(pool[3]) else pool[3]
        self._day, self.reached_ms = (int(value) for value in state["day"])
        self._over = {"psi": state["over"][0].copy(), "ks": state["over"][1].copy()}
        self._counts, self._wanted = state["counts"].copy(), state["wanted"].copy()
        self._week.clear()
        for at, counts, wanted in zip(state["week_at"].tolist(), state["week_counts"], state["week_wanted"], strict=True):
            self._week.append((at, counts.copy(), wanted.copy()))


def _plain(value: float) -> float:
    return 0.5 if np.isnan(value) else float(value)
