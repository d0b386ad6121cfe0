"""Worker processes forked from one that has its imports done: a start costs a tenth of a second of CPU instead of four.

    python -m bench.faults.nursery      reads one JSON object a line ({"argv", "env", "out", "log"}), answers with lines of JSON

Each is a process of its own that runs the same command with the same environment; only what `import` does is shared. Rounds whose figures
depend on the time a start takes use fresh processes (`Fresh`).
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
from typing import IO, Protocol


class Child(Protocol):
    """What a round needs of a process: as subprocess.Popen."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, sig: int) -> None: ...

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
                [sys.executable, "-c", "from streams.cli import main; main()", *argv],
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

    def start(self, argv: Sequence[str], environment: Mapping[str, str], out: Path, log: Path) -> Child:
        """Start a child; returns when it is born."""
        with self._lock:
            self._stdin.write(json.dumps({"argv": list(argv), "env": dict(environment), "out": str(out), "log": str(log)}) + "\n")
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
    for name in ("streams.commands.worker", "streams.main"):  # all of it: that is what children need not do again
        import_module(name)
    from streams.cli import main

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
            _become(order, main)
        tell({"born": pid})
        threading.Thread(target=watch, args=(pid,), daemon=True).start()


def _become(order: dict[str, object], main: object) -> None:
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
        assert callable(main)
        main()
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
