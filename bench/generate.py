"""A synthetic backlog over the input topics: python bench/generate.py EVENTS [--customers N] [--seed S] [--prefix P]."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import orjson
from confluent_kafka import Producer

from streams.settings import load
from streams.topics import producer_config

START_MS = 1_700_000_000_000
SPAN_MS = 17_280  # between two events; 600,000 events are 120 days
BATCH = 10_000
TOPIC_SHARES = (0.4, 0.5, 0.1)
LATE_SHARE = 0.02
LATE_MS = 3_600_000
NAMES: Final = ("transactions", "logins", "support-tickets")


def events(count: int, *, customers: int, seed: int, start_ms: int = START_MS) -> Iterator[tuple[int, str, bytes]]:
    """(topic index, customer, JSON) of `count` events in event-time order, 2 % of them up to an hour late.

    Customers are drawn by a power law: a few are hot. The same seed gives the same bytes.
    """
    random = np.random.default_rng(seed)
    weight = 1 / (np.arange(customers) + 10) ** 0.9
    customer = random.choice(customers, count, p=weight / weight.sum()).tolist()
    topic = random.choice(len(TOPIC_SHARES), count, p=TOPIC_SHARES).tolist()
    number = random.lognormal(3, 1, count).round(2)
    product = random.integers(0, 50, count).tolist()
    moment = start_ms + np.arange(count) * SPAN_MS
    moment -= np.where(random.random(count) < LATE_SHARE, random.integers(0, LATE_MS, count), 0)
    for i, (c, t, x, p, at) in enumerate(zip(customer, topic, number.tolist(), product, moment.tolist(), strict=True)):
        event: dict[str, Any] = {"event_id": f"e{seed}-{i:09d}", "customer_id": f"c{c:06d}", "event_time": at}
        if t == 0:
            kind = "payment" if x < 90 else "failed_payment" if x < 110 else "refund"
            event |= {"kind": kind, "amount": x, "currency": "EUR", "product": f"p{p}", "channel": "web", "method": "card"}
        elif t == 1:
            kind = "login" if x < 60 else "failed_login"
            event |= {"kind": kind, "device": ("mobile", "desktop", "tablet")[p % 3], "country": "DE", "session_id": f"s{i // 3:08d}"}
        else:
            kind = "opened" if x < 30 else "resolved"
            event |= {
                "kind": kind,
                "ticket_id": f"t{i:08d}",
                "category": f"k{p % 7}",
                "priority": "high" if p % 5 == 0 else "normal",
                "channel": "phone",
            }
        yield t, event["customer_id"], orjson.dumps(event)


def generate(count: int, *, customers: int, seed: int, prefix: str, config: dict[str, Any], start_ms: int = START_MS) -> float:
    """Produce `count` events (see `events`) and wait for the acknowledgements; returns seconds."""
    return send(events(count, customers=customers, seed=seed, start_ms=start_ms), prefix=prefix, config=config)


def send(stream: Iterable[tuple[int, str, bytes]], *, prefix: str, config: dict[str, Any]) -> float:
    """Produce events, each to its topic, and wait for the acknowledgements; returns seconds. Raises SystemExit when some are missing."""
    begin = time.perf_counter()
    producer = Producer(
        {"linger.ms": 20, "batch.size": 1_000_000, "queue.buffering.max.messages": 2_000_000, "compression.type": "lz4", **config}
    )
    waiting: list[list[dict[str, Any]]] = [[] for _ in NAMES]
    for topic, customer, value in stream:
        batch = waiting[topic]
        batch.append({"value": value, "key": customer})
        if len(batch) == BATCH:
            producer.produce_batch(prefix + NAMES[topic], batch)
            producer.poll(0)
            waiting[topic] = []
    for name, batch in zip(NAMES, waiting, strict=True):
        producer.produce_batch(prefix + name, batch)
    left = producer.flush(60)
    if left:
        raise SystemExit(f"{left} events were not acknowledged within 60 s")
    return time.perf_counter() - begin


def main() -> None:
    """Run from the command line; settings as for every command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("events", type=int)
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    settings = load()
    config = producer_config(settings)
    seconds = generate(arguments.events, customers=arguments.customers, seed=arguments.seed, prefix=settings.topic_prefix, config=config)
    print(f"{arguments.events:,} events in {seconds:.1f} s")


if __name__ == "__main__":
    main()
