"""The consumer of a worker where it meets Kafka: errors inside the client's callbacks are seen outside, and a flood stays in Kafka."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import NoReturn

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

import streams.ingest
from features.facts import TOPICS
from features.memory_store import MemoryStore
from features.store import Claim, Intent
from proto.errors import DependencyUnreachable, StoreUnavailable, StoreWentBack
from streams.codec import Decoder
from streams.ingest import FETCH, Ingest, IngestSettings
from streams.merge import RECORD_BYTES, Batch
from streams.settings import Settings
from streams.topics import client_config, create, producer_config

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


class Owning:
    """An owner of partitions without a past."""

    def __init__(self) -> None:
        self.claimed_at: list[float] = []

    def assign(self, partition: int, nonce: str) -> Claim:
        self.claimed_at.append(time.monotonic())
        return MemoryStore().claim(partition, nonce)

    def restored(self, claim: Claim) -> None:
        """As it was claimed."""

    def revoke(self, partitions: Sequence[int], *, lost: bool) -> None:
        """Nothing to give back."""


def ingest_of(settings: Settings, kind: type[Ingest] = Ingest) -> Ingest:
    return kind(
        IngestSettings(client_config(settings), settings.group_id, [settings.prefixed(topic) for topic in TOPICS], 100, 0.01, 1 << 20, 10),
        Decoder(currency="EUR", rates={}, future_ms=0, max_bytes=1_000, digest_key=b"k"),
        Owning(),
        lambda: None,
    )


class Mute(Ingest):
    """Never hears of an assignment."""

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        pass


class Deaf(Ingest):
    """Does not hear of a second assignment, as a client that never gets back into its group."""

    def _on_assign(self, consumer: Consumer, assigned: list[TopicPartition]) -> None:
        if not self.assignments:
            super()._on_assign(consumer, assigned)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_worker_without_partitions_is_in_its_group_and_one_that_does_not_get_back_is_behind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog ends whoever is behind and does not get on: not three workers on two partitions."""
    monkeypatch.setattr(streams.ingest, "JOIN_S", 0.5)
    settings = settings.model_copy(update={"partitions": 2})
    create(settings)
    mute = ingest_of(settings, Mute)
    mute.start()
    until(mute.behind)
    mute.stop()
    assert mute.join(20)
    workers = [ingest_of(settings, kind) for kind in (Deaf, Ingest, Ingest)]
    workers[0].start()
    until(lambda: sorted(workers[0].lags()) == [0, 1])
    assert not workers[0].behind()
    for worker in workers[1:]:
        worker.start()
    until(lambda: not any(worker.behind() for worker in workers[1:]) and sum(len(worker.lags()) for worker in workers) >= 1)
    until(workers[0].behind)  # the group has taken its partitions, and it hears of no others
    workers[0].stop()
    assert workers[0].join(20)
    until(lambda: sorted(len(worker.lags()) for worker in workers[1:]) == [1, 1] and not any(worker.behind() for worker in workers[1:]))
    workers.append(ingest_of(settings))
    workers[-1].start()
    until(lambda: workers[-1].assignments > 0 and sorted(len(worker.lags()) for worker in workers[1:]) == [0, 1, 1])
    settled = time.monotonic() + 1
    while time.monotonic() < settled:
        assert not any(worker.behind() for worker in workers[1:])
        time.sleep(0.02)
    for worker in workers[1:]:
        worker.stop()
    assert all(worker.join(20) for worker in workers)


def test_a_partition_lost_while_it_is_restored_is_claimed_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.ingest, "AGAIN_S", 0.3)
    settings = settings.model_copy(update={"partitions": 1})
    create(settings)
    restoring, go_on = threading.Event(), threading.Event()
    claims: list[Claim] = []

    def restore(claim: Claim, wanted: Callable[[], bool]) -> Claim:
        claims.append(claim)
        restoring.set()
        assert go_on.wait(30)
        if len(claims) == 2:
            raise StoreWentBack("what was restored so far is gone")
        return claim

    worker = ingest_of(settings)
    worker.restore = restore
    worker.start()
    assert restoring.wait(30)
    worker.drop(0, again_s=0.0)
    assert worker.behind()
    assert not worker.caught_up
    until(lambda: not worker._dropped)
    go_on.set()
    until(lambda: 0 in worker.lags())
    assert len({claim.nonce for claim in claims}) == len(claims) == 3
    assert worker._merges[0].nonce == claims[-1].nonce
    assert isinstance(worker.owner, Owning)
    first, second, third = worker.owner.claimed_at
    assert min(second - first, third - second) >= 0.3  # not as fast as it can, whatever the store does
    assert not worker.behind()
    worker.stop()
    assert worker.join(20)


def read_ahead(settings: Settings, bound: int) -> int:
    """Bytes held decoded in front of a worker that takes nothing, once it has stopped reading on."""
    ingest = Ingest(
        IngestSettings(
            client_config(settings),
            f"{settings.group_id}-{bound}",
            [settings.prefixed(topic) for topic in TOPICS],
            100_000,
            0.01,
            bound,
            10,
        ),
        Decoder(currency="EUR", rates={}, future_ms=0, max_bytes=1_000_000, digest_key=b"k"),
        Owning(),
        lambda: None,
    )
    ingest.start()
    seen, since, begin = 0, time.monotonic(), time.monotonic()
    while time.monotonic() - since < 3 or not seen:
        assert time.monotonic() - begin < 60
        now = sum(buffer.held for merge in ingest._merges.values() for buffer in merge.buffers)
        if now != seen:
            seen, since = now, time.monotonic()
        time.sleep(0.05)
    ingest.stop()
    assert ingest.join(20)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(("events", "padding"), [(40_000, 4_000), (80_000, 1)])
