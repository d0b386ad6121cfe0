"""Every output compared with what its inputs say: nothing differs in an honest life, and each planted fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bench.small_model import small
from features.carry import empty
from features.catalog import NAMES
from features.facts import DAY_MS, ID, KIND, PROFILE, TIME, TOPICS
from features.history import Histories, Step, vectors
from features.memory_store import MemoryStore
from features.window import HOUR_MS, WINDOW_MS
from proto.errors import ArtifactRejected
from scoring.bands import floors
from scoring.fallback import Fallback
from scoring.scorer import Scorer
from scoring.scorer import load as load_model
from streams.evaluate import Rules
from streams.feature_log import Logged
from streams.rerun import Base, Rerun, Span, Topics
from streams.scores import Model, score_records
from streams.skew import Skew, compare
from tests.streams.test_rebuild import NOW_MS, PARTITION, Broker, Died, Life, Message, Shelf, decoder, scores, world

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

NAMED = Topics(TOPICS, "churn-scores", "churn-dead-letters", "churn-alerts", "churn-features")
NOWHERE = Base(dict.fromkeys(TOPICS, -1))


def models() -> dict[str, Model]:
    first, second = (load_model(small(12, 3, seed).envelope) for seed in (0, 1))
    return {first.digest: first, second.digest: second}


@pytest.fixture(scope="module")
def shelf_of() -> Callable[[], Shelf]:
    known = models()
    return lambda: Shelf(dict(known), next(iter(known)))


def inputs(random: Random, events: int = 150) -> list[list[Message]]:
    """A world whose amounts do not add up in floats."""
    topics = world(random, events)
    for messages in topics:
        for i, message in enumerate(messages):
            with suppress(ValueError, TypeError):
                event = json.loads(message.body or b"")
                if "amount" in event:
                    event["amount"] = round(random.uniform(0.01, 30_000), 2)
                    messages[i] = replace(message, body=json.dumps(event).encode())
    return topics


def live(random: Random, shelf: Shelf, topics: list[list[Message]], *, crashes: int = 0) -> Broker:
    """A worker's life, or several after crashes, with the feature log on and models changing."""
    store, broker, clock = MemoryStore(), Broker(), count(NOW_MS)
    life = Life(store, broker, topics, shelf, random, "0", clock, feature_log=True)
    for number in range(crashes):
        life.run(random.randint(1, 6))
        broker.cut_off = {name: random.choice([0, 2, 1_000]) for name in ("churn-features", "churn-alerts", "churn-scores")}
        with suppress(Died):
            life.run()
        broker.cut_off = None
        life = Life(store, broker, topics, shelf, random, str(number + 1), clock, feature_log=True)
    life.run()
    return broker


def told(broker: Broker, shelf: Shelf, span: Span = Span(), *, base: Base = NOWHERE, log: bool = True, hysteresis: float = 0.02) -> Skew:
    rerun = Rerun(broker, NAMED, decoder(), PARTITION, span, base, {name: broker.ends(name, 0)[1] - 1 for name in TOPICS})
    logged = Logged(broker, NAMED.features, PARTITION) if log else None
    return compare(rerun, shelf.by_digest, Rules(Fallback(0.5), 3, hysteresis), logged)


@pytest.mark.parametrize("seed", range(12))
def test_of_an_honest_life_every_byte_is_made_again(seed: int, shelf_of: Callable[[], Shelf]) -> None:
    random = Random(seed)
    broker = live(random, shelf_of(), inputs(random), crashes=seed % 3)
    found = told(broker, shelf_of())
    assert not found.mismatches, found.report()
    emitted = scores(broker)
    assert found.rows == found.vectors == len(emitted) > 30
    assert found.dead_letters == len({message.body for message in broker.of("churn-dead-letters")})
    assert set(found.models) == {score["model_digest"] for score in emitted}


