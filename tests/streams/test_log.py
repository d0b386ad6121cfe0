"""A stretch of a partition on a real broker: holes, transactions, ends, what is no longer there."""

from __future__ import annotations

from itertools import islice

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from proto.errors import DependencyUnreachable, InvariantBroken
from streams.log import KafkaLog
from streams.settings import Settings
from streams.topics import client_config, create, producer_config

pytestmark = pytest.mark.servers


@pytest.fixture
def topic(settings: Settings) -> str:
    create(settings)
    return settings.prefixed("logins")


def send(settings: Settings, topic: str, first: int, count: int) -> None:
    producer = Producer(producer_config(settings))
    for number in range(first, first + count):
        producer.produce(topic, str(number).encode(), b"k", partition=0)
    assert producer.flush(20) == 0


def offsets(log: KafkaLog, topic: str, start: int, stop: int) -> list[int]:
    return [message.offset() for piece in log.read(topic, 0, start, stop) for message in piece]


def test_a_stretch_is_read_from_its_start_to_its_stop(settings: Settings, topic: str) -> None:
    send(settings, topic, 0, 12_000)
    log = KafkaLog(client_config(settings), timeout_s=10)
    assert log.partitions(topic) == settings.partitions
    assert log.ends(topic, 0) == (0, 12_000)
    assert log.ends(topic, 1) == (0, 0)
    assert offsets(log, topic, 5, 11_003) == list(range(5, 11_003))
    assert offsets(log, topic, 7, 7) == []
    assert offsets(log, topic, 12_000, 12_000) == []
    # A reader that has had enough; the consumer is used again.
    assert [len(piece) > 0 for piece in islice(log.read(topic, 0, 0, 12_000), 1)] == [True]
    send(settings, topic, 12_000, 5)
    assert offsets(log, topic, 11_999, 12_000) == [11_999]
    assert len(log._idle) <= 2
    log.close()


def test_what_was_not_committed_is_left_out_and_the_end_is_found(settings: Settings, topic: str) -> None:
    send(settings, topic, 0, 3)
    producer = Producer({**client_config(settings), "transactional.id": settings.topic_prefix, "transaction.timeout.ms": 20_000})
    producer.init_transactions(20)
    for committed in (True, False, True):
        producer.begin_transaction()
        for number in range(4):
            producer.produce(topic, str(number).encode(), b"k", partition=0)
        producer.flush(10)
        if committed:
            producer.commit_transaction(10)
        else:
            producer.abort_transaction(10)
    producer.begin_transaction()
    producer.produce(topic, b"open", b"k", partition=0)
    producer.flush(10)
    log = KafkaLog(client_config(settings), timeout_s=10)
    low, high = log.ends(topic, 0)
    # 3 plain ones, then three transactions of four and their markers; the open one is not there yet.
    assert (low, high) == (0, 18)
    assert offsets(log, topic, low, high) == [0, 1, 2, 3, 4, 5, 6, 13, 14, 15, 16]
    assert offsets(log, topic, 8, high) == [13, 14, 15, 16]
    everything = KafkaLog(client_config(settings), timeout_s=10, committed=False)
    assert everything.ends(topic, 0) == (0, 19)
    assert offsets(everything, topic, 0, 19) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18]
    producer.abort_transaction(10)
    log.close()
    everything.close()


def test_what_is_deleted_is_an_error_and_no_gap(settings: Settings, topic: str) -> None:
    send(settings, topic, 0, 10)
    admin = AdminClient(client_config(settings))
    next(iter(admin.delete_records([TopicPartition(topic, 0, 6)]).values())).result(10)
    log = KafkaLog(client_config(settings), timeout_s=10)
    assert log.ends(topic, 0) == (6, 10)
    assert offsets(log, topic, 6, 10) == [6, 7, 8, 9]
    with pytest.raises(InvariantBroken, match="offset 3 is not in the topic"):
        offsets(log, topic, 3, 10)
    with pytest.raises(DependencyUnreachable, match="topics create"):
        log.partitions(topic + "-not")
    log.close()


def test_a_broker_that_is_not_there_is_said_in_time() -> None:
    log = KafkaLog({"bootstrap.servers": "127.0.0.1:9"}, timeout_s=1)
    with pytest.raises(DependencyUnreachable):
        log.ends("logins", 0)
    with pytest.raises(DependencyUnreachable, match="within 1 s"):
        list(log.read("logins", 0, 0, 1))
