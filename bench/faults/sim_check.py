"""Whether a finished run kept its promises: everything is worked out again from the logs alone, by other code.

The order in which a partition's events were handled is read from the cuts of its output records. Along that order the slow
oracle (features/oracle.py) says what each event must have become; one pass of the kernel over the whole log, without batches,
crashes or bytes, gives vectors and states; the scores follow from the models the records name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any, Final

import numpy as np
import orjson

from bench.faults.sim_broker import Log, Message
from bench.faults.sim_redis import Broken, ModelRedis
from bench.faults.sim_worker import Slices
from features import oracle
from features.catalog import LAYOUT_HASH, N_FEATURES
from features.facts import KIND, NONE, OFFSET, PROFILE, SILENCE, SOURCES, TIME, TOPICS, WIDTH
from features.history import Histories, digest
from features.state import decode
from features.window import HORIZON_MS
from proto.errors import Reason
from proto.scores import BANDS, SCHEMA_VERSION
from scoring.bands import MEDIUM, UNKNOWN
from streams.metrics import residue
from streams.reader import HighWater
from streams.scores import Model, vector_hashes

ORACLE_VECTORS: Final = 6
"""Vectors of each partition that the oracle works out too; the kernel's own are compared everywhere."""
TOP_REASONS: Final = 3
HYSTERESIS: Final = 0.02
Source = tuple[str, int]
"""Topic and offset."""


@dataclass(slots=True)
class Input:
    """One input record as it is, whatever became of it."""

    source: Source
    topic: int
    customer: str
    event_id: str
    append_ms: int
    row: list[int]
    reason: Reason


@dataclass(slots=True)
class Output:
    """What subscribers of one partition see. `first`: by source, the record the reader rule keeps."""

    raw: list[tuple[bytes, bytes, dict[str, Any]]] = field(default_factory=list)
    first: dict[Source, tuple[bytes, bytes, dict[str, Any]]] = field(default_factory=dict)


def inputs_of(
    logs: Mapping[tuple[str, int], Log], partition: int, reasons: Mapping[tuple[str, int, int], Reason], decoder: Slices
) -> list[Input]:
    """The input records of a partition, topic after topic. reasons: for what the generator says each must be refused."""
    found = []
    for topic, name in enumerate(TOPICS):
        messages = logs[name, partition].messages
        if not messages:
            continue
        records = decoder.decode(topic, partition, messages)
        for i, (message, row) in enumerate(zip(messages, records.facts.tolist(), strict=True)):
            reason = reasons[name, partition, message.offset()]
            source = name, message.offset()
            found.append(Input(source, topic, records.customer[i], records.event_id[i], message.append_ms, row, reason))
    return found


def read(log: Log, partition: int, claims: Mapping[str, Sequence[int]], *, relaxed: bool, once: bool) -> Output:
    """An output log through the reader rule: per source topic drop what is not above the highest offset seen.

    claims: steps at which each process claimed the partition. relaxed: the store went back, so copies of a record may differ, but
    only when two workers were at it at the same time: one that claimed when a record was there must not make it again.
    once: outputs are committed in transactions, so not even a repeat may be seen.
    """
    output = Output()
    high: dict[str, int] = {}
    water = HighWater()
    copies: dict[Source, Message] = {}
    if log.stable != log.end:
        raise Broken("I7", f"{log.place}: a transaction is open at rest, readers see nothing beyond offset {log.stable}")
    for message in log.messages:
        if not message.committed:
            continue
        key, value = message.key() or b"", message.value() or b""
        record = orjson.loads(value)
        source = record["source"]["topic"], record["source"]["offset"]
        if record["source"]["partition"] != partition:
            raise Broken("I5", f"{log.place}: a record of partition {record['source']['partition']}")
        entry = (key, value, record)
        output.raw.append(entry)
        former = copies.setdefault(source, message)
        if once and former is not message:
            raise Broken(
                "I2", f"{log.place}: {source} is there twice: by {former.writer} at step {former.step}, {message.writer}, {message.step}"
            )
        if former.value() != value:
            claimed = max((step for step in claims.get(message.writer, ()) if step <= message.step), default=0)
            if not relaxed or former.step < claimed:
                texts = f"{former.value()!r} by {former.writer} and {value!r} by {message.writer}"
                raise Broken("I2", f"{log.place}: two records of {source} differ: {texts}")
        first = source[1] > high.get(source[0], -1)
        if water.first(source[0], partition, source[1]) != first:
            raise Broken("I2", f"{log.place}: the reader library {'drops' if first else 'hands out'} {source}, against the rule")
        if first:
            high[source[0]] = source[1]
            output.first[source] = entry
        elif source not in output.first:
            raise Broken("I5", f"{log.place}: {source} came first when {high[source[0]]} was there already: a reader drops it")
    return output


