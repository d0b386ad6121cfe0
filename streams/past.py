"""A deployment's past opened for reading: its topics, models and rules; one partition, or all of them in processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from features.facts import TOPICS
from features.store import Offsets
from models.registry import Published
from models.registry import read as read_models
from proto.errors import ArtifactRejected, BadUsage, DependencyUnreachable
from scoring.fallback import Fallback
from scoring.reasons import Money
from scoring.scorer import load as load_model
from streams.codec import exponent_of
from streams.evaluate import Rules
from streams.feature_log import Logged
from streams.log import KafkaLog
from streams.metrics import Parts
from streams.rerun import Rerun, Span, Topics, base
from streams.scores import Model
from streams.settings import Settings
from streams.snapshot import Snapshots
from streams.topics import ALERTS, DEAD_LETTERS, FEATURES, MODELS, SCORES, client_config
from streams.training import decoder

T = TypeVar("T")


@dataclass(slots=True)
class Shelf:
    """Models ever published, by digest, loaded when first asked for; "" is the fallback."""

    published: Published
    money: Money
    fallback: Model
    _loaded: dict[str, Model] = field(default_factory=dict)

    def by_digest(self, digest: str) -> Model:
        """Raises ArtifactRejected for one that is not on the topic (any more)."""
        if not digest:
            return self.fallback
        if digest not in self._loaded:
            envelope = self.published.envelopes.get(digest)
            if envelope is None:
                raise ArtifactRejected(f"model {digest[:16]} is not on the model topic: publish it again (`churnstream models publish`)")
            self._loaded[digest] = load_model(envelope, money=self.money)
        return self._loaded[digest]

    def named(self, name: str) -> Model:
        """By alias, or by a digest shortened to 8 digits or more. Raises BadUsage when none or several are called so."""
        alias = self.published.aliases.get(name)
        found = [alias] if alias else [digest for digest in self.published.envelopes if len(name) >= 8 and digest.startswith(name)]
        if len(found) != 1:
            known = ", ".join([*self.published.aliases, *(digest[:12] for digest in self.published.envelopes)]) or "nothing"
            raise BadUsage(f"model {name}: {len(found)} on the topic are called so; there are {known}")
        return self.by_digest(found[0])


class Past:
    """What a deployment has read and written. `close` ends its clients."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        client = client_config(settings)
        prefixed = settings.prefixed
        self.topics = Topics(
            [prefixed(topic) for topic in TOPICS], prefixed(SCORES), prefixed(DEAD_LETTERS), prefixed(ALERTS), prefixed(FEATURES)
        )
        self.log = KafkaLog(client, timeout_s=settings.dependency_timeout_s)
        self.decoder = decoder(settings)
        self.snapshots = None if settings.snapshot_dir is None else Snapshots(settings.snapshot_dir, settings.namespace)
        self.rules = Rules(Fallback(settings.fallback_probability), settings.reasons_top, settings.alert_hysteresis)
        money = Money(settings.currency, exponent_of(settings.currency))
        published = read_models(client, prefixed(MODELS), timeout_s=settings.dependency_timeout_s)
        self.models = Shelf(published, money, self.rules.fallback)

    def rerun(
        self, partition: int, span: Span, *, applied: Offsets | None = None, recorded: bool = True, parts: Parts | None = None
    ) -> Rerun:
        """A partition to be told. Raises BadUsage when history before the span is gone."""
        begin = base(self.log, self.topics.inputs, partition, self.snapshots, span)
        return Rerun(self.log, self.topics, self.decoder, partition, span, begin, applied, recorded, Parts() if parts is None else parts)

    def logged(self, partition: int) -> Logged | None:
        """The feature log of a partition, None when there is no such topic."""
        with suppress(DependencyUnreachable):
            return Logged(self.log, self.topics.features, partition)
        return None

    def close(self) -> None:
        """Leave the broker."""
        self.log.close()


def opened(settings: Settings) -> Settings:
    """The settings with the address of Kafka in them, for other processes. Raises DependencyUnreachable when there is none."""
    return settings.model_copy(update={"kafka_bootstrap_servers": client_config(settings)["bootstrap.servers"]})


def partitions(settings: Settings) -> int:
    """How many partitions the inputs have. Raises DependencyUnreachable."""
    log = KafkaLog(client_config(settings), timeout_s=settings.dependency_timeout_s)
    try:
        return log.partitions(settings.prefixed(TOPICS[0]))
    finally:
        log.close()


def applied(settings: Settings, count: int) -> list[Offsets | None]:
    """Where each partition stands by the store, None for all when it does not answer.

    Ask before looking at the outputs: everything up to there has them.
    """
    from streams.stack import endpoints
    from streams.state_store import open_store

    try:
        store = open_store(settings, endpoints(settings).redis, patience_s=0)
        found: list[Offsets | None] = []
        for partition in range(count):
            claim = store.look(partition)
            found.append(None if claim.fresh or claim.rebuilding else {name: claim.applied.get(name, -1) for name in TOPICS})
        store.close()
    except DependencyUnreachable:
        return [None] * count
    return found


def each(work: Callable[..., T], arguments: Sequence[tuple[Any, ...]], processes: int) -> list[T]:
    """Results of `work(*arguments)` in order, in so many processes (0 = one per core). The same result however many there are."""
    processes = min(processes or os.cpu_count() or 1, len(arguments))
    if processes <= 1:
        return [work(*some) for some in arguments]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(work, *some) for some in arguments]
        return [future.result() for future in futures]
