"""What can be fitted to labelled rows: boosted trees, a random forest, a scorecard, a neural network; and what can be served of it.

A learner gives a margin in log-odds. One that is a sum of trees is served as such (models.graph); the others only stand in the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xgboost
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import OneHotEncoder

from features.catalog import CATALOG, M, Op
from models import export, trees
from models.dataset import Rows
from models.trees import Grown

Columns = npt.NDArray[np.intp]
Vectors = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

BINS: Final = 8
SMOOTHING: Final = 2.0
"""Rows of the base rate added to a leaf of the random forest before its log-odds are taken."""

_RISK_UP: Final = {"purchase_age_days", "purchase_age_per_gap"}
_RISK_DOWN: Final = {"purchase_days_90d", "purchase_days_life", "purchase_rate_life", "active_days_30d", "active_days_90d"}
_MORE_IS_SAFER: Final = {M["purchases"], M["spend"]}

FIXED: Final[Mapping[str, Any]] = {
    "objective": "binary:logistic",
    "tree_method": "hist",
    "nthread": 1,  # the same bits on every machine; two threads are slower on rows this few
    "seed": 0,
    "eta": 0.06,
    "min_child_weight": 50,
    "subsample": 0.7,
    "colsample_bynode": 0.5,
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted learner. margin: log-odds before calibration, float64 (n,), of vectors (n, N_FEATURES), by the library that fitted it.
    grown: the same as trees, None when it is none. settings: what was chosen on the way."""

    margin: Callable[[Vectors], Floats]
    grown: Grown | None
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Learner:
    """A way to fit. max_rows: more rows than these are thinned out evenly in time; 0 = all."""

    name: str
    family: str
    fitted: Callable[[Rows, Columns], Fitted]
    servable: bool
    max_rows: int = 0

    def fit(self, rows: Rows, columns: Columns) -> Fitted:
        """Fit on labelled rows, using some columns of the layout; equal rows give an equal result."""
        if self.max_rows and len(rows) > self.max_rows:
            keep = np.zeros(len(rows), np.bool_)
            keep[np.random.default_rng(0).choice(len(rows), self.max_rows, replace=False)] = True
            rows = rows.where(keep)
        return self.fitted(rows, columns)


def direction(column: int) -> int:
    """What common sense allows: +1 the risk may only rise with the feature, -1 only fall, 0 either."""
    feature = CATALOG[column]
    if feature.name in _RISK_UP:
        return 1
    return -1 if feature.name in _RISK_DOWN or (feature.op is Op.TOTAL and feature.a in _MORE_IS_SAFER) else 0


def boosted(name: str, *, depth: int, rounds: int, weighted: bool = False) -> Learner:
    """Gradient-boosted trees by XGBoost with common sense as constraints; rounds: fixed, or (negative) the most, with early stopping.

    weighted: churned rows count as much as the stayed ones together; calibration takes it back.
    """

    def fit(rows: Rows, columns: Columns) -> Fitted:
        parameters: dict[str, Any] = {**FIXED, "max_depth": depth}
        parameters["monotone_constraints"] = "(" + ",".join(str(direction(int(column))) for column in columns) + ")"
        if weighted:
            parameters["scale_pos_weight"] = float((rows.y == 0).sum() / max((rows.y == 1).sum(), 1))
        if rounds < 0:
            # The same number of rows in a leaf whatever the base rate: at 1 in 2 this is what FIXED says.
            parameters["min_child_weight"] = max(4 * FIXED["min_child_weight"] * float(rows.y.mean() * (1 - rows.y.mean())), 1.0)
        chosen = rounds if rounds > 0 else _rounds(rows, columns, parameters, -rounds)
        booster = xgboost.train(parameters, xgboost.DMatrix(rows.x[:, columns], label=rows.y), chosen)

        def margin(x: Vectors) -> Floats:
            return np.asarray(booster.predict(xgboost.DMatrix(x[:, columns]), output_margin=True), np.float64)

        grown = Grown(export.forest_of(booster, columns), export.covers(booster))
        return Fitted(margin, grown, {"max_depth": depth, "rounds": chosen, "weighted": weighted})

    return Learner(name, "boosted trees", fit, servable=True, max_rows=400_000)


def tuned(parameters: Mapping[str, Any]) -> Learner:
    """Boosted trees with parameters of XGBoost found by a search (models.tuning), stopped early, with common sense as constraints."""

    def fit(rows: Rows, columns: Columns) -> Fitted:
        own: dict[str, Any] = {**FIXED, **parameters}
        own["monotone_constraints"] = "(" + ",".join(str(direction(int(column))) for column in columns) + ")"
        chosen = _rounds(rows, columns, own, 800)
        booster = xgboost.train(own, xgboost.DMatrix(rows.x[:, columns], label=rows.y), chosen)

        def margin(x: Vectors) -> Floats:
            return np.asarray(booster.predict(xgboost.DMatrix(x[:, columns]), output_margin=True), np.float64)

        grown = Grown(export.forest_of(booster, columns), export.covers(booster))
        return Fitted(margin, grown, {**parameters, "rounds": chosen})

    return Learner("xgboost-tuned", "boosted trees", fit, servable=True, max_rows=400_000)


def _rounds(rows: Rows, columns: Columns, parameters: Mapping[str, Any], most: int) -> int:
    """Where the log loss on the last fifth of the time stops falling."""
    edge = np.quantile(rows.at, 0.8)
    early, late = rows.at < edge, rows.at >= edge
    if len(np.unique(rows.y[early])) < 2 or len(np.unique(rows.y[late])) < 2:
        return most // 4
    data = [xgboost.DMatrix(rows.x[part][:, columns], label=rows.y[part]) for part in (early, late)]
    stopped = xgboost.train(
        {**parameters, "eval_metric": "logloss"}, data[0], most, evals=[(data[1], "late")], early_stopping_rounds=25, verbose_eval=False
    )
    return int(stopped.best_iteration) + 1


