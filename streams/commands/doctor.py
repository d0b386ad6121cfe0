"""`churnstream doctor`: whether everything is there that the service needs."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Example: churnstream doctor")
def doctor(json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False) -> None:
    """Look at directory, disk, Kafka, topics, model and Redis, and say what to do about what is not well. Changes nothing.

    Exit code 0 when all is well, 3 when Kafka or Redis does not answer, else 1.
    """
    from dataclasses import asdict

    from proto.errors import ChurnError, DependencyUnreachable
    from streams.checkup import checkup
    from streams.console import Console
    from streams.settings import load

    console = Console(json_output=json_output)
    found = []
    for finding in checkup(load()):
        found.append(finding)
        console.say(f"{'ok  ' if finding.well else 'FAIL'}  {finding.what}: {finding.said}")
        if not finding.well:
            console.say(f"      -> {finding.do}")
    console.result({"well": all(one.well for one in found), "findings": [{**asdict(one), "well": one.well} for one in found]})
    ill = [one for one in found if not one.well]
    if ill:
        kind = DependencyUnreachable if any(one.unreachable for one in ill) else ChurnError
        raise kind(f"{len(ill)} of {len(found)} checks are not passed, first {ill[0].what}: {ill[0].said}")
