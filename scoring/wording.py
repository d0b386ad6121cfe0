"""Reasons as JSON by compiled code: which features moved a score most, and what is said of them, for a whole batch at once.

What a value reads like is decided in scoring/reasons.py; here the same texts are put together without a Python object per reason. A row
with a value that is not of the usual kind (huge, infinite, an amount exactly between two smallest coins) is left to Python.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from features.compiled import kernel, types
from features.written import MOST_DIGITS, elements, put, put_fixed


class Form(IntEnum):
    """How a feature's values read."""

    BARE = 0  # a number
    COUNTED = 1  # a number with its unit
    MONEY = 2
    SHARE = 3  # a percentage
    FLAG = 4  # yes or no


_COUNTED, _MONEY, _SHARE, _FLAG = int(Form.COUNTED), int(Form.MONEY), int(Form.SHARE), int(Form.FLAG)
LARGEST: Final = 1e15
"""From here on numbers are left to Python."""

DECIMALS: Final = 6
"""Decimals of a contribution."""

# Pieces of a feature.
_NAME, _MEANING, _UNKNOWN, _UNIT, _ONE_UNIT = range(5)
_PIECES: Final = 5
# Pieces that all features share, behind those of the features.
_OPEN, _NEXT, _CLOSE, _CONTRIBUTION, _UP, _DOWN, _YES, _NO, _PERCENT, _CURRENCY = range(10)


@dataclass(frozen=True, slots=True)
class Words:
    """Of one feature: its name; what stands before a value, what instead of an unknown one, what behind many and behind one."""

    name: str
    meaning: str
    unknown: str
    form: Form
    unit: str = ""
    one_unit: str = ""


_BYTES, _TEXT = types.uint8[::1], types.Array(types.uint8, 1, "C", readonly=True)
_INTS, _TABLE, _INT, _VOID = types.int64[::1], types.int64[:, ::1], types.int64, types.void
_DOUBLES, _FLAGS = types.float64[:, ::1], types.boolean[::1]


@kernel(_VOID(types.float64[:, ::1], _INT, _TABLE, types.float64[:, ::1]))
def _strongest(contributions: Any, top: int, chosen: Any, amounts: Any) -> None:
    # By size, ties in the order of the features; -1 behind the last one that is not zero.
    for r in range(contributions.shape[0]):
        found = 0
        for f in range(contributions.shape[1]):
            size = abs(contributions[r, f])
            if not size > 0.0 or (found == top and not size > abs(amounts[r, top - 1])):
                continue
            at = min(found, top - 1)
            while at > 0 and abs(amounts[r, at - 1]) < size:
                amounts[r, at] = amounts[r, at - 1]
                chosen[r, at] = chosen[r, at - 1]
                at -= 1
            amounts[r, at] = contributions[r, f]
            chosen[r, at] = f
            found = min(found + 1, top)
        for at in range(found, top):
            chosen[r, at] = -1
            amounts[r, at] = 0.0


