"""`churnstream dlq`: look at the records that could not be used, and send them back."""

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
    """Look at the records that could not be used: where they came from, why, and their bytes; and send them back."""


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


@app.command(
    epilog="Example: churnstream dlq redrive --reason future --since 2026-11-01 --dry-run\n\n"
    "Example: churnstream dlq redrive --record transactions-2-1041 --rekey"
)
def redrive(
    reason: Annotated[list[str] | None, typer.Option(metavar="CODE", help="Only letters of this reason; may be repeated.")] = None,
    topic: Annotated[str | None, typer.Option(help="Only records of this input topic.")] = None,
    record: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this record, as `dlq list` names it; may be repeated.")
    ] = None,
    offsets: Annotated[str | None, typer.Option(metavar="FIRST-LAST", help="Only these offsets of the source topic.")] = None,
    since: Annotated[str | None, typer.Option(help="Only records received from then on, RFC 3339 or YYYY-MM-DD (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Only records received before.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All letters; needed when nothing else selects.")] = False,
    rekey: Annotated[bool, typer.Option(help="Send under the customer_id of the event instead of the original key.")] = False,
    again: Annotated[bool, typer.Option(help="Also what was sent back before.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be sent, send nothing.")] = False,
    json_output: Json = False,
) -> None:
    """Send dead letters back to the topics they came from: the original bytes, none twice (docs/dead-letters.md)."""
    from features.facts import TOPICS
    from proto.errors import BadUsage
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.redrive import OUTLOOK, SAME_VERDICT, Selection, offsets_of
    from streams.redrive import redrive as send_back
    from streams.settings import load

    for code in reason or ():
        _known(code)
    if topic is not None and topic not in TOPICS:
        raise BadUsage(f"--topic {topic}: input topics are {', '.join(TOPICS)}")
    selection = Selection(
        frozenset(reason or ()),
        topic,
        frozenset(record or ()),
        instant(since, "--since"),
        instant(until, "--until"),
        None if offsets is None else offsets_of(offsets),
    )
    if everything == (selection != Selection()):
        raise BadUsage("say which: --reason, --topic, --record, --offsets, --since, --until, or --all alone")
    console = Console(json_output=json_output)
    done = send_back(load(), selection, dry_run=dry_run, again=again, rekey=rekey)
    sent = dict(sorted(done.sent.items()))
    if sent:
        columns = ("reason", "would be sent" if dry_run else "sent", "what becomes of it")
        outlook = ("is taken" if rekey and code == "key_mismatch" else OUTLOOK.get(code, SAME_VERDICT) for code in sent)
        console.table(columns, [(code, count, text) for (code, count), text in zip(sent.items(), outlook, strict=True)])
    counts = [f"{done.selected} selected", f"{sum(sent.values())} {'would be ' if dry_run else ''}sent"]
    counts.append(f"{done.before} sent back before (--again sends them)")
    if rekey:
        counts.append(f"{done.unkeyed} without a readable customer_id")
    console.say(", ".join(counts))
    if done.unreadable:
        console.say(f"{done.unreadable} records on the topic are no dead letters")
    console.result(
        {
            "dry_run": dry_run,
            "selected": done.selected,
            "sent": sum(sent.values()),
            "sent_by_reason": sent,
            "sent_before": done.before,
            "without_customer": done.unkeyed,
            "unreadable": done.unreadable,
        }
    )
