"""The topics of a deployment as one table, and the explicit way to create them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from features.facts import DAY_MS, TOPICS
from features.window import HORIZON_MS
from proto.errors import BadUsage, ChurnError, DependencyUnreachable

if TYPE_CHECKING:
    from confluent_kafka.admin import AdminClient

    from streams.settings import Settings

SCORES: Final = "churn-scores"
ALERTS: Final = "churn-alerts"
DEAD_LETTERS: Final = "churn-dead-letters"
MODELS: Final = "churn-models"
REDRIVES: Final = "churn-redrives"
FEATURES: Final = "churn-features"
DRIFT: Final = "churn-drift"
DRIFT_STATE: Final = "churn-drift-state"
OUTCOMES: Final = "churn-outcomes"

# Events over the accepted 1 MB must reach us to become dead letters, and a dead letter carries the event's bytes as base64.
INPUT_MAX_BYTES: Final = 12 << 20
DEAD_LETTER_MAX_BYTES: Final = 24 << 20
MODEL_MAX_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class Topic:
    """One row of the table. `partitions` None = the deployment's count; `retained` = deleted after the retention."""

    name: str
    role: str
    max_bytes: int = 1 << 20
    partitions: int | None = None
    retained: bool = True
    append_time: bool = False

    def config(self, retention_days: int) -> dict[str, str]:
        """The settings of the topic that we state; all others are the broker's."""
        values = {"max.message.bytes": str(self.max_bytes)}
        if self.retained:
            values |= {"cleanup.policy": "delete", "retention.ms": str(retention_days * DAY_MS)}
        else:
            values |= {"cleanup.policy": "compact"}
        if self.append_time:
            # With CreateTime a feed of old data would be deleted by retention as it arrives.
            values |= {"message.timestamp.type": "LogAppendTime"}
        return values


TABLE: Final = (
    Topic("transactions", "payments, refunds, renewals, plan changes; key = customer", INPUT_MAX_BYTES, append_time=True),
    Topic("logins", "log-ins, use and disturbances; key = customer", INPUT_MAX_BYTES, append_time=True),
    Topic("support-tickets", "tickets and satisfaction; key = customer", INPUT_MAX_BYTES, append_time=True),
    Topic("customer-profiles", "what is known of a customer; latest per key stays", INPUT_MAX_BYTES, retained=False, append_time=True),
    Topic(SCORES, "one score per event; partition = the event's"),
    Topic(ALERTS, "customers that moved to another band; partition = the event's"),
    Topic(DEAD_LETTERS, "records that could not be used, with the reason and the bytes", DEAD_LETTER_MAX_BYTES),
    Topic(REDRIVES, "which dead letters were sent back, so that none is twice", partitions=1, retained=False),
    Topic(MODELS, "artifacts and aliases; read by every worker from the beginning", MODEL_MAX_BYTES, partitions=1, retained=False),
    Topic(OUTCOMES, "what became of customers: labels, interventions, answers; key = customer", append_time=True),
    Topic(DRIFT, "verdicts on drift and damaged records", partitions=1),
    Topic(DRIFT_STATE, "baseline and detectors of the drift watch", MODEL_MAX_BYTES, partitions=1, retained=False),
)
FEATURE_LOG: Final = Topic(FEATURES, "the vector of each score as it was scored (CHURN_FEATURE_LOG=true); partition = the event's")
assert tuple(topic.name for topic in TABLE[: len(TOPICS)]) == TOPICS  # the order is the topic index


def table(settings: Settings) -> tuple[Topic, ...]:
    """The topics of a deployment."""
    return (*TABLE, FEATURE_LOG) if settings.feature_log else TABLE


@dataclass(frozen=True, slots=True)
class Plan:
    """What `create` did, or would do: names created, (name, key, old, new) of changed settings, and what an operator should know."""

    created: tuple[str, ...]
    changed: tuple[tuple[str, str, str, str], ...]
    warnings: tuple[str, ...]
    dry_run: bool

    @property
    def empty(self) -> bool:
        """Whether everything was as it should be."""
        return not self.created and not self.changed


def client_config(settings: Settings, kafka: str | None = None) -> dict[str, Any]:
    """What every librdkafka client of ours starts from: the address, and the TLS/SASL settings passed through.

    kafka: the address when known; None = the environment's, else the embedded stack's (DependencyUnreachable when there is none).
    """
    if kafka is None:
        from streams.stack import kafka_address

        kafka = kafka_address(settings)
    return {"bootstrap.servers": kafka, "client.id": "churnstream", **settings.kafka}


