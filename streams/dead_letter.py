"""Dead letters read back: what could not be used, why, and its original bytes made safe to look at."""

from __future__ import annotations

import logging
import time
from base64 import b64decode
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from pydantic import ValidationError

from proto.errors import ChurnError, DependencyUnreachable
from proto.scores import DeadLetter
from streams.reader import HighWater

if TYPE_CHECKING:
    from streams.settings import Settings

log = logging.getLogger(__name__)
log.addHandler(logging.NullHandler())  # a client's retries are its own affair; what fails in the end is raised

TOPIC: Final = "churn-dead-letters"
_BATCH: Final = 200
Answer = TypeVar("Answer")


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
    """Every dead letter up to the topic's end as of now: counted by reason, the newest `limit` that match kept.

    Raises DependencyUnreachable when Kafka does not answer, ChurnError when the topic does not exist.
    """
    collected = Collected()
    kept: dict[int, deque[DeadLetter]] = {}
    for partition, letter in letters(settings):
        if letter is None:
            collected.unreadable += 1
            continue
        collected.by_reason[letter.reason] += 1
        if (reason is None or letter.reason == reason) and (source is None or source_id(letter) == source):
            kept.setdefault(partition, deque(maxlen=max(limit, 0))).append(letter)
    newest = sorted((letter for queue in kept.values() for letter in queue), key=lambda one: (one.append_time, source_id(one)))
    collected.letters = newest[-limit:] if limit > 0 else []
    return collected


def letters(settings: Settings) -> Iterator[tuple[int, DeadLetter | None]]:
    """(partition, letter) of every record up to the ends as of now, None for one that is no dead letter.

    What was written twice (docs/reading-scores.md) comes once. Errors as of `collect`.
    """
    water = HighWater()
    for partition, _, value in values(settings, TOPIC):
        try:
            letter = DeadLetter.model_validate_json(value)
        except ValidationError:
            yield partition, None
            continue
        source = letter.source
        if water.first(source.topic, source.partition, source.offset):
            yield partition, letter


def values(settings: Settings, topic: str) -> Iterator[tuple[int, bytes | None, bytes]]:
    """(partition, key, value) of every record up to the ends as of now; a plain consumer without a group, it commits nothing."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

    from streams.topics import client_config

    name, timeout_s = settings.prefixed(topic), settings.dependency_timeout_s
    config = {
        **client_config(settings),
        "group.id": f"{settings.prefixed(settings.group_id)}-dlq-reader",
        "enable.auto.commit": False,
        "enable.partition.eof": True,
        "auto.offset.reset": "earliest",
        "queued.max.messages.kbytes": 65_536,
    }
    consumer = Consumer(config, logger=log)
    try:
        found = _patiently(lambda: consumer.list_topics(name, timeout=timeout_s), timeout_s).topics[name]
        if found.error is not None:
            raise ChurnError(f"topic {name}: {found.error.str()}; `churnstream topics create` makes it")
        parts = [TopicPartition(name, partition) for partition in sorted(found.partitions)]
        ends = {part.partition: _patiently(partial(consumer.get_watermark_offsets, part, timeout=timeout_s), timeout_s) for part in parts}
        for partition, bounds in ends.items():
            low, high = bounds
            if low >= high:
                continue
            consumer.assign([TopicPartition(name, partition, OFFSET_BEGINNING)])
            progress, done = time.monotonic(), False
            while not done:
                # consume alone would wait for all it may bring.
                first = consumer.poll(0.5)
                messages = [] if first is None else [first, *consumer.consume(_BATCH, timeout=0)]
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
                    yield partition, _bytes(message.key()), message.value() or b""
                    done = (message.offset() or 0) == high - 1
    finally:
        consumer.close()


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value


def _patiently(ask: Callable[[], Answer], timeout_s: float) -> Answer:
    """The answer of Kafka; asked again, within the time, while a partition has no leader yet (a topic just made)."""
    from confluent_kafka import KafkaError, KafkaException

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except KafkaException as error:
            problem = error.args[0]
            settling = problem.code() in (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)
            if not settling or time.monotonic() > deadline:
                raise DependencyUnreachable(f"Kafka: {problem.str()}; is it up? (`churnstream stack status`)") from error
            time.sleep(0.05)
