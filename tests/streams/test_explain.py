"""Any past score made again from what is known of its customer, and an altered history reported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

import pytest

from features.facts import TOPICS
from features.memory_store import MemoryStore
from features.state import decode
from proto.errors import BadUsage
from scoring.fallback import Fallback
from streams.explain import Explainer, Known
from streams.scores import vector_hashes
from tests.streams.test_rebuild import NOW_MS, PARTITION, Broker, Life, Shelf, decoder, scores
from tests.streams.test_skew import NAMED, inputs, models


@pytest.fixture(scope="module")
def past() -> tuple[Broker, MemoryStore, Shelf]:
    """What a worker with changing models left behind."""
    random, store, broker, known = Random(12), MemoryStore(), Broker(), models()
    shelf = Shelf(known, next(iter(known)))
    Life(store, broker, inputs(random, 350), shelf, random, "0", count(NOW_MS)).run()
    return broker, store, shelf


def explainer(broker: Broker, shelf: Shelf, store: MemoryStore | None = None) -> Explainer:
    def stored(partition: int, customer: str) -> Known | None:
        state = None if store is None else store.load(partition, [customer])[0]
        if state is None:
            return None
        found = decode(state)
        return Known(found.facts, found.carry, "Redis")

    return Explainer(broker, NAMED, decoder(), shelf.by_digest, Fallback(0.5), 1, stored)


def sources(found: Explainer, emitted: list[dict[str, Any]]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for score in emitted:
        again = found.score(score["score_id"])
        assert again == score
        made = found.explain(again)
        assert made.proven, (score, made.problems)
        counts[made.source] = counts.get(made.source, 0) + 1
        assert all(fact["effect"] for fact in made.timeline)
        assert list(made.timeline) == sorted(made.timeline, key=lambda fact: fact["time"])
    return counts


def test_every_past_score_is_made_again(past: tuple[Broker, MemoryStore, Shelf]) -> None:
    broker, store, shelf = past
    emitted = scores(broker)
    assert len({score["model_digest"] for score in emitted}) == 2
    counts = sources(explainer(broker, shelf, store), emitted[::2])
    assert counts["Redis"] > 5
    assert counts["topics"] > 5  # their facts have left the state
    assert sum(sources(explainer(broker, shelf), emitted[::4]).values()) == len(emitted[::4])


def test_a_customer_is_explained_as_of_any_time(past: tuple[Broker, MemoryStore, Shelf]) -> None:
    broker, store, shelf = past
    found = explainer(broker, shelf, store)
    for score in [one for one in scores(broker) if not one["late"]][::9]:
        then = found.latest(score["customer_id"], PARTITION, score["at"])
        assert then["at"] == score["at"]
        assert then["customer_id"] == score["customer_id"]
    with pytest.raises(BadUsage, match="no score at or before"):
        found.latest("c000", PARTITION, 1_000)


def test_a_late_fact_corrects_what_was_known_then(past: tuple[Broker, MemoryStore, Shelf]) -> None:
    """A late score supersedes the customer's last one, and the two views of an instant are those of an undisturbed pass."""
    broker, store, shelf = past
    found = explainer(broker, shelf, store)
    emitted = scores(broker)
    last: dict[str, dict[str, Any]] = {}
    corrected = 0
    for score in emitted:
        former = last.get(score["customer_id"])
        late = score["late"]
        assert score["cause"] == ("late" if late else "event")
        assert score["supersedes"] == (former["score_id"] if late and former is not None else None)
        if late and former is not None and former["at"] == score["at"] and corrected < 8:
            customer = score["customer_id"]
            # Between the two the instant is the same, what is known is not.
            then = found._known(former)
            assert then is not None
            assert vector_hashes(then[1][None])[0] == former["vector_hash"] != score["vector_hash"]
            corrected += 1
            latest = found.latest(customer, PARTITION, score["at"])
            view = found.known_then(customer, PARTITION, score["at"])
            assert vector_hashes(view.vector[None])[0] == latest["vector_hash"]
        last[score["customer_id"]] = score
    assert corrected > 3
    for customer, score in last.items():
        now = found.corrected(customer, PARTITION, score["at"])
        past_only = Explainer(broker, NAMED, decoder(), shelf.by_digest, Fallback(0.5), 1).corrected(customer, PARTITION, score["at"])
        assert vector_hashes(now.vector[None])[0] == vector_hashes(past_only.vector[None])[0]


def test_an_altered_history_is_reported_and_the_feature_named(past: tuple[Broker, MemoryStore, Shelf]) -> None:
    was, _, shelf = past
    broker = Broker({topic: list(records) for topic, records in was.topics.items()}, ever=was.ever)
    emitted = [one for one in scores(broker) if one["source"]["topic"] == TOPICS[0] and not one["late"]][-1]
    log = broker.of(TOPICS[0])
    place = next(i for i, message in enumerate(log) if message.place == emitted["source"]["offset"])
    event = json.loads(log[place].body or b"")
    event["amount"] = round(event.get("amount", 1.0) + 1_000.0, 2)
    log[place] = replace(log[place], body=json.dumps(event).encode())
    made = explainer(broker, shelf).explain(emitted)
    assert not made.proven
    assert "altered" in made.problems[0]
    assert not made.timeline
    del log[place]
    assert "altered" in explainer(broker, shelf).explain(emitted).problems[0]


def test_what_is_no_score_is_said(past: tuple[Broker, MemoryStore, Shelf]) -> None:
    broker, store, shelf = past
    found = explainer(broker, shelf, store)
    for wrong in ("nonsense", "transactions-7-1", "orders-0-1"):
        with pytest.raises(BadUsage, match="looks like"):
            found.score(wrong)
    with pytest.raises(BadUsage, match="is not on churn-scores"):
        found.score("transactions-0-99999")
