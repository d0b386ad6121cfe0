"""The events every engine gets, the topics they lie on, and what our scores of them have to be."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from bench import generate
from features.catalog import N_FEATURES, NAMES
from features.facts import TOPICS
from features.history import Histories
from streams.settings import Settings
from streams.topics import ALERTS, DEAD_LETTERS, MODELS, SCORES, TABLE, client_config

PARTITIONS: Final = 4
CUSTOMERS: Final = 20_000
INPUTS: Final = generate.NAMES
OUTPUTS: Final = (SCORES, ALERTS, DEAD_LETTERS)
CHUNK: Final = 4_096
SAMPLE: Final = 60_000
"""Vectors a model is fitted on, as many as the peers' is."""
NOT_LOW: Final = 0.21
"""Share of the vectors above the medium threshold. With the scores that moved to another band a little more is explained."""

NEAREST: Final = tuple(
    NAMES.index(name)
    for name in (
        *(f"purchase_count_{w}" for w in ("24h", "7d", "30d")),
        *(f"spend_minor_sum_{w}" for w in ("24h", "7d", "30d")),
        *("spend_minor_mean_90d", "spend_minor_mean_life", "spend_trend_30d_90d"),
        *(f"login_count_{w}" for w in ("24h", "7d", "30d")),
        *("failed_login_count_1h", "failed_login_count_24h", "failed_login_share_7d"),
        *("ticket_count_7d", "ticket_count_30d"),
        *("purchase_age_days", "login_age_days", "ticket_age_days"),
        *("products_distinct_30d", "purchase_trend_30d_90d", "hour_sin", "hour_cos"),
    )
)
"""Our columns nearest to the peers' 24: counts, sums and means by window, failed log-ins, ages, products, shares, hour of day."""
assert len(set(NEAREST)) == 24


def events(count: int, seed: int, peers: Path | None) -> Iterator[tuple[int, str, bytes]]:
    """(topic index, customer, JSON) in arrival order: of the peers' generator, or of ours where there are no peers."""
    if peers is None:
        return generate.events(count, customers=CUSTOMERS, seed=seed)
    spec = importlib.util.spec_from_file_location("peers_generate", peers / "generate.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{peers / 'generate.py'}: not there; --peers names the directory of the peers")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ((topic, key.decode(), value) for topic, key, value, _ in module.generate(count, seed))


def index_of(event_id: str) -> int:
    """Place of an event in its stream: both generators number their events."""
    return int(event_id.rpartition("-")[2].lstrip("e"))


def create_topics(settings: Settings, names: Iterable[str]) -> None:
    """Make topics of the deployment anew, empty. Inputs keep the producer's times, as the peers' workload says; outputs the broker's."""
    from confluent_kafka.admin import AdminClient, NewTopic

    admin = AdminClient(client_config(settings))
    wanted = []
    for topic in TABLE:
        if topic.name in names:
            times = "CreateTime" if topic.name in TOPICS else "LogAppendTime"
            config = topic.config(settings.retention_days) | {"message.timestamp.type": times}
            wanted.append(NewTopic(settings.prefixed(topic.name), topic.partitions or settings.partitions, 1, config=config))
    remake(admin, wanted)


def remake(admin: Any, wanted: list[Any]) -> None:
    """Delete these topics where they are and create them."""
    names = {topic.topic for topic in wanted}
    delete(admin, names & admin.list_topics(timeout=20).topics.keys())
    for future in admin.create_topics(wanted, operation_timeout=20).values():
        future.result()
    _wait(lambda: names <= admin.list_topics(timeout=20).topics.keys(), "topics were made and are not there")


def delete(admin: Any, names: Iterable[str]) -> None:
    """Delete topics and wait until they are gone."""
    gone = list(names)
    if gone:
        for future in admin.delete_topics(gone, operation_timeout=20).values():
            future.result()
        _wait(lambda: not set(gone) & admin.list_topics(timeout=20).topics.keys(), "topics were deleted and are still there")


def _wait(done: Any, complaint: str) -> None:
    deadline = time.monotonic() + 20
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"Kafka: {complaint} after 20 s")
        time.sleep(0.05)


def preload(settings: Settings, count: int, seed: int, peers: Path | None) -> float:
    """Make all topics of the deployment and lay the backlog on them; returns seconds."""
    create_topics(settings, (*TOPICS, *OUTPUTS, MODELS))
    config = {**client_config(settings), "partitioner": "murmur2_random"}
    return generate.send(events(count, seed, peers), prefix=settings.topic_prefix, config=config)


@dataclass(frozen=True, slots=True)
class Replay:
    """A replay in arrival order, one thread, no Kafka: vectors float32 (events, N_FEATURES), and what the histories take in memory."""

    vectors: npt.NDArray[np.float32]
    customers: int
    bytes_in_memory: int

    def sample(self) -> npt.NDArray[np.float32]:
        """SAMPLE vectors from all over the stream."""
        rows = np.random.default_rng(11).choice(len(self.vectors), min(SAMPLE, len(self.vectors)), replace=False)
        return np.ascontiguousarray(self.vectors[np.sort(rows)])

    def scores(self, session: Any) -> npt.NDArray[np.float32]:
        """What a model scores each event, shape (events,)."""
        parts = range(0, len(self.vectors), CHUNK)
        return np.concatenate([session.probabilities(self.vectors[at : at + CHUNK]) for at in parts]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Message:
    """What the decoder asks of a message, made from an event that was never on a topic."""

    _key: bytes
    _value: bytes
    _offset: int

    def key(self) -> bytes:
        return self._key

    def value(self) -> bytes:
        return self._value

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return 0, -1


def replay(settings: Settings, count: int, seed: int, peers: Path | None) -> Replay:
    """Replay the stream as it arrived. Raises SystemExit when an event of it would not be scored."""
    from streams.codec import Decoder

    decoder = Decoder(
        currency=settings.currency,
        rates=settings.rates,
        future_ms=settings.future_allowance_ms,
        max_bytes=settings.max_event_bytes,
        digest_key=settings.digest_key.get_secret_value().encode(),
    )
    histories = Histories(create=True, max_facts=1 << 40)
    vectors = np.empty((count, N_FEATURES), np.float32)
    offsets = [0] * len(INPUTS)
    stream, done = events(count, seed, peers), 0
    while part := list(islice(stream, CHUNK)):
        places = [[i for i, (topic, _, _) in enumerate(part) if topic == index] for index in range(len(INPUTS))]
        customers = [key for _, key, _ in part]
        rows: list[npt.NDArray[np.int64]] = []
        for index, these in enumerate(places):
            messages = [_Message(part[i][1].encode(), part[i][2], offsets[index] + n) for n, i in enumerate(these)]
            offsets[index] += len(messages)
            found = decoder.decode(index, 0, messages)
            if found.reason.any():
                raise SystemExit(f"an event of {INPUTS[index]} is no valid one: {next(iter(found.detail.values()), '')}")
            rows.append(found.facts)
        order = np.argsort(np.concatenate([np.array(these, np.int64) for these in places]), kind="stable")
        step = histories.step(customers, np.concatenate(rows)[order])
        if len(step.rows) != len(part):
            raise SystemExit(f"{len(part) - len(step.rows)} events of the stream are duplicates or too late")
        vectors[done : done + len(part)] = step.vectors
        done += len(part)
    return Replay(vectors, len(histories), histories.nbytes)