def handled_order(inputs: Sequence[Input], scores: Output, letters: Output) -> list[Input]:
    """The order in which the events were handled, as the cuts of the output records say.

    Between two of them: what left no record (duplicates, then profile facts; neither changes what the other becomes).
    Raises Broken when the cuts contradict each other.
    """
    cuts: list[tuple[int, ...]] = []
    events = {source: entry for source, entry in scores.first.items() if source[0] != SOURCES[SILENCE]}
    # Of equal cuts that of the record comes first: the silent were scored behind it.
    silent = [entry for source, entry in scores.first.items() if source[0] == SOURCES[SILENCE]]
    for _, _, record in [*events.values(), *letters.first.values(), *silent]:
        if "cut" in record:
            cuts.append(tuple(record["cut"][name] for name in TOPICS))
    cuts.sort(key=sum)
    for earlier, later in pairwise(cuts):
        if any(a > b for a, b in zip(earlier, later, strict=True)):
            raise Broken("I5", f"no order gives both cuts {earlier} and {later}")
    emitting = {source for source, (_, _, record) in [*events.items(), *letters.first.items()] if "cut" in record}
    dead = set(letters.first) - emitting
    sums = [sum(cut) for cut in cuts]

    def place(event: Input) -> tuple[int, int, int, int]:
        index = TOPICS.index(event.source[0])
        low, high = 0, len(cuts)
        while low < high:
            middle = (low + high) // 2
            if cuts[middle][index] >= event.source[1]:
                high = middle
            else:
                low = middle + 1
        # Before the first cut that holds it; the record that cut belongs to comes last of its gap.
        if event.source in emitting:
            return sums[low] if low < len(sums) else 0, low, 3, event.source[1]
        rank = 2 if event.source in dead else 1 if event.topic == PROFILE >> 3 else 0
        return sums[low] if low < len(sums) else 2**62, low, rank, event.source[1]

    return sorted(inputs, key=lambda event: place(event)[1:])


def check_partition(
    partition: int,
    inputs: Sequence[Input],
    scores: Output,
    letters: Output,
    redis: ModelRedis,
    models: Mapping[str, Model],
    random: Random,
    tick_ms: int = 0,
) -> int:
    """All invariants of one partition at rest. Returns the number of scores. Raises Broken."""
    silent = [record for _, _, record in scores.first.values() if record["source"]["topic"] == SOURCES[SILENCE]]
    order = with_ticks(handled_order(inputs, scores, letters), silent)
    lives: dict[str, oracle.History] = {}
    counters = dict.fromkeys(("events", "scores", "dead_letters", "duplicates", "duplicate_conflicts", "profile_facts"), 0)
    counters["events"] = len(inputs)
    if tick_ms:
        counters["silence"] = len(silent)
    present = _Present(tick_ms)
    accepted: list[Input] = []
    scored: list[tuple[int, oracle.Handled]] = []
    sample = set(random.sample(range(len(order)), min(ORACLE_VECTORS, len(order))))
    oracle_vectors: dict[int, bytes] = {}
    for position, event in enumerate(order):
        if event.topic == SILENCE:
            life = lives[event.customer]
            present.scored(partition, event, lives)
            accepted.append(event)
            scored.append((len(accepted) - 1, oracle.Handled(oracle.SCORED, event.row[TIME], False)))
            if position in sample:
                oracle_vectors[len(accepted) - 1] = life.vector(event.row[TIME])
            continue
        present.passed(partition, event)
        if event.reason != Reason.ACCEPTED:
            _check_letter(partition, event, event.reason, scores, letters)
            counters["dead_letters"] += 1
            continue
        life = lives.setdefault(event.customer, oracle.History())
        handled = life.handle(event.row)
        accepted.append(event)
        if handled.outcome in (oracle.TOO_LATE, oracle.AMOUNT_RANGE):
            reason = Reason.TOO_LATE if handled.outcome == oracle.TOO_LATE else Reason.AMOUNT_RANGE
            _check_letter(partition, event, reason, scores, letters)
            counters["dead_letters"] += 1
        elif handled.outcome == oracle.SCORED:
            if event.source not in scores.first:
                raise Broken("I1", f"partition {partition}: {event.source} has no score")
            if event.source in letters.first:
                raise Broken("I2", f"partition {partition}: {event.source} has a score and a dead letter")
            scored.append((len(accepted) - 1, handled))
            counters["scores"] += 1
            if position in sample:
                oracle_vectors[len(accepted) - 1] = life.vector()
        else:
            if event.source in scores.first or event.source in letters.first:
                raise Broken("I2", f"partition {partition}: {event.source} is no event to be scored, and has a record")
            name = "profile_facts" if handled.outcome == oracle.IS_PROFILE else "duplicates"
            counters[name] += 1
            counters["duplicate_conflicts"] += handled.outcome == oracle.DUPLICATE_CONFLICT
    there = {event.source for event in order}
    for source in [*scores.first, *letters.first]:
        if source not in there:
            raise Broken("I2", f"partition {partition}: a record of {source}, which is not in the log")
    reference = Histories(create=True)
    taken, vectors = _one_pass(reference, accepted)
    if taken != [index for index, _ in scored]:
        raise Broken("I3", f"partition {partition}: kernel and oracle take different events for scored")
    last = _check_scores(partition, accepted, scored, vectors, oracle_vectors, scores, models)
    # A record that was given up has moved time all the same.
    newest = max((event.row[TIME] for event in inputs if event.reason in (Reason.ACCEPTED, Reason.CRASH)), default=-1)
    _check_state(partition, lives, newest, reference, redis, counters, last, models)
    return len(scored)


