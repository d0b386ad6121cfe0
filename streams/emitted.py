"""What a partition has emitted, read back from its output topics: scores and dead letters, in the order in which they were made."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from operator import attrgetter
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from features.catalog import LAYOUT_HASH
from features.facts import SILENCE, SOURCES, TOPICS
from features.store import Offsets
from proto.scores import BANDS
from streams.codec import RawMessage
from streams.log import Log

log = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MARGIN: Final = 4_000
"""Output records looked at from the end, however covered the last one is: a worker that was cut off may still have repeated some."""
_WIDER: Final = 8
SCORE, LETTER, ALERT = range(3)
"""Kinds of output records."""
_INDEX: Final = {name: index for index, name in enumerate(SOURCES)}
_BAND: Final = {band: code for code, band in enumerate(BANDS)}
_NOTHING: Final = -len(TOPICS) - 1.0


class _Source(msgspec.Struct, gc=False):
    topic: str
    offset: int


_NAMES: Final = {f"t{index}": name for index, name in enumerate(TOPICS)}
_Cut: Any = msgspec.defstruct("_Cut", [(name, int, -1) for name in _NAMES], rename=_NAMES, gc=False)


_CUT_OF: Final = tuple(attrgetter(f"cut.{name}") for name in _NAMES)


class _Score(msgspec.Struct, gc=False):
    source: _Source
    cut: _Cut
    probability: float
    band: str
    at: int
    scored_at: int
    model_digest: str
    layout_hash: str
    vector_hash: str
    alert_band: str = ""  # version 0.1.0 wrote none


class _Letter(msgspec.Struct, gc=False):
    """A dead letter or an alert."""

    source: _Source
    cut: _Cut | None = None  # version 0.1.0 wrote dead letters without one
    scored_at: int = -1
    model_digest: str = ""


@dataclass(frozen=True, slots=True)
class Emitted:
    """n output records as columns. Of dead letters only the first three say something, of alerts also clock and model."""

    plan: IntArray  # (n, topics + 1): cut of each topic, index of the source (features.facts.SOURCES)
    offset: IntArray  # (n,) of the source
    kind: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.float32]
    band: npt.NDArray[np.uint8]
    alert: npt.NDArray[np.uint8]  # alert band
    at: IntArray
    scored_at: IntArray
    model: npt.NDArray[np.object_]
    vector_hash: npt.NDArray[np.object_]  # "" under another catalog
    customer: npt.NDArray[np.object_]  # of silence scores, else ""
    record: npt.NDArray[np.object_]  # (n,) the whole record as bytes where they are kept, else b""

    def __len__(self) -> int:
        return len(self.offset)

    @property
    def key(self) -> IntArray:
        """Place of each record in the order of all: every record that was handled has moved one offset of the cut on."""
        key: IntArray = self.plan[:, : len(TOPICS)].sum(axis=1)
        return key

    def pick(self, which: Any) -> Emitted:
        """Some of them: a slice, indices or a mask."""
        return Emitted(*(getattr(self, column.name)[which] for column in fields(self)))

    def last_scores(self, rows: IntArray) -> tuple[Any, ...]:
        """Of these scores what `Histories.restore_scores` takes."""
        return self.probability[rows], self.band[rows], self.alert[rows], self.at[rows], self.plan[rows, -1], self.offset[rows]

    def cut(self, row: int) -> dict[str, int]:
        """The cut of one record, -1 for the last."""
        return dict(zip(TOPICS, self.plan[row].tolist(), strict=False))


def together(parts: Sequence[Emitted]) -> Emitted:
    """All of them, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Emitted(*(np.concatenate([getattr(part, column.name) for part in parts]) for column in fields(Emitted)))


def _records(messages: Sequence[RawMessage], keep: bool) -> npt.NDArray[np.object_]:
    records = np.full(len(messages), b"", np.object_)
    if keep:
        records[:] = [message.value() or b"" for message in messages]
    return records


def _scores(decoder: msgspec.json.Decoder[_Score], messages: Sequence[RawMessage], keep: bool) -> Emitted:
    read = decoder.decode
    scores = [read(message.value() or b"") for message in messages]
    n = len(scores)
    plan = np.empty((n, len(TOPICS) + 1), np.int64)
    for i, column in enumerate(_CUT_OF):
        plan[:, i] = list(map(column, scores))
    plan[:, -1] = [_INDEX[score.source.topic] for score in scores]
    return Emitted(
        plan=plan,
        offset=np.array([score.source.offset for score in scores], np.int64),
        kind=np.full(n, SCORE, np.uint8),
        probability=np.array([score.probability for score in scores], np.float32),
        band=np.array([_BAND[score.band] for score in scores], np.uint8),
        alert=np.array([_BAND[score.alert_band or score.band] for score in scores], np.uint8),
        at=np.array([score.at for score in scores], np.int64),
        scored_at=np.array([score.scored_at for score in scores], np.int64),
        model=np.array([score.model_digest for score in scores], np.object_),
        vector_hash=np.array([score.vector_hash if score.layout_hash == LAYOUT_HASH else "" for score in scores], np.object_),
        customer=_customers(plan[:, -1], messages),
        record=_records(messages, keep),
    )


