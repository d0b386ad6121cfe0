"""Texts of a batch as numbers: 64-bit keyed digests, RFC 3339 times and decimal amounts, in compiled loops over joined bytes."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import numpy as np
import numpy.typing as npt

from features.compiled import kernel, types
from features.facts import NONE

IntArray = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

UNSURE: Final = NONE + 1
"""A text the compiled loops leave to the slow, complete reader (it may be right or wrong)."""
SATURATED: Final = 10**18
"""An amount beyond every accepted one."""

_U = np.uint64
_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_INTS = types.int64[::1]


@kernel(types.void(_BYTES, _INTS, types.uint64, types.uint64, _INTS))
def _siphash(data: Bytes, lengths: IntArray, k0: np.uint64, k1: np.uint64, out: IntArray) -> None:
    """SipHash-2-4 of consecutive texts; an empty text gives 0, and no other one does (0 becomes 1)."""
    start = 0
    for i in range(lengths.size):
        n = lengths[i]
        if n == 0:
            out[i] = 0
            continue
        v0 = k0 ^ _U(0x736F6D6570736575)
        v1 = k1 ^ _U(0x646F72616E646F6D)
        v2 = k0 ^ _U(0x6C7967656E657261)
        v3 = k1 ^ _U(0x7465646279746573)
        words = n // 8
        for w in range(words + 2):
            # words, then the rest with the length in its top byte, then the four closing rounds
            m = _U(0)
            if w < words:
                at = start + 8 * w
                for j in range(8):
                    m |= _U(data[at + j]) << _U(8 * j)
            elif w == words:
                at = start + 8 * w
                for j in range(n - 8 * w):
                    m |= _U(data[at + j]) << _U(8 * j)
                m |= _U(n & 255) << _U(56)
            else:
                v2 ^= _U(255)
            rounds = 4 if w > words else 2
            v3 ^= m
            for _ in range(rounds):
                v0 += v1
                v1 = (v1 << _U(13)) | (v1 >> _U(51))
                v1 ^= v0
                v0 = (v0 << _U(32)) | (v0 >> _U(32))
                v2 += v3
                v3 = (v3 << _U(16)) | (v3 >> _U(48))
                v3 ^= v2
                v0 += v3
                v3 = (v3 << _U(21)) | (v3 >> _U(43))
                v3 ^= v0
                v2 += v1
                v1 = (v1 << _U(17)) | (v1 >> _U(47))
                v1 ^= v2
                v2 = (v2 << _U(32)) | (v2 >> _U(32))
            v0 ^= m
        digest = np.int64(v0 ^ v1 ^ v2 ^ v3)
        out[i] = 1 if digest == 0 else digest
        start += n


@kernel(types.int64(_BYTES, types.int64, types.int64))
def _digits(data: Bytes, start: int, count: int) -> int:
    """The number written in `count` decimal digits, -1 when one of them is none."""
    value = 0
    for i in range(start, start + count):
        digit = int(data[i]) - 48
        if digit < 0 or digit > 9:
            return -1
        value = value * 10 + digit
    return value


@kernel(types.void(_BYTES, _INTS, _INTS))
def _times(data: Bytes, lengths: IntArray, out: IntArray) -> None:
    """Epoch milliseconds of consecutive RFC 3339 texts; UNSURE for whatever is not the plain form."""
    stop = 0
    for i in range(lengths.size):
        start = stop
        stop += lengths[i]
        out[i] = UNSURE
        if stop - start < 20:
            continue
        year, month, day = _digits(data, start, 4), _digits(data, start + 5, 2), _digits(data, start + 8, 2)
        hour, minute, second = _digits(data, start + 11, 2), _digits(data, start + 14, 2), _digits(data, start + 17, 2)
        if data[start + 4] != 45 or data[start + 7] != 45 or data[start + 10] != 84 or data[start + 13] != 58 or data[start + 16] != 58:
            continue
        if not (year >= 1 and 1 <= month <= 12 and day >= 1 and 0 <= hour <= 23 and 0 <= minute <= 59 and 0 <= second <= 59):
            continue
        leap = (year % 4 == 0 and year % 100 != 0) or year % 400 == 0
        longest = 30 if month in (4, 6, 9, 11) else 31
        if month == 2:
            longest = 29 if leap else 28
        if day > longest:
            continue
        at = start + 19
        fraction = 0
        if data[at] == 46:
            at += 1
            first = at
            while at < stop and 48 <= data[at] <= 57:
                if at - first < 3:
                    fraction = fraction * 10 + int(data[at]) - 48
                at += 1
            if at == first:
                continue
            for _ in range(at - first, 3):
                fraction *= 10
        offset = 0
        if at == stop - 1 and data[at] == 90:
            pass
        elif at == stop - 6 and (data[at] == 43 or data[at] == 45) and data[at + 3] == 58:
            hours, minutes = _digits(data, at + 1, 2), _digits(data, at + 4, 2)
            if hours < 0 or hours > 23 or minutes < 0 or minutes > 59:
                continue
            offset = hours * 60 + minutes
            if data[at] == 45:
                offset = -offset
        else:
            continue
        # Days from civil (Hinnant): years begin in March, so the leap day is the last one.
        y = year - 1 if month <= 2 else year
        era = y // 400
        of_era = y - era * 400
        of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
        days = era * 146_097 + of_era * 365 + of_era // 4 - of_era // 100 + of_year - 719_468
        out[i] = (((days * 24 + hour) * 60 + minute - offset) * 60 + second) * 1000 + fraction


@kernel(types.void(_BYTES, _INTS, types.int64, _INTS))
def _amounts(data: Bytes, lengths: IntArray, exponent: int, out: IntArray) -> None:
    """Minor units, half-even, of consecutive plain decimals (12, 12.345, or quoted).

    NONE for an empty text or `null`; SATURATED from 10**18 on; UNSURE for whatever has a sign, an exponent or other characters.
    """
    stop = 0
    for i in range(lengths.size):
        start = stop
        stop += lengths[i]
        end = stop
        if start == end or (end - start == 4 and data[start] == 110):
            out[i] = NONE
            continue
        if end - start >= 2 and data[start] == 34 and data[end - 1] == 34:
            start += 1
            end -= 1
        out[i] = UNSURE
        # More digits before the point can overflow a float, which is another verdict.
        value, seen, decimals, point = 0, 0, 0, False
        half, rest = -1, False  # first digit cut off; anything but zeros behind it
        sound = end - start <= 300
        for at in range(start, end):
            digit = int(data[at]) - 48
            if digit == -2 and not point and seen > 0 and at + 1 < end:
                point = True
            elif digit < 0 or digit > 9:
                sound = False
                break
            elif point and decimals == exponent:
                if half < 0:
                    half = digit
                elif digit != 0:
                    rest = True
            else:
                seen += 1
                decimals += 1 if point else 0
                value = value * 10 + digit if value < SATURATED // 10 else SATURATED
        if not sound or seen == 0:
            continue
        for _ in range(decimals, exponent):
            value = value * 10 if value < SATURATED // 10 else SATURATED
        if half > 5 or (half == 5 and (rest or value % 2 == 1)):
            value += 1
        out[i] = min(value, SATURATED)


def _joined(texts: Sequence[str]) -> tuple[Bytes, IntArray]:
    together = "".join(texts)
    if together.isascii():
        return np.frombuffer(together.encode(), np.uint8), np.fromiter(map(len, texts), np.int64, len(texts))
    encoded = [text.encode() for text in texts]
    return np.frombuffer(b"".join(encoded), np.uint8), np.fromiter(map(len, encoded), np.int64, len(encoded))


def key_of(secret: bytes, purpose: str) -> tuple[np.uint64, np.uint64]:
    """A SipHash key for one purpose (e.g. the ids of a topic): digests of different purposes have nothing to do with each other."""
    material = np.frombuffer(blake2b(purpose.encode(), key=blake2b(secret).digest(), digest_size=16).digest(), "<u8")
    return material[0], material[1]


def digests(texts: Sequence[str], key: tuple[np.uint64, np.uint64]) -> IntArray:
    """SipHash-2-4 of each text in UTF-8, as int64, shape (n,): 0 for an empty text and for no other."""
    out = np.empty(len(texts), np.int64)
    _siphash(*_joined(texts), *key, out)
    return out


def times(texts: Sequence[str]) -> IntArray:
    """Epoch milliseconds of RFC 3339 texts, shape (n,); UNSURE where the complete reader has to look (proto.events.epoch_ms)."""
    out = np.empty(len(texts), np.int64)
    _times(*_joined(texts), out)
    return out


def amounts(raw: Sequence[bytes | memoryview], lengths: Sequence[int], exponent: int) -> IntArray:
    """Minor units of JSON amounts as they stand in the record, shape (n,); NONE when absent, UNSURE and SATURATED as said above."""
    out = np.empty(len(raw), np.int64)
    _amounts(np.frombuffer(b"".join(raw), np.uint8), np.array(lengths, np.int64), exponent, out)
    return out
