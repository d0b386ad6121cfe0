"""How long `churnstream --help` takes: median of seven runs, as a user meets it (process start included)."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time


def seconds() -> float:
    """One run."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "from streams.cli import main; main()", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    runs = [seconds() for _ in range(7)]
    print(json.dumps({"seconds_median": round(statistics.median(runs), 3), "runs": [round(r, 3) for r in runs]}))
