"""What could happen so that a customer is scored lower: plans of events, each run through the kernel before it is proposed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
import numpy.typing as npt

from features.facts import DAY_MS, ID, TIME
from features.store import CustomerState
from scoring.whatif import outcomes_of

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

MOST_TRIED: Final = 400
"""Plans run; those with the fewest, cheapest events first."""
_STEP: Final = 0x9E3779B97F4A7C1
"""Between the ids of a plan's events: any will do that tells them apart."""


@dataclass(frozen=True, slots=True)
class Action:
    """An event somebody can bring about. fact: as the stream would decode it, shape (WIDTH,). counts: how often it may be tried.

    effort: of one, in the unit of the others.
    """

    name: str
    fact: IntArray
    counts: tuple[int, ...]
    effort: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """(action, time in ms) in the order of time, and the probability the stream would give with the last of them."""

    steps: tuple[tuple[Action, int], ...]
    probability: float

    @property
    def counts(self) -> dict[str, int]:
        """How often each action occurs."""
        return dict(Counter(action.name for action, _ in self.steps))


@dataclass(frozen=True, slots=True)
class Search:
    """The plans found, least effort first, and how many were run."""

    plans: tuple[Plan, ...]
    tried: int


def search(
    state: CustomerState,
    actions: Sequence[Action],
    score: Callable[[FloatArray], FloatArray],
    *,
    at_ms: int,
    days: int,
    below: float,
    most: int = 3,
) -> Search:
    """Plans whose last event, `days` after at_ms, is scored below the threshold; none contains another one.

    score: vectors (k, N_FEATURES) to probabilities (k,).
    """
    tried = [_scheduled(actions, counts, at_ms, days) for counts in _combinations(actions)]
    if not tried:
        return Search((), 0)
    probability = score(outcomes_of(state, [_facts(steps) for steps in tried])).tolist()
    plans: list[Plan] = []
    for steps, found in zip(tried, probability, strict=True):
        plan = Plan(steps, found)
        if found < below and not any(_within(known, plan) for known in plans):
            plans.append(plan)
            if len(plans) == most:
                break
    return Search(tuple(plans), len(tried))


def _combinations(actions: Sequence[Action]) -> Iterator[tuple[int, ...]]:
    every = [counts for counts in product(*((0, *action.counts) for action in actions)) if any(counts)]
    every.sort(key=lambda counts: (sum(n * action.effort for n, action in zip(counts, actions, strict=True)), sum(counts), counts))
    yield from every[:MOST_TRIED]


def _scheduled(actions: Sequence[Action], counts: Sequence[int], at_ms: int, days: int) -> tuple[tuple[Action, int], ...]:
    """Spread evenly, the actions taking turns; the last one at the end."""
    left = list(counts)
    turns: list[Action] = []
    while any(left):
        for i, action in enumerate(actions):
            if left[i]:
                left[i] -= 1
                turns.append(action)
    span = days * DAY_MS
    return tuple((action, at_ms + span * (i + 1) // len(turns)) for i, action in enumerate(turns))


def _facts(steps: Sequence[tuple[Action, int]]) -> IntArray:
    rows = np.stack([action.fact for action, _ in steps])
    rows[:, TIME] = [time for _, time in steps]
    rows[:, ID] = 1 + _STEP * np.arange(1, len(steps) + 1)
    return rows


def _within(known: Plan, other: Plan) -> bool:
    counts = other.counts
    return all(counts.get(name, 0) >= number for name, number in known.counts.items())
