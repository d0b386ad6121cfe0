"""State lost and brought back by worker processes on real servers: from the topics, and from a snapshot when the topics are cut short."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from random import Random

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from redis import Redis

from bench.generate import events
from features.facts import TOPICS
from features.state import decode
from features.store import Claim
from streams.log import KafkaLog
from tests.conftest import run_command
from tests.e2e.test_worker import Deployment, beside, deployment

__all__ = ["deployment"]
pytestmark = [pytest.mark.servers, pytest.mark.slow]

OUTPUTS = ("churn-scores", "churn-dead-letters", "churn-alerts")


def ends(deployment: Deployment, topics: tuple[str, ...]) -> dict[tuple[str, int], tuple[int, int]]:
    log = KafkaLog(deployment.client, timeout_s=10)
    names = [(topic, partition) for topic in topics for partition in range(deployment.settings.partitions)]
    found = {(topic, partition): log.ends(deployment.settings.prefixed(topic), partition) for topic, partition in names}
    log.close()
    return found


def lose_everything(deployment: Deployment) -> None:
    """All keys of this deployment, and of no other."""
    lose(deployment, f"{deployment.settings.namespace}:*")
    store = deployment.store()
    assert all(store.look(partition).fresh for partition in range(deployment.settings.partitions))
    store.close()


def lose(deployment: Deployment, pattern: str) -> None:
    with Redis.from_url(deployment.settings.redis_url.get_secret_value()) as redis:
        for key in list(redis.scan_iter(match=pattern, count=1_000)):
            redis.unlink(key)


def keep_only(deployment: Deployment, below: dict[tuple[str, int], int]) -> None:
    """What retention does: records below these offsets are gone."""
    admin = AdminClient(deployment.client)
    places = [TopicPartition(deployment.settings.prefixed(topic), partition, offset) for (topic, partition), offset in below.items()]
    for future in admin.delete_records(places).values():
        future.result(10)


def test_an_emptied_store_is_rebuilt_and_nothing_is_emitted_again(deployment: Deployment, tmp_path: Path) -> None:
    deployment.feed(1_500)
    deployment.send("logins", (b"x", b"{"), (b"y", b""))
    deployment.work()
    states, counters, outputs = deployment.states(), deployment.handled(), ends(deployment, OUTPUTS)

    # From the topics alone.
    lose_everything(deployment)
    deployment.work()
    assert deployment.states() == states
    assert deployment.handled() == counters
    assert ends(deployment, OUTPUTS) == outputs

    # A customer's key is lost: its next event finds that out, and costs the partition, not the worker.
    whole = beside(deployment, "whole")
    whole.feed(1_500)
    whole.send("logins", (b"x", b"{"), (b"y", b""))
    store = deployment.store()
    coming = {customer for _, customer, _ in events(600, customers=200, seed=8)}
    lost = min(customer for customer in store.customers(0) if customer in coming)  # of one without events nothing would be noticed
    store.close()
    lose(deployment, f"{deployment.settings.namespace}:{{0}}:c:{lost}")
    for each in (deployment, whole):
        each.feed(600, seed=8, start_ms=1_700_100_000_000)
    done = deployment.wait(deployment.start("--until-idle", "0.5"))
    assert done.code == 0, done.err
    assert "rebuild the partition" in done.err
    assert "partition 0: claimed again" in done.err
    whole.work()
    assert deployment.states() == whole.states()
    assert deployment.handled() == whole.handled()
    assert deployment.count() == 2_100

    # From a snapshot, when retention has taken what came before it from every topic.
    directory = {"CHURN_SNAPSHOT_DIR": str(tmp_path / "snapshots")}
    environment = deployment.environment | directory
    taken = run_command("snapshot", "take", "--json", environment=environment)
    assert taken.code == 0, taken.err
    at = deployment.store()
    below = {
        (topic, partition): max(0, offset + 1)
        for partition in range(deployment.settings.partitions)
        for topic, offset in at.look(partition).applied.items()
        if topic != "customer-profiles"  # compacted: nothing is deleted by age
    }
    at.close()
    deployment.feed(600, seed=9, start_ms=1_700_200_000_000)
    deployment.work(**directory)
    states, counters, outputs = deployment.states(), deployment.handled(), ends(deployment, OUTPUTS)
    keep_only(deployment, below)
    assert any(low for low, _ in ends(deployment, TOPICS).values())
    lose_everything(deployment)
    done = deployment.wait(deployment.start("--until-idle", "0.5"))
    assert done.code == 1
    assert "no good snapshot (CHURN_SNAPSHOT_DIR is not set)" in done.err
    deployment.work(**directory)
    assert deployment.states() == states
    assert deployment.handled() == counters
    assert ends(deployment, OUTPUTS) == outputs
    verified = run_command("snapshot", "verify", "--json", environment=environment).json()
    assert verified["damaged"] == 0
    assert len(verified["snapshots"]) == deployment.settings.partitions


def test_what_is_lost_while_nothing_happens_is_brought_back_without_an_event(deployment: Deployment, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    name = deployment.settings.namespace
    deployment.feed(600)
    program = f"import os; from streams.cli import main; os.chdir({str(elsewhere)!r}); main()"
    worker = deployment.start(program=program)
    deployment.until(lambda: deployment.handled()["events"] == 600)
    with Redis.from_url(deployment.settings.redis_url.get_secret_value()) as redis:
        backup = {key: redis.dump(key) for key in redis.scan_iter(match=f"{name}:*", count=1_000)}
    deployment.feed(600, seed=8, start_ms=1_700_100_000_000)
    deployment.until(lambda: deployment.handled()["events"] == 1_200)
    states, counters, outputs = deployment.states(), deployment.handled(), ends(deployment, OUTPUTS)

    def put_back() -> None:
        lose(deployment, f"{name}:*")
        with Redis.from_url(deployment.settings.redis_url.get_secret_value()) as redis:
            for key, dumped in backup.items():
                redis.restore(key, 0, dumped)

    losses = (partial(lose, deployment, f"{name}:*"), partial(lose, deployment, f"{name}:*:who"), put_back)
    for loss in losses:
        before = {stand.nonce for stand in stands(deployment)}
        loss()
        deployment.until(lambda before=before: all(whole(stand) and stand.nonce not in before for stand in stands(deployment)))  # type: ignore[misc]  # the default binds this turn's value, which mypy cannot type
        deployment.until(lambda: deployment.handled() == counters)
        assert deployment.states() == states
    assert ends(deployment, OUTPUTS) == outputs
    worker.send_signal(signal.SIGTERM)
    done = deployment.wait(worker)
    assert (done.code, done.json()["residue"], done.json()["events_in"]) == (0, 0, 1_200), done.err
    assert list(elsewhere.iterdir()) == []  # it leaves nothing where it was started


def stands(deployment: Deployment) -> list[Claim]:
    store = deployment.store()
    found = [store.look(partition) for partition in range(deployment.settings.partitions)]
    store.close()
    return found


def whole(stand: Claim) -> bool:
    return bool(stand.nonce) and not (stand.fresh or stand.rebuilding or stand.damaged)


def test_a_worker_takes_snapshots_while_it_works(deployment: Deployment, tmp_path: Path) -> None:
    directory = {"CHURN_SNAPSHOT_DIR": str(tmp_path / "snapshots"), "CHURN_SNAPSHOT_INTERVAL_S": "0.001", "CHURN_BATCH_MAX_EVENTS": "100"}
    deployment.feed(4_000)
    deployment.work(**directory)
    states, outputs = deployment.states(), ends(deployment, OUTPUTS)
    listed = run_command("snapshot", "list", "--json", environment=deployment.environment | directory).json()["snapshots"]
    assert {one["partition"] for one in listed}
    assert run_command("snapshot", "verify", environment=deployment.environment | directory).code == 0
    lose_everything(deployment)
    done = deployment.wait(deployment.start("--until-idle", "0.5", **directory))
    assert done.code == 0, done.err
    assert "customers from " in done.err
    assert deployment.states() == states
    assert ends(deployment, OUTPUTS) == outputs


def test_history_from_files_comes_before_the_live_topics(deployment: Deployment, tmp_path: Path) -> None:
    random = Random(3)
    events = [
        {
            "topic": "logins" if number % 2 else "transactions",
            "event_id": f"h{number}",
            "customer_id": f"c{random.randrange(40)}",
            "event_time": 1_690_000_000_000 + number * 3_600_000,
            "kind": "login" if number % 2 else "payment",
            **({} if number % 2 else {"amount": 12.5}),
        }
        for number in range(600)
    ]
    file = tmp_path / "history.jsonl"
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    directory = {"CHURN_SNAPSHOT_DIR": str(tmp_path / "snapshots")}
    environment = deployment.environment | directory
    # The last hundred have reached the topics as well.
    for topic in ("logins", "transactions"):
        bodies = [{name: value for name, value in event.items() if name != "topic"} for event in events[-100:] if event["topic"] == topic]
        deployment.send(topic, *((str(body["customer_id"]).encode(), json.dumps(body).encode()) for body in bodies))
    arguments = ("backfill", str(file), "--mapping", "jsonl", "--json")
    refused = run_command(*arguments, environment=deployment.environment)
    assert refused.code == 2
    assert "CHURN_SNAPSHOT_DIR" in refused.err
    planned = run_command(*arguments, "--dry-run", environment=environment).json()
    done = run_command(*arguments, environment=environment)
    assert done.code == 0, done.err
    filled = done.json()
    assert {name: filled[name] for name in ("facts", "live", "customers")} == {
        name: planned[name] for name in ("facts", "live", "customers")
    }
    assert (filled["facts"], filled["live"], filled["bad_rows"]) == (500, 100, 0)
    again = run_command(*arguments, environment=environment)
    assert again.code == 2
    assert "holds state already" in again.err
    summary = deployment.work(**directory)
    assert (summary["events_in"], summary["scores"], summary["duplicates"]) == (100, 100, 0)
    states = deployment.states()
    kept = 0
    store = deployment.store()
    for partition in range(deployment.settings.partitions):
        names = list(store.customers(partition))
        kept += sum(len(decode(state).facts) + int(decode(state).carry[0]) for state in store.load(partition, names) if state is not None)
    store.close()
    assert kept == 600
    lose_everything(deployment)
    deployment.work(**directory)
    assert str(deployment.states()) == str(states)  # a customer without a live event has no score: not a number
