"""What could be reached on the simulated population: by one who knows the hidden state, by one who sees events only; the gate table."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xgboost
from pydantic import JsonValue

from models import calibrate, evaluate, gates
from models.policy import Policy
from proto.errors import ArtifactRejected

Floats = npt.NDArray[np.float64]

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
    """Rows of one stretch of time: what is seen of them (n, columns), NaN where it is unknown; labels (n,)."""

    seen: npt.NDArray[np.float32]
    y: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class Scores:
    """Calibrated probabilities of the early, late and test rows."""

    early: Floats
    late: Floats
    test: Floats


def oracle(early: Part, late: Part, test: Part) -> Scores:
    """Scores of one who knows the hidden state, and has learnt what follows from it.

    Fitted on the early rows, stopped and calibrated on the late ones: as much of the future as a model is given, no noise still to come.
    """
    return _student(early, late, test, early.y, late.y)


def observer(early: Part, late: Part, test: Part, known: Scores) -> Scores:
    """Scores of one who sees what events tell, taught by the oracle's probabilities in place of what happened.

    An outcome is a draw from that probability, so a learner of outcomes comes to the same answer with more rows: this is where it would
    end up, not where these rows bring it.
    """
    return _student(early, late, test, known.early, known.late)


def _student(early: Part, late: Part, test: Part, taught: npt.NDArray[Any], judged: npt.NDArray[Any]) -> Scores:
    data = [xgboost.DMatrix(part.seen, label=target) for part, target in ((early, taught), (late, judged), (test, np.zeros(len(test.y))))]
    booster = xgboost.train(
        {**_PARAMETERS, "eval_metric": "logloss"}, data[0], 600, evals=[(data[1], "late")], early_stopping_rounds=25, verbose_eval=False
    )
    until = (0, booster.best_iteration + 1)
    margins = [np.asarray(booster.predict(d, output_margin=True, iteration_range=until), np.float64) for d in data]
    platt = calibrate.fit(margins[1], late.y)
    return Scores(*(platt.probabilities(margin) for margin in margins))


@dataclass(frozen=True, slots=True)
class Row:
    """One gate: what is required, and what was reached on the test rows.

    attainable, observable: what the oracle and the observer reach (None = nobody knows, as on all real data). judged: whether a failure
    stops a publication. note: what a reader has to know.
    """

    gate: str
    required: float
    reached: float
    attainable: float | None = None
    observable: float | None = None
    at_most: bool = False  # the figure must lie below, not above
    near: float = 0.03
    strict: bool = False
    judged: bool = True
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the requirement itself is met."""
        return self.reached <= self.required if self.at_most else self.reached > self.required

    @property
    def unattainable(self) -> bool:
        """Whether no reader of events meets it: the observer does not, who is taught by the hidden process itself."""
        return self.observable is not None and not self.at_most and not self.observable > self.required

    @property
    def excused(self) -> bool:
        """Not met, not attainable, and as near to what is as the policy asks."""
        return not self.met and not self.strict and self.unattainable and self.reached >= (self.observable or 0.0) - self.near

    @property
    def passed(self) -> bool:
        """Met, excused, or not judged."""
        return self.met or self.excused or not self.judged

    @property
    def verdict(self) -> str:
        """In words."""
        if self.met:
            return "met"
        if not self.unattainable:
            return "failed" if self.judged else "failed, not judged"
        known = "?" if self.attainable is None else f"{self.attainable:.3f}"
        said = f"not attainable: required {self.required:g}, oracle {known}, from events {self.observable:.3f}"
        return f"{said}; within {self.near:g} of it" if self.excused else f"{said}; strict" if self.strict else f"{said}; too far below"

    def as_dict(self) -> dict[str, JsonValue]:
        """JSON types."""
        return {
            "gate": self.gate,
            "required": self.required,
            "reached": round(self.reached, 6),
            "attainable": None if self.attainable is None else round(self.attainable, 4),
            "observable": None if self.observable is None else round(self.observable, 4),
            "at_most": self.at_most,
            "met": self.met,
            "unattainable": self.unattainable,
            "passed": self.passed,
            "judged": self.judged,
            "verdict": self.verdict,
            "note": self.note,
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


def table(
    reached: dict[str, float],
    attainable: dict[str, float] | None,
    observable: dict[str, float] | None = None,
    policy: Policy | None = None,
    *,
    judged: bool = True,
) -> list[Row]:
    """The gates on figures, in the order of the policy."""
    policy = policy or Policy()
    known, seen = attainable or {}, observable or {}
    return [
        Row(
            name,
            bound,
            reached[name],
            known.get(name),
            seen.get(name),
            at_most=name == "calibration_error",
            near=policy.near,
            strict=policy.strict,
            judged=judged,
        )
        for name, bound in policy.performance.items()
    ]


def chosen(y: npt.NDArray[np.integer], score: Floats) -> tuple[float, float]:
    """Contact and high-risk threshold for the required precisions, chosen on one slice of time to hold on the next."""
    contact = evaluate.threshold_for(y, score, gates.CONTACT_PRECISION + gates.MARGIN)
    return contact, max(evaluate.threshold_for(y, score, gates.HIGH_PRECISION + gates.MARGIN), contact)


def check_not_above(auc: float, oracle_auc: float, distance: float) -> None:
    """Raises ArtifactRejected when a model is better than one who knows the hidden process: it has seen what it must not."""
    if auc > oracle_auc + distance:
        raise ArtifactRejected(f"model gate: AUC {auc:.4f} is above the {oracle_auc:.4f} of the oracle: look for the leak")
