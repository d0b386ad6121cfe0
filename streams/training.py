"""Facts for training and judging, in merge order: from files by a mapping, or from the input topics up to their present end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson

from features.facts import OFFSET, TIME, TOPICS
from proto.errors import BadInput, DependencyUnreachable, Reason
from streams.codec import Decoder, Records
from streams.merge import merge_keys, order
from streams.settings import Settings
from streams.topics import client_config

IntArray = npt.NDArray[np.int64]

FETCH: Final = 5_000


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
class _FileRecord:
    """A row of a file as the message it would become. It counts as appended when it happened."""

    record: Any
    number: int

    def value(self) -> bytes | None:
        value: bytes = self.record.value
        return value

    def key(self) -> bytes | None:
        key: bytes = self.record.key
        return key

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

    by_topic: dict[int, list[_FileRecord]] = {}
    for record in events(files, load_mapping(mapping)):
        if isinstance(record, BadRow):
            raise BadInput(f"{record.place}: {record.why}")
        messages = by_topic.setdefault(TOPICS.index(record.topic), [])
        messages.append(_FileRecord(record, len(messages)))
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


def _batches(client: Mapping[str, Any], topics: Sequence[str], timeout_s: float) -> Iterator[tuple[int, int, list[Any]]]:
    """(position in `topics`, partition, messages in offset order) until the end each partition had at the beginning."""
    from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

    consumer = Consumer(
        {
            **client,
            "group.id": "churnstream-training",  # the client asks for one; it is never joined
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "enable.partition.eof": True,
            "queued.max.messages.kbytes": 65_536,
        }
    )
    try:
        left: dict[tuple[str, int], int] = {}
        starts = []
        for topic in topics:
            try:
                known = consumer.list_topics(topic, timeout=timeout_s).topics[topic]
                if known.error is not None:
                    raise DependencyUnreachable(f"Kafka: topic {topic}: {known.error.str()}; run `churnstream topics create`")
                for partition in known.partitions:
                    low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout_s)
                    if high > low:
                        left[topic, partition] = high
                        starts.append(TopicPartition(topic, partition, low))
            except KafkaException as error:
                raise DependencyUnreachable(f"Kafka: topic {topic}: {error.args[0].str()}") from error
        consumer.assign(starts)
        heard = time.monotonic()
        while left:
            # consume waits until it has that many or the time is over, so the time is short and the patience is counted apart.
            messages = consumer.consume(FETCH, 0.1)
            if messages:
                heard = time.monotonic()
            elif time.monotonic() - heard > timeout_s:
                raise DependencyUnreachable(f"Kafka: nothing read from {sorted({t for t, _ in left})} within {timeout_s:g} s")
            by_place: dict[tuple[str, int], list[Any]] = {}
            reached: dict[tuple[str, int], int] = {}
            for message in messages:
                place = message.topic() or "", message.partition() or 0
                if (problem := message.error()) is None:
                    by_place.setdefault(place, []).append(message)
                    reached[place] = (message.offset() or 0) + 1
                elif problem.code() == KafkaError._PARTITION_EOF:
                    # Compaction and transactions leave holes: the end is where the broker says, not where the last message lay.
                    reached[place] = message.offset() or 0
                else:
                    raise DependencyUnreachable(f"Kafka: {problem.str()}")
            for (topic, partition), found in by_place.items():
                # What came after the beginning is left for the next run: every run has a stated end.
                kept = [message for message in found if message.offset() < left.get((topic, partition), 0)]
                if kept:
                    yield topics.index(topic), partition, kept
            for place, offset in reached.items():
                if offset >= left.get(place, 0):
                    left.pop(place, None)
    finally:
        consumer.close()
