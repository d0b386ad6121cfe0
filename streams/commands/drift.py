"""`churnstream drift`: whether scores, features and records have moved, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.callback()
def group() -> None:
    """Watch for change: make a baseline, run the watch, look at what it said, write a report."""


@app.command(epilog="Example: churnstream drift scores --json")
def scores(
    block: Annotated[int, typer.Option(min=1, help="Scores of one block mean.")] = 256,
    json_output: Json = False,
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


@app.command(epilog="Example: churnstream drift baseline --days 28 --json")
def baseline(
    days: Annotated[int, typer.Option(min=14, help="The last so many days of the scores on the topic.")] = 28,
    since: Annotated[int | None, typer.Option("--from", metavar="EPOCH_MS", help="Begin here instead.")] = None,
    until: Annotated[int | None, typer.Option("--to", metavar="EPOCH_MS", help="End before this.")] = None,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Share of customers looked at, by the watch too.")] = 1.0,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to a file as well.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make it, say what is in it, publish nothing.")] = False,
    json_output: Json = False,
) -> None:
    """Make the baseline of the drift watch from the topics and publish it. Features are in it where they are logged."""
    from streams.console import Console
    from streams.drift_baseline import make, publish
    from streams.settings import load

    settings = load()
    console = Console(json_output=json_output)
    reference = make(settings, from_ms=since, to_ms=until, days=days, share=share)
    base = reference.baseline
    if out is not None:
        out.write_bytes(reference.to_bytes())
    if not dry_run:
        publish(settings, reference)
    console.say(
        f"{base.events:,} scores of {base.days} days, {len(base.series) - 1} features, segments {', '.join(base.segments) or 'none'}; "
        f"blocks of {base.block_ms / 3_600_000:g} h; {'not published' if dry_run else 'published'}"
    )
    console.result(
        {
            "scores": base.events,
            "days": base.days,
            "features": len(base.series) - 1,
            "segments": list(base.segments),
            "block_hours": base.block_ms / 3_600_000,
            "ageing": [one.name for one, old in zip(base.series, base.ageing[:, 0].tolist(), strict=True) if old],
            "digest": reference.digest,
            "published": not dry_run,
        }
    )


@app.command(epilog="Example: churnstream drift watch --until-idle 5 --json")
def watch(
    until_idle: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Stop when nothing came for so long; the default is to go on.")
    ] = None,
    afresh: Annotated[bool, typer.Option("--afresh", help="Forget the stored detectors and read from the beginning.")] = False,
    json_output: Json = False,
) -> None:
    """Watch scores, logged features and inputs; verdicts go to churn-drift and the webhook. Until SIGTERM or Ctrl-C."""
    from streams.console import Console
    from streams.settings import load
    from streams.stack import endpoints
    from streams.topics import client_config

    settings = load()
    console = Console(json_output=json_output)
    where = endpoints(settings)

    from streams.drift_watch import DriftWatch
    from streams.main import log_to_stderr

    log_to_stderr(settings.log_level)
    summary = DriftWatch(settings, client_config(settings, where.kafka), afresh=afresh, until_idle_s=until_idle).run()
    console.say(f"{summary['records']:,} records, {summary['scores']:,} scores, {summary['verdicts']} verdicts")
    console.result(summary)


@app.command(epilog="Example: churnstream drift report --days 7 --out drift.html --json")
def report(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the page goes.")] = Path("drift.html"),
    days: Annotated[int, typer.Option(min=1, help="The last so many days of the scores on the topic.")] = 7,
    json_output: Json = False,
) -> None:
    """Scores and logged features of the last days against the baseline, as one HTML page, and the action that follows."""
    import time

    from drift.report import html
    from streams.console import Console
    from streams.drift_baseline import recent
    from streams.settings import load

    console = Console(json_output=json_output)
    found = recent(load(), days=days)
    page = html(found, time.time_ns() // 1_000_000)
    out.write_text(page, encoding="utf-8")
    result = found.json()
    console.say(f"{found.events:,} rows; moved: {', '.join(result['moved'][:8]) or 'nothing'}; {found.action}: {result['advice']}")
    console.say(f"{out}, {len(page) / 1_000:.0f} kB")
    console.result({**result, "file": str(out), "bytes": len(page.encode())})