def _customers(source: IntArray, messages: Sequence[RawMessage]) -> npt.NDArray[np.object_]:
    names = np.full(len(source), "", np.object_)
    for row in np.flatnonzero(source == SILENCE).tolist():
        names[row] = (messages[row].key() or b"").decode("utf-8", "surrogatepass")
    return names


def _others(
    kind: int, decoder: msgspec.json.Decoder[_Letter], messages: Sequence[RawMessage], unplaced: set[tuple[int, int]], keep: bool
) -> Emitted:
    letters = [decoder.decode(message.value() or b"") for message in messages]
    unplaced.update((_INDEX[letter.source.topic], letter.source.offset) for letter in letters if letter.cut is None)
    records = _records(messages, keep)[[letter.cut is not None for letter in letters]]
    placed = [letter for letter in letters if letter.cut is not None]
    n = len(placed)
    plan = np.empty((n, len(TOPICS) + 1), np.int64)
    for i, column in enumerate(_CUT_OF):
        plan[:, i] = list(map(column, placed))
    plan[:, -1] = [_INDEX[letter.source.topic] for letter in placed]
    return Emitted(
        plan=plan,
        offset=np.array([letter.source.offset for letter in placed], np.int64),
        kind=np.full(n, kind, np.uint8),
        probability=np.full(n, np.nan, np.float32),
        band=np.zeros(n, np.uint8),
        alert=np.zeros(n, np.uint8),
        at=np.full(n, -1, np.int64),
        scored_at=np.array([letter.scored_at for letter in placed], np.int64),
        model=np.array([letter.model_digest for letter in placed], np.object_),
        vector_hash=np.full(n, "", np.object_),
        customer=np.full(n, "", np.object_),
        record=records,
    )


@dataclass(slots=True)
class _Kind:
    """One output topic of the partition. last_key: of the newest record, below every key when there never was one."""

    topic: str
    code: int
    low: int
    high: int
    window: list[Emitted] = field(default_factory=list)
    begin: int = 0  # first offset of the window
    last_key: float = _NOTHING


