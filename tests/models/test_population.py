"""The simulated population does what docs/simulation.md says, with causes that can be found."""

import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from features.window import DAY_MS
from models import behaviour, population
from models.behaviour import LOGIN_KINDS, TRANSACTION_KINDS, Events
from models.population import HIDDEN, NEVER, Drift, People, Process, Scenario, Truth
from proto.errors import BadUsage

BASE = Process(base=2.7e-4)
"""The level that a pilot finds for 15 % a year, to save the pilot."""
PAGE = Path(__file__).parents[2] / "docs" / "simulation.md"


@cache
def simulated(scenario: Scenario) -> tuple[People, Truth, dict[str, Events]]:
    who, truth, topics = behaviour.simulate(scenario, 0)
    return who, truth, {events.topic: events for events in topics}


def plain(**knobs: object) -> Scenario:
    return replace(Scenario(customers=1_600, months=8, process=BASE, late=0, duplicates=0, broken=0), **knobs)  # type: ignore[arg-type]  # fields by name


def test_the_page_states_the_parameters_that_are_used() -> None:
    stated: dict[str, float] = {}
    for names, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ([\d., ]+) \|", PAGE.read_text(), re.MULTILINE):
        stated |= dict(zip(re.findall(r"\w+", names), map(float, values.split(", ")), strict=True))
    assert stated == {f.name: getattr(Process(), f.name) for f in fields(Process) if f.name != "base"}


def test_the_same_seed_gives_the_same_events_and_another_one_others() -> None:
    scenario = plain(customers=200, months=3, late=0.02, duplicates=0.01, broken=0.01)
    first, again, other = (behaviour.simulate(s, 0)[2] for s in (scenario, scenario, replace(scenario, seed=1)))
    for a, b in zip(first, again, strict=True):
        for name, column in a.columns.items():
            np.testing.assert_array_equal(column, b.columns[name])
    assert not np.array_equal(first[1].columns["time"][:50], other[1].columns["time"][:50])


@pytest.mark.parametrize("rate", [0.4])
def test_a_pilot_finds_the_churn_that_was_asked_for(rate: float) -> None:
    scenario = Scenario(customers=4_096, churn_rate=rate).calibrated()
    who, truth = population.run(scenario, 0, None)
    assert population.yearly_churn(truth.left, who.signup, scenario.days) == pytest.approx(rate, abs=0.03)


def test_who_is_dissatisfied_decides_to_leave() -> None:
    _, truth, _ = simulated(plain())
    noted = truth.hidden[120]
    active = noted[:, HIDDEN.index("phase")] == population.ACTIVE
    s = noted[:, HIDDEN.index("satisfaction")]
    decides = (truth.decided >= 120) & active
    low, high = np.nanquantile(s[active], (0.2, 0.8))
    assert decides[active & (s < low)].mean() > 4 * decides[active & (s > high)].mean()


def test_one_bad_ticket_is_felt_by_the_group_and_by_nobody_else() -> None:
    scenario = plain(customers=16)
    who, everybody = population.people(scenario, 0), population.world(scenario)
    everybody.severity[:] = 0
    calm, spoilt = (population.beginning(who, scenario, 0) for _ in range(2))
    calm.phase[:] = spoilt.phase[:] = population.ACTIVE
    calm.next_bill[:] = spoilt.next_bill[:] = NEVER
    uniforms, normals = population.draws_of(np.random.default_rng(0), 16)
    uniforms[2], uniforms[6] = 1.0, 1.0
    population.step(who, calm, everybody, 5, (uniforms, normals), scenario)
    uniforms[2, 3], uniforms[3, 3] = 0.0, 0.0  # customer 3 opens a ticket, and it is reopened
    population.step(who, spoilt, everybody, 5, (uniforms, normals), scenario)
    fall = calm.s - spoilt.s
    np.testing.assert_allclose(fall[[0, 1, 2, 4, 5, 6, 7]], BASE.contagion_cost)
    np.testing.assert_allclose(fall[8:], 0, atol=1e-12)
    assert fall[3] == pytest.approx(BASE.bad_ticket_cost * who.patience[3])


def test_without_an_effect_the_offer_changes_nobody_and_with_one_it_saves_some_and_wakes_dogs() -> None:
    idle = replace(BASE, offer_gain=1e-12, offer_return=0, dog_cost=0)
    _, truth, _ = simulated(plain(process=idle))
    np.testing.assert_array_equal(truth.left, truth.left_if_offered)
    scenario = plain(process=replace(BASE, base=3e-3, sleeping_dogs=0.3, dog_cost=1.5))
    who, truth, _ = simulated(scenario)
    later, sooner = truth.left_if_offered > truth.left, truth.left_if_offered < truth.left
    assert later.sum() > 10
    assert sooner.sum() > 10
    assert (truth.left[later | sooner] >= scenario.offer_day).all()
    assert (who.receptive[sooner] < 0).mean() > 0.9


