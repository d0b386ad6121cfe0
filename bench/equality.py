"""The same facts give the same state: shuffled with duplicates, and through a worker killed in mid-stream.

    python -m bench.equality shuffle [--events 20000] [--json]
    python -m bench.equality kill [--events 60000] [--json]

shuffle: the events once in order and once shuffled within an hour with 10 % sent twice; every customer's final vector must be equal
bit for bit. kill: the same topics content with an undisturbed worker, and with one that gets SIGKILL in mid-stream and a successor;
every customer's state digest and every score (after the reader rule) must be equal, and repeated score records byte-equal.
Exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from features.history import Histories, digest
from features.redis_store import RedisStore
from streams.feed import Pace, Record, send
from streams.settings import load
from streams.stack import from_settings, up
from streams.topics import client_config
from streams.trial import Trial, stop

HOUR_MS = 3_600_000
START_MS = 1_700_000_000_000


def sample(count: int, seed: int, customers: int = 500) -> list[Record]:
    """Events of all kinds in time order, no two in the same millisecond: then offsets, which a shuffle changes, decide nothing."""
    random = np.random.default_rng(seed)
    weight = 1 / (np.arange(customers) + 3)
    who = random.choice(customers, count, p=weight / weight.sum())
    time_ms = START_MS + np.cumsum(random.integers(1, 2 * 20_000, count))
    records = []
    for i in range(count):
        event: dict[str, Any] = {"event_id": f"e{i}", "customer_id": f"c{who[i]:04d}", "event_time": int(time_ms[i])}
        choice = int(random.integers(0, 10))
        if choice < 4:
            kind = ("payment", "failed_payment", "refund", "renewal")[choice]
            event |= {"kind": kind, "amount": f"{random.integers(1, 10_000) / 100:.2f}", "product": f"p{random.integers(0, 30)}"}
            topic = "transactions"
        elif choice < 8:
            kind = ("login", "failed_login", "feature_use", "error")[choice - 4]
            event |= {
                "kind": kind,
                "device": f"d{random.integers(0, 4)}",
                "session_id": f"s{i // 4}",
                "feature": f"f{random.integers(0, 9)}",
            }
            topic = "logins"
        else:
            kind = ("opened", "satisfaction")[choice - 8]
            event |= {"kind": kind, "ticket_id": f"t{i}", "category": f"k{random.integers(0, 5)}", "csat": int(random.integers(1, 6))}
            topic = "support-tickets"
        records.append(Record(topic, event["customer_id"].encode(), orjson.dumps(event), event["event_id"], event["event_time"]))  # type: ignore[arg-type]  # one of the three names above
    return records


def shuffled(records: Sequence[Record], seed: int) -> list[Record]:
    """The records out of order by up to an hour, a tenth of them twice."""
    random = np.random.default_rng(seed)
    twice = [record for record in records if random.random() < 0.1]
    all_of_them = [*records, *twice]
    rank = [record.event_ms + int(random.integers(0, HOUR_MS)) for record in all_of_them]
    return [all_of_them[i] for i in np.argsort(rank, kind="stable")]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left: state digest and final vector per customer, score records by id in log order, the workers' counters."""

    digests: Mapping[str, str]
    vectors: Mapping[str, bytes]
    scores: Mapping[str, Sequence[bytes]]
    counters: Mapping[str, int]


def run(trial: Trial, records: Sequence[Record], *, kill_at: int | None = None) -> Outcome:
    """Feed everything, work it off (with a SIGKILL once `kill_at` scores are out, and a successor), and read what is there."""
    own = trial.settings
    client = client_config(own)
    trial.command("topics", "create", "--json")
    send(records, client, own.topic_prefix, Pace(), timeout_s=30)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "worker.log"
        if kill_at is not None:
            victim = trial.start(log)
            while count(client, own.prefixed("churn-scores")) < kill_at:
                if victim.poll() is not None:
                    raise SystemExit(f"the worker ended by itself:\n{log.read_text(encoding='utf-8')[-3000:]}")
                time.sleep(0.005)
            os.kill(victim.pid, signal.SIGKILL)
            victim.communicate()
        worker = trial.start(log, "--until-idle", "2")
        worker.wait(timeout=300)
        stop(worker)
        if worker.returncode:
            raise SystemExit(log.read_text(encoding="utf-8")[-3000:])
    store = RedisStore(trial.redis, namespace=trial.name)
    digests: dict[str, str] = {}
    vectors: dict[str, bytes] = {}
    counters: dict[str, int] = {}
    for partition in range(own.partitions):
        for name, value in store.look(partition).counters.items():
            counters[name] = counters.get(name, 0) + value
        names = sorted(store.customers(partition))
        for start in range(0, len(names), 1_000):
            part = names[start : start + 1_000]
            states = store.load(partition, part)
            histories = Histories()
            histories.load(part, states)
            newest = histories.vectors_at(part, histories.newest_ms(part))
            for name, state, vector in zip(part, states, newest, strict=True):
                assert state is not None
                digests[name] = digest(state)
                vectors[name] = vector.tobytes()
    return Outcome(digests, vectors, read(client, own.prefixed("churn-scores")), counters)


