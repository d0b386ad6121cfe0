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

from features.window import DAY_MS
from models import attainable, labels, lint
from models.attainable import Part
from models.dataset import SNAPSHOT, Rows
from models.learners import ALL, LEARNERS
from models.population import CUTOFF_DAYS, HIDDEN, Scenario
from models.split import Split
from models.train import Options, Trained, train
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
    """A trained model, its gate table, and what each step took (s)."""

    trained: Trained
    gates: list[attainable.Row]
    oracle: dict[str, float]
    seconds: dict[str, float]
    rows: int
    findings: list[lint.Finding]
    directory: Path


def run(
    settings: Settings, scenario: Scenario, label_name: str, *, learners: tuple[str, ...] = ALL, folds: int = 3, say: Callable[[str], None]
) -> Run:
    """The whole way. Raises BadInput for a simulation too short for the label, ArtifactRejected for a leak or a graph that is not exact."""
    label = labels.load(label_name)
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

    options = Options(
        learners=tuple(LEARNERS[name] for name in learners),
        folds=folds,
        ensembles=True,
        board=True,
        medium=None,
        high=None,
        allow_high_auc=True,  # the oracle decides below what is too good
    )
    trained = train(rows, split, options)
    done("train", f"champion {trained.manifest.training['chosen']}")

    thresholds = trained.manifest.thresholds
    test = rows.where((rows.y >= 0) & (rows.at >= split.at) & (rows.kind == SNAPSHOT))
    best, other = _oracle(directory, rows, split, options.held_out_ms, test)
    contact, high = attainable.chosen(*best)
    known = attainable.figures(test.y, other, contact, high)
    reached = attainable.figures(test.y, trained.test_score, thresholds.medium, thresholds.high)
    attainable.check_not_above(reached["auc"], known["auc"], ORACLE_DISTANCE)
    done("oracle", f"AUC {known['auc']:.4f} with the hidden state, {reached['auc']:.4f} without")
    return Run(trained, attainable.table(reached, known), known, seconds, len(rows), dataset.findings, directory)


def _oracle(
    directory: Path, rows: Rows, split: Split, held_out_ms: int, test: Rows
) -> tuple[tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """The oracle's view of the late rows (labels, scores) and of the test rows (scores)."""
    training = rows.where((rows.y >= 0) & (rows.at >= split.first) & (rows.at <= split.train_last))
    early_at, late_at = split.folds(training.at, held_out_ms)
    found = _Hidden(directory)
    parts = [Part(found.of(part), part.y) for part in (training.where(early_at), training.where(late_at), test)]
    late, tested = attainable.oracle(*parts)
    return (parts[1].y, late), tested


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
                "seconds_by_step": run.seconds,
                "lint": [finding.as_dict() for finding in run.findings],
                "training_rows": run.rows,
            }
        )
    )
    return found
