"""A model tried in a throw-away process before a worker opens it: whatever it does to the process, the worker goes on.

    python -m models.quarantine < envelope

The process may use so much CPU and memory, writes no file, opens no further one once it has its imports, and runs at low priority. It
takes the envelope apart, opens the graph and scores the golden rows, at every batch size. Its last line is a JSON object.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from features.catalog import LAYOUT_HASH
from proto.errors import ArtifactRejected

CPU_S: Final = 20
MEMORY_BYTES: Final = 2 << 30
"""Beyond what the imports have taken."""
WALL_S: Final = 60.0
NICE: Final = 5
REFUSED: Final = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one trial: CPU seconds, bytes of address space, seconds by the clock."""

    cpu_s: int = CPU_S
    memory_bytes: int = MEMORY_BYTES
    wall_s: float = WALL_S


def examine(envelope: bytes, limits: Limits | None = None) -> dict[str, Any]:
    """What the trial found: digest and peak memory. Raises ArtifactRejected when the model is refused, or the process fails on it."""
    limits = limits or Limits()
    root = Path(__file__).resolve().parent.parent
    argv = [sys.executable, "-m", "models.quarantine", str(limits.cpu_s), str(limits.memory_bytes)]
    # Nothing of the environment that could tell the process more than the model: no addresses, no secrets.
    environment = {key: os.environ[key] for key in ("PATH", "LANG", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV") if key in os.environ}
    try:
        done = subprocess.run(argv, input=envelope, capture_output=True, timeout=limits.wall_s, check=False, env=environment, cwd=root)
    except subprocess.TimeoutExpired as error:
        raise ArtifactRejected(f"model refused: its trial took longer than {limits.wall_s:g} s") from error
    said = done.stdout.decode("utf-8", "replace").strip().splitlines()
    if done.returncode == 0 and said:
        found: dict[str, Any] = json.loads(said[-1])
        return found
    if done.returncode == REFUSED and said:
        raise ArtifactRejected(str(json.loads(said[-1])["refused"]))
    last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or [""])[-1]
    how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with code {done.returncode}"
    bounds = f"{limits.cpu_s} s of CPU and {limits.memory_bytes >> 20} MiB"
    raise ArtifactRejected(f"model refused: its trial {how}, bounds being {bounds}" + (f": {last}" if last else ""))


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Trials with a memory: what passed is not tried again on this machine, so a worker that starts again is not held up.

    directory: one empty file per model that passed, named after its bytes and the versions of Python and ONNX Runtime.
    """

    directory: Path
    limits: Limits = Limits()

    def examine(self, envelope: bytes) -> None:
        """Raises ArtifactRejected when the model does not pass."""
        with_what = f"{sys.version_info[:3]} {version('onnxruntime')} {LAYOUT_HASH} ".encode()
        passed = self.directory / sha256(with_what + envelope).hexdigest()
        if passed.exists():
            return
        examine(envelope, self.limits)
        self.directory.mkdir(parents=True, exist_ok=True)
        passed.touch()


def _confine(cpu_s: int, memory_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    spent = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(spent.ru_utime + spent.ru_stime) + cpu_s
    for limit, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, used + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),  # what is open stays open
    ):
        resource.setrlimit(limit, (value, value))


def _try(envelope: bytes) -> dict[str, Any]:
    from models.artifact import unpack
    from models.session import Session

    artifact = unpack(envelope)
    session = Session(artifact.onnx)
    golden = artifact.tables.golden
    session.prove(golden, artifact.tables.golden_probability)
    return {"digest": artifact.digest}


def main() -> int:
    """The throw-away process."""
    # All that is needed is imported before the doors close.
    import models.artifact
    import models.session  # noqa: F401 - as above

    envelope = sys.stdin.buffer.read()
    os.nice(NICE)
    _confine(int(sys.argv[1]), int(sys.argv[2]))
    try:
        found = _try(envelope)
    except ArtifactRejected as error:
        print(json.dumps({"refused": str(error)}), flush=True)
        return REFUSED
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
