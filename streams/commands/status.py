"""`churnstream status`: where the deployment stands."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Example: churnstream status")
def status(json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False) -> None:
    """Partitions, who owns them, what waits to be scored, and the model in force."""
    from streams.checkup import standing
    from streams.console import Console
    from streams.settings import load

    console = Console(json_output=json_output)
    found = standing(load())
    rows = found["partitions"]
    if not json_output:
        columns = ("partition", "owned", "waiting", *rows[0]["applied"])
        console.table(columns, [(row["partition"], row["owned"], row["lag"], *row["applied"].values()) for row in rows])
    console.say(f"{found['owned']} of {len(rows)} partitions are owned by a worker, {found['lag']:,} records wait")
    console.say(f"model in force: {found['champion'][:12] or 'none (fallback)'}")
    console.result(found)
