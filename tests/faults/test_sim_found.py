"""What the simulation found, each as the smallest story that shows it."""

from __future__ import annotations

from collections.abc import Sequence

from features.memory_store import MemoryStore
from features.store import CustomerState
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
