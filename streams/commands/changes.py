"""`churnstream changes`: why scores moved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from features.store import Offsets
    from streams.ledger import Change, Totals
    from streams.settings import Settings

app = typer.Typer()


@app.command(epilog="Example: churnstream changes --customer 13085 --min 0.05")
def changes(
    customer: Annotated[str | None, typer.Option("--customer", metavar="ID", help="Of this customer only.")] = None,
    least: Annotated[float, typer.Option("--min", metavar="D", min=0, help="List moves of at least this probability.")] = 0.1,
    start: Annotated[str | None, typer.Option("--from", metavar="TIME", help="Scores at or after this instant: RFC 3339, a day.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Scores before it.")] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Moves listed, the largest.")] = 100,
    processes: Annotated[int, typer.Option(min=0, help="Partitions told at a time; 0 = one per core.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Split each move from one score of a customer to its next into event, time passing, correction, model and feature change.

    The topics are told again from the beginning; the parts of a move sum to it. Exit code 1 when an emitted score or its vector
    could not be made again (`not_made`): its parts say nothing then.
    """
    import time

    from proto.errors import ChurnError
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.ledger import CAUSES, Totals, summary
    from streams.partitioner import partition_of
    from streams.past import applied, each, opened, partitions
    from streams.rerun import EVER
    from streams.settings import load

    began = time.perf_counter()
    settings = opened(load())
    console = Console(json_output=json_output)
    from_ms, to_ms = instant(start, "--from"), instant(end, "--to")
    count = partitions(settings)
    stands = applied(settings, count)
    wanted = range(count) if customer is None else [partition_of(customer, count)]
    bounds = (-EVER if from_ms is None else from_ms, EVER if to_ms is None else to_ms)
    work = [(settings, number, stands[number], customer, least, bounds, most) for number in wanted]
    total = Totals()
    found: list[Change] = []
    for some, totals in each(partition, work, processes):
        total.add(totals)
        found += some
    found = sorted(found, key=_size)[:most]
    rows = [(c.customer, c.score_id, f"{c.former:.3f}", f"{c.now:.3f}", *(f"{part:+.3f}" for part in c.parts)) for c in found]
    if not json_output:
        console.table(("customer", "score", "former", "now", *CAUSES), rows)
    console.say(f"{total.transitions:,} transitions, {total.listed:,} of them by {least:g} or more")
    report: dict[str, Any] = {**summary(total), "seconds": round(time.perf_counter() - began, 2)}
    console.result({**report, "changes": [change.report() for change in found]})
    if total.not_made:
        raise ChurnError(f"{total.not_made} scores could not be made again: history or models are not what they were")


def partition(
    settings: Settings, number: int, stand: Offsets | None, customer: str | None, least: float, bounds: tuple[int, int], most: int
) -> tuple[list[Change], Totals]:
    """One partition: its largest moves of at least this much, and what all came to."""
    from streams.ledger import Ledger, Totals
    from streams.past import Past
    from streams.rerun import Span

    past = Past(settings)
    rerun = past.rerun(number, Span(), applied=stand)
    totals = Totals()
    found: list[Change] = []
    for change in Ledger(rerun, past.models.by_digest, past.rules.fallback, customer):
        if not bounds[0] <= change.at < bounds[1]:
            continue
        totals.note(change)
        if abs(change.now - change.former) >= least:
            totals.listed += 1
            found.append(change)
            if len(found) > 4 * most:
                found = sorted(found, key=_size)[:most]
    past.close()
    return found, totals


def _size(change: Change) -> tuple[float, str]:
    return -abs(change.now - change.former), change.score_id
