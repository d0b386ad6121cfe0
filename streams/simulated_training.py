"""From nothing to a champion on the simulated population: simulate, make rows, compare learners, hold them against the oracle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
from pyarrow.parquet import ParquetFile

from features.texts import digests, key_of
from features.window import DAY_MS
from models import attainable, evaluate, labels, lint, safety, tuning
from models.attainable import Part
from models.dataset import Rows
from models.learners import ALL, LEARNERS
from models.policy import Policy
from models.population import AGE_BANDS, CUTOFF_DAYS, HIDDEN, PLANS, REGIONS, SEGMENTS, Scenario
from models.split import Split
from models.train import HELD_OUT_MS, Options, Trained, train
from proto.errors import BadInput
from streams import datasets, simulate
from streams.datasets import Plan
from streams.settings import Settings

FIRST_DAY: Final = 90
"""Before that every window is half empty."""
TEST_DAYS: Final = 90
MAX_ROWS: Final = 600_000
ORACLE_DISTANCE: Final = 0.005
"""An AUC so far above the oracle's is a leak."""


@dataclass(frozen=True, slots=True)
class Run:
    """A trained model, its gate table, figures of oracle and observer, what the model cannot see, and what each step took (s)."""

    trained: Trained
    gates: list[attainable.Row]
    safety: safety.Safety
    oracle: dict[str, float]
    observer: dict[str, float]
    blind: list[dict[str, Any]]
    seconds: dict[str, float]
    rows: int
    findings: list[lint.Finding]
    quality: dict[str, Any]
    split: Split
    directory: Path


def run(
    settings: Settings,
    scenario: Scenario,
    label_name: str,
    *,
    learners: tuple[str, ...] = ALL,
    folds: int = 3,
    policy: Policy | None = None,
    curve: tuple[float, ...] = (),
    blind: bool = False,
    tune: tuning.Wish | None = None,
    rival: Callable[[Rows, str], safety.Rival | None] = lambda test, label: None,
    say: Callable[[str], None],
) -> Run:
    """The whole way. curve, blind: also a learning curve, and which hidden causes the vector cannot see. rival: the model in service.

    Raises BadInput for a simulation too short for the label, ArtifactRejected for a leak or a graph that is not exact.
    """
    label = labels.load(label_name)
    policy = policy or Policy()
    seconds: dict[str, float] = {}
    begin = time.perf_counter()

    def done(step: str, text: str) -> None:
        nonlocal begin
        seconds[step] = round(time.perf_counter() - begin, 1)
        say(f"{step}: {text}, {seconds[step]:.1f} s")
        begin = time.perf_counter()

    end = scenario.start_ms + scenario.days * DAY_MS
    split = Split(end - TEST_DAYS * DAY_MS - label.horizon_ms % DAY_MS, scenario.start_ms + FIRST_DAY * DAY_MS, end, label)
    # Cut-offs on the grid of the hidden state.
    grid = [scenario.start_ms + day * DAY_MS for day in scenario.cutoffs]
    wanted = tuple(at for at in grid if split.first <= at <= split.train_last or split.at <= at <= split.test_last)
    if not any(at >= split.at for at in wanted) or split.train_last - split.first < 4 * CUTOFF_DAYS * DAY_MS:
        raise BadInput(f"{scenario.months} months are too short for the label {label.name}; simulate more, or choose a shorter label")

    directory = settings.data_dir / f"simulated-{scenario.customers}-{scenario.months}m-seed{scenario.seed}"
    if (directory / simulate.SCENARIO).exists():
        done("simulate", f"{directory} is there already")
    else:
        events = simulate.write(scenario, directory)
        done("simulate", f"{events:,} events of {scenario.customers:,} customers")
    plan = Plan(label, wanted, None, end, share=min(1.0, MAX_ROWS / (scenario.customers * len(wanted))))
    dataset = datasets.of_simulation(directory, simulate.parts(directory), plan, settings)
    lint.check(dataset.findings)
    datasets.save(dataset, plan, settings.data_dir / "datasets", {"kind": "simulation", "directory": directory.name})
    rows = dataset.rows
    done("rows", f"{len(rows):,} rows at {len(wanted)} cut-offs")

    chosen = tuple(LEARNERS[name] for name in learners)
    tuned = None
    if tune is not None:
        tuned = tuning.tune(rows, split, tune, HELD_OUT_MS, folds, rows.digest(), say)
        chosen = (*chosen, tuned.learner)
        done("tune", tuned.text)
    options = Options(
        learners=chosen,
        folds=folds,
        ensembles=True,
        board=True,
        medium=None,
        high=None,
        allow_high_auc=True,  # the oracle decides below what is too good
        curve=curve,
        tuning=tuned.as_dict() if tuned else None,
    )
    trained = train(rows, split, options)
    done("train", f"champion {trained.manifest.training['chosen']}")

    thresholds, test = trained.manifest.thresholds, trained.test
    seen = _Seen(directory, rows, split, options.held_out_ms, test)
    oracle = attainable.oracle(*seen.parts(seen.hidden))
    observer = attainable.observer(*seen.parts(seen.told), oracle)
    score = trained.score(test.x)
    known, told = (_figures(seen, scores) for scores in (oracle, observer))
    reached = attainable.figures(test.y, score, thresholds.medium, thresholds.high)
    attainable.check_not_above(reached["auc"], known["auc"], ORACLE_DISTANCE)
    done(
        "oracle",
        f"AUC {known['auc']:.4f} with the hidden state, {told['auc']:.4f} by its pupil who sees events, {reached['auc']:.4f} reached",
    )
    causes = _blind(seen, oracle, trained.columns) if blind else []
    found = safety.measure(
        test,
        trained.score,
        thresholds.medium,
        trained.manifest.gates,
        policy,
        session=trained.session,
        names=group_names(settings),
        rival=rival(test, label.name),
    )
    errors = sum(finding.error for finding in dataset.findings)
    leaks = attainable.Row("leakage", 0.0, float(errors), at_most=True, note="errors of the lint")
    gates = [*attainable.table(reached, known, told, policy), leaks, *found.gates]
    done("gates", f"{sum(row.passed for row in gates)} of {len(gates)} passed")
    return Run(trained, gates, found, known, told, causes, seconds, len(rows), dataset.findings, dataset.quality, split, directory)


