"""`churnstream backtest`: how good models would have been, period after period."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Example: churnstream backtest --from-topics --by quarter --html backtest.html")
def backtest(
    from_topics: Annotated[bool, typer.Option("--from-topics", help="Facts of the input topics up to their present end.")] = False,
    events: Annotated[list[Path] | None, typer.Option("--events", metavar="FILE", help="Facts of files instead; repeat it.")] = None,
    mapping: Annotated[str, typer.Option(help="Mapping of the files, as for `churnstream feed`.")] = "jsonl",
    by: Annotated[str, typer.Option(help="quarter or month.")] = "quarter",
    start: Annotated[str | None, typer.Option("--from", metavar="DAY", help="The first period begins here or later, YYYY-MM-DD.")] = None,
    end: Annotated[str | None, typer.Option("--to", metavar="DAY", help="Periods that begin after it are left out.")] = None,
    label_days: Annotated[int, typer.Option(min=1, help="Churned: no purchase for so many days.")] = 90,
    active_days: Annotated[int, typer.Option(min=1, help="Asked of customers with a purchase in so many days.")] = 180,
    contact: Annotated[float, typer.Option(min=0, help="Cost of contacting a customer.")] = 1.0,
    loss: Annotated[float, typer.Option(min=0, help="Cost of losing one, in the same unit.")] = 10.0,
    saved: Annotated[float, typer.Option(min=0, max=1, help="Share of contacted leavers who stay.")] = 0.3,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Train for each period on what was known before it, and measure on what came after: AUC with intervals, calibration, segments, cost.

    Reads only. Exit code 1 when no period could be measured.
    """
    import time
    from dataclasses import asdict

    from proto.errors import BadUsage, ChurnError

    if by not in ("quarter", "month"):
        raise BadUsage(f"--by {by}: quarter or month")
    if from_topics == bool(events):
        raise BadUsage("say where the events are: --from-topics or --events FILE")

    from features.window import DAY_MS
    from models import backtest as past
    from models.dataset import build, concatenate
    from models.labels import Label
    from models.split import STEP_MS, Split
    from models.train import Options
    from streams.commands.feed import instant
    from streams.commands.models import MIN_HISTORY_DAYS
    from streams.console import Console
    from streams.settings import load
    from streams.training import from_files
    from streams.training import from_topics as of_topics

    began, used = time.perf_counter(), time.process_time()
    settings = load()
    console = Console(json_output=json_output)
    parts = of_topics(settings) if from_topics else from_files(events or [], mapping, settings)
    times = [part.facts[:, 0] for part in parts if len(part.facts)]
    if not times:
        raise ChurnError("there are no facts to look back on")
    oldest, newest = min(int(one.min()) for one in times), max(int(one.max()) for one in times)
    label = Label(label_days, active_days)
    from_ms, to_ms = instant(start, "--from"), instant(end, "--to")
    first = oldest - oldest % DAY_MS + MIN_HISTORY_DAYS * DAY_MS
    last = newest - label.horizon_ms
    wanted = (past.quarters if by == "quarter" else past.months)(from_ms or first, min(last, to_ms or last))
    if not wanted:
        raise ChurnError(f"no {by} lies between {MIN_HISTORY_DAYS} days after the first event and {label_days} days before the last")
    plan = Split(max(wanted[-1].from_ms, first + label.horizon_ms), first, newest, label)
    cutoffs = sorted({*range(first, last + 1, STEP_MS), *(one.from_ms for one in wanted)})
    rows = concatenate(
        [build(part.customers, part.facts, label, cutoffs, events=(first, plan.train_last), known_to_ms=newest) for part in parts]
    )
    facts = sum(len(part.facts) for part in parts)
    console.say(f"{len(rows):,} rows from {facts:,} facts in {time.perf_counter() - began:.1f} s")
    costs = past.Costs(contact, loss, saved)
    found = past.run(rows, plan, wanted, costs, Options(), console.say)
    report = found.report()
    for name, why in found.skipped.items():
        console.say(f"{name}: not measured: {why}")
    if html is not None:
        from streams.backtest_page import page

        title = f"{wanted[0].name} to {wanted[-1].name}"
        html.write_text(page(report, title=title, label=label.name, facts=facts, costs=asdict(costs)), encoding="utf-8")
        console.say(f"written: {html}")
    seconds, cpu = round(time.perf_counter() - began, 1), round(time.process_time() - used, 1)
    console.result({**report, "facts": facts, "rows": len(rows), "costs": asdict(costs), "seconds": seconds, "cpu_seconds": cpu})
    if not found.periods:
        raise ChurnError("no period could be measured")
