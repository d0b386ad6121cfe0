"""`churnstream state`: what Redis holds of a customer, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from features.state import Customer

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.callback()
def group() -> None:
    """Look at the state of customers in Redis. Nothing is changed."""


@app.command(epilog="Example: churnstream state show 12345")
def show(
    customer: Annotated[str, typer.Argument(help="customer_id of the events.")],
    facts: Annotated[int, typer.Option(min=0, help="Kept facts to list, newest first.")] = 10,
    json_output: Json = False,
) -> None:
    """Everything kept of one customer: facts, totals of what left, features as of the last scored event, last score.

    Exit code 1 when nothing is stored of this customer.
    """
    from features.state import decode
    from proto.errors import ChurnError
    from streams.console import Console
    from streams.partitioner import partition_of
    from streams.settings import load
    from streams.stack import endpoints
    from streams.state_store import open_store

    settings = load()
    console = Console(json_output=json_output)
    partition = partition_of(customer, settings.partitions)
    store = open_store(settings, endpoints(settings).redis, patience_s=0)
    state = store.load(partition, [customer])[0]
    stale = store.look(partition).rebuilding
    store.close()
    if stale:
        console.say(f"stale: partition {partition} is being rebuilt; what is shown may be from before, and may lack customers")
    if state is None:
        again = "; its partition is being rebuilt: ask again later" if stale else ""
        raise ChurnError(f"nothing is stored of customer {customer!r} (partition {partition}, namespace {settings.namespace}){again}")
    decoded = decode(state)
    shown = describe(decoded, facts)
    score, totals = shown["score"], shown["totals"]
    console.say(f"customer {customer}, partition {partition}, key {settings.namespace}:{{{partition}}}:c:{customer}")
    console.say(
        f"{shown['kept_facts']} kept facts in {len(state.chunks)} closed chunks and one open, {totals['left_facts']} left the 90 days"
    )
    if score is not None:
        console.say(f"last score {score['probability']:.4f} ({score['band']}) at {score['at']}")
    if not json_output:
        console.table(("feature", "value"), [(name, value) for name, value in shown["features"].items() if value is not None])
        console.table(("time", "kind", "value", "topic", "offset"), [tuple(fact.values()) for fact in shown["facts"]])
    console.result(
        {
            "customer": customer,
            "partition": partition,
            "stale": stale,
            "value_bytes": len(state.main) + sum(len(chunk) for chunk in state.chunks),
            **shown,
        }
    )


def describe(customer: Customer, facts: int) -> dict[str, Any]:
    """A decoded customer as JSON types; absent numbers are None, times RFC 3339 in UTC. facts: how many to list, newest first."""
    from math import isnan

    from features.carry import BASE, FIRST, MEASURE, MONEY, NEWEST
    from features.catalog import CLOCKS, MEASURES, NAMES
    from features.facts import KIND, KINDS, NONE, OFFSET, TIME, TOPICS, VALUE
    from proto.scores import BANDS

    kinds = {code: name for name, code in KINDS.items()}
    rows = customer.facts[::-1][:facts].tolist()
    carry = customer.carry.tolist()
    vector = customer.vector.tolist()
    scored = not isnan(customer.probability)
    return {
        "kept_facts": len(customer.facts),
        "score": {
            "probability": customer.probability,
            "band": BANDS[customer.band],
            "alert_band": BANDS[customer.alert_band],
            "at": _utc(customer.score_at),
        }
        if scored
        else None,
        "features": {name: None if isnan(value) else value for name, value in zip(NAMES, vector, strict=True)},
        "facts": [
            {
                "time": _utc(row[TIME]),
                "kind": kinds[row[KIND]],
                "value": None if row[VALUE] == NONE else row[VALUE],
                "topic": TOPICS[row[KIND] >> 3],
                "offset": row[OFFSET],
            }
            for row in rows
        ],
        "totals": {
            "left_facts": carry[BASE],
            "money_minor": carry[MONEY],
            "measures": {measure.name: carry[MEASURE + i] for i, measure in enumerate(MEASURES)},
            "newest": {clock.name: None if carry[NEWEST + i] == NONE else _utc(carry[NEWEST + i]) for i, clock in enumerate(CLOCKS)},
            "first": {clock.name: None if carry[FIRST + i] == NONE else _utc(carry[FIRST + i]) for i, clock in enumerate(CLOCKS)},
        },
    }


def _utc(ms: int) -> str:
    from datetime import UTC, datetime, timedelta

    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
