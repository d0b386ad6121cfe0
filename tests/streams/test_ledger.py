"""Each move of a score is split into its causes, exactly: against single changes worked out from the facts one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count, pairwise
from random import Random
from typing import Any

import numpy as np
import pytest

from features import oracle
from features.facts import DAY_MS, KIND, OFFSET, PROFILE, TOPICS
from features.memory_store import MemoryStore
from scoring.fallback import Fallback
from streams.ledger import CAUSES, Change, Ledger, Totals
from streams.rerun import Rerun, Span
from tests.streams.test_rebuild import NOW_MS, PARTITION, Broker, Life, Message, Shelf, decoder, scores, world
from tests.streams.test_skew import NAMED, NOWHERE, models


@pytest.fixture(scope="module")
def past() -> tuple[Broker, Shelf, list[list[Message]]]:
    """A life with ticks, late facts, profiles and two models in turns."""
    random, broker, known = Random(21), Broker(), models()
    shelf = Shelf(known, next(iter(known)))
    inputs = world(random, 130, 6)
    Life(MemoryStore(), broker, inputs, shelf, random, "0", count(NOW_MS), tick_ms=7 * DAY_MS).run()
    return broker, shelf, inputs


def changes(broker: Broker, shelf: Shelf) -> list[Change]:
    rerun = Rerun(broker, NAMED, decoder(), PARTITION, Span(), NOWHERE, {name: broker.ends(name, 0)[1] - 1 for name in TOPICS})
    return list(Ledger(rerun, shelf.by_digest, Fallback(0.5)))


def test_the_parts_are_those_of_one_change_at_a_time(past: tuple[Broker, Shelf, list[list[Message]]]) -> None:
    broker, shelf, inputs = past
    found = changes(broker, shelf)
    emitted = {score["score_id"]: score for score in scores(broker)}
    per_customer: dict[str, list[dict[str, Any]]] = {}
    for score in emitted.values():
        per_customer.setdefault(score["customer_id"], []).append(score)
    assert {(c.former_id, c.score_id) for c in found} == {
        (one["score_id"], other["score_id"]) for some in per_customer.values() for one, other in pairwise(some)
    }
    totals = Totals()
    for change in found:
        totals.note(change)
    assert totals.not_made == 0
    assert totals.residue < 1e-12
    assert all(totals.moved[name] > 0.01 for name in CAUSES[:4]), totals
    assert totals.moved["features"] == 0

    rows: dict[str, list[list[int]]] = {}
    for topic, messages in enumerate(inputs):
        records = decoder().decode(topic, PARTITION, messages)
        for name, row, reason in zip(records.customer, records.facts.tolist(), records.reason.tolist(), strict=True):
            if not reason:
                rows.setdefault(name, []).append(row)

    def probability(model: str, score: dict[str, Any], at: int, *, without: dict[str, Any] | None = None) -> float:
        """What a model says at an instant of what was known at a score, but for its own event."""
        life = oracle.History()
        source = without["source"] if without else {"topic": "", "offset": -1}
        for row in sorted(rows[score["customer_id"]], key=lambda row: (row[0], row[KIND] >> 3, row[OFFSET])):
            topic = TOPICS[row[KIND] >> 3]
            if row[OFFSET] <= score["cut"][topic] and (topic, row[OFFSET]) != (source["topic"], source["offset"]):
                life.handle(row)
        vector = np.frombuffer(life.vector(at), "<f4")[None].copy()
        return float(shelf.by_digest(model).score(vector)[0])

    checked = dict.fromkeys(("event", "late", "silence", "model"), 0)
    for change in found[::3]:
        former, now = emitted[change.former_id], emitted[change.score_id]
        event, time, correction, model, _ = change.parts
        assert (correction != 0) <= (now["cause"] == "late")
        assert (model != 0) <= (former["model_digest"] != now["model_digest"])
        profiles = [row[OFFSET] for row in rows[change.customer] if row[KIND] == PROFILE]
        if any(former["cut"][TOPICS[3]] < offset <= now["cut"][TOPICS[3]] for offset in profiles):
            continue  # a profile in between is a step of its own
        ahead = probability(now["model_digest"], now, now["at"], without=now)
        kept = probability(now["model_digest"], former, former["at"])
        step = now["probability"] - ahead
        assert (event, correction) == pytest.approx((0.0, step) if now["cause"] == "late" else (step, 0.0), abs=1e-9)
        assert time == pytest.approx(ahead - kept, abs=1e-9)
        assert model == pytest.approx(kept - former["probability"], abs=1e-9)
        checked[now["cause"]] += 1
        checked["model"] += model != 0
    if not all(checked.values()):
        raise AssertionError(checked)


def test_a_score_that_cannot_be_made_again_is_counted(past: tuple[Broker, Shelf, list[list[Message]]]) -> None:
    was, shelf, _ = past
    broker = Broker({topic: list(records) for topic, records in was.topics.items()})
    log = broker.of("churn-scores")
    body = json.loads(log[-1].body or b"") | {"probability": 0.123}
    log[-1] = replace(log[-1], body=json.dumps(body).encode())
    assert [change.made for change in changes(broker, shelf)].count(False) == 1
