"""Each score once for its readers: the rule over simulated logs, across restarts, and the reader on a real Kafka."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from features.facts import TOPICS
from proto.errors import BadInput, DependencyUnreachable, InvariantBroken
from streams.reader import HighWater, Position, ScoreReader
from streams.settings import Settings
from streams.topics import client_config, create, producer_config
from tests.conftest import ROOT

Place = tuple[str, int]
SEEDS = range(2_000)
VECTORS = json.loads((ROOT / "docs" / "reading-scores.json").read_text(encoding="utf-8"))["cases"]


# --- the rule


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: str(case["name"]))
def test_the_published_vectors(case: Mapping[str, Any]) -> None:
    partition = case["log"][0][1]
    resumed = Position.of(0, json.dumps({"v": 1, "high": case.get("resume", {})}))
    water = HighWater({(topic, partition): high for topic, high in resumed.high.items()})
    assert [water.first(*record) for record in case["log"]] == case["first"]
    assert {topic: high for (topic, _), high in water.seen.items()} == case["high"]


def simulated(random: Random) -> tuple[list[Place], list[Place]]:
    """(sources in merge order, log of one output partition): writers die, begin again where they may, and live on when declared dead."""
    offsets = dict.fromkeys(TOPICS[:3], -1)
    sources = []
    for _ in range(random.randint(1, 60)):
        topic = random.choice(TOPICS[:3])
        offsets[topic] += random.choice((1, 1, 1, 2, 5))  # holes: duplicates, dead letters, transaction markers
        sources.append((topic, offsets[topic]))
    log: list[Place] = []
    writers, frontier = [0], 0
    while frontier < len(sources):
        if random.random() < 0.2:
            writers.append(random.randint(0, frontier))  # what was applied is never beyond what was written
        writer = random.randrange(len(writers)) if random.random() < 0.3 else len(writers) - 1
        stop = min(len(sources), writers[writer] + random.randint(0, 12))
        log += sources[writers[writer] : stop]
        writers[writer] = stop
        frontier = max(frontier, stop)
    return sources, log


@dataclass(frozen=True, slots=True)
class Kept:
    """What a subscriber has after a restart: the log position and, if it keeps them, the marks."""

    offset: int
    metadata: str


def read_with_restarts(log: list[Place], random: Random, make: Callable[[], HighWater], keep: Callable[[str], str]) -> list[Place]:
    """What was handed out and committed, by a subscriber that now and then loses what it has not committed."""
    done: list[Place] = []
    kept = Kept(0, "")
    while kept.offset < len(log):
        position = Position.of(kept.offset, kept.metadata)
        water = make()
        water.seen.update({(topic, 0): high for topic, high in position.high.items()})
        handed: list[Place] = []
        for offset in range(kept.offset, len(log)):
            topic, source = log[offset]
            if water.first(topic, 0, source):
                handed.append((topic, source))
            if random.random() < 0.1:
                break
        if random.random() < 0.7:  # else it dies before its commit
            done += handed
            reached = Position(offset + 1, {topic: high for (topic, _), high in water.seen.items()})
            kept = Kept(reached.offset, keep(reached.metadata()))
    return done


def violations(make: Callable[[], HighWater] = HighWater, keep: Callable[[str], str] = lambda metadata: metadata) -> list[int]:
    """Seeds whose subscriber does not get every score exactly once and in order."""
    broken = []
    for seed in SEEDS:
        random = Random(seed)
        sources, log = simulated(random)
        if read_with_restarts(log, random, make, keep) != sources:
            broken.append(seed)
    return broken


def test_every_score_is_handed_out_once_and_in_order_whatever_was_written_twice() -> None:
    assert violations() == []
    repeated = sum(len(log) > len(sources) for sources, log in (simulated(Random(seed)) for seed in SEEDS))
    assert repeated > len(SEEDS) // 4  # the logs do hold repeats


class Everything(HighWater):
    """Mutant: dedupe off."""

    def first(self, topic: str, partition: int, offset: int) -> bool:
        super().first(topic, partition, offset)
        return True


class AcrossTopics(HighWater):
    """Mutant: one mark for all topics."""

    def first(self, topic: str, partition: int, offset: int) -> bool:
        return super().first("", partition, offset)


class OneMore(HighWater):
    """Mutant: the highest itself counts as new."""

    def first(self, topic: str, partition: int, offset: int) -> bool:
        before = self.seen.get((topic, partition), -1)
        return super().first(topic, partition, offset) or offset == before


@pytest.mark.parametrize("mutant", [Everything, AcrossTopics, OneMore])
def test_a_reader_without_the_rule_is_caught(mutant: type[HighWater]) -> None:
    assert violations(make=mutant)


def test_a_reader_that_forgets_its_marks_at_a_restart_is_caught() -> None:
    assert violations(keep=lambda _: "")


@pytest.mark.parametrize("metadata", ["x", "{}", "[]", '{"v":2,"high":{}}', '{"v":1}', '{"v":1,"high":{"logins":"a"}}', '{"v":1,"high":7}'])
def test_metadata_of_another_kind_is_refused(metadata: str) -> None:
    with pytest.raises(BadInput, match="group of your own"):
        Position.of(3, metadata)


# --- on a real Kafka


def record(topic: str, partition: int, offset: int) -> bytes:
    source = {"topic": topic, "partition": partition, "offset": offset}
    return json.dumps({"score_id": f"{topic}-{partition}-{offset}", "source": source}).encode()


@dataclass(frozen=True, slots=True)
class Topic:
    """The score topic of this test's deployment."""

    settings: Settings

    @property
    def name(self) -> str:
        return self.settings.prefixed("churn-scores")

    def write(self, *records: tuple[int, bytes], **options: Any) -> None:
        producer = Producer({**producer_config(self.settings), **options})
        for partition, value in records:
            producer.produce(self.name, value, partition=partition)
        assert producer.flush(30) == 0

    def write_sources(self, partition: int, *sources: Place) -> None:
        self.write(*((partition, record(topic, partition, offset)) for topic, offset in sources))

    @contextmanager
    def reader(self, **options: Any) -> Iterator[ScoreReader]:
        client = {**client_config(self.settings), "session.timeout.ms": 6_000, "heartbeat.interval.ms": 500}
        with ScoreReader(client, f"{self.settings.topic_prefix}readers", topic=self.name, **options) as reader:
            yield reader


