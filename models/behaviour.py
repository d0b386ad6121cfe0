"""What the simulated customers do, as columns of events: the visible side of models.population, one block at a time."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.window import DAY_MS, HOUR_MS
from models import population
from models.population import AGE_BANDS, NEVER, PLANS, REGIONS, SEGMENTS, Ints, Log, People, Scenario, Truth

Column = npt.NDArray[Any]

ABSENT: Final = -1
"""In every column: the field is left out."""
TRANSACTION_KINDS: Final = ("payment", "failed_payment", "refund", "renewal", "upgrade", "downgrade", "cancellation")
LOGIN_KINDS: Final = ("login", "failed_login", "logout", "feature_use", "page_view", "error", "outage", "slow_response")
TICKET_KINDS: Final = ("opened", "resolved", "reopened", "satisfaction")
PRODUCTS: Final = (*PLANS, "add-on")
METHODS: Final = ("card", "debit", "transfer")
CHANNELS: Final = ("web", "app", "phone", "mail")
DEVICES: Final = ("desktop", "phone", "tablet")
COUNTRIES: Final = ("DE", "FR", "NL", "AT", "PL", "US")
FEATURES: Final = ("dashboard", "search", "report", "export", "share", "import", "alerts", "api", "billing", "settings", "help", "team")
CATEGORIES: Final = ("outage", "billing", "usage", "defect", "contract")
PRIORITIES: Final = ("low", "normal", "high", "urgent")
BROKEN_MS: Final = 915_148_800_000  # 1999: before the first accepted instant

TEXTS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "transactions": {"kind": TRANSACTION_KINDS, "product": PRODUCTS, "method": METHODS, "channel": CHANNELS},
    "logins": {"kind": LOGIN_KINDS, "device": DEVICES, "feature": FEATURES, "country": COUNTRIES},
    "support-tickets": {"kind": TICKET_KINDS, "category": CATEGORIES, "priority": PRIORITIES, "channel": CHANNELS},
    "customer-profiles": {"kind": ("profile",), "plan": PLANS, "segment": SEGMENTS, "region": REGIONS, "age_band": AGE_BANDS},
}
"""By topic: columns that hold positions in these tuples."""
NUMBERS: Final[dict[str, tuple[str, ...]]] = {
    "transactions": ("amount_minor",),
    "logins": ("session_id", "duration_ms"),
    "support-tickets": ("ticket_id", "wait_seconds", "csat", "nps"),
    "customer-profiles": ("signup_date", "contract_end", "consent"),
}
"""By topic: columns that hold numbers (dates as days since 1970)."""

_HOURS: Final = np.array(
    [
        [1, 1, 0.5, 0.3, 0.3, 0.5, 1.5, 3, 3.5, 3, 3, 3.5, 4.5, 4, 3.5, 3.5, 4, 5, 6.5, 8, 9, 8.5, 6, 3],
        [0.2, 0.1, 0.1, 0.1, 0.2, 0.5, 1.5, 4, 9, 11, 11, 10, 7, 8, 10, 10, 8, 5, 2, 1, 0.7, 0.5, 0.4, 0.3],
        [0.3, 0.2, 0.2, 0.2, 0.3, 0.6, 1.5, 4, 9, 11, 11, 10, 7, 8, 10, 10, 8, 5, 2, 1, 0.7, 0.5, 0.4, 0.3],
    ]
)
"""Weight of each hour of the day (UTC) by segment."""


@dataclass(frozen=True, slots=True)
class Events:
    """The events of one topic in arrival order; columns of shape (n,), integers.

    time, arrived: epoch ms; customer: position in the population; number: makes the event id, equal for a duplicate; kind ABSENT = broken.
    The others as TEXTS and NUMBERS say.
    """

    topic: str
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(self.columns["time"])


def simulate(scenario: Scenario, block: int, everybody: population.World | None = None) -> tuple[People, Truth, list[Events]]:
    """A block of customers: who they are, what became of them, and their events of the four topics."""
    everybody = everybody or population.world(scenario)
    log = Log()
    who, truth = population.run(scenario, block, log, everybody=everybody)
    rng = np.random.default_rng([scenario.seed, 5, block])
    found = [
        _transactions(scenario, who, log, rng),
        _logins(scenario, who, log, rng, truth),
        _tickets(scenario, who, log, rng),
        _profiles(scenario, who, log, rng),
    ]
    return who, truth, [_soiled(scenario, topic, columns, who, rng) for topic, columns in zip(TEXTS, found, strict=True)]


def customer_id(number: int) -> str:
    """The id of a simulated customer, with leading zeros."""
    return f"{number:07d}"


def _at(scenario: Scenario, day: Ints, ms: Column) -> Ints:
    return scenario.start_ms + day * DAY_MS + ms.astype(np.int64)


def _hours(rng: np.random.Generator, segment: Ints) -> Ints:
    """A time of the day (ms) for each of n events, by the habits of a segment."""
    edges = np.cumsum(_HOURS, axis=1)
    edges /= edges[:, -1:]
    # One sorted list for all segments: segment k lives in (k, k + 1].
    flat = (edges + np.arange(len(edges))[:, None]).ravel()
    hour = np.searchsorted(flat, segment + rng.random(len(segment))) - 24 * segment
    ms: Ints = np.minimum(hour, 23) * HOUR_MS + rng.integers(0, HOUR_MS, len(segment))
    return ms


def _stack(parts: list[dict[str, Column]], names: tuple[str, ...]) -> dict[str, Column]:
    """Events of several kinds as one set of columns; a column that a part lacks is ABSENT there."""
    length = [len(part["time"]) for part in parts]
    return {
        name: np.concatenate([part.get(name, np.full(n, ABSENT, np.int64)) for part, n in zip(parts, length, strict=True)])
        for name in ("time", "who", *names)
    }


def _names(topic: str) -> tuple[str, ...]:
    return (*TEXTS[topic], *NUMBERS[topic])


def _transactions(scenario: Scenario, who: People, log: Log, rng: np.random.Generator) -> dict[str, Column]:
    method = rng.integers(0, len(METHODS), len(who.number))
    parts = []

    def part(name: str, kind: str, width: int, amount: bool, product: int | None = None) -> None:
        day, found, values = log.take(name, width)
        # Bills are collected in the night, what people do themselves happens in their hours.
        collected = name in ("paid", "failed")
        ms = rng.integers(2 * HOUR_MS, 5 * HOUR_MS, len(day)) if collected else _hours(rng, who.segment[found])
        code = np.full(len(day), TRANSACTION_KINDS.index(kind))
        columns = {
            "time": _at(scenario, day, ms),
            "who": found,
            "kind": np.where(values[:, 1] > 0, TRANSACTION_KINDS.index("renewal"), code) if name == "paid" else code,
            "product": who.plan[found] if product is None else np.full(len(day), product),
            "method": method[found],
            "channel": np.where(rng.random(len(day)) < who.mobile[found], 1, 0),
        }
        parts.append(columns | ({"amount_minor": values[:, 0].astype(np.int64)} if amount else {}))

    part("paid", "payment", 2, True)
    part("failed", "failed_payment", 1, True)
    part("refund", "refund", 1, True)
    part("extra", "payment", 1, True, PRODUCTS.index("add-on"))
    part("upgrade", "upgrade", 1, False)
    part("downgrade", "downgrade", 1, False)
    part("cancellation", "cancellation", 0, False)
    return _stack(parts, _names("transactions"))


def _logins(scenario: Scenario, who: People, log: Log, rng: np.random.Generator, truth: Truth) -> dict[str, Column]:
    day, found, values = log.take("sessions", 3)
    times = values[:, 0].astype(np.int64)
    day, found = np.repeat(day, times), np.repeat(found, times)
    troubled, severity = np.repeat(values[:, 1], times) > 0, np.repeat(values[:, 2], times)
    n = len(day)
    start = _at(scenario, day, _hours(rng, who.segment[found]))
    drift = scenario.drift
    covariate = drift is not None and drift.kind == "covariate"
    mobile = np.where(covariate & (day >= (drift.day if drift else 0)), 0.9, who.mobile[found])
    device = np.where(rng.random(n) < mobile, np.where(rng.random(n) < 0.15, 2, 1), 0)
    country = np.where(rng.random(n) < 0.02, rng.integers(0, len(COUNTRIES), n), who.number[found] % 4)
    common = {"who": found, "device": device, "country": country, "session_id": np.arange(n)}
    login = LOGIN_KINDS.index

    def some(mask: npt.NDArray[np.bool_], kind: int | Column, ms: Column, **more: Column) -> dict[str, Column]:
        chosen = {name: values[mask] for name, values in (common | more).items()}
        return {"time": (start + ms.astype(np.int64))[mask], "kind": np.broadcast_to(np.asarray(kind), (n,))[mask], **chosen}

    everyone = np.ones(n, np.bool_)
    actions = 1 + rng.poisson(1.0, n)
    pace = rng.exponential(60_000, n) + 5_000
    # Dearer plans hold more features; a customer keeps to those met so far.
    breadth = 3 + 2 * who.plan[found] + who.number[found] % 3
    mistyped = rng.random(n) < 0.05
    parts = [
        some(everyone, login("login"), np.zeros(n)),
        some(mistyped, login("failed_login"), np.full(n, -20_000)),
        some(rng.random(n) < 0.3, login("logout"), pace * (actions + 1)),
    ]
    trouble = np.where(severity > 0, login("outage"), np.where(rng.random(n) < 0.6, login("slow_response"), login("error")))
    parts.append(some(troubled, trouble, pace * 0.5, duration_ms=rng.exponential(8_000, n).astype(np.int64)))
    which = np.repeat(np.arange(n), actions)
    place = np.arange(len(which)) - np.repeat(np.cumsum(actions) - actions, actions)
    parts.append(
        {
            "time": start[which] + (pace[which] * (place + 1)).astype(np.int64),
            "kind": np.where(rng.random(len(which)) < 0.4, login("feature_use"), login("page_view")),
            **{name: values[which] for name, values in common.items()},
            "feature": (rng.random(len(which)) * np.minimum(breadth[which], len(FEATURES))).astype(np.int64),
            "duration_ms": rng.exponential(30_000, len(which)).astype(np.int64) + 500,
        }
    )
    columns = _stack(parts, _names("logins"))
    # A session near midnight may go on into the next day, but not beyond the day of leaving.
    end = scenario.start_ms + np.where(truth.left < NEVER, truth.left + 1, scenario.days)[columns["who"]] * DAY_MS - 1
    columns["time"] = np.minimum(columns["time"], end)
    if drift is not None and drift.kind == "unit":
        since = scenario.start_ms + drift.day * DAY_MS
        stated = (columns["time"] >= since) & (columns["duration_ms"] > 0)
        columns["duration_ms"] = np.where(stated, columns["duration_ms"] // 1000, columns["duration_ms"])
    if drift is not None and drift.kind == "outage":
        silent = (columns["time"] >= scenario.start_ms + drift.day * DAY_MS) & (
            columns["time"] < scenario.start_ms + (drift.day + 7) * DAY_MS
        )
        columns = {name: values[~silent] for name, values in columns.items()}
    return columns


def _tickets(scenario: Scenario, who: People, log: Log, rng: np.random.Generator) -> dict[str, Column]:
    day, found, values = log.take("tickets", 6)
    wait_hours, reopened, bad, s, severity, failed = values.T
    n = len(day)
    opened = _at(scenario, day, _hours(rng, who.segment[found]))
    resolved = opened + (wait_hours * HOUR_MS).astype(np.int64)
    category = np.where(failed > 0, 1, np.where(severity > 0, 0, rng.integers(2, len(CATEGORIES), n)))
    priority = np.clip(rng.integers(0, 3, n) + (severity > 0.5) + (who.segment[found] == 2), 0, 3)
    common = {
        "who": found,
        "ticket_id": np.arange(n),
        "category": category,
        "priority": priority,
        "channel": np.where(rng.random(n) < who.mobile[found], 1, rng.choice([0, 2, 3], n)),
    }
    ticket = TICKET_KINDS.index

    def some(mask: npt.NDArray[np.bool_], kind: str, time: Ints, **more: Column) -> dict[str, Column]:
        return {"time": time[mask], "kind": np.full(int(mask.sum()), ticket(kind)), **{k: v[mask] for k, v in (common | more).items()}}

    again = reopened > 0
    later = resolved + rng.integers(6 * HOUR_MS, 72 * HOUR_MS, n)
    rated = rng.random(n) < 0.3
    csat = np.clip(np.rint(3.4 + s - bad + 0.8 * rng.standard_normal(n)), 1, 5).astype(np.int64)
    nps = np.clip(np.rint(6.5 + 2 * s - 1.5 * bad + 1.5 * rng.standard_normal(n)), 0, 10).astype(np.int64)
    columns = _stack(
        [
            some(np.ones(n, np.bool_), "opened", opened),
            some(np.ones(n, np.bool_), "resolved", resolved, wait_seconds=(wait_hours * 3600).astype(np.int64)),
            some(again, "reopened", later),
            some(again, "resolved", later + 24 * HOUR_MS, wait_seconds=np.full(n, 86_400)),
            some(rated, "satisfaction", resolved + HOUR_MS, csat=csat, nps=np.where(rng.random(n) < 0.5, nps, ABSENT)),
        ],
        _names("support-tickets"),
    )
    # What would happen after the end is not known yet.
    known = columns["time"] < scenario.start_ms + scenario.days * DAY_MS
    return {name: values[known] for name, values in columns.items()}


def _profiles(scenario: Scenario, who: People, log: Log, rng: np.random.Generator) -> dict[str, Column]:
    day, found, values = log.take("profile", 2)
    first = scenario.start_ms // DAY_MS
    plan, ends = values.astype(np.int64).T
    return {
        "time": _at(scenario, day, rng.integers(0, 2 * HOUR_MS, len(day))),
        "who": found,
        "kind": np.zeros(len(day), np.int64),
        "plan": plan,
        "segment": who.segment[found],
        "region": who.region[found],
        "age_band": who.age[found],
        "signup_date": first + who.signup[found],
        "contract_end": np.where(ends < NEVER, first + ends, ABSENT),
        "consent": who.consent[found].astype(np.int64),
    }


def _soiled(scenario: Scenario, topic: str, columns: dict[str, Column], who: People, rng: np.random.Generator) -> Events:
    """Events in the order of their arrival: some late, some twice, some broken."""
    n = len(columns["time"])
    time = columns["time"]
    delay = np.where(
        rng.random(n) < scenario.late, np.minimum(rng.lognormal(np.log(6 * HOUR_MS), 1.5, n), 10 * DAY_MS), rng.random(n) * 2_000
    )
    twice = np.flatnonzero(rng.random(n) < scenario.duplicates)
    first = time + delay.astype(np.int64)
    arrived = np.concatenate([first, first[twice] + rng.exponential(600_000, len(twice)).astype(np.int64)])
    rows = np.concatenate([np.arange(n), twice])
    order = np.argsort(arrived, kind="stable")
    rows, arrived = rows[order], arrived[order]
    out = {name: values[rows] for name, values in columns.items() if name != "who"}
    out |= {"customer": who.number[columns["who"][rows]], "arrived": arrived, "number": rows}
    damaged = rng.random(len(rows)) < scenario.broken
    old = damaged & (rng.random(len(rows)) < 0.5)
    out["kind"] = np.where(damaged & ~old, ABSENT, out["kind"])
    out["time"] = np.where(old, BROKEN_MS, out["time"])
    return Events(topic, out)
