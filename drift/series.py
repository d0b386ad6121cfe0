"""What is watched: series of values, counted into the bins of their baseline, by segment and hour."""

from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from features.window import DAY_MS

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Role = Literal["score", "feature", "field", "error", "calibration"]

EDGES: Final = 10
BINS: Final = EDGES + 2
MISSING: Final = BINS - 1
"""The last bin holds what is unknown (NaN)."""
MONDAY_MS: Final = 3 * DAY_MS
"""1970-01-01 was a Thursday: slots of time are counted from a Monday, so that weeks are whole."""
ALL: Final = "all"
"""The first segment of every table: everybody."""


@dataclass(frozen=True, slots=True)
class Series:
    """One watched quantity. topic: where it comes from, "" for several; kinds: the events it is made of.

    lasting: it accumulates over a customer's life, so it moves as customers grow older; it is reported and pages nobody.
    """

    name: str
    role: Role
    topic: str = ""
    kinds: tuple[str, ...] = ()
    lasting: bool = False


def edges_of(values: npt.NDArray[np.floating]) -> Floats:
    """Edges (series, EDGES) of bins of about equal counts for values (n, series), NaN = unknown; unused edges are +inf.

    Bin i holds what lies in (edge i-1, edge i]. A value that makes up a tenth or more has an edge of its own, so the mass at 0 of a
    count is a bin. Smallest and largest value are no edges: what lies beyond them is in the outer bins.
    """
    shape = values.shape[1]
    found = np.full((shape, EDGES), np.inf)
    quantiles = np.arange(1, EDGES + 1) / (EDGES + 1)
    for i in range(shape):
        known = values[:, i][np.isfinite(values[:, i])]
        if len(known):
            cuts = np.unique(np.quantile(known, quantiles, method="lower"))
            cuts = cuts[cuts < known.max()] if cuts[0] < known.max() else cuts[:1]
            found[i, : len(cuts)] = cuts
    return found


def codes(values: npt.NDArray[np.floating], edges: Floats) -> npt.NDArray[np.uint8]:
    """Bin (n, series) of each value (n, series); NaN is MISSING."""
    found = np.empty(values.shape, np.uint8)
    for i in range(values.shape[1]):
        column = values[:, i]
        found[:, i] = np.where(np.isnan(column), MISSING, np.searchsorted(edges[i], column))
    return found


def tally(binned: npt.NDArray[np.uint8], segment: npt.NDArray[np.integer], segments: int) -> Ints:
    """Counts (series, segments + 1, BINS) of binned values (n, series); segment: 1 .. segments, 0 = of none; row 0 is everybody."""
    series = binned.shape[1]
    place = (np.arange(series) * (segments + 1))[None, :] + np.asarray(segment, np.int64)[:, None]
    flat = np.bincount((place * BINS + binned).ravel(), minlength=series * (segments + 1) * BINS)
    counts = flat.reshape(series, segments + 1, BINS).astype(np.int64)
    counts[:, 0] = counts.sum(axis=1)
    return counts


@dataclass(slots=True)
class Tally:
    """Counts per slot of time, kept until the slot is closed; slots of `slot_ms`, by the instant of the value.

    Of each customer only the first value in a slot counts: ten values of a busy one say no more about the others than one does.
    """

    edges: Floats
    segments: int
    slot_ms: int
    open: dict[int, Ints] = field(default_factory=dict)
    seen: dict[int, set[int]] = field(default_factory=dict)

    @staticmethod
    def of(edges: Floats, segments: int, slot_ms: int) -> "Tally":
        """An empty one."""
        return Tally(edges, segments, slot_ms)

    def add(
        self,
        at_ms: npt.NDArray[np.integer],
        values: npt.NDArray[np.floating],
        segment: npt.NDArray[np.integer],
        who: npt.NDArray[np.integer] | None = None,
    ) -> None:
        """Count values (n, series) at instants (n,) of segments (n,); who: numbers (n,) of the customers, None = all are different."""
        if not len(at_ms):
            return
        slot = (np.asarray(at_ms, np.int64) - MONDAY_MS) // self.slot_ms
        if who is not None:
            new = np.unique(np.column_stack([slot, who]), axis=0, return_index=True)[1]
            new = np.sort(new)
            fresh = [w not in self.seen.setdefault(s, set()) for s, w in zip(slot[new].tolist(), who[new].tolist(), strict=True)]
            new = new[np.array(fresh, np.bool_)]
            for s, w in zip(slot[new].tolist(), who[new].tolist(), strict=True):
                self.seen[s].add(w)
            slot, values, segment = slot[new], values[new], segment[new]
        binned = codes(values, self.edges)
        for one in np.unique(slot).tolist():
            which = slot == one
            counts = tally(binned[which], segment[which], self.segments)
            self.open[one] = self.open[one] + counts if one in self.open else counts

    def arrays(self) -> tuple[Ints, Ints, Ints]:
        """Numbers of the open slots, their counts, and (slot, customer) of who was counted; `restore` takes them."""
        slots = sorted(self.open)
        counts = np.array([self.open[slot] for slot in slots], np.int64)
        seen = np.array([(slot, who) for slot in sorted(self.seen) for who in sorted(self.seen[slot])], np.int64)
        return np.array(slots, np.int64), counts.reshape(len(slots), len(self.edges), self.segments + 1, BINS), seen.reshape(-1, 2)

    def restore(self, slots: Ints, counts: Ints, seen: Ints) -> None:
        """Go on where `arrays` was taken."""
        self.open = dict(zip(slots.tolist(), counts, strict=True))
        self.seen = {}
        for slot, who in seen.tolist():
            self.seen.setdefault(slot, set()).add(who)

    def close(self, before_ms: int) -> list[tuple[int, Ints]]:
        """Take out (start_ms, counts) of the slots that end at `before_ms` or earlier, in order."""
        done = sorted(slot for slot in self.open if (slot + 1) * self.slot_ms + MONDAY_MS <= before_ms)
        for slot in done:
            self.seen.pop(slot, None)
        return [(slot * self.slot_ms + MONDAY_MS, self.open.pop(slot)) for slot in done]
