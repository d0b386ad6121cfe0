"""Compile once, keep on disk: where Numba's cache lies, and the decorator every compiled function wears.

Numba looks only at the file of a function when it decides whether cached machine code is still good, so a change in a
function it calls from another file would go unnoticed. Here every state of the sources has a directory of its own.
Import `kernel` and `types` from this module before anything else imports numba functions of ours.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

SOURCES: Final = Path(__file__).resolve().parent
IDLE_S: Final = 3600
"""A directory of another source state goes once it has not been used for so long: nobody compiles into it any more."""


def source_digest(sources: Path, facts: Sequence[str] = ()) -> str:
    """Digest of every *.py under `sources` (names and bytes) and of `facts` about the toolchain."""
    digest = blake2b(digest_size=12)
    for path in sorted(sources.glob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    for fact in facts:
        digest.update(f"{len(fact)} {fact}\n".encode())
    return digest.hexdigest()


def _toolchain() -> list[str]:
    cpu: str = import_module("llvmlite.binding").get_host_cpu_name()
    return [platform.python_implementation(), sys.version, cpu, *(version(name) for name in ("numba", "numpy", "llvmlite"))]


def cache_directory(sources: Path = SOURCES, data_dir: Path | None = None) -> Path:
    """<data dir>/numba/<digest>; the data dir is CHURN_DATA_DIR or ./.churnstream."""
    root = Path(os.environ.get("CHURN_DATA_DIR") or ".churnstream") if data_dir is None else data_dir
    return root.resolve() / "numba" / source_digest(sources, _toolchain())


def claim(directory: Path) -> None:
    """Make the directory, mark it used now, and remove its siblings that were idle for IDLE_S.

    Safe beside other processes: Numba writes each file under a temporary name and renames it, and a directory somebody
    may still be compiling into is never idle for that long.
    """
    directory.mkdir(parents=True, exist_ok=True)
    os.utime(directory)
    now = directory.stat().st_mtime
    for sibling in directory.parent.iterdir():
        try:
            idle = sibling != directory and now - sibling.stat().st_mtime > IDLE_S
        except FileNotFoundError:  # another process was quicker
            continue
        if idle:
            shutil.rmtree(sibling, ignore_errors=True)


def _start() -> tuple[Any, Path]:
    directory = cache_directory()
    claim(directory)
    # Both: the variable for a numba not imported yet (it reads it again whenever the environment changes), the
    # attribute for one that another library has imported before us.
    os.environ["NUMBA_CACHE_DIR"] = str(directory)
    numba = import_module("numba")
    numba.config.CACHE_DIR = str(directory)
    return numba, directory


_numba, CACHE_DIRECTORY = _start()
types: Any = _numba.types


def kernel(signature: Any) -> Callable[[Function], Function]:
    """Compile a function for exactly this signature, now: nothing is left to compile when it is called.

    signature: text or Numba type, e.g. "int64(int64[::1], int64)". The function runs without the GIL, divides as IEEE 754
    says, keeps the order of float operations as written, and is found in CACHE_DIRECTORY by the next process.
    """

    def compile_it(function: Function) -> Function:
        decorate = _numba.njit(signature, cache=True, nogil=True, error_model="numpy", fastmath=False)
        return cast(Function, decorate(function))

    return compile_it


def modules(sources: Path = SOURCES) -> list[str]:
    """Modules of this package that hold compiled functions."""
    wearers = [path for path in sorted(sources.glob("*.py")) if "from features.compiled import" in path.read_text("utf-8")]
    return [f"features.{path.stem}" for path in wearers if path.name != Path(__file__).name]


def main() -> None:
    """Compile everything here, and the modules named on the command line, and print the seconds it took."""
    from time import perf_counter

    began = perf_counter()
    for module in [*modules(), *sys.argv[1:]]:
        before = perf_counter()
        import_module(module)
        print(f"{module:24} {perf_counter() - before:6.2f} s")
    print(f"{'all':24} {perf_counter() - began:6.2f} s   {CACHE_DIRECTORY}")


if __name__ == "__main__":
    main()
