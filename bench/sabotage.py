"""Twenty-four models that must not come into service, each refused by the gate it was made for; and twenty sound ones, accepted.

    python -m bench.sabotage [--json]

All go the real way: lint, gates on scores, the gate table, the envelope, the scorer a worker opens. Data are made up: who churns follows
from three features, so that what is planted is known.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import xgboost

from bench.small_model import manifest_of
from features.catalog import N_FEATURES, NAMES
from models import attainable, calibrate, evaluate, export, gates, graph, lint, safety, trees
from models.artifact import Tables, pack
from models.calibrate import Platt, sigmoid
from models.dataset import SNAPSHOT, Rows
from models.graph import Forest
from models.policy import Policy
from models.safety import Rival
from models.session import Session
from models.trees import Grown
from proto.errors import ArtifactRejected
from scoring.scorer import load

Floats = npt.NDArray[np.float64]
_USED: Final = ("purchase_age_days", "login_count_30d", "ticket_count_30d", "nps_last", "login_count_7d")
AGE, LOGINS, TICKETS, RATING, WEEK = (NAMES.index(name) for name in _USED)
COLUMNS: Final = np.array([AGE, LOGINS, TICKETS, RATING], np.intp)
POLICY: Final = Policy(auc=0.8, precision_high=0.7, precision_contact=0.6, recall_contact=0.3, f1_contact=0.4, calibration_error=0.03)
GOOD: Final = 20


def rows_of(seed: int, n: int = 6_000) -> Rows:
    """Three rows of each customer; two groups of equal risk in each profile column."""
    rng = np.random.default_rng(seed)
    x = np.zeros((n, N_FEATURES), np.float32)
    x[:, AGE] = rng.exponential(30, n)
    x[:, LOGINS] = rng.poisson(4, n)
    x[:, WEEK] = rng.poisson(1, n).clip(0, 3)
    x[:, TICKETS] = rng.poisson(1, n)
    x[:, RATING] = np.where(rng.random(n) < 0.3, rng.integers(0, 11, n), np.nan)
    margin = 0.08 * x[:, AGE] - 0.6 * x[:, LOGINS] + 0.7 * x[:, TICKETS] - 1.2
    y = (rng.random(n) < sigmoid(margin.astype(np.float64))).astype(np.int8)
    customer = np.arange(n) // 3
    group = np.repeat(rng.integers(1, 3, (n // 3, 4)), 3, axis=0)
    return Rows(x, y, np.tile(np.arange(3), n // 3), customer, np.full(n, SNAPSHOT, np.uint8), group, tuple(map(str, range(n // 3))), 10)


@dataclass(frozen=True)
class Made:
    """A trained model before its gates: forest as exported, margins by its trainer, calibration, thresholds, champion's scores."""

    train: Rows
    late: Rows
    test: Rows
    grown: Grown
    margin: Callable[[npt.NDArray[np.float32]], Floats]
    platt: Platt
    edges: tuple[float, float]
    rival: Rival | None = None

    def score(self, x: npt.NDArray[np.float32]) -> Floats:
        """Calibrated probabilities by the trainer."""
        return self.platt.probabilities(self.margin(x))


def make(train: Rows, late: Rows, test: Rows, *, depth: int = 3, rounds: int = 60) -> Made:
    """Fit, calibrate, choose thresholds."""
    parameters = {"objective": "binary:logistic", "max_depth": depth, "eta": 0.15, "tree_method": "hist", "nthread": 1, "seed": 0}
    booster = xgboost.train(parameters, xgboost.DMatrix(train.x[:, COLUMNS], label=train.y), rounds)

    def margin(x: npt.NDArray[np.float32]) -> Floats:
        return np.asarray(booster.predict(xgboost.DMatrix(x[:, COLUMNS]), output_margin=True), np.float64)

    platt = calibrate.fit(margin(late.x), late.y)
    score = platt.probabilities(margin(late.x))
    contact = round(evaluate.threshold_for(late.y, score, 0.70), 4)
    high = round(max(evaluate.threshold_for(late.y, score, 0.80), contact + 0.01), 4)
    return Made(train, late, test, Grown(export.forest_of(booster, COLUMNS), export.covers(booster)), margin, platt, (contact, high))


def sound(seed: int) -> Made:
    """A model nothing is wrong with."""
    return make(*(rows_of(3 * seed + part) for part in range(3)), depth=2 + seed % 3)


