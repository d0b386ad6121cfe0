"""Dead letters sent back on a real Kafka: their bytes where they came from, under the right key, none twice."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition

from proto.errors import BadUsage, DependencyUnreachable
from proto.scores import DeadLetter, Source
from streams.dead_letter import collect
from streams.log import KafkaLog
from streams.partitioner import murmur2
from streams.redrive import Redriven, Selection, bytes_digest, offsets_of, redrive
from streams.settings import Settings
from streams.topics import DEAD_LETTERS, client_config, create, producer_config
from tests.conftest import Completed

EVENT = {"customer_id": "c1", "kind": "login", "event_time": 1_700_000_000_000}
ALL = Selection()


def event(number: int, **fields: Any) -> bytes:
    return json.dumps(EVENT | {"event_id": f"e{number}"} | fields).encode()


def letter(
    offset: int, reason: str, value: bytes | None, key: bytes | None = b"c1", topic: str = "logins", partition: int = 0
) -> DeadLetter:
    return DeadLetter(
        schema_version=1,
        reason=reason,
        detail="",
        source=Source(topic=topic, partition=partition, offset=offset),
        cut=None,
        append_time=1_700_000_000_000 + offset,
        key=None if key is None else b64encode(key).decode(),
        value=None if value is None else b64encode(value).decode(),
    )


def set_aside(settings: Settings, *letters: DeadLetter) -> None:
    producer = Producer(producer_config(settings))
    for one in letters:
        producer.produce(settings.prefixed(DEAD_LETTERS), orjson.dumps(one.model_dump()), partition=one.source.partition)
    assert producer.flush(20) == 0


Found = tuple[int, bytes | None, bytes | None, dict[str, bytes]]


def everything_on(settings: Settings, topic: str) -> list[Found]:
    """(partition, key, value, headers) of what a consumer sees that reads committed, once the brokers have ended all transactions."""
    name = settings.prefixed(topic)
    committed, all_there = (KafkaLog(client_config(settings), timeout_s=10, committed=only) for only in (True, False))
    places = range(settings.partitions)
    by = time.monotonic() + 10
    while [committed.ends(name, place) for place in places] != [all_there.ends(name, place) for place in places]:
        assert time.monotonic() < by, f"{name}: a transaction stays open"
        time.sleep(0.02)
    committed.close()
    all_there.close()
    consumer = Consumer({**client_config(settings), "group.id": "test", "enable.auto.commit": False, "enable.partition.eof": True})
    partitions = sorted(consumer.list_topics(name, timeout=10).topics[name].partitions)
    consumer.assign([TopicPartition(name, partition, 0) for partition in partitions])
    found: list[Found] = []
    ended = 0
    while ended < len(partitions):
        message = consumer.poll(10)
        assert message is not None, f"{name} could not be read"
        if (error := message.error()) is None:
            headers: Any = message.headers() or []
            found.append((message.partition() or 0, message.key(), message.value(), dict(headers)))
        else:
            assert error.code() == KafkaError._PARTITION_EOF, error.str()
            ended += 1
    consumer.close()
    return found


def test_a_selection_takes_what_it_says() -> None:
    one = letter(7, "future", b"x")
    taken = [
        Selection(),
        Selection(reasons=frozenset({"future", "empty"})),
        Selection(topic="logins"),
        Selection(records=frozenset({"logins-0-7"})),
        Selection(since_ms=1_700_000_000_007, until_ms=1_700_000_000_008),
        Selection(offsets=(7, 7)),
    ]
    left = [
        Selection(reasons=frozenset({"empty"})),
        Selection(topic="transactions"),
        Selection(records=frozenset({"logins-1-7"})),
        Selection(since_ms=1_700_000_000_008),
        Selection(until_ms=1_700_000_000_007),
        Selection(offsets=(8, 9)),
        Selection(offsets=(0, 6)),
        replace(taken[1], topic="transactions"),
    ]
    assert [selection.takes(one) for selection in taken] == [True] * len(taken)
    assert [selection.takes(one) for selection in left] == [False] * len(left)


def test_offsets_are_a_span_or_one() -> None:
    assert offsets_of("3-9") == (3, 9)
    assert offsets_of("5") == (5, 5)
    for wrong in ("", "a", "9-3", "-1", "1-", "1-2-3"):
        with pytest.raises(BadUsage, match="--offsets"):
            offsets_of(wrong)


def test_records_are_known_by_all_their_bytes() -> None:
    records = [
        ("a", b"k", b"v"),
        ("b", b"k", b"v"),
        ("a", b"", b"v"),
        ("a", None, b"v"),
        ("a", b"k", None),
        ("a", b"k", b""),
        ("a", b"kv", b""),
    ]
    assert len({bytes_digest(*record) for record in records}) == len(records)
    assert bytes_digest("a", b"k", b"1:v") != bytes_digest("a", b"k1:", b"v")


@pytest.mark.servers
def test_letters_go_back_with_their_bytes_under_their_key_and_none_twice(settings: Settings) -> None:
    create(settings)
    values = [event(0), b"\xff\x00{", None, b"", event(4, customer_id="Ünal"), b"x" * 3_000_000]
    keys = [b"c1", b"c2", b"c3", b"c4", "Ünal".encode(), b"c1"]
    letters = [letter(i, "not_json", value, key, partition=i % 4) for i, (value, key) in enumerate(zip(values, keys, strict=True))]
    set_aside(settings, *letters, letters[1])  # the last one written twice, as after a crash

    dry = redrive(settings, ALL, dry_run=True)
    assert everything_on(settings, "logins") == []
    real = redrive(settings, ALL, dry_run=False)
    assert real == replace(dry, dry_run=False)
    assert (real.selected, real.sent["not_json"], real.before) == (6, 6, 0)

    found = everything_on(settings, "logins")
    assert sorted((key or b"", value or b"") for _, key, value, _ in found) == sorted(
        (key, value or b"") for key, value in zip(keys, values, strict=True)
    )
    assert [value for _, key, value, _ in found if key == b"c3"] == [None]  # a tombstone stays one
    for partition, key, _, headers in found:
        assert partition == murmur2(key or b"") % settings.partitions
        number = keys.index(key or b"")
        assert headers["churn-redrive-reason"] == b"not_json"
        assert headers["churn-redrive-of"] in {f"logins-{number % 4}-{number}".encode(), b"logins-1-5"}
        assert abs(int(headers["churn-redrive-at"]) - time.time() * 1_000) < 60_000

    assert redrive(settings, ALL, dry_run=False) == Redriven(False, selected=6, before=6)
    # One that came back has another offset, and is known all the same.
    set_aside(settings, letter(900, "not_json", values[1], keys[1], partition=1))
    assert redrive(settings, ALL, dry_run=False).before == 7
    assert len(everything_on(settings, "logins")) == 6
    again = redrive(settings, Selection(records=frozenset({"logins-1-1"})), dry_run=False, again=True)
    assert again.sent == {"not_json": 1}
    assert len(everything_on(settings, "logins")) == 7


@pytest.mark.servers
def test_a_redrive_that_dies_before_its_commit_has_sent_nothing_and_the_next_sends_all(settings: Settings) -> None:
    create(settings)
    set_aside(settings, *(letter(i, "future", event(i), f"c{i}".encode(), "logins") for i in range(5)))
    dead = Producer(
        {
            **producer_config(settings),
            "transactional.id": f"{settings.topic_prefix}{settings.namespace}-dlq-redrive",
            "transaction.timeout.ms": 10_000,
        }
    )
    dead.init_transactions(20)
    dead.begin_transaction()
    dead.produce(settings.prefixed("logins"), event(0), b"c0")
    dead.produce(settings.prefixed("churn-redrives"), b"{}", bytes_digest("logins", b"c0", event(0)).encode(), partition=0)
    dead.flush(10)  # written, not committed; the process is gone

    assert redrive(settings, ALL, dry_run=False).sent == {"future": 5}
    found = everything_on(settings, "logins")
    assert sorted(key or b"" for _, key, _, _ in found) == [f"c{i}".encode() for i in range(5)]
    assert all(headers for *_, headers in found)


@pytest.mark.servers
def test_a_record_the_topic_does_not_take_leaves_nothing_half_done(settings: Settings) -> None:
    create(settings)
    # A compacted topic takes no record without a key; it cannot have come from there, but a letter may say anything.
    set_aside(settings, letter(0, "key_mismatch", event(0)), letter(1, "key_mismatch", event(1), None, "customer-profiles"))
    for _ in range(2):
        with pytest.raises(DependencyUnreachable, match="2 dead letters back"):
            redrive(settings, ALL, dry_run=False)
    assert everything_on(settings, "logins") == []
    assert redrive(settings, Selection(topic="logins"), dry_run=False).sent == {"key_mismatch": 1}


@pytest.mark.servers
def test_more_than_one_transaction(settings: Settings) -> None:
    create(settings)
    set_aside(settings, *(letter(i, "future", event(i), b"c%d" % i, partition=i % 4) for i in range(450)))
    assert redrive(settings, ALL, dry_run=False).sent == {"future": 450}
    assert len(everything_on(settings, "logins")) == 450
    assert collect(settings, limit=0).by_reason == {"future": 450}


@pytest.mark.servers
@pytest.mark.slow
def test_a_wrong_key_is_put_right_and_the_worker_scores_the_event_once(
    settings: Settings, environment: dict[str, str], churnstream: Callable[..., Completed]
) -> None:
    create(settings)
    producer = Producer(producer_config(settings))
    for number, (key, value) in enumerate([(b"c1", event(0)), (b"other", event(1)), (None, event(2)), (b"c1", b"{"), (b"c9", b"{")]):
        producer.produce(settings.prefixed("logins"), value, key, partition=number % 4 if key is None else -1)
    assert producer.flush(20) == 0

    def work() -> dict[str, Any]:
        done = churnstream("worker", "--until-idle", "1", "--json", environment=environment)
        assert done.code == 0, done.err
        return {name: done.json()[name] for name in ("events_in", "scores", "dead_letters", "duplicates", "residue")}

    def send_back(*arguments: str) -> dict[str, Any]:
        done = churnstream("dlq", "redrive", *arguments, "--json", environment=environment)
        assert done.code == 0, done.err
        return done.json()

    assert work() == {"events_in": 5, "scores": 1, "dead_letters": 4, "duplicates": 0, "residue": 0}
    dry = send_back("--reason", "key_mismatch", "--rekey", "--dry-run")
    assert dry == send_back("--reason", "key_mismatch", "--rekey") | {"dry_run": True}
    assert (dry["selected"], dry["sent"], dry["sent_before"]) == (2, 2, 0)
    assert send_back("--reason", "not_json", "--rekey")["without_customer"] == 2
    assert send_back("--reason", "not_json")["sent"] == 2
    # The offsets between the records are the broker's marks of the transactions: no record, and nothing to wait for. The wrong
    # keys were put right; broken bytes stay broken, come back once, and are known then.
    assert work() == {"events_in": 4, "scores": 2, "dead_letters": 2, "duplicates": 0, "residue": 0}
    returned = send_back("--reason", "not_json")
    assert (returned["selected"], returned["sent"], returned["sent_before"]) == (4, 0, 4)
    # Sent again on purpose, an event that was accepted is a duplicate and has no second score.
    assert send_back("--reason", "key_mismatch", "--rekey", "--again")["sent"] == 2
    assert work() == {"events_in": 2, "scores": 0, "dead_letters": 0, "duplicates": 2, "residue": 0}


@pytest.mark.parametrize(
    "arguments",
    [(), ("--all", "--reason", "future"), ("--reason", "nonsense"), ("--topic", "scores"), ("--offsets", "9-1"), ("--since", "yesterday")],
)
def test_misuse_is_said(arguments: tuple[str, ...], churnstream: Callable[..., Completed]) -> None:
    done = churnstream("dlq", "redrive", *arguments)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
