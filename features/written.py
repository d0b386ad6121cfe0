"""Texts written by compiled code: many records of one shape at once, their fields filled into a fixed text.

A record is literal, field, literal, field, ..., literal. The literals are the same for all records. A field is a piece of a common
buffer of texts, a whole number in decimal, or sixteen bytes in hexadecimal.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.compiled import kernel, types

_extending: Any = import_module("numba.extending")
_cgutils: Any = import_module("numba.core.cgutils")

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

PIECE, NUMBER, DIGEST = 0, 1, 2
"""Kinds of fields."""
DIGEST_BYTES: Final = 16
MOST_DIGITS: Final = 26
"""No number takes more bytes: 19 digits, their separators, a sign."""
_HEX: Final = np.frombuffer(b"0123456789abcdef", np.uint8).copy()
_BYTES, _TEXT = types.uint8[::1], types.Array(types.uint8, 1, "C", readonly=True)
_INTS, _TABLE, _INT = types.int64[::1], types.int64[:, ::1], types.int64
_QUOTE, _BACKSLASH, _COMMA, _CLOSE = ord('"'), ord("\\"), ord(","), ord("]")


@_extending.intrinsic
def _copy(typing, out, pos, texts, start, size):  # type: ignore[no-untyped-def]  # numba counts the parameters
    """memcpy: a loop over bytes costs several times as much for pieces of this length."""

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        target = context.make_array(signature.args[0])(context, builder, values[0]).data
        source = context.make_array(signature.args[2])(context, builder, values[2]).data
        _cgutils.raw_memcpy(builder, builder.gep(target, [values[1]]), builder.gep(source, [values[3]]), values[4], 1)
        return context.get_dummy_value()

    return types.void(out, _INT, texts, _INT, _INT), code


@kernel(_INT(_BYTES, _INT, _TEXT, _INT, _INT))
def put(out: Any, pos: int, texts: Any, start: int, end: int) -> int:
    """Copy texts[start:end]; returns the position after it."""
    _copy(out, pos, texts, start, end - start)
    return pos + end - start


@kernel(_INT(_BYTES, _INT, _INT, _INT, types.boolean))
def put_fixed(out: Any, pos: int, number: int, decimals: int, separated: bool) -> int:
    """A whole number in decimal, its last `decimals` digits behind a point, thousands separated by commas if so asked."""
    rest = np.uint64(number)
    if number < 0:
        out[pos] = ord("-")
        pos += 1
        rest = np.uint64(0) - rest
    size = 1
    left = rest // np.uint64(10)
    while left > 0 or size <= decimals:
        left //= np.uint64(10)
        size += 1
    whole = size - decimals
    size += (1 if decimals > 0 else 0) + ((whole - 1) // 3 if separated else 0)
    at = pos + size - 1
    for digit in range(whole + decimals):
        if decimals > 0 and digit == decimals:
            out[at] = ord(".")
            at -= 1
        if separated and digit > decimals and (digit - decimals) % 3 == 0:
            out[at] = _COMMA
            at -= 1
        out[at] = ord("0") + np.int64(rest % np.uint64(10))
        rest //= np.uint64(10)
        at -= 1
    return pos + size


@kernel(_INT(_TEXT, _INTS, _INTS))
def _elements(texts: Any, starts: Any, ends: Any) -> int:
    # A JSON array of strings or numbers without white space: "[", elements with "," between them, "]".
    pos = 1
    for i in range(starts.shape[0]):
        starts[i] = pos
        if texts[pos] == _QUOTE:
            pos += 1
            while texts[pos] != _QUOTE:
                pos += 2 if texts[pos] == _BACKSLASH else 1
            pos += 1
        else:
            while texts[pos] != _COMMA and texts[pos] != _CLOSE:
                pos += 1
        ends[i] = pos
        pos += 1
    return pos


def elements(array: bytes, count: int) -> tuple[IntArray, IntArray]:
    """Where the `count` strings or numbers of a JSON array stand in it: starts and ends, shape (count,) each.

    Raises ValueError when they are not as many.
    """
    starts, ends = np.empty(count, np.int64), np.empty(count, np.int64)
    if count and _elements(np.frombuffer(array + b"]" * count, np.uint8), starts, ends) != len(array):
        raise ValueError(f"not an array of {count} strings or numbers")
    return starts, ends


@kernel(_INT(_TEXT, _INTS, _INTS, _TABLE, _TABLE, _TEXT, types.Array(types.uint8, 2, "C", readonly=True), _BYTES, _INTS))
def _fill(literals: Any, at: Any, kinds: Any, values: Any, ends: Any, texts: Any, digests: Any, out: Any, stops: Any) -> int:
    pos = 0
    for i in range(values.shape[0]):
        for k in range(kinds.shape[0]):
            pos = put(out, pos, literals, at[k], at[k + 1])
            if kinds[k] == PIECE:
                pos = put(out, pos, texts, values[i, k], ends[i, k])
            elif kinds[k] == NUMBER:
                pos = put_fixed(out, pos, values[i, k], 0, False)
            else:
                for b in range(DIGEST_BYTES):
                    out[pos] = _HEX[digests[i, b] >> 4]
                    out[pos + 1] = _HEX[digests[i, b] & 15]
                    pos += 2
        pos = put(out, pos, literals, at[kinds.shape[0]], at[kinds.shape[0] + 1])
        stops[i] = pos
    return pos


class Pieces:
    """A buffer of texts under construction, and where the pieces lie in it."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, text: bytes) -> int:
        """Append a text; returns its position."""
        self._parts.append(text)
        self._size += len(text)
        return self._size - len(text)

    def choice(self, texts: Sequence[bytes], chosen: npt.NDArray[np.integer]) -> tuple[IntArray, IntArray]:
        """Starts and ends of texts[chosen], chosen being of shape (n,)."""
        bounds = np.cumsum([0, *map(len, texts)]) + self.add(b"".join(texts))
        return bounds[chosen], bounds[chosen + 1]

    def array(self, texts: bytes, count: int) -> tuple[IntArray, IntArray]:
        """Starts and ends of the elements of a JSON array."""
        starts, ends = elements(texts, count)
        at = self.add(texts)
        return starts + at, ends + at

    def each(self, texts: Sequence[bytes]) -> tuple[IntArray, IntArray]:
        """Starts and ends of as many texts as there are records."""
        bounds = np.zeros(len(texts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)), out=bounds[1:])
        bounds += self.add(b"".join(texts))
        return bounds[:-1], bounds[1:]

    def joined(self) -> ByteArray:
        """All of it, shape (size,)."""
        return np.frombuffer(b"".join(self._parts), np.uint8)


