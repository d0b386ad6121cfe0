"""`churnstream dlq`: look at the records that could not be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from proto.scores import DeadLetter

app = typer.Typer(no_args_is_help=True)

Reason = Annotated[str | None, typer.Option(metavar="CODE", help="Only this reason, e.g. not_json.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.callback()
def group() -> None:
    """Look at the records that could not be used: where they came from, why, and their bytes."""


def _known(reason: str | None) -> None:
    from proto.errors import BadUsage
    from proto.errors import Reason as Code

    codes = [code.name.lower() for code in Code if code]
    if reason is not None and reason not in codes:
        raise BadUsage(f"--reason {reason}: reasons are {', '.join(codes)}")


def _plain(letter: DeadLetter) -> dict[str, object]:
    from streams.dead_letter import source_id

    return {"source_id": source_id(letter), **letter.model_dump()}


@app.command("list", epilog="Example: churnstream dlq list --reason not_json --limit 50")
def list_letters(
    reason: Reason = None,
    limit: Annotated[int, typer.Option(min=0, help="Show the newest so many; all are counted.")] = 20,
    json_output: Json = False,
) -> None:
    """Counts by reason, and one line for each of the newest dead letters."""
    from datetime import UTC, datetime

    from streams.console import Console
    from streams.dead_letter import collect, escaped, original, source_id
    from streams.settings import load

    _known(reason)
    console = Console(json_output=json_output)
    found = collect(load(), limit=limit, reason=reason)
    counts = dict(sorted(found.by_reason.items()))
    if found.letters:
        console.table(
            ("record", "received (UTC)", "reason", "detail", "key"),
            [
                (
                    source_id(letter),
                    f"{datetime.fromtimestamp(letter.append_time / 1000, UTC):%Y-%m-%d %H:%M:%S}" if letter.append_time >= 0 else "",
                    letter.reason,
                    escaped(letter.detail.encode(), 100),
                    escaped(original(letter.key), 40),
                )
                for letter in found.letters
            ],
        )
    console.say(f"{sum(counts.values())} dead letters" + "".join(f", {count} {code}" for code, count in counts.items()))
    if found.unreadable:
        console.say(f"{found.unreadable} records on the topic are no dead letters")
    letters = [_plain(letter) for letter in found.letters]
    console.result({"total": sum(counts.values()), "by_reason": counts, "unreadable": found.unreadable, "letters": letters})


@app.command(epilog="Example: churnstream dlq show transactions-2-1041")
def show(
    record: Annotated[str | None, typer.Argument(help="<topic>-<partition>-<offset> as `dlq list` prints it; none = the newest.")] = None,
    reason: Reason = None,
    limit: Annotated[int, typer.Option(min=1, help="Show the newest so many.")] = 1,
    characters: Annotated[int, typer.Option(min=1, help="Cut the original bytes after so many characters.")] = 2_000,
    json_output: Json = False,
) -> None:
    """One dead letter in full. Control characters of the original are escaped; --json has the bytes as base64."""
    from proto.errors import ChurnError
    from streams.console import Console
    from streams.dead_letter import collect, escaped, original, source_id
    from streams.settings import load

    _known(reason)
    console = Console(json_output=json_output)
    found = collect(load(), limit=limit, reason=reason, source=record)
    if not found.letters:
        raise ChurnError(
            f"no dead letter {record or ''} {reason or ''}".replace("  ", " ").strip() + "; `churnstream dlq list` shows what is there"
        )
    for letter in found.letters:
        console.say(f"record    {source_id(letter)}")
        console.say(f"reason    {letter.reason}")
        console.say(f"detail    {escaped(letter.detail.encode(), 500)}")
        console.say(f"received  {letter.append_time} ms")
        console.say(f"key       {escaped(original(letter.key), characters)}")
        console.say(f"value     {escaped(original(letter.value), characters)}")
        console.say()
    console.result({"letters": [_plain(letter) for letter in found.letters]})
