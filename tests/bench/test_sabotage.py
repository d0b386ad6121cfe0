"""A few of the sabotaged models, so that no gate falls silent between two runs of the whole bench."""

import pytest

from bench.sabotage import SABOTAGE, judge, sound
from proto.errors import ArtifactRejected


def test_a_sound_model_comes_through() -> None:
    judge(sound(1))


@pytest.mark.parametrize("name", ["labels turned round", "two columns swapped", "one age band hardly found", "worse than the champion"])
def test_a_sabotaged_one_is_refused_by_its_own_gate(name: str) -> None:
    words, run = SABOTAGE[name]
    with pytest.raises(ArtifactRejected, match=words):
        run()
