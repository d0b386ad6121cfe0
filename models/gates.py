"""What a model must pass before it may be published; a model that fails one is not made into an artifact."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from models.session import Session
from proto.errors import ArtifactRejected

PARITY: Final = 1e-5
AUC_ALARM: Final = 0.95
CONTACT_PRECISION: Final = 0.80
HIGH_PRECISION: Final = 0.85
MARGIN: Final = 0.03
"""Added to a precision when a threshold is chosen for it on one slice, to hold on the next."""
BATCH_ROWS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Passed:
    """What the gates measured."""

    parity: float  # largest |ONNX - trainer| over all hold-out rows
    threshold_flips: int
    batch_dependent_rows: int
    rows: int

    def as_dict(self) -> dict[str, JsonValue]:
        """JSON types."""
        return {
            "onnx_parity_max": self.parity,
            "threshold_flips": self.threshold_flips,
            "batch_dependent_rows": self.batch_dependent_rows,
            "rows": self.rows,
        }


def check_scores(session: Session, x: npt.NDArray[np.float32], expected: npt.NDArray[np.float64], thresholds: tuple[float, ...]) -> Passed:
    """Compare the exported graph with the trainer's own probabilities `expected` (n,), float64, on hold-out vectors x (n, features).

    Raises ArtifactRejected for: a score that is not a probability, one score for everybody, a distance of PARITY or more, a row on
    another side of a threshold, a row whose bits depend on its batch.
    """
    found = session.probabilities(x)
    if not np.all(np.isfinite(found)) or found.min() < 0 or found.max() > 1:
        raise ArtifactRejected("model gate: the graph gives values that are not probabilities")
    if found.min() == found.max():
        raise ArtifactRejected(f"model gate: every row scores {found[0]:.4f}; the model has learnt nothing")
    parity = float(np.max(np.abs(found - expected)))
    if not parity < PARITY:
        raise ArtifactRejected(f"model gate: graph and trainer are {parity:.1e} apart, the bound is {PARITY:.0e}")
    flips = sum(int(np.sum((found >= edge) != (expected >= edge))) for edge in thresholds)
    if flips:
        raise ArtifactRejected(f"model gate: {flips} of {len(x):,} rows lie in another band than at the trainer's")
    # Taken evenly, so that all times are in it.
    sample = x[np.linspace(0, len(x) - 1, min(len(x), BATCH_ROWS)).astype(np.intp)]
    dependent = session.batch_dependent_rows(sample)
    if dependent:
        raise ArtifactRejected(f"model gate: {dependent} of {len(sample):,} rows depend on the size of their batch")
    return Passed(parity, flips, dependent, len(x))


def check_auc(auc: float, what: str, *, allow: bool = False) -> None:
    """Raises ArtifactRejected when the AUC is too good to be true (unless allowed), or not a number."""
    if np.isnan(auc):
        raise ArtifactRejected(f"model gate: no AUC on the {what} rows, one class is missing")
    if auc > AUC_ALARM and not allow:
        raise ArtifactRejected(
            f"model gate: AUC {auc:.3f} on the {what} rows is above {AUC_ALARM}: a sign that features know the label. "
            "Look for the leak; --allow-high-auc publishes all the same"
        )
