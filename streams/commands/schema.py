"""`churnstream schema`: the public contracts as JSON Schema files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """The contracts of events, scores and dead letters as JSON Schema."""


@app.command(epilog="Example: churnstream schema export --check")
def export(
    directory: Annotated[Path, typer.Option(help="Where the files are.")] = Path("docs/schemas"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit 1 when a file differs from the contract.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Write one schema file per kind of record. A second run says "no changes"."""
    from proto.errors import ChurnError
    from proto.schemas import differences, schemas
    from streams.console import Console

    console = Console(json_output=json_output)
    problems = differences(directory)
    written: list[str] = []
    if not check and problems:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in schemas().items():
            path = directory / name
            if not path.is_file() or path.read_text("utf-8") != text:
                path.write_text(text, "utf-8")
                written.append(name)
                console.say(f"wrote {path}")
        problems = differences(directory)
    elif not problems:
        console.say("no changes")
    for problem in problems:
        console.say(f"{directory / problem}")
    console.result({"written": written, "problems": problems, "schemas": len(schemas())})
    if problems:
        raise ChurnError(f"{len(problems)} schema files do not match the contracts; `churnstream schema export` writes them")
