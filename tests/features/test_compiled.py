"""Machine code is never older than the sources: each state of them has a cache directory of its own."""

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest

from features import compiled

SOURCES = compiled.SOURCES
FILES = sorted(path.name for path in SOURCES.glob("*.py"))


def copy_of_the_sources(to: Path) -> Path:
    copy = to / "features"
    shutil.copytree(SOURCES, copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.mark.parametrize("name", FILES)
def test_a_change_in_any_source_gives_another_directory(name: str, tmp_path: Path) -> None:
    copy = copy_of_the_sources(tmp_path)
    before = compiled.cache_directory(copy, tmp_path)
    assert before == compiled.cache_directory(copy, tmp_path)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content.replace(b"a", b"b", 1) if b"a" in content else content + b"\n")
    assert compiled.cache_directory(copy, tmp_path) != before
    (copy / name).write_bytes(content)
    assert compiled.cache_directory(copy, tmp_path) == before


def test_a_new_or_renamed_source_or_toolchain_gives_another_digest(tmp_path: Path) -> None:
    copy = copy_of_the_sources(tmp_path)
    digests = [compiled.source_digest(copy, ["numba 1"]), compiled.source_digest(copy, ["numba 2"]), compiled.source_digest(copy)]
    (copy / "another.py").write_text("")
    digests.append(compiled.source_digest(copy))
    (copy / "another.py").rename(copy / "renamed.py")
    digests.append(compiled.source_digest(copy))
    assert len(set(digests)) == len(digests)


def test_the_directory_in_use_is_that_of_the_sources() -> None:
    assert compiled.CACHE_DIRECTORY.parent.name == "numba"
    assert list(compiled.CACHE_DIRECTORY.rglob("*.nbi")), "nothing of ours was cached there"
    numba = sys.modules["numba"]
    assert str(compiled.CACHE_DIRECTORY) == numba.config.CACHE_DIR


CALLEE = "from features.compiled import kernel\n@kernel('int64(int64)')\ndef inner(x):\n    return x + {}\n"
CALLER = """
    from features.compiled import kernel
    from features.callee import inner
    @kernel('int64(int64)')
    def outer(x):
        return inner(x)
    if __name__ == "__main__":
        print(outer(1))
"""
# The same two functions with the decorator one would write without thinking about it, and one directory for ever.
PLAIN_CALLEE = "import numba\n@numba.njit('int64(int64)', cache=True)\ndef inner(x):\n    return x + {}\n"
PLAIN_CALLER = """
    import numba
    from features.callee import inner
    @numba.njit('int64(int64)', cache=True)
    def outer(x):
        return inner(x)
    if __name__ == "__main__":
        print(outer(1))
"""


def run(root: Path) -> int:
    environment = {**os.environ, "CHURN_DATA_DIR": str(root / "data"), "NUMBA_CACHE_DIR": str(root / "plain"), "PYTHONPATH": str(root)}
    code = "import features.caller as c; print(c.outer(1))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def package(root: Path, callee: str, caller: str) -> Path:
    (root / "features").mkdir()
    (root / "features" / "__init__.py").write_text("")
    shutil.copy(SOURCES / "compiled.py", root / "features")
    (root / "features" / "caller.py").write_text(dedent(caller))
    (root / "features" / "callee.py").write_text(callee.format(1))
    return root / "features" / "callee.py"


def test_a_change_in_a_called_function_is_seen_by_its_caller(tmp_path: Path) -> None:
    callee = package(tmp_path, CALLEE, CALLER)
    assert run(tmp_path) == 2
    callee.write_text(CALLEE.format(100))
    assert run(tmp_path) == 101


def test_numba_alone_would_have_served_the_old_one(tmp_path: Path) -> None:
    callee = package(tmp_path, PLAIN_CALLEE, PLAIN_CALLER)
    assert run(tmp_path) == 2
    callee.write_text(PLAIN_CALLEE.format(100))
    assert run(tmp_path) == 2, "numba looks at called functions now: the directory per source state may go"


def test_two_processes_may_compile_at_the_same_time(tmp_path: Path) -> None:
    package(tmp_path, CALLEE, CALLER)
    environment = {**os.environ, "CHURN_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import features.caller as c; print(c.outer(1))"]
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0].strip() for process in both] == ["2", "2"]
    assert [process.returncode for process in both] == [0, 0]
    assert run(tmp_path) == 2


def test_directories_nobody_has_used_for_long_are_removed(tmp_path: Path) -> None:
    old, recent, own = (tmp_path / "numba" / name for name in ("old", "recent", "own"))
    for directory, age in ((old, compiled.IDLE_S + 60), (recent, compiled.IDLE_S - 60)):
        directory.mkdir(parents=True)
        (directory / "code.nbc").write_bytes(b"x")
        then = directory.stat().st_mtime - age
        os.utime(directory, (then, then))
    compiled.claim(own)
    assert sorted(path.name for path in (tmp_path / "numba").iterdir()) == ["own", "recent"]


def test_nothing_is_left_to_compile_at_call_time() -> None:
    dispatchers = [
        (module.__name__, name, function)
        for module in map(import_module, compiled.modules())
        for name, function in vars(module).items()
        if hasattr(function, "signatures") and hasattr(function, "py_func")
    ]
    assert len(dispatchers) > 40
    for module_name, name, function in dispatchers:
        assert len(function.signatures) == 1, f"{module_name}.{name}"
        assert not function._can_compile, f"{module_name}.{name} would compile for other types at call time"
