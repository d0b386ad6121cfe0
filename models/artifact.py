"""A model as it is published: manifest, ONNX graph and tables in one compressed envelope; nothing is believed before it is checked.

Envelope (before compression): magic, manifest length (u32), manifest, graph length (u32), graph, tables. Tables: number of tree
nodes (u32), their shares (float64), number of golden rows (u32), their vectors (float32), their probabilities (float32).
Everything little-endian. The manifest holds the sha256 of graph and tables, and its own sha256 is the model's name everywhere.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import numpy as np
import numpy.typing as npt
import orjson
import zstandard
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from features.catalog import LAYOUT_HASH, N_FEATURES, NAMES
from models import graph
from models.graph import Forest
from models.signature import envelope_of
from proto.errors import ArtifactRejected

MAX_ENVELOPE_BYTES: Final = 32 * 1024 * 1024 - 64 * 1024
"""Compressed: a record of 32 MiB, less its key and framing."""
MAX_CONTENT_BYTES: Final = 96 * 1024 * 1024
MAX_MANIFEST_BYTES: Final = 1024 * 1024
MAX_GOLDEN: Final = 4096
MAGIC: Final = b"CHURNMDL\x02\x00\x00\x00"

SHA256: Final = r"^[0-9a-f]{64}$"
Finite = Field(allow_inf_nan=False)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Thresholds(_Part):
    """Where a probability becomes "medium" and "high"; the edge itself belongs to the higher band."""

    medium: float = Field(gt=0, lt=1)
    high: float = Field(gt=0, lt=1)
    version: str = Field(min_length=1, max_length=64)


class Calibration(_Part):
    """The two numbers folded into the leaves: probability = sigmoid(slope * margin + offset)."""

    method: str = "platt, folded into the leaves"
    slope: float = Field(gt=0, allow_inf_nan=False)
    offset: float = Finite


class Manifest(_Part):
    """What a model is, on what it was trained and how it did. Open dictionaries hold figures for people, not for the runtime."""

    schema_version: int = Field(1, ge=1, le=1)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")
    parent: str = Field("", pattern=r"^([0-9a-f]{64})?$")  # digest of the model this one follows
    layout_hash: str = Field(pattern=r"^[0-9a-f]{32}$")
    features_used: list[str]  # the columns the trees may ask for; the graph still takes the whole vector
    onnx_sha256: str = Field(pattern=SHA256)
    tables_sha256: str = Field(pattern=SHA256)
    calibration: Calibration
    thresholds: Thresholds
    label: dict[str, JsonValue]
    data: dict[str, JsonValue]
    training: dict[str, JsonValue]
    metrics: dict[str, JsonValue]
    baseline: dict[str, JsonValue]
    gates: dict[str, JsonValue]
    runtime: dict[str, str]

    def canonical(self) -> bytes:
        """JSON with sorted keys and the shortest numbers: equal manifests are equal bytes."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)

    @property
    def digest(self) -> str:
        """sha256 of the canonical bytes: the identity of the model."""
        return sha256(self.canonical()).hexdigest()


@dataclass(frozen=True, slots=True)
class Tables:
    """What travels beside the graph: of each node that asks the share of the training weight that went to `yes`, float64 (nodes,), 0 on
    leaves; golden rows and what they must score."""

    share: npt.NDArray[np.float64]
    golden: npt.NDArray[np.float32]  # (rows, N_FEATURES)
    golden_probability: npt.NDArray[np.float32]  # (rows,)

    def encode(self) -> bytes:
        """The bytes whose sha256 the manifest holds."""
        return b"".join((
            struct.pack("<I", len(self.share)),
            self.share.astype("<f8").tobytes(),
            struct.pack("<I", len(self.golden)),
            self.golden.astype("<f4").tobytes(),
            self.golden_probability.astype("<f4").tobytes(),
        ))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Artifact:
    """A checked model. `digest` is the manifest's; `forest` is the graph's trees as arrays."""

    manifest: Manifest
    digest: str
    onnx: bytes
    forest: Forest
    tables: Tables


