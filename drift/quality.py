"""The raw records of the input topics: how many of each kind, what is missing, damaged, repeated, and in which units."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from drift.series import ALL, MONDAY_MS, Floats, Ints
from drift.statistics import psi
from features.facts import KIND, KINDS, LEVEL, N_KINDS, NONE, TIME, TOPICS, VALUE, A, B, C, D
from features.window import DAY_MS, HOUR_MS

Rule = Literal["schema", "nulls", "range", "cardinality", "duplicates", "stall", "volume", "shift", "mix"]

COLUMNS: Final[tuple[tuple[str, ...], ...]] = (
    ("amount_minor", "product", "method", "channel", "", "", "", ""),
    ("duration_ms", "device", "session_id", "feature", "country", "", "", ""),
    ("wait_seconds", "ticket_id", "category", "channel", "", "priority", "csat", "nps"),
    ("signup_date", "plan", "segment", "region", "age_band", "", "", ""),
)
"""By topic: names of the eight watched fields; the first is the number in VALUE, then A, B, C, D, then the parts of a ticket's LEVEL."""
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
        shapes = ((N_KINDS, g), (len(TOPICS),), (len(TOPICS),), (N_KINDS, FIELDS), (N_KINDS, g, OCTAVES), (N_KINDS, TEXTS, g, CATEGORIES + 1))
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
            rows = facts[facts[:, KIND] == kind]
            for i, column in enumerate((A, B, C, D)):
                values, counts = np.unique(rows[rows[:, column] != 0, column], return_counts=True)
                if 0 < len(values) <= 200:
                    best = values[np.argsort(-counts, kind="stable")[:CATEGORIES]]
                    known[kind, i, : len(best)] = best
        return Vocabulary(known)


