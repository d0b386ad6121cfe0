"""Histories of one partition -> totals and vectors, compiled; the only place where order is decided.

A customer is a slot: a region of the arena with the kept facts in order, a row of totals, a row of carry, a cursor per
window on its oldest fact. Nothing here allocates: Python makes room before a batch (`demand`, `make_room`, `repack`), then
one call handles the whole batch without the GIL. Not for two threads at a time.

Different values are counted without walking a history. The index holds, per customer and attribute, every value among the
kept facts with the time of its newest occurrence, so a window's count is the number of entries newer than its left edge. Of
the facts with one value exactly one stands for it: the one the entry's time points at (a fact inserted at or before that
time carries a mark and never stands for it). When that fact leaves a window, the count of the window drops by one.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from features.aggregate import (
    ATTRIBUTES_OF,
    ATTRIBUTES_OF_AT,
    BOUNDED,
    COUNT_OF,
    DAYS_OF,
    LENGTHS,
    MAX_ATTRIBUTES_OF_A_FACT,
    ROW_WIDTH,
    attribute_value,
    enter,
    exclude,
    fold,
)
from features.carry import BASE, CARRY_WIDTH, MONEY
from features.catalog import N_FEATURES
from features.compiled import kernel, types
from features.facts import DAY_MS, ID, KIND, MAX_SUM_MINOR, NONE, OFFSET, PROFILE, TIME, VALUE, WIDTH, D
from features.index import find, home, put, remove
from features.prefetch import prefetch
from features.state import (
    ALERT_SHIFT,
    BAND_MASK,
    CHUNK,
    MAX_CHUNK_BYTES,
    MAX_MAIN_BYTES,
    SOURCE_SHIFT,
    decode_parts,
    encode_chunk,
    encode_main,
)
from features.vector import evaluate
from features.window import D90, HORIZON_MS, LIFE

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

SCORED, IS_PROFILE, DUPLICATE, DUPLICATE_CONFLICT, TOO_LATE, AMOUNT_RANGE, SKIPPED = range(7)
"""Outcomes, as features.history.Outcome names them."""

# Columns of `Table.places`, one row per slot.
REGION: Final = 0  # first arena row of the slot
CAPACITY: Final = 1  # arena rows of the slot
END: Final = 2  # arena row behind the newest fact
NEWEST: Final = 3  # newest event time, NONE without facts
TAIL: Final = 4  # per bounded window: arena row of its oldest fact (END when empty); that of 90 d is the first kept fact
DUE: Final = TAIL + BOUNDED  # per bounded window: the time at which its oldest fact leaves
FIRST_STORED: Final = DUE + BOUNDED  # closed chunks [FIRST_STORED, END_STORED) are in the store ...
END_STORED: Final = FIRST_STORED + 1
VALID: Final = END_STORED + 1  # ... and those below VALID are as they should be
DIRTY: Final = VALID + 1  # 1 when there are changes nobody has taken
USED: Final = DIRTY + 1  # number of the batch that used the slot last
PENDING: Final = USED + 1  # facts a coming batch may add; zero between batches
PLACE_WIDTH: Final = PENDING + 1

# Columns of `Table.counts`.
TOP: Final = 0  # arena rows handed out
ENTRIES: Final = 1  # entries of the index
KEPT: Final = 2  # kept facts of all slots
COUNTS: Final = 3

OWNERS: Final = 16
"""Owners per slot in the index: one per attribute, the last one for the ids of facts."""
IDS: Final = OWNERS - 1
ENTRIES_OF_A_FACT: Final = MAX_ATTRIBUTES_OF_A_FACT + 1
"""At most so many entries of the index come with one fact."""
NEVER: Final = 2**63 - 1
AHEAD: Final = 3
"""So many facts before its turn a fact's memory is fetched; that of its slot twice as many."""
_MIN_SLACK: Final = 4
_RANGE: Final = MAX_SUM_MINOR


