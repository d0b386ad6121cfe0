"""The drift watch without Kafka and Faust: messages in, verdicts out; all it knows can be stored and taken up again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Literal
from zlib import crc32

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from drift.baseline import Baseline
from drift.budget import Budget
from drift.cause import Cause, explain, pages
from drift.coverage import Coverage
from drift.monitor import Finding, Monitor
from drift.policy import Episode, Pager
from drift.quality import Fault, Normal, Watch
from drift.series import BINS, Tally
from drift.sources import WATCHED
from features.facts import ID, TIME, TOPICS
from features.window import DAY_MS
from proto.drift import SCHEMA_VERSION
from proto.errors import BadInput
from streams.codec import Decoder, RawMessage
from streams.drift_state import pack, unpack
from streams.emitted import first_wins
from streams.feature_log import read as read_features

SCORES: Final = len(TOPICS)
FEATURES: Final = SCORES + 1
"""Source indices behind those of the inputs."""
REMEMBERED: Final = 200_000
"""Event ids per topic among which a repetition is recognised."""
TOLD: Final = 20
UPDATE_MS: Final = DAY_MS
"""An open episode is updated once in so long."""
ACTIONS: Final[Mapping[str, str]] = {"breakage": "repair-upstream", "behaviour": "review-and-retrain", "unexplained": "look"}
Kind = Literal["page", "update", "over"]


class _Source(msgspec.Struct, gc=False):
    topic: str
    offset: int


class _Score(msgspec.Struct, gc=False):
    source: _Source
    customer_id: str
    at: int
    probability: float
    fallback: bool


@dataclass(frozen=True, slots=True)
class Reference:
    """What is normal in a deployment: of scores (and features, where they are logged) and of the raw records."""

    baseline: Baseline
    normal: Normal
    segment_field: str
    share: float  # of customers looked at

    @property
    def features(self) -> bool:
        """Whether features are watched, not only the score."""
        return len(self.baseline.series) > 1

    @property
    def digest(self) -> str:
        """Which baseline this is."""
        return blake2b(self.to_bytes(), digest_size=16).hexdigest()

    def to_bytes(self) -> bytes:
        """One record; `from_bytes` reads it."""
        arrays = {f"normal_{name}": value for name, value in self.normal.arrays().items()}
        plain = {"segment_field": self.segment_field, "share": self.share}
        return pack(plain, {**arrays, "baseline": np.frombuffer(self.baseline.to_bytes(), np.uint8)})

    @staticmethod
    def from_bytes(data: bytes) -> Reference:
        """Raises BadInput."""
        plain, arrays = unpack(data)
        try:
            base = Baseline.from_bytes(arrays["baseline"].tobytes())
            normal = {name.removeprefix("normal_"): value for name, value in arrays.items()}
            return Reference(base, Normal.of(normal, base.segments), plain["segment_field"], plain["share"])
        except KeyError as error:
            raise BadInput(f"the drift baseline lacks {error}; make one with `churnstream drift baseline`") from error


def chosen(key: bytes | None, share: float) -> bool:
    """Whether a customer is among those looked at; the same ones in all topics and runs."""
    return share >= 1 or (key is not None and crc32(key) < share * 2**32)


def numbers(customers: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number for each customer: two of them share one in a slot of 2^16 customers with a chance of one in two, which moves no count."""
    return np.array([crc32(customer.encode()) for customer in customers], np.int64)


@dataclass(slots=True)
class Segments:
    """The segment of each customer, as their newest profile says."""

    field_name: str
    names: tuple[str, ...]
    codes: dict[str, int] = field(default_factory=dict)

    def learn(self, messages: Sequence[RawMessage]) -> None:
        """From records of the profile topic."""
        for message in messages:
            try:
                profile = orjson.loads(message.value() or b"")
                name, customer = profile.get(self.field_name), profile.get("customer_id")
            except (ValueError, AttributeError):
                continue
            if name in self.names and isinstance(customer, str):
                self.codes[customer] = self.names.index(name) + 1

    def of(self, customers: Sequence[str]) -> npt.NDArray[np.int64]:
        """1 .. of each customer, 0 = none."""
        return np.array([self.codes.get(customer, 0) for customer in customers], np.int64)


