"""Exact Shapley values of a forest, fast enough for the stream: everything that does not depend on the row is tabulated.

Path-dependent TreeSHAP: a condition on a feature that is not in the coalition is answered by the share of the training weight that went
that way. The contribution of one leaf then depends on the row only through which conditions on its path hold, and so does the
contribution of a small subtree through its own conditions and those on the way to it. For every subtree of at most HEIGHT levels and
every pattern of these conditions the contributions of all features asked there are one row of a table, computed when the model is
loaded; a score compares every node once and adds one row per subtree.
Source: Lundberg et al. (2020), From local explanations to global understanding with explainable AI for trees; XGBoost's `pred_contribs`.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.compiled import kernel
from models.graph import Forest

Ints = npt.NDArray[np.int32]

HEIGHT: Final = 2
"""Levels of conditions in one subtree. One more would halve the additions and make the tables six times as large."""
MAX_BYTES: Final = 256 << 20
"""Tables larger than this are not built; 200 trees of depth 6 take 12 MB."""
ROWS: Final = 256
"""Rows that go through all trees together: their sums and one tree's table stay in the nearer caches."""


@kernel(
    "void(int32[::1], float64[::1], int32[::1], int32[::1], int32[::1], int32[::1], int32[::1], int32[::1], float64[::1], int64[::1], "
    "int32[::1], int32[::1], float32[::1])"
)
def _tabulate(
    leaf_group: Any,
    leaf_weight: Any,
    leaf_condition: Any,
    condition_bit: Any,
    condition_want: Any,
    condition_player: Any,
    leaf_player: Any,
    player_column: Any,
    player_share: Any,
    group_table: Any,
    group_bits: Any,
    group_width: Any,
    table: Any,
) -> None:
    # A player is a distinct feature on the way to a leaf: `holds` when the row meets all its conditions, else its share speaks.
    holds = np.empty(32, np.float64)
    terms = np.empty(33, np.float64)
    weight = np.empty((33, 33), np.float64)
    for d in range(1, 33):
        # s! (d - 1 - s)! / d!
        weight[d, 0] = 1.0 / d
        for s in range(1, d):
            weight[d, s] = weight[d, s - 1] * s / (d - s)
    for leaf in range(leaf_group.shape[0]):
        group = leaf_group[leaf]
        first = leaf_player[leaf]
        d = leaf_player[leaf + 1] - first
        for pattern in range(1 << group_bits[group]):
            for k in range(d):
                holds[k] = 1.0
            for c in range(leaf_condition[leaf], leaf_condition[leaf + 1]):
                if ((pattern >> condition_bit[c]) & 1) != condition_want[c]:
                    holds[condition_player[c]] = 0.0
            row = group_table[group] + pattern * group_width[group]
            for j in range(d):
                # terms[s]: over all coalitions of s others, the product of what each other player says.
                terms[0] = 1.0
                size = 0
                for k in range(d):
                    if k != j:
                        share = player_share[first + k]
                        terms[size + 1] = 0.0
                        for s in range(size, -1, -1):
                            terms[s + 1] += terms[s] * holds[k]
                            terms[s] *= share
                        size += 1
                total = 0.0
                for s in range(d):
                    total += weight[d, s] * terms[s]
                table[row + player_column[first + j]] += leaf_weight[leaf] * total * (holds[j] - player_share[first + j])


@kernel(
    "void(float32[:, ::1], int32[::1], int32[::1], float32[::1], uint8[::1], int32[::1], int32[::1], int32[::1], int32[::1], int32[::1], "
    "int64[::1], float32[::1], uint8[:, ::1], uint32[::1], float64[:, ::1])"
)
def _add(
    columns: Any,
    tree_node: Any,
    node_feature: Any,
    node_value: Any,
    node_missing_yes: Any,
    tree_group: Any,
    group_bit: Any,
    bit_node: Any,
    group_feature: Any,
    feature: Any,
    group_table: Any,
    table: Any,
    yes: Any,
    pattern: Any,
    contributions: Any,
) -> None:
    n = columns.shape[1]
    for t in range(tree_node.shape[0] - 1):
        start = tree_node[t]
        for node in range(start, tree_node[t + 1]):
            values = columns[node_feature[node]]
            edge = node_value[node]
            answers = yes[node - start]
            if node_missing_yes[node]:
                for r in range(n):
                    answers[r] = not (values[r] >= edge)
            else:
                for r in range(n):
                    answers[r] = values[r] < edge
        for g in range(tree_group[t], tree_group[t + 1]):
            for r in range(n):
                pattern[r] = 0
            for b in range(group_bit[g], group_bit[g + 1]):
                answers = yes[bit_node[b]]
                shift = b - group_bit[g]
                for r in range(n):
                    pattern[r] |= answers[r] << shift
            first = group_feature[g]
            width = group_feature[g + 1] - first
            at = group_table[g]
            for q in range(width):
                sums = contributions[feature[first + q]]
                for r in range(n):
                    sums[r] += table[at + pattern[r] * width + q]


def table_bytes(forest: Forest) -> int:
    """Bytes of the tables this forest would need. A forest within MAX_BYTES has at most 26 conditions in one pattern."""
    return sum(4 * (len({int(forest.feature[node]) for node in group.nodes}) << len(group.nodes)) for _, group in _groups(forest))


@dataclass(frozen=True, slots=True)
class _Group:
    """A subtree: the (node, answer) pairs on the way to its root, 1 for yes; and all nodes that ask there, the way first."""

    root: int
    way: list[tuple[int, int]]
    nodes: list[int]


