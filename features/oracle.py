"""The slow, obvious answer: one customer's whole life as a list of facts, every feature recomputed by scanning it.

For verification and tests only: nothing in the service may import this module (a test holds that), and it shares no code
with the kernel; only the declarative tables and the names of the fact columns. It never forgets a fact, keeps no running
sum per window and knows no carry. Python floats are IEEE float64, so equality with the kernel is asked bit for bit.
"""

import math
import struct
from bisect import insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from features.catalog import ATTRIBUTES, CATALOG, CLOCKS, LASTS, MEASURES, MONEY, PURCHASE, TICKET, Feature, Field, Op
from features.facts import DAY_MS, ID, KIND, KINDS, LEVEL, MAX_SUM_MINOR, NONE, OFFSET, PRIORITIES, PROFILE, TIME, VALUE, A, B, C, D
from features.window import H1, HORIZON_MS, HOUR_MS, LIFE, WINDOW_DAYS, WINDOW_MS

SCORED, IS_PROFILE, DUPLICATE, DUPLICATE_CONFLICT, TOO_LATE, AMOUNT_RANGE, SKIPPED = range(7)
"""Outcomes of one fact, numbered as in features/history.py (stated here again on purpose; a test compares them)."""

_KIND_NAME: Final = {code: name for name, code in KINDS.items()}
_COLUMN: Final = {"A": A, "B": B, "C": C, "D": D}
_FORMAT: Final = f"<{len(CATALOG)}f"


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact and what it says, each part worked out once from its row.

    order: (event time ms, topic index, offset). adds: what it adds to each measure. clocks: indices of the clocks it moves.
    values: its value of each attribute, None when it has none. lasts: its value for each of LASTS, None when it has none.
    """

    row: tuple[int, ...]
    time: int
    order: tuple[int, int, int]
    adds: tuple[int, ...]
    clocks: frozenset[int]
    values: tuple[int | None, ...]
    lasts: tuple[int | None, ...]


def fact_of(row: Sequence[int]) -> Fact:
    """Read a fact row, shape (WIDTH,) of Python integers."""
    columns = tuple(row)
    time, code = columns[TIME], columns[KIND]
    kind = _KIND_NAME[code]
    return Fact(
        row=columns,
        time=time,
        order=(time, code >> 3, columns[OFFSET]),
        adds=tuple(_adds(columns, measure.field) if kind in measure.kinds else 0 for measure in MEASURES),
        clocks=frozenset(i for i, clock in enumerate(CLOCKS) if kind in clock.kinds),
        values=tuple(_value(columns, attribute.column) if kind in attribute.kinds else None for attribute in ATTRIBUTES),
        lasts=tuple(_last(columns, kind, name) for name in LASTS),
    )


def _csat(row: Sequence[int]) -> int | None:
    return (row[LEVEL] // 256) % 256 or None


def _nps(row: Sequence[int]) -> int | None:
    stored = row[LEVEL] % 256
    return stored - 1 if stored else None


def _adds(row: Sequence[int], field: Field) -> int:
    amount = row[VALUE]
    csat, nps = _csat(row), _nps(row)
    match field:
        case Field.ONE:
            return 1
        case Field.VALUE:
            return 0 if amount == NONE else amount
        case Field.VALUE_KNOWN:
            return int(amount != NONE)
        case Field.CSAT:
            return csat or 0
        case Field.CSAT_KNOWN:
            return int(csat is not None)
        case Field.NPS:
            return nps or 0
        case Field.NPS_KNOWN:
            return int(nps is not None)
        case Field.URGENT:
            return int(row[LEVEL] // 65536 in (PRIORITIES["high"], PRIORITIES["urgent"]))


def _value(row: Sequence[int], column: str) -> int | None:
    if column == "DAY":
        return row[TIME] // DAY_MS
    return row[_COLUMN[column]] or None


def _last(row: Sequence[int], kind: str, name: str) -> int | None:
    if name == "purchase_amount" and kind in PURCHASE and row[VALUE] != NONE:
        return row[VALUE]
    if name == "csat" and kind in TICKET:
        return _csat(row)
    if name == "nps" and kind in TICKET:
        return _nps(row)
    return None


@dataclass(frozen=True, slots=True)
class Handled:
    """What became of one fact. `at`: the customer's newest event time afterwards (ms); late: inserted before it."""

    outcome: int
    at: int
    late: bool


