"""A customer as bytes: facts in chunks, carry, last vector and last score; compact, checked, and read without trust.

`main` holds the prefix, the open chunk, the score, the vector and the carry; every 64 facts a chunk closes and is stored apart.
The layout is documented byte by byte in docs/state.md. All code here is integer only: a float is moved as its bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from features.carry import (
    BASE,
    CARRY_WIDTH,
    FIRST,
    LAST_WIDTH,
    LASTS_AT,
    NEWEST,
    PROFILE_AT,
    PROFILE_WIDTH,
    empty,
)
from features.catalog import LASTS, LAYOUT_HASH, N_FEATURES
from features.compiled import kernel
from features.facts import ID, KIND, LEVEL, NONE, OFFSET, TIME, VALUE, WIDTH, A
from features.store import FORMAT, PREFIX, CustomerState
from proto.errors import ChainBroken, StateDamaged

CHUNK: Final = 64
"""Facts of a closed chunk: sequence numbers [64 k, 64 k + 64)."""
FACT_BYTES: Final = 1 + 4 * 10 + 1 + 4 * 8 + 8
"""No fact takes more."""
MAX_CHUNK_BYTES: Final = 4 + 10 + 1 + CHUNK * FACT_BYTES
CODE_BYTES: Final = (N_FEATURES + 3) // 4
BITMAP_BYTES: Final = (CARRY_WIDTH + 7) // 8
HEAD_BYTES: Final = 17
MAX_MAIN_BYTES: Final = HEAD_BYTES + CHUNK * FACT_BYTES + 25 + CODE_BYTES + 4 * N_FEATURES + BITMAP_BYTES + 10 * CARRY_WIDTH
"""Room an encoder must find in the buffer before it starts; it does not look again."""

TRUNCATED: Final = -1
CHECKSUM: Final = -2
UNKNOWN_FORMAT: Final = -3
INCONSISTENT: Final = -4
OTHER_CATALOG: Final = -5

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

BAND_MASK: Final = 3
ALERT_SHIFT: Final = 2
SOURCE_SHIFT: Final = 4
"""A score is stored with one byte: its own band in bits 0 and 1, the one last alerted in bits 2 and 3, in bits 4 to 6 one more than
the index of its source (features.facts.SOURCES). Without a source (0: format 1) there is no offset of it either."""

_FORMER_FORMAT: Final = 1
_LAYOUT_TAG: Final = int(LAYOUT_HASH[:4], 16)
_HAS_CARRY: Final = 1
_HAS_SCORE: Final = 2
_HAS_VECTOR: Final = 4

_VALUE_KNOWN: Final = 32
_SAME_LEVEL: Final = 64
_SAME_TEXTS: Final = 128

_ZERO: Final = 0  # +0.0
_SMALL: Final = 1  # a whole number 1..255, one byte
_NAN: Final = 2  # the canonical NaN
_RAW: Final = 3
_NAN_BITS: Final = 0x7FC00000

# Everything is int64 here: masks make the arithmetic shifts logical, multiplications wrap, constants are written as signed.
_32_BITS: Final = (1 << 32) - 1
_35_BITS: Final = (1 << 35) - 1
_57_BITS: Final = (1 << 57) - 1
_63_BITS: Final = (1 << 63) - 1
_SEED: Final = 0xC2B2AE3D27D4EB4F - (1 << 64)
_MULTIPLIER: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_FINAL_MULTIPLIER: Final = 0xD6E8FEB86659FD93 - (1 << 64)

_PLAIN: Final = 0  # zigzag varint of the number
_DIGEST: Final = 1  # eight bytes
_FROM_NEWEST: Final = 2  # difference to the newest event time of the carry
_FROM_CLOCK: Final = 3  # difference to the newest time of the same clock


def _carry_forms() -> npt.NDArray[np.uint8]:
    forms = np.full(CARRY_WIDTH, _PLAIN, np.uint8)
    forms[NEWEST + 1 : FIRST] = _FROM_NEWEST
    forms[FIRST:LASTS_AT] = _FROM_CLOCK
    forms[LASTS_AT + 1 : LASTS_AT + LAST_WIDTH * len(LASTS) : LAST_WIDTH] = _FROM_NEWEST
    forms[PROFILE_AT] = _FROM_NEWEST
    forms[PROFILE_AT + 4 : PROFILE_AT + PROFILE_WIDTH] = _DIGEST
    return forms


_FORMS: Final = _carry_forms()
_NEUTRAL: Final = empty()

# Scratch of a chunk while it is written or read: per topic the former offset, level and texts, per text column the values seen.
_OFFSETS: Final = 0
_LEVELS: Final = 4
_TEXTS: Final = 8
_COUNTS: Final = 24
_SEEN: Final = 28
_SCRATCH: Final = _SEEN + 4 * CHUNK


@kernel("int64(uint8[::1], int64)")
def _byte(buffer: ByteArray, pos: int) -> int:
    return int(buffer[pos])


@kernel("int64(int64)")
def _zigzag(number: int) -> int:
    return (number << 1) ^ (number >> 63)


@kernel("int64(int64)")
def _unzigzag(word: int) -> int:
    return ((word >> 1) & _63_BITS) ^ -(word & 1)


@kernel("int64(uint8[::1], int64, int64)")
def _put_varint(out: ByteArray, pos: int, word: int) -> int:
    """Seven bits a byte, lowest first, of the word taken as unsigned."""
    while word & ~127:
        out[pos] = (word & 127) | 128
        word = (word >> 7) & _57_BITS
        pos += 1
    out[pos] = word
    return pos + 1


@kernel("UniTuple(int64, 2)(uint8[::1], int64, int64)")
def _get_varint(buffer: ByteArray, pos: int, end: int) -> tuple[int, int]:
    """The word and the position after it, or an error < 0 as position."""
    word = 0
    for shift in range(0, 70, 7):
        if pos >= end:
            break
        byte = _byte(buffer, pos)
        pos += 1
        word |= (byte & 127) << shift
        if byte < 128:
            return word, pos
    return 0, TRUNCATED


@kernel("int64(uint8[::1], int64, int64, int64)")
def _put_bytes(out: ByteArray, pos: int, number: int, size: int) -> int:
    for i in range(size):
        out[pos + i] = (number >> (8 * i)) & 255
    return pos + size


@kernel("int64(uint8[::1], int64, int64)")
def _get_bytes(buffer: ByteArray, pos: int, size: int) -> int:
    number = 0
    for i in range(size):
        number |= _byte(buffer, pos + i) << (8 * i)
    return number


@kernel("int64(int64, uint8[::1], int64, int64)")
def _mix(state: int, buffer: ByteArray, pos: int, end: int) -> int:
    """Fold bytes into the state. Every step is a bijection of the state, so a change within one word never gets lost."""
    while pos + 8 <= end:
        state = (state ^ _get_bytes(buffer, pos, 8)) * _MULTIPLIER
        state ^= (state >> 29) & _35_BITS
        pos += 8
    state = (state ^ _get_bytes(buffer, pos, end - pos)) * _MULTIPLIER
    return state ^ ((state >> 29) & _35_BITS) ^ (end - pos)


@kernel("int64(uint8[::1], int64, int64, int64)")
def checksum(buffer: ByteArray, pos: int, at: int, end: int) -> int:
    """32 bits over buffer[pos:end] without the four bytes at `at`, which hold it."""
    state = _mix(_mix(_SEED, buffer, pos, at), buffer, at + 4, end)
    state = (state ^ ((state >> 32) & _32_BITS)) * _FINAL_MULTIPLIER
    return (state >> 32) & _32_BITS


@kernel("int64(int64[:, ::1], int64, int64, uint8[::1], int64)")
def _put_facts(facts: IntArray, first: int, count: int, out: ByteArray, pos: int) -> int:
    scratch = np.zeros(_SCRATCH, np.int64)
    time = 0
    for row in range(first, first + count):
        kind = facts[row, KIND] & 31
        topic = kind >> 3
        texts = _TEXTS + 4 * topic
        header = kind
        value = facts[row, VALUE]
        if value != NONE:
            header |= _VALUE_KNOWN
        level = facts[row, LEVEL]
        if level == scratch[_LEVELS + topic]:
            header |= _SAME_LEVEL
        same = True
        for column in range(4):
            same = same and facts[row, A + column] == scratch[texts + column]
        if same:
            header |= _SAME_TEXTS
        out[pos] = header
        pos = _put_varint(out, pos + 1, facts[row, TIME] - time)
        time = facts[row, TIME]
        pos = _put_varint(out, pos, _zigzag(facts[row, OFFSET] - scratch[_OFFSETS + topic]))
        scratch[_OFFSETS + topic] = facts[row, OFFSET]
        if value != NONE:
            pos = _put_varint(out, pos, _zigzag(value))
        if level != scratch[_LEVELS + topic]:
            pos = _put_varint(out, pos, _zigzag(level))
            scratch[_LEVELS + topic] = level
        if not same:
            modes_at = pos
            modes = 0
            pos += 1
            for column in range(4):
                text = facts[row, A + column]
                if text == 0:
                    pass
                elif text == scratch[texts + column]:
                    modes |= 1 << (2 * column)
                else:
                    seen = _SEEN + CHUNK * column
                    number = scratch[_COUNTS + column] - 1
                    while number >= 0 and scratch[seen + number] != text:
                        number -= 1
                    if number >= 0:
                        modes |= 2 << (2 * column)
                        out[pos] = number
                        pos += 1
                    else:
                        modes |= 3 << (2 * column)
                        pos = _put_bytes(out, pos, text, 8)
                        scratch[seen + scratch[_COUNTS + column]] = text
                        scratch[_COUNTS + column] += 1
                scratch[texts + column] = text
            out[modes_at] = modes
        pos = _put_bytes(out, pos, facts[row, ID], 8)
    return pos


@kernel("int64(uint8[::1], int64, int64, int64, int64, int64[:, ::1], int64)")
def _get_facts(buffer: ByteArray, pos: int, end: int, count: int, skip: int, facts: IntArray, row: int) -> int:
    """Read `count` <= 64 facts and store all but the first `skip` from `row` on. Returns the position after them or an error."""
    scratch = np.zeros(_SCRATCH, np.int64)
    time = 0
    for number in range(count):
        if pos >= end:
            return TRUNCATED
        header = _byte(buffer, pos)
        kind = header & 31
        topic = kind >> 3
        texts = _TEXTS + 4 * topic
        word, pos = _get_varint(buffer, pos + 1, end)
        if pos < 0:
            return pos
        time += word
        word, pos = _get_varint(buffer, pos, end)
        if pos < 0:
            return pos
        scratch[_OFFSETS + topic] += _unzigzag(word)
        value = NONE
        if header & _VALUE_KNOWN:
            word, pos = _get_varint(buffer, pos, end)
            if pos < 0:
                return pos
            value = _unzigzag(word)
        if not header & _SAME_LEVEL:
            word, pos = _get_varint(buffer, pos, end)
            if pos < 0:
                return pos
            scratch[_LEVELS + topic] = _unzigzag(word)
        if not header & _SAME_TEXTS:
            if pos >= end:
                return TRUNCATED
            modes = _byte(buffer, pos)
            pos += 1
            for column in range(4):
                mode = (modes >> (2 * column)) & 3
                seen = _SEEN + CHUNK * column
                if mode == 0:
                    scratch[texts + column] = 0
                elif mode == 2:
                    if pos >= end:
                        return TRUNCATED
                    place = _byte(buffer, pos)
                    if place >= scratch[_COUNTS + column]:
                        return INCONSISTENT
                    scratch[texts + column] = scratch[seen + place]
                    pos += 1
                elif mode == 3:
                    if pos + 8 > end:
                        return TRUNCATED
                    text = _get_bytes(buffer, pos, 8)
                    pos += 8
                    # At most one new value per fact and column: `count` <= 64 bounds it.
                    scratch[seen + scratch[_COUNTS + column]] = text
                    scratch[_COUNTS + column] += 1
                    scratch[texts + column] = text
        if pos + 8 > end:
            return TRUNCATED
        if number >= skip:
            facts[row, TIME] = time
            facts[row, OFFSET] = scratch[_OFFSETS + topic]
            facts[row, KIND] = kind
            facts[row, VALUE] = value
            facts[row, LEVEL] = scratch[_LEVELS + topic]
            for column in range(4):
                facts[row, A + column] = scratch[texts + column]
            facts[row, ID] = _get_bytes(buffer, pos, 8)
            row += 1
        pos += 8
    return pos


@kernel("int64(float32[::1], uint8[::1], int64)")
def _put_vector(vector: FloatArray, out: ByteArray, pos: int) -> int:
    bits = vector.view(np.int32)
    codes = pos
    for i in range(CODE_BYTES):
        out[codes + i] = 0
    pos += CODE_BYTES
    for i in range(N_FEATURES):
        word = int(bits[i])
        code = _RAW
        if word == 0:
            code = _ZERO
        elif word == _NAN_BITS:
            code = _NAN
        else:
            number = vector[i]
            if number >= 1 and number <= 255 and number == int(number):
                code = _SMALL
                out[pos] = int(number)
                pos += 1
            else:
                pos = _put_bytes(out, pos, word, 4)
        out[codes + (i >> 2)] |= code << (2 * (i & 3))
    return pos


@kernel("int64(uint8[::1], int64, int64, float32[::1])")
def _get_vector(buffer: ByteArray, pos: int, end: int, vector: FloatArray) -> int:
    bits = vector.view(np.int32)
    codes = pos
    pos += CODE_BYTES
    if pos > end:
        return TRUNCATED
    for i in range(N_FEATURES):
        code = (_byte(buffer, codes + (i >> 2)) >> (2 * (i & 3))) & 3
        if code == _ZERO:
            bits[i] = 0
        elif code == _NAN:
            bits[i] = _NAN_BITS
        elif code == _SMALL:
            if pos >= end:
                return TRUNCATED
            vector[i] = buffer[pos]
            pos += 1
        else:
            if pos + 4 > end:
                return TRUNCATED
            bits[i] = _get_bytes(buffer, pos, 4)
            pos += 4
    return pos


@kernel("int64(int64[::1], int64)")
def _reference(carry: IntArray, column: int) -> int:
    """What a time of the carry is stored relative to."""
    reference = 0
    if _FORMS[column] == _FROM_NEWEST:
        reference = carry[NEWEST]
    elif _FORMS[column] == _FROM_CLOCK:
        reference = carry[column - (FIRST - NEWEST)]
    if reference == NONE:
        reference = 0
    return reference


@kernel("int64(int64[::1], uint8[::1], int64)")
def _put_carry(carry: IntArray, out: ByteArray, pos: int) -> int:
    bitmap = pos
    for i in range(BITMAP_BYTES):
        out[bitmap + i] = 0
    pos += BITMAP_BYTES
    for column in range(BASE + 1, CARRY_WIDTH):
        number = carry[column]
        if number != _NEUTRAL[column]:
            out[bitmap + (column >> 3)] |= 1 << (column & 7)
            if _FORMS[column] == _DIGEST:
                pos = _put_bytes(out, pos, number, 8)
            else:
                pos = _put_varint(out, pos, _zigzag(number - _reference(carry, column)))
    return pos


@kernel("int64(uint8[::1], int64, int64, int64[::1])")
def _get_carry(buffer: ByteArray, pos: int, end: int, carry: IntArray) -> int:
    """Fill a row that is neutral already."""
    bitmap = pos
    pos += BITMAP_BYTES
    if pos > end:
        return TRUNCATED
    for column in range(BASE + 1, CARRY_WIDTH):
        if (_byte(buffer, bitmap + (column >> 3)) >> (column & 7)) & 1:
            if _FORMS[column] == _DIGEST:
                if pos + 8 > end:
                    return TRUNCATED
                carry[column] = _get_bytes(buffer, pos, 8)
                pos += 8
            else:
                word, pos = _get_varint(buffer, pos, end)
                if pos < 0:
                    return pos
                carry[column] = _unzigzag(word) + _reference(carry, column)
    return pos


@kernel("int64(int64[:, ::1], int64, int64, int64[::1], float32[::1], float32, int64, int64, int64, uint8[::1], int64)")
def encode_main(
    facts_arena: IntArray,
    start: int,
    length: int,
    carry_row: IntArray,
    vector: FloatArray,
    prob: float,
    band: int,
    score_at: int,
    score_offset: int,
    out_buffer: ByteArray,
    out_pos: int,
) -> int:
    """Write `main` of the customer whose kept facts are rows [start, start + length). Returns the position after it.

    The sequence number of the first kept fact is carry_row[BASE]. A customer never scored has score_at NONE (prob and band are
    not stored then); a vector of canonical NaN alone takes no byte. The buffer has MAX_MAIN_BYTES free at out_pos.
    """
    base = carry_row[BASE]
    first = base // CHUNK
    closed = (base + length) // CHUNK - first
    skip = base - first * CHUNK
    kept = closed * CHUNK - skip if closed > 0 else 0
    pos = _put_bytes(out_buffer, out_pos, FORMAT, 2)
    pos = _put_bytes(out_buffer, pos, closed, 2)
    pos = _put_bytes(out_buffer, pos, first, 4)
    pos = _put_bytes(out_buffer, pos + 4, _LAYOUT_TAG, 2)
    flags = 0
    for column in range(BASE + 1, CARRY_WIDTH):
        if carry_row[column] != _NEUTRAL[column]:
            flags |= _HAS_CARRY
            break
    if score_at != NONE:
        flags |= _HAS_SCORE
    bits = vector.view(np.int32)
    for i in range(N_FEATURES):
        if int(bits[i]) != _NAN_BITS:
            flags |= _HAS_VECTOR
            break
    out_buffer[pos] = flags
    out_buffer[pos + 1] = skip
    out_buffer[pos + 2] = length - kept
    pos = _put_facts(facts_arena, start + kept, length - kept, out_buffer, pos + 3)
    if flags & _HAS_SCORE:
        last = facts_arena[start + length - 1, TIME] if length > kept else 0
        one = np.empty(1, np.float32)
        one[0] = prob
        pos = _put_bytes(out_buffer, pos, int(one.view(np.int32)[0]), 4)
        out_buffer[pos] = band
        pos = _put_varint(out_buffer, pos + 1, _zigzag(score_at - last))
        if band >> SOURCE_SHIFT:
            pos = _put_varint(out_buffer, pos, score_offset)
    if flags & _HAS_VECTOR:
        pos = _put_vector(vector, out_buffer, pos)
    if flags & _HAS_CARRY:
        pos = _put_carry(carry_row, out_buffer, pos)
    _put_bytes(out_buffer, out_pos + 8, checksum(out_buffer, out_pos, out_pos + 8, pos), 4)
    return pos


@kernel("int64(int64[:, ::1], int64, int64, int64, uint8[::1], int64)")
def encode_chunk(facts_arena: IntArray, first_index: int, count: int, first_seq: int, out_buffer: ByteArray, out_pos: int) -> int:
    """Write a closed chunk: rows [first_index, first_index + count), the first with sequence number first_seq.

    first_seq + count is a multiple of 64 and count <= 64 (less when facts of the chunk had left before it was written again).
    Returns the position after it; the buffer has MAX_CHUNK_BYTES free.
    """
    pos = _put_varint(out_buffer, out_pos + 4, first_seq)
    out_buffer[pos] = count
    pos = _put_facts(facts_arena, first_index, count, out_buffer, pos + 1)
    _put_bytes(out_buffer, out_pos, checksum(out_buffer, out_pos, out_pos, pos), 4)
    return pos


@kernel("Tuple((int64, float32, int64, int64, int64))(uint8[::1], int64, int64, int64, int64[:, ::1], int64, int64[::1], float32[::1])")
def decode_main(
    buffer: ByteArray, pos: int, end: int, closed: int, facts_arena: IntArray, start: int, carry_row: IntArray, vector: FloatArray
) -> tuple[int, np.float32, int, int, int]:
    """Read `main` from buffer[pos:end]: the open facts into their rows, the whole carry row, the vector.

    closed: number of closed chunks the caller holds; the arena has 64 * (closed + 1) free rows at `start`.
    Returns (kept facts or an error < 0, probability, band byte, score_at, offset of its source); nothing read here is trusted before
    the checksum, and nothing after it without a look at the bounds.
    """
    nothing = np.float32(np.nan)
    if pos < 0 or end > buffer.size or pos + HEAD_BYTES > end:
        return TRUNCATED, nothing, 0, NONE, -1
    if _get_bytes(buffer, pos, 2) != FORMAT and _get_bytes(buffer, pos, 2) != _FORMER_FORMAT:
        return UNKNOWN_FORMAT, nothing, 0, NONE, -1
    if _get_bytes(buffer, pos + 8, 4) != checksum(buffer, pos, pos + 8, end):
        return CHECKSUM, nothing, 0, NONE, -1
    if _get_bytes(buffer, pos + 12, 2) != _LAYOUT_TAG:
        return OTHER_CATALOG, nothing, 0, NONE, -1
    first = _get_bytes(buffer, pos + 4, 4)
    flags = _byte(buffer, pos + 14)
    skip = _byte(buffer, pos + 15)
    count = _byte(buffer, pos + 16)
    taken = count if closed > 0 else count + skip
    if _get_bytes(buffer, pos + 2, 2) != closed or skip >= CHUNK or taken >= CHUNK or flags > 7:
        return INCONSISTENT, nothing, 0, NONE, -1
    kept = closed * CHUNK - skip if closed > 0 else 0
    carry_row[:] = _NEUTRAL
    carry_row[BASE] = first * CHUNK + skip
    pos = _get_facts(buffer, pos + HEAD_BYTES, end, count, 0, facts_arena, start + kept)
    if pos < 0:
        return pos, nothing, 0, NONE, -1
    prob, band, score_at, score_offset = nothing, 0, NONE, -1
    if flags & _HAS_SCORE:
        if pos + 5 > end:
            return TRUNCATED, nothing, 0, NONE, -1
        one = np.empty(1, np.float32)
        one.view(np.int32)[0] = _get_bytes(buffer, pos, 4)
        prob = one[0]
        band = _byte(buffer, pos + 4)
        word, pos = _get_varint(buffer, pos + 5, end)
        if pos < 0:
            return pos, nothing, 0, NONE, -1
        last = facts_arena[start + kept + count - 1, TIME] if count > 0 else 0
        score_at = _unzigzag(word) + last
        if band >> SOURCE_SHIFT:
            score_offset, pos = _get_varint(buffer, pos, end)
            if pos < 0:
                return pos, nothing, 0, NONE, -1
    if flags & _HAS_VECTOR:
        pos = _get_vector(buffer, pos, end, vector)
        if pos < 0:
            return pos, nothing, 0, NONE, -1
    else:
        vector.view(np.int32)[:] = _NAN_BITS
    if flags & _HAS_CARRY:
        pos = _get_carry(buffer, pos, end, carry_row)
        if pos < 0:
            return pos, nothing, 0, NONE, -1
    if pos != end:
        return INCONSISTENT, nothing, 0, NONE, -1
    return kept + count, prob, band, score_at, score_offset


@kernel("int64(uint8[::1], int64, int64, int64, int64, int64[:, ::1], int64)")
def decode_chunk(buffer: ByteArray, pos: int, end: int, number: int, base: int, facts_arena: IntArray, start: int) -> int:
    """Read closed chunk `number` of the customer whose first kept fact, sequence number `base`, belongs in row `start`.

    Facts that have left meanwhile (sequence number < base) are skipped. Returns the number of facts stored or an error < 0.
    """
    if pos < 0 or end > buffer.size or pos + 6 > end:
        return TRUNCATED
    if _get_bytes(buffer, pos, 4) != checksum(buffer, pos, pos, end):
        return CHECKSUM
    word, pos = _get_varint(buffer, pos + 4, end)
    if pos < 0 or pos >= end:
        return TRUNCATED
    first_seq = word
    count = _byte(buffer, pos)
    wanted = max(base, number * CHUNK)
    skip = wanted - first_seq
    if count > CHUNK or first_seq < number * CHUNK or skip < 0 or skip > count or first_seq + count != (number + 1) * CHUNK:
        return INCONSISTENT
    pos = _get_facts(buffer, pos + 1, end, count, skip, facts_arena, start + wanted - base)
    if pos < 0:
        return pos
    return count - skip if pos == end else INCONSISTENT


@kernel(
    "Tuple((int64, float32, int64, int64, int64))(uint8[::1], int64[::1], int64, int64, int64[:, ::1], int64, int64[::1], float32[::1])"
)
def decode_parts(
    buffer: ByteArray, bounds: IntArray, part: int, parts: int, facts_arena: IntArray, start: int, carry_row: IntArray, vector: FloatArray
) -> tuple[int, np.float32, int, int, int]:
    """Read a whole customer from `parts` neighbouring pieces of the buffer: `main`, then its closed chunks, oldest first.

    Piece i is buffer[bounds[i]:bounds[i + 1]]; `part` is the one of `main`. The arena has 64 * parts free rows at `start`.
    Returns as decode_main.
    """
    length, prob, band, score_at, source = decode_main(
        buffer, bounds[part], bounds[part + 1], parts - 1, facts_arena, start, carry_row, vector
    )
    if length < 0:
        return length, prob, band, score_at, source
    base = carry_row[BASE]
    for i in range(1, parts):
        stored = decode_chunk(buffer, bounds[part + i], bounds[part + i + 1], base // CHUNK + i - 1, base, facts_arena, start)
        if stored < 0:
            return stored, prob, band, score_at, source
    return length, prob, band, score_at, source


@dataclass(frozen=True, slots=True, eq=False)
class Customer:
    """One customer decoded: what a history is rebuilt from, and its last evaluation."""

    facts: IntArray  # kept facts in order, shape (n, WIDTH)
    carry: IntArray  # shape (CARRY_WIDTH,), features/carry.py
    vector: FloatArray  # as of the last evaluation, shape (N_FEATURES,); all NaN when never scored
    probability: float  # NaN when never scored
    band: int
    score_at: int  # event time of the last score, NONE when never scored
    alert_band: int = 0  # the band after the last alert (scoring.bands), 0 when no model has scored yet
    source: int = -1  # of the last score, index into features.facts.SOURCES; -1 when never scored, or by version 0.1
    source_offset: int = -1


def encode(customer: Customer) -> CustomerState:
    """All bytes of one customer; the worker uses the compiled functions on its arena instead."""
    facts = np.ascontiguousarray(customer.facts, np.int64)
    base, length = int(customer.carry[BASE]), len(facts)
    out = np.empty(max(MAX_MAIN_BYTES, MAX_CHUNK_BYTES), np.uint8)
    c, bands = customer, customer.band | customer.alert_band << ALERT_SHIFT | (customer.source + 1) << SOURCE_SHIFT
    size = encode_main(facts, 0, length, c.carry, c.vector, c.probability, bands, c.score_at, c.source_offset, out, 0)
    main = out[:size].tobytes()
    chunks = []
    for number in range(base // CHUNK, (base + length) // CHUNK):
        first_seq = max(base, number * CHUNK)
        size = encode_chunk(facts, first_seq - base, (number + 1) * CHUNK - first_seq, first_seq, out, 0)
        chunks.append(out[:size].tobytes())
    return CustomerState(main, tuple(chunks))


def join(states: Sequence[CustomerState]) -> tuple[ByteArray, IntArray, IntArray]:
    """Many customers in one buffer for decode_parts: the buffer, the bounds of its pieces, and where each customer begins among them."""
    pieces: list[bytes] = []
    firsts = [0]
    for state in states:
        pieces.append(state.main)
        pieces.extend(state.chunks)
        firsts.append(len(pieces))
    bounds = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=bounds[1:])
    return np.frombuffer(b"".join(pieces), np.uint8).copy(), bounds, np.array(firsts, np.int64)


def decode(state: CustomerState, customer: str = "") -> Customer:
    """One customer from its bytes. Raises ChainBroken for an unknown format and StateDamaged for anything else that does not hold."""
    buffer, bounds, _ = join([state])
    parts = 1 + len(state.chunks)
    facts = np.empty((CHUNK * parts, WIDTH), np.int64)
    carry, vector = np.empty(CARRY_WIDTH, np.int64), np.empty(N_FEATURES, np.float32)
    length, probability, band, score_at, offset = decode_parts(buffer, bounds, 0, parts, facts, 0, carry, vector)
    if length < 0:
        raise damage(int(length), customer, state.main)
    own, alerted, source = int(band) & BAND_MASK, int(band) >> ALERT_SHIFT & BAND_MASK, (int(band) >> SOURCE_SHIFT) - 1
    return Customer(facts[:length].copy(), carry, vector, float(probability), own, int(score_at), alerted, source, int(offset))


def damage(error: int, customer: str, main: bytes) -> ChainBroken:
    """The exception of an error a decoder returned for a customer."""
    if error == UNKNOWN_FORMAT:
        found = PREFIX.unpack_from(main)[0]
        return ChainBroken(f"state format {found} of customer {customer!r} is not known to this version (it reads {FORMAT})")
    if error == OTHER_CATALOG:
        return ChainBroken(f"state of customer {customer!r} was written for another feature catalog; rebuild it from the input topics")
    what = {TRUNCATED: "it ends too early", CHECKSUM: "the checksum does not hold"}.get(error, "its parts do not fit each other")
    return StateDamaged(f"stored state of customer {customer!r} is damaged: {what}; rebuild its partition from the input topics")
