"""A small model of random data, made through the real export, for the simulation and for tests that need one."""

from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256

import numpy as np
import numpy.typing as npt
import xgboost

from features.catalog import LAYOUT_HASH, N_FEATURES, NAMES
from models import export, graph
from models.artifact import Calibration, Manifest, Tables, Thresholds, pack
from models.calibrate import Platt
from models.graph import Forest
from models.session import Session

PLATT = Platt(0.8, -0.3)


@dataclass(frozen=True)
class Small:
    """Vectors (n, N_FEATURES), the booster fitted on `columns` of them, and the artifact made of it."""

    x: npt.NDArray[np.float32]
    columns: npt.NDArray[np.intp]
    booster: xgboost.Booster
    forest: Forest
    onnx: bytes
    tables: Tables
    manifest: Manifest
    envelope: bytes

    def margin(self) -> npt.NDArray[np.float64]:
        """Raw outputs of XGBoost itself."""
        return np.asarray(self.booster.predict(xgboost.DMatrix(self.x[:, self.columns]), output_margin=True), np.float64)


def vectors(rows: int, seed: int) -> npt.NDArray[np.float32]:
    """Random vectors, a fifth of the values unknown."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, N_FEATURES)).astype(np.float32)
    x[rng.random(x.shape) < 0.2] = np.nan
    return x


@cache
def small(trees: int = 40, depth: int = 4, seed: int = 0) -> Small:
    """The model; the same arguments give the same bytes."""
    x = vectors(3_000, seed)
    columns = np.arange(0, N_FEATURES, 3)
    risk = np.nan_to_num(x[:, 0]) + 0.7 * np.nan_to_num(x[:, 3]) * np.nan_to_num(x[:, 6])
    y = risk + np.random.default_rng(seed + 1).normal(size=len(x)) > 0.4
    parameters = {"objective": "binary:logistic", "max_depth": depth, "eta": 0.2, "tree_method": "hist", "nthread": 1, "seed": 0}
    booster = xgboost.train(parameters, xgboost.DMatrix(x[:, columns], label=y), trees)
    forest = export.forest_of(booster, columns, PLATT)
    onnx = graph.write(forest, N_FEATURES)
    tables = Tables(export.shares(forest, export.covers(booster)), x[:48], Session(onnx).probabilities(x[:48]))
    manifest = manifest_of(onnx, tables)
    return Small(x, columns, booster, forest, onnx, tables, manifest, pack(manifest, onnx, tables))


def manifest_of(onnx: bytes, tables: Tables, layout_hash: str = LAYOUT_HASH) -> Manifest:
    """A manifest that names these parts."""
    return Manifest(
        name="test",
        version="1",
        layout_hash=layout_hash,
        features_used=list(NAMES),
        onnx_sha256=sha256(onnx).hexdigest(),
        tables_sha256=sha256(tables.encode()).hexdigest(),
        calibration=Calibration(slope=PLATT.a, offset=PLATT.b),
        thresholds=Thresholds(medium=0.3, high=0.6, version="test"),
        label={},
        data={},
        training={},
        metrics={},
        baseline={},
        gates={},
        runtime={},
    )


def repacked(onnx: bytes | None = None, layout_hash: str = LAYOUT_HASH, **tables: npt.NDArray[np.floating]) -> bytes:
    """The small model's envelope with parts exchanged and every digest made right again: only the content is wrong."""
    base = small()
    changed = replace(base.tables, **tables)  # type: ignore[arg-type]  # arrays of the fields' own dtypes
    graph_bytes = base.onnx if onnx is None else onnx
    return pack(manifest_of(graph_bytes, changed, layout_hash), graph_bytes, changed)
