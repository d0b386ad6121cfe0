"""Medians of the runs, the figures the claims read, and the tables of bench/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Rows = Sequence[Mapping[str, Any]]

BEGIN: Final = "<!-- measured: begin (`make bench` writes this part) -->"
END: Final = "<!-- measured: end -->"
OURS, OURS_24, OURS_EOS = "churnstream", "churnstream_24", "churnstream_exactly_once"
RATIOS: Final = {
    "ks_batch": "ks_batch_alo_1",
    "ks": "ks_alo_1",
    "flink": "flink_heap_alo_1",
    "faust_tuned": "faust_take_best",
    "quix": "quix",
    "faust_plain": "faust_plain",
}


def medians(rows: Rows, by: Sequence[str]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows with equal `by` as one: the median of every number, true only where it is true of all; `runs`, and the spread of the rate."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    return {key: _middle(group) | {"runs": len(group)} for key, group in groups.items()}


def _middle(group: list[Mapping[str, Any]]) -> dict[str, Any]:
    middle: dict[str, Any] = {}
    for name in group[0]:
        values = [row[name] for row in group if row.get(name) is not None]
        if not values:
            middle[name] = None
        elif isinstance(values[0], bool):
            middle[name] = any(values) if name == "saturated" else all(values)
        elif isinstance(values[0], int | float):
            middle[name] = round(statistics.median(values), 5)
        else:
            middle[name] = values[0]
    if "events_per_cpu_second" in middle:
        rates = [row["events_per_cpu_second"] for row in group]
        middle["events_per_cpu_second_range"] = [min(rates), max(rates)]
    return middle


def flat(throughput: Mapping[str, Mapping[str, Any]], latency: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """What the claims read, by plain names; None where it was not measured."""
    ours = throughput.get(OURS, {})
    once = throughput.get(OURS_EOS, {})
    figures: dict[str, Any] = {
        "events_per_cpu_second": ours.get("events_per_cpu_second"),
        "scores_per_second": ours.get("scores_per_second"),
        "events_per_cpu_second_24": throughput.get(OURS_24, {}).get("events_per_cpu_second"),
        "exactly_once_events_per_cpu_second": once.get("events_per_cpu_second"),
        "agree": ours.get("agree"),
        "share_explained": ours.get("share_explained"),
        "startup_s": ours.get("startup_s"),
        "peak_rss_mb": ours.get("peak_rss_mb"),
    }
    for name, peer in RATIOS.items():
        other = throughput.get(peer, {})
        figures[f"times_{name}"] = _ratio(ours, other, "events_per_cpu_second")
        figures[f"times_{name}_second_half"] = _ratio(ours, other, "second_half_events_per_cpu_second")
    figures["exactly_once_times_ks_batch"] = _ratio(once, throughput.get("ks_batch_eos_1", {}), "events_per_cpu_second")
    for mode, name in (("", OURS), ("exactly_once_", OURS_EOS)):
        for rate, row in latency.get(name, {}).items():
            for column in ("p50_ms", "p95_ms", "p99_ms", "p999_ms", "cpu_us_per_event"):
                figures[f"{mode}{column}_at_{rate}"] = None if row["saturated"] and column.startswith("p") else row[column]
    return figures


def _ratio(ours: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float | None:
    return round(float(ours[name]) / float(other[name]), 2) if ours.get(name) and other.get(name) else None


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, between their two marks."""
    throughput, latency = result["throughput"], result["latency"]
    lines = [
        BEGIN,
        f"Measured {result['date']} on {result['machine']['cores']} cores ({result['machine']['processor']}), "
        f"Kafka, Redis and the harness on the same; {result['events']:,} events, {result['stream']}. {result['minutes']:g} minutes.",
        "",
        "### A backlog",
    ]
    head = (
        *("engine", "runs", "events/s", "events/CPU-s (min-max)", "2nd half /s", "2nd half /CPU-s"),
        *("broker, Redis us/event", "start s", "RSS MB", "network B/event", "explained", "agree"),
    )
    rows = []
    for name, row in throughput.items():
        low, high = row["events_per_cpu_second_range"]
        rows.append(
            (
                name + ("" if row["complete"] else f" (stopped at {row['unique']:,.0f})"),
                row["runs"],
                f"{row['scores_per_second']:,.0f}",
                f"**{row['events_per_cpu_second']:,.0f}** ({low:,}-{high:,})",
                f"{row['second_half_scores_per_second']:,.0f}",
                f"{row['second_half_events_per_cpu_second']:,.0f}",
                f"{row['broker_cpu_s_per_million']:.1f}, {row['redis_cpu_s_per_million']:.1f}",
                f"{row['startup_s']:.1f}",
                f"{row['peak_rss_mb']:,.0f}",
                f"{row['network_bytes_per_event']:,.0f}",
                f"{row['share_explained']:.0%}" if name.startswith(OURS) else "-",
                f"{row['agree']:.4f}" if "agree" in row else "-",
            )
        )
    lines += _table(head, rows)
    ours = throughput.get(OURS)
    if ours:
        lines += [
            "",
            f"A customer of ours takes {ours['redis_value_bytes_p50']:,.0f} bytes of values in Redis in the median, with keys and the "
            f"server's overhead {ours['redis_memory_bytes_p50']:,.0f} (p99 {ours['redis_memory_bytes_p99']:,.0f}), and on average "
            f"{result['bytes_in_memory_per_customer']:,} bytes in a worker's memory; "
            f"{result['events'] / max(1, result['customers']):.0f} events each.",
        ]
    lines += ["", "### Latency, open loop"]
    columns = ("engine", "events/s", "p50", "p95", "p99", "p99.9 ms", "CPU us/event", "broker, Redis us/event", "cores", "sender late ms")
    steps = []
    for name, rates in latency.items():
        for rate, row in rates.items():
            numbers = [f"{row[p]:,.1f}" if row[p] is not None else "-" for p in ("p50_ms", "p95_ms", "p99_ms", "p999_ms")]
            if row["saturated"]:
                numbers = [f"saturated ({row['scored']:,.0f} of {row['sent']:,.0f})", "", "", ""]
            steps.append(
                (
                    name,
                    f"{rate:,}",
                    *numbers,
                    f"{row['cpu_us_per_event']:.0f}",
                    f"{row['broker_cpu_us_per_event']:.0f}, {row['redis_cpu_us_per_event']:.0f}",
                    f"{row['machine_cores']:.2f}",
                    f"{row['sender_late_ms']:.1f}",
                )
            )
    lines += _table(columns, steps)
    for name, reason in result["skipped"].items():
        lines += ["", f"Not measured: {name}: {reason}"]
    return "\n".join([*lines, END])


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (head, ["---"] * len(head), *rows)]


def write(readme: Path, text: str) -> None:
    """Replace the generated part; the rest is written by hand. Raises SystemExit when the marks are gone."""
    whole = readme.read_text(encoding="utf-8")
    before, begin, rest = whole.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{readme}: the marks of the generated part are missing: {BEGIN} and {END}")
    readme.write_text(before + text + after, encoding="utf-8")
