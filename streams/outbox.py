"""The outputs of one batch: as records to produce, as bytes kept with the state, and the question whether they are out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import orjson
import zstandard

from features.facts import SILENCE, SOURCES
from streams.log import Log

Record = dict[str, Any]
"""{"key": str, bytes or None, "value": bytes}."""

LEVEL: Final = 1  # of compression: the records of a batch are alike, the lowest level takes most of them away
FIRST_LOOK: Final = 64
"""Records looked at first from the end of a topic; ends of transactions and what was aborted are among them."""
_WIDER: Final = 16


@dataclass(frozen=True, slots=True)
class Outbox:
    """Records of one partition, in order."""

    scores: list[Record] = field(default_factory=list)
    alerts: list[Record] = field(default_factory=list)
    dead_letters: list[Record] = field(default_factory=list)
    features: list[Record] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.scores or self.dead_letters)  # there is no alert without its score

    def pack(self) -> bytes:
        """As bytes, compressed; b"" when there is nothing."""
        if not self:
            return b""
        kinds = (self.scores, self.alerts, self.dead_letters, *([self.features] if self.features else ()))
        lists = [[(record["key"], record["value"]) for record in records] for records in kinds]
        return zstandard.ZstdCompressor(LEVEL).compress(msgspec.msgpack.encode(lists))

    @classmethod
    def unpack(cls, packed: bytes) -> Outbox:
        """What `pack` made bytes of."""
        if not packed:
            return cls()
        lists = msgspec.msgpack.decode(zstandard.ZstdDecompressor().decompress(packed))
        return cls(*([{"key": key, "value": value} for key, value in records] for records in lists))


@dataclass(frozen=True, slots=True)
class Tail:
    """The ends of the output topics, to compare an outbox with. Full topic names; `log` reads only what is committed."""

    log: Log
    scores: str
    dead_letters: str

    def has(self, partition: int, outbox: Outbox) -> bool:
        """Whether the records of an outbox, all or none of which were ever committed, are on the topics.

        Nobody may be able to write them meanwhile: ask after the producer of the former owner is fenced.
        """
        topic, records = (self.scores, outbox.scores) if outbox.scores else (self.dead_letters, outbox.dead_letters)
        if not records:
            return True
        # Cuts only grow along a partition, whatever the records are about.
        wanted = orjson.loads(records[-1]["value"])
        low, high = self.log.ends(topic, partition)
        look = FIRST_LOOK
        while True:
            start = max(low, high - look)
            last: bytes | None = None
            for messages in self.log.read(topic, partition, start, high):
                last = messages[-1].value()
            if last is not None:
                return _behind(orjson.loads(last), wanted)
            if start == low:
                return low > 0  # retention took everything: an outbox does not wait that long
            look *= _WIDER


def _behind(newest: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a record lies at or behind another: by their cuts; of one cut, the silent that were scored there come last."""
    if not all(newest["cut"][name] >= offset for name, offset in wanted["cut"].items()):
        return False
    one, other = newest["source"], wanted["source"]
    if newest["cut"] != wanted["cut"] or other["topic"] != SOURCES[SILENCE]:
        return True
    return bool(one["topic"] == other["topic"] and one["offset"] >= other["offset"])
