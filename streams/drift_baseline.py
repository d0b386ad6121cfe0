"""The drift baseline of a deployment, made from its own topics: what scores, features and raw records are like in a quiet stretch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from drift.baseline import fit
from drift.budget import Budget
from drift.quality import Normal, Vocabulary, Watch, normal
from drift.report import Report, compare
from drift.series import MONDAY_MS, Tally, edges_of
from drift.sources import FEATURES, SCORE, WATCHED
from features.facts import TIME, TOPICS
from features.window import DAY_MS, HOUR_MS
from proto.errors import BadInput, BadUsage, DependencyUnreachable
from streams.codec import RawMessage
from streams.drift_state import BASELINE, latest
from streams.drifting import Reference, Segments, _Score, chosen, numbers
from streams.feature_log import Vectors, once, read
from streams.log import KafkaLog
from streams.settings import Settings
from streams.topics import DRIFT, DRIFT_STATE, client_config, producer_config
from streams.topics import FEATURES as FEATURE_TOPIC
from streams.topics import SCORES as SCORE_TOPIC
from streams.training import decoder

SEGMENTS: Final = 6
"""Most segments watched apart: the largest."""
SAMPLE: Final = 200_000
"""Values from which the edges of the bins are taken."""
IntArray = npt.NDArray[np.int64]


def make(settings: Settings, *, from_ms: int | None, to_ms: int | None, days: int, share: float) -> Reference:
    """From what the topics hold of [from_ms, to_ms), the last `days` by default; share: of customers looked at.

    Raises BadInput when there are too few days or scores.
    """
    source = KafkaLog(client_config(settings), timeout_s=settings.dependency_timeout_s)
    try:
        return _make(settings, source, from_ms, to_ms, days, share)
    finally:
        source.close()


def _make(settings: Settings, source: KafkaLog, from_ms: int | None, to_ms: int | None, days: int, share: float) -> Reference:
    inputs = [settings.prefixed(topic) for topic in TOPICS]
    _, customers, at, probability = _scores(source, settings.prefixed(SCORE_TOPIC), share)
    if not len(at):
        raise BadInput("no score by a model on the topic yet: nothing to make a drift baseline from")
    until = int(at.max()) // HOUR_MS * HOUR_MS if to_ms is None else to_ms
    since = until - days * DAY_MS if from_ms is None else from_ms
    since = since // HOUR_MS * HOUR_MS

    segments = _segments(source, inputs[-1], settings.drift_segment)
    g = len(segments.names)
    inside = (at >= since) & (at < until)
    names = [name for name, wanted in zip(customers, inside.tolist(), strict=True) if wanted]
    score_edges = edges_of(probability[inside][:, None])
    tallies = [Tally.of(score_edges, g, HOUR_MS)]
    tallies[0].add(at[inside], probability[inside][:, None], segments.of(names), numbers(names))
    edges = [score_edges]
    if (feature_edges := _feature_edges(source, settings.prefixed(FEATURE_TOPIC), share, since, until)) is not None:
        edges.append(feature_edges)
        tallies.append(Tally.of(feature_edges, g, HOUR_MS))
        for vectors in _features(source, settings.prefixed(FEATURE_TOPIC), share, since, until):
            who = vectors.customers
            x = np.ascontiguousarray(vectors.columns["vector"])[:, WATCHED]
            tallies[1].add(vectors.columns["at"].astype(np.int64), x, segments.of(who), numbers(who))
    closed = [dict(tally.close(2**62)) for tally in tallies]
    starts = sorted(set().union(*closed))
    blank = [np.zeros((len(edge), g + 1, 12), np.int64) for edge in edges]
    counts = np.array([np.concatenate([part.get(start, none) for part, none in zip(closed, blank, strict=True)]) for start in starts])
    series = (SCORE, *FEATURES) if len(edges) > 1 else (SCORE,)
    base = fit(series, segments.names, np.concatenate(edges), np.array(starts, np.int64), counts)
    usual = _normal(settings, source, inputs, segments, share, since, until, base.block_ms)
    return Reference(base, usual, settings.drift_segment, share)


def recent(settings: Settings, *, days: int) -> Report:
    """The last `days` against the published baseline: a row per score by a model, with its vector where it was logged.

    Raises BadUsage without a baseline, BadInput without scores.
    """
    source = KafkaLog(client_config(settings), timeout_s=settings.dependency_timeout_s)
    try:
        stored = latest(source, settings.prefixed(DRIFT_STATE))
        if BASELINE not in stored:
            raise BadUsage("there is no drift baseline yet; make one with `churnstream drift baseline`")
        reference = Reference.from_bytes(stored[BASELINE])
        places, customers, at, probability = _scores(source, settings.prefixed(SCORE_TOPIC), reference.share)
        if not len(at):
            raise BadInput("no score by a model on the topic yet: nothing to report")
        since = int(at.max()) + 1 - days * DAY_MS
        segments = Segments(reference.segment_field, reference.baseline.segments)
        for _, messages in _messages(source, settings.prefixed(TOPICS[-1])):
            segments.learn(messages)
        row = {place: i for i, (place, when) in enumerate(zip(places, at.tolist(), strict=True)) if when >= since}
        rows = np.array(list(row.values()))
        values = np.full((len(at), len(reference.baseline.series)), np.nan)
        values[:, 0] = probability
        if reference.features:
            for part in _features(source, settings.prefixed(FEATURE_TOPIC), reference.share, since, 2**62):
                c = part.columns
                where = zip(c["topic"].tolist(), c["partition"].tolist(), c["offset"].tolist(), strict=True)
                known = np.array([row.get((TOPICS[topic], partition, offset), -1) for topic, partition, offset in where])
                values[known[known >= 0], 1:] = c["vector"][known >= 0][:, WATCHED]
        who = segments.of([customers[i] for i in rows.tolist()])
        verdicts = [
            orjson.loads(message.value() or b"{}") for _, messages in _messages(source, settings.prefixed(DRIFT)) for message in messages
        ]
        return compare(reference.baseline, at[rows], values[rows], who, verdicts=verdicts, budget=Budget(settings.drift_pages))
    finally:
        source.close()


def publish(settings: Settings, reference: Reference) -> None:
    """Put the baseline where the watch finds it; its detectors begin anew. Returns when the broker has it."""
    from confluent_kafka import KafkaException, Producer

    producer = Producer({**producer_config(settings), "compression.type": "none"})
    topic = settings.prefixed(DRIFT_STATE)
    failed: list[Any] = []
    producer.produce(topic, reference.to_bytes(), BASELINE, 0, on_delivery=lambda error, _: failed.append(error) if error else None)
    try:
        left = producer.flush(settings.dependency_timeout_s)
    except KafkaException as error:
        raise DependencyUnreachable(f"Kafka: {topic}: {error.args[0].str()}") from error
    if left or failed:
        raise DependencyUnreachable(f"Kafka: {topic}: the baseline was not taken ({failed[0].str() if failed else 'no answer'})")


def _messages(source: KafkaLog, topic: str) -> Iterator[tuple[int, list[RawMessage]]]:
    for partition in range(source.partitions(topic)):
        low, high = source.ends(topic, partition)
        for messages in source.read(topic, partition, low, high):
            yield partition, messages


Place = tuple[str, int, int]
"""Topic (without prefix), partition and offset of the event a score is of."""


def _scores(source: KafkaLog, topic: str, share: float) -> tuple[list[Place], list[str], IntArray, npt.NDArray[np.float64]]:
    """Places, customers, instants and probabilities of the scores by a model; of repeated ones the first."""
    decode = msgspec.json.Decoder(_Score).decode
    found: dict[Place, tuple[str, int, float]] = {}
    for partition, messages in _messages(source, topic):
        for message in messages:
            if chosen(message.key(), share):
                score = decode(message.value() or b"")
                if not score.fallback:
                    found.setdefault((score.source.topic, partition, score.source.offset), (score.customer_id, score.at, score.probability))
    rows = list(found.values())
    return (
        list(found),
        [row[0] for row in rows],
        np.array([row[1] for row in rows], np.int64),
        np.array([row[2] for row in rows], np.float64),
    )


def _segments(source: KafkaLog, topic: str, field: str) -> Segments:
    """The largest values of the profile field, and who is in them."""
    newest: dict[str, str] = {}
    for _, messages in _messages(source, topic):
        for message in messages:
            try:
                profile = orjson.loads(message.value() or b"")
                name, customer = profile.get(field), profile.get("customer_id")
            except (ValueError, AttributeError):
                continue
            if isinstance(name, str) and isinstance(customer, str):
                newest[customer] = name
    names = tuple(sorted(name for name, _ in Counter(newest.values()).most_common(SEGMENTS)))
    return Segments(field, names, {customer: names.index(name) + 1 for customer, name in newest.items() if name in names})


def _features(source: KafkaLog, topic: str, share: float, since: int, until: int) -> Iterator[Vectors]:
    for partition in range(source.partitions(topic)):
        low, high = source.ends(topic, partition)
        for piece in once(read(messages) for messages in source.read(topic, partition, low, high)):
            at = piece.columns["at"]
            wanted = (at >= since) & (at < until) & np.array([chosen(name.encode(), share) for name in piece.customers], np.bool_)
            if wanted.any():
                names = [name for name, mine in zip(piece.customers, wanted.tolist(), strict=True) if mine]
                yield Vectors(names, piece.columns[wanted])


def _feature_edges(source: KafkaLog, topic: str, share: float, since: int, until: int) -> npt.NDArray[np.float64] | None:
    """Edges of the watched features; None where they are not logged."""
    try:
        partitions = range(source.partitions(topic))
    except DependencyUnreachable:
        return None
    total = sum(high - low for low, high in (source.ends(topic, partition) for partition in partitions))
    every = max(1, total // SAMPLE)
    parts = [vectors.columns["vector"][::every][:, WATCHED] for vectors in _features(source, topic, share, since, until)]
    return edges_of(np.concatenate(parts)) if parts else None


def _normal(
    settings: Settings, source: KafkaLog, inputs: list[str], segments: Segments, share: float, since: int, until: int, block_ms: int
) -> Normal:
    """The raw records of the stretch."""
    codec = decoder(settings)
    kept: list[IntArray] = []
    who: list[str] = []
    refused: Counter[tuple[int, bool]] = Counter()
    gaps = np.zeros(len(TOPICS))
    for topic, name in enumerate(inputs):
        seen: set[int] = set()
        times = []
        for partition, messages in _messages(source, name):
            mine = [message for message in messages if chosen(message.key(), share)]
            records = codec.decode(topic, partition, mine)
            when = records.facts[:, TIME]
            good = (records.reason == 0) & (when >= since) & (when < until)
            # The instant of what cannot be read is not known: all of the topic, spread over the stretch.
            refused[topic, True] += int((records.reason != 0).sum())
            for i in np.flatnonzero(good).tolist():
                number = int(records.facts[i, -1])
                if number in seen:
                    refused[topic, False] += 1
                else:
                    seen.add(number)
                    kept.append(records.facts[i])
                    who.append(records.customer[i])
                    times.append(int(when[i]))
        gaps[topic] = np.diff(np.sort(times)).max(initial=0) if len(times) > 1 else 0
    facts = np.array(kept, np.int64).reshape(-1, 10)
    words = Vocabulary.of(facts)
    counting = Watch(Normal.blank(block_ms, words, segments.names))
    for start in range(0, len(facts), 100_000):
        counting.add(facts[start : start + 100_000], segments.of(who[start : start + 100_000]))
    blocks = sorted(counting.blocks.items())
    if not blocks:
        raise BadInput("the inputs hold no record of that stretch: nothing to make a drift baseline from")
    for (topic, broken), n in refused.items():
        share_of = n // len(blocks)
        for i, (_, counters) in enumerate(blocks):
            target = counters.broken if broken else counters.duplicates
            target[topic] += share_of + (i < n % len(blocks))
    dated = [(block * block_ms + MONDAY_MS, counters) for block, counters in blocks]
    return normal(dated, block_ms, gaps, words, segments.names, Budget(settings.drift_pages))
