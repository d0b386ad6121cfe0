"""Exact Shapley values of a forest, fast enough for the stream: a coalition's size becomes a variable, and the mean over it an integral.

Path-dependent TreeSHAP: a condition on a feature that is not in the coalition is answered by the share of the training weight that went
that way. Let every feature be in it with chance z. What a leaf contributes to a feature is then the integral over z from 0 to 1 of the
product of what all other features on its path say, a polynomial of a degree below their number, so that a few points of Gauss and
Legendre give it exactly. At one point a tree is walked once up (what is expected below a node) and once down (the chance to get there),
each step a product; nothing is tabulated per pattern, and sixteen rows go side by side (features/lanes.py).

A feature asked twice on a path is one player. Its second node then multiplies by what both say over what the first said, and adds the
difference of their contributions; where the row does not meet the first condition the second says its share and adds nothing.
Source: Lundberg et al. (2020), From local explanations to global understanding with explainable AI for trees; XGBoost's `pred_contribs`.
The variable in place of the coalition's size: Owen (1972), Multilinear extensions of games.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.compiled import kernel, types
from features.lanes import LANES, add_wide, everywhere, invert, less, load, mask, pick, select, splat, store
from models.graph import Forest

FloatArray = npt.NDArray[np.float32]

MOST_POINTS: Final = 8
"""Exact for paths of up to twice as many different features; a forest with longer ones is left to Saabas."""
ROWS: Final = 128
"""Rows that go through all trees together, a multiple of LANES: their values stay in the second cache, the trees are read as often."""
_UNIT: Final = 14
"""Numbers of a unit per point: what its left and right child say (held yes, held no, not held), its own yes and no, then the factors
of the contributions of the three, each for yes and no."""


_COLUMNS, _PRIOR = types.float32[:, ::1], (types.int64[::1], types.float32[::1], types.uint8[::1])


@kernel(mask(_COLUMNS, types.int64, types.int64[::1], types.int64, *_PRIOR))
def _holds(columns: Any, c: int, prior: Any, i: int, column: Any, edge: Any, want: Any) -> Any:
    """Which rows from c on meet every earlier condition on the feature of node i."""
    held = everywhere()
    for z in range(prior[i], prior[i + 1]):
        met = less(load(columns, column[z], c), edge[z])
        held = held & (met if want[z] else invert(met))
    return held


@cache
def _walk(points: int) -> Callable[..., None]:
    """The walk for so many points: a loop whose length is known costs a third less. Compiled the first time, then found on disk."""

    @kernel(
        "void(float32[:, ::1], int64[::1], int64[::1], int64[::1], float32[::1], int64[::1], int64[::1], int64[::1], uint8[::1],"
        "int64[::1], float32[:, ::1], int64[:, ::1], float32[:, ::1], int64[:, ::1], uint8[::1], int64[::1], float32[:, ::1], int64[::1],"
        "float32[::1], uint8[::1], float32[::1], float32[:, ::1], float32[:, ::1], float64[:, ::1])"
    )
    def add(
        columns: Any,
        tree_upper: Any,
        tree_unit: Any,
        upper_column: Any,
        upper_edge: Any,
        upper_feature: Any,
        upper_yes: Any,
        upper_no: Any,
        upper_plain: Any,
        upper_prior: Any,
        upper_step: Any,
        unit_column: Any,
        unit_edge: Any,
        unit_feature: Any,
        unit_plain: Any,
        unit_prior: Any,
        unit_step: Any,
        prior_column: Any,
        prior_edge: Any,
        prior_want: Any,
        point_weight: Any,
        below: Any,
        gain: Any,
        sums: Any,
    ) -> None:
        # below: what is expected under each node; on the way down the chance (times the point's weight) to get there. gain: what is
        # expected under `yes` less that under `no`. Shape (nodes of a tree, points * LANES) both.
        nothing = splat(np.float32(0))
        for t in range(tree_upper.shape[0] - 1):
            u0, uppers = tree_upper[t], tree_upper[t + 1] - tree_upper[t]
            n0, units = tree_unit[t], tree_unit[t + 1] - tree_unit[t]
            for c in range(0, columns.shape[1], LANES):
                for k in range(units):
                    i, slot = n0 + k, uppers + k
                    b1 = less(load(columns, unit_column[i, 0], c), unit_edge[i, 0])
                    b2 = less(load(columns, unit_column[i, 1], c), unit_edge[i, 1])
                    b3 = less(load(columns, unit_column[i, 2], c), unit_edge[i, 2])
                    if unit_plain[i]:
                        for q in range(points):
                            o = q * _UNIT
                            s2 = pick(b2, unit_step[i, o], unit_step[i, o + 1])
                            s3 = pick(b3, unit_step[i, o + 3], unit_step[i, o + 4])
                            d = s2 - s3
                            store(gain, slot, q * LANES, d)
                            store(below, slot, q * LANES, s3 + pick(b1, unit_step[i, o + 6], unit_step[i, o + 7]) * d)
                    else:
                        h1 = _holds(columns, c, unit_prior, 3 * i, prior_column, prior_edge, prior_want)
                        h2 = _holds(columns, c, unit_prior, 3 * i + 1, prior_column, prior_edge, prior_want)
                        h3 = _holds(columns, c, unit_prior, 3 * i + 2, prior_column, prior_edge, prior_want)
                        share = splat(unit_step[i, points * _UNIT])
                        for q in range(points):
                            o = q * _UNIT
                            s2 = select(h2, pick(b2, unit_step[i, o], unit_step[i, o + 1]), splat(unit_step[i, o + 2]))
                            s3 = select(h3, pick(b3, unit_step[i, o + 3], unit_step[i, o + 4]), splat(unit_step[i, o + 5]))
                            d = s2 - s3
                            store(gain, slot, q * LANES, d)
                            told = select(h1, pick(b1, unit_step[i, o + 6], unit_step[i, o + 7]), share)
                            store(below, slot, q * LANES, s3 + told * d)
                for j in range(uppers - 1, -1, -1):
                    i = u0 + j
                    yes, no = upper_yes[i], upper_no[i]
                    b = less(load(columns, upper_column[i], c), upper_edge[i])
                    if upper_plain[i]:
                        for q in range(points):
                            s = load(below, no, q * LANES)
                            d = load(below, yes, q * LANES) - s
                            store(gain, j, q * LANES, d)
                            store(below, j, q * LANES, s + pick(b, upper_step[i, 4 * q], upper_step[i, 4 * q + 1]) * d)
                    else:
                        h = _holds(columns, c, upper_prior, i, prior_column, prior_edge, prior_want)
                        share = splat(upper_step[i, 4 * points])
                        for q in range(points):
                            s = load(below, no, q * LANES)
                            d = load(below, yes, q * LANES) - s
                            store(gain, j, q * LANES, d)
                            told = select(h, pick(b, upper_step[i, 4 * q], upper_step[i, 4 * q + 1]), share)
                            store(below, j, q * LANES, s + told * d)
                for q in range(points):
                    store(below, 0, q * LANES, splat(point_weight[q]))
                for j in range(uppers):
                    i = u0 + j
                    yes, no = upper_yes[i], upper_no[i]
                    b = less(load(columns, upper_column[i], c), upper_edge[i])
                    total = nothing
                    if upper_plain[i]:
                        for q in range(points):
                            p = load(below, j, q * LANES)
                            total = total + p * load(gain, j, q * LANES)
                            w = p * pick(b, upper_step[i, 4 * q], upper_step[i, 4 * q + 1])
                            store(below, yes, q * LANES, w)
                            store(below, no, q * LANES, p - w)
                        total = total * pick(b, upper_step[i, 2], upper_step[i, 3])
                    else:
                        h = _holds(columns, c, upper_prior, i, prior_column, prior_edge, prior_want)
                        share = splat(upper_step[i, 4 * points])
                        for q in range(points):
                            p = load(below, j, q * LANES)
                            total = total + p * load(gain, j, q * LANES) * pick(b, upper_step[i, 4 * q + 2], upper_step[i, 4 * q + 3])
                            w = p * select(h, pick(b, upper_step[i, 4 * q], upper_step[i, 4 * q + 1]), share)
                            store(below, yes, q * LANES, w)
                            store(below, no, q * LANES, p - w)
                        total = select(h, total, nothing)
                    add_wide(sums, upper_feature[i], c, total)
                for k in range(units):
                    i, slot = n0 + k, uppers + k
                    b1 = less(load(columns, unit_column[i, 0], c), unit_edge[i, 0])
                    b2 = less(load(columns, unit_column[i, 1], c), unit_edge[i, 1])
                    b3 = less(load(columns, unit_column[i, 2], c), unit_edge[i, 2])
                    a1, a2, a3 = nothing, nothing, nothing
                    if unit_plain[i]:
                        for q in range(points):
                            o = q * _UNIT
                            p = load(below, slot, q * LANES)
                            a1 = a1 + p * load(gain, slot, q * LANES)
                            a2 = a2 + p * pick(b1, unit_step[i, o + 6], unit_step[i, o + 7])
                            a3 = a3 + p
                        a1 = a1 * pick(b1, unit_step[i, 8], unit_step[i, 9])
                        a3 = (a3 - a2) * pick(b3, unit_step[i, 12], unit_step[i, 13])
                        a2 = a2 * pick(b2, unit_step[i, 10], unit_step[i, 11])
                    else:
                        h1 = _holds(columns, c, unit_prior, 3 * i, prior_column, prior_edge, prior_want)
                        h2 = _holds(columns, c, unit_prior, 3 * i + 1, prior_column, prior_edge, prior_want)
                        h3 = _holds(columns, c, unit_prior, 3 * i + 2, prior_column, prior_edge, prior_want)
                        share = splat(unit_step[i, points * _UNIT])
                        for q in range(points):
                            o = q * _UNIT
                            p = load(below, slot, q * LANES)
                            a1 = a1 + p * load(gain, slot, q * LANES) * pick(b1, unit_step[i, o + 8], unit_step[i, o + 9])
                            w = p * select(h1, pick(b1, unit_step[i, o + 6], unit_step[i, o + 7]), share)
                            a2 = a2 + w * pick(b2, unit_step[i, o + 10], unit_step[i, o + 11])
                            a3 = a3 + (p - w) * pick(b3, unit_step[i, o + 12], unit_step[i, o + 13])
                        a1, a2, a3 = select(h1, a1, nothing), select(h2, a2, nothing), select(h3, a3, nothing)
                    add_wide(sums, unit_feature[i, 0], c, a1)
                    add_wide(sums, unit_feature[i, 1], c, a2)
                    add_wide(sums, unit_feature[i, 2], c, a3)

    return add


for _points in (1, 2, 3, 4):
    _walk(_points)  # trees of depth 1 to 8: compiled with everything else, when the software is set up


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a node multiplies by and adds. earlier: (node, answer), 1 for yes, of the conditions on its feature further up; where a row
    does not meet them, the node says its share and adds nothing. told, credit: per point the factors of what is expected below `yes`
    and of the contribution, each (for a row that answers yes, no)."""

    earlier: list[tuple[int, int]]
    told: list[tuple[float, float]]
    credit: list[tuple[float, float]]
    share: float


