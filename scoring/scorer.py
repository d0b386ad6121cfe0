"""Vectors to probabilities: a published model, checked again on this machine before its first score."""

import logging
from typing import Final

import numpy as np
import numpy.typing as npt

from models.artifact import Artifact, unpack
from models.session import Session, Vectors
from proto.errors import ArtifactRejected
from scoring.bands import LOW, UNKNOWN, bands
from scoring.reasons import Money, Reason, Reasons
from scoring.trees import Trees

log = logging.getLogger(__name__)


class Scorer:
    """One model in service. Scores are a function of the vector alone, whatever batch it comes in.

    Raises ArtifactRejected when the golden rows do not score as they did at the trainer, or depend on the batch.
    """

    fallback: Final = False

    def __init__(self, artifact: Artifact, *, money: Money | None = None) -> None:
        manifest = artifact.manifest
        self.manifest = manifest
        self.digest = artifact.digest
        self.name = manifest.name
        self.version = manifest.version
        self.layout_hash = manifest.layout_hash
        self.threshold_version = manifest.thresholds.version
        self.edges = (manifest.thresholds.medium, manifest.thresholds.high)
        self._thresholds = manifest.thresholds
        self._session = Session(artifact.onnx)
        self._reasons = Reasons(artifact, money=money)
        self.reasons_method = self._reasons.method
        self._prove(artifact)
        trees = Trees(artifact.forest, artifact.tables.golden.shape[1])
        self._evaluator: Session | Trees = trees
        if not trees.agrees(self._session, artifact.tables.golden):
            log.warning("model %s: compiled trees are not ONNX Runtime's to the bit on this machine, so it scores itself", self.digest[:12])
            self._evaluator = self._session

    def _prove(self, artifact: Artifact) -> None:
        expected = artifact.tables.golden_probability
        found = self._session.prove(artifact.tables.golden, expected)
        if np.any(bands(found, self._thresholds) != bands(expected, self._thresholds)):
            raise ArtifactRejected(f"model {self.digest[:12]} refused: a golden row falls in another band than at the trainer's")

    def score(self, vectors: Vectors) -> Vectors:
        """Calibrated probability of churn, float32 of shape (k,), for float32 vectors of shape (k, N_FEATURES).

        NaN where the model fails on a vector: an error of the runtime, or no probability. The other rows are not touched by it.
        """
        try:
            probability = self._evaluator.probabilities(vectors)
        except Exception as error:  # the runtime has no common class
            log.error("model %s failed on a batch of %d, tried row by row: %s", self.digest[:12], len(vectors), error)
            probability = np.array([self._one(vectors[i : i + 1]) for i in range(len(vectors))], np.float32)
        sound = (probability >= 0) & (probability <= 1)
        return probability if sound.all() else np.where(sound, probability, np.float32(np.nan))

    def _one(self, vector: Vectors) -> float:
        try:
            return float(self._evaluator.probabilities(vector)[0])
        except Exception as error:  # as above
            log.error("model %s failed on a vector: %s", self.digest[:12], error)
            return np.nan

    def bands(self, probability: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        """Band codes (scoring.bands.Band), uint8 of shape (k,)."""
        return bands(probability, self._thresholds)

    def reasons(self, vectors: Vectors, band: npt.NDArray[np.uint8], former: npt.NDArray[np.uint8], top: int = 3) -> list[bytes]:
        """Per score its `top` reasons as JSON, strongest first; b"[]" where the band is low and has not moved.

        former: the band each score replaces, UNKNOWN when there was none. Nothing else is explained, since nobody acts on it;
        nor is a score of band UNKNOWN, which no model gave.
        """
        moved = (band != former) & (former != UNKNOWN)
        wanted = np.flatnonzero((band != UNKNOWN) & ((band != LOW) | moved))
        found = [b"[]"] * len(vectors)
        for row, reasons in zip(wanted.tolist(), self._reasons.written(vectors[wanted], top), strict=True):
            found[row] = reasons
        return found

    def explain(self, vectors: Vectors, top: int = 3) -> list[list[Reason]]:
        """The `top` reasons of each vector whatever its band, strongest first; fewer where fewer features moved the score."""
        return self._reasons.top(vectors, top)


def load(envelope: bytes, *, digest: str | None = None, money: Money | None = None) -> Scorer:
    """A published envelope as a model ready to score, every check passed. Raises ArtifactRejected."""
    return Scorer(unpack(envelope, digest=digest), money=money)
