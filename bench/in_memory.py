"""A worker's life without servers: the real merge, engine and store rules over records in memory, and what it left, to be told again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from typing import Any

from features.facts import TOPICS
from features.memory_store import MemoryStore
from scoring.fallback import Fallback
from streams.codec import Decoder, RawMessage
from streams.engine import Engine, EngineSettings
from streams.merge import Merge, Slice, Ticks
from streams.metrics import Metrics
from streams.rerun import Base, Rerun, Span, Topics
from streams.scores import Model
from streams.silence import stand

NAMED = Topics(TOPICS, "churn-scores", "churn-dead-letters", "churn-alerts", "churn-features")
NOW_MS = 1_750_000_000_000


@dataclass(frozen=True, slots=True)
class Message:
    """A record as a consumer would give it."""

    body: bytes | None
    customer: bytes
    place: int

    def value(self) -> bytes | None:
        """As in RawMessage."""
        return self.body

    def key(self) -> bytes | None:
        """As in RawMessage."""
        return self.customer

    def offset(self) -> int:
        """As in RawMessage."""
        return self.place

    def timestamp(self) -> tuple[int, int]:
        """As in RawMessage."""
        return 2, NOW_MS


def decoder() -> Decoder:
    """Of these worlds."""
    return Decoder(currency="EUR", rates={"USD": Decimal("0.9")}, future_ms=300_000, max_bytes=1_000_000, digest_key=b"k")


@dataclass(slots=True)
class Topic:
    """All topics of one partition: a Log, and the sink of a worker."""

    of: dict[str, list[Message]] = field(default_factory=dict)

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """As in Log."""
        return 0, len(self.of.get(topic, ()))

    def read(self, topic: str, partition: int, start: int, stop: int) -> Generator[list[RawMessage], None, None]:
        """As in Log."""
        for first in range(start, stop, 2_000):
            yield list(self.of[topic][first : min(stop, first + 2_000)])

    def scores(self, partition: int, records: list[dict[str, Any]]) -> None:
        """As in Sink."""
        self._add("churn-scores", records)

    def dead_letters(self, partition: int, records: list[dict[str, Any]]) -> None:
        """As in Sink."""
        self._add("churn-dead-letters", records)

    def alerts(self, partition: int, records: list[dict[str, Any]]) -> None:
        """As in Sink."""
        self._add("churn-alerts", records)

    def features(self, partition: int, records: list[dict[str, Any]]) -> None:
        """As in Sink."""
        self._add("churn-features", records)

    def flush(self) -> None:
        """Nothing is under way."""

    def _add(self, topic: str, records: Sequence[dict[str, Any]]) -> None:
        log = self.of.setdefault(topic, [])
        log += [Message(record["value"], record["key"].encode(), len(log) + i) for i, record in enumerate(records)]


@dataclass(slots=True)
class Shelf:
    """Models by digest, and the one in force."""

    known: dict[str, Model]
    now: str

    def current(self) -> Model:
        """As in Models."""
        return self.known[self.now]

    def by_digest(self, digest: str) -> Model:
        """As in Models."""
        return self.known[digest] if digest else Fallback(0.5)


class Worker:
    """One partition from the first record on."""

    def __init__(self, topic: Topic, shelf: Shelf, tick_ms: int) -> None:
        self.topic, self.shelf, self.store = topic, shelf, MemoryStore()
        clock = count(NOW_MS)
        self.engine = Engine(EngineSettings(2_000_000, 3, tick_ms=tick_ms), self.store, shelf, topic, lambda: next(clock), Metrics())
        claim = self.engine.assign(0, "bench")
        self.engine.restored(claim)
        self.merge = Merge.of(claim, Ticks(tick_ms, stand(claim.counters)) if tick_ms else None)
        for buffer, name in zip(self.merge.buffers, TOPICS, strict=True):
            end = topic.ends(name, 0)[1]
            for messages in topic.read(name, 0, 0, end):
                buffer.add(Slice(decoder().decode(buffer.topic, 0, messages), messages))
            buffer.reach(end, end)

    def run(self, now_ms: int = -1, batches: int = 2**62) -> int:
        """Take so many batches, or all there are; how many came."""
        done = 0
        while done < batches and (batch := self.merge.take(4_000, now_ms=now_ms)) is not None:
            result = self.engine.process([batch])
            if 0 in result.ticks:
                self.merge.ticked(result.ticks[0])
            done += 1
        return done

    def rerun(self) -> Rerun:
        """What it did, to be told again."""
        applied = {name: self.topic.ends(name, 0)[1] - 1 for name in TOPICS}
        return Rerun(self.topic, NAMED, decoder(), 0, Span(), Base(dict.fromkeys(TOPICS, -1)), applied)
