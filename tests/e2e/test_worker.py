"""Worker processes on real Kafka and Redis: every event once, whatever happens to the process."""

from __future__ import annotations

import json
import os
import signal
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from bench.faults.nursery import COMMAND, Child
from bench.generate import generate
from bench.model import publish_model
from features.facts import TOPICS
from features.history import digest
from features.redis_store import RedisStore
from features.state import decode
from proto.scores import DeadLetter, ScoreRecord
from streams.engine import CRASH_PLACES, CRASH_VARIABLE
from streams.settings import Settings
from streams.topics import client_config, create, producer_config
from tests.conftest import ROOT, Completed, nursery

pytestmark = [pytest.mark.servers, pytest.mark.slow]

# The compiled kernels are kept between tests; a worker would otherwise compile them anew in every data directory.
SHARED_DATA = str(Path(os.environ.get("CHURN_DATA_DIR") or ROOT / ".churnstream").resolve())
PATIENCE_S = 90.0


@dataclass(slots=True)
class Deployment:
    """One deployment on the test's servers, and the worker processes in it."""

    settings: Settings
    environment: dict[str, str]
    directory: Path
    processes: list[Child] = field(default_factory=list)

    @property
    def client(self) -> dict[str, Any]:
        return client_config(self.settings)

    def feed(self, events: int, seed: int = 7, start_ms: int = 1_700_000_000_000) -> None:
        generate(
            events, customers=200, seed=seed, prefix=self.settings.topic_prefix, config=producer_config(self.settings), start_ms=start_ms
        )

    def send(self, topic: str, *records: tuple[bytes | None, bytes | None], partition: int | None = None) -> None:
        producer = Producer(producer_config(self.settings))
        for key, value in records:
            where: dict[str, Any] = {} if partition is None else {"partition": partition}
            producer.produce(self.settings.prefixed(topic), value, key, **where)
        assert producer.flush(30) == 0

    def start(self, *arguments: str, program: str = COMMAND, **variables: str) -> Child:
        number = len(self.processes)
        process = nursery().start(
            ["worker", "--json", *arguments],
            {**self.environment, "CHURN_DATA_DIR": SHARED_DATA, **variables},
            self.directory / f"out{number}",
            self.directory / f"err{number}",
            program=program,
            cwd=ROOT,
        )
        self.processes.append(process)
        return process

    def wait(self, process: Child, timeout_s: float = PATIENCE_S) -> Completed:
        """The end of a worker: exit code, stdout, stderr."""
        code = process.wait(timeout_s)
        number = self.processes.index(process)
        return Completed(code, (self.directory / f"out{number}").read_text(), (self.directory / f"err{number}").read_text())

    def work(self, *arguments: str, **variables: str) -> dict[str, Any]:
        """Run one worker until it is idle; its summary."""
        done = self.wait(self.start("--until-idle", "0.5", *arguments, **variables))
        assert done.code == 0, done.err
        return done.json()

    def read(self, topic: str) -> list[list[tuple[bytes | None, bytes]]]:
        """Everything on a topic: (key, value) by partition, in order."""
        name = self.settings.prefixed(topic)
        consumer = Consumer({**self.client, "group.id": "test", "enable.auto.commit": False, "enable.partition.eof": True})
        partitions = sorted(consumer.list_topics(name, timeout=10).topics[name].partitions)
        consumer.assign([TopicPartition(name, partition, 0) for partition in partitions])
        found: list[list[tuple[bytes | None, bytes]]] = [[] for _ in partitions]
        ended = 0
        end = time.monotonic() + 30
        while ended < len(partitions):
            assert time.monotonic() < end, f"{name} could not be read to its end"
            for message in consumer.consume(5_000, 0.05):  # it waits for all 5,000, or the whole time
                error = message.error()
                if error is None:
                    found[message.partition() or 0].append((message.key(), message.value() or b""))
                else:
                    assert error.code() == KafkaError._PARTITION_EOF
                    ended += 1
        consumer.close()
        return found

    def bodies(self, topic: str) -> list[list[dict[str, Any]]]:
        """Records by partition, as written."""
        return [[json.loads(value) for _, value in rows] for rows in self.read(topic)]

    def scores(self) -> list[list[dict[str, Any]]]:
        return self.bodies("churn-scores")

    def count(self, topic: str = "churn-scores") -> int:
        return sum(map(len, self.read(topic)))

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.1)

    def store(self) -> RedisStore:
        return RedisStore(self.settings.redis_url.get_secret_value(), namespace=self.settings.namespace)

    def handled(self) -> Counter[str]:
        """Counters stored with the partitions."""
        store = self.store()
        total: Counter[str] = Counter()
        for partition in range(self.settings.partitions):
            total.update(store.look(partition).counters)
        store.close()
        return total

    def states(self) -> dict[str, tuple[Any, ...]]:
        """Everything stored of every customer: digest of its facts and carry, last vector, score, bands."""
        store = self.store()
        found: dict[str, tuple[Any, ...]] = {}
        for partition in range(self.settings.partitions):
            names = list(store.customers(partition))
            for name, state in zip(names, store.load(partition, names), strict=True):
                assert state is not None
                one = decode(state)
                found[name] = digest(state), one.vector.tobytes(), one.probability, one.band, one.alert_band, one.score_at
        store.close()
        return found


