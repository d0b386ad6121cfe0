"""Faust's own consumer rebalances in mid-stream: every batch is scored once; a feeder that would not send again is caught."""

from __future__ import annotations

from typing import Any

import pytest

from bench.rebalance import measure
from streams.settings import Settings

pytestmark = [pytest.mark.servers, pytest.mark.slow]


def run(settings: Settings, fault: str) -> dict[str, Any]:
    kafka, redis = settings.kafka_bootstrap_servers, settings.redis_url.get_secret_value()
    return measure(settings, kafka, redis, rebalances=3, hold_s=0.05, fault=fault)


def test_rebalances_of_the_control_consumer_lose_no_batch(settings: Settings) -> None:
    figures = run(settings, "")
    assert figures["failures"] == []
    assert figures["batches_lost"] == figures["residue"] == 0
    assert figures["rebalances"] >= 3
    assert figures["items_resent"] >= 1  # what was lost on the way was seen and sent again
    assert figures["scores"] == figures["events_in"] == figures["events_scored_once"] == figures["events"]


def test_without_sending_again_the_same_run_is_red(settings: Settings) -> None:
    figures = run(settings, "no-resend")
    assert figures["batches_lost"] > 0
    assert "a batch was lost" in figures["failures"]