@dataclass(slots=True)
class Watcher:
    """Reads pieces of any source in offset order of their partitions and says what has moved.

    A block is closed when every source partition that is not read to its end has gone beyond it by `grace_ms`.
    """

    reference: Reference
    decoder: Decoder
    grace_ms: int
    budget: Budget = field(default_factory=Budget)
    positions: dict[tuple[int, int], int] = field(default_factory=dict)
    scores_read: int = 0
    records_read: int = 0
    _monitor: Monitor = field(init=False)
    _watch: Watch = field(init=False)
    _tallies: tuple[Tally, Tally] = field(init=False)
    _coverage: Coverage = field(default_factory=Coverage)
    _pager: Pager = field(default_factory=Pager)
    segments: Segments = field(init=False)
    _reached: dict[tuple[int, int], int] = field(default_factory=dict)
    _ended: set[tuple[int, int]] = field(default_factory=set)
    _high: dict[tuple[int, int], npt.NDArray[np.int64]] = field(default_factory=dict)
    _seen: list[dict[int, None]] = field(default_factory=lambda: [{} for _ in TOPICS])
    _judged_ms: int = -1
    _updated: dict[str, int] = field(default_factory=dict)
    _scores: Any = field(default_factory=lambda: msgspec.json.Decoder(_Score))

    def __post_init__(self) -> None:
        base = self.reference.baseline
        self._monitor = Monitor(base, self.budget)
        self._watch = Watch(self.reference.normal)
        g = len(base.segments)
        self._tallies = Tally.of(base.edges[:1], g, base.block_ms), Tally.of(base.edges[1:], g, base.block_ms)
        self.segments = Segments(self.reference.segment_field, base.segments)

    # -- messages in

    def take(self, source: int, partition: int, messages: Sequence[RawMessage]) -> None:
        """A piece of a partition in offset order; source: topic index, SCORES or FEATURES."""
        place = source, partition
        start = self.positions.get(place, -1)
        messages = [message for message in messages if message.offset() >= start]
        if not messages:
            return
        self.positions[place] = messages[-1].offset() + 1
        self._ended.discard(place)
        mine = [message for message in messages if chosen(message.key(), self.reference.share)]
        self.records_read += len(mine)
        if source == SCORES:
            self._take_scores(place, mine)
        elif source == FEATURES:
            self._take_features(place, mine)
        else:
            self._take_inputs(place, mine)

    def ended(self, source: int, partition: int) -> None:
        """The partition has nothing more for now."""
        self._ended.add((source, partition))

    def _take_scores(self, place: tuple[int, int], messages: Sequence[RawMessage]) -> None:
        scores = [self._scores.decode(message.value() or b"") for message in messages]
        high = self._high.setdefault(place, np.full(len(TOPICS), -1, np.int64))
        indices = np.array([TOPICS.index(s.source.topic) if s.source.topic in TOPICS else 0 for s in scores], np.int64)
        new = first_wins(indices, np.array([s.source.offset for s in scores], np.int64), high)
        scores = [score for score, wanted in zip(scores, new.tolist(), strict=True) if wanted]
        if not scores:
            return
        self.scores_read += len(scores)
        at = np.array([score.at for score in scores], np.int64)
        self._reach(place, int(at.max()))
        segment = self.segments.of([score.customer_id for score in scores])
        good = np.array([not score.fallback for score in scores])
        for score, code in zip(scores, segment.tolist(), strict=True):
            if not score.fallback:
                self._coverage.score(score.customer_id, score.at, code)
        probability = np.array([score.probability for score in scores])[:, None]
        who = numbers([score.customer_id for score in scores])
        self._tallies[0].add(at[good], probability[good], segment[good], who[good])

    def _take_features(self, place: tuple[int, int], messages: Sequence[RawMessage]) -> None:
        found = read_features(messages)
        if not len(found):
            return
        high = self._high.setdefault(place, np.full(len(TOPICS), -1, np.int64))
        new = first_wins(found.columns["topic"], found.columns["offset"], high)
        at = found.columns["at"].astype(np.int64)
        self._reach(place, int(at.max()))
        if self.reference.features:
            vectors, segment, who = found.columns["vector"][new][:, WATCHED], self.segments.of(found.customers), numbers(found.customers)
            self._tallies[1].add(at[new], vectors, segment[new], who[new])

    def _take_inputs(self, place: tuple[int, int], messages: Sequence[RawMessage]) -> None:
        topic, partition = place
        if topic == len(TOPICS) - 1:
            self.segments.learn(messages)
        if not messages:
            return
        records = self.decoder.decode(topic, partition, messages)
        good = np.flatnonzero(records.reason == 0)
        seen, twice, kept = self._seen[topic], 0, []
        for i in good.tolist():
            number = int(records.facts[i, ID])
            if number in seen:
                twice += 1
            else:
                seen[number] = None
                kept.append(i)
        for number in list(seen)[: max(len(seen) - REMEMBERED, 0)]:
            del seen[number]
        facts = records.facts[kept]
        customers = [records.customer[i] for i in kept]
        segment = self.segments.of(customers)
        self._watch.add(facts, segment)
        for customer, at, code in zip(customers, facts[:, TIME].tolist(), segment.tolist(), strict=True):
            self._coverage.event(customer, at, code)
        if len(facts):
            self._reach(place, int(facts[:, TIME].max()))
        broken = len(records) - len(good)
        if (broken or twice) and (when := self._reached.get(place, max(self._reached.values(), default=0))):
            self._watch.refused(topic, when, broken, twice)

    def _reach(self, place: tuple[int, int], at_ms: int) -> None:
        self._reached[place] = max(self._reached.get(place, 0), at_ms)

    # -- verdicts out

    @property
    def watermark_ms(self) -> int:
        """Up to when everything is thought to have been read; -1 before the first record."""
        if not self._reached:
            return -1
        behind = [at for place, at in self._reached.items() if place not in self._ended]
        return (min(behind) if behind else max(self._reached.values())) - self.grace_ms

    def advance(self, made_at: int) -> list[dict[str, Any]]:
        """Close the blocks that are over; the verdicts (proto.drift.DriftVerdict) on them. made_at: wall clock, epoch ms."""
        base = self.reference.baseline
        watermark = self.watermark_ms
        if watermark < 0:
            return []
        closed: dict[int, list[npt.NDArray[np.int64] | None]] = {}
        for i, tally in enumerate(self._tallies):
            for start, counts in tally.close(watermark):
                closed.setdefault(start, [None, None])[i] = counts
        shape = base.sigma.shape
        verdicts: list[dict[str, Any]] = []
        judge_at = (watermark // base.block_ms) * base.block_ms
        if self._judged_ms < 0:
            self._judged_ms = judge_at
        instants = sorted({start + base.block_ms for start in closed} | {judge_at} if judge_at > self._judged_ms else set(closed))
        for until in instants:
            findings: list[Finding] = []
            parts = closed.get(until - base.block_ms)
            if parts is not None and until - base.block_ms >= self._monitor.reached_ms:
                sizes = (1, shape[0] - 1)
                whole = [np.zeros((n, shape[1], BINS), np.int64) if part is None else part for n, part in zip(sizes, parts, strict=True)]
                findings = self._monitor.update(until - base.block_ms, np.concatenate(whole))
            faults: list[Fault] = []
            if until > self._judged_ms:
                faults = self._watch.judge(until)
                if until // DAY_MS != self._judged_ms // DAY_MS:
                    faults += self._coverage.judge(until, base.segments)
                    self._coverage.forget(until)
                self._judged_ms = until
            verdicts += self._decide(until, findings, faults, made_at)
        return verdicts

    def _decide(self, at: int, findings: list[Finding], faults: list[Fault], made_at: int) -> list[dict[str, Any]]:
        out = [self._verdict("over", episode, at, made_at, [], []) for episode in self._pager.over(at)]
        if pages(findings, faults):
            causes = explain(findings, faults, self.reference.baseline.segments)
            episode, first = self._pager.note(causes[0].key, at, len(findings))
            if first or at - self._updated.get(episode.key, 0) >= UPDATE_MS:
                self._updated[episode.key] = at
                out.append(self._verdict("page" if first else "update", episode, at, made_at, causes, findings))
        return out

    def _verdict(
        self, kind: Kind, episode: Episode, at: int, made_at: int, causes: Sequence[Cause], findings: Sequence[Finding]
    ) -> dict[str, Any]:
        far = sorted(findings, key=lambda f: -f.statistic / max(f.threshold, 1e-9))
        first = causes[0] if causes else None
        summary = f"{first.nature}: {first.detail}" if first else f"episode {episode.number} is over"
        digest = blake2b(f"{episode.key}:{episode.number}:{kind}:{at}".encode(), digest_size=12).hexdigest()
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict_id": digest,
            "kind": kind,
            "episode": episode.number,
            "key": episode.key,
            "at": at,
            "made_at": made_at,
            "summary": summary,
            "action": ACTIONS[first.nature] if first else "none",
            "causes": [
                {
                    "nature": c.nature, "what": c.what, "topic": c.topic, "kinds": list(c.kinds), "field": c.field,
                    "segments": list(c.segments), "strength": round(c.strength, 3), "features": list(c.features), "detail": c.detail,
                }
                for c in causes[:5]
            ],
            "findings": [
                {
                    "series": f.series, "segment": f.segment, "detector": f.detector, "window": f.window,
                    "statistic": round(f.statistic, 5), "threshold": round(f.threshold, 5), "before": round(f.before, 4),
                    "after": round(f.after, 4), "since": f.since_ms,
                }
                for f in far[:TOLD]
            ],
            "findings_total": len(findings),
            "baseline": self.reference.digest,
            "budget_pages_per_30_days": self.budget.pages,
        }  # fmt: skip

    # -- state

    @property
    def distances(self) -> Mapping[str, npt.NDArray[np.float64]]:
        """PSI and KS (2, series, segments) of the newest block, day and week."""
        return self._monitor.distances

    @property
    def open_episodes(self) -> list[Episode]:
        """Those not over."""
        return list(self._pager.episodes.values())

    def coverage(self) -> list[tuple[int, int]]:
        """(covered, active) of everybody and each segment."""
        return self._coverage.shares(max(self._reached.values(), default=0), len(self.reference.baseline.segments))

    def state(self) -> bytes:
        """One record; `restore` goes on from it."""
        tallies = [tally.arrays() for tally in self._tallies]
        arrays = {
            **{f"monitor_{name}": value for name, value in self._monitor.state().items()},
            **{f"watch_{name}": value for name, value in self._watch.state().items()},
            **{f"tally_{name}_{i}": part[k] for i, part in enumerate(tallies) for k, name in enumerate(("slots", "counts", "seen"))},
        }
        places = [[s, p, self.positions[s, p], self._reached.get((s, p), 0)] for s, p in self.positions]
        plain = {
            "baseline": self.reference.digest,
            "places": places,
            "high": [[s, p, *high.tolist()] for (s, p), high in self._high.items()],
            "pager": self._pager.state(),
            "updated": self._updated,
            "judged": self._judged_ms,
            "segments": self.segments.codes,
            "coverage": self._coverage.customers,
            "read": [self.scores_read, self.records_read],
        }
        return pack(plain, arrays)

    def restore(self, data: bytes) -> None:
        """Go on where `state` was taken. Raises BadInput when it is of another baseline."""
        plain, arrays = unpack(data)
        if plain["baseline"] != self.reference.digest:
            raise BadInput("the stored drift state belongs to another baseline; begin anew with `churnstream drift watch --afresh`")
        self._monitor.restore({name.removeprefix("monitor_"): value for name, value in arrays.items() if name.startswith("monitor_")})
        self._watch.restore({name.removeprefix("watch_"): value for name, value in arrays.items() if name.startswith("watch_")})
        for i, tally in enumerate(self._tallies):
            tally.restore(*(arrays[f"tally_{name}_{i}"] for name in ("slots", "counts", "seen")))
        for s, p, position, reached in plain["places"]:
            self.positions[s, p] = position
            if reached:
                self._reached[s, p] = reached
        self._high = {(s, p): np.array(high, np.int64) for s, p, *high in plain["high"]}
        self._pager, self._updated = Pager.of(plain["pager"]), plain["updated"]
        self._judged_ms, self.segments.codes = plain["judged"], plain["segments"]
        self._coverage.customers = plain["coverage"]
        self.scores_read, self.records_read = plain["read"]
