"""A TCP link that can be made bad on purpose: it refuses, swallows, resets, delays, throttles, slices, or cuts before the reply."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

Answer = TypeVar("Answer")

CHUNK: Final = 65_536
UP, DOWN = "up", "down"
"""Directions: client to server, server to client."""


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to the bytes of a link from now on.

    refuse: nobody listens. swallow: directions whose bytes vanish while the connections stay up. delay_ms: each piece waits so long.
    bytes_per_second: each direction, 0 = unbounded. slice_bytes: pieces of at most so many bytes, 0 = as they come.
    cut_after: so many pieces of a request travel up, then the connection is reset before any answer comes back; 0 = never.
    """

    refuse: bool = False
    swallow: tuple[str, ...] = ()
    delay_ms: float = 0.0
    bytes_per_second: int = 0
    slice_bytes: int = 0
    cut_after: int = 0


CLEAR: Final = Weather()


@dataclass(slots=True, eq=False)
class _Link:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    requests: int = 0

    def reset(self) -> None:
        for writer in (self.client, self.server):
            with_reset(writer)


def with_reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN, so the other side sees an error and not an end."""
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() >= 0:
        # Linger 0: what is queued is thrown away.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    writer.transport.abort()


@dataclass(slots=True)
class Proxy:
    """Listens on a port of 127.0.0.1 and passes bytes to the target's port; works in a thread of its own. A context manager.

    The methods may be called from any thread and return when the change is in force.
    """

    target: int
    port: int = 0
    weather: Weather = CLEAR
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _server: asyncio.Server | None = field(default=None, init=False)
    _links: set[_Link] = field(default_factory=set, init=False)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    def __enter__(self) -> Proxy:
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join()
        self._loop.close()

    def set(self, weather: Weather) -> None:
        """Change what happens to the bytes, also of the connections that are open."""
        self._call(self._set(weather))

    def clear(self) -> None:
        """Pass everything on again. Swallowed bytes make the open connections useless, so those are reset."""
        bad = self.weather
        self.set(CLEAR)
        if bad.swallow:
            self.reset()

    def reset(self) -> None:
        """Reset every open connection."""
        self._call(self._reset())

    def turn_to(self, target: int) -> None:
        """Send what comes from now on to another server; the open connections are reset."""
        self.target = target
        self.reset()

    def _call(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _set(self, weather: Weather) -> None:
        self.weather = weather
        if weather.refuse and self._server is not None:
            self._server.close()
            self._server = None
            await self._reset()
        elif not weather.refuse and self._server is None:
            await self._listen()

    async def _reset(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, up = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            with_reset(writer)
            return
        link = _Link(writer, up)
        self._links.add(link)
        tasks = [
            asyncio.ensure_future(self._pass(link, UP, reader, up)),
            asyncio.ensure_future(self._pass(link, DOWN, upstream, writer)),
        ]
        self._tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, link: _Link, way: str, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK):
                weather = self.weather
                if weather.cut_after and way == UP:
                    link.requests += 1
                if weather.cut_after and way == DOWN and link.requests >= weather.cut_after:
                    return  # the server has done it, the client will never know
                size = weather.slice_bytes or len(data)
                for start in range(0, len(data), size):
                    piece = data[start : start + size]
                    wait_s = weather.delay_ms / 1_000 + (len(piece) / weather.bytes_per_second if weather.bytes_per_second else 0)
                    if wait_s:
                        await asyncio.sleep(wait_s)
                    elif weather.slice_bytes:
                        await asyncio.sleep(0)
                    weather = self.weather
                    if way not in weather.swallow:
                        sink.write(piece)
                        await sink.drain()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            link.reset()
            self._links.discard(link)
