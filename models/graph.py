"""The one kind of ONNX graph we run: a tree ensemble and the choice of one column; checked piece by piece before the runtime sees it.

An ONNX file is data that drives native code, so everything not on the lists below is refused: operators, attributes, attribute types,
functions, subgraphs, sparse or external tensors, sizes.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from proto.errors import ArtifactRejected

MAX_GRAPH_BYTES: Final = 32 * 1024 * 1024
MAX_TREES: Final = 5_000
MAX_NODES: Final = 1_000_000

INPUT: Final = "features"
OUTPUT: Final = "probability"
IR_VERSION: Final = 8
OPSETS: Final = {"": 17, "ai.onnx.ml": 1}
MODEL, TREES, PICK = "ai.onnx.ml", "TreeEnsembleClassifier", "Gather"
ALLOWED_OPERATORS: Final = {(MODEL, TREES), ("", PICK)}

_NODE_COLUMNS: Final = (
    "nodes_treeids",
    "nodes_nodeids",
    "nodes_featureids",
    "nodes_modes",
    "nodes_values",
    "nodes_truenodeids",
    "nodes_falsenodeids",
    "nodes_missing_value_tracks_true",
)
_LEAF_COLUMNS: Final = ("class_treeids", "class_nodeids", "class_ids", "class_weights")
_TREE_ATTRIBUTES: Final = {*_NODE_COLUMNS, *_LEAF_COLUMNS, "base_values", "classlabels_int64s", "post_transform"}
_PLAIN_TYPES: Final = {
    onnx.AttributeProto.INT,
    onnx.AttributeProto.FLOAT,
    onnx.AttributeProto.STRING,
    onnx.AttributeProto.INTS,
    onnx.AttributeProto.FLOATS,
    onnx.AttributeProto.STRINGS,
}
BRANCH: Final = b"BRANCH_LT"  # a row goes to the true child when x < value
LEAF: Final = b"LEAF"


@dataclass(frozen=True, slots=True)
class Forest:
    """The trees of a graph as flat arrays, in the order of the graph's nodes.

    root: int32[trees], position of each tree's first node. The rest has shape (nodes,): feature int32 (-1 on a leaf), value float32,
    yes/no int32 (positions of the children; -1 on a leaf), missing_yes bool (NaN goes to `yes`), weight float32 (0 on a branch).
    base: what is added to the sum of the leaves; the probability is 1 / (1 + exp(-(sum + base))).
    """

    root: npt.NDArray[np.int32]
    feature: npt.NDArray[np.int32]
    value: npt.NDArray[np.float32]
    yes: npt.NDArray[np.int32]
    no: npt.NDArray[np.int32]
    missing_yes: npt.NDArray[np.bool_]
    weight: npt.NDArray[np.float32]
    base: float

    @property
    def n_nodes(self) -> int:
        """Nodes of all trees."""
        return len(self.feature)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ArtifactRejected(f"model graph refused: {message}")


def parse(data: bytes) -> onnx.ModelProto:
    """The protobuf message in `data`. Raises ArtifactRejected when it is too large or none."""
    _refuse(len(data) > MAX_GRAPH_BYTES, f"{len(data):,} bytes, the bound is {MAX_GRAPH_BYTES:,}")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf backends raise different classes
        raise ArtifactRejected(f"model graph refused: not an ONNX file ({type(error).__name__})") from error
    return model


def read(data: bytes, n_features: int) -> Forest:
    """Check the graph in `data` against every list and bound, and return its trees.

    Raises ArtifactRejected with the first thing that is not allowed.
    """
    model = parse(data)
    _check_frame(model)
    _check_tensors(model.graph)
    _check_ends(model.graph, n_features)
    trees, pick = _check_operators(model.graph)
    _refuse(list(trees.input) != [INPUT] or len(trees.output) != 2, f"the trees must read `{INPUT}` and give label and probabilities")
    wired = [trees.output[1], model.graph.initializer[0].name]
    _refuse(list(pick.input) != wired or list(pick.output) != [OUTPUT], f"`{OUTPUT}` must be one column of the trees' probabilities")
    index = model.graph.initializer[0]
    _refuse(list(index.dims) != [] or _scalar(index) != 1, "the chosen column must be number 1")
    return _forest({a.name: a for a in trees.attribute}, n_features)


def _check_frame(model: onnx.ModelProto) -> None:
    _refuse(not 3 <= model.ir_version <= IR_VERSION, f"IR version {model.ir_version}, at most {IR_VERSION} is read")
    _refuse(len(model.functions) > 0, "it defines functions")
    _refuse(len(model.training_info) > 0, "it holds training information")
    opsets = {item.domain: item.version for item in model.opset_import}
    _refuse(len(opsets) != len(model.opset_import) or opsets != OPSETS, f"operator sets {opsets}, expected {OPSETS}")


def _check_tensors(graph: onnx.GraphProto) -> None:
    _refuse(len(graph.sparse_initializer) > 0, "it holds sparse tensors")
    _refuse(len(graph.quantization_annotation) > 0, "it holds quantisation annotations")
    _refuse(len(graph.initializer) != 1, f"{len(graph.initializer)} tensors, expected the column index alone")
    for tensor in graph.initializer:
        external = tensor.data_location != onnx.TensorProto.DEFAULT or len(tensor.external_data) > 0
        _refuse(external, "it refers to data outside the file")
        _refuse(tensor.data_type != onnx.TensorProto.INT64, "the column index is not int64")


def _check_ends(graph: onnx.GraphProto, n_features: int) -> None:
    _refuse([item.name for item in graph.input] != [INPUT], f"its input must be `{INPUT}` alone")
    _refuse([item.name for item in graph.output] != [OUTPUT], f"its output must be `{OUTPUT}` alone")
    shape = graph.input[0].type.tensor_type
    _refuse(shape.elem_type != onnx.TensorProto.FLOAT, "its input is not float32")
    dims = [d.dim_value for d in shape.shape.dim]
    _refuse(len(dims) != 2 or dims[1] != n_features, f"its input has shape {dims}, the feature layout has {n_features} columns")


def _check_operators(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    for node in graph.node:
        _refuse((node.domain, node.op_type) not in ALLOWED_OPERATORS, f"operator {node.domain or 'ai.onnx'}:{node.op_type} is not allowed")
        for attribute in node.attribute:
            _refuse(attribute.type not in _PLAIN_TYPES, f"attribute {attribute.name} is not a plain value")
            _refuse(bool(attribute.ref_attr_name), f"attribute {attribute.name} refers to another")
    _refuse([node.op_type for node in graph.node] != [TREES, PICK], "expected a tree ensemble, then the choice of one column")
    trees, pick = graph.node
    unknown = {a.name for a in trees.attribute} - _TREE_ATTRIBUTES
    _refuse(bool(unknown), f"unknown tree attributes {sorted(unknown)}")
    _refuse(len({a.name for a in trees.attribute}) != len(trees.attribute), "a tree attribute is given twice")
    _refuse([(a.name, a.i) for a in pick.attribute] != [("axis", 1)], "the column must be chosen along axis 1")
    return trees, pick


def _scalar(tensor: onnx.TensorProto) -> int:
    if len(tensor.raw_data) == 8:
        return int.from_bytes(tensor.raw_data, "little", signed=True)
    return int(tensor.int64_data[0]) if len(tensor.int64_data) == 1 else -1


def _forest(attributes: dict[str, onnx.AttributeProto], n_features: int) -> Forest:
    missing = sorted(_TREE_ATTRIBUTES - attributes.keys())
    _refuse(bool(missing), f"tree attributes {missing} are missing")
    _refuse(attributes["post_transform"].s != b"LOGISTIC", "the trees must end in LOGISTIC")
    _refuse(list(attributes["classlabels_int64s"].ints) != [0, 1], "the classes must be 0 and 1")
    _refuse(len(attributes["base_values"].floats) != 1, "expected one base value")
    base = float(attributes["base_values"].floats[0])

    modes = list(attributes["nodes_modes"].strings)
    n = len(modes)
    _refuse(not 0 < n <= MAX_NODES, f"{n:,} tree nodes, the bound is {MAX_NODES:,}")
    _refuse(not set(modes) <= {BRANCH, LEAF}, "a node is neither a less-than branch nor a leaf")
    leaf = np.array([mode == LEAF for mode in modes])

    def column(name: str, dtype: type[np.generic], rows: int) -> npt.NDArray[Any]:
        values = attributes[name].floats if dtype is np.float32 else attributes[name].ints
        _refuse(len(values) != rows, f"{name} has {len(values):,} entries, expected {rows:,}")
        return np.array(values, dtype)

    tree = column("nodes_treeids", np.int64, n)
    node = column("nodes_nodeids", np.int64, n)
    feature = column("nodes_featureids", np.int64, n)
    value = column("nodes_values", np.float32, n)
    yes_id = column("nodes_truenodeids", np.int64, n)
    no_id = column("nodes_falsenodeids", np.int64, n)
    missing_yes = column("nodes_missing_value_tracks_true", np.int64, n)

    # Trees one after the other, nodes numbered from 0 in the order they appear: then a position is its tree's root plus the id.
    starts = np.flatnonzero(node == 0)
    _refuse(not 0 < len(starts) <= MAX_TREES or starts[0] != 0, f"{len(starts):,} trees, the bound is {MAX_TREES:,}")
    sizes = np.diff(np.append(starts, n))
    owner = np.repeat(np.arange(len(starts)), sizes)
    first = np.repeat(starts, sizes)
    _refuse(not np.array_equal(tree, owner) or not np.array_equal(node, np.arange(n) - first), "tree nodes are not numbered in order")

    branch = ~leaf
    size = np.repeat(sizes, sizes)
    for child in (yes_id, no_id):
        # A child comes after its parent, so walking down always ends.
        _refuse(bool(np.any(branch & ((child <= node) | (child >= size)))), "a branch leads outside its tree or back")
    children = np.concatenate([(first + yes_id)[branch], (first + no_id)[branch]])
    parents = np.bincount(children, minlength=n)
    _refuse(bool(np.any(parents != (node != 0))), "a tree node does not have exactly one parent")
    _refuse(bool(np.any(branch & ((feature < 0) | (feature >= n_features)))), "a branch asks for a feature outside the layout")
    _refuse(not np.all(np.isfinite(value)), "a threshold is not finite")
    _refuse(not np.all((missing_yes == 0) | (missing_yes == 1)), "a missing-value flag is neither 0 nor 1")

    where = np.flatnonzero(leaf)
    for name, expected in (("class_treeids", tree[where]), ("class_nodeids", node[where]), ("class_ids", np.zeros(len(where)))):
        _refuse(not np.array_equal(column(name, np.int64, len(where)), expected), f"{name} does not list the leaves in order")
    weight = np.zeros(n, np.float32)
    weight[where] = column("class_weights", np.float32, len(where))
    _refuse(not np.all(np.isfinite(weight)) or not np.isfinite(base), "a leaf or the base value is not finite")

    return Forest(
        root=starts.astype(np.int32),
        feature=np.where(leaf, -1, feature).astype(np.int32),
        value=value,
        yes=np.where(leaf, -1, first + yes_id).astype(np.int32),
        no=np.where(leaf, -1, first + no_id).astype(np.int32),
        missing_yes=missing_yes.astype(np.bool_),
        weight=weight,
        base=base,
    )


def write(forest: Forest, n_features: int) -> bytes:
    """The graph of a forest, in the form `read` accepts; `read(write(f)) == f`."""
    leaf = forest.feature < 0
    sizes = np.diff(np.append(forest.root, forest.n_nodes))
    tree = np.repeat(np.arange(len(sizes)), sizes)
    first = np.repeat(forest.root, sizes)
    node = np.arange(forest.n_nodes) - first
    trees = onnx.helper.make_node(
        TREES,
        [INPUT],
        ["label", "probabilities"],
        domain=MODEL,
        nodes_treeids=tree.tolist(),
        nodes_nodeids=node.tolist(),
        nodes_featureids=np.where(leaf, 0, forest.feature).tolist(),
        nodes_modes=[LEAF if is_leaf else BRANCH for is_leaf in leaf],
        nodes_values=forest.value.tolist(),
        nodes_truenodeids=np.where(leaf, 0, forest.yes - first).tolist(),
        nodes_falsenodeids=np.where(leaf, 0, forest.no - first).tolist(),
        nodes_missing_value_tracks_true=forest.missing_yes.astype(int).tolist(),
        class_treeids=tree[leaf].tolist(),
        class_nodeids=node[leaf].tolist(),
        class_ids=[0] * int(leaf.sum()),
        class_weights=forest.weight[leaf].tolist(),
        base_values=[forest.base],
        classlabels_int64s=[0, 1],
        post_transform="LOGISTIC",
    )
    pick = onnx.helper.make_node(PICK, ["probabilities", "column"], [OUTPUT], axis=1)
    graph = onnx.helper.make_graph(
        [trees, pick],
        "churn",
        [onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, [None, n_features])],
        [onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, [None])],
        [onnx.helper.make_tensor("column", onnx.TensorProto.INT64, [], [1])],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
    model = onnx.helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets, producer_name="churnstream")
    return bytes(model.SerializeToString(deterministic=True))
