"""Reading churn-scores (or churn-alerts): each record once, whatever was written twice; for services that subscribe.

    with ScoreReader({"bootstrap.servers": "kafka:9092"}, "campaigns") as reader:
        while True:
            for score in reader.read(1.0):
                act(score)
            reader.commit()

docs/reading-scores.md states the rule for other languages, with test vectors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Literal

import orjson
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from proto.errors import BadInput, ChurnError, DependencyUnreachable, InvariantBroken

log = logging.getLogger(__name__)

SCORES: Final = "churn-scores"
FETCH: Final = 1_000


@dataclass(slots=True)
class HighWater:
    """The reader rule: of each (source topic, source partition) the highest source offset seen; what is not above it is a repeat.

    Exact, because a partition has the outputs of one source partition in the order of their offsets, whoever wrote them: a repeat
    can only come after the first.
    """

    seen: dict[tuple[str, int], int] = field(default_factory=dict)

    def first(self, topic: str, partition: int, offset: int) -> bool:
        """Whether this is the first record of its source; it is noted as seen."""
        place = topic, partition
        if offset <= self.seen.get(place, -1):
            return False
        self.seen[place] = offset
        return True


@dataclass(frozen=True, slots=True)
class Position:
    """How far an output partition is read: the next offset, and the highest source offset seen of each source topic."""

    offset: int
    high: Mapping[str, int]

    def metadata(self) -> str:
        """`high` as it is kept with a committed offset.

        >>> Position(7, {"logins": 3}).metadata()
        '{"v":1,"high":{"logins":3}}'
        """
        return orjson.dumps({"v": 1, "high": dict(self.high)}).decode()

    @staticmethod
    def of(offset: int, metadata: str | None) -> Position:
        """From a committed offset and its metadata; an offset somebody else committed has none, and nothing counts as seen.

        Raises BadInput when the metadata is of another kind.
        """
        if not metadata:
            return Position(offset, {})
        try:
            found = orjson.loads(metadata)
            if found["v"] == 1:
                return Position(offset, {str(topic): int(value) for topic, value in found["high"].items()})
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise BadInput(f"the metadata of the committed offset {offset} is not ours: {metadata[:200]!r}; use a group of your own")


class ScoreReader:
    """A member of a consumer group on the score topic.

    client: librdkafka settings, at least bootstrap.servers. group: the subscriber's own name. start: where a group begins that has
    never committed. resume: for subscribers that keep `positions()` in one transaction with what they make of the scores: asked with
    a partition when it is assigned, it wins over the committed offset; None = the committed one.

    At least once: `commit` says that everything handed out so far is done with; what was not is handed out again after a restart or
    to the member that takes the partition over. The high water is kept in the metadata of the committed offset, so both move as one.
    With every score handed over once per commit, and with `resume` exactly once in the subscriber's own store.
    """

    def __init__(
        self,
        client: Mapping[str, Any],
        group: str,
        *,
        topic: str = SCORES,
        start: Literal["beginning", "end"] = "beginning",
        resume: Callable[[int], Position | None] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        self._topic, self._start, self._resume, self._timeout_s = topic, start, resume, timeout_s
        self._offsets: dict[int, int] = {}
        self._water: dict[int, HighWater] = {}
        self._handed: set[int] = set()  # partitions with something not committed yet
        self._failure: ChurnError | None = None
        self.repeats = 0
        self._consumer = Consumer(
            {
                "session.timeout.ms": 10_000,
                "reconnect.backoff.max.ms": 1_000,
                "queued.max.messages.kbytes": 16_384,
                **client,
                "group.id": group,
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # Scores of a transaction that was given up (delivery exactly_once) are not scores.
                "isolation.level": "read_committed",
                # A position that retention has removed is said, not skipped.
                "auto.offset.reset": "error",
            },
            logger=log,
        )
        self._consumer.subscribe([topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_revoke)

    def read(self, timeout_s: float, limit: int = FETCH) -> list[dict[str, Any]]:
        """Up to `limit` scores not handed out before, in the order of their partitions; [] when none came in `timeout_s` seconds.

        Raises InvariantBroken when the position is no longer in the topic, BadInput for a record that is no output of churnstream,
        DependencyUnreachable when Kafka refuses. After an error the reader is of no more use than to commit what was handed out.
        """
        deadline = time.monotonic() + timeout_s
        scores: list[dict[str, Any]] = []
        while not scores:
            if self._failure is not None:
                raise self._failure
            first = self._consumer.poll(max(0.0, deadline - time.monotonic()))
            if first is None:
                return []
            try:
                # consume would wait for all it may bring; what is there already comes at once.
                for message in (first, *self._consumer.consume(limit - 1, 0)):
                    if (error := message.error()) is not None:
                        self._failed(error, message)
                    elif (score := self._taken(message)) is not None:
                        scores.append(score)
            except ChurnError as failure:
                self._failure = failure  # raised once the scores before it are handed out
        return scores

    def commit(self) -> None:
        """Everything handed out so far is done with. Returns when the broker has noted it.

        Raises DependencyUnreachable when it has not: then it is not known, and may be handed out again.
        """
        positions = self.positions()
        offsets = [
            TopicPartition(self._topic, partition, positions[partition].offset, positions[partition].metadata())
            for partition in sorted(self._handed)
        ]
        self._handed.clear()
        if not offsets:
            return
        try:
            for done in self._consumer.commit(offsets=offsets, asynchronous=False) or ():
                if done.error is not None:
                    raise KafkaException(done.error)
        except KafkaException as failure:
            raise DependencyUnreachable(f"Kafka: {self._topic}: the commit failed: {failure.args[0].str()}") from failure

    def positions(self) -> dict[int, Position]:
        """How far each owned partition was handed out."""
        return {
            partition: Position(offset, {topic: high for (topic, _), high in self._water[partition].seen.items()})
            for partition, offset in self._offsets.items()
        }

    def close(self) -> None:
        """Leave the group. Commits nothing."""
        self._consumer.close()

    def __enter__(self) -> ScoreReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _taken(self, message: Message) -> dict[str, Any] | None:
        """The score of a message, None when it is a repeat."""
        partition, offset = message.partition() or 0, message.offset() or 0
        water = self._water.get(partition)
        if water is None:
            return None  # given up meanwhile: its next owner reads it
        try:
            score: dict[str, Any] = orjson.loads(message.value() or b"")
            topic, source_partition, source_offset = (score["source"][name] for name in ("topic", "partition", "offset"))
        except (ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{self._topic}[{partition}] offset {offset}: not an output of churnstream ({error})") from error
        if source_partition != partition or not isinstance(topic, str) or not isinstance(source_offset, int):
            raise BadInput(f"{self._topic}[{partition}] offset {offset}: a source of this partition is needed, not {score['source']}")
        self._offsets[partition] = offset + 1
        self._handed.add(partition)
        if water.first(topic, partition, source_offset):
            return score
        self.repeats += 1
        return None

    def _failed(self, error: KafkaError, message: Message) -> None:
        where = f"{message.topic() or self._topic}[{message.partition()}]"
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise InvariantBroken(
                f"{where}: the position is not in the topic ({error.str()}): records were deleted unread, or the topic was made anew; "
                "say with `resume`, or with a new group and `start`, where to go on"
            )
        if error.fatal() or error.code() in (
            KafkaError.UNKNOWN_TOPIC_OR_PART,
            KafkaError._UNKNOWN_TOPIC,
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
        ):
            raise DependencyUnreachable(f"Kafka: {where}: {error.str()}")
        log.warning("kafka: %s", error.str())

    # -- called by the client inside poll

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        try:
            starts = [self._place(consumer, found) for found in consumer.committed(assigned, timeout=self._timeout_s)]
        except KafkaException as failure:  # never out of a callback: the client makes something else of it
            raise DependencyUnreachable(f"Kafka: {self._topic}: where to begin: {failure.args[0].str()}") from failure
        consumer.assign(starts)

    def _place(self, consumer: Consumer, found: TopicPartition) -> TopicPartition:
        """Where to begin in an assigned partition; `found` is what the group has committed there."""
        if found.error is not None:
            raise KafkaException(found.error)
        partition = found.partition
        position = self._resume(partition) if self._resume is not None else None
        if position is None and found.offset >= 0:
            position = Position.of(found.offset, found.metadata)
        if position is None and self._start == "end":
            position = self._end(consumer, partition)
        self._water[partition] = HighWater({(topic, partition): high for topic, high in (position.high if position else {}).items()})
        return TopicPartition(self._topic, partition, position.offset if position else OFFSET_BEGINNING)

    def _end(self, consumer: Consumer, partition: int) -> Position:
        """The end as of now. Committed at once: a member that takes over before the first commit begins there too."""
        high = consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=self._timeout_s)[1]
        position = Position(high, {})
        consumer.commit(offsets=[TopicPartition(self._topic, partition, high, position.metadata())], asynchronous=False)
        return position

    def _on_revoke(self, _: Consumer, revoked: list[TopicPartition]) -> None:
        # Handed out and not committed: the next owner begins at the commit, so these must not be committed any more.
        for tp in revoked:
            self._offsets.pop(tp.partition, None)
            self._water.pop(tp.partition, None)
            self._handed.discard(tp.partition)
