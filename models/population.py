"""The hidden process of the simulated population: who customers are, how satisfied, when they decide to leave. See docs/simulation.md.

Pure: everything is a function of a Scenario and the number of a block of customers. One step is one day of one block, vectorised over
its customers; the same draws given to a copy of the state show what would have happened otherwise.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from features.window import DAY_MS
from proto.errors import BadUsage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
DriftKind = Literal["covariate", "concept", "outage", "unit"]
DRIFT_KINDS: Final[tuple[DriftKind, ...]] = ("covariate", "concept", "outage", "unit")

BLOCK: Final = 4096
"""Customers simulated together; a multiple of GROUP, so that nobody is touched by another block."""
GROUP: Final = 8
CUTOFF_DAYS: Final = 15
PILOT: Final = 4096
START_MS: Final = 1_704_067_200_000  # 2024-01-01
NEVER: Final = 10**6
"""A day that does not come."""

SEGMENTS: Final = ("consumer", "small_business", "enterprise")
REGIONS: Final = ("north", "south", "east", "west", "centre")
PLANS: Final = ("basic", "plus", "pro", "business")
PRICES: Final = np.array([900, 1_900, 4_900, 19_900], np.int64)
"""Minor units a month; a yearly contract pays ten of them."""
AGE_BANDS: Final = ("18-29", "30-44", "45-59", "60+")
SEGMENT_SHARES: Final = (0.70, 0.22, 0.08)
REGION_SHARES: Final = (0.15, 0.2, 0.2, 0.2, 0.25)
AGE_SHARES: Final = (0.22, 0.34, 0.28, 0.16)
PLAN_SHARES: Final = np.array([[0.55, 0.35, 0.10, 0.0], [0.15, 0.40, 0.35, 0.10], [0.0, 0.05, 0.35, 0.60]])
SESSIONS_A_DAY: Final = np.array([0.10, 0.16, 0.35])
ANNUAL_SHARE: Final = np.array([0.15, 0.35, 0.80])
WEEKDAYS: Final = np.array(
    [[0.95, 0.95, 0.95, 0.95, 1.0, 1.15, 1.05], [1.3, 1.3, 1.3, 1.3, 1.2, 0.4, 0.2], [1.3, 1.3, 1.3, 1.3, 1.2, 0.4, 0.2]]
)
"""Use by segment and weekday (Monday first)."""
MONTH_DAYS: Final = 30
YEAR_DAYS: Final = 365
FUTURE, ACTIVE, DECIDED, LEFT = range(4)
STAYED, EXPLICIT, SILENT, INVOLUNTARY = range(4)
CAUSES: Final = ("", "explicit", "silent", "involuntary")


@dataclass(frozen=True, slots=True)
class Process:
    """The parameters of docs/simulation.md, with their reasons there. `base` 0 = found by a pilot."""

    level_sd: float = 0.7
    pull: float = 0.03
    mood_sd: float = 0.06
    problem_cost: float = 0.05
    incident_cost: float = 0.25
    bad_ticket_cost: float = 0.6
    good_ticket_gain: float = 0.1
    contagion_cost: float = 0.08
    failed_payment_cost: float = 0.15
    price_rise_cost: float = 0.5
    decision_slope: float = 1.5
    new_customer_factor: float = 2.0
    annual_far: float = 0.3
    annual_near: float = 3.0
    season_peak: float = 0.2
    fade_days: float = 14
    regret: float = 0.004
    leave_at_bill: float = 0.75
    explicit_share: float = 0.6
    card_failure: float = 0.012
    retry_success: float = 0.6
    offer_gain: float = 0.6
    offer_return: float = 0.35
    sleeping_dogs: float = 0.08
    dog_cost: float = 0.3
    base: float = 0.0


@dataclass(frozen=True, slots=True)
class Drift:
    """A planted change: what kind, and from which day of the simulation on."""

    kind: DriftKind
    day: int

    @staticmethod
    def parse(text: str) -> "Drift":
        """From KIND@DAY. Raises BadUsage."""
        kind, _, day = text.partition("@")
        for known in DRIFT_KINDS:
            if kind == known and day.isdigit():
                return Drift(known, int(day))
        raise BadUsage(f"--drift {text}: needs KIND@DAY, a kind of {', '.join(DRIFT_KINDS)} and a day of the simulation, e.g. concept@180")


@dataclass(frozen=True, slots=True)
class Scenario:
    """What to simulate. Shares lie in [0, 1); churn_rate is the share that leaves within a year."""

    customers: int = 100_000
    months: int = 12
    seed: int = 0
    churn_rate: float = 0.15
    start_ms: int = START_MS
    drift: Drift | None = None
    late: float = 0.02
    duplicates: float = 0.005
    broken: float = 0.001
    process: Process = field(default_factory=Process)

    def __post_init__(self) -> None:
        if self.customers < 1 or self.months < 1:
            raise BadUsage(f"a simulation needs customers and months, got {self.customers} and {self.months}")
        if not 0.01 <= self.churn_rate <= 0.8:
            raise BadUsage(f"--churn-rate {self.churn_rate:g}: between 0.01 and 0.8 a year can be simulated")
        for name in ("late", "duplicates", "broken"):
            if not 0 <= getattr(self, name) < 1:
                raise BadUsage(f"--{name} {getattr(self, name):g}: a share in [0, 1)")

    @property
    def days(self) -> int:
        """Length of the simulation."""
        return round(self.months * YEAR_DAYS / 12)

    @property
    def blocks(self) -> int:
        """Independent blocks of customers."""
        return -(-self.customers // BLOCK)

    @property
    def offer_day(self) -> int:
        """When the offer of the counterfactual would be made."""
        return self.days * 2 // 3

    @property
    def cutoffs(self) -> range:
        """Days at whose beginning the hidden state is noted."""
        return range(CUTOFF_DAYS, self.days + 1, CUTOFF_DAYS)

    def calibrated(self) -> "Scenario":
        """With `process.base` set such that a pilot of the plain process loses `churn_rate` a year."""
        if self.process.base:
            return self
        return replace(self, process=replace(self.process, base=_base(self.process, self.churn_rate)))


@dataclass(slots=True)
class People:
    """What does not change of n customers; arrays of shape (n,)."""

    number: Ints
    segment: Ints
    region: Ints
    age: Ints
    plan: Ints
    annual: Bools
    consent: Bools
    explicit: Bools  # would send a cancellation
    signup: Ints  # day, negative before the start
    bill: Ints  # first day of a bill within the simulation
    level: Floats
    patience: Floats  # weight of bad experiences, mean 1
    price_sense: Floats
    receptive: Floats  # to an offer, mean 0.5; negative for sleeping dogs
    need: Floats  # of support, mean 1
    rate: Floats  # sessions a day
    mobile: Floats  # share of sessions on the phone


@dataclass(slots=True)
class State:
    """What changes of n customers from day to day; arrays of shape (n,), days counted from the start."""

    s: Floats
    phase: npt.NDArray[np.int8]
    decided: Ints
    cancelled: Bools
    fails: Ints
    retry: Ints
    next_bill: Ints
    plan: Ints
    left: Ints
    cause: Ints
    failed_today: Bools

    def copy(self) -> "State":
        """Another world that begins like this one."""
        return State(**{f.name: getattr(self, f.name).copy() for f in fields(self)})


@dataclass(frozen=True, slots=True)
class World:
    """What is the same for everybody: severity of incidents (days, regions), seasons (days,), the day prices rise."""

    severity: Floats
    load: Floats
    use_season: Floats
    leave_season: Floats
    price_day: int
    weekday: Ints


class Log:
    """What happened, by name: days, positions in the block and values, gathered day by day."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[int, Ints, Floats]]] = {}

    def add(self, name: str, day: int, who: Ints, *values: npt.NDArray[Any]) -> None:
        """Something happened to `who` (k,); values (k,) each."""
        if len(who):
            self._parts.setdefault(name, []).append((day, who, np.column_stack(values) if values else np.empty((len(who), 0))))

    def take(self, name: str, width: int) -> tuple[Ints, Ints, Floats]:
        """Days (k,), positions (k,), values (k, width) of all there is under a name."""
        parts = self._parts.get(name, [])
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, width))
        days = np.repeat([day for day, _, _ in parts], [len(who) for _, who, _ in parts])
        return days, np.concatenate([who for _, who, _ in parts]), np.concatenate([values for _, _, values in parts])


