"""`churnstream simulate`: a population with known causes, as files or on the topics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

EPILOG = """\b
Examples:
  churnstream simulate --customers 5000 --out simulated
  churnstream simulate --customers 2000 --months 6 --drift concept@120 --out drifted --to-topics
  churnstream simulate --customers 1000 --out small --json-lines events.jsonl
"""


@app.command(epilog=EPILOG)
def simulate(
    out: Annotated[Path, typer.Option(help="Directory of the files; the same scenario again changes nothing.")],
    customers: Annotated[int, typer.Option(min=1, help="How many customers.")] = 100_000,
    months: Annotated[int, typer.Option(min=1, max=60, help="How long.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    churn_rate: Annotated[float, typer.Option(help="Share that leaves within a year.")] = 0.15,
    drift: Annotated[str | None, typer.Option(metavar="KIND@DAY", help="covariate, concept, outage or unit, from a day on.")] = None,
    late: Annotated[float, typer.Option(help="Share of events that arrive hours to 10 days late.")] = 0.02,
    duplicates: Annotated[float, typer.Option(help="Share of events sent twice.")] = 0.005,
    broken: Annotated[float, typer.Option(help="Share of events that cannot be read.")] = 0.001,
    processes: Annotated[int, typer.Option(min=0, help="Processes; 0 = one per core.")] = 0,
    to_topics: Annotated[bool, typer.Option("--to-topics", help="Send the events to the input topics afterwards.")] = False,
    speed: Annotated[str, typer.Option(help="With --to-topics: max, a rate (500/s), or a factor of event time (100000x).")] = "max",
    json_lines: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the events as JSON lines too.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Simulate customers with a hidden satisfaction: events of all kinds, what became of them, what an offer would have done.

    Parquet files by topic, and the truth beside them (docs/simulation.md). Deterministic by seed.
    """
    import time

    from models.population import Drift, Scenario
    from streams import simulate as simulation
    from streams.console import Console

    console = Console(json_output=json_output)
    planted = None if drift is None else Drift.parse(drift)
    scenario = Scenario(customers, months, seed, churn_rate, drift=planted, late=late, duplicates=duplicates, broken=broken)
    begin, cpu = time.perf_counter(), _cpu_seconds()
    events = simulation.write(
        scenario,
        out,
        processes=processes,
        on_block=lambda done, so_far: console.say(f"{done} of {scenario.blocks} blocks, {so_far:,} events"),
    )
    seconds, cpu = time.perf_counter() - begin, _cpu_seconds() - cpu
    result = {
        "directory": str(out),
        "customers": customers,
        "days": scenario.days,
        "events": events,
        **simulation.summary(out),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "events_per_cpu_second": round(events / cpu),
    }
    if json_lines is not None:
        result["json_lines"] = simulation.to_json_lines(out, json_lines)
    if to_topics:
        from streams.feed import Pace, send
        from streams.settings import load
        from streams.stack import endpoints
        from streams.topics import client_config

        settings = load()
        client = client_config(settings, endpoints(settings).kafka)
        pace = Pace.parse(speed)
        sent = send(simulation.records(out), client, settings.topic_prefix, pace, timeout_s=settings.dependency_timeout_s)
        result["sent"] = sent.events
    console.say(
        f"{events:,} events of {customers:,} customers in {seconds:.1f} s ({events / cpu:,.0f} per CPU-second), "
        f"{result['yearly_churn']:.1%} left within a year: {out}"
    )
    console.result(result)


def _cpu_seconds() -> float:
    import resource

    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)
