"""The packages the users asked for: declared in pyproject.toml, locked with hashes, importable."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What was asked for -> (the distribution that provides it, the module it is imported as).
ASKED_FOR = {
    "faust-streaming": ("faust-streaming", "faust"),
    "confluent-kafka": ("confluent-kafka", "confluent_kafka"),
    "river": ("river", "river"),
    "xgboost": ("xgboost-cpu", "xgboost"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "skl2onnx": ("skl2onnx", "skl2onnx"),
    "onnxmltools": ("onnxmltools", "onnxmltools"),
    "redis": ("redis", "redis"),
    "pydantic": ("pydantic", "pydantic"),
    "prometheus-client": ("prometheus-client", "prometheus_client"),
    "grpcio": ("grpcio", "grpc"),
    "orjson": ("orjson", "orjson"),
    "pytest": ("pytest", "pytest"),
    "testcontainers": ("testcontainers", "testcontainers"),
}


def declared() -> set[str]:
    """Distributions named in pyproject.toml, runtime and developer ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    return {re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def locked() -> dict[str, str]:
    """Distribution -> version in requirements.lock. Raises ValueError when an entry has no hash."""
    versions = {}
    for entry in (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if not entry or entry.startswith("#"):
            continue
        found = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", entry)
        if not found or "--hash=sha256:" not in entry:
            raise ValueError(f"requirements.lock: {entry[:60]}: no version or no hash")
        versions[found[1].lower()] = found[2]
    return versions


def importable(modules: list[str]) -> list[str]:
    """The modules that a fresh interpreter imports, each in a process of its own."""
    return [m for m in modules if subprocess.run([sys.executable, "-c", f"import {m}"], capture_output=True, check=False).returncode == 0]


if __name__ == "__main__":
    names, versions = declared(), locked()
    works = set(importable([module for _, module in ASKED_FOR.values()]))
    good = [asked for asked, (package, module) in ASKED_FOR.items() if package in names and package in versions and module in works]
    print(json.dumps({"packages": len(good), "missing": sorted(set(ASKED_FOR) - set(good))}))
