"""The model in force: follows the model topic without a group, verifies what it finds, and keeps the last good one."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from models.ledger import CHAMPION, LOG, Ledger
from models.registry import ALIAS, ARTIFACT, digest_of
from models.signature import Trust
from proto.errors import ArtifactRejected, DependencyUnreachable, Untrusted
from streams.metrics import Metrics
from streams.scores import Model

log = logging.getLogger(__name__)

WAIT_S: Final = 0.5
KEPT: Final = 3
"""Loaded models remembered: the one in force, and those an open intent may name."""
FORMER: Final = 5
"""Former champions a worker without a model tries when the champion is refused."""


@dataclass(frozen=True, slots=True)
class ReloadSettings:
    """Full topic name, client settings, and how long Kafka may take to answer."""

    client: Mapping[str, Any]
    topic: str
    timeout_s: float


class Reload:
    """Reads the model topic in a thread. The engine asks `current` only between two batches, so a batch never mixes models.

    load: envelope bytes to a model ready to score; raises ArtifactRejected. Where each artifact lies is remembered, not its bytes.
    trust: whose signatures count, on models and on what is said about them. examine: tries an envelope where it can do no harm, before
    it is loaded here; raises ArtifactRejected.
    """

    def __init__(
        self,
        settings: ReloadSettings,
        load: Callable[[bytes], Model],
        fallback: Model,
        metrics: Metrics,
        trust: Trust | None = None,
        examine: Callable[[bytes], object] | None = None,
    ) -> None:
        self._settings, self._load, self._fallback, self._metrics = settings, load, fallback, metrics
        self._trust, self._examine = trust or Trust(), examine
        self._ledger = Ledger(self._trust)
        self._current: Model = fallback
        self._places: dict[str, tuple[int, int]] = {}
        self._loaded: dict[str, Model] = {}
        self._wanted: str | None = None  # by the alias record; counts where no key is trusted
        self._newest: tuple[str, bytes] = ("", b"")  # the artifact read last: the alias that follows most likely means it
        self._refused: set[str] = set()
        self._unapproved: set[str] = set()
        self._ends: set[int] = set()
        self._complete = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        if self._trust.checks:
            log.info("models: signatures are checked; trusted are %s", self._trust.names)
        else:
            log.warning("models: signatures are not checked, whoever can write %s decides (CHURN_MODEL_PUBLIC_KEYS)", settings.topic)

    def start(self) -> None:
        """Start following; returns when the topic has been read to its end once. Raises DependencyUnreachable."""
        self._thread = threading.Thread(target=self._run, name="reload", daemon=True)
        self._thread.start()
        finished = self._complete.wait(self._settings.timeout_s * 3)
        if self.failure is not None:
            raise self.failure
        if not finished:
            raise DependencyUnreachable(
                f"Kafka: {self._settings.topic} could not be read to its end within {self._settings.timeout_s * 3:g} s"
            )

    def stop(self) -> None:
        """Stop following; the model in force stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def current(self) -> Model:
        """The model in force now: the last champion that passed all gates, else the fallback."""
        return self._current

    def by_digest(self, digest: str) -> Model:
        """A model by digest, loaded again when needed; "" is the fallback. Raises ArtifactRejected."""
        if not digest:
            return self._fallback
        if digest in self._loaded:
            return self._loaded[digest]
        if digest not in self._places:
            raise ArtifactRejected(f"model {digest[:16]}: not on {self._settings.topic}; an open batch needs it: publish it again")
        return self._remember(digest)

    # -- the thread

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            log.error("reading models stopped: %s", error)
            self.failure = error
        self._complete.set()

    def _consumer(self) -> Consumer:
        return Consumer(
            {
                "fetch.message.max.bytes": 40 << 20,
                "fetch.max.bytes": 64 << 20,
                "fetch.wait.max.ms": 100,  # the end of the topic is told with a fetch that brings nothing
                "queued.max.messages.kbytes": 65_536,
                **self._settings.client,
                "group.id": f"models-{secrets.token_hex(6)}",  # the client asks for one; it is never joined
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "auto.offset.reset": "earliest",  # begin again when compaction took the place away: reading twice does no harm
            },
            logger=log,
        )

    def _follow(self) -> None:
        s = self._settings
        consumer = self._consumer()
        try:
            try:
                known = consumer.list_topics(s.topic, timeout=s.timeout_s).topics[s.topic]
            except KafkaException as error:
                raise DependencyUnreachable(f"Kafka: no metadata within {s.timeout_s:g} s: {error.args[0]}") from error
            if known.error is not None:
                raise DependencyUnreachable(f"Kafka: topic {s.topic}: {known.error.str()}; run `churnstream topics create`")
            consumer.assign([TopicPartition(s.topic, partition, 0) for partition in known.partitions])
            while not self._stop.is_set():
                message = consumer.poll(WAIT_S)
                if message is None:
                    if self._complete.is_set():
                        self._switch()  # what could not be fetched is tried again
                    continue
                place: Any = message.partition(), message.offset()  # both known of a record, and of an end of partition
                failure = message.error()
                if failure is None:
                    self._read(message.key() or b"", message.value(), *place)
                elif failure.code() == KafkaError._PARTITION_EOF:
                    self._ends.add(place[0])
                else:
                    log.warning("models: %s", failure.str())
                if len(self._ends) == len(known.partitions):
                    # Only now: on the way there the topic may name champions that were replaced long ago.
                    self._switch()
                    self._complete.set()
        finally:
            consumer.close()

    def _read(self, raw_key: bytes, value: bytes | None, partition: int, offset: int) -> None:
        key = raw_key.decode("utf-8", "replace")
        if key.startswith(ARTIFACT):
            digest = key.removeprefix(ARTIFACT)
            self._newest = ("", b"")
            if value is None:
                self._places.pop(digest, None)
            else:
                self._places[digest] = (partition, offset)
                self._refused.discard(digest)
                self._newest = (digest, value)
            return
        if key.startswith((ALIAS, LOG)):
            try:
                self._ledger.note(value)
            except Untrusted as error:
                self._refuse(error, f"{self._settings.topic}[{partition}] offset {offset}")
        if key == f"{ALIAS}{CHAMPION}":
            digest = "" if value is None else digest_of(value)
            if value is not None and not digest:
                log.error("models: %s[%d] offset %d: not an alias; the model in force stays", self._settings.topic, partition, offset)
            elif self._trust.checks and digest and digest != self._ledger.target(CHAMPION) and digest != self._wanted:
                self._refuse(
                    Untrusted(f"alias champion to {digest[:16]} is not the newest signed decision"),
                    f"{self._settings.topic}[{partition}] offset {offset}",
                )
            self._wanted = digest or (None if value is None else self._wanted)

    def _candidates(self) -> list[str]:
        """Digests that should be in force, best first: the champion, and for a worker without any model the champions before it."""
        targets = self._ledger.targets(CHAMPION)
        named = self._ledger.target(CHAMPION) if self._trust.checks else self._wanted
        if not named:
            return []
        former = [decision.digest for decision in targets] if self._current is self._fallback else []
        return list(dict.fromkeys([named, *former]))[:FORMER]

    def _switch(self) -> None:
        for digest in self._candidates():
            if digest == self._current.digest:
                return
            if digest in self._refused or digest not in self._places:
                continue
            if missing := self._ledger.missing_approval(digest):
                if digest not in self._unapproved:
                    self._unapproved.add(digest)
                    self._refuse(Untrusted(missing), f"model {digest[:16]}")
                continue
            try:
                model = self._remember(digest)
            except ArtifactRejected as error:
                # Not tried again: the same bytes would fail again.
                self._refused.add(digest)
                self._refuse(error, f"model {digest[:16]}")
                continue
            except DependencyUnreachable as error:
                log.warning("models: %s; tried again", error)
                return
            self._current = model
            log.info("model %s (%s) in force from the next batch on", model.version, digest[:16])
            return

    def _refuse(self, error: ArtifactRejected, what: str) -> None:
        kind = "signature" if isinstance(error, Untrusted) else "artifact"
        self._metrics.rejected_models.labels(kind).inc()
        log.error("%s: refused, %s stays in force: %s", what, self._current.version or "the fallback", error)

    def _remember(self, digest: str) -> Model:
        model = self._loaded.get(digest)
        if model is None:
            envelope = self._trust.open(self._fetch(digest), digest)
            if self._examine is not None:
                self._examine(envelope)
            model = self._load(envelope)
            if model.digest != digest:
                raise ArtifactRejected(f"artifact/{digest[:16]} holds model {model.digest[:16]}")
        self._loaded.pop(digest, None)
        self._loaded[digest] = model  # the newest last
        for old in list(self._loaded)[:-KEPT]:
            if old != self._current.digest:
                self._loaded.pop(old, None)
        return model

    def _fetch(self, digest: str) -> bytes:
        newest, held = self._newest
        if newest == digest:
            return held
        s = self._settings
        partition, offset = self._places[digest]
        consumer = self._consumer()
        try:
            consumer.assign([TopicPartition(s.topic, partition, offset)])
            message = consumer.poll(s.timeout_s)
            if message is None or message.error() is not None:
                raise DependencyUnreachable(f"Kafka: {s.topic}[{partition}] offset {offset} could not be read within {s.timeout_s:g} s")
            value = message.value()
            if value is None or message.offset() != offset:
                raise ArtifactRejected(f"{s.topic}[{partition}] offset {offset}: the artifact was replaced meanwhile")
            return bytes(value)
        finally:
            consumer.close()
