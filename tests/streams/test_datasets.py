"""Training sets of a simulation: the same rows whatever the processes and parts, kept and read back bit for bit."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow.parquet import ParquetFile, write_table

from features.window import DAY_MS
from models import lint, population
from models.dataset import Rows, build
from models.labels import load
from models.population import START_MS, Process, Scenario
from proto.errors import BadInput
from streams import datasets, simulate, training
from streams.datasets import Dataset, Plan
from streams.settings import Settings

SCENARIO = Scenario(240, 6, process=Process(base=2e-3), late=0.05, duplicates=0.02, broken=0.01)
PLAN = Plan(load("silent-30d"), tuple(START_MS + day * DAY_MS for day in (60, 90, 120)), None, START_MS + 182 * DAY_MS)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "BLOCK", 120)
        simulate.write(SCENARIO, out, processes=1)
    return out


@pytest.fixture(scope="module")
def dataset(simulated: Path) -> Dataset:
    return datasets.of_simulation(simulated, [0, 1], PLAN, Settings(), processes=1)


def contents(rows: Rows) -> set[tuple[str, int, int, bytes]]:
    return {(rows.names[c], int(t), int(y), x.tobytes()) for c, t, y, x in zip(rows.customer, rows.at, rows.y, rows.x, strict=True)}


def test_parts_give_the_rows_of_their_customers_and_nothing_stops_the_training(simulated: Path, dataset: Dataset) -> None:
    parts = [training.from_simulation(simulated, block, Settings()) for block in (0, 1)]
    assert contents(dataset.rows) == contents(datasets.of_parts(parts, PLAN).rows)
    assert 0.02 < dataset.rows.y.mean() < 0.5
    assert (dataset.rows.profile != 0).mean() > 0.95  # some profiles are broken
    lint.check(dataset.findings)
    assert dataset.quality["facts"]["rejected"] > 0


def test_a_share_takes_the_same_rows_however_they_are_parted(simulated: Path, dataset: Dataset) -> None:
    half = replace(PLAN, share=0.5)
    some = contents(datasets.of_simulation(simulated, [0, 1], half, Settings(), processes=1).rows)
    assert some < contents(dataset.rows)
    assert len(some) == pytest.approx(len(dataset.rows) / 2, rel=0.2)
    one = contents(datasets.of_simulation(simulated, [1], half, Settings(), processes=1).rows)
    assert one == {entry for entry in some if int(entry[0]) >= 120}


def test_late_facts_are_in_the_corrected_view_only(simulated: Path, dataset: Dataset) -> None:
    corrected = datasets.of_simulation(simulated, [0, 1], replace(PLAN, corrected=True), Settings(), processes=1)
    differ = len(contents(corrected.rows) - contents(dataset.rows)) / len(dataset.rows)
    assert 0.003 < differ < 0.2


def test_the_lint_that_needs_facts_runs_over_them(simulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded fault: rows made with the facts of the day after their instant."""
    honest = build

    def peeping(customers: list[str], facts: np.ndarray, label: object, snapshots: tuple[int, ...], **rest: object) -> Rows:
        rows = honest(customers, facts, label, [at + DAY_MS for at in snapshots], **rest)  # type: ignore[arg-type]  # passed on as they came
        return replace(rows, at=rows.at - DAY_MS)

    monkeypatch.setattr(datasets, "build", peeping)
    found = datasets.of_simulation(simulated, [0], PLAN, Settings(), processes=1).findings
    assert any(finding.check == "past_the_cut" and finding.error for finding in found)


def test_a_kept_set_is_the_same_set_and_a_damaged_one_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    home = datasets.save(dataset, PLAN, tmp_path, {"kind": "test"})
    rows, manifest = datasets.load(home)
    assert contents(rows) == contents(dataset.rows)
    assert (rows.digest(), rows.known_to_ms) == (dataset.rows.digest(), dataset.rows.known_to_ms)
    np.testing.assert_array_equal(rows.profile, dataset.rows.profile)
    assert manifest["label"]["name"] == PLAN.label.name
    assert datasets.save(dataset, PLAN, tmp_path, {"kind": "test"}) == home

    table = ParquetFile(home / datasets.ROWS).read()
    write_table(table.slice(1), home / datasets.ROWS)
    with pytest.raises(BadInput, match="not those of the manifest"):
        datasets.load(home)
    with pytest.raises(BadInput, match="no training set"):
        datasets.load(tmp_path / "nowhere")