def test_a_span_holds_the_records_of_its_time_and_both_parts_make_the_whole(shelf_of: Callable[[], Shelf]) -> None:
    random = Random(5)
    broker = live(random, shelf_of(), inputs(random))
    time, times = -1, []
    for score in scores(broker):
        time = max(time, score["event_time"])
        times.append(time)
    middle = times[len(times) // 2]
    parts = [told(broker, shelf_of(), span) for span in (Span(to_ms=middle), Span(from_ms=middle))]
    assert not any(part.mismatches for part in parts), [part.report() for part in parts]
    assert parts[0].rows + parts[1].rows == len(times)
    assert min(part.rows for part in parts) > 10


def test_a_snapshot_is_as_good_as_the_beginning(shelf_of: Callable[[], Shelf]) -> None:
    random = Random(8)
    topics, store, broker = inputs(random), MemoryStore(), Broker()
    life = Life(store, broker, topics, shelf_of(), random, "0", count(NOW_MS), feature_log=True)
    life.run(12)
    claim = store.claim(PARTITION, "0")
    names = sorted(store.customers(PARTITION))
    states = {name: state for name, state in zip(names, store.load(PARTITION, names), strict=True) if state is not None}
    life.run()
    middle = Base(claim.applied, claim.watermark_ms, states)
    found = told(broker, shelf_of(), base=middle)
    assert not found.mismatches, found.report()
    assert 0 < found.rows < told(broker, shelf_of()).rows


def test_a_model_that_is_gone_is_said(shelf_of: Callable[[], Shelf]) -> None:
    random = Random(2)
    shelf = shelf_of()
    broker = live(random, shelf, inputs(random, 60))

    def gone(digest: str) -> Model:
        raise ArtifactRejected(f"{digest}: not there")

    rerun = Rerun(broker, NAMED, decoder(), PARTITION, Span(), NOWHERE)
    found = compare(rerun, gone, Rules(Fallback(0.5), 3, 0.02))
    assert found.mismatches == found.rows == found.by["model_gone"] > 0


# -- planted faults: each in the live way alone


def stepped(change: Callable[[Histories, str, IntArray, IntArray, int, FloatArray], FloatArray]) -> Callable[..., None]:
    """The kernel replaced by one that goes record by record and has its vector changed: (histories, customer, facts, carry, at, vector)."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = Histories.step

        def step(self: Histories, customers: Sequence[str], facts: IntArray, skip: Any = None) -> Step:
            steps = []
            for i, customer in enumerate(customers):
                before = self.last_vectors([customer])[0].copy()
                one = right(self, customers[i : i + 1], facts[i : i + 1])
                if len(one.rows):
                    arguments = self.facts(customer), self.carry(customer), int(one.at[0])
                    wrong = change(self, customer, *arguments, before if change is stale_vector else one.vectors[0])
                    one = replace(one, vectors=np.ascontiguousarray(wrong, np.float32)[None], rows=one.rows + i)
                steps.append(one)
            return Step(*(np.concatenate([getattr(one, name) for one in steps]) for name in Step.__dataclass_fields__))

        patch.setattr(Histories, "step", step)

    return plant


def boundary(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    moved = facts.copy()
    moved[np.isin(facts[:, TIME], [at - window for window in WINDOW_MS if window < 80 * DAY_MS]), TIME] += 1
    return vectors(moved, carry, at)


def right_edge(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    return vectors(facts[facts[:, TIME] < at], carry, at)


def zone(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    moved = facts.copy()
    moved[:, TIME] += HOUR_MS
    return vectors(moved, carry, at + HOUR_MS)


def float_sum(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    wrong, column = vector.copy(), NAMES.index("spend_minor_sum_90d")
    wrong[column] = np.nextafter(wrong[column], np.float32(np.inf)) if wrong[column] > 1_000 else wrong[column]
    return wrong


def zero_for_nan(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    return np.nan_to_num(vector)


def profile_left_out(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    return vectors(facts[facts[:, KIND] != PROFILE], carry, at)


def carry_lost(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    return vectors(facts, empty(), at)


def wall_clock(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    return vectors(facts, carry, at + 2 * DAY_MS)


def swapped(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    wrong = vector.copy()
    wrong[[0, 1]] = vector[[1, 0]]
    return wrong


def stale_vector(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    return vector


def half_precision(h: Histories, c: str, facts: IntArray, carry: IntArray, at: int, vector: FloatArray) -> FloatArray:
    with np.errstate(over="ignore"):
        return vector.astype(np.float16).astype(np.float32)


def dedupe_off(patch: pytest.MonkeyPatch) -> None:
    right = Histories.step

    def step(self: Histories, customers: Sequence[str], facts: IntArray, skip: Any = None) -> Step:
        other = facts.copy()
        other[:, ID] = np.random.default_rng(len(facts)).integers(1, 2**62, len(facts))
        return right(self, customers, other, skip)

    patch.setattr(Histories, "step", step)


def late_put_at_the_end(patch: pytest.MonkeyPatch) -> None:
    right = Histories.step

    def step(self: Histories, customers: Sequence[str], facts: IntArray, skip: Any = None) -> Step:
        steps = []
        for i, customer in enumerate(customers):
            moved = facts[i : i + 1].copy()
            moved[0, TIME] = max(moved[0, TIME], self.newest_ms([customer])[0])
            one = right(self, [customer], moved)
            steps.append(replace(one, rows=one.rows + i))
        return Step(*(np.concatenate([getattr(one, name) for one in steps]) for name in Step.__dataclass_fields__))

    patch.setattr(Histories, "step", step)


def topics_in_another_order(patch: pytest.MonkeyPatch) -> None:
    right = Histories.step

    def step(self: Histories, customers: Sequence[str], facts: IntArray, skip: Any = None) -> Step:
        order = np.argsort(-(facts[:, KIND] >> 3), kind="stable")
        back = np.argsort(order, kind="stable")
        done = right(self, [customers[i] for i in order.tolist()], facts[order])
        vector = np.zeros((len(facts), done.vectors.shape[1]), np.float32)
        vector[done.rows] = done.vectors
        rows = np.sort(order[done.rows])
        return Step(done.outcome[back], done.at[back], done.late[back], rows, vector[back][rows])

    patch.setattr(Histories, "step", step)


def stale_model(patch: pytest.MonkeyPatch) -> None:
    right = Scorer.score
    first = load_model(small(12, 3, 0).envelope)
    patch.setattr(Scorer, "score", lambda self, vectors: right(first, vectors))


def thresholds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scorer, "bands", lambda self, probability: np.where(probability > 0.5, 3, 1).astype(np.uint8))


def reasons_of_the_neighbour(patch: pytest.MonkeyPatch) -> None:
    right = Scorer.reasons

    def reasons(self: Scorer, *arguments: Any) -> list[bytes]:
        found = right(self, *arguments)
        return found[1:] + found[:1]

    patch.setattr(Scorer, "reasons", reasons)


def one_score_lost(patch: pytest.MonkeyPatch) -> None:
    right = score_records
    patch.setattr("streams.engine.score_records", lambda *arguments: right(*arguments)[1:])


def cut_of_the_batch(patch: pytest.MonkeyPatch) -> None:
    right = score_records

    def records(*arguments: Any) -> list[dict[str, Any]]:
        made = right(*arguments)
        for one in made:
            at = [record["value"].index(b'"cut":') for record in (one, made[-1])]
            one["value"] = one["value"][: at[0]] + made[-1]["value"][at[1] :]
        return made

    patch.setattr("streams.engine.score_records", records)


def hysteresis_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("streams.evaluate.floors", lambda edges, _: floors(edges, 0.0))


@dataclass(frozen=True)
class Fault:
    """shows: features or fields, one of which must be named."""

    name: str
    plant: Callable[[pytest.MonkeyPatch], None]
    shows: frozenset[str]


def fault(plant: Any, *shows: str) -> Fault:
    name = plant.__name__
    whole = name in {
        "dedupe_off",
        "late_put_at_the_end",
        "topics_in_another_order",
        "stale_model",
        "thresholds",
        "reasons_of_the_neighbour",
        "one_score_lost",
        "cut_of_the_batch",
        "hysteresis_off",
    }
    return Fault(name, plant if whole else stepped(plant), frozenset(shows))


FAULTS = (
    fault(boundary, "event_count_1h", "purchase_count_24h"),
    fault(right_edge, "event_count_1h"),
    fault(zone, "hour_sin"),
    fault(float_sum, "spend_minor_sum_90d"),
    fault(zero_for_nan, "csat_mean_90d"),
    fault(late_put_at_the_end, "event_count_7d", "spend_minor_sum_7d"),
    fault(profile_left_out, "profile_known", "contract_days_left", "consent_given"),
    fault(carry_lost, "spend_minor_sum_life", "tenure_days"),
    fault(wall_clock, "purchase_age_days", "event_count_24h"),
    fault(swapped, NAMES[0], NAMES[1]),
    fault(stale_vector, "event_count_1h", "event_count_24h"),
    fault(half_precision, "spend_minor_sum_90d"),
    fault(dedupe_off, "unexpected", "event_count_90d"),
    fault(topics_in_another_order, "event_count_24h", "event_count_7d", "event_count_1h"),
    fault(stale_model, "probability"),
    fault(thresholds, "band"),
    fault(reasons_of_the_neighbour, "reasons"),
    fault(one_score_lost, "missing"),
    fault(cut_of_the_batch, "missing", "unexpected"),
    fault(hysteresis_off, "alert_band"),
)


@pytest.mark.parametrize("planted", FAULTS, ids=[what.name for what in FAULTS])
def test_a_planted_fault_is_seen_and_named(planted: Fault, shelf_of: Callable[[], Shelf], monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(31)
    topics, shelf = inputs(random, 300), shelf_of()
    with monkeypatch.context() as patch:
        planted.plant(patch)
        broker = live(random, shelf, topics)
    found = told(broker, shelf)
    assert found.mismatches
    assert planted.shows & {*found.by, *found.features}, found.report()


def test_a_logged_vector_that_is_not_the_scored_one_is_named(shelf_of: Callable[[], Shelf]) -> None:
    random = Random(3)
    broker = live(random, shelf_of(), inputs(random, 60))
    log = broker.of("churn-features")
    value = bytearray(log[5].body or b"")
    value[-1] ^= 64  # of the last feature's sign and exponent
    log[5] = replace(log[5], body=bytes(value))
    found = told(broker, shelf_of())
    assert found.report()["mismatches"] == 1
    assert found.by == {"logged_vector": 1}
    assert found.features == {NAMES[-1]: 1}
    assert found.mismatches
