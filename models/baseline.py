"""The frozen baseline: a logistic regression on recency alone, fitted on the same rows; a model has to be worth more than this."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime
from pydantic import JsonValue
from skl2onnx import to_onnx
from sklearn.linear_model import LogisticRegression

from features.catalog import NAMES
from models.calibrate import sigmoid

FEATURE: Final = "purchase_age_days"
COLUMN: Final = NAMES.index(FEATURE)
SCALE_DAYS: Final = 90.0
"""Recency is divided by this, so that the solver sees numbers near one."""
OPSETS: Final = {"": 17, "ai.onnx.ml": 1}


@dataclass(frozen=True, slots=True)
class Baseline:
    """probability = sigmoid(slope * recency_days / SCALE_DAYS + offset).

    onnx: the same model exported; parity: the largest distance between the two seen in training.
    """

    slope: float
    offset: float
    onnx: bytes
    parity: float

    def score(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Probabilities (n,) of vectors (n, N_FEATURES); a customer who never bought counts as infinitely long silent."""
        recency = x[:, COLUMN].astype(np.float64)
        return sigmoid(self.slope * np.where(np.isnan(recency), 1e6, recency) / SCALE_DAYS + self.offset)

    def as_dict(self) -> dict[str, JsonValue]:
        """What the manifest says about it."""
        return {
            "feature": FEATURE,
            "scale_days": SCALE_DAYS,
            "slope": self.slope,
            "offset": self.offset,
            "onnx_sha256": sha256(self.onnx).hexdigest(),
            "onnx_parity": self.parity,
        }


def fit(x: npt.NDArray[np.float32], y: npt.NDArray[np.integer]) -> Baseline:
    """Fit on vectors (n, N_FEATURES) and labels (n,); rows without a purchase are left out."""
    known = ~np.isnan(x[:, COLUMN])
    recency = (x[known, COLUMN] / np.float32(SCALE_DAYS)).reshape(-1, 1)
    model = LogisticRegression(C=1e6).fit(recency, y[known])
    graph = to_onnx(model, recency[:1], options={"zipmap": False}, target_opset=OPSETS).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    exported = session.run(["probabilities"], {session.get_inputs()[0].name: recency})[0][:, 1]
    parity = float(np.max(np.abs(exported - model.predict_proba(recency)[:, 1])))
    return Baseline(float(model.coef_[0, 0]), float(model.intercept_[0]), graph, parity)
