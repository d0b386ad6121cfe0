"""`churnstream topics`: create the topics explicitly, never by accident."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Create the topics, or say what would be created."""


@app.command(epilog="Example: churnstream topics create --dry-run")
def create(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Create missing topics and set what differs. A second run says "no changes"."""
    from streams.console import Console
    from streams.settings import load
    from streams.topics import create as create_topics
    from streams.topics import table

    settings = load()
    console = Console(json_output=json_output)
    plan = create_topics(settings, dry_run=dry_run)
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if plan.empty:
        console.say("no changes")
    if plan.created:
        days = f"{settings.retention_days} d"
        rows = [
            (settings.prefixed(t.name), t.partitions or settings.partitions, days if t.retained else "latest per key", t.role)
            for t in table(settings)
            if settings.prefixed(t.name) in plan.created
        ]
        console.table(("topic", "partitions", "kept", "holds"), rows, title="would be created" if dry_run else "created")
    if plan.changed:
        console.table(("topic", "setting", "was", "is to be" if dry_run else "is"), plan.changed)
    console.result(
        {
            "created": list(plan.created),
            "changed": [{"topic": topic, "setting": key, "from": old, "to": new} for topic, key, old, new in plan.changed],
            "warnings": list(plan.warnings),
            "dry_run": plan.dry_run,
        }
    )
