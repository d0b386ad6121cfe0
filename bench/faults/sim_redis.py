"""A model of Redis: the store in memory behind a wire that loses answers, a journal to go back in, and a log of who wrote.

The rules are those of features/memory_store.py, which tests/contracts holds equal to the real function library. What is
added here is what happens to a server: it is out of reach, it executes and the answer gets lost, it loses its tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from random import Random
from typing import Any, Final, TypeVar

from bench.faults.sim_broker import Host
from bench.faults.sim_schedule import Scheduler
from features.facts import SOURCES, TOPICS
from features.memory_store import MemoryStore
from features.store import DIGEST_SIZE, Apply, Claim, CustomerState, CustomerWrite, Intent, Offsets, Standing
from proto.errors import ChurnError, StoreUnavailable

Answer = TypeVar("Answer")
_CONTAINERS: Final = frozenset((dict, list, set, bytearray))
TRIES: Final = 4


class Broken(Exception):
    """An invariant does not hold. `invariant` is its number, I1 to I10."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


@dataclass(frozen=True, slots=True)
class Moment:
    """A partition as it was after one write."""

    number: int
    stored: object
    writer: Writer


@dataclass(frozen=True, slots=True)
class Writer:
    """Who may write to a partition and where it stands, as the log of accepted writes says: kept apart from the store."""

    nonce: str = ""
    applied: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(TOPICS, -1))


class ModelRedis:
    """One server for all processes. I6 is checked at every accepted write."""

    def __init__(self, schedule: Scheduler, partitions: int, random: Random) -> None:
        self.schedule, self.random = schedule, random
        self.store: Any = MemoryStore()
        self.down_until = 0
        self.lossy = 0.0
        """Share of calls whose answer gets lost, or that do not arrive."""
        self.writes = 0
        self.broken: Broken | None = None
        self.went_back: dict[int, int] = {}
        """Per partition how often its state was rolled back, lost or damaged."""
        self.now = {number: Moment(0, None, Writer()) for number in range(partitions)}
        self.claims: list[tuple[int, str, int]] = []
        """Partition, process and step of each claim."""
        self.moments: dict[int, list[Moment]] = {number: [moment] for number, moment in self.now.items()}

    @property
    def state(self) -> dict[int, Any]:
        """The partitions inside the store; that it is a dict of plain data classes is all that is assumed."""
        found: dict[int, Any] = self.store._partitions
        return found

    def call(self, host: Host, what: str, partition: int, work: Callable[[], Answer]) -> Answer:
        """One call over the wire: tried again as the real client does, so it may be executed more than once."""
        for _ in range(TRIES):
            self.schedule.step(f"{what} [{partition}]")
            draw = self.random.random()
            if self.schedule.now_ms < self.down_until or draw < self.lossy / 2:
                self.schedule.sleep(50 + self.random.randrange(400))
                continue
            answer: Answer | ChurnError
            try:
                answer = work()
            except ChurnError as error:
                answer = error
            if draw < self.lossy:
                self.schedule.note("answer lost")
                self.schedule.sleep(50 + self.random.randrange(400))
                continue
            self.schedule.step("answer" if not isinstance(answer, ChurnError) else type(answer).__name__)
            if isinstance(answer, ChurnError):
                raise answer
            return answer
        raise StoreUnavailable(f"no answer after {TRIES} tries")

    def wrote(self, partition: int, writer: Writer) -> None:
        """Note an accepted write."""
        self.writes += 1
        moment = Moment(self.writes, _copied(self.state.get(partition)), writer)
        self.now[partition] = moment
        self.moments[partition].append(moment)

    def violates(self, text: str) -> None:
        """Note a violation of I6; the run ends with it."""
        self.broken = self.broken or Broken("I6", text)

    # -- what happens to a server

    def go_back(self, writes: int) -> None:
        """Lose the newest writes, of all partitions alike."""
        target = max(0, self.writes - writes)
        for partition, moments in self.moments.items():
            kept = next(moment for moment in reversed(moments) if moment.number <= target)
            if kept is self.now[partition]:
                continue
            self.went_back[partition] = self.went_back.get(partition, 0) + 1
            self.now[partition] = kept
            moments[:] = [moment for moment in moments if moment.number <= target]
            if kept.stored is None:
                self.state.pop(partition, None)
            else:
                self.state[partition] = _copied(kept.stored)

    def lose_everything(self) -> None:
        """FLUSHALL."""
        for partition in list(self.state):
            self.lose_partition(partition)

    def lose_partition(self, partition: int) -> None:
        """All keys of a partition are gone."""
        self.state.pop(partition, None)
        self.went_back[partition] = self.went_back.get(partition, 0) + 1
        self.wrote(partition, Writer())

    def lose_part(self, partition: int) -> tuple[str, str]:
        """One key of a partition is gone: which kind, and whose it was. ("", "") when there is nothing to lose."""
        store, random, found = self.store, self.random, self.state.get(partition)
        if found is None or found.meta is None or not found.mains:
            return "", ""
        kind = random.choice(["meta", "list", "customer", "customer", "chunk" if found.chunks else "customer"])
        customer, writer = "", self.now[partition].writer
        if kind == "meta":
            store.lose_meta(partition)
            writer = Writer()
        elif kind == "list":
            store.lose_list(partition)
        elif kind == "customer":
            customer = random.choice(sorted(found.mains))
            store.lose_customer(partition, customer)
        else:
            customer, number = random.choice(sorted(found.chunks))
            store.lose_chunk(partition, customer, number)
        self.went_back[partition] = self.went_back.get(partition, 0) + 1
        self.wrote(partition, writer)
        return kind, customer


