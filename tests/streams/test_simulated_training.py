"""The whole way on a small population: a champion that is exact, beats recency and not the oracle; what is kept and shown of it."""

import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from models import lint, pages, report
from models.population import Process, Scenario
from models.registry import save
from models.tuning import Wish, tune
from proto.errors import BadInput
from scoring.scorer import load
from streams import datasets, evaluations, simulated_training
from streams.commands.models import app
from streams.settings import Settings
from streams.simulated_training import Run

SCENARIO = Scenario(700, 12, process=Process(base=1.5e-3))
LEARNERS = ("xgboost-weighted", "logistic")


def trained(directory: Path, *, more: bool) -> Run:
    return simulated_training.run(
        Settings(data_dir=directory),
        SCENARIO,
        "silent-30d",
        learners=LEARNERS,
        folds=2,
        curve=(0.5, 1.0) if more else (),
        blind=more,
        say=lambda text: None,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture(scope="module")
def done(home: Path) -> Run:
    return trained(home, more=True)


@pytest.fixture(scope="module")
def body(done: Run) -> dict[str, Any]:
    return report.body(done.trained, done.gates, done.safety, {"blind_spots": done.blind, "warnings": ["<odd>"]}, draws=20)


def test_from_nothing_to_a_gate_table(done: Run, home: Path) -> None:
    manifest = done.trained.manifest
    found = simulated_training.report(done)
    chosen: Any = manifest.training["chosen"]
    assert found["leaderboard"][0]["learner"] == chosen["learner"]
    assert {entry["learner"] for entry in found["leaderboard"]} == {*LEARNERS, "average", "stack"}
    assert all(entry["parity"] < 1e-5 for entry in found["leaderboard"])
    reached = {row["gate"]: row for row in found["gate_table"]}
    assert 0.8 < reached["auc"]["reached"] <= found["auc_oracle"] + simulated_training.ORACLE_DISTANCE
    assert {"leakage", "parity", "robust_noise", "robust_spike", "robust_finite", "latency_us"} < set(reached)
    load(done.trained.envelope, digest=manifest.digest)
    save(home / "models", manifest, done.trained.envelope)
    assert list((home / "datasets").glob("*/manifest.json"))


def test_what_the_vector_lacks_is_the_decision_nobody_announces(done: Run) -> None:
    assert done.observer["auc"] < done.oracle["auc"]
    gained = {entry["told"]: entry["gained"] for entry in done.blind}
    assert max(gained, key=lambda cause: gained[cause]) == "the decision"


def test_the_same_seed_gives_the_same_model(done: Run, tmp_path: Path) -> None:
    """From the simulation on, in another directory, and whatever else is measured on the way."""
    again = trained(tmp_path, more=False)
    assert again.trained.digest == done.trained.digest
    assert again.trained.envelope == done.trained.envelope


def test_an_evaluation_is_kept_and_its_page_needs_nothing_else(done: Run, body: dict[str, Any], tmp_path: Path) -> None:
    names = simulated_training.group_names(Settings())
    home = evaluations.save(tmp_path, done.trained, body, names)
    assert evaluations.find(tmp_path, None) == evaluations.find(tmp_path, home.name[:8]) == home
    kept, rows = evaluations.body_of(home), evaluations.rows_of(home)
    assert kept["model"]["digest"] == home.name
    assert len(rows.y) == kept["rows"] == len(done.trained.test)
    assert set(rows.groups["segment"]) <= {"consumer", "small_business", "enterprise", "unknown"}
    assert kept["figures"]["auc"][0] == pytest.approx(done.gates[0].reached, abs=1e-4)
    page = (home / evaluations.PAGE).read_text()
    assert page == pages.html(kept)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|@import|url\((?!#)", page)  # only places within the page
    assert page.count("<svg") == 6
    assert "&lt;odd&gt;" in page
    assert all(row.gate in page for row in done.gates)
    with pytest.raises(BadInput, match="none is kept"):
        evaluations.find(tmp_path / "nowhere", None)


def command(home: Path, *words: str) -> tuple[int, Any]:
    """Exit by an error or not, and the JSON object of a command of `churnstream models`."""
    found = CliRunner().invoke(app, [*words, "--json"], env={"CHURN_DATA_DIR": str(home)})
    said = found.stdout.splitlines()
    return 0 if found.exception is None else 1, orjson.loads(said[-1]) if said else found.exception


def test_the_commands_that_read_an_evaluation(done: Run, body: dict[str, Any], home: Path, tmp_path: Path) -> None:
    evaluations.save(home / "evaluations", done.trained, body, simulated_training.group_names(Settings()))
    failed, shown = command(home, "report", "--out", str(tmp_path / "page.html"))
    assert (failed, shown["model"]["digest"]) == (0, done.trained.digest)
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")

    failed, free = command(home, "what-if", "--cost", "1", "--benefit", "100", "--success", "0.5")
    assert failed == 0
    assert free["best"]["net_interval"][0] < free["best"]["net"] < free["best"]["net_interval"][1]
    assert sum(entry["net"] for entry in free["by_group"]) == pytest.approx(free["best"]["net"], abs=0.1)
    failed, bound = command(home, "what-if", "--cost", "1", "--benefit", "100", "--success", "0.5", "--capacity", "2")
    assert bound["best"]["contacts"] <= 2
    assert bound["best"]["net"] <= free["best"]["net"]
    assert command(home, "what-if", "--recall", "0.01", "--precision", "0.1")[0] == 0
    failed, no = command(home, "what-if", "--recall", "1", "--precision", "1")
    assert (failed, no["feasible"]) == (1, False)


def test_build_dataset_gives_the_same_digest_twice_and_stops_at_a_leak(done: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (simulation,) = home.glob("simulated-*")
    words = ("build-dataset", "--simulation", str(simulation), "--label", "silent-30d", "--step-days", "45")
    failed, first = command(home, *words)
    assert (failed, command(home, *words)[1]["digest"]) == (0, first["digest"])
    assert 0 < first["labelled"] < first["rows"]
    rows, manifest = datasets.load(Path(first["directory"]))
    assert (len(rows), manifest["label"]["name"]) == (first["rows"], first["label"])
    planted = lint.Finding("too_good", "csat_last", 1.0, "planted", True)
    monkeypatch.setattr(lint, "lint", lambda rows: [planted])
    failed, leaky = command(home, *words)
    assert (failed, leaky["lint"][0]["feature"]) == (1, "csat_last")


def test_a_tuning_goes_on_where_it_was(done: Run, home: Path, tmp_path: Path) -> None:
    kept = min((home / "datasets").glob("*"), key=lambda one: -(one / datasets.ROWS).stat().st_size)
    rows, _ = datasets.load(kept)
    rows = rows.where(rows.customer % 2 == 0)
    said: list[str] = []

    def search(trials: int) -> Any:
        return tune(rows, done.split, Wish(trials, tmp_path / "studies.log"), 30 * 86_400_000, 1, rows.digest(), said.append)

    first = search(2)
    assert (first.finished + first.pruned, len(said)) == (2, 2)
    second = search(3)
    assert (second.finished + second.pruned, len(said)) == (3, 3)
    assert second.auc >= first.auc
    assert search(3).parameters == second.parameters
    assert len(said) == 3


def test_a_simulation_too_short_for_its_label_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="too short"):
        simulated_training.run(Settings(data_dir=tmp_path), Scenario(700, 7), "silent-30d", say=lambda text: None)
    assert not list(tmp_path.iterdir())
