"""Cost of one event against the length of a history: in order, and late.

    python -m bench.history [--json]

One customer with 100 or 10,000 facts in the 90-day window. In order: microseconds per event of a batch that follows on, while as many
facts leave the window. Late: milliseconds of a step with one fact inserted in the middle of the history. Medians of repeated runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import numpy as np
import numpy.typing as npt

from features.facts import ID, KIND, KINDS, OFFSET, TIME, VALUE, WIDTH, A, B
from features.history import Histories
from features.window import HORIZON_MS

IntArray = npt.NDArray[np.int64]
BATCH = 1_000
REPEATS = 9
LATE_REPEATS = 51
START_MS = 1_600_000_000_000


def facts(count: int, gap_ms: int, first: int = 0) -> IntArray:
    """`count` payments and logins every `gap_ms`, numbered from `first`, with few products and many sessions; shape (count, WIDTH)."""
    number = np.arange(first, first + count)
    rows = np.zeros((count, WIDTH), np.int64)
    rows[:, TIME] = START_MS + number * gap_ms
    rows[:, OFFSET] = number
    login = number % 2 == 1
    rows[:, KIND] = np.where(login, KINDS["login"], KINDS["payment"])
    rows[:, VALUE] = 100 + number % 977
    rows[:, A] = 1 + number % 53
    rows[:, B] = np.where(login, 1_000_003 * (number // 3 + 1), 7)
    rows[:, ID] = number + 1
    return rows


def in_order_us(kept: int) -> float:
    """Microseconds per event of batches that follow on, with `kept` facts in the window throughout."""
    gap = HORIZON_MS // kept
    histories = Histories(create=True)
    filled = 2 * kept
    _feed(histories, facts(filled, gap))
    times = []
    for _ in range(REPEATS):
        batch = facts(BATCH, gap, filled)
        filled += BATCH
        begin = time.perf_counter()
        histories.step(["c"] * BATCH, batch)
        times.append((time.perf_counter() - begin) / BATCH * 1e6)
    assert abs(histories.kept_facts - kept) <= 1, histories.kept_facts
    return statistics.median(times)


def late_ms(kept: int) -> float:
    """Milliseconds of one step that inserts a fact in the middle of `kept` facts."""
    gap = HORIZON_MS // kept
    histories = Histories(create=True)
    _feed(histories, facts(kept, gap))
    times = []
    for repeat in range(LATE_REPEATS):
        fact = facts(1, gap, kept // 2 + repeat)
        fact[0, TIME] += gap // 2
        fact[0, OFFSET] = kept + repeat
        fact[0, ID] = -1 - repeat
        begin = time.perf_counter()
        step = histories.step(["c"], fact)
        times.append((time.perf_counter() - begin) * 1e3)
        assert step.late[0]
    return statistics.median(times)


def _feed(histories: Histories, rows: IntArray) -> None:
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        histories.step(["c"] * len(part), part)


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    parser.parse_args()
    short, long = in_order_us(100), in_order_us(10_000)
    figures = {
        "in_order_us_at_100": round(short, 3),
        "in_order_us_at_10000": round(long, 3),
        "in_order_ratio": round(long / short, 3),
        "late_insert_ms_at_10000": round(late_ms(10_000), 4),
    }
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