class Client:
    """The Store of one process."""

    def __init__(self, server: ModelRedis, host: Host) -> None:
        self._server, self._host = server, host

    def claim(self, partition: int, nonce: str) -> Claim:
        def work() -> Claim:
            claim: Claim = self._server.store.claim(partition, nonce)
            self._server.claims.append((partition, self._host.name, self._server.schedule.steps))
            self._server.wrote(partition, Writer(nonce, self._server.now[partition].writer.applied))
            return claim

        return self._server.call(self._host, "claim", partition, work)

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        def work() -> None:
            self._server.store.intend(partition, nonce, former, intent)
            self._accepted("intend", partition, nonce)

        self._server.call(self._host, "intend", partition, work)

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        def work() -> list[CustomerState | None]:
            found: list[CustomerState | None] = self._server.store.load(partition, customers)
            return found

        return self._server.call(self._host, "load", partition, work)

    def apply(self, batches: Sequence[Apply]) -> None:
        """Batches travel together; each is a command of its own."""
        if not batches:
            return
        batches = list(batches)

        def work() -> None:
            refusals = []
            for batch in batches:
                try:
                    self._server.store.apply([batch])
                except ChurnError as refusal:
                    refusals.append(refusal)
                else:
                    self._accepted("apply", batch.partition, batch.nonce, batch.former, batch.to)
            if refusals:
                raise refusals[0]

        self._server.call(self._host, "apply", batches[0].partition, work)

    def look(self, partition: int) -> Claim:
        def work() -> Claim:
            claim: Claim = self._server.store.look(partition)
            return claim

        return self._server.call(self._host, "look", partition, work)

    def standings(self, partitions: Sequence[int]) -> list[Standing]:
        """Two commands for each, as RedisStore sends them: something may happen between offsets and the length of the list."""
        state = self._server.state

        def offsets() -> list[tuple[Standing, int]]:
            found = self._server.store.standings(partitions)
            return [(standing, _customers(state.get(number))) for standing, number in zip(found, partitions, strict=True)]

        def lists() -> list[int]:
            return [len(state[number].who) // DIGEST_SIZE if number in state else 0 for number in partitions]

        first = self._server.call(self._host, "standings", partitions[0], offsets)
        then = self._server.call(self._host, "lengths", partitions[0], lists)
        return [replace(standing, whole=count == length) for (standing, count), length in zip(first, then, strict=True)]

    def customers(self, partition: int) -> Iterator[str]:
        def work() -> list[str]:
            return list(self._server.store.customers(partition))

        yield from self._server.call(self._host, "customers", partition, work)

    def release(self, partition: int, nonce: str) -> None:
        def work() -> None:
            self._server.store.release(partition, nonce)
            self._server.wrote(partition, self._server.now[partition].writer)

        self._server.call(self._host, "release", partition, work)

    def begin_rebuild(self, partition: int, nonce: str) -> None:
        def work() -> None:
            self._server.store.begin_rebuild(partition, nonce)
            self._accepted("begin_rebuild", partition, nonce)

        self._server.call(self._host, "begin_rebuild", partition, work)

    def restore(self, partition: int, nonce: str, customers: Sequence[CustomerWrite]) -> None:
        def work() -> None:
            self._server.store.restore(partition, nonce, customers)
            self._accepted("restore", partition, nonce)

        self._server.call(self._host, "restore", partition, work)

    def finish_rebuild(
        self,
        partition: int,
        nonce: str,
        applied: Offsets,
        model: str,
        watermark_ms: int,
        counters: Mapping[str, int],
        intent: Intent | None = None,
    ) -> None:
        def work() -> None:
            self._server.store.finish_rebuild(partition, nonce, applied, model, watermark_ms, counters, intent)
            self._accepted("finish_rebuild", partition, nonce, rebuilt=applied)

        self._server.call(self._host, "finish_rebuild", partition, work)

    def _accepted(
        self,
        what: str,
        partition: int,
        nonce: str,
        former: Offsets | None = None,
        to: Offsets | None = None,
        rebuilt: Offsets | None = None,
    ) -> None:
        """I6: an accepted write comes from the newest claim and follows what was there."""
        server = self._server
        writer = server.now[partition].writer
        if nonce != writer.nonce:
            server.violates(f"partition {partition}: {what} of {nonce} was accepted, though {writer.nonce or 'nobody'} has the claim")
        if former is not None and to is not None:
            if _plain(to) == _plain(writer.applied):
                return  # the same batch again: nothing was written
            if _plain(former) != _plain(writer.applied):
                server.violates(f"partition {partition}: {what} from {dict(former)} was accepted at {dict(writer.applied)}")
            writer = Writer(writer.nonce, dict(to))
        if rebuilt is not None:
            writer = Writer(writer.nonce, dict(rebuilt))
        server.wrote(partition, writer)


def _plain(offsets: Offsets) -> dict[str, int]:
    return dict.fromkeys(SOURCES, -1) | dict(offsets)


def _customers(found: Any) -> int:
    return 0 if found is None or found.meta is None else int(found.meta.customers)


@cache
def _parts(kind: Any) -> tuple[str, ...] | None:
    """The fields to copy of a data class that changes; None of anything else."""
    changes = is_dataclass(kind) and not getattr(kind, "__dataclass_params__").frozen  # noqa: B009 - mypy does not know it
    return tuple(part.name for part in fields(kind)) if changes else None


def _copied(value: Any) -> Any:
    """A copy that shares only what never changes."""
    kind: Any = type(value)
    if kind in _CONTAINERS:
        return kind(value)
    if (parts := _parts(kind)) is None:
        return value
    twin = kind.__new__(kind)
    for name in parts:
        setattr(twin, name, _copied(getattr(value, name)))
    return twin