@pytest.fixture
def topic(settings: Settings) -> Topic:
    create(settings)
    return Topic(settings)


def ids(reader: ScoreReader, count: int, patience_s: float = 30.0) -> list[str]:
    """The score ids of the next `count` scores."""
    found: list[str] = []
    end = time.monotonic() + patience_s
    while len(found) < count:
        assert time.monotonic() < end, f"only {found}"
        found += [score["score_id"] for score in reader.read(0.5, limit=count - len(found))]
    return found


@pytest.mark.servers
def test_repeats_are_dropped_and_a_restart_still_knows_them(topic: Topic) -> None:
    first = [("logins", 0), ("transactions", 0), ("logins", 1)]
    topic.write_sources(2, *first)
    with topic.reader() as reader:
        assert ids(reader, 3) == ["logins-2-0", "transactions-2-0", "logins-2-1"]
        reader.commit()
    topic.write_sources(2, *first, ("logins", 2))
    with topic.reader() as reader:
        assert ids(reader, 1) == ["logins-2-2"]
        assert reader.repeats == 3
        assert reader.positions()[2] == Position(7, {"logins": 2, "transactions": 0})
    # That was not committed, so it comes again; what was is not even read.
    with topic.reader() as reader:
        assert ids(reader, 1) == ["logins-2-2"]
        reader.commit()
        reader.commit()
    with topic.reader() as reader:
        assert reader.read(3.0) == []