def _groups(forest: Forest) -> list[tuple[int, _Group]]:
    """(tree, subtree) of the largest subtrees of at most HEIGHT levels, tree after tree. They cover every leaf once."""
    feature, yes, no = forest.feature.tolist(), forest.yes.tolist(), forest.no.tolist()
    height = [0] * forest.n_nodes
    # Children stand behind their parent.
    for node in range(forest.n_nodes - 1, -1, -1):
        if feature[node] >= 0:
            height[node] = 1 + max(height[yes[node]], height[no[node]])
    found = []
    for tree, root in enumerate(forest.root.tolist()):
        waiting: list[tuple[int, list[tuple[int, int]]]] = [(root, [])]
        while waiting:
            node, way = waiting.pop()
            if height[node] > HEIGHT:
                waiting += [(no[node], [*way, (node, 0)]), (yes[node], [*way, (node, 1)])]
                continue
            inside = [node] if feature[node] >= 0 else []
            for each in inside:
                inside += [child for child in (yes[each], no[each]) if feature[child] >= 0]
            found.append((tree, _Group(node, way, [each for each, _ in way] + inside)))
    return found


class TreeShap:
    """Tables of one forest. share: of every node the share of the training weight that goes to `yes`, float64 (nodes,)."""

    def __init__(self, forest: Forest, share: npt.NDArray[np.float64]) -> None:
        feature, yes, no = forest.feature.tolist(), forest.yes.tolist(), forest.no.tolist()
        shares, weight = share.tolist(), forest.weight.tolist()
        groups = _groups(forest)
        asks = np.flatnonzero(forest.feature >= 0)
        place = np.full(forest.n_nodes, -1, np.int64)
        place[asks] = np.arange(len(asks))
        # Nodes that ask, tree after tree.
        self._tree_node = np.searchsorted(asks, np.append(forest.root, forest.n_nodes)).astype(np.int32)
        self._node_feature = forest.feature[asks].astype(np.int32)
        self._node_value = forest.value[asks].astype(np.float32)
        self._node_missing_yes = forest.missing_yes[asks].astype(np.uint8)
        self._tree_group = np.searchsorted([tree for tree, _ in groups], np.arange(len(forest.root) + 1)).astype(np.int32)

        bit_node: list[int] = []
        features: list[int] = []
        group_bit, group_feature, group_table, size = [0], [0], [], 0
        leaf_group: list[int] = []
        leaf_weight: list[float] = []
        leaf_condition, leaf_player = [0], [0]
        condition_bit: list[int] = []
        condition_want: list[int] = []
        condition_player: list[int] = []
        player_column: list[int] = []
        player_share: list[float] = []
        for number, (tree, group) in enumerate(groups):
            bit_node += (place[group.nodes] - self._tree_node[tree]).tolist()
            group_bit.append(len(bit_node))
            asked = list(dict.fromkeys(feature[node] for node in group.nodes))
            features += asked
            group_feature.append(len(features))
            group_table.append(size)
            size += len(asked) << len(group.nodes)
            bit = {node: i for i, node in enumerate(group.nodes)}
            waiting = [(group.root, group.way)]
            while waiting:
                node, path = waiting.pop()
                if feature[node] >= 0:
                    waiting += [(no[node], [*path, (node, 0)]), (yes[node], [*path, (node, 1)])]
                    continue
                players: dict[int, int] = {}
                told: list[float] = []
                for each, want in path:
                    player = players.setdefault(feature[each], len(players))
                    if player == len(told):
                        told.append(1.0)
                    told[player] *= shares[each] if want else 1.0 - shares[each]
                    condition_bit.append(bit[each])
                    condition_want.append(want)
                    condition_player.append(player)
                leaf_group.append(number)
                leaf_weight.append(weight[node])
                leaf_condition.append(len(condition_bit))
                player_column += [asked.index(f) for f in players]
                player_share += told
                leaf_player.append(len(player_share))
        self._group_bit, self._bit_node = np.array(group_bit, np.int32), np.array(bit_node, np.int32)
        self._group_feature, self._feature = np.array(group_feature, np.int32), np.array(features, np.int32)
        self._group_table = np.array(group_table, np.int64)
        self._table = np.zeros(size, np.float32)
        _tabulate(
            np.array(leaf_group, np.int32),
            np.array(leaf_weight),
            np.array(leaf_condition, np.int32),
            np.array(condition_bit, np.int32),
            np.array(condition_want, np.int32),
            np.array(condition_player, np.int32),
            np.array(leaf_player, np.int32),
            np.array(player_column, np.int32),
            np.array(player_share),
            self._group_table,
            np.diff(self._group_bit).astype(np.int32),
            np.diff(self._group_feature).astype(np.int32),
            self._table,
        )
        self._most_nodes = int(np.diff(self._tree_node).max())

    def contributions(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Contribution of each feature to the margin in log-odds, float64 of the vectors' shape (k, features)."""
        rows, features = vectors.shape
        found = np.empty((rows, features))
        for first in range(0, rows, ROWS):
            block = np.ascontiguousarray(vectors[first : first + ROWS].T, np.float32)
            n = block.shape[1]
            sums = np.zeros((features, n))
            _add(
                block,
                self._tree_node,
                self._node_feature,
                self._node_value,
                self._node_missing_yes,
                self._tree_group,
                self._group_bit,
                self._bit_node,
                self._group_feature,
                self._feature,
                self._group_table,
                self._table,
                np.empty((self._most_nodes, n), np.uint8),
                np.empty(n, np.uint32),
                sums,
            )
            found[first : first + n] = sums.T
        return found
