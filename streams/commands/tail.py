"""`churnstream tail`: the last scores, and those that come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from confluent_kafka import Consumer

    from streams.settings import Settings

app = typer.Typer()
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line; with --follow one per score.")]

FIRST_LOOK = 1_000
"""Records of a partition looked at first, counted from its end; ten times as many when that was not enough."""


@app.command(epilog="Example: churnstream tail --customer 12345 --count 3")
def tail(
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="Scores to show.")] = 10,
    customer: Annotated[str | None, typer.Option(metavar="ID", help="Only this customer's.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="All since then (RFC 3339 or a day) instead of a count.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones until Ctrl-C.")] = False,
    json_output: Json = False,
) -> None:
    """The last scores on churn-scores, oldest first."""
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.settings import load

    settings = load()
    console = Console(json_output=json_output and not follow)
    reader = Reader(settings, customer)
    since_ms = instant(since, "--since")
    scores = reader.last(count) if since_ms is None else reader.since(since_ms)
    for score in scores:
        _say(console, score, as_json=json_output and follow)
    if follow:
        for score in reader.coming():
            _say(console, score, as_json=json_output)
    reader.close()
    console.result({"scores": scores, "count": len(scores)})


def _say(console: Any, score: dict[str, Any], *, as_json: bool) -> None:
    import json

    if as_json:
        print(json.dumps(score, ensure_ascii=False), flush=True)
        return
    from datetime import UTC, datetime

    at = datetime.fromtimestamp(score["at"] / 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    reasons = "; ".join(reason["text"] for reason in score["reasons"])
    marks = "".join(f" [{mark}]" for mark in ("late", "fallback") if score[mark])
    console.say(f"{at}  {score['customer_id']:<16} {score['probability']:.4f} {score['band']:<7}{marks} {reasons}".rstrip())


class Reader:
    """Reads the score topic without a group. customer: only this one's records; they lie in one partition."""

    def __init__(self, settings: Settings, customer: str | None) -> None:
        from confluent_kafka import Consumer

        from streams.partitioner import partition_of
        from streams.topics import SCORES, client_config

        self._topic = settings.prefixed(SCORES)
        self._key = None if customer is None else customer.encode()
        self._timeout_s = settings.dependency_timeout_s
        self._consumer: Consumer = Consumer(
            {**client_config(settings), "group.id": "tail", "enable.auto.commit": False, "enable.partition.eof": True}
        )
        partitions = self._partitions()
        self._chosen = partitions if customer is None else [partition_of(customer, len(partitions))]

    def last(self, count: int) -> list[dict[str, Any]]:
        """The last `count` scores by append time; the consumer then stands at the end."""
        found: list[tuple[int, int, int, dict[str, Any]]] = []
        for partition in self._chosen:
            found += self._last_of(partition, count)
        self._assign({partition: end for partition, (_, end) in self._ends.items()})
        return [score for *_, score in sorted(found, key=lambda row: row[:3])[len(found) - min(count, len(found)) :]]

    def since(self, at_ms: int) -> list[dict[str, Any]]:
        """All scores written at or after this instant, by append time; the consumer then stands at the end."""
        from confluent_kafka import TopicPartition

        asked = [TopicPartition(self._topic, partition, at_ms) for partition in self._chosen]
        found: list[tuple[int, int, int, dict[str, Any]]] = []
        for place in self._consumer.offsets_for_times(asked, timeout=self._timeout_s):
            end = self._ends[place.partition][1]
            if 0 <= place.offset < end:
                self._assign({place.partition: place.offset})
                found += self._until(place.partition, end)
        self._assign({partition: self._ends[partition][1] for partition in self._chosen})
        return [score for *_, score in sorted(found, key=lambda row: row[:3])]

    def coming(self) -> Iterator[dict[str, Any]]:
        """Scores from the end on, without an end of its own."""
        while True:
            message = self._consumer.poll(0.5)
            if message is not None and message.error() is None and self._wanted(message):
                yield _body(message)

    def close(self) -> None:
        """Leave the broker."""
        self._consumer.close()

    def _partitions(self) -> list[int]:
        from confluent_kafka import KafkaException, TopicPartition

        from proto.errors import DependencyUnreachable

        try:
            known = self._consumer.list_topics(self._topic, timeout=self._timeout_s).topics[self._topic]
            if known.error is not None:
                raise DependencyUnreachable(f"Kafka: topic {self._topic}: {known.error.str()}; run `churnstream topics create`")
            self._ends = {
                partition: self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=self._timeout_s)
                for partition in known.partitions
            }
        except KafkaException as error:
            raise DependencyUnreachable(f"Kafka: {error.args[0].str()}") from error
        return sorted(self._ends)

    def _last_of(self, partition: int, count: int) -> list[tuple[int, int, int, dict[str, Any]]]:
        low, end = self._ends[partition]
        look = max(FIRST_LOOK, count)
        while True:
            start = max(low, end - look)
            rows = []
            if count and start < end:
                self._assign({partition: start})
                rows = list(self._until(partition, end))[-count:]
            if len(rows) >= count or start <= low:
                return rows
            look *= 10

    def _until(self, partition: int, end: int) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
        from confluent_kafka import KafkaError

        from proto.errors import DependencyUnreachable

        while True:
            # poll returns with the first message; consume would wait for all it may bring.
            first = self._consumer.poll(self._timeout_s)
            if first is None:
                raise DependencyUnreachable(f"Kafka: {self._topic}[{partition}] could not be read within {self._timeout_s:g} s")
            for message in (first, *self._consumer.consume(1_000, 0)):
                error = message.error()
                if error is not None:
                    if error.code() == KafkaError._PARTITION_EOF:
                        return
                    raise DependencyUnreachable(f"Kafka: {error.str()}")
                offset = message.offset() or 0
                if self._wanted(message):
                    yield message.timestamp()[1], partition, offset, _body(message)
                if offset >= end - 1:
                    return

    def _wanted(self, message: Any) -> bool:
        return self._key is None or message.key() == self._key

    def _assign(self, starts: dict[int, int]) -> None:
        from confluent_kafka import TopicPartition

        self._consumer.assign([TopicPartition(self._topic, partition, start) for partition, start in starts.items()])


def _body(message: Any) -> dict[str, Any]:
    import orjson

    body: dict[str, Any] = orjson.loads(message.value())
    return body
