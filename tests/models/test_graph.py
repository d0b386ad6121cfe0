"""A graph that is not exactly the one kind we run is refused before the runtime sees it."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper

from bench.small_model import small
from features.catalog import N_FEATURES
from models import graph
from proto.errors import ArtifactRejected

Change = Callable[[onnx.ModelProto], None]


def attribute(model: onnx.ModelProto, name: str) -> onnx.AttributeProto:
    found: onnx.AttributeProto = next(a for a in model.graph.node[0].attribute if a.name == name)
    return found


def external_data(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Loop", ["features"], ["x"]))


def other_domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"


def another_domain_declared(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def function(model: onnx.ModelProto) -> None:
    model.functions.append(helper.make_function("d", "f", [], [], [], []))


def sparse_tensor(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def subgraph(model: onnx.ModelProto) -> None:
    model.graph.node[1].attribute.append(helper.make_attribute("body", helper.make_graph([], "g", [], [])))


def another_tensor(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("big", onnx.TensorProto.FLOAT, [1], [1.0]))


def other_column(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(helper.make_tensor("column", onnx.TensorProto.INT64, [], [7]))


def narrower_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = N_FEATURES - 1


def feature_outside(model: onnx.ModelProto) -> None:
    attribute(model, "nodes_featureids").ints[0] = N_FEATURES


def negative_feature(model: onnx.ModelProto) -> None:
    attribute(model, "nodes_featureids").ints[0] = -1


def child_outside(model: onnx.ModelProto) -> None:
    attribute(model, "nodes_truenodeids").ints[0] = 10**6


def cycle(model: onnx.ModelProto) -> None:
    attribute(model, "nodes_truenodeids").ints[1] = 0


def two_parents(model: onnx.ModelProto) -> None:
    attribute(model, "nodes_truenodeids").ints[0] = attribute(model, "nodes_falsenodeids").ints[0]


def leaf_not_finite(model: onnx.ModelProto) -> None:
    attribute(model, "class_weights").floats[0] = float("nan")


def threshold_not_finite(model: onnx.ModelProto) -> None:
    attribute(model, "nodes_values").floats[0] = float("inf")


def base_not_finite(model: onnx.ModelProto) -> None:
    attribute(model, "base_values").floats[0] = float("inf")


def shorter_column(model: onnx.ModelProto) -> None:
    del attribute(model, "nodes_values").floats[-1]


def other_mode(model: onnx.ModelProto) -> None:
    attribute(model, "nodes_modes").strings[0] = b"BRANCH_EQ"


def no_sigmoid(model: onnx.ModelProto) -> None:
    attribute(model, "post_transform").s = b"NONE"


def unknown_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("nodes_values_as_tensor", [1.0]))


def leaf_of_another_tree(model: onnx.ModelProto) -> None:
    attribute(model, "class_treeids").ints[0] = 1


def newer_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 99


CHANGES = [
    external_data, unknown_operator, other_domain, another_domain_declared, function, sparse_tensor, subgraph, another_tensor, other_column,
    narrower_input, feature_outside, negative_feature, child_outside, cycle, two_parents, leaf_not_finite, threshold_not_finite,
    base_not_finite, shorter_column, other_mode, no_sigmoid, unknown_attribute, leaf_of_another_tree, newer_ir,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_graph_is_refused(change: Change) -> None:
    model = onnx.load_from_string(small().onnx)
    change(model)
    with pytest.raises(ArtifactRejected):
        graph.read(model.SerializeToString(), N_FEATURES)


def test_the_unchanged_graph_is_read() -> None:
    assert graph.read(small().onnx, N_FEATURES).n_nodes == small().forest.n_nodes


def test_what_is_no_graph_is_refused() -> None:
    rng = np.random.default_rng(0)
    for size in (0, 1, 10, 1000):
        with pytest.raises(ArtifactRejected):
            graph.read(rng.bytes(size), N_FEATURES)


def test_a_graph_beyond_the_bound_is_refused() -> None:
    with pytest.raises(ArtifactRejected, match="bound"):
        graph.read(b"\0" * (graph.MAX_GRAPH_BYTES + 1), N_FEATURES)


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_refused_or_harmless(seed: int) -> None:
    """Whatever passes the structure check is a forest with every index inside and every number finite."""
    data = small(trees=3, depth=2).onnx
    rng = np.random.default_rng(seed)
    for _ in range(100):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            forest = graph.read(bytes(changed), N_FEATURES)
        except ArtifactRejected:
            continue
        assert np.all(forest.feature < N_FEATURES)
        assert np.all(forest.yes < forest.n_nodes)
        assert np.all(np.isfinite(forest.weight))
