"""How stale stored state can be: the ends of the input topics, looked at over and over, compared with the offsets applied."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from features.facts import TOPICS
from features.store import Offsets

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.25
REMEMBERED: Final = 1_200
"""Looks kept: five minutes. State that lags further has no known bound."""

Ends = Mapping[tuple[int, int], int]
"""Next offset by (topic index, partition)."""


class Freshness:
    """What was in the topics when. `bound` answers from any thread; `look` is called by a thread of its own."""

    def __init__(self, look: Callable[[], Ends], clock_ms: Callable[[], int]) -> None:
        self._look, self._clock_ms = look, clock_ms
        self._looks: deque[tuple[int, Ends]] = deque(maxlen=REMEMBERED)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="freshness", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no longer."""
        self._ended.set()

    def look(self) -> None:
        """Look once. The time is taken before: what comes in meanwhile may or may not be in the answer."""
        before = self._clock_ms()
        self._looks.append((before, self._look()))

    def bound(self, partition: int, applied: Offsets, now_ms: int) -> int | None:
        """Everything taken in so many ms before now is in state with these offsets; None when that is not known."""
        wanted = [((topic, partition), applied[name] + 1) for topic, name in enumerate(TOPICS)]

        def met(ends: Ends) -> bool:
            return all(ends.get(place, 0) <= end for place, end in wanted)

        looks = self._looks
        if looks and met((newest := looks[-1])[1]):  # nearly always, and without a copy of all
            return max(0, now_ms - newest[0])
        return next((max(0, now_ms - at_ms) for at_ms, ends in reversed(tuple(looks)) if met(ends)), None)

    def seen_ms(self) -> int | None:
        """When the topics were last looked at, None when never."""
        return self._looks[-1][0] if self._looks else None

    def _run(self) -> None:
        failed = False
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                self.look()
                failed = False
            except Exception as error:  # whatever the client raises: answers then say that their staleness is not known
                if not failed:
                    log.warning("the ends of the input topics cannot be read: %s", error)
                failed = True


def kafka_ends(client: Mapping[str, Any], topics: Sequence[str], partitions: int, timeout_s: float) -> Callable[[], Ends]:
    """Reads the ends of all input topics in one request. topics: full names by topic index."""
    admin = AdminClient(dict(client), logger=log)
    asked = {TopicPartition(name, partition): (index, partition) for index, name in enumerate(topics) for partition in range(partitions)}

    def look() -> Ends:
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # it comes so
        futures = admin.list_offsets(dict.fromkeys(asked, latest), request_timeout=timeout_s)
        deadline = time.monotonic() + timeout_s
        try:
            return {asked[place]: future.result(max(0.1, deadline - time.monotonic())).offset for place, future in futures.items()}
        except KafkaException as error:
            raise OSError(error.args[0].str()) from error

    return look