def group_names(settings: Settings) -> dict[int, str]:
    """Texts of the population's groups by the digest a fact holds."""
    words = [*PLANS, *SEGMENTS, *REGIONS, *AGE_BANDS]
    key = key_of(settings.digest_key.get_secret_value().encode(), "text")
    return dict(zip(digests(words, key).tolist(), words, strict=True))


def _figures(seen: _Seen, scores: attainable.Scores) -> dict[str, float]:
    contact, high = attainable.chosen(seen.late.y, scores.late)
    return attainable.figures(seen.test.y, scores.test, contact, high)


OBSERVABLE: Final = ("cancelled", "days_to_bill", "annual", "failed_tries", "tenure_days", "plan", "segment")
"""Hidden columns that a firm could know from its books, so an observer may see them beside the vector."""
CAUSES: Final = {
    "the decision": ("phase", "days_decided"),
    "satisfaction": ("satisfaction", "level"),
    "who the customer is": ("sessions_a_day", "explicit", "patience", "need", "price_sense"),
    "bills and contract": OBSERVABLE,
    "the end of the contract": ("days_left",),
}
"""What an observer may be told, one at a time, to see which of it the vector lacks."""


def _blind(seen: _Seen, oracle: attainable.Scores, columns: npt.NDArray[np.intp]) -> list[dict[str, Any]]:
    """AUC of the vector and of the vector with each hidden cause, by the oracle's pupil: what the vector cannot see, and what it costs."""

    def area(told: tuple[str, ...]) -> float:
        scores = attainable.observer(*seen.parts(lambda rows: seen.beside(rows, columns, told)), oracle)
        return round(evaluate.auc(seen.test.y, scores.test), 4)

    alone = area(())
    found = [{"told": "nothing: the vector alone", "auc": alone, "gained": 0.0}]
    for cause, names in CAUSES.items():
        with_it = area(names)
        found.append({"told": cause, "columns": list(names), "auc": with_it, "gained": round(with_it - alone, 4)})
    return found


