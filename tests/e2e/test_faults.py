"""Workers that hang, are frozen, meet records that end them, or are told to stop under load: in both modes of delivery."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions
from confluent_kafka.admin import AdminClient

from proto.errors import Reason
from streams.engine import CRASH_VARIABLE
from tests.e2e.test_worker import Deployment, beside, deployment, first_wins

__all__ = ["deployment"]

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.timeout(400)]
MODES = ("at_least_once", "exactly_once")
both_modes = pytest.mark.parametrize("delivery", MODES)


def raw(deployment: Deployment) -> list[str]:
    return [row["score_id"] for rows in deployment.scores() for row in rows]


def test_a_worker_that_hangs_ends_itself_and_another_goes_on(deployment: Deployment) -> None:
    deployment.feed(3_000)
    begin = time.monotonic()
    hung = deployment.start(CHURN_BATCH_MAX_EVENTS="100", CHURN_PROGRESS_TIMEOUT_S="3", **{CRASH_VARIABLE: "after_compute:9:hang"})
    done = deployment.wait(hung)
    assert done.code == 1
    assert time.monotonic() - begin < 60
    assert "none was applied for 3 s" in done.err
    assert 0 < deployment.handled()["events"] < 3_000
    deployment.work()
    assert len(raw(deployment)) == len(set(raw(deployment))) == 3_000


@both_modes
def test_a_stop_under_load_repeats_nothing(deployment: Deployment, delivery: str) -> None:
    settings = {"CHURN_DELIVERY": delivery, "CHURN_BATCH_MAX_EVENTS": "50"}
    deployment.feed(8_000)
    worker = deployment.start(**settings)
    deployment.until(lambda: deployment.handled()["events"] > 500)
    begin = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    done = deployment.wait(worker)
    assert (done.code, done.json()["residue"]) == (0, 0), done.err
    assert time.monotonic() - begin < 10
    assert deployment.handled()["events"] < 8_000  # in mid-stream
    store = deployment.store()
    stands = [store.look(partition) for partition in range(deployment.settings.partitions)]
    store.close()
    assert {(stand.nonce, stand.intent) for stand in stands} == {("", None)}
    group = deployment.settings.topic_prefix + deployment.settings.group_id
    admin = AdminClient(deployment.client)
    offsets = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group].result(10)
    hints = {(tp.topic, tp.partition): tp.offset for tp in offsets.topic_partitions or []}
    for stand in stands:
        for topic, offset in stand.applied.items():
            assert hints.get((deployment.settings.prefixed(topic), stand.partition), 0) == offset + 1
    deployment.work(CHURN_DELIVERY=delivery)
    assert len(raw(deployment)) == len(set(raw(deployment))) == 8_000


def test_a_worker_that_outgrows_its_memory_stops_in_order(deployment: Deployment) -> None:
    deployment.feed(500)
    done = deployment.wait(deployment.start(CHURN_MEMORY_LIMIT_MB="20"))  # less than any worker needs
    assert done.code == 1
    assert "above CHURN_MEMORY_LIMIT_MB=20" in done.err
    assert "Traceback" not in done.err
    store = deployment.store()
    assert {store.look(partition).nonce for partition in range(deployment.settings.partitions)} == {""}  # given up, nothing in flight
    store.close()
    assert deployment.work(CHURN_MEMORY_LIMIT_MB="4000")["residue"] == 0
    assert len(raw(deployment)) == len(set(raw(deployment))) == 500


def test_a_frozen_worker_that_thaws_changes_nothing(deployment: Deployment) -> None:
    """Both modes at once: what takes time is the group, which has to notice."""
    calm = beside(deployment, "calm")
    sides = {delivery: beside(deployment, delivery) for delivery in MODES}
    for each in (calm, *sides.values()):
        each.feed(8_000)
    calm.work()
    zombies, successors = {}, {}
    for delivery, side in sides.items():
        settings = {"CHURN_DELIVERY": delivery, "CHURN_BATCH_MAX_EVENTS": "50"}
        zombies[delivery] = side.start(**settings)
        side.until(lambda side=side: side.handled()["events"] > 400)  # type: ignore[misc]  # the default binds this turn's value, which mypy cannot type
        zombies[delivery].send_signal(signal.SIGSTOP)
        assert side.handled()["events"] < 8_000
        successors[delivery] = side.start(**settings)
    try:
        for side in sides.values():
            side.until(lambda side=side: side.handled()["events"] == 8_000)  # type: ignore[misc]  # as above
    finally:
        for zombie in zombies.values():
            zombie.send_signal(signal.SIGCONT)
    time.sleep(3)  # what a thawed worker would do wrong, it does at once
    for delivery, side in sides.items():
        for worker in (successors[delivery], zombies[delivery]):
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        assert side.wait(successors[delivery]).code == 0
        side.wait(zombies[delivery])  # it may have ended with an error: it lost its partitions in mid-batch
        assert side.states() == calm.states()
        assert side.handled() == calm.handled()
        assert [first_wins(rows) for rows in side.scores()] == [first_wins(rows) for rows in calm.scores()]
    assert len(raw(sides["exactly_once"])) == 8_000


def test_a_record_on_which_native_code_crashes_becomes_a_dead_letter(deployment: Deployment) -> None:
    deployment.feed(1_000)
    victim = {"event_id": "poison", "customer_id": "c000001", "kind": "login", "event_time": 1_700_050_000_123, "session": "poison"}
    deployment.send("logins", (b"c000001", json.dumps(victim).encode()))
    deployment.feed(500, seed=8, start_ms=1_700_100_000_000)
    codes = []
    for number in range(8):
        # A group of its own: nobody waits for the session of the one that died to end.
        group = {"CHURN_GROUP_ID": f"{deployment.settings.group_id}-{number}"}
        process = deployment.start(
            "--until-idle", "0.5", **group, program=f"exec(open({str(Path(__file__).with_name('poisoned.py'))!r}).read())"
        )
        codes.append(deployment.wait(process).code)
        if codes[-1] == 0:
            break
    assert codes == [-signal.SIGABRT] * 4 + [0]
    letters = [body for rows in deployment.bodies("churn-dead-letters") for body in rows]
    assert [letter["reason"] for letter in letters] == [Reason.CRASH.name.lower()]
    scores = raw(deployment)
    assert len(set(scores)) == 1_500
    assert deployment.handled()["dead_letters"] == 1


def test_a_bad_deployment_of_a_producer_pauses_the_worker(deployment: Deployment) -> None:
    deployment.feed(100)
    deployment.send("logins", *[(b"c000001", b"{")] * 3_000)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = deployment.start(CHURN_METRICS_PORT=str(port), CHURN_PROGRESS_TIMEOUT_S="3", CHURN_BATCH_MAX_EVENTS="500")

    def scrape(name: str) -> list[float]:
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        except OSError:
            return []
        return [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)]

    deployment.until(lambda: scrape("churn_paused") == [1.0])
    handled = deployment.handled()["events"]
    time.sleep(5)  # longer than the watchdog of this worker waits
    assert worker.poll() is None  # the watchdog knows of it
    assert deployment.handled()["events"] == handled < 3_100
    assert set(scrape("churn_accounting_residue{")) == {0.0}
    worker.send_signal(signal.SIGTERM)
    done = deployment.wait(worker)
    assert done.code == 0
    assert "paused:" in done.err
    assert "limit 50%" in done.err
    deployment.work(CHURN_DEAD_LETTER_LIMIT="1")
    assert (deployment.handled()["events"], deployment.handled()["dead_letters"]) == (3_100, 3_000)