class Table(NamedTuple):
    """All customers of one partition as arrays; S slots."""

    facts: IntArray  # (N, WIDTH) the arena
    marks: ByteArray  # (N,) bit a: this fact does not stand for its value of attribute a
    entries: IntArray  # (H, 3) features/index.py
    places: IntArray  # (S, PLACE_WIDTH)
    totals: IntArray  # (S, ROW_WIDTH) features/aggregate.py
    carry: IntArray  # (S, CARRY_WIDTH)
    vectors: FloatArray  # (S, N_FEATURES) of the last scored event
    probability: FloatArray  # (S,) of the last score, NaN when never
    band: ByteArray  # (S,) the byte of features.state: band, alert band, source of the last score
    score_at: IntArray  # (S,) ms, NONE when never
    score_offset: IntArray  # (S,) offset of the source
    counts: IntArray  # (COUNTS,)


_I1, _I2 = types.int64[::1], types.int64[:, ::1]
_U1, _B1 = types.uint8[::1], types.boolean[::1]
_F1, _F2 = types.float32[::1], types.float32[:, ::1]
_TABLE = types.NamedTuple((_I2, _U1, _I2, _I2, _I2, _I2, _F2, _F1, _U1, _I1, _I1, _I1), Table)
_INT, _VOID = types.int64, types.void


@kernel(_VOID(_I2, _U1, _I2, _I2, _INT, _INT, _INT, _INT))
def _exclude_values(facts: IntArray, marks: ByteArray, index: IntArray, rows: IntArray, r: int, i: int, window: int, owner: int) -> None:
    """Fact i leaves a window: the counts of different values drop where it stands for its value."""
    kind = facts[i, KIND]
    for k in range(ATTRIBUTES_OF_AT[kind], ATTRIBUTES_OF_AT[kind + 1]):
        attribute = ATTRIBUTES_OF[k]
        column = COUNT_OF[attribute, window]
        if column < 0 or marks[i] >> attribute & 1:
            continue
        value = attribute_value(facts, i, attribute)
        if value != 0:
            place = find(index, owner + attribute, value)
            if place >= 0 and index[place, 2] == facts[i, TIME]:
                rows[r, column] -= 1


@kernel(_VOID(_TABLE, _INT, _INT))
def _unlist(t: Table, s: int, i: int) -> None:
    """Take the entries that arena row i of slot s stands for out of the index."""
    kind = t.facts[i, KIND]
    time = t.facts[i, TIME]
    for k in range(ATTRIBUTES_OF_AT[kind], ATTRIBUTES_OF_AT[kind + 1]):
        attribute = ATTRIBUTES_OF[k]
        if t.marks[i] >> attribute & 1:
            continue
        value = attribute_value(t.facts, i, attribute)
        if value != 0:
            place = find(t.entries, s * OWNERS + attribute, value)
            if place >= 0 and t.entries[place, 2] == time:
                remove(t.entries, place)
                t.counts[ENTRIES] -= 1
    place = find(t.entries, s * OWNERS + IDS, t.facts[i, ID])
    if place >= 0 and t.entries[place, 2] == time:
        remove(t.entries, place)
        t.counts[ENTRIES] -= 1


@kernel(_VOID(_TABLE, _INT, _INT))
def _advance(t: Table, s: int, at: int) -> None:
    """Move the windows of slot s to `at`: what is at or before a left edge leaves, what leaves 90 d is folded into the carry."""
    places, facts = t.places, t.facts
    end = places[s, END]
    for window in range(BOUNDED):
        if places[s, DUE + window] > at:
            continue
        edge = at - LENGTHS[window]
        i = places[s, TAIL + window]
        while i < end and facts[i, TIME] <= edge:
            exclude(t.totals, s, facts, i, window)
            _exclude_values(facts, t.marks, t.entries, t.totals, s, i, window, s * OWNERS)
            if window == D90:
                fold(t.carry, s, facts, i)
                _unlist(t, s, i)
                t.counts[KEPT] -= 1
            i += 1
        places[s, TAIL + window] = i
        places[s, DUE + window] = facts[i, TIME] + LENGTHS[window] if i < end else NEVER


@kernel(types.boolean(_I2, _INT, _I2, _INT))
def _before(left: IntArray, i: int, right: IntArray, j: int) -> bool:
    """Whether fact i of `left` comes before fact j of `right`: by time, topic index, offset."""
    if left[i, TIME] != right[j, TIME]:
        return bool(left[i, TIME] < right[j, TIME])
    if left[i, KIND] >> 3 != right[j, KIND] >> 3:
        return bool(left[i, KIND] >> 3 < right[j, KIND] >> 3)
    return bool(left[i, OFFSET] < right[j, OFFSET])


