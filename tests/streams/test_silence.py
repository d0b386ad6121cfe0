"""The silent are scored at every tick, by the one kernel, in a chain with everything else: told again, rebuilt and continued exactly."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from itertools import count
from random import Random
from typing import Any

import numpy as np
import pytest

import streams.silence
from features import oracle
from features.facts import DAY_MS, SILENCE, TOPICS
from features.memory_store import MemoryStore
from features.state import decode
from features.store import MAX_CUSTOMERS
from features.window import HORIZON_MS, HOUR_MS
from scoring.fallback import Fallback
from streams.evaluate import Rules
from streams.feature_log import Logged
from streams.merge import TickStand
from streams.metrics import residue
from streams.rerun import Rerun, Span
from streams.scores import vector_hashes
from streams.silence import Roster, place_of, stand
from streams.skew import compare
from tests.streams.test_rebuild import NOW_MS, PARTITION, Broker, Died, Life, Message, Shelf, contents, decoder, scores, world
from tests.streams.test_skew import NAMED, NOWHERE

MIDNIGHT: int = NOW_MS // DAY_MS * DAY_MS


def silent(broker: Broker) -> list[dict[str, Any]]:
    return [score for score in scores(broker) if score["cause"] == "silence"]


def frozen(customers: int) -> list[list[Message]]:
    """Customers with a few events each in the ten days before MIDNIGHT, and then nothing."""
    random = Random(4)
    topics: list[list[Message]] = [[] for _ in TOPICS]
    times = sorted(random.randrange(MIDNIGHT - 10 * DAY_MS, MIDNIGHT) for _ in range(4 * customers))
    for number, time in enumerate(times):
        topic, kind = random.choice([(0, "payment"), (1, "login"), (2, "opened")])
        name = f"f{number % customers:04d}"
        event = {"event_id": f"e{number}", "customer_id": name, "event_time": time, "kind": kind}
        if topic == 0:
            event |= {"amount": "12.5", "currency": "EUR"}
        topics[topic].append(Message(json.dumps(event).encode(), name.encode(), len(topics[topic])))
    return topics


def vectors_by_brute_force(inputs: list[list[Message]], found: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """By the oracle: customer and instant -> hash of the vector, from all its facts up to the cut."""
    rows: dict[str, list[oracle.Fact]] = {}
    for topic, messages in enumerate(inputs):
        records = decoder().decode(topic, PARTITION, messages)
        for name, row in zip(records.customer, records.facts.tolist(), strict=True):
            rows.setdefault(name, []).append(oracle.fact_of(row))
    values = {}
    for score in found:
        name, at = score["customer_id"], score["at"]
        values[name, at] = vector_hashes(np.frombuffer(oracle.vector(rows[name], at), "<f4")[None])[0]
    return values


def test_frozen_customers_are_scored_at_every_tick_as_by_brute_force_and_a_crash_within_a_tick_changes_nothing() -> None:
    customers, days = 60, 35
    inputs = frozen(customers)
    lives = {}
    for crashes in (0, 3):
        random, store, broker, clock = Random(crashes), MemoryStore(), Broker(), count(NOW_MS)
        shelf = Shelf()
        shelf.known = {"one": shelf.known["one"]}
        life = Life(store, broker, inputs, shelf, random, "0", clock, tick_ms=DAY_MS)
        life.run()
        arrived = life.merge.ticks
        assert arrived is not None
        for number in range(crashes):
            # The clock of the broker moves on, and the worker dies in the middle of a slice: some of its scores are out.
            life.now_ms = arrived.arrived_ms + (3 + 4 * number) * DAY_MS
            broker.cut_off = {"churn-scores": 70, "churn-alerts": 1_000}
            with suppress(Died):
                while life.step() is not None:
                    pass
            broker.cut_off = None
            life = Life(store, broker, inputs, shelf, random, str(number + 1), clock, tick_ms=DAY_MS)
        life.now_ms = arrived.arrived_ms + days * DAY_MS
        while life.step() is not None:
            pass
        found = [one for one in silent(broker) if one["at"] >= MIDNIGHT]
        assert Counter(one["at"] for one in found) == {MIDNIGHT + day * DAY_MS: customers for day in range(days)}
        assert len({(one["customer_id"], one["at"]) for one in found}) == customers * days
        lives[crashes] = {(one["customer_id"], one["at"]): (one["vector_hash"], one["probability"], one["band"]) for one in found}
        claim = store.look(PARTITION)
        assert claim.counters["silence"] == len(silent(broker))
        assert residue({name: claim.counters[name] for name in claim.counters}) == 0
        assert claim.counters["events"] == 4 * customers
        states = contents(store)
        assert {score[3] for score in states.values()} == {repr(lives[crashes][name, MIDNIGHT + 34 * DAY_MS][1]) for name in states}
    assert lives[0] == lives[3]
    sample = [one for one in found if one["customer_id"] < "f0012"]
    brute = vectors_by_brute_force(inputs, sample)
    assert all(brute[one["customer_id"], one["at"]] == one["vector_hash"] for one in sample)
    assert len(sample) == 12 * days


@pytest.mark.parametrize("seed", range(6))
def test_of_an_honest_life_with_ticks_every_byte_is_made_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and slices of two in turns, late facts, crashes, stores that go back and vanish."""
    monkeypatch.setattr(streams.silence, "SLICE", 2)
    random, store, broker, clock = Random(seed), MemoryStore(), Broker(), count(NOW_MS)
    inputs = world(random, 70, 5)
    shelf, tick_ms = Shelf(), random.choice([6 * HOUR_MS, DAY_MS, 7 * DAY_MS])
    for number in range(1 + seed % 4):
        life = Life(store, broker, inputs, shelf, random, str(number), clock, feature_log=True, tick_ms=tick_ms)
        before = store.snapshot()
        life.run(random.randint(3, 60))
        if seed % 3 == 1:
            store.go_back(before)
            continue
        broker.cut_off = {name: random.choice([0, 1, 1_000]) for name in ("churn-features", "churn-alerts", "churn-scores")}
        with suppress(Died):
            life.run(1)
        broker.cut_off = None
        if seed % 5 == 4:
            store = MemoryStore()
    life = Life(store, broker, inputs, shelf, random, "last", clock, feature_log=True, tick_ms=tick_ms)
    life.run()
    found = silent(broker)
    assert len(found) > 20
    assert [one["source"]["offset"] for one in found] == sorted({one["source"]["offset"] for one in found})
    assert {one["at"] % tick_ms for one in found} == {0}
    assert len({(one["customer_id"], one["at"]) for one in found}) == len(found)
    rerun = Rerun(broker, NAMED, decoder(), PARTITION, Span(), NOWHERE, {name: broker.ends(name, 0)[1] - 1 for name in TOPICS})
    logged = Logged(broker, NAMED.features, PARTITION)
    skew = compare(rerun, shelf.by_digest, Rules(Fallback(0.5), 3, 0.02), logged, tick_ms)
    assert not skew.mismatches, skew.report()
    assert skew.rows == skew.vectors == len(scores(broker))
    # What is stored is what the last records say, whatever happened in between.
    last = {one["customer_id"]: one for one in scores(broker)}
    for name, score in last.items():
        state = store.load(PARTITION, [name])[0]
        assert state is not None
        customer = decode(state)
        place = f"{(*TOPICS, 'silence')[customer.source]}-{PARTITION}-{customer.source_offset}"
        assert (place, customer.score_at, customer.probability) == (score["score_id"], score["at"], score["probability"])


