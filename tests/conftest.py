"""Real servers for the tests at the edge, and a place of its own in them for every test."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bench.faults.nursery import Nursery

if TYPE_CHECKING:
    from streams.settings import Settings
    from streams.stack import Endpoints

ROOT = Path(__file__).parent.parent
TOGETHER = frozenset(
    f"tests/{name}.py"
    for name in (
        "contracts/test_brownouts",
        "contracts/test_formats",
        "contracts/test_store",
        "faults/test_nemesis_checker",
        "faults/test_poison",
        "features/test_planted_bugs",
        "models/test_registry",
        "models/test_train",
        "streams/test_stack",
    )
)
"""Files whose tests share something dear: one worker of pytest-xdist runs all of them. Its own way of grouping, a suffix of the
node id, has no effect since pytest 9.2."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spreads tests one by one, those of the files above together."""
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]  # it comes without types

    class Grouped(LoadScopeScheduling):  # type: ignore[misc]  # as above
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return file if file in TOGETHER else nodeid

    return Grouped(config, log)


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the session's Kafka and Redis are, and which rung of the ladder they stand on."""

    kafka: str
    redis: str
    origin: str  # environment | containers | embedded


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Servers]:
    """Real Kafka and Redis: those of the environment, else containers when an engine answers, else embedded. Never skipped.

    TEST_SERVERS=embedded leaves the containers out. All workers of pytest-xdist share one pair of embedded servers.
    """
    kafka, redis = os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""), os.environ.get("REDIS_URL", "")
    with ExitStack() as stack:
        if kafka and redis:
            origin = "environment"
        elif not kafka and not redis and (found := _containers(stack)):
            origin, (kafka, redis) = "containers", found
        else:
            own = stack.enter_context(_shared_stack(tmp_path_factory, worker_id))
            origin, kafka, redis = "embedded", kafka or own.kafka, redis or own.redis
        yield Servers(kafka, redis, origin)


@pytest.fixture
def settings(servers: Servers, tmp_path: Path) -> Settings:
    """Settings of a deployment that only this test knows: own topic prefix, Redis namespace, consumer group and data directory.

    The compiled kernels in it are those of all tests: compiling them anew for every command costs 20 s of CPU. So are the names of the
    models that were tried: a trial costs a second.
    """
    from pydantic import SecretStr

    from streams.settings import Settings

    own = f"t{uuid.uuid4().hex[:10]}"
    kernels = Path(os.environ.get("CHURN_DATA_DIR") or ROOT / ".churnstream").resolve() / "numba"
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "numba").symlink_to(kernels)
    (kernels.parent / "tried").mkdir(exist_ok=True)
    (tmp_path / "data" / "tried").symlink_to(kernels.parent / "tried")
    return Settings(
        kafka_bootstrap_servers=servers.kafka,
        redis_url=SecretStr(servers.redis),
        topic_prefix=f"{own}-",
        namespace=own,
        group_id=own,
        data_dir=tmp_path / "data",
    )


@pytest.fixture
def environment(settings: Settings) -> dict[str, str]:
    """The environment of a command that works in this test's deployment."""
    return {
        **bare_environment(),
        "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "CHURN_TOPIC_PREFIX": settings.topic_prefix,
        "CHURN_NAMESPACE": settings.namespace,
        "CHURN_GROUP_ID": settings.group_id,
        "CHURN_DATA_DIR": str(settings.data_dir),
    }


@pytest.fixture
def churnstream() -> Callable[..., Completed]:
    """Runs the real command: `churnstream("topics", "create", environment=environment)`."""
    return run_command


@dataclass(frozen=True, slots=True)
class Completed:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        value: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return value


def bare_environment() -> dict[str, str]:
    """The machine's environment without settings of ours."""
    ours = ("KAFKA_BOOTSTRAP_SERVERS", "REDIS_URL", "LOG_LEVEL")
    return {k: v for k, v in os.environ.items() if not k.startswith("CHURN_") and k not in ours}


def run_command(*arguments: str, environment: dict[str, str] | None = None, timeout_s: float = 120, cwd: Path = ROOT) -> Completed:
    """Run `churnstream ARGUMENTS` as a process of its own, forked from one that has done the imports of a worker."""
    with tempfile.TemporaryDirectory() as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        process = nursery().start(arguments, bare_environment() if environment is None else environment, out, err, cwd=cwd)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return Completed(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


@cache
def nursery() -> Nursery:
    """One of this process, started with its first child and ended with the session."""
    return _until_the_end.enter_context(Nursery())


_until_the_end = ExitStack()


def pytest_unconfigure() -> None:
    """The end of the session."""
    _until_the_end.close()


def _containers(stack: ExitStack) -> tuple[str, str] | None:
    """Kafka and Redis in containers, None when no engine answers. An engine that answers but cannot run them is said, not hidden."""
    if os.environ.get("TEST_SERVERS") == "embedded":
        return None
    if not _engine_answers(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")):
        return None
    from testcontainers.community.kafka import KafkaContainer
    from testcontainers.community.redis import RedisContainer

    try:
        kafka = KafkaContainer("confluentinc/cp-kafka:8.1.0").with_kraft()
        for key, value in {
            "AUTO_CREATE_TOPICS_ENABLE": "false",
            "GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
            "TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",  # the default of 3 would let no transaction begin
            "TRANSACTION_STATE_LOG_MIN_ISR": "1",
        }.items():
            kafka = kafka.with_env(f"KAFKA_{key}", value)
        running = stack.enter_context(kafka)
        redis = stack.enter_context(RedisContainer("redis:8.2"))
        return running.get_bootstrap_server(), f"redis://{redis.get_container_host_ip()}:{redis.get_exposed_port(6379)}/0"
    except Exception as error:  # whatever the engine or the images come up with
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(
                f"a container engine answers, but Kafka and Redis did not start in it ({error}); using embedded servers", stacklevel=1
            )
        return None


def _engine_answers(host: str) -> bool:
    """Whether a Docker engine answers a ping. Asked by hand, because the client library leaves its socket open when none does."""
    scheme, _, place = host.partition("://")
    address: Any = place
    if scheme != "unix":
        name, _, port = place.partition(":")
        address = (name, int(port or 2375))
    with socket.socket(socket.AF_UNIX if scheme == "unix" else socket.AF_INET) as probe:
        probe.settimeout(3)
        try:
            probe.connect(address)
            probe.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in probe.recv(64)
        except OSError:
            return False


@contextmanager
def _shared_stack(factory: pytest.TempPathFactory, worker: str) -> Iterator[Endpoints]:
    """One embedded pair for all workers: the first starts it, the last stops it."""
    from streams.stack import Stack

    base = factory.getbasetemp()
    home = (base if worker == "master" else base.parent) / "servers"
    users = home / "users"
    users.mkdir(parents=True, exist_ok=True)
    stack = Stack(home, timeout_s=120)
    with _exclusive(home / "users.lock"):
        (users / worker).touch()
        endpoints = stack.up().endpoints
    try:
        yield endpoints
    finally:
        with _exclusive(home / "users.lock"):
            (users / worker).unlink()
            if not any(users.iterdir()):
                stack.down()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
