"""Forests put together: scaled, joined, and grown from scikit-learn trees or from a scorecard; every one fits the graph we run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.calibrate import Platt
from models.graph import Forest

Floats = npt.NDArray[np.float64]
LOWEST: Final = np.float32(-3.4028235e38)
"""No value lies below: a node that asks for less than this sends on nothing but what is missing."""


@dataclass(frozen=True, slots=True)
class Grown:
    """A forest, and of each node the training weight that passed it, float64 (nodes,)."""

    forest: Forest
    cover: Floats


def scaled(grown: Grown, platt: Platt) -> Grown:
    """The forest whose margin is a * margin + b: leaves and base in float64, rounded once."""
    forest = grown.forest
    weight = (forest.weight.astype(np.float64) * platt.a).astype(np.float32)
    base = float(np.float32(platt.a * forest.base + platt.b))
    return Grown(
        Forest(forest.root, forest.feature, forest.value, forest.yes, forest.no, forest.missing_yes, weight, base),
        grown.cover,
    )


def joined(parts: Sequence[Grown]) -> Grown:
    """All trees of several forests as one: its margin is the sum of theirs."""
    shift = np.cumsum([0, *(part.forest.n_nodes for part in parts)])[:-1].tolist()

    def moved(name: str) -> npt.NDArray[np.int32]:
        values = [np.where(getattr(p.forest, name) < 0, -1, getattr(p.forest, name) + s) for p, s in zip(parts, shift, strict=True)]
        return np.concatenate(values).astype(np.int32)

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part.forest, name) for part in parts])

    forest = Forest(
        root=moved("root"),
        feature=column("feature"),
        value=column("value"),
        yes=moved("yes"),
        no=moved("no"),
        missing_yes=column("missing_yes"),
        weight=column("weight"),
        base=float(np.float32(sum(part.forest.base for part in parts))),
    )
    return Grown(forest, np.concatenate([part.cover for part in parts]))


class Nodes:
    """Trees written node by node, parents before children."""

    def __init__(self) -> None:
        self._roots: list[int] = []
        self._rows: list[list[float]] = []  # feature, value, yes, no, missing_yes, weight, cover

    def root(self) -> None:
        """The next node begins a tree."""
        self._roots.append(len(self._rows))

    def leaf(self, weight: float, cover: float) -> int:
        """A leaf; returns its position."""
        self._rows.append([-1, 0, -1, -1, 0, weight, cover])
        return len(self._rows) - 1

    def branch(self, feature: int, value: float, missing_yes: bool, cover: float) -> int:
        """A node that asks whether the feature is below a value; `children` follow."""
        self._rows.append([feature, value, -1, -1, missing_yes, 0, cover])
        return len(self._rows) - 1

    def children(self, node: int, yes: int, no: int) -> None:
        """Where a branch leads."""
        self._rows[node][2:4] = yes, no

    def grown(self, base: float) -> Grown:
        """The forest."""
        rows = np.array(self._rows)
        forest = Forest(
            root=np.array(self._roots, np.int32),
            feature=rows[:, 0].astype(np.int32),
            value=rows[:, 1].astype(np.float32),
            yes=rows[:, 2].astype(np.int32),
            no=rows[:, 3].astype(np.int32),
            missing_yes=rows[:, 4] > 0,
            weight=rows[:, 5].astype(np.float32),
            base=float(np.float32(base)),
        )
        return Grown(forest, rows[:, 6].copy())


def of_sklearn(trees: Sequence[Any], leaves: Sequence[Floats], columns: npt.NDArray[np.intp]) -> Grown:
    """Trees of scikit-learn (estimators with `tree_`), each leaf with the weight in leaves[tree][node].

    They ask x <= t in float64 of a float32 x, we ask x < v: the same when v is the next float32 after the largest one that is <= t.
    """
    nodes = Nodes()
    for estimator, weight in zip(trees, leaves, strict=True):
        tree = estimator.tree_
        below = tree.threshold.astype(np.float32)
        below = np.where(below.astype(np.float64) > tree.threshold, np.nextafter(below, np.float32(-np.inf)), below)
        # Infinite where only missing values are sent the other way.
        value = np.clip(np.nextafter(below, np.float32(np.inf)), LOWEST, -LOWEST)
        cover = tree.weighted_n_node_samples
        nodes.root()
        # Parents first, from a stack of (their node, ours to be told).
        stack: list[tuple[int, int, bool]] = [(0, -1, True)]
        pending: dict[int, list[int]] = {}
        while stack:
            theirs, parent, is_yes = stack.pop()
            left, right = int(tree.children_left[theirs]), int(tree.children_right[theirs])
            if left < 0:
                ours = nodes.leaf(float(weight[theirs]), float(cover[theirs]))
            else:
                feature = int(columns[tree.feature[theirs]])
                ours = nodes.branch(feature, float(value[theirs]), bool(tree.missing_go_to_left[theirs]), float(cover[theirs]))
                stack += [(right, ours, False), (left, ours, True)]
            if parent >= 0:
                known = pending.setdefault(parent, [-1, -1])
                known[0 if is_yes else 1] = ours
                if min(known) >= 0:
                    nodes.children(parent, *pending.pop(parent))
    return nodes.grown(0.0)


def of_scorecard(
    edges: Sequence[npt.NDArray[np.float32]], points: Sequence[Floats], counts: Sequence[Floats], columns: npt.NDArray[np.intp], base: float
) -> Grown:
    """One small tree per feature: bin k holds edges[k - 1] <= x < edges[k] and adds points[k]; the last entry is for a missing value."""
    nodes = Nodes()

    def bins(column: int, edge: npt.NDArray[np.float32], value: Floats, count: Floats, first: int, last: int) -> int:
        if first == last:
            return nodes.leaf(float(value[first]), float(count[first]))
        middle = (first + last) // 2
        node = nodes.branch(column, float(edge[middle]), False, float(count[first : last + 1].sum()))
        yes = bins(column, edge, value, count, first, middle)
        nodes.children(node, yes, bins(column, edge, value, count, middle + 1, last))
        return node

    for edge, value, count, column in zip(edges, points, counts, columns.tolist(), strict=True):
        nodes.root()
        top = nodes.branch(column, float(LOWEST), True, float(count.sum()))
        missing = nodes.leaf(float(value[-1]), float(count[-1]))
        nodes.children(top, missing, bins(column, edge, value, count, 0, len(edge)))
    return nodes.grown(base)
