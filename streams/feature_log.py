"""The feature log: the vector of each score as it was scored, compact on a topic, as columns in Parquet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from features.catalog import LAYOUT_HASH, N_FEATURES, NAMES
from features.facts import SILENCE, SOURCES, TIME, TOPICS
from proto.errors import BadInput
from streams.codec import RawMessage
from streams.emitted import first_wins
from streams.log import Log
from streams.merge import Batch
from streams.scores import Scored

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT: Final = b"CFL1"
CAUSES: Final = ("event", "silence", "late")
"""Why a vector was scored, by code."""
LAYOUT: Final = np.frombuffer(bytes.fromhex(LAYOUT_HASH), np.uint8)
HEAD: Final = [
    ("format", "V4"),
    ("cause", "u1"),
    ("topic", "u1"),  # index of the source topic
    ("late", "u1"),
    ("layout", "u1", len(LAYOUT)),
    ("partition", "<i4"),
    ("offset", "<i8"),
    ("event_time", "<i8"),
    ("at", "<i8"),
    ("cut", "<i8", len(TOPICS)),
]
"""Little-endian and packed; the float32 values of the vector follow, in the order of the layout."""
RECORD: Final = np.dtype([*HEAD, ("vector", "<f4", N_FEATURES)])
_PREFIX: Final = np.dtype(HEAD).itemsize
_FORMAT: Final = np.void(FORMAT)


def feature_records(batch: Batch, scored: Scored) -> list[dict[str, Any]]:
    """The vectors of a batch's scores as {"key", "value"}, in its order; a pure function of its arguments."""
    rows = scored.rows
    columns = np.zeros(len(rows), RECORD)
    columns["format"] = _FORMAT
    columns["layout"] = LAYOUT
    columns["topic"] = batch.topic[rows]
    columns["late"] = scored.late
    columns["cause"] = np.where(batch.topic[rows] == SILENCE, CAUSES.index("silence"), np.where(scored.late, CAUSES.index("late"), 0))
    columns["partition"] = batch.partition
    columns["offset"] = batch.offset[rows]
    columns["event_time"] = batch.facts[rows, TIME]
    columns["at"] = scored.at
    columns["cut"] = batch.cuts()[rows]
    columns["vector"] = scored.vectors
    data, size = columns.tobytes(), RECORD.itemsize
    values = [data[start : start + size] for start in range(0, len(data), size)]
    return [{"key": customer, "value": value} for customer, value in zip(scored.customers, values, strict=True)]


@dataclass(frozen=True, slots=True)
class Vectors:
    """n logged vectors under this catalog, in the order of the log; `columns` of dtype RECORD."""

    customers: list[str]
    columns: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.customers)

    @property
    def score_ids(self) -> list[str]:
        """Of the score each belongs to."""
        c = self.columns
        places = zip(c["topic"].tolist(), c["partition"].tolist(), c["offset"].tolist(), strict=True)
        return [f"{SOURCES[topic]}-{partition}-{offset}" for topic, partition, offset in places]


def read(messages: Sequence[RawMessage]) -> Vectors:
    """Records of the log as columns; those of another layout are left out. Raises BadInput for one that is none."""
    customers, values = [], []
    for message in messages:
        value = message.value() or b""
        if len(value) < _PREFIX or value[: len(FORMAT)] != FORMAT:
            raise BadInput(f"offset {message.offset()} of the feature log is no record of it")
        if len(value) == RECORD.itemsize:
            values.append(value)
            customers.append((message.key() or b"").decode("utf-8", "replace"))
    columns = np.frombuffer(b"".join(values), RECORD)
    ours = (columns["layout"] == LAYOUT).all(axis=1)
    if not ours.all():
        customers = [customer for customer, mine in zip(customers, ours.tolist(), strict=True) if mine]
        columns = columns[ours]
    return Vectors(customers, columns)