def with_ticks(order: list[Input], silent: Sequence[Mapping[str, Any]]) -> list[Input]:
    """The silence scores as records of their own, each behind the last record its cut holds."""
    found, handled = [], 0
    places = {event.source: place for place, event in enumerate(order)}
    for record in sorted(silent, key=lambda record: int(record["source"]["offset"])):
        behind = max((place for (topic, offset), place in places.items() if offset <= record["cut"][topic]), default=-1) + 1
        found += order[handled : max(handled, behind)]
        handled = max(handled, behind)
        row = [0] * WIDTH
        row[TIME], row[OFFSET], row[KIND] = record["at"], record["source"]["offset"], SILENCE << 3
        source = SOURCES[SILENCE], record["source"]["offset"]
        found.append(Input(source, SILENCE, record["customer_id"], "", 0, row, Reason.ACCEPTED))
    return found + order[handled:]


@dataclass(slots=True)
class _Present:
    """Who has to be scored at a tick, and was: everybody with an event in the 90 days before the tick before, whom no event disturbed."""

    period_ms: int
    tick_ms: int = 0
    due: set[str] = field(default_factory=set)
    seen: set[tuple[str, int]] = field(default_factory=set)
    time_ms: int = -1

    def scored(self, partition: int, event: Input, lives: Mapping[str, oracle.History]) -> None:
        """A silence score."""
        at, name = event.row[TIME], event.customer
        newest = lives[name].newest
        if at % self.period_ms or newest is None or not at - self.period_ms - HORIZON_MS < newest <= at:
            raise Broken("I2", f"partition {partition}: {name!r}, last seen at {newest}, was scored at {at}, when nobody asked")
        if (name, at) in self.seen:
            raise Broken("I2", f"partition {partition}: {name!r} was scored twice at the tick {at}")
        self.seen.add((name, at))
        if at > self.tick_ms:
            self._end(partition)
            self.tick_ms = at
            reach = at - self.period_ms - HORIZON_MS
            self.due = {one for one, life in lives.items() if life.newest is not None and reach < life.newest <= at}
        self.due.discard(name)

    def passed(self, partition: int, event: Input) -> None:
        """A record was handled."""
        if not self.period_ms or event.reason != Reason.ACCEPTED:
            return
        if event.row[TIME] >= self.tick_ms + self.period_ms:
            self._end(partition)
        self.due.discard(event.customer)

    def _end(self, partition: int) -> None:
        if self.due:
            raise Broken("I1", f"partition {partition}: {sorted(self.due)} have no score at the tick {self.tick_ms}")


