"""What the pinned Faust and aiokafka do that this design steps around; a test that fails here says that an upgrade changed it.

Then read docs/decisions/faust-shell.md anew before the upgrade is taken: a finding that is gone may free the design, and the feeder
(streams/agents.py) rests on some of them. Most of it runs on prepared state of the real objects, without a broker; the rest on real Kafka.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import version
from typing import Any

import faust
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from faust.events import Event
from faust.types import TP
from faust.types.tuples import ConsumerMessage

from streams.settings import Settings
from streams.topics import client_config

TOPIC = TP("finding", 0)


def test_these_are_the_versions_the_findings_are_of() -> None:
    assert version("faust-streaming") == "0.15.3"
    assert version("aiokafka") == "0.14.0"


def new_app(**settings: Any) -> faust.App:
    return faust.App("findings", broker="kafka://127.0.0.1:1", store="memory://", web_enabled=False, **settings)


# --- commits


async def committable(*, committed: int | None, acked: list[int], gap: tuple[int, int] | None = None) -> int | None:
    """The offset Faust's own consumer would commit with this past. gap: as the fetch loop notes one, before the acknowledgements."""
    with consumer_of(new_app()) as consumer:
        consumer._committed_offset[TOPIC] = committed
        if gap is not None:
            await consumer._add_gap(TOPIC, *gap)
        consumer._acked[TOPIC] = acked
        found: dict[TP, int] = consumer._filter_committable_offsets({TOPIC})
        return found.get(TOPIC)


@contextmanager
def consumer_of(app: faust.App) -> Iterator[Any]:
    """The app's consumer, never started; the loop of its thread is closed in the end."""
    consumer: Any = app.consumer
    try:
        yield consumer
    finally:
        consumer._thread.thread_loop.close()


def test_a_commit_passes_over_the_event_behind_the_committed_offset_while_it_is_in_work() -> None:
    # 2585 is in work, those behind it are done: 2590 says that 2585 is done too.
    assert asyncio.run(committable(committed=2585, acked=[2586, 2587, 2588, 2589])) == 2590


def test_a_new_group_commits_past_everything_in_work() -> None:
    assert asyncio.run(committable(committed=None, acked=[50, 51])) == 52  # 0..49 are in work


def test_a_hole_in_the_offsets_is_noted_one_too_long() -> None:
    # 11 is the mark of a transaction, so 12 comes after 10. 12 is in work; 14 says it is done.
    assert asyncio.run(committable(committed=10, acked=[10, 13], gap=(11, 12))) == 14


def test_what_the_broker_refused_counts_as_committed() -> None:
    async def refused() -> tuple[bool, int]:
        app = new_app()
        with consumer_of(app) as consumer:
            consumer._acked[TOPIC] = [0, 1, 2]
            consumer._commit = _answer(False)
            consumer.assignment = lambda: {TOPIC}
            app.producer.flush = _answer(None)  # type: ignore[method-assign]  # there is nothing to flush to
            return await consumer._commit_tps({TOPIC}, start_new_transaction=False), consumer._committed_offset[TOPIC]

    assert asyncio.run(refused()) == (False, 3)


def _answer(value: Any) -> Any:
    async def answer(*_: Any) -> Any:
        return value

    return answer


# --- acknowledgements


class AgentFails(Exception):
    """What the loop over the values comes to."""


async def failing(read: Callable[[Any], Any], **settings: Any) -> list[int]:
    """Let an agent's loop over five events of a stream fail at its first value; the offsets Faust may commit then."""
    app = new_app(**settings)
    topics: Any = app.topics
    topics._acking_topics.add(TOPIC.topic)
    with consumer_of(app) as consumer:
        stream: Any = app.stream(app.channel())
        app.flow_control.resume()
        for offset in range(5):
            message = ConsumerMessage(TOPIC.topic, 0, offset, 0.0, 0, {}, None, b"", None, generation_id=app.consumer_generation_id)
            message.incref()
            await stream.channel.put(Event(app, None, offset, {}, message))
        values = read(stream)
        with suppress(AgentFails):
            async for _ in values:
                raise AgentFails
        await values.aclose()  # as the interpreter does once the failed agent is gone
        await stream.stop()
        return sorted(consumer._acked[TOPIC])


def test_take_acknowledges_its_whole_buffer_when_the_agent_fails() -> None:
    assert asyncio.run(failing(lambda stream: stream.take(5, within=10))) == [0, 1, 2, 3, 4]
    assert asyncio.run(failing(lambda stream: stream.take_events(5, within=10))) == [0, 1, 2, 3, 4]


def test_noack_take_acknowledges_nothing() -> None:
    assert asyncio.run(failing(lambda stream: stream.noack_take(5, within=10))) == []


@pytest.mark.parametrize("settings", [{}, {"stream_ack_exceptions": True}, {"stream_ack_exceptions": False}])
def test_an_ordinary_loop_acknowledges_the_event_it_failed_on_whatever_the_setting_says(settings: dict[str, bool]) -> None:
    assert asyncio.run(failing(lambda stream: stream.__aiter__(), **settings)) == [0]


# --- channels


