"""`churnstream feed`: send the rows of files as events."""

from __future__ import annotations

import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

EPILOG = """\b
Examples:
  churnstream feed data/online_retail_ii/invoices.csv.gz --mapping online_retail_ii --dry-run
  churnstream feed invoices.csv --mapping my.toml --speed 100x --until 2010-12-01T00:00:00Z
  churnstream feed export.jsonl.gz --mapping jsonl --speed 500/s
"""


class _Progress:
    """One line that rewrites itself on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self._drawn = 0.0

    def show(self, events: int, event_ms: int) -> None:
        now = time.monotonic()
        if sys.stderr.isatty() and now - self._drawn > 0.2:
            self._drawn = now
            print(f"\r{events:,} events, {time.strftime('%Y-%m-%d %H:%M', time.gmtime(event_ms / 1000))} ", end="", file=sys.stderr)

    def clear(self) -> None:
        """Free the line for something else."""
        if self._drawn:
            self._drawn = 0.0
            print("\r\x1b[K", end="", file=sys.stderr)


def instant(text: str | None, name: str) -> int | None:
    """Epoch ms of an option's text (RFC 3339, or a bare day), None of None. Raises BadUsage naming the option."""
    from proto.errors import BadUsage
    from proto.events import epoch_ms

    if text is None:
        return None
    try:
        # A bare day is that day's beginning, UTC.
        return epoch_ms(f"{date.fromisoformat(text)}T00:00:00Z" if len(text) == 10 else text)
    except ValueError as error:
        raise BadUsage(f"{name} {text}: {error}") from error


@app.command(epilog=EPILOG)
def feed(
    files: Annotated[list[Path], typer.Argument(help=".csv, .jsonl, .ndjson or .parquet, also .gz; read in this order.")],
    mapping: Annotated[str, typer.Option(help="TOML mapping file, or the name of a shipped one.")],
    speed: Annotated[str, typer.Option(help="max, a rate (500/s), or a factor of event time (100x).")] = "max",
    start: Annotated[str | None, typer.Option("--from", help="First event time, RFC 3339 or YYYY-MM-DD (UTC).")] = None,
    until: Annotated[str | None, typer.Option(help="Event time to stop before.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Send at most so many events.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave bad rows out and exit 0; they are still reported and counted.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Read and map everything, send nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Send rows of files as events, columns mapped by configuration (docs/feeding.md). Exit code 4 when a row is no event."""
    from collections.abc import Iterator
    from itertools import islice

    from proto.errors import BadInput
    from streams.console import Console
    from streams.feed import BadRow, Pace, Record, Sent, events, load_mapping, send
    from streams.settings import load

    console = Console(json_output=json_output)
    settings = load()
    pace = Pace.parse(speed)
    bad, first = 0, ""
    progress = _Progress()

    def good() -> Iterator[Record]:
        nonlocal bad, first
        for record in events(files, load_mapping(mapping), from_ms=instant(start, "--from"), until_ms=instant(until, "--until")):
            if isinstance(record, BadRow):
                bad += 1
                first = first or f"{record.place}: {record.why}"
                progress.clear()
                print(f"{record.place}: {record.why}", file=sys.stderr)
            else:
                yield record

    records = islice(good(), limit) if limit is not None else good()
    if dry_run:
        sent = Sent()
        for record in records:
            sent.events += 1
            sent.by_topic[record.topic] = sent.by_topic.get(record.topic, 0) + 1
    else:
        from streams.stack import endpoints
        from streams.topics import client_config

        servers = endpoints(settings).kafka
        sent = send(
            records,
            client_config(settings, servers),
            settings.topic_prefix,
            pace,
            timeout_s=settings.dependency_timeout_s,
            on_progress=progress.show,
        )
    progress.clear()
    console.say(f"{'would send' if dry_run else 'sent'} {sent.events} events, {bad} bad rows")
    console.result({"events": sent.events, "bad_rows": bad, "by_topic": sent.by_topic, "dry_run": dry_run})
    if bad and not skip_bad:
        raise BadInput(f"{bad} rows are no events, the first is {first} (--skip-bad leaves them out)")
