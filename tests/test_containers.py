"""The rung of the test ladder that needs a container engine, without one: a stand-in speaks as much of Docker's interface as is used.

What it "starts" are servers that run already, so the whole way from the ping to the addresses is walked with the installed client and
testcontainers. Not shown by this: that the images exist and do what their environment says.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from io import BytesIO
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer, ThreadingUnixStreamServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.conftest import ROOT, Servers, bare_environment

STARTED = b"Started!\nKafka Server started\n"
"""What the reaper and Kafka log when they are ready."""


@dataclass(slots=True)
class Engine:
    """The stand-in. ports: container port -> port on this machine; broken: it answers the ping and fails at everything else."""

    socket: Path
    ports: dict[str, int]
    broken: bool = False
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, bytes, str]:
        """(status, body, content type) of a request."""
        path, _, query = re.sub(r"^/v1\.\d+", "", target).partition("?")
        if path == "/_ping":
            return 200, b"OK", "text/plain"
        if path == "/version":
            return 200, json.dumps({"ApiVersion": "1.45", "MinAPIVersion": "1.24", "Version": "27.0"}).encode(), "application/json"
        if self.broken:
            return 500, b'{"message":"no space left on device"}', "application/json"
        if method == "POST" and path == "/containers/create":
            name = f"{len(self.created):064x}"
            self.created[name] = json.loads(body)
            return 201, json.dumps({"Id": name, "Warnings": []}).encode(), "application/json"
        if path == "/containers/json":
            wanted = json.loads(parse_qs(query)["filters"][0])["id"]
            return 200, json.dumps([self._shown(name) for name in self.created if name in wanted]).encode(), "application/json"
        if match := re.fullmatch(r"/images/(.+)/json", path):
            return 200, json.dumps({"Id": "sha256:0", "RepoTags": [match[1]]}).encode(), "application/json"
        if match := re.fullmatch(r"/containers/([0-9a-f]+)(/\w+)?", path):
            return self._container(method, match[1], match[2] or "", body)
        return 404, json.dumps({"message": f"{method} {path} is not spoken here"}).encode(), "application/json"

    def _container(self, method: str, name: str, what: str, body: bytes) -> tuple[int, bytes, str]:
        match method, what:
            case "POST", "/start":
                self.started.append(name)
                return 204, b"", "text/plain"
            case "GET", "/json":
                return 200, json.dumps(self._shown(name)).encode(), "application/json"
            case "PUT", "/archive":
                with tarfile.open(fileobj=BytesIO(body)) as archive:
                    for member in archive:
                        if (content := archive.extractfile(member)) is not None:
                            self.files["/" + member.name.lstrip("/")] = content.read().decode()
                return 200, b"", "text/plain"
            case "GET", "/logs":
                # Frames of the multiplexed stream: 1 = stdout, length, bytes.
                return 200, b"\x01\x00\x00\x00" + len(STARTED).to_bytes(4, "big") + STARTED, "application/vnd.docker.multiplexed-stream"
            case "DELETE", "":
                self.removed.append(name)
                return 204, b"", "text/plain"
            case "POST", "/stop":
                return 204, b"", "text/plain"
        return 404, json.dumps({"message": f"{method} {what} of a container is not spoken here"}).encode(), "application/json"

    def _shown(self, name: str) -> dict[str, Any]:
        spec = self.created[name]
        bindings = {port: [{"HostIp": "0.0.0.0", "HostPort": str(self.ports[port])}] for port in spec.get("ExposedPorts", {})}
        return {
            "Id": name,
            "Name": f"/{name[-4:]}",
            "State": {"Status": "running", "Running": True, "ExitCode": 0},
            "HostConfig": {"NetworkMode": "bridge"},
            "Config": {"Image": spec["Image"], "Tty": False, "Env": spec.get("Env"), "Labels": spec.get("Labels") or {}},
            "NetworkSettings": {"Ports": bindings, "Networks": {"bridge": {"Gateway": "127.0.0.1", "IPAddress": "127.0.0.1"}}},
        }


@contextmanager
def engine(directory: Path, ports: dict[str, int], *, broken: bool = False) -> Iterator[Engine]:
    """A stand-in that answers on a socket below `directory`."""
    made = Engine(directory / "docker.sock", ports, broken)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            status, content, kind = made.answer(self.command, self.path, body)
            self.send_response(status)
            if status != 204:
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any  # noqa: N815 - the names http.server looks for

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingUnixStreamServer(str(made.socket), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield made
        server.shutdown()


@contextmanager
def reaper() -> Iterator[int]:
    """Somebody who listens where testcontainers' own helper would; its port."""

    class Listen(StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.read()

    with ThreadingTCPServer(("127.0.0.1", 0), Listen) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


ASK = """
import json, sys, warnings
from contextlib import ExitStack
from tests.conftest import _containers
with warnings.catch_warnings(record=True) as caught, ExitStack() as stack:
    warnings.simplefilter("always")
    found = _containers(stack)
    said = [str(warning.message) for warning in caught if "container engine" in str(warning.message)]
print(json.dumps({"found": found, "warnings": said}))
"""


def ask(host: str, **variables: str) -> dict[str, Any]:
    """What the ladder's rung says with this engine; in a process of its own, as the client library keeps its sockets."""
    environment = {**bare_environment(), "PYTHONPATH": str(ROOT), "DOCKER_HOST": host, **variables}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.servers
def test_an_engine_that_answers_gives_the_addresses_of_its_containers(servers: Servers, tmp_path: Path) -> None:
    ports = {"9093/tcp": int(servers.kafka.rpartition(":")[2]), "6379/tcp": int(urlsplit(servers.redis).port or 6379)}
    with reaper() as port, engine(tmp_path, ports | {"8080/tcp": port}) as fake:
        said = ask(f"unix://{fake.socket}")
    assert said["warnings"] == []
    # Which name the host has depends on whether the tests run in a container themselves.
    host = said["found"][0].rpartition(":")[0]
    assert host in ("localhost", "127.0.0.1")
    assert said["found"] == [f"{host}:{ports['9093/tcp']}", f"redis://{host}:{ports['6379/tcp']}/0"]

    by_image = {spec["Image"]: (name, spec) for name, spec in fake.created.items()}
    kafka = next(image for image in by_image if "kafka" in image)
    redis = next(image for image in by_image if image.startswith("redis"))
    assert not kafka.endswith(":latest")
    assert not redis.endswith(":latest")
    environment = dict(text.split("=", 1) for text in by_image[kafka][1]["Env"])
    wanted = {
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
    }
    assert {name: environment.get(name) for name in wanted} == wanted
    (script,) = fake.files.values()
    assert f"PLAINTEXT://{host}:{ports['9093/tcp']}" in script
    for image in (kafka, redis):
        assert by_image[image][0] in fake.started
        assert by_image[image][0] in fake.removed  # nothing stays behind


def test_an_engine_that_cannot_run_containers_is_said_and_the_embedded_servers_are_next(tmp_path: Path) -> None:
    with engine(tmp_path, {}, broken=True) as fake:
        said = ask(f"unix://{fake.socket}")
    assert said["found"] is None
    assert len(said["warnings"]) == 1
    assert "no space left on device" in said["warnings"][0]
    assert "embedded" in said["warnings"][0]


def test_without_an_engine_or_on_demand_the_rung_is_left_out_at_once(tmp_path: Path) -> None:
    from tests.conftest import _engine_answers

    begin = time.monotonic()
    assert not _engine_answers(f"unix://{tmp_path / 'nobody.sock'}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert not _engine_answers(f"tcp://127.0.0.1:{free.getsockname()[1]}")  # nobody listens
    assert time.monotonic() - begin < 1
    with engine(tmp_path, {}, broken=True) as fake:
        assert ask(f"unix://{fake.socket}", TEST_SERVERS="embedded") == {"found": None, "warnings": []}
        assert _engine_answers(f"unix://{fake.socket}")
