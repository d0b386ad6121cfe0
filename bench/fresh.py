"""What a stranger meets: the repository cloned into an empty folder, then one `make` command there, timed from nothing.

    python -m bench.fresh demo     # setting up included
    python -m bench.fresh test     # setting up timed apart

The clone holds what is committed. Packages and jars come from where this machine gets them; nothing of this checkout is used.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# What a stranger's shell does not know: our settings, and the virtual environment this runs in.
OURS = ("KAFKA_BOOTSTRAP_SERVERS", "REDIS_URL", "VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")


def environment() -> dict[str, str]:
    """The environment of a new shell."""
    here = str(Path(sys.executable).parent)
    clean = {name: value for name, value in os.environ.items() if name not in OURS and not name.startswith("CHURN_")}
    clean["PATH"] = os.pathsep.join(part for part in clean.get("PATH", "").split(os.pathsep) if part != here)
    return clean


def make(target: str, where: Path) -> tuple[float, str]:
    """Run `make TARGET`: seconds and what it wrote to stdout. Ends with the command's own words when it fails."""
    begin = time.monotonic()
    done = subprocess.run(["make", target], cwd=where, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(done.stdout[-4_000:], file=sys.stderr)
        raise SystemExit(f"make {target} ended with code {done.returncode}")
    return round(time.monotonic() - begin, 1), done.stdout


def demo(where: Path) -> dict[str, Any]:
    """The demo, setting up included."""
    seconds, out = make("demo", where)
    summary = json.loads(out.splitlines()[-1])
    return {"seconds": seconds, "residue": summary["residue"], "scores": summary["scores"]}


def test(where: Path) -> dict[str, Any]:
    """The tests: their time with and without setting up, and how many passed."""
    setup, _ = make("setup", where)
    seconds, out = make("test", where)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", out.splitlines()[-1])}
    return {"seconds": seconds, "setup_seconds": setup, **counts}


def main() -> None:
    """Run from the command line; the figures as one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("demo", "test"))
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="churnstream-") as folder:
        where = Path(folder) / "churnstream"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(where)], check=True)
        figures = demo(where) if arguments.what == "demo" else test(where)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
