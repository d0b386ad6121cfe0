"""Every mutant still fits the sources; one of them is run here, all of them by `churnstream-faults mutants`."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.faults.mutants import MUTANTS, Edit, Mutant, caught, mutant, plant


@pytest.mark.parametrize("what", MUTANTS, ids=lambda what: what.name)
def test_a_mutant_fits(what: Mutant, tmp_path: Path) -> None:
    plant(what, tmp_path)
    for edit in what.edits:
        compile((tmp_path / edit.file).read_text("utf-8"), edit.file, "exec")


def test_the_list_is_whole() -> None:
    assert [what.name for what in MUTANTS] == [f"M{number}" for number in range(1, 15)]


def test_an_edit_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no longer fits"):
        plant(mutant("gone", "", Edit("streams/engine.py", "this text is not there", ""), shows={"I1"}), tmp_path)


@pytest.mark.slow
def test_a_mutant_is_caught_and_a_sound_build_is_not() -> None:
    chosen = next(what for what in MUTANTS if what.name == "M14")
    assert caught(chosen, 50)["caught"]
    sound = mutant("sound", "nothing", Edit("streams/engine.py", '"""The way of a batch', '"""The way of every batch'), shows={"I1"})
    found = caught(sound, 3)
    assert (found["caught"], found["invariant"], found["seeds"]) == (False, "", 3)
