"""`churnstream worker`: one scoring worker."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.command(epilog="Example: churnstream worker --until-idle 3 --json")
def worker(
    until_idle: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Stop when caught up and nothing came for so long; the default is to go on."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Score events as they come, until SIGTERM or Ctrl-C; then finish the batch in work and stop within 10 seconds.

    Several workers share the partitions. With --until-idle a summary is printed at the end: what came in, what became of it, and
    where the time went (CPU seconds by part).
    """
    from streams.console import Console
    from streams.settings import load
    from streams.stack import endpoints
    from streams.topics import client_config

    settings = load()
    console = Console(json_output=json_output)
    where = endpoints(settings)

    from streams.main import Worker, log_to_stderr

    log_to_stderr(settings.log_level)
    summary = Worker(settings, client_config(settings, where.kafka), where.redis, until_idle_s=until_idle).run()
    counts = ("events_in", "scores", "dead_letters", "duplicates", "profile_facts", "residue")
    console.say(", ".join(f"{summary[name]:,} {name.replace('_', ' ')}" for name in counts))
    if summary["events_in"]:
        model = summary["model_version"] or "none (fallback)"
        console.say(f"{summary['events_per_second']:,.0f} events/s, {summary['cpu_seconds']:.1f} CPU seconds; model {model}")
        parts = summary["parts_cpu_seconds"]
        walls = summary["parts_wall_seconds"]
        per = 1e6 / summary["events_in"]
        console.table(
            ("part", "CPU us/event", "wall us/event"), [(name, round(parts[name] * per, 2), round(walls[name] * per, 2)) for name in parts]
        )
    console.result(summary)
