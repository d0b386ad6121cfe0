"""Topics: made on purpose, once, as the table says."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from features.facts import TOPICS
from proto.errors import BadUsage
from streams.settings import Settings
from streams.topics import TABLE, client_config, create, producer_config
from tests.conftest import run_command

pytestmark = pytest.mark.servers


def config(settings: Settings, topic: str) -> dict[str, str]:
    resource = ConfigResource(ResourceType.TOPIC, settings.prefixed(topic))
    admin = AdminClient(client_config(settings))
    (future,) = admin.describe_configs([resource]).values()
    return {key: entry.value for key, entry in future.result().items()}


def test_create_makes_every_topic_as_the_table_says_and_a_second_run_changes_nothing(settings: Settings) -> None:
    names = {settings.prefixed(topic.name) for topic in TABLE}
    assert set(create(settings).created) == names
    assert create(settings).empty
    present = AdminClient(client_config(settings)).list_topics(timeout=20).topics
    counts = {name: len(present[settings.prefixed(name)].partitions) for name in (t.name for t in TABLE)}
    assert counts == {t.name: 4 for t in TABLE} | {"churn-models": 1, "churn-redrives": 1, "churn-drift": 1, "churn-drift-state": 1}
    for topic in TOPICS:
        assert config(settings, topic)["message.timestamp.type"] == "LogAppendTime"
        assert int(config(settings, topic)["max.message.bytes"]) > 10_000_000  # so that a record of 10 MB can become a dead letter
    assert config(settings, "transactions")["retention.ms"] == str(400 * 86_400_000)
    assert config(settings, "customer-profiles")["cleanup.policy"] == "compact"
    assert config(settings, "churn-models")["cleanup.policy"] == "compact"
    assert int(config(settings, "churn-models")["max.message.bytes"]) == 32 << 20


def test_a_dry_run_says_what_the_real_run_then_does_and_does_nothing(environment: dict[str, str], settings: Settings) -> None:
    dry = run_command("topics", "create", "--dry-run", "--json", environment=environment)
    assert dry.code == 0, dry.err
    present = AdminClient(client_config(settings)).list_topics(timeout=20).topics
    assert not any(name.startswith(settings.topic_prefix) for name in present)
    real = run_command("topics", "create", "--json", environment=environment)
    assert real.json() == dry.json() | {"dry_run": False}
    assert "no changes" in run_command("topics", "create", environment=environment).out


def test_a_changed_partition_count_is_refused(settings: Settings, environment: dict[str, str]) -> None:
    create(settings)
    with pytest.raises(BadUsage, match="has 4 partitions, the settings say 8"):
        create(settings.model_copy(update={"partitions": 8}))
    assert run_command("topics", "create", environment=environment | {"CHURN_PARTITIONS": "8"}).code == 2


def test_a_setting_that_differs_is_set_and_a_short_retention_is_said(settings: Settings) -> None:
    create(settings)
    short = settings.model_copy(update={"retention_days": 30})
    plan = create(short)
    assert (settings.prefixed("logins"), "retention.ms", str(400 * 86_400_000), str(30 * 86_400_000)) in plan.changed
    assert "shorter than the longest window" in plan.warnings[0]
    assert create(short).empty
    assert config(settings, "logins")["retention.ms"] == str(30 * 86_400_000)


def test_a_topic_is_never_made_by_accident(settings: Settings) -> None:
    from confluent_kafka import Producer

    failures: list[object] = []
    # Not the longest of waits: an unknown topic fails when the message times out.
    producer = Producer({**producer_config(settings), "message.timeout.ms": 3000, "topic.metadata.propagation.max.ms": 500})
    try:
        producer.produce(settings.prefixed("never-made"), b"x", on_delivery=lambda error, _: failures.append(error))
        producer.flush(20)
    except KafkaException as error:
        failures.append(error)
    assert any(failure is not None for failure in failures)


def test_clients_pass_security_settings_through_and_producers_use_murmur2() -> None:
    settings = Settings(
        kafka_bootstrap_servers="k:9093", kafka={"security_protocol": "SASL_SSL", "SASL_USERNAME": "u", "ssl.ca.location": "/ca"}
    )
    assert client_config(settings) == {
        "bootstrap.servers": "k:9093",
        "client.id": "churnstream",
        "security.protocol": "SASL_SSL",
        "sasl.username": "u",
        "ssl.ca.location": "/ca",
    }
    assert producer_config(settings)["partitioner"] == "murmur2_random"
