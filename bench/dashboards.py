"""The Grafana dashboards, made from a table of panels: python -m bench.dashboards [--check]."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos

ROOT: Final = Path(__file__).resolve().parents[1]
HOME: Final = ROOT / "deploy" / "grafana"
WIDTH: Final = 24


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture: what it shows, by which queries (legend, PromQL), in which unit of Grafana's. number: the last value only."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    number: bool = False
    width: int = 8


def _one(title: str, query: str, unit: str = "short", **options: int | bool) -> Panel:
    return Panel(title, (("", query),), unit, **options)  # type: ignore[arg-type]  # width and number, as named


SCORING: Final = (
    _one("Scores a second", 'sum(rate(churn_events_total{outcome="score"}[1m]))', "ops", number=True, width=4),
    _one("Records waiting", "sum(churn_lag_records)", number=True, width=4),
    _one("Accounting residue", "sum(churn_accounting_residue)", number=True, width=4),
    _one("Paused workers", "sum(churn_paused)", number=True, width=4),
    _one("Fallback scores a second", "sum(rate(churn_fallback_scores_total[5m]))", "ops", number=True, width=4),
    _one("Age of the model in force", "time() - max(churn_model_since_timestamp_seconds)", "s", number=True, width=4),
    Panel(
        "From event to score",
        tuple(
            (f"p{percent}", f"histogram_quantile(0.{percent}, sum by (le) (rate(churn_score_latency_seconds_bucket[1m])))")
            for percent in (50, 90, 99)
        ),
        "s",
    ),
    Panel("Records by what became of them", (("{{outcome}}", "sum by (outcome) (rate(churn_events_total[1m]))"),), "ops"),
    Panel("Records waiting by partition", (("{{partition}}", "sum by (partition) (churn_lag_records)"),)),
    Panel("Applied offsets", (("{{topic}} {{partition}}", "churn_applied_offset"),)),
    Panel("Dead letters by reason", (("{{reason}}", "sum by (reason) (rate(churn_dlq_total[5m]))"),), "ops"),
    Panel("Events of one batch", (("mean", "rate(churn_batch_events_sum[1m]) / rate(churn_batch_events_count[1m])"),)),
    Panel(
        "Alerts and late events",
        (("alerts", "sum(rate(churn_alerts_total[5m]))"), ("late", "sum(rate(churn_events_late_total[5m]))")),
        "ops",
    ),
    Panel("Memory of the workers", (("{{instance}}", 'process_resident_memory_bytes{job="churn-worker"}'),), "bytes"),
    Panel("CPU of the workers", (("{{instance}}", 'rate(process_cpu_seconds_total{job="churn-worker"}[1m])'),), "percentunit"),
    Panel("Redis memory, filled", (("filled", "max(churn_store_memory_ratio)"),), "percentunit"),
    Panel("Stalled for", (("{{instance}}", "churn_stalled_seconds"),), "s"),
    Panel(
        "Faults met",
        (
            ("fenced batches", "sum(rate(churn_batches_fenced_total[5m]))"),
            ("batches sent again", "sum(rate(churn_batches_resent_total[5m]))"),
            ("models refused", "sum(rate(churn_models_rejected_total[5m]))"),
        ),
        "ops",
    ),
)
LOOKUPS: Final = (
    _one("Lookups a second", "sum(rate(churn_lookups_total[1m]))", "ops", number=True, width=6),
    _one(
        "Refused or failed, share",
        '1 - sum(rate(churn_lookups_total{outcome="OK"}[5m])) / sum(rate(churn_lookups_total[5m]))',
        "percentunit",
        number=True,
        width=6,
    ),
    _one("Stalest partition", "max(churn_lookup_staleness_seconds)", "s", number=True, width=6),
    _one(
        "Lookups of one round trip",
        "sum(rate(churn_lookups_total[1m])) / sum(rate(churn_lookup_state_reads_total[1m]))",
        number=True,
        width=6,
    ),
    Panel(
        "GetScore",
        tuple(
            (f"p{percent}", f'histogram_quantile(0.{percent}, sum by (le) (rate(churn_lookup_seconds_bucket{{method="GetScore"}}[1m])))')
            for percent in (50, 90, 99)
        ),
        "s",
    ),
    Panel("Lookups by method", (("{{method}}", "sum by (method) (rate(churn_lookups_total[1m]))"),), "ops"),
    Panel("Lookups by outcome", (("{{outcome}}", "sum by (outcome) (rate(churn_lookups_total[1m]))"),), "ops"),
    Panel("Staleness bound by partition", (("{{partition}}", "churn_lookup_staleness_seconds"),), "s"),
    Panel("Memory", (("{{instance}}", 'process_resident_memory_bytes{job="churn-lookups"}'),), "bytes"),
    Panel("CPU", (("{{instance}}", 'rate(process_cpu_seconds_total{job="churn-lookups"}[1m])'),), "percentunit"),
)
DASHBOARDS: Final[dict[str, tuple[str, tuple[Panel, ...]]]] = {"scoring": ("Churn scoring", SCORING), "lookups": ("Churn lookups", LOOKUPS)}
"""By file name: title and panels."""


def queries() -> Iterator[str]:
    """Every PromQL expression of a panel."""
    for _, panels in DASHBOARDS.values():
        for panel in panels:
            for _, query in panel.queries:
                yield query


def metrics_of(expression: str) -> set[str]:
    """Names of the metrics in a PromQL expression: ours, the scrape's and the process's."""
    return set(re.findall(r"\b(?:churn|process)_[a-z0-9_]+\b|\bup\b", re.sub(r'"[^"]*"', '""', expression)))


def made(name: str) -> str:
    """A dashboard as JSON."""
    title, panels = DASHBOARDS[name]
    source = DataSourceRef(type_val="prometheus", uid="prometheus")
    board = dashboard.Dashboard(title).uid(f"churn-{name}").tags(["churnstream"]).refresh("10s").time("now-30m", "now").editable()
    x = y = row = 0
    for panel in panels:
        high = 4 if panel.number else 8
        if x + panel.width > WIDTH:
            x, y, row = 0, y + row, 0
        row = max(row, high)
        drawn = stat.Panel() if panel.number else timeseries.Panel().min(0).fill_opacity(10)
        drawn = drawn.title(panel.title).unit(panel.unit).datasource(source).grid_pos(_place(x, y, panel.width, high))
        for legend, query in panel.queries:
            drawn = drawn.with_target(prometheus.Dataquery().expr(query).legend_format(legend))
        board = board.with_panel(drawn)
        x += panel.width
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _place(x: int, y: int, width: int, height: int) -> GridPos:
    return GridPos(h=height, w=width, x=x, y=y)


def stale() -> list[str]:
    """Committed dashboards that are not what the table gives now."""
    files = {name: HOME / f"{name}.json" for name in DASHBOARDS}
    return [name for name, file in files.items() if not file.is_file() or file.read_text("utf-8") != made(name)]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file is stale")
    if parser.parse_args().check:
        if found := stale():
            sys.exit(f"made from another table: {', '.join(found)}; run `make dashboards`")
        return
    HOME.mkdir(parents=True, exist_ok=True)
    for name in DASHBOARDS:
        (HOME / f"{name}.json").write_text(made(name), "utf-8")


if __name__ == "__main__":
    main()
