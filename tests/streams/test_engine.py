"""The engine on a store and a log in memory: accounting, repetition after a crash, fencing, model switch."""

from __future__ import annotations

import json
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from decimal import Decimal
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from features.facts import DAY_MS, TOPICS
from features.history import Histories, digest, vectors
from features.memory_store import MemoryStore
from features.store import Intent, Offsets, Standing
from proto.errors import ArtifactRejected, ChainBroken, Fenced, InvariantBroken
from proto.scores import BANDS, AlertRecord, DeadLetter, ScoreRecord
from scoring.bands import floors
from scoring.fallback import Fallback
from streams.codec import Decoder, RawMessage
from streams.engine import ATTEMPTS, CRASH_PLACES, Engine, EngineSettings, Result
from streams.merge import Batch, Merge, Slice
from streams.metrics import Metrics, residue
from streams.outbox import Outbox, Tail
from streams.scores import Model, vector_hashes

NOW_MS = 1_750_000_000_000


@dataclass(frozen=True, slots=True)
class Message:
    """A record as the consumer would give it."""

    body: bytes | None
    customer: bytes | None
    place: int
    append_ms: int

    def value(self) -> bytes | None:
        return self.body

    def key(self) -> bytes | None:
        return self.customer

    def offset(self) -> int:
        return self.place

    def timestamp(self) -> tuple[int, int]:
        return 2, self.append_ms


@dataclass(slots=True)
class Log:
    """One partition of the outputs: what is acknowledged, in order. `lose` batches fail before they are acknowledged."""

    written: list[tuple[str, bytes]] = field(default_factory=list)
    letters: list[bytes] = field(default_factory=list)
    alerted: list[tuple[str, bytes]] = field(default_factory=list)
    queued: list[tuple[str, bytes]] = field(default_factory=list)
    flushes: int = 0
    fail_at: int = -1

    def scores(self, partition: int, records: list[dict[str, Any]]) -> None:
        self.queued += [(record["key"], record["value"]) for record in records]

    def dead_letters(self, partition: int, records: list[dict[str, Any]]) -> None:
        self.letters += [record["value"] for record in records]

    def alerts(self, partition: int, records: list[dict[str, Any]]) -> None:
        self.alerted += [(record["key"], record["value"]) for record in records]

    def features(self, partition: int, records: list[dict[str, Any]]) -> None:
        raise AssertionError("the feature log is off")

    def flush(self) -> None:
        self.flushes += 1
        if self.flushes == self.fail_at:
            raise Died("before the outputs were acknowledged")
        self.written += self.queued
        self.queued = []

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(value) for _, value in self.written]


@dataclass(slots=True)
class Committed(Log):
    """A log whose records come in transactions: the outputs of a partition all at once, or not at all."""

    owners: dict[int, str] = field(default_factory=dict)
    name: str = ""
    reached: Callable[[str], None] = lambda _: None

    def claim(self, partition: int) -> None:
        self.owners[partition] = self.name

    def revoke(self, partition: int) -> None:
        pass

    def transact(self, outputs: Mapping[int, tuple[Outbox, Offsets]]) -> set[int]:
        refused = set()
        for partition, (outbox, _) in outputs.items():
            self.reached("transaction_begun")
            if self.owners[partition] != self.name:
                refused.add(partition)
                continue
            self.scores(partition, outbox.scores)
            self.flush()
            self.alerts(partition, outbox.alerts)
            self.dead_letters(partition, outbox.dead_letters)
            self.reached("transaction_committed")
        return refused

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self.letters if "letters" in topic else self.written)

    def read(self, topic: str, partition: int, start: int, stop: int) -> Generator[list[RawMessage], None, None]:
        values = self.letters if "letters" in topic else [value for _, value in self.written]
        if values[start:stop]:
            yield [Message(value, None, start + i, 0) for i, value in enumerate(values[start:stop])]


class Died(Exception):
    """Stands for the end of the process."""