def test_a_worker_that_does_not_get_on_reads_ahead_no_further_than_its_bound(settings: Settings, events: int, padding: int) -> None:
    """Large events wait, or small ones, which take more room than they have bytes. On top of the bound of each partition comes
    one fetch, which is in hand before it is counted."""
    create(settings)
    noise = Random(1).randbytes(padding).hex()
    producer = Producer({**producer_config(settings), "linger.ms": 20})
    for number in range(events):
        event = {"event_id": f"e{number}", "customer_id": f"c{number % 997}", "kind": "login", "event_time": 1_700_000_000_000 + number}
        event["padding"] = noise[number % padding :][:padding]
        producer.produce(settings.prefixed("logins"), json.dumps(event), str(event["customer_id"]))
        if number % 2_000 == 0:
            producer.poll(0)
    assert producer.flush(60) == 0
    bound = 1 << 20
    each = RECORD_BYTES + padding + 150
    fetch = min(FETCH * each, 20 << 20)  # the client's own queue holds 16 MB, and is filled again meanwhile
    assert bound // 2 < read_ahead(settings, bound) < settings.partitions * (bound + fetch) < events * each * 2 // 3
    # Without a bound it takes all there is: the test would see it.
    assert read_ahead(settings, 1 << 30) > events * (each - 50)


class Midway(Owning):
    """An owner of partitions in which a batch of 4,000 logins is open: more than the reader's bounds let wait."""

    def assign(self, partition: int, nonce: str) -> Claim:
        store = MemoryStore()
        fresh = store.claim(partition, nonce)
        to = {**fresh.applied, TOPICS[1]: 3_999}
        store.intend(partition, nonce, fresh.applied, Intent(to, "", 1))
        return store.claim(partition, nonce)


def test_an_open_batch_larger_than_the_bounds_is_read_to_its_end(settings: Settings) -> None:
    """Begun by a worker with larger bounds, say before CHURN_BATCH_MAX_EVENTS and CHURN_BUFFER_BYTES were lowered."""
    settings = settings.model_copy(update={"partitions": 1})
    create(settings)
    producer = Producer(producer_config(settings))

    def produce(numbers: range) -> None:
        for number in numbers:
            event = {"event_id": f"e{number}", "customer_id": "c", "kind": "login", "event_time": 1_700_000_000_000 + number}
            producer.produce(settings.prefixed("logins"), json.dumps(event), "c")
        assert producer.flush(60) == 0

    produce(range(100))
    inputs = [settings.prefixed(topic) for topic in TOPICS]
    ingest = Ingest(
        IngestSettings(client_config(settings), settings.group_id, inputs, 10, 0.01, 4_000, 10),
        Decoder(currency="EUR", rates={}, future_ms=0, max_bytes=1_000, digest_key=b"k"),
        Midway(),
        lambda: None,
    )
    ingest.start()
    until(lambda: any(buffer.position == 100 for merge in ingest._merges.values() for buffer in merge.buffers))
    produce(range(100, 4_200))  # by one fetch more than fits can always be read
    taken: list[Batch] = []

    def take() -> bool:
        taken.extend(ingest.take())
        return bool(taken)

    until(take)
    ingest.stop()
    assert ingest.join(20)
    assert (len(taken[0]), taken[0].recovered) == (4_000, True)


class Behind(Owning):
    """An owner of partitions in which two logins were handled."""

    def assign(self, partition: int, nonce: str) -> Claim:
        fresh = super().assign(partition, nonce)
        return replace(fresh, applied={**fresh.applied, TOPICS[1]: 1})


def test_records_deleted_between_restore_and_reading_are_a_reason_to_claim_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulation, seed 16071: a worker frozen there ended with an error for people; its successors had handled what was gone."""
    monkeypatch.setattr(streams.ingest, "AGAIN_S", 0.2)
    settings = settings.model_copy(update={"partitions": 1})
    create(settings)
    producer = Producer(producer_config(settings))
    for _ in range(10):
        producer.produce(settings.prefixed("logins"), b"{", "c")
    assert producer.flush(60) == 0
    logins = TopicPartition(settings.prefixed("logins"), 0, 8)
    admin = AdminClient(client_config(settings))  # answers come only while it lives
    admin.delete_records([logins])[logins].result(10)
    owner = Behind()
    inputs = [settings.prefixed(topic) for topic in TOPICS]
    ingest = Ingest(
        IngestSettings(client_config(settings), settings.group_id, inputs, 10, 0.01, 4_000, 10),
        Decoder(currency="EUR", rates={}, future_ms=0, max_bytes=1_000, digest_key=b"k"),
        owner,
        lambda: None,
    )
    ingest.start()
    until(lambda: len(owner.claimed_at) > 2 or ingest.failure is not None)
    assert ingest.failure is None
    ingest.stop()
    assert ingest.join(20)
    assert not ingest.take()
