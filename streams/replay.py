"""What another model would have said: a range of the topics told again with it, beside what was scored then. Touches nothing live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from features.facts import PROFILE, SOURCES, TIME
from models.artifact import Thresholds
from proto.scores import BANDS
from scoring.bands import bands
from streams.evaluate import Rules, score
from streams.rerun import Rerun, Told
from streams.scores import Model, Scored, together

if TYPE_CHECKING:
    import pyarrow as pa

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

LISTED: Final = 20
"""Customers a report names, those with the most flips."""
NOWHERE: Final = "none"
"""Segment of a customer whose profile states none."""
_PROFILES: Final = PROFILE >> 3
_OUT: Final = np.dtype([("topic", "<i4"), ("band", "<i4"), ("offset", "<i8"), ("at", "<i8"), ("probability", "<f4")])


@dataclass(slots=True)
class Replayed:
    """What a replay came to. rows: scores made; compared: those with a score of their time; flips: (band then, band now).

    moves: sum of |probability now - then|. digest: of everything made, in order; partitions are added in their order.
    """

    rows: int = 0
    compared: int = 0
    equal: int = 0
    handled: int = 0
    moves: float = 0.0
    largest_move: float = 0.0
    flips: Counter[tuple[str, str]] = field(default_factory=Counter)
    segments: dict[str, list[int]] = field(default_factory=dict)  # compared, flipped, up
    moved: int = 0  # compared scores with another probability
    customers: int = 0
    flipped: Counter[str] = field(default_factory=Counter)  # customers with a flip, and how many each has
    digest: str = ""

    def add(self, other: Replayed) -> None:
        """Another partition's; its customers are others."""
        for name in ("rows", "compared", "equal", "handled", "moves", "moved", "customers"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_move = max(self.largest_move, other.largest_move)
        self.flips.update(other.flips)
        self.flipped.update(other.flipped)
        for segment, counts in other.segments.items():
            self.segments[segment] = [a + b for a, b in zip(self.segments.get(segment, [0, 0, 0]), counts, strict=True)]
        self.digest = blake2b((self.digest + other.digest).encode(), digest_size=16).hexdigest()

    def report(self) -> dict[str, Any]:
        """As JSON."""
        flipped = {pair: count for pair, count in self.flips.items() if pair[0] != pair[1]}
        return {
            "rows": self.rows,
            "records": self.handled,
            "digest": self.digest,
            "compared": self.compared,
            "equal": self.equal,
            "flips": sum(flipped.values()),
            "flips_by": {f"{then}->{now}": count for (then, now), count in sorted(flipped.items())},
            "mean_move": self.moves / self.compared if self.compared else 0.0,
            "largest_move": self.largest_move,
            "probabilities_moved": self.moved,
            "customers": self.customers,
            "customers_flipped": len(self.flipped),
            "most_flipped": dict(sorted(self.flipped.items(), key=lambda one: (-one[1], one[0]))[:LISTED]),
            "segments": {
                segment: {"compared": compared, "flips": flips, "up": up}
                for segment, (compared, flips, up) in sorted(self.segments.items())
            },
        }


@dataclass(frozen=True, slots=True)
class Rebanded:
    """A model whose bands begin elsewhere; probabilities are its own."""

    model: Model
    edges: tuple[float, float]
    fallback: bool = False

    @property
    def digest(self) -> str:
        """The model's own: what it says is the same."""
        return self.model.digest

    @property
    def name(self) -> str:
        """As of the model."""
        return self.model.name

    @property
    def version(self) -> str:
        """As of the model."""
        return self.model.version

    @property
    def reasons_method(self) -> str:
        """As of the model."""
        return self.model.reasons_method

    @property
    def threshold_version(self) -> str:
        """Named by the edges."""
        return f"{self.edges[0]:g}-{self.edges[1]:g}"

    def score(self, vectors: FloatArray) -> FloatArray:
        """As the model."""
        return self.model.score(vectors)

    def bands(self, probability: FloatArray) -> ByteArray:
        """By these edges."""
        return bands(probability, Thresholds(medium=self.edges[0], high=self.edges[1], version=self.threshold_version))

    def reasons(self, vectors: FloatArray, band: ByteArray, former: ByteArray, top: int) -> list[bytes]:
        """As the model."""
        return self.model.reasons(vectors, band, former, top)


def rebanded(model: Model, edges: tuple[float, float] | None) -> Model:
    """The model with these edges; itself without any, and when it is a fallback, which has none."""
    return model if edges is None or model.fallback else Rebanded(model, edges)


def replay(
    rerun: Rerun, model: Model | Callable[[str], Model], rules: Rules, out: Callable[[Told, Scored, list[str]], None] | None = None
) -> Replayed:
    """Tell a partition again with this model for every score inside the span; or, given a shelf, with that of each score's time.

    Last scores and alerts are those of the replay from the beginning of the span on; before it, those of the time. out: is given
    each stretch with its scores and the segment of each.
    """
    found = Replayed()
    content = blake2b(digest_size=16)
    segments: dict[str, str] = {}
    seen: set[str] = set()
    for told in rerun:
        _note_segments(told, segments)
        scored = _scored(rerun, model, rules, told)
        with rerun.parts.part("report"):
            made = np.empty(len(told.rows), _OUT)
            made["topic"], made["offset"] = told.batch.topic[told.rows], told.batch.offset[told.rows]
            made["at"], made["probability"], made["band"] = scored.at, scored.probability, scored.band
            content.update(made.tobytes())
            found.rows += len(made)
            seen.update(told.customers)
            theirs = [segments.get(customer, NOWHERE) for customer in told.customers] if segments else [NOWHERE] * len(made)
            _compare(found, told, scored, theirs)
            if out is not None:
                out(told, scored, theirs)
    found.handled, found.digest = rerun.handled, content.hexdigest()
    found.customers = len(seen)
    return found


def _scored(rerun: Rerun, model: Model | Callable[[str], Model], rules: Rules, told: Told) -> Scored:
    part = rerun.parts.part
    if not callable(model):
        t = told
        return score(rerun.histories, model, rules, t.customers, t.rows, t.at, t.late, t.vectors, t.sources, part)
    digests = np.full(len(told.rows), "", np.object_)
    if told.block is not None:
        there = told.place >= 0
        digests[there] = told.block.model[told.place[there]]
    edges = [0, *(np.flatnonzero(digests[1:] != digests[:-1]) + 1).tolist(), len(digests)]
    pieces = []
    for first, end in pairwise(edges):
        t = told.pick(slice(first, end))
        of_then = model(str(digests[first])) if first < end else rules.fallback
        pieces.append(score(rerun.histories, of_then, rules, t.customers, t.rows, t.at, t.late, t.vectors, t.sources, part))
    return together(pieces)


def _note_segments(told: Told, segments: dict[str, str]) -> None:
    batch = told.batch
    for i in np.flatnonzero((batch.topic == _PROFILES) & (batch.reason == 0)).tolist():
        segments[batch.customer[i]] = orjson.loads(batch.messages[i].value()).get("segment") or NOWHERE


def _compare(found: Replayed, told: Told, scored: Scored, theirs: list[str]) -> None:
    block = told.block
    there = np.flatnonzero(told.place >= 0)
    if block is None or not len(there):
        return
    place = told.place[there]
    now, then = scored.probability[there].astype(np.float64), block.probability[place].astype(np.float64)
    move = np.abs(now - then)
    found.compared += len(there)
    found.equal += int(np.count_nonzero((now == then) & (scored.band[there] == block.band[place])))
    found.moves += float(move.sum())
    found.moved += int(np.count_nonzero(move))
    found.largest_move = max(found.largest_move, float(move.max()))
    width = len(BANDS)
    pairs = np.bincount(block.band[place].astype(np.int64) * width + scored.band[there], minlength=width * width)
    found.flips.update({(BANDS[i // width], BANDS[i % width]): int(pairs[i]) for i in np.flatnonzero(pairs).tolist()})
    changed = scored.band[there] != block.band[place]
    up = scored.band[there] > block.band[place]
    found.flipped.update(told.customers[i] for i in there[changed].tolist())
    for segment in set(theirs):
        mine = np.fromiter((theirs[i] == segment for i in there.tolist()), np.bool_, len(there))
        counts = found.segments.setdefault(segment, [0, 0, 0])
        counts[0] += int(mine.sum())
        counts[1] += int((mine & changed).sum())
        counts[2] += int((mine & up).sum())


class Files:
    """Replayed scores as Parquet, one file a partition; it gets its name when it is whole."""

    def __init__(self, directory: Path, partition: int, model: Model | None) -> None:
        import pyarrow.parquet as pq

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / f"scores-{partition}.parquet"
        self._scratch = self._path.with_suffix(".tmp")
        self._writer = pq.ParquetWriter(self._scratch, schema(model), compression="zstd")

    def __call__(self, told: Told, scored: Scored, segments: list[str]) -> None:
        """One stretch."""
        import pyarrow as pa

        if not len(told.rows):
            return
        batch, rows, block = told.batch, told.rows, told.block
        instant = pa.timestamp("ms", "UTC")
        places = zip(batch.topic[rows].tolist(), batch.offset[rows].tolist(), strict=True)
        missing = told.place < 0
        then = np.full(len(rows), np.nan, np.float32) if block is None else block.probability[told.place]
        bands = np.zeros(len(rows), np.int8) if block is None else block.band[told.place].astype(np.int8)
        models = [None] * len(rows) if block is None else block.model[told.place].tolist()
        names = pa.array(BANDS)
        self._writer.write_table(
            pa.Table.from_arrays(
                [
                    pa.array([f"{SOURCES[topic]}-{batch.partition}-{offset}" for topic, offset in places]),
                    pa.array(list(told.customers)),
                    pa.array(segments).dictionary_encode(),
                    pa.array(batch.facts[rows, TIME], instant),
                    pa.array(scored.at, instant),
                    pa.array(scored.late),
                    pa.array(scored.probability),
                    pa.DictionaryArray.from_arrays(pa.array(scored.band.astype(np.int8)), names),
                    pa.array(then, mask=missing),
                    pa.DictionaryArray.from_arrays(pa.array(bands, mask=missing), names),
                    pa.array(models, pa.string(), mask=missing),
                ],
                schema=self._writer.schema,
            )
        )

    def close(self) -> None:
        """The file is whole."""
        self._writer.close()
        self._scratch.replace(self._path)


def schema(model: Model | None) -> pa.Schema:
    """Of the files: each score of the replay beside the one of its time (null where there was none)."""
    import pyarrow as pa

    instant, band = pa.timestamp("ms", "UTC"), pa.dictionary(pa.int8(), pa.string())
    return pa.schema(
        [
            ("score_id", pa.string()),
            ("customer_id", pa.string()),
            ("segment", pa.dictionary(pa.int32(), pa.string())),
            ("event_time", instant),
            ("at", instant),
            ("late", pa.bool_()),
            ("probability", pa.float32()),
            ("band", band),
            ("then_probability", pa.float32()),
            ("then_band", band),
            ("then_model", pa.string()),
        ],
        metadata={
            "model_digest": "recorded" if model is None else model.digest,
            "model_version": "recorded" if model is None else model.version,
            "format": "churnstream replay 1",
        },
    )
