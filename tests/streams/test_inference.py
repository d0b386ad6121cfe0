"""A model that fails on one vector: that event gets the fallback's score, said so, and the batch goes on."""

from __future__ import annotations

import json

import numpy as np
import numpy.typing as npt
import pytest

from features.memory_store import MemoryStore
from proto.scores import ScoreRecord
from streams.metrics import residue
from tests.streams.test_engine import Log, Scattered, digests, engine_on, run, shelf, start, world


class Failing(Scattered):
    """Gives no probability for a tenth of all vectors."""

    def score(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        probability = super().score(vectors)
        return np.where(probability < 0.1, np.float32(np.nan), probability)

    def bands(self, probability: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
        return np.where(np.isnan(probability), np.uint8(0), super().bands(probability))


class Ending(Failing):
    """As before this was handled: the error ends the batch."""

    def score(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        probability = super().score(vectors)
        if np.isnan(probability).any():
            raise RuntimeError("the operator failed")
        return probability


def scored(model: Failing | Scattered) -> tuple[Log, MemoryStore, dict[str, int]]:
    store, log, models = MemoryStore(), Log(), shelf()
    models.known[model.digest], models.now = model, model.digest
    engine = engine_on(store, log, models)
    run(engine, start(engine, world(5, events=600), "n"))
    return log, store, dict(engine.totals)


def test_one_row_that_fails_costs_one_fallback_and_no_batch() -> None:
    log, _, totals = scored(Failing("five", 0.3, 0.6))
    sound, _, expected = scored(Scattered("five", 0.3, 0.6))
    assert totals == expected
    assert residue(totals) == 0
    failed = 0
    for record, other in zip(log.records(), sound.records(), strict=True):
        ScoreRecord.model_validate(record)
        if other["probability"] < 0.1:
            failed += 1
            assert (record["fallback"], record["probability"], record["band"], record["reasons"]) == (True, 0.5, "unknown", [])
            assert record["model_digest"] == "five"  # which failed
            assert record["vector_hash"] == other["vector_hash"]
        else:
            assert record == other | {"scored_at": record["scored_at"], "alert_band": record["alert_band"]}
            assert not record["fallback"]
    assert failed > 20
    # No band is no reason to alert: the band alerted before stays.
    assert log.alerted
    assert all(json.loads(value)["to_band"] != "unknown" for _, value in log.alerted)


def test_the_same_rows_fail_again_and_give_the_same_bytes() -> None:
    first, again = scored(Failing("five", 0.3, 0.6)), scored(Failing("five", 0.3, 0.6))
    assert first[0].written == again[0].written
    assert digests(first[1]) == digests(again[1])


def test_an_error_out_of_a_model_ends_the_batch() -> None:
    """Why a Scorer gives NaN instead (tests/scoring/test_scorer.py)."""
    models = shelf()
    models.known["five"], models.now = Ending("five", 0.3, 0.6), "five"
    engine = engine_on(MemoryStore(), Log(), models)
    merge = start(engine, world(5, events=600), "n")
    with pytest.raises(RuntimeError, match="the operator failed"):
        run(engine, merge)
