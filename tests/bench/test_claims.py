"""The ledger catches what it must: a broken floor, a failing command, a missing key, a wrong ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.claims import LEDGER, Claim, LedgerInvalid, main, read_ledger


def ledger(path: Path, *entries: dict[str, object]) -> Path:
    """A ledger file with these entries over a sound default."""
    default: dict[str, object] = {
        "id": "speed",
        "issue": "main-job",
        "statement": "It is fast.",
        "command": """echo noise; echo '{"a": {"rates": [7, 12.5]}, "auc": 0.8, "residue": 0, "text": "12"}'""",
        "key": "a.rates.1",
        "direction": ">=",
        "target": 10,
        "floor": 10,
    }
    lines = []
    for entry in entries:
        lines += ["[[claim]]", "date = 2026-11-25", *(f"{k} = {json.dumps(v)}" for k, v in (default | entry).items() if v is not None)]
    path.write_text("\n".join(lines))
    return path


def run(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    code = main(["--ledger", str(path), *options])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    summary: dict[str, Any] = json.loads(lines[0])
    return code, summary


def test_a_claim_that_holds_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ledger(
        tmp_path / "l.toml",
        {},
        {"id": "auc", "key": "auc", "direction": "in", "target": "0.72..0.85", "floor": "0.72..0.85"},
        {"id": "residue", "key": "residue", "direction": "==", "target": 0, "floor": 0},
    )
    code, summary = run(capsys, path)
    assert code == 0
    assert summary["checked"] == 3
    assert summary["failed"] == summary["missed_targets"] == []
    assert summary["values"] == {"speed": 12.5, "auc": 0.8, "residue": 0}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"floor": 13, "target": 13}, ""),
        ({"direction": "<=", "floor": 12, "target": 12}, ""),
        ({"key": "auc", "direction": "in", "floor": "0.81..0.85", "target": "0.81..0.85"}, ""),
        ({"key": "residue", "direction": "==", "floor": 1, "target": 1}, ""),
        ({"key": "residue", "direction": "==", "floor": False, "target": False}, ""),
        ({"key": "text"}, ""),
        ({"key": "a.rates.2"}, "has no a.rates.2"),
        ({"key": "b"}, "has no b"),
        ({"command": """echo '{"a": {"rates": [7, 12.5]}}'; exit 1"""}, "exit code 1"),
        ({"command": "no-such-command"}, "exit code 127"),
        ({"command": "true"}, "no JSON object"),
        ({"command": "echo not json"}, "no JSON object"),
        ({"command": "echo 5"}, "no JSON object"),
        ({"command": "sleep 60", "timeout_s": 0.2}, "did not end within 0.2 s"),
    ],
)
def test_a_seeded_fault_is_caught(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: dict[str, object], error: str) -> None:
    code, summary = run(capsys, ledger(tmp_path / "l.toml", {"id": "fine"}, fault))
    assert code == 1
    (failed,) = summary["failed"]
    assert failed["id"] == "speed"
    assert error in failed["error"]


def test_between_floor_and_target_the_reason_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, summary = run(capsys, ledger(tmp_path / "l.toml", {"target": 20, "floor": 11, "reason": "two cores"}))
    assert code == 0
    assert summary["missed_targets"] == [{"id": "speed", "value": 12.5, "target": 20, "reason": "two cores"}]


def test_a_distinct_command_runs_once_and_quick_takes_the_short_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = tmp_path / "count"
    slow = f"""echo x >> {count}; echo '{{"n": 5}}'"""
    entry = {"command": slow, "key": "n", "floor": 5, "target": 5, "quick": "echo '{\"n\": 2}'", "quick_floor": 2}
    path = ledger(tmp_path / "l.toml", entry, entry | {"id": "other"})
    assert run(capsys, path)[0] == 0
    assert count.read_text() == "x\n"
    code, summary = run(capsys, path, "--quick")
    assert (code, summary["values"]) == (0, {"speed": 2, "other": 2})
    assert summary["missed_targets"][0]["reason"] == "a quick run, whose floor is 2"
    assert count.read_text() == "x\n"


def test_a_command_runs_as_in_a_new_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Makefile").write_text("""all:\n\t@echo '{"n": 10}'\n""")
    monkeypatch.setenv("MAKELEVEL", "1")  # as `make claims` sets it
    monkeypatch.setenv("MAKEFLAGS", "w")
    path = ledger(tmp_path / "l.toml", {"command": f"cd {tmp_path} && make", "key": "n"})
    assert run(capsys, path)[0] == 0


def test_an_issue_is_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ledger(tmp_path / "l.toml", {}, {"id": "later", "issue": "speed", "command": "false"})
    assert run(capsys, path, "--issue", "MAIN-JOB")[0] == 0
    assert main(["--ledger", str(path), "--issue", "nothing"]) == 2


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"floor": 5}, "needs a reason"),
        ({"direction": ">"}, "is none of"),
        ({"direction": "in"}, "needs a range"),
        ({"direction": "in", "floor": "0.9..0.1", "target": "0.9..0.1"}, "needs a range"),
        ({"floor": "ten"}, "needs a number"),
        ({"key": None}, "missing key"),
        ({"speed": 1}, "unknown field speed"),
    ],
)
def test_a_wrong_ledger_is_refused(tmp_path: Path, fault: dict[str, object], message: str) -> None:
    path = ledger(tmp_path / "l.toml", fault)
    with pytest.raises(LedgerInvalid, match=message):
        read_ledger(path)
    assert main(["--ledger", str(path)]) == 4


def test_an_id_is_there_once(tmp_path: Path) -> None:
    with pytest.raises(LedgerInvalid, match="twice"):
        read_ledger(ledger(tmp_path / "l.toml", {}, {}))


def test_our_own_ledger_is_sound() -> None:
    assert all(isinstance(claim, Claim) for claim in read_ledger(LEDGER))
