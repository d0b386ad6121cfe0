"""The carry: what left a history, folded into one int64 row per customer; also the form of a customer's totals over the whole life.

A row of zeros is not neutral: use `empty()`. All parts are commutative folds except the distinct days, which rely on facts
leaving in time order (they do: only the oldest fact leaves).
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from features.catalog import ATTRIBUTES, CLOCKS, LASTS, MEASURES
from features.facts import NONE

DAY_ATTRIBUTES: Final = tuple(i for i, attribute in enumerate(ATTRIBUTES) if attribute.column == "DAY")

BASE: Final = 0  # number of facts that left = sequence number of the oldest kept fact
MONEY: Final = 1  # sum of VALUE over money kinds, for the 2**62 rule
MEASURE: Final = 2  # one sum per measure
NEWEST: Final = MEASURE + len(MEASURES)  # newest time per clock, NONE when never
FIRST: Final = NEWEST + len(CLOCKS)  # first time per clock, NONE when never
LASTS_AT: Final = FIRST + len(CLOCKS)  # per last: value, time, topic index, offset; time NONE when never
LAST_WIDTH: Final = 4
PROFILE_AT: Final = LASTS_AT + LAST_WIDTH * len(LASTS)  # time, offset, VALUE, LEVEL, A, B, C, D; time NONE when never
PROFILE_WIDTH: Final = 8
DAYS_AT: Final = PROFILE_AT + PROFILE_WIDTH  # per DAY attribute: number of distinct days, last day (NONE when never)
CARRY_WIDTH: Final = DAYS_AT + 2 * len(DAY_ATTRIBUTES)


def empty() -> npt.NDArray[np.int64]:
    """The carry of a customer nothing has left yet, shape (CARRY_WIDTH,)."""
    row = np.zeros(CARRY_WIDTH, np.int64)
    row[NEWEST:LASTS_AT] = NONE
    row[LASTS_AT + 1 : PROFILE_AT : LAST_WIDTH] = NONE
    row[PROFILE_AT] = NONE
    row[DAYS_AT + 1 :: 2] = NONE
    return row
