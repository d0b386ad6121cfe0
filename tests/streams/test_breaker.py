"""When a worker stops taking records that all become dead letters, when it ends for want of progress, and the accounts it shows."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from random import Random

import pytest
from prometheus_client import generate_latest

from streams.breaker import LEAST, WINDOW_S, Breaker
from streams.main import Watchdog
from streams.metrics import COUNTERS, Metrics


def test_a_tenth_of_bad_data_passes_a_bad_deployment_does_not() -> None:
    breaker = Breaker(0.5)
    assert not any(breaker.note(4_000, 400, float(second)) for second in range(300))
    told = [breaker.note(4_000, 4_000, 300.0 + second) for second in range(60)]
    assert not told[0]
    assert "records of the last minute became dead letters (limit 50%)" in told[-1]


def test_few_records_mean_nothing_and_a_limit_of_1_is_none() -> None:
    assert not Breaker(0.5).note(LEAST - 1, LEAST - 1, 0.0)
    assert Breaker(0.5).note(LEAST, LEAST, 0.0)
    assert not Breaker(1.0).note(10 * LEAST, 10 * LEAST, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_the_window_is_the_last_minute(seed: int) -> None:
    random = Random(seed)
    limit = random.choice([0.1, 0.5, 0.9])
    breaker = Breaker(limit)
    noted: deque[tuple[float, int, int]] = deque()
    now_s = 0.0
    for _ in range(200):
        now_s += random.choice([0.01, 1.0, 30.0])
        events = random.randrange(2_000)
        noted.append((now_s, events, random.randint(0, events)))
        last = [row for row in noted if row[0] > now_s - WINDOW_S]
        total, letters = sum(row[1] for row in last), sum(row[2] for row in last)
        assert bool(breaker.note(*noted[-1][1:], now_s)) == (total >= LEAST and letters > limit * total)


def test_every_scrape_works_the_residue_out() -> None:
    metrics = Metrics()
    counters = dict.fromkeys(COUNTERS, 0) | {"events": 10, "scores": 7, "dead_letters": 2, "duplicates": 1}
    metrics.accounting.counters = lambda: {0: counters, 3: counters | {"scores": 6}}  # an event of partition 3 went astray
    text = generate_latest(metrics.registry).decode()
    assert 'churn_accounting_residue{partition="0"} 0.0' in text
    assert 'churn_accounting_residue{partition="3"} 1.0' in text
    assert 'churn_partition_records_total{partition="0",what="scores"} 7.0' in text


def test_the_watchdog_ends_a_worker_that_is_behind_and_applies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    behind = False
    watchdog = Watchdog(lambda: behind, 0.6)

    def end(code: int) -> None:
        assert code == 1
        ended.set()
        watchdog.done()

    monkeypatch.setattr(os, "_exit", end)
    watchdog.start()
    assert not ended.wait(1.2)  # idle
    behind = True
    for _ in range(12):
        watchdog.moved()
        assert not ended.wait(0.1)  # busy
    began = time.monotonic()
    assert ended.wait(10)
    assert time.monotonic() - began > 0.4
