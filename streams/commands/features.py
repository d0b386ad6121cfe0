"""`churnstream features`: the catalog as a list and as a page, and the proof that the kernel computes what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.callback()
def group() -> None:
    """List the features, check them against the oracle, write their page."""


@app.command("list", epilog="Example: churnstream features list --json")
def list_(json_output: Json = False) -> None:
    """Every feature: name, group, source, aggregate, window, unit, meaning."""
    from features.catalog import LAYOUT_HASH
    from features.listing import entries
    from streams.console import Console

    console = Console(json_output=json_output)
    features = entries()
    columns = ("name", "group", "source", "aggregate", "window", "unit", "meaning")
    if not json_output:
        console.table(columns, [[feature[column] for column in columns] for feature in features])
    console.result({"features": features, "count": len(features), "layout_hash": LAYOUT_HASH})


@app.command(epilog="Example: churnstream features export --from 2026-01-01 --to 2026-02-01 --out vectors")
def export(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the files go: part-<partition>.parquet.")],
    start: Annotated[str | None, typer.Option("--from", metavar="TIME", help="Vectors from this instant on; RFC 3339 or a day.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="TIME", help="Vectors before this instant.")] = None,
    json_output: Json = False,
) -> None:
    """The feature log as Parquet: each vector as it was scored, a column per feature. Needs CHURN_FEATURE_LOG=true on the workers."""
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.feature_log import export as write
    from streams.log import KafkaLog
    from streams.settings import load
    from streams.topics import FEATURES, client_config

    settings = load()
    console = Console(json_output=json_output)
    log = KafkaLog(client_config(settings), timeout_s=settings.dependency_timeout_s)
    topic = settings.prefixed(FEATURES)
    from_ms, to_ms = instant(start, "--from"), instant(end, "--to")
    bounds = -(2**62) if from_ms is None else from_ms, 2**62 if to_ms is None else to_ms
    rows = [write(log, topic, partition, out, *bounds) for partition in range(log.partitions(topic))]
    log.close()
    files = [out / f"part-{partition}.parquet" for partition in range(len(rows))]
    size = sum(path.stat().st_size for path in files)
    console.say(f"{sum(rows):,} vectors in {len(files)} files, {size:,} bytes: {out}")
    console.result({"rows": sum(rows), "files": [str(path) for path in files], "bytes": size})


@app.command(epilog="Example: churnstream features verify --oracle --cases 100000")
def verify(
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Compare with the oracle: plain Python over whole lives (the only way so far).")
    ] = False,
    cases: Annotated[int, typer.Option(min=1, help="Vectors to compare, at least.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the histories.")] = 1,
    processes: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.")] = 0,
    json_output: Json = False,
) -> None:
    """Compare whole vectors, byte by byte, over seeded hostile histories. Exit code 1 when one differs."""
    import os
    from time import perf_counter

    from proto.errors import BadUsage
    from streams.console import Console

    if not oracle:
        raise BadUsage("say what to verify against: churnstream features verify --oracle")
    # Compiled before the clock starts and before the children, which find the machine code on disk.
    from features.verify import report
    from features.verify import verify as compare

    console = Console(json_output=json_output)
    shown = 0

    def progress(done: int) -> None:
        nonlocal shown
        if done * 20 // cases > shown:
            shown = done * 20 // cases
            console.say(f"{done:>12,} of {cases:,} cases   {perf_counter() - began:7.1f} s")

    began = perf_counter()
    found = compare(cases, seed, processes or os.cpu_count() or 1, progress)
    result = report(found, seed, perf_counter() - began)
    for one in found.first_mismatches:
        where = f"{one.check}: world {one.world}, customer {one.customer}, event {one.position}"
        console.say(f"{where}: {one.what}: oracle {one.oracle}, kernel {one.kernel}")
    console.say(
        f"{found.cases:,} vectors compared, {found.mismatches:,} mismatches; {found.histories:,} histories, "
        f"{found.histories_over_1000_facts:,} of them over 1,000 kept facts (the oracle looked at {found.hot_sampled:,} of their "
        f"{found.hot_events:,} scored events); {result['seconds']} s, seed {seed}"
    )
    console.result(result)
    if found.mismatches:
        raise typer.Exit(1)


@app.command(epilog="Example: churnstream features docs --check")
def docs(
    path: Annotated[Path, typer.Argument(help="The page.")] = Path("docs/features.md"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 when the page is not current.")] = False,
    json_output: Json = False,
) -> None:
    """Write docs/features.md from the catalog."""
    from features.listing import page
    from streams.console import Console

    console = Console(json_output=json_output)
    text = page()
    current = path.is_file() and path.read_text(encoding="utf-8") == text
    if not current and not check:
        path.write_text(text, encoding="utf-8")
    console.say(f"{path}: {'current' if current else 'out of date: run churnstream features docs' if check else 'written'}")
    console.result({"path": str(path), "current": current, "written": not current and not check})
    if check and not current:
        raise typer.Exit(1)
