"""Outputs of a batch to Kafka: acknowledged by all replicas, in the partition their events came from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, Message, Producer

from proto.errors import DependencyUnreachable, InvariantBroken
from streams.topics import DEAD_LETTER_MAX_BYTES

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SinkSettings:
    """Full topic names and client settings; timeout_s bounds the wait for acknowledgements."""

    client: Mapping[str, Any]
    scores: str
    dead_letters: str
    timeout_s: float
    alerts: str


class KafkaSink:
    """An idempotent producer. `scores` and `dead_letters` only queue; `flush` waits and raises when anything failed.

    Used by one thread. After a failure it must not be used again: the process ends, and the open intent repeats the batch.
    """

    def __init__(self, settings: SinkSettings) -> None:
        self._settings = settings
        self._failed: KafkaError | None = None
        self._producer = Producer(
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
            },
            logger=log,
        )

    def scores(self, partition: int, records: list[dict[str, Any]]) -> None:
        """Queue score records ({"key", "value"}) of one partition, in order."""
        self._queue(self._settings.scores, partition, records)

    def dead_letters(self, partition: int, records: list[dict[str, Any]]) -> None:
        """Queue dead letters of one partition, in order."""
        self._queue(self._settings.dead_letters, partition, records)

    def alerts(self, partition: int, records: list[dict[str, Any]]) -> None:
        """Queue alerts of one partition, in order."""
        self._queue(self._settings.alerts, partition, records)

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

    def _queue(self, topic: str, partition: int, records: list[dict[str, Any]]) -> None:
        if not records:
            return
        queued = self._producer.produce_batch(topic, records, partition=partition, on_delivery=self._report)
        if queued != len(records):
            errors = {str(record.get("_error")) for record in records if "_error" in record}
            raise InvariantBroken(
                f"{topic}[{partition}]: {len(records) - queued} of {len(records)} records were refused by the producer: {errors}"
            )
        self._producer.poll(0)

    def _report(self, error: KafkaError | None, _: Message) -> None:
        if error is not None and self._failed is None:
            self._failed = error
