"""The raw records of the input topics: how many of each kind, what is missing, damaged, repeated, and in which units."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.stats import t

from drift.baseline import SHRINK_WEEKS
from drift.budget import DAYS, Budget
from drift.series import ALL, MONDAY_MS, Floats, Ints
from drift.statistics import psi, threshold
from features.facts import KIND, KINDS, LEVEL, N_KINDS, NONE, TIME, TOPICS, VALUE, A, B, C, D
from features.window import DAY_MS, HOUR_MS

Rule = Literal["schema", "nulls", "range", "cardinality", "duplicates", "stall", "coverage", "volume", "shift", "mix"]

COLUMNS: Final[tuple[tuple[str, ...], ...]] = (
    ("amount_minor", "product", "method", "channel", "", "", "", ""),
    ("duration_ms", "device", "session_id", "feature", "country", "", "", ""),
    ("wait_seconds", "ticket_id", "category", "channel", "csat", "priority", "", "nps"),
    ("signup_date", "plan", "segment", "region", "age_band", "", "", ""),
)
"""By topic: names of the eight watched fields: the number in VALUE, then A, B, C, D (of a ticket its CSAT), then parts of LEVEL."""
FIELDS: Final = 8
TEXTS: Final = 4
CATEGORIES: Final = 12
"""Most frequent texts of a field that are told apart; everything else is one."""
OCTAVES: Final = 96
"""Bins of a number: thirds of a factor of two, from below 1 to 2^32."""
KIND_NAMES: Final = {code: name for name, code in KINDS.items()}
SAID: Final = 0.05
"""A field given less often than that with a kind does not belong to it."""


def topic_of(kind: int) -> str:
    """Where records of a kind come from."""
    return TOPICS[kind >> 3]


@dataclass(slots=True)
class Counters:
    """What is counted of the raw records of a slot of time; axis 1 or the last but one is the segment, 0 = everybody."""

    kinds: Ints  # (N_KINDS, G + 1)
    broken: Ints  # (topics,)
    duplicates: Ints  # (topics,)
    present: Ints  # (N_KINDS, FIELDS)
    numbers: Ints  # (N_KINDS, G + 1, OCTAVES)
    texts: Ints  # (N_KINDS, TEXTS, G + 1, CATEGORIES + 1), the last is any other

    @staticmethod
    def zero(segments: int) -> "Counters":
        """Nothing counted."""
        g = segments + 1
        shapes = (
            (N_KINDS, g),
            (len(TOPICS),),
            (len(TOPICS),),
            (N_KINDS, FIELDS),
            (N_KINDS, g, OCTAVES),
            (N_KINDS, TEXTS, g, CATEGORIES + 1),
        )
        return Counters(*(np.zeros(shape, np.int64) for shape in shapes))

    def add(self, other: "Counters") -> None:
        """Count what the other counted too."""
        for name in self.__slots__:
            getattr(self, name).__iadd__(getattr(other, name))

    def arrays(self) -> tuple[Ints, ...]:
        """In the order of the fields."""
        return self.kinds, self.broken, self.duplicates, self.present, self.numbers, self.texts


def octave(values: Ints) -> Ints:
    """Bin of numbers >= 0 on the log scale, thirds of an octave."""
    found: Ints = np.clip(1 + np.floor(3 * np.log2(np.maximum(values, 1) + (values > 0) * 1e-9)), 0, OCTAVES - 1).astype(np.int64)
    return np.where(values <= 0, 0, found)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The texts (as digests) told apart: (N_KINDS, TEXTS, CATEGORIES), 0 = none. Identifiers have none: their texts are all different."""

    known: Ints

    @staticmethod
    def of(facts: Ints) -> "Vocabulary":
        """The most frequent texts of each kind and field; a field with more than 200 is an identifier."""
        known = np.zeros((N_KINDS, TEXTS, CATEGORIES), np.int64)
        for kind in np.unique(facts[:, KIND]).tolist():
            rows = _texts(facts[facts[:, KIND] == kind])
            for i in range(TEXTS):
                values, counts = np.unique(rows[rows[:, i] != 0, i], return_counts=True)
                if 0 < len(values) <= 200:
                    best = values[np.argsort(-counts, kind="stable")[:CATEGORIES]]
                    known[kind, i, : len(best)] = best
        return Vocabulary(known)


