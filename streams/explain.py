"""Why a customer was scored so then: the vector rebuilt at the stored cut, judged by that very model, and the facts that mattered."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from features.catalog import LAYOUT_HASH, NAMES
from features.facts import KIND, KINDS, NONE, OFFSET, PROFILE, SILENCE, SOURCES, TIME, TOPICS, VALUE
from features.history import Histories, vectors
from features.store import Offsets
from proto.errors import ArtifactRejected, BadUsage, ChurnError
from proto.scores import BANDS
from streams.codec import Decoder, RawMessage
from streams.emitted import Outputs
from streams.log import Log
from streams.merge import merge_keys, order, placed
from streams.rerun import Topics
from streams.scores import Model, judged, vector_hashes

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

MOST_TRIED: Final = 400
"""Facts left out one at a time, the newest first; older ones are not weighed."""
AHEAD: Final = 100_000
"""Score records behind that of a customer's event in which its scores at ticks are looked for."""
LOOKED_AT: Final = 50
"""Events of a customer tried, from the asked time backwards, until one has a score of that time."""
_ID: Final = re.compile(r"(.+)-(\d+)-(\d+)")
_KIND: Final = {code: name for name, code in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a customer: kept facts in order, and the carry of those that left. source: where it was read."""

    facts: IntArray
    carry: IntArray | None
    source: str


@dataclass(frozen=True, slots=True)
class View:
    """A customer as of an instant. vector: at that instant, of these facts and the carry; score: its last score then, None in a
    corrected view of a customer that had none."""

    at: int
    facts: IntArray
    vector: FloatArray
    source: str
    score: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """A score of the past made again. problems: what is not as it was; empty when everything was rebuilt bit for bit."""

    score: Mapping[str, Any]
    source: str
    problems: Sequence[str]
    features: Sequence[str]  # names of those whose value is another one now, as far as the score tells
    reasons: Sequence[Mapping[str, Any]]
    timeline: Sequence[Mapping[str, Any]]
    weighed: int  # facts left out one at a time

    @property
    def proven(self) -> bool:
        """Whether vector, probability, band and reasons are the emitted ones."""
        return not self.problems


@dataclass(slots=True)
class Explainer:
    """Explains scores of one deployment. stored: what the store holds of a customer of a partition, None when it does not answer."""

    log: Log
    topics: Topics
    decoder: Decoder
    models: Callable[[str], Model]
    fallback: Model
    partitions: int
    stored: Callable[[int, str], Known | None] = lambda _partition, _customer: None
    top: int = 10

    def score(self, score_id: str) -> dict[str, Any]:
        """The emitted score of this id. Raises BadUsage when it is none, or there is none (any more)."""
        found = _ID.fullmatch(score_id)
        if found is None or found[1] not in SOURCES or int(found[2]) >= self.partitions:
            raise BadUsage(f"score id {score_id}: looks like transactions-2-8123 (topic, partition, offset of the event)")
        topic, partition, offset = found[1], int(found[2]), int(found[3])
        # Cuts say where a record's score lies, not where a tick's does.
        emitted = self._at(partition, topic, offset) if topic in TOPICS else None
        emitted = emitted or self._anywhere(partition, score_id)
        if emitted is None:
            low = self.log.ends(self.topics.scores, partition)[0]
            why = f"; scores before offset {low} of {self.topics.scores}[{partition}] were deleted by retention" if low else ""
            raise BadUsage(f"score {score_id} is not on {self.topics.scores}[{partition}]: its event was no new fact, or has no score{why}")
        return emitted

    def record(self, partition: int, place: int, end: int) -> dict[str, Any] | None:
        """The first score record at or behind a place."""
        pieces = self.log.read(self.topics.scores, partition, place, end)
        piece = next(pieces, None)
        del pieces  # ends the read
        if piece is None:
            return None
        emitted: dict[str, Any] = orjson.loads(piece[0].value() or b"{}")
        return emitted

    def latest(self, customer: str, partition: int, at_ms: int) -> dict[str, Any]:
        """The score of the customer's newest event by this instant, or one at a tick after it. Raises BadUsage when there was none.

        Ticks are looked for in the AHEAD records behind the event's score.
        """
        for facts in self._events(partition, customer):
            for row in facts[facts[:, TIME] <= at_ms][::-1][:LOOKED_AT].tolist():
                emitted = self._at(partition, TOPICS[row[KIND] >> 3], row[OFFSET])
                if emitted is not None and emitted["customer_id"] == customer and emitted["at"] <= at_ms:
                    return self._tick_after(partition, emitted, at_ms) or emitted
        raise BadUsage(f"customer {customer!r} has no score at or before {at_ms} ms that could be found")

    def explain(self, score: Mapping[str, Any]) -> Explanation:
        """Make an emitted score again. Never raises because history is not what it was: that is a finding."""
        customer = score["customer_id"]
        if score["layout_hash"] != LAYOUT_HASH:
            return Explanation(
                score, "", [f"scored under another catalog ({score['layout_hash']}): use the version of that time"], [], [], [], 0
            )
        best = self._known(score)
        if best is None:
            return Explanation(score, "", [f"no fact of customer {customer!r} up to the cut is there any more"], [], [], [], 0)
        return self._judge(score, *best)

    def known_then(self, customer: str, partition: int, at_ms: int) -> View:
        """The customer at an instant, from the facts that had been handled when it was scored last before it (that score's cut).

        Raises BadUsage without a score by then, ChurnError when the facts of that score are not what they were.
        """
        score = self.latest(customer, partition, at_ms)
        best = self._known(score)
        if best is None or vector_hashes(best[1][None])[0] != score["vector_hash"]:
            raise ChurnError(f"what was known at {score['score_id']} cannot be told: history was altered, compacted or deleted since")
        known = best[0]
        return View(at_ms, known.facts, vectors(known.facts, known.carry, at_ms), known.source, score)

    def corrected(self, customer: str, partition: int, at_ms: int) -> View:
        """The customer at an instant from all that is known of it by now: late facts are where they belong.

        Raises BadUsage when nothing is known of it up to then.
        """
        try:
            score = self.latest(customer, partition, at_ms)
        except BadUsage:
            score = None
        known = self.stored(partition, customer)
        if known is None or not len(known.facts) or known.facts[:, TIME].max() > at_ms:
            # What the state has folded into the carry may have happened after the instant: told again up to it.
            parts = [(index, rows[rows[:, TIME] <= at_ms]) for index, rows in self._of(partition, customer, None)]
            parts = [(index, rows) for index, rows in parts if len(rows)]
            if not parts:
                raise BadUsage(f"nothing is known of customer {customer!r} at or before {at_ms} ms")
            # In the recorded order where there is one: what was refused as too late then is no part of what is known.
            plan = self._plan(partition, customer)
            known = self._stepped(customer, parts, _planned(parts, plan) if len(plan) else _merged(parts), "topics")
        return View(at_ms, known.facts, vectors(known.facts, known.carry, at_ms), known.source, score)

    def _known(self, score: Mapping[str, Any]) -> tuple[Known, FloatArray] | None:
        """What was known at the cut of a score, and the vector of it: the one that was scored, unless history was changed."""
        customer, partition, at = score["customer_id"], score["source"]["partition"], score["at"]
        cut = {name: score["cut"].get(name, -1) for name in TOPICS}
        best: tuple[Known, FloatArray] | None = None
        for known in self._sources(partition, customer, score):
            facts = _until(known.facts, cut)
            if len(facts) and facts[:, TIME].max() <= at:
                vector = vectors(facts, known.carry, at)
                best = Known(facts, known.carry, known.source), vector
                if vector_hashes(vector[None])[0] == score["vector_hash"]:
                    break
        return best

    def _judge(self, score: Mapping[str, Any], known: Known, vector: FloatArray) -> Explanation:
        problems, apart = [], _other_values(score, vector)
        found_hash = vector_hashes(vector[None])[0]
        if found_hash != score["vector_hash"]:
            problems.append(
                f"history was altered, compacted or deleted: up to the cut it gives vector {found_hash}, scored was {score['vector_hash']}"
            )
        try:
            model = self.models(score["model_digest"])
        except ArtifactRejected as error:
            return Explanation(score, known.source, [*problems, str(error)], apart, score["reasons"], [], 0)
        probability, band = judged(model, self.fallback, vector[None])
        if float(probability[0]) != score["probability"] and not problems:
            problems.append(f"the model gives {float(probability[0])!r}, emitted was {score['probability']!r}")
        if BANDS[int(band[0])] != score["band"] and not problems:
            problems.append(f"the band is {BANDS[int(band[0])]}, emitted was {score['band']}")
        # Asked as for a customer whose band has moved: live, a low one that has not is not explained.
        moved = np.array([1 + int(band[0]) % 3], np.uint8)
        reasons = orjson.loads(model.reasons(vector[None], band, moved, max(self.top, len(score["reasons"])))[0])
        if not problems and score["reasons"] != reasons[: len(score["reasons"])]:
            problems.append("the reasons are not the emitted ones")
        timeline, weighed = ([], 0) if problems else self._timeline(model, known, score["at"], float(probability[0]))
        return Explanation(score, known.source, problems, apart, reasons, timeline, weighed)

    def _timeline(self, model: Model, known: Known, at: int, probability: float) -> tuple[list[dict[str, Any]], int]:
        """The facts whose absence moves the probability most, in the order in which they happened."""
        facts = known.facts
        tried = range(max(0, len(facts) - MOST_TRIED), len(facts))
        without = np.stack([vectors(np.delete(facts, i, axis=0), known.carry, at) for i in tried])
        effects = probability - model.score(without).astype(np.float64)
        chosen = [i for i in np.argsort(-np.abs(effects), kind="stable")[: self.top].tolist() if effects[i]]
        return [_fact(facts[tried[i]].tolist(), float(effects[i])) for i in sorted(chosen)], len(tried)

    # -- where history is

    def _events(self, partition: int, customer: str) -> Iterator[IntArray]:
        """Facts that may have a score, in the order of their time: the kept ones first, then all of the topics."""
        stored = self.stored(partition, customer)
        if stored is not None:
            yield _by_time(stored.facts)
        records = list(self._of(partition, customer, None))
        if records:
            yield _by_time(np.concatenate([rows for _, rows in records]))

    def _sources(self, partition: int, customer: str, score: Mapping[str, Any]) -> Iterator[Known]:
        """What is known of a customer, the cheapest first. Whether it is what was known then, only the hash of the vector can say."""
        stored = self.stored(partition, customer)
        if stored is not None:
            yield stored
        records = list(self._of(partition, customer, score))
        if not records:
            return
        yield self._stepped(customer, records, _merged(records), "topics")
        plan = self._plan(partition, customer)
        if len(plan):
            yield self._stepped(customer, records, _planned(records, plan), "topics, in the recorded order")

    def _of(self, partition: int, customer: str, score: Mapping[str, Any] | None) -> Iterator[tuple[int, IntArray]]:
        """(topic index, accepted facts) of the customer, up to the cut of the score."""
        key = customer.encode("utf-8", "surrogatepass")
        for index, topic in enumerate(self.topics.inputs):
            low, high = self.log.ends(topic, partition)
            if score is not None:
                high = min(high, score["cut"].get(TOPICS[index], -1) + 1)
            mine = [message for piece in self.log.read(topic, partition, low, high) for message in piece if message.key() == key]
            if mine:
                records = self.decoder.decode(index, partition, mine)
                facts = records.facts[records.reason == 0]
                if len(facts):
                    yield index, facts

    def _stepped(self, customer: str, records: Sequence[tuple[int, IntArray]], ranks: npt.NDArray[np.intp], source: str) -> Known:
        facts = np.concatenate([rows for _, rows in records])[ranks]
        histories = Histories(create=True)
        histories.step([customer] * len(facts), facts)
        return Known(histories.facts(customer), histories.carry(customer), source)

    def _plan(self, partition: int, customer: str) -> IntArray:
        """The cuts of all outputs of a customer, in their order."""
        key = customer.encode("utf-8", "surrogatepass")
        t = self.topics
        outputs = Outputs(_OfKey(self.log, key), t.scores, t.dead_letters, t.alerts, partition)
        outputs.look()
        pieces = [piece.plan for piece in outputs.after(dict.fromkeys(TOPICS, -1))]
        return np.concatenate(pieces) if pieces else np.empty((0, len(TOPICS) + 1), np.int64)

    # -- where the score is

    def _tick_after(self, partition: int, score: Mapping[str, Any], at_ms: int) -> dict[str, Any] | None:
        """The last score of the same customer at a tick up to an instant, behind a score and not behind another event of it."""
        key = score["customer_id"].encode("utf-8", "surrogatepass")
        begin, end = self._place(partition, score["source"]["topic"], score["source"]["offset"])
        found: dict[str, Any] | None = None
        for piece in self.log.read(self.topics.scores, partition, begin, min(end, begin + AHEAD)):
            for message in piece:
                if message.key() == key:
                    emitted: dict[str, Any] = orjson.loads(message.value() or b"{}")
                    if emitted["cause"] == SOURCES[SILENCE] and score["at"] < emitted["at"] <= at_ms:
                        found = emitted
                    elif emitted["score_id"] != score["score_id"] and emitted["at"] > at_ms:
                        return found
        return found

    def _at(self, partition: int, topic: str, offset: int) -> dict[str, Any] | None:
        first, end = self._place(partition, topic, offset)
        emitted = self.record(partition, first, end)
        if emitted is None or (emitted["source"]["topic"], emitted["source"]["offset"]) != (topic, offset):
            return None
        return emitted

    def _place(self, partition: int, topic: str, offset: int) -> tuple[int, int]:
        """Where the score of a record has to lie, by halves, since cuts only grow along a partition; and the end."""
        first, end = self.log.ends(self.topics.scores, partition)
        last = end
        while first < last:
            middle = (first + last) // 2
            emitted = self.record(partition, middle, end)
            if emitted is None or emitted["cut"].get(topic, -1) >= offset:
                last = middle
            else:
                first = middle + 1
        return first, end

    def _anywhere(self, partition: int, score_id: str) -> dict[str, Any] | None:
        """By looking at all: after a store went back under two owners, cuts may not grow."""
        wanted = f'"score_id":"{score_id}"'.encode()
        low, high = self.log.ends(self.topics.scores, partition)
        for piece in self.log.read(self.topics.scores, partition, low, high):
            for message in piece:
                if wanted in (message.value() or b""):
                    emitted: dict[str, Any] = orjson.loads(message.value() or b"{}")
                    return emitted
        return None


@dataclass(frozen=True, slots=True)
class _OfKey:
    """A log of which only the records of one key are seen."""

    log: Log
    key: bytes

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        return self.log.ends(topic, partition)

    def read(self, topic: str, partition: int, start: int, stop: int) -> Generator[list[RawMessage], None, None]:
        for piece in self.log.read(topic, partition, start, stop):
            mine = [message for message in piece if message.key() == self.key]
            if mine:
                yield mine


def _by_time(facts: IntArray) -> IntArray:
    events = facts[facts[:, KIND] != PROFILE]
    found: IntArray = events[np.lexsort((events[:, OFFSET], events[:, KIND], events[:, TIME]))]
    return found


def _until(facts: IntArray, cut: Offsets) -> IntArray:
    highest = np.array([cut[name] for name in TOPICS], np.int64)
    known: IntArray = facts[facts[:, OFFSET] <= highest[facts[:, KIND] >> 3]]
    return known


def _columns(records: Sequence[tuple[int, IntArray]]) -> tuple[IntArray, IntArray]:
    """Topic index and offset of all records."""
    topics = np.concatenate([np.full(len(rows), index, np.int64) for index, rows in records])
    return topics, np.concatenate([rows[:, OFFSET] for _, rows in records])


def _keys(records: Sequence[tuple[int, IntArray]]) -> IntArray:
    return np.concatenate([merge_keys(rows[:, TIME], np.ones(len(rows), np.bool_)) for _, rows in records])


def _merged(records: Sequence[tuple[int, IntArray]]) -> npt.NDArray[np.intp]:
    topics, offsets = _columns(records)
    return order(_keys(records), topics, offsets)


def _planned(records: Sequence[tuple[int, IntArray]], plan: IntArray) -> npt.NDArray[np.intp]:
    topics, offsets = _columns(records)
    place, emitted = placed(plan, topics, offsets)
    return np.lexsort((offsets, topics, _keys(records), topics == PROFILE >> 3, emitted, place))


def _other_values(score: Mapping[str, Any], vector: FloatArray) -> list[str]:
    """Features named in the emitted reasons whose value is another one in this vector."""
    names = []
    for reason in score["reasons"]:
        value = float(vector[NAMES.index(reason["feature"])])
        if reason["value"] != (None if np.isnan(value) else value):
            names.append(reason["feature"])
    return names


def _fact(row: Sequence[int], effect: float) -> dict[str, Any]:
    return {
        "time": row[TIME],
        "kind": _KIND[row[KIND]],
        "value": None if row[VALUE] == NONE else row[VALUE],
        "topic": TOPICS[row[KIND] >> 3],
        "offset": row[OFFSET],
        "effect": effect,
    }
