"""What a simulated day consists of: customers, events, and everything that is wrong with them. A pure function of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Final

import orjson

from features.facts import DAY_MS
from proto.errors import Reason
from streams.partitioner import partition_of

PARTITIONS: Final = 2
START_MS: Final = 1_750_000_000_000
"""The broker's clock at the beginning."""
_KINDS: Final = (
    ("payment", "payment", "refund", "renewal", "failed_payment", "cancellation"),
    ("login", "login", "failed_login", "page_view", "feature_use", "error"),
    ("opened", "resolved", "reopened", "satisfaction"),
    ("profile",),
)
_ODD: Final = ("%s%%d", "a b", "{0}", "ünï", '"quoted"', "\u2028", "0", "c" * 60)
_POISON: Final = (
    (b"{", Reason.NOT_JSON),
    (b"\xff\xfe", Reason.NOT_UTF8),
    (None, Reason.EMPTY),
    (b"", Reason.EMPTY),
    (b"[]", Reason.WRONG_TYPE),
    (b'{"event_id": "x"}', Reason.MISSING_FIELD),
    (b"[" * 200, Reason.NESTING),
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One record on its way to a topic. reason: why the decoder must refuse it (ACCEPTED: it must not); hole: offsets missing before it.

    number: its place among all arrivals.
    """

    number: int
    topic: int
    partition: int
    key: bytes
    value: bytes | None
    reason: Reason
    hole: int


@cache
def customers(partition: int) -> tuple[str, ...]:
    """Names that murmur2 puts into the partition; some of them are odd."""
    names = [*_ODD, *(f"c{number:03d}" for number in range(60))]
    return tuple(name for name in names if partition_of(name, PARTITIONS) == partition)


@dataclass(frozen=True, slots=True)
class Size:
    """How large a world is: events over all partitions, customers of each partition, records of one batch at most."""

    events: int
    customers: int
    batch: int


def size_of(random: Random) -> Size:
    """Mostly small; one in twenty is ten times as large."""
    if random.random() < 0.05:
        return Size(random.randint(300, 600), random.randint(3, 20), random.choice([10, 60]))
    return Size(random.randint(40, 120), random.randint(2, 6), random.choice([3, 8, 20]))


def arrivals(random: Random, size: Size) -> list[Arrival]:
    """Records in the order in which they reach the broker: late, double, contradicting, out of range, unreadable ones among them."""
    pools = [random.sample(customers(partition), size.customers) for partition in range(PARTITIONS)]
    pace = random.choice([(1, 1_000), (1_000, 3_600_000), (0, 1, 3_600_000, DAY_MS), (3_600_000, DAY_MS, 12 * DAY_MS)])
    spoiled = random.choice([0.0, 0.1, 0.4])
    rich = random.random() < 0.3
    time = START_MS - 6_000 * DAY_MS
    sent: list[tuple[int, int, dict[str, Any]]] = []
    found: list[Arrival] = []
    for number in range(size.events):
        time += random.choice(pace)
        partition = random.randrange(PARTITIONS)
        topic = random.choices(range(4), (4, 4, 2, 1))[0]
        customer = random.choice(pools[partition])
        event: dict[str, Any] = {
            "event_id": f"e{number}",
            "customer_id": customer,
            "event_time": time,
            "kind": random.choice(_KINDS[topic]),
        }
        _dress(topic, event, random, rich)
        reason, key, value = Reason.ACCEPTED, customer, None
        draw = random.random()
        if draw < 0.08:
            event["event_time"] = time - random.randrange(3 * DAY_MS)
        elif draw < 0.12:
            event["event_time"] = time - random.randrange(80 * DAY_MS, 100 * DAY_MS)
        elif draw < 0.20 and sent:
            topic, partition, event = random.choice(sent[-30:])
            key = event["customer_id"]
            if draw > 0.17:
                event = {**event, "event_time": event["event_time"] + 5}
        elif draw < 0.20 + spoiled:
            reason, key, value = _spoil(random, event, pools[partition])
        if reason == Reason.ACCEPTED:
            sent.append((topic, partition, event))
        if value is None and reason in (Reason.ACCEPTED, Reason.FUTURE, Reason.KEY_MISMATCH):
            value = orjson.dumps(event)
        hole = random.choice((0, 0, 0, 0, 0, 1, 1, 3))
        found.append(Arrival(number, topic, partition, key.encode(), value, reason, hole))
    return found


def probe(number: int, partition: int, customer: str) -> Arrival:
    """One more login, newer than all else: so that somebody looks at the customer, and at the partition, again."""
    event = {"event_id": f"probe{number}", "customer_id": customer, "event_time": START_MS - DAY_MS, "kind": "login"}
    return Arrival(number, 1, partition, customer.encode(), orjson.dumps(event), Reason.ACCEPTED, 0)


def _dress(topic: int, event: dict[str, Any], random: Random, rich: bool) -> None:
    if topic == 0:
        event["amount"] = 9_999_999_999_000.01 + random.randrange(900) if rich else random.choice([10, "12.5", 3.25, 0, "0.005"])
        if rich:
            event["amount"] = f"{event['amount']:.2f}"
        event["currency"] = random.choice(["EUR", "EUR", "USD", "XXX"])
        event["product"] = f"p{random.randrange(3)}"
    elif topic == 1:
        event["device"] = f"d{random.randrange(3)}"
        event["duration_ms"] = random.randrange(10_000)
    elif topic == 2:
        event["ticket_id"] = f"t{random.randrange(4)}"
        event["priority"] = random.choice(["low", "urgent"])
        if event["kind"] == "satisfaction":
            event["csat"] = random.randint(1, 5)
    else:
        event["plan"] = f"plan{random.randrange(2)}"
        event["signup_date"] = "2015-03-01"
        event["consent"] = random.random() < 0.5


def _spoil(random: Random, event: dict[str, Any], pool: Sequence[str]) -> tuple[Reason, str, bytes | None]:
    draw = random.random()
    customer: str = event["customer_id"]
    if draw < 0.15:
        event["event_time"] = START_MS + 400 * DAY_MS
        return Reason.FUTURE, customer, None
    if draw < 0.3 and (others := [name for name in pool if name != customer]):
        return Reason.KEY_MISMATCH, random.choice(others), None
    value, reason = random.choice(_POISON)
    return reason, customer, value
