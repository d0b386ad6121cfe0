"""Hashes of rows are those of the standard library."""

from hashlib import blake2b

import numpy as np
import pytest

from features.blake2b import DIGEST_BYTES, LANES, blake2b_rows


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 64, 65, 106, 129])
@pytest.mark.parametrize("count", [0, 1, LANES - 1, LANES, 3 * LANES + 1])
def test_hashes_are_those_of_the_standard_library(count: int, width: int) -> None:
    rows = np.random.default_rng(width).normal(size=(count, width)).astype(np.float32)
    expected = [blake2b(row.astype("<f4").tobytes(), digest_size=DIGEST_BYTES).digest() for row in rows]
    assert [found.tobytes() for found in blake2b_rows(rows)] == expected
