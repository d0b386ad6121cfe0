"""Totals of a customer -> one vector: the catalog as a programme over columns, the last step and the only one with floats.

Operations are those of features.catalog.Op in float64, each operand converted from its integer once. BEFORE, CHANGE and
OPEN_TICKETS subtract in integers first. The result is rounded once to float32; NaN has one bit pattern, 0x7FC00000.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from features.aggregate import distinct_column, distinct_used, total_column, totals_used
from features.carry import FIRST, LAST_WIDTH, LASTS_AT, NEWEST, PROFILE_AT
from features.catalog import CATALOG, N_FEATURES, Feature, Op
from features.compiled import kernel
from features.facts import DAY_MS, NONE
from features.window import HOUR_MS, WINDOW_DAYS

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# sin and cos of the hour of the day (24 of them) and of the weekday (7), written out: the mathematical library of a
# machine may round the last digit its own way. Worked out once with math.sin and math.cos.
# fmt: off
HOURS_SIN: Final = np.array((
    0.0, 0.25881904510252074, 0.49999999999999994, 0.7071067811865475, 0.8660254037844386, 0.9659258262890683,
    1.0, 0.9659258262890683, 0.8660254037844387, 0.7071067811865476, 0.49999999999999994, 0.258819045102521,
    1.2246467991473532e-16, -0.2588190451025208, -0.4999999999999997, -0.7071067811865471, -0.8660254037844384, -0.9659258262890683,
    -1.0, -0.9659258262890684, -0.8660254037844386, -0.7071067811865477, -0.5000000000000004, -0.25881904510252157,
))
HOURS_COS: Final = np.array((
    1.0, 0.9659258262890683, 0.8660254037844387, 0.7071067811865476, 0.5000000000000001, 0.25881904510252074,
    6.123233995736766e-17, -0.25881904510252063, -0.4999999999999998, -0.7071067811865475, -0.8660254037844387, -0.9659258262890682,
    -1.0, -0.9659258262890683, -0.8660254037844388, -0.7071067811865479, -0.5000000000000004, -0.25881904510252063,
    -1.8369701987210297e-16, 0.2588190451025203, 0.5000000000000001, 0.7071067811865474, 0.8660254037844384, 0.9659258262890681,
))
WEEKDAYS_SIN: Final = np.array((
    0.0, 0.7818314824680298, 0.9749279121818236, 0.43388373911755823, -0.433883739117558, -0.9749279121818236,
    -0.7818314824680299,
))
WEEKDAYS_COS: Final = np.array((
    1.0, 0.6234898018587336, -0.22252093395631434, -0.900968867902419, -0.9009688679024191, -0.2225209339563146,
    0.6234898018587334,
))
# fmt: on

DAYS: Final = np.array((*WINDOW_DAYS, np.nan))


def _instruction(feature: Feature) -> tuple[int, ...]:
    """(op, x, y, z, u, v): columns x, y, z of a totals row, windows u, v whose length counts."""
    clock_newest, clock_first = NEWEST + feature.a, FIRST + feature.a
    columns = [total_column(*pair) for pair in totals_used(feature)] + [distinct_column(*pair) for pair in distinct_used(feature)]
    match feature.op:
        case Op.AGE_DAYS | Op.AGE_HOURS:
            columns = [clock_newest]
        case Op.TENURE_DAYS:
            columns = [clock_first]
        case Op.MEAN_GAP_DAYS | Op.AGE_PER_GAP:
            columns = [clock_newest, clock_first, *columns]
        case Op.LAST | Op.KNOWN:
            columns = [LASTS_AT + LAST_WIDTH * feature.a]
        case Op.LAST_PER_MEAN:
            columns = [LASTS_AT + LAST_WIDTH * feature.a, *columns]
        case Op.PER_LIFE_DAY:
            columns = [*columns, FIRST + feature.b]
        case _:
            pass
    columns += [0] * (3 - len(columns))
    return (int(feature.op), *columns, feature.wa, feature.wb)


PROGRAMME: Final = np.array([_instruction(feature) for feature in CATALOG], np.int64)

_TOTAL, _RATIO, _SHARE, _TREND = int(Op.TOTAL), int(Op.RATIO), int(Op.SHARE), int(Op.TREND)
_BEFORE, _CHANGE, _RATE, _PER_MINUTE = int(Op.BEFORE), int(Op.CHANGE), int(Op.RATE), int(Op.PER_MINUTE)
_AGE_DAYS, _AGE_HOURS, _TENURE_DAYS = int(Op.AGE_DAYS), int(Op.AGE_HOURS), int(Op.TENURE_DAYS)
_MEAN_GAP_DAYS, _AGE_PER_GAP = int(Op.MEAN_GAP_DAYS), int(Op.AGE_PER_GAP)
_DISTINCT, _DISTINCT_RATIO = int(Op.DISTINCT), int(Op.DISTINCT_RATIO)
_LAST, _LAST_PER_MEAN, _ZSCORE, _KNOWN = int(Op.LAST), int(Op.LAST_PER_MEAN), int(Op.ZSCORE), int(Op.KNOWN)
_HOUR_SIN, _HOUR_COS, _WEEKDAY_SIN, _WEEKDAY_COS = int(Op.HOUR_SIN), int(Op.HOUR_COS), int(Op.WEEKDAY_SIN), int(Op.WEEKDAY_COS)
_PROFILE_KNOWN, _SIGNUP_DAYS, _CONTRACT_DAYS, _CONSENT = (
    int(Op.PROFILE_KNOWN),
    int(Op.SIGNUP_DAYS),
    int(Op.CONTRACT_DAYS),
    int(Op.CONSENT),
)
_PRODUCT, _OPEN_TICKETS, _PER_LIFE_DAY = int(Op.PRODUCT), int(Op.OPEN_TICKETS), int(Op.PER_LIFE_DAY)


@kernel("float64(float64, float64)")
def _ratio(above: float, below: float) -> float:
    return np.nan if below == 0.0 else above / below


@kernel("float64(int64[:, ::1], int64, int64, int64)")
def _value(rows: IntArray, r: int, at: int, f: int) -> float:
    op, x, y, z = PROGRAMME[f, 0], PROGRAMME[f, 1], PROGRAMME[f, 2], PROGRAMME[f, 3]
    u, v = PROGRAMME[f, 4], PROGRAMME[f, 5]
    if op in (_TOTAL, _DISTINCT):
        return np.float64(rows[r, x])
    if op in (_RATIO, _DISTINCT_RATIO):
        return _ratio(np.float64(rows[r, x]), np.float64(rows[r, y]))
    if op == _SHARE:
        return _ratio(np.float64(rows[r, x]), np.float64(rows[r, x]) + np.float64(rows[r, y]))
    if op == _TREND:
        return _ratio(np.float64(rows[r, x]) / DAYS[u], np.float64(rows[r, y]) / DAYS[v])
    if op == _BEFORE:
        return np.float64(rows[r, y] - rows[r, x])
    if op == _CHANGE:
        return np.float64(rows[r, x] - (rows[r, y] - rows[r, x]))
    if op == _RATE:
        return float(np.float64(rows[r, x]) / DAYS[u])
    if op == _PER_MINUTE:
        return np.float64(rows[r, x]) / 60.0
    if op in (_AGE_DAYS, _TENURE_DAYS):
        return np.nan if rows[r, x] == NONE else np.float64(at - rows[r, x]) / np.float64(DAY_MS)
    if op == _AGE_HOURS:
        return np.nan if rows[r, x] == NONE else np.float64(at - rows[r, x]) / np.float64(HOUR_MS)
    if op in (_MEAN_GAP_DAYS, _AGE_PER_GAP):
        if rows[r, z] <= 1:
            return np.nan
        gap = (np.float64(rows[r, x] - rows[r, y]) / np.float64(DAY_MS)) / np.float64(rows[r, z] - 1)
        if op == _MEAN_GAP_DAYS:
            return float(gap)
        return _ratio(np.float64(at - rows[r, x]) / np.float64(DAY_MS), gap)
    if op == _LAST:
        return np.nan if rows[r, x + 1] == NONE else np.float64(rows[r, x])
    if op == _LAST_PER_MEAN:
        if rows[r, x + 1] == NONE or rows[r, z] == 0:
            return np.nan
        return _ratio(np.float64(rows[r, x]), np.float64(rows[r, y]) / np.float64(rows[r, z]))
    if op == _ZSCORE:
        expected = (np.float64(rows[r, y]) / DAYS[v]) * DAYS[u]
        return float((np.float64(rows[r, x]) - expected) / math.sqrt(expected + 1.0))
    if op == _HOUR_SIN:
        return float(HOURS_SIN[(at // HOUR_MS) % 24])
    if op == _HOUR_COS:
        return float(HOURS_COS[(at // HOUR_MS) % 24])
    if op == _WEEKDAY_SIN:
        return float(WEEKDAYS_SIN[(at // DAY_MS + 3) % 7])
    if op == _WEEKDAY_COS:
        return float(WEEKDAYS_COS[(at // DAY_MS + 3) % 7])
    if op == _KNOWN:
        return 0.0 if rows[r, x + 1] == NONE else 1.0
    if op == _PRODUCT:
        return np.float64(rows[r, x]) * np.float64(rows[r, y])
    if op == _OPEN_TICKETS:
        return np.float64(max(rows[r, x] + rows[r, y] - rows[r, z], 0))
    if op == _PER_LIFE_DAY:
        if rows[r, y] == NONE:
            return np.nan
        return _ratio(np.float64(rows[r, x]), np.float64(at - rows[r, y]) / np.float64(DAY_MS))
    known = rows[r, PROFILE_AT] != NONE
    if op == _PROFILE_KNOWN:
        return 1.0 if known else 0.0
    value, level = rows[r, PROFILE_AT + 2], rows[r, PROFILE_AT + 3]
    if op == _SIGNUP_DAYS:
        return np.float64(at - value * DAY_MS) / np.float64(DAY_MS) if known and value != NONE else np.nan
    if op == _CONTRACT_DAYS:
        return np.float64((level >> 2) * DAY_MS - at) / np.float64(DAY_MS) if known and level >> 2 != 0 else np.nan
    # CONSENT
    return np.float64((level & 3) - 1) if known and level & 3 else np.nan


@kernel("void(int64[:, ::1], int64, int64, float32[:, ::1], int64)")
def evaluate(rows: IntArray, r: int, at: int, vectors: FloatArray, k: int) -> None:
    """Write the vector of totals row r at `at` (ms) into row k of `vectors`."""
    for f in range(N_FEATURES):
        value = _value(rows, r, at, f)
        # Arithmetic makes NaNs of either sign; the one written here is a constant.
        vectors[k, f] = np.float32(np.nan) if value != value else np.float32(value)  # noqa: PLR0124 - the test for NaN
