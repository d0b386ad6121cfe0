"""What a real worker left on real Kafka and Redis, told again."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bench.small_model import small
from features.catalog import N_FEATURES
from models import registry
from streams.commands.explain import explainer_of
from streams.commands.replay import partition as replayed
from streams.commands.verify import partition as compared
from streams.feature_log import export
from streams.log import KafkaLog
from streams.replay import Replayed
from streams.rerun import EVER, Span
from streams.skew import Skew
from streams.topics import client_config, create, producer_config
from tests.conftest import Completed
from tests.e2e.test_worker import SHARED_DATA, Deployment, deployment

__all__ = ["deployment"]

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.xdist_group("workers")]


def test_the_past_is_proven_explained_and_replayed(deployment: Deployment, churnstream: Callable[..., Completed], tmp_path: Path) -> None:
    # Transactions leave holes in the offsets of the outputs: the harder case.
    environment = deployment.environment | {"CHURN_DELIVERY": "exactly_once", "CHURN_FEATURE_LOG": "true", "CHURN_SILENCE": "daily"}
    environment |= {"CHURN_DATA_DIR": SHARED_DATA}
    settings = deployment.settings.model_copy(update={"feature_log": True, "silence": "daily"})
    live = replace(deployment, environment=environment, settings=settings)
    create(settings)
    digests, silent = [], 0
    for seed, start_ms in ((0, 1_700_000_000_000), (1, 1_700_200_000_000)):
        model = small(12, 3, seed)
        registry.publish(producer_config(settings), settings.prefixed("churn-models"), model.manifest, model.envelope)
        digests.append(model.manifest.digest)
        live.feed(1_000, seed=seed, start_ms=start_ms)
        done = live.work()
        assert done["scores"] == 1_000
        assert done["residue"] == 0
        silent += done["silence"]

    assert silent > 100  # two midnights lie between the feeds
    verified = churnstream("verify", "skew", "--processes", "1", "--json", environment=environment)
    assert verified.code == 0, verified.err
    found = verified.json()
    assert found["rows"] == found["vectors"] == 2_000 + silent
    assert found["mismatches"] == 0
    assert list(found["scores_by_model"]) == digests
    # With another setting than the workers' the outputs are not what the inputs say.
    other = Skew()
    for number in range(settings.partitions):
        other.add(compared(settings.model_copy(update={"reasons_top": 1}), number, Span(), None)[0])
    assert other.rows == 2_000 + silent
    assert other.by.keys() == {"reasons"}

    score = json.loads(live.read("churn-scores")[0][-1][1])
    explainer = explainer_of(settings, 5)
    assert explainer.score(score["score_id"]) == score
    made = explainer.explain(score)
    assert made.proven
    assert made.source == "Redis"
    assert explainer.latest(score["customer_id"], 0, score["at"])["at"] == score["at"]

    log = KafkaLog(client_config(settings), timeout_s=20)
    rows = [export(log, settings.prefixed("churn-features"), number, tmp_path / "f", -EVER, EVER) for number in range(settings.partitions)]
    log.close()
    assert sum(rows) == 2_000 + silent
    assert pq.read_table(tmp_path / "f").num_columns == 11 + N_FEATURES

    total = Replayed()
    for number in range(settings.partitions):
        total.add(replayed(settings, number, Span(), None, digests[1][:12], tmp_path / "r", True)[0])
    assert total.compared == pq.read_table(tmp_path / "r").num_rows == 2_000 + silent
    assert 1_000 <= total.equal < 2_000 + silent  # what the second model scored is what it says again
