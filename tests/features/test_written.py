"""Texts by compiled code, compared with what Python and a JSON encoder write."""

import msgspec
import numpy as np
import pytest

from features.written import MOST_DIGITS, Pieces, elements, fill, put_fixed

STRANGE = ['"', "\\", '\\"', "", "a,b", "]", "tab\t", "é", "\u2028", "\0", "[1,2]", "x" * 300]


def fixed(number: int, decimals: int, separated: bool) -> str:
    out = np.full(MOST_DIGITS + 1, ord("~"), np.uint8)
    end = put_fixed(out, 0, number, decimals, separated)
    assert out[end] == ord("~")
    return out[:end].tobytes().decode()


def test_whole_numbers_are_written_as_python_writes_them() -> None:
    random = np.random.default_rng(1)
    numbers = [0, 7, -7, 9, 10, 99, 100, 999, 1000, -1000, 999_999, 10**6, 2**63 - 1, -(2**63)]
    numbers += [int(x) >> int(s) for x, s in zip(random.integers(-(2**63), 2**63 - 1, 500), random.integers(0, 63, 500), strict=True)]
    for number in numbers:
        assert fixed(number, 0, False) == str(number)
        assert fixed(number, 0, True) == f"{number:,}"


@pytest.mark.parametrize(
    ("number", "decimals", "text"), [(0, 2, "0.00"), (5, 2, "0.05"), (-5, 1, "-0.5"), (123_456, 2, "1,234.56"), (1_000, 3, "1.000")]
)
def test_decimals_have_a_digit_before_the_point(number: int, decimals: int, text: str) -> None:
    assert fixed(number, decimals, True) == text


def test_elements_of_an_array_are_found_whatever_they_hold() -> None:
    for values in (STRANGE, [0.5, -1e-7, 1e300, 3.0], [1, 22, 333], [""]):
        array = msgspec.json.encode(values)
        starts, ends = elements(array, len(values))
        assert [msgspec.json.decode(array[a:b]) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)] == values
    for count in (1, 3):
        with pytest.raises(ValueError, match="not an array"):
            elements(b'["a","b"]', count)
    assert elements(b"[]", 0)[0].shape == (0,)


def test_records_are_filled_in() -> None:
    pieces = Pieces()
    name = pieces.array(msgspec.json.encode(STRANGE), len(STRANGE))
    flag = pieces.choice([b"no", b"yes"], np.arange(len(STRANGE)) % 2)
    own = pieces.each([text.encode() for text in STRANGE])
    numbers = np.arange(len(STRANGE)) - 3
    digests = np.arange(16 * len(STRANGE), dtype=np.uint8).reshape(-1, 16)
    together, ends = fill([b"<", b":", b":", b":", b":", b">"], [name, numbers, flag, digests, own], pieces.joined(), len(STRANGE))
    expected = [
        b"<%b:%d:%b:%b:%b>" % (msgspec.json.encode(text), i - 3, (b"no", b"yes")[i % 2], digests[i].tobytes().hex().encode(), text.encode())
        for i, text in enumerate(STRANGE)
    ]
    assert [together[a:b] for a, b in zip([0, *ends], ends, strict=False)] == expected
