"""The registry of published models: files beside us, then records on the model topic; everything checked again when read."""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from models.artifact import MAX_ENVELOPE_BYTES, Artifact, Manifest, unpack
from models.ledger import CHAMPION, LOG, Ledger, parse
from models.signature import Trust
from proto.errors import ArtifactRejected, BadUsage, DependencyUnreachable, Untrusted

ARTIFACT: Final = "artifact/"
ALIAS: Final = "alias/"
FILE: Final = "artifact.zst"
BASELINE_FILE: Final = "baseline.onnx"
PRODUCER_ONLY: Final = {"partitioner", "enable.idempotence", "acks", "linger.ms", "transactional.id", "message.max.bytes"}
"""Settings a consumer would warn about."""
_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Published:
    """What the model topic says now: models (sealed or not) by digest, which digest an alias stands for, and what was decided.

    ends: offset after the last record read, by partition. doubtful: why records were not believed.
    """

    envelopes: Mapping[str, bytes]
    aliases: Mapping[str, str]
    ledger: Ledger = field(default_factory=Ledger)
    ends: Mapping[int, int] = field(default_factory=dict)
    doubtful: Sequence[str] = ()

    def artifact(self, digest: str) -> Artifact:
        """A published model, checked. Raises ArtifactRejected when it is not there, damaged, or not signed by whom we trust."""
        if digest not in self.envelopes:
            raise ArtifactRejected(f"model {digest[:12]}: not on the model topic; `churnstream models list` shows what is")
        return unpack(self.ledger.trust.open(self.envelopes[digest], digest), digest=digest)

    def champion(self) -> Artifact:
        """The model in service. Raises ArtifactRejected when there is none."""
        if CHAMPION not in self.aliases:
            raise ArtifactRejected("no model is published; `churnstream models train --publish` makes one")
        return self.artifact(self.aliases[CHAMPION])

    def named(self, name: str) -> str:
        """Digest of what is called by an alias, `models:/churn@champion`, `models:/churn/VERSION`, a version, or 8 digits of a digest.

        Raises BadUsage when none or several are called so.
        """
        wanted = name.removeprefix("models:/")
        if wanted != name:
            _, at, alias = wanted.partition("@")
            _, slash, version = wanted.partition("/")
            wanted = alias if at else version if slash else wanted
        if wanted in self.aliases:
            return self.aliases[wanted]
        found = [digest for digest in self.envelopes if len(wanted) >= 8 and digest.startswith(wanted)] or [
            digest for digest in self.envelopes if self.version(digest) == wanted
        ]
        if len(found) != 1:
            known = ", ".join([*self.aliases, *(digest[:12] for digest in self.envelopes)]) or "nothing"
            raise BadUsage(f"model {name}: {len(found)} on the topic are called so; there are {known}")
        return found[0]

    def version(self, digest: str) -> str:
        """Version of a published model by the log, else by its manifest; "" when that cannot be read."""
        for decision in self.ledger.decisions.values():
            if decision.digest == digest and decision.version:
                return decision.version
        try:
            return unpack(self.envelopes[digest], digest=digest).manifest.version
        except ArtifactRejected:
            return ""


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

    Nothing is signed and nothing logged: for trials and benchmarks. People go through models.desk.
    producer: settings of an idempotent librdkafka producer. Raises ArtifactRejected for an envelope that does not hold this
    manifest, DependencyUnreachable when Kafka does not take it.
    """
    unpack(envelope, digest=manifest.digest)
    published = read(producer, topic)
    wanted = {}
    if published.envelopes.get(manifest.digest) != envelope:
        wanted[f"{ARTIFACT}{manifest.digest}"] = envelope
    if published.aliases.get(alias) != manifest.digest:
        wanted[f"{ALIAS}{alias}"] = orjson.dumps({"digest": manifest.digest, "version": manifest.version})
    for key, value in wanted.items():
        send(producer, topic, key, value)
    return bool(wanted)


def send(settings: Mapping[str, Any], topic: str, key: str, value: bytes) -> tuple[int, int]:
    """One record, acknowledged; its partition and offset. Raises DependencyUnreachable."""
    from confluent_kafka import KafkaError, Message, Producer

    done: list[tuple[KafkaError | None, Message]] = []
    producer = Producer({**settings, "compression.type": "none"})
    producer.produce(topic, value, key, on_delivery=lambda error, message: done.append((error, message)))
    if producer.flush(_TIMEOUT_S) or not done:
        raise DependencyUnreachable(f"Kafka did not acknowledge {key} on {topic} within {_TIMEOUT_S:g} s")
    error, message = done[0]
    if error is not None:
        raise DependencyUnreachable(f"Kafka did not take {key} on {topic}: {error.str()}")
    return message.partition() or 0, message.offset() or 0


def read(client: Mapping[str, Any], topic: str, trust: Trust | None = None, *, timeout_s: float = _TIMEOUT_S) -> Published:
    """The model topic from its beginning to its end. Raises DependencyUnreachable.

    Without trusted keys the last record of an alias counts; with them the newest decision that one of them signed.
    """
    ledger = Ledger(trust or Trust())
    envelopes: dict[str, bytes] = {}
    aliases: dict[str, str] = {}
    ends: dict[int, int] = {}
    doubtful: list[str] = []
    for partition, offset, key, value in records(client, topic, {}, timeout_s=timeout_s):
        ends[partition] = offset + 1
        if key.startswith(ARTIFACT):
            digest = key.removeprefix(ARTIFACT)
            envelopes.pop(digest, None)
            if value is not None:
                envelopes[digest] = value
        elif key.startswith((ALIAS, LOG)):
            try:
                ledger.note(value)
            except Untrusted as error:
                doubtful.append(str(error))
            if key.startswith(ALIAS):
                name = key.removeprefix(ALIAS)
                aliases.pop(name, None)
                if value is not None and (digest := digest_of(value)):
                    aliases[name] = digest
    if ledger.trust.checks:
        aliases = {name: target for name in {d.alias for d in ledger.proven.values()} if name and (target := ledger.target(name))}
    return Published(envelopes, aliases, ledger, ends, doubtful)


def records(
    client: Mapping[str, Any], topic: str, since: Mapping[int, int], *, timeout_s: float = _TIMEOUT_S
) -> Iterator[tuple[int, int, str, bytes | None]]:
    """(partition, offset, key, value) of the records from an offset (else the beginning) of each partition to its end.

    client: settings of a client or a producer. Raises DependencyUnreachable.
    """
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

    consumer = Consumer(
        {
            **{key: value for key, value in client.items() if key not in PRODUCER_ONLY},
            "group.id": "churnstream-models-reader",  # the client asks for one; it is never joined
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
            "fetch.message.max.bytes": 40 << 20,
            "fetch.max.bytes": 64 << 20,
            "fetch.wait.max.ms": 50,  # the end is told with a fetch that brings nothing
        }
    )
    try:
        try:
            known = consumer.list_topics(topic, timeout=timeout_s).topics[topic]
        except KafkaException as error:
            raise DependencyUnreachable(f"Kafka: no metadata within {timeout_s:g} s: {error.args[0]}") from error
        if known.error is not None:
            raise DependencyUnreachable(f"Kafka: topic {topic}: {known.error.str()}; run `churnstream topics create`")
        consumer.assign([TopicPartition(topic, number, since.get(number, OFFSET_BEGINNING)) for number in known.partitions])
        ended: set[int] = set()
        while len(ended) < len(known.partitions):
            message = consumer.poll(timeout_s)
            if message is None:
                raise DependencyUnreachable(f"Kafka: {topic} could not be read to its end within {timeout_s:g} s")
            trouble = message.error()
            if trouble is None:
                key = (message.key() or b"").decode("utf-8", "replace")
                yield message.partition() or 0, message.offset() or 0, key, message.value()
            elif trouble.code() == KafkaError._PARTITION_EOF:
                ended.add(message.partition() or 0)
            elif not trouble.retriable():
                raise DependencyUnreachable(f"Kafka: {topic}: {trouble.str()}")
    finally:
        consumer.close()


def digest_of(value: bytes) -> str:
    """Where an alias points; "" when the bytes are no alias, so that one bad record does not hide the others."""
    if decision := parse(value):
        return decision.digest
    try:
        return str(orjson.loads(value)["digest"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
