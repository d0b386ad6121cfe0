"""The registry of published models: files beside us, then records on the model topic; everything checked again when read."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from models.artifact import MAX_ENVELOPE_BYTES, Artifact, Manifest, unpack
from proto.errors import ArtifactRejected, BadUsage, DependencyUnreachable

CHAMPION: Final = "champion"
ARTIFACT: Final = "artifact/"
ALIAS: Final = "alias/"
FILE: Final = "artifact.zst"
BASELINE_FILE: Final = "baseline.onnx"
PRODUCER_ONLY: Final = {"partitioner", "enable.idempotence", "acks", "linger.ms", "transactional.id"}
"""Settings a consumer would warn about."""
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Published:
    """What the model topic says now: envelopes by digest, and which digest an alias stands for."""

    envelopes: Mapping[str, bytes]
    aliases: Mapping[str, str]

    def artifact(self, digest: str) -> Artifact:
        """A published model, checked. Raises ArtifactRejected when it is not there or damaged."""
        if digest not in self.envelopes:
            raise ArtifactRejected(f"model {digest[:12]}: not on the model topic; `churnstream models list` shows what is")
        return unpack(self.envelopes[digest], digest=digest)

    def champion(self) -> Artifact:
        """The model in service. Raises ArtifactRejected when there is none."""
        if CHAMPION not in self.aliases:
            raise ArtifactRejected("no model is published; `churnstream models train --publish` makes one")
        return self.artifact(self.aliases[CHAMPION])


def save(directory: Path, manifest: Manifest, envelope: bytes, baseline: bytes = b"") -> Path:
    """Keep a model as <directory>/<digest>/artifact.zst, with the graph of its baseline beside it; twice is once.

    Written, flushed to disk, then renamed: a reader sees all of it or nothing, also after a power cut.
    """
    unpack(envelope, digest=manifest.digest)
    home = directory / manifest.digest
    home.mkdir(parents=True, exist_ok=True)
    _write(home / FILE, envelope)
    if baseline:
        _write(home / BASELINE_FILE, baseline)
    return home / FILE


def _write(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with scratch.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)
    # The new name lies in the directory, which has to reach the disk too.
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def kept(directory: Path) -> list[str]:
    """Digests of the models kept in a directory, sorted."""
    return sorted(path.parent.name for path in directory.glob(f"*/{FILE}"))


def take(directory: Path, digest: str) -> bytes:
    """The envelope of a kept model, checked against its digest, which may be shortened to 8 digits.

    Raises BadUsage when none or several begin so, ArtifactRejected when the file is not that model (any more).
    """
    found = [known for known in kept(directory) if known.startswith(digest)]
    if len(digest) < 8 or len(found) != 1:
        raise BadUsage(f"{digest}: {len(found)} kept models begin so (8 digits are needed); `churnstream models list --local` shows them")
    path = directory / found[0] / FILE
    if path.stat().st_size > MAX_ENVELOPE_BYTES:
        raise ArtifactRejected(f"model artifact refused: {path} is larger than any artifact")
    envelope = path.read_bytes()
    unpack(envelope, digest=found[0])
    return envelope


def publish(producer: Mapping[str, Any], topic: str, manifest: Manifest, envelope: bytes, *, alias: str = CHAMPION) -> bool:
    """Put a model on the topic, and when it is acknowledged point the alias at it. False when all that was so already.

    producer: settings of an idempotent librdkafka producer. Raises ArtifactRejected for an envelope that does not hold this
    manifest, DependencyUnreachable when Kafka does not take it.
    """
    unpack(envelope, digest=manifest.digest)
    published = read({key: value for key, value in producer.items() if key not in PRODUCER_ONLY}, topic)
    wanted = {}
    if published.envelopes.get(manifest.digest) != envelope:
        wanted[f"{ARTIFACT}{manifest.digest}"] = envelope
    if published.aliases.get(alias) != manifest.digest:
        wanted[f"{ALIAS}{alias}"] = orjson.dumps({"digest": manifest.digest, "version": manifest.version})
    for key, value in wanted.items():
        _send(producer, topic, key, value)
    return bool(wanted)


def _send(settings: Mapping[str, Any], topic: str, key: str, value: bytes) -> None:
    from confluent_kafka import KafkaError, Producer

    failed: list[KafkaError] = []
    producer = Producer({**settings, "compression.type": "none"})
    producer.produce(topic, value, key, on_delivery=lambda error, _: failed.append(error) if error is not None else None)
    if producer.flush(_TIMEOUT_S):
        raise DependencyUnreachable(f"Kafka did not acknowledge {key} on {topic} within {_TIMEOUT_S:g} s")
    if failed:
        raise DependencyUnreachable(f"Kafka did not take {key} on {topic}: {failed[0].str()}")


def read(client: Mapping[str, Any], topic: str, *, timeout_s: float = _TIMEOUT_S) -> Published:
    """The model topic from its beginning to its end; the last record of a key counts. Raises DependencyUnreachable."""
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

    consumer = Consumer(
        {
            **client,
            "group.id": "churnstream-models-reader",  # the client asks for one; it is never joined
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.message.max.bytes": 40 << 20,
            "fetch.max.bytes": 64 << 20,
        }
    )
    envelopes: dict[str, bytes] = {}
    aliases: dict[str, str] = {}
    try:
        try:
            known = consumer.list_topics(topic, timeout=timeout_s).topics[topic]
        except KafkaException as error:
            raise DependencyUnreachable(f"Kafka: no metadata within {timeout_s:g} s: {error.args[0]}") from error
        if known.error is not None:
            raise DependencyUnreachable(f"Kafka: topic {topic}: {known.error.str()}; run `churnstream topics create`")
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in known.partitions])
        ended: set[int] = set()
        while len(ended) < len(known.partitions):
            message = consumer.poll(timeout_s)
            if message is None:
                raise DependencyUnreachable(f"Kafka: {topic} could not be read to its end within {timeout_s:g} s")
            trouble = message.error()
            if trouble is not None:
                if trouble.code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition() or 0)
                elif not trouble.retriable():
                    raise DependencyUnreachable(f"Kafka: {topic}: {trouble.str()}")
                continue
            key, value = (message.key() or b"").decode("utf-8", "replace"), message.value()
            if key.startswith(ARTIFACT):
                digest = key.removeprefix(ARTIFACT)
                envelopes.pop(digest, None)
                if value is not None:
                    envelopes[digest] = value
            elif key.startswith(ALIAS):
                name = key.removeprefix(ALIAS)
                aliases.pop(name, None)
                if value is not None and (digest := _digest_of(value)):
                    aliases[name] = digest
    finally:
        consumer.close()
    return Published(envelopes, aliases)


def _digest_of(value: bytes) -> str:
    """Where an alias points; "" when the bytes are no alias, so that one bad record does not hide the others."""
    try:
        return str(orjson.loads(value)["digest"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
