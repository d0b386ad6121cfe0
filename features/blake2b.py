"""BLAKE2b-128 of many rows of equal length, eight rows side by side.

The standard library hashes one row a call. Here the compression function is written out once as vector operations, one lane for each
of eight rows, and stays in registers.
Source: RFC 7693.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.compiled import kernel, types

_extending: Any = import_module("numba.extending")
_cgutils: Any = import_module("numba.core.cgutils")
_ir: Any = import_module("llvmlite.ir")

DIGEST_BYTES: Final = 16
LANES: Final = 8
BLOCK: Final = 16
"""Words of 64 bits in a block."""
_WORD = _ir.IntType(64)
_WORDS = _ir.VectorType(_WORD, LANES)
_START: Final = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
# No key, one leaf; the length of the digest in the lowest byte.
_STATE: Final = np.array([_START[0] ^ 0x01010000 ^ DIGEST_BYTES, *_START[1:]], np.uint64)
_SIGMA: Final = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
_ROUNDS: Final = 12
_MIXED: Final = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15), (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_TURNS: Final = (32, 24, 16, 63)


def _everywhere(number: int) -> Any:
    return _ir.Constant(_WORDS, [number] * LANES)


def _turned(builder: Any, word: Any, bits: int) -> Any:
    return builder.or_(builder.lshr(word, _everywhere(bits)), builder.shl(word, _everywhere(64 - bits)))


def _mix(builder: Any, v: list[Any], places: Sequence[int], first: Any, second: Any) -> None:
    a, b, c, d = places
    for word, (above, below) in ((first, _TURNS[:2]), (second, _TURNS[2:])):
        v[a] = builder.add(builder.add(v[a], v[b]), word)
        v[d] = _turned(builder, builder.xor(v[d], v[a]), above)
        v[c] = builder.add(v[c], v[d])
        v[b] = _turned(builder, builder.xor(v[b], v[c]), below)


@_extending.intrinsic
def _compress(typing, state, block, read, last):  # type: ignore[no-untyped-def]  # numba counts the parameters
    """Take a block (BLOCK, LANES) into the state (8, LANES). read: bytes up to its end; last: all bits set in the last one, else 0."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        h, m = (
            [
                builder.gep(builder.bitcast(context.make_array(kind)(context, builder, value).data, _WORDS.as_pointer()), [_WORD(i)])
                for i in range(count)
            ]
            for kind, value, count in zip(signature.args, values, (8, BLOCK), strict=False)
        )
        nothing = _ir.Constant(_WORDS, _ir.Undefined)
        first = _ir.Constant(_ir.VectorType(_ir.IntType(32), LANES), [0] * LANES)
        read, last = (
            builder.shuffle_vector(builder.insert_element(nothing, number, _ir.IntType(32)(0)), nothing, first) for number in values[2:]
        )
        words = [builder.load(place, align=8) for place in m]
        before = [builder.load(place, align=8) for place in h]
        v = [*before, *map(_everywhere, _START)]
        v[12], v[14] = builder.xor(v[12], read), builder.xor(v[14], last)
        for number in range(_ROUNDS):
            order = _SIGMA[number % len(_SIGMA)]
            for i, places in enumerate(_MIXED):
                _mix(builder, v, places, words[order[2 * i]], words[order[2 * i + 1]])
        for i, place in enumerate(h):
            builder.store(builder.xor(builder.xor(before[i], v[i]), v[i + 8]), place, align=8)
        return context.get_dummy_value()

    return types.void(state, block, types.uint64, types.uint64), code


@kernel("void(uint32[:, ::1], uint64[:, ::1])")
def _hash(rows: Any, found: Any) -> None:
    count, width = rows.shape
    blocks = max(1, (width + 2 * BLOCK - 1) // (2 * BLOCK))
    state, block = np.empty((8, LANES), np.uint64), np.empty((BLOCK, LANES), np.uint64)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        for i in range(8):
            for lane in range(LANES):
                state[i, lane] = _STATE[i]
        for b in range(blocks):
            for i in range(BLOCK):
                at = 2 * (BLOCK * b + i)
                for lane in range(LANES):
                    word = np.uint64(0)
                    if lane < lanes and at < width:
                        word = np.uint64(rows[first + lane, at])
                        if at + 1 < width:
                            word |= np.uint64(rows[first + lane, at + 1]) << np.uint64(32)
                    block[i, lane] = word
            last = np.uint64(0xFFFFFFFFFFFFFFFF) if b == blocks - 1 else np.uint64(0)
            _compress(state, block, np.uint64(min(4 * width, 8 * BLOCK * (b + 1))), last)
        for lane in range(lanes):
            found[first + lane, 0] = state[0, lane]
            found[first + lane, 1] = state[1, lane]


def blake2b_rows(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """blake2b-128 of the little-endian bytes of each row of a float32 array (n, width), uint8 of shape (n, DIGEST_BYTES)."""
    found = np.empty((len(rows), DIGEST_BYTES // 8), np.uint64)
    _hash(np.require(rows, np.float32, ["C", "W"]).view(np.uint32), found)  # writable because the compiled signature says so
    return found.astype("<u8", copy=False).view(np.uint8)
