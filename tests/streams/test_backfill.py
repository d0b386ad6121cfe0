"""History from files: no score is made of it, and the live topics go on as if they had held it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from features.facts import DAY_MS, OFFSET, TOPICS
from features.memory_store import MemoryStore
from features.state import decode
from proto.errors import BadUsage, InvariantBroken
from streams.backfill import Live, facts_of, fill, live, read, refuse_state
from streams.feed import Record
from streams.snapshot import Snapshots
from tests.streams.test_rebuild import NOW_MS, PARTITION, Broker, Life, Message, Shelf, contents, decoder, scores

Event = tuple[int, dict[str, Any]]
NOTHING_LIVE = Live(dict.fromkeys(TOPICS, 0), np.empty(0, np.int64), None)


def history(random: Random, events: int = 240, customers: int = 6) -> list[Event]:
    """Events in order of time, over more than the 90 days that are kept."""
    time = NOW_MS - 260 * DAY_MS
    found: list[Event] = []
    for number in range(events):
        time += random.choice([60_000, 3_600_000, DAY_MS, 2 * DAY_MS])
        topic = random.choices(range(4), [4, 4, 2, 1])[0]
        kind = random.choice((("payment", "renewal"), ("login", "failed_login"), ("opened",), ("profile",))[topic])
        event: dict[str, Any] = {
            "event_id": f"e{number}",
            "customer_id": f"c{random.randrange(customers)}",
            "event_time": min(time, NOW_MS),
            "kind": kind,
        }
        if topic == 0:
            event |= {"amount": random.choice([10, "12.5"]), "currency": "EUR"}
        found.append((topic, event))
    return found


def as_rows(events: Sequence[Event]) -> Iterator[Record]:
    for topic, event in events:
        key = event["customer_id"].encode()
        yield Record(TOPICS[topic], key, json.dumps(event).encode(), event["event_id"], event["event_time"])


def as_topics(events: Sequence[Event], low: int = 0) -> list[list[Message]]:
    topics: list[list[Message]] = [[] for _ in TOPICS]
    for topic, event in events:
        topics[topic].append(Message(json.dumps(event).encode(), event["customer_id"].encode(), low + len(topics[topic])))
    return topics


def worker(store: MemoryStore, broker: Broker, inputs: list[list[Message]], snapshots: Snapshots | None, nonce: str = "w") -> Life:
    clock = iter(range(NOW_MS, NOW_MS + 1_000_000))
    return Life(store, broker, inputs, Shelf(), Random(1), nonce, clock, snapshots=snapshots)


def everything_there(inputs: list[list[Message]], low: int = 0) -> Broker:
    """A broker that has all records already: then they are handled in the order of the merge."""
    broker = Broker()
    for topic, messages in zip(TOPICS, inputs, strict=True):
        broker.topics[topic] = list(messages)
        broker.low[topic] = low
    return broker


def filled(events: Sequence[Event], there: Live, tmp_path: Path) -> tuple[MemoryStore, Snapshots, Any]:
    store, snapshots = MemoryStore(), Snapshots(tmp_path, "ns")
    rows = read(as_rows(events), decoder(), 1, lambda _: None)
    result = fill(store, snapshots, PARTITION, facts_of(rows, PARTITION), there, max_facts=40, now_ms=NOW_MS)
    return store, snapshots, result


def vectors(told: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {record["event_id"]: record["vector_hash"] for record in told}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("overlap", [0, 30])
def test_live_scores_are_those_of_topics_that_held_everything(seed: int, overlap: int, tmp_path: Path) -> None:
    random = Random(seed)
    events = history(random)
    split = random.randrange(60, 200)
    whole = worker(MemoryStore(), everything_there(as_topics(events)), as_topics(events), None)
    whole.run()
    expected = vectors(scores(whole.broker))

    low = random.choice([0, 1_000])  # retention has taken what came before, or the topics are young
    inputs = as_topics(events[split:], low)
    broker = everything_there(inputs, low)
    there = live(broker, TOPICS, decoder(), PARTITION, ids=True)
    mixed = list(events[: split + overlap])
    random.shuffle(mixed)  # a file may be in any order
    store, snapshots, result = filled(mixed, there, tmp_path)
    assert (result.facts, result.live, result.duplicates, result.too_late) == (split, overlap, 0, 0)
    assert broker.emitted() == {}
    life = worker(store, broker, inputs, snapshots)
    life.run()
    found = vectors(scores(broker))
    assert found == {name: expected[name] for topic, event in events[split:] if topic != 3 for name in [event["event_id"]]}
    # The same histories, but for where their facts came from, and what was scored before anybody looked.
    held = contents(whole.store)
    for name, (facts, carry, *_) in contents(store).items():
        other_facts, other_carry = held[name][:2]
        assert [fact[:OFFSET] + fact[OFFSET + 1 :] for fact in facts] == [fact[:OFFSET] + fact[OFFSET + 1 :] for fact in other_facts]
        assert carry[:2] == other_carry[:2]
    # Lost again, it comes back with what the files held.
    before = contents(store)
    store.go_back({})
    again = worker(store, broker, inputs, snapshots, "again")
    again.run()
    assert contents(store) == before
    assert vectors(scores(broker)) == found


def test_facts_of_files_lie_below_every_offset_and_are_known_to_every_cut(tmp_path: Path) -> None:
    events = history(Random(1))
    store, _, result = filled(events, NOTHING_LIVE, tmp_path)
    assert result.facts == len(events)
    offsets: list[tuple[int, int]] = []
    names = list(store.customers(PARTITION))
    for state in store.load(PARTITION, names):
        assert state is not None
        offsets += [(int(fact[2]) >> 3, int(fact[OFFSET])) for fact in decode(state).facts]
    assert max(offset for _, offset in offsets) <= -2
    assert len(set(offsets)) == len(offsets)
    assert store.look(PARTITION).applied == dict.fromkeys(TOPICS, -1)
    assert not store.look(PARTITION).fresh


def test_a_partition_with_state_is_refused(tmp_path: Path) -> None:
    events = history(Random(2), events=40)
    store, snapshots, _ = filled(events, NOTHING_LIVE, tmp_path)
    with pytest.raises(BadUsage, match="holds state already"):
        refuse_state(store.look(PARTITION))
    assert snapshots.backfill(PARTITION) is True


def test_an_unfinished_backfill_is_not_taken_for_state(tmp_path: Path) -> None:
    events = history(Random(2), events=40)
    store, snapshots = MemoryStore(), Snapshots(tmp_path, "ns")
    store.claim(PARTITION, "files")
    store.begin_rebuild(PARTITION, "files")
    snapshots.note_backfill(PARTITION, done=False)
    inputs = as_topics(events)
    with pytest.raises(InvariantBroken, match="run `churnstream backfill` again"):
        worker(store, everything_there(inputs), inputs, snapshots)
    # And one whose snapshots are all gone cannot be made from the topics, which never held it.
    store, snapshots, _ = filled(events[:20], NOTHING_LIVE, tmp_path / "b")
    inputs = as_topics(events[20:])
    life = worker(store, everything_there(inputs), inputs, snapshots)
    life.run()
    for snapshot in snapshots.of(PARTITION):
        snapshot.path.unlink()
    store.go_back({})
    with pytest.raises(InvariantBroken, match="no snapshot is good"):
        worker(store, life.broker, inputs, snapshots, "again")
