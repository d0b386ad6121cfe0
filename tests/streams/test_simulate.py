"""A simulation in files: read as the codec would read it, merged in order of arrival, the same bytes again."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from pyarrow.parquet import ParquetFile
from typer.testing import CliRunner

from features.facts import TOPICS
from models import population
from models.population import Process, Scenario
from proto.errors import BadInput, Reason
from streams import simulate, training
from streams.settings import Settings

SCENARIO = Scenario(300, 4, process=Process(base=2e-3), late=0.05, duplicates=0.02, broken=0.01)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The scenario in blocks of 128 customers, and the number of its events."""
    out = tmp_path_factory.mktemp("simulated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "BLOCK", 128)
        return out, simulate.write(SCENARIO, out, processes=1)


def test_columns_become_the_facts_that_the_codec_makes_of_the_same_events(written: tuple[Path, int]) -> None:
    out, events = written
    settings = Settings()
    rejected = 0
    for block in simulate.parts(out):
        fast = training.from_simulation(out, block, settings)
        decode = training.decoder(settings).decode
        decoded = []
        for topic, name in enumerate(TOPICS):
            rows = ParquetFile(out / name / simulate.part(block)).read().to_pylist()
            messages = [training.FileMessage(simulate.record_of(name, row)[1], i) for i, row in enumerate(rows)]
            decoded.append(decode(topic, 0, messages))
        slow = training.merged(decoded)
        assert {Reason(r) for part in decoded for r in part.reason.tolist()} == {
            Reason.ACCEPTED,
            Reason.MISSING_FIELD,
            Reason.BEFORE_2000,
        }
        np.testing.assert_array_equal(fast.facts, slow.facts)
        assert fast.customers == slow.customers
        assert fast.rejected == slow.rejected > 0
        rejected += fast.rejected
        events -= len(fast.facts)
    assert events == rejected


def test_records_come_in_order_of_arrival_over_all_parts(written: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    out, events = written
    arrived: dict[tuple[str, str], int] = {}
    for topic in TOPICS:
        for block in simulate.parts(out):
            for row in ParquetFile(out / topic / simulate.part(block)).read(["event_id", "arrived"]).to_pylist():
                arrived.setdefault((topic, row["event_id"]), row["arrived"])
    order, seen = [], set()
    for record in simulate.records(out):
        key = (record.topic, record.event_id)
        if key not in seen:  # a duplicate arrives again later
            order.append(arrived[key])
        seen.add(key)
    assert len(seen) == len(arrived)
    assert order == sorted(order)
    assert simulate.to_json_lines(out, out.parent / "events.jsonl") == events


def test_the_same_scenario_gives_the_same_bytes_and_another_one_is_refused(written: tuple[Path, int], tmp_path: Path) -> None:
    out, _ = written
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(population, "BLOCK", 128)
        simulate.write(SCENARIO, tmp_path / "again", processes=1)

    def digests(directory: Path) -> dict[str, str]:
        return {str(p.relative_to(directory)): sha256(p.read_bytes()).hexdigest() for p in sorted(directory.rglob("*")) if p.is_file()}

    assert digests(out) == digests(tmp_path / "again")
    with pytest.raises(BadInput, match="another simulation"):
        simulate.write(replace(SCENARIO, seed=1), out)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "something").touch()
    with pytest.raises(BadInput, match="not empty"):
        simulate.write(SCENARIO, tmp_path / "half")
    with pytest.raises(BadInput, match="no finished simulation"):
        simulate.parts(tmp_path / "half")


def test_the_truth_says_what_became_of_everybody(written: tuple[Path, int]) -> None:
    found = simulate.summary(written[0])
    assert found["left_if_offered"] > 0
    assert sum(found["left"].values()) > 20
    assert 0.2 < found["yearly_churn"] < 0.9


def test_the_command_refuses_what_cannot_be_simulated(tmp_path: Path) -> None:
    from streams.commands.simulate import app

    result = CliRunner().invoke(app, ["--out", str(tmp_path / "x"), "--churn-rate", "2"])
    assert "churn-rate" in str(result.exception)
