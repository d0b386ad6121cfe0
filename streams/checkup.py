"""What a deployment needs, looked at one by one; and where it stands now."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from features.facts import TOPICS
from features.redis_health import refusal
from models.ledger import CHAMPION
from models.registry import read as read_models
from proto.errors import ArtifactRejected, ChurnError, DependencyUnreachable
from streams.freshness import kafka_ends
from streams.settings import Settings
from streams.stack import kafka_address, kafka_error, redis_address, without_password
from streams.state_store import open_store
from streams.topics import MODELS, client_config, table

PATIENCE_S: Final = 2.0
"""How long a server may take to answer a checkup."""
SKEW_MS: Final = 1_000
LITTLE_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. do: what to do about it, "" when it is well. unreachable: a server does not answer."""

    what: str
    said: str
    do: str = ""
    unreachable: bool = False

    @property
    def well(self) -> bool:
        """Whether there is nothing to do."""
        return not self.do


def checkup(settings: Settings) -> Iterator[Finding]:
    """Every check that can be made; one whose server does not answer is left out. Changes nothing."""
    home = settings.data_dir if settings.data_dir.exists() else settings.data_dir.resolve().parent
    writable = os.access(home, os.W_OK)
    yield Finding("data directory", str(settings.data_dir), "" if writable else f"make {home} writable, or set CHURN_DATA_DIR")
    disk = os.statvfs(home)
    free = disk.f_bavail * disk.f_frsize
    yield Finding("disk", f"{free >> 30} GB free", "" if free > LITTLE_BYTES else "free some space: servers stop when the disk is full")
    kafka = yield from _kafka(settings)
    if kafka:
        yield from _topics(settings, kafka)
        yield from _model(settings, kafka)
    yield from _redis(settings)


def _kafka(settings: Settings) -> Generator[Finding, None, str]:
    """The address, "" when nobody answers there."""
    try:
        address = kafka_address(settings)
        error = kafka_error(client_config(settings, address), PATIENCE_S)
    except ChurnError as absent:
        yield Finding("Kafka", str(absent), "churnstream stack up", unreachable=True)
        return ""
    where = f"Kafka at {address}"
    yield Finding(where, error or "answers", "check the address and the TLS/SASL settings" if error else "", unreachable=bool(error))
    return "" if error else address


def _topics(settings: Settings, address: str) -> Iterator[Finding]:
    from confluent_kafka.admin import AdminClient

    found = AdminClient(client_config(settings, address)).list_topics(timeout=PATIENCE_S).topics
    missing = [topic.name for topic in table(settings) if settings.prefixed(topic.name) not in found]
    yield Finding("topics", f"{', '.join(missing)} missing" if missing else "all there", "churnstream topics create" if missing else "")
    for topic in table(settings):
        name, wanted = settings.prefixed(topic.name), topic.partitions or settings.partitions
        if name in found and (count := len(found[name].partitions)) != wanted:
            yield Finding(f"topic {name}", f"{count} partitions, the settings say {wanted}", f"set CHURN_PARTITIONS={count}")


def _model(settings: Settings, address: str) -> Iterator[Finding]:
    try:
        artifact = read_models(client_config(settings, address), settings.prefixed(MODELS)).champion()
    except ArtifactRejected as error:
        yield Finding("model", str(error), "churnstream models train --from-topics --publish")
    except ChurnError:
        return  # without its topic, which is said already
    else:
        yield Finding("model", f"{CHAMPION} is {artifact.manifest.version} ({artifact.digest[:12]})")


def _redis(settings: Settings) -> Iterator[Finding]:
    try:
        url = redis_address(settings)
        with closing(open_store(settings, url, patience_s=0)) as store:
            asked = time.time_ns() // 1_000_000
            found = store.health()
    except ChurnError as error:
        yield Finding("Redis", str(error), "check REDIS_URL, or `churnstream stack up`", unreachable=True)
        return
    took = time.time_ns() // 1_000_000 - asked
    for health in found:
        where = f"Redis at {without_password(health.address)}"
        if reason := refusal(health, settings.redis_oldest_version):
            yield Finding(where, reason, "use another server")
        elif health.writes_fail:
            yield Finding(where, f"refuses writes: {health.writes_fail}", "look at its disk")
        else:
            slow = took > SKEW_MS
            yield Finding(where, f"{health.version}, answers in {took} ms", "it is slow: look at its CPU and the way to it" if slow else "")


def standing(settings: Settings) -> dict[str, Any]:
    """Where every partition stands: applied offsets, ends, lag, whether somebody owns it. Raises DependencyUnreachable."""
    partitions = range(settings.partitions)
    client = client_config(settings, kafka_address(settings))
    if error := kafka_error(client, PATIENCE_S):
        raise DependencyUnreachable(f"Kafka at {client['bootstrap.servers']}: {error}; `churnstream doctor` looks at everything")
    ends = kafka_ends(client, [settings.prefixed(topic) for topic in TOPICS], settings.partitions, PATIENCE_S)()
    with closing(open_store(settings, redis_address(settings), patience_s=0)) as store:
        standings = store.standings(partitions)
    rows: list[dict[str, Any]] = []
    for partition, one in zip(partitions, standings, strict=True):
        lag = sum(max(0, ends[topic, partition] - one.applied[name] - 1) for topic, name in enumerate(TOPICS))
        rows.append({"partition": partition, "owned": bool(one.nonce), "lag": lag, "applied": dict(one.applied), "whole": one.whole})
    published = read_models(client, settings.prefixed(MODELS))
    return {
        "partitions": rows,
        "lag": sum(row["lag"] for row in rows),
        "owned": sum(row["owned"] for row in rows),
        "champion": published.aliases.get(CHAMPION, ""),
    }
