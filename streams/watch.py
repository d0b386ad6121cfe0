"""The score topic followed for those who watch: one consumer for all of them, a bounded queue for each."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson
from confluent_kafka import Consumer, KafkaException, TopicPartition

from proto.churn.v1 import churn_pb2 as pb
from proto.errors import DependencyUnreachable
from proto.scores import BANDS
from streams.refusal import Code, Refusal, wrong

log = logging.getLogger(__name__)

QUEUED: Final = 1_000
"""Scores that wait for a slow reader; older ones are left out then, and counted."""
MOST_WATCHERS: Final = 100
_BANDS: Final[Mapping[str, int]] = {name: 1 + code for code, name in enumerate(BANDS)}


@dataclass(slots=True, eq=False)
class _Watcher:
    wanted: Callable[[Mapping[str, Any]], bool]
    loop: asyncio.AbstractEventLoop
    queue: deque[Mapping[str, Any]] = field(default_factory=deque)
    skipped: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class Watch:
    """Reads scores while somebody watches. client: settings of a Kafka client; topic: full name of the scores."""

    def __init__(self, client: Mapping[str, Any], topic: str, timeout_s: float) -> None:
        self._client, self._topic, self._timeout_s = client, topic, timeout_s
        self._watchers: set[_Watcher] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._ready = threading.Event()
        self._failure: Exception | None = None
        self.partitions = 0

    def scores(self, request: pb.WatchScoresRequest) -> AsyncIterator[pb.WatchScoresResponse]:
        """Scores from now on that meet the request, without an end. Raises Refusal, and DependencyUnreachable while it is read."""
        return self._scores(_Watcher(_filter(request), asyncio.get_running_loop()))

    async def _scores(self, watcher: _Watcher) -> AsyncIterator[pb.WatchScoresResponse]:
        with self._lock:
            if len(self._watchers) >= MOST_WATCHERS:
                raise Refusal(Code.RESOURCE_EXHAUSTED, "WATCHERS", f"{MOST_WATCHERS} watch already")
            self._watchers.add(watcher)
            self._begin()
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._ready.wait, self._timeout_s)
            while True:
                if self._failure is not None:
                    raise DependencyUnreachable(f"Kafka: {self._topic}: {self._failure}")
                while watcher.queue:
                    score = watcher.queue.popleft()
                    skipped, watcher.skipped = watcher.skipped, 0
                    yield _response(score, skipped)
                watcher.wake.clear()
                if not watcher.queue:
                    await watcher.wake.wait()
        finally:
            with self._lock:
                self._watchers.discard(watcher)

    def close(self) -> None:
        """Stop reading."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def _begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._failure = None
            self._ready.clear()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            self._follow()
        except Exception as error:  # whatever the client raises: every watcher is told
            log.warning("scores cannot be followed: %s", error)
            self._failure = error
            with self._lock:
                for watcher in self._watchers:
                    watcher.loop.call_soon_threadsafe(watcher.wake.set)
        self._ready.set()

    def _follow(self) -> None:
        consumer = Consumer({**self._client, "group.id": "watch", "enable.auto.commit": False, "fetch.wait.max.ms": 50}, logger=log)
        try:
            try:
                known = consumer.list_topics(self._topic, timeout=self._timeout_s).topics[self._topic]
                if known.error is not None:
                    raise DependencyUnreachable(known.error.str())
                places = [TopicPartition(self._topic, partition) for partition in known.partitions]
                for place in places:
                    place.offset = consumer.get_watermark_offsets(place, timeout=self._timeout_s)[1]
            except KafkaException as error:
                raise DependencyUnreachable(error.args[0].str()) from error
            consumer.assign(places)
            self._ready.set()
            while not self._ended.is_set():
                first = consumer.poll(0.25)
                with self._lock:
                    watchers = list(self._watchers)
                    if not watchers:
                        self._thread = None
                        return
                if first is None:
                    continue
                for message in (first, *consumer.consume(500, 0)):
                    if message.error() is None:
                        self._tell(watchers, orjson.loads(message.value() or b"{}"))
        finally:
            consumer.close()

    def _tell(self, watchers: list[_Watcher], score: Mapping[str, Any]) -> None:
        for watcher in watchers:
            if watcher.wanted(score):
                if len(watcher.queue) >= QUEUED:
                    watcher.queue.popleft()
                    watcher.skipped += 1
                watcher.queue.append(score)
                if not watcher.loop.is_closed():
                    watcher.loop.call_soon_threadsafe(watcher.wake.set)


def _filter(request: pb.WatchScoresRequest) -> Callable[[Mapping[str, Any]], bool]:
    bands = frozenset(request.bands)
    if not bands <= set(_BANDS.values()):
        raise wrong("bands", "needs unknown, low, medium or high")
    least = request.min_probability if request.HasField("min_probability") else -1.0
    customers = frozenset(request.customer_ids)

    def wanted(score: Mapping[str, Any]) -> bool:
        return (
            (not bands or _BANDS[score["band"]] in bands)
            and score["probability"] >= least
            and (not customers or score["customer_id"] in customers)
        )

    return wanted


def _response(score: Mapping[str, Any], skipped: int) -> pb.WatchScoresResponse:
    return pb.WatchScoresResponse(
        score_id=score["score_id"],
        customer_id=score["customer_id"],
        at_ms=score["at"],
        scored_at_ms=score["scored_at"],
        probability=score["probability"],
        band=_BANDS[score["band"]],  # type: ignore[arg-type]  # the number of the enum
        alert_band=_BANDS[score["alert_band"]],  # type: ignore[arg-type]  # as above
        late=score["late"],
        fallback=score["fallback"],
        reasons=[
            pb.Contribution(
                feature=reason["feature"],
                value=reason["value"],
                contribution=reason["contribution"],
                text=reason["text"],
                raises=reason["contribution"] > 0,
            )
            for reason in score["reasons"]
        ],
        model=pb.Model(
            name=score["model_name"],
            version=score["model_version"],
            digest=score["model_digest"],
            threshold_version=score["threshold_version"],
            layout_hash=score["layout_hash"],
        ),
        skipped=skipped,
    )
