"""One simulated run: a seed makes a world, faults happen to it, and at rest every promise is checked.

    churnstream-faults simulate --seeds 0..2000 --json

The last line says how many seeds and events there were, which faults, and the first seed that broke an invariant with the
command that shows it again. Same seed and sources: same run, which the digest of the trace shows.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Final

from bench.faults.sim_broker import Broker, Log
from bench.faults.sim_check import Output, check_partition, inputs_of, read
from bench.faults.sim_redis import Broken, ModelRedis
from bench.faults.sim_schedule import Scheduler
from bench.faults.sim_worker import (
    ALERTS,
    DEAD_LETTERS,
    SCORES,
    Process,
    Slices,
    World,
    clients_of_the_simulation,
    decoder,
    foreign_model,
    models,
)
from bench.faults.sim_world import PARTITIONS, START_MS, Arrival, arrivals, customers, probe, size_of
from features.facts import DAY_MS, TOPICS
from proto.errors import Reason
from streams.snapshot import Snapshots

REST_MS: Final = 400_000
"""I7: after the last fault, and with everything alive, all input must be handled within this (virtual) time: session timeouts,
one watchdog period and retries, twice over."""
BEGUN_LATE: Final = 0.1
"""Share of the runs in which topics do not begin at offset 0."""
AT_ONCE: Final = 0.4
"""Share of the sudden faults that happen at once, when most workers are idle; the others happen in the midst of work."""
DECODED_BY_SLICE: Final = 0.1
"""Share of the runs in which every slice is decoded where it is read; in the others each topic at once."""
MEMORY: Final = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where files cost nothing to write; None is the usual place."""
STORE_WENT_BACK: Final = frozenset({"ChainBroken", "StateDamaged", "StoreWentBack", "Fenced"})
"""What a worker may end with when the store is no longer what it was; its next start finds out and repairs it."""


TICKS: Final = "CHURN_SIM_TICKS"
"""Set: the silent are scored too. A variable, so that processes of a campaign have it, and the worlds of all seeds stay as they were."""
TICKS_MS: Final = (DAY_MS, 7 * DAY_MS, 30 * DAY_MS)


@dataclass(slots=True)
class Outcome:
    """What one seed came to. violation "" when every invariant held."""

    seed: int
    violation: str = ""
    invariant: str = ""
    events: int = 0
    scores: int = 0
    raw_duplicates: int = 0
    steps: int = 0
    virtual_ms: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    trace: list[str] = field(default_factory=list)


def simulate(seed: int) -> Outcome:
    """Run one seed. Never raises for a broken promise: the outcome says so."""
    return Run(seed).outcome()


