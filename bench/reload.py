"""Models swapped under load: a worker on real Kafka and Redis, a steady stream, signed models, and every score read back.

    python -m bench.reload [--swaps 200] [--rate 5000] [--json]

A sender of its own process keeps the pace whatever happens (open loop). Quiet stretches and stretches full of swaps alternate, so that
a machine that is busy with something else slows both. Eight models of the same 200 trees under different names take turns: a worker
remembers three, so nearly every swap fetches, verifies and opens a model; the first eight are new to the worker and go through their
trial in a process of their own. At the end `churnstream models rollback` runs a few times as a person would run it.

Exit 1 when a batch had two models, a score is missing or a fallback, the worker refused a model or ended.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from array import array
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from bench.generate import SPAN_MS, START_MS, events, generate
from streams.settings import Settings, load
from streams.topics import client_config, producer_config
from streams.trial import Trial, stop

CUSTOMERS: Final = 5_000
WARM: Final = 20_000
CHUNK: Final = 50_000
MODELS: Final = 8
BLOCK: Final = 20
QUIET_S: Final = 6.0
APART_S: Final = 0.5
ROLLBACKS: Final = 3
PATIENCE_S: Final = 120.0
TICK_S: Final = 0.0005
FACT_BYTES: Final = 80


def send(rate: float) -> None:
    """The sender's process: events from number WARM on, at `rate` a second, until stdin is closed; start and count as JSON lines."""
    from confluent_kafka import Producer

    settings = load()
    names = [settings.prefixed(name) for name in ("transactions", "logins", "support-tickets")]
    producer = Producer({**producer_config(settings), "linger.ms": 1})
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    chunks: list[list[tuple[int, str, bytes]]] = []

    def make() -> None:
        number = 1
        while not ended.is_set():
            if len(chunks) < 2:
                start = START_MS + (WARM + (number - 1) * CHUNK) * SPAN_MS
                chunks.append(list(events(CHUNK, customers=CUSTOMERS, seed=number, start_ms=start)))
                number += 1
            time.sleep(0.05)

    threading.Thread(target=make, daemon=True).start()
    while not chunks:
        time.sleep(0.05)
    start_ns, sent = time.monotonic_ns() + 1_000_000, 0
    print(json.dumps({"start_ns": start_ns}), flush=True)
    while not ended.is_set():
        due = int((time.monotonic_ns() - start_ns) * rate / 1e9) + 1
        while sent < due and chunks:
            for topic, key, value in chunks[0][sent % CHUNK : sent % CHUNK + due - sent]:
                producer.produce(names[topic], value, key)
                sent += 1
            if sent % CHUNK == 0:
                chunks.pop(0)
        producer.poll(0)
        time.sleep(TICK_S)
    producer.flush(10)
    print(json.dumps({"sent": sent}), flush=True)


@dataclass(slots=True)
class Seen:
    """Every score as it came, read in a thread: place of its event (chunk-wise numbering), ns, model, partition, batch."""

    client: dict[str, Any]
    topic: str
    place: array[int] = field(default_factory=lambda: array("q"))
    seen_ns: array[int] = field(default_factory=lambda: array("q"))
    first_ns: dict[str, int] = field(default_factory=dict)  # since the last `forget`
    models: dict[tuple[int, int], set[str]] = field(default_factory=lambda: defaultdict(set))  # of (partition, scored_at)
    fallbacks: int = 0
    failure: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read no further."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    def _run(self) -> None:
        from confluent_kafka import Consumer, TopicPartition

        try:
            consumer = Consumer({**self.client, "group.id": "bench-reload", "enable.auto.commit": False, "fetch.wait.max.ms": 5})
            partitions = consumer.list_topics(self.topic, timeout=10).topics[self.topic].partitions
            consumer.assign([TopicPartition(self.topic, number, 0) for number in partitions])
            while not self._stop.is_set():
                messages = consumer.consume(1_000, 0.002)
                now = time.monotonic_ns()
                for message in messages:
                    if message.error() is None:
                        self._take(orjson.loads(message.value() or b""), message.partition() or 0, now)
            consumer.close()
        except Exception as error:
            self.failure = error

    def _take(self, score: dict[str, Any], partition: int, now: int) -> None:
        digest = score["model_digest"]
        self.models[partition, score["scored_at"]].add(digest)
        self.first_ns.setdefault(digest, now)
        self.fallbacks += score["fallback"]
        seed, number = score["event_id"][1:].split("-")
        if seed != "0":
            self.place.append((int(seed) - 1) * CHUNK + int(number))
            self.seen_ns.append(now)