def test_a_rebalance_of_its_own_consumer_empties_the_channels() -> None:
    async def left() -> tuple[int, int]:
        app = new_app()
        with consumer_of(app) as consumer:
            subscriber: Any = app.channel().__aiter__()
            app.flow_control.resume()
            for number in range(64):
                await subscriber.put(number)
            before = subscriber.queue.qsize()
            consumer.assignment = lambda: {TOPIC}
            consumer.wait_empty = _answer(None)
            app.producer.flush = _answer(None)  # type: ignore[method-assign]  # there is nothing to flush to
            await app._on_partitions_revoked({TOPIC})
            return before, subscriber.queue.qsize()

    assert asyncio.run(left()) == (64, 0)


def test_emptying_a_queue_cancels_the_put_that_waits_for_room() -> None:
    """Why the feeder puts only into an empty queue."""

    async def cancelled() -> bool:
        app = new_app()
        queue = app.FlowControlQueue(maxsize=1, clear_on_resume=True)
        app.flow_control.resume()
        await queue.put(1)
        waiting = asyncio.ensure_future(queue.put(2))
        await asyncio.sleep(0)  # the task begins
        app.flow_control.clear()
        await asyncio.wait([waiting], timeout=5)
        return waiting.cancelled()

    assert asyncio.run(cancelled())


def test_an_event_of_another_generation_is_skipped_without_a_word_and_a_plain_value_is_not() -> None:
    """Why the feeder sends plain values."""

    async def seen() -> list[Any]:
        app = new_app()
        with consumer_of(app):
            stream: Any = app.stream(app.channel())
            app.flow_control.resume()
            app.consumer_generation_id = 7
            for generation in (6, 7):
                message = ConsumerMessage(TOPIC.topic, 0, generation, 0.0, 0, {}, None, b"", None, generation_id=generation)
                await stream.channel.put(Event(app, None, f"event of generation {generation}", {}, message))
            await stream.channel.put("plain")
            values = stream.__aiter__()
            found = [await values.__anext__() for _ in range(2)]
            await values.aclose()
            await stream.stop()
            return found

    assert asyncio.run(seen()) == ["event of generation 7", "plain"]


# --- producers and transactions


def test_its_producer_is_not_idempotent_unless_it_is_transactional() -> None:
    async def settings(in_transaction: bool) -> Any:
        app = new_app()
        app.in_transaction = in_transaction
        producer: Any = app.producer
        return producer._settings_extra()

    assert asyncio.run(settings(False)) == {}
    assert asyncio.run(settings(True)) == {"acks": "all", "enable_idempotence": True}


def test_offsets_in_a_transaction_carry_no_member_and_no_generation() -> None:
    """So a broker cannot fence a member that was thrown out of its group (KIP-447)."""
    protocol: Any = import_module("aiokafka.protocol.transaction")
    (only,) = protocol.TxnOffsetCommitRequest._CLASSES
    assert list(only.SCHEMA.names) == ["transactional_id", "group_id", "producer_id", "producer_epoch", "topics"]


# --- on a real Kafka


@pytest.mark.servers
@pytest.mark.slow
def test_what_was_not_done_is_committed(settings: Settings) -> None:
    """Three agents of one app: one of concurrency 2 with an event in work, one that fails on an event, one whose event does not decode."""
    names = [settings.prefixed(name) for name in ("in-work", "failing", "undecodable")]
    client = client_config(settings)
    admin = AdminClient(client)
    for future in admin.create_topics([NewTopic(name, 1, 1) for name in names]).values():
        future.result(20)
    producer = Producer(client)
    for name in names:
        for number in range(6):
            undecodable = name == names[2] and number == 3
            producer.produce(name, b"{" if undecodable else b"%d" % number, partition=0)
    assert producer.flush(20) == 0
    seen: dict[str, list[int]] = {name: [] for name in names}

    async def work() -> dict[str, int]:
        app = faust.App(
            f"{settings.topic_prefix}findings",
            broker=f"kafka://{settings.kafka_bootstrap_servers}",
            store="memory://",
            web_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            stream_wait_empty=False,
            autodiscover=False,
            broker_commit_interval=0.1,
            consumer_auto_offset_reset="earliest",
        )
        held = asyncio.Event()

        @app.agent(app.topic(names[0], value_serializer="json"), concurrency=2)
        async def in_work(numbers: Any) -> None:
            async for number in numbers:
                if number == 1:
                    await held.wait()
                seen[names[0]].append(number)

        @app.agent(app.topic(names[1], value_serializer="json"))
        async def failing(numbers: Any) -> None:
            async for number in numbers:
                if number == 2:
                    raise ValueError("this one fails")
                seen[names[1]].append(number)

        @app.agent(app.topic(names[2], value_serializer="json"))
        async def undecodable(numbers: Any) -> None:
            async for number in numbers:
                seen[names[2]].append(number)

        await app.start()
        group = str(app.conf.id)
        found: dict[str, int] = {}
        end = asyncio.get_running_loop().time() + 40
        while (set(found) != set(names) or min(found.values()) < 6) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.2)
            offsets = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)])[group].result(10)
            found = {tp.topic: tp.offset for tp in offsets.topic_partitions or []}
        await app.stop()
        return found

    assert asyncio.run(work()) == dict.fromkeys(names, 6)
    assert sorted(seen[names[0]]) == [0, 2, 3, 4, 5]  # 1 was in work all the time: after a kill nobody would do it
    assert seen[names[1]] == [0, 1, 3, 4, 5]  # the agent was started again behind it
    assert seen[names[2]] == [0, 1, 2, 4, 5]
