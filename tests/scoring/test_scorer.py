"""A model in service: checked on this machine, banded by its own thresholds; and what stands in when there is none."""

import numpy as np
import pytest

from bench.small_model import repacked, small
from features.catalog import LAYOUT_HASH, N_FEATURES
from models.artifact import Thresholds, unpack
from models.session import Session, Vectors
from proto.errors import ArtifactRejected
from proto.scores import BANDS
from scoring.bands import HIGH, UNKNOWN, bands
from scoring.fallback import Fallback
from scoring.scorer import Scorer, load

THRESHOLDS = Thresholds(medium=0.3, high=0.6, version="x")


def test_the_edge_belongs_to_the_higher_band() -> None:
    below = np.nextafter(0.6, 0)
    found = bands(np.array([0.0, np.nextafter(0.3, 0), 0.3, below, 0.6, 1.0]), THRESHOLDS)
    assert [BANDS[code] for code in found] == ["low", "low", "medium", "medium", "high", "high"]


def test_a_float32_probability_is_compared_as_the_number_it_is() -> None:
    """float32(0.3) lies above 0.3, float32(0.6) too: comparing in float32 would give the same here, but not for 0.7."""
    just_below = np.array([0.7], np.float32)  # 0.699999988
    assert BANDS[bands(just_below, Thresholds(medium=0.1, high=0.7, version="x"))[0]] == "medium"


def test_a_model_is_loaded_with_its_identity() -> None:
    model = small()
    scorer = load(model.envelope, digest=model.manifest.digest)
    assert (scorer.digest, scorer.name, scorer.version) == (model.manifest.digest, "test", "1")
    assert (scorer.layout_hash, scorer.threshold_version, scorer.fallback) == (LAYOUT_HASH, "test", False)
    score = scorer.score(model.x)
    assert score.dtype == np.float32
    assert scorer.bands(score).dtype == np.uint8


def test_golden_rows_that_score_otherwise_refuse_the_model() -> None:
    model = small()
    wrong = model.tables.golden_probability.copy()
    wrong[5] += np.float32(1e-5) if wrong[5] < 0.5 else -np.float32(1e-5)
    with pytest.raises(ArtifactRejected, match="golden rows score"):
        Scorer(unpack(repacked(golden_probability=wrong)))


def test_scores_do_not_depend_on_their_neighbours() -> None:
    scorer = Scorer(unpack(small().envelope))
    x = small().x[:100]
    together = scorer.score(x)
    for size in (1, 3, 16, 17, 99):
        parts = np.concatenate([scorer.score(x[i : i + size]) for i in range(0, 100, size)])
        np.testing.assert_array_equal(parts.view(np.uint32), together.view(np.uint32))


def test_the_fallback_says_that_it_is_one() -> None:
    fallback = Fallback(0.4)
    x = np.zeros((3, N_FEATURES), np.float32)
    score = fallback.score(x)
    assert score.tolist() == [np.float32(0.4)] * 3
    assert [BANDS[code] for code in fallback.bands(score)] == ["unknown"] * 3
    assert fallback.reasons(x, fallback.bands(score), fallback.bands(score)) == [b"[]"] * 3
    assert fallback.fallback
    assert fallback.digest == ""


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_a_fallback_that_is_no_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Fallback(probability)


def test_scorer_and_fallback_have_one_surface() -> None:
    surface = {"score", "bands", "reasons", "digest", "name", "version", "threshold_version", "layout_hash", "fallback", "reasons_method"}
    assert surface <= set(dir(Scorer(unpack(small().envelope))))
    assert surface <= set(dir(Fallback(0.5)))


class FailsOn(Session):
    """A runtime that fails on vectors whose first feature is 777: by an error, or with a number that is no probability."""

    def __init__(self, graph: bytes, answer: float | None) -> None:
        super().__init__(graph)
        self.answer = answer

    def probabilities(self, vectors: Vectors) -> Vectors:
        bad = vectors[:, 0] == 777
        if bad.any() and self.answer is None:
            raise RuntimeError("the operator failed")
        return np.where(bad, np.float32(self.answer or 0), super().probabilities(vectors))


@pytest.mark.parametrize("answer", [None, np.nan, np.inf, -np.inf, 1.0000001, -0.1])
def test_a_model_that_fails_on_a_vector_still_scores_the_others_bit_for_bit(answer: float | None) -> None:
    model = small()
    scorer = Scorer(unpack(model.envelope))
    whole = scorer.score(model.x[:50])
    x = model.x[:50].copy()
    x[[3, 49], 0] = 777
    scorer._evaluator = FailsOn(model.onnx, answer)
    found = scorer.score(x)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 49]
    rest = np.delete(np.arange(50), [3, 49])
    assert found[rest].tobytes() == whole[rest].tobytes()
    band = scorer.bands(found)
    assert np.flatnonzero(band == UNKNOWN).tolist() == [3, 49]
    reasons = scorer.reasons(x, band, np.full(50, HIGH, np.uint8))
    assert reasons[3] == reasons[49] == b"[]"
