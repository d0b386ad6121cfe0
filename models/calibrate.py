"""Platt scaling: margins to calibrated probabilities by two numbers, folded into the leaves so that no step is added to the graph."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from proto.errors import ArtifactRejected

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Platt:
    """probability = 1 / (1 + exp(-(a * margin + b))). `a` is positive: calibration never turns the order of customers round."""

    a: float
    b: float

    def probabilities(self, margin: Floats) -> Floats:
        """Calibrated probabilities in float64, same shape."""
        return sigmoid(self.a * margin + self.b)


def sigmoid(margin: Floats) -> Floats:
    """1 / (1 + exp(-margin)) without overflow."""
    small = np.exp(-np.abs(margin))
    return np.where(margin >= 0, 1.0, small) / (1.0 + small)


def fit(margin: Floats, label: npt.NDArray[np.integer], steps: int = 100) -> Platt:
    """Maximum likelihood by Newton's method, with Platt's smoothed targets, so that separable data stay finite.

    margin: raw model output, shape (n,); label: 0 or 1, shape (n,). Rows must not be among those the model was fitted on.
    Raises ArtifactRejected when one class is missing or the margin does not rise with the label.
    Source: Platt (1999), Probabilistic outputs for support vector machines; Lin, Lin, Weng (2007).
    """
    positive = int(label.sum())
    negative = len(label) - positive
    if positive == 0 or negative == 0:
        raise ArtifactRejected(f"calibration needs both classes, got {positive} churned and {negative} stayed")
    target = np.where(label == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    design = np.column_stack([margin, np.ones_like(margin)])
    weights = np.array([1.0, 0.0])
    loss = _loss(design @ weights, target)
    for _ in range(steps):
        p = sigmoid(design @ weights)
        gradient = design.T @ (p - target)
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        # Halve the step until the likelihood does not get worse: Newton alone may overshoot far from the optimum.
        scale = 1.0
        while (moved := _loss(design @ (weights - scale * step), target)) > loss and scale > 1e-10:
            scale /= 2
        weights = weights - scale * step
        if loss - moved <= 1e-12 * abs(loss):
            break
        loss = moved
    if not weights[0] > 0:
        raise ArtifactRejected(f"calibration would turn the order of customers round (slope {weights[0]:.4f})")
    return Platt(float(weights[0]), float(weights[1]))


def _loss(margin: Floats, target: Floats) -> float:
    return float(np.sum(np.logaddexp(0.0, margin) - target * margin))
