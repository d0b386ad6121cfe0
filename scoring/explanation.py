"""A model that also explains completely: what every feature adds to the margin, in business words."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Final

import numpy as np
import numpy.typing as npt

from features.catalog import CATALOG
from models.artifact import unpack
from models.session import Vectors
from scoring.reasons import Money
from scoring.scorer import Scorer
from scoring.wording import DECIMALS

NAMES: Final = tuple(feature.name for feature in CATALOG)


@dataclass(frozen=True, slots=True)
class Part:
    """What one feature adds to the margin in log-odds; value None = unknown."""

    feature: str
    value: float | None
    contribution: float
    text: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """bias + the contributions = margin, probability = 1 / (1 + exp(-margin)). parts: those not zero, strongest first."""

    bias: float
    margin: float
    parts: tuple[Part, ...]
    method: str


class ExplainingScorer(Scorer):
    """A Scorer whose contributions can be had as a whole. Scores are the Scorer's own, to the bit."""

    def complete(self, vectors: Vectors) -> list[Explanation]:
        """The whole explanation of each vector (k, N_FEATURES)."""
        found = self._reasons.contributions(vectors)
        return [self._of(vector, row) for vector, row in zip(vectors, found, strict=True)]

    def moved(self, before: Vectors, after: Vectors) -> list[Part]:
        """How much more each feature adds at `after` than at `before` (both (N_FEATURES,)), with its value and text at `after`."""
        one, other = self._reasons.contributions(np.stack([before, after]))
        return self._parts(after, other - one)

    def text(self, feature: int, value: float) -> str:
        """How a value of a feature (catalog position) reads."""
        return self._reasons.text(feature, value)

    def _of(self, vector: Vectors, row: npt.NDArray[np.float64]) -> Explanation:
        bias = self._reasons.bias
        return Explanation(bias, bias + float(row.sum()), tuple(self._parts(vector, row)), self.reasons_method)

    def _parts(self, vector: Vectors, row: npt.NDArray[np.float64]) -> list[Part]:
        order = np.argsort(-np.abs(row), kind="stable")
        return [self._part(i, float(vector[i]), float(row[i])) for i in order.tolist() if round(row[i], DECIMALS + 3)]

    def _part(self, feature: int, value: float, contribution: float) -> Part:
        return Part(NAMES[feature], None if isnan(value) else value, contribution, self._reasons.text(feature, value))


def load(envelope: bytes, *, money: Money | None = None) -> ExplainingScorer:
    """A published envelope as a model that scores and explains, every check passed. Raises ArtifactRejected."""
    return ExplainingScorer(unpack(envelope), money=money)