def count(facts: Ints, segment: npt.NDArray[np.integer], words: Vocabulary, segments: int) -> Counters:
    """Accepted records as facts (n, WIDTH), their segments (n,) in 0 .. segments; broken and duplicates are added by the caller."""
    out = Counters.zero(segments)
    g = segments + 1
    kind, seg = facts[:, KIND], np.asarray(segment, np.int64)
    place = kind * g + seg
    out.kinds += np.bincount(place, minlength=N_KINDS * g).reshape(N_KINDS, g)
    level = facts[:, LEVEL]
    ticket = (kind >> 3) == 2
    given = np.column_stack(
        [
            facts[:, VALUE] != NONE,
            *(facts[:, column] != 0 for column in (A, B, C, D)),
            ticket & (level >> 16 > 0),
            ticket & (level >> 8 & 255 > 0),
            ticket & (level & 255 > 0),
        ]
    )
    for i in range(FIELDS):
        out.present[:, i] += np.bincount(kind[given[:, i]], minlength=N_KINDS)
    stated = np.flatnonzero(given[:, 0])
    flat = place[stated] * OCTAVES + octave(facts[stated, VALUE])
    out.numbers += np.bincount(flat, minlength=out.numbers.size).reshape(out.numbers.shape)
    for i, column in enumerate((A, B, C, D)):
        which = np.flatnonzero(given[:, i + 1] & (words.known[kind, i, 0] != 0))
        same = words.known[kind[which], i] == facts[which, column][:, None]
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
    unrest: Floats  # (N_KINDS, G + 1) standard deviation of the log of a day's records by what the cycle expects
    total: Counters
    gaps: Floats  # (topics,) longest silence, ms
    words: Vocabulary
    segments: tuple[str, ...]

    def expected(self, start_ms: int) -> Floats:
        """Records (N_KINDS, G + 1) of the block that begins then."""
        found: Floats = self.volume[(start_ms - MONDAY_MS) // self.block_ms % len(self.volume)]
        return found


def normal(blocks: Sequence[tuple[int, Counters]], block_ms: int, gaps: Floats, words: Vocabulary, segments: Sequence[str]) -> Normal:
    """From the blocks (start_ms, counters) of a quiet period, in order; empty ones may be left out."""
    cells = 7 * DAY_MS // block_ms
    a_day = max(cells // 7, 1)
    starts = np.array([start for start, _ in blocks])
    kinds = np.array([counters.kinds for _, counters in blocks], np.float64)
    cell = (starts - MONDAY_MS) // block_ms % cells
    days = max((starts[-1] + block_ms - starts[0]) / DAY_MS, 1.0)
    # Hour of the day times weekday: few weeks say little about an hour of the week.
    by_hour, by_day = np.zeros((a_day, *kinds.shape[1:])), np.zeros((7, *kinds.shape[1:]))
    np.add.at(by_hour, cell % a_day, kinds)
    np.add.at(by_day, cell // a_day if cells > 1 else cell, kinds)
    mean = kinds.sum(axis=0) / days
    with np.errstate(invalid="ignore", divide="ignore"):
        hour = np.where(mean > 0, by_hour / days / mean, 0)
        weekday = np.where(mean > 0, by_day / (days / 7) / mean, 1) if cells > 1 else np.ones((1, *mean.shape))
    place = np.arange(cells)
    volume = mean * (hour[place % a_day] * weekday[place // a_day] if cells > 1 else 7.0)
    total = Counters.zero(len(segments))
    for _, counters in blocks:
        total.add(counters)
    day = (starts - MONDAY_MS) // max(DAY_MS, block_ms)
    _, first = np.unique(day, return_index=True)
    real, wanted = np.add.reduceat(kinds, first, axis=0), np.add.reduceat(volume[cell], first, axis=0)
    ratio = np.log((real + 1) / (wanted + 1))
    return Normal(block_ms, volume, np.maximum(ratio.std(axis=0), 0.02), total, gaps, words, tuple(segments))


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule that does not hold. strength: how far beyond its bound, 1 = at it; factor: found by expected."""

    rule: Rule
    topic: str
    kind: str  # "" = all of the topic
    field: str
    segment: str
    strength: float
    factor: float
    detail: str


MIN_RECORDS: Final = 30
NULLS, BROKEN, TWICE, OTHERS = 0.15, 0.02, 0.05, 0.25
"""Shares beyond those of the baseline: of values missing, records unreadable, repeated, texts never seen before."""
STALL: Final = 0.05
VOLUME_Z: Final = 5.0
VOLUME_FACTOR: Final = 1.35
UNIT_FACTOR: Final = 4.0
SHIFT_PSI: Final = 0.25


def judge(counters: Counters, expected: Floats, base: Normal, *, hours: float) -> list[Fault]:
    """The rules over a window of `hours` with these counters and expected records (N_KINDS, G + 1); strongest first."""
    found = [*_volumes(counters, expected, base, hours), *_records(counters, expected, base), *_fields(counters, base)]
    return sorted(found, key=lambda fault: -fault.strength)


def _volumes(counters: Counters, expected: Floats, base: Normal, hours: float) -> list[Fault]:
    found = []
    names = (ALL, *base.segments)
    for t, topic in enumerate(TOPICS):
        rows = slice(t * 8, t * 8 + 8)
        for g, name in enumerate(names):
            got, wanted = int(counters.kinds[rows, g].sum()), float(expected[rows, g].sum())
            if wanted >= MIN_RECORDS and got <= STALL * wanted:
                detail = f"{got} records of {topic} instead of about {wanted:.0f} in {hours:g} h"
                found.append(Fault("stall", topic, "", "", name, wanted / (got + 1), got / wanted, detail))
    for kind, kind_name in KIND_NAMES.items():
        for g, name in enumerate(names):
            got, wanted = int(counters.kinds[kind, g]), float(expected[kind, g])
            if wanted < MIN_RECORDS and got < MIN_RECORDS:
                continue
            factor = (got + 1) / (wanted + 1)
            spread = np.sqrt(base.unrest[kind, g] ** 2 + 1 / (wanted + 1))
            z = abs(float(np.log(factor))) / float(spread)
            if wanted >= MIN_RECORDS and got <= STALL * wanted and z > VOLUME_Z:
                detail = f"{got} records of kind {kind_name} instead of about {wanted:.0f} in {hours:g} h"
                found.append(Fault("stall", topic_of(kind), kind_name, "", name, z / VOLUME_Z, factor, detail))
            elif z > VOLUME_Z and max(factor, 1 / factor) > VOLUME_FACTOR:
                detail = f"{factor:.2f} times as many records of kind {kind_name} as usual"
                found.append(Fault("volume", topic_of(kind), kind_name, "", name, z / VOLUME_Z, factor, detail))
    return found


def _records(counters: Counters, expected: Floats, base: Normal) -> list[Fault]:
    found = []
    rules: tuple[tuple[Rule, Ints, Ints, float, str], ...] = (
        ("schema", counters.broken, base.total.broken, BROKEN, "cannot be read"),
        ("duplicates", counters.duplicates, base.total.duplicates, TWICE, "were sent before"),
    )
    for rule, now, then, bound, text in rules:
        for t, topic in enumerate(TOPICS):
            n = int(counters.kinds[t * 8 : t * 8 + 8, 0].sum()) + int(now[t])
            before = (then[t] + 1) / (base.total.kinds[t * 8 : t * 8 + 8, 0].sum() + then[t] + 100)
            share = now[t] / max(n, 1)
            excess = share - before - 3 * np.sqrt(before / max(n, 1))
            if n >= MIN_RECORDS and excess > bound:
                detail = f"{share:.1%} of the records of {topic} {text}, {before:.1%} before"
                found.append(Fault(rule, topic, "", "", ALL, float(excess / bound), float(share / before), detail))
    return found


def _fields(counters: Counters, base: Normal) -> list[Fault]:
    found = []
    names = (ALL, *base.segments)
    for kind, kind_name in KIND_NAMES.items():
        n, before_n = int(counters.kinds[kind, 0]), int(base.total.kinds[kind, 0])
        if n < MIN_RECORDS or before_n < MIN_RECORDS:
            continue
        topic = topic_of(kind)
        for i, field_name in enumerate(COLUMNS[kind >> 3]):
            before = base.total.present[kind, i] / before_n
            gone = before - counters.present[kind, i] / n - 3 * np.sqrt(max(before * (1 - before), 0.0) / n)
            if field_name and before > SAID and gone > NULLS * max(before, 0.3):
                detail = f"{field_name} is given in {counters.present[kind, i] / n:.1%} of kind {kind_name}, {before:.1%} before"
                found.append(Fault("nulls", topic, kind_name, field_name, ALL, float(gone / (NULLS * max(before, 0.3))), 0.0, detail))
        for g, name in enumerate(names):
            found += _number(kind, name, counters.numbers[kind, g], base.total.numbers[kind, g])
            for i in range(TEXTS):
                now, then = counters.texts[kind, i, g], base.total.texts[kind, i, g]
                found += _text(kind, i, name, now, then)
    return found


def _number(kind: int, segment: str, now: Ints, then: Ints) -> list[Fault]:
    """A number in other units moves as a whole: by a large factor, and nothing stays where it was."""
    n, m = int(now.sum()), int(then.sum())
    if n < MIN_RECORDS or m < MIN_RECORDS:
        return []
    octaves = np.arange(OCTAVES) / 3
    a, b = (float(np.interp(0.5, np.cumsum(counts) / counts.sum(), octaves)) for counts in (then, now))
    factor = 2 ** (b - a)
    coarse = [counts.reshape(-1, 3).sum(axis=1) for counts in (then, now)]
    distance = float(psi(*coarse)) - 32 / n
    overlap = float(np.minimum(now / n, then / m).sum())
    name, field_name, topic = KIND_NAMES[kind], COLUMNS[kind >> 3][0], topic_of(kind)
    if max(factor, 1 / factor) >= UNIT_FACTOR and overlap < 0.6:
        detail = f"{field_name} of kind {name} is {factor:.3g} times what it was, all of it: another unit?"
        return [Fault("range", topic, name, field_name, segment, abs(b - a) / np.log2(UNIT_FACTOR) * 4, factor, detail)]
    if distance > SHIFT_PSI:
        detail = f"{field_name} of kind {name} is distributed otherwise (median {factor:.2f} times)"
        return [Fault("shift", topic, name, field_name, segment, distance / SHIFT_PSI, factor, detail)]
    return []


def _text(kind: int, column: int, segment: str, now: Ints, then: Ints) -> list[Fault]:
    n, m = int(now.sum()), int(then.sum())
    if n < MIN_RECORDS or m < MIN_RECORDS:
        return []
    name, field_name, topic = KIND_NAMES[kind], COLUMNS[kind >> 3][column + 1], topic_of(kind)
    others = now[-1] / n - then[-1] / m
    if others > OTHERS:
        detail = f"{now[-1] / n:.1%} of {field_name} of kind {name} are texts never seen before"
        return [Fault("cardinality", topic, name, field_name, segment, float(others / OTHERS) * 2, 0.0, detail)]
    distance = float(psi(then, now)) - (CATEGORIES + 1) / n
    if distance > SHIFT_PSI:
        detail = f"the mix of {field_name} of kind {name} has changed"
        return [Fault("mix", topic, name, field_name, segment, distance / SHIFT_PSI, 0.0, detail)]
    return []


@dataclass(slots=True)
class Watch:
    """Counts raw records by block, forgets the older ones, judges the last block and the last day."""

    base: Normal
    blocks: dict[int, Counters] = field(default_factory=dict)
    newest_ms: list[int] = field(default_factory=lambda: [0] * len(TOPICS))

    def add(self, facts: Ints, segment: npt.NDArray[np.integer]) -> None:
        """Accepted records; by event time."""
        block = (facts[:, TIME] - MONDAY_MS) // self.base.block_ms
        for one in np.unique(block).tolist():
            which = block == one
            self.of(one).add(count(facts[which], segment[which], self.base.words, len(self.base.segments)))
        for t in range(len(TOPICS)):
            times = facts[(facts[:, KIND] >> 3) == t, TIME]
            if len(times):
                self.newest_ms[t] = max(self.newest_ms[t], int(times.max()))

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
        """The rules over the last day, of kinds too rare for an hour, and over the last block; blocks older than a week are forgotten."""
        oldest = (until_ms - 7 * DAY_MS - MONDAY_MS) // self.base.block_ms
        for block in [block for block in self.blocks if block < oldest]:
            del self.blocks[block]
        found: dict[tuple[Any, ...], Fault] = {}
        for length in dict.fromkeys((self.base.block_ms, max(DAY_MS, self.base.block_ms))):
            counters, expected = self.window(until_ms, length)
            for fault in judge(counters, expected, self.base, hours=length / HOUR_MS):
                key = fault.rule, fault.topic, fault.kind, fault.field, fault.segment
                if key not in found or found[key].strength < fault.strength:
                    found[key] = fault
        for t, topic in enumerate(TOPICS):
            silent = until_ms - self.newest_ms[t]
            if self.newest_ms[t] and self.base.gaps[t] and silent > 3 * self.base.gaps[t]:
                detail = f"nothing on {topic} for {silent / HOUR_MS:.1f} h, {self.base.gaps[t] / HOUR_MS:.1f} h at most before"
                found["gap", topic] = Fault("stall", topic, "", "", ALL, silent / float(self.base.gaps[t]), 0.0, detail)
        return sorted(found.values(), key=lambda fault: -fault.strength)
