"""Customers read from the store and scored at an instant, for lookups: those that wait together are answered together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from features.facts import NONE
from features.history import Histories
from features.redis_store import Seen
from features.store import MAX_CUSTOMERS, CustomerState, Standing
from proto.errors import ChainBroken
from streams.partitioner import partition_of
from streams.scores import Model, judged

FloatArray = npt.NDArray[np.float32]

LARGEST: Final = 500
"""Customers answered in one go: a small lookup does not wait longer than these take."""


class LookupStore(Protocol):
    """What is needed of a store (features.redis_store.RedisStore)."""

    def lookup(self, asked: Sequence[tuple[int, Sequence[str]]]) -> list[Seen]: ...

    def standings(self, partitions: Sequence[int]) -> list[Standing]: ...


@dataclass(frozen=True, slots=True)
class Last:
    """The last score of the stream."""

    probability: float
    band: int
    alert_band: int
    at_ms: int


@dataclass(frozen=True, slots=True)
class Found:
    """A customer at an instant. state None: nothing is stored, and the vector is that of nobody; newest_ms None: no fact is kept."""

    customer: str
    seen: Seen
    state: CustomerState | None
    model: Model
    at_ms: int
    newest_ms: int | None
    vector: FloatArray
    probability: float
    band: int
    last: Last | None


@dataclass(slots=True, eq=False)
class _Asked:
    customers: Sequence[str]
    at_ms: int | None
    answer: asyncio.Future[list[Found]]


class StateReader:
    """Answers `read` in one thread of its own: one round trip to the store, one run of kernel and model for all who wait.

    now_ms: the instant meant by "now", from where a partition stands. on_read: called for each round trip. One asyncio loop; the store is
    this thread's alone.
    """

    def __init__(
        self,
        store: LookupStore,
        model: Callable[[], Model],
        fallback: Model,
        partitions: int,
        now_ms: Callable[[Seen], int],
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._model, self._fallback, self._partitions, self._now_ms = store, model, fallback, partitions, now_ms
        self._pool = ThreadPoolExecutor(1, "lookup")
        self._waiting: list[_Asked] = []
        self._running = False
        self._on_read = on_read

    async def read(self, customers: Sequence[str], at_ms: int | None) -> list[Found]:
        """Customers in the order asked. at_ms None: now. Never before a customer's newest event time.

        Raises StoreUnavailable, ChainBroken (state damaged or of another version).
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(customers, at_ms, loop.create_future())
        self._waiting.append(asked)
        if not self._running:
            self._running = True
            loop.create_task(self._run())  # noqa: RUF006 - it ends by itself when nobody waits; every answer is a future of its own
        return await asked.answer

    async def standings(self) -> list[Standing]:
        """Where every partition stands. Raises StoreUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._store.standings, range(self._partitions))

    def close(self) -> None:
        """End the thread once it has answered."""
        self._pool.shutdown(wait=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            together: list[_Asked] = []
            size = 0
            while self._waiting and (not together or size + len(self._waiting[0].customers) <= LARGEST):
                together.append(self._waiting.pop(0))
                size += len(together[-1].customers)
            self._on_read()
            results = await loop.run_in_executor(self._pool, self._answer, together)
            for asked, result in zip(together, results, strict=True):
                if asked.answer.done():  # who asked has gone
                    continue
                if isinstance(result, BaseException):
                    asked.answer.set_exception(result)
                else:
                    asked.answer.set_result(result)
        self._running = False

    def _answer(self, together: Sequence[_Asked]) -> list[list[Found] | Exception]:
        try:
            flat = self._find([(customer, asked.at_ms) for asked in together for customer in asked.customers])
        except Exception as error:
            if len(together) == 1:
                return [error]
            # One damaged customer is one refused answer.
            return [self._answer([asked])[0] for asked in together] if isinstance(error, ChainBroken) else [error] * len(together)
        results: list[list[Found] | Exception] = []
        begin = 0
        for asked in together:
            results.append(flat[begin : begin + len(asked.customers)])
            begin += len(asked.customers)
        return results

    def _find(self, wanted: Sequence[tuple[str, int | None]]) -> list[Found]:
        customers = list(dict.fromkeys(customer for customer, _ in wanted))
        places: dict[int, list[str]] = {}
        for customer in customers:
            places.setdefault(partition_of(customer, self._partitions), []).append(customer)
        asked = [
            (partition, named[first : first + MAX_CUSTOMERS])
            for partition, named in places.items()
            for first in range(0, len(named), MAX_CUSTOMERS)
        ]
        states: dict[str, tuple[Seen, CustomerState | None]] = {}
        for (_, named), seen in zip(asked, self._store.lookup(asked), strict=True):
            states.update({customer: (seen, state) for customer, state in zip(named, seen.states, strict=True)})
        histories = Histories()
        histories.load(customers, [states[customer][1] for customer in customers])
        names = [customer for customer, _ in wanted]
        newest = histories.newest_ms(names)
        now = np.array([self._now_ms(states[name][0]) if at is None else at for name, at in wanted], np.int64)
        instant = np.maximum(now, newest)
        vectors = histories.vectors_at(names, instant)
        model = self._model()
        probability, band = judged(model, self._fallback, vectors)
        alerts = histories.alert_bands(names).tolist()
        scores = [column.tolist() for column in histories.last_scores(names)]
        found = []
        for i, name in enumerate(names):
            seen, state = states[name]
            last = None if scores[2][i] == NONE else Last(scores[0][i], scores[1][i], alerts[i], scores[2][i])
            known = int(newest[i])
            found.append(
                Found(
                    name,
                    seen,
                    state,
                    model,
                    int(instant[i]),
                    None if known == NONE else known,
                    vectors[i],
                    float(probability[i]),
                    int(band[i]),
                    last,
                )
            )
        return found
