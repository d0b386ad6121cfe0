"""One hash index for all values of a partition: (owner, value) -> newest event time, open addressing, no tombstones.

Rows are (value, owner + 1, time); 0 in the second column is an empty place. The length is a power of two. Linear probing;
a removal shifts the entries behind it back, so a search never meets a grave. Growing is the caller's: at most
MAX_LOAD of the places may be taken.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from features.compiled import kernel

IntArray = npt.NDArray[np.int64]

MAX_LOAD: Final = 0.6
INDEX_WIDTH: Final = 3


@kernel("int64(int64[:, ::1], int64, int64)")
def home(index: IntArray, owner: int, value: int) -> int:
    """The place where a search for (owner, value) begins."""
    word = np.uint64(value) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(owner + 1) * np.uint64(0xD6E8FEB86659FD93)
    word ^= word >> np.uint64(32)
    word *= np.uint64(0xC2B2AE3D27D4EB4F)
    word ^= word >> np.uint64(29)
    return int(np.int64(word & np.uint64(index.shape[0] - 1)))


@kernel("int64(int64[:, ::1], int64, int64)")
def find(index: IntArray, owner: int, value: int) -> int:
    """Place of an entry; ~place of the empty row where it belongs (< 0) when there is none."""
    mask = index.shape[0] - 1
    place = home(index, owner, value)
    while index[place, 1] != 0:
        if index[place, 0] == value and index[place, 1] == owner + 1:
            return place
        place = (place + 1) & mask
    return ~place


@kernel("void(int64[:, ::1], int64, int64, int64, int64)")
def put(index: IntArray, place: int, owner: int, value: int, time: int) -> None:
    """Write an entry at a place `find` gave (not complemented)."""
    index[place, 0] = value
    index[place, 1] = owner + 1
    index[place, 2] = time


@kernel("void(int64[:, ::1], int64)")
def remove(index: IntArray, place: int) -> None:
    """Remove the entry at a place and close the gap."""
    mask = index.shape[0] - 1
    gap = place
    while True:
        place = (place + 1) & mask
        if index[place, 1] == 0:
            break
        wanted = home(index, index[place, 1] - 1, index[place, 0])
        # The entry may move back into the gap unless its home lies cyclically in (gap, place].
        if (place - wanted) & mask >= (place - gap) & mask:
            index[gap, 0] = index[place, 0]
            index[gap, 1] = index[place, 1]
            index[gap, 2] = index[place, 2]
            gap = place
    index[gap, 1] = 0


@kernel("void(int64[:, ::1], int64[:, ::1])")
def rehash(index: IntArray, larger: IntArray) -> None:
    """Copy every entry into an empty index."""
    for place in range(index.shape[0]):
        if index[place, 1] != 0:
            to = ~find(larger, index[place, 1] - 1, index[place, 0])
            put(larger, to, index[place, 1] - 1, index[place, 0], index[place, 2])


def room_for(entries: int) -> int:
    """Length of an index that holds this many entries within MAX_LOAD."""
    length = 64
    while length * MAX_LOAD < entries:
        length *= 2
    return length
