"""Labelled rows to a publishable model: choose and calibrate on a later slice, fit on all training rows, export, pass the gates."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version as installed
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xgboost

from features.catalog import CATALOG, LAYOUT_HASH, N_FEATURES, NAMES, Op
from features.window import DAY_MS
from models import baseline, calibrate, evaluate, export, gates, graph, trees
from models.artifact import Calibration, Manifest, Tables, Thresholds, pack
from models.calibrate import Platt
from models.compete import Contender, Slice, compete, slices
from models.dataset import SNAPSHOT, Rows
from models.learners import LEARNERS, QUICK, Columns, Fitted, Learner
from models.session import Session
from models.split import Split
from proto.errors import BadInput

GOLDEN_ROWS: Final = 64
HELD_OUT_MS: Final = 30 * DAY_MS
TENURE: Final = NAMES.index("tenure_days")
NEW_DAYS: Final = 90
"""A customer is new for so long after the first event."""
BASELINE_DRAWS: Final = 200
"""Of the bootstrap behind the baseline's interval: nothing is decided by it."""

CALENDAR: Final = {Op.TENURE_DAYS, Op.SIGNUP_DAYS}
"""Grow with the calendar for everybody at once: what a model learns of them lies outside the range it will serve."""
CLOCK: Final = {Op.HOUR_SIN, Op.HOUR_COS, Op.WEEKDAY_SIN, Op.WEEKDAY_COS}
"""Tell snapshots (always at midnight) from events, so they would answer another question than the one asked."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller decides.

    medium, high: where the bands begin; None = chosen on the late rows for the precisions of gates.REQUIRED. allow_high_auc: publish in
    spite of the leakage alarm. folds: slices of time the learners are compared on. board: fit and test all of them on all training rows.
    """

    name: str = "churn"
    medium: float | None = 0.3
    high: float | None = 0.6
    held_out_ms: int = HELD_OUT_MS
    parent: str = ""
    allow_high_auc: bool = False
    learners: tuple[Learner, ...] = tuple(LEARNERS[name] for name in QUICK)
    folds: int = 1
    ensembles: bool = False
    board: bool = False
    curve: tuple[float, ...] = ()
    tuning: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """A model that passed every gate. `baseline_onnx` is the recency baseline's graph; it is kept, never served. `board`: leaderboard.

    test: the mature snapshots after the split (those of the late slice where there are none, and `tested` is False); score: their
    calibrated probabilities by the library that fitted it; recency: those of the baseline. curve: AUC by share of the training customers.
    """

    manifest: Manifest
    envelope: bytes
    baseline_onnx: bytes
    board: list[dict[str, Any]]
    test: Rows
    tested: bool
    score: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float64]]
    recency: npt.NDArray[np.float64]
    columns: Columns
    session: Session
    curve: list[dict[str, Any]]

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


def train(rows: Rows, split: Split, options: Options | None = None) -> Trained:
    """The whole way from rows (models.dataset.build over the split's cut-offs) to a model ready to publish.

    1. The training rows are parted by time with a gap: learners are fitted on the early part and compared on the late snapshots, if asked
       for over several such parts, each later than the last.
    2. Platt scaling is fitted on the late rows, for the early model: as far ahead of its training as the final model will serve.
    3. The best learner that can be served is fitted on all training rows and takes the same two numbers. Test rows are looked at last.

    Raises BadInput when there are too few rows, ArtifactRejected when a gate refuses the result.
    """
    options = options or Options()
    mature = rows.y >= 0
    everything = rows.where(mature & (rows.at >= split.first) & (rows.at <= split.train_last))
    test = rows.where(mature & (rows.at >= split.at) & (rows.kind == SNAPSHOT))
    chain = slices(everything, split, options.held_out_ms, options.folds)
    early, late = chain[-1].early, chain[-1].late
    snapshot = late.kind == SNAPSHOT
    columns, dropped = columns_of(everything.x)

    contenders = compete(chain, everything, columns, options.learners, ensembles=options.ensembles)
    best = max((one for one in contenders if one.servable), key=lambda one: one.auc)
    gates.check_auc(best.auc, "validation", allow=options.allow_high_auc)
    platt = calibrate.fit(best.late, late.y)
    late_score = platt.probabilities(best.late)[snapshot]
    thresholds = _thresholds(chain, best, options)
    recency = baseline.fit(early.x, early.y)
    metrics: dict[str, Any] = {"validation": _measure(late_score, late.where(snapshot))}
    baseline_metrics: dict[str, Any] = {"validation": _measure(recency.score(late.x[snapshot]), late.where(snapshot), BASELINE_DRAWS)}

    fitted = best.whole()
    assert fitted.grown is not None
    recency = baseline.fit(everything.x, everything.y)
    if len(np.unique(test.y)) == 2:
        metrics["test"] = _measure(platt.probabilities(fitted.margin(test.x)), test)
        baseline_metrics["test"] = _measure(recency.score(test.x), test, BASELINE_DRAWS)
        gates.check_auc(metrics["test"]["auc"], "test", allow=options.allow_high_auc)

    held_out = np.concatenate([late.x, test.x])
    grown = trees.scaled(fitted.grown, platt)
    onnx = graph.write(grown.forest, N_FEATURES)
    graph.read(onnx, N_FEATURES)
    session = Session(onnx)
    passed = gates.check_scores(session, held_out, platt.probabilities(fitted.margin(held_out)), (thresholds.medium, thresholds.high))
    golden = _golden(held_out)
    tables = Tables(export.shares(grown.forest, grown.cover), golden, session.probabilities(golden))
    board = leaderboard(contenders, late, test, measured=options.board)
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
        thresholds=thresholds,
        label=split.label.as_dict(),
        data=_data(rows, split, {"early": early, "late": late, "training": everything, "test": test}),
        training={**_training(best, fitted, contenders, dropped, platt), **({"tuning": dict(options.tuning)} if options.tuning else {})},
        metrics=metrics,
        baseline={**recency.as_dict(), "metrics": baseline_metrics},
        gates=passed.as_dict(),
        runtime=_runtime(),
    )
    tested = "test" in metrics
    judged = test if tested else late.where(snapshot)
    return Trained(
        manifest,
        pack(manifest, onnx, tables),
        recency.onnx,
        board,
        judged,
        tested,
        lambda x: platt.probabilities(fitted.margin(x)),
        recency.score(judged.x),
        columns,
        session,
        learning_curve(best, options.learners, everything, columns, judged, options.curve) if tested else [],
    )


