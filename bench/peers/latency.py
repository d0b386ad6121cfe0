"""Latency at fixed rates, open loop: from the moment an event is meant to be sent until a read_committed consumer has its score.

One engine goes through a ladder of rates without a restart, on topics of its own that begin empty. It ends where the engine (or the
machine) no longer keeps up; that rate is reported as saturated, with what was scored of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.peers.engines import Died, Engine, Running, remove_state
from bench.peers.meter import Meter, Reading
from bench.peers.throughput import Place
from bench.peers.workload import OUTPUTS, create_topics, delete
from features.facts import TOPICS
from streams.topics import MODELS, client_config

SEED: Final = 5
FIRST_S: Final = 90.0
DRAIN_S: Final = 5.0
WARM_UP: Final = 2_000
"""Events sent at 200/s until the first score and a little beyond: an engine that compiles as it runs does it here."""


@dataclass(slots=True)
class Helper:
    """One of the two processes beside the engine."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, what: str, **asked: Any) -> Helper:
        """Start it and wait until it is ready."""
        helper = cls(
            subprocess.Popen(
                [sys.executable, "-m", "bench.peers.openloop", what, json.dumps(asked)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent.parent,
            )
        )
        helper.answer()
        return helper

    def tell(self, line: str) -> None:
        """Send a command."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next line it says. Raises Died when it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Died("the sender or the reader of the benchmark ended")
        value: dict[str, Any] = json.loads(line)
        return value

    def ask(self, line: str) -> dict[str, Any]:
        """Send a command and wait for the answer."""
        self.tell(line)
        return self.answer()

    def end(self) -> None:
        """Close it."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def measure(engine: Engine, place: Place, rates: Sequence[int], seconds: float, warm_s: float, peers: Path | None) -> list[dict[str, Any]]:
    """One row per rate reached. Raises Died when the engine gives no score at all."""
    run = f"{engine.name.replace('_', '-')}-l{time.time_ns() // 1_000_000}"
    settings = place.settings.model_copy(update={"topic_prefix": f"{run}."})
    create_topics(settings, (*TOPICS, *OUTPUTS, MODELS))
    servers = settings.kafka_bootstrap_servers
    count = WARM_UP * 4 + sum(int(rate * (seconds + warm_s)) for rate in rates)
    phases: list[tuple[dict[str, Any], Reading, bool]] = []
    saved = place.scratch / f"{run}.npz"
    with ExitStack() as stack:
        stack.callback(remove_state, place.scratch, run)
        stack.callback(_clean, engine, settings, run)
        sender = Helper.start("send", servers=servers, prefix=settings.topic_prefix, seed=SEED, count=count, peers=str(peers or ""))
        stack.callback(sender.end)
        running = engine.start(settings, run, place.scratch)
        stack.callback(running.stop)
        reader = Helper.start("read", servers=servers, topic=running.scores, partitions=settings.partitions)
        stack.callback(reader.end)
        meter = Meter(running.process.pid, place.servers, place.redis)
        sent = _warm_up(sender, reader, running)
        for rate in rates:
            sender.tell(f"phase {rate} {int(rate * (seconds + warm_s))} {int(rate * warm_s)}")
            sender.answer()
            before = meter.read()
            phase = sender.answer()
            used = meter.read().since(before)
            running.check()
            sent = phase["sent"]
            kept_up = _drained(reader, sent, DRAIN_S)
            phases.append((phase, used, kept_up))
            if not kept_up:
                break
        reader.ask(f"save {saved}")
    found = np.load(saved)
    seen = np.full(count, -1, np.int64)
    explained = np.zeros(count, np.bool_)
    seen[found["index"][::-1]] = found["seen_ns"][::-1]  # of repeats the first one counts
    explained[found["index"]] = found["explained"]
    saved.unlink()
    return [_row(engine.name, phase, used, kept_up, seen, explained, warm_s) for phase, used, kept_up in phases]


def _warm_up(sender: Helper, reader: Helper, running: Running) -> int:
    """A trickle until scores come; returns the events sent."""
    deadline = time.monotonic() + FIRST_S
    sent = 0
    for share in (0.05, 0.95):
        number = int(WARM_UP * share)
        sender.tell(f"phase 200 {number} {number}")
        sender.answer()
        sent = sender.answer()["sent"]
        while int(reader.ask("count")["count"]) < sent:
            running.check()
            if time.monotonic() > deadline:
                raise Died(f"{reader.ask('count')['count']} of {sent} scores within {FIRST_S:g} s: {running.tail()}")
            time.sleep(0.05)
    return sent


def _drained(reader: Helper, sent: int, timeout_s: float) -> bool:
    """Whether the scores of all events come within the time."""
    deadline = time.monotonic() + timeout_s
    while int(reader.ask("count")["count"]) < sent:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _row(name: str, phase: dict[str, Any], used: Reading, kept_up: bool, seen: Any, explained: Any, warm_s: float) -> dict[str, Any]:
    rate, first = phase["rate"], phase["first"]
    places = np.arange(first + int(rate * warm_s), phase["sent"])
    due = phase["start_ns"] + (places - first) / rate * 1e9
    scored = seen[places] >= 0
    ms = (seen[places][scored] - due[scored]) / 1e6
    events = len(places)
    return {
        "engine": name,
        "rate": int(rate),
        "sent": events,
        "scored": int(scored.sum()),
        "saturated": not kept_up,
        **{f"p{str(q).replace('.', '')}_ms": round(float(np.percentile(ms, q)), 2) if len(ms) else None for q in (50, 95, 99, 99.9)},
        "cpu_us_per_event": round(1e6 * used.engine / events, 1),
        "broker_cpu_us_per_event": round(1e6 * used.broker / events, 1),
        "redis_cpu_us_per_event": round(1e6 * used.redis / events, 1),
        "machine_cores": round(used.machine / used.at_s, 2),
        "sender_late_ms": phase["late_ms"],
        "share_explained": round(float(explained[places][scored].mean()), 4) if len(ms) else 0.0,
    }


def _clean(engine: Engine, settings: Any, run: str) -> None:
    from confluent_kafka.admin import AdminClient

    engine.clean(settings, run)
    admin = AdminClient(client_config(settings))
    delete(admin, {name for name in admin.list_topics(timeout=20).topics if name.startswith(settings.topic_prefix)})
