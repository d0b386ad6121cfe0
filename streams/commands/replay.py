"""`churnstream replay`: what another model would have said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from features.store import Offsets
    from streams.replay import Replayed
    from streams.rerun import Span
    from streams.scores import Model
    from streams.settings import Settings

app = typer.Typer()


@app.command(epilog="Example: churnstream replay --from 2026-01-01 --to 2026-02-01 --model 9c84d1f0 --out replayed")
def replay(
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="NAME", help="Alias or digest (8 digits) on the model topic; recorded: the model of each score's time."
        ),
    ] = "champion",
    thresholds: Annotated[
        str | None, typer.Option("--thresholds", metavar="MEDIUM,HIGH", help="Let the bands begin here instead; probabilities stay.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="Begin where event time reaches this: RFC 3339, a day.")
    ] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="TIME", help="End where it reaches this.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write every score there as Parquet.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="In the order of a fresh backlog instead of the recorded one; nothing is compared.")
    ] = False,
    processes: Annotated[int, typer.Option(min=0, help="Partitions told at a time; 0 = one per core.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Tell a range of the topics again with a model, and report what it would have said against what was scored.

    Reads only; neither Redis nor any topic is written. For "exactly as it was" use `verify skew`.
    """
    import time

    from proto.errors import BadUsage
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.past import applied, each, opened, partitions
    from streams.replay import Replayed
    from streams.rerun import EVER, Span
    from streams.settings import load

    began = time.perf_counter()
    edges = _edges(thresholds)
    if merged and model == "recorded":
        raise BadUsage("--merged looks at no outputs, so it does not know the models of their time: name one with --model")
    settings = opened(load())
    console = Console(json_output=json_output)
    from_ms, to_ms = instant(start, "--from"), instant(end, "--to")
    span = Span(-EVER if from_ms is None else from_ms, EVER if to_ms is None else to_ms)
    count = partitions(settings)
    stands: list[Offsets | None] = [None] * count if merged else applied(settings, count)
    total, used = Replayed(), 0.0
    parts: dict[str, float] = {}
    work = [(settings, number, span, stands[number], model, out, not merged, edges) for number in range(count)]
    for found, cpu_s, by_part in each(partition, work, processes):
        total.add(found)
        used += cpu_s
        for name, seconds in by_part.items():
            parts[name] = parts.get(name, 0.0) + seconds
    report = total.report()
    console.say(f"{total.rows:,} scores of {total.handled:,} records, digest {total.digest}")
    if total.compared:
        flips = report["flips"]
        console.say(
            f"{flips:,} of {total.compared:,} in another band, {len(total.flipped):,} of {total.customers:,} customers; "
            f"{total.moved:,} probabilities moved"
        )
        console.table(("then -> now", "scores"), list(report["flips_by"].items()))
        rows = [(name, s["compared"], s["flips"], s["up"]) for name, s in report["segments"].items()]
        console.table(("segment", "scores", "flips", "to a higher band"), rows)
    console.result(
        {
            **report,
            "seconds": round(time.perf_counter() - began, 2),
            "cpu_seconds": round(used, 2),
            "records_per_cpu_second": round(total.handled / used) if used else 0,
            "parts_cpu_seconds": {name: round(seconds, 3) for name, seconds in parts.items()},
        }
    )


def _edges(text: str | None) -> tuple[float, float] | None:
    from proto.errors import BadUsage

    if text is None:
        return None
    try:
        medium, high = (float(part) for part in text.split(","))
    except ValueError:
        medium = high = 0.0
    if not 0 < medium < high < 1:
        raise BadUsage(f"--thresholds {text}: two numbers, 0 < MEDIUM < HIGH < 1, as in 0.3,0.6")
    return medium, high


def partition(
    settings: Settings,
    number: int,
    span: Span,
    stand: Offsets | None,
    model: str,
    out: Path | None,
    recorded: bool,
    edges: tuple[float, float] | None = None,
) -> tuple[Replayed, float, dict[str, float]]:
    """One partition replayed, the CPU seconds it took, and those by part."""
    import gc
    import time
    from dataclasses import replace

    from streams.past import Past
    from streams.replay import Files, rebanded
    from streams.replay import replay as run

    past = Past(settings)
    of_then = model == "recorded"
    chosen = None if of_then else rebanded(past.models.named(model), edges)
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)  # as in a worker: every message is an object, and none is in a cycle
    began = time.process_time()
    rerun = past.rerun(number, span, applied=stand, recorded=recorded)
    files = None if out is None else Files(out, number, chosen)

    def then(digest: str) -> Model:
        return rebanded(past.models.by_digest(digest), edges)

    found = run(rerun, then if chosen is None else chosen, replace(past.rules, reasons_top=0), files)
    if files is not None:
        files.close()
    used = time.process_time() - began
    past.close()
    return found, used, dict(rerun.parts.cpu)