Field = tuple[IntArray, IntArray] | IntArray | ByteArray
"""Of each of n records: start and end in the buffer of texts; a number, shape (n,); or bytes for hexadecimal, shape (n, 16)."""


def fill(literals: Sequence[bytes], fields: Sequence[Field], texts: ByteArray, count: int) -> tuple[bytes, list[int]]:
    """`count` records one after the other, and where each ends. There is one literal more than fields, at most one field of bytes."""
    at = np.cumsum([0, *map(len, literals)]).astype(np.int64)
    kinds = np.empty(len(fields), np.int64)
    values, ends = np.zeros((count, len(fields)), np.int64), np.zeros((count, len(fields)), np.int64)
    digests = np.empty((0, DIGEST_BYTES), np.uint8)
    size = count * int(at[-1])
    for k, field in enumerate(fields):
        if isinstance(field, tuple):
            kinds[k] = PIECE
            values[:, k], ends[:, k] = field
            size += int((field[1] - field[0]).sum())
        elif field.ndim == 1:
            kinds[k] = NUMBER
            values[:, k] = field
            size += count * MOST_DIGITS
        else:
            kinds[k] = DIGEST
            digests = np.ascontiguousarray(field, np.uint8)
            size += count * 2 * DIGEST_BYTES
    out, stops = np.empty(size, np.uint8), np.empty(count, np.int64)
    used = _fill(np.frombuffer(b"".join(literals), np.uint8), at, kinds, values, ends, texts, digests, out, stops)
    return out[:used].tobytes(), stops.tolist()
