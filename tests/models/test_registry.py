"""Models on disk and on a real Kafka: published once, verified whenever read, and trained from the topics by the real command."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import pytest
from confluent_kafka import Producer

from bench.small_model import small
from models import registry
from models.desk import Desk
from models.signature import Trust
from proto.errors import ArtifactRejected, BadUsage, DependencyUnreachable, Untrusted
from streams.feed import Pace, Record, send
from streams.settings import Settings
from streams.topics import client_config, create, producer_config
from tests.conftest import Completed
from tests.models.shop import START, rhythms
from tests.models.test_signature import person


def test_a_kept_model_is_read_again(tmp_path: Path) -> None:
    model = small()
    path = registry.save(tmp_path, model.manifest, model.envelope, b"baseline")
    assert registry.save(tmp_path, model.manifest, model.envelope, b"baseline") == path
    assert registry.kept(tmp_path) == [model.manifest.digest]
    assert registry.take(tmp_path, model.manifest.digest[:8]) == model.envelope
    assert sorted(os.listdir(path.parent)) == ["artifact.zst", "baseline.onnx"]


def test_a_damaged_or_exchanged_file_is_refused(tmp_path: Path) -> None:
    model, other = small(), small(seed=5)
    path = registry.save(tmp_path, model.manifest, model.envelope)
    path.write_bytes(other.envelope)
    with pytest.raises(ArtifactRejected, match="it is"):
        registry.take(tmp_path, model.manifest.digest)
    path.write_bytes(model.envelope[:-10])
    with pytest.raises(ArtifactRejected):
        registry.take(tmp_path, model.manifest.digest)


def test_a_model_is_named_by_eight_digits_that_are_its_own(tmp_path: Path) -> None:
    model = small()
    registry.save(tmp_path, model.manifest, model.envelope)
    for digest in (model.manifest.digest[:7], "0" * 8):
        with pytest.raises(BadUsage, match="kept models begin so"):
            registry.take(tmp_path, digest)


def test_an_envelope_is_kept_under_its_own_name_only(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRejected):
        registry.save(tmp_path, small().manifest, small(seed=5).envelope)


@pytest.mark.servers
def test_published_it_is_the_champion_and_a_second_time_changes_nothing(settings: Settings) -> None:
    create(settings)
    producer, topic = producer_config(settings), settings.prefixed("churn-models")
    first, second = small(), small(seed=5)
    assert registry.publish(producer, topic, first.manifest, first.envelope)
    assert not registry.publish(producer, topic, first.manifest, first.envelope)
    assert registry.read(client_config(settings), topic).champion().digest == first.manifest.digest
    assert registry.publish(producer, topic, second.manifest, second.envelope)
    found = registry.read(client_config(settings), topic)
    assert found.champion().digest == second.manifest.digest
    assert set(found.envelopes) == {first.manifest.digest, second.manifest.digest}
    assert registry.publish(producer, topic, first.manifest, first.envelope)  # back again: the alias moves, the artifact stays
    assert registry.read(client_config(settings), topic).champion().digest == first.manifest.digest


@pytest.mark.servers
def test_what_lies_under_a_wrong_name_on_the_topic_is_refused(settings: Settings) -> None:
    create(settings)
    topic, model = settings.prefixed("churn-models"), small()
    registry.publish(producer_config(settings), topic, model.manifest, model.envelope)
    producer = Producer(producer_config(settings))
    producer.produce(topic, small(seed=5).envelope, f"artifact/{model.manifest.digest}")
    producer.produce(topic, b"not json", "alias/other")
    assert producer.flush(10) == 0
    found = registry.read(client_config(settings), topic)
    assert set(found.aliases) == {"champion"}
    with pytest.raises(ArtifactRejected, match="it is"):
        found.champion()
    # Publishing again puts the right bytes back.
    assert registry.publish(producer_config(settings), topic, model.manifest, model.envelope)
    assert registry.read(client_config(settings), topic).champion().digest == model.manifest.digest


@pytest.mark.servers
def test_the_life_of_models_by_two_persons_who_sign(
    settings: Settings, environment: dict[str, str], churnstream: Callable[..., Completed], tmp_path: Path
) -> None:
    """Published, approved by the other, promoted, rolled back, put away: each once, each in the log; a stranger's word moves nothing."""
    create(settings)
    producer, topic = producer_config(settings), settings.prefixed("churn-models")
    models = [small(seed=seed) for seed in (0, 5)]
    first, second = (model.manifest.digest for model in models)
    signers = {who: person(tmp_path, who) for who in ("ada", "bob", "eve")}
    trust = Trust({key.key_id: key for _, key in (signers["ada"], signers["bob"])}, two_persons=True)
    clock = count(1_000)

    def at(who: str) -> Desk:
        return Desk(producer, topic, signers[who][0], trust, lambda: next(clock))

    def run(*arguments: str) -> dict[str, Any]:
        of_ada = {
            "CHURN_MODEL_SIGNING_KEY_FILE": str(tmp_path / "ada" / "signing.pem"),
            "CHURN_MODEL_PUBLIC_KEYS": f"{tmp_path / 'ada' / 'trusted.pub'},{tmp_path / 'bob' / 'trusted.pub'}",
            "CHURN_MODEL_TWO_PERSONS": "true",
        }
        done = churnstream("models", *arguments, "--json", environment=environment | of_ada)
        assert done.code == 0, done.err
        return done.json()

    def stages() -> dict[str, str]:
        return {model["digest"]: model["stage"] for model in run("list", "--all")["models"]}

    path = str(registry.save(settings.data_dir / "models", models[0].manifest, models[0].envelope))
    assert not run("publish", path, "--dry-run")["changed"]
    assert not at("ada").published.envelopes
    assert run("publish", path)["changed"]
    assert not run("publish", first[:12])["changed"]
    assert stages() == {first: "staging"}
    with pytest.raises(ArtifactRejected, match="another person than ada"):
        at("ada").promote(first[:12])
    with pytest.raises(BadUsage, match="another person"):
        at("ada").approve(first[:12])
    with pytest.raises(BadUsage, match="among the trusted ones"):
        at("eve")
    bob = at("bob")
    assert bob.approve(first[:12], "looked at").changed
    assert not bob.approve(first[:12]).changed
    assert at("ada").promote(first[:12]).changed
    assert not at("bob").promote("models:/test@champion").changed
    ada = at("ada")
    ada.publish(models[1].envelope)
    at("bob").approve(second)
    ada = at("ada")
    ada.promote(second)
    with pytest.raises(BadUsage, match="is champion"):
        ada.archive("champion")
    assert stages() == {first: "approved", second: "champion"}
    assert run("rollback", "--dry-run")["decisions"][0]["digest"] == first
    registry.publish(producer, topic, models[0].manifest, models[0].envelope)  # neither signed nor logged: it moves nothing
    assert stages() == {first: "approved", second: "champion"}
    with pytest.raises(Untrusted, match="not signed"):
        at("ada").rollback()
    at("ada").publish(models[0].envelope)  # signed again
    assert run("rollback", "--why", "too many alerts")["digest"] == first
    ada = at("ada")
    assert ada.archive(second).changed
    assert not ada.archive(second).changed
    with pytest.raises(ArtifactRejected, match="archived"):
        ada.promote(second)
    with pytest.raises(BadUsage, match="names no model before"):
        at("ada").rollback("shadow")

    found = run("log")
    assert found["faults"] == []
    assert [(d["action"], d["who"]) for d in found["decisions"]] == [
        ("publish", "ada"), ("approve", "bob"), ("promote", "ada"), ("publish", "ada"), ("approve", "bob"), ("promote", "ada"),
        ("publish", "ada"), ("rollback", "ada"), ("archive", "ada"),
    ]  # fmt: skip
    rolled_back = found["decisions"][7]["at_ms"]
    for at_ms, digest in ((rolled_back - 1, second), (rolled_back, first)):
        moment = datetime.fromtimestamp(at_ms / 1_000, UTC).isoformat(timespec="milliseconds")
        assert run("live-at", moment)["digest"] == digest
    page = tmp_path / "card.html"
    run("card", "champion", "--out", str(page))
    assert "looked at" in page.read_text()
    assert "http" not in page.read_text()