def _texts(facts: Ints) -> Ints:
    """The four texts (n, TEXTS) of each fact, 0 = none; a ticket has no D, its CSAT (1 to 5) takes the place."""
    found = facts[:, [A, B, C, D]].copy()
    ticket = (facts[:, KIND] >> 3) == 2
    found[ticket, 3] = facts[ticket, LEVEL] >> 8 & 255
    return found


def count(facts: Ints, segment: npt.NDArray[np.integer], words: Vocabulary, segments: int) -> Counters:
    """Accepted records as facts (n, WIDTH), their segments (n,) in 0 .. segments; broken and duplicates are added by the caller."""
    out = Counters.zero(segments)
    g = segments + 1
    kind, seg = facts[:, KIND], np.asarray(segment, np.int64)
    place = kind * g + seg
    out.kinds += np.bincount(place, minlength=N_KINDS * g).reshape(N_KINDS, g)
    level = facts[:, LEVEL]
    ticket = (kind >> 3) == 2
    texts = _texts(facts)
    given = np.column_stack(
        [
            facts[:, VALUE] != NONE,
            texts != 0,
            ticket & (level >> 16 > 0),
            np.zeros(len(facts), np.bool_),
            ticket & (level & 255 > 0),
        ]
    )
    for i in range(FIELDS):
        out.present[:, i] += np.bincount(kind[given[:, i]], minlength=N_KINDS)
    stated = np.flatnonzero(given[:, 0])
    flat = place[stated] * OCTAVES + octave(facts[stated, VALUE])
    out.numbers += np.bincount(flat, minlength=out.numbers.size).reshape(out.numbers.shape)
    for i in range(TEXTS):
        which = np.flatnonzero(given[:, i + 1] & (words.known[kind, i, 0] != 0))
        same = words.known[kind[which], i] == texts[which, i][:, None]
        code = np.where(same.any(axis=1), same.argmax(axis=1), CATEGORIES)
        flat = place[which] * (CATEGORIES + 1) + code
        found = np.bincount(flat, minlength=N_KINDS * g * (CATEGORIES + 1)).reshape(N_KINDS, g, CATEGORIES + 1)
        out.texts[:, i] += found
    for counts, axis in ((out.kinds, 1), (out.numbers, 1), (out.texts, 2)):
        everybody = counts.sum(axis=axis)
        counts[(slice(None),) * axis + (0,)] = everybody
    return out