@dataclass(slots=True)
class _Nodes:
    """Upper nodes, or units of three nodes, in the making."""

    column: list[Any] = field(default_factory=list)
    edge: list[Any] = field(default_factory=list)
    feature: list[Any] = field(default_factory=list)
    plain: list[bool] = field(default_factory=list)  # no feature was asked before
    prior: list[int] = field(default_factory=lambda: [0])  # where the earlier conditions of each node end
    step: list[list[float]] = field(default_factory=list)
    tree: list[int] = field(default_factory=lambda: [0])  # where each tree ends


class _Layout:
    """A forest as the walk reads it: per tree the upper nodes, parents first, then the units: what is at most two levels high."""

    def __init__(self, forest: Forest, share: npt.NDArray[np.float64], features: int) -> None:
        leaf, itself = forest.feature < 0, np.arange(forest.n_nodes)
        self._leaf: list[bool] = leaf.tolist()
        # A leaf leads to itself.
        self._children = list(zip(np.where(leaf, itself, forest.yes).tolist(), np.where(leaf, itself, forest.no).tolist(), strict=True))
        self._feature, self.edge = np.where(leaf, 0, forest.feature).tolist(), forest.value.tolist()
        # Behind all columns they are there once more with -inf for NaN: what a node sees that sends missing values to `yes`.
        self.column = np.where(leaf, 0, forest.feature + features * forest.missing_yes).tolist()
        self._weight, self._share = forest.weight.tolist(), share.tolist()
        self._height, self._earlier = _heights(forest), _earlier(forest)
        self._points, self.point_weight = _quadrature(points_of(forest))
        self.upper, self.unit = _Nodes(), _Nodes()
        self.upper_children: list[tuple[int, int]] = []
        self.prior: list[tuple[int, int]] = []
        for root in forest.root.tolist():
            self._tree(root)

    def _tree(self, root: int) -> None:
        uppers: list[int] = []
        units: list[int] = []
        waiting = [] if self._leaf[root] else [root]
        for node in waiting:
            if self._height[node] > 2:
                uppers.append(node)
                waiting += self._children[node]
            else:
                units.append(node)
        # Alike beside alike, so that the processor guesses right which kind comes next.
        units.sort(key=lambda node: any(self._earlier[each] for each in (node, *self._children[node])))
        slot = {node: i for i, node in enumerate([*uppers, *units])}
        for node in uppers:
            (asked,) = self._append(self.upper, node)
            yes, no = self._children[node]
            self.upper_children.append((slot[yes], slot[no]))
            self.upper.step.append([x for q in range(len(self._points)) for x in (*asked.told[q], *asked.credit[q])] + [asked.share])
        for node in units:
            children = self._children[node]
            own, *below = self._append(self.unit, node, *children)
            step: list[float] = []
            for q in range(len(self._points)):
                credits: list[float] = []
                for child, how in zip(children, below, strict=True):
                    yes, no = (self._weight[each] for each in self._children[child])
                    step += [no + told * (yes - no) for told in (*how.told[q], how.share)]
                    credits += [credit * (yes - no) for credit in how.credit[q]]
                step += [*own.told[q], *own.credit[q], *credits]
            self.unit.step.append([*step, own.share])
        for nodes in (self.upper, self.unit):
            nodes.tree.append(len(nodes.step))

    def _append(self, to: _Nodes, *nodes: int) -> list[_Asked]:
        to.column += [self.column[node] for node in nodes]
        to.edge += [self.edge[node] for node in nodes]
        to.feature += [self._feature[node] for node in nodes]
        asked = [self._ask(node) for node in nodes]
        to.plain.append(not any(how.earlier for how in asked))
        for how in asked:
            self.prior += how.earlier
            to.prior.append(len(self.prior))
        return asked

    def _ask(self, node: int) -> _Asked:
        none = [(0.0, 0.0)] * len(self._points)
        if self._leaf[node]:
            return _Asked([], none, none, 0.0)
        share, earlier = self._share[node], self._earlier[node]
        first = 1.0  # what the feature's earlier nodes say without the row
        for each, answer in earlier:
            first *= self._share[each] if answer else 1 - self._share[each]
        told, credit = [], []
        for z in self._points:
            said = z + (1 - z) * first
            no, step = (1 - z) * first * share / said, z / said
            told.append((no + step, no))
            # The contributions of all nodes so far, this one included, less what the earlier ones have added.
            rest = 1 - first
            credit.append(tuple(((held - first * share) - rest * (no + step * held)) / said for held in (1, 0)))
        return _Asked(earlier, told, credit, share)


