"""Facts in merge order to labelled rows, through the same histories and the same kernel as live scoring.

Each row is a vector as it was known then: an event's row is what scoring it gave; a snapshot at T is taken when the merged stream
first passes T, and evaluated at T. What arrived later, late facts included, is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.catalog import N_FEATURES
from features.facts import KIND, NONE, OFFSET, PROFILE, TIME, A, B, C, D
from features.history import Histories, Outcome
from models.labels import UNKNOWN, Label, Outcomes, contract_ends, of_kinds

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

EVENT: Final = 0
SNAPSHOT: Final = 1
PROFILE_COLUMNS: Final = (A, B, C, D)
"""Fact columns of a profile: plan, segment, region, age band, as digests of their texts."""

MAX_EVENTS_AT_ONCE: Final = 20_000
"""Facts per call of the kernel: bounds the vectors held at once to 10 MB."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Labelled rows, n of them, in the order they were taken.

    x: float32 (n, N_FEATURES). y: int8, 1 churned, 0 stayed, -1 not mature. at: epoch ms. customer: position in `names`.
    kind: uint8, EVENT or SNAPSHOT. profile: int64 (n, 4), digests of plan, segment, region and age band as known then (0 = unknown): for
    reports by group, never for the model. known_to_ms: newest event time in the data, up to which labels are complete.
    """

    x: FloatArray
    y: npt.NDArray[np.int8]
    at: IntArray
    customer: IntArray
    kind: npt.NDArray[np.uint8]
    profile: IntArray
    names: tuple[str, ...]
    known_to_ms: int

    def __len__(self) -> int:
        return len(self.y)

    def where(self, keep: BoolArray) -> "Rows":
        """The rows of a mask (n,)."""
        return replace(
            self,
            x=self.x[keep],
            y=self.y[keep],
            at=self.at[keep],
            customer=self.customer[keep],
            kind=self.kind[keep],
            profile=self.profile[keep],
        )

    def digest(self) -> str:
        """sha256 of everything a model sees of these rows: vectors, labels, instants."""
        digest = sha256()
        for part in (self.x, self.y, self.at):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows of several partitions as one; a customer lives in one partition only."""
    names: list[str] = []
    customers = []
    for part in parts:
        customers.append(part.customer + len(names))
        names.extend(part.names)
    return Rows(
        np.concatenate([part.x for part in parts]) if parts else np.empty((0, N_FEATURES), np.float32),
        np.concatenate([part.y for part in parts]) if parts else np.empty(0, np.int8),
        np.concatenate([part.at for part in parts]) if parts else np.empty(0, np.int64),
        np.concatenate(customers) if parts else np.empty(0, np.int64),
        np.concatenate([part.kind for part in parts]) if parts else np.empty(0, np.uint8),
        np.concatenate([part.profile for part in parts]) if parts else np.empty((0, len(PROFILE_COLUMNS)), np.int64),
        tuple(names),
        max((part.known_to_ms for part in parts), default=0),
    )


def build(
    customers: Sequence[str],
    facts: IntArray,
    label: Label,
    snapshots: Sequence[int],
    *,
    events: tuple[int, int] | None = None,
    known_to_ms: int | None = None,
    corrected: bool = False,
) -> Rows:
    """The rows of one partition's facts (n, WIDTH), given in merge order; rejected records are left out beforehand.

    snapshots: instants at which every customer of the label's population gives a row, in any order. events: (first, last) between which
    the event instants of that population give rows too; None = none. known_to_ms: up to when the data are complete, for labels; None =
    the newest event time here. corrected: as if every fact had arrived when it happened, which live scoring never sees. Rows whose label
    is not mature, or came in its gap, get y = -1.
    """
    if corrected:
        order = np.lexsort((facts[:, OFFSET], facts[:, KIND] >> 3, facts[:, TIME]))
        customers, facts = [customers[i] for i in order.tolist()], facts[order]
    numbers, names = _number(customers)
    moving = np.maximum.accumulate(facts[:, TIME]) if len(facts) else facts[:, TIME]
    known_to = (int(moving[-1]) if len(facts) else 0) if known_to_ms is None else known_to_ms

    histories = Histories(create=True, max_facts=2**40)
    known = _Known(len(names), facts, label)
    taken = np.zeros(len(facts), np.bool_)
    found: list[_Taken] = []

    def handle(start: int, stop: int) -> None:
        step = histories.step(customers[start:stop], facts[start:stop])
        good = (step.outcome == Outcome.SCORED) | (step.outcome == Outcome.PROFILE)
        taken[start:stop] = good
        who, rows = numbers[start:stop], step.rows
        if events is None:
            known.add(start, stop, who, good)
            return
        then = known.running(start, stop, who, good)
        if len(rows):
            when = step.at[rows]
            keep = (when >= events[0]) & (when <= events[1]) & label.asked(then[0, rows], then[1, rows], then[2, rows], when)
            chosen = rows[keep]
            found.append(_Taken(step.vectors[keep], when[keep], who[chosen], EVENT, then[2, chosen], then[3:, chosen].T))

    def snapshot(instant: int) -> None:
        who = np.flatnonzero(label.asked(known.newest, known.ended, known.contract, instant))
        if len(who):
            x = histories.vectors_at([names[i] for i in who], instant)
            found.append(_Taken(x, np.full(len(who), instant), who, SNAPSHOT, known.contract[who], known.profile[who]))

    position = 0
    for instant in sorted(set(snapshots)):
        # The first fact beyond the instant; those at the instant itself still count, as in every window (t - W, t].
        passed = int(np.searchsorted(moving, instant, side="right"))
        for start in range(position, passed, MAX_EVENTS_AT_ONCE):
            handle(start, min(start + MAX_EVENTS_AT_ONCE, passed))
        position = max(position, passed)
        snapshot(instant)
    for start in range(position, len(facts), MAX_EVENTS_AT_ONCE):
        handle(start, min(start + MAX_EVENTS_AT_ONCE, len(facts)))

    def column(name: str, empty: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in found]) if found else empty

    none = np.empty(0, np.int64)
    when, who = column("at", none), column("customer", none)
    # Labels look ahead on purpose, so they use every event that was taken in, whenever it arrived.
    outcomes = Outcomes(numbers[taken], facts[taken], label)
    churned = outcomes.churned(who, when, column("contract", none))
    answered = label.mature(when, known_to) & ~outcomes.too_soon(who, when)
    return Rows(
        x=column("x", np.empty((0, N_FEATURES), np.float32)),
        y=np.where(answered, churned, UNKNOWN).astype(np.int8),
        at=when,
        customer=who,
        kind=np.repeat(np.array([part.kind for part in found], np.uint8), [len(part.at) for part in found]),
        profile=column("profile", np.empty((0, len(PROFILE_COLUMNS)), np.int64)),
        names=tuple(names),
        known_to_ms=known_to,
    )


