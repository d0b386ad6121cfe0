"""Time-ordered splits with a gap as long as the label, so that nothing of a test row's time is known in training."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from features.window import DAY_MS
from models.labels import Label
from proto.errors import BadInput

IntArray = npt.NDArray[np.int64]

STEP_MS: Final = 15 * DAY_MS


@dataclass(frozen=True, slots=True)
class Split:
    """Where training ends and testing begins (all epoch ms).

    at: the split; first: the earliest training cut-off; end: up to where the data are complete. Training rows lie in
    [first, at - N]: the last training label closes as the first test row opens. Test rows lie in [at, end - N].
    """

    at: int
    first: int
    end: int
    label: Label
    step_ms: int = STEP_MS

    def __post_init__(self) -> None:
        if self.first > self.train_last:
            days = (self.at - self.first) / DAY_MS
            raise BadInput(
                f"split: only {days:.0f} days of data lie between the first cut-off and the split; training on a label of "
                f"{self.label.days} days needs more: choose a later split or a shorter label"
            )

    @property
    def train_last(self) -> int:
        """The last instant a training row may lie at."""
        return self.at - self.label.horizon_ms

    @property
    def test_last(self) -> int:
        """The last instant whose label is complete."""
        return self.end - self.label.horizon_ms

    def train_cutoffs(self) -> list[int]:
        """Training snapshots: the last one as late as allowed, then back step by step; in time order."""
        return list(range(self.train_last, self.first - 1, -self.step_ms))[::-1]

    def test_cutoffs(self) -> list[int]:
        """Test snapshots from the split on; empty while no label after it is complete."""
        return list(range(self.at, self.test_last + 1, self.step_ms))

    def folds(self, at: IntArray, held_out_ms: int, back: int = 0) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Training rows again parted by time, with the same gap: (early rows to fit, late rows to choose and calibrate on).

        held_out_ms: how long the late part is; back: how many such parts lie after it and are left out. Rows in the gap are in neither.
        """
        late_to = self.train_last - back * held_out_ms
        late_from = late_to - held_out_ms
        # The parts of a chain share no instant: only the last one has its end.
        until = at <= late_to if back == 0 else at < late_to
        return at <= late_from - self.label.horizon_ms, (at >= late_from) & until