def _one_pass(reference: Histories, accepted: Sequence[Input]) -> tuple[list[int], Any]:
    """The kernel over everything: indices that have a score, and their vectors."""
    taken: list[int] = []
    vectors: list[Any] = []
    first = 0
    for index in [*(i for i, event in enumerate(accepted) if event.topic == SILENCE), len(accepted)]:
        part = accepted[first:index]
        step = reference.step([event.customer for event in part], np.array([event.row for event in part], np.int64).reshape(-1, WIDTH))
        taken += (step.rows + first).tolist()
        vectors.append(step.vectors)
        if index < len(accepted):
            taken.append(index)
            vectors.append(reference.vectors_at([accepted[index].customer], accepted[index].row[TIME]))
        first = index + 1
    return taken, np.concatenate(vectors)


def _check_letter(partition: int, event: Input, reason: Reason, scores: Output, letters: Output) -> None:
    if event.source in scores.first:
        raise Broken("I2", f"partition {partition}: {event.source} must be set aside ({reason.name.lower()}), and has a score")
    if event.source not in letters.first:
        raise Broken("I1", f"partition {partition}: {event.source} must be set aside ({reason.name.lower()}), and has no dead letter")
    found = letters.first[event.source][2]["reason"]
    if found != reason.name.lower():
        raise Broken("I1", f"partition {partition}: {event.source} was set aside for {found}, not for {reason.name.lower()}")


def _check_scores(
    partition: int,
    accepted: Sequence[Input],
    scored: Sequence[tuple[int, oracle.Handled]],
    vectors: Any,
    oracle_vectors: Mapping[int, bytes],
    scores: Output,
    models: Mapping[str, Model],
) -> dict[str, tuple[float, int, int, str, int, int, int]]:
    """I4: each record follows from its cut and its model, field by field. Returns the last score of each customer."""
    hashes = vector_hashes(vectors)
    by_model: dict[str, list[int]] = {}
    for k, (index, _) in enumerate(scored):
        found = scores.first[accepted[index].source][2]["model_digest"]
        if found not in models:
            raise Broken("I4", f"partition {partition}: {accepted[index].source} was scored by a model {found!r} nobody published")
        by_model.setdefault(found, []).append(k)
    probability = np.zeros(len(scored), np.float32)
    band = np.zeros(len(scored), np.uint8)
    for name, rows in by_model.items():
        probability[rows] = models[name].score(vectors[rows])
        band[rows] = models[name].bands(probability[rows])
    former = np.zeros(len(scored), np.uint8)
    alert: list[int] = []
    last: dict[str, tuple[float, int, int, str, int, int, int]] = {}
    superseded: list[str | None] = []
    for k, (index, handled) in enumerate(scored):
        customer = accepted[index].customer
        former[k] = last[customer][1] if customer in last else UNKNOWN
        model = models[scores.first[accepted[index].source][2]["model_digest"]]
        alert.append(_alert_after(last[customer][4] if customer in last else UNKNOWN, int(band[k]), float(probability[k]), model))
        superseded.append(None)
        topic, offset = accepted[index].source
        if handled.late and customer in last:
            superseded[k] = f"{SOURCES[last[customer][5]]}-{partition}-{last[customer][6]}"
        stored = hashes[k]
        if topic == SOURCES[SILENCE]:  # the vector that is stored is the last event's
            stored = last[customer][3] if customer in last else vector_hashes(np.full((1, N_FEATURES), np.nan, np.float32))[0]
        last[customer] = (float(probability[k]), int(band[k]), handled.at, stored, alert[k], SOURCES.index(topic), offset)
    reasons: dict[int, bytes] = {}
    for name, rows in by_model.items():
        reasons.update(zip(rows, models[name].reasons(vectors[rows], band[rows], former[rows], TOP_REASONS), strict=True))
    for k, (index, handled) in enumerate(scored):
        event = accepted[index]
        if index in oracle_vectors and oracle_vectors[index] != vectors[k].tobytes():
            raise Broken("I4", f"partition {partition}: the vector of {event.source} is not the oracle's")
        key, _, record = scores.first[event.source]
        model = models[record["model_digest"]]
        topic, offset = event.source
        expected = {
            "score_id": f"{topic}-{partition}-{offset}",
            "customer_id": event.customer,
            "event_id": event.event_id,
            "event_time": event.row[TIME],
            "at": handled.at,
            "scored_at": record["scored_at"],
            "probability": float(probability[k]),
            "band": BANDS[band[k]],
            "alert_band": BANDS[alert[k]],
            "threshold_version": model.threshold_version,
            "model_name": model.name,
            "model_version": model.version,
            "model_digest": model.digest,
            "layout_hash": LAYOUT_HASH,
            "vector_hash": hashes[k],
            "cause": "silence" if topic == SOURCES[SILENCE] else "late" if handled.late else "event",
            "late": handled.late,
            "fallback": model.fallback,
            "supersedes": superseded[k],
            "reasons": orjson.loads(reasons[k]),
            "reasons_method": model.reasons_method,
            "source": {"topic": topic, "partition": partition, "offset": offset},
            "cut": record["cut"],
            "schema_version": SCHEMA_VERSION,
        }
        if record != expected:
            names = sorted(name for name in expected | record if record.get(name, ...) != expected.get(name, ...))
            shown = {name: (record.get(name), expected.get(name)) for name in names}
            raise Broken("I4", f"partition {partition}: the score of {event.source} cannot be made again: (found, expected) {shown}")
        if key != event.customer.encode("utf-8", "surrogatepass"):
            raise Broken("I4", f"partition {partition}: the score of {event.source} has the key {key!r}")
        if record["scored_at"] < event.append_ms:
            raise Broken("I4", f"partition {partition}: {event.source} was scored before it was there")
    return last


