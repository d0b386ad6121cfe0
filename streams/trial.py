"""A deployment of its own for one run of a demo or a benchmark: a namespace, topics, worker processes; gone with its data directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proto.errors import ChurnError
from streams.settings import Settings

STOP_S = 15.0
"""A worker stops within 10 s or is killed."""


@dataclass(slots=True)
class Trial:
    """Names nobody else uses, on servers that run. `settings` are this run's, `extra` further CHURN_ variables of its processes."""

    base: Settings
    kafka: str
    redis: str
    kind: str
    extra: Mapping[str, str] = field(default_factory=dict)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.kind}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 1_000_000:06d}"

    @property
    def settings(self) -> Settings:
        """The settings every part of this run uses."""
        from pydantic import SecretStr

        return self.base.model_copy(
            update={
                "kafka_bootstrap_servers": self.kafka,
                "redis_url": SecretStr(self.redis),
                "namespace": self.name,
                "topic_prefix": f"{self.name}.",
                **({"currency": self.extra["CHURN_CURRENCY"]} if "CHURN_CURRENCY" in self.extra else {}),
            }
        )

    @property
    def environment(self) -> dict[str, str]:
        """What turns any churnstream command to this run."""
        return {
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka,
            "REDIS_URL": self.redis,
            "CHURN_NAMESPACE": self.name,
            "CHURN_TOPIC_PREFIX": f"{self.name}.",
            **self.extra,
        }

    def command(self, *arguments: str) -> dict[str, Any]:
        """Run a churnstream command to its end; the object of its last line. Raises ChurnError with what it said."""
        done = subprocess.run(_argv(arguments), env=os.environ | self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChurnError(f"`churnstream {' '.join(arguments)}` ended with code {done.returncode}:\n{done.stderr[-3000:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def start(self, log: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start `churnstream worker --json`; the caller ends it."""
        with log.open("a") as stream:
            return subprocess.Popen(
                _argv(("worker", "--json", *arguments)),
                env=os.environ | self.environment | variables,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )

    @contextmanager
    def worker(self, log: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A worker process; stopped gracefully at the end of the block, killed when that takes too long."""
        process = self.start(log, *arguments)
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Stop a worker gracefully; its summary, or {} when it printed none."""
    if process.poll() is None:
        process.terminate()
    try:
        out, _ = process.communicate(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
    lines = out.splitlines() if out else []
    summary: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return summary


def _argv(arguments: Sequence[str]) -> Sequence[str]:
    return [sys.executable, "-c", "from streams.cli import main; main()", *arguments]