class Run:
    """A world and what happens to it; the scenario itself is the scheduler's main actor."""

    def __init__(self, seed: int, *, at_rest: Callable[[Run], object] | None = None) -> None:
        """at_rest: called before the checks, by tests of the checks."""
        self.seed, self._at_rest_hook = seed, at_rest
        self.random = Random(f"{seed}/faults")
        world_random = Random(f"{seed}/world")
        size = size_of(world_random)
        self.arrivals = arrivals(world_random, size)
        self.schedule = Scheduler(str(seed), START_MS)
        self.broker = Broker(self.schedule, TOPICS, (SCORES, DEAD_LETTERS, ALERTS), PARTITIONS, Random(f"{seed}/broker"))
        self.redis = ModelRedis(self.schedule, PARTITIONS, Random(f"{seed}/redis"))
        self.late = self._begin_late(Random(f"{seed}/begin"))
        exactly_once = self.random.random() < 0.4
        self._home = TemporaryDirectory(dir=MEMORY) if self.random.random() < 0.3 else None
        self.snapshots = Snapshots(Path(self._home.name), "sim") if self._home is not None else None
        pieces = {"MARGIN": self.random.choice([1, 4_000])}
        pieces |= self.random.choice([{}, {"GAP": 3, "SPAN": 12, "STREAMED": 5}, {"GAP": 20, "SPAN": 8, "STREAMED": 9}])
        max_facts = self.random.choice([1, 60, 100_000])
        self.slices = Slices()
        by_slice = Random(f"{seed}/decoder").random() < DECODED_BY_SLICE
        self.world = World(
            self.schedule,
            self.broker,
            self.redis,
            size.batch,
            max_facts,
            pieces,
            exactly_once,
            self.snapshots,
            decoder() if by_slice else self.slices,
            Random(f"{seed}/ticks").choice(TICKS_MS) if os.environ.get(TICKS) else 0,
        )
        self._prepare(*product(range(len(TOPICS)), range(PARTITIONS)))
        self.reasons: dict[tuple[str, int, int], Reason] = {}
        self.processes: list[Process] = []
        self.workers = self.random.choice([1, 1, 2, 2, 3])
        self.model = self.random.choice(["", "", *sorted(models())])
        self.started = 0
        self.faults: Counter[str] = Counter()
        self.lost: dict[int, set[str]] = {}
        """Customers of whom a key was deleted, per partition: found out when somebody looks at them again."""
        self.deadly: set[int] = set()
        """Numbers of the arrivals that end whoever handles them."""
        self._supervised = False
        self._victim: Process | None = None

    def _begin_late(self, random: Random) -> bool:
        """Whether some topics lost their first records before anybody came."""
        if random.random() >= BEGUN_LATE:
            return False
        for topic, partition in product(TOPICS, range(PARTITIONS)):
            log = self.broker.log(topic, partition)
            log.low = log.end = random.choice([0, 0, 1, 7])
        return True

    def _prepare(self, *places: tuple[int, int]) -> None:
        """Decode what will arrive in a (topic, partition)."""
        for topic, partition in places:
            log = Log((TOPICS[topic], partition))
            for record in self.arrivals:
                if record.topic == topic and record.partition == partition:
                    log.append(record.key, record.value, START_MS, number=record.number)
            self.slices.prepare(topic, partition, log.messages)

    def outcome(self) -> Outcome:
        outcome = Outcome(self.seed, events=len(self.arrivals))
        logging.disable(logging.CRITICAL)
        with clients_of_the_simulation(self.world):
            try:
                self._scenario()
                if self._at_rest_hook is not None:
                    self._at_rest_hook(self)
                self._check(outcome)
            except Broken as broken:
                outcome.violation, outcome.invariant = str(broken), broken.invariant
            finally:
                self.schedule.close()
                if self._home is not None:
                    self._home.cleanup()
                logging.disable(logging.NOTSET)
        outcome.faults = self.faults
        outcome.steps, outcome.virtual_ms = self.schedule.steps, self.schedule.now_ms - START_MS
        outcome.digest, outcome.trace = self.schedule.digest(), self.schedule.trace
        return outcome

    # -- what happens

    def _scenario(self) -> None:
        random, schedule = self.random, self.schedule
        backlog = random.choice([0, len(self.arrivals) // 2, len(self.arrivals)])
        self._arrive(self.arrivals[:backlog])
        rest = self.arrivals[backlog:]
        for _ in range(self.workers):
            self._start()
        count = random.choice([0, 1, 2, 3, 3, 4, 6])
        if count and random.random() < 0.4:  # while they work on the backlog
            self._happens_in_work(random.choice(self._sudden()), self._alive()[0])
        pieces = max(1, count + 1)
        each = -(-len(rest) // pieces)
        for number in range(pieces):
            self._arrive_slowly(rest[number * each : (number + 1) * each])
            self._pause(random.choice([5, 30, 100, 300, 4_000, 12_000]))
            if number < count:
                self._happens(random.choice(self._menu()))
            self._keep_alive()
        self.schedule.no_longer_after_steps()
        self._pause(random.choice([5, 300]))
        self._calm()
        # An idle partition notices with its next event that the store has lost something of it.
        for partition in sorted(self.redis.went_back):
            self._probe(partition, customers(partition)[0])
        self._rest()
        if self.lost:
            for process in self._alive():
                process.kill()  # what is in memory would hide what the store has lost
            self._keep_alive()
            for partition, names in sorted(self.lost.items()):
                for name in sorted(names):
                    self._probe(partition, name)
            self._rest()
        # What a zombie still had under way comes to its end, and may break something yet.
        self._pause(20_000)
        self._rest()  # what was applied and refused a moment ago is owed yet
        self._supervised = False
        if random.random() < 0.3:
            for process in self._alive():
                process.stop()
            self._note("graceful stop at the end")
            if not schedule.wait(lambda: not self._alive(), 60_000):
                raise Broken("I7", "a graceful stop did not end")

    def _rest(self) -> None:
        """Wait until everything is handled."""
        if not self.schedule.wait(lambda: bool(self.redis.broken) or self._at_rest(), REST_MS) and not self.redis.broken:
            self._look()
            raise Broken("I7", f"not at rest after {REST_MS} ms and {self.schedule.steps} steps: {list(self._ahead())}")
        self._look()

    def _probe(self, partition: int, customer: str) -> None:
        record = probe(len(self.arrivals), partition, customer)
        self.arrivals.append(record)
        self._prepare((1, partition))
        self._arrive([record])

    def _pause(self, ms: int) -> None:
        self.schedule.wait(lambda: bool(self.redis.broken), ms)
        self._look()

    def _look(self) -> None:
        if self.schedule.failure is not None:
            raise self.schedule.failure
        if self.redis.broken is not None:
            raise self.redis.broken
        if self.world.unexpected:
            raise Broken("I7", f"a worker ended with an error that nothing explains: {self.world.unexpected[0]}")

    def _happens(self, fault: Callable[[], None]) -> None:
        """Now, or in the midst of what some worker does next."""
        process = self._some()
        if process is None or fault not in self._sudden() or self.random.random() < AT_ONCE:
            fault()
        else:
            self._happens_in_work(fault, process)

    def _happens_in_work(self, fault: Callable[[], None], process: Process) -> None:
        thread = self.random.choice(["feed", "feed", "feed", "restore", "transactions", "ingest", "snapshot"])
        self.schedule.after_steps(
            process, thread, self.random.randint(1, self.random.choice([5, 30, 100])), partial(self._happens_to, process, fault)
        )

    def _happens_to(self, process: Process, fault: Callable[[], None]) -> None:
        self._victim = process if process.alive else None
        fault()
        self._victim = None

    def _sudden(self) -> Sequence[Callable[[], None]]:
        """Faults that need no time of their own."""
        return (self._kill, self._stop_one, self._lossy_redis, self._redis_away, self._broker_away, *self._losses())

    def _losses(self) -> Sequence[Callable[[], None]]:
        """What the store may lose. Not where topics began late: without a snapshot nobody can know that, and the worker rightly refuses."""
        return () if self.late else (self._redis_goes_back, self._redis_empty, self._redis_loses_a_key)

    def _menu(self) -> Sequence[Callable[[], None]]:
        return (
            self._kill,
            self._kill,
            self._freeze,
            self._freeze,
            self._one_more,
            self._stop_one,
            self._storm,
            self._lossy_redis,
            self._redis_away,
            self._broker_away,
            self._switch_model,
            self._offer_foreign_model,
            self._deadly_record,
            *self._losses(),
            *self._losses()[:1],
            *([self._retention, self._retention, self._snapshot_damaged] if self.snapshots is not None else []),
        )

    def _note(self, fault: str) -> None:
        self.faults[fault] += 1
        self.schedule.note(f"FAULT {fault}")

    def _some(self) -> Process | None:
        if self._victim is not None:
            return self._victim
        alive = self._alive()
        return self.random.choice(alive) if alive else None

    def _kill(self) -> None:
        if (process := self._some()) is not None:
            self._note("worker kill -9")
            process.kill()

    def _freeze(self) -> None:
        process = self._some()
        if process is None or process.frozen:
            return
        for_ms = self.random.choice([200, 3_000, 8_000, 15_000])
        self._note("worker frozen past the session timeout" if for_ms > 7_000 else "worker frozen")
        process.freeze(True)
        self.schedule.at(for_ms, lambda: process.freeze(False))
        if self.random.random() < 0.5:
            self._pause(for_ms + self.random.choice([-100, 0, 500]))

    def _one_more(self) -> None:
        if len(self._alive()) < 4:
            self._note("worker added")
            self.workers += 1
            self._start()

    def _stop_one(self) -> None:
        if (process := self._some()) is not None:
            self._note("graceful stop")
            process.stop()
            if self.workers > 1:
                self.workers -= 1

    def _storm(self) -> None:
        self._note("rebalance storm")
        for _ in range(self.random.randint(2, 4)):
            self.random.choice((self._one_more, self._stop_one, self._kill))()
            self._pause(self.random.choice([10, 300, 2_000]))
            self._keep_alive()

    def _lossy_redis(self) -> None:
        self._note("Redis answers lost")
        self.redis.lossy = self.random.choice([0.1, 0.3])
        self.world.explained.add("StoreUnavailable")
        self.schedule.at(self.random.choice([50, 1_000, 5_000]), self._redis_well)

    def _redis_well(self) -> None:
        self.redis.lossy = 0.0

    def _redis_away(self) -> None:
        self._note("Redis out of reach")
        self.world.explained.add("StoreUnavailable")
        self.redis.down_until = self.schedule.now_ms + self.random.choice([100, 1_500, 10_000])

    def _broker_away(self) -> None:
        self._note("broker out of reach")
        self.broker.down = True
        for_ms = self.random.choice([100, 4_000, 40_000])
        self.world.explained.add("DependencyUnreachable")
        self.schedule.at(for_ms, self._broker_back)

    def _broker_back(self) -> None:
        self.broker.down = False

    def _switch_model(self) -> None:
        self._note("model switch")
        self.model = self.random.choice(sorted(models()))
        for process in self._alive():

            def switch(process: Process = process, model: str = self.model) -> None:
                process.shelf.now = model

            self.schedule.at(self.random.choice([0, 10, 500]), switch)

    def _redis_goes_back(self) -> None:
        self._note("Redis loses its newest writes")
        self.world.explained |= STORE_WENT_BACK
        self.redis.go_back(self.random.choice([1, 2, 3, 5, 10, 30, 100]))

    def _redis_empty(self) -> None:
        self._note("Redis FLUSHALL")
        self.world.explained |= STORE_WENT_BACK
        self.redis.lose_everything()

    def _redis_loses_a_key(self) -> None:
        partition = self.random.randrange(PARTITIONS)
        kind, customer = self.redis.lose_part(partition)
        if kind:
            self._note(f"Redis key deleted: {kind}")
            self.world.explained |= STORE_WENT_BACK
            if customer:
                self.lost.setdefault(partition, set()).add(customer)

    def _retention(self) -> None:
        """Records are deleted that a snapshot holds."""
        assert self.snapshots is not None
        for partition in range(PARTITIONS):
            snapshot = next(self.snapshots.good(partition), None)
            if snapshot is None:
                continue
            self._note("retention")
            applied = self.redis.store.look(partition).applied
            for topic in TOPICS:
                log = self.broker.log(topic, partition)
                log.low = max(log.low, self.random.randint(0, min(snapshot.stand.applied[topic], applied[topic]) + 1))

    def _snapshot_damaged(self) -> None:
        """One byte of a snapshot changes; not where nothing else holds what it does."""
        assert self.snapshots is not None
        partition = self.random.randrange(PARTITIONS)
        found = self.snapshots.of(partition)
        if found and all(self.broker.log(topic, partition).low == 0 for topic in TOPICS):
            self._note("snapshot damaged")
            path = self.random.choice(found).path
            data = bytearray(path.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            path.write_bytes(data)

    def _deadly_record(self) -> None:
        """A record to come on which native code fails."""
        coming = [record.number for record in self.arrivals[len(self.reasons) :] if record.reason == Reason.ACCEPTED]
        if coming:
            self._note("a record that ends every worker")
            self.deadly.add(self.random.choice(coming))

    def _offer_foreign_model(self) -> None:
        if (process := self._some()) is not None:
            self._note("model of another layout published")
            process.shelf.foreign = foreign_model()

    # -- keeping it going

    def _alive(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def _start(self) -> None:
        self.started += 1
        self.processes.append(Process(self.world, f"w{self.started}", self.model))

    def _keep_alive(self) -> None:
        """The supervisor: as many workers as there should be."""
        for _ in range(self.workers - len(self._alive())):
            self._start()

    def _calm(self) -> None:
        """No more faults; everything is alive."""
        self.redis.lossy = 0.0
        self.redis.down_until = 0
        self.broker.down = False
        for process in self._alive():
            if process.frozen:
                process.freeze(False)
        self.workers = max(1, self.workers)
        self._supervised = True
        self.schedule.at(500, self._supervise)
        self._keep_alive()
        self._look()

    def _supervise(self) -> None:
        if self._supervised:
            self._keep_alive()
            self.schedule.at(2_000, self._supervise)

    def _arrive(self, records: Sequence[Arrival]) -> None:
        for record in records:
            log = self.broker.log(TOPICS[record.topic], record.partition)
            log.skip(record.hole)
            offset = log.append(record.key, record.value, self.schedule.now_ms, number=record.number)
            reason = record.reason
            if record.number in self.deadly:
                self.world.deadly.add((record.key.decode(), record.topic, offset))
                reason = Reason.CRASH
            self.reasons[TOPICS[record.topic], record.partition, offset] = reason

    def _arrive_slowly(self, records: Sequence[Arrival]) -> None:
        start, delay = 0, 0
        while start < len(records):
            count = self.random.choice([1, 3, 10, 50])
            piece = records[start : start + count]
            self.schedule.at(delay, lambda piece=piece: self._arrive(piece))  # type: ignore[misc]  # the default binds this turn's value, which mypy cannot type
            start += count
            delay += self.random.choice([1, 5, 50])

    def _at_rest(self) -> bool:
        if len(self.reasons) < len(self.arrivals):
            return False
        # What a worker applied and was refused to emit, or died before it emitted, is emitted by whoever claims the partition next.
        alive = self._alive()
        if any(p.ingest._dropped for p in alive) or not all(any(n in p.ingest._merges for p in alive) for n in range(PARTITIONS)):
            return False
        return not any(self._ahead())

    def _ahead(self) -> Iterator[tuple[str, int, int]]:
        """Topics and partitions with records that are not applied yet, and how many."""
        for number in range(PARTITIONS):
            found = self.redis.state.get(number)
            applied = {} if found is None or found.meta is None else found.meta.applied
            for topic in TOPICS:
                log = self.broker.logs[topic, number]
                if log.offsets and log.offsets[-1] > (at := applied.get(topic, -1)):
                    yield topic, number, len(log.messages) - log.first(at + 1)

    # -- at the end

    def _check(self, outcome: Outcome) -> None:
        self._look()
        random = Random(f"{self.seed}/check")
        for number in range(PARTITIONS):
            relaxed = bool(self.redis.went_back.get(number))
            claims: dict[str, list[int]] = {}
            for partition, process, step in self.redis.claims:
                if partition == number:
                    claims.setdefault(process, []).append(step)
            once = self.world.exactly_once
            scores = read(self.broker.log(SCORES, number), number, claims, relaxed=relaxed, once=once)
            letters = read(self.broker.log(DEAD_LETTERS, number), number, claims, relaxed=relaxed, once=once)
            inputs = inputs_of(self.broker.logs, number, self.reasons, self.slices)
            outcome.scores += check_partition(number, inputs, scores, letters, self.redis, models(), random, self.world.tick_ms)
            outcome.raw_duplicates += _extra(scores) + _extra(letters)


def _extra(output: Output) -> int:
    return len(output.raw) - len(output.first)
