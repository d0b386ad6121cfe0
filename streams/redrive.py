"""Dead letters sent back to the topics they came from: their original bytes, chosen by an operator, none twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import orjson

from features.facts import TOPICS
from proto.errors import BadUsage, ChurnError, DependencyUnreachable
from proto.events import Refused, read
from streams.dead_letter import letters, original, source_id, values
from streams.topics import REDRIVES, producer_config

if TYPE_CHECKING:
    from confluent_kafka import Producer

    from proto.scores import DeadLetter
    from streams.settings import Settings

PIECE: Final = 200
"""Records of one transaction; of large ones fewer."""
PIECE_BYTES: Final = 8 << 20
TRANSACTION_TIMEOUT_MS: Final = 10_000
"""A redrive that dies within a transaction holds the workers up for no longer: they read what is committed."""

OUTLOOK: Final[Mapping[str, str]] = {
    "too_large": "comes back unless CHURN_MAX_EVENT_BYTES was raised",
    "future": "is taken once its event time is no longer in the future",
    "key_mismatch": "comes back with the same key; --rekey sends it under its customer_id",
    "amount_range": "comes back unless the currency or its rate was changed",
    "too_late": "comes back: the customer's newest event only moves on",
    "crash": "ends workers again, four in all, unless this version handles it",
    "before_2000": "comes back",
}
"""What becomes of a letter that is sent back as it is, by reason."""
SAME_VERDICT: Final = "comes back unless a newer version reads it otherwise"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters; what is None or empty does not restrict. Times are append times of the original record (ms), since <= t < until."""

    reasons: frozenset[str] = frozenset()
    topic: str | None = None
    records: frozenset[str] = frozenset()  # as dead_letter.source_id
    since_ms: int | None = None
    until_ms: int | None = None
    offsets: tuple[int, int] | None = None  # first and last offset in the source topic

    def takes(self, letter: DeadLetter) -> bool:
        """Whether a letter is meant."""
        return (
            (not self.reasons or letter.reason in self.reasons)
            and (self.topic is None or letter.source.topic == self.topic)
            and (not self.records or source_id(letter) in self.records)
            and (self.since_ms is None or letter.append_time >= self.since_ms)
            and (self.until_ms is None or letter.append_time < self.until_ms)
            and (self.offsets is None or self.offsets[0] <= letter.source.offset <= self.offsets[1])
        )


@dataclass(slots=True)
class Redriven:
    """What was done, or would be: letters selected, sent, left out because their bytes were sent back before, and not re-keyed."""

    dry_run: bool
    selected: int = 0
    sent: Counter[str] = field(default_factory=Counter)  # by reason
    before: int = 0
    unkeyed: int = 0
    unreadable: int = 0


def bytes_digest(topic: str, key: bytes | None, value: bytes | None) -> str:
    """What a record is known by: blake2b-128 over its topic, key and value, lengths included, in hex."""
    digest = blake2b(digest_size=16)
    for part in (topic.encode(), key, value):
        digest.update(b"-" if part is None else b"%d:" % len(part) + part)
    return digest.hexdigest()


def redrive(settings: Settings, selection: Selection, *, dry_run: bool, again: bool = False, rekey: bool = False) -> Redriven:
    """Send the selected letters back to their source topics, those on the topic as of now.

    Each record and the note that it was sent are one transaction, and the notes are read first: none is sent twice, also when a
    redrive dies in the middle. The note is of the bytes, so a letter that came back is known as well. again: send it nevertheless.
    rekey: under the customer_id in the value instead of the original key; a letter without one is left out.

    Raises DependencyUnreachable when Kafka does not take them; what is noted then is sent, and nothing else.
    """
    done = Redriven(dry_run)
    producer = None if dry_run else _producer(settings)  # first: it ends what another redrive has begun
    noted = {key.decode() for _, key, _ in values(settings, REDRIVES) if key}
    piece = _Piece(settings, producer)
    for _, letter in letters(settings):
        if letter is None:
            done.unreadable += 1
            continue
        if not selection.takes(letter):
            continue
        done.selected += 1
        if letter.source.topic not in TOPICS:
            raise ChurnError(f"dead letter {source_id(letter)}: {letter.source.topic} is no input topic")
        key, value = original(letter.key), original(letter.value)
        if rekey and (key := _customer(letter.source.topic, value)) is None:
            done.unkeyed += 1
            continue
        digest = bytes_digest(letter.source.topic, key, value)
        if digest in noted and not again:
            done.before += 1
            continue
        noted.add(digest)
        piece.add(letter, digest, key, value)
        done.sent[letter.reason] += 1
    piece.send()
    return done


