"""A model is tried in a process that may die, within limits, once per machine."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard

from bench.small_model import repacked, small
from models import quarantine
from models.quarantine import Limits, Quarantine
from proto.errors import ArtifactRejected
from tests.conftest import ROOT


def test_a_sound_model_passes_once_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Quarantine(tmp_path / "tried")
    trials.examine(small().envelope)
    monkeypatch.setattr(quarantine, "examine", lambda *_: pytest.fail("tried again"))
    trials.examine(small().envelope)
    assert len(list((tmp_path / "tried").iterdir())) == 1


def test_what_takes_too_long_is_refused_and_not_remembered(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRejected, match=r"took longer than 0.01 s"):
        Quarantine(tmp_path / "tried", Limits(wall_s=0.01)).examine(small().envelope)
    assert not (tmp_path / "tried").exists()


def test_what_needs_more_memory_than_it_may_ends_its_process_only() -> None:
    large = zstandard.compress(bytes(64 << 20))
    with pytest.raises(ArtifactRejected, match="its trial ended"):
        quarantine.examine(large, Limits(memory_bytes=16 << 20))
    with pytest.raises(ArtifactRejected, match="does not begin like one"):
        quarantine.examine(large)


def test_the_process_can_neither_open_a_file_nor_work_without_end() -> None:
    program = """
from models.quarantine import _confine
_confine(0, 1 << 28)
try:
    open("/etc/hostname")
except OSError:
    print("closed", flush=True)
while True:
    pass
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "closed\n"
    assert done.returncode in (-signal.SIGKILL, -signal.SIGXCPU)


def test_golden_rows_that_score_otherwise_are_refused() -> None:
    wrong = np.clip(small().tables.golden_probability + np.float32(0.01), 0, 1)
    with pytest.raises(ArtifactRejected, match="apart from the trainer"):
        quarantine.examine(repacked(golden_probability=wrong))