def test_a_rebuilt_partition_goes_on_with_its_ticks_where_it_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.silence, "SLICE", 4)
    random, store, broker, clock = Random(3), MemoryStore(), Broker(), count(NOW_MS)
    inputs = frozen(10)
    life = Life(store, broker, inputs, Shelf(), random, "0", clock, tick_ms=DAY_MS)
    life.run()
    assert life.merge.ticks is not None
    now_ms = life.now_ms = life.merge.ticks.arrived_ms + 5 * DAY_MS
    for _ in range(4):
        life.step()
    emptied = MemoryStore()
    life = Life(emptied, broker, inputs, Shelf(), random, "1", clock, tick_ms=DAY_MS)
    assert stand(life.restored.counters).place  # in the middle of a tick
    assert life.restored.counters["silence"] == len(silent(broker))
    life.now_ms = now_ms
    while life.step() is not None:
        pass
    found = [one for one in silent(broker) if one["at"] >= MIDNIGHT]
    assert len({(one["customer_id"], one["at"]) for one in found}) == len(found)
    assert set(Counter(one["at"] for one in found).values()) == {10}
    assert emptied.look(PARTITION).counters["silence"] == len(silent(broker))


def test_lost_altered_and_invented_silence_is_seen() -> None:
    random, store, broker = Random(5), MemoryStore(), Broker()
    inputs = frozen(12)
    shelf = Shelf()
    Life(store, broker, inputs, shelf, random, "0", count(NOW_MS), tick_ms=DAY_MS).run()

    def mismatches() -> dict[str, int]:
        rerun = Rerun(broker, NAMED, decoder(), PARTITION, Span(), NOWHERE, {name: broker.ends(name, 0)[1] - 1 for name in TOPICS})
        return dict(compare(rerun, shelf.by_digest, Rules(Fallback(0.5), 3, 0.02), tick_ms=DAY_MS).by)

    assert not mismatches()
    log = broker.of("churn-scores")
    places = [i for i, message in enumerate(log) if b'"cause":"silence"' in (message.body or b"")]
    one = log[places[len(places) // 2]]
    del log[places[len(places) // 2]]
    assert mismatches().keys() == {"silence_missing"}
    later = json.loads(one.body or b"") | {"at": json.loads(one.body or b"")["at"] + DAY_MS}
    log.insert(places[len(places) // 2], Message(json.dumps(later, separators=(",", ":")).encode(), one.customer, one.place))
    assert "vector_hash" in mismatches()


def test_who_is_due() -> None:
    roster = Roster(DAY_MS)
    names = [f"n{number}" for number in range(50)]
    roster.note(names, np.full(50, MIDNIGHT - 1, np.int64))
    roster.note(["future"], np.array([MIDNIGHT + 1]))
    for day in (0, 1, 89, 90):
        assert len(roster.due(MIDNIGHT + day * DAY_MS)) == 50 + (day > 0)
    assert len(roster.due(MIDNIGHT + HORIZON_MS + DAY_MS)) == 1
    roster.note(names[:20], np.full(20, MIDNIGHT + HORIZON_MS, np.int64))
    assert len(roster.due(MIDNIGHT + HORIZON_MS + DAY_MS)) == 21
    first = Roster(DAY_MS)
    first.note(names, np.full(50, MIDNIGHT - 1, np.int64))
    whole = first.slice(TickStand(MIDNIGHT - DAY_MS, 0), MIDNIGHT + 200 * DAY_MS)
    assert len(whole.customers) == MAX_CUSTOMERS
    assert whole.customers[:50] == sorted(names, key=place_of)
    assert whole.now == TickStand(MIDNIGHT + 19 * DAY_MS, 0)
    rest = first.slice(TickStand(MIDNIGHT + 95 * DAY_MS, 0), MIDNIGHT + 100_000 * DAY_MS)
    assert (rest.customers, rest.now) == ([], TickStand(MIDNIGHT + 100_000 * DAY_MS, 0))  # nobody is left, so nobody is looked for


def test_nothing_of_the_state_but_the_last_score_is_moved_by_a_tick() -> None:
    store, broker = MemoryStore(), Broker()
    life = Life(store, broker, frozen(5), Shelf(), Random(1), "0", count(NOW_MS), tick_ms=DAY_MS)
    life.run()
    before = {name: state[:3] for name, state in contents(store).items()}
    assert life.merge.ticks is not None
    life.now_ms = life.merge.ticks.arrived_ms + 100 * DAY_MS
    while life.step() is not None:
        pass
    assert {name: state[:3] for name, state in contents(store).items()} == before
    assert {decode(state).source for state in store.load(PARTITION, sorted(before)) if state} == {SILENCE}