@pytest.fixture
def deployment(settings: Settings, environment: dict[str, str], tmp_path: Path) -> Iterator[Deployment]:
    with open_deployment(settings, environment, tmp_path) as found:
        yield found


@contextmanager
def open_deployment(settings: Settings, environment: dict[str, str], directory: Path) -> Iterator[Deployment]:
    create(settings)
    found = Deployment(settings, environment, directory)
    try:
        yield found
    finally:
        for process in found.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def beside(deployment: Deployment, name: str) -> Deployment:
    """Another deployment on the same servers."""
    prefix = deployment.settings.topic_prefix + name
    settings = deployment.settings.model_copy(update={"topic_prefix": prefix, "namespace": prefix, "group_id": prefix})
    directory = deployment.directory / name
    directory.mkdir()
    create(settings)
    environment = deployment.environment | {"CHURN_TOPIC_PREFIX": prefix, "CHURN_NAMESPACE": prefix, "CHURN_GROUP_ID": prefix}
    return replace(deployment, settings=settings, environment=environment, directory=directory, processes=[])


def first_wins(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reader rule over one output partition; the clocks of worker and broker left out."""
    high: dict[str, int] = {}
    kept = []
    for row in rows:
        if row["source"]["offset"] > high.get(row["source"]["topic"], -1):
            high[row["source"]["topic"]] = row["source"]["offset"]
            kept.append({**row, "scored_at": 0, "append_time": 0})
    return kept


def test_every_event_becomes_a_score_a_dead_letter_a_duplicate_or_a_profile_fact(
    deployment: Deployment, churnstream: Callable[..., Completed]
) -> None:
    deployment.feed(2_000)
    again = {"event_id": "again", "customer_id": "c000001", "kind": "payment", "event_time": 1_700_040_000_000, "amount": 5}
    paid = (b"c000001", json.dumps(again).encode())
    deployment.send("transactions", paid, paid, (b"c000001", b"{"), (None, b"\xff"), (b"c000002", paid[1]))
    profile = {"event_id": "p", "customer_id": "c000001", "event_time": "2023-11-15T00:00:00Z", "plan": "gold", "consent": True}
    deployment.send("customer-profiles", (b"c000001", json.dumps(profile).encode()))
    summary = deployment.work()
    counts = {name: summary[name] for name in ("events_in", "scores", "dead_letters", "duplicates", "profile_facts", "residue")}
    assert counts == {"events_in": 2_006, "scores": 2_001, "dead_letters": 3, "duplicates": 1, "profile_facts": 1, "residue": 0}
    parts = summary["parts_cpu_seconds"]
    assert {"consume", "decode", "merge", "load", "kernel", "onnx", "reasons", "encode", "produce", "apply"} <= parts.keys()

    by_partition = deployment.read("churn-scores")
    assert sum(map(len, by_partition)) == 2_001
    for number, rows in enumerate(by_partition):
        cut = dict.fromkeys(TOPICS, -1)
        for key, value in rows:
            record = ScoreRecord.model_validate_json(value)
            assert (record.customer_id.encode(), number) == (key, record.source.partition)
            assert record.fallback  # no model was published
            assert all(record.cut[topic] >= offset for topic, offset in cut.items())
            cut = dict(record.cut)
            assert cut[record.source.topic] == record.source.offset
    letters = [DeadLetter.model_validate_json(value) for rows in deployment.read("churn-dead-letters") for _, value in rows]
    assert {letter.reason: b64decode(letter.value or "") for letter in letters} == {
        "not_json": b"{",
        "not_utf8": b"\xff",
        "key_mismatch": paid[1],
    }

    environment = deployment.environment | {"CHURN_DATA_DIR": SHARED_DATA}
    shown = churnstream("state", "show", "c000001", "--json", environment=environment).json()
    assert shown["features"]["profile_known"] is None or shown["features"]["profile_known"] in (0.0, 1.0)
    assert shown["score"]["band"] == "unknown"
    assert shown["kept_facts"] > 2
    assert churnstream("state", "show", "nobody", environment=environment).code == 1
    tail = churnstream("tail", "--customer", "c000001", "--count", "2", "--json", environment=environment).json()
    theirs = sorted(
        (row["source"]["offset"] for rows in deployment.scores() for row in rows if row["customer_id"] == "c000001"), reverse=True
    )
    assert tail["count"] == 2
    assert all(row["customer_id"] == "c000001" and row["source"]["offset"] in theirs for row in tail["scores"])
    assert churnstream("tail", "--count", "5", environment=environment).out.count("\n") == 5

    assert deployment.work()["events_in"] == 0  # a restart has nothing to do


IN_TRANSACTIONS = {"transaction_begun", "transaction_committed"}
# What a worker leaves behind at these places is the same in both modes.
ALIKE = {"after_claim", "after_intent", "after_compute", "before_hint"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_killed_at_every_place_the_next_worker_finishes_what_was_begun(deployment: Deployment, delivery: str) -> None:
    calm = beside(deployment, "calm")
    for each in (deployment, calm):
        each.feed(6_000)
        publish_model(each.settings, trees=20, depth=3)
        each.send("logins", (b"c000001", b"{"), (b"c000002", b"["))
    assert calm.work(CHURN_BATCH_MAX_EVENTS="350")["scores"] == 6_000

    # The last two are reached when the worker has nothing more to do.
    places = [place for place in CRASH_PLACES if place not in (ALIKE if delivery == "exactly_once" else IN_TRANSACTIONS)]
    for number, place in enumerate(places):
        variables = {"CHURN_BATCH_MAX_EVENTS": "100", "CHURN_DELIVERY": delivery}
        if delivery == "at_least_once":
            # Nothing rests on the group, and in a new one nobody waits for the session of the dead to end.
            variables["CHURN_GROUP_ID"] = f"{deployment.settings.group_id}-{number}"
        variables[CRASH_VARIABLE] = f"{place}:{1 + number % 2 if place[:2] != 'on' else 1}"
        if place == "on_revoke":
            assert deployment.handled()["events"] < 6_002
        done = deployment.wait(deployment.start("--until-idle", "0.3", **variables))
        assert done.code == 70, (place, done.err)
    assert deployment.handled()["events"] == 6_002
    assert deployment.work(CHURN_DELIVERY=delivery)["events_in"] == 0

    assert deployment.states() == calm.states()
    assert deployment.handled() == calm.handled()
    for topic, expected in (("churn-scores", 6_000), ("churn-alerts", calm.count("churn-alerts")), ("churn-dead-letters", 2)):
        raw = [value for rows in deployment.read(topic) for _, value in rows]
        assert len(set(raw)) == expected > 0  # what came again is equal to the byte
        if delivery == "exactly_once":
            assert len(raw) == expected  # and nothing did
        elif topic == "churn-scores":
            assert len(raw) > expected
        assert [first_wins(rows) for rows in deployment.bodies(topic)] == [first_wins(rows) for rows in calm.bodies(topic)]


def test_killed_from_outside_nothing_is_missing(deployment: Deployment) -> None:
    deployment.feed(6_000)
    victim = deployment.start(CHURN_BATCH_MAX_EVENTS="100")
    deployment.until(lambda: deployment.handled()["events"] > 0)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    left = 6_000 - deployment.handled()["events"]
    assert left > 0
    assert deployment.work()["events_in"] == left
    by_partition = deployment.scores()
    assert [len(first_wins(rows)) for rows in by_partition] == [len({row["score_id"] for row in rows}) for rows in by_partition]
    assert sum(len(first_wins(rows)) for rows in by_partition) == 6_000


def test_two_workers_share_the_partitions_and_one_takes_over(deployment: Deployment) -> None:
    one, two = deployment.start(), deployment.start()

    def owners() -> set[str]:
        store = deployment.store()
        nonces = {store.look(partition).nonce for partition in range(deployment.settings.partitions)}
        store.close()
        return nonces

    def assigned(process: Child) -> list[int]:
        text = (deployment.directory / f"err{deployment.processes.index(process)}").read_text()
        lines = [line for line in text.splitlines() if "assigned partitions" in line or "gave up partitions" in line]
        return json.loads(lines[-1].rpartition("partitions ")[2]) if lines and "assigned" in lines[-1] else []

    deployment.until(lambda: sorted(assigned(one) + assigned(two)) == [0, 1, 2, 3] and len(assigned(one)) == 2)
    assert len(owners()) == 4
    deployment.feed(2_000)
    deployment.until(lambda: deployment.handled()["events"] == 2_000)
    two.send_signal(signal.SIGTERM)
    assert 0 < deployment.wait(two).json()["events_in"] < 2_000
    deployment.feed(1_000, seed=8, start_ms=1_700_100_000_000)
    deployment.until(lambda: deployment.handled()["events"] == 3_000)
    one.send_signal(signal.SIGTERM)
    assert deployment.wait(one).json()["residue"] == 0
    rows = deployment.scores()
    assert sum(map(len, rows)) == sum(len(first_wins(part)) for part in rows) == 3_000


def test_a_published_model_takes_over_between_two_batches(deployment: Deployment) -> None:
    deployment.feed(1_500)
    worker = deployment.start()
    deployment.until(lambda: deployment.handled()["events"] == 1_500)
    digest = publish_model(deployment.settings, trees=20, depth=3)
    begin = 1_700_100_000_000

    def scored_by_model() -> bool:
        nonlocal begin
        deployment.feed(50, seed=begin % 1_000_003, start_ms=begin)
        begin += 10_000_000
        return any(row["model_digest"] == digest for rows in deployment.scores() for row in rows)

    deployment.until(scored_by_model)
    deployment.feed(1_500, seed=9, start_ms=begin)
    worker.send_signal(signal.SIGTERM)
    assert deployment.wait(worker).code == 0
    summary = deployment.work()
    assert summary["residue"] == 0
    for rows in deployment.scores():
        assert len(first_wins(rows)) == len(rows)
        by_batch: dict[int, set[str]] = {}
        for row in rows:
            by_batch.setdefault(row["scored_at"], set()).add(row["model_digest"])
            assert row["fallback"] == (row["model_digest"] == "")
            assert (row["band"] == "unknown") == row["fallback"]
        assert all(len(models) == 1 for models in by_batch.values())
        assert [row["model_digest"] for row in rows] == sorted(row["model_digest"] for row in rows)  # once switched, never back
    with_reasons = [row for rows in deployment.scores() for row in rows if row["band"] in ("medium", "high")]
    assert with_reasons
    assert all(1 <= len(row["reasons"]) <= 3 for row in with_reasons)
    worker = deployment.start("--until-idle", "0.5")
    assert deployment.wait(worker).code == 0


def test_a_record_in_the_wrong_partition_stops_the_worker_with_its_reason(deployment: Deployment) -> None:
    event = json.dumps({"event_id": "e", "customer_id": "c1", "kind": "login", "event_time": 1_700_000_000_000}).encode()
    for partition in range(deployment.settings.partitions):
        deployment.send("logins", (b"c1", event), partition=partition)
    done = deployment.wait(deployment.start())
    assert done.code == 1
    assert "partitioner=murmur2_random" in done.err.splitlines()[-1]


def test_topics_of_different_widths_are_refused(deployment: Deployment) -> None:
    from confluent_kafka.admin import NewPartitions

    admin = AdminClient(deployment.client)
    name = deployment.settings.prefixed("logins")
    admin.create_partitions([NewPartitions(name, 5)])[name].result(10)
    deployment.until(lambda: len(admin.list_topics(name, timeout=10).topics[name].partitions) == 5)
    done = deployment.wait(deployment.start())
    assert done.code == 1
    assert "different partition counts" in done.err.splitlines()[-1]


def test_records_deleted_unread_stop_the_worker_instead_of_being_skipped(deployment: Deployment) -> None:
    deployment.feed(400)
    deployment.work()
    deployment.feed(400, seed=8, start_ms=1_700_100_000_000)
    admin = AdminClient(deployment.client)
    name = deployment.settings.prefixed("logins")
    ends = {p: admin.list_topics(name, timeout=10).topics[name].partitions[p] for p in range(4)}
    for future in admin.delete_records([TopicPartition(name, partition, -1) for partition in ends]).values():
        future.result(10)
    done = deployment.wait(deployment.start())
    assert done.code == 1
    assert "deleted unread" in done.err.splitlines()[-1]
