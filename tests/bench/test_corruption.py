"""A sample of the corrupted models: no layer accepts what it should not, none crashes, and each layer is what refuses."""

from __future__ import annotations

import pytest

from bench import corruption
from models import graph
from models.signature import Trust, envelope_of
from streams.settings import Settings


def test_each_layer_refuses_on_its_own() -> None:
    figures = corruption.layers(120)
    for name, tally in figures["layers"].items():
        assert (tally["accepted_wrong"], tally["crashes"], tally["wrong"]) == (0, 0, []), name
    for name in ("signature", "digest"):
        assert figures["layers"][name]["refused"] >= 115, name
    assert figures["layers"]["structure"]["refused"] > sum(1 for _ in corruption.hostile())
    assert figures["layers"]["golden"]["refused"] > 0


def test_a_layer_that_looks_away_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trust, "open", lambda _, value, __: envelope_of(value))
    monkeypatch.setattr(graph, "ALLOWED_OPERATORS", {*graph.ALLOWED_OPERATORS, ("", "Loop")})
    monkeypatch.setattr(graph, "_check_frame", lambda _: None)
    layers = corruption.layers(20)["layers"]
    assert layers["signature"]["accepted_wrong"] > 10
    assert layers["structure"]["accepted_wrong"] > 0


@pytest.mark.servers
def test_a_worker_keeps_its_champion_through_a_sample(settings: Settings) -> None:
    figures = corruption.served(settings, 60, signed=True)
    assert figures["refused"] == figures["cases"]
    assert figures["looks"] > 0
    assert (figures["looks_without_champion"], figures["thread_failures"]) == (0, 0)
    assert figures["sound_one_taken_afterwards"]
