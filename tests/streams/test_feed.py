"""Files to events: mapping by configuration, nothing lost silently, and the real command against a real broker."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from proto.errors import BadInput
from proto.events import epoch_ms, read
from streams.feed import BadRow, FeedMapping, Pace, Record, events, load_mapping, rows
from streams.settings import Settings
from tests.conftest import ROOT, bare_environment, run_command

INVOICES = ROOT / "data" / "online_retail_ii" / "invoices.csv.gz"
BASE: dict[str, Any] = {
    "topic": "transactions",
    "fields": {
        "event_id": {"column": "id"},
        "customer_id": {"column": "who"},
        "kind": {"constant": "payment"},
        "event_time": {"column": "at", "format": "epoch_s"},
        "amount": {"column": "paid"},
    },
}
ROW = {"id": "1", "who": "0042", "at": "1700000000", "paid": "1.50"}


def mapping(**fields: Any) -> FeedMapping:
    return FeedMapping.model_validate(BASE | {"fields": BASE["fields"] | fields})


def csv_file(path: Path, *lines: dict[str, str]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return path


def fed(tmp_path: Path, chosen: FeedMapping, *lines: dict[str, str]) -> list[dict[str, Any] | str]:
    """Payloads, or the complaint about a bad row."""
    found = events([csv_file(tmp_path / "rows.csv", *lines)], chosen)
    return [one.why if isinstance(one, BadRow) else orjson.loads(one.value) for one in found]


def test_every_invoice_of_the_shop_becomes_an_event_of_its_own() -> None:
    found = list(events([INVOICES], load_mapping("online_retail_ii")))
    assert len(found) == 33_391
    records = [one for one in found if isinstance(one, Record)]
    assert len({record.event_id for record in records}) == 33_391
    payloads = [orjson.loads(record.value) for record in records]
    assert Counter(p["kind"] for p in payloads) == {"payment": 27_242, "refund": 6_149}
    with gzip.open(INVOICES, "rt") as stream:
        source = list(csv.DictReader(stream))
    assert [(p["event_id"], p["customer_id"], Decimal(p["amount"])) for p in payloads] == [
        (row["invoice"], row["customer_id"], abs(Decimal(row["amount"]))) for row in source
    ]
    assert all(record.key.decode() == p["customer_id"] for record, p in zip(records, payloads, strict=True))
    for record in records[::500]:
        assert read(0, record.value).event_id == record.event_id


def test_local_times_get_the_zone_of_the_mapping() -> None:
    found = {r.event_id: r.event_ms for r in events([INVOICES], load_mapping("online_retail_ii")) if isinstance(r, Record)}
    with gzip.open(INVOICES, "rt") as stream:
        source = {row["invoice"]: row["invoice_ts"] for row in csv.DictReader(stream)}
    winter = next(i for i, ts in source.items() if ts.startswith("2010-01"))
    summer = next(i for i, ts in source.items() if ts.startswith("2010-07"))
    assert found[winter] == epoch_ms(source[winter].replace(" ", "T") + "Z")
    assert found[summer] == epoch_ms(source[summer].replace(" ", "T") + "+01:00")


@pytest.mark.parametrize(
    ("field", "value", "row", "expected"),
    [
        ("product", {"column": "paid", "constant": None}, {}, "1.50"),
        ("event_id", {"columns": ["who", "id"], "join": "/"}, {}, "0042/1"),
        ("amount", {"column": "paid", "absolute": True}, {"paid": "-3.5"}, "3.5"),
        ("amount", {"column": "paid", "negate": True}, {"paid": "-3.5"}, "3.5"),
        ("kind", {"column": "paid", "positive": "payment", "negative": "refund"}, {"paid": "0"}, "payment"),
        ("kind", {"column": "x", "map": {"b": "refund"}, "default": "payment"}, {"x": "b"}, "refund"),
        ("kind", {"column": "x", "map": {"b": "refund"}, "default": "payment"}, {"x": "?"}, "payment"),
        ("event_time", {"column": "at", "format": "epoch_ms"}, {"at": "1700000000001"}, 1_700_000_000_001),
        ("event_time", {"column": "at", "format": "%d/%m/%Y", "zone": "America/New_York"}, {"at": "04/07/2024"}, 1_720_065_600_000),
        ("event_time", {"column": "at", "format": "%Y-%m-%dT%H:%M:%S%z"}, {"at": "2024-07-04T00:00:00+0200"}, 1_720_044_000_000),
    ],
)  # fmt: skip
def test_ways_to_make_a_field(tmp_path: Path, field: str, value: dict[str, Any], row: dict[str, str], expected: object) -> None:
    (payload,) = fed(tmp_path, mapping(**{field: value}), ROW | {"x": ""} | row)
    assert isinstance(payload, dict), payload
    assert payload[field] == expected


def test_a_derived_id_depends_on_its_columns_and_nothing_else(tmp_path: Path) -> None:
    chosen = mapping(event_id={"columns": ["who", "at"], "digest": True})
    first, second, third = fed(tmp_path, chosen, ROW, ROW | {"paid": "9"}, ROW | {"who": "7"})
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert isinstance(third, dict)
    assert first["event_id"] == second["event_id"] != third["event_id"]
    assert len(first["event_id"]) == 32


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"who": ""}, "customer_id"),
        ({"paid": "-1"}, "must not be negative"),
        ({"paid": "1,50"}, "amount"),
        ({"paid": "NaN"}, "not a finite number"),
        ({"at": "yesterday"}, "."),
        ({"at": "Infinity"}, "nfinity"),
        ({"at": ""}, "event_time"),
    ],
)
def test_a_bad_row_is_reported_with_its_place_and_the_others_go_on(tmp_path: Path, row: dict[str, str], why: str) -> None:
    path = csv_file(tmp_path / "rows.csv", ROW, ROW | row, ROW | {"id": "3"})
    good, bad, after = events([path], mapping())
    assert isinstance(good, Record)
    assert isinstance(after, Record)
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:3"
    assert why in bad.why


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    (complaint,) = fed(tmp_path, mapping(product={"column": "sku"}), ROW)
    assert complaint == "no column 'sku'"


def test_parquet_with_numbers_and_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = {"id": [1, 2], "who": [42, 7], "at": [datetime(2024, 7, 4), datetime(2024, 1, 4)], "paid": [Decimal("1.50"), Decimal("2.00")]}  # noqa: DTZ001 - a time without a zone is the case
    pq.write_table(pa.table(table), path)
    chosen = mapping(event_time={"column": "at", "format": "%Y", "zone": "Europe/London"})
    records = [one for one in events([path], chosen) if isinstance(one, Record)]
    assert [(r.event_id, r.key, r.event_ms) for r in records] == [
        ("1", b"42", epoch_ms("2024-07-04T00:00:00+01:00")),
        ("2", b"7", epoch_ms("2024-01-04T00:00:00Z")),
    ]
    assert [orjson.loads(r.value)["amount"] for r in records] == ["1.50", "2.00"]


def test_json_lines_of_our_own_contract_go_to_their_topics(tmp_path: Path) -> None:
    base = {"customer_id": "c", "event_time": "2024-01-01T00:00:00Z", "unknown": [1]}
    lines = [
        base | {"event_id": "1", "kind": "payment", "amount": 0.1},
        base | {"event_id": "2", "kind": "login"},
        base | {"event_id": "3", "kind": "satisfaction", "csat": 4},
        base | {"event_id": "4", "plan": "pro", "consent": True},
        base | {"event_id": "5", "kind": "dance"},
    ]
    path = tmp_path / "export.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(map(orjson.dumps, lines)) + b"\n{broken\n[]\n"))
    found = list(events([path], load_mapping("jsonl")))
    assert [one.topic for one in found if isinstance(one, Record)] == ["transactions", "logins", "support-tickets", "customer-profiles"]
    assert [one.place.rsplit(":", 1)[1] for one in found if isinstance(one, BadRow)] == ["5", "6", "7"]
    for topic, one in enumerate(found[:4]):
        assert isinstance(one, Record)
        assert read(topic, one.value).event_time == one.event_ms


def test_from_and_until_choose_by_event_time(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "rows.csv", *(ROW | {"id": str(i), "at": str(1_700_000_000 + i)} for i in range(5)))
    chosen = events([path], mapping(), from_ms=1_700_000_001_000, until_ms=1_700_000_003_000)
    assert [one.event_id for one in chosen if isinstance(one, Record)] == ["1", "2"]


def test_files_are_read_as_they_come_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "endless.csv"
    path.write_text("a\n1\n" + '"broken\n' * 2)
    reader = rows(path)
    assert next(reader)[1] == {"a": "1"}  # before the broken end is reached
    with pytest.raises(BadInput):
        list(reader)


@pytest.mark.parametrize("text", ["fast", "0/s", "-1x", "10", "x"])
def test_a_speed_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        Pace.parse(text)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"topic": "payments"}, "topic"),
        ({"fields": {}}, "is missing"),
        ({"fields": BASE["fields"] | {"shoe": {"column": "x"}}}, "no event has a field shoe"),
        ({"fields": BASE["fields"] | {"kind": {"column": "x", "constant": "y"}}}, "exactly one of"),
        ({"fields": BASE["fields"] | {"event_time": {"column": "x", "zone": "Mars/Base"}}}, "no time zone"),
        ({"speed": 3}, "Extra inputs"),
    ],
)
def test_a_wrong_mapping_is_refused_with_the_reason(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        FeedMapping.model_validate(BASE | change)


def test_a_dry_run_counts_and_a_bad_row_is_exit_code_4(tmp_path: Path) -> None:
    toml = tmp_path / "m.toml"
    toml.write_text(
        'topic = "transactions"\n[fields]\n'
        + "\n".join(f"{k} = {{ {', '.join(f'{a} = {json.dumps(b)}' for a, b in v.items())} }}" for k, v in BASE["fields"].items())
    )
    path = csv_file(tmp_path / "rows.csv", ROW, ROW | {"who": ""})
    done = run_command("feed", str(path), "--mapping", str(toml), "--dry-run", "--json")
    assert done.code == 4, done.err
    assert done.json() == {"events": 1, "bad_rows": 1, "by_topic": {"transactions": 1}, "dry_run": True}
    assert f"{path}:3: customer_id" in done.err
    assert run_command("feed", str(path), "--mapping", str(toml), "--dry-run", "--skip-bad").code == 0
    assert run_command("feed", str(path), "--mapping", "nowhere", "--dry-run").code == 4


@pytest.mark.servers
def test_the_command_sends_what_its_dry_run_counted(settings: Settings, environment: dict[str, str]) -> None:
    from confluent_kafka import Consumer, TopicPartition

    from streams.topics import client_config, create

    create(settings)
    arguments = ("feed", str(INVOICES), "--mapping", "online_retail_ii", "--limit", "500", "--json")
    dry = run_command(*arguments, "--dry-run", environment=environment)
    sent = run_command(*arguments, environment=environment)
    assert sent.code == 0, sent.err
    assert sent.json()["events"] == dry.json()["events"] == 500
    consumer = Consumer({**client_config(settings), "group.id": settings.group_id})
    try:
        name = settings.prefixed("transactions")
        ends = [consumer.get_watermark_offsets(TopicPartition(name, p), timeout=20)[1] for p in range(4)]
    finally:
        consumer.close()
    assert sum(ends) == 500
    assert min(ends) > 0


def test_a_broker_that_is_not_there_is_exit_code_3(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text('{"event_id":"1","customer_id":"c","kind":"login","event_time":1700000000000}\n')
    environment = bare_environment() | {
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "REDIS_URL": "redis://127.0.0.1:1",
        "CHURN_DEPENDENCY_TIMEOUT_S": "1",
    }
    done = run_command("feed", str(path), "--mapping", "jsonl", environment=environment)
    assert done.code == 3, done.err
    assert len(done.err.splitlines()) == 1, done.err