@kernel(_INT(_I2, _INT, _INT, _I2, _INT))
def _position(facts: IntArray, start: int, end: int, batch: IntArray, j: int) -> int:
    """Where fact j of the batch belongs among the sorted arena rows [start, end), behind its equals."""
    if start == end or not _before(batch, j, facts, end - 1):
        return end
    low, high = start, end - 1
    while low < high:
        middle = (low + high) >> 1
        if _before(batch, j, facts, middle):
            high = middle
        else:
            low = middle + 1
    return low


@kernel(_VOID(_TABLE, _INT, _I2, _INT, _INT))
def _accept(t: Table, s: int, batch: IntArray, j: int, at: int) -> None:
    """Insert fact j of the batch into slot s, whose windows stand at `at`; the arena has room behind the slot's facts."""
    places, facts, marks, totals, index = t.places, t.facts, t.marks, t.totals, t.entries
    start, end = places[s, TAIL + D90], places[s, END]
    p = _position(facts, start, end, batch, j)
    for m in range(end, p, -1):
        for column in range(WIDTH):
            facts[m, column] = facts[m - 1, column]
        marks[m] = marks[m - 1]
    for column in range(WIDTH):
        facts[p, column] = batch[j, column]
    marks[p] = 0
    places[s, END] = end + 1
    places[s, NEWEST] = at
    t.counts[KEPT] += 1

    time = facts[p, TIME]
    windows = 1 << LIFE
    for window in range(BOUNDED):
        if time > at - LENGTHS[window]:
            windows |= 1 << window
            if places[s, TAIL + window] == p:
                places[s, DUE + window] = time + LENGTHS[window]
        else:
            places[s, TAIL + window] += 1
    enter(totals, s, facts, p, windows)

    kind = facts[p, KIND]
    for k in range(ATTRIBUTES_OF_AT[kind], ATTRIBUTES_OF_AT[kind + 1]):
        attribute = ATTRIBUTES_OF[k]
        value = attribute_value(facts, p, attribute)
        if value == 0:
            continue
        owner = s * OWNERS + attribute
        place = find(index, owner, value)
        former = index[place, 2] if place >= 0 else NONE
        if place >= 0 and former >= time:
            marks[p] |= np.uint8(1 << attribute)
            continue
        for window in range(BOUNDED):
            column = COUNT_OF[attribute, window]
            if column >= 0 and windows >> window & 1 and (place < 0 or former <= at - LENGTHS[window]):
                totals[s, column] += 1
        if place >= 0:
            index[place, 2] = time
        else:
            put(index, ~place, owner, value, time)
            t.counts[ENTRIES] += 1
            days = DAYS_OF[attribute]
            if days >= 0:
                # The index knows the days of the kept facts; of those that left only the last can come again.
                day = time // DAY_MS
                if day > t.carry[s, days + 1]:
                    totals[s, days] += 1
                totals[s, days + 1] = max(totals[s, days + 1], day)
    place = find(index, s * OWNERS + IDS, facts[p, ID])
    if place < 0:
        put(index, ~place, s * OWNERS + IDS, facts[p, ID], time)
        t.counts[ENTRIES] += 1
    else:
        index[place, 2] = max(index[place, 2], time)

    chunk = (t.carry[s, BASE] + p - start) // CHUNK
    places[s, VALID] = min(places[s, VALID], chunk)
    places[s, DIRTY] = 1


@kernel(types.boolean(_TABLE, _INT, _I2, _INT, _INT))
def _same(t: Table, s: int, batch: IntArray, j: int, time: int) -> bool:
    """Whether the kept fact with the id of fact j, known to have happened at `time`, says the same but for the offset."""
    facts = t.facts
    low, high = t.places[s, TAIL + D90], t.places[s, END]
    while low < high:
        middle = (low + high) >> 1
        if facts[middle, TIME] < time:
            low = middle + 1
        else:
            high = middle
    while facts[low, ID] != batch[j, ID]:
        low += 1
    if facts[low, TIME] != batch[j, TIME]:
        return False
    column = KIND
    while column <= D and facts[low, column] == batch[j, column]:
        column += 1
    return column > D


