"""The inputs of one partition once more, in the order in which its outputs say that they were handled."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from features.facts import PROFILE, TOPICS
from features.store import Offsets
from proto.errors import InvariantBroken
from streams.codec import Decoder, RawMessage
from streams.emitted import Emitted
from streams.log import Log
from streams.merge import Batch, Merge, Slice
from streams.metrics import Parts

GAP: Final = 2_000
"""Records without outputs between two with one; a longer stretch is handled on its own, in pieces."""
SPAN: Final = 8_000
"""Offsets one planned piece covers at most, unless a single record does."""
STREAMED: Final = 4_000
"""Records of one piece of a long stretch."""
PROFILES: Final = PROFILE >> 3


@dataclass(slots=True)
class Recorded:
    """Reads from the offsets `start` on. inputs: full topic names in topic-index order; whole: every output from there on is still there.

    go_on is called before each batch and may raise.
    """

    source: Log
    inputs: Sequence[str]
    decoder: Decoder
    partition: int
    start: Offsets
    watermark_ms: int
    whole: bool = True
    go_on: Callable[[], None] = lambda: None
    parts: Parts = field(default_factory=Parts)
    merge: Merge = field(init=False)
    _readers: list[Generator[list[RawMessage], None, None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.merge = Merge(self.partition, "", dict(self.start), self.watermark_ms)
        for buffer, topic in zip(self.merge.buffers, self.inputs, strict=True):
            low, high = self.source.ends(topic, self.partition)
            begin = max(low, self.start[TOPICS[buffer.topic]] + 1)
            buffer.reach(begin, high)
            self._readers.append(self.source.read(topic, self.partition, begin, high))

    def close(self) -> None:
        """End the reads."""
        for reader in self._readers:
            reader.close()

    def batches(self, emitted: Emitted) -> Iterator[tuple[Batch, Emitted | None]]:
        """The records up to the last of the emitted ones, in batches; with the emitted records each batch is ordered by."""
        keys = emitted.key
        before = sum(self.merge.applied.values())
        first = 0
        while first < len(emitted):
            if keys[first] - before > GAP:
                yield from self._stretch(emitted, first)
            end = max(first + 1, int(np.searchsorted(keys, before + SPAN, side="right")))
            wide = np.flatnonzero(np.diff(keys[first:end]) > GAP)
            if len(wide):
                end = first + 1 + int(wide[0])
            block = emitted.pick(slice(first, end))
            to = block.cut(-1)
            self._feed(to, None)
            self.merge.force(to, block.plan)
            self.go_on()
            batch = self.merge.take(0)
            assert batch is not None
            yield batch, block
            before = int(keys[end - 1])
            first = end

    def up_to(self, to: Offsets) -> Iterator[Batch]:
        """The records up to these offsets in the order of the merge, in batches."""
        while True:
            self._feed(to, STREAMED)
            self.go_on()
            batch = self.merge.take(STREAMED, until=to)
            if batch is None:
                return
            yield batch

    @property
    def ends(self) -> dict[str, int]:
        """The last offset of each topic when the reading began, at least where it began."""
        return {TOPICS[buffer.topic]: max(buffer.end - 1, self.start[TOPICS[buffer.topic]]) for buffer in self.merge.buffers}

    def _stretch(self, emitted: Emitted, row: int) -> Iterator[tuple[Batch, None]]:
        """The many records before an emitted one.

        None of them has an output, so they are repetitions and profiles. Repetitions change nothing and come first: a profile could
        take away what they repeat. Where outputs were deleted by retention the order is that of the merge.
        """
        to = emitted.cut(row)
        source = TOPICS[emitted.plan[row, -1]]
        to[source] -= 1
        if self.whole:
            yield from ((batch, None) for batch in self.up_to({**to, TOPICS[PROFILES]: self.merge.applied[TOPICS[PROFILES]]}))
        yield from ((batch, None) for batch in self.up_to(to))

    def _feed(self, to: Offsets, enough: int | None) -> None:
        """Read on until everything up to `to` waits, or `enough` records of each topic."""
        for buffer, reader in zip(self.merge.buffers, self._readers, strict=True):
            last = to[TOPICS[buffer.topic]]
            if last >= buffer.end:
                raise InvariantBroken(
                    f"{self.inputs[buffer.topic]}[{self.partition}]: outputs speak of offset {last}, but the topic ends at {buffer.end}: "
                    "it was recreated or truncated; outputs of another life of a topic cannot be continued"
                )
            while buffer.position <= last and (enough is None or buffer.count < enough):
                with self.parts.part("consume"):
                    messages = next(reader, None)
                if messages is None:
                    buffer.reach(buffer.end)
                    break
                with self.parts.part("decode"):
                    buffer.add(Slice(self.decoder.decode(buffer.topic, self.partition, messages), messages))
