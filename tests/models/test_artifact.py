"""An envelope is what its manifest says, or it is refused; ArtifactRejected is the only way out."""

import struct

import numpy as np
import pytest
import zstandard

from bench.small_model import manifest_of, repacked, small
from models import artifact, graph
from models.artifact import MAGIC, Manifest, pack, unpack
from proto.errors import ArtifactRejected


def test_packed_and_unpacked_it_is_the_same() -> None:
    model = small()
    found = unpack(model.envelope, digest=model.manifest.digest)
    assert found.manifest == model.manifest
    assert found.onnx == model.onnx
    np.testing.assert_array_equal(found.tables.share, model.tables.share)
    np.testing.assert_array_equal(found.tables.golden, model.tables.golden)
    np.testing.assert_array_equal(found.forest.weight, model.forest.weight)


def test_equal_models_are_equal_bytes() -> None:
    model = small()
    assert pack(model.manifest, model.onnx, model.tables) == model.envelope


def test_a_flipped_bit_never_makes_another_model() -> None:
    """A few bits of a compressed frame mean nothing; with any of the others it is refused."""
    model = small(trees=2, depth=2)
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(model.envelope), 500).tolist():
        changed = bytearray(model.envelope)
        changed[position] ^= 1 << int(rng.integers(8))
        try:
            found = unpack(bytes(changed), digest=model.manifest.digest)
        except ArtifactRejected:
            refused += 1
        else:
            assert found.onnx == model.onnx
            assert found.tables.encode() == model.tables.encode()
    assert refused > 490


def test_every_flipped_bit_of_the_content_is_refused() -> None:
    """Inside the compression too, where no checksum of the frame helps."""
    model = small(trees=2, depth=2)
    content = zstandard.ZstdDecompressor().decompress(model.envelope)
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(content), 300).tolist():
        changed = bytearray(content)
        changed[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(ArtifactRejected):
            unpack(zstandard.compress(bytes(changed)), digest=model.manifest.digest)


def test_every_truncation_is_refused() -> None:
    model = small(trees=2, depth=2)
    content = zstandard.ZstdDecompressor().decompress(model.envelope)
    for size in [*range(40), *range(40, len(content), 997), len(content) - 1]:
        with pytest.raises(ArtifactRejected):
            unpack(zstandard.compress(content[:size]))
        with pytest.raises(ArtifactRejected):
            unpack(model.envelope[: min(size, len(model.envelope) - 1)])
    with pytest.raises(ArtifactRejected):
        unpack(zstandard.compress(content + b"\0"))


def test_another_model_under_this_name_is_refused() -> None:
    with pytest.raises(ArtifactRejected, match="it is"):
        unpack(small(seed=5).envelope, digest=small().manifest.digest)


def test_another_feature_layout_is_refused() -> None:
    with pytest.raises(ArtifactRejected, match="feature layout"):
        unpack(repacked(layout_hash="0" * 32))


def test_a_graph_of_another_model_is_refused() -> None:
    other = small(seed=5)
    with pytest.raises(ArtifactRejected, match="made for another graph"):
        pack(small().manifest, other.onnx, small().tables)
    with pytest.raises(ArtifactRejected, match="shares"):
        unpack(repacked(onnx=other.onnx))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_shares_that_are_none_are_refused(value: float) -> None:
    share = small().tables.share.copy()
    share[0] = value
    with pytest.raises(ArtifactRejected, match="shares"):
        unpack(repacked(share=share))


def test_a_bomb_is_refused_by_the_size_it_states() -> None:
    bomb = zstandard.compress(b"\0" * (artifact.MAX_CONTENT_BYTES + 1))
    assert len(bomb) < 100_000
    with pytest.raises(ArtifactRejected, match="size"):
        unpack(bomb)
    unstated = zstandard.ZstdCompressor(write_content_size=False).compress(b"\0" * 100)
    with pytest.raises(ArtifactRejected):
        unpack(unstated)


def test_lengths_beyond_the_bytes_are_refused() -> None:
    for content in (MAGIC + struct.pack("<I", 2**32 - 1), MAGIC + struct.pack("<I", 1000) + b"{}"):
        with pytest.raises(ArtifactRejected):
            unpack(zstandard.compress(content))
    assert graph.MAX_GRAPH_BYTES < 2**32


def test_a_manifest_that_is_not_canonical_is_refused() -> None:
    model = small()
    canonical = model.manifest.canonical()
    spaced = canonical.replace(b",", b", ", 1)
    content = zstandard.ZstdDecompressor().decompress(model.envelope)
    changed = content.replace(struct.pack("<I", len(canonical)) + canonical, struct.pack("<I", len(spaced)) + spaced)
    with pytest.raises(ArtifactRejected, match="canonical"):
        unpack(zstandard.compress(changed))


def test_thresholds_in_the_wrong_order_are_refused() -> None:
    model = small()
    data = manifest_of(model.onnx, model.tables).model_dump()
    data["thresholds"] = {"medium": 0.6, "high": 0.3, "version": "x"}
    manifest = Manifest.model_validate(data)
    with pytest.raises(ArtifactRejected, match="threshold"):
        unpack(pack(manifest, model.onnx, model.tables))