@dataclass(frozen=True, slots=True)
class Truth:
    """Of each customer of a block: what became of them, in this world and in the one where they got an offer. Days; NEVER = not."""

    left: Ints
    cause: Ints
    decided: Ints  # the last time they did; -1 never
    left_if_offered: Ints
    hidden: dict[int, npt.NDArray[np.float32]]  # by cut-off day, (n, len(HIDDEN))


HIDDEN: Final = (
    "satisfaction", "level", "phase", "days_decided", "cancelled", "days_to_bill", "annual", "sessions_a_day", "failed_tries",
    "tenure_days", "plan", "explicit", "patience", "need", "price_sense", "segment", "days_left",
)  # fmt: skip
"""Columns of the hidden state: all the process knows of a customer, and nothing that is still to be drawn."""


def world(scenario: Scenario) -> World:
    """Incidents, seasons and prices of a scenario: the same for all blocks."""
    rng = np.random.default_rng([scenario.seed, 1])
    days = scenario.days
    severity = np.zeros((days, len(REGIONS)))
    for day in np.flatnonzero(rng.random(days) < 1 / 7).tolist():
        severity[day, rng.choice(len(REGIONS), p=REGION_SHARES)] = rng.uniform(0.2, 1.0)
    of_year = 2 * np.pi * (np.arange(days) % YEAR_DAYS) / YEAR_DAYS
    month = (np.arange(days) % YEAR_DAYS) // 30.5
    return World(
        severity=severity,
        load=1 + 2 * severity.max(axis=1),
        use_season=1 + 0.15 * np.cos(of_year),
        leave_season=1 + scenario.process.season_peak * np.isin(month, (0, 8)).astype(np.float64),
        price_day=round(0.45 * days),
        weekday=(scenario.start_ms // DAY_MS + 3 + np.arange(days)) % 7,
    )


def people(scenario: Scenario, block: int) -> People:
    """The customers of a block, as drawn before anything happens."""
    rng = np.random.default_rng([scenario.seed, 2, block])
    n = min(BLOCK, scenario.customers - block * BLOCK)
    p = scenario.process
    segment = rng.choice(3, n, p=SEGMENT_SHARES)
    annual = rng.random(n) < ANNUAL_SHARE[segment]
    joins = rng.random(n) < 0.25
    signup = np.where(joins, rng.integers(1, max(scenario.days, 2), n), -1 - rng.exponential(600, n).astype(np.int64))
    period = np.where(annual, YEAR_DAYS, MONTH_DAYS)
    dog = rng.random(n) < p.sleeping_dogs
    return People(
        number=np.arange(n) + block * BLOCK,
        segment=segment,
        region=rng.choice(len(REGIONS), n, p=REGION_SHARES),
        age=rng.choice(len(AGE_BANDS), n, p=AGE_SHARES),
        plan=(rng.random(n)[:, None] > np.cumsum(PLAN_SHARES, axis=1)[segment]).sum(axis=1).clip(0, 3),
        annual=annual,
        consent=rng.random(n) < 0.85,
        explicit=rng.random(n) < p.explicit_share,
        signup=signup,
        bill=np.where(joins, signup, signup + -(signup // period) * period),
        level=rng.normal(0, p.level_sd, n) + np.array([0.0, 0.05, 0.2])[segment],
        patience=rng.gamma(4, 1 / 4, n),
        price_sense=rng.gamma(2, 1 / 2, n),
        receptive=np.where(dog, -p.dog_cost / p.offer_gain, rng.beta(2, 2, n)),
        need=rng.gamma(2, 1 / 2, n),
        rate=SESSIONS_A_DAY[segment] * rng.gamma(2, 1 / 2, n) + 0.01,
        mobile=rng.beta(2, 2, n),
    )


def beginning(who: People, scenario: Scenario, block: int) -> State:
    """The state on the morning of day 0."""
    n = len(who.number)
    rng = np.random.default_rng([scenario.seed, 3, block])
    p = scenario.process
    spread = p.mood_sd / np.sqrt(2 * p.pull)
    return State(
        s=who.level + rng.normal(0, spread, n),
        phase=np.where(who.signup < 0, ACTIVE, FUTURE).astype(np.int8),
        decided=np.full(n, -1),
        cancelled=np.zeros(n, np.bool_),
        fails=np.zeros(n, np.int64),
        retry=np.full(n, NEVER),
        next_bill=who.bill.copy(),
        plan=who.plan.copy(),
        left=np.full(n, NEVER),
        cause=np.zeros(n, np.int64),
        failed_today=np.zeros(n, np.bool_),
    )


UNIFORMS: Final = 16
NORMALS: Final = 2


def step(
    who: People,
    now: State,
    everybody: World,
    day: int,
    draws: tuple[Floats, Floats],
    scenario: Scenario,
    log: Log | None = None,
    around: Bools | None = None,
) -> Bools:
    """One day of a block; `now` is moved on in place, what happened goes to `log` (None = nobody asks). Returns whose ticket went badly.

    draws: uniforms (UNIFORMS, n) and normals (NORMALS, n) of the day. The same draws and another state are another world. around: whose
    ticket went badly as far as the others are concerned; None = as it happens here.
    """
    u, z = draws
    p, drift = scenario.process, scenario.drift
    drifted = drift.kind if drift is not None and day >= drift.day else None
    severity = everybody.severity[day][who.region]

    joins = np.flatnonzero((now.phase == FUTURE) & (who.signup == day))
    now.phase[joins] = ACTIVE
    live = (now.phase == ACTIVE) | (now.phase == DECIDED)
    gone = now.phase == DECIDED

    # use
    rate = who.rate * np.exp(0.25 * np.clip(now.s, -2, 2)) * WEEKDAYS[who.segment, everybody.weekday[day]] * everybody.use_season[day]
    rate *= np.where(gone, np.exp(-(day - now.decided) / p.fade_days), 1.0) * (0.6 if drifted == "covariate" else 1.0)
    sessions = np.where(live, poisson(u[0], rate), 0)
    problem = (sessions > 0) & (u[1] < 1 - (1 - np.minimum(0.03 + 0.6 * severity, 0.95)) ** sessions)

    # bills
    due = live & (now.next_bill == day)
    leaves = due & gone & (now.cancelled | ((day - now.decided >= 7) & (u[4] < p.leave_at_bill)))
    tried = (due & ~leaves) | (live & (now.retry == day))
    again = tried & (now.fails > 0)
    failed = tried & np.where(again, u[5] >= p.retry_success, u[5] < p.card_failure)
    paid = tried & ~failed
    now.fails[failed] += 1
    now.retry[failed] = day + np.where(now.fails[failed] == 1, 3, 4)
    now.next_bill[failed] = NEVER
    period = np.where(who.annual, YEAR_DAYS, MONTH_DAYS)
    now.next_bill[paid] = day + period[paid]
    now.fails[paid], now.retry[paid] = 0, NEVER
    lost = failed & (now.fails >= 3)
    out = leaves | lost
    now.cause[out] = np.where(lost[out], INVOLUNTARY, np.where(now.cancelled[out], EXPLICIT, SILENT))
    now.left[out], now.phase[out] = day, LEFT

    # support
    chance = 0.004 * who.need * np.exp(-0.4 * now.s) + problem * np.where(severity > 0, 0.15, 0.03) + 0.25 * now.failed_today
    opened = live & ~out & (u[2] < chance)
    wait_hours = 4 * everybody.load[day] * np.exp(z[1])
    reopened = opened & (u[3] < 0.12)
    bad: Bools = reopened | (opened & (wait_hours > 24))
    heard = bad if around is None else around
    group = np.arange(len(bad)) // GROUP
    near = np.bincount(group, heard)[group] - heard

    # satisfaction
    felt = p.problem_cost * problem + p.incident_cost * severity * (problem & (severity > 0)) + p.bad_ticket_cost * bad
    shift = p.mood_sd * z[0] + p.good_ticket_gain * (opened & ~bad) - who.patience * felt
    shift -= p.contagion_cost * near + p.failed_payment_cost * failed
    if day == everybody.price_day:
        shift -= p.price_rise_cost * who.price_sense * np.isin(now.plan, (1, 2))
    now.s += np.where(live, p.pull * (who.level - now.s) + shift, 0)
    now.failed_today = failed

    # the decision and what follows
    slope = p.decision_slope * (0.5 if drifted == "concept" else 1.0)
    decides = p.base * np.exp(-slope * now.s) * everybody.leave_season[day]
    decides *= 1 + p.new_customer_factor * np.exp(-np.maximum(day - who.signup, 0) / 60)
    decides *= np.where(who.annual, np.where(now.next_bill - day <= 90, p.annual_near, p.annual_far), 1.0)
    if drifted == "concept":
        decides *= np.where(who.rate > 1.5 * SESSIONS_A_DAY[who.segment], 3.0, 1.0)
    deciding = (now.phase == ACTIVE) & (u[6] < decides)
    stays = (now.phase == DECIDED) & ~now.cancelled & (u[7] < p.regret)
    cancels = (now.phase == DECIDED) & who.explicit & ~now.cancelled & (day - now.decided >= 5) & (u[8] < 0.1)
    cancels &= ~stays & (~who.annual | (now.next_bill - day <= 60))
    now.phase[deciding], now.decided[deciding] = DECIDED, day
    now.phase[stays] = ACTIVE
    now.s[stays] += 0.5
    now.cancelled |= cancels

    change = (now.phase == ACTIVE) & (u[9] < 0.0005 * np.exp(0.5 * now.s))
    up = change & (now.plan < 3)
    down = (now.phase == ACTIVE) & (u[10] < 0.0005 * who.price_sense * np.exp(-0.5 * now.s)) & (now.plan > 0) & ~up
    now.plan[up] += 1
    now.plan[down] -= 1
    if log is None:
        return bad

    def note(name: str, mask: Bools, *values: npt.NDArray[Any]) -> None:
        found = np.flatnonzero(mask)
        log.add(name, day, found, *(value[found] for value in values))

    factor = np.where(who.annual, 10, 1) * np.where((day >= everybody.price_day) & np.isin(now.plan, (1, 2)), 1.08, 1.0)
    bill = np.rint(PRICES[now.plan] * factor)
    note("sessions", sessions > 0, sessions, problem, severity)
    note("tickets", opened, wait_hours, reopened, bad, now.s, severity, failed)
    note("paid", paid, bill, who.annual & (day > np.maximum(who.signup, 0)))
    note("failed", failed | (leaves & ~now.cancelled & (u[11] < 0.5)), bill)
    note("refund", bad & (u[12] < 0.2), np.rint(bill / np.where(who.annual, 10, 1) / 2))
    note("extra", (sessions > 0) & (u[13] < 0.03 * sessions), 500 + 100 * np.floor(20 * u[14]))
    note("cancellation", cancels)
    note("upgrade", up, PRICES[now.plan])
    note("downgrade", down, PRICES[now.plan])
    fresh = np.zeros(len(bad), np.bool_)
    fresh[joins] = True
    ends = np.where(who.annual, now.next_bill, NEVER)
    note("profile", fresh | up | down | (paid & who.annual) | (day == 0) & live, now.plan, ends)
    return bad


def poisson(u: Floats, mean: Floats) -> Ints:
    """Poisson counts by the inverse of their distribution, cut at 9, so that the same draw serves two worlds; shape of the inputs."""
    term = np.exp(-mean)
    below = term.copy()
    count = np.zeros(len(u), np.int64)
    for k in range(1, 10):
        more = u > below
        if not more.any():
            break
        count += more
        term *= mean / k
        below += term
    return count


def draws_of(rng: np.random.Generator, n: int) -> tuple[Floats, Floats]:
    """The random numbers of one day of n customers."""
    return rng.random((UNIFORMS, n), np.float32).astype(np.float64), rng.standard_normal((NORMALS, n), np.float32).astype(np.float64)


def offer(who: People, now: State, u: Floats, p: Process) -> None:
    """Make everybody a retention offer today, in place. u: uniforms (n,)."""
    live = (now.phase == ACTIVE) | (now.phase == DECIDED)
    now.s += np.where(live, p.offer_gain * who.receptive, 0)
    back = (now.phase == DECIDED) & ~now.cancelled & (u < p.offer_return * np.maximum(who.receptive, 0))
    now.phase[back] = ACTIVE


def run(scenario: Scenario, block: int, log: Log | None, *, everybody: World | None = None) -> tuple[People, Truth]:
    """All days of a block. The scenario is calibrated (Scenario.calibrated)."""
    everybody = everybody or world(scenario)
    who = people(scenario, block)
    now = beginning(who, scenario, block)
    n = len(who.number)
    rng = np.random.default_rng([scenario.seed, 4, block])
    other: State | None = None
    hidden = {}
    for day in range(scenario.days):
        if day in scenario.cutoffs:
            hidden[day] = look(who, now, day)
        if day == scenario.offer_day:
            other = now.copy()
            offer(who, other, rng.random(n), scenario.process)
        draws = draws_of(rng, n)
        bad = step(who, now, everybody, day, draws, scenario, log)
        if other is not None:
            # Only one's own offer is asked about: the others live as they did.
            step(who, other, everybody, day, draws, scenario, around=bad)
    if scenario.days in scenario.cutoffs:
        hidden[scenario.days] = look(who, now, scenario.days)
    assert other is not None
    return who, Truth(now.left, now.cause, now.decided, other.left, hidden)


def look(who: People, now: State, day: int) -> npt.NDArray[np.float32]:
    """The hidden state on the morning of a day, (n, len(HIDDEN)), NaN for those who have not joined."""
    decided, left = now.phase >= DECIDED, now.phase == LEFT
    columns = (
        now.s,
        who.level,
        now.phase,
        np.where(decided, day - now.decided, -1),
        now.cancelled,
        np.minimum(now.next_bill, now.retry) - day,
        who.annual,
        who.rate,
        now.fails,
        day - who.signup,
        now.plan,
        who.explicit,
        who.patience,
        who.need,
        who.price_sense,
        who.segment,
        np.where(left, day - now.left, -1),
    )
    found = np.column_stack(columns).astype(np.float32)
    found[now.phase == FUTURE] = np.nan
    return found


def yearly_churn(left: Ints, signup: Ints, days: int) -> float:
    """Share of those who were customers at the start that leave within a year (a shorter run is taken to its power)."""
    there = signup < 0
    return float(1 - (1 - np.mean(left[there] < days)) ** (YEAR_DAYS / days))


def _base(process: Process, rate: float) -> float:
    """Daily level of the decision that gives a yearly churn of `rate` in a pilot, to within 2 % of it or a step of 1 %."""
    low, high = np.log(1e-6), np.log(3e-2)
    for _ in range(8):
        middle = float((low + high) / 2)
        scenario = Scenario(customers=PILOT, seed=20_240_101, process=replace(process, base=float(np.exp(middle))))
        everybody, who = world(scenario), people(scenario, 0)
        now = beginning(who, scenario, 0)
        rng = np.random.default_rng([scenario.seed, 4, 0])
        for day in range(scenario.days):
            step(who, now, everybody, day, draws_of(rng, PILOT), scenario)
        found = yearly_churn(now.left, who.signup, scenario.days)
        if abs(found / rate - 1) < 0.02:
            break
        low, high = (middle, high) if found < rate else (low, middle)
    return float(np.exp(middle))
