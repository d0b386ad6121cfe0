"""Frozen customers and a clock that goes on: each scored at every tick, every vector held against the oracle; what a tick costs.

    python -m bench.silence [--customers 1000] [--days 35] [--json]

Customers have events in the ten days before a midnight and none after it. The broker's clock moves on day by day. `scored`: silence
scores from that midnight on; `expected`: customers times days; `different`: vectors that are not the oracle's; `told_again`: records
that `verify skew` finds otherwise. `scores_per_cpu_second`: of the engine with everything, silence only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import orjson

from bench.in_memory import NOW_MS, Message, Shelf, Topic, Worker, decoder
from bench.small_model import small
from features import oracle
from features.facts import DAY_MS, TOPICS
from scoring.fallback import Fallback
from scoring.scorer import load
from streams.evaluate import Rules
from streams.scores import vector_hashes
from streams.skew import compare

MIDNIGHT = NOW_MS // DAY_MS * DAY_MS


def inputs(customers: int, events: int) -> Topic:
    """Payments, logins and tickets of the days before MIDNIGHT."""
    random, topic = Random(4), Topic({name: [] for name in TOPICS})
    times = sorted(random.randrange(MIDNIGHT - 10 * DAY_MS, MIDNIGHT) for _ in range(events * customers))
    for number, at in enumerate(times):
        which, kind = random.choice([(0, "payment"), (1, "login"), (2, "opened")])
        name = f"f{number % customers:06d}"
        event: dict[str, Any] = {"event_id": f"e{number}", "customer_id": name, "event_time": at, "kind": kind}
        if which == 0:
            event |= {"amount": "12.5", "currency": "EUR"}
        log = topic.of[TOPICS[which]]
        log.append(Message(orjson.dumps(event), name.encode(), len(log)))
    return topic


def measure(customers: int, days: int, events: int) -> dict[str, Any]:
    """The run; the figures as one flat object."""
    topic = inputs(customers, events)
    model = load(small(200, 6, 0).envelope)
    worker = Worker(topic, Shelf({model.digest: model}, model.digest), DAY_MS)
    worker.run()
    assert worker.merge.ticks is not None
    before = worker.engine.totals["silence"]
    arrived, began = worker.merge.ticks.arrived_ms, time.process_time()
    longest = 0.0
    for day in range(1, days + 1):
        while True:
            each = time.process_time()
            if not worker.run(arrived + day * DAY_MS, 1):
                break
            longest = max(longest, time.process_time() - each)
    used = time.process_time() - began
    made = worker.engine.totals["silence"] - before
    found = [score for message in topic.of["churn-scores"] if (score := orjson.loads(message.body or b""))["cause"] == "silence"]
    found = [score for score in found if score["at"] >= MIDNIGHT]
    facts: dict[str, list[oracle.Fact]] = {}
    for index, name in enumerate(TOPICS):
        if topic.of[name]:
            records = decoder().decode(index, 0, topic.of[name])
            for customer, row in zip(records.customer, records.facts.tolist(), strict=True):
                facts.setdefault(customer, []).append(oracle.fact_of(row))
    different = 0
    for score in found:
        vector = np.frombuffer(oracle.vector(facts[score["customer_id"]], score["at"]), "<f4")
        different += vector_hashes(vector[None])[0] != score["vector_hash"]
    per_tick = Counter(score["at"] for score in found)
    skew = compare(worker.rerun(), worker.shelf.by_digest, Rules(Fallback(0.5), 3, 0.02), None, DAY_MS)
    return {
        "customers": customers,
        "ticks": len(per_tick),
        "expected": customers * days,
        "scored": len({(score["customer_id"], score["at"]) for score in found}),
        "missing": customers * days - len({(score["customer_id"], score["at"]) for score in found}),
        "different": different,
        "told_again_rows": skew.rows,
        "told_again_mismatches": skew.mismatches,
        "scores_per_cpu_second": round(made / used),
        "slice_cpu_ms_longest": round(longest * 1e3, 1),
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--customers", type=int, default=1_000)
    parser.add_argument("--days", type=int, default=35)
    parser.add_argument("--events", type=int, default=8, help="events of each customer before it falls silent")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    figures = measure(arguments.customers, arguments.days, arguments.events)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
