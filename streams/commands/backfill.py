"""`churnstream backfill`: history from files into the state, before the first start."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

EPILOG = """\b
Examples:
  churnstream backfill history.parquet --mapping my.toml --dry-run
  churnstream backfill 2024.csv.gz 2025.csv.gz --mapping my.toml
"""


@app.command(epilog=EPILOG)
def backfill(
    files: Annotated[list[Path], typer.Argument(help=".csv, .jsonl, .ndjson or .parquet, also .gz.")],
    mapping: Annotated[str, typer.Option(help="TOML mapping file, or the name of a shipped one (docs/feeding.md).")],
    until_topic: Annotated[
        bool,
        typer.Option(
            "--until-topic/--everything", help="Leave events that the live topics hold to them (by event_id): they get scores there."
        ),
    ] = True,
    skip_bad: Annotated[bool, typer.Option(help="Leave bad rows out and exit 0; they are still reported and counted.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Read everything, write nothing.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Fill empty state with history, with no score made of it; a worker started afterwards goes on with the live topics.

    Needs CHURN_SNAPSHOT_DIR: what came from files can only be rebuilt from a snapshot. Stop the workers first. Exit code 4 when a row
    is no event.
    """
    import time
    from dataclasses import asdict

    from features.facts import TOPICS
    from proto.errors import BadInput, BadUsage
    from streams import backfill as filling
    from streams.console import Console
    from streams.feed import BadRow, events, load_mapping
    from streams.log import KafkaLog
    from streams.settings import load
    from streams.snapshot import Snapshots
    from streams.stack import endpoints
    from streams.state_store import open_store
    from streams.topics import client_config
    from streams.training import decoder

    console = Console(json_output=json_output)
    settings = load()
    if settings.snapshot_dir is None:
        raise BadUsage("a back-fill needs snapshots, what came from files is in no topic: set CHURN_SNAPSHOT_DIR")
    snapshots = Snapshots(settings.snapshot_dir, settings.namespace, settings.snapshot_keep)
    read_as = load_mapping(mapping)
    where = endpoints(settings)
    codec = decoder(settings)
    store = open_store(settings, where.redis, patience_s=0)
    source = KafkaLog(client_config(settings, where.kafka), timeout_s=settings.dependency_timeout_s)
    inputs = [settings.prefixed(topic) for topic in TOPICS]
    began = time.monotonic()
    total = filling.Filled()

    def on_bad(row: BadRow) -> None:
        print(f"{row.place}: {row.why}", file=sys.stderr)

    try:
        for partition in range(settings.partitions):
            filling.refuse_state(store.look(partition))
        rows = filling.read(events(files, read_as), codec, settings.partitions, on_bad)
        if rows.bad and not skip_bad:
            raise BadInput(
                f"{rows.bad} rows are no events, the first is {rows.first_bad} (--skip-bad leaves them out); nothing was written"
            )
        for partition in range(settings.partitions):
            there = filling.live(source, inputs, codec, partition, ids=until_topic)
            filled = filling.fill(
                store,
                snapshots,
                partition,
                filling.facts_of(rows, partition),
                there,
                max_facts=settings.max_facts_in_memory // 4,
                now_ms=time.time_ns() // 1_000_000,
                dry_run=dry_run,
            )
            total.add(filled)
            console.say(
                f"partition {partition}: {filled.facts:,} facts of {filled.customers:,} customers, {filled.live:,} left to the topics"
            )
    finally:
        store.close()
        source.close()
    seconds = time.monotonic() - began
    if total.gap_ms is not None and total.gap_ms > 0:
        console.say(f"between the newest fact and the first live record lie {total.gap_ms / 3_600_000:.1f} hours: is there a gap?")
    console.say(f"{'would fill' if dry_run else 'filled'} {total.facts:,} facts of {total.customers:,} customers in {seconds:.1f} s")
    console.result({**asdict(total), "bad_rows": rows.bad, "dry_run": dry_run, "seconds": round(seconds, 3)})