@pytest.mark.servers
def test_two_members_and_a_takeover_commit_every_score_once(topic: Topic) -> None:
    """Four simulated partitions; one member leaves without committing what it was handed."""
    expected: Counter[str] = Counter()
    for partition in range(4):
        random = Random(partition)
        sources, log = simulated(random)
        for _ in range(20):
            if len(sources) > 20 and len(log) > len(sources):
                break
            sources, log = simulated(random)
        expected.update(f"{name}-{partition}-{offset}" for name, offset in sources)
        topic.write_sources(partition, *log)
    done: Counter[str] = Counter()
    with topic.reader() as one:
        done.update(ids(one, 10))
        one.commit()
        with topic.reader() as two:
            got: list[list[str]] = [[], []]
            end = time.monotonic() + 30
            while not all(got) and time.monotonic() < end:
                for mine, reader in zip(got, (one, two), strict=True):
                    mine += [score["score_id"] for score in reader.read(0.2, limit=3)]
                    if reader is one:
                        one.commit()
                if len(one.positions()) == 2:
                    break
            done.update(got[0])
            # `two` leaves here; what it was handed is nobody's yet.
        end = time.monotonic() + 30
        while len(done) < len(expected) and time.monotonic() < end:
            done.update(score["score_id"] for score in one.read(0.5))
            one.commit()
        assert one.read(1.0) == []
    assert done == expected


@pytest.mark.servers
def test_positions_of_the_subscribers_own_store_win(topic: Topic) -> None:
    topic.write_sources(1, ("logins", 0), ("logins", 1), ("logins", 0), ("logins", 2))
    with topic.reader(resume=lambda partition: Position(1, {"logins": 1}) if partition == 1 else None) as reader:
        assert ids(reader, 1) == ["logins-1-2"]
        assert reader.repeats == 2


@pytest.mark.servers
def test_a_group_that_begins_at_the_end_begins_there_for_all_its_members(topic: Topic) -> None:
    topic.write_sources(0, ("logins", 0), ("logins", 1))
    with topic.reader(start="end") as reader:
        assert reader.read(4.0) == []
    topic.write_sources(0, ("logins", 2))
    with topic.reader(start="end") as reader:  # nothing was committed by hand; what came between is not left out
        assert ids(reader, 1) == ["logins-0-2"]


@pytest.mark.servers
def test_scores_of_an_aborted_transaction_are_not_scores(topic: Topic) -> None:
    producer = Producer({**producer_config(topic.settings), "transactional.id": topic.settings.topic_prefix})
    producer.init_transactions(30)
    for aborted, offsets in ((True, (0, 1)), (False, (0, 1))):
        producer.begin_transaction()
        for offset in offsets:
            producer.produce(topic.name, record("logins", 3, offset), partition=3)
        if aborted:
            producer.flush(10)
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)
    with topic.reader() as reader:
        assert ids(reader, 2) == ["logins-3-0", "logins-3-1"]
        assert reader.repeats == 0


@pytest.mark.servers
@pytest.mark.parametrize(
    "foreign", [b"", b"{", b"[]", b'{"source":3}', record("logins", 1, 0), b'{"source":{"topic":"a","partition":0,"offset":"1"}}']
)
def test_a_record_of_another_kind_is_said_once_the_scores_before_it_are_handed_out(topic: Topic, foreign: bytes) -> None:
    topic.write((0, record("logins", 0, 0)), (0, foreign), (0, record("logins", 0, 1)))
    with topic.reader() as reader:
        assert ids(reader, 1) == ["logins-0-0"]
        for _ in range(2):
            with pytest.raises(BadInput, match=r"\[0\] offset 1"):
                ids(reader, 1)
        reader.commit()
        assert reader.positions()[0].offset == 1


@pytest.mark.servers
def test_scores_deleted_unread_are_said(topic: Topic) -> None:
    topic.write_sources(0, *(("logins", offset) for offset in range(5)))
    with topic.reader() as reader:
        ids(reader, 2)
        reader.commit()
    admin = AdminClient(client_config(topic.settings))
    for future in admin.delete_records([TopicPartition(topic.name, 0, 4)]).values():
        future.result(10)
    with topic.reader() as reader, pytest.raises(InvariantBroken, match="deleted unread"):
        ids(reader, 1)


@pytest.mark.servers
def test_a_topic_that_is_not_there_is_said(settings: Settings, tmp_path: Path) -> None:
    with (
        ScoreReader(client_config(settings), settings.topic_prefix, topic=settings.prefixed("churn-scores")) as reader,
        pytest.raises(DependencyUnreachable, match="churn-scores"),
    ):
        reader.read(20.0)
