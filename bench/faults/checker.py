"""Did the service keep its promises? Everything it left is held against a recomputation of its own from the input log.

The recomputation shares nothing with the engine's way of a batch: records are read one by one with the reference reader, rules are
written out plainly, facts and outcomes come from the oracle (features/oracle.py), stored states are compared part by part. Vectors of a
sample come from the oracle too; all others from one run of the kernel over the log from its beginning, with no store, batch or restart
in between. The order in which records were handled is not recomputed but read: each output says in its cut what had been handled.

Invariants (docs/reliability.md): I1 nothing lost, I2 no duplicate after the reader rule and raw duplicates equal to the byte, I3 state,
I4 scores, I5 order, I6 one writer, I9 accounting. I7 (progress) and I8 (bounds) are watched while a round runs (bench/faults/rounds.py).
"""

from __future__ import annotations

import random
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_EVEN, Decimal
from hashlib import blake2b
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import orjson

from features.carry import CARRY_WIDTH, DAY_ATTRIBUTES, DAYS_AT, FIRST, LAST_WIDTH, LASTS_AT, MEASURE, MONEY, NEWEST, PROFILE_AT, empty
from features.catalog import ATTRIBUTES, CLOCKS, LASTS, LAYOUT_HASH, MEASURES
from features.catalog import MONEY as MONEY_KINDS
from features.facts import (
    KIND,
    KINDS,
    LEVEL,
    MAX_AMOUNT_MINOR,
    NONE,
    OFFSET,
    PRIORITIES,
    PROFILE,
    TIME,
    TOPICS,
    VALUE,
    YEAR_2000_MS,
    pack_profile,
    pack_ticket,
)
from features.history import Histories
from features.oracle import DUPLICATE, DUPLICATE_CONFLICT, IS_PROFILE, SCORED, TOO_LATE, Fact, History
from features.state import decode
from features.store import Claim, CustomerState
from features.texts import digests, key_of
from features.window import HORIZON_MS
from proto.errors import ChurnError, Reason
from proto.events import CustomerProfile, Event, Login, Refused, SupportTicket, Transaction, days, read
from proto.scores import BANDS, SCHEMA_VERSION
from streams.scores import Model

PIECE: Final = 4_000
SHOWN: Final = 5
"""Violations of one kind that are told apart; the others are counted."""
_KIND_NAME: Final = {code: name for name, code in KINDS.items()}


class Record(NamedTuple):
    """One input record as it lies in the log. topic: index in features.facts.TOPICS."""

    topic: int
    partition: int
    offset: int
    append_ms: int
    key: bytes | None
    value: bytes | None


class Output(NamedTuple):
    """One output record as it lies in the log."""

    key: bytes | None
    value: bytes


@dataclass(slots=True)
class Evidence:
    """What a deployment left: input log, raw output logs by partition in order, and what the store holds.

    began_ms, ended_ms: wall clock around all of it. models: by digest, the fallback under "".
    """

    inputs: Mapping[int, list[Record]]
    scores: Mapping[int, list[Output]]
    letters: Mapping[int, list[Output]]
    alerts: Mapping[int, list[Output]]
    stands: Mapping[int, Claim]
    states: Mapping[int, dict[str, CustomerState]]
    models: Mapping[str, Model]
    began_ms: int
    ended_ms: int


@dataclass(frozen=True, slots=True)
class Rules:
    """What the deployment's settings say, as far as results depend on them. exponent: decimals of the currency."""

    currency: str = "EUR"
    exponent: int = 2
    future_ms: int = 300_000
    max_bytes: int = 1_000_000
    digest_key: bytes = b"churnstream/digest/v1"
    reasons_top: int = 3
    hysteresis: float = 0.02
    exactly_once: bool = False  # then not even a raw duplicate may be seen
    clock_s: int = 0  # how far the workers' wall clocks may be off
    stopped: bool = True  # all workers have stopped gracefully: nobody owns anything, no batch is open