def _customer(topic: str, value: bytes | None) -> bytes | None:
    """The customer_id of an event as a record key, None when the event cannot be read."""
    try:
        return read(TOPICS.index(topic), value, max_bytes=1 << 30).customer_id.encode()
    except Refused:
        return None


def _producer(settings: Settings) -> Producer:
    from confluent_kafka import KafkaException, Producer

    producer = Producer(
        {
            "linger.ms": 5,
            "reconnect.backoff.max.ms": 1_000,
            **producer_config(settings),
            "transactional.id": f"{settings.topic_prefix}{settings.namespace}-dlq-redrive",
            "transaction.timeout.ms": TRANSACTION_TIMEOUT_MS,
        }
    )
    try:
        producer.init_transactions(settings.dependency_timeout_s)
    except KafkaException as failure:
        raise DependencyUnreachable(f"Kafka: {failure.args[0].str()}; is it up? (`churnstream stack status`)") from failure
    return producer


@dataclass(slots=True)
class _Piece:
    """Records that go in one transaction. producer None: a dry run, nothing is sent."""

    settings: Settings
    producer: Producer | None
    waiting: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    size: int = 0

    def add(self, letter: DeadLetter, digest: str, key: bytes | None, value: bytes | None) -> None:
        """One more record, with its note; sends when there are enough."""
        if self.producer is None:
            return
        now = time.time_ns() // 1_000_000
        note = {"schema_version": 1, "record": source_id(letter), "reason": letter.reason, "at": now}
        headers = [
            ("churn-redrive-of", source_id(letter).encode()),
            ("churn-redrive-reason", letter.reason.encode()),
            ("churn-redrive-at", str(now).encode()),
        ]
        # No partition is given: murmur2 of the key puts the record where the customer's other records are.
        self.waiting.append((letter.source.topic, {"key": key, "value": value, "headers": headers}))
        self.waiting.append((REDRIVES, {"key": digest.encode(), "value": orjson.dumps(note), "partition": 0}))
        self.size += len(value or b"")
        if len(self.waiting) >= 2 * PIECE or self.size >= PIECE_BYTES:
            self.send()

    def send(self) -> None:
        """All that wait, in one transaction."""
        from confluent_kafka import KafkaException

        if self.producer is None or not self.waiting:
            return
        refused: list[str] = []
        try:
            self.producer.begin_transaction()
            for topic, record in self.waiting:
                self.producer.produce(
                    self.settings.prefixed(topic), on_delivery=lambda error, _: refused.append(error.str()) if error else None, **record
                )
            self.producer.commit_transaction(self.settings.dependency_timeout_s)
        except KafkaException as failure:
            why = refused[0] if refused else failure.args[0].str()
            with suppress(KafkaException):  # else it ends with its timeout
                self.producer.abort_transaction(self.settings.dependency_timeout_s)
            raise DependencyUnreachable(
                f"Kafka did not take {len(self.waiting) // 2} dead letters back ({why}); run it again: what was sent is known then"
            ) from failure
        self.waiting.clear()
        self.size = 0


def offsets_of(text: str) -> tuple[int, int]:
    """FIRST-LAST as (first, last), one number as itself twice. Raises BadUsage."""
    first, dash, last = text.partition("-")
    try:
        bounds = int(first), int(last if dash else first)
    except ValueError as error:
        raise BadUsage(f"--offsets {text}: needs FIRST-LAST, e.g. 100-250") from error
    if not 0 <= bounds[0] <= bounds[1]:
        raise BadUsage(f"--offsets {text}: needs 0 <= FIRST <= LAST")
    return bounds
