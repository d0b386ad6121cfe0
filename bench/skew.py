"""A live run that is not gentle, then every one of its outputs compared with what its inputs say.

    python -m bench.skew [--events 1000000] [--json]

The backlog has late events and 2 % of it once more; two models are put in force while it is scored, and the worker is killed once.
Then `verify skew` in one process. `rows` are scores, `mismatches` records of any kind that are not what they should be.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
    """Send the first records of each input once more; how many."""
    from confluent_kafka import Producer

    log = KafkaLog(client_config(settings), timeout_s=30)
    producer = Producer({**producer_config(settings), "linger.ms": 20, "queue.buffering.max.messages": 1_000_000})
    count = 0
    for topic in (settings.prefixed(name) for name in TOPICS[:3]):
        for partition in range(settings.partitions):
            _, high = log.ends(topic, partition)
            for messages in log.read(topic, partition, 0, int(high * share)):
                count += producer.produce_batch(topic, [{"key": m.key(), "value": m.value()} for m in messages], partition=partition)
    producer.flush(60)
    log.close()
    return count


def scores(log: KafkaLog, settings: Settings) -> int:
    """How many score records there are."""
    return sum(log.ends(settings.prefixed("churn-scores"), partition)[1] for partition in range(settings.partitions))


def measure(events: int, customers: int, trees: int, depth: int) -> dict[str, Any]:
    """The whole run; the figures as one flat object."""
    settings = load()
    started = up(settings)
    try:
        trial = Trial(settings, started.endpoints.kafka, started.endpoints.redis, "skew", {"CHURN_FEATURE_LOG": "true"})
        own = trial.settings
        trial.command("topics", "create", "--json")
        generate(events, customers=customers, seed=7, prefix=own.topic_prefix, config=producer_config(own))
        repeated = repeat(own, REPEATED)
        log = KafkaLog(client_config(own), timeout_s=30)
        publish_model(own, trees=trees, depth=depth)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "worker.log"
            process = trial.start(path)
            for share, happens in ((0.25, "reload"), (0.5, "kill"), (0.7, "reload")):
                while scores(log, own) < events * share:
                    if process.poll() is not None:
                        raise SystemExit(path.read_text(encoding="utf-8")[-3000:])
                    time.sleep(0.05)
                if happens == "reload":
                    publish_model(own, trees=trees + round(10 * share), depth=depth)
                else:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    process = trial.start(path, "--until-idle", "2")
            process.wait(timeout=1_800)
            summary = stop(process)
            if process.returncode:
                raise SystemExit(path.read_text(encoding="utf-8")[-3000:])
        raw = scores(log, own)
        log.close()
        found = trial.command("verify", "skew", "--processes", "1", "--json")
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
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--customers", type=int, default=20_000)
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    figures = measure(arguments.events, arguments.customers, arguments.trees, arguments.depth)
    for name, value in figures.items():
        print(f"{name}: {value}", file=sys.stderr)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