def _heights(forest: Forest) -> list[int]:
    """Levels of conditions below and with each node."""
    height = [0] * forest.n_nodes
    yes, no = forest.yes.tolist(), forest.no.tolist()
    # Children stand behind their parent.
    for node in np.flatnonzero(forest.feature >= 0)[::-1].tolist():
        height[node] = 1 + max(height[yes[node]], height[no[node]])
    return height


def _ways(forest: Forest) -> list[list[tuple[int, int]]]:
    """(node, answer) of all conditions on the way to each node, from the root."""
    ways: list[list[tuple[int, int]]] = [[] for _ in range(forest.n_nodes)]
    yes, no = forest.yes.tolist(), forest.no.tolist()
    for node in np.flatnonzero(forest.feature >= 0).tolist():
        ways[yes[node]] = [*ways[node], (node, 1)]
        ways[no[node]] = [*ways[node], (node, 0)]
    return ways


def _earlier(forest: Forest) -> list[list[tuple[int, int]]]:
    """Of each node the conditions on the way to it that ask the same feature; nothing of a leaf."""
    feature = forest.feature.tolist()
    return [[(each, answer) for each, answer in way if feature[each] == feature[node]] for node, way in enumerate(_ways(forest))]


def points_of(forest: Forest) -> int:
    """Points at which the integrals are exact: half the different features of the path that has most, rounded up."""
    feature = forest.feature.tolist()
    most = max((len({feature[each] for each, _ in way}) for way in _ways(forest)), default=0)
    return max(1, (most + 1) // 2)


def _quadrature(points: int) -> tuple[list[float], FloatArray]:
    """Points and weights of Gauss and Legendre on [0, 1]."""
    at, weight = np.polynomial.legendre.leggauss(points)
    return ((at + 1) / 2).tolist(), (weight / 2).astype(np.float32)


def _aligned(rows: int, width: int) -> FloatArray:
    """Zeros of shape (rows, width), each row of LANES at a border of the cache when the width is a multiple of them."""
    found = np.zeros(4 * rows * width + 64, np.uint8)
    start = -found.ctypes.data % 64
    return found[start : start + 4 * rows * width].view(np.float32).reshape(rows, width)


class TreeShap:
    """The walk over one forest. share: of every node the share of the training weight that goes to `yes`, float64 (nodes,).

    About 60 bytes per node and point.
    """

    def __init__(self, forest: Forest, share: npt.NDArray[np.float64], n_features: int) -> None:
        layout = _Layout(forest, share, n_features)
        upper, unit = layout.upper, layout.unit
        points = len(layout.point_weight)
        wide, narrow = np.int64, np.float32
        children = np.array(layout.upper_children, wide).reshape(-1, 2)
        prior = [node for node, _ in layout.prior]
        self._n_features, self._walk = n_features, _walk(points)
        self._forest = (
            np.array(upper.tree, wide),
            np.array(unit.tree, wide),
            np.array(upper.column, wide),
            np.array(upper.edge, narrow),
            np.array(upper.feature, wide),
            np.ascontiguousarray(children[:, 0]),
            np.ascontiguousarray(children[:, 1]),
            np.array(upper.plain, np.uint8),
            np.array(upper.prior, wide),
            np.array(upper.step, narrow).reshape(-1, 4 * points + 1),
            np.array(unit.column, wide).reshape(-1, 3),
            np.array(unit.edge, narrow).reshape(-1, 3),
            np.array(unit.feature, wide).reshape(-1, 3),
            np.array(unit.plain, np.uint8),
            np.array(unit.prior, wide),
            np.array(unit.step, narrow).reshape(-1, _UNIT * points + 1),
            np.array([layout.column[node] for node in prior], wide),
            np.array([layout.edge[node] for node in prior], narrow),
            np.array([answer for _, answer in layout.prior], np.uint8),
            layout.point_weight,
        )
        self._scratch = int((np.diff(upper.tree) + np.diff(unit.tree)).max()), points * LANES

    def contributions(self, vectors: FloatArray) -> npt.NDArray[np.float64]:
        """Contribution of each feature to the margin in log-odds, float64 of the vectors' shape (k, features)."""
        rows, features = vectors.shape
        if features != self._n_features:
            raise ValueError(f"vectors have {features} columns, the model {self._n_features}")
        found = np.empty((rows, features))
        below, gain = _aligned(*self._scratch), _aligned(*self._scratch)
        for first in range(0, rows, ROWS):
            block = vectors[first : first + ROWS].T
            width = -(-block.shape[1] // LANES) * LANES
            columns = _aligned(2 * features, width)
            columns[:features, : block.shape[1]] = block
            columns[features:, : block.shape[1]] = np.where(np.isnan(block), -np.inf, block)
            sums = np.zeros((features, width))
            self._walk(columns, *self._forest, below, gain, sums)
            found[first : first + ROWS] = sums[:, : block.shape[1]].T
        return found
