"""The published schema files are those of the models."""

from __future__ import annotations

from pathlib import Path

from proto.errors import Reason
from proto.schemas import differences, schemas
from proto.scores import DeadLetter

DIRECTORY = Path(__file__).parents[2] / "docs" / "schemas"


def test_the_files_match_the_contracts() -> None:
    assert differences(DIRECTORY) == [], "run `churnstream schema export`"


def test_a_stale_a_missing_and_a_stray_file_are_each_named(tmp_path: Path) -> None:
    for name, text in schemas().items():
        (tmp_path / name).write_text(text, "utf-8")
    assert differences(tmp_path) == []
    (tmp_path / "logins.json").write_text("{}", "utf-8")
    (tmp_path / "transactions.json").unlink()
    (tmp_path / "stray.json").write_text("{}", "utf-8")
    assert sorted(problem.split(":")[0] for problem in differences(tmp_path)) == ["logins.json", "stray.json", "transactions.json"]


def test_a_dead_letter_names_every_reason_there_is() -> None:
    named = DeadLetter.model_json_schema()["properties"]["reason"]["enum"]
    assert named == [reason.name.lower() for reason in Reason if reason]
