"""A forest as compiled code: the probabilities of ONNX Runtime, to the bit, in a fifth of its time.

Every row takes as many steps as the tree is deep, whatever it meets on the way: a leaf leads to itself, so there is no branch the
processor could guess wrong, and the steps of several rows overlap. Leaves are added in float32 in the order of the trees and the
logistic function is written as ONNX Runtime has it. Whether the bits are the same is not taken for granted: `agrees` compares them
when a model is loaded, and a scorer whose trees do not agree asks the runtime.
"""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.compiled import kernel
from models.graph import Forest
from models.session import Session

Vectors = npt.NDArray[np.float32]

ROWS: Final = 32
"""Rows that go through all trees together: with 106 features their values fill the nearest cache; a multiple of 4."""
TRIED: Final = 2_048
"""Random rows of `agrees`."""


@kernel("void(float32[:, ::1], uint64[::1], int64[::1], uint32[::1], float32[::1], uint32[::1], float32[::1], float32, float32[::1])")
def _probabilities(
    vectors: Any, root: Any, depth: Any, column: Any, value: Any, yes: Any, weight: Any, base: Any, probability: Any
) -> None:
    n, features = vectors.shape
    # Behind each row once more with -inf for NaN: what a node sees that sends missing values to `yes`.
    rows = np.empty((ROWS, 2 * features), np.float32)
    margin = np.empty(ROWS, np.float32)
    one, none = np.float32(1), np.float32(0)
    for first in range(0, n, ROWS):
        count = min(ROWS, n - first)
        for r in range(count):
            for f in range(features):
                x = vectors[first + r, f]
                rows[r, f] = x
                rows[r, features + f] = np.float32(-np.inf) if np.isnan(x) else x
        margin[:] = none
        for t in range(root.shape[0]):
            start, steps = root[t], depth[t]
            for r in range(0, count, 4):
                i, j, k, m = start, start, start, start
                for _ in range(steps):
                    # Unsigned, so that no index has to be looked at for being negative.
                    i = np.uint64(yes[i]) + np.uint64(not rows[r, column[i]] < value[i])
                    j = np.uint64(yes[j]) + np.uint64(not rows[r + 1, column[j]] < value[j])
                    k = np.uint64(yes[k]) + np.uint64(not rows[r + 2, column[k]] < value[k])
                    m = np.uint64(yes[m]) + np.uint64(not rows[r + 3, column[m]] < value[m])
                margin[r] += weight[i]
                margin[r + 1] += weight[j]
                margin[r + 2] += weight[k]
                margin[r + 3] += weight[m]
        for r in range(count):
            x = margin[r] + base
            risen = one / (one + np.float32(math.exp(-abs(x))))
            probability[first + r] = one - risen if x < none else risen


class Trees:
    """A forest laid out for the walk; about 16 bytes per node."""

    def __init__(self, forest: Forest, n_features: int) -> None:
        order, depth = siblings_together(forest)
        place = np.empty(forest.n_nodes, np.int64)
        place[order] = np.arange(forest.n_nodes)
        feature = forest.feature[order]
        leaf = feature < 0
        self._n_features = n_features
        self._root, self._depth = place[forest.root].astype(np.uint64), depth
        self._column = np.where(leaf, 0, feature + n_features * forest.missing_yes[order]).astype(np.uint32)
        # Nothing is below -inf: a leaf goes to the place behind `yes`, which is its own.
        self._value = np.where(leaf, np.float32(-np.inf), forest.value[order])
        self._yes = np.where(leaf, np.maximum(np.arange(forest.n_nodes) - 1, 0), place[forest.yes[order]]).astype(np.uint32)
        self._weight = forest.weight[order]
        self._base = np.float32(forest.base)

    def probabilities(self, vectors: Vectors) -> Vectors:
        """Probability of churn of each vector, float32 of shape (k,), for float32 vectors of shape (k, n_features)."""
        if vectors.shape[1] != self._n_features:
            raise ValueError(f"vectors have {vectors.shape[1]} columns, the model {self._n_features}")
        probability = np.empty(len(vectors), np.float32)
        _probabilities(
            np.ascontiguousarray(vectors, np.float32),
            self._root,
            self._depth,
            self._column,
            self._value,
            self._yes,
            self._weight,
            self._base,
            probability,
        )
        return probability

    def agrees(self, session: Session, golden: Vectors) -> bool:
        """Whether golden rows and rows made to be difficult score as the runtime does, to the bit."""
        tried = np.concatenate([golden, self._difficult()])
        return bool(np.array_equal(self.probabilities(tried).view(np.uint32), session.probabilities(tried).view(np.uint32)))

    def _difficult(self) -> Vectors:
        """Rows of thresholds as they are and their neighbours, zeros of both signs, the infinities and NaN, shape (TRIED, n_features)."""
        random = np.random.default_rng(0)
        rows = random.normal(0, 100, (TRIED, self._n_features)).astype(np.float32)
        for feature in range(self._n_features):
            edges = self._value[(self._column % self._n_features == feature) & np.isfinite(self._value)]
            with np.errstate(over="ignore"):  # beyond the largest number lies infinity, and it is tried too
                beside = [np.nextafter(edges, np.float32(-np.inf)), np.nextafter(edges, np.float32(np.inf))]
            values = np.concatenate([edges, *beside, _SPECIAL])
            known = random.random(TRIED) < 0.9
            rows[known, feature] = random.choice(values, TRIED)[known]
        return rows


_SPECIAL: Final = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.nan, 1e-40, 1e30], np.float32)


def siblings_together(forest: Forest) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions in a new order, tree after tree, where the two children of a branch stand side by side, `yes` first; depth of each tree."""
    order: list[int] = []
    depth: list[int] = []
    feature, yes, no = forest.feature.tolist(), forest.yes.tolist(), forest.no.tolist()
    for start in forest.root.tolist():
        level, levels = [start], -1
        order.append(start)
        while level:
            level = [child for node in level if feature[node] >= 0 for child in (yes[node], no[node])]
            order.extend(level)
            levels += 1
        depth.append(levels)
    return np.array(order, np.int64), np.array(depth, np.int64)