def producer_config(settings: Settings, kafka: str | None = None) -> dict[str, Any]:
    """As client_config, for producers: murmur2 as every Java client does, idempotent, records up to the largest we accept."""
    return {
        "partitioner": "murmur2_random",  # librdkafka's own default is CRC32: the same customer would lie in two partitions
        "enable.idempotence": True,
        "acks": "all",
        "message.max.bytes": MODEL_MAX_BYTES,
        **client_config(settings, kafka),
    }


def create(settings: Settings, *, dry_run: bool = False) -> Plan:
    """Create the missing topics and set what differs. A second call changes nothing.

    Raises BadUsage when a topic has another partition count than the settings say, DependencyUnreachable when Kafka does not answer.
    """
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, NewTopic

    from streams.stack import kafka_error

    config = client_config(settings)
    address = config["bootstrap.servers"]
    if error := kafka_error(config, settings.dependency_timeout_s):
        raise DependencyUnreachable(f"Kafka at {address}: {error}; is it up? (`churnstream stack status`)")
    admin = AdminClient(config)
    present = admin.list_topics(timeout=settings.dependency_timeout_s).topics
    missing, there = [], []
    for topic in table(settings):
        name, wanted = settings.prefixed(topic.name), topic.partitions or settings.partitions
        if name not in present:
            missing.append(NewTopic(name, wanted, settings.replication, config=topic.config(settings.retention_days)))
            continue
        there.append(topic)
        if (found := len(present[name].partitions)) != wanted:
            raise BadUsage(
                f"topic {name} has {found} partitions, the settings say {wanted}: changing the count would move customers away "
                f"from their state; set CHURN_PARTITIONS={found}, or use a new CHURN_TOPIC_PREFIX"
            )
    try:
        changes = _differences(admin, there, settings)
        if not dry_run:
            for future in admin.create_topics(missing, operation_timeout=settings.dependency_timeout_s).values() if missing else ():
                future.result()
            _wait_until_there(admin, [topic.topic for topic in missing], settings)
            _set(admin, changes)
            _wait_until_set(admin, there, settings)
    except KafkaException as failure:
        raise ChurnError(f"Kafka at {address}: creating topics: {failure.args[0].str()}") from failure
    return Plan(tuple(topic.topic for topic in missing), tuple(changes), _warnings(settings), dry_run)


def _warnings(settings: Settings) -> tuple[str, ...]:
    longest = HORIZON_MS // DAY_MS
    if settings.retention_days >= longest:
        return ()
    return (
        f"retention of {settings.retention_days} days is shorter than the longest window of {longest}: "
        "features cannot be rebuilt from the topics alone (CHURN_RETENTION_DAYS)",
    )


def _differences(admin: AdminClient, topics: list[Topic], settings: Settings) -> list[tuple[str, str, str, str]]:
    """(topic, key, value found, value wanted) for every stated setting that differs."""
    from confluent_kafka.admin import ConfigResource, ResourceType

    if not topics:
        return []
    wanted = {settings.prefixed(topic.name): topic.config(settings.retention_days) for topic in topics}
    futures = admin.describe_configs([ConfigResource(ResourceType.TOPIC, name) for name in wanted])
    return [
        (resource.name, key, entries[key].value, value)
        for resource, future in futures.items()
        for entries in [future.result()]
        for key, value in wanted[resource.name].items()
        if entries[key].value != value
    ]


def _wait_until_there(admin: AdminClient, names: list[str], settings: Settings) -> None:
    """As with changes: a worker started at once would not find the topics just made."""
    deadline = time.monotonic() + settings.dependency_timeout_s
    while left := set(names) - admin.list_topics(timeout=settings.dependency_timeout_s).topics.keys():
        if time.monotonic() > deadline:
            raise ChurnError(f"topic {min(left)}: made, but still not there after {settings.dependency_timeout_s:g} s")
        time.sleep(0.02)


def _wait_until_set(admin: AdminClient, topics: list[Topic], settings: Settings) -> None:
    """The controller confirms a change before every broker has seen it; without this wait the next command may still read the old value."""
    deadline = time.monotonic() + settings.dependency_timeout_s
    while left := _differences(admin, topics, settings):
        if time.monotonic() > deadline:
            raise ChurnError(f"topic {left[0][0]}: {left[0][1]} is still {left[0][2]}, not {left[0][3]}; does the cluster refuse it?")
        time.sleep(0.02)


def _set(admin: AdminClient, changes: list[tuple[str, str, str, str]]) -> None:
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    by_topic: dict[str, list[ConfigEntry]] = {}
    for name, key, _, value in changes:
        by_topic.setdefault(name, []).append(ConfigEntry(key, value, incremental_operation=AlterConfigOpType.SET))
    resources = [ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries) for name, entries in by_topic.items()]
    for future in admin.incremental_alter_configs(resources).values() if resources else ():
        future.result()
