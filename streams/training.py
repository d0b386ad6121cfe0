"""Facts for training and judging, in merge order: from files by a mapping, or from the input topics up to their present end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson

from features.facts import (
    ID,
    KIND,
    KINDS,
    LEVEL,
    MAX_AMOUNT_MINOR,
    NONE,
    OFFSET,
    PRIORITIES,
    TIME,
    TOPICS,
    VALUE,
    WIDTH,
    YEAR_2000_MS,
    A,
    B,
    C,
    D,
)
from features.texts import digests, key_of
from proto.errors import BadInput, Reason
from proto.events import AMOUNT_REQUIRED, FIRST_SIGNUP, MAX_WAIT_SECONDS, days
from streams.codec import Decoder, RawMessage, Records, exponent_of
from streams.merge import merge_keys, order
from streams.settings import Settings
from streams.topics import client_config

if TYPE_CHECKING:
    from streams.feed import Record

IntArray = npt.NDArray[np.int64]

_FAR_MS = 2**44
_FIRST_SIGNUP_DAY = days(FIRST_SIGNUP)


@dataclass(frozen=True, slots=True)
class Facts:
    """Accepted facts (n, WIDTH) of one partition, in merge order, with their customers; rejected = records left out."""

    customers: list[str]
    facts: IntArray
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class EmittedScores:
    """Scores read from the score topic, aligned; fallback scores are left out."""

    customers: list[str]
    at: IntArray
    probability: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FileMessage:
    """A row of a file as the message it would become. It counts as appended when it happened."""

    record: Record
    number: int

    def value(self) -> bytes | None:
        return self.record.value

    def key(self) -> bytes | None:
        return self.record.key

    def offset(self) -> int:
        return self.number

    def timestamp(self) -> tuple[int, int]:
        return 2, self.record.event_ms


def decoder(settings: Settings) -> Decoder:
    """The codec of the workers: same currency, bounds and digest key."""
    return Decoder(
        currency=settings.currency,
        rates=settings.rates,
        future_ms=settings.future_allowance_ms,
        max_bytes=settings.max_event_bytes,
        digest_key=settings.digest_key.get_secret_value().encode(),
    )


def from_files(files: Sequence[Path], mapping: str, settings: Settings) -> list[Facts]:
    """Facts of all files as one partition; records reach the codec in file order and are merged as a backlog would be.

    Raises BadInput for a mapping or a row that is none.
    """
    return from_mapped([(file, mapping) for file in files], settings, in_order=True)


def from_mapped(sources: Sequence[tuple[Path, str]], settings: Settings, *, in_order: bool = False) -> list[Facts]:
    """Facts of files, each by a mapping of its own. in_order: as they come; else those of all files by event time.

    Raises BadInput for a mapping or a row that is none.
    """
    from streams.feed import BadRow, events, load_mapping

    records: list[Record] = []
    for file, mapping in sources:
        for record in events([file], load_mapping(mapping)):
            if isinstance(record, BadRow):
                raise BadInput(f"{record.place}: {record.why}")
            records.append(record)
    if not in_order:
        records.sort(key=lambda record: record.event_ms)
    by_topic: dict[int, list[FileMessage]] = {}
    for record in records:
        messages = by_topic.setdefault(TOPICS.index(record.topic), [])
        messages.append(FileMessage(record, len(messages)))
    decode = decoder(settings).decode
    return [merged([decode(topic, 0, messages) for topic, messages in sorted(by_topic.items())])]


def from_topics(settings: Settings) -> list[Facts]:
    """Facts of the four input topics up to their present end, one entry per partition that has any."""
    names = [settings.prefixed(topic) for topic in TOPICS]
    codec = decoder(settings)
    decoded: dict[int, list[Records]] = {}
    for topic, partition, messages in _batches(client_config(settings), names, settings.dependency_timeout_s):
        decoded.setdefault(partition, []).append(codec.decode(topic, partition, messages))
    return [merged(decoded[partition]) for partition in sorted(decoded)]


def from_simulation(directory: Path, block: int, settings: Settings) -> Facts:
    """Facts of one block of a simulation (streams.simulate), as the codec would make them of the same events sent as JSON.

    Columns are turned into facts as a whole; a row that is not beyond doubt is read by the codec. Raises BadInput.
    """
    from pyarrow.parquet import ParquetFile

    from streams.simulate import part, record_of

    if exponent_of(settings.currency) != 2:
        raise BadInput(f"a simulation has amounts of two decimals, {settings.currency} has others; set another currency")
    codec = decoder(settings)
    found = []
    for topic, name in enumerate(TOPICS):
        table = ParquetFile(directory / name / part(block)).read()
        facts, sound = _columns(topic, table, settings)
        customers = _texts(table["customer_id"])
        reason = np.zeros(len(facts), np.uint8)
        doubtful = np.flatnonzero(~sound)
        if len(doubtful):
            rows = table.take(doubtful).to_pylist()
            read = codec.decode(topic, 0, [FileMessage(record_of(name, row)[1], int(i)) for i, row in zip(doubtful, rows, strict=True)])
            facts[doubtful], reason[doubtful] = read.facts, read.reason
        nothing: IntArray = facts[:, OFFSET]
        found.append(Records(topic, 0, nothing, nothing, nothing, facts, customers, [], reason, {}, {}))
    return merged(found)


def _columns(topic: int, table: Any, settings: Settings) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Facts (n, WIDTH) of a table of one topic, and which of them are beyond doubt."""
    secret = settings.digest_key.get_secret_value().encode()
    text_key, n = key_of(secret, "text"), table.num_rows
    facts = np.zeros((n, WIDTH), np.int64)
    facts[:, TIME] = _numbers(table, "event_time")
    facts[:, OFFSET] = np.arange(n)
    facts[:, ID] = digests(_texts(table["event_id"]), key_of(secret, f"id {TOPICS[topic]}"))
    kinds = table["kind"].combine_chunks()
    codes = np.array([KINDS.get(kind, -1) for kind in kinds.dictionary.to_pylist()], np.int64)
    facts[:, KIND] = np.append(codes, -1)[np.asarray(kinds.indices.fill_null(len(codes)))]
    sound = (facts[:, KIND] >> 3 == topic) & (facts[:, TIME] >= YEAR_2000_MS) & (facts[:, TIME] < _FAR_MS)
    value, texts = (
        ("amount_minor", ("product", "method", "channel")),
        ("duration_ms", ("device", "session_id", "feature", "country")),
        ("wait_seconds", ("ticket_id", "category", "channel")),
        ("signup_date", ("plan", "segment", "region", "age_band")),
    )[topic]
    facts[:, VALUE] = _numbers(table, value)
    if topic == 0:
        needed = np.isin(facts[:, KIND], [KINDS[kind] for kind in AMOUNT_REQUIRED])
        sound &= np.where(facts[:, VALUE] == NONE, ~needed, (facts[:, VALUE] >= 0) & (facts[:, VALUE] <= MAX_AMOUNT_MINOR))
    elif topic == 2:
        csat, nps = _numbers(table, "csat"), _numbers(table, "nps")
        priorities = table["priority"].combine_chunks()
        ranks = np.array([PRIORITIES.get(text, 0) for text in priorities.dictionary.to_pylist()], np.int64)
        facts[:, LEVEL] = np.append(ranks, 0)[np.asarray(priorities.indices.fill_null(len(ranks)))] << 16
        facts[:, LEVEL] |= np.where(csat == NONE, 0, csat << 8) | np.where(nps == NONE, 0, nps + 1)
        sound &= ((csat == NONE) | ((csat >= 1) & (csat <= 5))) & ((nps == NONE) | ((nps >= 0) & (nps <= 10)))
    elif topic == 3:
        ends = _numbers(table, "contract_end")
        consent = np.asarray(table["consent"].cast("int64").fill_null(-1))
        facts[:, LEVEL] = np.where(ends == NONE, 0, ends) << 2 | consent + 1
        sound &= ((ends == NONE) | (ends > 0)) & ((facts[:, VALUE] == NONE) | (facts[:, VALUE] >= _FIRST_SIGNUP_DAY))
    if topic in (1, 2):
        sound &= (facts[:, VALUE] == NONE) | ((facts[:, VALUE] >= 0) & (facts[:, VALUE] <= MAX_WAIT_SECONDS))
    for column, name in zip((A, B, C, D), texts, strict=False):
        facts[:, column] = _digests(table[name], text_key)
    return facts, sound


