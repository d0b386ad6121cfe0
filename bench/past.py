"""A live run that is not gentle; then its past proven, replayed and explained.

    python -m bench.past [--events 1000000] [--explain 1000] [--json]

The backlog has late events, repetitions that are duplicates and repetitions that come too late; four more models are put in force
while it is scored, and the worker is killed once. Then `verify skew` in one process: `rows` are scores, `mismatches` records of any
kind that are not what they should be. Then the last model over everything: `replay_*` in the recorded order, beside what was scored,
`merged_*` from the inputs alone. Then random past scores are explained, each with its model loaded and its history found: `explain_*`.
Rates are per CPU second of the process that does it all: fetching, decoding, features, scores.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from bench.generate import generate
from bench.model import publish_model
from features.facts import TOPICS
from streams.log import KafkaLog
from streams.settings import Settings, load
from streams.stack import from_settings, up
from streams.topics import client_config, producer_config
from streams.trial import Trial, stop

REPEATED = 0.02


def repeat(settings: Settings, share: float) -> int:
    """Send the first and the last records of each input once more, half of this share each; how many."""
    from confluent_kafka import Producer

    log = KafkaLog(client_config(settings), timeout_s=30)
    producer = Producer({**producer_config(settings), "linger.ms": 20, "queue.buffering.max.messages": 1_000_000})
    count = 0
    for topic in (settings.prefixed(name) for name in TOPICS[:3]):
        for partition in range(settings.partitions):
            _, high = log.ends(topic, partition)
            some = int(high * share / 2)
            for begin in (0, high - some):
                for messages in log.read(topic, partition, begin, begin + some):
                    count += producer.produce_batch(topic, [{"key": m.key(), "value": m.value()} for m in messages], partition=partition)
    producer.flush(60)
    log.close()
    return count


def scores(log: KafkaLog, settings: Settings) -> int:
    """How many score records there are."""
    return sum(log.ends(settings.prefixed("churn-scores"), partition)[1] for partition in range(settings.partitions))


def live(trial: Trial, events: int, trees: int, depth: int, path: Path) -> dict[str, Any]:
    """Score the backlog, with models changing and a worker killed; the summary of the last worker."""
    own = trial.settings
    log = KafkaLog(client_config(own), timeout_s=30)
    publish_model(own, trees=trees, depth=depth)
    process = trial.start(path)
    try:
        for share, more in ((0.15, 40), (0.3, 41), (0.45, 42), (0.55, None), (0.7, trees + 1)):
            while scores(log, own) < events * share:
                if process.poll() is not None:
                    raise SystemExit(path.read_text(encoding="utf-8")[-3000:])
                time.sleep(0.05)
            if more is not None:
                publish_model(own, trees=more, depth=depth)
            else:
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = trial.start(path, "--until-idle", "2")
        process.wait(timeout=1_800)
    finally:
        summary = stop(process)
    log.close()
    if process.returncode:
        raise SystemExit(path.read_text(encoding="utf-8")[-3000:])
    return summary


def explained(settings: Settings, count: int) -> dict[str, Any]:
    """Random past scores made again, one after the other; each reads its history and checks its hash."""
    from streams.commands.explain import explainer_of

    explainer = explainer_of(settings, 10)
    log = KafkaLog(client_config(settings), timeout_s=30)
    rng = np.random.default_rng(5)
    ends = [log.ends(settings.prefixed("churn-scores"), partition)[1] for partition in range(settings.partitions)]
    log.close()
    seconds: list[float] = []
    proven, models, sources = 0, set(), Counter[str]()
    for _ in range(count):
        partition = int(rng.integers(settings.partitions))
        place = int(rng.integers(ends[partition]))
        found = explainer.record(partition, place, ends[partition])
        assert found is not None
        began = time.perf_counter()
        made = explainer.explain(explainer.score(found["score_id"]))
        seconds.append(time.perf_counter() - began)
        proven += made.proven
        models.add(found["model_digest"])
        sources[made.source] += 1
    return {
        "explain_scores": count,
        "explain_not_proven": count - proven,
        "explain_models": len(models),
        "explain_seconds_median": round(float(np.median(seconds)), 4),
        "explain_seconds_max": round(max(seconds), 3),
        "explain_sources": dict(sources),
    }


def measure(events: int, customers: int, trees: int, depth: int, explain: int) -> dict[str, Any]:
    """The whole run; the figures as one flat object."""
    settings = load()
    started = up(settings)
    try:
        trial = Trial(settings, started.endpoints.kafka, started.endpoints.redis, "past", {"CHURN_FEATURE_LOG": "true"})
        own = trial.settings
        trial.command("topics", "create", "--json")
        generate(events, customers=customers, seed=7, prefix=own.topic_prefix, config=producer_config(own))
        repeated = repeat(own, REPEATED)
        with tempfile.TemporaryDirectory() as scratch:
            summary = live(trial, events, trees, depth, Path(scratch) / "worker.log")
        log = KafkaLog(client_config(own), timeout_s=30)
        raw = scores(log, own)
        log.close()
        found = trial.command("verify", "skew", "--processes", "1", "--json")
        told = trial.command("replay", "--processes", "1", "--json")
        merged = [trial.command("replay", "--merged", "--processes", number, "--json") for number in ("1", "0", "1")]
        again = explained(own, explain)
    finally:
        if started.started:
            from_settings(settings).down(started.started)
    return {
        "events": events + repeated,
        "repeated": repeated,
        "score_records": raw,
        "repeated_scores": raw - found["rows"],
        "after_kill": summary["events_in"],
        **{name: value for name, value in found.items() if name not in ("examples", "scores_by_model")},
        "examples": found["examples"][:3],
        "replay_compared": told["compared"],
        "replay_flips": told["flips"],
        "replay_records_per_cpu_second": told["records_per_cpu_second"],
        "replay_parts_cpu_seconds": told["parts_cpu_seconds"],
        "merged_rows": merged[0]["rows"],
        "merged_records_per_cpu_second": merged[0]["records_per_cpu_second"],
        "merged_parts_cpu_seconds": merged[0]["parts_cpu_seconds"],
        "merged_digests": len({one["digest"] for one in merged}),
        **again,
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--explain", type=int, default=1_000, help="past scores explained")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    figures = measure(arguments.events, arguments.customers, arguments.trees, arguments.depth, arguments.explain)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