@kernel(_VOID(_TABLE, _INT))
def _expect(t: Table, s: int) -> None:
    """Slot s comes soon: a table of many customers is larger than any cache."""
    prefetch(t.places, s)
    prefetch(t.totals, s)
    prefetch(t.carry, s)
    prefetch(t.vectors, s)


@kernel(_VOID(_TABLE, _INT, _I2, _INT))
def _expect_fact(t: Table, s: int, batch: IntArray, j: int) -> None:
    """Fact j of the batch comes soon, to slot s, whose place is in the cache by now."""
    kind = batch[j, KIND]
    prefetch(t.entries, home(t.entries, s * OWNERS + IDS, batch[j, ID]))
    for k in range(ATTRIBUTES_OF_AT[kind], ATTRIBUTES_OF_AT[kind + 1]):
        value = attribute_value(batch, j, ATTRIBUTES_OF[k])
        prefetch(t.entries, home(t.entries, s * OWNERS + ATTRIBUTES_OF[k], value))
    rows = t.facts.shape[0] - 1
    prefetch(t.facts, min(t.places[s, END], rows))
    for window in range(BOUNDED):
        if t.places[s, DUE + window] <= batch[j, TIME]:
            prefetch(t.facts, min(t.places[s, TAIL + window], rows))


@kernel(_INT(_TABLE, _I1, _I2, _B1, _INT, _U1, _I1, _B1, _I1, _F2))
def step(
    t: Table,
    slots: IntArray,
    batch: IntArray,
    skip: BoolArray,
    number: int,
    outcome: ByteArray,
    at: IntArray,
    late: BoolArray,
    rows: IntArray,
    vectors: FloatArray,
) -> int:
    """Handle a batch in its order; fills outcome, at, late (one per fact), rows and vectors (one per scored fact).

    Returns the number of scored facts. The caller has made room for all of it.
    """
    scored = 0
    n = slots.shape[0]
    for j in range(min(2 * AHEAD, n)):
        _expect(t, slots[j])
    for j in range(n):
        s = slots[j]
        if j + 2 * AHEAD < n:
            _expect(t, slots[j + 2 * AHEAD])
        if j + AHEAD < n:
            _expect_fact(t, slots[j + AHEAD], batch, j + AHEAD)
        late[j] = False
        if skip[j]:
            at[j] = NONE
            outcome[j] = SKIPPED
            continue
        newest = t.places[s, NEWEST]
        at[j] = newest
        t.places[s, USED] = number
        time = batch[j, TIME]
        known = find(t.entries, s * OWNERS + IDS, batch[j, ID])
        if known >= 0:
            outcome[j] = DUPLICATE if _same(t, s, batch, j, t.entries[known, 2]) else DUPLICATE_CONFLICT
            continue
        if newest != NONE and time <= newest - HORIZON_MS:
            outcome[j] = TOO_LATE
            continue
        if batch[j, KIND] >> 3 == 0 and batch[j, VALUE] != NONE and batch[j, VALUE] > _RANGE - t.totals[s, MONEY]:
            outcome[j] = AMOUNT_RANGE
            continue
        now = max(time, newest)
        late[j] = time < newest
        at[j] = now
        if now > newest:
            _advance(t, s, now)
        _accept(t, s, batch, j, now)
        if batch[j, KIND] == PROFILE:
            outcome[j] = IS_PROFILE
            continue
        outcome[j] = SCORED
        evaluate(t.totals, s, now, vectors, scored)
        for f in range(N_FEATURES):
            t.vectors[s, f] = vectors[scored, f]
        rows[scored] = j
        scored += 1
    return scored


@kernel(_VOID(_TABLE, _I1, _I1, _I2, _F2))
def peek(t: Table, slots: IntArray, at: IntArray, scratch: IntArray, vectors: FloatArray) -> None:
    """Vectors of slots at times not before their newest fact; changes nothing. scratch: shape (1, ROW_WIDTH)."""
    for j in range(slots.shape[0]):
        s, now = slots[j], at[j]
        for column in range(ROW_WIDTH):
            scratch[0, column] = t.totals[s, column]
        end = t.places[s, END]
        for window in range(BOUNDED):
            if t.places[s, DUE + window] > now:
                continue
            edge = now - LENGTHS[window]
            i = t.places[s, TAIL + window]
            while i < end and t.facts[i, TIME] <= edge:
                exclude(scratch, 0, t.facts, i, window)
                _exclude_values(t.facts, t.marks, t.entries, scratch, 0, i, window, s * OWNERS)
                i += 1
        evaluate(scratch, 0, now, vectors, j)


