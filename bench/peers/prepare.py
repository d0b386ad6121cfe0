"""Makes the peers ready to run: Python ones in environments of their own, Java ones built by Maven; says why where one cannot be.

The peers lie outside this repository, in a directory that is only read: `run.py` there names their commands, `generate.py` makes their
events, `model.py` their model. What they need is kept under the data directory and made again when their sources change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PACKAGES: Final = {
    "faust": (
        "faust-streaming==0.15.3",
        "aiokafka==0.14.0",
        "cramjam",
        "confluent-kafka==2.16.1",
        "redis[hiredis]==8.1.0",
        "onnxruntime==1.32.0",
        "numpy",
        "orjson",
        "psutil",
        "uvloop==0.23.0",
    ),
    "quix": ("quixstreams==3.28.1", "onnxruntime==1.32.0", "numpy", "orjson"),
}
"""The versions their own figures were measured with."""
JAVA: Final = ("kafka_streams", "flink")
PARENT: Final = (
    '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion><groupId>peers</groupId><artifactId>all</artifactId>'
    "<version>1</version><packaging>pom</packaging><modules><module>kafka_streams</module><module>flink</module></modules></project>\n"
)
"""Flink's peer uses classes of the Kafka Streams peer: built together, nothing of them has to be installed for the whole user."""
PREPARE_S: Final = 900.0


class Unprepared(Exception):
    """Something a peer needs is not to be had; the text says what."""


@dataclass(frozen=True, slots=True)
class Command:
    """How a peer is started: its command line ("{state}" stands for a scratch directory) and its variables."""

    argv: Sequence[str]
    variables: Mapping[str, str]


@dataclass(slots=True)
class Peers:
    """What can run, why the rest cannot, and the model all of them load."""

    directory: Path
    model: Path
    commands: dict[str, Command] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def prepare(directory: Path, home: Path, wanted: Sequence[str]) -> Peers:
    """Prepare the `wanted` peers of `directory`; what is made goes to `home`. Never raises for a peer: it is skipped with the reason."""
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    peers = Peers(directory, home / "model.onnx")
    failed: dict[str, str] = {}
    environments = {"faust": "", "quix": ""}
    for name in environments:
        if any(_needs(peer) == name for peer in wanted) or name == "faust":
            try:
                environments[name] = str(_environment(home / name, PACKAGES[name]))
            except Unprepared as error:
                failed[name] = str(error)
    if any(_needs(peer) == "java" for peer in wanted):
        try:
            _build(directory, home / "java")
        except Unprepared as error:
            failed["java"] = str(error)
    try:
        _model(directory, peers.model)
        commands = _commands(directory, home, environments["faust"] or sys.executable, environments["quix"])
    except Unprepared as error:
        peers.skipped = dict.fromkeys(wanted, str(error))
        return peers
    for peer in wanted:
        if reason := failed.get(_needs(peer)):
            peers.skipped[peer] = reason
        elif peer not in commands:
            peers.skipped[peer] = f"{directory / 'run.py'} knows no peer of this name"
        else:
            peers.commands[peer] = commands[peer]
    return peers


def _needs(peer: str) -> str:
    return "java" if peer.startswith(("ks_", "flink_")) else "quix" if peer.startswith("quix") else "faust"


def _environment(place: Path, packages: Sequence[str]) -> Path:
    """A virtual environment with these packages; returns its interpreter."""
    python, mark = place / "bin" / "python", place / ".packages"
    if python.is_file() and mark.is_file() and mark.read_text(encoding="utf-8").split() == list(packages):
        return python
    uv = Path(sys.executable).parent / "uv"
    if uv.is_file():
        _run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(place)], "a virtual environment")
        _run([str(uv), "pip", "install", "--quiet", "--python", str(python), *packages], "packages from the index")
    else:
        _run([sys.executable, "-m", "venv", "--clear", str(place)], "a virtual environment")
        _run([str(python), "-m", "pip", "install", "--quiet", *packages], "packages from the index")
    mark.write_text("\n".join(packages), encoding="utf-8")
    return python


def _build(directory: Path, place: Path) -> None:
    """The Java peers and all their jars under `place`."""
    sources = [path for part in JAVA for path in sorted((directory / part).rglob("*")) if path.is_file() and "target" not in path.parts]
    if not sources:
        raise Unprepared(f"{directory} has no Java peers")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    mark = place / ".sources"
    if mark.is_file() and mark.read_text(encoding="utf-8") == digest:
        return
    for tool in ("mvn", "javac", "java"):
        if shutil.which(tool) is None:
            raise Unprepared(f"no {tool} on this machine (a JDK of 17 or newer and Maven build the Java peers)")
    shutil.rmtree(place, ignore_errors=True)
    for path in sources:
        target = place / path.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (place / "pom.xml").write_text(PARENT, encoding="utf-8")
    goals = ("package", "dependency:copy-dependencies", "-DincludeScope=runtime")
    _run(["mvn", "-q", "-B", "-f", str(place / "pom.xml"), *goals], "a build with Maven")
    mark.write_text(digest, encoding="utf-8")


def _model(directory: Path, target: Path) -> None:
    """The peers' shared model, made by their own script with our XGBoost."""
    if target.is_file():
        return
    scratch = target.with_suffix(".new")
    _run([sys.executable, "model.py", str(scratch)], "the peers' model", directory)
    scratch.replace(target)


def _commands(directory: Path, home: Path, python: str, quix: str) -> dict[str, Command]:
    """Their command lines as `run.py` has them."""
    variables = {
        "KAFKA_BOOTSTRAP_SERVERS": "unused:9092",
        "PEERS_PY": python,
        "PEERS_QUIX_PY": quix or python,
        **{
            f"PEERS_{short}_CP": f"{home / 'java' / part / 'target' / jar}{os.pathsep}{home / 'java' / part / 'target' / 'dependency'}/*"
            for short, part, jar in (("KS", "kafka_streams", "kafka-streams-peer-1.jar"), ("FLINK", "flink", "flink-peer-1.jar"))
        },
    }
    text = _run([python, "-c", "import json, run; print(json.dumps(run.PEERS))"], "the list of peers", directory, variables)
    return {name: Command(argv, more) for name, (argv, more) in json.loads(text.splitlines()[-1]).items()}


def _run(argv: Sequence[str], what: str, directory: Path | None = None, variables: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            argv,
            cwd=directory,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=PREPARE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unprepared(f"{what} is not to be had: {error}") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        raise Unprepared(f"{what} is not to be had: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout
