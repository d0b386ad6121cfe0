"""Whether every output is what its inputs say: a range of the topics told again, each record compared with the emitted one as bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from features.catalog import LAYOUT_HASH, NAMES
from features.facts import KIND, OFFSET, SILENCE, SOURCES, TOPICS
from proto.errors import ArtifactRejected
from streams.emitted import LETTER, SCORE
from streams.evaluate import Rules, score, set_aside
from streams.feature_log import Logged
from streams.merge import TickStand
from streams.metrics import Parts
from streams.rerun import EVER, Rerun, Told
from streams.scores import Model, Scored, alert_records, score_records
from streams.silence import Attendance, place_of

IntArray = npt.NDArray[np.int64]

EXAMPLES: Final = 20
"""Differing records shown in full."""
MISSING, UNEXPECTED, MODEL_GONE = "missing", "unexpected", "model_gone"
"""Differences that are no field: a record that should be there, one that should not, one whose model cannot be had."""


@dataclass(slots=True)
class Skew:
    """What a comparison found. rows: score records looked at; vectors, dead_letters, alerts: and so many of these.

    differing: by kind of record, how many are not equal as bytes, not there, or not expected. by: how often each field of a score
    differs; features: how often each feature.
    """

    rows: int = 0
    vectors: int = 0
    dead_letters: int = 0
    alerts: int = 0
    handled: int = 0  # input records on the way
    models: Counter[str] = field(default_factory=Counter)
    by: Counter[str] = field(default_factory=Counter)
    features: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Skew) -> None:
        """Another partition's."""
        for name in ("rows", "vectors", "dead_letters", "alerts", "handled"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("models", "by", "features", "differing"):
            getattr(self, name).update(getattr(other, name))
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    @property
    def mismatches(self) -> int:
        """Records of all kinds that are not what they should be."""
        return self.differing.total()

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rows": self.rows,
            "mismatches": self.mismatches,
            "mismatches_by": dict(self.by.most_common()),
            "features": dict(self.features.most_common()),
            **{f"{kind}_differing": self.differing[kind] for kind in ("scores", "vectors", "dead_letters", "alerts")},
            "vectors": self.vectors,
            "dead_letters": self.dead_letters,
            "alerts": self.alerts,
            "records": self.handled,
            "models": len(self.models),
            "scores_by_model": dict(self.models),
            "layout_hash": LAYOUT_HASH,
            "examples": self.examples,
        }


def compare(rerun: Rerun, models: Callable[[str], Model], rules: Rules, logged: Logged | None = None, tick_ms: int = 0) -> Skew:
    """Tell a partition again and compare what it emits inside the span.

    models: by digest, "" the fallback; ArtifactRejected for one that cannot be had. rules: of the deployment whose outputs these are;
    tick_ms: its ticks, 0 when nobody is to be missed at them.
    """
    return _Comparison(rerun, models, rules, logged, rerun.parts, tick_ms).run()


@dataclass(slots=True)
class _Comparison:
    rerun: Rerun
    models: Callable[[str], Model]
    rules: Rules
    logged: Logged | None
    parts: Parts
    tick_ms: int
    found: Skew = field(default_factory=Skew)
    _attendance: Attendance | None = None
    _alerts: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def run(self) -> Skew:
        self._alerts = _alerts(self.rerun)
        self.rerun.tick_ms = self.tick_ms
        for told in self.rerun:
            self._silence(told)
            self._scores(told)
            self._dead_letters(told)
        self.found.handled = self.rerun.handled
        return self.found

    def _silence(self, told: Told) -> None:
        """Whether somebody was left out at a tick; asked only where everybody is in memory."""
        if not self.tick_ms or self.rerun.base.states or not len(told.batch):
            return
        block, silent = told.block, told.batch.topic[0] == SILENCE
        if self._attendance is None:
            if not silent or block is None:
                return
            first = int(block.at[0])
            # The first one of all is whole; one that the range begins in may have begun before it.
            begun = self.rerun.span.from_ms > -EVER
            before = TickStand(first, place_of(block.customer[0]) - 1) if begun else TickStand(first - self.tick_ms, 0)
            self._attendance = Attendance(self.tick_ms, self.rerun.histories, before)
        if silent and block is not None:
            for customer, at in self._attendance.missing(block):
                self._differs("silence_missing", None, {"score_id": f"silence of {customer} at {at}"})
        else:
            for customer, at in self._attendance.passed(told.time_ms):
                self._differs("silence_missing", None, {"score_id": f"silence of {customer} at {at}"})
            accepted = np.flatnonzero(told.batch.reason == 0).tolist()
            self._attendance.note([told.batch.customer[i] for i in accepted])

    # -- scores

    def _scores(self, told: Told) -> None:
        found, block = self.found, told.block
        there = told.place >= 0
        emitted = np.zeros(0 if block is None else len(block), np.bool_)
        if block is not None:
            emitted[_inside(told)] = True
            emitted &= block.kind == SCORE
            emitted[told.place[there]] = False
            for row in np.flatnonzero(emitted).tolist():
                self._differs(UNEXPECTED, block.record[row], None)
        for i in np.flatnonzero(~there).tolist():
            self._differs(MISSING, None, _named(told, i))
        found.rows += len(told.rows) + int(emitted.sum())
        if block is None:
            return
        if not there.all():
            told = told.pick(there)
        self._vectors(told)
        for run in _runs(block.model[told.place]):
            self._run(told.pick(run), str(block.model[told.place[run.start]]))
        self.rerun.restore(told)

    def _run(self, told: Told, digest: str) -> None:
        """Scores of one model: made again, encoded with the clock of each batch, compared."""
        block, batch = told.block, told.batch
        assert block is not None
        self.found.models[digest] += len(told.rows)
        try:
            model = self.models(digest)
        except ArtifactRejected:
            for row in told.place.tolist():
                self._differs(MODEL_GONE, block.record[row], None)
            return
        scored = score(
            self.rerun.histories,
            model,
            self.rules,
            told.customers,
            told.rows,
            told.at,
            told.late,
            told.vectors,
            told.sources,
            self.parts.part,
        )
        with self.parts.part("encode"):
            clocks = block.scored_at[told.place]
            records: list[dict[str, Any]] = []
            alerts: list[dict[str, Any]] = []
            for run in _runs(clocks):
                one = _some(scored, run)
                records += score_records(batch, model, int(clocks[run.start]), one)
                alerts += alert_records(batch, model, self.rules.hysteresis, int(clocks[run.start]), one)
        with self.parts.part("compare"):
            emitted = block.record[told.place].tolist()
            made = [record["value"] for record in records]
            if made != emitted:
                for i, (one, other) in enumerate(zip(made, emitted, strict=True)):
                    if one != other:
                        self._differs("", other, one, told.vectors[i])
            self._check_alerts(told, alerts)

    def _vectors(self, told: Told) -> None:
        if self.logged is None:
            return
        facts = told.batch.facts[told.rows]
        places = list(zip((facts[:, KIND] >> 3).tolist(), facts[:, OFFSET].tolist(), strict=True))
        cuts = told.batch.cuts()[told.rows]
        ahead = int(len(places) > 0 and places[-1][0] == SILENCE)  # the silent share the cut of the record before them
        known = self.logged.of(places, int(cuts[-1].sum()) + ahead if len(cuts) else -1)
        for i, vector in enumerate(known):
            if vector is not None:
                self.found.vectors += 1
                if vector != told.vectors[i].tobytes():
                    self.found.differing["vectors"] += 1
                    self.found.by["logged_vector"] += 1
                    self.found.features.update(_apart(np.frombuffer(vector, "<f4"), told.vectors[i]))

    def _differs(self, what: str, emitted: bytes | None, made: Any, vector: npt.NDArray[np.float32] | None = None) -> None:
        """Note one score that is not what it should be."""
        found = self.found
        found.differing["scores"] += 1
        example: dict[str, Any] = {}
        if what:
            found.by[what] += 1
            example = made if emitted is None else orjson.loads(emitted)
            example = {"score_id": example["score_id"], "differs": [what]}
        else:
            one, other = orjson.loads(emitted or b"{}"), orjson.loads(made)
            fields = [name for name in {**one, **other} if one.get(name) != other.get(name)] or ["encoding"]
            found.by.update(fields)
            if vector is not None and self.logged is None:
                found.features.update(_reasons_apart(one, vector))
            example = {
                "score_id": one.get("score_id"),
                "differs": fields,
                "emitted": {name: one.get(name) for name in fields},
                "found": {name: other.get(name) for name in fields},
            }
        if len(found.examples) < EXAMPLES:
            found.examples.append(example)

    # -- the others

    def _dead_letters(self, told: Told) -> None:
        found, block, batch = self.found, told.block, told.batch
        emitted: dict[tuple[int, int], bytes] = {}
        if block is not None:
            rows = _inside(told)
            rows = rows[block.kind[rows] == LETTER]
            places = zip(block.plan[rows, -1].tolist(), block.offset[rows].tolist(), strict=True)
            emitted = dict(zip(places, block.record[rows].tolist(), strict=True))
        for _, letter in set_aside(batch, told.outcome):
            source = orjson.loads(letter["value"])["source"]
            place = TOPICS.index(source["topic"]), source["offset"]
            if place in self.rerun.outputs.unplaced:
                continue
            found.dead_letters += 1
            found.differing["dead_letters"] += emitted.pop(place, None) != letter["value"]
        found.dead_letters += len(emitted)
        found.differing["dead_letters"] += len(emitted)

    def _check_alerts(self, told: Told, made: Sequence[Mapping[str, Any]]) -> None:
        found, facts = self.found, told.batch.facts[told.rows]
        expected = {}
        for record in made:
            source = orjson.loads(record["value"])["source"]
            expected[SOURCES.index(source["topic"]), source["offset"]] = record["value"]
        for place in zip((facts[:, KIND] >> 3).tolist(), facts[:, OFFSET].tolist(), strict=True) if self._alerts or expected else ():
            one, other = self._alerts.pop(place, None), expected.get(place)
            if one is not None or other is not None:
                found.alerts += 1
                found.differing["alerts"] += one != other