def count(client: Mapping[str, Any], topic: str) -> int:
    """Records of a topic so far."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({**client, "group.id": "equality-count"})
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        marks = [consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10) for number in partitions]
        return sum(high for _, high in marks)
    finally:
        consumer.close()


def read(client: Mapping[str, Any], topic: str) -> dict[str, list[bytes]]:
    """Score records by score_id, in log order."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

    consumer = Consumer({**client, "group.id": "equality-reader", "enable.partition.eof": True, "auto.offset.reset": "error"})
    found: dict[str, list[bytes]] = {}
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        ended = 0
        while ended < len(partitions):
            for message in consumer.consume(5_000, 1.0):
                error = message.error()
                if error is None:
                    value = message.value() or b""
                    found.setdefault(orjson.loads(value)["score_id"], []).append(value)
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended += 1
                else:
                    raise SystemExit(f"{topic}: {error.str()}")
    finally:
        consumer.close()
    return found


def comparable(record: bytes) -> dict[str, Any]:
    """A score without the wall clock."""
    score: dict[str, Any] = orjson.loads(record)
    del score["scored_at"]
    return score


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Keys that only one has, or whose values differ."""
    return sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())


def shuffle(trials: tuple[Trial, Trial], events: int, seed: int) -> dict[str, Any]:
    """Both orders; figures and what differs."""
    records = sample(events, seed)
    plain = run(trials[0], records)
    mixed = run(trials[1], shuffled(records, seed + 1))
    return {
        "events": events,
        "duplicates": mixed.counters["duplicates"],
        "customers": len(plain.vectors),
        "different_vectors": differing(plain.vectors, mixed.vectors),
        "lost_or_extra_facts": mixed.counters["events"] - mixed.counters["duplicates"] - events,
        "failures": [] if mixed.counters["duplicates"] else ["no duplicate was met"],
    }


def kill(trials: tuple[Trial, Trial], events: int, seed: int) -> dict[str, Any]:
    """With and without a SIGKILL; figures and what differs."""
    records = sample(events, seed)
    calm = run(trials[0], records)
    killed = run(trials[1], records, kill_at=events // 3)
    first = {key: comparable(found[0]) for key, found in killed.scores.items()}
    repeats = sum(len(found) - 1 for found in killed.scores.values())
    return {
        "events": events,
        "customers": len(calm.digests),
        "different_states": differing(calm.digests, killed.digests),
        "different_vectors": differing(calm.vectors, killed.vectors),
        "different_scores": differing({key: comparable(found[0]) for key, found in calm.scores.items()}, first),
        "scores": len(first),
        "repeated_records": repeats,
        "repeats_not_byte_equal": sum(record != found[0] for found in killed.scores.values() for record in found[1:]),
        "different_counters": differing(calm.counters, killed.counters),
        "failures": [] if len(first) == events else [f"{events - len(first)} events have no score"],
    }


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shuffle", "kill"))
    parser.add_argument("--events", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    settings = load()
    started = up(settings)
    try:
        trials = (
            Trial(settings, started.endpoints.kafka, started.endpoints.redis, "equal"),
            Trial(settings, started.endpoints.kafka, started.endpoints.redis, "equal"),
        )
        if arguments.what == "shuffle":
            figures = shuffle(trials, arguments.events or 20_000, arguments.seed)
        else:
            figures = kill(trials, arguments.events or 60_000, arguments.seed)
    finally:
        if started.started:
            from_settings(settings).down(started.started)
    differences = {key: value for key, value in figures.items() if key.startswith(("different", "lost", "repeats_not")) and value}
    figures["failures"] += [f"{key}: {value}" for key, value in differences.items()]
    print(json.dumps(figures))
    sys.exit(bool(figures["failures"]))


if __name__ == "__main__":
    main()