@pytest.mark.servers
def test_a_missing_topic_is_said(settings: Settings) -> None:
    with pytest.raises(DependencyUnreachable, match="topics create"):
        registry.read(client_config(settings), settings.prefixed("churn-models"), timeout_s=10)


def rhythm_records() -> list[Record]:
    shop = rhythms(customers=400, days=420)
    records = []
    for i, (name, time) in enumerate(zip(shop.customers, shop.facts[:, 0].tolist(), strict=True)):
        event = {"event_id": f"e{i}", "customer_id": name, "kind": "payment", "event_time": time, "amount": "10.00", "currency": "EUR"}
        records.append(Record("transactions", name.encode(), orjson.dumps(event), f"e{i}", time))
    return records


@pytest.mark.servers
@pytest.mark.slow
def test_a_model_trained_from_topics_is_published_and_judged_alike_by_files(
    settings: Settings, environment: dict[str, str], churnstream: Callable[..., Completed], tmp_path: Path
) -> None:
    """Partitions and their merge decide nothing about a customer's rows; the commands publish, list, show and judge it."""
    create(settings)
    records = rhythm_records()
    send(records, client_config(settings), settings.topic_prefix, Pace(), timeout_s=30)
    export = tmp_path / "events.jsonl"
    export.write_bytes(b"\n".join(record.value for record in records))
    day = f"{datetime.fromtimestamp(START // 1000 + 300 * 86_400, UTC):%Y-%m-%d}"
    options = ("--split", day, "--label-days", "30", "--active-days", "90", "--json")

    topics = churnstream("models", "train", "--from-topics", *options, "--publish", environment=environment)
    assert topics.code == 0, topics.err
    trained = topics.json()
    assert trained["published"]
    assert trained["changed"]
    assert 0.6 < trained["auc"] < 0.95

    again = churnstream("models", "train", "--from-topics", *options, "--publish", environment=environment)
    assert again.code == 0, again.err
    assert (again.json()["digest"], again.json()["changed"]) == (trained["digest"], False)

    listed = churnstream("models", "list", "--json", environment=environment).json()["models"]
    assert [(model["digest"], model["aliases"]) for model in listed] == [(trained["digest"], ["champion"])]
    card = churnstream("models", "card", environment=environment)
    assert card.code == 0, card.err
    assert all(
        word in card.out for word in ("## Purpose", "## Label", "## Data", "## Figures: test", "## Limits", "## Risk", "## Decisions")
    )
    assert churnstream("models", "show", "--json", environment=environment).json()["digest"] == trained["digest"]

    judged = churnstream("models", "evaluate", "--from-topics", *options, environment=environment)
    assert judged.code == 0, judged.err
    assert judged.json()["auc"] == pytest.approx(trained["auc"], abs=1e-3)

    files = churnstream("models", "evaluate", "--events", str(export), "--mapping", "jsonl", *options, environment=environment)
    assert files.code == 0, files.err
    # The interval may differ: the bootstrap draws customers by number, and partitions number them otherwise.
    for figure in ("auc", "snapshot_rows", "base_rate"):
        assert files.json()[figure] == judged.json()[figure]


SALES = ("data/online_retail_ii/invoices.csv.gz", "--mapping", "online_retail_ii")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("train", "--split", "2010-12-01"), 2, "--from-topics"),
        (("train", "--split", "yesterday", "--events", *SALES), 2, "--split"),
        (("train", "--split", "2010-12-01", "--events", "nowhere.csv", "--mapping", "online_retail_ii"), 4, "nowhere.csv"),
        (("train", "--split", "2010-12-01", "--from-topics", "--medium", "0.7"), 2, "medium"),
        (("train", "--split", "2010-01-15", "--events", *SALES), 4, "later split"),
        (("publish", "0123456789"), 2, "kept models begin so"),
        (("live-at", "yesterday"), 2, "TIME yesterday"),
    ],
)  # fmt: skip
def test_misuse_is_said_with_its_exit_code(
    arguments: tuple[str, ...], code: int, says: str, churnstream: Callable[..., Completed], tmp_path: Path
) -> None:
    environment = {**os.environ, "CHURN_CURRENCY": "GBP"}
    done = churnstream("models", *arguments, environment=environment)
    assert done.code == code, done.err
    assert says in done.err
    assert "Traceback" not in done.err
