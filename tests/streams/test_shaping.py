"""Rows before they are events: lookups, groups, day numbers, and the shipped mappings of sets whose files are not here."""

import gzip
from pathlib import Path

import numpy as np
import orjson
import pytest

from features.catalog import NAMES
from features.window import DAY_MS
from models.dataset import build
from models.labels import load
from proto.errors import BadInput
from proto.events import epoch_ms
from streams.feed import MAPPINGS, BadRow, FeedMapping, Record, events, load_mapping
from streams.settings import Settings
from streams.shaping import Group, grouped
from streams.training import from_mapped

COURSE = "code_module,code_presentation,module_presentation_length\nAAA,2013J,268\n"
STUDENT = "code_module,code_presentation,id_student,region,imd_band,age_band\nAAA,2013J,7,Wales,0-10%,0-35\nAAA,2013J,8,Wales,,0-35\n"
REGISTRATION = (
    "code_module,code_presentation,id_student,date_registration,date_unregistration\nAAA,2013J,7,-20,40\nAAA,2013J,8,-5,\nAAA,2013J,9,,3\n"
)
ASSESSMENT = "code_module,code_presentation,id_assessment,assessment_type,date,weight\nAAA,2013J,1,TMA,19,10.0\n"
WORK = "id_assessment,id_student,date_submitted,is_banked,score\n1,7,18,False,75\n1,8,19,True,60\n1,8,20,False,\n"


