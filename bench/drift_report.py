"""How long the drift report of 100,000 rows of 60 features takes, and how large the page is.

python -m bench.drift_report --json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from typing import Any

import numpy as np

from drift.baseline import fit
from drift.report import compare, html
from drift.series import Series, Tally, edges_of
from features.window import DAY_MS, HOUR_MS

ROWS, FEATURES, DAYS = 100_000, 60, 28


def main() -> int:
    """Run; 0 within 5 s and 500 kB, without an address in the page, with the moved series first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    at = np.sort(rng.integers(0, DAYS * DAY_MS, ROWS))
    values = rng.lognormal(0, 2, (ROWS, FEATURES + 1))
    segment = rng.integers(1, 4, ROWS)
    edges = edges_of(values)
    tally = Tally.of(edges, 3, HOUR_MS)
    tally.add(at, values, segment)
    slots = tally.close(2**62)
    series = [Series("score", "score"), *(Series(f"feature_{i}", "feature", "logins") for i in range(FEATURES))]
    base = fit(series, ("a", "b", "c"), edges, np.array([s for s, _ in slots]), np.array([c for _, c in slots]))
    later = rng.lognormal(0, 2, values.shape)
    later[:, 7] *= 4
    begin, cpu = time.perf_counter(), time.process_time()
    found = compare(base, at + DAYS * DAY_MS, later, segment)
    page = html(found, 2 * DAYS * DAY_MS)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    outside = len(re.findall(r"https?:|src=|href=|@import|url\(", page))
    report: dict[str, Any] = {
        "rows": ROWS, "features": FEATURES, "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "bytes": len(page.encode()),
        "outside_links": outside, "action": found.action, "moved": found.json()["moved"],
    }  # fmt: skip
    report["ok"] = cpu < 5 and report["bytes"] < 500_000 and not outside and report["moved"] == ["feature_6"]
    print(json.dumps(report) if args.json else json.dumps(report, indent=2))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
