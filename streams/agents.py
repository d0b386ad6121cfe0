"""The Faust app of a worker: one agent scores merged batches that a service feeds it, one item at a time."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import faust
from faust.auth import SASLCredentials, SSLCredentials
from faust.types.auth import CredentialsT, SASLMechanism
from faust.types.streams import StreamT
from mode import Service

from proto.errors import BadUsage, InvariantBroken
from streams.engine import Result
from streams.merge import Batch

log = logging.getLogger(__name__)

LOOK_S: Final = 0.05
"""How long an item may lie untaken before its queue is looked at."""
WAKE_S: Final = 0.2
"""How often an idle feeder looks around."""


@dataclass(slots=True, eq=False)
class Item:
    """What goes through the channel: batches of different partitions, and the futures that say how far it is."""

    number: int
    batches: list[Batch]
    taken: asyncio.Future[None]
    result: asyncio.Future[Result]


@dataclass(slots=True)
class Progress:
    """How the feeding goes; times of the loop's monotonic clock in seconds."""

    items: int = 0
    resent: int = 0  # items cleared from the channel before the agent took them, and sent again
    repeats: int = 0  # items the agent refused because it had begun them
    paused: str = ""  # why nothing is taken any more
    idle_since: float | None = None
    failure: BaseException | None = None


