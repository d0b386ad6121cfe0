"""The guard passes noise and stops a regression; the report keeps what is written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import guard
from bench.peers import report


def judged(*ratios: float) -> tuple[guard.Verdict, int]:
    """The verdict on these pairs against an accepted ratio of 1, and how many were measured."""
    left: Iterator[float] = iter(ratios)
    verdict = guard.judge(lambda: next(left), 1.0, 3)
    return verdict, len(verdict.ratios)


def test_a_pair_disturbed_by_others_is_no_regression() -> None:
    verdict, measured = judged(1.02, 1.9, 0.98)
    assert not verdict.red
    assert measured == 3


def test_a_disturbed_minute_is_measured_again() -> None:
    verdict, measured = judged(1.3, 1.4, 1.2, 1.0, 1.01, 0.99)
    assert not verdict.red
    assert measured == 6


def test_a_worker_a_fifth_slower_is_red() -> None:
    verdict, measured = judged(1.2, 1.21, 1.19, 1.2, 1.22, 1.18, 1.2, 1.2, 1.2)
    assert verdict.red
    assert measured == 9


@pytest.mark.parametrize(("ratio", "red"), [(1.15, False), (1.16, True)])
def test_the_limit(ratio: float, red: bool) -> None:
    assert guard.Verdict(ratio, (ratio,), 1.0).red is red


def test_medians_are_of_numbers_and_one_incomplete_run_counts() -> None:
    rows = [
        {"engine": "a", "events_per_cpu_second": rate, "complete": rate != 30, "agree": 1.0, "saturated": rate == 30}
        for rate in (10, 30, 20)
    ]
    found = report.medians(rows, ("engine",))[("a",)]
    assert found["events_per_cpu_second"] == 20
    assert found["events_per_cpu_second_range"] == [10, 30]
    assert found["complete"] is False
    assert found["saturated"] is True
    assert found["runs"] == 3


def test_only_the_measured_part_of_the_readme_is_replaced(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"by hand\n{report.BEGIN}\nold\n{report.END}\nmore by hand\n")
    report.write(readme, f"{report.BEGIN}\nnew\n{report.END}")
    assert readme.read_text() == f"by hand\n{report.BEGIN}\nnew\n{report.END}\nmore by hand\n"
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="marks"):
        report.write(readme, "")
