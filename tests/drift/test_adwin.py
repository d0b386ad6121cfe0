"""River's ADWIN over block means: quiet on a steady stream, awake on a planted shift."""

import numpy as np
import pytest

from drift.adwin import BlockAdwin


def test_a_steady_stream_raises_no_alarm_in_a_million_values() -> None:
    detector = BlockAdwin()
    generator = np.random.default_rng(1)
    assert sum(detector.update(generator.beta(2, 5, 50_000)) for _ in range(20)) == 0
    assert detector.mean == pytest.approx(2 / 7, abs=0.01)


def test_a_planted_shift_is_found() -> None:
    detector = BlockAdwin()
    generator = np.random.default_rng(2)
    assert detector.update(generator.beta(2, 5, 100_000)) == 0
    assert detector.update(generator.beta(4, 5, 50_000)) >= 1


def test_single_values_would_alarm_where_block_means_stay_quiet() -> None:
    """The reason for blocks: a slowly swinging stream, as scores are within a day."""
    generator = np.random.default_rng(3)
    swing = np.clip(0.4 + 0.15 * np.sin(np.arange(100_000) / 40) + generator.normal(0, 0.05, 100_000), 0, 1)
    assert BlockAdwin(block=1).update(swing) > 10
    assert BlockAdwin(block=256).update(swing) == 0


def test_the_cut_of_the_stream_into_calls_changes_nothing() -> None:
    values = np.random.default_rng(4).beta(2, 5, 10_000)
    whole, pieces = BlockAdwin(), BlockAdwin()
    whole.update(values)
    for piece in np.array_split(values, 77):
        pieces.update(piece)
    assert whole.mean == pieces.mean


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_values_outside_the_range_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        BlockAdwin().update(np.array([0.5, value]))