class _Reader:
    """Bytes taken from the front; asking for more than there is refuses the artifact."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise ArtifactRejected("model artifact refused: it ends before its contents do")
        part = self._data[self._at : self._at + size]
        self._at += size
        return bytes(part)

    def u32(self, bound: int, what: str) -> int:
        (value,) = struct.unpack("<I", self.take(4))
        if value > bound:
            raise ArtifactRejected(f"model artifact refused: {value:,} {what}, the bound is {bound:,}")
        return int(value)

    def rest(self) -> bytes:
        return bytes(self._data[self._at :])

    def finish(self) -> None:
        if self._at != len(self._data):
            raise ArtifactRejected(f"model artifact refused: {len(self._data) - self._at:,} bytes too many")


def pack(manifest: Manifest, onnx: bytes, tables: Tables) -> bytes:
    """The envelope. Raises ArtifactRejected when the manifest does not name these parts or the result is too large."""
    if manifest.onnx_sha256 != sha256(onnx).hexdigest() or manifest.tables_sha256 != sha256(tables.encode()).hexdigest():
        raise ArtifactRejected("model artifact refused: the manifest was made for another graph or other tables")
    canonical = manifest.canonical()
    content = b"".join((
        MAGIC,
        struct.pack("<I", len(canonical)),
        canonical,
        struct.pack("<I", len(onnx)),
        onnx,
        tables.encode(),
    ))  # fmt: skip
    envelope = zstandard.ZstdCompressor(level=9, write_checksum=True, write_content_size=True).compress(content)
    if len(envelope) > MAX_ENVELOPE_BYTES or len(content) > MAX_CONTENT_BYTES:
        raise ArtifactRejected(f"model artifact refused: {len(envelope):,} bytes compressed, the bound is {MAX_ENVELOPE_BYTES:,}")
    return envelope


def unpack(envelope: bytes, *, digest: str | None = None, layout_hash: str = LAYOUT_HASH, n_features: int = N_FEATURES) -> Artifact:
    """The model in an envelope, every check passed: sizes, digests, feature layout, graph structure, tables.

    A signature before it is passed over, not checked: that is the part of models.signature.Trust, and comes first.
    digest: what the model must be; None accepts any. Raises ArtifactRejected, and nothing else, for any bytes whatever.
    """
    reader = _Reader(_decompress(envelope_of(envelope)))
    if reader.take(len(MAGIC)) != MAGIC:
        raise ArtifactRejected("model artifact refused: it does not begin like one")
    canonical = reader.take(reader.u32(MAX_MANIFEST_BYTES, "bytes of manifest"))
    found = sha256(canonical).hexdigest()
    if digest is not None and found != digest:
        raise ArtifactRejected(f"model artifact refused: it is {found[:12]}, not {digest[:12]}")
    try:
        manifest = Manifest.model_validate_json(canonical)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactRejected(f"model artifact refused: manifest field {first['loc']}: {first['msg']}") from error
    if manifest.canonical() != canonical:
        raise ArtifactRejected("model artifact refused: the manifest is not in canonical form")
    _check_manifest(manifest, layout_hash)

    onnx = reader.take(reader.u32(graph.MAX_GRAPH_BYTES, "bytes of graph"))
    if sha256(onnx).hexdigest() != manifest.onnx_sha256:
        raise ArtifactRejected("model artifact refused: the graph is not the one in the manifest")
    if sha256(reader.rest()).hexdigest() != manifest.tables_sha256:
        raise ArtifactRejected("model artifact refused: the tables are not the ones in the manifest")
    share = np.frombuffer(reader.take(8 * reader.u32(graph.MAX_NODES, "tree nodes")), "<f8")
    rows = reader.u32(MAX_GOLDEN, "golden rows")
    golden = np.frombuffer(reader.take(4 * rows * n_features), "<f4").reshape(rows, n_features)
    tables = Tables(share, golden, np.frombuffer(reader.take(4 * rows), "<f4"))
    reader.finish()

    forest = graph.read(onnx, n_features)
    _check_tables(tables, forest)
    for what in contradictions(manifest, forest, NAMES if n_features == N_FEATURES else ()):
        raise ArtifactRejected(f"model artifact refused: {what}")
    return Artifact(manifest, found, onnx, forest, tables)


def _decompress(envelope: bytes) -> bytes:
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise ArtifactRejected(f"model artifact refused: {len(envelope):,} bytes, the bound is {MAX_ENVELOPE_BYTES:,}")
    try:
        # The size in the header is what would be allocated, so it is looked at first; a frame that does not say is refused.
        stated = zstandard.get_frame_parameters(envelope).content_size
        if stated > MAX_CONTENT_BYTES:
            raise ArtifactRejected("model artifact refused: it states no size, or one beyond the bound, for its contents")
        content = zstandard.ZstdDecompressor().decompress(envelope, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ArtifactRejected(f"model artifact refused: not decompressible ({error})") from error
    if len(content) != stated:
        raise ArtifactRejected("model artifact refused: its contents have another size than stated")
    return content


def _check_manifest(manifest: Manifest, layout_hash: str) -> None:
    if manifest.layout_hash != layout_hash:
        message = f"made for feature layout {manifest.layout_hash[:12]}, this is {layout_hash[:12]}"
        raise ArtifactRejected(f"model artifact refused: {message}; train again")
    if not manifest.thresholds.medium < manifest.thresholds.high:
        raise ArtifactRejected("model artifact refused: the medium threshold is not below the high one")


def contradictions(manifest: Manifest, forest: Forest, names: Sequence[str]) -> Iterator[str]:
    """What a manifest says that cannot be: against the trees, against the gates every model has passed, against itself.

    names: of the columns of a vector; () leaves the features out. Figures a manifest does not state are not asked for.
    """
    used = set(manifest.features_used)
    asked = {names[column] for column in np.unique(forest.feature[forest.feature >= 0]).tolist()} if names else set()
    if asked - used:
        yield f"its trees ask for {min(asked - used)}, which is not among the features it says it uses"
    if names and used - set(names):
        yield f"it says it uses {min(used - set(names))}, which is no feature of this layout"
    for gate, bound in (("onnx_parity_max", 1e-5), ("threshold_flips", 0), ("batch_dependent_rows", 0)):
        reached = manifest.gates.get(gate, 0)
        if not isinstance(reached, int | float) or not 0 <= reached <= bound:
            yield f"gate {gate} = {reached}, the bound is {bound:g}"
    constants = [manifest.calibration.slope, manifest.calibration.offset]
    if manifest.training.get("platt", constants) != constants:
        yield f"calibrated by {constants}, trained with {manifest.training['platt']}"
    for part, figures in manifest.metrics.items():
        if not isinstance(figures, dict):
            continue
        for name in ("auc", "brier", "base_rate", "mean_score", "average_precision"):
            value = figures.get(name)
            if value is not None and (not isinstance(value, int | float) or not 0 <= value <= 1):
                yield f"{part} {name} = {value} is none"
        auc, interval = figures.get("auc"), figures.get("auc_interval")
        known = isinstance(auc, float) and isinstance(interval, list) and all(isinstance(end, int | float) for end in interval)
        if known and not interval[0] <= auc <= interval[-1]:  # type: ignore[index,operator]  # both are what the line above asks
            yield f"{part} AUC {auc} lies outside its interval {interval}"


def _check_tables(tables: Tables, forest: Forest) -> None:
    share = tables.share
    if len(share) != forest.n_nodes:
        raise ArtifactRejected(f"model artifact refused: {len(share):,} shares for {forest.n_nodes:,} tree nodes")
    if not np.all((share >= 0) & (share <= 1)) or share[forest.feature < 0].any():
        raise ArtifactRejected("model artifact refused: the shares do not belong to these trees")
    if len(tables.golden) == 0:
        raise ArtifactRejected("model artifact refused: it has no golden rows")
    golden = tables.golden_probability
    if len(golden) > 1 and forest.n_nodes > len(forest.root) and golden.min() == golden.max():
        raise ArtifactRejected(f"model artifact refused: all {len(golden)} golden rows score the same")
    if not np.all((golden >= 0) & (golden <= 1)):
        raise ArtifactRejected("model artifact refused: a golden probability is not one")
