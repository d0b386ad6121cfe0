"""Outputs of a batch to Kafka, in the partition their events came from: acknowledged by all replicas, or in one transaction."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from features.store import Claim, Offsets
from proto.errors import DependencyUnreachable, Fenced, InvariantBroken
from streams.outbox import Outbox, Record, Tail
from streams.topics import DEAD_LETTER_MAX_BYTES

log = logging.getLogger(__name__)

_FENCED: Final = (
    KafkaError._FENCED,
    KafkaError.PRODUCER_FENCED,
    KafkaError.INVALID_PRODUCER_EPOCH,
    KafkaError.INVALID_PRODUCER_ID_MAPPING,
)
"""Another worker has claimed the transactional id."""


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """Full topic names and client settings; timeout_s bounds the wait for acknowledgements."""

    client: Mapping[str, Any]
    scores: str
    dead_letters: str
    timeout_s: float
    alerts: str
    features: str = ""


def _producer(settings: SinkSettings, **more: Any) -> Producer:
    return Producer(
        {
            "linger.ms": 2,
            "batch.size": 500_000,
            "message.max.bytes": DEAD_LETTER_MAX_BYTES,  # the client refuses more than 1 MB unless told
            "compression.type": "lz4",
            "queue.buffering.max.messages": 2_000_000,
            "queue.buffering.max.kbytes": 256 << 10,
            "reconnect.backoff.max.ms": 1_000,
            **settings.client,
            "enable.idempotence": True,
            "acks": "all",
            "delivery.timeout.ms": int(settings.timeout_s * 1_000),
            # A report per message would cost a Python call each; a failed one still reports.
            "delivery.report.only.error": True,
            "partitioner": "murmur2_random",
            **more,
        },
        logger=log,
    )


class KafkaSink:
    """An idempotent producer. `scores` and `dead_letters` only queue; `flush` waits and raises when anything failed.

    Used by one thread. After a failure it must not be used again: the process ends, and the open intent repeats the batch.
    """

    def __init__(self, settings: SinkSettings) -> None:
        self._settings = settings
        self._failed: KafkaError | None = None
        self._producer = _producer(settings)

    def scores(self, partition: int, records: list[Record]) -> None:
        """Queue score records ({"key", "value"}) of one partition, in order."""
        self._queue(self._settings.scores, partition, records)

    def dead_letters(self, partition: int, records: list[Record]) -> None:
        """Queue dead letters of one partition, in order."""
        self._queue(self._settings.dead_letters, partition, records)

    def alerts(self, partition: int, records: list[Record]) -> None:
        """Queue alerts of one partition, in order."""
        self._queue(self._settings.alerts, partition, records)

    def features(self, partition: int, records: list[Record]) -> None:
        """Queue vectors of the feature log of one partition, in order."""
        self._queue(self._settings.features, partition, records)

    def flush(self) -> None:
        """Wait until everything queued is acknowledged. Raises DependencyUnreachable when something was not."""
        left = self._producer.flush(self._settings.timeout_s + 1.0)
        if self._failed is not None:
            raise DependencyUnreachable(f"Kafka did not take an output record: {self._failed.str()}")
        if left:
            raise DependencyUnreachable(f"Kafka did not acknowledge {left} output records within {self._settings.timeout_s:g} s")

    def close(self) -> None:
        """Forget what is still queued; nothing is after a flush."""
        self._producer.purge()
        self._producer.flush(0.1)

    def _queue(self, topic: str, partition: int, records: list[Record]) -> None:
        _queue(self._producer, topic, partition, records, self._report)

    def _report(self, error: KafkaError | None, _: Message) -> None:
        if error is not None and self._failed is None:
            self._failed = error


class Transactions:
    """A transactional producer for each owned partition: whoever has claimed it last is the only one that can commit.

    transactional.id is `<prefix>-<partition>`. A partition is claimed before its first batch, whose thread may be another one.
    Each partition has a thread, so what is asked of it happens in this order: a producer made for an earlier claim, and initialised
    after the one of a later claim, would fence the later one.
    The group's offsets, hints anyway, are not part of a transaction: the client's call for that ignores its timeout, and never
    returned after the link to Kafka was cut at the wrong moment (librdkafka #5456).
    """

    def __init__(
        self,
        settings: SinkSettings,
        prefix: str,
        reached: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings, self._prefix, self._reached = settings, prefix, reached
        self._claims: dict[int, Future[Producer]] = {}
        self._turns: Counter[int] = Counter()  # how often each partition was claimed or given up
        self._threads: dict[int, ThreadPoolExecutor] = {}

    def claim(self, partition: int) -> None:
        """Begin to fence the former owner's producer and to end its open transaction; `claimed` waits for it."""
        if partition not in self._threads:
            self._threads[partition] = ThreadPoolExecutor(1, f"transactions-{partition}")
        self._turns[partition] += 1
        self._claims[partition] = self._threads[partition].submit(self._claim, partition, self._turns[partition])

    def claimed(self, partition: int) -> None:
        """Wait until nobody else can commit outputs of the partition. Raises DependencyUnreachable, Fenced when given up meanwhile."""
        claim = self._claims.get(partition)
        if claim is None:
            raise Fenced(f"partition {partition} was given up while its transactions were claimed")
        try:
            claim.result()
        except KafkaException as error:
            raise DependencyUnreachable(f"Kafka: transactions of partition {partition}: {error.args[0].str()}") from error

    def transact(self, outputs: Mapping[int, tuple[Outbox, Offsets]]) -> set[int]:
        """Commit the outputs of each partition; the partitions that are another worker's by now.

        Raises DependencyUnreachable when Kafka does not take them; those of other partitions may be committed then.
        """
        futures = {}
        for partition, (outbox, _) in outputs.items():
            # The claim of now: a later one waits for its turn behind this.
            futures[partition] = self._threads[partition].submit(self._transact, partition, self._claims.get(partition), outbox)
        done = {partition: future.exception() for partition, future in futures.items()}
        for failure in done.values():
            if failure is not None and not isinstance(failure, Fenced):
                raise failure
        for failure in done.values():
            if failure is not None:
                log.warning("%s", failure)
        return {partition for partition, failure in done.items() if failure is not None}

    def revoke(self, partition: int) -> None:
        """Give the producer up; no transaction of it is open."""
        self._turns[partition] += 1
        self._claims.pop(partition, None)

    def flush(self) -> None:
        """Send what is queued without committing it; for tests that want to die then."""
        for claim in list(self._claims.values()):
            claim.result().flush(self._settings.timeout_s)

    def _claim(self, partition: int, turn: int) -> Producer:
        if self._turns[partition] != turn:
            raise Fenced(f"partition {partition} was given up before its transactions were claimed")
        timeout_s = self._settings.timeout_s
        producer = _producer(
            self._settings,
            **{
                "transactional.id": f"{self._prefix}-{partition}",
                "transaction.timeout.ms": int(timeout_s * 1_000),
                # The next transaction has to wait until the markers of the last one are written; asked again every 100 ms,
                # as by default, a commit takes that long.
                "retry.backoff.ms": 5,
                "linger.ms": 0,  # a commit flushes
            },
        )
        _patiently(lambda: producer.init_transactions(timeout_s), timeout_s)
        return producer

    def _transact(self, partition: int, claim: Future[Producer] | None, outbox: Outbox) -> None:
        if claim is None:
            raise Fenced(f"partition {partition}: given up before its outputs were committed")
        producer = claim.result()
        end = time.monotonic() + self._settings.timeout_s
        while True:
            try:
                self._once(producer, partition, outbox)
                return
            except KafkaException as failure:
                error: KafkaError = failure.args[0]
                if error.code() in _FENCED:
                    raise Fenced(f"partition {partition}: another worker has claimed its transactions ({error.str()})") from failure
                if error.fatal() or not error.txn_requires_abort() or time.monotonic() > end:
                    raise DependencyUnreachable(f"Kafka: outputs of partition {partition} not committed: {error.str()}") from failure
                log.warning("partition %d: transaction repeated: %s", partition, error.str())
                _aborted(producer, self._settings.timeout_s)

    def _once(self, producer: Producer, partition: int, outbox: Outbox) -> None:
        s = self._settings
        producer.begin_transaction()
        self._reached("transaction_begun")
        half = len(outbox.scores) // 2
        _queue(producer, s.features, partition, outbox.features)
        _queue(producer, s.alerts, partition, outbox.alerts)
        _queue(producer, s.scores, partition, outbox.scores[:half])
        self._reached("half_produced")
        _queue(producer, s.scores, partition, outbox.scores[half:])
        _queue(producer, s.dead_letters, partition, outbox.dead_letters)
        self._reached("after_produce")
        _patiently(lambda: producer.commit_transaction(s.timeout_s), s.timeout_s)
        self._reached("transaction_committed")


def settle(claim: Claim, sink: KafkaSink | Transactions, tail: Tail) -> None:
    """Emit the outputs of the last applied batch when its worker died before they were out. Call it with every claim.

    Raises Fenced when the partition is another worker's meanwhile.
    """
    if isinstance(sink, Transactions):
        sink.claimed(claim.partition)
    outbox = Outbox.unpack(claim.outbox)
    if not outbox or tail.has(claim.partition, outbox):
        return
    log.warning("partition %d: outputs up to %s were not committed, now they are", claim.partition, dict(claim.applied))
    if isinstance(sink, Transactions):
        if sink.transact({claim.partition: (outbox, claim.applied)}):
            raise Fenced(f"partition {claim.partition}: claimed by another while its outputs were emitted")
        return
    # The mode was changed after a crash.
    sink.features(claim.partition, outbox.features)
    sink.alerts(claim.partition, outbox.alerts)
    sink.scores(claim.partition, outbox.scores)
    sink.dead_letters(claim.partition, outbox.dead_letters)
    sink.flush()


def _queue(producer: Producer, topic: str, partition: int, records: list[Record], report: Any = None) -> None:
    if not records:
        return
    more = {} if report is None else {"on_delivery": report}
    queued = producer.produce_batch(topic, records, partition=partition, **more)
    if queued != len(records):
        errors = {str(record.get("_error")) for record in records if "_error" in record}
        raise InvariantBroken(
            f"{topic}[{partition}]: {len(records) - queued} of {len(records)} records were refused by the producer: {errors}"
        )
    producer.poll(0)


def _patiently(call: Callable[[], Any], timeout_s: float) -> None:
    """Call again while the client says that this is all that is needed."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            call()
            return
        except KafkaException as failure:
            if not failure.args[0].retriable() or time.monotonic() > end:
                raise


def _aborted(producer: Producer, timeout_s: float) -> None:
    _patiently(lambda: producer.abort_transaction(timeout_s), timeout_s)
