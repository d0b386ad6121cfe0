"""Labelled rows to a publishable model: choose and calibrate on a later slice, fit on all training rows, export, pass the gates."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version as installed
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xgboost

from features.catalog import CATALOG, LAYOUT_HASH, N_FEATURES, NAMES, M, Op
from features.window import DAY_MS
from models import baseline, calibrate, evaluate, export, gates, graph
from models.artifact import Calibration, Manifest, Tables, Thresholds, pack
from models.calibrate import Platt
from models.dataset import SNAPSHOT, Rows
from models.session import Session
from models.split import Split
from proto.errors import BadInput

BoolArray = npt.NDArray[np.bool_]
Columns = npt.NDArray[np.intp]

GOLDEN_ROWS: Final = 64
HELD_OUT_MS: Final = 30 * DAY_MS
BASELINE_DRAWS: Final = 200
"""Of the bootstrap behind the baseline's interval: nothing is decided by it."""

CALENDAR: Final = {Op.TENURE_DAYS, Op.SIGNUP_DAYS}
"""Grow with the calendar for everybody at once: what a model learns of them lies outside the range it will serve."""
CLOCK: Final = {Op.HOUR_SIN, Op.HOUR_COS, Op.WEEKDAY_SIN, Op.WEEKDAY_COS}
"""Tell snapshots (always at midnight) from events, so they would answer another question than the one asked."""

_RISK_UP: Final = {"purchase_age_days", "purchase_age_per_gap"}
_RISK_DOWN: Final = {"purchase_days_90d", "purchase_days_life", "purchase_rate_life", "active_days_30d", "active_days_90d"}
_MORE_IS_SAFER: Final = {M["purchases"], M["spend"]}

_FIXED: Final[Mapping[str, Any]] = {
    "objective": "binary:logistic",
    "tree_method": "hist",
    "nthread": 1,  # the same bits on every machine; two threads are slower on rows this few
    "seed": 0,
    "eta": 0.06,
    "min_child_weight": 50,
    "subsample": 0.7,
    "colsample_bynode": 0.5,
}
CANDIDATES: Final[tuple[Mapping[str, int], ...]] = ({"max_depth": 3, "rounds": 150}, {"max_depth": 4, "rounds": 120})


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller decides. thresholds: where "medium" and "high" begin; allow_high_auc: publish in spite of the leakage alarm."""

    name: str = "churn"
    medium: float = 0.3
    high: float = 0.6
    held_out_ms: int = HELD_OUT_MS
    parent: str = ""
    allow_high_auc: bool = False
    candidates: tuple[Mapping[str, int], ...] = field(default=CANDIDATES)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that passed every gate. `baseline_onnx` is the recency baseline's graph; it is kept, never served."""

    manifest: Manifest
    envelope: bytes
    baseline_onnx: bytes

    @property
    def digest(self) -> str:
        """The model's identity."""
        return self.manifest.digest


def columns_of(x: npt.NDArray[np.float32]) -> tuple[Columns, dict[str, list[str]]]:
    """Columns the trees may use, and the names left out by why: "calendar", "clock", "constant" (one value at most in these rows)."""
    dropped: dict[str, list[str]] = {"calendar": [], "clock": [], "constant": []}
    kept = []
    for column, feature in enumerate(CATALOG):
        values = x[:, column]
        known = values[~np.isnan(values)]
        if feature.op in CALENDAR:
            dropped["calendar"].append(feature.name)
        elif feature.op in CLOCK:
            dropped["clock"].append(feature.name)
        elif len(known) == 0 or (len(known) == len(values) and known.min() == known.max()):
            dropped["constant"].append(feature.name)
        else:
            kept.append(column)
    if not kept:
        raise BadInput("training: every feature has the same value in all rows; nothing can be learnt")
    return np.array(kept, np.intp), dropped


def direction(column: int) -> int:
    """What common sense allows: +1 the risk may only rise with the feature, -1 only fall, 0 either."""
    feature = CATALOG[column]
    if feature.name in _RISK_UP:
        return 1
    return -1 if feature.name in _RISK_DOWN or (feature.op is Op.TOTAL and feature.a in _MORE_IS_SAFER) else 0


def fit(rows: Rows, columns: Columns, candidate: Mapping[str, int]) -> xgboost.Booster:
    """Gradient-boosted trees on the rows; every argument is in `candidate` or fixed, so equal rows give equal trees."""
    constraints = "(" + ",".join(str(direction(int(column))) for column in columns) + ")"
    parameters = {**_FIXED, "max_depth": candidate["max_depth"], "monotone_constraints": constraints}
    return xgboost.train(parameters, xgboost.DMatrix(rows.x[:, columns], label=rows.y), candidate["rounds"])