def _numbers(table: Any, name: str) -> IntArray:
    column = table[name]
    if column.type == "date32[day]":
        column = column.cast("int32").cast("int64")
    return np.asarray(column.fill_null(NONE), np.int64)


def _texts(column: Any) -> list[str]:
    """Texts of a column, the dictionary's own objects where it has one."""
    whole = column.combine_chunks()
    if not hasattr(whole, "dictionary"):
        texts: list[str] = whole.fill_null("").to_pylist()
        return texts
    names = [*whole.dictionary.to_pylist(), ""]
    return [names[i] for i in whole.indices.fill_null(len(names) - 1).to_pylist()]


def _digests(column: Any, key: tuple[np.uint64, np.uint64]) -> IntArray:
    whole = column.combine_chunks()
    if not hasattr(whole, "dictionary"):
        return digests(whole.fill_null("").to_pylist(), key)
    known = digests([*whole.dictionary.to_pylist(), ""], key)
    chosen: IntArray = known[np.asarray(whole.indices.fill_null(len(known) - 1))]
    return chosen


def merged(records: Sequence[Records]) -> Facts:
    """All records of one partition in merge order, the rejected ones left out. Records of a topic come in offset order."""
    facts, topics, keys, rejected = [], [], [], 0
    customers: list[str] = []
    for topic in sorted({part.topic for part in records}):
        parts = [part for part in records if part.topic == topic]
        rows = np.concatenate([part.facts for part in parts])
        good = np.concatenate([part.reason for part in parts]) == Reason.ACCEPTED
        keys.append(merge_keys(rows[:, TIME], good)[good])
        facts.append(rows[good])
        topics.append(np.full(int(good.sum()), topic, np.int64))
        names = [name for part in parts for name in part.customer]
        customers.extend(names[i] for i in np.flatnonzero(good).tolist())
        rejected += int((~good).sum())
    rows = np.concatenate(facts) if facts else np.empty((0, OFFSET), np.int64)
    ranks = order(np.concatenate(keys), np.concatenate(topics), rows[:, OFFSET]) if facts else np.empty(0, np.intp)
    return Facts([customers[i] for i in ranks.tolist()], rows[ranks], rejected)


