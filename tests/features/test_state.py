"""A customer as bytes: nothing is lost, nothing damaged is believed, and the documented layout is the layout."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.carry import (
    BASE,
    CARRY_WIDTH,
    FIRST,
    LAST_WIDTH,
    LASTS_AT,
    MEASURE,
    NEWEST,
    PROFILE_AT,
    PROFILE_WIDTH,
    empty,
)
from features.catalog import LAYOUT_HASH, N_FEATURES
from features.facts import ID, KIND, LEVEL, NONE, OFFSET, TIME, VALUE, WIDTH, A
from features.state import (
    CHUNK,
    HEAD_BYTES,
    MAX_CHUNK_BYTES,
    MAX_MAIN_BYTES,
    Customer,
    checksum,
    decode,
    decode_parts,
    encode,
    encode_chunk,
    encode_main,
    join,
)
from features.store import FORMAT, PREFIX, CustomerState
from proto.errors import ChainBroken, StateDamaged

INT64: Final = np.iinfo(np.int64)
NAN: Final = np.array([0x7FC00000], np.uint32).view(np.float32)[0]
DAY_MS: Final = 86_400_000


def customer(rng: np.random.Generator, length: int, *, base: int = 0, wild: bool = False, scored: bool = True) -> Customer:
    """A made-up customer; `wild` takes numbers from the whole of int64 and any bits as floats."""
    if wild:
        facts = rng.integers(INT64.min, INT64.max, (length, WIDTH), np.int64, endpoint=True)
        facts[:, KIND] = rng.integers(0, 32, length)
        texts = rng.integers(INT64.min, INT64.max, 40, np.int64)
        few = rng.random((length, 4)) < 0.7
        facts[:, A : A + 4] = np.where(few, texts[rng.integers(0, 40, (length, 4))], facts[:, A : A + 4])
        facts[:, A : A + 4][rng.random((length, 4)) < 0.3] = 0
        facts[rng.random(length) < 0.3, VALUE] = NONE
        vector = rng.integers(0, 2**32, N_FEATURES, np.uint32).view(np.float32)
        score = (
            float(np.float32(rng.random())),
            int(rng.integers(0, 4)),
            int(rng.integers(INT64.min + 1, INT64.max)),
            int(rng.integers(0, 4)),
            int(rng.integers(0, 5)),
            int(rng.integers(0, INT64.max)),
        )
    else:
        facts = ordinary_facts(rng, length)
        vector = np.where(rng.random(N_FEATURES) < 0.5, rng.integers(0, 400, N_FEATURES), rng.lognormal(3, 2, N_FEATURES)).astype(
            np.float32
        )
        score = (0.25, 1, int(facts[-1, TIME]) if length else 1_700_000_000_000, 2, 1, 8_123)
    vector[rng.random(N_FEATURES) < 0.2] = 0.0
    vector[rng.random(N_FEATURES) < 0.2] = NAN
    carry = empty()
    carry[BASE] = base
    if base:
        some = rng.random(CARRY_WIDTH) < 0.6
        some[BASE] = False
        high = INT64.max if wild else 10**13
        carry[some] = rng.integers(-high, high, CARRY_WIDTH, np.int64)[some]
        if wild:
            carry[NEWEST:PROFILE_AT:3] = rng.choice([INT64.min, INT64.max, 0, -1], len(range(NEWEST, PROFILE_AT, 3)))
    if not scored:
        vector[:] = NAN
        score = (float("nan"), 0, NONE, 0, -1, -1)
    return Customer(facts, carry, vector, *score)


def ordinary_facts(rng: np.random.Generator, length: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Facts as the stream brings them: payments, logins with sessions, tickets."""
    facts = np.zeros((length, WIDTH), np.int64)
    kind = rng.choice([0, 8, 9, 16], length, p=[0.4, 0.42, 0.08, 0.1])
    facts[:, KIND] = kind
    facts[:, TIME] = 1_700_000_000_000 + np.sort(rng.integers(0, 90 * DAY_MS, length))
    for topic in range(3):
        rows = kind >> 3 == topic
        facts[rows, OFFSET] = np.cumsum(rng.integers(1, 2 * 20_000, rows.sum()))
    facts[:, VALUE] = np.where(kind == 0, (rng.lognormal(3, 1, length) * 100).astype(np.int64), NONE)
    facts[:, LEVEL] = np.where(kind == 16, 3 << 16, 0)
    digests = rng.integers(INT64.min, INT64.max, 60, np.int64)
    fresh = rng.integers(INT64.min, INT64.max, (2, length), np.int64)
    facts[:, A] = np.select([kind == 0, kind == 16], [digests[rng.integers(0, 50, length)], fresh[0]], digests[50])
    facts[:, A + 1] = np.select([kind == 0, kind == 16], [digests[51], digests[52]], fresh[1])
    facts[:, A + 2] = np.select([kind == 0, kind == 16], [digests[53], digests[54]], 0)
    facts[:, A + 3] = np.where((kind == 8) | (kind == 9), digests[55], 0)
    facts[:, ID] = rng.integers(INT64.min, INT64.max, length, np.int64)
    return facts


