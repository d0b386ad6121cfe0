"""Facts for training and judging, in merge order: from files by a mapping, or from the input topics up to their present end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import orjson

from features.facts import OFFSET, TIME, TOPICS
from proto.errors import BadInput, Reason
from streams.codec import Decoder, RawMessage, Records
from streams.merge import merge_keys, order
from streams.settings import Settings
from streams.topics import client_config

if TYPE_CHECKING:
    from streams.feed import Record

IntArray = npt.NDArray[np.int64]


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
    from streams.feed import BadRow, events, load_mapping

    by_topic: dict[int, list[FileMessage]] = {}
    for record in events(files, load_mapping(mapping)):
        if isinstance(record, BadRow):
            raise BadInput(f"{record.place}: {record.why}")
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