@dataclass(frozen=True, slots=True)
class _Taken:
    """Rows of one instant or batch."""

    x: FloatArray
    at: IntArray
    customer: IntArray
    kind: int
    contract: IntArray
    profile: IntArray


class _Known:
    """What is known of each customer at the position reached, beside the features: whether the label asks about them, and their profile."""

    def __init__(self, customers: int, facts: IntArray, label: Label) -> None:
        self._time = facts[:, TIME]
        self._activity = np.where(of_kinds(facts, label.active_by), self._time, NONE)
        self._ending = np.where(of_kinds(facts, label.unless), self._time, NONE)
        self._contract = contract_ends(facts)
        self._facts = facts
        self._is_profile = facts[:, KIND] == PROFILE
        self.newest = np.full(customers, NONE, np.int64)
        self.ended = np.full(customers, NONE, np.int64)
        self.contract = np.full(customers, NONE, np.int64)
        self.profile = np.zeros((customers, len(PROFILE_COLUMNS)), np.int64)
        self._profile_at = np.full(customers, NONE, np.int64)

    def add(self, start: int, stop: int, who: IntArray, good: BoolArray) -> None:
        """Take in the facts of a batch that were taken in by the histories."""
        np.maximum.at(self.newest, who[good], self._activity[start:stop][good])
        np.maximum.at(self.ended, who[good], self._ending[start:stop][good])
        for i in np.flatnonzero(good & self._is_profile[start:stop]).tolist():
            self._read_profile(start + i, int(who[i]))

    def running(self, start: int, stop: int, who: IntArray, good: BoolArray) -> IntArray:
        """As `add`; returns (7, n): newest activity, newest ending, contract and profile of each row's customer, that row included."""
        then = np.empty((3 + len(PROFILE_COLUMNS), len(who)), np.int64)
        activity, ending = self._activity[start:stop].tolist(), self._ending[start:stop].tolist()
        profiles = self._is_profile[start:stop].tolist()
        for row, (customer, usable) in enumerate(zip(who.tolist(), good.tolist(), strict=True)):
            if usable:
                self.newest[customer] = max(self.newest[customer], activity[row])
                self.ended[customer] = max(self.ended[customer], ending[row])
                if profiles[row]:
                    self._read_profile(start + row, customer)
            then[0, row], then[1, row], then[2, row] = self.newest[customer], self.ended[customer], self.contract[customer]
        # A profile changes rarely: those at the end of the batch will do, since they only name the groups of a report.
        then[3:] = self.profile[who].T
        return then

    def _read_profile(self, position: int, customer: int) -> None:
        # The newest by event time counts, as in the kernel.
        if self._time[position] >= self._profile_at[customer]:
            self._profile_at[customer] = self._time[position]
            self.contract[customer] = self._contract[position]
            self.profile[customer] = self._facts[position, PROFILE_COLUMNS]


def _number(customers: Sequence[str]) -> tuple[IntArray, list[str]]:
    """Customers numbered in order of appearance, and their names by number."""
    known: dict[str, int] = {}
    numbers = np.fromiter((known.setdefault(name, len(known)) for name in customers), np.int64, len(customers))
    return numbers, list(known)
