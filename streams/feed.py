"""Files to events: CSV, Parquet or JSON lines, mapped by configuration only, sent at a chosen pace."""

from __future__ import annotations

import csv
import gzip
import logging
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from hashlib import blake2b
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from features.facts import TOPICS
from proto.errors import BadInput, DependencyUnreachable
from proto.events import MODELS
from streams.shaping import Group, Lookup, grouped, looked_up

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())  # a client's retries are its own affair; what fails in the end is raised

MAPPINGS: Final = Path(__file__).parent / "mappings"
"""The mappings we ship; `--mapping NAME` finds them without a path."""
TopicName = Literal["transactions", "logins", "support-tickets", "customer-profiles"]
_PARQUET_ROWS: Final = 10_000
_NUMBERS: Final = {"event_time", "amount", "duration_ms", "wait_seconds", "csat", "nps", "consent"}
_TEXTS: Final = {name for contract in MODELS for name in contract.model_fields} - _NUMBERS


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Value(_Strict):
    """How one event field comes from a row: a constant, a column, or columns joined; then, in this order, map, scale of sign, time."""

    constant: str | int | float | bool | None = None
    column: str | None = None
    columns: tuple[str, ...] | None = None
    join: str = "-"
    digest: bool = Field(False, description="Replace the text by its 128-bit digest; for ids built from many columns.")
    map: dict[str, str] | None = Field(None, description="Replace the text; one not listed is `default`, or else a bad row.")
    default: str | int | float | None = Field(None, description="Value when the cell is empty or not in `map`.")
    absolute: bool = Field(False, description="Drop the sign of a number.")
    negate: bool = Field(False, description="Turn the sign of a number.")
    positive: str | None = Field(None, description="Value when the number is >= 0: a kind from a sign; needs `negative`.")
    negative: str | None = None
    number: Literal["integer", "boolean"] | None = Field(None, description="Type of the field when the file has only text.")
    times: float | None = Field(None, description="Multiply a number; rounded half up where `number` is integer.")
    format: str | None = Field(None, description='strptime format of a time, or "epoch_s" / "epoch_ms" / "days" since `since`.')
    since: Value | None = Field(None, description="Where days are counted from: a text YYYY-MM-DD.")
    plus_days: int = Field(0, description="Days added to a time.")
    date: bool = Field(False, description="The day of a time, as YYYY-MM-DD.")
    zone: str = Field("UTC", description="Zone of a time without one (IANA name).")

    @model_validator(mode="after")
    def _one_source(self) -> Value:
        if sum(source is not None for source in (self.constant, self.column, self.columns)) != 1:
            raise ValueError("needs exactly one of constant, column, columns")
        if (self.positive is None) != (self.negative is None):
            raise ValueError("positive and negative go together")
        if (self.since is None) != (self.format != "days"):
            raise ValueError("format days and since go together")
        return self

    @field_validator("zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError) as error:
            raise ValueError(f"no time zone {name}") from error
        return name


class TopicBy(_Strict):
    """The topic from a column of the row."""

    column: str
    map: dict[str, TopicName]
    default: TopicName | None = None


class FeedMapping(_Strict):
    """One TOML file: which topic, and how each event field comes from a row. `copy` takes columns named like fields as they are."""

    topic: TopicName | None = None
    topic_by: TopicBy | None = None
    copy_columns: bool = Field(False, alias="copy")
    fields: dict[str, Value]
    only: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="Keep rows whose column has one of these texts.")
    skip: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="Leave out rows whose column has one of these texts.")
    needs: tuple[str, ...] = Field((), description="Leave out rows in which one of these columns is empty.")
    lookup: tuple[Lookup, ...] = Field((), description="Columns of a second file beside each row.")
    group: Group | None = Field(None, description="Rows put together as one.")
    sort: bool = Field(False, description="The file's order means nothing: its events are taken by event time.")

    @model_validator(mode="after")
    def _complete(self) -> FeedMapping:
        if (self.topic is None) == (self.topic_by is None):
            raise ValueError("needs exactly one of topic, topic_by")
        known = {name for contract in MODELS for name in contract.model_fields}
        if unknown := sorted(set(self.fields) - known):
            raise ValueError(f"no event has a field {unknown[0]}; fields are {', '.join(sorted(known))}")
        if not self.copy_columns:
            needed = {"customer_id", "event_id", "event_time", "kind"} - ({"kind"} if self.topic == "customer-profiles" else set())
            if missing := sorted(needed - set(self.fields)):
                raise ValueError(f"fields.{missing[0]} is missing")
        return self


