"""A seeded scheduler: actors that take turns, a clock only it moves, and a digest of every step.

Each actor is real, synchronous code on a thread of its own, but only one runs at any time, and it hands over only where it
calls `step` or `wait`. Who goes on is drawn from the seed; so a run is a pure function of the seed and the code.
"""

from __future__ import annotations

import heapq
import threading
from _thread import allocate_lock
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from queue import Empty
from random import Random
from typing import Any, Final

MAX_STEPS: Final = 60_000
"""A run with more steps than this goes round in circles. A usual one has one to three thousand."""
LONGEST_STEP_MS: Final = 3
_NEVER_MS: Final = 1 << 62


class Killed(BaseException):
    """The process of this actor was killed: nothing it still does may have an effect. Not an Exception, so nobody handles it."""


@dataclass(slots=True, eq=False)
class Actor:
    """One thread of one simulated process. `ready` None: can go on; else it waits until that holds or the clock says `wake_ms`."""

    name: str
    process: object
    turn: Any = field(default_factory=allocate_lock)
    ready: Callable[[], bool] | None = None
    wake_ms: int | None = None
    weight: float = 1.0
    frozen: bool = False
    killed: bool = False
    done: bool = False


@dataclass(slots=True)
class _Fuse:
    """Burns with every step an actor of this kind makes in this process."""

    process: object
    kind: str
    left: int
    work: Callable[[], None]