class History:
    """One customer's accepted facts, all of them for ever, sorted by (event time, topic index, offset)."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self.newest: int | None = None
        self._by_id: dict[int, list[Fact]] = {}
        self._money = 0

    def handle(self, row: Sequence[int]) -> Handled:
        """Take one fact row in, by the rules in their order: duplicate, too late, money, late, insert."""
        fact = fact_of(row)
        if self.newest is not None:
            for other in self._by_id.get(fact.row[ID], ()):
                if other.time > self.newest - HORIZON_MS:  # kept
                    same = all(fact.row[c] == other.row[c] for c in range(len(fact.row)) if c not in (OFFSET, ID))
                    return Handled(DUPLICATE if same else DUPLICATE_CONFLICT, self.newest, False)
            if fact.time <= self.newest - HORIZON_MS:
                return Handled(TOO_LATE, self.newest, False)
        kind = _KIND_NAME[fact.row[KIND]]
        amount = fact.row[VALUE] if kind in MONEY and fact.row[VALUE] != NONE else 0
        if self._money + amount > MAX_SUM_MINOR:
            return Handled(AMOUNT_RANGE, NONE if self.newest is None else self.newest, False)
        late = self.newest is not None and fact.time < self.newest
        self.newest = fact.time if self.newest is None else max(self.newest, fact.time)
        self._money += amount
        self._by_id.setdefault(fact.row[ID], []).append(fact)
        insort(self.facts, fact, key=_order)
        return Handled(IS_PROFILE if fact.row[KIND] == PROFILE else SCORED, self.newest, late)

    def vector(self, at: int | None = None) -> bytes:
        """Every feature at `at` (ms, the newest event time by default) as little-endian float32 in catalog order."""
        if at is None:
            assert self.newest is not None, "a customer without facts has no newest event time"
            at = self.newest
        return vector(self.facts, at)

    def kept(self) -> list[Fact]:
        """The facts whose event time is above newest - 90 d, in order."""
        return [] if self.newest is None else [fact for fact in self.facts if fact.time > self.newest - HORIZON_MS]


def _order(fact: Fact) -> tuple[int, int, int]:
    return fact.order


def vector(facts: Iterable[Fact], at: int) -> bytes:
    """Every feature of these facts at `at` (ms) as little-endian float32 in catalog order; NaN is 0x7FC00000."""
    return struct.pack(_FORMAT, *[math.nan if math.isnan(value) else value for value in values(facts, at)])


def values(facts: Iterable[Fact], at: int) -> list[float]:
    """Every feature in float64, before the one rounding to float32."""
    life = Life(sorted(facts, key=_order), at)
    return [_OPERATIONS[feature.op](life, feature) for feature in CATALOG]


class Life:
    """A customer's sorted facts looked at from `at` (ms): totals, clocks, distinct values, last values."""

    def __init__(self, facts: list[Fact], at: int) -> None:
        self.at = at
        self.facts = facts
        self.inside = [[fact for fact in facts if at - length < fact.time <= at] for length in WINDOW_MS]
        self.inside.append(facts)  # LIFE

    def total(self, measure: int, window: int) -> int:
        return sum([fact.adds[measure] for fact in self.inside[window]])

    def distinct(self, attribute: int, window: int) -> int:
        return len({fact.values[attribute] for fact in self.inside[window]} - {None})

    def times(self, clock: int) -> list[int]:
        return [fact.time for fact in self.facts if clock in fact.clocks]

    def last(self, which: int) -> int | None:
        for fact in reversed(self.facts):
            if fact.lasts[which] is not None:
                return fact.lasts[which]
        return None

    def profile(self) -> Sequence[int] | None:
        for fact in reversed(self.facts):
            if fact.row[KIND] == PROFILE:
                return fact.row
        return None


def _ratio(above: float, below: float) -> float:
    return above / below if below != 0 else math.nan


def _trend(life: Life, f: Feature) -> float:
    long = life.total(f.a, f.wb)
    if long == 0:
        return math.nan
    return (life.total(f.a, f.wa) / WINDOW_DAYS[f.wa]) / (long / WINDOW_DAYS[f.wb])


def _age(life: Life, f: Feature, unit: int) -> float:
    times = life.times(f.a)
    return (life.at - max(times)) / unit if times else math.nan


def _tenure(life: Life, clock: int) -> float:
    times = life.times(clock)
    return (life.at - min(times)) / DAY_MS if times else math.nan


def _mean_gap(life: Life, f: Feature) -> float:
    times, days = life.times(f.a), life.distinct(f.b, LIFE)
    if days <= 1:
        return math.nan
    return ((max(times) - min(times)) / DAY_MS) / (days - 1)


def _last_per_mean(life: Life, f: Feature) -> float:
    last, count = life.last(f.a), life.total(f.wb, f.wa)
    if last is None or count == 0:
        return math.nan
    return _ratio(float(last), float(life.total(f.b, f.wa)) / float(count))