def _alert_after(before: int, band: int, probability: float, model: Model) -> int:
    """The alert band after a score, told slowly: up at once, down when clearly below the threshold of the band before."""
    if band in (UNKNOWN, before):
        return before
    if before == UNKNOWN or band > before:
        return band
    edge = model.edges[before - MEDIUM]
    return band if probability < edge - min(HYSTERESIS, edge / 2) else before


def _check_state(
    partition: int,
    lives: Mapping[str, oracle.History],
    newest: int,
    reference: Histories,
    redis: ModelRedis,
    counters: Mapping[str, int],
    last: Mapping[str, tuple[float, int, int, str, int, int, int]],
    models: Mapping[str, Model],
) -> None:
    """I3 and I9: facts, carry, vector, last score, offsets and counters are those of one undisturbed pass."""
    claim = redis.store.look(partition)
    found_counters = {name: claim.counters.get(name, 0) for name in counters}
    if residue(found_counters):
        raise Broken("I9", f"partition {partition}: {residue(found_counters)} events are unaccounted for: {found_counters}")
    if found_counters != dict(counters):
        raise Broken("I9", f"partition {partition}: counted {found_counters}, there were {dict(counters)}")
    if claim.intent is not None:
        raise Broken("I3", f"partition {partition}: at rest, and a batch is still open: {claim.intent}")
    if claim.watermark_ms != newest:
        raise Broken("I3", f"partition {partition}: the watermark is {claim.watermark_ms}, the newest event is of {newest}")
    if claim.model not in models:
        raise Broken("I4", f"partition {partition}: the stored model {claim.model!r} is not known")
    names = sorted(name for name, life in lives.items() if life.facts)
    stored = sorted(redis.store.customers(partition))
    # A customer all of whose records were refused by the histories may be stored, without facts.
    if not set(names) <= set(stored) or not set(stored) <= set(lives):
        raise Broken("I3", f"partition {partition}: customers {stored} are stored, {names} have facts")
    for name, state in zip(names, redis.store.load(partition, names), strict=True):
        assert state is not None
        life = lives[name]
        customer = decode(state)
        if customer.facts.tolist() != [list(fact.row) for fact in life.kept()]:
            raise Broken("I3", f"partition {partition}: the kept facts of {name!r} are not those of the log")
        if digest(state) != reference.digest(name):
            raise Broken("I3", f"partition {partition}: the state of {name!r} is not that of one pass over the log")
        score = last.get(name)
        if score is None:
            if customer.score_at != NONE or customer.band != UNKNOWN:
                raise Broken("I3", f"partition {partition}: {name!r} was never scored, and has a last score")
        elif (
            customer.probability,
            customer.band,
            customer.score_at,
            vector_hashes(customer.vector[np.newaxis])[0],
            customer.alert_band,
            customer.source,
            customer.source_offset,
        ) != score:
            raise Broken("I3", f"partition {partition}: the last score of {name!r} is not its last record's")


__all__ = ["Broken", "Input", "Output", "check_partition", "handled_order", "inputs_of", "read"]
