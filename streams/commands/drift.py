"""`churnstream drift`: whether the scores have moved."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Watch for change. Nothing is written."""


@app.command(epilog="Example: churnstream drift scores --json")
def scores(
    block: Annotated[int, typer.Option(min=1, help="Scores of one block mean.")] = 256,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Run ADWIN over the scores on the topic, in order of event time: where their level changed. Fallback scores are left out."""
    import numpy as np

    from drift.adwin import BlockAdwin
    from streams.console import Console
    from streams.settings import load
    from streams.training import emitted_scores

    console = Console(json_output=json_output)
    emitted = emitted_scores(load(), 0)
    order = np.argsort(emitted.at, kind="stable")
    detector = BlockAdwin(block=block)
    changes = []
    for start in range(0, len(order), block):
        part = order[start : start + block]
        if detector.update(emitted.probability[part]):
            changes.append({"at": int(emitted.at[part[-1]]), "scores": start + len(part), "mean_since": round(detector.mean, 4)})
    console.say(f"{len(order):,} scores, {len(changes)} changes of level")
    if changes:
        console.table(("epoch ms", "after scores", "mean since"), [tuple(change.values()) for change in changes])
    console.result({"scores": len(order), "changes": changes, "mean": round(float(emitted.probability.mean()), 4) if len(order) else None})