@dataclass(frozen=True, slots=True)
class Normal:
    """The raw records of a quiet period. block_ms divides a day, or is a week."""

    block_ms: int
    volume: Floats  # (cells, N_KINDS, G + 1) records of a block
    unrest: Floats  # (N_KINDS, G + 1) standard deviation, beyond chance, of the log of a day's records by what the cycle expects
    total: Counters
    shift_limit: Floats  # (N_KINDS, G + 1) PSI of a day's numbers that may page
    mix_limit: Floats  # (N_KINDS, TEXTS, G + 1) and of its texts
    volume_limit: float  # standard deviations
    gaps: Floats  # (topics,) longest silence, ms
    words: Vocabulary
    segments: tuple[str, ...]

    @staticmethod
    def blank(block_ms: int, words: Vocabulary, segments: Sequence[str]) -> "Normal":
        """Nothing known yet: to count with."""
        g = len(segments) + 1
        shape = (N_KINDS, g)
        return Normal(
            block_ms, np.zeros((7 * DAY_MS // block_ms, *shape)), np.zeros(shape), Counters.zero(g - 1), np.zeros(shape),
            np.zeros((N_KINDS, TEXTS, g)), 0.0, np.zeros(len(TOPICS)), words, tuple(segments),
        )  # fmt: skip

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of it but the names of the segments; `of` reads it."""
        total = {f"total_{name}": counts for name, counts in zip(Counters.__slots__, self.total.arrays(), strict=True)}
        own = {
            "volume": self.volume,
            "unrest": self.unrest,
            "shift_limit": self.shift_limit,
            "mix_limit": self.mix_limit,
            "gaps": self.gaps,
        }
        return {**own, **total, "words": self.words.known, "plain": np.array([self.block_ms, self.volume_limit])}

    @staticmethod
    def of(arrays: Mapping[str, npt.NDArray[Any]], segments: Sequence[str]) -> "Normal":
        """From `arrays`."""
        a = arrays
        total = Counters(*(a[f"total_{name}"] for name in Counters.__slots__))
        return Normal(
            int(a["plain"][0]), a["volume"], a["unrest"], total, a["shift_limit"], a["mix_limit"], float(a["plain"][1]), a["gaps"],
            Vocabulary(a["words"]), tuple(segments),
        )  # fmt: skip

    def expected(self, start_ms: int) -> Floats:
        """Records (N_KINDS, G + 1) of the block that begins then."""
        found: Floats = self.volume[(start_ms - MONDAY_MS) // self.block_ms % len(self.volume)]
        return found


def normal(
    blocks: Sequence[tuple[int, Counters]],
    block_ms: int,
    gaps: Floats,
    words: Vocabulary,
    segments: Sequence[str],
    budget: Budget | None = None,
) -> Normal:
    """From the blocks (start_ms, counters) of a quiet period, in order; empty ones may be left out."""
    cells = 7 * DAY_MS // block_ms
    starts = np.array([start for start, _ in blocks])
    kinds = np.array([counters.kinds for _, counters in blocks], np.float64)
    cell = (starts - MONDAY_MS) // block_ms % cells
    days = max((starts[-1] + block_ms - starts[0]) / DAY_MS, 1.0)
    # Segments keep different hours, so everybody is the sum of them; column 0 is worked with as those of no segment.
    kinds[:, :, 0] -= kinds[:, :, 1:].sum(axis=2)
    volume = _volume(kinds, cell, cells, days)
    for counts in (kinds, volume):
        counts[:, :, 0] = counts.sum(axis=2)
    total = Counters.zero(len(segments))
    for _, counters in blocks:
        total.add(counters)
    day = (starts - MONDAY_MS) // max(DAY_MS, block_ms)
    _, first = np.unique(day, return_index=True)
    real, wanted = np.add.reduceat(kinds, first, axis=0), np.add.reduceat(volume[cell], first, axis=0)
    ratio = np.log((real + 1) / (wanted + 1))
    daily = [(total.numbers, np.array([c.numbers for _, c in blocks])), (total.texts, np.array([c.texts for _, c in blocks]))]
    watched = int((total.kinds.sum(axis=0) > 0).sum()) * len(KINDS)
    budget = budget or Budget()
    alpha = budget.alpha(budget.quality, 3 * DAYS * watched)
    limits: list[Floats] = []
    for whole, parts in daily:
        found = np.add.reduceat(parts, first, axis=0)
        distances = np.where(found.sum(axis=-1) >= MIN_RECORDS, psi(coarse(whole), coarse(found)), np.nan)
        limits.append(threshold(distances, alpha, SHIFT_PSI, int(days)))
    z = float(t.isf(alpha / 2, max(int(days) - 1, 2)) * np.sqrt(1 + 1 / days))
    # What is more than the chance of small counts.
    unrest = np.sqrt(np.maximum(ratio.var(axis=0, ddof=1) - (1 / (wanted + 1)).mean(axis=0), 0.02**2))
    shift, mix = limits
    return Normal(block_ms, volume, unrest, total, shift, mix, max(z, VOLUME_Z), gaps, words, tuple(segments))


def _volume(kinds: Floats, cell: Ints, cells: int, days: float) -> Floats:
    """Records (cells, ...) of a block: hour of the day times weekday, and the more the hour of the week itself, the more weeks."""
    mean = kinds.sum(axis=0) / days
    if cells == 1:
        whole: Floats = mean[None] * 7.0
        return whole
    a_day, weeks = cells // 7, days / 7
    by_hour, by_day, own = (np.zeros((n, *kinds.shape[1:])) for n in (a_day, 7, cells))
    np.add.at(by_hour, cell % a_day, kinds)
    np.add.at(by_day, cell // a_day, kinds)
    np.add.at(own, cell, kinds)
    with np.errstate(invalid="ignore", divide="ignore"):
        hour = np.where(mean > 0, by_hour / days / mean, 0)
        weekday = np.where(mean > 0, by_day / weeks / mean, 1)
    place = np.arange(cells)
    weight = weeks / (weeks + SHRINK_WEEKS)
    mixed: Floats = weight * own / weeks + (1 - weight) * mean * hour[place % a_day] * weekday[place // a_day]
    return mixed


def coarse(counts: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Whole octaves of numbers; texts stay as they are."""
    return counts if counts.shape[-1] != OCTAVES else counts.reshape(*counts.shape[:-1], OCTAVES // 3, 3).sum(axis=-1)


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule that does not hold. segment: "!x" is everybody but x.

    strength: how far beyond its bound, 1 = at it; factor: found by expected; told: the segments with enough records to tell; pages:
    whether it is certain enough, within the budget, to wake somebody.
    """

    rule: Rule
    topic: str
    kind: str  # "" = all of the topic
    field: str
    segment: str
    strength: float
    factor: float
    detail: str
    told: frozenset[str] = frozenset()
    pages: bool = True


MIN_RECORDS: Final = 30
NULLS, BROKEN, TWICE, OTHERS = 0.15, 0.02, 0.05, 0.10
"""Shares beyond those of the baseline: of values missing, records unreadable, repeated, texts never seen before."""
STALL: Final = 0.05
VOLUME_Z: Final = 4.0
VOLUME_FACTOR: Final = 1.35
WEEK_UNREST: Final = 0.6
"""Of the unrest of a day that is left in a week: days are not independent, or it would be 0.38."""
TELLS, TELLS_MIX = 10, 60
"""Records of a segment from which it is seen whether its volume, or its distribution, has moved too."""
UNIT_FACTOR: Final = 5.0
SHIFT_PSI: Final = 0.25
HINT: Final = 0.4
"""Faults of at least so much strength are said too: they do not page, but they tell segments apart and explain what features found."""
FEW_PSI, FEWER_PSI = 0.6, 1.2
"""Bounds of weeks of a hundred records, or fewer, whose days are too small to have a bound of their own."""


def judge(counters: Counters, expected: Floats, base: Normal, *, hours: float, certain: bool = True) -> list[Fault]:
    """The rules over a window of `hours` with these counters and expected records (N_KINDS, G + 1); strongest first.

    certain: whether volumes, shifts and mixes may page; the budget counts one look a day.
    """
    budgeted = certain and hours >= 24
    found = [*_volumes(counters, expected, base, hours, budgeted), *_records(counters, base), *_fields(counters, base, budgeted)]
    return sorted(found, key=lambda fault: -fault.strength)


def _parts(counts: npt.NDArray[Any], axis: int = -1) -> npt.NDArray[Any]:
    """Counts by segment (0 = everybody), and behind them by everybody but each segment."""
    own = np.moveaxis(counts, axis, 0)
    return np.moveaxis(np.concatenate([own, own[:1] - own[1:]]), 0, axis)


def _names(base: Normal) -> tuple[str, ...]:
    return (ALL, *base.segments, *(f"!{name}" for name in base.segments))


def _volumes(counters: Counters, expected: Floats, base: Normal, hours: float, budgeted: bool) -> list[Fault]:
    found = []
    names = _names(base)
    got, wanted = _parts(counters.kinds), np.maximum(_parts(expected), 0)
    unrest = np.concatenate([base.unrest, np.repeat(base.unrest[:, :1], len(base.segments), axis=1)], axis=1)
    if hours > 24:
        unrest = unrest * WEEK_UNREST
    for i, topic in enumerate(TOPICS):
        if i == len(TOPICS) - 1:
            continue  # profiles come when somebody changes something: no flow that could stall
        rows = slice(i * 8, i * 8 + 8)
        n, m = got[rows].sum(axis=0), wanted[rows].sum(axis=0)
        told = frozenset(names[g] for g in np.flatnonzero(m >= MIN_RECORDS))
        for g in np.flatnonzero((m >= MIN_RECORDS) & (n <= STALL * m)).tolist():
            detail = f"{n[g]} records of {topic} instead of about {m[g]:.0f} in {hours:g} h"
            found.append(Fault("stall", topic, "", "", names[g], float(m[g] / (n[g] + 1)), float(n[g] / m[g]), detail, told))
    factor = (got + 1) / (wanted + 1)
    z = np.abs(np.log(factor)) / np.sqrt(unrest**2 + 1 / (wanted + 1))
    enough = (wanted >= MIN_RECORDS) | (got >= MIN_RECORDS)
    for kind, g in np.argwhere(enough & (z > HINT * VOLUME_Z)).tolist():
        if kind not in KIND_NAMES:
            continue
        name, strength = KIND_NAMES[kind], float(z[kind, g]) / VOLUME_Z
        told = frozenset(names[i] for i in np.flatnonzero(wanted[kind] >= TELLS))
        if wanted[kind, g] >= MIN_RECORDS and got[kind, g] <= STALL * wanted[kind, g] and strength >= 1:
            detail = f"{got[kind, g]} records of kind {name} instead of about {wanted[kind, g]:.0f} in {hours:g} h"
            found.append(Fault("stall", topic_of(kind), name, "", names[g], strength, float(factor[kind, g]), detail, told))
        else:
            detail = f"{factor[kind, g]:.2f} times as many records of kind {name} as usual in {hours:g} h"
            far = max(factor[kind, g], 1 / factor[kind, g]) > VOLUME_FACTOR
            strength = strength if far else min(strength, 0.99)
            certain = bool(budgeted and far and z[kind, g] > base.volume_limit and names[g][0] != "!")
            found.append(Fault("volume", topic_of(kind), name, "", names[g], strength, float(factor[kind, g]), detail, told, certain))
    return found


def _records(counters: Counters, base: Normal) -> list[Fault]:
    found = []
    rules: tuple[tuple[Rule, Ints, Ints, float, str], ...] = (
        ("schema", counters.broken, base.total.broken, BROKEN, "cannot be read"),
        ("duplicates", counters.duplicates, base.total.duplicates, TWICE, "were sent before"),
    )
    for rule, now, then, bound, text in rules:
        for i, topic in enumerate(TOPICS):
            n = int(counters.kinds[i * 8 : i * 8 + 8, 0].sum()) + int(now[i])
            before = (then[i] + 1) / (base.total.kinds[i * 8 : i * 8 + 8, 0].sum() + then[i] + 100)
            share = now[i] / max(n, 1)
            excess = share - before - 4 * np.sqrt(before / max(n, 1))
            if n >= MIN_RECORDS and excess > bound:
                detail = f"{share:.1%} of the records of {topic} {text}, {before:.1%} before"
                found.append(Fault(rule, topic, "", "", ALL, float(excess / bound), float(share / before), detail))
    return found


def _fields(counters: Counters, base: Normal, budgeted: bool) -> list[Fault]:
    found = []
    names = _names(base)
    numbers, then_numbers = _parts(counters.numbers, 1), _parts(base.total.numbers, 1)
    texts, then_texts = _parts(counters.texts, 2), _parts(base.total.texts, 2)
    # Most texts are as they were: only the others are looked at one by one.
    moved = (texts.sum(axis=-1) >= MIN_RECORDS) & (psi(then_texts, texts) > HINT * SHIFT_PSI)
    for kind, kind_name in KIND_NAMES.items():
        n, before_n = int(counters.kinds[kind, 0]), int(base.total.kinds[kind, 0])
        if n < MIN_RECORDS // 2 or before_n < MIN_RECORDS:
            continue
        topic = topic_of(kind)
        for i, field_name in enumerate(COLUMNS[kind >> 3] if n >= MIN_RECORDS else ()):
            before = base.total.present[kind, i] / before_n
            gone = before - counters.present[kind, i] / n - 4 * np.sqrt(max(before * (1 - before), 0.0) / n)
            if field_name and before > SAID and gone > NULLS * max(before, 0.3):
                detail = f"{field_name} is given in {counters.present[kind, i] / n:.1%} of kind {kind_name}, {before:.1%} before"
                found.append(Fault("nulls", topic, kind_name, field_name, ALL, float(gone / (NULLS * max(before, 0.3))), 0.0, detail))
        told = frozenset(names[g] for g in np.flatnonzero(numbers[kind].sum(axis=-1) >= MIN_RECORDS // 2))
        told_shift = frozenset(names[g] for g in np.flatnonzero(numbers[kind].sum(axis=-1) >= TELLS_MIX))
        for g, name in enumerate(names):
            limit = None if name[0] == "!" or not budgeted else float(base.shift_limit[kind, g])
            found += _number(kind, name, numbers[kind, g], then_numbers[kind, g], told, told_shift, limit)
        for i in range(TEXTS):
            told = frozenset(names[g] for g in np.flatnonzero(texts[kind, i].sum(axis=-1) >= TELLS_MIX))
            for g in np.flatnonzero(moved[kind, i]).tolist():
                limit = None if names[g][0] == "!" or not budgeted else float(base.mix_limit[kind, i, g])
                found += _text(kind, i, names[g], texts[kind, i, g], then_texts[kind, i, g], told, limit)
    return found


def _number(
    kind: int, segment: str, now: Ints, then: Ints, told: frozenset[str], told_shift: frozenset[str], limit: float | None
) -> list[Fault]:
    """A number in other units moves as a whole: by a large factor, and nothing stays where it was."""
    n, m = int(now.sum()), int(then.sum())
    if n < MIN_RECORDS // 2 or m < MIN_RECORDS or (overlap := float(np.minimum(now / n, then / m).sum())) > 0.85:
        return []
    octaves = np.arange(OCTAVES) / 3
    (a, spread), (b, _) = (_middle(counts, octaves) for counts in (then, now))
    factor = 2 ** (b - a)
    name, field_name, topic = KIND_NAMES[kind], COLUMNS[kind >> 3][0], topic_of(kind)
    surely = abs(b - a) - 3 * 1.25 * spread / np.sqrt(n)  # 1.25: of the error of a median by that of a mean
    if surely >= np.log2(UNIT_FACTOR) and overlap < 0.6:
        detail = f"{field_name} of kind {name} is {factor:.3g} times what it was, all of it: another unit?"
        return [Fault("range", topic, name, field_name, segment, float(2 * surely), factor, detail, told)]
    distance = float(psi(coarse(then), coarse(now))) - 32 / n
    told = told_shift
    if n >= MIN_RECORDS and distance > HINT * SHIFT_PSI:
        detail = f"{field_name} of kind {name} is distributed otherwise (median {factor:.2f} times)"
        return [Fault("shift", topic, name, field_name, segment, distance / SHIFT_PSI, factor, detail, told, distance > _bound(limit, n))]
    return []


def _bound(limit: float | None, n: int) -> float:
    """What a distance of n records must exceed to page; None = it must not page."""
    if limit is None:
        return np.inf
    return limit if np.isfinite(limit) else (FEW_PSI if n >= 100 else FEWER_PSI)


def _middle(counts: Ints, octaves: Floats) -> tuple[float, float]:
    """Median and standard deviation of binned numbers, in octaves."""
    share = counts / counts.sum()
    mean = float((share * octaves).sum())
    return float(np.interp(0.5, np.cumsum(share), octaves)), float(np.sqrt((share * (octaves - mean) ** 2).sum()))


def _text(kind: int, column: int, segment: str, now: Ints, then: Ints, told: frozenset[str], limit: float | None) -> list[Fault]:
    n, m = int(now.sum()), int(then.sum())
    if n < MIN_RECORDS or m < MIN_RECORDS:
        return []
    name, field_name, topic = KIND_NAMES[kind], COLUMNS[kind >> 3][column + 1], topic_of(kind)
    others = now[-1] / n - then[-1] / m
    if others > OTHERS:
        detail = f"{now[-1] / n:.1%} of {field_name} of kind {name} are texts never seen before"
        return [Fault("cardinality", topic, name, field_name, segment, float(others / OTHERS), 0.0, detail, told)]
    distance = float(psi(then, now)) - (CATEGORIES + 1) / n
    if distance > HINT * SHIFT_PSI:
        detail = f"the mix of {field_name} of kind {name} has changed"
        return [Fault("mix", topic, name, field_name, segment, distance / SHIFT_PSI, 0.0, detail, told, distance > _bound(limit, n))]
    return []


@dataclass(slots=True)
class Watch:
    """Counts raw records by block, forgets the older ones, judges the last block and the last day."""

    base: Normal
    blocks: dict[int, Counters] = field(default_factory=dict)
    newest_ms: list[int] = field(default_factory=lambda: [0] * len(TOPICS))
    since_ms: int = -1  # the first record seen: windows that begin before say nothing

    def add(self, facts: Ints, segment: npt.NDArray[np.integer]) -> None:
        """Accepted records; by event time."""
        if self.since_ms < 0 and len(facts):
            self.since_ms = int(facts[:, TIME].max())
        block = (facts[:, TIME] - MONDAY_MS) // self.base.block_ms
        for one in np.unique(block).tolist():
            which = block == one
            self.of(one).add(count(facts[which], segment[which], self.base.words, len(self.base.segments)))
        for i in range(len(TOPICS)):
            times = facts[(facts[:, KIND] >> 3) == i, TIME]
            if len(times):
                self.newest_ms[i] = max(self.newest_ms[i], int(times.max()))

    def refused(self, topic: int, at_ms: int, broken: int, duplicates: int) -> None:
        """Records of a topic that were read around `at_ms` and are none, or repetitions."""
        counters = self.of((at_ms - MONDAY_MS) // self.base.block_ms)
        counters.broken[topic] += broken
        counters.duplicates[topic] += duplicates

    def of(self, block: int) -> Counters:
        """The counters of a block."""
        if block not in self.blocks:
            self.blocks[block] = Counters.zero(len(self.base.segments))
        return self.blocks[block]

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything but the base; `restore` goes on from it."""
        blocks = sorted(self.blocks)
        columns = zip(*(self.blocks[block].arrays() for block in blocks), strict=True) if blocks else ([] for _ in Counters.__slots__)
        counts = {f"block_{n}": np.array(list(column), np.int32) for n, column in zip(Counters.__slots__, columns, strict=True)}
        return {"blocks": np.array(blocks, np.int64), "newest": np.array([*self.newest_ms, self.since_ms], np.int64), **counts}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on where `state` was taken."""
        *self.newest_ms, self.since_ms = state["newest"].tolist()
        self.blocks = {
            block: Counters(*(state[f"block_{name}"][i].astype(np.int64) for name in Counters.__slots__))
            for i, block in enumerate(state["blocks"].tolist())
        }

    def window(self, until_ms: int, length_ms: int) -> tuple[Counters, Floats]:
        """Counted and expected in the whole blocks of (until - length, until]."""
        last = (until_ms - MONDAY_MS) // self.base.block_ms
        total, expected = Counters.zero(len(self.base.segments)), np.zeros(self.base.unrest.shape)
        for block in range(last - max(length_ms // self.base.block_ms, 1), last):
            expected += self.base.expected(block * self.base.block_ms + MONDAY_MS)
            if block in self.blocks:
                total.add(self.blocks[block])
        return total, expected

    def judge(self, until_ms: int) -> list[Fault]:
        """The rules over the last block, day and week, the longer for what is too rare for the shorter; older blocks are forgotten."""
        oldest = (until_ms - 7 * DAY_MS - MONDAY_MS) // self.base.block_ms
        for block in [block for block in self.blocks if block < oldest]:
            del self.blocks[block]
        found: dict[tuple[Any, ...], Fault] = {}
        for length in dict.fromkeys((self.base.block_ms, max(DAY_MS, self.base.block_ms), 7 * DAY_MS)):
            if until_ms - length < self.since_ms or self.since_ms < 0 or (length > DAY_MS and (until_ms - MONDAY_MS) % DAY_MS):
                continue  # a week is looked at once a day
            counters, expected = self.window(until_ms, length)
            for fault in judge(counters, expected, self.base, hours=length / HOUR_MS, certain=(until_ms - MONDAY_MS) % DAY_MS == 0):
                key = fault.rule, fault.topic, fault.kind, fault.field, fault.segment
                if key not in found or (found[key].pages, found[key].strength) < (fault.pages, fault.strength):
                    found[key] = fault
        for i, topic in enumerate(TOPICS[:-1]):
            silent = until_ms - self.newest_ms[i]
            if self.newest_ms[i] and self.base.gaps[i] and silent > 3 * self.base.gaps[i]:
                detail = f"nothing on {topic} for {silent / HOUR_MS:.1f} h, {self.base.gaps[i] / HOUR_MS:.1f} h at most before"
                found["gap", topic] = Fault("stall", topic, "", "", ALL, silent / float(self.base.gaps[i]), 0.0, detail)
        return sorted(found.values(), key=lambda fault: -fault.strength)