class DyingStore(MemoryStore):
    """Dies at chosen calls, before or after they took effect."""

    def __init__(self) -> None:
        super().__init__()
        self.deaths: list[tuple[str, int]] = []
        self.calls = {"intend": 0, "apply": 0}

    def _step(self, moment: str, name: str) -> None:
        if (f"{moment} {name}", self.calls[name]) in self.deaths:
            raise Died(f"{moment} {name} {self.calls[name]}")

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        arguments = partition, nonce, former, intent
        if intent.attempts > ATTEMPTS:  # record by record: a death there is that record's
            return super().intend(*arguments)
        self.calls["intend"] += 1
        self._step("before", "intend")
        super().intend(*arguments)
        return self._step("after", "intend")

    def apply(self, batches: Any) -> None:
        self.calls["apply"] += 1
        self._step("before", "apply")
        super().apply(batches)
        self._step("after", "apply")


class Constant(Fallback):
    """A model with a digest that gives every vector one probability, and a reason when it is high."""

    fallback = False  # type: ignore[misc]  # a model for tests on the fallback's surface

    def __init__(self, name: str, probability: float, band: str) -> None:
        super().__init__(probability)
        self.digest = self.version = name  # type: ignore[misc]  # as above
        self._band = BANDS.index(band)

    def bands(self, probability: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        return np.full(len(probability), self._band, np.uint8)


class Scattered(Fallback):
    """A model whose probability is a digest of the vector: anything, but always the same."""

    fallback = False  # type: ignore[misc]  # a model for tests on the fallback's surface

    def __init__(self, name: str, medium: float, high: float) -> None:
        super().__init__(0.5)
        self.digest = self.version = self.threshold_version = name  # type: ignore[misc]  # as above
        self.edges = (medium, high)

    def score(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.array([int(text[:4], 16) / 65_536 for text in vector_hashes(vectors)], np.float32)

    def bands(self, probability: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        return np.searchsorted(self.edges, probability.astype(np.float64), side="right").astype(np.uint8) + np.uint8(1)


@dataclass(slots=True)
class Shelf:
    """Models by digest, and which one is in force."""

    known: dict[str, Model]
    now: str = ""

    def current(self) -> Model:
        return self.known[self.now]

    def by_digest(self, digest: str) -> Model:
        if digest not in self.known:
            raise ArtifactRejected(f"no model {digest}")
        return self.known[digest]


def shelf() -> Shelf:
    models: list[Model] = [
        Fallback(0.5),
        Constant("one", 0.25, "low"),
        Constant("two", 0.75, "high"),
        Scattered("three", 0.3, 0.6),
        Scattered("four", 0.5, 0.55),
    ]
    return Shelf({model.digest: model for model in models})


def decoder() -> Decoder:
    return Decoder(currency="EUR", rates={"USD": Decimal("0.9")}, future_ms=300_000, max_bytes=1_000_000, digest_key=b"k")


def engine_on(store: MemoryStore, log: Log, models: Shelf | None = None, *, max_facts: int = 100_000, hysteresis: float = 0.02) -> Engine:
    ticks: Iterator[int] = iter(range(NOW_MS, NOW_MS + 1_000_000))
    return Engine(EngineSettings(max_facts, 3, hysteresis), store, models or shelf(), log, lambda: next(ticks), Metrics())


World = list[list[Message]]
"""Messages per topic."""


def world(seed: int, events: int = 300, customers: int = 12) -> World:
    """A messy stream: late, duplicate, conflicting, too late, future and broken records, profiles."""
    random = Random(seed)
    topics: World = [[] for _ in TOPICS]
    time = NOW_MS - 200 * DAY_MS
    sent: list[tuple[int, dict[str, Any]]] = []
    for number in range(events):
        time += random.choice([1, 1_000, 3_600_000, DAY_MS])
        topic = random.choices(range(4), [4, 4, 2, 1])[0]
        customer = f"c{random.randrange(customers):03d}"
        kind = random.choice((("payment", "refund", "renewal"), ("login", "failed_login"), ("opened", "satisfaction"), ("profile",))[topic])
        event: dict[str, Any] = {"event_id": f"e{number}", "customer_id": customer, "event_time": time, "kind": kind}
        if topic == 0:
            event |= {"amount": random.choice([10, "12.5", 3.25]), "currency": random.choice(["EUR", "USD"]), "product": "p1"}
        if kind == "satisfaction":
            event["csat"] = random.randint(1, 5)
        chance = random.random()
        if chance < 0.10:
            event["event_time"] = time - random.randrange(3 * DAY_MS)
        elif chance < 0.14 and sent:
            topic, event = random.choice(sent)
        elif chance < 0.17 and sent:
            topic, event = random.choice(sent)
            event = {**event, "event_time": event["event_time"] + 5}
        elif chance < 0.20:
            event["event_time"] = time - 120 * DAY_MS
        elif chance < 0.22:
            event["event_time"] = NOW_MS + DAY_MS
        sent.append((topic, event))
        body: bytes | None = json.dumps(event).encode()
        if chance > 0.97:
            body = random.choice([b"{", b"\xff", None, b"[]", b'{"event_id": 1}'])
        key = b"someone else" if 0.95 < chance < 0.96 else event["customer_id"].encode()
        # Offsets with holes, as transactions leave them.
        place = (topics[topic][-1].place if topics[topic] else -1) + random.choice([1, 1, 1, 2])
        topics[topic].append(Message(body, key, place, NOW_MS))
    return topics


def merge_from(topics: World, merge: Merge, decode: Decoder, chunk: int = 37) -> Merge:
    """The buffers filled with everything from the merge's offsets on, as a consumer would."""
    for buffer, messages in zip(merge.buffers, topics, strict=True):
        buffer.reach(merge.applied[TOPICS[buffer.topic]] + 1)
        rest = [message for message in messages if message.place >= buffer.position]
        for start in range(0, len(rest), chunk):
            piece = rest[start : start + chunk]
            buffer.add(Slice(decode.decode(buffer.topic, merge.partition, piece), piece))
    return merge


def start(engine: Engine, topics: World, nonce: str, partition: int = 0) -> Merge:
    claim = engine.assign(partition, nonce)
    merge = Merge(partition, nonce, dict(claim.applied), claim.watermark_ms, claim.intent.to if claim.intent else None)
    return merge_from(topics, merge, decoder())


def batches(merge: Merge, size: int = 40) -> Iterator[Batch]:
    while (batch := merge.take(size)) is not None:
        yield batch


def run(engine: Engine, merge: Merge, size: int = 40) -> list[Result]:
    return [engine.process([batch]) for batch in batches(merge, size)]


def digests(store: MemoryStore, partition: int = 0) -> dict[str, str]:
    names = sorted(store.customers(partition))
    states = store.load(partition, names)
    return {name: digest(state) for name, state in zip(names, states, strict=True) if state is not None}


def first_wins(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reader rule: per source topic drop what is not above the highest offset seen."""
    high: dict[str, int] = {}
    kept = []
    for record in records:
        source = record["source"]
        if source["offset"] > high.get(source["topic"], -1):
            high[source["topic"]] = source["offset"]
            kept.append(record)
    return kept


def test_every_record_is_a_score_a_dead_letter_a_duplicate_or_a_profile_fact() -> None:
    topics = world(1, events=800)
    store, log = MemoryStore(), Log()
    engine = engine_on(store, log)
    results = run(engine, start(engine, topics, "n"))
    totals = dict(engine.totals)
    assert totals["events"] == sum(map(len, topics))
    assert residue(totals) == 0
    assert totals["scores"] == len(log.written)
    assert totals["dead_letters"] == len(log.letters)
    assert min(totals[name] for name in ("scores", "dead_letters", "duplicates", "duplicate_conflicts", "profile_facts")) > 0
    assert dict(store.look(0).counters) == totals
    assert results[-1].applied[0] == {name: messages[-1].place for name, messages in zip(TOPICS, topics, strict=True)}
    by_place = {(TOPICS[t], m.place): m for t, messages in enumerate(topics) for m in messages}
    sources = [(r["source"]["topic"], r["source"]["offset"]) for r in log.records()]
    assert len(set(sources)) == len(sources)
    letters = [DeadLetter.model_validate_json(letter) for letter in log.letters]
    assert {"too_late", "future", "key_mismatch", "not_json", "not_utf8", "empty"} <= {letter.reason for letter in letters}
    for letter in letters:
        original = by_place[letter.source.topic, letter.source.offset]
        assert (None if letter.value is None else b64decode(letter.value)) == original.body
        assert (None if letter.key is None else b64decode(letter.key)) == original.customer
    for (key, value), place in zip(log.written, sources, strict=True):
        record = ScoreRecord.model_validate_json(value)
        assert record.customer_id == key == json.loads(by_place[place].body or b"")["customer_id"]


def test_a_score_can_be_recomputed_from_its_own_cut() -> None:
    topics = world(2, events=200)
    store, log = MemoryStore(), Log()
    engine = engine_on(store, log)
    run(engine, start(engine, topics, "n"), size=23)
    histories = engine._partitions[0].histories  # a look inside: what is stored is compared with what was emitted
    checked = 0
    for record in log.records():
        facts, carry = histories.facts(record["customer_id"]), histories.carry(record["customer_id"])
        if carry[0] == 0:  # nothing has left: the whole life is there, and any cut of it can be asked
            vector = vectors(facts, None, record["at"], record["cut"])
            assert vector_hashes(vector[np.newaxis]) == [record["vector_hash"]]
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("seed", range(40))
def test_dying_anywhere_changes_neither_state_nor_scores(seed: int) -> None:
    random = Random(seed)
    topics = world(seed, events=150)
    calm_store, calm_log = MemoryStore(), Log()
    calm = engine_on(calm_store, calm_log)
    run(calm, start(calm, topics, "n"), size=20)

    store, log = DyingStore(), Log()
    deaths = 0
    for life in range(1_000):
        name = random.choice(["intend", "apply"])
        store.deaths = [(f"{random.choice(['before', 'after'])} {name}", store.calls[name] + random.randint(1, 3))]
        log.fail_at = log.flushes + random.choice([1, 3, 9])
        # A new process: nothing in memory, other batch sizes, a small cache, another clock.
        engine = engine_on(store, log, max_facts=random.choice([1, 100_000]))
        engine._clock_ms = lambda life=life: NOW_MS + life  # type: ignore[misc]  # the default binds this turn's value, which mypy cannot type
        try:
            run(engine, start(engine, topics, f"n{life}"), size=random.randint(5, 30))
        except Died:
            deaths += 1
            log.queued.clear()
            continue
        break
    assert deaths
    assert digests(store) == digests(calm_store)
    assert dict(store.look(0).counters) == dict(calm_store.look(0).counters)
    by_id: dict[str, list[bytes]] = {}
    for _, value in log.written:
        by_id.setdefault(json.loads(value)["score_id"], []).append(value)
    assert all(len(set(values)) == 1 for values in by_id.values())  # what was written twice is equal to the byte
    # The calm run cut its batches elsewhere; but for the clock nothing of it shows.
    kept = first_wins(log.records())
    assert len(kept) == len(by_id)
    clock = {"scored_at": 0}
    assert [record | clock for record in kept] == [record | clock for record in calm_log.records()]


@pytest.mark.parametrize("seed", range(40))
def test_in_transactions_dying_anywhere_repeats_and_loses_nothing(seed: int) -> None:
    random = Random(seed)
    topics = world(200 + seed, events=150)
    models = shelf()
    models.now = "three"
    calm_store, calm_log = MemoryStore(), Log()
    calm = engine_on(calm_store, calm_log, models)
    run(calm, start(calm, topics, "n"), size=20)

    store, log = MemoryStore(), Committed()
    reachable = [place for place in CRASH_PLACES if place not in ("half_produced", "after_produce", "before_hint", "on_revoke", "on_stop")]
    died: Counter[str] = Counter()
    for life in range(1_000):
        place = random.choice(reachable[1:] if life == 0 else reachable)
        left = 1 if place == "after_claim" else random.randint(1, 5)

        def reached(here: str, place: str = place) -> None:
            nonlocal left
            left -= here == place
            if left == 0:
                raise Died(place)

        log.name, log.reached = f"n{life}", reached
        engine = engine_on(store, log, models, max_facts=random.choice([1, 100_000]))
        engine._clock_ms = lambda life=life: NOW_MS + life  # type: ignore[misc]  # the default binds this turn's value, which mypy cannot type
        engine._reached = reached
        try:
            claim = engine.assign(0, f"n{life}")
            outbox = Outbox.unpack(claim.outbox)
            if not Tail(log, "scores", "letters").has(0, outbox):
                log.transact({0: (outbox, claim.applied)})
            run(engine, merge_from(topics, Merge.of(claim), decoder()), size=random.randint(5, 30))
        except Died:
            died[place] += 1
            continue
        break
    assert died
    assert digests(store) == digests(calm_store)
    assert dict(store.look(0).counters) == dict(calm_store.look(0).counters)
    clocks = {"scored_at": 0}
    for found, expected in (
        (log.records(), calm_log.records()),
        ([json.loads(value) for _, value in log.alerted], [json.loads(value) for _, value in calm_log.alerted]),
        ([json.loads(value) for value in log.letters], [json.loads(value) for value in calm_log.letters]),
    ):
        assert [record | clocks for record in found] == [record | clocks for record in expected]
        assert found


def test_a_worker_whose_transactions_were_claimed_loses_the_partition_and_its_successor_emits() -> None:
    topics = world(8, events=80)
    store, log = MemoryStore(), Committed()
    log.name = "n1"
    engine = engine_on(store, log)
    merge = start(engine, topics, "n1")
    assert engine.process([batch for batch in [merge.take(20)] if batch]).applied
    before = len(log.written)
    log.owners[0] = "n2"  # claimed between our apply and our transaction
    result = engine.process([batch for batch in [merge.take(20)] if batch])
    assert (result.fenced, dict(result.applied), engine.owned, len(log.written)) == ([0], {}, [], before)
    log.name = "n2"
    claim = engine_on(store, log).assign(0, "n2")
    outbox = Outbox.unpack(claim.outbox)
    assert outbox.scores
    tail = Tail(log, "scores", "letters")
    assert not tail.has(0, outbox)
    log.transact({0: (outbox, claim.applied)})
    assert tail.has(0, outbox)
    assert first_wins(log.records()) == log.records()


class Poisoned(Scattered):
    """A model that ends the process on some vectors, as a fault in native code would."""

    def __init__(self, name: str, poison: set[str]) -> None:
        super().__init__(name, 0.3, 0.6)
        self.poison = poison

    def score(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self.poison & set(vector_hashes(vectors)):
            raise Died("native code")
        return super().score(vectors)


def test_a_record_that_ends_every_worker_becomes_a_dead_letter_and_the_rest_goes_on() -> None:
    topics = world(9, events=120)
    calm_store, log = MemoryStore(), Log()
    models = shelf()
    models.now = "three"
    calm = engine_on(calm_store, log, models)
    run(calm, start(calm, topics, "n"), size=30)
    records = log.records()[40:]
    second = next(record for record in records[5:] if record["customer_id"] != records[0]["customer_id"])
    victims = {record["score_id"]: record["vector_hash"] for record in (records[0], second)}

    store, log = MemoryStore(), Log()
    models.known["three"] = Poisoned("three", set(victims.values()))
    deaths = 0
    for life in range(30):
        engine = engine_on(store, log, models)
        try:
            run(engine, start(engine, topics, f"n{life}"), size=30)
        except Died:
            deaths += 1
            log.queued.clear()
            continue
        break
    # Two begun as a whole, two with the record handled alone; for the second record of the same batch only the latter.
    assert 4 <= deaths <= 8
    letters = [DeadLetter.model_validate_json(letter) for letter in log.letters]
    crashed = [letter for letter in letters if letter.reason == "crash"]
    assert [f"{x.source.topic}-{x.source.partition}-{x.source.offset}" for x in crashed] == list(victims)
    assert not victims.keys() & {record["score_id"] for record in log.records()}
    assert residue(store.look(0).counters) == 0
    assert store.look(0).counters["events"] == sum(map(len, topics))
    assert store.look(0).watermark_ms == calm_store.look(0).watermark_ms  # they have moved time all the same


def test_record_by_record_gives_the_same_bytes() -> None:
    topics = world(10, events=120)
    seen = []
    for attempts in (1, 3):
        store, log = MemoryStore(), Log()
        models = shelf()
        models.now = "three"
        engine = engine_on(store, log, models)
        engine._clock_ms = lambda: NOW_MS
        merge = start(engine, topics, "n")
        batch = merge.take(100)
        assert batch is not None
        if attempts > 1:
            engine._partitions[0].intent = Intent(batch.to, "three", NOW_MS, attempts - 1)
            batch = replace(batch, recovered=True)
        engine.process([batch])
        assert store.look(0).intent is None
        seen.append((log.written, log.letters, log.alerted, digests(store), dict(store.look(0).counters)))
    assert seen[0] == seen[1]


def test_a_store_that_went_back_costs_the_partition_until_it_is_claimed_again() -> None:
    topics = world(11, events=120)
    store, log = MemoryStore(), Log()
    engine = engine_on(store, log)
    merges = {partition: start(engine, topics, f"n{partition}", partition) for partition in (0, 1)}
    engine.process([batch for merge in merges.values() if (batch := merge.take(20))])
    kept = deepcopy(store)
    engine.process([batch for merge in merges.values() if (batch := merge.take(20))])
    store.__dict__.update(kept.__dict__)  # a backup comes back, for both
    before = len(log.written)
    result = engine.process([batch for merge in merges.values() if (batch := merge.take(20))])
    assert (result.broken, dict(result.applied), engine.owned, len(log.written)) == ([0, 1], {}, [], before)

    engine.assign(0, "n0")
    behind = start_again(engine, topics, "n0")
    other = engine_on(store, Log())
    ahead = start(other, topics, "n0")  # under the same nonce: somebody restored it from us
    other.process([batch for batch in [ahead.take(20)] if batch])
    with pytest.raises(ChainBroken):
        engine.process([batch for batch in [behind.take(20)] if batch])


class Unlisting(MemoryStore):
    """Loses its list of customers of partition 0 while outputs are produced."""

    def apply(self, batches: Any) -> None:
        self._partitions[0].who.clear()
        super().apply(batches)


def test_damage_met_while_applying_costs_the_partition_and_not_the_worker() -> None:
    topics = world(12, events=120)
    store, log = Unlisting(), Log()
    engine = engine_on(store, log)
    merges = [start(engine, topics, f"n{partition}", partition) for partition in (0, 1)]
    for _ in range(2):
        result = engine.process([batch for merge in merges if (batch := merge.take(20)) is not None])
    assert (result.broken, list(result.applied), engine.owned) == ([0], [1], [1])
    assert store.claim(0, "n2").damaged


def emptied(store: MemoryStore, _: MemoryStore) -> None:
    store._partitions.clear()


def rolled_back(store: MemoryStore, before: MemoryStore) -> None:
    store.__dict__.update(deepcopy(before.__dict__))


def rolled_back_to_another(store: MemoryStore, before: MemoryStore) -> None:
    rolled_back(store, before)
    store.claim(0, "another")


def unlisted(store: MemoryStore, _: MemoryStore) -> None:
    del store._partitions[0].who[:8]


def claimed(store: MemoryStore, _: MemoryStore) -> None:
    store.claim(0, "another")


def untouched(store: MemoryStore, _: MemoryStore) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "broken", "fenced"),
    [
        (emptied, [0], []),
        (rolled_back, [0], []),
        (rolled_back_to_another, [], [0]),
        (unlisted, [0], []),
        (claimed, [], []),  # in good order: for the group to say
        (untouched, [], []),
    ],
)
def test_a_partition_at_rest_is_given_up_when_its_state_is_not_there_any_more(
    change: Callable[[MemoryStore, MemoryStore], None], broken: list[int], fenced: list[int]
) -> None:
    topics = world(13, events=120)
    store, before = MemoryStore(), MemoryStore()
    engine = engine_on(store, Log())
    merge = start(engine, topics, "n")
    first, second, third = (merge.take(20) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    engine.process([first])
    before.__dict__.update(deepcopy(store.__dict__))
    engine.process([second])
    change(store, before)
    # Until it is restored, what is stored is the Restorer's business.
    assert engine.compare(store.standings) == Result({}, [], {}, [])
    engine._partitions[0].ready = True
    found = engine.compare(store.standings)
    assert (found.broken, found.fenced, engine.owned) == (broken, fenced, [] if broken or fenced else [0])
    if change is not untouched:
        return

    def while_a_batch_goes_through(partitions: Sequence[int]) -> Sequence[Standing]:
        stale = before.standings(partitions)
        engine.process([third])
        return stale

    assert engine.compare(while_a_batch_goes_through) == Result({}, [], {}, [])
    assert engine.compare(before.standings).broken == [0]  # the same answer, and nothing came between: it counts


def test_an_outbox_comes_back_as_it_was() -> None:
    outbox = Outbox(
        [{"key": "\u00e4", "value": b'{"a":1}'}],
        [{"key": "b", "value": b"x" * 10_000}],
        [{"key": b"\xff", "value": b""}, {"key": None, "value": b"1"}],
    )
    assert Outbox.unpack(outbox.pack()) == outbox
    assert len(outbox.pack()) < 200
    assert (Outbox().pack(), Outbox.unpack(b"")) == (b"", Outbox())


def test_an_open_batch_is_repeated_with_its_model_and_clock() -> None:
    topics = world(3, events=60)
    store, log = DyingStore(), Log()
    models = shelf()
    models.now = "one"
    engine = engine_on(store, log, models)
    store.deaths = [("before apply", 1)]
    with pytest.raises(Died):
        run(engine, start(engine, topics, "n1"))
    written = list(log.written)
    assert written
    models.now = "two"
    again = engine_on(store, log, models)
    merge = start(again, topics, "n2")
    first = merge.take(7)
    assert first is not None
    assert first.recovered
    again.process([first])
    assert log.written[len(written) :] == written
    run(again, merge)
    later = [json.loads(value) for _, value in log.written[2 * len(written) :]]
    assert {record["model_digest"] for record in later} == {"two"}
    assert {record["band"] for record in later} == {"high"}
    del models.known["one"]


def alerts_by_hand(records: Sequence[dict[str, Any]], models: Shelf, hysteresis: float) -> list[tuple[str, str, str]]:
    """Alerts of score records, told slowly: (id, band before, band after)."""
    order = ("low", "medium", "high")
    last: dict[str, str] = {}
    alerts = []
    for record in records:
        band, customer, probability = record["band"], record["customer_id"], record["probability"]
        if band != "unknown":
            before = last.get(customer)
            if before is None:
                last[customer] = band
                if band != "low":
                    alerts.append((record["score_id"], "unknown", band))
            else:
                rises = order.index(band) > order.index(before)
                edge = dict(zip(order[1:], models.known[record["model_digest"]].edges, strict=True))
                falls = band != before and not rises and probability < edge[before] - min(hysteresis, edge[before] / 2)
                if rises or falls:
                    last[customer] = band
                    alerts.append((record["score_id"], before, band))
        assert record["alert_band"] == last.get(customer, "unknown")
    return alerts


@pytest.mark.parametrize("seed", range(30))
def test_alerts_are_the_crossings_and_dying_adds_and_loses_none(seed: int) -> None:
    random = Random(seed)
    topics = world(100 + seed, events=300, customers=random.choice([2, 12]))
    models = shelf()
    hysteresis = random.choice([0.0, 0.02, 0.1, 0.5])
    store, log = DyingStore(), Log()
    for life in range(1_000):
        # The model depends on the life, so a crash in mid-stream also switches it.
        models.now = random.choice(["", "three", "three", "four"])
        name = random.choice(["intend", "apply"])
        store.deaths = [(f"{random.choice(['before', 'after'])} {name}", store.calls[name] + random.randint(1, 4))]
        engine = engine_on(store, log, models, max_facts=random.choice([1, 100_000]), hysteresis=hysteresis)
        try:
            run(engine, start(engine, topics, f"n{life}"), size=random.randint(5, 60))
        except Died:
            log.queued.clear()
            continue
        break
    alerts = [AlertRecord.model_validate_json(value) for _, value in log.alerted]
    by_id = {alert.alert_id: alert for alert in alerts}
    assert len({value for _, value in log.alerted}) == len(by_id)  # what came twice is equal to the byte
    kept = first_wins(log.records())
    expected = alerts_by_hand(kept, models, hysteresis)
    assert [(alert.alert_id, alert.from_band, alert.to_band) for alert in by_id.values()] == expected
    scores = {record["score_id"]: record for record in kept}
    for key, value in log.alerted:
        alert = json.loads(value)
        score = scores[alert["alert_id"]]
        shared = set(alert) & set(score)
        assert {"customer_id", "at", "cut", "source", "probability", "model_digest", "scored_at", "threshold_version"} <= shared
        assert {name: alert[name] for name in shared} == {name: score[name] for name in shared}
        assert (key, alert["to_band"]) == (score["customer_id"], score["band"])


def test_a_probability_that_trembles_at_a_threshold_alerts_once() -> None:
    random = Random(1)
    histories = Histories(create=True)
    histories.ensure(["a"])
    trembling = np.array([0.6 + random.uniform(-0.019, 0.019) for _ in range(1_000)], np.float32)
    band = np.where(trembling >= 0.6, 3, 2).astype(np.uint8)
    assert np.count_nonzero(np.diff(band)) > 300
    noted = histories.note_scores(["a"] * 1_000, trembling, band, np.arange(1_000), floors((0.3, 0.6), 0.02))
    assert np.count_nonzero(noted.former_alert != noted.alert) == 2  # first medium, then high for good
    noted = histories.note_scores(["a"] * 1_000, trembling, band, np.arange(1_000), floors((0.3, 0.6), 0.0))
    assert np.count_nonzero(noted.former_alert != noted.alert) > 300


def test_every_alert_can_end() -> None:
    assert floors((0.01, 0.03), 0.02).tolist() == [np.inf, -np.inf, 0.005, 0.015]
    assert floors((), 0.02).tolist() == [np.inf, -np.inf, np.inf, np.inf]


def test_a_model_is_switched_only_between_two_batches() -> None:
    topics = world(4, events=120)
    store, log = MemoryStore(), Log()
    models = shelf()
    engine = engine_on(store, log, models)
    bounds = []
    for number, batch in enumerate(batches(start(engine, topics, "n"), 30)):
        models.now = ("", "one", "two")[number % 3]
        engine.process([batch])
        bounds.append((len(log.written), models.now))
        assert store.look(0).model == models.now
    begin = 0
    records = log.records()
    for end, name in bounds:
        assert {record["model_digest"] for record in records[begin:end]} <= {name}
        assert {record["fallback"] for record in records[begin:end]} <= {name == ""}
        begin = end


def test_a_fenced_batch_writes_no_state_and_produces_nothing() -> None:
    topics = world(5, events=80)
    store, log = MemoryStore(), Log()
    engine, other = engine_on(store, log), engine_on(store, Log())
    merge = start(engine, topics, "n1")
    first = merge.take(20)
    assert first is not None
    engine.process([first])
    before = len(log.written)
    other.assign(0, "n2")
    result = engine.process([batch for batch in [merge.take(20)] if batch])
    assert result.fenced == [0]
    assert len(log.written) == before
    assert engine.owned == []
    assert store.look(0).nonce == "n2"
    # What is still in the buffers of the loser is ignored.
    assert engine.process([batch for batch in [merge.take(20)] if batch]).applied == {}
    engine.assign(0, "n3")
    other.assign(0, "n4")
    with pytest.raises(Fenced):
        engine.process([batch for batch in [start_again(engine, topics, "n3").take(20)] if batch])


def start_again(engine: Engine, topics: World, nonce: str) -> Merge:
    """A merge from where the engine believes the partition to stand."""
    partition = engine._partitions[0]
    return merge_from(topics, Merge(0, nonce, dict(partition.applied), partition.watermark_ms), decoder())


def test_a_batch_that_does_not_follow_stops_the_engine() -> None:
    topics = world(6, events=60)
    engine = engine_on(MemoryStore(), Log())
    merge = start(engine, topics, "n")
    assert merge.take(10) is not None  # lost on the way
    second = merge.take(10)
    assert second is not None
    with pytest.raises(InvariantBroken):
        engine.process([second])


def test_the_size_of_batches_and_of_the_cache_does_not_show() -> None:
    topics = world(7)
    seen = []
    for size, max_facts in ((1, 1), (13, 200), (1_000, 100_000)):
        store, log = MemoryStore(), Log()
        engine = engine_on(store, log, max_facts=max_facts)
        run(engine, start(engine, topics, "n"), size)
        seen.append((digests(store), dict(store.look(0).counters), [record | {"scored_at": 0} for record in log.records()]))
    assert seen[0] == seen[1] == seen[2]


def test_several_partitions_go_through_in_one_item() -> None:
    store, log = MemoryStore(), Log()
    engine = engine_on(store, log)
    worlds = {partition: world(10 + partition, events=100) for partition in range(3)}
    merges = {partition: start(engine, topics, f"n{partition}", partition) for partition, topics in worlds.items()}
    while taken := [batch for merge in merges.values() if (batch := merge.take(25)) is not None]:
        engine.process(taken)
    for partition, topics in worlds.items():
        alone_store, alone_log = MemoryStore(), Log()
        alone = engine_on(alone_store, alone_log)
        run(alone, start(alone, topics, "n", partition), 25)
        assert digests(store, partition) == digests(alone_store, partition)
    assert set(engine.residues().values()) == {0}
    engine.revoke([0, 1], lost=False)
    assert engine.owned == [2]
    assert store.look(0).nonce == ""