def _random_forest(rows: Rows, columns: Columns) -> Fitted:
    """scikit-learn's trees, put together as the mean of their leaves' log-odds, so that calibration is a straight line."""
    count, depth = 80, 7
    model = RandomForestClassifier(
        count, max_depth=depth, min_samples_leaf=30, max_features="sqrt", max_samples=0.5, random_state=0, n_jobs=1
    )
    model.fit(rows.x[:, columns], rows.y)
    rate = float(rows.y.mean())
    leaves = []
    for estimator in model.estimators_:
        n = estimator.tree_.weighted_n_node_samples
        p = (estimator.tree_.value[:, 0, 1] * n + SMOOTHING * rate) / (n + SMOOTHING)
        leaves.append(np.log(p / (1 - p)) / count)

    def margin(x: Vectors) -> Floats:
        node = model.apply(x[:, columns])
        return np.asarray(np.sum([leaf[node[:, tree]] for tree, leaf in enumerate(leaves)], axis=0), np.float64)

    grown = trees.of_sklearn(model.estimators_, leaves, columns)
    return Fitted(margin, grown, {"trees": count, "max_depth": depth})


def _scorecard(rows: Rows, columns: Columns) -> Fitted:
    """Logistic regression on features cut into bins by their quantiles, a missing value being a bin of its own."""
    x = rows.x[:, columns]
    edges = []
    for column in range(x.shape[1]):
        known = x[~np.isnan(x[:, column]), column]
        cuts = np.unique(np.quantile(known, np.arange(1, BINS) / BINS, method="higher")) if len(known) else np.empty(0, np.float32)
        # An edge at the smallest value would leave its lower bin empty.
        edges.append(cuts[cuts > known.min()].astype(np.float32) if len(known) else cuts)
    sizes = np.array([len(edge) + 2 for edge in edges])
    first = np.cumsum(sizes) - sizes

    def places(x: Vectors) -> npt.NDArray[np.int64]:
        found = np.empty((len(x), len(columns)), np.int64)
        for i, (column, edge) in enumerate(zip(columns.tolist(), edges, strict=True)):
            value = x[:, column]
            found[:, i] = first[i] + np.where(np.isnan(value), len(edge) + 1, np.searchsorted(edge, value, side="right"))
        return found

    at = places(rows.x)
    design = OneHotEncoder(categories=[np.arange(start, start + size) for start, size in zip(first, sizes, strict=True)]).fit_transform(at)
    model = LogisticRegression(C=0.02, max_iter=300).fit(design, rows.y)
    points, base = model.coef_[0].astype(np.float64), float(model.intercept_[0])
    count = np.bincount(at.ravel(), minlength=len(points)).astype(np.float64)

    def margin(x: Vectors) -> Floats:
        return np.asarray(base + points[places(x)].sum(axis=1), np.float64)

    bounds = [slice(start, start + size) for start, size in zip(first.tolist(), sizes.tolist(), strict=True)]
    grown = trees.of_scorecard(edges, [points[b] for b in bounds], [count[b] for b in bounds], columns, base)
    return Fitted(margin, grown, {"bins": BINS, "C": 0.02})


def _network(rows: Rows, columns: Columns) -> Fitted:
    """Two hidden layers on winsorised, standardised features with missing indicators; all of it fitted on these rows."""
    x = rows.x[:, columns].astype(np.float64)
    low, middle, high = np.nan_to_num(np.nanquantile(x, (0.01, 0.5, 0.99), axis=0))
    gaps = np.isnan(x).any(axis=0)

    def prepared(x: Vectors) -> Floats:
        values = x[:, columns].astype(np.float64)
        missing = np.isnan(values)
        values = np.clip(np.where(missing, middle, values), low, high)
        return np.hstack([np.sign(values) * np.log1p(np.abs(values)), missing[:, gaps]])

    design = prepared(rows.x)
    mean, spread = design.mean(axis=0), design.std(axis=0)
    spread[spread == 0] = 1.0
    model = MLPClassifier((32, 16), alpha=1e-3, early_stopping=True, n_iter_no_change=5, max_iter=60, random_state=0)
    model.fit((design - mean) / spread, rows.y)

    def margin(x: Vectors) -> Floats:
        p = np.clip(model.predict_proba((prepared(x) - mean) / spread)[:, 1], 1e-9, 1 - 1e-9)
        return np.asarray(np.log(p / (1 - p)), np.float64)

    return Fitted(margin, None, {"layers": [32, 16], "epochs": int(model.n_iter_)})


LEARNERS: Final = {
    learner.name: learner
    for learner in (
        boosted("xgboost-d3", depth=3, rounds=150),
        boosted("xgboost-d4", depth=4, rounds=120),
        boosted("xgboost", depth=5, rounds=-500),
        boosted("xgboost-weighted", depth=4, rounds=120, weighted=True),
        Learner("forest", "random forest", _random_forest, servable=True, max_rows=120_000),
        Learner("logistic", "logistic regression", _scorecard, servable=True, max_rows=120_000),
        Learner("mlp", "neural network", _network, servable=False, max_rows=60_000),
    )
}
QUICK: Final = ("xgboost-d3", "xgboost-d4")
ALL: Final = tuple(LEARNERS)
