"""What any model could reach: an oracle that sees the hidden state of the simulated process; the table of required and reached figures."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xgboost
from pydantic import JsonValue

from models import calibrate, evaluate, gates
from proto.errors import ArtifactRejected

Floats = npt.NDArray[np.float64]

NEAR: Final = 0.03
"""How far below the oracle a figure may lie where the oracle itself does not reach what is required."""
_PARAMETERS: Final[dict[str, Any]] = {
    "objective": "binary:logistic",
    "tree_method": "hist",
    "nthread": 1,
    "seed": 0,
    "eta": 0.05,
    "max_depth": 5,
    "min_child_weight": 5,
    "subsample": 0.8,
}


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one stretch of time: hidden state (n, columns), labels (n,)."""

    hidden: npt.NDArray[np.float32]
    y: npt.NDArray[np.int8]


def oracle(early: Part, late: Part, test: Part) -> tuple[Floats, Floats]:
    """Calibrated probabilities of the late and the test rows by one who knows the hidden state, and has learnt what follows from it.

    Fitted on the early rows, stopped and calibrated on the late ones: as much of the future as a model is given, no noise still to come.
    """
    data = [xgboost.DMatrix(part.hidden, label=part.y) for part in (early, late, test)]
    booster = xgboost.train(
        {**_PARAMETERS, "eval_metric": "logloss"}, data[0], 400, evals=[(data[1], "late")], early_stopping_rounds=25, verbose_eval=False
    )
    until = (0, booster.best_iteration + 1)
    margins = [np.asarray(booster.predict(d, output_margin=True, iteration_range=until), np.float64) for d in data[1:]]
    platt = calibrate.fit(margins[0], late.y)
    return platt.probabilities(margins[0]), platt.probabilities(margins[1])


@dataclass(frozen=True, slots=True)
class Row:
    """One gate: what is required, what the model reached on the test rows, what the oracle reached (None = nobody knows)."""

    gate: str
    required: float
    reached: float
    attainable: float | None
    at_most: bool = False  # the figure must lie below, not above

    @property
    def met(self) -> bool:
        """Whether the requirement itself is met."""
        return self.reached <= self.required if self.at_most else self.reached > self.required

    @property
    def unattainable(self) -> bool:
        """Whether the oracle does not meet it either: no model can be asked for it, only for being near the oracle."""
        return self.attainable is not None and not self.at_most and not self.attainable > self.required

    @property
    def passed(self) -> bool:
        """Met, or as good as can be."""
        return self.met or (self.unattainable and self.attainable is not None and self.reached >= self.attainable - NEAR)

    def as_dict(self) -> dict[str, JsonValue]:
        """JSON types."""
        return {
            "gate": self.gate,
            "required": self.required,
            "reached": round(self.reached, 4),
            "attainable": None if self.attainable is None else round(self.attainable, 4),
            "met": self.met,
            "unattainable": self.unattainable,
            "passed": self.passed,
        }


def figures(y: npt.NDArray[np.integer], score: Floats, contact: float, high: float) -> dict[str, float]:
    """The figures the gates ask for, of labels and scores (n,), at a contact and a high-risk threshold."""
    hits, called = float(np.sum(y[score >= contact])), float(np.sum(score >= contact))
    precision, recall = hits / called if called else 0.0, hits / max(float(y.sum()), 1.0)
    in_high = score >= high
    return {
        "auc": evaluate.auc(y, score),
        "precision_high": float(y[in_high].mean()) if in_high.any() else 0.0,
        "precision_contact": precision,
        "recall_contact": recall,
        "f1_contact": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "calibration_error": evaluate.calibration_error(y, score),
    }


REQUIRED: Final = {
    "auc": 0.85,
    "precision_high": gates.HIGH_PRECISION,
    "precision_contact": gates.CONTACT_PRECISION,
    "recall_contact": 0.80,
    "f1_contact": 0.82,
    "calibration_error": 0.02,
}
"""Of a named label and base rate; the last one at most."""


def table(reached: dict[str, float], attainable: dict[str, float] | None, required: dict[str, float] = REQUIRED) -> list[Row]:
    """All gates of figures, in the order they are required."""
    known = attainable or {}
    return [Row(name, bound, reached[name], known.get(name), at_most=name == "calibration_error") for name, bound in required.items()]


def chosen(y: npt.NDArray[np.integer], score: Floats) -> tuple[float, float]:
    """Contact and high-risk threshold for the required precisions, chosen on one slice of time to hold on the next."""
    contact = evaluate.threshold_for(y, score, gates.CONTACT_PRECISION + gates.MARGIN)
    return contact, max(evaluate.threshold_for(y, score, gates.HIGH_PRECISION + gates.MARGIN), contact)


def check_not_above(auc: float, oracle_auc: float, distance: float) -> None:
    """Raises ArtifactRejected when a model is better than one who knows the hidden process: it has seen what it must not."""
    if auc > oracle_auc + distance:
        raise ArtifactRejected(f"model gate: AUC {auc:.4f} is above the {oracle_auc:.4f} of the oracle: look for the leak")
