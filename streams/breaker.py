"""Whether so many records become dead letters that the fault is not theirs."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

WINDOW_S: Final = 60.0
LEAST: Final = 1_000
"""Records of the window below which no share means anything."""


@dataclass(slots=True)
class Breaker:
    """Records and dead letters of the last minute. limit: the share of dead letters that is still bad data; 1 = any."""

    limit: float
    _noted: deque[tuple[float, int, int]] = field(default_factory=deque)
    _events: int = 0
    _dead_letters: int = 0

    def note(self, events: int, dead_letters: int, now_s: float) -> str:
        """Count a batch; why it is too much, "" while it is not. now_s: of a monotonic clock."""
        self._noted.append((now_s, events, dead_letters))
        self._events += events
        self._dead_letters += dead_letters
        while self._noted[0][0] <= now_s - WINDOW_S:
            _, old, old_letters = self._noted.popleft()
            self._events -= old
            self._dead_letters -= old_letters
        if self._events < LEAST or self._dead_letters <= self.limit * self._events:
            return ""
        return f"{self._dead_letters:,} of {self._events:,} records of the last minute became dead letters (limit {self.limit:.0%})"
