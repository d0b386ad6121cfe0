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


@app.command(epilog="Example: churnstream state show 12345\n\nExample: churnstream state show 12345 --at 2026-01-31 --view known-then")
def show(
    customer: Annotated[str, typer.Argument(help="customer_id of the events.")],
    facts: Annotated[int, typer.Option(min=0, help="Kept facts to list, newest first.")] = 10,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="As of this instant (RFC 3339 or a day), told from facts.")] = None,
    view: Annotated[
        str, typer.Option(help="With --at. known-then: from what had been handled when it was scored last; corrected: from all known now.")
    ] = "corrected",
    json_output: Json = False,
) -> None:
    """Everything kept of one customer: facts, totals of what left, features as of the last scored event, last score.

    With --at its vector at an instant of the past, as known then or corrected by what came late; both by the kernel that scores.
    Exit code 1 when nothing is stored of this customer.
    """
    if at is not None:
        _as_of(customer, at, view, facts, json_output)
        return
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


def _as_of(customer: str, at: str, view: str, facts: int, json_output: bool) -> None:
    from math import isnan

    from features.catalog import NAMES
    from proto.errors import BadUsage
    from streams.commands.explain import explainer_of
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.partitioner import partition_of
    from streams.past import opened
    from streams.scores import vector_hashes
    from streams.settings import load

    if view not in ("known-then", "corrected"):
        raise BadUsage(f"--view {view}: there are known-then and corrected")
    explainer = explainer_of(opened(load()), 1)
    partition, at_ms = partition_of(customer, explainer.partitions), instant(at, "--at")
    assert at_ms is not None
    found = (explainer.known_then if view == "known-then" else explainer.corrected)(customer, partition, at_ms)
    console = Console(json_output=json_output)
    shown = {name: None if isnan(value) else value for name, value in zip(NAMES, found.vector.tolist(), strict=True)}
    console.say(f"customer {customer} at {_utc(at_ms)}, {view}: {len(found.facts)} kept facts, from {found.source}")
    if found.score is not None:
        console.say(f"last score then {found.score['probability']:.4f} ({found.score['band']}), {found.score['score_id']}")
    rows = [_listed(row) for row in found.facts[::-1][:facts].tolist()]
    if not json_output:
        console.table(("feature", "value"), [(name, value) for name, value in shown.items() if value is not None])
        console.table(("time", "kind", "value", "topic", "offset"), [tuple(row.values()) for row in rows])
    console.result(
        {
            "customer": customer,
            "partition": partition,
            "view": view,
            "at": _utc(at_ms),
            "source": found.source,
            "kept_facts": len(found.facts),
            "vector_hash": vector_hashes(found.vector[None])[0],
            "score": None if found.score is None else dict(found.score),
            "features": shown,
            "facts": rows,
        }
    )


def _listed(row: list[int]) -> dict[str, Any]:
    from features.facts import KIND, KINDS, NONE, OFFSET, TIME, TOPICS, VALUE

    kinds = {code: name for name, code in KINDS.items()}
    return {
        "time": _utc(row[TIME]),
        "kind": kinds[row[KIND]],
        "value": None if row[VALUE] == NONE else row[VALUE],
        "topic": TOPICS[row[KIND] >> 3],
        "offset": row[OFFSET],
    }


def describe(customer: Customer, facts: int) -> dict[str, Any]:
    """A decoded customer as JSON types; absent numbers are None, times RFC 3339 in UTC. facts: how many to list, newest first."""
    from math import isnan

    from features.carry import BASE, FIRST, MEASURE, MONEY, NEWEST
    from features.catalog import CLOCKS, MEASURES, NAMES
    from features.facts import NONE
    from proto.scores import BANDS

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
        "facts": [_listed(row) for row in rows],
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
