"""Coverage: the share of active customers whose last event has a fresh score by a model, by segment."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from drift.quality import Fault
from drift.series import ALL
from features.window import DAY_MS

ACTIVE_MS: Final = 30 * DAY_MS
FRESH_MS: Final = 3_600_000
"""A score this much older than the customer's last event is not fresh."""
CUSTOMERS: Final = 20_000
"""Customers followed: of so many a share is known to a third of a percent."""
LEAST: Final = 0.95
ENOUGH: Final = 100


@dataclass(slots=True)
class Coverage:
    """Last event and last score by a model of the customers met first, up to CUSTOMERS; epoch ms."""

    customers: dict[str, list[int]] = field(default_factory=dict)  # event, score, segment

    def _of(self, customer: str, segment: int) -> list[int] | None:
        known = self.customers.get(customer)
        if known is None and len(self.customers) < CUSTOMERS:
            known = self.customers[customer] = [0, 0, segment]
        if known is not None and segment:
            known[2] = segment
        return known

    def event(self, customer: str, at_ms: int, segment: int) -> None:
        """The customer did something."""
        if known := self._of(customer, segment):
            known[0] = max(known[0], at_ms)

    def score(self, customer: str, at_ms: int, segment: int) -> None:
        """The customer was scored, and not by the fallback."""
        if known := self._of(customer, segment):
            known[1] = max(known[1], at_ms)

    def forget(self, at_ms: int) -> None:
        """Drop those who are no longer active."""
        for name in [name for name, (event, score, _) in self.customers.items() if max(event, score) <= at_ms - ACTIVE_MS]:
            del self.customers[name]

    def shares(self, at_ms: int, segments: int) -> list[tuple[int, int]]:
        """(covered, active) of everybody and of each segment."""
        rows = np.array(list(self.customers.values()), np.int64).reshape(-1, 3)
        # What happened just now may be scored in a moment.
        active = (rows[:, 0] > at_ms - ACTIVE_MS) & (rows[:, 0] <= at_ms)
        covered = active & (rows[:, 1] >= rows[:, 0] - FRESH_MS)
        which = [active] + [active & (rows[:, 2] == g + 1) for g in range(segments)]
        return [(int((covered & these).sum()), int(these.sum())) for these in which]

    def judge(self, at_ms: int, segments: tuple[str, ...]) -> list[Fault]:
        """Segments of at least ENOUGH active customers of whom fewer than LEAST are covered."""
        found = []
        for name, (covered, active) in zip((ALL, *segments), self.shares(at_ms, len(segments)), strict=True):
            if active >= ENOUGH and covered < LEAST * active:
                share = covered / active
                detail = f"{share:.1%} of {active} active customers have a fresh score by a model"
                found.append(
                    Fault("coverage", "churn-scores", "", "", name, (1 - share) / (1 - LEAST), share, detail, frozenset((ALL, *segments)))
                )
        return found
