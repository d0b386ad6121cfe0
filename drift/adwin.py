"""A change detector for a bounded stream: River's ADWIN over block means."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from river.drift import ADWIN

BLOCK: Final = 256
"""Values of one mean. ADWIN assumes independent values; scores of neighbouring events are not (busy customers, hours of the
day), and fed one by one they alarm every few thousand events. Means of blocks are nearly independent and cost 1/256."""
DELTA: Final = 0.002
"""Bound on the false-alarm probability of one test, River's default."""


@dataclass(slots=True)
class BlockAdwin:
    """Watches values in [0, 1]; remembers the values that do not fill a block yet."""

    block: int = BLOCK
    delta: float = DELTA
    _adwin: ADWIN = field(init=False)
    _rest: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"a block needs at least one value, got {self.block}")
        self._adwin = ADWIN(delta=self.delta, clock=1)
        self._rest = np.empty(0)

    def update(self, values: npt.NDArray[np.floating]) -> int:
        """Add values, shape (n,), each in [0, 1]; returns how many changes were detected. Raises ValueError outside the range."""
        if len(values) and not (values.min() >= 0 and values.max() <= 1):  # also false for NaN
            raise ValueError("ADWIN over block means needs values between 0 and 1")
        waiting = np.concatenate([self._rest, values.astype(np.float64)])
        full = len(waiting) // self.block * self.block
        self._rest = waiting[full:]
        detected = 0
        for mean in waiting[:full].reshape(-1, self.block).mean(axis=1):
            self._adwin.update(float(mean))
            detected += bool(self._adwin.drift_detected)
        return detected

    @property
    def mean(self) -> float:
        """Mean of the window ADWIN considers current; 0.0 before the first full block."""
        return float(self._adwin.estimation)
