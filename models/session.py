"""A checked ONNX graph opened for inference, so that a row's probability never depends on the rows beside it.

One thread, one operator at a time, and every batch padded to a multiple of 16 rows: the runtime's kernels treat the last rows of an
odd batch, and the slices of several threads, in another order of additions.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime

from models.graph import INPUT, OUTPUT
from proto.errors import ArtifactRejected

Vectors = npt.NDArray[np.float32]

ROWS: Final = 16
GOLDEN_TOLERANCE: Final = 1e-6
"""Between machines: the C library's exp may differ in the last bit, the sums of leaves do not."""
BATCHES: Final = (1, 2, 3, 7, 16, 50, 513, 1000)
"""Batch sizes the gate tries."""


class Session:
    """Probabilities of a graph that `models.graph.read` has accepted. Loaded from bytes, so no file can be referred to.

    Raises ArtifactRejected when the runtime refuses the graph.
    """

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime has no common class for "cannot load"
            raise ArtifactRejected(f"ONNX Runtime {onnxruntime.__version__} does not load the graph: {error}") from error

    def probabilities(self, vectors: Vectors) -> Vectors:
        """Probability of churn of each vector, float32 of shape (k,), for float32 vectors of shape (k, n_features)."""
        rows = len(vectors)
        if rows == 0:
            return np.empty(0, np.float32)
        short = -rows % ROWS
        if short:
            padded = np.zeros((rows + short, vectors.shape[1]), np.float32)
            padded[:rows] = vectors
            vectors = padded
        (scores,) = self._session.run([OUTPUT], {INPUT: np.ascontiguousarray(vectors)})
        return np.asarray(scores[:rows], np.float32)

    def batch_dependent_rows(self, vectors: Vectors) -> int:
        """Rows whose bits differ between any two batch sizes of BATCHES; a model in service has none."""
        reference = self.probabilities(vectors).view(np.uint32)
        differs = np.zeros(len(vectors), np.bool_)
        for size in BATCHES:
            parts = [self.probabilities(vectors[start : start + size]) for start in range(0, len(vectors), size)]
            differs |= np.concatenate(parts).view(np.uint32) != reference
        return int(differs.sum())

    def prove(self, golden: Vectors, expected: Vectors) -> Vectors:
        """Probabilities of the golden rows (k, n_features), which scored `expected` (k,) at the trainer.

        Raises ArtifactRejected when one is no probability, is another one, or depends on the size of its batch.
        """
        found = self.probabilities(golden)
        if not np.all((found >= 0) & (found <= 1)):
            raise ArtifactRejected("model refused: a golden row scores what is no probability")
        apart = float(np.max(np.abs(found - expected)))
        if not apart <= GOLDEN_TOLERANCE:
            raise ArtifactRejected(f"model refused: golden rows score {apart:.1e} apart from the trainer's")
        if dependent := self.batch_dependent_rows(golden):
            raise ArtifactRejected(f"model refused: {dependent} golden rows depend on the size of their batch")
        return found
