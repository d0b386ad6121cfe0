"""What another model would have said: a range of the topics told again with it, beside what was scored then. Touches nothing live."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import orjson

from features.facts import PROFILE, SOURCES, TIME
from proto.scores import BANDS
from streams.evaluate import Rules, score
from streams.rerun import Rerun, Told
from streams.scores import Model, Scored

if TYPE_CHECKING:
    import pyarrow as pa

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
    customers: int = 0
    customers_flipped: int = 0
    digest: str = ""

    def add(self, other: Replayed) -> None:
        """Another partition's; its customers are others."""
        for name in ("rows", "compared", "equal", "handled", "moves", "customers", "customers_flipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.largest_move = max(self.largest_move, other.largest_move)
        self.flips.update(other.flips)
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
            "customers": self.customers,
            "customers_flipped": self.customers_flipped,
            "segments": {
                segment: {"compared": compared, "flips": flips, "up": up}
                for segment, (compared, flips, up) in sorted(self.segments.items())
            },
        }


def replay(rerun: Rerun, model: Model, rules: Rules, out: Callable[[Told, Scored, list[str]], None] | None = None) -> Replayed:
    """Tell a partition again with this model for every score inside the span.

    Last scores and alerts are those of the replay from the beginning of the span on; before it, those of the time. out: is given
    each stretch with its scores and the segment of each.
    """
    found = Replayed()
    content = blake2b(digest_size=16)
    segments: dict[str, str] = {}
    seen: set[str] = set()
    flipped: set[str] = set()
    for told in rerun:
        _note_segments(told, segments)
        scored = score(
            rerun.histories, model, rules, told.customers, told.rows, told.at, told.late, told.vectors, told.sources, rerun.parts.part
        )
        with rerun.parts.part("report"):
            made = np.empty(len(told.rows), _OUT)
            made["topic"], made["offset"] = told.batch.topic[told.rows], told.batch.offset[told.rows]
            made["at"], made["probability"], made["band"] = scored.at, scored.probability, scored.band
            content.update(made.tobytes())
            found.rows += len(made)
            seen.update(told.customers)
            theirs = [segments.get(customer, NOWHERE) for customer in told.customers] if segments else [NOWHERE] * len(made)
            _compare(found, told, scored, theirs, flipped)
            if out is not None:
                out(told, scored, theirs)
    found.handled, found.digest = rerun.handled, content.hexdigest()
    found.customers, found.customers_flipped = len(seen), len(flipped)
    return found


def _note_segments(told: Told, segments: dict[str, str]) -> None:
    batch = told.batch
    for i in np.flatnonzero((batch.topic == _PROFILES) & (batch.reason == 0)).tolist():
        segments[batch.customer[i]] = orjson.loads(batch.messages[i].value()).get("segment") or NOWHERE


def _compare(found: Replayed, told: Told, scored: Scored, theirs: list[str], flipped: set[str]) -> None:
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
    found.largest_move = max(found.largest_move, float(move.max()))
    width = len(BANDS)
    pairs = np.bincount(block.band[place].astype(np.int64) * width + scored.band[there], minlength=width * width)
    found.flips.update({(BANDS[i // width], BANDS[i % width]): int(pairs[i]) for i in np.flatnonzero(pairs).tolist()})
    changed = scored.band[there] != block.band[place]
    up = scored.band[there] > block.band[place]
    flipped.update(told.customers[i] for i in there[changed].tolist())
    for segment in set(theirs):
        mine = np.fromiter((theirs[i] == segment for i in there.tolist()), np.bool_, len(there))
        counts = found.segments.setdefault(segment, [0, 0, 0])
        counts[0] += int(mine.sum())
        counts[1] += int((mine & changed).sum())
        counts[2] += int((mine & up).sum())


class Files:
    """Replayed scores as Parquet, one file a partition; it gets its name when it is whole."""

    def __init__(self, directory: Path, partition: int, model: Model) -> None:
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


def schema(model: Model) -> pa.Schema:
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
        metadata={"model_digest": model.digest, "model_version": model.version, "format": "churnstream replay 1"},
    )
