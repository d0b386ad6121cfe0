"""The jars of Apache Kafka: fetched once per installation, every one checked against deploy/kafka.lock."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from proto.errors import BadInput, DependencyUnreachable

BROKER = "org.apache.kafka:kafka_2.13:4.3.1"
# The logging backend that the broker's Maven description leaves out: without it a broker that cannot start says nothing. Added by itself,
# not resolved together with the broker, because its parent would then choose other versions of the broker's own dependencies.
LOGGING = ("org.apache.logging.log4j", "log4j-slf4j-impl", "2.25.4")
LOCK = Path(__file__).parent.parent / "deploy" / "kafka.lock"


@dataclass(frozen=True, slots=True)
class Jar:
    """One locked artifact: Maven coordinates group:name:version and the sha256 of the file."""

    group: str
    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The name of the file in the jar directory."""
        return f"{self.name}-{self.version}.jar"


def read_lock(path: Path = LOCK) -> list[Jar]:
    """The locked jars. Raises BadInput when the file is missing or a line is not `group:name:version sha256:HEX`."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; the embedded Kafka needs a checkout of the repository") from error
    jars = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        coordinates, _, digest = line.partition(" sha256:")
        parts = coordinates.split(":")
        if len(parts) != 3 or len(digest) != 64:
            raise BadInput(f"{path}, line {number}: needs `group:name:version sha256:HEX`")
        jars.append(Jar(parts[0], parts[1], parts[2], digest))
    if not jars:
        raise BadInput(f"{path}: lists no jar; write it with `churnstream stack lock`")
    return jars


def jar_dir() -> Path:
    """Where this installation keeps its jars: inside the virtual environment, so that they leave with it."""
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12] if LOCK.is_file() else "none"
    return Path(sys.prefix) / "share" / "churnstream" / f"kafka-{digest}"


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def broken(directory: Path) -> list[str]:
    """File names that are missing or differ from the lock."""

    def wrong(jar: Jar) -> str | None:
        path = directory / jar.filename
        return None if path.is_file() and sha256(path) == jar.sha256 else jar.filename

    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        return [name for name in pool.map(wrong, read_lock()) if name]


def fetch() -> tuple[Path, int]:
    """Make every locked jar present. Returns the directory and how many were fetched (0 when all were there).

    Raises DependencyUnreachable when the Maven repository does not answer, BadInput when a file is not the locked one.
    """
    directory = jar_dir()
    wanted = set(broken(directory))
    if not wanted:
        return directory, 0
    directory.mkdir(parents=True, exist_ok=True)
    with _scratch(directory.parent) as scratch:
        from jgo.maven import MavenContext

        context = MavenContext(repo_cache=scratch, local_repos=[], timeout=30)

        def one(jar: Jar) -> None:
            try:
                path = context.project(jar.group, jar.name).at_version(jar.version).artifact().resolve()
            except Exception as error:  # jgo raises what its transport raises
                raise DependencyUnreachable(f"fetching {jar.filename}: {error}; is the Maven repository reachable?") from error
            if (found := sha256(path)) != jar.sha256:
                raise BadInput(
                    f"{jar.filename}: sha256 {found[:12]}... is not the locked {jar.sha256[:12]}...; nothing was installed from it"
                )
            os.replace(path, directory / jar.filename)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, [jar for jar in read_lock() if jar.filename in wanted]))
    return directory, len(wanted)


def write_lock(path: Path = LOCK) -> int:
    """Resolve the broker with all it depends on and write the lock anew. Returns the number of jars."""
    with _scratch(Path(tempfile.gettempdir())) as scratch:
        from jgo.env import EnvironmentBuilder
        from jgo.maven import MavenContext

        repository = scratch / "repository"
        context = MavenContext(repo_cache=repository, local_repos=[], timeout=30)
        EnvironmentBuilder(context=context, cache_dir=scratch / "environment").from_endpoint(BROKER)
        context.project(*LOGGING[:2]).at_version(LOGGING[2]).artifact().resolve()
        lines = []
        for file in sorted(repository.rglob("*.jar")):
            *group, name, version, _ = file.relative_to(repository).parts
            lines.append(f"{'.'.join(group)}:{name}:{version} sha256:{sha256(file)}")
    header = "# Apache Kafka for the embedded broker, with all it needs. Written by `churnstream stack lock`.\n"
    path.write_text(header + "\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="maven-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
