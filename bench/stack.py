"""How long the embedded servers take from nothing to answering, and whether anything is left of them."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from streams.stack import Stack


def once() -> tuple[float, int]:
    """Seconds until both answer on a fresh data directory; processes left after `down`."""
    with tempfile.TemporaryDirectory(prefix="churnstream-bench-") as home:
        stack = Stack(Path(home))
        started = stack.up()
        servers = stack.status()
        stack.down()
        return started.seconds, sum(server.runs() for server in servers)


if __name__ == "__main__":
    results = [once() for _ in range(3)]
    print(
        json.dumps(
            {
                "seconds_median": round(statistics.median(s for s, _ in results), 2),
                "seconds": [round(s, 2) for s, _ in results],
                "left_running": sum(left for _, left in results),
            }
        )
    )