def _last_value(life: Life, f: Feature) -> float:
    last = life.last(f.a)
    return math.nan if last is None else float(last)


def _zscore(life: Life, f: Feature) -> float:
    expected = (life.total(f.a, f.wb) / WINDOW_DAYS[f.wb]) * WINDOW_DAYS[f.wa]
    return (life.total(f.a, f.wa) - expected) / math.sqrt(expected + 1)


def _hour_angle(life: Life) -> float:
    return 2 * math.pi * ((life.at // HOUR_MS) % 24) / 24


def _weekday_angle(life: Life) -> float:
    return 2 * math.pi * ((life.at // DAY_MS + 3) % 7) / 7


def _signup_days(life: Life, _f: Feature) -> float:
    profile = life.profile()
    if profile is None or profile[VALUE] == NONE:
        return math.nan
    return (life.at - profile[VALUE] * DAY_MS) / DAY_MS


def _contract_days(life: Life, _f: Feature) -> float:
    profile = life.profile()
    if profile is None or profile[LEVEL] // 4 == 0:
        return math.nan
    return ((profile[LEVEL] // 4) * DAY_MS - life.at) / DAY_MS


def _consent(life: Life, _f: Feature) -> float:
    profile = life.profile()
    return math.nan if profile is None else (math.nan, 0.0, 1.0)[profile[LEVEL] % 4]


# One line per operation, in the words of `features.catalog.Op`. An integer divided by an integer in Python is the
# correctly rounded quotient, which is the float64 quotient only below 2**53: so operands are made floats first.
_OPERATIONS: Final[dict[Op, Callable[[Life, Feature], float]]] = {
    Op.TOTAL: lambda h, f: float(h.total(f.a, f.wa)),
    Op.RATIO: lambda h, f: _ratio(float(h.total(f.a, f.wa)), float(h.total(f.b, f.wb))),
    Op.SHARE: lambda h, f: _ratio(float(h.total(f.a, f.wa)), float(h.total(f.a, f.wa)) + float(h.total(f.b, f.wb))),
    Op.TREND: _trend,
    Op.BEFORE: lambda h, f: float(h.total(f.a, f.wb) - h.total(f.a, f.wa)),
    Op.CHANGE: lambda h, f: float(h.total(f.a, f.wa) - (h.total(f.a, f.wb) - h.total(f.a, f.wa))),
    Op.RATE: lambda h, f: h.total(f.a, f.wa) / WINDOW_DAYS[f.wa],
    Op.PER_MINUTE: lambda h, f: h.total(f.a, H1) / 60,
    Op.AGE_DAYS: lambda h, f: _age(h, f, DAY_MS),
    Op.AGE_HOURS: lambda h, f: _age(h, f, HOUR_MS),
    Op.TENURE_DAYS: lambda h, f: _tenure(h, f.a),
    Op.MEAN_GAP_DAYS: _mean_gap,
    Op.AGE_PER_GAP: lambda h, f: _ratio(_age(h, f, DAY_MS), _mean_gap(h, f)),
    Op.DISTINCT: lambda h, f: float(h.distinct(f.a, f.wa)),
    Op.DISTINCT_RATIO: lambda h, f: _ratio(float(h.distinct(f.a, f.wa)), float(h.distinct(f.b, f.wb))),
    Op.LAST: _last_value,
    Op.LAST_PER_MEAN: _last_per_mean,
    Op.ZSCORE: _zscore,
    Op.HOUR_SIN: lambda h, _f: math.sin(_hour_angle(h)),
    Op.HOUR_COS: lambda h, _f: math.cos(_hour_angle(h)),
    Op.WEEKDAY_SIN: lambda h, _f: math.sin(_weekday_angle(h)),
    Op.WEEKDAY_COS: lambda h, _f: math.cos(_weekday_angle(h)),
    Op.KNOWN: lambda h, f: float(h.last(f.a) is not None),
    Op.PROFILE_KNOWN: lambda h, _f: float(h.profile() is not None),
    Op.SIGNUP_DAYS: _signup_days,
    Op.CONTRACT_DAYS: _contract_days,
    Op.CONSENT: _consent,
    Op.PRODUCT: lambda h, f: float(h.total(f.a, f.wa)) * float(h.total(f.b, f.wb)),
    Op.OPEN_TICKETS: lambda h, f: float(max(0, h.total(f.a, LIFE) + h.total(f.wa, LIFE) - h.total(f.b, LIFE))),
    Op.PER_LIFE_DAY: lambda h, f: _ratio(float(h.total(f.a, LIFE)), _tenure(h, f.b)),
}
