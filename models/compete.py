"""Learners compared on later and later slices of the training time, always with a gap; the best that can be served is the champion."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from models import calibrate, evaluate, trees
from models.calibrate import Platt
from models.dataset import SNAPSHOT, Rows
from models.learners import Columns, Fitted, Learner, Vectors
from models.split import Split
from models.trees import Grown
from proto.errors import BadInput

Floats = npt.NDArray[np.float64]

ENSEMBLE_FAMILIES: Final = 2


@dataclass(frozen=True, slots=True)
class Contender:
    """A learner, or several together, after the comparison.

    aucs: per slice, on its snapshots; margins: of each slice's late rows by the model of the rows before its gap; whole: fits on all
    training rows.
    """

    name: str
    family: str
    servable: bool
    aucs: tuple[float, ...]
    margins: tuple[Floats, ...]
    whole: Callable[[], Fitted]
    seconds: float

    @property
    def auc(self) -> float:
        """Mean over the slices."""
        return float(np.mean(self.aucs))

    @property
    def late(self) -> Floats:
        """Margins of the last slice's rows."""
        return self.margins[-1]


@dataclass(frozen=True, slots=True)
class Slice:
    """One step of the chain: rows to fit on, and later rows to judge and calibrate by."""

    early: Rows
    late: Rows

    def auc(self, margin: Floats) -> float:
        """Of margins (n,) of the late rows, on the snapshots among them."""
        snapshot = self.late.kind == SNAPSHOT
        return evaluate.auc(self.late.y[snapshot], margin[snapshot])


def slices(training: Rows, split: Split, held_out_ms: int, folds: int) -> list[Slice]:
    """The chain, in time order; steps without both classes are left out, but the last. Raises BadInput when the last lacks one."""
    found = []
    for back in reversed(range(folds)):
        early_at, late_at = split.folds(training.at, held_out_ms, back=back)
        early, late = training.where(early_at), training.where(late_at)
        parts = (("early", early), ("late", late.where(late.kind == SNAPSHOT)))
        poor = [(name, part) for name, part in parts if len(np.unique(part.y)) < 2]
        if not poor:
            found.append(Slice(early, late))
        elif back == 0:
            name, part = poor[0]
            raise BadInput(
                f"training: {len(part)} labelled rows in the {name} part, both churned and stayed customers are needed; "
                "move the split on, or shorten the label"
            )
    return found


def compete(chain: Sequence[Slice], training: Rows, columns: Columns, learners: Sequence[Learner], *, ensembles: bool) -> list[Contender]:
    """Every learner over the chain; with `ensembles` also the average and the stack of the best servable learner of each family."""
    margins: dict[str, list[Floats]] = {}
    found = []
    for learner in learners:
        begin = time.process_time()
        margins[learner.name] = [learner.fit(part.early, columns).margin(part.late.x) for part in chain]
        found.append(
            Contender(
                name=learner.name,
                family=learner.family,
                servable=learner.servable,
                aucs=tuple(part.auc(margin) for part, margin in zip(chain, margins[learner.name], strict=True)),
                margins=tuple(margins[learner.name]),
                whole=lambda learner=learner: learner.fit(training, columns),  # type: ignore[misc]  # bound now, not at the call
                seconds=time.process_time() - begin,
            )
        )
    best: dict[str, Contender] = {}
    for contender in found:
        if contender.servable and (contender.family not in best or contender.auc > best[contender.family].auc):
            best[contender.family] = contender
    members = list(best.values())
    if ensembles and len(members) >= ENSEMBLE_FAMILIES:
        own = [[margins[member.name][i] for member in members] for i in range(len(chain))]
        found.append(_together("average", members, chain, own, _average))
        if len(chain) > 1:
            found.append(_together("stack", members, chain, own, _stack))
    return found


Weigh = Callable[[list[tuple[list[Floats], Any]]], tuple[Floats, float]]


def _together(name: str, members: list[Contender], chain: Sequence[Slice], own: list[list[Floats]], weigh: Weigh) -> Contender:
    """Members as one. A slice is judged with weights from the other slices (from itself when there is no other)."""
    begin = time.process_time()
    seen = [(margins, part.late.y) for margins, part in zip(own, chain, strict=True)]
    aucs, lates = [], []
    for i, part in enumerate(chain):
        weights, bias = weigh([entry for j, entry in enumerate(seen) if j != i] or seen)
        lates.append(np.column_stack(own[i]) @ weights + bias)
        aucs.append(part.auc(lates[-1]))
    weights, bias = weigh(seen)

    def whole() -> Fitted:
        return _combined([member.whole() for member in members], [member.name for member in members], weights, bias)

    return Contender(name, "ensemble", True, tuple(aucs), tuple(lates), whole, time.process_time() - begin)


def _average(seen: list[tuple[list[Floats], Any]]) -> tuple[Floats, float]:
    """The mean of the members' calibrated log-odds, as one weight per member and a constant."""
    labels = np.concatenate([y for _, y in seen])
    platts = [calibrate.fit(np.concatenate(margins), labels) for margins in zip(*(margins for margins, _ in seen), strict=True)]
    return np.array([platt.a for platt in platts]) / len(platts), float(np.mean([platt.b for platt in platts]))


def _stack(seen: list[tuple[list[Floats], Any]]) -> tuple[Floats, float]:
    """A logistic regression on the members' margins."""
    design = np.concatenate([np.column_stack(margins) for margins, _ in seen])
    model = LogisticRegression(C=1.0).fit(design, np.concatenate([y for _, y in seen]))
    return np.asarray(model.coef_[0], np.float64), float(model.intercept_[0])


def _combined(fitted: Sequence[Fitted], names: Sequence[str], weights: Floats, bias: float) -> Fitted:
    def margin(x: Vectors) -> Floats:
        return np.asarray(sum(weight * one.margin(x) for weight, one in zip(weights, fitted, strict=True)) + bias, np.float64)

    grown = [one.grown for one in fitted if one.grown is not None]
    parts: list[Grown] = [trees.scaled(one, Platt(float(weight), 0.0)) for weight, one in zip(weights, grown, strict=True)]
    together = trees.scaled(trees.joined(parts), Platt(1.0, bias))
    return Fitted(margin, together, {"members": dict(zip(names, weights.tolist(), strict=True))})