def _inside(told: Told) -> IntArray:
    """Rows of the block whose record lies in the stretch."""
    block, batch = told.block, told.batch
    assert block is not None
    inside = np.zeros(len(block), np.bool_)
    for index, name in enumerate(TOPICS):
        inside |= (block.plan[:, -1] == index) & (block.offset > batch.former[name]) & (block.offset <= batch.to[name])
    return np.flatnonzero(inside)


def _named(told: Told, i: int) -> dict[str, Any]:
    row = int(told.rows[i])
    topic = SOURCES[int(told.batch.topic[row])]
    return {"score_id": f"{topic}-{told.batch.partition}-{told.batch.offset[row]}"}


def _runs(values: npt.NDArray[Any]) -> Iterator[slice]:
    """Stretches of equal values."""
    if len(values):
        ends = [*(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
        first = 0
        for end in ends:
            yield slice(first, end)
            first = end


def _some(scored: Scored, run: slice) -> Scored:
    return Scored(**{name: getattr(scored, name)[run] for name in Scored.__dataclass_fields__})


def _alerts(rerun: Rerun) -> dict[tuple[int, int], bytes]:
    """All alerts of the partition by their source; the first wins."""
    source, topic = rerun.source, rerun.topics.alerts
    low, high = source.ends(topic, rerun.partition)
    found: dict[tuple[int, int], bytes] = {}
    for messages in source.read(topic, rerun.partition, low, high):
        for message in messages:
            value = message.value() or b"{}"
            at = orjson.loads(value)["source"]
            found.setdefault((SOURCES.index(at["topic"]), at["offset"]), value)
    return found


def _apart(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> list[str]:
    """Names of the features that are not equal bit for bit."""
    return [NAMES[i] for i in np.flatnonzero(one.view(np.uint32) != other.view(np.uint32)).tolist()]


def _reasons_apart(emitted: Mapping[str, Any], vector: npt.NDArray[np.float32]) -> list[str]:
    """Without a feature log: those of the emitted reasons whose value is another one now."""
    names = []
    for reason in emitted.get("reasons", ()):
        if reason["feature"] in NAMES:
            value = float(vector[NAMES.index(reason["feature"])])
            told = reason["value"]
            if (told is None) != bool(np.isnan(value)) or (told is not None and np.float32(told) != np.float32(value)):
                names.append(reason["feature"])
    return names