@dataclass(slots=True)
class Outputs:
    """The outputs of one partition up to their present ends.

    conflicts: records whose cut did not follow the one before; unplaced: (topic index, offset) of dead letters without a cut.
    keep: whether the records as bytes are kept with their columns.
    """

    source: Log
    scores: str
    dead_letters: str
    alerts: str
    partition: int
    margin: int = MARGIN
    keep: bool = False
    conflicts: int = 0
    unplaced: set[tuple[int, int]] = field(default_factory=set)
    _kinds: list[_Kind] = field(default_factory=list)
    _score: msgspec.json.Decoder[_Score] = field(default_factory=lambda: msgspec.json.Decoder(_Score))
    _letter: msgspec.json.Decoder[_Letter] = field(default_factory=lambda: msgspec.json.Decoder(_Letter))

    def look(self) -> None:
        """Read the last records of all topics."""
        for code, topic in ((SCORE, self.scores), (LETTER, self.dead_letters), (ALERT, self.alerts)):
            low, high = self.source.ends(topic, self.partition)
            kind = _Kind(topic, code, low, high, begin=max(low, high - self.margin))
            kind.window = self._window(kind)
            while not any(map(len, kind.window)) and kind.begin > low:
                # Aborted transactions and their ends alone: what was committed lies before them.
                kind.begin = max(low, high - _WIDER * (high - kind.begin))
                kind.window = self._window(kind)
            keys = [int(part.key.max()) for part in kind.window if len(part)]
            if keys:
                kind.last_key = max(keys)
            elif high > 0:
                kind.last_key = float("inf")  # there were some, retention took them: whatever lies here was emitted long ago
            self._kinds.append(kind)

    def _window(self, kind: _Kind) -> list[Emitted]:
        return [self._columns(kind, messages) for messages in self.source.read(kind.topic, self.partition, kind.begin, kind.high)]

    @property
    def ever(self) -> bool:
        """Whether anything was ever emitted."""
        return any(kind.high > 0 for kind in self._kinds)

    @property
    def complete(self) -> bool:
        """Whether everything ever emitted is still there."""
        return all(kind.low == 0 for kind in self._kinds)

    def newest(self) -> dict[str, int] | None:
        """Per topic the highest offset the newest records cover; None when there are none."""
        parts = [part for kind in self._kinds for part in kind.window if len(part)]
        if not parts:
            return None
        everything = together(parts)
        newest = dict(zip(TOPICS, everything.plan.max(axis=0).tolist(), strict=False))
        silent = everything.offset[everything.plan[:, -1] == SILENCE]
        return newest | {SOURCES[SILENCE]: int(silent.max())} if len(silent) else newest

    @property
    def newest_key(self) -> float:
        """Place in the order of the newest record that is there; below every place when there is none."""
        return max([float(part.key.max()) for kind in self._kinds for part in kind.window if len(part)], default=_NOTHING)

    def last_keys(self) -> tuple[float, float, float]:
        """Place in the order of the newest score, dead letter and alert; infinite when retention took them all."""
        score, letter, alert = (kind.last_key for kind in self._kinds)
        return score, letter, alert

    def after(self, applied: Offsets) -> Iterator[Emitted]:
        """Everything emitted beyond these offsets in the order in which it was made, each record once (the first wins).

        Of the alerts only those behind the newest score: their scores were made and did not get out.
        """
        high = np.array([applied.get(name, -1) for name in SOURCES], np.int64)
        scores, letters, alerts = (self._first(self._pieces(kind, high), high) for kind in self._kinds)
        high = high[: len(TOPICS)]
        last = self._kinds[SCORE].last_key
        ahead = (found for piece in alerts if len(found := piece.pick(piece.key > last)))
        for piece in _in_order(chain(scores, ahead), letters):
            cuts = np.maximum.accumulate(np.vstack([high, piece.plan[:, :-1]]))
            changed = int((cuts[1:] != piece.plan[:, :-1]).any(axis=1).sum())
            if changed:
                # Only after a rollback with a zombie: two owners have handled the same records in different orders.
                self.conflicts += changed
                piece.plan[:, :-1] = cuts[1:]
            high = cuts[-1]
            yield piece

    def _columns(self, kind: _Kind, messages: Sequence[RawMessage]) -> Emitted:
        if kind.code == SCORE:
            return _scores(self._score, messages, self.keep)
        return _others(kind.code, self._letter, messages, self.unplaced, self.keep)

    def _pieces(self, kind: _Kind, applied: IntArray) -> Iterator[Emitted]:
        """From a record on that `applied` covers, or from the beginning."""
        first = next((part for part in kind.window if len(part)), None)
        if kind.begin == kind.low or (first is not None and _covered(first, applied)):
            yield from kind.window
            return
        width = self.margin
        while True:
            width *= _WIDER
            start = max(kind.low, kind.high - width)
            pieces = self.source.read(kind.topic, self.partition, start, kind.high)
            head: list[Emitted] = []
            for messages in pieces:
                head.append(self._columns(kind, messages))
                if len(head[-1]):
                    break
            if start == kind.low or (head and len(head[-1]) and _covered(head[-1], applied)):
                yield from chain(head, (self._columns(kind, messages) for messages in pieces))
                return
            del pieces  # ends the read

    def _first(self, pieces: Iterator[Emitted], applied: IntArray) -> Iterator[Emitted]:
        """Without what is not above the highest offset seen of its topic."""
        high = applied.copy()
        for piece in pieces:
            new = first_wins(piece.plan[:, -1], piece.offset, high)
            if new.all():
                if len(piece):
                    yield piece
            elif new.any():
                yield piece.pick(new)


def first_wins(topic: npt.NDArray[Any], offset: IntArray, high: IntArray) -> npt.NDArray[np.bool_]:
    """The reader rule: which of these records, in their order, are above the highest offset seen of their topic.

    topic, offset: (n,), of the source. high: (sources,) the highest offset seen of each, -1 for none; moved on.
    """
    new = np.zeros(len(offset), np.bool_)
    for index in range(len(high)):
        these = np.flatnonzero(topic == index)
        if len(these):
            before = np.maximum.accumulate(np.concatenate([high[index : index + 1], offset[these]]))
            new[these] = offset[these] > before[:-1]
            high[index] = before[-1]
    return new


def _covered(piece: Emitted, applied: IntArray) -> bool:
    return bool(piece.offset[0] <= applied[piece.plan[0, -1]])


def _in_order(scores: Iterator[Emitted], letters: Iterator[Emitted]) -> Iterator[Emitted]:
    waiting = next(letters, None)
    for piece in scores:
        end = int(piece.key[-1])
        parts = [piece]
        while waiting is not None:
            count = int(np.searchsorted(waiting.key, end, side="right"))
            if count:
                parts.append(waiting.pick(slice(0, count)))
            if count < len(waiting):
                waiting = waiting.pick(slice(count, None))
                break
            waiting = next(letters, None)
        both = together(parts)
        # What is said of a record comes before the silent that were scored behind it.
        yield both if len(parts) == 1 else both.pick(np.lexsort((both.plan[:, -1] == SILENCE, both.key)))
    while waiting is not None:
        yield waiting
        waiting = next(letters, None)