@pytest.fixture(scope="module")
def oulad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("oulad")
    files = {
        "course": COURSE,
        "student": STUDENT,
        "student_registration": REGISTRATION,
        "assessment": ASSESSMENT,
        "student_assessment": WORK,
    }
    for name, text in files.items():
        (out / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    return out


def sent(file: Path, mapping: str) -> list[dict[str, object]]:
    found = list(events([file], load_mapping(mapping)))
    assert not [row for row in found if isinstance(row, BadRow)]
    return [orjson.loads(record.value) for record in found if isinstance(record, Record)]


def test_a_university_comes_through_five_mappings(oulad: Path) -> None:
    opened = epoch_ms("2013-10-01T00:00:00Z")
    first, second = sent(oulad / "student_registration.csv.gz", "oulad_registrations")  # the third never registered
    assert (first["customer_id"], first["event_time"]) == ("AAA-2013J-7", opened - 20 * DAY_MS)
    assert (first["signup_date"], first["contract_end"]) == ("2013-09-11", "2014-06-25")  # the last of 268 days
    assert (first["age_band"], second["customer_id"], "segment" in second) == ("0-35", "AAA-2013J-8", False)
    assert [e["event_time"] for e in sent(oulad / "student_registration.csv.gz", "oulad_openings")] == ["2013-10-01T00:00:00Z"] * 2
    (left,) = sent(oulad / "student_registration.csv.gz", "oulad_withdrawals")
    assert (left["kind"], left["event_time"]) == ("cancellation", opened + 40 * DAY_MS)
    work = sent(oulad / "student_assessment.csv.gz", "oulad_submissions")  # the banked one is of another course
    assert [(e["customer_id"], e["amount"], e["event_time"]) for e in work] == [
        ("AAA-2013J-7", "75", opened + 18 * DAY_MS),
        ("AAA-2013J-8", "0", opened + 20 * DAY_MS),
    ]
    assert [e["nps"] for e in sent(oulad / "student_assessment.csv.gz", "oulad_marks")] == [8]  # 7.5, half up


def test_files_of_several_mappings_are_taken_by_event_time_and_answer_a_label(oulad: Path) -> None:
    registration = oulad / "student_registration.csv.gz"
    sources = [(registration, f"oulad_{name}") for name in ("registrations", "withdrawals", "openings")]
    sources.append((oulad / "student_assessment.csv.gz", "oulad_submissions"))
    (facts,) = from_mapped(sources, Settings())
    assert np.all(np.diff(facts.facts[:, 0]) >= 0)
    opened, label = epoch_ms("2013-10-01T00:00:00Z"), load("leaves-course-28d")
    cuts = [opened + day * DAY_MS for day in (13, 14, 39, 40, 240, 241)]
    rows = build(facts.customers, facts.facts, label, cuts, known_to_ms=opened + 400 * DAY_MS)
    asked = {((int(at) - opened) // DAY_MS, rows.names[c]): int(y) for at, c, y in zip(rows.at, rows.customer, rows.y, strict=True)}
    seven, eight = "AAA-2013J-7", "AAA-2013J-8"
    # Not before the 14th day, not the one who has left, not when fewer than 28 days of the course remain.
    assert asked == {(14, seven): 1, (14, eight): 0, (39, seven): 1, (39, eight): 0, (40, eight): 0, (240, eight): 0}
    at_39 = (rows.at == cuts[2]) & (rows.customer == rows.names.index(seven))
    assert rows.x[at_39][0, NAMES.index("last_purchase_minor")] == 7_500


def test_lines_of_a_basket_are_one_event(tmp_path: Path) -> None:
    file = tmp_path / "lines.csv"
    file.write_text("basket,who,sales,at\n1,a,0.10,2017-01-01\n2,b,5,2017-01-01\n1,a,0.20,2017-01-02\n3,c,1,2017-01-03\n")
    mapping = FeedMapping.model_validate(
        {
            "topic": "transactions",
            "group": {"by": ["basket"], "sum": ["sales"]},
            "fields": {
                "event_id": {"column": "basket"},
                "customer_id": {"column": "who"},
                "kind": {"constant": "payment"},
                "amount": {"column": "sales"},
                "event_time": {"column": "at", "format": "%Y-%m-%d"},
            },
        }
    )
    found = [orjson.loads(record.value) for record in events([file], mapping) if isinstance(record, Record)]
    assert [(e["event_id"], e["amount"]) for e in found] == [("1", "0.30"), ("2", "5"), ("3", "1")]  # exact, the time of the first line


def test_a_group_is_held_for_so_many_rows_and_no_longer() -> None:
    rows = [(n, {"k": key, "v": "1"}) for n, key in enumerate("abac")]
    held = [row["v"] for _, row in grouped(rows, Group(by=("k",), sum=("v",), within=3))]
    short = [row["k"] for _, row in grouped(rows, Group(by=("k",), sum=("v",), within=2))]
    assert [str(value) for value in held] == ["2", "1", "1"]
    assert short == ["a", "b", "a", "c"]


def test_a_lookup_says_what_it_lacks(oulad: Path, tmp_path: Path) -> None:
    for name in ("student_registration", "student", "course"):
        (tmp_path / f"{name}.csv.gz").write_bytes((oulad / f"{name}.csv.gz").read_bytes())
    (tmp_path / "course.csv.gz").write_bytes(gzip.compress((COURSE + "AAA,2013J,240\n").encode()))
    with pytest.raises(BadInput, match="AAA-2013J a second time"):
        sent(tmp_path / "student_registration.csv.gz", "oulad_registrations")
    (tmp_path / "course.csv.gz").write_bytes(gzip.compress(b"code_module,code_presentation\nAAA,2013J\n"))
    with pytest.raises(BadInput, match="no column module_presentation_length"):
        sent(tmp_path / "student_registration.csv.gz", "oulad_registrations")


def test_calls_of_1999_keep_their_weekday_and_hour(tmp_path: Path) -> None:
    file = tmp_path / "calls.csv"
    file.write_text(
        "vru_line,call_id,customer_id,priority,type,date,vru_entry,q_time\nA,1,0,0,PS,990101,0:34:12,0\nA,2,27,2,NE,990101,6:55:20,17\n"
    )
    (call,) = sent(file, "bank_calls")
    assert call["event_time"] == epoch_ms("2000-01-07T06:55:20+02:00")  # a Friday, as 1 January 1999 was
    assert (call["wait_seconds"], call["priority"], call["category"]) == (17, "high", "NE")


@pytest.mark.parametrize("name", sorted(path.stem for path in MAPPINGS.glob("*.toml")))
def test_every_shipped_mapping_is_one(name: str) -> None:
    load_mapping(name)
