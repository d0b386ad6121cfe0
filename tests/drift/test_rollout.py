"""Rollout: a split that sticks, a test one may look at, guardrails that stop."""

import numpy as np
import pytest

from bench.rollout import ever, gains, through
from drift.rollout import CANARY, Evidence, Health, Rollout, arm_of, brier_gain, interval, share_of


def test_a_customer_stays_where_it_was_when_the_share_grows_and_salts_are_independent() -> None:
    customers = [f"c{i}" for i in range(5_000)]
    small = {c for c in customers if arm_of(c, "s", 0.05) == "challenger"}
    large = {c for c in customers if arm_of(c, "s", 0.25) == "challenger"}
    assert small < large
    assert len(small) == pytest.approx(250, abs=60)
    other = {c for c in customers if arm_of(c, "t", 0.25) == "challenger"}
    assert len(large & other) == pytest.approx(5_000 / 16, abs=70)
    assert share_of("c1", "s") == 0.129579200649861


def test_peeking_every_hour_does_not_promote_an_equal_model_and_would_with_a_plain_test() -> None:
    x = gains(np.random.default_rng(5), 400 * 4_000, 0.0)[0].reshape(400, 4_000)
    assert ever(x, 0.05, fault=False).mean() <= 0.05
    assert ever(x, 0.05, fault=True).mean() > 0.12


def test_the_vectorised_wealth_is_that_of_the_evidence() -> None:
    x = gains(np.random.default_rng(6), 20 * 3_000, -0.4)[0].reshape(20, 3_000)
    shown = []
    for row in x:
        evidence = Evidence()
        for start in range(0, 3_000, 20):
            evidence.add(row[start : start + 20])
        shown.append(evidence.shown(0.05))
    # Both look at the same instants: the evidence after every label, from the 500th on.
    assert ever(x, 0.05, fault=False).tolist() == shown
    assert 0 < sum(shown) < 20


def test_a_better_challenger_is_promoted_and_a_worse_one_never_leaves_the_canary() -> None:
    assert through(2, -0.45, Health()).step == "promoted"
    worse = Rollout("s")
    shares = set()
    rng = np.random.default_rng(3)
    for hour in range(1, 400):
        worse.label(gains(rng, 20, 0.5)[0].tolist())
        worse.look(hour, Health())
        shares.add(worse.share)
    assert worse.step == "stopped"
    assert max(shares) <= CANARY


@pytest.mark.parametrize("health", [Health(errors=0.01), Health(slower_ms=50), Health(shift=0.5), Health(calibration=-0.1)])
def test_a_guardrail_stops_at_the_first_look(health: Health) -> None:
    rollout = Rollout("s")
    assert rollout.look(0.001, health)
    assert (rollout.step, rollout.share) == ("stopped", 0.0)
    assert rollout.look(100, Health()) == ""  # for good


def test_differences_are_losses_and_bounded() -> None:
    assert brier_gain(1, 0.2, 0.9) == pytest.approx(0.64 - 0.01)
    with pytest.raises(ValueError, match="lies in"):
        Evidence().add([1.1])
    low, high = interval(10_000, 0.01, 0.04)
    assert low < 0.01 < high
    assert high - low < 0.03
