"""What is normal: the histograms of a quiet period by hour and weekday, and how far its own windows stray from them."""

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drift.series import MISSING, MONDAY_MS, Floats, Ints, Series
from drift.statistics import ks, psi
from features.window import DAY_MS, HOUR_MS
from proto.errors import BadInput

BLOCK_HOURS: Final = (1, 2, 3, 4, 6, 8, 12, 24, 168)
BLOCK_EVENTS: Final = 100
"""A block is the shortest of BLOCK_HOURS that has so many events on average: means of fewer say little."""
WEEK_HOURS: Final = 168
MIN_DAYS: Final = 14
POOL_EVENTS: Final = 50
"""Blocks of a quiet segment are put together until they hold so many events."""
SHRINK_WEEKS: Final = 4.0
"""An hour of the week seen for so many weeks weighs as much as what hour and weekday say on their own."""
RATIO: Final = 1.6
"""Variance of a week's mean by what independent values would give; above it longer blocks are taken."""
SEED: Final = 512
"""Values of the baseline each detector begins with."""
AGEING_T: Final = 6.0
FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Baseline:
    """S series, G segments, W cells of the week. Rows are (series, segment), segment 0 = everybody."""

    series: tuple[Series, ...]
    segments: tuple[str, ...]  # (G,) without "all"
    edges: Floats  # (S, EDGES)
    block_ms: int
    days: int
    since_ms: int
    until_ms: int
    events: int
    expected: npt.NDArray[np.float32]  # (W, S, G + 1, BINS) shares by cell
    volume: Floats  # (W, G + 1) events of a block
    ranks: Floats  # (S, BINS - 1) middle rank of each bin
    hold: Ints  # (S, G + 1) blocks of one value of ADWIN
    sigma: Floats  # (S, G + 1) of the residuals of those values
    phi: Floats  # (S, G + 1) their lag-one correlation
    ageing: npt.NDArray[np.bool_]  # (S, G + 1) moves steadily already in the baseline, or by its nature: reported, never paged
    memory: Floats  # (S, G + 1) how many days say something of their own: slow series have few, and cannot be tested against a month
    block_psi: Floats  # (blocks, S, G + 1) distances of the baseline's own windows from it; NaN = too few events
    block_ks: Floats
    day_psi: Floats
    day_ks: Floats
    seeds: npt.NDArray[np.float32]  # (<= SEED, S, G + 1) last values fed to ADWIN, NaN = none
    origin: str = ""

    @property
    def cells(self) -> int:
        """Cells of the week."""
        return len(self.expected)

    def cell(self, start_ms: int) -> int:
        """Of the week, of a block that begins then."""
        return int((start_ms - MONDAY_MS) // self.block_ms % self.cells)

    def level(self, counts: npt.NDArray[np.number]) -> Floats:
        """Mean rank (..., S, G + 1) of counts or shares (..., S, G + 1, BINS); NaN where nothing is known."""
        known = counts[..., :MISSING]
        total = known.sum(axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Floats = np.where(total > 0, (known * self.ranks[:, None, :]).sum(axis=-1) / total, np.nan)
        return found

    def to_bytes(self) -> bytes:
        """A compressed archive; `from_bytes` reads it."""
        arrays = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), np.ndarray)}
        arrays |= {name: arrays[name].astype(np.float32) for name in ("block_psi", "block_ks", "day_psi", "day_ks")}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        head = {**plain, "series": [asdict(one) for one in self.series], "format": FORMAT}
        out = io.BytesIO()
        whole: dict[str, Any] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays}
        np.savez_compressed(out, **whole)
        return out.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> "Baseline":
        """Raises BadInput for bytes that are no baseline of this format."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            head: dict[str, Any] = json.loads(arrays.pop("head").tobytes())
            if head.pop("format") != FORMAT:
                raise ValueError("another format")
            for name in ("block_psi", "block_ks", "day_psi", "day_ks"):
                arrays[name] = arrays[name].astype(np.float64)
            head["series"] = tuple(Series(**{**one, "kinds": tuple(one["kinds"])}) for one in head["series"])
            return Baseline(**(head | {"segments": tuple(head["segments"])} | arrays))
        except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"not a drift baseline of format {FORMAT} ({error}); make one with `churnstream drift baseline`") from error


def coarser(starts: Ints, counts: npt.NDArray[Any], block_ms: int) -> tuple[Ints, npt.NDArray[Any]]:
    """Blocks of `block_ms`, aligned to Monday, from counts (T, ...) of finer slots that begin at `starts` (T,); empty ones are left out."""
    block = (starts - MONDAY_MS) // block_ms
    which, first = np.unique(block, return_index=True)
    return which * block_ms + MONDAY_MS, np.add.reduceat(counts, first, axis=0)


def fit(
    series: Sequence[Series], segments: Sequence[str], edges: Floats, starts: Ints, counts: npt.NDArray[np.integer], *, origin: str = ""
) -> Baseline:
    """The baseline of slots that begin at `starts` (T,), ascending, with counts (T, S, G + 1, BINS).

    Slots are whole hours or days. Raises BadInput for fewer than MIN_DAYS days.
    """
    if not len(starts) or (days := int((starts[-1] - starts[0]) // DAY_MS) + 1) < MIN_DAYS:
        covered = int((starts[-1] - starts[0]) // DAY_MS) + 1 if len(starts) else 0
        raise BadInput(f"a baseline needs at least {MIN_DAYS} days (28 are better), there are {covered}")
    slot_ms = int(np.diff(starts).min()) if len(starts) > 1 else DAY_MS
    events = int(counts[:, 0, 0].sum())
    block_ms = _block(events / days, slot_ms)
    when, blocks = coarser(starts, counts, block_ms)
    cells = WEEK_HOURS * HOUR_MS // block_ms
    cell = ((when - MONDAY_MS) // block_ms % cells).astype(np.int64)
    expected, weight = _expected(blocks, cell, cells)
    total = blocks.sum(axis=0, dtype=np.int64)
    share = total[:, 0, :MISSING] / np.maximum(total[:, 0, :MISSING].sum(axis=1, keepdims=True), 1)
    ranks = np.cumsum(share, axis=1) - share / 2
    weeks = np.maximum(np.bincount(cell, minlength=cells), 1)
    volume = np.zeros((cells, blocks.shape[2]))
    np.add.at(volume, cell, blocks[:, 0].sum(axis=-1))
    volume /= weeks[:, None]

    shape = blocks.shape[1:3]
    blank = np.zeros(shape)
    none = np.full((0, *shape), np.nan)
    half = Baseline(
        tuple(series), tuple(segments), edges, block_ms, days, int(starts[0]), int(starts[-1]) + slot_ms, events,
        expected.astype(np.float32), volume, ranks, np.ones(shape, np.int64), blank + 1, blank, blank > 0, blank,
        none, none, none, none, none.astype(np.float32), origin,
    )  # fmt: skip
    hold, sigma, phi, ageing, memory, seeds = _residuals(half, when, blocks, cell, weight)
    windows = _windows(half, when, blocks, cell)
    values = {f.name: getattr(half, f.name) for f in fields(half)}
    values |= {"hold": hold, "sigma": sigma, "phi": phi, "ageing": ageing, "memory": memory, "seeds": seeds, **windows}
    return Baseline(**values)


def _block(events_a_day: float, slot_ms: int) -> int:
    for hours in BLOCK_HOURS:
        if hours * HOUR_MS % slot_ms == 0 and events_a_day * hours / 24 >= BLOCK_EVENTS:
            return hours * HOUR_MS
    return BLOCK_HOURS[-1] * HOUR_MS


def _expected(blocks: npt.NDArray[np.integer], cell: Ints, cells: int) -> tuple[Floats, Floats]:
    """Shares (cells, S, G + 1, BINS) of each cell of the week, and how much each cell speaks for itself (cells,)."""
    total = blocks.sum(axis=0, dtype=np.float64) + 1e-3
    overall = total / total.sum(axis=-1, keepdims=True)
    if cells == 1:
        return overall[None], np.ones(1)
    a_day = max(cells // 7, 1)
    weeks = np.bincount(cell, minlength=cells)
    weight = weeks / (weeks + SHRINK_WEEKS)

    def by(group: Ints, n: int) -> Floats:
        sums = np.zeros((n, *blocks.shape[1:]))
        np.add.at(sums, group, blocks)
        # With little to say, a group says what everybody says.
        sums += POOL_EVENTS * overall
        shares: Floats = sums / sums.sum(axis=-1, keepdims=True)
        return shares

    own = by(cell, cells)
    hour, weekday = by(cell % a_day, a_day), by(cell // a_day, 7)
    place = np.arange(cells)
    smooth = np.maximum(hour[place % a_day] + weekday[place // a_day] - overall, 1e-6)
    w = weight[:, None, None, None]
    mixed: Floats = w * own + (1 - w) * smooth / smooth.sum(axis=-1, keepdims=True)
    return mixed, weight


def _residuals(
    base: Baseline, when: Ints, blocks: npt.NDArray[np.integer], cell: Ints, weight: Floats
) -> tuple[Ints, Floats, Floats, npt.NDArray[np.bool_], Floats, npt.NDArray[np.float32]]:
    """How the levels stray from the cycle: hold, sigma, phi, ageing, memory by row, and the last standardised values."""
    residual = base.level(blocks) - base.level(base.expected)[cell]
    known = blocks[..., :MISSING].sum(axis=-1)
    weeks = np.maximum(np.bincount(cell, minlength=len(weight)), 2)[cell]
    # The cycle was fitted to these very blocks: what comes later strays farther, by this factor on average.
    inflate = float(np.sqrt(np.mean((weeks + weight[cell]) / (weeks - weight[cell]))))
    shape = residual.shape[1:]
    hold, sigma, phi = np.ones(shape, np.int64), np.ones(shape), np.zeros(shape)
    ageing, memory = np.zeros(shape, np.bool_), np.zeros(shape)
    lasting = np.array([one.lasting for one in base.series], np.bool_)
    seeds = np.full((SEED, *shape), np.nan, np.float32)
    a_day = max(DAY_MS // base.block_ms, 1)
    for s, g in np.ndindex(shape):
        for length in dict.fromkeys((1, a_day)):
            values, at = pooled(residual[:, s, g], known[:, s, g], length, when)
            if len(values) < 8:
                continue
            hold[s, g] = length
            phi[s, g] = correlation(values)
            shocks = values[1:] - phi[s, g] * values[:-1]
            sigma[s, g] = max(float(np.std(shocks)) * inflate, 1e-4)
            seeds[-min(len(shocks), SEED) :, s, g] = shocks[-SEED:] / sigma[s, g]
            if variance_ratio(shocks, max(7 * a_day // length, 2)) <= RATIO:
                break
        values, at = pooled(residual[:, s, g], known[:, s, g], a_day, when)
        ageing[s, g] = lasting[s] or abs(trend(values, at)) > AGEING_T
        if len(values) >= MIN_DAYS:
            persistence = correlation(values)
            # A correlation of few values is estimated too low, by so much (Kendall 1954).
            persistence = min(persistence + (1 + 3 * persistence) / len(values), 0.99)
            memory[s, g] = len(values) * (1 - persistence) / (1 + persistence)
    return hold, sigma, phi, ageing, memory, seeds


def pooled(residual: Floats, known: Ints, hold: int, when: Ints) -> tuple[Floats, Ints]:
    """Residuals (T,) put together until `hold` blocks and POOL_EVENTS events are in; the values and the block each ends with."""
    values, ends = [], []
    weight, total, blocks = 0, 0.0, 0
    for i, (r, n) in enumerate(zip(residual.tolist(), known.tolist(), strict=True)):
        blocks += 1
        if n:
            weight, total = weight + n, total + n * r
        if blocks >= hold and weight >= POOL_EVENTS:
            values.append(total / weight)
            ends.append(when[i])
            weight, total, blocks = 0, 0.0, 0
    return np.array(values), np.array(ends, np.int64)


def correlation(values: Floats) -> float:
    """Lag-one correlation, within [0, 0.95]: only persistence is taken out."""
    centred = values - values.mean()
    below = float((centred[:-1] ** 2).sum())
    return float(np.clip((centred[1:] * centred[:-1]).sum() / below, 0, 0.95)) if below > 0 else 0.0


def variance_ratio(values: Floats, length: int) -> float:
    """Variance of the means of `length` neighbours by what it would be, were they independent; 1 where it cannot be told."""
    n = len(values) // length
    if n < 3 or values.var() <= 0:
        return 1.0
    means = values[-n * length :].reshape(n, length).mean(axis=1)
    return float(means.var(ddof=1) * length / values.var(ddof=1))


def trend(values: Floats, at: Ints) -> float:
    """t of a line through the values, widened by their own persistence."""
    if len(values) < MIN_DAYS:
        return 0.0
    x = (at - at.mean()) / DAY_MS
    slope = float((x * values).sum() / (x**2).sum())
    rest = values - values.mean() - slope * x
    phi = correlation(rest)
    error = float(np.sqrt((rest**2).sum() / (len(rest) - 2) / (x**2).sum() * (1 + phi) / (1 - phi)))
    return slope / max(error, 1e-12)


def _windows(base: Baseline, when: Ints, blocks: npt.NDArray[np.integer], cell: Ints) -> dict[str, Floats]:
    """PSI and KS of the baseline's own blocks and days."""
    n = blocks.sum(axis=-1)[..., None]
    expected = base.expected[cell] * n
    enough = n[..., 0] >= POOL_EVENTS
    found = {
        "block_psi": np.where(enough, psi(expected, blocks), np.nan),
        "block_ks": np.where(enough, ks(expected, blocks), np.nan),
    }
    if base.block_ms >= DAY_MS:
        return found | {"day_psi": found["block_psi"], "day_ks": found["block_ks"]}
    _, day = coarser(when, blocks, DAY_MS)
    _, wanted = coarser(when, expected, DAY_MS)
    enough = day.sum(axis=-1) >= POOL_EVENTS
    return found | {"day_psi": np.where(enough, psi(wanted, day), np.nan), "day_ks": np.where(enough, ks(wanted, day), np.nan)}
