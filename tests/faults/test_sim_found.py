"""What the simulation found, each as the smallest story that shows it."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

import streams.sink
from features.memory_store import MemoryStore
from features.store import CustomerState
from proto.errors import Fenced
from streams.sink import SinkSettings, Transactions
from tests.streams.test_engine import Log, batches, engine_on, run, start, world


class Suspended(MemoryStore):
    """Lets something happen the next time states are read: the reader is suspended just before it."""

    meanwhile: list[object]

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        while self.meanwhile:
            self.meanwhile.pop()()  # type: ignore[operator]  # callables, put there by the test
        return super().load(partition, customers)


def test_a_worker_suspended_in_mid_batch_emits_nothing_that_follows_from_its_successors_states() -> None:
    """Seed 283: intent accepted, suspended; the successor ran this batch and more; then the states were read, of the wrong time."""
    topics = world(11, events=900)
    store, log = Suspended(), Log()
    store.meanwhile = []
    engine = engine_on(store, log)
    merge = start(engine, topics, "n1")
    first = next(iter(batches(merge, 40)))
    other_log = Log()

    def successor() -> None:
        other = engine_on(store, other_log)
        run(other, start(other, topics, "n2"))

    store.meanwhile.append(successor)
    result = engine.process([first])
    assert result.fenced == [0]
    assert set(log.written) <= set(other_log.written)
    assert set(log.letters) <= set(other_log.letters)


class Initialised:
    """A producer whose first initialisation takes until it is let go."""

    made: int
    order: list[int]
    begun, go = threading.Event(), threading.Event()

    def __init__(self, *_: object, **__: object) -> None:
        Initialised.made += 1
        self.number = Initialised.made

    def init_transactions(self, _timeout: float) -> None:
        if self.number == 1:
            self.begun.set()
            self.go.wait(10)
        self.order.append(self.number)


def test_transactions_of_a_partition_are_claimed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds 841, 2399, 2615, 2688: the producer of an earlier claim was initialised last and fenced the one in use, our own."""
    Initialised.made, Initialised.order = 0, []
    monkeypatch.setattr(streams.sink, "Producer", Initialised)
    transactions = Transactions(SinkSettings({}, "scores", "letters", 1.0, "alerts"), "prefix-")
    transactions.claim(0)
    assert Initialised.begun.wait(10)
    transactions.claim(0)  # given up again before its turn comes: nothing of it may reach the broker
    transactions.revoke(0)
    with pytest.raises(Fenced):
        transactions.claimed(0)
    transactions.claim(0)
    transactions.claim(1)
    transactions.claimed(1)  # one partition does not wait for another
    assert Initialised.order == [2]
    Initialised.go.set()
    transactions.claimed(0)
    assert Initialised.order == [2, 1, 3]
