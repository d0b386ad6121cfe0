"""Dead letters read back from a real topic, and shown so that no terminal takes them for commands."""

from __future__ import annotations

from base64 import b64encode

import orjson
import pytest

from proto.errors import ChurnError
from proto.scores import DeadLetter
from streams.dead_letter import collect, escaped, original
from streams.settings import Settings
from streams.topics import DEAD_LETTERS, create, producer_config
from tests.conftest import bare_environment, run_command

HOSTILE = b'{"a":"\x1b]0;owned\x07\xe2\x80\xae\xff\n'


def letter(offset: int, reason: str, value: bytes | None = HOSTILE) -> bytes:
    body = {
        "schema_version": 1,
        "reason": reason,
        "detail": "why \x1b[31m",
        "source": {"topic": "logins", "partition": offset % 4, "offset": offset},
        "append_time": 1_700_000_000_000 + offset,
        "key": b64encode(b"c1").decode(),
        "value": None if value is None else b64encode(value).decode(),
    }
    DeadLetter.model_validate(body)
    return orjson.dumps(body)


def produce(settings: Settings, *letters: bytes) -> None:
    from confluent_kafka import Producer

    producer = Producer(producer_config(settings))
    for i, one in enumerate(letters):
        producer.produce(settings.prefixed(DEAD_LETTERS), one, partition=i % 4)
    assert producer.flush(20) == 0


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "(none)"), (b"", ""), (b"plain \xc3\xa9", "plain é"), (b"\x1b[2J\r\n", "\\x1b[2J\\r\\n"), (b"\xff", "\\xff"),
     (b"\xe2\x80\xae", "\\u202e"), (b"x" * 99, "xxxxx ... (99 bytes)")],
)  # fmt: skip
def test_bytes_are_escaped_and_cut(value: bytes | None, shown: str) -> None:
    assert escaped(value, 5 if value == b"x" * 99 else 50) == shown


@pytest.mark.servers
def test_an_empty_topic_and_a_missing_one(settings: Settings) -> None:
    with pytest.raises(ChurnError, match="topics create"):
        collect(settings, limit=5)
    create(settings)
    assert collect(settings, limit=5).letters == []


@pytest.mark.servers
def test_list_and_show_find_what_was_set_aside(settings: Settings, environment: dict[str, str]) -> None:
    create(settings)
    big = letter(99, "too_large", b"x" * 10_000_000)
    produce(settings, *(letter(i, "not_json" if i % 3 else "future") for i in range(30)), b"not a dead letter", big)
    found = collect(settings, limit=4)
    assert found.by_reason == {"not_json": 20, "future": 10, "too_large": 1}
    assert found.unreadable == 1
    assert [one.source.offset for one in found.letters] == [27, 28, 29, 99]
    assert original(found.letters[-1].value) == b"x" * 10_000_000
    assert [one.source.offset for one in collect(settings, limit=2, reason="future").letters] == [24, 27]

    listed = run_command("dlq", "list", "--reason", "future", "--limit", "3", "--json", environment=environment)
    assert listed.code == 0, listed.err
    assert listed.json()["total"] == 31
    assert [one["source_id"] for one in listed.json()["letters"]] == ["logins-1-21", "logins-0-24", "logins-3-27"]
    shown = run_command("dlq", "show", "logins-1-21", environment=environment)
    assert shown.code == 0, shown.err
    assert '{"a":"\\x1b]0;owned\\x07\\u202e\\xff\\n' in shown.out
    assert not any(ord(c) < 32 and c != "\n" for c in shown.out)
    assert run_command("dlq", "show", "logins-0-4711", environment=environment).code == 1
    assert run_command("dlq", "list", "--reason", "nonsense", environment=environment).code == 2


def test_a_broker_that_is_not_there_is_exit_code_3() -> None:
    absent = {"KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1", "CHURN_DEPENDENCY_TIMEOUT_S": "1"}
    done = run_command("dlq", "list", environment=bare_environment() | absent)
    assert (done.code, len(done.err.splitlines())) == (3, 1), done.err
