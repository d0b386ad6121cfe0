"""What a customer's features would be if further events happened: appended to the stored history, through the same kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.catalog import N_FEATURES
from features.facts import NONE, OFFSET, TIME
from features.history import Histories, Outcome
from features.store import CustomerState

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

FIRST_OFFSET = 2**48
"""Of events that are in no topic: behind all that are."""
_ONE = ("customer",)


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Vectors (N_FEATURES,) without and with the events, at one instant; what became of each event, in the order given."""

    at_ms: int
    before: FloatArray
    after: FloatArray
    outcomes: tuple[Outcome, ...]


def what_if(state: CustomerState | None, facts: IntArray, at_ms: int) -> WhatIf:
    """Append events to a stored customer (None: one without facts). facts: (n, WIDTH), their offsets are replaced.

    They are handled in the order of their times. Both vectors are taken at `at_ms`, or at the newest event time when that is later.
    """
    histories = _loaded(state)
    order = np.argsort(facts[:, TIME], kind="stable")
    events = facts[order]
    events[:, OFFSET] = FIRST_OFFSET + np.arange(len(events))
    newest = max([int(histories.newest_ms(_ONE)[0]), *events[:, TIME].tolist()])
    at = max(at_ms, newest)
    before = histories.vectors_at(_ONE, at)[0]
    outcome = histories.step(_ONE * len(events), events).outcome
    after = histories.vectors_at(_ONE, at)[0]
    placed = np.empty(len(events), np.uint8)
    placed[order] = outcome
    return WhatIf(at, before, after, tuple(Outcome(code) for code in placed.tolist()))


def outcomes_of(state: CustomerState | None, plans: Sequence[IntArray]) -> FloatArray:
    """The vector of each plan's last event, as the stream would score it, shape (plans, N_FEATURES). plans: facts (n, WIDTH) each.

    Raises ValueError when the last event of a plan would not be scored.
    """
    vectors = np.empty((len(plans), N_FEATURES), np.float32)
    for row, facts in enumerate(plans):
        histories = _loaded(state)
        events = facts[np.argsort(facts[:, TIME], kind="stable")]
        events[:, OFFSET] = FIRST_OFFSET + np.arange(len(events))
        stepped = histories.step(_ONE * len(events), events)
        if not len(stepped.rows) or int(stepped.rows[-1]) != len(events) - 1:
            raise ValueError(f"the last event of a plan is not scored: {Outcome(int(stepped.outcome[-1])).name.lower()}")
        vectors[row] = stepped.vectors[-1]
    return vectors


def newest_ms(state: CustomerState | None) -> int:
    """Newest event time of a stored customer, NONE without facts."""
    return NONE if state is None else int(_loaded(state).newest_ms(_ONE)[0])


def _loaded(state: CustomerState | None) -> Histories:
    histories = Histories()
    histories.load(_ONE, [state])
    return histories