@dataclass(slots=True)
class Logged:
    """The feature log of one partition, asked for score after score in their order; of repeated records the first counts."""

    source: Log
    topic: str
    partition: int
    _pieces: Iterator[list[RawMessage]] = field(init=False)
    _known: dict[tuple[int, int], bytes] = field(default_factory=dict)
    _reached: int = -len(TOPICS) - 1

    def __post_init__(self) -> None:
        low, high = self.source.ends(self.topic, self.partition)
        self._pieces = self.source.read(self.topic, self.partition, low, high)

    def of(self, places: Sequence[tuple[int, int]], key: int) -> list[bytes | None]:
        """The vectors (bytes of float32) of these (topic index, offset); None where none is logged. key: sum of the last one's cut."""
        while self._reached < key and (messages := next(self._pieces, None)) is not None:
            columns = read(messages).columns
            if len(columns):
                self._reached = int(columns["cut"].sum(axis=1).max())
            data = np.ascontiguousarray(columns["vector"]).tobytes()
            size = N_FEATURES * 4
            for i, place in enumerate(zip(columns["topic"].tolist(), columns["offset"].tolist(), strict=True)):
                self._known.setdefault(place, data[i * size : (i + 1) * size])
        return [self._known.pop(place, None) for place in places]


def once(pieces: Iterable[Vectors]) -> Iterator[Vectors]:
    """By the reader rule: what is not above the highest offset seen of its topic is a repetition."""
    high = np.full(len(SOURCES), -1, np.int64)
    for piece in pieces:
        new = first_wins(piece.columns["topic"], piece.columns["offset"], high)
        yield piece if new.all() else _some(piece, new)


def _some(piece: Vectors, which: npt.NDArray[np.bool_]) -> Vectors:
    return Vectors([name for name, wanted in zip(piece.customers, which.tolist(), strict=True) if wanted], piece.columns[which])


def schema() -> pa.Schema:
    """Of the Parquet files: what a vector belongs to, then one float32 column per feature; NaN = unknown, as it was scored."""
    import pyarrow as pa

    instant = pa.timestamp("ms", "UTC")
    fields = [
        pa.field("score_id", pa.string()),
        pa.field("customer_id", pa.string()),
        pa.field("event_time", instant),
        pa.field("at", instant),
        pa.field("cause", pa.dictionary(pa.int8(), pa.string())),
        pa.field("late", pa.bool_()),
        *(pa.field(f"cut_{name}", pa.int64()) for name in TOPICS),
        pa.field("vector_hash", pa.string()),
        *(pa.field(name, pa.float32()) for name in NAMES),
    ]
    return pa.schema(fields, metadata={"layout_hash": LAYOUT_HASH, "format": "churnstream features 1"})


def table(piece: Vectors) -> pa.Table:
    """Logged vectors as a table of `schema`."""
    import pyarrow as pa

    c = piece.columns
    vectors = np.ascontiguousarray(c["vector"])
    data, size = vectors.tobytes(), N_FEATURES * 4
    hashes = [blake2b(data[start : start + size], digest_size=16).hexdigest() for start in range(0, len(data), size)]
    instant = pa.timestamp("ms", "UTC")
    columns = [
        pa.array(piece.score_ids),
        pa.array(piece.customers),
        pa.array(c["event_time"], instant),
        pa.array(c["at"], instant),
        pa.DictionaryArray.from_arrays(pa.array(c["cause"].astype(np.int8)), pa.array(CAUSES)),
        pa.array(c["late"].astype(np.bool_)),
        *(pa.array(np.ascontiguousarray(c["cut"][:, i])) for i in range(len(TOPICS))),
        pa.array(hashes),
        *(pa.array(np.ascontiguousarray(vectors[:, i])) for i in range(N_FEATURES)),
    ]
    return pa.Table.from_arrays(columns, schema=schema())


def export(source: Log, topic: str, partition: int, directory: Path, from_ms: int, to_ms: int) -> int:
    """Write the vectors of one partition scored at instants [from_ms, to_ms) to `part-<partition>.parquet`; how many.

    The file gets its name when it is whole. Metadata of the schema holds the layout hash.
    """
    import pyarrow.parquet as pq

    low, high = source.ends(topic, partition)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"part-{partition}.parquet"
    scratch = path.with_suffix(".tmp")
    count = 0
    with pq.ParquetWriter(scratch, schema(), compression="zstd") as writer:
        for piece in once(read(messages) for messages in source.read(topic, partition, low, high)):
            at = piece.columns["at"]
            inside = _some(piece, (at >= from_ms) & (at < to_ms))
            if len(inside):
                writer.write_table(table(inside))
                count += len(inside)
    scratch.replace(path)
    return count