class _Seen:
    """The rows of early, late and test as oracle and observer see them."""

    def __init__(self, directory: Path, rows: Rows, split: Split, held_out_ms: int, test: Rows) -> None:
        training = rows.where((rows.y >= 0) & (rows.at >= split.first) & (rows.at <= split.train_last))
        early_at, late_at = split.folds(training.at, held_out_ms)
        self.early, self.late, self.test = training.where(early_at), training.where(late_at), test
        self._hidden = _Hidden(directory)

    def parts(self, look: Callable[[Rows], npt.NDArray[np.float32]]) -> tuple[Part, Part, Part]:
        """The three parts through one pair of eyes."""
        early, late, test = (Part(look(rows), rows.y) for rows in (self.early, self.late, self.test))
        return early, late, test

    def hidden(self, rows: Rows) -> npt.NDArray[np.float32]:
        """All of the hidden state."""
        return self._hidden.of(rows)

    def told(self, rows: Rows) -> npt.NDArray[np.float32]:
        """The whole vector and what the books say."""
        return self.beside(rows, np.arange(rows.x.shape[1]), OBSERVABLE)

    def beside(self, rows: Rows, columns: npt.NDArray[np.intp], names: tuple[str, ...]) -> npt.NDArray[np.float32]:
        """Columns of the vector and some of the hidden state."""
        hidden = self._hidden.of(rows)[:, [HIDDEN.index(name) for name in names]]
        return np.column_stack([rows.x[:, columns], hidden])


class _Hidden:
    """The hidden state of a simulation by customer and cut-off."""

    def __init__(self, directory: Path) -> None:
        keys, values = [], []
        for block in simulate.parts(directory):
            table = ParquetFile(directory / "hidden" / simulate.part(block)).read()
            keys.append(_keys(table["customer_id"].cast("string").to_pylist(), np.asarray(table["at"])))
            values.append(np.column_stack([np.asarray(table[name]) for name in HIDDEN]))
        key = np.concatenate(keys)
        self._order = np.argsort(key)
        self._keys, self._values = key[self._order], np.concatenate(values)

    def of(self, rows: Rows) -> npt.NDArray[np.float32]:
        """(n, len(HIDDEN)) for the rows."""
        numbers = np.array([int(name) for name in rows.names], np.int64)
        wanted = numbers[rows.customer] * _FAR + rows.at
        place = np.searchsorted(self._keys, wanted)
        if not np.array_equal(self._keys[place], wanted):
            raise BadInput("the simulation has no hidden state for a row; simulate again")
        found: npt.NDArray[np.float32] = self._values[self._order[place]]
        return found


_FAR: Final = 2**42


def _keys(customers: list[str], at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.array([int(name) for name in customers], np.int64) * _FAR + at


def report(run: Run) -> dict[str, Any]:
    """What the command prints as JSON."""
    found: dict[str, Any] = orjson.loads(
        orjson.dumps(
            {
                "leaderboard": run.trained.board,
                "gate_table": [row.as_dict() for row in run.gates],
                "gates_met": all(row.met for row in run.gates),
                "gates_passed": all(row.passed for row in run.gates),
                "auc_oracle": round(run.oracle["auc"], 4),
                "auc_observer": round(run.observer["auc"], 4),
                "auc_gap_to_oracle": round(run.oracle["auc"] - run.gates[0].reached, 4),
                "auc_gap_to_observer": round(run.observer["auc"] - run.gates[0].reached, 4),
                "blind_to": run.blind,
                "learning_curve": run.trained.curve,
                "tuning": run.trained.manifest.training.get("tuning"),
                "robustness": run.safety.robustness,
                "fairness": run.safety.differences,
                "against_champion": run.safety.champion,
                "seconds_by_step": run.seconds,
                "lint": [finding.as_dict() for finding in run.findings],
                "training_rows": run.rows,
            }
        )
    )
    return found