@dataclass(slots=True)
class Verdict:
    """What was found. `violations` begin with the invariant's number."""

    violations: list[str] = field(default_factory=list)
    records: int = 0
    scores: int = 0
    letters: int = 0
    alerts: int = 0
    customers: int = 0
    raw_duplicates: int = 0
    oracle_vectors: int = 0
    _kinds: Counter[str] = field(default_factory=Counter)

    def broken(self, invariant: str, kind: str, text: str) -> None:
        """Note a violation; the kind is told once it has come SHOWN times."""
        self._kinds[f"{invariant} {kind}"] += 1
        if self._kinds[f"{invariant} {kind}"] <= SHOWN:
            self.violations.append(f"{invariant} {kind}: {text}")

    def finish(self) -> Verdict:
        """Say how often each kind came."""
        self.violations += [f"{kind}: {count} in all" for kind, count in self._kinds.items() if count > SHOWN]
        return self


@dataclass(slots=True)
class _Judged:
    """One input record as the rules see it; `row` is a fact row, empty when refused."""

    record: Record
    reason: Reason
    customer: str = ""
    event_id: str = ""
    row: list[int] = field(default_factory=list)

    @property
    def place(self) -> tuple[int, int]:
        return self.record.topic, self.record.offset


@dataclass(slots=True)
class _Expected:
    """What one record has to become."""

    outcome: int  # of the oracle; -1 for a dead letter of the reader
    reason: Reason = Reason.ACCEPTED
    at: int = 0
    late: bool = False


def check(evidence: Evidence, rules: Rules, *, sample: int = 200, seed: int = 0) -> Verdict:
    """Hold what is there against what has to be there. sample: scores whose vector the oracle recomputes."""
    verdict = Verdict()
    total = sum(map(len, evidence.inputs.values()))
    for partition in sorted(evidence.inputs):
        share = round(sample * len(evidence.inputs[partition]) / total) + 1 if total else 0
        _Partition(partition, evidence, rules, verdict, random.Random(f"{seed}-{partition}"), share).check()
    return verdict.finish()


Source = tuple[int, int]
"""Topic index and offset."""
Parsed = TypeVar("Parsed")


