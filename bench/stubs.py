"""The Python code of the gRPC contract, made from the .proto file: python -m bench.stubs [--check]."""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
CONTRACT: Final = "proto/churn/v1/churn.proto"
MADE: Final = ("churn_pb2.py", "churn_pb2.pyi", "churn_pb2_grpc.py")


def make(directory: Path) -> None:
    """Write the code of the contract below a directory. Raises SystemExit when the contract does not compile."""
    from grpc_tools import protoc

    known = str(files("grpc_tools") / "_proto")
    options = [f"--{kind}_out={directory}" for kind in ("python", "pyi", "grpc_python")]
    if code := protoc.main(["protoc", f"-I{ROOT}", f"-I{known}", *options, CONTRACT]):
        raise SystemExit(code)


def stale() -> list[str]:
    """Committed files that are not what the contract gives now."""
    home = (ROOT / CONTRACT).parent
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        fresh = Path(scratch, CONTRACT).parent
        return [name for name in MADE if not (home / name).is_file() or (home / name).read_bytes() != (fresh / name).read_bytes()]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a file is stale")
    if not parser.parse_args().check:
        make(ROOT)
    elif found := stale():
        sys.exit(f"made from another contract: {', '.join(found)}; run `make proto`")


if __name__ == "__main__":
    main()
