"""What "churned" means: no purchase in the next N days, asked of customers with a purchase in the last M days."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from features.catalog import PURCHASE
from features.facts import KIND, KINDS, NONE, TIME
from features.window import DAY_MS

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

PURCHASE_CODES: Final = np.array([KINDS[kind] for kind in PURCHASE], np.int64)
_FAR: Final = 2**44
"""Beyond every event time (the year 2527): customer * _FAR + time sorts by customer, then time."""


@dataclass(frozen=True, slots=True)
class Label:
    """The question put to the model.

    churned = no purchase in (at, at + days]; population = a purchase in (at - active_days, at]. A label is mature when the whole of
    (at, at + days] is known; before that nobody is called churned or stayed.
    """

    days: int = 90
    active_days: int = 180

    def __post_init__(self) -> None:
        if self.days <= 0 or self.active_days <= 0:
            raise ValueError(f"label and activity need positive days, got {self.days} and {self.active_days}")

    @property
    def name(self) -> str:
        """The definition in one word; another definition has another name."""
        return f"no-purchase-{self.days}d/active-{self.active_days}d/1"

    @property
    def horizon_ms(self) -> int:
        """Length of the time the label looks at."""
        return self.days * DAY_MS

    @property
    def active_ms(self) -> int:
        """Length of the time in which a purchase makes a customer active."""
        return self.active_days * DAY_MS

    def active(self, newest_purchase: IntArray, at: IntArray | int) -> BoolArray:
        """Whether the newest purchase known then (NONE = never) lies in (at - M, at]; shape of the inputs."""
        known = newest_purchase != NONE
        inside: BoolArray = known & (np.where(known, newest_purchase, 0) > np.asarray(at) - self.active_ms) & (newest_purchase <= at)
        return inside

    def mature(self, at: IntArray, known_to_ms: int) -> BoolArray:
        """Whether the label's whole time is over at `known_to_ms`."""
        return at + self.horizon_ms <= known_to_ms


def is_purchase(facts: IntArray) -> BoolArray:
    """Which facts (n, WIDTH) are purchases, by the catalog's own list."""
    return np.isin(facts[:, KIND], PURCHASE_CODES)


class Purchases:
    """Purchase times by customer, to ask whether one follows. Built from customer numbers (n,) and facts (n, WIDTH)."""

    def __init__(self, customer: IntArray, facts: IntArray) -> None:
        bought = is_purchase(facts)
        self._keys = np.sort(customer[bought] * _FAR + facts[bought, TIME])

    def churned(self, customer: IntArray, at: IntArray, label: Label) -> BoolArray:
        """Whether no purchase lies in (at, at + N]; shape of the inputs."""
        base = customer * _FAR + at
        after = np.searchsorted(self._keys, base, side="right")
        until = np.searchsorted(self._keys, base + label.horizon_ms, side="right")
        none: BoolArray = until == after
        return none

    def active(self, customer: IntArray, at: IntArray, label: Label) -> BoolArray:
        """Whether a purchase lies in (at - M, at], by all that is known now; shape of the inputs."""
        base = customer * _FAR + at
        some: BoolArray = np.searchsorted(self._keys, base, side="right") > np.searchsorted(
            self._keys, base - label.active_ms, side="right"
        )
        return some
