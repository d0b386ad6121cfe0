"""A sample of the campaign: rounds of fixed seeds on servers that are broken on purpose; the ledger resumes and adds up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bench.faults import campaign, ledger
from bench.faults.nemesis import FAULTS
from tests.conftest import ROOT

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(600)]

SHARED_DATA = Path(os.environ.get("CHURN_DATA_DIR") or ROOT / ".churnstream").resolve()


def test_a_short_sample_of_rounds_finds_nothing_and_the_ledger_resumes(tmp_path: Path) -> None:
    book = tmp_path / "ledger.jsonl"
    home = SHARED_DATA / "faults" / f"sample{os.getpid()}"
    said: list[str] = []
    faults = ["kill", "redis_kill", "graceful"]
    common = {"seed": "ci", "faults": faults, "events": 1_500, "book": book, "home": home, "say": said.append}
    lines = campaign.run(rounds=3, **common)  # type: ignore[arg-type]  # the values of a dict of mixed arguments
    assert [line["fault"] for line in lines] == faults
    assert [line.get("violations", []) for line in lines] == [[], [], []], said
    assert campaign.run(rounds=3, **common) == lines  # type: ignore[arg-type]  # the values of a dict of mixed arguments
    figures = campaign.figures(lines, book)
    assert (figures["rounds"], figures["violated"], figures["graceful_raw_duplicates"]) == (3, 0, 0)


def test_every_fault_has_its_turn_and_a_seed_its_schedule() -> None:
    one, again, other = campaign.deck("1"), campaign.deck("1"), campaign.deck("2")
    assert one == again
    assert [fault.name for fault in one] != [fault.name for fault in other]
    assert {fault.name for fault in one} == FAULTS.keys()
    assert all(fault.share >= 5 for fault in FAULTS.values())


def test_figures_of_a_ledger_and_a_line_cut_off_by_a_crash(tmp_path: Path) -> None:
    book = tmp_path / "ledger.jsonl"
    for i in range(100):
        events = 20_000 if i < 3 else 2_000
        line: dict[str, object] = {"seed": f"s:{i}", "fault": "kill", "mode": "at_least_once", "events": events, "recover_s": i / 10}
        if i == 7:
            line["violations"] = ["I1 no score: partition 0"]
        ledger.append(book, json.dumps(line))
    with book.open("a") as stream:
        stream.write('{"seed": "s:100", "fau')
    figures = ledger.summary(ledger.read(book))
    assert (figures["rounds"], figures["violated"], figures["rounds_of_20000_events"]) == (100, 1, 3)
    assert (figures["kill_recover_p50_s"], figures["kill_recover_p99_s"]) == (4.9, 9.8)
    assert figures["failures"] == ["s:7 kill: I1 no score: partition 0"]