class _Thread:
    """A thread that runs one actor after another, over many runs: making one costs more than a switch."""

    idle: list[_Thread] = []  # noqa: RUF012 - shared on purpose

    def __init__(self) -> None:
        self.turn = allocate_lock()
        self.turn.acquire()
        self.work: Callable[[], None] = lambda: None
        threading.Thread(target=self._loop, name="actor", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self.turn.acquire()
            self.work()

    @classmethod
    def start(cls, work: Callable[[], None]) -> None:
        thread = cls.idle.pop() if cls.idle else cls()
        thread.work = work
        thread.turn.release()


class Scheduler:
    """Who runs, and what time it is. `now_ms` is virtual; every step takes a little of it, and when all wait it jumps."""

    def __init__(self, seed: str, start_ms: int) -> None:
        self.random = Random(f"{seed}/schedule")
        self.now_ms = start_ms
        self.steps = 0
        self._notes: list[str] = []
        # Some runs switch at almost every chance, some let one actor go far; some starve an actor.
        self._stay = self.random.choice([0.2, 0.6, 0.9])
        self._main = Actor("main", None)
        self._main.turn.acquire()
        self.current = self._main
        self._actors = [self._main]
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._fuses: list[_Fuse] = []
        self._numbers = 0

    def note(self, what: str) -> None:
        """Add to the trace."""
        self._notes.append(f"{self.steps} {self.now_ms} {self.current.name} {what}")

    @property
    def trace(self) -> list[str]:
        """Everything noted so far, a line each."""
        return self._notes

    def digest(self) -> str:
        """Digest of everything noted so far."""
        return blake2b("".join(self._notes).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def spawn(self, name: str, process: object, work: Callable[[], None]) -> Actor:
        """A new actor; it first runs when it is chosen."""
        actor = Actor(name, process, weight=self.random.choice([0.2, 1.0, 1.0, 1.0, 5.0]))
        actor.turn.acquire()
        self._actors.append(actor)

        def run() -> None:
            actor.turn.acquire()
            try:
                if not actor.killed:
                    work()
            except Killed:
                pass
            except BaseException as error:  # an actor's work handles what it expects; this is for the harness itself
                self.failure = self.failure or error
            actor.done = True
            self._actors.remove(actor)
            _Thread.idle.append(thread[0])
            self._hand_to(self._choose())

        thread: list[_Thread] = []
        thread.append(_Thread.idle.pop() if _Thread.idle else _Thread())
        thread[0].work = run
        thread[0].turn.release()
        return actor

    failure: BaseException | None = None
    """What an actor raised that its process did not handle: a fault of the simulation itself."""

    def at(self, delay_ms: int, work: Callable[[], None]) -> None:
        """Call `work` when so much time has passed; it must not wait."""
        self._numbers += 1
        heapq.heappush(self._timers, (self.now_ms + delay_ms, self._numbers, work))

    def after_steps(self, process: object, kind: str, steps: int, work: Callable[[], None]) -> None:
        """Call `work` when actors of the process whose name begins so have made so many steps more; it must not wait.

        So something can happen in the midst of what they do, wherever that takes little time.
        """
        self._fuses.append(_Fuse(process, kind, steps, work))

    def no_longer_after_steps(self) -> None:
        """What has not happened yet after its steps happens now."""
        fuses, self._fuses = self._fuses, []
        for fuse in fuses:
            fuse.work()

    def step(self, what: str) -> None:
        """Time passes, and others may come first."""
        me = self.current
        if me.killed:
            raise Killed
        self.steps += 1
        draw = self.random.random()
        self.now_ms += int(draw * 1_000) % (LONGEST_STEP_MS + 1)
        self.note(what)
        if self._timers and self._timers[0][0] <= self.now_ms:
            self._fire()
        if self._fuses:
            self._burn(me)
        if draw >= self._stay or me.frozen or me.killed:
            self._switch(me)

    def wait(self, ready: Callable[[], bool], timeout_ms: int | None = None) -> bool:
        """Let others go on until `ready` holds (True) or the time is over (False)."""
        me = self.current
        if me.killed:
            raise Killed
        me.ready = ready
        me.wake_ms = None if timeout_ms is None else self.now_ms + timeout_ms
        self._switch(me)
        me.ready = me.wake_ms = None
        return ready()

    def sleep(self, delay_ms: int) -> None:
        """Let so much time pass."""
        self.wait(_never, delay_ms)

    def freeze(self, process: object, frozen: bool) -> None:
        """Stop or continue all actors of a process where they are."""
        for actor in self._actors:
            if actor.process is process:
                actor.frozen = frozen

    def kill(self, process: object) -> None:
        """End all actors of a process where they are; what they unwind has no effect any more."""
        for actor in self._actors:
            if actor.process is process and actor is not self._main:
                actor.killed = True

    def close(self) -> None:
        """End every actor. Called by the main one."""
        for actor in self._actors:
            actor.killed = actor is not self._main
        while len(self._actors) > 1:
            self.wait(lambda: len(self._actors) == 1, 0)

    def _switch(self, me: Actor) -> None:
        other = self._choose()
        if other is not me:
            self._hand_to(other)
            me.turn.acquire()
        if me.killed:
            raise Killed

    def _hand_to(self, other: Actor) -> None:
        self.current = other
        other.turn.release()

    def _burn(self, me: Actor) -> None:
        for fuse in [fuse for fuse in self._fuses if fuse.process is me.process and me.name.partition(" ")[2].startswith(fuse.kind)]:
            fuse.left -= 1
            if fuse.left <= 0:
                self._fuses.remove(fuse)
                fuse.work()

    def _fire(self) -> None:
        while self._timers and self._timers[0][0] <= self.now_ms:
            heapq.heappop(self._timers)[2]()

    def _choose(self) -> Actor:
        if self.steps > MAX_STEPS or self.failure is not None:
            dying = next((actor for actor in self._actors if actor.killed), None)
            return dying or self._main
        while True:
            total = 0.0
            runnable: list[Actor] = []
            now = self.now_ms
            soonest = self._timers[0][0] if self._timers else _NEVER_MS
            for actor in self._actors:
                if actor.killed:
                    return actor
                if actor.frozen:
                    continue
                ready, wake = actor.ready, actor.wake_ms
                if ready is None or (wake is not None and wake <= now) or (ready is not _never and ready()):
                    runnable.append(actor)
                    total += actor.weight
                elif wake is not None and wake < soonest:
                    soonest = wake
            if len(runnable) == 1:
                return runnable[0]
            if runnable:
                draw = self.random.random() * total
                for actor in runnable:
                    draw -= actor.weight
                    if draw < 0:
                        return actor
                return runnable[-1]
            assert soonest < _NEVER_MS, "everybody waits for nothing"
            self.now_ms = max(now, soonest)
            self._fire()


def _never() -> bool:
    return False


class Lock:
    """What the code under simulation takes for a threading.Lock."""

    def __init__(self, schedule: Scheduler) -> None:
        self._schedule = schedule
        self._held = False

    def __enter__(self) -> bool:
        while self._held:
            self._schedule.wait(lambda: not self._held)
        self._held = True
        return True

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, *, timeout: float) -> bool:
        """Take it, or be refused when another one does not give it back: at once here, time does not matter."""
        if self._held:
            return False
        return self.__enter__()

    def release(self) -> None:
        """Give it back."""
        self._held = False


class Event:
    """What the code under simulation takes for a threading.Event."""

    def __init__(self, schedule: Scheduler) -> None:
        self._schedule = schedule
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        return self._set or self._schedule.wait(self.is_set, None if timeout is None else int(timeout * 1_000))


class Queue:
    """What the code under simulation takes for a queue.SimpleQueue."""

    def __init__(self, schedule: Scheduler) -> None:
        self._schedule = schedule
        self.items: deque[Any] = deque()

    def put(self, item: object) -> None:
        self.items.append(item)

    def get(self) -> Any:
        self._schedule.wait(lambda: bool(self.items))
        return self.items.popleft()

    def get_nowait(self) -> Any:
        if not self.items:
            raise Empty
        return self.items.popleft()


class Future:
    """What a Pool gives for a task."""

    def __init__(self, schedule: Scheduler) -> None:
        self._schedule = schedule
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None

    def result(self) -> Any:
        self._schedule.wait(lambda: self.done)
        if self.error is not None:
            raise self.error
        return self.value

    def exception(self) -> BaseException | None:
        self._schedule.wait(lambda: self.done)
        return self.error


class Pool:
    """What the code under simulation takes for a ThreadPoolExecutor with one thread: an actor of the process that submits first."""

    def __init__(self, schedule: Scheduler, name: str) -> None:
        self._schedule, self._name = schedule, name
        self._todo: deque[Callable[[], None]] = deque()
        self._started = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        future = Future(self._schedule)

        def run() -> None:
            try:
                future.value = work(*arguments)
            except Exception as error:
                future.error = error
            future.done = True

        self._todo.append(run)
        if not self._started:
            self._started = True
            process: Any = self._schedule.current.process
            self._schedule.spawn(f"{process.name} {self._name}", process, self._run)
        return future

    def _run(self) -> None:
        while True:
            self._schedule.wait(lambda: bool(self._todo))
            self._todo.popleft()()


class Threads:
    """What the code under simulation takes for the module threading."""

    def __init__(self, schedule: Scheduler) -> None:
        self._schedule = schedule

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> Threads._Start:  # noqa: N802 - threading's name
        return Threads._Start(self._schedule, target, name)

    @dataclass(slots=True)
    class _Start:
        schedule: Scheduler
        target: Callable[[], None]
        name: str

        def join(self, timeout: float | None = None) -> None:
            """Nobody here waits for a thread."""

        def start(self) -> None:
            process: Any = self.schedule.current.process
            self.schedule.spawn(f"{process.name} {self.name}", process, self.target)