def margins(booster: xgboost.Booster, columns: Columns, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Raw outputs (n,) of vectors (n, N_FEATURES), in log-odds before calibration."""
    return np.asarray(booster.predict(xgboost.DMatrix(x[:, columns]), output_margin=True), np.float64)


def train(rows: Rows, split: Split, options: Options | None = None) -> Trained:
    """The whole way from rows (models.dataset.build over the split's cut-offs) to a model ready to publish.

    1. The training rows are parted by time with a gap: candidates are fitted on the early part and compared on the late snapshots.
    2. Platt scaling is fitted on the late rows, for the early model: as far ahead of its training as the final model will serve.
    3. The best candidate is fitted on all training rows and takes the same two numbers. Test rows are looked at last, once.

    Raises BadInput when there are too few rows, ArtifactRejected when a gate refuses the result.
    """
    options = options or Options()
    mature = rows.y >= 0
    training = mature & (rows.at >= split.first) & (rows.at <= split.train_last)
    early_at, late_at = split.folds(rows.at, options.held_out_ms)
    early, late = rows.where(training & early_at), rows.where(training & late_at)
    late_snapshots = late.where(late.kind == SNAPSHOT)
    for name, part in (("early", early), ("late", late_snapshots)):
        if len(np.unique(part.y)) < 2:
            raise BadInput(
                f"training: {len(part)} labelled rows in the {name} part, both churned and stayed customers are needed; "
                "move the split on, or shorten the label"
            )
    everything = rows.where(training)
    columns, dropped = columns_of(everything.x)

    tried = []
    for candidate in options.candidates:
        booster = fit(early, columns, candidate)
        tried.append((evaluate.auc(late_snapshots.y, margins(booster, columns, late_snapshots.x)), candidate, booster))
    best, candidate, first = max(tried, key=lambda entry: entry[0])
    gates.check_auc(best, "validation", allow=options.allow_high_auc)
    platt = calibrate.fit(margins(first, columns, late.x), late.y)
    recency = baseline.fit(early.x, early.y)
    metrics: dict[str, Any] = {"validation": _measure(platt.probabilities(margins(first, columns, late_snapshots.x)), late_snapshots)}
    baseline_metrics: dict[str, Any] = {"validation": _measure(recency.score(late_snapshots.x), late_snapshots, BASELINE_DRAWS)}

    booster = fit(everything, columns, candidate)
    recency = baseline.fit(everything.x, everything.y)
    test = rows.where(mature & (rows.at >= split.at) & (rows.kind == SNAPSHOT))
    if len(np.unique(test.y)) == 2:
        metrics["test"] = _measure(platt.probabilities(margins(booster, columns, test.x)), test)
        baseline_metrics["test"] = _measure(recency.score(test.x), test, BASELINE_DRAWS)
        gates.check_auc(metrics["test"]["auc"], "test", allow=options.allow_high_auc)

    held_out = np.concatenate([late.x, test.x])
    forest = export.forest_of(booster, columns, platt)
    onnx = graph.write(forest, N_FEATURES)
    graph.read(onnx, N_FEATURES)
    session = Session(onnx)
    passed = gates.check_scores(session, held_out, platt.probabilities(margins(booster, columns, held_out)), (options.medium, options.high))
    golden = _golden(held_out)
    tables = Tables(export.shares(forest, export.covers(booster)), golden, session.probabilities(golden))
    onnx_sha256 = sha256(onnx).hexdigest()
    manifest = Manifest(
        name=options.name,
        version=f"{np.datetime64(split.at, 'ms').astype('datetime64[D]')}.{onnx_sha256[:8]}",
        parent=options.parent,
        layout_hash=LAYOUT_HASH,
        features_used=[NAMES[column] for column in columns],
        onnx_sha256=onnx_sha256,
        tables_sha256=sha256(tables.encode()).hexdigest(),
        calibration=Calibration(slope=platt.a, offset=platt.b),
        thresholds=Thresholds(medium=options.medium, high=options.high, version=f"{options.medium:g}-{options.high:g}"),
        label=split.label.as_dict(),
        data=_data(rows, split, {"early": early, "late": late, "training": everything, "test": test}),
        training=_training(candidate, dropped, tried, platt),
        metrics=metrics,
        baseline={**recency.as_dict(), "metrics": baseline_metrics},
        gates=passed.as_dict(),
        runtime=_runtime(),
    )
    return Trained(manifest, pack(manifest, onnx, tables), recency.onnx)


def _measure(score: npt.NDArray[np.float64], rows: Rows, draws: int = evaluate.DRAWS) -> dict[str, Any]:
    return evaluate.measure(rows.y, score, rows.customer, draws=draws).as_dict()


def _golden(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows spread evenly over the hold-out, and the corners: nothing known, all zero, very large, very small."""
    spread = x[np.linspace(0, len(x) - 1, min(len(x), GOLDEN_ROWS)).astype(np.intp)]
    corners = [np.full(N_FEATURES, value, np.float32) for value in (np.nan, 0.0, 1e30, -1e30)]
    return np.concatenate([spread, np.stack(corners)])


def _data(rows: Rows, split: Split, parts: Mapping[str, Rows]) -> dict[str, Any]:
    return {
        "split_ms": split.at,
        "first_cutoff_ms": split.first,
        "train_last_ms": split.train_last,
        "known_to_ms": rows.known_to_ms,
        "rows": {name: len(part) for name, part in parts.items()},
        "base_rate": {name: round(float(part.y.mean()), 4) if len(part) else None for name, part in parts.items()},
        "training_sha256": parts["training"].digest(),
    }


def _training(
    candidate: Mapping[str, int], dropped: dict[str, list[str]], tried: list[tuple[float, Mapping[str, int], xgboost.Booster]], platt: Platt
) -> dict[str, Any]:
    return {
        "chosen": dict(candidate),
        "fixed": dict(_FIXED),
        "tried": [{**entry, "validation_auc": round(auc, 4)} for auc, entry, _ in tried],
        "dropped": dropped,
        "calibrated_on": "late rows, by the model of the early rows",
        "platt": [platt.a, platt.b],
    }


def _runtime() -> dict[str, str]:
    packages = ("xgboost-cpu", "onnxruntime", "onnx", "onnxmltools", "numpy")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def _version(package: str) -> str:
    # `xgboost` takes the place of `xgboost-cpu` on machines with a GPU.
    return xgboost.__version__ if package == "xgboost-cpu" else installed(package)