@kernel(_VOID(_TABLE, _INT, _I2, _INT))
def replay(t: Table, s: int, history: IntArray, length: int) -> None:
    """Rebuild a reset slot from its carry row (filled in already) and its facts in order; the arena has room for them.

    Facts out of reach of the newest one go on into the carry; the others are taken in with the windows standing where they
    will stand at the end.
    """
    newest = history[length - 1, TIME] if length > 0 else NONE
    i = 0
    while i < length and history[i, TIME] <= newest - HORIZON_MS:
        fold(t.carry, s, history, i)
        i += 1
    for column in range(CARRY_WIDTH):
        t.totals[s, column] = t.carry[s, column]
    while i < length:
        _accept(t, s, history, i, newest)
        i += 1


@kernel(_VOID(_TABLE, _INT, _I1))
def reset(t: Table, s: int, neutral: IntArray) -> None:
    """Make a slot a customer without facts. neutral: features.carry.empty()."""
    places = t.places
    for column in range(PLACE_WIDTH):
        places[s, column] = 0
    places[s, NEWEST] = NONE
    for window in range(BOUNDED):
        places[s, DUE + window] = NEVER
    for column in range(ROW_WIDTH):
        t.totals[s, column] = neutral[column] if column < CARRY_WIDTH else 0
    for column in range(CARRY_WIDTH):
        t.carry[s, column] = neutral[column]
    for f in range(N_FEATURES):
        t.vectors[s, f] = np.float32(np.nan)
    t.probability[s] = np.float32(np.nan)
    t.band[s] = 0
    t.score_at[s] = NONE
    t.score_offset[s] = -1


@kernel(_VOID(_TABLE, _I1, _I1))
def reset_all(t: Table, slots: IntArray, neutral: IntArray) -> None:
    """`reset` of many slots."""
    for j in range(slots.shape[0]):
        reset(t, slots[j], neutral)


@kernel(_VOID(_TABLE, _INT))
def forget(t: Table, s: int) -> None:
    """Take everything of a slot out of the index; its arena rows become free at the next repack."""
    for i in range(t.places[s, TAIL + D90], t.places[s, END]):
        _unlist(t, s, i)
    t.counts[KEPT] -= t.places[s, END] - t.places[s, TAIL + D90]
    t.places[s, TAIL + D90] = 0
    t.places[s, END] = 0
    t.places[s, CAPACITY] = 0


# Room: a batch may add PENDING facts to a slot. It has room when they fit behind its facts; else the facts move to the front
# of the region when that frees a quarter of them or more (so that each move is paid for by as many appended facts), else to
# the top of the arena with half as much again.


@kernel(types.boolean(_TABLE, _INT, _INT))
def _fits(t: Table, s: int, pending: int) -> bool:
    return bool(t.places[s, END] + pending <= t.places[s, REGION] + t.places[s, CAPACITY])


@kernel(types.boolean(_TABLE, _INT, _INT))
def _fits_moved(t: Table, s: int, pending: int) -> bool:
    length = t.places[s, END] - t.places[s, TAIL + D90]
    return bool(t.places[s, CAPACITY] - length >= max(pending, length >> 2))


@kernel(_INT(_TABLE, _INT, _INT))
def _wanted(t: Table, s: int, pending: int) -> int:
    length = t.places[s, END] - t.places[s, TAIL + D90] + pending
    return int(length + max(length >> 1, _MIN_SLACK))


@kernel(_VOID(_TABLE, _INT, _I2, _U1, _INT, _INT))
def _move(t: Table, s: int, facts: IntArray, marks: ByteArray, region: int, capacity: int) -> None:
    """Copy a slot's facts to `region` of an arena, which may be the same one further down."""
    start = t.places[s, TAIL + D90]
    shift = region - start
    for i in range(start, t.places[s, END]):
        for column in range(WIDTH):
            facts[i + shift, column] = t.facts[i, column]
        marks[i + shift] = t.marks[i]
    for window in range(BOUNDED):
        t.places[s, TAIL + window] += shift
    t.places[s, END] += shift
    t.places[s, REGION] = region
    t.places[s, CAPACITY] = capacity


