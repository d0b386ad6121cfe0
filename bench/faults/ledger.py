"""The ledger of a campaign: one line of JSON per round, appended as it ends; and the figures that follow from it."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Line = Mapping[str, Any]

COMMITTED: Final = Path(__file__).parent / "ledger.jsonl"
"""The rounds that docs/reliability.md reports."""


def read(path: Path) -> list[Line]:
    """Every whole line; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text("utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append(path: Path, line: str) -> None:
    """Add one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def percentile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that `share` of the values do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """Figures over some rounds. Times in seconds."""
    by_fault: dict[str, dict[str, Any]] = {}
    for name in sorted({line["fault"] for line in lines}):
        of_fault = [line for line in lines if line["fault"] == name]
        recover = [line["recover_s"] for line in of_fault if "recover_s" in line]
        by_fault[name] = {
            "rounds": len(of_fault),
            "violated": sum(bool(line.get("violations")) for line in of_fault),
            "recover_p50_s": percentile(recover, 0.5),
            "recover_p99_s": percentile(recover, 0.99),
        }
    # From one SIGKILL to lag 0; kill_twice is two of them, one after the other, and has its own row.
    kills = [line["recover_s"] for line in lines if line["fault"] in ("kill", "kill_big", "kill_one_of_two") and "recover_s" in line]
    graceful = [line for line in lines if line["fault"] == "graceful"]
    redis = [line["recover_s"] for line in lines if line["fault"] == "redis_kill" and "recover_s" in line]
    scale = [line["facts"]["scale_pause_s"] for line in lines if "scale_pause_s" in line.get("facts", {})]
    return {
        "rounds": len(lines),
        "violated": sum(bool(line.get("violations")) for line in lines),
        "violations": sum(len(line.get("violations", ())) for line in lines),
        "failures": [f"{line['seed']} {line['fault']}: {line['violations'][0]}" for line in lines if line.get("violations")][:20],
        "events": sum(line["events"] for line in lines),
        "scores": sum(line.get("scores", 0) for line in lines),
        "rounds_of_20000_events": sum(line["events"] >= 20_000 for line in lines),
        "modes": dict(Counter(line["mode"] for line in lines)),
        "raw_duplicates": sum(line.get("raw_duplicates", 0) for line in lines),
        "restarts": sum(line.get("restarts", 0) for line in lines),
        "kill_recover_p50_s": percentile(kills, 0.5),
        "kill_recover_p99_s": percentile(kills, 0.99),
        "redis_recover_p99_s": percentile(redis, 0.99),
        "scale_pause_max_s": max(scale, default=None),
        "graceful_rounds": len(graceful),
        "graceful_raw_duplicates": sum(line.get("raw_duplicates", 0) for line in graceful),
        "graceful_stop_max_s": max((line["facts"]["stopped_s"] for line in graceful if "stopped_s" in line.get("facts", {})), default=None),
        "max_rss_mb": max((line.get("max_rss_mb", 0) for line in lines), default=0),
        "by_fault": by_fault,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every part that runs servers takes."""
    parser.add_argument("--seed", default="1")
    parser.add_argument("--mode", choices=("at_least_once", "exactly_once"), help="delivery; both in turn unless given")
    parser.add_argument("--ledger", type=Path, help="file the results are appended to (default: in the data directory)")
    parser.add_argument("--lane", default="0", help="name of this run's servers; two runs side by side need different ones")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")


def home() -> Path:
    """Where campaigns keep what is not committed."""
    return Path(os.environ.get("CHURN_DATA_DIR") or ".churnstream").resolve() / "faults"
