"""Hostile records through real topics and a real worker: each becomes a score, a dead letter, a duplicate or a profile fact.

    python -m bench.fuzz [--records 100000] [--seed 1] [--json]

Fails (exit 1) when a record is missing from the outputs, appears twice, the residue is not 0, or the worker does not end well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import orjson

from features.facts import TOPICS
from streams.fuzz import fuzz_records
from streams.settings import load
from streams.stack import from_settings, up
from streams.topics import client_config, producer_config
from streams.trial import Trial, stop

Place = tuple[str, int, int]


def produce(config: dict[str, Any], prefix: str, records: int, seed: int) -> None:
    """Send the fuzzed records of a seed and wait for the broker."""
    from confluent_kafka import Producer

    refused: list[str] = []
    report = {"delivery.report.only.error": True, "on_delivery": lambda error, _: refused.append(str(error))}
    producer = Producer({"linger.ms": 20, "compression.type": "lz4", **config, **report})
    for record in fuzz_records(seed, records):
        # A compacted topic takes no record without a key, so none can come from one.
        key = b"" if record.key is None and TOPICS[record.topic] == "customer-profiles" else record.key
        while True:
            try:
                producer.produce(prefix + TOPICS[record.topic], record.value, key)
                break
            except BufferError:
                producer.poll(0.1)
    if left := producer.flush(120):
        raise SystemExit(f"Kafka did not take {left} records within 120 s")
    if refused:
        raise SystemExit(f"Kafka refused {len(refused)} records: {refused[0]}")


def outputs(client: dict[str, Any], topic: str) -> Counter[Place]:
    """Sources of every record of an output topic, read to its end."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

    config = {**client, "group.id": "fuzz-reader", "enable.auto.commit": False, "enable.partition.eof": True, "auto.offset.reset": "error"}
    consumer = Consumer({**config, "fetch.message.max.bytes": 32 << 20})
    found: Counter[Place] = Counter()
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        ended: set[int] = set()
        while len(ended) < len(partitions):
            for message in consumer.consume(5_000, 1.0):
                error = message.error()
                if error is None:
                    source = orjson.loads(message.value() or b"")["source"]
                    found[source["topic"], source["partition"], source["offset"]] += 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition() or 0)
                else:
                    raise SystemExit(f"{topic}: {error.str()}")
    finally:
        consumer.close()
    return found


def measure(records: int, seed: int) -> dict[str, Any]:
    """One campaign on servers of its own or those that run."""
    settings = load()
    started = up(settings)
    try:
        trial = Trial(settings, started.endpoints.kafka, started.endpoints.redis, "fuzz", {"CHURN_DEAD_LETTER_LIMIT": "1"})
        own = trial.settings
        trial.command("topics", "create", "--json")
        produce(producer_config(own), own.topic_prefix, records, seed)
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "worker.log"
            process = trial.start(log, "--until-idle", "2")
            summary = stop_when_done(process, log)
        client = client_config(own)
        scores, letters = outputs(client, own.prefixed("churn-scores")), outputs(client, own.prefixed("churn-dead-letters"))
    finally:
        if started.started:
            from_settings(settings).down(started.started)
    ends = summary["scores"] + summary["dead_letters"] + summary["duplicates"] + summary["profile_facts"]
    failures = [
        text
        for text, bad in (
            ("the worker did not see every record", summary["events_in"] != records),
            ("the residue is not 0", summary["residue"] != 0 or ends != records),
            ("scores on the topic differ from those counted", sum(scores.values()) != summary["scores"]),
            ("dead letters on the topic differ from those counted", sum(letters.values()) != summary["dead_letters"]),
            ("a record has two outputs", any(count > 1 for count in (scores + letters).values())),
            ("not both scores and dead letters came", not (scores and letters)),
        )
        if bad
    ]
    return {
        "records": records,
        "seed": seed,
        **{name: summary[name] for name in ("events_in", "scores", "dead_letters", "duplicates", "profile_facts", "residue")},
        "unaccounted": records - ends,
        "worker_exit_code": process.returncode,
        "failures": failures,
    }


def stop_when_done(process: Any, log: Path) -> dict[str, Any]:
    """The summary of a worker that ends by itself. Ends the campaign with the worker's log when it failed."""
    process.wait(timeout=600)
    summary = stop(process)
    if process.returncode or not summary:
        raise SystemExit(f"the worker ended with code {process.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return summary


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    figures = measure(arguments.records, arguments.seed)
    print(json.dumps(figures))
    sys.exit(bool(figures["failures"]))


if __name__ == "__main__":
    main()
