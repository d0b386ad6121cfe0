"""The state store of a deployment, and a look at its servers every few seconds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from features.redis_health import FULL, Health
from features.redis_store import RedisStore
from proto.errors import ChurnError

if TYPE_CHECKING:
    from streams.metrics import Metrics
    from streams.settings import Settings

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 10.0
GLANCE_EVERY_S: Final = 1.0


def open_store(settings: Settings, url: str, *, patience_s: float = 6.0) -> RedisStore:
    """The store at this address under the settings' namespace; nothing is asked yet. patience_s: how long it may be away."""
    return RedisStore(
        url,
        namespace=settings.namespace,
        timeout_s=min(3.0, settings.dependency_timeout_s),
        patience_s=patience_s,
        oldest=settings.redis_oldest_version,
    )


class StoreWatch:
    """A thread of its own that looks at the servers: metrics, and a warning when one fills up or refuses writes.

    glance: called every GLANCE_EVERY_S with the store, to look whether what it holds is still there.
    """

    def __init__(
        self, store: RedisStore, metrics: Metrics, *, every_s: float = LOOK_EVERY_S, glance: Callable[[RedisStore], None] = lambda _: None
    ) -> None:
        self._store, self._metrics, self._every_s, self._glance = store, metrics, every_s, glance
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-watch", daemon=True)
        self._said: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End, and close the store: it is this thread's alone."""
        self._ended.set()

    def _run(self) -> None:
        due_s = 0.0
        try:
            while not self._ended.is_set():
                try:
                    if time.monotonic() >= due_s:
                        due_s = time.monotonic() + self._every_s
                        self.look()
                    self._glance(self._store)
                except ChurnError as error:  # it does not answer: the batches in work say so
                    log.debug("%s", error)
                self._ended.wait(min(self._every_s, GLANCE_EVERY_S))
        finally:
            self._store.close()

    def look(self) -> None:
        """Look once. Each thing is said once, until it is over."""
        found = self._store.health()
        limited = [health.filled for health in found if health.limit_bytes]
        self._metrics.store_filled.set(max(limited, default=0.0))
        self._metrics.store_writable.set(0 if any(health.writes_fail for health in found) else 1)
        now = {said for health in found for said in _warnings(health)}
        for address, text in sorted(now - self._said):
            log.warning("Redis at %s %s", address, text)
        for address, text in sorted(self._said - now):
            log.info("Redis at %s: over: %s", address, text)
        self._said = now


def _warnings(health: Health) -> list[tuple[str, str]]:
    warnings = []
    if health.filled >= FULL:
        warnings.append(f"has filled {FULL:.0%} of its {health.limit_bytes >> 20} MB: batches wait once it is full; give it more memory")
    if health.writes_fail:
        warnings.append(f"refuses writes ({health.writes_fail}): batches wait; look at its disk")
    return [(health.address, text) for text in warnings]