@kernel(_INT(_TABLE, _I1, _I1))
def demand(t: Table, slots: IntArray, counts: IntArray) -> int:
    """Note that counts[j] facts may come for slots[j]. Returns the arena rows that moving slots to the top will take."""
    for j in range(slots.shape[0]):
        t.places[slots[j], PENDING] += counts[j]
    rows = 0
    for j in range(slots.shape[0]):
        s = slots[j]
        pending = t.places[s, PENDING]
        if pending > 0:
            if not _fits(t, s, pending) and not _fits_moved(t, s, pending):
                rows += _wanted(t, s, pending)
            t.places[s, PENDING] = -pending  # counted; a slot may occur again
    return rows


@kernel(_VOID(_TABLE, _I1))
def make_room(t: Table, slots: IntArray) -> None:
    """Give every slot the room noted by `demand`."""
    for j in range(slots.shape[0]):
        s = slots[j]
        pending = -t.places[s, PENDING]
        t.places[s, PENDING] = 0
        if pending <= 0 or _fits(t, s, pending):
            continue
        if _fits_moved(t, s, pending):
            _move(t, s, t.facts, t.marks, t.places[s, REGION], t.places[s, CAPACITY])
        else:
            wanted = _wanted(t, s, pending)
            _move(t, s, t.facts, t.marks, t.counts[TOP], wanted)
            t.counts[TOP] += wanted


@kernel(_INT(_TABLE, _INT))
def _repacked(t: Table, s: int) -> int:
    pending = abs(t.places[s, PENDING])
    return _wanted(t, s, pending) if pending else min(t.places[s, CAPACITY], _wanted(t, s, 0))


@kernel(_INT(_TABLE))
def repacked_rows(t: Table) -> int:
    """Arena rows all slots take after `repack`."""
    rows = 0
    for s in range(t.places.shape[0]):
        if t.places[s, CAPACITY] or t.places[s, PENDING]:
            rows += _repacked(t, s)
    return rows


@kernel(_VOID(_TABLE, _I2, _U1))
def repack(t: Table, facts: IntArray, marks: ByteArray) -> None:
    """Copy all slots into a new arena without the gaps, with the room noted by `demand`."""
    top = 0
    for s in range(t.places.shape[0]):
        if t.places[s, CAPACITY] or t.places[s, PENDING]:
            capacity = _repacked(t, s)
            _move(t, s, facts, marks, top, capacity)
            top += capacity
    t.counts[TOP] = top


# The way to bytes and back: features/state.py knows the layout, here is only what changed.