@dataclass(slots=True)
class _Partition:
    """The check of one partition."""

    number: int
    evidence: Evidence
    rules: Rules
    verdict: Verdict
    random: random.Random
    sample: int

    def check(self) -> None:
        records = self.evidence.inputs[self.number]
        judged = self._judge(records)
        scores = self._first_wins("score", self.evidence.scores.get(self.number, []))
        letters = self._first_wins("dead letter", self.evidence.letters.get(self.number, []))
        alerts = self._first_wins("alert", self.evidence.alerts.get(self.number, []))
        self.verdict.records += len(records)
        self.verdict.scores += len(scores)
        self.verdict.letters += len(letters)
        self.verdict.alerts += len(alerts)
        order = self._order(judged, scores, letters)
        histories, expected = self._handle(order)
        self._outputs(judged, expected, scores, letters)
        due = self._scores(order, expected, scores)
        self._alerts(due, alerts)
        self._letters(order, expected, letters)
        self._state(order, histories, scores)
        self._meta(order, expected)
        self._known(histories)

    def broken(self, invariant: str, kind: str, text: str) -> None:
        self.verdict.broken(invariant, kind, f"partition {self.number}: {text}")

    # -- what the log says

    def _judge(self, records: Sequence[Record]) -> dict[Source, _Judged]:
        found: dict[Source, _Judged] = {}
        events: list[tuple[_Judged, Event]] = []
        for record in records:
            judged = _Judged(record, Reason.ACCEPTED)
            found[judged.place] = judged
            try:
                event = read(record.topic, record.value, max_bytes=self.rules.max_bytes)
            except Refused as refused:
                judged.reason = refused.reason
                continue
            judged.customer, judged.event_id = event.customer_id, event.event_id
            judged.reason = self._refusal(record, event)
            if judged.reason == Reason.ACCEPTED:
                events.append((judged, event))
        texts = sorted({text for _, event in events for text in _texts(event)} - {""})
        known = dict(zip(texts, digests(texts, key_of(self.rules.digest_key, "text")).tolist(), strict=True)) | {"": 0}
        for topic, name in enumerate(TOPICS):
            of_topic = [(judged, event) for judged, event in events if judged.record.topic == topic]
            ids = digests([event.event_id for _, event in of_topic], key_of(self.rules.digest_key, f"id {name}")).tolist()
            for (judged, event), identity in zip(of_topic, ids, strict=True):
                judged.row = [*self._numbers(judged.record, event), *(known[text] for text in _texts(event)), identity]
        return found

    def _refusal(self, record: Record, event: Event) -> Reason:
        if record.key != event.customer_id.encode():
            return Reason.KEY_MISMATCH
        if event.event_time < YEAR_2000_MS:
            return Reason.BEFORE_2000
        if record.append_ms >= 0 and event.event_time > record.append_ms + self.rules.future_ms:
            return Reason.FUTURE
        if isinstance(event, Transaction) and (self._minor(event) or 0) > MAX_AMOUNT_MINOR:
            return Reason.AMOUNT_RANGE
        return Reason.ACCEPTED

    def _minor(self, event: Transaction) -> int | None:
        """The amount in minor units; None when absent or in a currency without a rate."""
        if event.amount is None or event.currency not in (None, self.rules.currency):
            return None
        if event.amount > Decimal(10) ** 17:
            return 10**18
        # Rounded from the exact decimal, half to even; a context's digits would round twice.
        return int((event.amount.scaleb(self.rules.exponent)).quantize(Decimal(1), ROUND_HALF_EVEN))

    def _numbers(self, record: Record, event: Event) -> tuple[int, int, int, int, int]:
        value: int | None = None
        level = 0
        kind = PROFILE
        match event:
            case Transaction():
                kind, value = KINDS[event.kind], self._minor(event)
            case Login():
                kind, value = KINDS[event.kind], event.duration_ms
            case SupportTicket():
                kind, value = KINDS[event.kind], event.wait_seconds
                level = pack_ticket(0 if event.priority is None else PRIORITIES[event.priority], event.csat, event.nps)
            case CustomerProfile():
                value = None if event.signup_date is None else days(event.signup_date)
                level = pack_profile(None if event.contract_end is None else days(event.contract_end), event.consent)
        return event.event_time, record.offset, kind, NONE if value is None else value, level

    # -- reader rule and order

    def _first_wins(self, what: str, rows: Sequence[Output]) -> dict[Source, tuple[dict[str, Any], Output]]:
        """The reader rule; every raw duplicate has to be equal to the byte, and of the kept ones nothing may be out of order."""
        kept: dict[Source, tuple[dict[str, Any], Output]] = {}
        high = [-1] * len(TOPICS)
        for row in rows:
            try:
                body: dict[str, Any] = orjson.loads(row.value)
                source: Source = TOPICS.index(body["source"]["topic"]), body["source"]["offset"]
                partition = body["source"]["partition"]
            except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                self.broken("I4", f"unreadable {what}", f"{row.value[:200]!r}: {error}")
                continue
            if partition != self.number:
                self.broken("I5", f"{what} in the wrong partition", f"source {body['source']}")
            if source[1] > high[source[0]]:
                high[source[0]] = source[1]
                kept[source] = (body, row)
                continue
            self.verdict.raw_duplicates += 1
            if self.rules.exactly_once:
                self.broken("I2", f"duplicate {what} in exactly_once", f"source {source}")
            if source not in kept:
                self.broken("I5", f"{what} out of order", f"source {source} after offset {high[source[0]]}, and never before")
            elif kept[source][1] != row:
                self.broken("I2", f"repeated {what} differs", f"source {source}: {kept[source][1].value!r} then {row.value!r}")
        return kept

    def _order(self, judged: Mapping[Source, _Judged], scores: Mapping[Source, Any], letters: Mapping[Source, Any]) -> list[_Judged]:
        """The records in the order in which they were handled: by the cuts of the outputs, and in between as the merge rule says."""
        waiting = [[item for item in judged.values() if item.record.topic == topic] for topic in range(len(TOPICS))]
        for items in waiting:
            items.sort(key=lambda item: item.record.offset)
        keys = [_merge_keys(items) for items in waiting]
        at = [0] * len(TOPICS)
        order: list[_Judged] = []
        reached = [-1] * len(TOPICS)

        def take(cut: Sequence[int], last: Source | None) -> None:
            between = []
            for topic in range(len(TOPICS)):
                while at[topic] < len(waiting[topic]) and waiting[topic][at[topic]].record.offset <= cut[topic]:
                    item = waiting[topic][at[topic]]
                    if item.place != last:
                        between.append((keys[topic][at[topic]], topic, item.record.offset, item))
                    at[topic] += 1
            between.sort(key=lambda entry: entry[:3])
            order.extend(entry[3] for entry in between)
            if last is not None and last in judged:
                order.append(judged[last])

        outputs = [(body, source) for kept in (scores, letters) for source, (body, _) in kept.items() if isinstance(body.get("cut"), dict)]
        cuts = [([body["cut"].get(name, -1) for name in TOPICS], source) for body, source in outputs]
        for cut, source in sorted(cuts, key=lambda entry: (sum(entry[0]), entry[1])):
            if any(now < before for now, before in zip(cut, reached, strict=True)) or cut[source[0]] != source[1]:
                self.broken("I5", "cuts do not follow each other", f"{cut} of source {source} after {reached}")
                continue
            take(cut, source)
            reached = list(cut)
        take([2**63] * len(TOPICS), None)
        return order

    # -- what everything has to become

    def _handle(self, order: Sequence[_Judged]) -> tuple[dict[str, History], dict[Source, _Expected]]:
        histories: dict[str, History] = {}
        expected: dict[Source, _Expected] = {}
        for item in order:
            if item.reason != Reason.ACCEPTED:
                expected[item.place] = _Expected(-1, item.reason)
                continue
            handled = histories.setdefault(item.customer, History()).handle(item.row)
            reason = Reason.ACCEPTED
            if handled.outcome not in (SCORED, IS_PROFILE, DUPLICATE, DUPLICATE_CONFLICT):
                reason = Reason.TOO_LATE if handled.outcome == TOO_LATE else Reason.AMOUNT_RANGE
            expected[item.place] = _Expected(handled.outcome, reason, handled.at, handled.late)
        return histories, expected

    def _outputs(
        self,
        judged: Mapping[Source, _Judged],
        expected: Mapping[Source, _Expected],
        scores: Mapping[Source, Any],
        letters: Mapping[Source, Any],
    ) -> None:
        for what, kept, wanted in (
            ("score", scores, {source for source, item in expected.items() if item.outcome == SCORED}),
            ("dead letter", letters, {source for source, item in expected.items() if item.reason != Reason.ACCEPTED}),
        ):
            for source in sorted(wanted - kept.keys()):
                self.broken("I1", f"no {what}", f"{TOPICS[source[0]]} offset {source[1]}: {judged[source].reason.name}")
            for source in sorted(kept.keys() - wanted):
                self.broken("I2", f"a {what} nobody asked for", f"{TOPICS[source[0]]} offset {source[1]}")

    # -- scores

    def _scores(
        self, order: Sequence[_Judged], expected: Mapping[Source, _Expected], scores: Mapping[Source, tuple[dict[str, Any], Output]]
    ) -> dict[Source, dict[str, Any]]:
        """Every score field by field, from the vector on: kernel over the whole log at once, the oracle for a sample.

        Returns the alerts that have to be there.
        """
        accepted = [item for item in order if item.reason == Reason.ACCEPTED]
        scored = [item for item in accepted if expected[item.place].outcome == SCORED]
        chosen = {item.place for item in self.random.sample(scored, min(self.sample, len(scored)))}
        oracle = self._oracle_vectors(accepted, chosen)
        kernel = Histories(create=True)
        bands = _Bands()
        alerts: dict[Source, dict[str, Any]] = {}
        cut = [-1] * len(TOPICS)
        cuts: dict[Source, dict[str, int]] = {}
        for item in order:
            cut[item.record.topic] = item.record.offset
            cuts[item.place] = dict(zip(TOPICS, cut, strict=True))
        for start in range(0, len(accepted), PIECE):
            part = accepted[start : start + PIECE]
            step = kernel.step([item.customer for item in part], np.array([item.row for item in part], np.int64))
            for item, outcome, at in zip(part, step.outcome.tolist(), step.at.tolist(), strict=True):
                wanted = expected[item.place]
                if (outcome, at) != (wanted.outcome, wanted.at):
                    self.broken("I3", "kernel and oracle disagree", f"{item.place}: {(outcome, at)}, oracle {wanted}")
            rows = [part[i] for i in step.rows.tolist()]
            for item, vector in zip(rows, step.vectors, strict=True):
                if item.place in oracle and oracle[item.place] != vector.tobytes():
                    self.broken("I4", "vector", f"{item.place}: kernel and oracle disagree")
            self._score_rows(rows, step.vectors, expected, scores, cuts, bands, alerts)
        return alerts

    def _oracle_vectors(self, accepted: Sequence[_Judged], chosen: set[Source]) -> dict[Source, bytes]:
        histories: dict[str, History] = {}
        wanted = {item.customer for item in accepted if item.place in chosen}
        found: dict[Source, bytes] = {}
        for item in accepted:
            if item.customer in wanted:
                history = histories.setdefault(item.customer, History())
                history.handle(item.row)
                if item.place in chosen:
                    found[item.place] = history.vector()
        self.verdict.oracle_vectors += len(found)
        return found

    def _score_rows(
        self,
        rows: Sequence[_Judged],
        vectors: Any,
        expected: Mapping[Source, _Expected],
        scores: Mapping[Source, tuple[dict[str, Any], Output]],
        cuts: Mapping[Source, dict[str, int]],
        bands: _Bands,
        alerts: dict[Source, dict[str, Any]],
    ) -> None:
        """Hold the scores of some records, in handling order, against the models they name; a run of one model at a time."""
        there = [i for i, item in enumerate(rows) if item.place in scores]
        runs = _runs(there, lambda i: str(scores[rows[i].place][0].get("model_digest")))
        for digest, indices in runs:
            model = self.evidence.models.get(digest)
            if model is None:
                self.broken("I4", "unknown model", f"{digest!r} scored {rows[indices[0]].place}")
                continue
            of_run = np.ascontiguousarray(vectors[indices])
            probability = model.score(of_run)
            band = model.bands(probability)
            former = np.zeros(len(indices), np.uint8)
            for k, i in enumerate(indices):
                former[k] = bands.last.get(rows[i].customer, 0)
                bands.last[rows[i].customer] = int(band[k])
            reasons = model.reasons(of_run, band, former, self.rules.reasons_top)
            for k, i in enumerate(indices):
                item = rows[i]
                body, raw = scores[item.place]
                wanted = self._score(item, expected[item.place], model, of_run[k], float(probability[k]), int(band[k]))
                before, after = bands.alert(item.customer, int(band[k]), float(probability[k]), model.edges, self.rules.hysteresis)
                wanted |= {
                    "reasons": orjson.loads(reasons[k]),
                    "cut": cuts[item.place],
                    "scored_at": body.get("scored_at"),
                    "alert_band": BANDS[after],
                    "supersedes": bands.superseded(item.customer, wanted["score_id"], wanted["late"]),
                }
                if before != after and (before, after) != (0, 1):  # a first score that is low is no alert
                    alerts[item.place] = self._alert(wanted, before, after, model)
                for name in sorted(wanted.keys() | body.keys()):
                    if wanted.get(name, "absent") != body.get(name, "absent"):
                        found, due = body.get(name, "absent"), wanted.get(name, "absent")
                        self.broken("I4", f"score field {name}", f"{item.place}: {found!r}, {due!r} is right")
                if raw.key != item.customer.encode():
                    self.broken("I4", "score key", f"{item.place}: {raw.key!r}")
                off_ms = 1_000 * self.rules.clock_s
                if not self.evidence.began_ms - off_ms <= int(body.get("scored_at", 0)) <= self.evidence.ended_ms + off_ms:
                    self.broken("I4", "scored_at", f"{item.place}: {body.get('scored_at')} is outside the round")

    def _score(self, item: _Judged, wanted: _Expected, model: Model, vector: Any, probability: float, band: int) -> dict[str, Any]:
        topic, offset = TOPICS[item.record.topic], item.record.offset
        return {
            "score_id": f"{topic}-{self.number}-{offset}",
            "customer_id": item.customer,
            "event_id": item.event_id,
            "event_time": item.row[TIME],
            "at": wanted.at,
            "probability": probability,
            "band": BANDS[band],
            "threshold_version": model.threshold_version,
            "model_name": model.name,
            "model_version": model.version,
            "model_digest": model.digest,
            "layout_hash": LAYOUT_HASH,
            "vector_hash": blake2b(vector.astype("<f4").tobytes(), digest_size=16).hexdigest(),
            "cause": "late" if wanted.late else "event",
            "late": wanted.late,
            "fallback": model.fallback,
            "reasons_method": model.reasons_method,
            "source": {"topic": topic, "partition": self.number, "offset": offset},
            "schema_version": SCHEMA_VERSION,
        }

    def _alert(self, score: Mapping[str, Any], before: int, after: int, model: Model) -> dict[str, Any]:
        same = ("customer_id", "event_id", "event_time", "at", "scored_at", "probability", "threshold_version", "source", "cut")
        return {name: score[name] for name in (*same, "model_name", "model_version", "model_digest", "schema_version")} | {
            "alert_id": score["score_id"],
            "from_band": BANDS[before],
            "to_band": BANDS[after],
            "thresholds": dict(zip(("medium", "high"), model.edges, strict=True)),
            "hysteresis": self.rules.hysteresis,
        }

    def _alerts(self, due: Mapping[Source, dict[str, Any]], alerts: Mapping[Source, tuple[dict[str, Any], Output]]) -> None:
        for source in sorted(due.keys() - alerts.keys()):
            self.broken("I1", "no alert", f"{source}")
        for source in sorted(alerts.keys() - due.keys()):
            self.broken("I2", "an alert nobody asked for", f"{source}")
        for source in due.keys() & alerts.keys():
            body, raw = alerts[source]
            if body != due[source] or raw.key != due[source]["customer_id"].encode():
                self.broken("I4", "alert", f"{source}: {body}, {due[source]} is right")

    # -- dead letters

    def _letters(
        self, order: Sequence[_Judged], expected: Mapping[Source, _Expected], letters: Mapping[Source, tuple[dict[str, Any], Output]]
    ) -> None:
        cut = [-1] * len(TOPICS)
        for item in order:
            record = item.record
            cut[record.topic] = record.offset
            if item.place not in letters:
                continue
            body, raw = letters[item.place]
            wanted = {
                "schema_version": SCHEMA_VERSION,
                "reason": expected[item.place].reason.name.lower(),
                "source": {"topic": TOPICS[record.topic], "partition": self.number, "offset": record.offset},
                "append_time": record.append_ms,
                "key": None if record.key is None else b64encode(record.key).decode(),
                "value": None if record.value is None else b64encode(record.value).decode(),
            }
            if "cut" in body:
                wanted["cut"] = dict(zip(TOPICS, cut, strict=True))
            for name, due in wanted.items():
                if body.get(name, "absent") != due:
                    self.broken("I4", f"dead letter field {name}", f"{item.place}: {body.get(name)!r}, {due!r} is right")
            if raw.key != record.key:
                self.broken("I4", "dead letter key", f"{item.place}: {raw.key!r}")

    # -- state

    def _state(
        self, order: Sequence[_Judged], histories: Mapping[str, History], scores: Mapping[Source, tuple[dict[str, Any], Output]]
    ) -> None:
        stored = self.evidence.states.get(self.number, {})
        self.verdict.customers += len(histories)
        for customer in sorted(stored.keys() - histories.keys()):
            self.broken("I3", "a customer of nothing", repr(customer))
        last: dict[str, dict[str, Any]] = {}
        for item in order:
            if item.place in scores:
                last[item.customer] = scores[item.place][0]
        for customer, history in histories.items():
            if customer not in stored:
                self.broken("I3", "customer without state", repr(customer))
                continue
            try:
                state = decode(stored[customer], customer)
            except ChurnError as error:
                self.broken("I3", "state unreadable", str(error))
                continue
            facts = [fact.row for fact in history.kept()]
            if [tuple(row) for row in state.facts.tolist()] != facts:
                self.broken("I3", "facts", f"customer {customer!r}: {len(state.facts)} stored, {len(facts)} are right")
            carry = _carry(history)
            if state.carry.tolist() != carry:
                wrong = [i for i in range(CARRY_WIDTH) if int(state.carry[i]) != carry[i]]
                self.broken("I3", "carry", f"customer {customer!r}: columns {wrong}")
            body = last.get(customer)
            if body is None:
                if state.score_at != NONE or not np.isnan(state.vector).all():
                    self.broken("I3", "a score of nothing", f"customer {customer!r}")
                continue
            found = (np.float32(state.probability), BANDS[state.band], BANDS[state.alert_band], state.score_at)
            due = (np.float32(body["probability"]), body["band"], body["alert_band"], body["at"])
            if found != due:
                self.broken("I3", "last score", f"customer {customer!r}: {found}, {due} is right")
            if blake2b(state.vector.astype("<f4").tobytes(), digest_size=16).hexdigest() != body["vector_hash"]:
                self.broken("I3", "last vector", f"customer {customer!r}")

    def _known(self, histories: Mapping[str, History]) -> None:
        """The list of known customers, by which a worker tells a new customer from one whose state is gone."""
        stand = self.evidence.stands[self.number]
        listed = [stand.customers[start : start + 8] for start in range(0, len(stand.customers), 8)]
        right = {blake2b(customer.encode("utf-8", "surrogatepass"), digest_size=8).digest() for customer in histories}
        if len(listed) != len(set(listed)) or set(listed) != right:
            self.broken("I3", "known customers", f"{len(listed)} listed, {len(right)} are right")
        if stand.damaged or stand.rebuilding:
            self.broken("I3", "store says", f"damaged {stand.damaged!r}, rebuilding {stand.rebuilding}")

    def _meta(self, order: Sequence[_Judged], expected: Mapping[Source, _Expected]) -> None:
        stand = self.evidence.stands[self.number]
        ends = dict.fromkeys(TOPICS, -1)
        for item in order:
            ends[TOPICS[item.record.topic]] = max(ends[TOPICS[item.record.topic]], item.record.offset)
        if {name: stand.applied.get(name, -1) for name in TOPICS} != ends:
            self.broken("I1", "applied offsets", f"{dict(stand.applied)}, {ends} is right")
        newest = max((item.row[TIME] for item in order if item.reason == Reason.ACCEPTED), default=-1)
        if stand.watermark_ms != newest:
            self.broken("I3", "watermark", f"{stand.watermark_ms}, {newest} is right")
        if stand.model not in self.evidence.models:
            self.broken("I4", "unknown model in meta", repr(stand.model))
        if self.rules.stopped and (stand.nonce or stand.intent is not None):
            self.broken("I6", "not released", f"owner {stand.nonce!r}, intent {stand.intent}")
        outcomes = Counter(item.outcome for item in expected.values())
        letters = sum(item.reason != Reason.ACCEPTED for item in expected.values())
        wanted = {
            "events": len(order),
            "scores": outcomes[SCORED],
            "dead_letters": letters,
            "duplicates": outcomes[DUPLICATE] + outcomes[DUPLICATE_CONFLICT],
            "duplicate_conflicts": outcomes[DUPLICATE_CONFLICT],
            "profile_facts": outcomes[IS_PROFILE],
        }
        found = {name: stand.counters.get(name, 0) for name in wanted}
        if found != wanted:
            self.broken("I9", "counters", f"{found}, {wanted} is right")