def emitted_scores(settings: Settings, from_ms: int) -> EmittedScores:
    """Scores given for instants from `from_ms` on, up to the present end of the score topic; duplicates dropped by the reader rule."""
    topic = settings.prefixed("churn-scores")
    customers: list[str] = []
    at: list[int] = []
    probability: list[float] = []
    highest: dict[tuple[str, int], int] = {}
    for _, _, messages in _batches(client_config(settings), [topic], settings.dependency_timeout_s):
        for message in messages:
            score: Mapping[str, Any] = orjson.loads(message.value() or b"{}")
            source = score["source"]
            place = source["topic"], source["partition"]
            if source["offset"] <= highest.get(place, -1):
                continue
            highest[place] = source["offset"]
            if score["at"] >= from_ms and not score["fallback"]:
                customers.append(score["customer_id"])
                at.append(score["at"])
                probability.append(score["probability"])
    return EmittedScores(customers, np.array(at, np.int64), np.array(probability, np.float64))


def _batches(client: Mapping[str, Any], topics: Sequence[str], timeout_s: float) -> Iterator[tuple[int, int, list[RawMessage]]]:
    """(position in `topics`, partition, messages in offset order) until the end each partition had at the beginning."""
    from streams.log import KafkaLog

    source = KafkaLog(client, timeout_s=timeout_s)
    try:
        # What comes after the beginning is left for the next run: every run has a stated end.
        ends = {
            (position, partition): source.ends(topic, partition)
            for position, topic in enumerate(topics)
            for partition in range(source.partitions(topic))
        }
        for (position, partition), (low, high) in ends.items():
            for messages in source.read(topics[position], partition, low, high):
                yield position, partition, messages
    finally:
        source.close()
