"""Seeded hostile histories: many customers' facts in the order a partition would hand them over, for verification.

What is hostile about them: event times exactly one window (or 1 ms less or more) after another fact, ties within and
across topics, duplicates with the same and with other content (also of facts that already left), late facts from 1 ms to
exactly 90 d, years of silence, absent values, amounts near 10^15 and sums at 2^62, attribute values and ids that customers
share, and customers with more than 1,000 kept facts.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from features.facts import (
    DAY_MS,
    ID,
    KIND,
    KINDS,
    LEVEL,
    MAX_AMOUNT_MINOR,
    NONE,
    OFFSET,
    PRIORITIES,
    TIME,
    TOPICS,
    VALUE,
    WIDTH,
    YEAR_2000_MS,
    A,
    B,
    C,
    D,
    pack_profile,
    pack_ticket,
)
from features.window import HORIZON_MS, HOUR_MS, WINDOW_MS

IntArray = npt.NDArray[np.int64]

HOT_FACTS: Final = 1_000
"""A history is hot when it once keeps more facts than this."""
HOT_SHARE: Final = 0.005
MEDIUM_SHARE: Final = 0.08

_KINDS_OF_TOPIC: Final = tuple(tuple(code for code in KINDS.values() if code >> 3 == topic) for topic in range(len(TOPICS)))
_DAY0: Final = YEAR_2000_MS // DAY_MS
_TRANSACTIONS, _LOGINS, _SUPPORT, _PROFILES = range(4)


@dataclass(frozen=True, slots=True)
class World:
    """One partition's stream of facts in merge order.

    facts: (n, WIDTH). owner: (n,) index into customers. skip: (n,) rows the codec would have rejected. hot: (customers,)
    whether the customer was made to keep more than HOT_FACTS facts. batches: ends of the batches, increasing, last one n.
    """

    customers: tuple[str, ...]
    facts: IntArray
    owner: IntArray
    skip: npt.NDArray[np.bool_]
    hot: npt.NDArray[np.bool_]
    batches: tuple[int, ...]


def world(seed: int, index: int, customers: int = 200) -> World:
    """World number `index` of a seed; the same arguments always give the same world. At least 1 % of 200 customers are hot."""
    rng = np.random.Generator(np.random.PCG64([seed, index]))
    hot = rng.random(customers) < HOT_SHARE
    # Three of the default 200 are always hot, so that the share of hot histories is above 1 % in every run.
    hot[: round(customers * 0.015)] = True
    medium = ~hot & (rng.random(customers) < MEDIUM_SHARE)
    lives = [_Life(rng, "hot" if hot[c] else "medium" if medium[c] else "short").facts() for c in range(customers)]
    lengths = [len(life) for life in lives]
    owner = rng.permutation(np.repeat(np.arange(customers), lengths)).astype(np.int64)
    # A stable sort by owner says which of its customer's facts each place in the stream holds.
    facts = np.empty((len(owner), WIDTH), np.int64)
    facts[np.argsort(owner, kind="stable")] = np.concatenate(lives)
    skip = rng.random(len(owner)) < 0.004
    facts[skip & (rng.random(len(owner)) < 0.5), TIME] = NONE
    for topic in range(len(TOPICS)):
        mine = np.flatnonzero(facts[:, KIND] >> 3 == topic)
        facts[mine, OFFSET] = int(rng.integers(0, 10**6)) + np.cumsum(rng.choice([1, 1, 1, 2, 1000], size=len(mine)))
    names = tuple(f"{c:05d}" if c % 3 else f"customer-{index}-{c}" for c in range(customers))
    return World(names, facts, owner, skip, hot, _batches(rng, len(owner)))


def _batches(rng: np.random.Generator, n: int) -> tuple[int, ...]:
    ends, at = [], 0
    while at < n:
        at = min(n, at + int(rng.choice([1, 3, 40, 400, 1500])))
        ends.append(at)
    return tuple(ends)


class _Life:
    """The facts of one customer in arrival order, made one after the other since each looks back at the former ones."""

    def __init__(self, rng: np.random.Generator, size: str) -> None:
        self.rng = rng
        self.hot = size == "hot"
        if size == "hot":
            self.length = int(rng.integers(1_150, 1_500))
        elif size == "medium":
            self.length = int(rng.integers(30, 160))
        else:
            self.length = 1 + int(rng.geometric(0.085))
        self.rows: list[list[int]] = []
        self.newest: int = 0
        # Seldom over the range a codec lets through: only so can a short history reach the 2**62 rule.
        self.amount_style = str(rng.choice(["small", "huge", "mixed", "rich"], p=[0.42, 0.2, 0.3, 0.08]))
        if self.hot and self.amount_style == "rich":
            self.amount_style = "huge"
        self.longest_step_ms = float(rng.choice([2 * HOUR_MS, 2 * DAY_MS, 12 * DAY_MS, 40 * DAY_MS, 400 * DAY_MS]))
        weights = rng.choice([0.05, 0.3, 1.0, 3.0], size=len(TOPICS))
        weights[_PROFILES] *= 0.3
        self.topics: list[int] = rng.choice(len(TOPICS), size=self.length, p=weights / weights.sum()).tolist()
        self.moves: list[float] = rng.random(self.length).tolist()
        self.dice: list[list[float]] = rng.random((self.length, 6)).tolist()
        self.numbers: list[list[int]] = rng.integers(-(2**63) + 1, 2**63 - 1, size=(self.length, 6)).tolist()
        pool = int(rng.choice([1, 2, 4, 30, 4000]))
        style = rng.integers(3)
        if style == 0:  # shared by all customers and all attributes
            self.pool = list(range(1, pool + 1))
        elif style == 1:  # equal in the low bits
            self.pool = [i << 40 for i in range(1, pool + 1)]
        else:
            self.pool = (rng.integers(-(2**63) + 1, 2**63 - 1, size=min(pool, self.length + 1)) | 1).tolist()
        self.small_ids = bool(rng.integers(2))

    def facts(self) -> IntArray:
        """(length, WIDTH); OFFSET is filled in when the stream is put together."""
        for i in range(self.length):
            again = self.moves[i] < 0.08 and i > 0
            row = self._again(i) if again else self._fresh(i)
            self.rows.append(row)
            self.newest = max(self.newest, row[TIME]) if i else row[TIME]
        return np.array(self.rows, np.int64)

    def _again(self, i: int) -> list[int]:
        """An event delivered a second time, one time in four with something else in it."""
        dice = self.dice[i]
        reach = i if dice[0] < 0.3 else min(i, 4)  # mostly a recent one
        row = list(self.rows[i - 1 - int(dice[1] * reach)])
        if dice[2] < 0.25:
            column = (TIME, VALUE, LEVEL, A, B, C, D)[int(dice[3] * 7)]
            if column == LEVEL:
                row[LEVEL] = _other_level(row)
            elif column == VALUE:
                row[VALUE] = 7 if row[VALUE] == NONE else row[VALUE] // 2
            elif column == TIME:
                row[TIME] += 1 if dice[4] < 0.5 else 91 * DAY_MS if dice[4] < 0.6 and not self.hot else -1
            else:
                row[column] ^= 5
        return row

    def _fresh(self, i: int) -> list[int]:
        topic, dice, numbers = self.topics[i], self.dice[i], self.numbers[i]
        kinds = _KINDS_OF_TOPIC[topic]
        # Half of them the first kind of the topic, so that purchases, logins and tickets meet often.
        kind = kinds[0] if dice[0] < 0.4 else kinds[numbers[0] % len(kinds)]
        row = [0] * WIDTH
        row[TIME] = self._time(i)
        row[KIND] = kind
        row[ID] = i + 1 if self.small_ids else numbers[1] | 1
        value = dice[1]
        if topic == _TRANSACTIONS:
            row[VALUE] = self._amount(value, numbers[2])
        elif topic == _PROFILES:
            row[VALUE] = NONE if value < 0.3 else _DAY0 + numbers[2] % 9000
            ends = None if dice[2] < 0.3 else 1 + numbers[3] % 30_000
            row[LEVEL] = pack_profile(ends, (None, False, True)[numbers[4] % 3])
        else:
            row[VALUE] = NONE if value < 0.25 else 0 if value < 0.3 else numbers[2] % (10**6 if value < 0.9 else 10**12)
        if topic == _SUPPORT:
            csat = 1 + numbers[3] % 5 if dice[2] < 0.4 else None
            nps = numbers[4] % 11 if dice[3] < 0.4 else None
            row[LEVEL] = pack_ticket(numbers[5] % 5, csat, nps)
        for column, number in zip((A, B, C, D), numbers[2:6], strict=True):
            if column != D or topic in (_LOGINS, _PROFILES):
                row[column] = 0 if number % 7 == 0 else self.pool[number % len(self.pool)]
        return row

    def _amount(self, dice: float, number: int) -> int:
        if dice < 0.12:
            return NONE
        if dice < 0.17:
            return 0
        if self.amount_style == "rich":
            return 2**59 + number % 2**60
        if self.amount_style == "huge" or (self.amount_style == "mixed" and dice < 0.5):
            return MAX_AMOUNT_MINOR - number % 1000
        return 1 + number % 50_000

    def _time(self, i: int) -> int:
        if i == 0:
            return YEAR_2000_MS + HORIZON_MS + int(self.dice[0][4] * 9_000) * DAY_MS + self.numbers[0][5] % DAY_MS
        move, (_, _, _, _, dice, other) = self.moves[i], self.dice[i]
        edge = self.numbers[i][0] % 3 - 1
        if self.hot:
            return self._hot_time(i, move, dice, other, edge)
        if move < 0.45:  # onwards, by anything from 1 ms to the longest step of this customer
            return self.newest + _up_to(self.longest_step_ms, dice)
        if move < 0.60:  # one window after another fact, or beside that edge
            back = self.rows[i - 1 - int(other * min(i, 12))][TIME]
            return max(back + WINDOW_MS[int(dice * 7)] + edge, self.newest - HORIZON_MS + 1)
        if move < 0.72:  # a tie
            return self.newest if dice < 0.7 else self.rows[i - 1 - int(other * min(i, 20))][TIME]
        if move < 0.84:  # late
            return self.newest - _up_to(89 * DAY_MS, dice)
        if move < 0.92:  # late, on the edge of a window; for 90 d: too late, by 0 or 1 ms, or just not
            return self.newest - WINDOW_MS[int(dice * 7)] + edge
        if move < 0.97:  # the turn of an hour or of a day, UTC
            unit = HOUR_MS if dice < 0.4 else DAY_MS
            return (self.newest // unit + 1 + int(other * 3)) * unit + edge
        return self.newest + (90 + int(2000 * dice * dice * dice)) * DAY_MS + edge  # silence

    def _hot_time(self, i: int, move: float, dice: float, other: float, edge: int) -> int:
        """About 70 days for all facts but the last 3 %, then on until most of them have left."""
        pace_ms = 70 * DAY_MS // self.length
        if i > self.length * 0.97:
            return self.newest + int(dice * 12) * DAY_MS + edge + 1
        if move < 0.74:
            return self.newest + int(2 * pace_ms * dice)
        if move < 0.80:  # into an hour, a day or a week after an earlier fact, if that is about now
            back = self.rows[i - 1 - int(other * min(i, 400))][TIME] + WINDOW_MS[int(dice * 3)] + edge
            return back if back - self.newest < HOUR_MS else self.newest
        if move < 0.88:
            return self.newest
        if move < 0.96:
            return self.newest - _up_to(60 * DAY_MS, dice)
        return self.newest - WINDOW_MS[int(dice * 7)] + edge


def _up_to(limit_ms: float, dice: float) -> int:
    """From 1 ms to the limit, every order of magnitude as likely as the others."""
    return int(math.pow(limit_ms, dice))


def _other_level(row: list[int]) -> int:
    """Another valid LEVEL for the same kind of fact; the same one where the topic has none."""
    topic, level = row[KIND] >> 3, row[LEVEL]
    if topic == _PROFILES:
        return level ^ 4  # the contract ends a day earlier or later
    if topic == _SUPPORT:
        return level ^ (4 << 16 if level >> 16 == PRIORITIES["urgent"] else 1 << 16)
    return level
