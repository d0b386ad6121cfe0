"""Lookups: each method of the contract as one function from a request to its answer; gRPC and REST call the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from math import isnan
from typing import Any, Final

import numpy as np
import orjson

from features.carry import BASE
from features.catalog import CATALOG, LAYOUT_HASH, NAMES, Op
from features.facts import KIND, KINDS, NONE, OFFSET, TIME, TOPICS, VALUE, YEAR_2000_MS
from features.state import decode
from proto.churn.v1 import churn_pb2 as pb
from scoring.counterfactual import Action, search
from scoring.explanation import ExplainingScorer, Part
from scoring.whatif import what_if
from streams.codec import Decoder
from streams.freshness import Freshness
from streams.past_facts import PastFacts
from streams.refusal import Code, Refusal, wrong
from streams.scores import Model, judged, vector_hashes
from streams.state_reader import Found, StateReader

LATEST_MS: Final = 4_102_444_800_000
"""2100: later instants are a mistake of unit."""
LONGEST_ID: Final = 256
POLL_S: Final = 0.02
"""How often state is read again while a demand is not met."""
BEFORE_THE_END_S: Final = 0.05
"""So long before a call's deadline waiting ends, so that the refusal says why."""
PAGE: Final = 100
DAYS: Final = 7
MOST_DAYS: Final = 90
_CONSENT: Final = NAMES.index("consent_given")
_OPEN_TICKETS: Final = next(i for i, feature in enumerate(CATALOG) if feature.op == Op.OPEN_TICKETS)
_KIND: Final = {code: name for name, code in KINDS.items()}
_BANDS: Final = (pb.BAND_UNKNOWN, pb.BAND_LOW, pb.BAND_MEDIUM, pb.BAND_HIGH)


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler knows of a call beside the request. ends_s: on the loop's clock."""

    ends_s: float

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.ends_s - asyncio.get_running_loop().time()


