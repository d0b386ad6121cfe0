"""Where the CPU time of one event goes: microseconds by part of its way, on a backlog and at a steady rate.

    python -m bench.profile [--events 300000] [--rate 2000] [--seconds 10] [--write] [--json]

A real worker with embedded Kafka and Redis and the benchmark's model (200 trees of depth 6). Parts are measured by the worker's own
threads (`parts_cpu_seconds` of its summary). What they leave over is told apart by thread: the client's own (compression, checksums,
sockets), the main thread (Faust's loop), and the rest of the worker's threads (hand-over between them, metrics, snapshots).
--write puts the table into bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.model import fit
from bench.peers import latency, workload
from bench.peers.__main__ import own_servers
from bench.peers.engines import Ours, Running
from bench.peers.meter import TICKS
from bench.peers.throughput import Place
from streams.settings import Settings, load

README: Final = Path(__file__).parent / "README.md"
BEGIN: Final = "<!-- profile: begin (`python -m bench.profile --write` writes this part) -->"
END: Final = "<!-- profile: end -->"
SEED: Final = 7
LOOK_S: Final = 0.1
CEILINGS: Final = {
    "consume": ("fetched records out of the client", 1.9),
    "decode": ("JSON to facts", 2.4),
    "merge": ("the topics in order", None),
    "load": ("customers from Redis, and who is missing", None),
    "intend": ("the intent to Redis", None),
    "kernel": ("duplicates, histories, vectors", None),
    "onnx": ("200 trees, to the bit of ONNX Runtime", 4.3),
    "reasons": ("exact contributions and their texts", None),
    "encode": ("scores, alerts, dead letters as JSON; hashes", None),
    "produce": ("queued with the client", 3.5),
    "ack": ("wait for acknowledgements", None),
    "state": ("what changed of the customers", None),
    "apply": ("state to Redis", None),
    "client": ("librdkafka's threads: fetch, compress, send", None),
    "loop": ("the main thread: Faust", None),
    "rest": ("other threads: hand-over, bookkeeping", None),
}
"""What each part is, and what design figures allow it (microseconds on one core); None where none was stated."""


@dataclass(slots=True)
class _Threads:
    """CPU seconds of the threads of a process by kind, looked at until it ends."""

    pid: int
    seconds: dict[int, tuple[str, float]] = field(default_factory=dict)

    def follow(self) -> None:
        """Look until the process is gone."""
        while self._look():
            time.sleep(LOOK_S)

    def by_kind(self) -> dict[str, float]:
        """Seconds of the client's threads, the main one and the others."""
        kinds = {"client": 0.0, "loop": 0.0, "others": 0.0}
        for thread, (name, seconds) in self.seconds.items():
            kinds["client" if name.startswith("rdk:") else "loop" if thread == self.pid else "others"] += seconds
        return kinds

    def _look(self) -> bool:
        try:
            found = os.listdir(f"/proc/{self.pid}/task")
        except OSError:
            return False
        for thread in found:
            try:
                text = Path(f"/proc/{self.pid}/task/{thread}/stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            name, _, fields = text.partition("(")[2].rpartition(")")
            values = fields.split()
            self.seconds[int(thread)] = name, (int(values[11]) + int(values[12])) / TICKS
        return bool(found) and "Z" not in {values[0]}


@dataclass(frozen=True, slots=True)
class _Watched(Ours):
    """Our worker, and a look at its threads from the first to the last moment."""

    threads: list[_Threads] = field(default_factory=list)

    def start(self, settings: Settings, run: str, scratch: Path, *options: str) -> Running:
        """As `Ours.start`."""
        running = Ours.start(self, settings, run, scratch, *options)
        threads = _Threads(running.process.pid)
        self.threads.append(threads)
        threading.Thread(target=threads.follow, daemon=True).start()
        return running


def _parts(log: Path, threads: _Threads) -> dict[str, Any]:
    """Microseconds per event by part, from a worker's summary and its threads; start-up of Python is in `loop`, and taken out."""
    summary = json.loads(log.read_text(encoding="utf-8", errors="replace").splitlines()[-1])
    events = summary["events_in"]
    named = {name: 1e6 * seconds / events for name, seconds in summary["parts_cpu_seconds"].items()}
    whole = 1e6 * summary["cpu_seconds"] / events
    client = 1e6 * threads.by_kind().get("client", 0.0) / events
    others = 1e6 * threads.by_kind().get("others", 0.0) / events
    rest = max(0.0, others - sum(named.values()))
    parts = {**named, "client": client, "rest": rest, "loop": max(0.0, whole - sum(named.values()) - client - rest)}
    return {
        "events": events,
        "events_per_item": round(events / summary["items"], 1),
        "us_per_event": round(whole, 2),
        "events_per_cpu_second": round(1e6 / whole),
        "parts": {name: round(parts[name], 2) for name in CEILINGS if name in parts},
    }


def measure(events: int, rate: int, seconds: float) -> dict[str, Any]:
    """Both runs, one after the other."""
    from redis import Redis

    base = load()
    with own_servers(base) as (settings, servers, scratch), Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        workload.preload(settings, events, SEED, None)
        sample = workload.replay(settings, min(events, 150_000), SEED, None).sample()
        engine = _Watched("profile", fit(sample, trees=200, depth=6, not_low=workload.NOT_LOW))
        run = f"profile-{time.time_ns() // 1_000_000}"
        running = engine.start(settings, run, scratch, "--until-idle", "1")
        try:
            running.process.wait(300)
        finally:
            running.stop()
            engine.clean(settings, run)
        backlog = _parts(running.log, engine.threads[-1])
        place = Place(settings, servers, redis, scratch, 0.0)
        (row,) = latency.measure(engine, place, [rate], seconds, 2.0, None)
        log = max(scratch.glob("profile-l*.log"), key=lambda path: path.stat().st_mtime)
        steady = {**_parts(log, engine.threads[-1]), **row}
    return {
        "backlog": backlog,
        "steady": steady,
        "backlog_us_per_event": backlog["us_per_event"],
        "events_per_cpu_second": backlog["events_per_cpu_second"],
        "steady_us_per_event": steady["cpu_us_per_event"],
        "steady_p50_ms": steady["p50_ms"],
        "steady_p99_ms": steady["p99_ms"],
        "steady_p999_ms": steady["p999_ms"],
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a table for the documentation."""
    backlog, steady = figures["backlog"], figures["steady"]
    lines = [
        f"| part | what it does | ceiling, us | backlog, us | {steady['rate']:,}/s, us |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {what} | {ceiling or ''} | {backlog['parts'].get(name, 0.0):.2f} | {steady['parts'].get(name, 0.0):.2f} |"
            for name, (what, ceiling) in CEILINGS.items()
        ),
        f"| all | events of an item: {backlog['events_per_item']:,.0f}; {steady['events_per_item']:,.0f} | "
        f"| {backlog['us_per_event']:.2f} | {steady['us_per_event']:.2f} |",
    ]
    return "\n".join(lines)


def _write(text: str) -> None:
    page = README.read_text(encoding="utf-8")
    before, after = page.index(BEGIN) + len(BEGIN), page.index(END)
    README.write_text(f"{page[:before]}\n{text}\n{page[after:]}", encoding="utf-8")


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=300_000, help="events of the backlog")
    parser.add_argument("--rate", type=int, default=2_000, help="events per second of the steady run")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the steady run")
    parser.add_argument("--write", action="store_true", help="put the table into bench/README.md")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    given = parser.parse_args()
    figures = measure(given.events, given.rate, given.seconds)
    text = table(figures)
    print(text, file=sys.stderr)
    if given.write:
        _write(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
