"""Dead letters read back: what could not be used, why, and its original bytes made safe to look at."""

from __future__ import annotations

import time
from base64 import b64decode
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from proto.errors import ChurnError, DependencyUnreachable
from proto.scores import DeadLetter

if TYPE_CHECKING:
    from streams.settings import Settings

TOPIC: Final = "churn-dead-letters"
_BATCH: Final = 200


@dataclass(slots=True)
class Collected:
    """What was read: counts over everything, and the newest letters that were asked for (by partition, then offset)."""

    by_reason: Counter[str] = field(default_factory=Counter)
    unreadable: int = 0
    letters: list[DeadLetter] = field(default_factory=list)


def source_id(letter: DeadLetter) -> str:
    """<topic>-<partition>-<offset> of the record that was set aside."""
    return f"{letter.source.topic}-{letter.source.partition}-{letter.source.offset}"


def original(text: str | None) -> bytes | None:
    """The original bytes of a key or value."""
    return None if text is None else b64decode(text)


def escaped(value: bytes | None, limit: int) -> str:
    """Bytes as one line that no terminal takes for commands: control, bidirectional and invalid characters escaped; cut after `limit`.

    >>> escaped(b"a\\x1b[31m\\xff", 100)
    'a\\\\x1b[31m\\\\xff'
    """
    if value is None:
        return "(none)"
    # Cut before decoding: a dead letter may hold megabytes.
    text = value[: 4 * limit].decode(errors="backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown + (f" ... ({len(value)} bytes)" if len(text) > limit or len(value) > 4 * limit else "")


def collect(settings: Settings, *, limit: int, reason: str | None = None, source: str | None = None) -> Collected:
    """Everything on the dead-letter topic up to its end as of now: counted by reason, the newest `limit` that match kept.

    Raises DependencyUnreachable when Kafka does not answer, ChurnError when the topic does not exist.
    """
    collected = Collected()
    kept: dict[int, deque[DeadLetter]] = {}
    for partition, value in _values(settings):
        try:
            letter = DeadLetter.model_validate_json(value)
        except ValidationError:
            collected.unreadable += 1
            continue
        collected.by_reason[letter.reason] += 1
        if (reason is None or letter.reason == reason) and (source is None or source_id(letter) == source):
            kept.setdefault(partition, deque(maxlen=max(limit, 0))).append(letter)
    newest = sorted((letter for letters in kept.values() for letter in letters), key=lambda one: (one.append_time, source_id(one)))
    collected.letters = newest[-limit:] if limit > 0 else []
    return collected


def _values(settings: Settings) -> Iterator[tuple[int, bytes]]:
    """(partition, value) of every record up to the ends as of now; a plain consumer without a group, it commits nothing."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

    from streams.topics import client_config

    name, timeout_s = settings.prefixed(TOPIC), settings.dependency_timeout_s
    config = {
        **client_config(settings),
        "group.id": f"{settings.prefixed(settings.group_id)}-dlq-reader",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "earliest",
        "queued.max.messages.kbytes": 65_536,
    }
    consumer = Consumer(config)
    try:
        try:
            found = consumer.list_topics(name, timeout=timeout_s).topics[name]
            if found.error is not None:
                raise ChurnError(f"topic {name}: {found.error.str()}; `churnstream topics create` makes it")
            ends = {p: consumer.get_watermark_offsets(TopicPartition(name, p), timeout=timeout_s) for p in sorted(found.partitions)}
        except KafkaException as error:
            raise DependencyUnreachable(f"Kafka at {config['bootstrap.servers']}: {error.args[0].str()}; is it up?") from error
        for partition, bounds in ends.items():
            low, high = bounds
            if low >= high:
                continue
            consumer.assign([TopicPartition(name, partition, OFFSET_BEGINNING)])
            progress, done = time.monotonic(), False
            while not done:
                messages = consumer.consume(_BATCH, timeout=0.5)
                if messages:
                    progress = time.monotonic()
                elif time.monotonic() - progress > timeout_s:
                    raise DependencyUnreachable(f"{name}[{partition}]: no answer from Kafka for {timeout_s:g} s")
                for message in messages:
                    if (problem := message.error()) is not None:
                        if problem.code() != KafkaError._PARTITION_EOF:
                            raise DependencyUnreachable(f"{name}[{partition}]: {problem.str()}")
                        done = True
                        continue
                    if (message.offset() or 0) >= high:
                        done = True
                        break
                    yield partition, message.value() or b""
                    done = (message.offset() or 0) == high - 1
    finally:
        consumer.close()