def judge(made: Made, onnx_of: Callable[[bytes], bytes] = lambda text: text, tables_of: Callable[[Tables], Tables] = lambda t: t) -> None:
    """The whole way to a worker. Raises ArtifactRejected with the gate's name."""
    lint.check(lint.lint(made.train))
    late = made.platt.probabilities(made.margin(made.late.x))
    gates.check_auc(evaluate.auc(made.late.y, late), "validation")
    scaled = trees.scaled(made.grown, made.platt)
    text = onnx_of(graph.write(scaled.forest, N_FEATURES))
    graph.read(text, N_FEATURES)
    session = Session(text)
    held_out = np.concatenate([made.late.x, made.test.x])
    passed = gates.check_scores(session, held_out, made.score(held_out), made.edges)
    test = made.test
    reached = attainable.figures(test.y, made.score(test.x), *made.edges)
    found = safety.measure(test, made.score, made.edges[0], passed.as_dict(), POLICY, session=session, rival=made.rival)
    _check((*attainable.table(reached, None, None, POLICY), *found.gates))
    tables = tables_of(Tables(export.shares(scaled.forest, scaled.cover), held_out[:48], session.probabilities(held_out[:48])))
    load(pack(manifest_of(text, tables), text, tables))


def _check(table: Sequence[attainable.Row]) -> None:
    failed = [f"{row.gate} {row.reached:.4g}, {row.required:g} required" for row in table if not row.passed]
    if failed:
        raise ArtifactRejected("gate " + "; gate ".join(failed))


def planted(rows: Rows, column: int, values: Any) -> Rows:
    x = rows.x.copy()
    x[:, column] = values
    return replace(rows, x=x)


def leaky(spread: float) -> Made:
    parts = [rows_of(part) for part in range(3)]
    rng = np.random.default_rng(9)
    parts = [planted(rows, RATING, rows.y * 4 + rng.normal(0, spread, len(rows))) for rows in parts]
    return make(*parts)


def scored(change: Callable[[Made, npt.NDArray[np.float32], Floats], Floats]) -> Made:
    """A model whose trainer's own scores are changed, in margins: what the figures then say of it."""
    made = sound(0)
    plain = made.margin
    return replace(made, margin=lambda x: change(made, x, plain(x)))


def forested(change: Callable[[Forest], Forest]) -> Made:
    """A model whose exported trees are not its trainer's."""
    made = sound(0)
    return replace(made, grown=Grown(change(made.grown.forest), made.grown.cover))


def relabelled(change: Callable[[npt.NDArray[np.int8]], npt.NDArray[np.int8]]) -> Made:
    parts = [rows_of(part) for part in range(3)]
    return make(replace(parts[0], y=change(parts[0].y)), parts[1], parts[2])


def _swapped(forest: Forest) -> Forest:
    feature = forest.feature.copy()
    feature[forest.feature == AGE], feature[forest.feature == LOGINS] = LOGINS, AGE
    return replace(forest, feature=feature)


