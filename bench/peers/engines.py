"""The engines that run: ours in its variants and the peers, each started as a user would start it, as a session of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from bench.model import Fitted
from bench.peers.prepare import Command
from bench.peers.workload import OUTPUTS, create_topics, delete, remake
from streams.settings import Settings
from streams.topics import ALERTS, SCORES, client_config

STOP_S: Final = 15.0


@dataclass(slots=True)
class Running:
    """An engine that runs: its process, where its scores come, when it was started (ns of the wall clock)."""

    process: subprocess.Popen[bytes]
    scores: str
    started_ns: int
    log: Path

    def check(self) -> None:
        """Raises Died when the process has ended."""
        if self.process.poll() is not None:
            raise Died(f"ended with code {self.process.returncode}: {self.tail()}")

    def tail(self) -> str:
        """The last lines of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(lines[-3:])[-600:]

    def stop(self) -> None:
        """SIGTERM, after a while SIGKILL, to the whole session."""
        for number, patience_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience_s)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


class Died(Exception):
    """An engine ended, or never gave a score; the text says what it said last."""


class Engine(Protocol):
    """What can be measured. exactly_once: its end offsets count markers. slow: rated on what it does in a time cap."""

    @property
    def name(self) -> str: ...
    @property
    def exactly_once(self) -> bool: ...
    @property
    def slow(self) -> bool: ...

    def start(self, settings: Settings, run: str, scratch: Path) -> Running:
        """Start on the topics of a deployment; the run's name makes group, state and outputs its own."""
        ...

    def clean(self, settings: Settings, run: str) -> None:
        """Remove what the run has left on the servers."""
        ...


@dataclass(frozen=True, slots=True)
class Ours:
    """A worker of this product with one model and one mode of delivery."""

    name: str
    model: Fitted
    delivery: str = "at_least_once"
    slow: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def exactly_once(self) -> bool:
        """Whether outputs are transactions."""
        return self.delivery == "exactly_once"

    def start(self, settings: Settings, run: str, scratch: Path, *options: str) -> Running:
        """As `Engine.start`, with further options of `churnstream worker`. Outputs begin empty: a worker goes by what it finds there."""
        create_topics(settings, OUTPUTS)
        self.model.publish(settings)
        return self.join(settings, run, scratch / f"{run}.log", *options)

    def join(self, settings: Settings, run: str, log: Path, *options: str) -> Running:
        """A worker of a run, the first one or one more; it logs to `log`."""
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
            "REDIS_URL": settings.redis_url.get_secret_value(),
            "CHURN_TOPIC_PREFIX": settings.topic_prefix,
            "CHURN_PARTITIONS": str(settings.partitions),
            "CHURN_NAMESPACE": run,
            "CHURN_GROUP_ID": run,
            "CHURN_DELIVERY": self.delivery,
            **self.variables,
        }
        argv = [sys.executable, "-c", "from streams.cli import main; main()", "worker", "--json", *options]
        return _spawn(argv, variables, settings.prefixed(SCORES), log, Path.cwd())

    def clean(self, settings: Settings, run: str) -> None:
        """As `Engine.clean`."""
        _forget(settings, run, settings.prefixed(SCORES), settings.prefixed(ALERTS))


@dataclass(frozen=True, slots=True)
class Peer:
    """One of the peers."""

    name: str
    command: Command
    model: Path

    @property
    def exactly_once(self) -> bool:
        """By its name, as the peers' own script has it."""
        return "eos" in self.name

    @property
    def slow(self) -> bool:
        """The Python ones."""
        return not self.name.startswith(("ks_", "flink_"))

    def start(self, settings: Settings, run: str, scratch: Path) -> Running:
        """As `Engine.start`."""
        from confluent_kafka.admin import AdminClient, NewTopic

        scores, state = f"scores-{run}", scratch / f"state-{run}"
        topic = NewTopic(scores, settings.partitions, 1, config={"message.timestamp.type": "LogAppendTime"})
        remake(AdminClient(client_config(settings)), [topic])
        state.mkdir()
        variables = {
            "KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
            "REDIS_URL": settings.redis_url.get_secret_value(),
            "MODEL_PATH": str(self.model.resolve()),
            "TOPIC_PREFIX": settings.topic_prefix,
            "SCORES_TOPIC": scores,
            "GROUP_ID": f"g-{run}",
            "STATE_DIR": str(state),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **self.command.variables,
        }
        argv = [part.replace("{state}", str(state)) for part in self.command.argv]
        return _spawn(argv, variables, scores, scratch / f"{run}.log", state)

    def clean(self, settings: Settings, run: str) -> None:
        """As `Engine.clean`: the scores and whatever it made itself (changelogs carry the group)."""
        _forget(settings, run)


def _spawn(argv: list[str], variables: Mapping[str, str], scores: str, log: Path, directory: Path) -> Running:
    with log.open("wb") as stream:
        started_ns = time.time_ns()
        process = subprocess.Popen(
            argv,
            env=os.environ | dict(variables),
            cwd=directory,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Running(process, scores, started_ns, log)


def _forget(settings: Settings, run: str, *more: str) -> None:
    """Delete the topics that carry the run's name, and empty Redis, which is the benchmark's own."""
    from confluent_kafka.admin import AdminClient
    from redis import Redis

    admin = AdminClient(client_config(settings))
    delete(admin, {name for name in admin.list_topics(timeout=20).topics if run in name or name in more})
    with Redis.from_url(settings.redis_url.get_secret_value()) as redis:
        redis.flushdb()


def remove_state(scratch: Path, run: str) -> None:
    """The files of a run's state."""
    shutil.rmtree(scratch / f"state-{run}", ignore_errors=True)


def consumer(settings: Settings, **more: Any) -> Any:
    """A read_committed consumer of a group of its own that commits nothing."""
    from confluent_kafka import Consumer

    return Consumer(
        {
            **client_config(settings),
            "group.id": f"bench-{time.time_ns()}",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
            **more,
        }
    )
