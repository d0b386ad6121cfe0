"""Baseline and detectors of the drift watch on their compacted topic: read at start, written with what the watch says."""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any, Final

import numpy as np
import zstandard

from proto.errors import BadInput
from streams.log import Log

BASELINE: Final = b"baseline"
STATE: Final = b"state"
FORMAT: Final = 1


def pack(plain: dict[str, Any], arrays: dict[str, Any]) -> bytes:
    """JSON types and arrays as one compressed record."""
    out = io.BytesIO()
    head = np.frombuffer(json.dumps({"format": FORMAT, **plain}).encode(), np.uint8)
    whole: dict[str, Any] = {"head": head, **arrays}
    np.savez(out, **whole)
    return zstandard.ZstdCompressor(level=3).compress(out.getvalue())


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `pack` took. Raises BadInput for bytes of another kind."""
    try:
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=1 << 30)
        with np.load(io.BytesIO(raw), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        plain: dict[str, Any] = json.loads(arrays.pop("head").tobytes())
        if plain.pop("format") != FORMAT:
            raise ValueError("another format")
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zstandard.ZstdError) as error:
        raise BadInput(f"the drift state on the topic cannot be read ({error}); `churnstream drift watch --afresh` begins anew") from error
    return plain, arrays


def latest(source: Log, topic: str) -> dict[bytes, bytes]:
    """The newest value of each key of a compacted topic of one partition."""
    found: dict[bytes, bytes] = {}
    low, high = source.ends(topic, 0)
    for messages in source.read(topic, 0, low, high):
        for message in messages:
            key, value = message.key() or b"", message.value()
            if value is None:
                found.pop(key, None)
            else:
                found[key] = value
    return found