@dataclass(slots=True)
class _Bands:
    """Per customer the band of the last score, and the band last alerted; codes are positions in proto.scores.BANDS."""

    last: dict[str, int] = field(default_factory=dict)
    alerted: dict[str, int] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)  # id of the last score

    def superseded(self, customer: str, score_id: str, late: bool) -> str | None:
        """What a score corrects; from then on it is the customer's last."""
        before = self.scores.get(customer)
        self.scores[customer] = score_id
        return before if late else None

    def alert(self, customer: str, band: int, probability: float, edges: Sequence[float], hysteresis: float) -> tuple[int, int]:
        """The alert band before and after a score: up with the band at once, down only when clearly below the threshold."""
        before = after = self.alerted.get(customer, 0)
        if band > before:
            after = band
        elif 0 < band < before:
            edge = edges[before - 2]
            if probability < edge - min(hysteresis, edge / 2):
                after = band
        self.alerted[customer] = after
        return before, after


def _texts(event: Event) -> tuple[str, str, str, str]:
    """The texts of a fact in the order of its columns A to D."""
    found: tuple[str | None, ...] = ()
    match event:
        case Transaction():
            found = (event.product, event.method, event.channel, None)
        case Login():
            found = (event.device, event.session_id, event.feature, event.country)
        case SupportTicket():
            found = (event.ticket_id, event.category, event.channel, None)
        case CustomerProfile():
            found = (event.plan, event.segment, event.region, event.age_band)
    a, b, c, d = (text or "" for text in found)
    return a, b, c, d


