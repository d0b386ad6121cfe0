"""The bad link does to real connections what its weather says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from bench.faults.proxy import DOWN, UP, Proxy, Weather


@pytest.fixture
def link() -> Iterator[Proxy]:
    """A proxy before a server that answers every line with itself."""
    server = socket.create_server(("127.0.0.1", 0))
    seen: list[bytes] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with closing(connection):
            try:
                while data := connection.recv(65_536):
                    seen.append(data)
                    connection.sendall(data)
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    with Proxy(server.getsockname()[1]) as proxy:
        yield proxy
    server.close()


def connect(proxy: Proxy) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", proxy.port), 2)
    connection.settimeout(0.4)
    return connection


def ask(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    found = b""
    while len(found) < len(data):
        piece = connection.recv(65_536)
        if not piece:
            break
        found += piece
    return found


def test_clear_weather_passes_everything(link: Proxy) -> None:
    with closing(connect(link)) as connection:
        assert ask(connection, b"x" * 200_000) == b"x" * 200_000


def test_nobody_listens_and_later_somebody_does(link: Proxy) -> None:
    with closing(connect(link)) as before:
        assert ask(before, b"a") == b"a"
        link.set(Weather(refuse=True))
        with pytest.raises(ConnectionError):
            connect(link)
        with pytest.raises(ConnectionError):
            ask(before, b"b")
    link.clear()
    with closing(connect(link)) as after:
        assert ask(after, b"c") == b"c"


@pytest.mark.parametrize("ways", [(UP,), (DOWN,), (UP, DOWN)])
def test_swallowed_bytes_never_arrive_and_the_connection_ends_with_the_weather(link: Proxy, ways: tuple[str, ...]) -> None:
    with closing(connect(link)) as connection:
        assert ask(connection, b"a") == b"a"
        link.set(Weather(swallow=ways))
        with pytest.raises(TimeoutError):
            ask(connection, b"b")
        link.clear()
        with pytest.raises(ConnectionError):
            ask(connection, b"c")


def test_a_reset_is_an_error_not_an_end(link: Proxy) -> None:
    with closing(connect(link)) as connection:
        assert ask(connection, b"a") == b"a"
        link.reset()
        with pytest.raises(ConnectionError):
            ask(connection, b"b")


def test_delay_slices_and_bandwidth_take_their_time(link: Proxy) -> None:
    with closing(connect(link)) as connection:
        connection.settimeout(5)
        link.set(Weather(delay_ms=50, slice_bytes=10))
        begin = time.monotonic()
        assert ask(connection, b"y" * 40) == b"y" * 40
        assert time.monotonic() - begin > 0.2  # four pieces up
        link.set(Weather(bytes_per_second=1_000))
        begin = time.monotonic()
        assert ask(connection, b"z" * 200) == b"z" * 200
        assert time.monotonic() - begin > 0.35  # both ways


def test_a_cut_comes_after_the_request_and_before_the_answer(link: Proxy) -> None:
    with closing(connect(link)) as connection:
        link.set(Weather(cut_after=2))
        assert ask(connection, b"first") == b"first"
        with pytest.raises(ConnectionError):
            ask(connection, b"second")
