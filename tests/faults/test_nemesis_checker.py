"""The checker is content with what a killed worker and its successor left, and with nothing else: each planted fault turns it red."""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import SecretStr

from bench.faults.checker import Evidence, Output, Rules, check
from bench.faults.rounds import DIRTY, Feeder, Shelf, gather, stream
from features.facts import OFFSET, TOPICS
from features.state import Customer, decode, encode
from features.store import CustomerState, Intent
from models import registry
from streams.settings import Settings
from streams.topics import create, producer_config
from tests.conftest import ROOT, Servers, bare_environment, nursery

pytestmark = [pytest.mark.servers, pytest.mark.slow]

SHARED_DATA = Path(os.environ.get("CHURN_DATA_DIR") or ROOT / ".churnstream").resolve()
EVENTS = 1_500


@pytest.fixture(scope="module")
def evidence(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """What a real worker left that died between producing and applying, and the one after it."""
    name = f"proof{time.monotonic_ns()}"
    settings = Settings(
        kafka_bootstrap_servers=servers.kafka, redis_url=SecretStr(servers.redis), topic_prefix=f"{name}-", namespace=name, group_id="g"
    )
    began_ms = time.time_ns() // 1_000_000
    create(settings)
    shelf = Shelf(SHARED_DATA / "faults" / "models")
    shelf.fill(settings)
    model = shelf.model(shelf.envelopes[0])
    registry.publish(producer_config(settings), settings.prefixed("churn-models"), model.manifest, shelf.envelopes[0])
    Feeder(settings, list(stream(11, EVENTS, DIRTY))).send(EVENTS)
    directory = tmp_path_factory.mktemp("proof")
    environment = {
        **bare_environment(),
        "CHURN_DATA_DIR": str(SHARED_DATA),
        "KAFKA_BOOTSTRAP_SERVERS": servers.kafka,
        "REDIS_URL": servers.redis,
        "CHURN_TOPIC_PREFIX": f"{name}-",
        "CHURN_NAMESPACE": name,
        "CHURN_GROUP_ID": "g",
        "CHURN_BATCH_MAX_EVENTS": "100",
    }
    for variables, code in (({"CHURNSTREAM_CRASH_AT": "after_produce:2"}, 70), ({}, 0)):
        log = directory / f"log{code}"
        process = nursery().start(["worker", "--until-idle", "0.5", "--json"], environment | variables, directory / "out", log)
        assert process.wait(90) == code, log.read_text()
    return gather(settings, shelf.by_digest, began_ms)


def test_what_was_left_is_right(evidence: Evidence) -> None:
    verdict = check(evidence, Rules())
    assert verdict.violations == []
    assert verdict.records == EVENTS
    assert verdict.raw_duplicates > 10  # the control of the reader rule
    assert verdict.letters > 20
    assert verdict.alerts > 20
    assert verdict.oracle_vectors >= 200
    left = [state for states in evidence.states.values() for state in states.values() if decode(state).carry[0] > 0]
    assert left  # facts have left their windows: the carry is compared, too


def test_in_exactly_once_the_same_is_wrong(evidence: Evidence) -> None:
    assert any(violation.startswith("I2") for violation in check(evidence, Rules(exactly_once=True)).violations)


# -- corruptions: each takes a copy of the evidence and a generator, and says which invariants must notice

Corruption = Callable[[Evidence, random.Random], None]


def _partition(e: Evidence, draw: random.Random) -> int:
    return draw.choice([p for p, rows in e.scores.items() if len(rows) > 50])


def _scores(e: Evidence, draw: random.Random) -> tuple[list[Output], int]:
    """The raw scores of a partition and the position of one that occurs once."""
    rows = e.scores[_partition(e, draw)]
    once = [i for i, row in enumerate(rows) if rows.count(row) == 1]
    return rows, draw.choice(once)


def _edit(name: str, change: Callable[[Any], Any]) -> Corruption:
    def corrupt(e: Evidence, draw: random.Random) -> None:
        rows, i = _scores(e, draw)
        body = orjson.loads(rows[i].value)
        before = body[name]
        body[name] = change(before)
        assert body[name] != before
        rows[i] = rows[i]._replace(value=orjson.dumps(body))

    return corrupt


def _edit_letter(name: str, value: Any) -> Corruption:
    def corrupt(e: Evidence, draw: random.Random) -> None:
        rows = next(rows for rows in e.letters.values() if rows)
        rows[:] = [row._replace(value=orjson.dumps({**orjson.loads(row.value), name: value})) for row in rows]

    return corrupt


def _edit_state(change: Callable[[Customer, random.Random], Customer]) -> Corruption:
    def corrupt(e: Evidence, draw: random.Random) -> None:
        states = e.states[_partition(e, draw)]
        name = draw.choice(sorted(name for name, state in states.items() if len(decode(state).facts) > 3 and decode(state).carry[0] > 0))
        states[name] = encode(change(decode(states[name]), draw))

    return corrupt


def _edit_stand(**changes: Any) -> Corruption:
    def corrupt(e: Evidence, draw: random.Random) -> None:
        p = _partition(e, draw)
        stand = e.stands[p]
        e.stands[p] = replace(stand, **{k: v(stand) if callable(v) else v for k, v in changes.items()})  # type: ignore[index]  # e.stands is spoilt on purpose, a Mapping elsewhere

    return corrupt


def drop_score(e: Evidence, draw: random.Random) -> None:
    rows, i = _scores(e, draw)
    del rows[i]


def drop_the_last_scores(e: Evidence, draw: random.Random) -> None:
    rows, _ = _scores(e, draw)
    del rows[-3:]


def repeat_with_another_byte(e: Evidence, draw: random.Random) -> None:
    rows, i = _scores(e, draw)
    body = orjson.loads(rows[i].value)
    rows.append(rows[i]._replace(value=orjson.dumps({**body, "scored_at": body["scored_at"] + 1})))


def swap_scores(e: Evidence, draw: random.Random) -> None:
    rows, _ = _scores(e, draw)
    kept = [i for i, row in enumerate(rows) if orjson.loads(row.value)["source"]["topic"] == "logins" and rows.count(row) == 1]
    k = draw.randrange(len(kept) - 1)
    rows[kept[k]], rows[kept[k + 1]] = rows[kept[k + 1]], rows[kept[k]]


def move_score(e: Evidence, draw: random.Random) -> None:
    rows, i = _scores(e, draw)
    other = next(p for p in e.scores if e.scores[p] is not rows)
    e.scores[other].append(rows.pop(i))


def swap_customers_of_two_scores(e: Evidence, draw: random.Random) -> None:
    rows, _ = _scores(e, draw)
    once = [i for i, row in enumerate(rows) if rows.count(row) == 1]
    bodies = {i: orjson.loads(rows[i].value) for i in once}
    i, j = next((i, j) for i in once for j in once if bodies[i]["customer_id"] != bodies[j]["customer_id"])
    bodies[i]["customer_id"], bodies[j]["customer_id"] = bodies[j]["customer_id"], bodies[i]["customer_id"]
    for k in (i, j):
        rows[k] = rows[k]._replace(value=orjson.dumps(bodies[k]))


def score_a_duplicate(e: Evidence, draw: random.Random) -> None:
    """A second delivery of an event gets a score as if it were new."""
    p = _partition(e, draw)
    outputs = {
        (b["source"]["topic"], b["source"]["offset"]) for rows in (e.scores[p], e.letters[p]) for b in (orjson.loads(r.value) for r in rows)
    }
    silent = [r for r in e.inputs[p] if r.topic < 3 and (TOPICS[r.topic], r.offset) not in outputs]
    record = draw.choice(silent)
    model = next(row for row in e.scores[p] if (s := orjson.loads(row.value)["source"])["topic"] == TOPICS[record.topic])
    body = orjson.loads(model.value)
    body["source"]["offset"] = record.offset
    at = next(
        i
        for i, row in enumerate(e.scores[p])
        if (s := orjson.loads(row.value)["source"])["topic"] == TOPICS[record.topic] and s["offset"] > record.offset
    )
    e.scores[p].insert(at, Output(model.key, orjson.dumps(body)))


def drop_alert(e: Evidence, draw: random.Random) -> None:
    rows = next(rows for rows in e.alerts.values() if len(rows) > 5)
    del rows[rows.index(draw.choice([row for row in rows if rows.count(row) == 1]))]


def alert_twice_as_high(e: Evidence, draw: random.Random) -> None:
    rows = next(rows for rows in e.alerts.values() if len(rows) > 5)
    i = draw.choice([i for i, row in enumerate(rows) if rows.count(row) == 1])
    rows[i] = rows[i]._replace(value=orjson.dumps({**orjson.loads(rows[i].value), "from_band": "unknown", "to_band": "high"}))


def forget_a_known_customer(e: Evidence, draw: random.Random) -> None:
    p = _partition(e, draw)
    e.stands[p] = replace(e.stands[p], customers=e.stands[p].customers[8:])  # type: ignore[index]  # e.stands is spoilt on purpose, a Mapping elsewhere


def drop_letter(e: Evidence, draw: random.Random) -> None:
    next(rows for rows in e.letters.values() if len(rows) > 5).pop(3)


def flip_a_bit_of_state(e: Evidence, draw: random.Random) -> None:
    states = e.states[_partition(e, draw)]
    name = draw.choice(sorted(states))
    main = bytearray(states[name].main)
    main[draw.randrange(len(main))] ^= 1 << draw.randrange(8)
    states[name] = CustomerState(bytes(main), states[name].chunks)


def swap_two_customers(e: Evidence, draw: random.Random) -> None:
    states = e.states[_partition(e, draw)]
    one, other = draw.sample(sorted(states), 2)
    states[one], states[other] = states[other], states[one]


def lose_a_customer(e: Evidence, draw: random.Random) -> None:
    states = e.states[_partition(e, draw)]
    del states[draw.choice(sorted(states))]


def lose_a_chunk(e: Evidence, draw: random.Random) -> None:
    states = next(states for states in e.states.values() if any(state.chunks for state in states.values()))
    name = next(name for name, state in states.items() if state.chunks)
    states[name] = CustomerState(states[name].main, states[name].chunks[:-1])


def invent_a_customer(e: Evidence, draw: random.Random) -> None:
    states = e.states[_partition(e, draw)]
    states["nobody"] = states[draw.choice(sorted(states))]


def without_last_fact(customer: Customer, draw: random.Random) -> Customer:
    return replace(customer, facts=customer.facts[:-1])


def with_a_fact_twice(customer: Customer, draw: random.Random) -> Customer:
    import numpy as np

    return replace(customer, facts=np.concatenate([customer.facts, customer.facts[-1:]]))


def with_an_offset_moved(customer: Customer, draw: random.Random) -> Customer:
    facts = customer.facts.copy()
    facts[draw.randrange(len(facts)), OFFSET] += 1
    return replace(customer, facts=facts)


def with_carry_off_by_one(customer: Customer, draw: random.Random) -> Customer:
    carry = customer.carry.copy()
    carry[draw.randrange(2, 20)] += 1
    return replace(customer, carry=carry)


def with_vector_of_another_time(customer: Customer, draw: random.Random) -> Customer:
    vector = customer.vector.copy()
    vector[draw.randrange(len(vector))] = 77.5
    return replace(customer, vector=vector)


def with_another_score(customer: Customer, draw: random.Random) -> Customer:
    return replace(customer, probability=customer.probability / 2)


def with_another_alert(customer: Customer, draw: random.Random) -> Customer:
    return replace(customer, alert_band=(customer.alert_band + 1) % 4)


CORRUPTIONS: dict[str, tuple[Corruption, str]] = {
    "a score is missing": (drop_score, "I1"),
    "the last scores are missing": (drop_the_last_scores, "I1"),
    "a dead letter is missing": (drop_letter, "I1"),
    "an alert is missing": (drop_alert, "I1"),
    "an alert says another band": (alert_twice_as_high, "I4"),
    "the band last alerted is forgotten": (_edit_state(with_another_alert), "I3"),
    "a known customer is forgotten": (forget_a_known_customer, "I3"),
    "the band last alerted in a score": (_edit("alert_band", lambda band: "high" if band != "high" else "low"), "I4"),
    "a repeated score differs in one digit": (repeat_with_another_byte, "I2"),
    "two scores of a topic changed places": (swap_scores, "I5"),
    "a score lies in another partition": (move_score, "I5"),
    "two scores changed customers": (swap_customers_of_two_scores, "I4"),
    "a duplicate was scored": (score_a_duplicate, "I2"),
    "a probability": (_edit("probability", lambda p: p + 1e-7), "I4"),
    "a band": (_edit("band", lambda band: "high" if band != "high" else "low"), "I4"),
    "a vector hash": (_edit("vector_hash", lambda text: text[:-1] + ("0" if text[-1] != "0" else "1")), "I4"),
    "an evaluation time": (_edit("at", lambda at: at + 1), "I4"),
    "late or not": (_edit("late", lambda late: not late), "I4"),
    "reasons": (_edit("reasons", lambda reasons: [] if reasons else [{"feature": "x"}]), "I4"),
    "a model": (_edit("model_digest", lambda _: ""), "I4"),
    "an unknown model": (_edit("model_digest", lambda _: "f" * 64), "I4"),
    "a cut": (_edit("cut", lambda cut: {**cut, "logins": cut["logins"] + 1}), "I"),
    "a wall clock from before the round": (_edit("scored_at", lambda _: 1), "I4"),
    "an event id": (_edit("event_id", lambda text: text + "x"), "I4"),
    "a letter's reason": (_edit_letter("reason", "empty"), "I4"),
    "a letter's bytes": (_edit_letter("value", "AAAA"), "I4"),
    "a bit of state": (flip_a_bit_of_state, "I3"),
    "two customers changed states": (swap_two_customers, "I3"),
    "a customer is gone": (lose_a_customer, "I3"),
    "a chunk is gone": (lose_a_chunk, "I3"),
    "a customer nobody sent": (invent_a_customer, "I3"),
    "the last fact is gone": (_edit_state(without_last_fact), "I3"),
    "a fact twice": (_edit_state(with_a_fact_twice), "I3"),
    "a fact's offset": (_edit_state(with_an_offset_moved), "I3"),
    "the carry": (_edit_state(with_carry_off_by_one), "I3"),
    "the stored vector": (_edit_state(with_vector_of_another_time), "I3"),
    "the stored score": (_edit_state(with_another_score), "I3"),
    "applied offsets one short": (_edit_stand(applied=lambda s: {**s.applied, "logins": s.applied["logins"] - 1}), "I1"),
    "the watermark": (_edit_stand(watermark_ms=lambda s: s.watermark_ms + 1), "I3"),
    "a counter": (_edit_stand(counters=lambda s: {**s.counters, "duplicates": s.counters["duplicates"] + 1}), "I9"),
    "an owner stayed": (_edit_stand(nonce="somebody"), "I6"),
    "an intent stayed": (_edit_stand(intent=Intent({}, "", 0)), "I6"),
    "a model nobody knows is in force": (_edit_stand(model="f" * 64), "I4"),
}


@pytest.fixture
def copied(evidence: Evidence) -> Evidence:
    """A copy to spoil; models are shared."""
    models = evidence.models
    bare = replace(evidence, models={})
    return replace(copy.deepcopy(bare), models=models)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_seen(copied: Evidence, name: str) -> None:
    corrupt, invariant = CORRUPTIONS[name]
    corrupt(copied, random.Random(name))
    violations = check(copied, Rules(), sample=20).violations
    assert any(violation.startswith(invariant) for violation in violations), violations
