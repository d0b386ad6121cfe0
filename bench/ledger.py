"""Each move of a score split into its causes, over many transitions: how far the parts are from the move, and how fast it goes.

    python -m bench.ledger [--transitions 100000] [--json]

A partition is scored in memory by the real engine: late events, repetitions, profiles, weekly ticks, two models in turns. Then
its past is told again and every transition from one score of a customer to the next is split.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from random import Random
from typing import Any

import orjson

from bench.in_memory import NOW_MS, Message, Shelf, Topic, Worker
from bench.small_model import small
from features.facts import DAY_MS, TOPICS
from scoring.fallback import Fallback
from scoring.scorer import load
from streams.ledger import CAUSES, Ledger, Totals
from streams.scores import Model

KINDS = (("payment", "payment", "refund", "renewal"), ("login", "login", "page_view"), ("opened", "satisfaction"), ("profile",))


def inputs(events: int, customers: int) -> Topic:
    """Half a year, one event in ten late, one in thirty a repetition, one in thirty a profile."""
    random, topic = Random(9), Topic({name: [] for name in TOPICS})
    for number in range(events):
        at = NOW_MS - 180 * DAY_MS + number * 180 * DAY_MS // events
        which = random.choices(range(4), (10, 14, 5, 1))[0]
        name = f"c{random.randrange(customers):06d}"
        late = random.randrange(20 * DAY_MS) if random.random() < 0.1 else 0
        kind = random.choice(KINDS[which])
        event: dict[str, Any] = {"event_id": f"e{number}", "customer_id": name, "event_time": at - late, "kind": kind}
        if which == 0:
            event |= {"amount": f"{random.uniform(1, 400):.2f}", "currency": "EUR", "product": f"p{random.randrange(9)}"}
        if which == 3:
            event["plan"] = random.choice(["basic", "pro"])
        log = topic.of[TOPICS[which]]
        log.append(Message(orjson.dumps(event), name.encode(), len(log)))
        if random.random() < 0.03:
            log.append(Message(log[-1].body, name.encode(), len(log)))
    return topic


def measure(transitions: int) -> dict[str, Any]:
    """The run; the figures as one flat object."""
    customers = max(50, transitions // 80)
    models: dict[str, Model] = {model.digest: model for model in (load(small(100, 5, seed).envelope) for seed in (0, 1))}
    names = list(models)
    worker = Worker(inputs(transitions * 3 // 4, customers), Shelf(models, names[0]), 7 * DAY_MS)
    turn = 0
    while worker.run(batches=3):
        turn += 1
        worker.shelf.now = names[turn % 2]
    began = time.process_time()
    totals = Totals()
    for change in Ledger(worker.rerun(), worker.shelf.by_digest, Fallback(0.5)):
        totals.note(change)
    used = time.process_time() - began
    return {
        "transitions": totals.transitions,
        "not_made": totals.not_made,
        "largest_residue": totals.residue,
        **{f"moved_by_{name}": round(totals.moved[name], 3) for name in CAUSES},
        "transitions_per_cpu_second": round(totals.transitions / used),
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=100_000, help="about so many at least")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    figures = measure(arguments.transitions)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
