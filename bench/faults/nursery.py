"""Worker processes forked from one that has its imports done: a start costs a tenth of a second of CPU instead of four.

    python -m bench.faults.nursery      reads one JSON object a line (`start` makes it), answers with lines of JSON

Each is a process of its own that runs the same command with the same environment; only what `import` does is shared. Rounds whose figures
depend on the time a start takes use fresh processes (`Fresh`). Tests of commands and workers use it too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Final, Protocol

COMMAND: Final = "from streams.cli import main; main()"
PREPARED: Final = ("streams.commands.worker", "streams.main")
"""What children find imported: all a worker needs."""


class Child(Protocol):
    """What a round needs of a process: as subprocess.Popen."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Starter(Protocol):
    """How `churnstream ARGV` is started."""

    def start(self, argv: Sequence[str], environment: Mapping[str, str], out: Path, log: Path) -> Child: ...


class Fresh:
    """A new interpreter each time, as in production."""

    def start(self, argv: Sequence[str], environment: Mapping[str, str], out: Path, log: Path) -> Child:
        """Start it."""
        with out.open("wb") as stdout, log.open("wb") as stderr:
            return subprocess.Popen(
                [sys.executable, "-c", COMMAND, *argv],
                env=dict(environment),
                stdout=stdout,
                stderr=stderr,
            )


class Forked:
    """A child of the nursery."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None
        self.ended = threading.Event()

    def poll(self) -> int | None:
        """Exit code, minus the signal that ended it; None while it runs."""
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises subprocess.TimeoutExpired."""
        if not self.ended.wait(timeout):
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        assert self.code is not None
        return self.code

    def send_signal(self, sig: int) -> None:
        """Send a signal unless it has ended."""
        if self.code is None:
            with suppress(ProcessLookupError):  # it has just ended; its code is on the way
                os.kill(self.pid, sig)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks, and what it says about its children. A context manager."""

    def __init__(self) -> None:
        self._children: dict[int, Forked] = {}
        self._born: list[Forked] = []
        self._news = threading.Condition()
        self._lock = threading.Lock()

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.faults.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin: IO[str] = self._process.stdin
        self._stdout: IO[str] = self._process.stdout
        self._reader = threading.Thread(target=self._read, args=(self._stdout,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stdin.close()
        self._process.wait(30)
        self._reader.join(5)
        self._stdout.close()

    def start(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        out: Path,
        log: Path,
        *,
        program: str = COMMAND,
        cwd: Path | None = None,
    ) -> Child:
        """Start a child; returns when it is born. program: its text, instead of the command."""
        order = {"argv": list(argv), "program": program, "cwd": str(cwd or "."), "env": dict(environment), "out": str(out), "log": str(log)}
        for file in (out, log):
            file.touch()  # they are there when this returns
        with self._lock:
            self._stdin.write(json.dumps(order) + "\n")
            self._stdin.flush()
            with self._news:
                if not self._news.wait_for(lambda: bool(self._born), 60):
                    raise TimeoutError("the nursery does not answer")
                return self._born.pop()

    def _read(self, answers: IO[str]) -> None:
        for line in answers:
            news = json.loads(line)
            with self._news:
                if "born" in news:
                    child = self._children[news["born"]] = Forked(news["born"])
                    self._born.append(child)
                else:
                    child = self._children.pop(news["ended"])
                    child.code = news["code"]
                    child.ended.set()
                self._news.notify_all()


def _serve() -> None:
    for name in PREPARED:
        import_module(name)
    lock = threading.Lock()

    def tell(news: dict[str, int]) -> None:
        with lock:
            sys.stdout.write(json.dumps(news) + "\n")
            sys.stdout.flush()

    def watch(pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        tell({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    for line in sys.stdin:
        order = json.loads(line)
        with lock:  # no thread is inside a write while we fork
            pid = os.fork()
        if pid == 0:
            _become(order)
        tell({"born": pid})
        threading.Thread(target=watch, args=(pid,), daemon=True).start()


def _become(order: dict[str, object]) -> None:
    """The child: its files, its environment, its command."""
    code = 1
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        out = os.open(str(order["out"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for source, target in ((null, 0), (out, 1), (log, 2)):
            os.dup2(source, target)
            os.close(source)
        environment = order["env"]
        assert isinstance(environment, dict)
        os.environ.clear()
        os.environ.update(environment)
        assert isinstance(order["argv"], list)
        sys.argv = ["churnstream", *order["argv"]]
        os.chdir(str(order["cwd"]))
        exec(str(order["program"]), {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
