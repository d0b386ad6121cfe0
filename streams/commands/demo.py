"""`churnstream demo`: the whole service on this machine, on real invoices, from nothing to live scores."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Examples: churnstream demo · churnstream demo --keep · churnstream demo --json")
def demo(
    keep: Annotated[bool, typer.Option(help="Leave everything running at the end and say how to look around.")] = False,
    rate: Annotated[float, typer.Option(min=1, help="Events per second of the paced tail.")] = 500.0,
    tail: Annotated[int, typer.Option(min=100, help="Events of the paced tail.")] = 5_000,
    json_output: Annotated[bool, typer.Option("--json/--no-json", help="Print one JSON object as the last line.")] = True,
) -> None:
    """Real invoices through real Kafka, Faust, Redis and ONNX Runtime: fill histories, train, publish, score live, show who is at risk.

    Each run uses topics and state of its own. Everything the run started is stopped at its end.
    """
    from streams.console import Console
    from streams.demo import run

    console = Console(json_output=json_output)
    console.result(run(console, keep=keep, rate=rate, tail=tail))
