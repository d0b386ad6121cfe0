"""A made-up shop whose customers buy in rhythms of their own, as facts, for tests that train."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.facts import ID, KIND, KINDS, OFFSET, TIME, VALUE, WIDTH
from features.window import DAY_MS

START: int = 1_600_000_000_000 // DAY_MS * DAY_MS


@dataclass(frozen=True)
class Shop:
    """Customers and facts (n, WIDTH) in time order."""

    customers: list[str]
    facts: npt.NDArray[np.int64]


def purchases(rows: list[tuple[str, int, str]]) -> Shop:
    """(customer, event time in ms, kind) in arrival order as facts."""
    facts = np.zeros((len(rows), WIDTH), np.int64)
    for i, (_, time, kind) in enumerate(rows):
        facts[i, [TIME, OFFSET, KIND, VALUE, ID]] = time, i, KINDS[kind], 1_000, i + 1
    return Shop([customer for customer, _, _ in rows], facts)


def rhythms(customers: int = 300, days: int = 420, seed: int = 0) -> Shop:
    """Each customer buys about every `gap` days until a day of leaving: those silent for long against their rhythm have left."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, int, str]] = []
    for number in range(customers):
        gap = rng.uniform(3, 60)
        leaves = rng.uniform(60, 2 * days)
        day = rng.uniform(0, 60)
        while day < min(days, leaves):
            rows.append((f"{number:05}", START + int(day * DAY_MS), "payment"))
            day += rng.exponential(gap)
    rows.sort(key=lambda row: row[1])
    return purchases(rows)
