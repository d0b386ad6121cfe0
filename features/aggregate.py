"""Totals of one customer as a row of integers, and the verbs that change it: include, exclude, fold.

A row starts as a carry (features/carry.py) and there holds the totals over the whole life; behind it lies one cell for
every (measure, window) and every (attribute, window) that the catalog uses. Which cells a fact touches is a table by kind,
compiled from the catalog when this module is imported. All numbers are int64, so the order of changes never shows.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from features.carry import BASE, CARRY_WIDTH, DAY_ATTRIBUTES, DAYS_AT, FIRST, LAST_WIDTH, LASTS_AT, MEASURE, MONEY, NEWEST, PROFILE_AT
from features.catalog import ATTRIBUTES, CATALOG, CLOCKS, LASTS, MEASURES, PURCHASE, TICKET, Feature, Field, Op
from features.compiled import kernel
from features.facts import DAY_MS, KIND, KINDS, LEVEL, N_KINDS, NONE, OFFSET, PROFILE, TIME, VALUE, A, B, C, D
from features.window import H1, LIFE, N_WINDOWS, WINDOW_MS

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

BOUNDED: Final = N_WINDOWS - 1
"""Number of windows that facts leave; the last one, LIFE, they never do."""
EVERY_WINDOW: Final = (1 << N_WINDOWS) - 1
LENGTHS: Final = np.array(WINDOW_MS, np.int64)


def totals_used(feature: Feature) -> list[tuple[int, int]]:
    """The (measure, window) pairs a feature reads, in the order of its operands."""
    a, wa, b, wb = feature.a, feature.wa, feature.b, feature.wb
    match feature.op:
        case Op.TOTAL | Op.RATE:
            return [(a, wa)]
        case Op.PER_MINUTE:
            return [(a, H1)]
        case Op.RATIO | Op.SHARE | Op.PRODUCT:
            return [(a, wa), (b, wb)]
        case Op.TREND | Op.BEFORE | Op.CHANGE | Op.ZSCORE:
            return [(a, wa), (a, wb)]
        case Op.LAST_PER_MEAN:
            return [(b, wa), (wb, wa)]
        case Op.OPEN_TICKETS:
            return [(a, LIFE), (wa, LIFE), (b, LIFE)]
        case Op.PER_LIFE_DAY:
            return [(a, LIFE)]
        case _:
            return []


def distinct_used(feature: Feature) -> list[tuple[int, int]]:
    """The (attribute, window) pairs a feature reads, in the order of its operands."""
    match feature.op:
        case Op.DISTINCT:
            return [(feature.a, feature.wa)]
        case Op.DISTINCT_RATIO:
            return [(feature.a, feature.wa), (feature.b, feature.wb)]
        case Op.MEAN_GAP_DAYS | Op.AGE_PER_GAP:
            return [(feature.b, LIFE)]
        case _:
            return []


TOTAL_CELLS: Final = {
    pair: CARRY_WIDTH + cell
    for cell, pair in enumerate(sorted({pair for feature in CATALOG for pair in totals_used(feature) if pair[1] != LIFE}))
}
DISTINCT_CELLS: Final = {
    pair: CARRY_WIDTH + len(TOTAL_CELLS) + cell
    for cell, pair in enumerate(sorted({pair for feature in CATALOG for pair in distinct_used(feature) if pair[1] != LIFE}))
}
ROW_WIDTH: Final = CARRY_WIDTH + len(TOTAL_CELLS) + len(DISTINCT_CELLS)
"""Columns of a totals row."""


def total_column(measure: int, window: int) -> int:
    """Column of T(measure, window)."""
    return MEASURE + measure if window == LIFE else TOTAL_CELLS[measure, window]


def distinct_column(attribute: int, window: int) -> int:
    """Column of D(attribute, window). Raises ValueError for a life-long count of anything but days."""
    if window != LIFE:
        return DISTINCT_CELLS[attribute, window]
    if attribute not in DAY_ATTRIBUTES:
        raise ValueError(f"different {ATTRIBUTES[attribute].name} are counted per window only, not over the whole life")
    return DAYS_AT + 2 * DAY_ATTRIBUTES.index(attribute)


def _adds_by_kind() -> tuple[IntArray, IntArray]:
    """What a fact of a kind adds: rows (window, column, field) sorted by kind and window, and where each (kind, window) begins."""
    rows: list[tuple[int, int, int]] = []
    at = np.zeros((N_KINDS, N_WINDOWS + 1), np.int64)
    names = {code: name for name, code in KINDS.items()}
    for kind in range(N_KINDS):
        for window in range(N_WINDOWS):
            at[kind, window] = len(rows)
            for index, measure in enumerate(MEASURES):
                if names.get(kind) in measure.kinds and (window == LIFE or (index, window) in TOTAL_CELLS):
                    rows.append((window, total_column(index, window), int(measure.field)))
        at[kind, N_WINDOWS] = len(rows)
    return np.array(rows, np.int64), at


def _members_by_kind(classes: list[tuple[str, ...]]) -> tuple[IntArray, IntArray]:
    """Indices of the classes each kind belongs to, and where each kind begins."""
    members: list[int] = []
    at = np.zeros(N_KINDS + 1, np.int64)
    names = {code: name for name, code in KINDS.items()}
    for kind in range(N_KINDS):
        at[kind] = len(members)
        members += [index for index, kinds in enumerate(classes) if names.get(kind) in kinds]
    at[N_KINDS] = len(members)
    return np.array(members, np.int64), at


ADDS, ADDS_AT = _adds_by_kind()
CLOCKS_OF, CLOCKS_OF_AT = _members_by_kind([clock.kinds for clock in CLOCKS])
ATTRIBUTES_OF, ATTRIBUTES_OF_AT = _members_by_kind([attribute.kinds for attribute in ATTRIBUTES])
_IS_PURCHASE: Final = np.array([kind in {KINDS[name] for name in PURCHASE} for kind in range(N_KINDS)])
_IS_TICKET: Final = np.array([kind in {KINDS[name] for name in TICKET} for kind in range(N_KINDS)])
MAX_ATTRIBUTES_OF_A_FACT: Final = int(np.diff(ATTRIBUTES_OF_AT).max())

_DAY: Final = -1
COLUMN_OF: Final = np.array([{"DAY": _DAY, "A": A, "B": B, "C": C, "D": D}[attribute.column] for attribute in ATTRIBUTES], np.int64)
"""Fact column of each attribute, -1 for the day."""
COUNT_OF: Final = np.array(
    [[DISTINCT_CELLS.get((attribute, window), -1) for window in range(BOUNDED)] for attribute in range(len(ATTRIBUTES))], np.int64
)
"""Column of D(attribute, window), -1 where the catalog has no use for it."""
DAYS_OF: Final = np.array([DAYS_AT + 2 * DAY_ATTRIBUTES.index(a) if a in DAY_ATTRIBUTES else -1 for a in range(len(ATTRIBUTES))], np.int64)
"""Column of the number of different days over the whole life (the last one stands behind it), -1 where not kept."""
assert LASTS == ("purchase_amount", "csat", "nps")
assert len(ATTRIBUTES) <= 8

_ONE, _VALUE, _VALUE_KNOWN = int(Field.ONE), int(Field.VALUE), int(Field.VALUE_KNOWN)
_CSAT, _CSAT_KNOWN, _NPS, _NPS_KNOWN = int(Field.CSAT), int(Field.CSAT_KNOWN), int(Field.NPS), int(Field.NPS_KNOWN)
_HIGH: Final = 3


@kernel("int64(int64[:, ::1], int64, int64)")
def contribution(facts: IntArray, i: int, field: int) -> int:
    """What fact i adds to a measure with this field."""
    if field == _ONE:
        return 1
    value = facts[i, VALUE]
    level = facts[i, LEVEL]
    if field == _VALUE:
        return 0 if value == NONE else int(value)
    if field == _VALUE_KNOWN:
        return 0 if value == NONE else 1
    if field == _CSAT:
        return int(level >> 8 & 255)
    if field == _CSAT_KNOWN:
        return 1 if level >> 8 & 255 else 0
    if field == _NPS:
        return int(max(level & 255, 1) - 1)
    if field == _NPS_KNOWN:
        return 1 if level & 255 else 0
    return 1 if level >> 16 >= _HIGH else 0


@kernel("int64(int64[:, ::1], int64, int64)")
def attribute_value(facts: IntArray, i: int, attribute: int) -> int:
    """Value of an attribute of fact i: never 0 for a day, 0 for an absent text."""
    column = COLUMN_OF[attribute]
    if column == _DAY:
        return int(facts[i, TIME] // DAY_MS + 1)
    return int(facts[i, column])


@kernel("void(int64[:, ::1], int64, int64[:, ::1], int64, int64)")
def include(rows: IntArray, r: int, facts: IntArray, i: int, windows: int) -> None:
    """Add fact i to the totals of the windows in the bit set `windows`."""
    kind = facts[i, KIND]
    for k in range(ADDS_AT[kind, 0], ADDS_AT[kind, N_WINDOWS]):
        if windows >> ADDS[k, 0] & 1:
            rows[r, ADDS[k, 1]] += contribution(facts, i, ADDS[k, 2])


@kernel("void(int64[:, ::1], int64, int64[:, ::1], int64, int64)")
def exclude(rows: IntArray, r: int, facts: IntArray, i: int, window: int) -> None:
    """Take fact i out of the totals of one window."""
    kind = facts[i, KIND]
    for k in range(ADDS_AT[kind, window], ADDS_AT[kind, window + 1]):
        rows[r, ADDS[k, 1]] -= contribution(facts, i, ADDS[k, 2])


@kernel("void(int64[:, ::1], int64, int64[:, ::1], int64, int64, int64)")
def _replace_last(rows: IntArray, r: int, facts: IntArray, i: int, at: int, value: int) -> None:
    time, topic, offset = facts[i, TIME], facts[i, KIND] >> 3, facts[i, OFFSET]
    if time < rows[r, at + 1]:
        return
    if time == rows[r, at + 1]:
        if topic < rows[r, at + 2]:
            return
        if topic == rows[r, at + 2] and offset < rows[r, at + 3]:
            return
    rows[r, at] = value
    rows[r, at + 1] = time
    rows[r, at + 2] = topic
    rows[r, at + 3] = offset


@kernel("void(int64[:, ::1], int64, int64[:, ::1], int64)")
def _recall(rows: IntArray, r: int, facts: IntArray, i: int) -> None:
    """Everything of a fact that lives on for ever but its sums and days: count, money, clocks, last values, profile."""
    time, kind = facts[i, TIME], facts[i, KIND]
    rows[r, BASE] += 1
    if kind >> 3 == 0 and facts[i, VALUE] != NONE:
        rows[r, MONEY] += facts[i, VALUE]
    for k in range(CLOCKS_OF_AT[kind], CLOCKS_OF_AT[kind + 1]):
        clock = CLOCKS_OF[k]
        rows[r, NEWEST + clock] = max(rows[r, NEWEST + clock], time)
        if rows[r, FIRST + clock] == NONE or time < rows[r, FIRST + clock]:
            rows[r, FIRST + clock] = time
    if _IS_PURCHASE[kind]:
        if facts[i, VALUE] != NONE:
            _replace_last(rows, r, facts, i, LASTS_AT, facts[i, VALUE])
    elif _IS_TICKET[kind]:
        csat, nps = facts[i, LEVEL] >> 8 & 255, facts[i, LEVEL] & 255
        if csat:
            _replace_last(rows, r, facts, i, LASTS_AT + LAST_WIDTH, csat)
        if nps:
            _replace_last(rows, r, facts, i, LASTS_AT + 2 * LAST_WIDTH, nps - 1)
    elif kind == PROFILE:
        offset = facts[i, OFFSET]
        if time > rows[r, PROFILE_AT] or (time == rows[r, PROFILE_AT] and offset >= rows[r, PROFILE_AT + 1]):
            rows[r, PROFILE_AT] = time
            rows[r, PROFILE_AT + 1] = offset
            rows[r, PROFILE_AT + 2] = facts[i, VALUE]
            rows[r, PROFILE_AT + 3] = facts[i, LEVEL]
            for column in range(4):
                rows[r, PROFILE_AT + 4 + column] = facts[i, A + column]


@kernel("void(int64[:, ::1], int64, int64[:, ::1], int64, int64)")
def enter(rows: IntArray, r: int, facts: IntArray, i: int, windows: int) -> None:
    """Fact i enters a history: totals of `windows` (LIFE among them), clocks, last values, profile. Days are the caller's."""
    include(rows, r, facts, i, windows)
    _recall(rows, r, facts, i)


@kernel("void(int64[:, ::1], int64, int64[:, ::1], int64)")
def fold(rows: IntArray, r: int, facts: IntArray, i: int) -> None:
    """Fact i, the oldest one, leaves the kept facts and enters the carry."""
    include(rows, r, facts, i, 1 << LIFE)
    _recall(rows, r, facts, i)
    kind = facts[i, KIND]
    for k in range(ATTRIBUTES_OF_AT[kind], ATTRIBUTES_OF_AT[kind + 1]):
        days = DAYS_OF[ATTRIBUTES_OF[k]]
        if days >= 0:
            # Facts leave in time order, so a day not above the last one has been counted.
            day = facts[i, TIME] // DAY_MS
            if day > rows[r, days + 1]:
                rows[r, days] += 1
                rows[r, days + 1] = day