def learning_curve(
    best: Contender, learners: Sequence[Learner], training: Rows, columns: Columns, test: Rows, shares: Sequence[float]
) -> list[dict[str, Any]]:
    """AUC on the test rows by how many of the training customers are learnt from, by the best learner that is not several together."""
    named = {learner.name: learner for learner in learners}
    learner = named.get(best.name) or next(learner for learner in learners if learner.servable)
    order = np.random.default_rng(0).permutation(np.unique(training.customer))
    points = []
    for share in shares:
        some = training.where(np.isin(training.customer, order[: max(1, round(share * len(order)))]))
        if len(np.unique(some.y)) < 2:
            continue
        margin = learner.fit(some, columns).margin(test.x)
        points.append(
            {
                "share": share,
                "customers": len(np.unique(some.customer)),
                "rows": len(some),
                "learner": learner.name,
                "auc": round(evaluate.auc(test.y, margin), 4),
            }
        )
    return points


def _training(
    best: Contender, fitted: Fitted, contenders: Sequence[Contender], dropped: dict[str, list[str]], platt: Platt
) -> dict[str, Any]:
    return {
        "chosen": {"learner": best.name, **fitted.settings},
        "tried": [{"learner": one.name, "validation_auc": [round(auc, 4) for auc in one.aucs]} for one in contenders],
        "dropped": dropped,
        "calibrated_on": "late rows, by the model of the early rows",
        "platt": [platt.a, platt.b],
    }


def leaderboard(contenders: Sequence[Contender], late: Rows, test: Rows, *, measured: bool) -> list[dict[str, Any]]:
    """The contenders, best first; with `measured` each fitted on all training rows and tested, new and existing customers apart.

    Each is calibrated as the champion is. `parity`: the largest distance between the library that fitted it and its trees in ONNX.
    """
    board = []
    for one in sorted(contenders, key=lambda one: -one.auc):
        entry: dict[str, Any] = {
            "learner": one.name,
            "family": one.family,
            "servable": one.servable,
            "validation_auc": [round(auc, 4) for auc in one.aucs],
            "validation_mean": round(one.auc, 4),
            "cpu_seconds": round(one.seconds, 1),
        }
        if measured and len(np.unique(test.y)) == 2:
            platt = calibrate.fit(one.late, late.y)
            fitted = one.whole()
            score = platt.probabilities(fitted.margin(test.x))
            entry["test"] = _measure(score, test, BASELINE_DRAWS)
            new = test.x[:, TENURE] < NEW_DAYS
            entry["auc_new"], entry["auc_existing"] = (_rounded_auc(test.y[part], score[part]) for part in (new, ~new))
            if fitted.grown is not None:
                onnx = graph.write(trees.scaled(fitted.grown, platt).forest, N_FEATURES)
                entry["parity"] = float(np.max(np.abs(Session(onnx).probabilities(test.x) - score)))
        board.append(entry)
    return board


def _rounded_auc(y: npt.NDArray[np.integer], score: npt.NDArray[np.float64]) -> float | None:
    return round(evaluate.auc(y, score), 4) if len(np.unique(y)) == 2 else None


def _thresholds(chain: Sequence[Slice], best: Contender, options: Options) -> Thresholds:
    """As stated, or chosen on the snapshots of all slices together, each calibrated by itself: one month has its own luck."""
    if options.medium is not None and options.high is not None:
        return Thresholds(medium=options.medium, high=options.high, version=f"{options.medium:g}-{options.high:g}")
    labels, scores = [], []
    for part, margin in zip(chain, best.margins, strict=True):
        shown = part.late.kind == SNAPSHOT
        labels.append(part.late.y[shown])
        scores.append(calibrate.fit(margin, part.late.y).probabilities(margin)[shown])
    y, score = np.concatenate(labels), np.concatenate(scores)
    medium = evaluate.threshold_for(y, score, gates.CONTACT_PRECISION + gates.MARGIN)
    high = max(evaluate.threshold_for(y, score, gates.HIGH_PRECISION + gates.MARGIN), medium + 0.01)
    medium, high = round(min(medium, 0.97), 4), round(min(high, 0.98), 4)
    return Thresholds(medium=medium, high=high, version=f"chosen-{medium:g}-{high:g}")


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


def _runtime() -> dict[str, str]:
    packages = ("xgboost-cpu", "onnxruntime", "onnx", "onnxmltools", "numpy")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


def _version(package: str) -> str:
    # `xgboost` takes the place of `xgboost-cpu` on machines with a GPU.
    return xgboost.__version__ if package == "xgboost-cpu" else installed(package)