class Feeder(Service):
    """Takes merged batches from `take`, sends them to the agent one item at a time and waits for each result.

    A rebalance of Faust's own consumer empties channels without a word. So an item that was not taken and is no longer in the
    queue is sent again; the agent knows items by number and refuses one it has already begun. While one item is worked on,
    the next is already merged. Ends on `drain`, or with a failure, after which nothing may go on.
    """

    def __init__(
        self,
        channel: faust.Channel[Item],
        take: Callable[[], list[Batch]],
        caught_up: Callable[[], bool],
        on_result: Callable[[Result], None],
        *,
        result_timeout_s: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.progress = Progress()
        self.ended = asyncio.Event()
        self._channel, self._take, self._caught_up, self._on_result = channel, take, caught_up, on_result
        self._timeout_s = result_timeout_s
        self._pool = ThreadPoolExecutor(1, "merge")
        self._wake = asyncio.Event()
        self._running = asyncio.get_running_loop()
        self._drain = asyncio.Event()

    def wake(self) -> None:
        """There may be something to take. From any thread."""
        if not self._running.is_closed():
            self._running.call_soon_threadsafe(self._wake.set)

    def pause(self, why: str) -> None:
        """Take nothing more until drained. What is taken already is read again by whoever comes next."""
        self.progress.paused = why

    def drain(self) -> None:
        """Finish the item in work and send no other; `ended` is set then."""
        self._drain.set()
        self._wake.set()

    @Service.task
    async def _feed(self) -> None:
        try:
            await self._feed_until_drained()
        except Exception as error:
            log.critical("feeding stopped: %s", error)
            self.progress.failure = error
        self.ended.set()

    async def _feed_until_drained(self) -> None:
        progress = self.progress
        coming = self._start_take()
        while not self._drain.is_set():
            batches = await coming
            if progress.paused:
                await self._drain.wait()
            if self._drain.is_set():
                return  # taken, but not begun: whoever owns the partitions next reads it again
            if batches:
                progress.idle_since = None
                progress.items += 1
                item = Item(progress.items, batches, self._running.create_future(), self._running.create_future())
                await self._send(item)
                coming = self._start_take()
                self._on_result(await self._result(item))
                continue
            if not self._caught_up():
                progress.idle_since = None
            elif progress.idle_since is None:
                progress.idle_since = self._running.time()
            await asyncio.wait([asyncio.ensure_future(self._wake.wait())], timeout=WAKE_S)
            coming = self._start_take()

    def _start_take(self) -> asyncio.Future[list[Batch]]:
        self._wake.clear()
        return self._running.run_in_executor(self._pool, self._take)

    async def _send(self, item: Item) -> None:
        """Put the item where the agent finds it, until the agent has it."""
        sent = False
        while not item.taken.done():
            queues = [subscriber.queue for subscriber in self._channel._subscribers]
            # Only into an empty queue: the clearing would cancel a put that waits for room.
            if queues and not any(queue.qsize() for queue in queues):
                if sent:
                    self.progress.resent += 1
                    log.warning("item %d: cleared by a rebalance of the control consumer, sent again", item.number)
                # A plain value, not an event: events of another generation of Faust's consumer are skipped silently.
                await self._channel.put(item)  # type: ignore[arg-type]  # a channel takes any value
                sent = True
            await asyncio.wait([item.taken], timeout=LOOK_S)

    async def _result(self, item: Item) -> Result:
        done, _ = await asyncio.wait([item.result], timeout=self._timeout_s)
        if not done:
            raise InvariantBroken(f"the agent gave no result for item {item.number} within {self._timeout_s:g} s")
        return item.result.result()


def scoring_agent(
    app: faust.App, channel: faust.Channel[Item], process: Callable[[Sequence[Batch]], Result], progress: Callable[[], Progress]
) -> None:
    """Register the agent: each item is processed in one thread of its own, so that Faust's loop stays live."""
    pool = ThreadPoolExecutor(1, "engine")
    begun = 0

    @app.agent(channel, name="score", concurrency=1)
    async def score(items: StreamT[Item]) -> AsyncIterator[None]:
        nonlocal begun
        async for item in items:
            if item.number <= begun:
                progress().repeats += 1
                continue
            begun = item.number
            item.taken.set_result(None)
            try:
                result = await asyncio.get_running_loop().run_in_executor(pool, process, item.batches)
            except Exception as error:
                # To the feeder, which ends the process. Raised here, Faust would restart the agent and go on.
                item.result.set_exception(error)
            else:
                item.result.set_result(result)
            yield


class _App(faust.App):
    """Keeps nothing in files: without this, every worker leaves `<app id>-data/` in the directory it was started in."""

    def _create_directories(self) -> None:
        pass


def faust_app(name: str, servers: str, client: Mapping[str, str], control_topic: str, on_command: Callable[[str], None]) -> faust.App:
    """A Faust app whose only topic is the worker's own control topic: a record "drain" there stops it gracefully."""
    app = _App(
        name,
        broker=[f"kafka://{server.strip()}" for server in servers.split(",")],
        broker_credentials=credentials(client),
        store="memory://",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        broker_check_crcs=True,
        stream_wait_empty=False,
        autodiscover=False,
    )
    control = app.topic(control_topic, key_serializer="raw", value_serializer="raw", key_type=bytes, value_type=bytes, internal=False)

    @app.agent(control, name="control", concurrency=1)
    async def commands(records: StreamT[bytes]) -> AsyncIterator[None]:
        async for record in records:
            on_command(record.decode("utf-8", "replace"))
            yield

    return app


def credentials(client: Mapping[str, str]) -> CredentialsT | None:
    """librdkafka's TLS and SASL settings as Faust's; None for plain text. Raises BadUsage for a mechanism Faust cannot speak."""
    protocol = client.get("security.protocol", "plaintext").lower()
    if protocol == "plaintext":
        return None
    context = _tls(client) if protocol.endswith("ssl") else None
    if protocol == "ssl":
        return SSLCredentials(context=context)
    mechanism = client.get("sasl.mechanism", client.get("sasl.mechanisms", "PLAIN")).upper()
    if mechanism not in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"):
        raise BadUsage(f"sasl.mechanism {mechanism}: a worker speaks PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512")
    return SASLCredentials(
        username=client.get("sasl.username"), password=client.get("sasl.password"), ssl_context=context, mechanism=SASLMechanism(mechanism)
    )


def _tls(client: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=client.get("ssl.ca.location"), cadata=client.get("ssl.ca.pem"))
    if certificate := client.get("ssl.certificate.location"):
        context.load_cert_chain(certificate, client.get("ssl.key.location"), client.get("ssl.key.password"))
    if client.get("ssl.endpoint.identification.algorithm") == "none":
        context.check_hostname = False
    if client.get("enable.ssl.certificate.verification") == "false":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
