"""20 sabotaged artifacts, each otherwise in order, and 20 good ones, before everything a worker asks of a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from bench.corruption import signing
from bench.small_model import PLATT, Small, small
from models import graph
from models.artifact import Calibration, Manifest, Tables, Thresholds, pack
from models.graph import Forest
from models.signature import Signer, Trust
from proto.errors import ArtifactRejected
from scoring.scorer import Scorer, load

ADA, TRUST = signing()
STRANGER, OF_STRANGER = signing()
AUC = {"auc": 0.8, "auc_interval": [0.78, 0.82], "brier": 0.15, "base_rate": 0.3, "mean_score": 0.31}


def stated(model: Small, **changed: Any) -> Manifest:
    """The model's manifest with figures as a training gives them."""
    full = {
        "gates": {"onnx_parity_max": 4e-7, "threshold_flips": 0, "batch_dependent_rows": 0},
        "metrics": {"test": AUC},
        "training": {"platt": [PLATT.a, PLATT.b]},
    }
    return model.manifest.model_copy(update=full | changed)


def made(
    model: Small, *, forest: Forest | None = None, onnx_bytes: bytes | None = None, tables: Tables | None = None, **changed: Any
) -> bytes:
    """The envelope of a model with parts exchanged and every digest right."""
    onnx_bytes = onnx_bytes or (model.onnx if forest is None else graph.write(forest, 106))
    tables = tables or model.tables
    manifest = stated(model, **changed).model_copy(
        update={"onnx_sha256": sha256(onnx_bytes).hexdigest(), "tables_sha256": sha256(tables.encode()).hexdigest()}
    )
    return pack(manifest, onnx_bytes, tables)


def accept(value: bytes, digest: str, trust: Trust = TRUST) -> Scorer:
    """What a worker does with a published model, the trial in a process of its own left out."""
    return load(trust.open(value, digest), digest=digest)


def load_digest(envelope: bytes) -> str:
    import zstandard

    content = zstandard.ZstdDecompressor().decompress(envelope)
    size = int.from_bytes(content[12:16], "little")
    return sha256(content[16 : 16 + size]).hexdigest()


def reached_leaf(model: Small) -> int:
    """A leaf of the first tree that the first golden row ends in."""
    f, row, at = model.forest, model.tables.golden[0], 0
    while f.feature[at] >= 0:
        x = row[f.feature[at]]
        yes = f.missing_yes[at] if np.isnan(x) else x < f.value[at]
        at = int(f.yes[at] if yes else f.no[at])
    return at


def changed_array(values: Any, at: Any, value: Any) -> Any:
    copy = np.array(values)
    copy[at] = value
    return copy


def edited(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_from_string(small().onnx)
    change(model)
    return bytes(model.SerializeToString())


def swapped_columns(m: Small) -> bytes:
    used = np.unique(m.forest.feature[m.forest.feature >= 0])
    first, second = (m.forest.feature == used[0]), (m.forest.feature == used[1])
    return made(m, forest=replace(m.forest, feature=np.where(first, used[1], np.where(second, used[0], m.forest.feature)).astype(np.int32)))


def sealed(envelope: bytes, by: Signer = ADA) -> tuple[bytes, str]:
    digest = load_digest(envelope)
    return by.seal(envelope, digest), digest


def opset_of_tomorrow(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def other_end(model: onnx.ModelProto) -> None:
    next(a for a in model.graph.node[0].attribute if a.name == "post_transform").s = b"SOFTMAX"


def column_0(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(helper.make_tensor("column", onnx.TensorProto.INT64, [], [0]))


def as_of(small_model: Small) -> dict[str, Callable[[], tuple[bytes, str]]]:
    m, f, t = small_model, small_model.forest, small_model.tables
    leaf = reached_leaf(m)
    other = small(seed=5)
    good = made(m)
    return {
        "another opset": lambda: sealed(made(m, onnx_bytes=edited(opset_of_tomorrow))),
        "two columns swapped": lambda: sealed(swapped_columns(m)),
        "a leaf of 0.4 more": lambda: sealed(made(m, forest=replace(f, weight=changed_array(f.weight, leaf, f.weight[leaf] + 0.4)))),
        "another layout": lambda: sealed(made(m, layout_hash="0" * 32)),
        "calibrated by another constant": lambda: sealed(made(m, forest=replace(f, base=f.base + 0.1))),
        "calibration stated wrongly": lambda: sealed(made(m, calibration=Calibration(slope=1.5, offset=PLATT.b))),
        "missing values go the other way": lambda: sealed(made(m, forest=replace(f, missing_yes=~f.missing_yes))),
        "a figure outside its interval": lambda: sealed(made(m, metrics={"test": AUC | {"auc": 0.9}})),
        "a figure that is none": lambda: sealed(made(m, metrics={"test": AUC | {"brier": 1.5}})),
        "a gate not passed": lambda: sealed(made(m, gates={"onnx_parity_max": 0.49})),
        "features it does not admit to": lambda: sealed(made(m, features_used=["purchase_age_days"])),
        "bands in the wrong order": lambda: sealed(made(m, thresholds=Thresholds(medium=0.6, high=0.3, version="x"))),
        "golden rows of another model": lambda: sealed(made(m, tables=replace(t, golden_probability=other.tables.golden_probability))),
        "no golden rows": lambda: sealed(made(m, tables=replace(t, golden=t.golden[:0], golden_probability=t.golden_probability[:0]))),
        "shares that are none": lambda: sealed(made(m, tables=replace(t, share=changed_array(t.share, 0, np.nan)))),
        "the probability of staying": lambda: sealed(made(m, onnx_bytes=edited(column_0))),
        "another end of the trees": lambda: sealed(made(m, onnx_bytes=edited(other_end))),
        "not signed": lambda: (good, load_digest(good)),
        "signed by a stranger": lambda: sealed(good, STRANGER),
        "an older model under the new one's name": lambda: (sealed(made(other))[0], load_digest(good)),
    }


@pytest.mark.parametrize("name", as_of(small()))
def test_a_sabotaged_artifact_is_refused(name: str) -> None:
    value, digest = as_of(small())[name]()
    with pytest.raises(ArtifactRejected):
        accept(value, digest)


def test_there_are_20_of_them_and_only_the_sabotage_is_wrong() -> None:
    assert len(as_of(small())) == 20
    value, digest = sealed(made(small()))
    assert accept(value, digest).digest == digest


def test_20_good_artifacts_are_accepted() -> None:
    models = [small(), small(seed=5), small(trees=3, depth=2), small(trees=1, depth=1)]
    good = [
        made(m, version=f"{number}", thresholds=Thresholds(medium=0.2 + number / 100, high=0.7, version="v"))
        for number in range(3)
        for m in models
    ]
    m, t = models[0], models[0].tables
    good += [
        made(m, metrics={}),
        made(m, metrics={"validation": AUC | {"auc_interval": [None, None]}}),
        made(m, gates={}),
        made(m, training={}),
        made(m, tables=replace(t, golden=t.golden[:1], golden_probability=t.golden_probability[:1])),
        made(m, features_used=list(m.manifest.features_used)),
        made(m, name="other"),
    ]
    for envelope in good:
        value, digest = sealed(envelope)
        assert accept(value, digest).digest == digest
    both = Trust({**TRUST.keys, **OF_STRANGER.keys})
    value, digest = sealed(good[0], STRANGER)
    assert accept(value, digest, both).digest == digest  # a second key, while keys are changed
    assert len(good) + 1 == 20