def strongest(contributions: npt.NDArray[np.float64], top: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Features with the `top` largest contributions of each row, either way, strongest first, and those contributions.

    Shape (k, top) each; ties in the order of the features; -1 and 0.0 where fewer features contribute.
    """
    shape = (len(contributions), top)
    chosen, amounts = np.empty(shape, np.int64), np.empty(shape)
    if top:
        _strongest(contributions, top, chosen, amounts)
    return chosen, amounts


@kernel(_INT(_BYTES, _INT, _TEXT, _INTS, _INT))
def _put_piece(out: Any, pos: int, texts: Any, at: Any, piece: int) -> int:
    return put(out, pos, texts, at[piece], at[piece + 1])


@kernel(_INT(_BYTES, _INT, types.float64, _INT, types.boolean))
def _put_rounded(out: Any, pos: int, value: float, decimals: int, separated: bool) -> int:
    # The products are exact for a float32: the tie goes to the even digit, as in Python.
    scaled = abs(value) * (1.0, 10.0, 100.0)[decimals]
    if np.signbit(value):
        out[pos] = ord("-")
        pos += 1
    return put_fixed(out, pos, int(np.rint(scaled)), decimals, separated)


@kernel(_INT(_TABLE, _DOUBLES, _DOUBLES, _TEXT, _TABLE, _TABLE, _TEXT, _INTS, _INTS, _INT, _BYTES, _INTS, _FLAGS))
def _write(
    chosen: Any,
    values: Any,
    amounts: Any,
    numbers: Any,
    starts: Any,
    ends: Any,
    texts: Any,
    at: Any,
    form: Any,
    decimals: int,
    out: Any,
    stops: Any,
    left: Any,
) -> int:
    common = form.shape[0] * _PIECES
    pos = 0
    top = chosen.shape[1]
    for r in range(chosen.shape[0]):
        begin = pos
        left[r] = False
        pos = _put_piece(out, pos, texts, at, common + _OPEN)
        for k in range(top):
            f = chosen[r, k]
            if f < 0:
                break
            value = values[r, k]
            if k > 0:
                pos = _put_piece(out, pos, texts, at, common + _NEXT)
            pos = _put_piece(out, pos, texts, at, _PIECES * f + _NAME)
            pos = put(out, pos, numbers, starts[0, r * top + k], ends[0, r * top + k])
            pos = _put_piece(out, pos, texts, at, common + _CONTRIBUTION)
            pos = put(out, pos, numbers, starts[1, r * top + k], ends[1, r * top + k])
            pos = _put_piece(out, pos, texts, at, _PIECES * f + _MEANING)
            size = abs(value)
            if np.isnan(value):
                pos = _put_piece(out, pos, texts, at, _PIECES * f + _UNKNOWN)
            elif form[f] == _FLAG:
                pos = _put_piece(out, pos, texts, at, common + (_NO if value == 0 else _YES))
            elif not size < LARGEST or (form[f] == _MONEY and size - np.floor(size) == 0.5):
                left[r] = True
                break
            elif form[f] == _MONEY:
                if np.signbit(value):
                    out[pos] = ord("-")
                    pos += 1
                pos = put_fixed(out, pos, int(np.rint(size)), decimals, True)
                pos = _put_piece(out, pos, texts, at, common + _CURRENCY)
            elif form[f] == _SHARE:
                pos = _put_rounded(out, pos, 100.0 * value, 0, False)
                pos = _put_piece(out, pos, texts, at, common + _PERCENT)
            else:
                places = 0 if size >= 10.0 or value == np.floor(value) else 1 if size >= 1.0 else 2
                pos = _put_rounded(out, pos, value, places, True)
                if form[f] == _COUNTED:
                    pos = _put_piece(out, pos, texts, at, _PIECES * f + (_ONE_UNIT if value == 1.0 else _UNIT))
            pos = _put_piece(out, pos, texts, at, common + (_UP if amounts[r, k] > 0.0 else _DOWN))
        pos = begin if left[r] else _put_piece(out, pos, texts, at, common + _CLOSE)
        stops[r] = pos
    return pos


class Wording:
    """The texts of all features, in catalog order.

    currency and decimals: how amounts in minor units are written; up and down: what is said of a contribution.
    """

    def __init__(self, words: Sequence[Words], currency: str, decimals: int, up: str, down: str) -> None:
        pieces: list[bytes] = []
        for word in words:
            pieces += [
                b'{"feature":%b,"value":' % orjson.dumps(word.name),
                b',"text":"%b' % _inside(word.meaning),
                *map(_inside, (word.unknown, word.unit, word.one_unit)),
            ]
        ends = (_inside(up) + b'"}', _inside(down) + b'"}')
        pieces += [b"[", b",", b"]", b',"contribution":', *ends, b"yes", b"no", b" %", _inside(f" {currency}".rstrip())]
        sizes = [len(piece) for piece in pieces]
        self._texts, self._at = np.frombuffer(b"".join(pieces), np.uint8), np.cumsum([0, *sizes]).astype(np.int64)
        self._form = np.array([word.form for word in words], np.int64)
        self._decimals, self._longest = decimals, max(sizes)

    def write(self, chosen: npt.NDArray[np.int64], values: npt.NDArray[np.float64], amounts: npt.NDArray[np.float64]) -> list[bytes | None]:
        """JSON of the reasons of each row, None of a row left to Python. All of shape (k, top)."""
        rows, top = chosen.shape
        count = rows * top
        numbers = [orjson.dumps(values.ravel().tolist()), orjson.dumps(np.round(amounts, DECIMALS).ravel().tolist())]
        found = [elements(text, count) for text in numbers]
        starts, ends = (np.stack([found[0][i], found[1][i] + len(numbers[0])]) for i in (0, 1))
        room = sum(map(len, numbers)) + (rows + count) * (6 * self._longest + MOST_DIGITS)
        out, stops, left = np.empty(room, np.uint8), np.empty(rows, np.int64), np.empty(rows, np.bool_)
        used = _write(
            chosen,
            values,
            amounts,
            np.frombuffer(b"".join(numbers), np.uint8),
            starts,
            ends,
            self._texts,
            self._at,
            self._form,
            self._decimals,
            out,
            stops,
            left,
        )
        together = out[:used].tobytes()
        bounds = [0, *stops.tolist()]
        return [None if slow else together[a:b] for a, b, slow in zip(bounds, bounds[1:], left.tolist(), strict=False)]


def _inside(text: str) -> bytes:
    return orjson.dumps(text)[1:-1]