def variants(settings: Settings) -> list[Any]:
    """One model of 200 trees of depth 6 under MODELS names."""
    from bench.model import Fitted, fit, vectors
    from models.artifact import pack, unpack

    fitted = fit(vectors(settings, WARM), trees=200, depth=6)
    artifact = unpack(fitted.envelope)
    made = []
    for number in range(MODELS):
        manifest = fitted.manifest.model_copy(update={"version": f"200x6-{number}"})
        made.append(Fitted(manifest, pack(manifest, artifact.onnx, artifact.tables), fitted.session))
    return made


def resident_mb(pid: int) -> float:
    """Resident memory of a process (MB)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1_024


def measure(trial: Trial, swaps: int, rate: float) -> dict[str, Any]:
    """The whole run; the figures."""
    from streams.publishing import desk as visit

    settings = trial.settings
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    log = settings.data_dir / "bench-reload-worker.log"
    trial.command("topics", "create", "--json")
    generate(WARM, customers=CUSTOMERS, seed=0, prefix=settings.topic_prefix, config=producer_config(settings))
    models = variants(settings)
    seen = Seen(client_config(settings), settings.prefixed("churn-scores"))
    seen.start()
    publish_s: list[float] = []
    swap_s: list[float] = []
    rss: list[float] = []
    stretches: list[tuple[str, int, int]] = []
    with trial.worker(log) as worker:
        _until(lambda: len(seen.models) > 0, worker, seen)
        sender = subprocess.Popen(
            [sys.executable, "-m", "bench.reload", "--send", str(rate)],
            env=os.environ | trial.environment,
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert sender.stdin is not None
        assert sender.stdout is not None
        try:
            start_ns = json.loads(sender.stdout.readline())["start_ns"]
            at = visit(settings)
            meant = 0  # fallbacks before the first model
            for number, model in enumerate(models):  # the first of each, new to the worker
                begin = time.monotonic_ns()
                at.publish(model.envelope)
                at.promote(model.manifest.digest)
                publish_s.append(_first(seen, model.manifest.digest, begin, worker))
                time.sleep(APART_S)
                meant = meant if number else seen.fallbacks
            began = time.monotonic_ns()
            for number in range(swaps):
                if number % BLOCK == 0:
                    if number:
                        stretches.append(("swaps", began, time.monotonic_ns()))
                    quiet = time.monotonic_ns()
                    time.sleep(QUIET_S)
                    began = time.monotonic_ns()
                    stretches.append(("quiet", quiet, began))
                model = models[number % MODELS]
                begin = time.monotonic_ns()
                seen.first_ns.pop(model.manifest.digest, None)
                at.promote(model.manifest.digest)
                swap_s.append(_first(seen, model.manifest.digest, begin, worker))
                rss.append(resident_mb(worker.pid))
                time.sleep(max(0.0, APART_S - swap_s[-1]))
            stretches.append(("swaps", began, time.monotonic_ns()))
            back_s, command_s = _rollbacks(trial, settings, seen, worker)
        finally:
            sender.stdin.close()
            said = sender.stdout.readline()
            sender.wait(20)
        sent = json.loads(said)["sent"]
        _until(lambda: len(seen.place) >= sent, worker, seen)
        summary = stop(worker)
    seen.stop()
    refused = [line for line in log.read_text().splitlines() if "refused" in line]
    mixed = sum(len(names) > 1 for names in seen.models.values())
    ms = _latencies(seen, start_ns, rate, sent)
    due = start_ns + np.arange(sent) / rate * 1e9
    inside = {kind: np.zeros(sent, np.bool_) for kind in ("quiet", "swaps")}
    for kind, first, last in stretches:
        inside[kind] |= (due >= first) & (due < last)
    p99 = {kind: float(np.percentile(ms[rows], 99)) for kind, rows in inside.items()}
    p50 = {kind: float(np.percentile(ms[rows], 50)) for kind, rows in inside.items()}
    tenth = max(1, len(rss) // 10)
    early, late = float(np.median(rss[tenth : 2 * tenth])), float(np.median(rss[-tenth:]))
    between = sent * (8 * tenth) / max(1, len(rss))
    figures = {
        "swaps": len(swap_s) + len(publish_s) + len(back_s),
        "rate": rate,
        "events": sent,
        "scores": len(seen.place),
        "missing": sent - len(np.unique(np.array(seen.place))),
        "fallbacks_under_load": seen.fallbacks - meant,
        "batches": len(seen.models),
        "batches_with_two_models": mixed,
        "models_refused": len(refused),
        "worker_residue": summary.get("residue"),
        "publish_to_score_s_max": round(max(publish_s), 3),
        "publish_to_score_s_median": round(float(np.median(publish_s)), 3),
        "swap_to_score_s_max": round(max(swap_s), 3),
        "swap_to_score_s_median": round(float(np.median(swap_s)), 3),
        "rollback_to_score_s_max": round(max(back_s), 3),
        "rollback_command_s_max": round(max(command_s), 3),
        "p50_ms_quiet": round(p50["quiet"], 1),
        "p50_ms_swaps": round(p50["swaps"], 1),
        "p99_ms_quiet": round(p99["quiet"], 1),
        "p99_ms_swaps": round(p99["swaps"], 1),
        "p99_ratio": round(p99["swaps"] / p99["quiet"], 3),
        "rss_mb_early": round(early, 1),
        "rss_mb_late": round(late, 1),
        "rss_growth_mb": round(late - early, 1),
        "rss_growth_mb_less_facts": round(late - early - between * FACT_BYTES / 2**20, 1),
    }
    failures = [
        what
        for what, wrong in (
            ("a batch had two models", mixed),
            ("scores are missing", figures["missing"]),
            ("a fallback under load", figures["fallbacks_under_load"]),
            ("a model was refused", refused),
            ("the accounting has a residue", figures["worker_residue"] != 0),
        )
        if wrong
    ]
    return figures | {"failures": failures}


def _latencies(seen: Seen, start_ns: int, rate: float, sent: int) -> Any:
    """Milliseconds from when each event was meant to be sent to its score; infinite where there is none."""
    at = np.full(sent, np.inf)
    place, ns = np.array(seen.place)[::-1], np.array(seen.seen_ns)[::-1]
    at[place] = ns
    return (at - (start_ns + np.arange(sent) / rate * 1e9)) / 1e6


def _first(seen: Seen, digest: str, begin_ns: int, worker: subprocess.Popen[str]) -> float:
    """Seconds from `begin_ns` to the first score by a model."""
    _until(lambda: seen.first_ns.get(digest, 0) > begin_ns, worker, seen)
    return (seen.first_ns[digest] - begin_ns) / 1e9


def _until(condition: Any, worker: subprocess.Popen[str], seen: Seen) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if seen.failure is not None:
            raise seen.failure
        if worker.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the worker ended ({worker.poll()}) or nothing came for {PATIENCE_S:g} s")
        time.sleep(0.002)


def _rollbacks(trial: Trial, settings: Settings, seen: Seen, worker: subprocess.Popen[str]) -> tuple[list[float], list[float]]:
    """Seconds from the start of the command to the first score by the former model, and of the command alone."""
    from streams.publishing import published

    back, alone = [], []
    for _ in range(ROLLBACKS):
        ledger = published(settings).ledger
        begin = time.monotonic_ns()
        now = ledger.target("champion")
        seen.first_ns.clear()
        done = trial.command("models", "rollback", "--json")
        alone.append((time.monotonic_ns() - begin) / 1e9)
        assert done["digest"] != now
        back.append(_first(seen, done["digest"], begin, worker))
        time.sleep(APART_S)
    return back, alone


def main() -> int:
    """Measure, print the figures as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=5_000)
    parser.add_argument("--send", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.send:
        send(arguments.send)
        return 0
    from pydantic import SecretStr

    from streams.publishing import own_keys
    from streams.stack import from_settings, up

    base = load()
    started = up(base)
    keys = own_keys(base.data_dir / "keys" / "bench", "bench")
    try:
        trial = Trial(
            base.model_copy(
                update={
                    "model_public_keys": keys["CHURN_MODEL_PUBLIC_KEYS"],
                    "model_signing_key": SecretStr(Path(keys["CHURN_MODEL_SIGNING_KEY_FILE"]).read_text()),
                }
            ),
            started.endpoints.kafka,
            started.endpoints.redis,
            "reload",
            keys,
        )
        figures = measure(trial, arguments.swaps, arguments.rate)
    finally:
        if started.started:
            from_settings(base).down(started.started)
    print(json.dumps(figures))
    return int(bool(figures["failures"]))


if __name__ == "__main__":
    sys.exit(main())