def _merge_keys(items: Iterable[_Judged]) -> list[int]:
    """The newest accepted time of the topic so far: a late record does not jump the queue."""
    newest = -1
    keys = []
    for item in items:
        if item.reason == Reason.ACCEPTED:
            newest = max(newest, item.row[TIME])
        keys.append(newest)
    return keys


def _runs(items: Iterable[int], key: Callable[[int], str]) -> list[tuple[str, list[int]]]:
    runs: list[tuple[str, list[int]]] = []
    for item in items:
        if not runs or runs[-1][0] != key(item):
            runs.append((key(item), []))
        runs[-1][1].append(item)
    return runs


def _carry(history: History) -> list[int]:
    """What of a life has left the 90 days, folded as docs/state.md says."""
    carry: list[int] = empty().tolist()
    assert history.newest is not None
    left: list[Fact] = [fact for fact in history.facts if fact.time <= history.newest - HORIZON_MS]
    carry[0] = len(left)
    for fact in left:
        if _KIND_NAME[fact.row[KIND]] in MONEY_KINDS and fact.row[VALUE] != NONE:
            carry[MONEY] += fact.row[VALUE]
        for i in range(len(MEASURES)):
            carry[MEASURE + i] += fact.adds[i]
        for i in fact.clocks:
            carry[NEWEST + i] = max(carry[NEWEST + i], fact.time)
            carry[FIRST + i] = fact.time if carry[FIRST + i] == NONE else min(carry[FIRST + i], fact.time)
        for i in range(len(LASTS)):
            value = fact.lasts[i]
            if value is not None:
                start = LASTS_AT + LAST_WIDTH * i
                carry[start : start + LAST_WIDTH] = [value, *fact.order]
        if fact.row[KIND] == PROFILE:
            row = fact.row
            carry[PROFILE_AT : PROFILE_AT + 8] = [row[TIME], row[OFFSET], row[VALUE], row[LEVEL], *row[LEVEL + 1 : LEVEL + 5]]
    for i, attribute in enumerate(DAY_ATTRIBUTES):
        seen = {fact.values[attribute] for fact in left} - {None}
        if seen:
            carry[DAYS_AT + 2 * i] = len(seen)
            carry[DAYS_AT + 2 * i + 1] = max(day for day in seen if day is not None)
    return carry


assert len(ATTRIBUTES) >= len(DAY_ATTRIBUTES)
assert len(CLOCKS) == FIRST - NEWEST
