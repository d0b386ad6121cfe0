"""From facts to scores: into the histories, vectors, probabilities, bands, reasons. The one way, live and in every replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.facts import KIND, OFFSET
from features.history import Histories, Outcome
from proto.errors import Reason
from scoring.bands import floors
from streams.merge import Batch
from streams.scores import Model, Scored, dead_letter_record, judged

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
Part = Callable[[str], AbstractContextManager[Any]]
"""Where the time of a named part of the work is counted."""

REJECTED: Final = 7
"""What became of a record that was no fact, beyond the kernel's outcomes (features.history.Outcome)."""
CRASHED: Final = "a worker ended each time it handled this record"
"""What the dead letter of a record that was given up says."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a score depends on besides vector and model. fallback: where the model fails; reasons_top: reasons of a score;
    hysteresis: how far below a threshold (probability) the lower band is alerted."""

    fallback: Model
    reasons_top: int
    hysteresis: float


def _uncounted(_: str) -> AbstractContextManager[None]:
    return nullcontext()


def evaluate(
    histories: Histories, model: Model, rules: Rules, customers: Sequence[str], facts: IntArray, part: Part = _uncounted
) -> tuple[ByteArray, Scored]:
    """Take n facts in, in this order; outcomes (n,), and the scores of those that have one. `rows` are positions among these facts."""
    with part("kernel"):
        step = histories.step(customers, facts)
    rows = step.rows
    scored = customers if len(rows) == len(customers) else [customers[i] for i in rows.tolist()]
    those = facts if len(rows) == len(facts) else facts[rows]
    sources = those[:, KIND] >> 3, those[:, OFFSET]
    return step.outcome, score(histories, model, rules, scored, rows, step.at[rows], step.late[rows], step.vectors, sources, part)


def score(
    histories: Histories,
    model: Model,
    rules: Rules,
    customers: Sequence[str],
    rows: IntArray,
    at: IntArray,
    late: npt.NDArray[np.bool_],
    vectors: FloatArray,
    sources: tuple[IntArray, IntArray],
    part: Part = _uncounted,
) -> Scored:
    """Judge k vectors of these customers (in this order, all aligned) and remember each score as its customer's last.

    sources: what each score is made for, index into features.facts.SOURCES and offset.
    """
    with part("onnx"):
        probability, band = judged(model, rules.fallback, vectors)
        noted = histories.note_scores(customers, probability, band, at, *sources, floors(model.edges, rules.hysteresis))
    with part("reasons"):
        reasons = model.reasons(vectors, band, noted.former, rules.reasons_top) if rules.reasons_top else [b"[]"] * len(vectors)
    former = noted.former_source, noted.former_offset
    return Scored(rows, customers, at, late, vectors, probability, band, noted.former_alert, noted.alert, *former, reasons)


def set_aside(batch: Batch, outcome: ByteArray) -> list[tuple[Reason, dict[str, Any]]]:
    """The dead letters of a batch with their reasons, in its order. outcome: of each record, shape (n,)."""
    reasons = batch.reason.copy()
    reasons[outcome == Outcome.TOO_LATE] = Reason.TOO_LATE
    reasons[outcome == Outcome.AMOUNT_RANGE] = Reason.AMOUNT_RANGE
    rows = np.flatnonzero(reasons).tolist()
    if not rows:
        return []
    cuts = batch.cuts()[rows].tolist()
    return [(why, dead_letter_record(batch, i, why, cut)) for i, cut in zip(rows, cuts, strict=True) for why in [Reason(int(reasons[i]))]]
