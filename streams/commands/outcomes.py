"""`churnstream outcomes`: what became of the scored customers."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Outcomes joined to the scores that predicted them. Nothing is written."""


@app.command(epilog="Example: churnstream outcomes report --horizon-days 90 --json")
def report(
    horizon_days: Annotated[int, typer.Option(min=1, help="How far ahead a score looks, as in the label of the model.")] = 90,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Probability from which a customer counts as flagged.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Live AUC, precision and calibration of mature scores, an estimate for the others, revenue at risk and saved; 95 % intervals."""
    from streams.console import Console
    from streams.outcomes import report as make
    from streams.settings import load

    console = Console(json_output=json_output)
    found = make(load(), horizon_days=horizon_days, threshold=threshold, seed=seed)
    console.say(
        f"{found['scores']:,} scores (one a customer and day), {found['labelled']:,} labelled, {found['unlabelled_yet']:,} not mature"
    )
    for title in ("live", "estimate"):
        rows = [(name, v["value"], v["low"], v["high"]) for name, v in (found[title] or {}).items() if isinstance(v, dict)]
        if rows:
            console.table((title, "value", "low", "high"), rows)
    console.say(found["estimate"]["statement"])
    for campaign, effect in found["interventions"].items():
        prevented = effect.get("churn_prevented")
        text = f"prevented {prevented['value']} [{prevented['low']}, {prevented['high']}]" if prevented else effect["evidence"]
        console.say(f"{campaign}: {effect['treated']} treated, {effect['held_out']} held out; {text}")
    console.result(found)
