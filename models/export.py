"""A fitted XGBoost booster as one ONNX graph with the calibration inside, plus the shares that reasons need."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxmltools
import xgboost
from onnxmltools.convert.common.data_types import FloatTensorType

from models.calibrate import Platt
from models.graph import TREES, Forest
from proto.errors import ArtifactRejected


def forest_of(booster: xgboost.Booster, columns: npt.NDArray[np.intp], platt: Platt | None = None) -> Forest:
    """The booster's trees, through onnxmltools, with columns renumbered to the feature layout and Platt scaling folded in.

    columns: layout position of each column the booster was fitted on. Folding multiplies the leaves by `a` and makes the base
    a * base + b (in float64, rounded once to float32): the margin becomes a * margin + b without another node in the graph.
    Raises ArtifactRejected for trees without a split.
    """
    converted = onnxmltools.convert_xgboost(booster, initial_types=[("features", FloatTensorType([None, len(columns)]))])
    ensembles = [node for node in converted.graph.node if node.op_type == TREES]
    # Where all leaves are zero onnxmltools writes a constant instead of trees.
    if len(ensembles) != 1 or not any(b"BRANCH" in mode for a in ensembles[0].attribute if a.name == "nodes_modes" for mode in a.strings):
        raise ArtifactRejected("export: the trees never ask anything; every customer would score the same")
    ensemble = ensembles[0]
    attributes: dict[str, Any] = {a.name: onnx.helper.get_attribute_value(a) for a in ensemble.attribute}
    a, b = (platt.a, platt.b) if platt else (1.0, 0.0)

    leaf = np.array([mode == b"LEAF" for mode in attributes["nodes_modes"]])
    node = np.array(attributes["nodes_nodeids"], np.int64)
    root = np.flatnonzero(node == 0)
    first = np.repeat(root, np.diff(np.append(root, len(node))))
    weight = np.zeros(len(node), np.float32)
    weight[leaf] = np.array(attributes["class_weights"], np.float64) * a
    feature = columns[np.array(attributes["nodes_featureids"], np.int64)]
    return Forest(
        root=root.astype(np.int32),
        feature=np.where(leaf, -1, feature).astype(np.int32),
        value=np.array(attributes["nodes_values"], np.float32),
        yes=np.where(leaf, -1, first + np.array(attributes["nodes_truenodeids"])).astype(np.int32),
        no=np.where(leaf, -1, first + np.array(attributes["nodes_falsenodeids"])).astype(np.int32),
        missing_yes=np.array(attributes["nodes_missing_value_tracks_true"], np.bool_),
        weight=weight,
        # Left out by onnxmltools where it is 0.
        base=float(np.float32(a * float(attributes.get("base_values", [0.0])[0]) + b)),
    )


def covers(booster: xgboost.Booster) -> npt.NDArray[np.float64]:
    """Training weight (sum of Hessians) that passed each node, shape (nodes,), in the order of `forest_of`: trees, then pre-order."""
    found: list[float] = []
    for text in booster.get_dump(with_stats=True, dump_format="json"):
        stack = [json.loads(text)]
        while stack:
            node = stack.pop()
            found.append(float(node["cover"]))
            stack.extend(reversed(node.get("children", [])))
    return np.array(found)


def shares(forest: Forest, cover: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of each node's cover that went to its `yes` child, shape (nodes,), float64; 0 on leaves."""
    asks = forest.feature >= 0
    yes, no = cover[forest.yes[asks]], cover[forest.no[asks]]
    both = yes + no
    found = np.zeros(forest.n_nodes)
    # Hessians can round to nothing in a confident corner: both children then count alike.
    found[asks] = np.divide(yes, both, out=np.full(len(both), 0.5), where=both > 0)
    return found
