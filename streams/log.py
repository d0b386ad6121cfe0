"""A stretch of one partition of a topic, read from here to there: outside any group, and with a stated end."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from proto.errors import DependencyUnreachable, InvariantBroken
from streams.codec import RawMessage

log = logging.getLogger(__name__)

FETCH: Final = 5_000
"""Most messages of one piece."""
WAIT_S: Final = 0.25
_ELECTING: Final = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)


class Log(Protocol):
    """What is kept of partitions. Both methods raise DependencyUnreachable when Kafka does not answer."""

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """The first offset kept and the one the next record will get; of a topic read committed, the end of what is committed."""
        ...

    def read(self, topic: str, partition: int, start: int, stop: int) -> Generator[list[RawMessage], None, None]:
        """Records with start <= offset < stop in offset order, in pieces that are not empty.

        Compaction and transactions leave holes; the end is where the partition has nothing more below `stop`.
        Close what is not read to its end: a read holds a consumer, and what holds the read may live long.
        Raises InvariantBroken when `start` is not in the partition (deleted by retention, or beyond its end).
        """
        ...


def watermarks(consumer: Consumer, topic: str, partition: int, timeout_s: float) -> tuple[int, int]:
    """First offset kept and next one, asked of the leader; one that is just being elected is waited for.

    Raises DependencyUnreachable when there is no answer within `timeout_s`.
    """
    until = time.monotonic() + timeout_s
    while True:
        try:
            low, high = consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=timeout_s)
        except KafkaException as error:
            if error.args[0].code() in _ELECTING and time.monotonic() < until:
                time.sleep(0.05)
                continue
            raise DependencyUnreachable(f"Kafka: the ends of {topic}[{partition}]: {error.args[0].str()}") from error
        return low, high


class KafkaLog:
    """The Log on Kafka. May be used by several threads; consumers are kept for the next read, `close` ends them.

    committed: whether records of transactions that are open or were aborted are left out.
    """

    def __init__(self, client: Mapping[str, Any], *, timeout_s: float, committed: bool = True) -> None:
        self._timeout_s = timeout_s
        self._config = {
            "queued.max.messages.kbytes": 65_536,
            "queued.min.messages": 50_000,
            "fetch.wait.max.ms": 20,
            "fetch.message.max.bytes": 4 << 20,
            "fetch.error.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1_000,
            **client,
            "group.id": f"log-{secrets.token_hex(6)}",  # the client asks for one; it is never joined
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed" if committed else "read_uncommitted",
        }
        self._idle: list[Consumer] = []

    def partitions(self, topic: str) -> int:
        """How many partitions the topic has. Raises DependencyUnreachable when there is no such topic."""
        with self._consumer() as consumer:
            try:
                known = consumer.list_topics(topic, timeout=self._timeout_s).topics[topic]
            except KafkaException as error:
                raise DependencyUnreachable(f"Kafka: topic {topic}: {error.args[0].str()}") from error
            if known.error is not None:
                raise DependencyUnreachable(f"Kafka: topic {topic}: {known.error.str()}; run `churnstream topics create`")
            return len(known.partitions)

    def ends(self, topic: str, partition: int) -> tuple[int, int]:
        """As in Log."""
        with self._consumer() as consumer:
            return watermarks(consumer, topic, partition, self._timeout_s)

    def read(self, topic: str, partition: int, start: int, stop: int) -> Generator[list[RawMessage], None, None]:
        """As in Log."""
        if start >= stop:
            return
        with self._consumer() as consumer:
            consumer.assign([TopicPartition(topic, partition, start)])
            heard = time.monotonic()
            ended = False
            while not ended:
                # poll returns as soon as there is one message, consume only when it has as many as asked or the time is over.
                first = consumer.poll(WAIT_S)
                if first is None:
                    if time.monotonic() - heard > self._timeout_s:
                        raise DependencyUnreachable(f"Kafka: nothing read from {topic}[{partition}] within {self._timeout_s:g} s")
                    continue
                messages: list[Any] = [first, *consumer.consume(FETCH - 1, 0)]
                piece: list[RawMessage] = messages
                if any(message.error() is not None for message in messages):
                    ended = self._errors(messages, topic, partition, start)
                    piece = [message for message in messages if message.error() is None]
                if piece:
                    heard = time.monotonic()
                    if piece[-1].offset() >= stop - 1:
                        ended = True
                        piece = [message for message in piece if message.offset() < stop]
                if piece:
                    yield piece

    def close(self) -> None:
        """End the consumers that are not in a read."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _consumer(self) -> Iterator[Consumer]:
        consumer = self._idle.pop() if self._idle else Consumer(self._config, logger=log)
        try:
            yield consumer
            consumer.unassign()
        except GeneratorExit:  # the reader had enough
            consumer.unassign()
            self._idle.append(consumer)
            raise
        except BaseException:
            consumer.close()
            raise
        self._idle.append(consumer)

    def _errors(self, messages: list[Any], topic: str, partition: int, start: int) -> bool:
        """Whether one of the errors is the end of the partition; raises what must not be passed over."""
        ended = False
        for message in messages:
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:
                    ended = True
                else:
                    self._failed(error, topic, partition, start)
        return ended

    def _failed(self, error: KafkaError, topic: str, partition: int, start: int) -> None:
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise InvariantBroken(f"{topic}[{partition}]: offset {start} is not in the topic ({error.str()})")
        if error.fatal() or error.code() in (
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError._UNKNOWN_TOPIC,
            KafkaError._UNKNOWN_PARTITION,
        ):
            raise DependencyUnreachable(f"Kafka: {topic}[{partition}]: {error.str()}")
        log.warning("kafka: %s", error.str())