@kernel(types.UniTuple(_INT, 2)(_TABLE, _I1))
def written_size(t: Table, slots: IntArray) -> tuple[int, int]:
    """Pieces that `write` makes of these slots, and an upper bound of their bytes."""
    chunks = 0
    for j in range(slots.shape[0]):
        s = slots[j]
        base = t.carry[s, BASE]
        closed = (base + t.places[s, END] - t.places[s, TAIL + D90]) // CHUNK
        chunks += max(0, closed - max(base // CHUNK, t.places[s, VALID]))
    return slots.shape[0] + chunks, slots.shape[0] * MAX_MAIN_BYTES + chunks * MAX_CHUNK_BYTES


@kernel(_INT(_TABLE, _I1, _U1, _I2, _I2))
def write(t: Table, slots: IntArray, out: ByteArray, pieces: IntArray, summary: IntArray) -> int:
    """Encode what changed of these slots since the last time, one after the other. Returns the bytes written.

    pieces: rows (chunk number or -1 for main, end in `out`), main first. summary: per slot (number of chunks, first and end
    of the chunk numbers that left the store).
    """
    pos = 0
    piece = 0
    for j in range(slots.shape[0]):
        s = slots[j]
        start = t.places[s, TAIL + D90]
        length = t.places[s, END] - start
        base = t.carry[s, BASE]
        pos = encode_main(
            t.facts,
            start,
            length,
            t.carry[s],
            t.vectors[s],
            t.probability[s],
            int(t.band[s]),
            t.score_at[s],
            t.score_offset[s],
            out,
            pos,
        )
        pieces[piece, 0] = -1
        pieces[piece, 1] = pos
        piece += 1
        first = base // CHUNK
        closed = (base + length) // CHUNK
        begin = max(first, t.places[s, VALID])
        for number in range(begin, closed):
            sequence = max(base, number * CHUNK)
            pos = encode_chunk(t.facts, start + sequence - base, (number + 1) * CHUNK - sequence, sequence, out, pos)
            pieces[piece, 0] = number
            pieces[piece, 1] = pos
            piece += 1
        summary[j, 0] = max(0, closed - begin)
        summary[j, 1] = t.places[s, FIRST_STORED]
        summary[j, 2] = min(first, t.places[s, END_STORED])
        t.places[s, FIRST_STORED] = first
        t.places[s, END_STORED] = closed
        t.places[s, VALID] = closed
        t.places[s, DIRTY] = 0
    return pos


@kernel(types.UniTuple(_INT, 2)(_TABLE, _I1, _INT, _INT, _U1, _I1, _I1, _I2, _INT))
def read(
    t: Table,
    slots: IntArray,
    done: int,
    number: int,
    buffer: ByteArray,
    bounds: IntArray,
    firsts: IntArray,
    history: IntArray,
    entries: int,
) -> tuple[int, int]:
    """Load the customers slots[done:] (reset already) from features.state.join's buffer, as many as there is room for.

    history: scratch for the facts of the largest one, shape (64 * parts, WIDTH); entries: how many the index may hold.
    Returns (how many are done, 0), (how many, facts of the next one that found no room), or (the damaged one, error < 0).
    """
    for j in range(done, slots.shape[0]):
        s = slots[j]
        parts = firsts[j + 1] - firsts[j]
        length, probability, band, score_at, offset = decode_parts(buffer, bounds, firsts[j], parts, history, 0, t.carry[s], t.vectors[s])
        if length < 0:
            return j, length
        if length > 0:
            wanted = _wanted(t, s, length)
            if t.counts[TOP] + wanted > t.facts.shape[0] or t.counts[ENTRIES] + length * ENTRIES_OF_A_FACT > entries:
                return j, length
            t.places[s, REGION] = t.counts[TOP]
            t.places[s, CAPACITY] = wanted
            t.places[s, END] = t.counts[TOP]
            for window in range(BOUNDED):
                t.places[s, TAIL + window] = t.counts[TOP]
            t.counts[TOP] += wanted
        replay(t, s, history, length)
        t.probability[s] = probability
        t.band[s] = np.uint8(band)
        t.score_at[s] = score_at
        t.score_offset[s] = offset
        base = t.carry[s, BASE]
        t.places[s, FIRST_STORED] = base // CHUNK
        t.places[s, END_STORED] = (base + t.places[s, END] - t.places[s, TAIL + D90]) // CHUNK
        t.places[s, VALID] = t.places[s, END_STORED]
        t.places[s, DIRTY] = 0
        t.places[s, USED] = number
    return slots.shape[0], 0


@kernel(_VOID(_TABLE, _I1, _F1, _U1, _I1, _I1, _I1, types.float64[::1], _U1, _I1, _U1))
def note_scores(
    t: Table,
    slots: IntArray,
    probability: FloatArray,
    band: ByteArray,
    at: IntArray,
    source: IntArray,
    offset: IntArray,
    floors: DoubleArray,
    former: ByteArray,
    former_offset: IntArray,
    alert: ByteArray,
) -> None:
    """Remember the last score of each slot, in order. former, former_offset: the band byte and the offset before each; alert: the
    alert band after each.

    The alert band rises with the band at once, and falls to it when the probability is below floors[alert band], shape (4,).
    """
    for j in range(slots.shape[0]):
        s = slots[j]
        former[j] = t.band[s]
        former_offset[j] = t.score_offset[s]
        level = (former[j] >> ALERT_SHIFT) & BAND_MASK
        if band[j] > level or (band[j] != 0 and np.float64(probability[j]) < floors[level]):
            level = band[j]
        alert[j] = level
        t.probability[s] = probability[j]
        t.band[s] = band[j] | (level << ALERT_SHIFT) | ((source[j] + 1) << SOURCE_SHIFT)
        t.score_at[s] = at[j]
        t.score_offset[s] = offset[j]
        t.places[s, DIRTY] = 1
