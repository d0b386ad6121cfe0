"""The consumer of a worker where it meets Kafka: what goes wrong inside the client's callbacks is seen outside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

import pytest
from confluent_kafka import Consumer, TopicPartition

from features.facts import TOPICS
from features.store import Claim
from proto.errors import DependencyUnreachable, StoreUnavailable
from streams.codec import Decoder
from streams.ingest import Ingest, IngestSettings
from streams.settings import Settings
from streams.topics import client_config, create

pytestmark = pytest.mark.servers


class Refusing:
    """An owner that cannot take a partition."""

    def __init__(self, refuse: Callable[[], NoReturn]) -> None:
        self.refuse = refuse

    def assign(self, partition: int, nonce: str) -> Claim:
        self.refuse()

    def restored(self, claim: Claim) -> None:
        """Never asked."""

    def revoke(self, partitions: Sequence[int], *, lost: bool) -> None:
        """Nothing was taken."""


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (None, DependencyUnreachable),
        (StoreUnavailable("Redis does not answer"), StoreUnavailable),
        (RuntimeError("what nobody thought of"), RuntimeError),
    ],
)
def test_an_error_in_an_assignment_is_the_failure_of_the_reader(settings: Settings, error: Exception | None, seen: type[Exception]) -> None:
    """None: an error of the client itself, which would leave its callback as something no `except` catches."""
    client = Consumer({**client_config(settings), "group.id": "nobody"})

    def refuse() -> NoReturn:
        if error is not None:
            raise error
        client.get_watermark_offsets(TopicPartition("there-is-no-such-topic", 0), timeout=5)
        raise AssertionError("the client answered")

    create(settings)
    stopped = threading.Event()
    ingest = Ingest(
        IngestSettings(client_config(settings), settings.group_id, [settings.prefixed(topic) for topic in TOPICS], 100, 0.01, 1 << 20, 10),
        Decoder(currency="EUR", rates={}, future_ms=0, max_bytes=1_000, digest_key=b"k"),
        Refusing(refuse),
        stopped.set,
    )
    ingest.start()
    assert stopped.wait(30)
    assert ingest.join(10)
    with pytest.raises(seen):
        ingest.take()
    client.close()