def load_mapping(name: str) -> FeedMapping:
    """A mapping file, or one of ours by name. Raises BadInput naming the file and what is wrong with it."""
    path = Path(name)
    if not path.suffix:
        path = MAPPINGS / f"{name}.toml"
    try:
        return FeedMapping.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        ours = ", ".join(sorted(p.stem for p in MAPPINGS.glob("*.toml")))
        raise BadInput(f"mapping {path}: {error.strerror}; give a TOML file, or one of: {ours}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"mapping {path}: {where + ': ' if where else ''}{first['msg']}") from error
    except ValueError as error:
        raise BadInput(f"mapping {path}: {error}") from error


@dataclass(frozen=True, slots=True)
class Record:
    """One event ready to send; event_ms as the mapping read it."""

    topic: TopicName
    key: bytes
    value: bytes
    event_id: str
    event_ms: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no event: where, and why."""

    place: str
    why: str


def rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a .csv, .jsonl/.ndjson or .parquet file (.gz too) with their line or row numbers. Raises BadInput."""
    plain = path.name.removesuffix(".gz")
    try:
        if plain.endswith(".parquet"):
            yield from _parquet(path)
            return
        with _opened(path) as stream:
            if plain.endswith((".jsonl", ".ndjson")):
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        try:
                            row = orjson.loads(line)
                        except orjson.JSONDecodeError as error:
                            row = {"": f"not JSON: {error}"}
                        yield number, row if isinstance(row, dict) else {"": "not a JSON object"}
            elif plain.endswith(".csv"):
                text = TextIOWrapper(stream, encoding="utf-8-sig", newline="")
                reader = csv.DictReader(text, strict=True)
                for row in reader:
                    yield reader.line_num, row
            else:
                raise BadInput(f"{path}: can read .csv, .jsonl, .ndjson and .parquet, also .gz")
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: {error}") from error


def _opened(path: Path) -> IO[bytes]:
    opened: Any = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115 - the caller closes it
    stream: IO[bytes] = opened
    return stream


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except ArrowException as error:
        raise BadInput(f"{path}: {error}") from error


def events(
    paths: Iterable[Path], mapping: FeedMapping, *, from_ms: int | None = None, until_ms: int | None = None
) -> Iterator[Record | BadRow]:
    """Every row of the files as an event or as a bad row, in file order or as `sort` says; from_ms <= event time < until_ms where given."""
    for path in paths:
        found = (
            record
            for record in _events(path, mapping)
            if isinstance(record, BadRow)
            or ((from_ms is None or record.event_ms >= from_ms) and (until_ms is None or record.event_ms < until_ms))
        )
        yield from sorted(found, key=lambda record: -1 if isinstance(record, BadRow) else record.event_ms) if mapping.sort else found


def _events(path: Path, mapping: FeedMapping) -> Iterator[Record | BadRow]:
    for number, row in _shaped(path, mapping):
        try:
            yield _record(row, mapping)
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            why = f"no column {error}" if isinstance(error, KeyError) else str(error)
            yield BadRow(f"{path}:{number}", why)


def _shaped(path: Path, mapping: FeedMapping) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file that are to become events, as the mapping shapes them. Raises BadInput."""
    found: Iterator[tuple[int, Mapping[str, Any]]] = (
        (number, row)
        for number, row in rows(path)
        if not any(str(row.get(column, "")) not in texts for column, texts in mapping.only.items())
        and not any(str(row.get(column, "")) in texts for column, texts in mapping.skip.items())
        and not any(row.get(column) in (None, "") for column in mapping.needs)
    )
    if mapping.lookup:
        found = looked_up(found, mapping.lookup, path.parent, rows)
    if mapping.group is None:
        yield from found
        return
    try:
        yield from grouped(found, mapping.group)
    except (KeyError, ArithmeticError) as error:
        raise BadInput(f"{path}: rows cannot be grouped: {error!r}") from error


def _record(row: Mapping[str, Any], mapping: FeedMapping) -> Record:
    if "" in row and isinstance(row[""], str):
        raise ValueError(row[""])
    topic = mapping.topic or _topic(row, mapping)
    contract = MODELS[TOPICS.index(topic)]
    event: dict[str, Any] = {}
    if mapping.copy_columns:
        event = {name: row[name] for name in contract.model_fields if row.get(name) is not None}
    for name, value in mapping.fields.items():
        cell = _cell(row, value)
        if cell is not None:
            # A Parquet or JSON column of whole numbers is a text here (a customer number, a product code).
            event[name] = str(cell) if name in _TEXTS and isinstance(cell, int) and not isinstance(cell, bool) else cell
    try:
        checked = contract.model_validate(event)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from error
    # Decimals as text: a JSON number would pass through binary floating point.
    body = orjson.dumps(event, default=str)
    return Record(topic, checked.customer_id.encode(), body, checked.event_id, checked.event_time)


def _topic(row: Mapping[str, Any], mapping: FeedMapping) -> TopicName:
    by = mapping.topic_by
    assert by is not None
    topic = by.map.get(str(row.get(by.column)), by.default)
    if topic is None or (row.get(by.column) is not None and str(row[by.column]) not in by.map):
        raise ValueError(f"{by.column} {row.get(by.column)!r} belongs to no topic")
    return topic


def _cell(row: Mapping[str, Any], value: Value) -> Any:
    if value.constant is not None:
        return value.constant
    if value.columns is not None:
        cell: Any = value.join.join(str(row[column]) for column in value.columns)
    else:
        assert value.column is not None
        cell = row[value.column]
    if cell is None or cell == "":
        return value.default
    if value.digest:
        cell = blake2b(str(cell).encode(), digest_size=16).hexdigest()
    if value.map is not None:
        mapped = value.map.get(str(cell), value.default)
        if mapped is None:
            raise ValueError(f"{value.column or value.columns} {cell!r} is not in the map")
        return mapped
    if value.positive is not None:
        return value.positive if Decimal(str(cell)) >= 0 else value.negative
    if value.absolute or value.negate or value.times is not None:
        number = Decimal(str(cell)) * Decimal(str(value.times or 1))
        number = abs(number) if value.absolute else -number if value.negate else number
        return int(number.to_integral_value(ROUND_HALF_UP)) if value.number == "integer" else str(number)
    if value.format is not None:
        moment = _days(row, cell, value) if value.format == "days" else _time(cell, value.format, value.zone)
        moment += value.plus_days * 86_400_000
        return datetime.fromtimestamp(moment / 1_000, UTC).date().isoformat() if value.date else moment
    if value.number == "integer":
        return int(cell)
    if value.number == "boolean":
        return str(cell).lower() in ("true", "1", "yes")
    return cell if isinstance(cell, str | int | float) else str(cell)


def _days(row: Mapping[str, Any], cell: Any, value: Value) -> int:
    assert value.since is not None
    start = datetime.strptime(str(_cell(row, value.since)), "%Y-%m-%d").replace(tzinfo=ZoneInfo(value.zone))
    return int((start + timedelta(days=int(cell))).timestamp()) * 1_000


def _time(cell: Any, form: str, zone: str) -> int:
    if isinstance(cell, datetime):  # a Parquet timestamp
        moment = cell
    elif form in ("epoch_s", "epoch_ms"):
        return int(Decimal(str(cell)) * (1_000 if form == "epoch_s" else 1))
    else:
        moment = datetime.strptime(str(cell), form)  # noqa: DTZ007 - the mapping's zone is put in below
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=ZoneInfo(zone))
    since = moment.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000 + since.microseconds // 1_000


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast to send: everything at once, so many a second, or the time between events divided by a factor."""

    per_second: float | None = None
    times: float | None = None

    @classmethod
    def parse(cls, text: str) -> Pace:
        """ "max", "500/s" or "100x". Raises BadInput."""
        if text == "max":
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(/s|x)", text)
        if match is None or float(match[1]) <= 0:
            raise BadInput(f"speed {text!r}: say max, a rate like 500/s, or a factor of event time like 100x")
        return cls(per_second=float(match[1])) if match[2] == "/s" else cls(times=float(match[1]))


@dataclass(slots=True)
class Sent:
    """What `send` did. intended_ns: per event id when it was meant to leave (wall clock, ns), filled when asked for."""

    events: int = 0
    by_topic: dict[str, int] = field(default_factory=dict)
    newest_ms: int = -1
    intended_ns: dict[str, int] = field(default_factory=dict)


def send(
    records: Iterable[Record],
    client: Mapping[str, Any],
    prefix: str,
    pace: Pace,
    *,
    timeout_s: float,
    note_times: bool = False,
    on_progress: Callable[[int, int], None] = lambda events, event_ms: None,
) -> Sent:
    """Produce the records and wait until the broker has them all. on_progress(events so far, event time of the last).

    A rate is an open loop: an event that is due is sent, whatever became of those before. Raises DependencyUnreachable.
    """
    from confluent_kafka import KafkaError, Producer

    failed: list[KafkaError] = []
    producer = Producer(
        {
            "linger.ms": 1 if pace.per_second or pace.times else 20,
            "batch.size": 500_000,
            "compression.type": "lz4",
            "queue.buffering.max.messages": 500_000,
            **client,
            "enable.idempotence": True,
            "acks": "all",
            "partitioner": "murmur2_random",
            "delivery.report.only.error": True,
            "delivery.timeout.ms": int(timeout_s * 1_000),
        },
        logger=log,
    )

    def report(error: KafkaError | None, _: object) -> None:
        if error is not None:
            failed.append(error)

    sent = Sent(by_topic=dict.fromkeys(TOPICS, 0))
    start_ns, first_ms = time.time_ns(), None
    for record in records:
        if pace.per_second is not None:
            due_ns = start_ns + int(sent.events * 1e9 / pace.per_second)
        elif pace.times is not None:
            first_ms = record.event_ms if first_ms is None else first_ms
            due_ns = start_ns + int((record.event_ms - first_ms) * 1e6 / pace.times)
        else:
            due_ns = 0
        if due_ns and (wait := due_ns - time.time_ns()) > 0:
            producer.poll(0)
            time.sleep(wait / 1e9)
        while True:
            try:
                producer.produce(prefix + record.topic, record.value, record.key, on_delivery=report)
                break
            except BufferError:
                producer.poll(0.05)  # the queue is full: its bound is the back-pressure
        if note_times:
            sent.intended_ns[record.event_id] = due_ns or time.time_ns()
        if due_ns and not sent.events:
            # A new idempotent producer takes half a second to get its id. The schedule begins when it can be kept.
            producer.flush(timeout_s)
            start_ns = time.time_ns()
        sent.events += 1
        sent.by_topic[record.topic] += 1
        sent.newest_ms = max(sent.newest_ms, record.event_ms)
        if sent.events % 256 == 0:
            producer.poll(0)
            on_progress(sent.events, record.event_ms)
        if failed:
            break
    left = producer.flush(timeout_s)
    if failed or left:
        producer.purge()
        producer.flush(1.0)
    if failed:
        raise DependencyUnreachable(f"Kafka did not take an event: {failed[0].str()}")
    if left:
        raise DependencyUnreachable(f"Kafka did not acknowledge {left} events within {timeout_s:g} s")
    on_progress(sent.events, sent.newest_ms)
    return sent