def test_those_who_left_pay_no_more_and_only_they_cancel() -> None:
    scenario = plain()
    who, truth, topics = simulated(scenario)
    events = topics["transactions"].columns
    day = (events["time"] - scenario.start_ms) // DAY_MS
    position = events["customer"] - who.number[0]
    assert (day <= truth.left[position]).all()
    cancelled = np.unique(position[events["kind"] == TRANSACTION_KINDS.index("cancellation")])
    explicit = np.flatnonzero(truth.cause == population.EXPLICIT)
    assert len(explicit) > 20
    assert set(explicit) <= set(cancelled)


def test_use_follows_the_week_and_the_hours() -> None:
    scenario = plain()
    who, _, topics = simulated(scenario)
    events = topics["logins"].columns
    office = who.segment[events["customer"] - who.number[0]] > 0
    hour = (events["time"] // 3_600_000) % 24
    weekday = (events["time"] // DAY_MS + 3) % 7
    assert ((hour >= 8) & (hour < 19))[office].mean() > 0.75
    assert (weekday >= 5)[office].mean() < 0.15 < (weekday >= 5)[~office].mean()


def drifted(kind: str) -> tuple[Events, Events, int]:
    """Logins of a scenario with and without a drift on day 120, and that day in ms."""
    scenario = plain()
    changed = replace(scenario, drift=Drift.parse(f"{kind}@120"))
    since = scenario.start_ms + 120 * DAY_MS
    with_drift, without = simulated(changed)[2]["logins"], simulated(scenario)[2]["logins"]
    early = [events.columns["time"] < since - DAY_MS for events in (with_drift, without)]
    np.testing.assert_array_equal(with_drift.columns["time"][early[0]].sum() > 0, True)
    return with_drift, without, since


def sessions(events: Events, begin: int, days: int) -> int:
    time = events.columns["time"]
    return int(np.sum((events.columns["kind"] == LOGIN_KINDS.index("login")) & (time >= begin) & (time < begin + days * DAY_MS)))


def test_drift_begins_on_its_day_and_is_of_its_kind() -> None:
    fewer, before, since = drifted("covariate")
    assert sessions(fewer, since - 30 * DAY_MS, 30) == sessions(before, since - 30 * DAY_MS, 30)
    assert sessions(fewer, since, 60) == pytest.approx(0.6 * sessions(before, since, 60), rel=0.05)

    silent, before, since = drifted("outage")
    assert sessions(silent, since, 7) == 0 < sessions(before, since, 7)
    assert sessions(silent, since + 7 * DAY_MS, 30) == sessions(before, since + 7 * DAY_MS, 30)

    smaller, _, since = drifted("unit")
    stated = smaller.columns["duration_ms"] > 0
    later = smaller.columns["time"] >= since
    ratio = smaller.columns["duration_ms"][stated & ~later].mean() / smaller.columns["duration_ms"][stated & later].mean()
    assert ratio == pytest.approx(1000, rel=0.05)

    def heavy_among_deciders(scenario: Scenario) -> float:
        who, truth, _ = simulated(scenario)
        return float((who.rate > 1.5 * population.SESSIONS_A_DAY[who.segment])[truth.decided >= 120].mean())

    assert heavy_among_deciders(replace(plain(), drift=Drift("concept", 120))) > heavy_among_deciders(plain()) + 0.15


def test_a_drift_is_named_or_refused() -> None:
    assert Drift.parse("unit@30") == Drift("unit", 30)
    for wrong in ("unit", "unit@", "flood@3", "unit@-1"):
        with pytest.raises(BadUsage, match="KIND@DAY"):
            Drift.parse(wrong)


def test_dirt_comes_in_the_shares_that_were_asked_for() -> None:
    scenario = plain(late=0.1, duplicates=0.05, broken=0.02)
    events = simulated(scenario)[2]["logins"].columns
    assert (np.diff(events["arrived"]) >= 0).all()
    n = len(np.unique(events["number"]))
    assert len(events["number"]) / n == pytest.approx(1.05, abs=0.01)
    broken = (events["kind"] < 0) | (events["time"] == behaviour.BROKEN_MS)
    assert broken.mean() == pytest.approx(0.02, abs=0.005)
    assert (events["arrived"] - events["time"] > 60 * 60_000)[~broken].mean() == pytest.approx(0.1, abs=0.02)