def _model(text: bytes, change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_model_from_string(text)
    change(model)
    return bytes(model.SerializeToString())


def _operator(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Sigmoid", [graph.OUTPUT], ["more"]))


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 22


def _output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "score"


def _golden(tables: Tables) -> Tables:
    return replace(tables, golden_probability=np.clip(tables.golden_probability + np.float32(0.01), 0, 1))


def _few(tables: Tables) -> Tables:
    return replace(tables, share=tables.share[:-1])


def _matching(change: Callable[[Made, npt.NDArray[np.float32], Floats], Floats]) -> Callable[[], None]:
    """Only the gate table is asked: there is no forest with such scores."""

    def run() -> None:
        made = scored(change)
        test = made.test
        reached = attainable.figures(test.y, made.score(test.x), *made.edges)
        exact = {"onnx_parity_max": 0.0, "threshold_flips": 0, "batch_dependent_rows": 0}
        found = safety.measure(test, made.score, made.edges[0], exact, POLICY, rival=made.rival)
        _check((*attainable.table(reached, None, None, POLICY), *found.gates))

    return run


def _beaten() -> None:
    made = sound(0)
    judge(replace(made, rival=Rival("better", "0" * 64, made.score(made.test.x) + 0.2 * made.test.y)))


def _equalled() -> None:
    made = sound(0)
    judge(replace(made, rival=Rival("itself", "0" * 64, made.score(made.test.x))))


def _flipping() -> None:
    made = sound(0)
    text = graph.write(trees.scaled(made.grown, made.platt).forest, N_FEATURES)
    x = np.concatenate([made.late.x, made.test.x])
    apart = np.abs(Session(text).probabilities(x) - made.score(x))
    row = int(np.argmax(apart))
    edge = (float(Session(text).probabilities(x)[row]) + float(made.score(x)[row])) / 2
    judge(replace(made, edges=(edge, 0.99)))


def _past() -> None:
    rows = rows_of(0)
    later = planted(rows, TICKETS, rows.x[:, TICKETS] + rows.y)

    def rebuilt(at: int) -> Rows:
        return rows.where(rows.at == at)

    lint.check(lint.past_the_cut(later, rebuilt))


SABOTAGE: Final[dict[str, tuple[str, Callable[[], None]]]] = {
    "the label as a feature": ("AUC", lambda: judge(leaky(0.3))),
    "a feature that nearly is the label": ("AUC", lambda: judge(leaky(1.2))),
    "a customer's number as a feature": (
        "an id",
        lambda: judge(make(*(planted(r, RATING, 1e3 + r.customer) for r in map(rows_of, range(3))))),
    ),
    "features of the day after the cut": ("past_the_cut|change without the future", _past),
    "labels turned round": ("turn the order", lambda: judge(relabelled(lambda y: (1 - y).astype(np.int8)))),
    "labels drawn by lot": ("gate auc|turn the order", lambda: judge(relabelled(lambda y: np.random.default_rng(5).permutation(y)))),
    "leaves half as large again": ("apart", lambda: judge(forested(lambda f: replace(f, weight=f.weight * np.float32(1.5))))),
    "another base": ("apart", lambda: judge(forested(lambda f: replace(f, base=f.base + 0.5)))),
    "two columns swapped": ("apart", lambda: judge(forested(_swapped))),
    "missing values sent the other way": ("apart", lambda: judge(forested(lambda f: replace(f, missing_yes=~f.missing_yes)))),
    "branches the wrong way round": ("apart", lambda: judge(forested(lambda f: replace(f, yes=f.no, no=f.yes)))),
    "a model that says one thing": ("learnt nothing", lambda: judge(forested(lambda f: replace(f, weight=f.weight * 0)))),
    "a threshold between graph and trainer": ("another band", _flipping),
    "an operator more": ("", lambda: judge(sound(0), lambda text: _model(text, _operator))),
    "another opset": ("", lambda: judge(sound(0), lambda text: _model(text, _opset))),
    "another output": ("", lambda: judge(sound(0), lambda text: _model(text, _output))),
    "golden rows that score otherwise": ("golden", lambda: judge(sound(0), tables_of=_golden)),
    "shares of other trees": ("shares", lambda: judge(sound(0), tables_of=_few)),
    "probabilities twice as sure": ("gate calibration_error", _matching(lambda made, x, m: 2.5 * m)),
    "one age band hardly found": ("gate fairness", _matching(lambda made, x, m: m - 3.0 * (made.test.profile[:, 3] == 1))),
    "scores that hang on the last digit": ("gate robust_noise", _matching(lambda made, x, m: m + 6 * np.modf(x[:, AGE] * 50)[0] - 3)),
    "a burst of logins turns the order round": ("gate robust_spike", _matching(lambda made, x, m: np.where(x[:, WEEK] > 3, -m, m))),
    "worse than the champion": ("better_than_champion", _beaten),
    "no better than the champion": ("better_than_champion", _equalled),
}
"""What is done, and words of the refusal that shows the right gate spoke ("" = any refusal of the graph)."""


def refusals() -> dict[str, str]:
    """What each sabotaged model was refused for; "" = it was let through, or refused by another gate."""
    found = {}
    for name, (words, run) in SABOTAGE.items():
        try:
            run()
            found[name] = ""
        except ArtifactRejected as error:
            found[name] = str(error) if any(word in str(error) for word in words.split("|")) else ""
            if not found[name]:
                print(f"{name}: refused for something else: {error}", file=sys.stderr)
    return found


def accepted() -> dict[int, str]:
    """Why each sound model was refused; "" = it was not."""
    found = {}
    for seed in range(GOOD):
        try:
            judge(sound(seed))
            found[seed] = ""
        except ArtifactRejected as error:
            found[seed] = str(error)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.parse_args()
    refused, good = refusals(), accepted()
    for name, why in refused.items():
        print(f"{'refused' if why else 'LET THROUGH'}: {name}: {why}", file=sys.stderr)
    for seed, why in good.items():
        if why:
            print(f"REFUSED although sound: {seed}: {why}", file=sys.stderr)
    result = {
        "sabotaged": len(refused),
        "refused": sum(bool(why) for why in refused.values()),
        "not_refused": sum(not why for why in refused.values()),
        "let_through": [name for name, why in refused.items() if not why],
        "sound": len(good),
        "accepted": sum(not why for why in good.values()),
        "refused_though_sound": sum(bool(why) for why in good.values()),
    }
    print(json.dumps(result))
    return 0 if not result["let_through"] and not result["refused_though_sound"] else 1


if __name__ == "__main__":
    sys.exit(main())
