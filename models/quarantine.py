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
from contextlib import suppress
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


def _rehearse() -> None:
    """Take a model of one question through the same steps: libraries import parts of themselves when first asked, and then need files."""
    import numpy as np

    from features.catalog import N_FEATURES, NAMES
    from models import graph
    from models.artifact import Calibration, Manifest, Tables, Thresholds, pack
    from models.session import Session

    node, none = np.array([0, -1, -1], np.int32), np.zeros(3, np.float32)
    forest = graph.Forest(
        root=np.array([0], np.int32),
        feature=node,
        value=none,
        yes=np.array([1, -1, -1], np.int32),
        no=np.array([2, -1, -1], np.int32),
        missing_yes=np.zeros(3, np.bool_),
        weight=np.array([0, -1, 1], np.float32),
        base=0.0,
    )
    onnx = graph.write(forest, N_FEATURES)
    golden = np.linspace(-1, 1, 2 * N_FEATURES, dtype=np.float32).reshape(2, -1)
    tables = Tables(np.array([0.5, 0, 0]), golden, Session(onnx).probabilities(golden))
    manifest = Manifest(
        name="rehearsal",
        version="0",
        layout_hash=LAYOUT_HASH,
        features_used=list(NAMES),
        onnx_sha256=sha256(onnx).hexdigest(),
        tables_sha256=sha256(tables.encode()).hexdigest(),
        calibration=Calibration(slope=1.0, offset=0.0),
        thresholds=Thresholds(medium=0.3, high=0.6, version="0"),
        label={},
        data={},
        training={},
        metrics={"test": {"auc": 0.5, "auc_interval": [0.4, 0.6]}},
        baseline={},
        gates={},
        runtime={},
    )
    envelope = pack(manifest, onnx, tables)
    _try(envelope)
    for damaged in (envelope[:-1], b""):
        with suppress(ArtifactRejected):
            _try(damaged)


def main() -> int:
    """The throw-away process."""
    _rehearse()  # before the doors close
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
