"""The detectors together: quiet where nothing drifts, awake where something does, the same after a restart."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from drift.baseline import Baseline, fit
from drift.monitor import Finding, Monitor
from drift.policy import QUIET_MS, Pager
from drift.series import MISSING, Series, Tally, codes, edges_of
from drift.statistics import ks, psi, threshold
from features.window import DAY_MS, HOUR_MS
from proto.errors import BadInput

DAYS, CALM = 28, 21
NAMES = ("quiet", "moved", "cycle")


def stream(seed: int, first: int, last: int, moved_from: int = 10**6) -> Iterator[tuple[Any, Any, Any]]:
    """Days [first, last) of three series: one quiet, one that moves in segment b only, one that is all cycle."""
    for day in range(first, last):
        rng = np.random.default_rng([seed, day])
        n = rng.poisson(1_500)
        hour, segment = rng.integers(0, 24, n), rng.integers(1, 3, n)
        values = rng.pareto(1.1, (n, 3))
        values[:, 2] += 30 * np.sin(2 * np.pi * hour / 24) + 10 * (day % 7 >= 5)
        values[:, 1] *= np.where((segment == 2) & (day >= moved_from), 2.0, 1.0)
        values[rng.random(n) < 0.05, 0] = np.nan
        yield day * DAY_MS + hour * HOUR_MS, values, segment


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    days = list(stream(1, 0, DAYS))
    edges = edges_of(np.concatenate([values for _, values, _ in days]))
    tally = Tally.of(edges, 2, HOUR_MS)
    for at, values, segment in days:
        tally.add(at, values, segment)
    slots = tally.close(2**62)
    series = [Series(name, "feature") for name in NAMES]
    return fit(series, ("a", "b"), edges, np.array([at for at, _ in slots]), np.array([counts for _, counts in slots]))


def watch(monitor: Monitor, days: Iterator[tuple[Any, Any, Any]]) -> list[Finding]:
    tally = Tally.of(monitor.baseline.edges, 2, monitor.baseline.block_ms)
    found: list[Finding] = []
    for at, values, segment in days:
        tally.add(at, values, segment)
        for start, counts in tally.close(2**62):
            found += monitor.update(start, counts)
    return found


def test_a_quiet_stream_with_a_cycle_and_wild_tails_brings_up_nothing(baseline: Baseline) -> None:
    assert watch(Monitor(baseline), stream(1, DAYS, DAYS + 40)) == []


def test_without_the_correction_the_same_stream_does_not_stay_quiet(baseline: Baseline) -> None:
    """The fault the test above would not survive."""
    assert len(watch(Monitor(baseline, raw=True), stream(1, DAYS, DAYS + 40))) > 10


def test_a_shift_of_one_segment_is_found_there_and_nowhere_else(baseline: Baseline) -> None:
    found = watch(Monitor(baseline), stream(1, DAYS, DAYS + CALM + 10, DAYS + CALM))
    assert found
    assert {finding.series for finding in found} == {"moved"}
    assert found[0].segment == "b"
    assert DAYS + CALM <= found[0].at_ms / DAY_MS <= DAYS + CALM + 3


def test_a_monitor_restored_from_its_state_goes_on_as_if_nothing_had_been(baseline: Baseline) -> None:
    whole, first = Monitor(baseline), Monitor(baseline)
    expected = watch(whole, stream(1, DAYS, DAYS + CALM + 10, DAYS + CALM))
    cut = DAYS + CALM + 1
    before = watch(first, stream(1, DAYS, cut, DAYS + CALM))
    second = Monitor(baseline)
    second.restore(first.state())
    assert before + watch(second, stream(1, cut, DAYS + CALM + 10, DAYS + CALM)) == expected
    assert len(before) < len(expected)


def test_a_baseline_survives_its_bytes(baseline: Baseline) -> None:
    again = Baseline.from_bytes(baseline.to_bytes())
    assert again.series == baseline.series
    np.testing.assert_array_equal(again.expected, baseline.expected)
    for damaged in (b"", b"PK\x03\x04", baseline.to_bytes()[:-100]):
        with pytest.raises(BadInput, match="drift baseline"):
            Baseline.from_bytes(damaged)


def test_two_weeks_are_the_least() -> None:
    with pytest.raises(BadInput, match="14 days"):
        fit([Series("x", "feature")], (), np.zeros((1, 10)), np.arange(9) * DAY_MS, np.ones((9, 1, 1, 12), np.int64))


def test_bins_have_equal_counts_a_mass_its_own_and_unknown_the_last() -> None:
    rng = np.random.default_rng(1)
    values = np.column_stack([rng.pareto(0.5, 11_000), rng.poisson(0.2, 11_000), np.full(11_000, np.nan)])
    binned = codes(values, edges_of(values))
    assert np.bincount(binned[:, 0], minlength=12)[:11].tolist() == pytest.approx([1_000] * 11, abs=2)
    assert np.bincount(binned[:, 1])[0] == (values[:, 1] == 0).sum()
    assert (binned[:, 2] == MISSING).all()


def test_distances_are_those_of_the_books() -> None:
    a, b = np.array([1_000, 1_000, 2_000]), np.array([2_000, 1_000, 1_000])
    assert float(psi(a, b)) == pytest.approx(0.25 * np.log(2) * 2, abs=1e-3)
    assert float(ks(a, b)) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="bins"):
        psi(a, b[:2])


def test_a_threshold_is_exceeded_as_rarely_as_it_was_allowed() -> None:
    rng = np.random.default_rng(2)
    limits = threshold(rng.normal(0.3, 0.05, (28, 4_000)) ** 2, 0.01, 0.0, 28)
    over = rng.normal(0.3, 0.05, 4_000) ** 2 > limits
    assert 0.003 < over.mean() < 0.017


def test_an_episode_pages_once_until_it_is_over() -> None:
    pager = Pager()
    days = [0, 1, 5, 11, 12, 30]
    assert [pager.note("unit", day * DAY_MS, 1)[1] for day in days] == [True, False, False, False, False, True]
    assert pager.note("other", 30 * DAY_MS, 1)[1]
    assert [episode.key for episode in Pager.of(pager.state()).over(30 * DAY_MS + QUIET_MS + 1)] == ["unit", "other"]