class Lookups:
    """The handlers. clock_ms: the wall clock, for ages. exponent: decimals of the account currency."""

    def __init__(
        self,
        reader: StateReader,
        freshness: Freshness,
        decoder: Decoder,
        model: Callable[[], Model],
        fallback: Model,
        past: PastFacts,
        clock_ms: Callable[[], int],
        *,
        stale_ms: int,
        max_batch: int,
        exponent: int,
    ) -> None:
        self._reader, self._freshness, self._decoder, self._past = reader, freshness, decoder, past
        self._model, self._fallback, self._clock_ms = model, fallback, clock_ms
        self._stale_ms, self._max_batch, self._exponent = stale_ms, max_batch, exponent
        self._pool = ThreadPoolExecutor(1, "explain")  # what takes milliseconds does not hold up plain lookups
        self.methods: Mapping[str, Callable[[Any, Call], Awaitable[Any]]] = {
            "GetScore": self.get_score,
            "BatchGetScores": self.batch_get_scores,
            "GetFeatures": self.get_features,
            "Explain": self.explain,
            "WhatIf": self.what_if,
            "Counterfactual": self.counterfactual,
            "ListHistory": self.list_history,
            "ScoreHistory": self.score_history,
        }

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)
        self._reader.close()

    # -- methods

    async def get_score(self, request: pb.GetScoreRequest, call: Call) -> pb.GetScoreResponse:
        """One customer."""
        found = (await self._read([request.customer_id], _instant(request), request.demand, call))[0]
        return pb.GetScoreResponse(score=self._score(found))

    async def batch_get_scores(self, request: pb.BatchGetScoresRequest, call: Call) -> pb.BatchGetScoresResponse:
        """Several customers, in the order asked; one that comes twice is answered twice."""
        if not request.customer_ids:
            raise wrong("customer_ids", "needs one customer or more")
        self._bounded("customer_ids", len(request.customer_ids))
        found = await self._read(list(request.customer_ids), _instant(request), request.demand, call)
        return pb.BatchGetScoresResponse(scores=[self._score(one) for one in found])

    async def get_features(self, request: pb.GetFeaturesRequest, call: Call) -> pb.GetFeaturesResponse:
        """Every feature at any time, of all that is known today or of what was known at a cut."""
        at_ms = _instant(request)
        found = (await self._read([request.customer_id], at_ms, request.demand, call))[0]
        cut = dict(request.cut)
        for topic, offset in cut.items():
            if topic not in TOPICS or offset < -1:
                raise wrong("cut", f"{topic}: {offset}; needs offsets by topic ({', '.join(TOPICS)}), -1 = none")
        vector, at, source = found.vector, found.at_ms, "state"
        if cut or (at_ms is not None and at_ms < at):
            at = at if at_ms is None else at_ms
            vector, source = await self._aside(self._past.vector, found.customer, found.seen.partition, found.state, at, cut or None)
        model, bound = found.model, self._bound(found)
        text = model.text if isinstance(model, ExplainingScorer) else _plain_text
        answer = pb.GetFeaturesResponse(
            customer_id=found.customer,
            status=self._status(found, bound),
            at_ms=at,
            vector_hash=vector_hashes(vector[None])[0],
            layout_hash=LAYOUT_HASH,
            freshness=_fresh(found, bound),
            source=source,
        )
        answer.features.extend(
            pb.FeatureValue(name=name, value=None if isnan(value) else value, text=text(i, value))
            for i, (name, value) in enumerate(zip(NAMES, vector.tolist(), strict=True))
        )
        return answer

    async def explain(self, request: pb.ExplainRequest, call: Call) -> pb.ExplainResponse:
        """The whole explanation. Refused while there is no model, and for a customer nothing is known of."""
        found = (await self._read([request.customer_id], _instant(request), request.demand, call))[0]
        model = self._explains(found)
        made = (await self._aside(model.complete, found.vector[None]))[0]
        return pb.ExplainResponse(
            score=self._score(found), contributions=map(_contribution, made.parts), bias=made.bias, margin=made.margin, method=made.method
        )

    async def what_if(self, request: pb.WhatIfRequest, call: Call) -> pb.WhatIfResponse:
        """The score without and with further events, at the same instant."""
        self._bounded("events", len(request.events))
        found = (await self._read([request.customer_id], _instant(request), request.demand, call))[0]
        facts = self._facts(request.events, found.at_ms)
        made = await self._aside(what_if, found.state, facts, found.at_ms)
        vectors = np.stack([made.before, made.after])
        probability, band = judged(found.model, self._fallback, vectors)
        answer = pb.WhatIfResponse(outcomes=[outcome.name.lower() for outcome in made.outcomes])
        for part, row in ((answer.before, 0), (answer.after, 1)):
            part.CopyFrom(self._score_of(found, made.at_ms, float(probability[row]), int(band[row]), vectors[row], hypothetical=row == 1))
        if isinstance(found.model, ExplainingScorer):
            answer.changes.extend(map(_contribution, found.model.moved(made.before, made.after)))
        return answer

    async def counterfactual(self, request: pb.CounterfactualRequest, call: Call) -> pb.CounterfactualResponse:
        """Plans of events after which the stream would score the customer below a threshold."""
        days = request.days if request.HasField("days") else DAYS
        if not 1 <= days <= MOST_DAYS:
            raise wrong("days", f"needs 1 to {MOST_DAYS}")
        if request.HasField("below") and not 0 < request.below <= 1:
            raise wrong("below", "needs a probability above 0")
        found = (await self._read([request.customer_id], _instant(request), request.demand, call))[0]
        model = self._explains(found)
        assert found.state is not None
        edges = [edge for edge in model.edges if edge <= found.probability]
        below = request.below if request.HasField("below") else (edges or [found.probability])[-1]
        answer = pb.CounterfactualResponse(score=self._score(found), below=below)
        if found.probability < below or not (edges or request.HasField("below")):
            return answer
        events = self._possible(found)
        actions = [Action(name, self._facts([event], found.at_ms)[0], counts, effort) for name, (event, counts, effort) in events.items()]

        def scored(vectors: Any) -> Any:
            return judged(model, self._fallback, vectors)[0]

        made = await self._aside(partial(search, found.state, actions, scored, at_ms=found.at_ms, days=days, below=below))
        answer.tried = made.tried
        for plan in made.plans:
            steps = [(events[action.name][0], time) for action, time in plan.steps]
            text = ", ".join(f"{number} x {name}" if number > 1 else name for name, number in plan.counts.items())
            one = pb.Plan(
                text=f"{text}, within {days} days",
                probability=plan.probability,
                band=_BANDS[int(model.bands(np.array([plan.probability], np.float32))[0])],
                at_ms=plan.steps[-1][1],
            )
            for event, time in steps:
                copy = one.events.add()
                copy.CopyFrom(event)
                copy.event_time_ms = time
            answer.plans.append(one)
        return answer

    def _possible(self, found: Found) -> dict[str, tuple[pb.Event, tuple[int, ...], float]]:
        """Events somebody can bring about: by what is said of them, how often, and the effort of one."""
        assert found.state is not None
        facts = decode(found.state, found.customer).facts
        possible: dict[str, tuple[pb.Event, tuple[int, ...], float]] = {}
        if found.vector[_OPEN_TICKETS] > 0:
            possible["resolve the open ticket"] = (pb.Event(kind="resolved"), (1,), 1.0)
        possible["a log-in"] = (pb.Event(kind="login"), (1, 2, 4, 7), 1.0)
        possible["a feature used"] = (pb.Event(kind="feature_use"), (2, 5), 1.0)
        possible["a rating of 5 of 5"] = (pb.Event(kind="satisfaction", csat=5), (1,), 2.0)
        paid = facts[(facts[:, KIND] == KINDS["payment"]) & (facts[:, VALUE] != NONE), VALUE]
        if len(paid):
            amount = str(Decimal(int(np.sort(paid)[len(paid) // 2])).scaleb(-self._exponent))
            possible["a purchase as usual"] = (pb.Event(kind="payment", amount=amount), (1, 2), 3.0)
        return possible

    async def list_history(self, request: pb.ListHistoryRequest, call: Call) -> pb.ListHistoryResponse:
        """The kept facts, newest first."""
        if request.limit < 0:
            raise wrong("limit", "must not be negative")
        self._bounded("limit", request.limit)
        before = request.before_ms if request.HasField("before_ms") else None
        found = (await self._read([request.customer_id], None, request.demand, call))[0]
        bound = self._bound(found)
        answer = pb.ListHistoryResponse(customer_id=found.customer, status=self._status(found, bound), freshness=_fresh(found, bound))
        if found.state is not None:
            known = decode(found.state, found.customer)
            rows = known.facts[::-1]
            if before is not None:
                rows = rows[rows[:, TIME] < before]
            answer.kept_facts, answer.left_facts = len(known.facts), int(known.carry[BASE])
            answer.facts.extend(_fact(row) for row in rows[: request.limit or PAGE].tolist())
        return answer

    async def score_history(self, request: pb.ScoreHistoryRequest, call: Call) -> pb.ScoreHistoryResponse:
        """A history brought along; the model is the one in force."""
        if not request.events:
            raise wrong("events", "needs one event or more")
        self._bounded("events", len(request.events))
        at_ms = _instant(request)
        times = [event.event_time_ms for event in request.events if event.HasField("event_time_ms")]
        facts = self._facts(request.events, max(times) if times else self._clock_ms())
        made = await self._aside(what_if, None, facts, at_ms or 0)
        model = self._model()
        probability, band = judged(model, self._fallback, made.after[None])
        score = pb.Score(
            status=pb.STATUS_KNOWN,
            at_ms=made.at_ms,
            probability=float(probability[0]),
            band=_BANDS[int(band[0])],
            fallback=not int(band[0]),
            vector_hash=vector_hashes(made.after[None])[0],
            model=_model(model),
        )
        answer = pb.ScoreHistoryResponse(score=score, outcomes=[outcome.name.lower() for outcome in made.outcomes])
        if isinstance(model, ExplainingScorer):
            answer.contributions.extend(map(_contribution, model.complete(made.after[None])[0].parts))
        return answer

    # -- reading

    async def _read(self, customers: Sequence[str], at_ms: int | None, demand: pb.Demand, call: Call) -> list[Found]:
        """State that meets the demand, waited for until the call's deadline is near."""
        for customer in customers:
            if not customer or len(customer) > LONGEST_ID:
                raise wrong("customer_id", f"needs 1 to {LONGEST_ID} characters")
        _check_demand(demand)
        while True:
            found = await self._reader.read(customers, at_ms)
            lacking = self._lacking(found, demand)
            if lacking is None:
                return found
            if call.left_s() < BEFORE_THE_END_S + POLL_S:
                raise lacking
            await asyncio.sleep(POLL_S)

    def _lacking(self, found: Sequence[Found], demand: pb.Demand) -> Refusal | None:
        if demand.HasField("max_age_ms"):
            now = self._clock_ms()
            for one in found:
                bound = self._freshness.bound(one.seen.partition, one.seen.applied, now)
                if bound is None or bound > demand.max_age_ms:
                    return Refusal(
                        Code.FAILED_PRECONDITION,
                        "TOO_OLD",
                        f"the state of partition {one.seen.partition} may be {'any time' if bound is None else f'{bound} ms'} old, "
                        f"{demand.max_age_ms} ms were demanded: is a worker running?",
                        details={"staleness_ms": "" if bound is None else str(bound), "partition": str(one.seen.partition)},
                    )
        for topic, offset in demand.min_offset.items():
            for one in found:
                if one.seen.applied[topic] < offset:
                    return Refusal(
                        Code.FAILED_PRECONDITION,
                        "NOT_YET_APPLIED",
                        f"{topic}[{one.seen.partition}] is applied up to offset {one.seen.applied[topic]}, {offset} was demanded",
                        details={"topic": topic, "partition": str(one.seen.partition), "applied": str(one.seen.applied[topic])},
                    )
        return None

    async def _aside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run what takes milliseconds in a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def _bounded(self, field: str, count: int) -> None:
        if count > self._max_batch:
            raise wrong(field, f"{count} are more than the {self._max_batch} of one call")

    def _facts(self, events: Sequence[pb.Event], at_ms: int) -> Any:
        """Events as facts (n, WIDTH) by the decoder of the stream. Raises Refusal with the dead letter's reason for one it would refuse."""
        rows = []
        for i, event in enumerate(events):
            if event.kind not in KINDS:
                raise wrong(f"events[{i}].kind", f"{event.kind!r} is none of {', '.join(KINDS)}")
            body = {field.name: value for field, value in event.ListFields() if field.name != "event_time_ms"}
            when = event.event_time_ms if event.HasField("event_time_ms") else at_ms
            body |= {"event_id": f"what-if-{i}", "customer_id": "what-if", "event_time": when}
            records = self._decoder.decode(KINDS[event.kind] >> 3, 0, [_Message(orjson.dumps(body), i)])
            if records.reason[0]:
                raise wrong(f"events[{i}]", records.detail.get(0, "refused"))
            rows.append(records.facts[0])
        return np.stack(rows) if rows else np.empty((0, 10), np.int64)

    def _explains(self, found: Found) -> ExplainingScorer:
        if not isinstance(found.model, ExplainingScorer):
            raise Refusal(Code.FAILED_PRECONDITION, "NO_MODEL", "no model is published yet, so there is nothing to explain")
        if found.state is None:
            raise Refusal(Code.NOT_FOUND, "UNKNOWN_CUSTOMER", "nothing is stored of this customer")
        return found.model

    # -- answers

    def _bound(self, found: Found) -> int | None:
        return self._freshness.bound(found.seen.partition, found.seen.applied, self._clock_ms())

    def _status(self, found: Found, bound: int | None) -> pb.Status:
        if found.state is None and not found.seen.rebuilding:
            return pb.STATUS_UNKNOWN
        if found.seen.rebuilding or bound is None or bound > self._stale_ms:
            return pb.STATUS_STALE
        if found.last is None:
            return pb.STATUS_NEW
        return pb.STATUS_NO_CONSENT if found.vector[_CONSENT] == 0.0 else pb.STATUS_KNOWN

    def _score(self, found: Found) -> pb.Score:
        return self._score_of(found, found.at_ms, found.probability, found.band, found.vector)

    def _score_of(self, found: Found, at_ms: int, probability: float, band: int, vector: Any, *, hypothetical: bool = False) -> pb.Score:
        scored = hypothetical or found.last is not None
        last, bound = found.last, self._bound(found)
        return pb.Score(
            customer_id=found.customer,
            status=self._status(found, bound),
            at_ms=at_ms,
            probability=probability if scored else None,
            band=_BANDS[band] if scored else pb.BAND_UNSPECIFIED,
            fallback=scored and not band,
            last=None
            if last is None
            else pb.LastScore(probability=last.probability, band=_BANDS[last.band], alert_band=_BANDS[last.alert_band], at_ms=last.at_ms),
            vector_hash=vector_hashes(vector[None])[0] if scored else "",
            model=_model(found.model),
            freshness=_fresh(found, bound),
        )


@dataclass(frozen=True, slots=True)
class _Message:
    """An event as the decoder takes it: a record without a broker's time, so that it may lie in the future."""

    body: bytes
    place: int

    def value(self) -> bytes | None:
        return self.body

    def key(self) -> bytes | None:
        return b"what-if"

    def offset(self) -> int:
        return self.place

    def timestamp(self) -> tuple[int, int]:
        return 0, -1


def _instant(request: Any) -> int | None:
    """The asked instant, None for now."""
    if not request.HasField("at_ms"):
        return None
    at: int = request.at_ms
    if not YEAR_2000_MS <= at <= LATEST_MS:
        raise wrong("at_ms", "needs epoch milliseconds between 2000 and 2100")
    return at


def _check_demand(demand: pb.Demand) -> None:
    if demand.HasField("max_age_ms") and demand.max_age_ms < 0:
        raise wrong("demand.max_age_ms", "must not be negative")
    for topic in demand.min_offset:
        if topic not in TOPICS:
            raise wrong("demand.min_offset", f"{topic!r} is none of {', '.join(TOPICS)}")


def _fresh(found: Found, bound: int | None) -> pb.Freshness:
    seen, newest = found.seen, found.newest_ms
    return pb.Freshness(
        newest_ms=newest,
        age_ms=None if newest is None else found.at_ms - newest,
        staleness_ms=bound,
        cut=seen.applied,
        partition=seen.partition,
        rebuilding=seen.rebuilding,
    )


def _model(model: Model) -> pb.Model:
    return pb.Model(
        name=model.name,
        version=model.version,
        digest=model.digest,
        threshold_version=model.threshold_version,
        layout_hash=LAYOUT_HASH,
    )


def _contribution(part: Part) -> pb.Contribution:
    return pb.Contribution(
        feature=part.feature, value=part.value, contribution=part.contribution, text=part.text, raises=part.contribution > 0
    )


def _fact(row: Sequence[int]) -> pb.Fact:
    value = None if row[VALUE] == NONE else row[VALUE]
    return pb.Fact(event_time_ms=row[TIME], kind=_KIND[row[KIND]], value=value, topic=TOPICS[row[KIND] >> 3], offset=row[OFFSET])


def _plain_text(feature: int, value: float) -> str:
    return f"{NAMES[feature].replace('_', ' ')}: {'unknown' if isnan(value) else f'{value:g}'}"
