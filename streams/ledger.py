"""Why a customer's score moved: each move split into event, time passing, correction, model change and feature change.

From one score of a customer to the next the way is walked one step at a time, and each step's difference belongs to one cause:

    former score --(other model, or other catalog)--> same vector, new model
                 --(time passes)--> same facts, later instant
                 --(a profile)--> the same instant, a replaced profile
                 --(the event)--> the new score

The first point is the probability that was emitted, the last one too, so the parts sum to the move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.catalog import N_FEATURES
from features.facts import PROFILE, SILENCE, SOURCES, TIME
from features.history import Histories
from proto.errors import ArtifactRejected
from streams.merge import Batch
from streams.rerun import Rerun, Told
from streams.scores import Model, judged, vector_hashes

FloatArray = npt.NDArray[np.float32]

CAUSES: Final = ("event", "time", "correction", "model", "features")
EVENT, TIME_PASSED, CORRECTION, MODEL, FEATURES = range(len(CAUSES))
_PROFILES: Final = PROFILE >> 3


@dataclass(frozen=True, slots=True)
class Change:
    """One move. parts: in the order of CAUSES; made: the new score made again is the emitted one, and so is the vector of the former."""

    customer: str
    score_id: str
    former_id: str
    at: int
    former: float
    now: float
    parts: tuple[float, ...]
    made: bool

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "customer": self.customer,
            "from": self.former_id,
            "to": self.score_id,
            "at": self.at,
            "former": self.former,
            "now": self.now,
            "move": self.now - self.former,
            "parts": dict(zip(CAUSES, self.parts, strict=True)),
        }


@dataclass(slots=True)
class Totals:
    """Of many changes: how many, how much each cause moved scores up and down, and the largest difference of parts and move."""

    transitions: int = 0
    listed: int = 0
    not_made: int = 0
    residue: float = 0.0
    moved: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    net: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    led: Counter[str] = field(default_factory=Counter)  # transitions of which a cause is the largest part

    def note(self, change: Change) -> None:
        """Count one in."""
        self.transitions += 1
        self.not_made += not change.made
        self.residue = max(self.residue, abs(sum(change.parts) - (change.now - change.former)))
        for name, part in zip(CAUSES, change.parts, strict=True):
            self.moved[name] += abs(part)
            self.net[name] += part
        if change.now != change.former:
            self.led[CAUSES[int(np.argmax(np.abs(change.parts)))]] += 1

    def add(self, other: Totals) -> None:
        """Another partition's."""
        for name in ("transitions", "listed", "not_made"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.residue = max(self.residue, other.residue)
        for name in CAUSES:
            self.moved[name] += other.moved[name]
            self.net[name] += other.net[name]
        self.led.update(other.led)


@dataclass(slots=True)
class _Last:
    """A customer's last score, and steps that its next one will have to account for: vectors before and after a profile."""

    score_id: str
    probability: float
    model: str
    vector: FloatArray
    other_catalog: bool
    profiles: list[tuple[FloatArray, FloatArray]] = field(default_factory=list)


@dataclass(slots=True)
class _Move:
    """A transition whose vectors are known and whose model is not asked yet."""

    customer: str
    last: _Last
    score_id: str
    at: int
    late: bool
    now: float
    ahead: FloatArray  # of the facts before the event, at the instant of the score
    vector: FloatArray
    hashed: bool


@dataclass(slots=True)
class Ledger:
    """Tells a partition again and gives every change of it, in order. Scores of models that cannot be had are left out as `not_made`."""

    rerun: Rerun
    models: Callable[[str], Model]
    fallback: Model
    customer: str | None = None
    _last: dict[str, _Last] = field(default_factory=dict)
    _ahead: FloatArray = field(default_factory=lambda: np.empty((0, 0), np.float32))
    _known: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    def __iter__(self) -> Iterator[Change]:
        self.rerun.watch = self._watch
        for told in self.rerun:
            yield from self._changes(told)
            self.rerun.restore(told)

    def _watch(self, histories: Histories, batch: Batch) -> None:
        """Vectors of the customers of a batch, each once, at the instant at which its record will find them, without the record."""
        names = batch.customer
        there = np.fromiter((name in histories for name in names), np.bool_, len(names))
        rows = np.flatnonzero(there)
        newest = np.full(len(names), -1, np.int64)
        newest[rows] = histories.newest_ms([names[i] for i in rows.tolist()])
        self._known = there & (newest >= 0)
        rows = np.flatnonzero(self._known)
        at = np.maximum(newest, batch.facts[:, TIME])[rows]
        self._ahead = np.full((len(names), N_FEATURES), np.nan, np.float32)
        if len(rows):
            self._ahead[rows] = histories.vectors_at([names[i] for i in rows.tolist()], at)

    def _changes(self, told: Told) -> Iterator[Change]:
        batch, block = told.batch, told.block
        silent = bool(len(batch)) and int(batch.topic[0]) == SILENCE
        if not silent:
            self._note_profiles(batch)
        moves: dict[str, list[_Move]] = {}
        if block is not None:
            hashes = vector_hashes(told.vectors)
            for k in range(len(told.rows)):
                place, row, name = int(told.place[k]), int(told.rows[k]), told.customers[k]
                if place < 0 or (self.customer is not None and name != self.customer):
                    continue
                vector = told.vectors[k]
                ahead = vector if silent else self._ahead[row]
                digest, probability = str(block.model[place]), float(block.probability[place])
                score_id = f"{SOURCES[int(batch.topic[row])]}-{batch.partition}-{int(batch.offset[row])}"
                other = block.vector_hash[place] == ""
                last = self._last.get(name)
                if last is not None:
                    hashed = other or block.vector_hash[place] == hashes[k]
                    late = bool(told.late[k])
                    move = _Move(name, last, score_id, int(told.at[k]), late, probability, ahead, vector, hashed)
                    moves.setdefault(digest, []).append(move)
                self._last[name] = _Last(score_id, probability, digest, vector.copy(), other)
        found = [change for digest, some in moves.items() for change in self._split(digest, some)]
        yield from found

    def _note_profiles(self, batch: Batch) -> None:
        histories = self.rerun.histories
        for i in np.flatnonzero((batch.topic == _PROFILES) & (batch.reason == 0) & self._known).tolist():
            name = batch.customer[i]
            if (last := self._last.get(name)) is not None:
                at = max(int(histories.newest_ms([name])[0]), int(batch.facts[i, TIME]))
                after = histories.vectors_at([name], at)[0]
                if after.tobytes() != self._ahead[i].tobytes():
                    last.profiles.append((self._ahead[i].copy(), after))

    def _split(self, digest: str, moves: list[_Move]) -> Iterator[Change]:
        """All moves to scores of one model."""
        try:
            model = self.models(digest)
        except ArtifactRejected:
            for move in moves:
                yield Change(
                    move.customer, move.score_id, move.last.score_id, move.at, move.last.probability, move.now, (0.0,) * len(CAUSES), False
                )
            return
        asked: list[FloatArray] = []
        for move in moves:
            asked += [move.last.vector, move.ahead, move.vector, *(v for pair in move.last.profiles for v in pair)]
        probability, _ = judged(model, self.fallback, np.stack(asked))
        values = iter(probability.astype(np.float64).tolist())
        for move in moves:
            kept, ahead, now = next(values), next(values), next(values)
            parts = [0.0] * len(CAUSES)
            for _ in move.last.profiles:
                before = next(values)
                parts[EVENT] += next(values) - before
            parts[FEATURES if move.last.other_catalog else MODEL] += kept - move.last.probability
            parts[TIME_PASSED] += ahead - kept - parts[EVENT]
            parts[CORRECTION if move.late else EVENT] += now - ahead
            made = (
                move.hashed and now == move.now and (move.last.model != digest or move.last.other_catalog or kept == move.last.probability)
            )
            yield Change(move.customer, move.score_id, move.last.score_id, move.at, move.last.probability, move.now, tuple(parts), made)


def summary(totals: Totals) -> Mapping[str, Any]:
    """As JSON."""
    return {
        "transitions": totals.transitions,
        "listed": totals.listed,
        "not_made": totals.not_made,
        "largest_residue": totals.residue,
        "moved_by": totals.moved,
        "net_by": totals.net,
        "led_by": {name: totals.led[name] for name in CAUSES},
    }
