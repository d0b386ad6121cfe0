"""`churnstream verify`: that what was emitted is what the topics say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from features.store import Offsets
    from streams.rerun import Span
    from streams.settings import Settings
    from streams.skew import Skew

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Start = Annotated[str | None, typer.Option("--from", metavar="TIME", help="Begin where event time reaches this; RFC 3339 or a day.")]
End = Annotated[str | None, typer.Option("--to", metavar="TIME", help="End where it reaches this.")]
Processes = Annotated[int, typer.Option(min=0, help="Partitions told at a time; 0 = one per core.")]


@app.callback()
def group() -> None:
    """Prove that what was emitted is what the topics say."""


@app.command(epilog="Example: churnstream verify skew --from 2026-01-01 --to 2026-02-01 --json")
def skew(start: Start = None, end: End = None, processes: Processes = 0, json_output: Json = False) -> None:
    """Tell a range of the topics again and compare every score, vector, alert and dead letter with the emitted one, byte by byte.

    The settings must be those of the workers: reasons, hysteresis, currency and fallback are part of a score. Exit code 1 when
    anything differs.
    """
    import time

    from proto.errors import ChurnError
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.past import applied, each, opened, partitions
    from streams.rerun import EVER, Span
    from streams.settings import load
    from streams.skew import Skew

    began = time.perf_counter()
    settings = opened(load())
    console = Console(json_output=json_output)
    from_ms, to_ms = instant(start, "--from"), instant(end, "--to")
    span = Span(-EVER if from_ms is None else from_ms, EVER if to_ms is None else to_ms)
    count = partitions(settings)
    stands = applied(settings, count)
    total, cpu_s = Skew(), 0.0
    for found, used in each(partition, [(settings, number, span, stands[number]) for number in range(count)], processes):
        total.add(found)
        cpu_s += used
    report = total.report()
    console.say(f"{total.rows:,} scores of {total.handled:,} records by {len(total.models)} models: {total.mismatches:,} mismatches")
    for example in total.examples[:5]:
        console.say(f"  {example['score_id']}: {', '.join(example['differs'])} differ")
    if total.features:
        console.say(f"  features: {', '.join(f'{name} {number}' for name, number in total.features.most_common(10))}")
    report |= {"seconds": round(time.perf_counter() - began, 2), "cpu_seconds": round(cpu_s, 2)}
    console.result({**report, "records_per_cpu_second": round(total.handled / cpu_s) if cpu_s else 0})
    if total.mismatches:
        raise ChurnError(f"{total.mismatches} of {total.rows} records are not what their inputs say")


def partition(settings: Settings, number: int, span: Span, stand: Offsets | None) -> tuple[Skew, float]:
    """One partition compared, and the CPU seconds it took."""
    import time

    from streams.past import Past
    from streams.silence import PERIODS
    from streams.skew import compare

    past = Past(settings)
    began = time.process_time()
    found = compare(
        past.rerun(number, span, applied=stand), past.models.by_digest, past.rules, past.logged(number), PERIODS[settings.silence]
    )
    used = time.process_time() - began
    past.close()
    return found, used
