"""The worker's clock is wrong, or an event's: neither reaches a feature, an identity or another event's window."""

from __future__ import annotations

import json
from typing import Any

import pytest

from features.facts import DAY_MS
from features.memory_store import MemoryStore
from streams.engine import Engine, EngineSettings
from streams.metrics import Metrics
from tests.streams.test_engine import NOW_MS, Log, Message, Scattered, World, digests, run, shelf, start, world

HOUR_MS = 3_600_000


def played(topics: World, shift_ms: int = 0, step_ms: int = 1) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Scores, alerts and states of a run with a clock that is off by `shift_ms` and moves by `step_ms` at every look."""
    store, log, models = MemoryStore(), Log(), shelf()
    models.now = "three"
    assert isinstance(models.current(), Scattered)
    now = NOW_MS + shift_ms

    def clock() -> int:
        nonlocal now
        now += step_ms
        return now

    engine = Engine(EngineSettings(100_000, 3), store, models, log, clock, Metrics())
    run(engine, start(engine, topics, "n"))
    alerts = [json.loads(value) for _, value in log.alerted]
    return log.records(), alerts, digests(store)


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "scored_at"} for record in records]


@pytest.mark.parametrize(
    ("shift_ms", "step_ms"), [(HOUR_MS, 1), (-HOUR_MS, 1), (-NOW_MS, 1), (50 * 365 * DAY_MS, 1), (0, -60_000), (0, 0), (0, 7 * DAY_MS)]
)
def test_a_wrong_clock_changes_nothing_but_the_moment_of_scoring(shift_ms: int, step_ms: int) -> None:
    topics = world(7, events=400)
    scores, alerts, states = played(topics)
    others, other_alerts, other_states = played(topics, shift_ms, step_ms)
    assert without_clock(others) == without_clock(scores)
    assert without_clock(other_alerts) == without_clock(alerts)
    assert [record["scored_at"] for record in others] != [record["scored_at"] for record in scores]
    assert other_states == states
    assert alerts


def purchases(*times: int, ahead: int | None = None) -> World:
    """Payments of one customer, the broker getting each as it happens, and one that claims to lie ahead."""
    topics: World = [[], [], [], []]
    for place, time in enumerate(times):
        event = {"event_id": f"e{place}", "customer_id": "c1", "kind": "payment", "event_time": time, "amount": 10}
        if place == ahead:
            event["event_time"] = time + DAY_MS * 400
        topics[0].append(Message(json.dumps(event).encode(), b"c1", place, time))
    return topics


def test_an_event_from_the_future_is_set_aside_and_moves_no_time() -> None:
    """Taken for true it would make everything after it late, and empty every window."""
    store, log = MemoryStore(), Log()
    engine = Engine(EngineSettings(100_000, 3), store, shelf(), log, lambda: NOW_MS, Metrics())
    times = [NOW_MS - DAY_MS + place * 60_000 for place in range(6)]
    run(engine, start(engine, purchases(*times, ahead=2), "n"))
    assert [json.loads(letter)["reason"] for letter in log.letters] == ["future"]
    records = log.records()
    assert [record["source"]["offset"] for record in records] == [0, 1, 3, 4, 5]
    assert [(record["at"], record["late"]) for record in records] == [(times[place], False) for place in (0, 1, 3, 4, 5)]
    assert store.look(0).watermark_ms == times[5]
    # As if it had never been there.
    other = Log()
    calm = Engine(EngineSettings(100_000, 3), MemoryStore(), shelf(), other, lambda: NOW_MS, Metrics())
    run(calm, start(calm, [[m for m in purchases(*times, ahead=2)[0] if m.place != 2], [], [], []], "n"))
    assert [record["vector_hash"] for record in other.records()] == [record["vector_hash"] for record in records]


def test_the_allowance_decides_what_the_future_is() -> None:
    """Five minutes beyond the broker's clock are accepted, a millisecond more is not, whatever the worker's clock says."""
    log = Log()
    engine = Engine(EngineSettings(100_000, 3), MemoryStore(), shelf(), log, lambda: 0, Metrics())
    topics: World = [[], [], [], []]
    for place, ahead in enumerate((300_000, 300_001)):
        event = {"event_id": f"e{place}", "customer_id": "c1", "kind": "login", "event_time": NOW_MS + ahead}
        topics[1].append(Message(json.dumps(event).encode(), b"c1", place, NOW_MS))
    run(engine, start(engine, topics, "n"))
    assert len(log.records()) == len(log.letters) == 1
    assert json.loads(log.letters[0])["source"]["offset"] == 1
