"""Facts in merge order to labelled rows, through the same histories and the same kernel as live scoring.

Each row is a vector as it was known then: an event's row is what scoring it gave; a snapshot at T is taken when the merged stream
first passes T, and evaluated at T. What arrived later, late facts included, is not in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import numpy as np
import numpy.typing as npt

from features.catalog import N_FEATURES
from features.facts import NONE, TIME
from features.history import Histories, Outcome
from models.labels import Label, Purchases, is_purchase

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

EVENT: Final = 0
SNAPSHOT: Final = 1
CHURNED, STAYED, UNKNOWN = 1, 0, -1

MAX_EVENTS_AT_ONCE: Final = 20_000
"""Facts per call of the kernel: bounds the vectors held at once to 10 MB."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Labelled rows, n of them, in the order they were taken.

    x: float32 (n, N_FEATURES). y: int8, 1 churned, 0 stayed, -1 not mature. at: epoch ms. customer: position in `names`.
    kind: uint8, EVENT or SNAPSHOT. known_to_ms: newest event time in the data, up to which labels are complete.
    """

    x: FloatArray
    y: npt.NDArray[np.int8]
    at: IntArray
    customer: IntArray
    kind: npt.NDArray[np.uint8]
    names: tuple[str, ...]
    known_to_ms: int

    def __len__(self) -> int:
        return len(self.y)

    def where(self, keep: BoolArray) -> "Rows":
        """The rows of a mask (n,)."""
        return Rows(self.x[keep], self.y[keep], self.at[keep], self.customer[keep], self.kind[keep], self.names, self.known_to_ms)

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
) -> Rows:
    """The rows of one partition's facts (n, WIDTH), given in merge order; rejected records are left out beforehand.

    snapshots: instants at which every active customer gives a row, in any order. events: (first, last) between which the event
    instants of active customers give rows too; None = none. known_to_ms: up to when the data are complete, for labels; None = the
    newest event time here. Rows whose label is not mature get y = -1.
    """
    numbers, names = _number(customers)
    bought = is_purchase(facts)
    moving = np.maximum.accumulate(facts[:, TIME]) if len(facts) else facts[:, TIME]
    known_to = (int(moving[-1]) if len(facts) else 0) if known_to_ms is None else known_to_ms

    histories = Histories(create=True, max_facts=2**40)
    newest_purchase = np.full(len(names), NONE, np.int64)  # of each customer, as known at the position reached
    taken = np.zeros(len(facts), np.bool_)
    vectors: list[FloatArray] = []
    at: list[IntArray] = []
    owner: list[IntArray] = []
    kind: list[npt.NDArray[np.uint8]] = []

    def add(x: FloatArray, when: IntArray, who: IntArray, what: int) -> None:
        vectors.append(x)
        at.append(when)
        owner.append(who)
        kind.append(np.full(len(who), what, np.uint8))

    def handle(start: int, stop: int) -> None:
        step = histories.step(customers[start:stop], facts[start:stop])
        taken[start:stop] = step.outcome == Outcome.SCORED
        who, buys = numbers[start:stop], bought[start:stop] & taken[start:stop]
        known = _running_newest(who, np.where(buys, facts[start:stop, TIME], NONE), newest_purchase)
        rows = step.rows
        if events is not None and len(rows):
            when = step.at[rows]
            keep = (when >= events[0]) & (when <= events[1]) & label.active(known[rows], when)
            add(step.vectors[keep], when[keep], who[rows][keep], EVENT)

    def snapshot(instant: int) -> None:
        who = np.flatnonzero(label.active(newest_purchase, instant))
        if len(who):
            add(histories.vectors_at([names[i] for i in who], instant), np.full(len(who), instant), who, SNAPSHOT)

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

    when = np.concatenate(at) if at else np.empty(0, np.int64)
    who = np.concatenate(owner) if owner else np.empty(0, np.int64)
    # Labels look ahead on purpose, so they use every purchase that was taken in, whenever it arrived.
    churned = Purchases(numbers[taken], facts[taken]).churned(who, when, label)
    y = np.where(label.mature(when, known_to), churned, UNKNOWN).astype(np.int8)
    x = np.concatenate(vectors) if vectors else np.empty((0, N_FEATURES), np.float32)
    return Rows(x, y, when, who, np.concatenate(kind) if kind else np.empty(0, np.uint8), tuple(names), known_to)


def _number(customers: Sequence[str]) -> tuple[IntArray, list[str]]:
    """Customers numbered in order of appearance, and their names by number."""
    known: dict[str, int] = {}
    numbers = np.fromiter((known.setdefault(name, len(known)) for name in customers), np.int64, len(customers))
    return numbers, list(known)


def _running_newest(who: IntArray, bought_at: IntArray, newest: IntArray) -> IntArray:
    """Newest purchase of each row's customer up to and including that row; `newest` (by customer) is moved on."""
    known = np.empty(len(who), np.int64)
    for row, (customer, time) in enumerate(zip(who.tolist(), bought_at.tolist(), strict=True)):
        newest[customer] = max(newest[customer], time)
        known[row] = newest[customer]
    return known
