"""The embedded servers: up, found again, down; what fails says so and leaves nothing running."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from proto.errors import BadInput, ChurnError, DependencyUnreachable
from streams import jars
from streams.stack import Server, Stack, kafka_error, without_password
from tests.conftest import bare_environment, run_command

pytestmark = [pytest.mark.servers]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    if (tmp_path / "stack.json").is_file() and (tmp_path / "stack.json").read_text() != "{":
        Stack(tmp_path).down()


def answers(server: Server) -> bool:
    if server.name == "kafka":
        return kafka_error({"bootstrap.servers": server.address}, 2.0) == ""
    with redis.Redis.from_url(server.address) as client:
        return bool(client.ping())


def test_up_is_idempotent_and_down_leaves_no_process(home: Path) -> None:
    environment = {**bare_environment(), "CHURN_DATA_DIR": str(home)}
    first = run_command("stack", "up", "--json", environment=environment)
    assert first.code == 0, first.err
    assert first.json()["started"] == ["kafka", "redis"]
    running = Stack(home).status()
    assert [s.name for s in running] == ["kafka", "redis"]
    assert all(answers(s) for s in running)

    again = run_command("stack", "up", "--json", environment=environment)
    assert again.json() | {"seconds": 0} == first.json() | {"started": [], "seconds": 0}
    assert "already up" in again.err
    status = run_command("stack", "status", "--json", environment=environment)
    assert [s["state"] for s in status.json()["servers"]] == ["running", "running"]

    assert run_command("stack", "down", "--json", environment=environment).json() == {"stopped": ["kafka", "redis"]}
    assert not any(s.runs() for s in running)
    assert not processes_under(home)
    assert run_command("stack", "status", environment=environment).code == 1
    assert run_command("stack", "down", "--json", environment=environment).json() == {"stopped": []}


def test_what_was_written_is_there_after_a_restart(home: Path) -> None:
    from confluent_kafka.admin import AdminClient, NewTopic

    with Stack(home) as endpoints:
        admin = AdminClient({"bootstrap.servers": endpoints.kafka})
        (future,) = admin.create_topics([NewTopic("kept", 3, 1)]).values()
        future.result(20)
        with redis.Redis.from_url(endpoints.redis) as client:
            client.set("kept", "yes")
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    with Stack(home) as endpoints:
        assert len(AdminClient({"bootstrap.servers": endpoints.kafka}).list_topics("kept", timeout=20).topics["kept"].partitions) == 3
        with redis.Redis.from_url(endpoints.redis) as client:
            assert client.get("kept") == b"yes"


@pytest.mark.parametrize("name", ["kafka", "redis"])
def test_a_taken_port_is_named_and_the_other_server_does_not_stay(home: Path, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = {**bare_environment(), "CHURN_DATA_DIR": str(home), f"CHURN_STACK_{name.upper()}_PORT": str(port)}
        done = run_command("stack", "up", environment=environment)
    assert done.code == 3
    assert f"{name}: port {port} is taken" in done.err
    assert "Traceback" not in done.err
    assert Stack(home).status() == []
    assert not processes_under(home)


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1", "Kafka at 127.0.0.1:1"),
        ("REDIS_URL", "redis://:secret@127.0.0.1:1", "Redis at redis://***@127.0.0.1:1"),
        ("REDIS_URL", "127.0.0.1:1", "Redis at 127.0.0.1:1"),
    ],
)
def test_an_address_that_does_not_answer_exits_3_within_the_limit(home: Path, variable: str, value: str, named: str) -> None:
    environment = {**bare_environment(), "CHURN_DATA_DIR": str(home), variable: value, "CHURN_DEPENDENCY_TIMEOUT_S": "2"}
    begin = time.monotonic()
    done = run_command("stack", "up", environment=environment)
    assert done.code == 3
    assert named in done.err
    assert "secret" not in done.err
    assert len(done.err.splitlines()) == 1
    assert time.monotonic() - begin < 20  # the limit of 2 s, and the start of Python on a busy machine
    assert not processes_under(home)


def test_a_server_that_dies_while_starting_shows_the_end_of_its_log(home: Path) -> None:
    (home / "redis").mkdir()
    (home / "redis" / "appendonlydir").write_text("a file where redis wants a directory")
    with pytest.raises(DependencyUnreachable, match=r"(?s)redis: stopped with code 1 while starting.*server\.log"):
        Stack(home, servers=("redis",)).up()
    assert not processes_under(home)


def test_a_later_process_with_the_same_pid_is_not_ours(home: Path) -> None:
    entry = {"name": "redis", "pid": os.getpid(), "born": "1@another-boot", "port": 1, "log": ""}
    (home / "stack.json").write_text(json.dumps({"servers": [entry]}))
    assert Stack(home).status() == []
    assert Stack(home).down() == []  # and this test is still alive to see it


def test_a_broken_record_of_the_servers_is_an_error_not_a_second_start(home: Path) -> None:
    (home / "stack.json").write_text("{")
    with pytest.raises(ChurnError, match=r"stack\.json: not readable"):
        Stack(home).up()


def test_a_jar_that_is_not_the_locked_one_is_seen(tmp_path: Path) -> None:
    locked = jars.read_lock()
    assert any(jar.name == "kafka_2.13" and jar.version.startswith("4.") for jar in locked)
    jars.fetch()
    assert jars.broken(jars.jar_dir()) == []
    for jar in locked:
        (tmp_path / jar.filename).symlink_to(jars.jar_dir() / jar.filename)
    changed = tmp_path / locked[0].filename
    content = changed.read_bytes()
    changed.unlink()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert jars.broken(tmp_path) == [locked[0].filename]


def test_a_lock_line_without_a_digest_is_named(tmp_path: Path) -> None:
    (tmp_path / "kafka.lock").write_text("# comment\norg.apache.kafka:kafka_2.13:4.3.1\n")
    with pytest.raises(BadInput, match="line 2"):
        jars.read_lock(tmp_path / "kafka.lock")


@pytest.mark.parametrize(
    ("url", "shown"),
    [("redis://h:1/0", "redis://h:1/0"), ("rediss://u:p@h:1", "rediss://***@h:1"), ("unix:///run/redis.sock", "unix:///run/redis.sock")],
)
def test_a_shown_redis_address_has_no_password(url: str, shown: str) -> None:
    assert without_password(url) == shown


def processes_under(home: Path) -> list[str]:
    """Command lines of live processes that name this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if str(home) in line:
                found.append(line)
    return found