def same(one: Customer, other: Customer) -> bool:
    return (
        np.array_equal(one.facts, other.facts)
        and np.array_equal(one.carry, other.carry)
        and one.vector.tobytes() == other.vector.tobytes()
        and (one.probability == other.probability or (np.isnan(one.probability) and np.isnan(other.probability)))
        and (one.band, one.score_at, one.alert_band, one.source, one.source_offset)
        == (other.band, other.score_at, other.alert_band, other.source, other.source_offset)
    )


LENGTHS: Final = (0, 1, 2, 30, 62, 63, 64, 65, 127, 128, 129, 300)
BASES: Final = (0, 1, 63, 64, 65, 100, 64 * 70_000 + 13)


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_customer_comes_back_as_it_was(length: int, wild: bool) -> None:
    rng = np.random.default_rng(length)
    for base in BASES:
        for scored in (True, False):
            one = customer(rng, length, base=base, wild=wild, scored=scored)
            state = encode(one)
            assert same(decode(state), one)
            assert len(state.chunks) == (base + length) // CHUNK - base // CHUNK
            assert PREFIX.unpack_from(state.main) == (FORMAT, len(state.chunks), base // CHUNK)


@given(st.integers(0, 2**32), st.integers(0, 200), st.integers(0, 2**30), st.booleans(), st.booleans())
def test_any_customer_comes_back_as_it_was(seed: int, length: int, base: int, wild: bool, scored: bool) -> None:
    one = customer(np.random.default_rng(seed), length, base=base, wild=wild, scored=scored)
    assert same(decode(encode(one)), one)


def test_the_index_bits_above_the_kind_are_not_stored() -> None:
    one = customer(np.random.default_rng(1), 70)
    marked = one.facts.copy()
    marked[:, KIND] |= 0x1E0
    assert encode(replace(one, facts=marked)) == encode(one)


def test_facts_that_left_are_skipped_in_a_chunk_written_before() -> None:
    rng = np.random.default_rng(5)
    whole = customer(rng, 200)
    before = encode(whole)
    for gone in (1, 63, 64, 65, 100, 127, 128, 191, 192, 199, 200):
        carry = customer(rng, 0, base=gone).carry
        left = replace(whole, facts=whole.facts[gone:], carry=carry)
        main = encode(left).main
        chunks = before.chunks[gone // CHUNK :]
        assert same(decode(CustomerState(main, chunks)), left), gone


def test_no_customer_takes_more_than_the_largest_size_and_neighbours_are_left_alone() -> None:
    rng = np.random.default_rng(3)
    largest_main = largest_chunk = 0
    guard = 64
    for _ in range(5):
        one = customer(rng, 63 + CHUNK, wild=True, base=64 * 3)
        odd = np.arange(len(one.facts)) % 2 == 1
        one.facts[:, TIME] = one.facts[:, OFFSET] = np.where(odd, INT64.min, 0)  # differences of 2^63
        one.facts[:, VALUE] = INT64.max
        one.facts[:, LEVEL] = INT64.max - odd
        one.facts[:, KIND] = 0
        one.facts[:, A : A + 4] = rng.integers(1, INT64.max, (len(one.facts), 4))
        one.vector[:] = 0.5
        one.carry[BASE + 1 :] = np.where(np.arange(CARRY_WIDTH - 1) % 2, INT64.max, -INT64.max)
        out = np.full(MAX_MAIN_BYTES + 2 * guard, 0xA5, np.uint8)
        end = encode_main(one.facts, 0, len(one.facts), one.carry, one.vector, one.probability, one.band, INT64.max, -1, out, guard)
        assert end <= guard + MAX_MAIN_BYTES
        assert (out[:guard] == 0xA5).all()
        assert (out[end:] == 0xA5).all()
        largest_main = max(largest_main, end - guard)
        end = encode_chunk(one.facts, 0, CHUNK, 192, out, guard)
        assert end <= guard + MAX_CHUNK_BYTES
        assert (out[:guard] == 0xA5).all()
        largest_chunk = max(largest_chunk, end - guard)
    # The bounds are bounds, not merely generous.
    assert largest_main > MAX_MAIN_BYTES - 400
    assert largest_chunk > MAX_CHUNK_BYTES - 30


def test_the_size_is_what_was_aimed_at() -> None:
    rng = np.random.default_rng(11)
    # Every login here has a session of its own, and every session costs 8 bytes: a long history ends a little above 24 a fact.
    for length, count, per_fact in ((30, 200, 24), (7, 200, 24), (500, 20, 26)):
        for base in (0, 200):
            sizes = []
            for _ in range(count):
                one = customer(rng, length, base=base)
                if base:  # a carry as a life leaves it: a few clocks, sums and days
                    carry = empty()
                    carry[BASE] = base
                    carry[MEASURE : MEASURE + 12] = rng.integers(0, 200_000, 12)
                    carry[NEWEST : NEWEST + 6] = 1_690_000_000_000 - rng.integers(0, 10**9, 6)
                    carry[FIRST : FIRST + 6] = 1_650_000_000_000 + rng.integers(0, 10**9, 6)
                    one = replace(one, carry=carry)
                state = encode(one)
                sizes.append(len(state.main) + sum(map(len, state.chunks)))
            assert np.mean(sizes) <= per_fact * length + 200 + 4 * N_FEATURES, (length, base)


# -- damage


def _reseal(main: bytearray, chunks: list[bytearray]) -> None:
    """Make the checksums hold again, so that the rest of the reader is asked."""
    if len(main) >= 12:
        buffer = np.frombuffer(bytes(main), np.uint8).copy()
        main[8:12] = int(checksum(buffer, 0, 8, len(main))).to_bytes(4, "little")
    for chunk in chunks:
        if len(chunk) >= 4:
            buffer = np.frombuffer(bytes(chunk), np.uint8).copy()
            chunk[:4] = int(checksum(buffer, 0, 0, len(chunk))).to_bytes(4, "little")


def _mutate(random: Random, piece: bytearray) -> None:
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        place = random.randrange(len(piece)) if piece else 0
        match random.randrange(6):
            case 0 if piece:
                piece[place] ^= 1 << random.randrange(8)
            case 1 if piece:
                piece[place] = random.choice([0, 1, 63, 64, 127, 128, 255, random.randrange(256)])
            case 2:
                del piece[place:]
            case 3:
                del piece[place : place + random.randrange(1, 20)]
            case 4:
                piece[place:place] = random.randbytes(random.randrange(1, 20))
            case _ if len(piece) > HEAD_BYTES:  # the bytes that steer: head and flags
                piece[random.randrange(2, HEAD_BYTES)] = random.randrange(256)


def _read_guarded(state: CustomerState) -> int:
    """Decode between guard rows and guard bytes; returns the length or the error."""
    guard, parts = 70, 1 + len(state.chunks)
    plain, bounds, _ = join([state])
    buffer = np.concatenate([np.full(64, 0xFF, np.uint8), plain, np.full(64, 0xFF, np.uint8)])
    arena = np.full((CHUNK * parts + 2 * guard, WIDTH), 77, np.int64)
    carry, vector = np.full(CARRY_WIDTH + 2 * guard, 77, np.int64), np.full(N_FEATURES + 2 * guard, 77, np.float32)
    length, *_ = decode_parts(
        buffer, bounds + 64, 0, parts, arena, guard, carry[guard : guard + CARRY_WIDTH], vector[guard : guard + N_FEATURES]
    )
    for array, size in ((arena, CHUNK * parts), (carry, CARRY_WIDTH), (vector, N_FEATURES)):
        assert (array[:guard] == 77).all()
        assert (array[guard + size :] == 77).all()
    assert length <= CHUNK * parts
    return int(length)


def _mutants(count: int, seed: int) -> tuple[int, int]:
    """Mutate and read `count` states. Returns how many passed as they were and how many with checksums made to hold."""
    random, rng = Random(seed), np.random.default_rng(seed)
    originals = [
        encode(customer(rng, length, base=base, wild=wild, scored=length != 30))
        for length in (0, 1, 30, 63, 64, 150)
        for base in (0, 5, 64 * 9 + 60)
        for wild in (False, True)
    ]
    passed = resealed = 0
    for _ in range(count):
        original = random.choice(originals)
        main, chunks = bytearray(original.main), [bytearray(chunk) for chunk in original.chunks]
        if random.random() < 0.05:
            main = bytearray(random.randbytes(random.randrange(400)))
        else:
            _mutate(random, random.choice([main, *chunks]))
            if random.random() < 0.1:
                random.shuffle(chunks)
        state = CustomerState(bytes(main), tuple(map(bytes, chunks)))
        if state == original:
            continue
        passed += _read_guarded(state) >= 0
        _reseal(main, chunks)
        resealed += _read_guarded(CustomerState(bytes(main), tuple(map(bytes, chunks)))) >= 0
    return passed, resealed


def test_mutated_bytes_are_refused_and_never_read_or_write_beyond() -> None:
    passed, resealed = _mutants(20_000, seed=1)
    # 2^-32 each; one among 20,000 would be a miracle.
    assert passed == 0
    # With its checksum made to hold a good part reads as another customer: the bounds behind the checksum were reached.
    assert resealed > 1_000


@pytest.mark.slow
def test_mutated_bytes_stay_within_bounds_with_every_access_checked(tmp_path: Path) -> None:
    # Numba checks every index of a process that was started with this set; an access out of bounds raises there.
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "CHURN_DATA_DIR": str(tmp_path)}
    here = Path(__file__)
    code = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('t', {str(here)!r}); t = u.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "import numpy as np\n"
        "from features.state import decode_chunk\n"
        "try:\n"
        "    t.encode_chunk(np.zeros((1, 10), np.int64), 0, 2, 0, np.zeros(999, np.uint8), 0)\n"
        "except IndexError:\n"
        "    print('bounds are checked')\n"
        "print(t._mutants(20_000, seed=2)[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["bounds are checked", "0"]


def test_every_flipped_bit_is_seen() -> None:
    state = encode(customer(np.random.default_rng(4), 70, base=3))
    for number, piece in enumerate([state.main, *state.chunks]):
        for bit in range(8 * len(piece)):
            flipped = bytearray(piece)
            flipped[bit // 8] ^= 1 << bit % 8
            pieces = [state.main, *state.chunks]
            pieces[number] = bytes(flipped)
            with pytest.raises(ChainBroken):
                decode(CustomerState(pieces[0], tuple(pieces[1:])))


def test_every_cut_is_seen() -> None:
    state = encode(customer(np.random.default_rng(4), 70, base=3))
    for size in range(len(state.main)):
        with pytest.raises(StateDamaged):
            decode(CustomerState(state.main[:size], state.chunks))
    for size in range(len(state.chunks[0])):
        with pytest.raises(StateDamaged):
            decode(CustomerState(state.main, (state.chunks[0][:size],)))
    with pytest.raises(StateDamaged):
        decode(CustomerState(state.main + b"\0", state.chunks))


@pytest.mark.parametrize(
    "broken",
    [
        lambda s: CustomerState(s.main, ()),
        lambda s: CustomerState(s.main, s.chunks[:1]),
        lambda s: CustomerState(s.main, s.chunks[::-1]),
        lambda s: CustomerState(s.main, (*s.chunks, s.chunks[0])),
        lambda s: CustomerState(s.main, (s.chunks[0], b"")),
    ],
)
def test_chunks_that_do_not_belong_are_seen(broken: Callable[[CustomerState], CustomerState]) -> None:
    state = encode(customer(np.random.default_rng(4), 140))
    with pytest.raises(StateDamaged, match="customer '00123' is damaged"):
        decode(broken(state), "00123")


def test_another_format_or_catalog_is_named() -> None:
    state = encode(customer(np.random.default_rng(4), 3))
    with pytest.raises(ChainBroken, match="state format 258 of customer 'c1'"):
        decode(CustomerState(b"\x02\x01" + state.main[2:], ()), "c1")
    main = bytearray(state.main)
    main[12] ^= 1
    _reseal(main, [])
    with pytest.raises(ChainBroken, match="customer 'c1' was written for another feature catalog"):
        decode(CustomerState(bytes(main), ()), "c1")


# -- the documented layout, read a second time: docs/state.md in plain Python, sharing nothing with features/state.py


def _wrap(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, size: int) -> int:
        assert len(self.data) >= size
        taken, self.data = self.data[:size], self.data[size:]
        return int.from_bytes(taken, "little")

    def varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.take(1)
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def zigzag(self) -> int:
        number = self.varint()
        return -(number + 1) // 2 if number % 2 else number // 2


def documented_checksum(before: bytes, after: bytes) -> int:
    state = 0xC2B2AE3D27D4EB4F
    for run in (before, after):
        whole = len(run) // 8 * 8
        words = [run[i : i + 8] for i in range(0, whole, 8)] + [run[whole:]]
        for word in words:
            state = (state ^ int.from_bytes(word, "little")) * 0x9E3779B97F4A7C15 % 2**64
            state ^= state >> 29
        state ^= len(run) - whole
    return ((state ^ state >> 32) * 0xD6E8FEB86659FD93 % 2**64) >> 32


def documented_facts(reader: Reader, count: int) -> list[list[int]]:
    time, rows = 0, []
    offsets, levels, former = [0] * 4, [0] * 4, [[0] * 4 for _ in range(4)]  # by topic
    seen: list[list[int]] = [[], [], [], []]
    for _ in range(count):
        head = reader.take(1)
        kind = head % 32
        topic = kind // 8
        time = _wrap(time + reader.varint())
        offsets[topic] = _wrap(offsets[topic] + reader.zigzag())
        value = reader.zigzag() if head & 32 else NONE
        if not head & 64:
            levels[topic] = reader.zigzag()
        if not head & 128:
            modes = reader.take(1)
            for column in range(4):
                mode = modes >> 2 * column & 3
                if mode == 0:
                    former[topic][column] = 0
                elif mode == 2:
                    former[topic][column] = seen[column][reader.take(1)]
                elif mode == 3:
                    former[topic][column] = _wrap(reader.take(8))
                    seen[column].append(former[topic][column])
        rows.append([time, offsets[topic], kind, value, levels[topic], *former[topic], _wrap(reader.take(8))])
    return rows


def documented(state: CustomerState) -> Customer:
    main = Reader(state.main)
    assert main.take(2) == 2
    closed, first = main.take(2), main.take(4)
    assert main.take(4) == documented_checksum(state.main[:8], state.main[12:])
    assert main.take(2) == int(LAYOUT_HASH[:4], 16)
    flags, skip, count = main.take(1), main.take(1), main.take(1)
    facts = []
    for number, chunk in enumerate(state.chunks, first):
        reader = Reader(chunk)
        assert reader.take(4) == documented_checksum(b"", chunk[4:])
        begin, size = reader.varint(), reader.take(1)
        rows = documented_facts(reader, size)
        assert reader.data == b""
        assert begin + size == 64 * number + 64
        facts += rows[max(0, 64 * first + skip - begin) :]
    assert len(state.chunks) == closed
    open_facts = documented_facts(main, count)
    facts += open_facts
    probability, bands, score_at, offset = float("nan"), 0, NONE, -1
    if flags & 2:
        probability = float(np.frombuffer(main.take(4).to_bytes(4, "little"), np.float32)[0])
        bands = main.take(1)
        score_at = _wrap(main.zigzag() + (open_facts[-1][0] if open_facts else 0))
        offset = main.varint() if bands >> 4 else -1
    vector = np.full(N_FEATURES, NAN, np.float32)
    if flags & 4:
        codes = [main.take(1) for _ in range((N_FEATURES + 3) // 4)]
        bits = vector.view(np.uint32)
        for i in range(N_FEATURES):
            code = codes[i // 4] >> 2 * (i % 4) & 3
            if code == 0:
                bits[i] = 0
            elif code == 1:
                vector[i] = float(main.take(1))
            elif code == 3:
                bits[i] = main.take(4)
    carry = empty()
    carry[BASE] = 64 * first + skip
    if flags & 1:
        bitmap = main.take((CARRY_WIDTH + 7) // 8)
        texts = range(PROFILE_AT + 4, PROFILE_AT + PROFILE_WIDTH)
        to_newest = {*range(NEWEST + 1, FIRST), *range(LASTS_AT + 1, PROFILE_AT, LAST_WIDTH), PROFILE_AT}
        for column in range(CARRY_WIDTH):
            if bitmap >> column & 1:
                if column in texts:
                    carry[column] = _wrap(main.take(8))
                    continue
                origin = 0
                if column in to_newest:
                    origin = int(carry[NEWEST])
                elif FIRST <= column < LASTS_AT:
                    origin = int(carry[column - FIRST + NEWEST])
                carry[column] = _wrap(main.zigzag() + (0 if origin == NONE else origin))
    assert main.data == b""
    everything = np.array(facts, np.int64).reshape(-1, WIDTH)
    return Customer(everything, carry, vector, probability, bands & 3, score_at, bands >> 2 & 3, (bands >> 4) - 1, offset)


@pytest.mark.parametrize("seed", range(40))
def test_the_documented_layout_is_the_layout(seed: int) -> None:
    rng = np.random.default_rng(seed)
    length, base = int(rng.integers(0, 200)), int(rng.integers(0, 3) * rng.integers(0, 10_000))
    one = customer(rng, length, base=base, wild=bool(seed % 2), scored=seed % 5 > 0)
    assert same(documented(encode(one)), one)
