"""The house as a stranger finds it: layout, packages, contract of imports, a quick command, nothing of one machine in it."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.house import ASKED_FOR, declared, importable, locked
from streams.cli import GROUPS
from streams.settings import Settings, variable
from tests.conftest import ROOT, bare_environment, run_command

HEAVY = ("pandas", "sklearn", "xgboost", "river", "numba", "onnxruntime", "faust", "confluent_kafka", "pyarrow", "numpy")


def tracked() -> list[Path]:
    """The files of the repository, those not yet committed included."""
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_the_names_asked_for_exist() -> None:
    folders = ("streams", "features", "models", "scoring", "drift", "proto", "tests")
    files = ("docker-compose.kafka.yml", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile")
    assert [name for name in folders if not (ROOT / name).is_dir()] == []
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_14_packages_are_declared_locked_and_importable() -> None:
    assert len(ASKED_FOR) == 14
    assert [p for p, _ in ASKED_FOR.values() if p not in declared()] == []
    assert [p for p, _ in ASKED_FOR.values() if p not in locked()] == []
    modules = [module for _, module in ASKED_FOR.values()]
    assert importable(modules) == modules


def test_every_declared_package_is_locked() -> None:
    assert sorted(declared() - set(locked())) == []


def test_what_is_locked_is_what_is_installed() -> None:
    from importlib.metadata import version

    assert {p: version(p) for p, _ in ASKED_FOR.values()} == {p: locked()[p] for p, _ in ASKED_FOR.values()}


def test_proto_is_ours_and_not_that_of_proto_plus() -> None:
    import proto.errors

    assert Path(proto.errors.__file__).parent == ROOT / "proto"
    assert "proto-plus" not in locked()


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    probe = f"""
import sys
from streams.cli import main
try:
    main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
print("HEAVY", [m for m in {HEAVY!r} if m in sys.modules])
"""
    best = 9.0
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", probe], env=bare_environment(), capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # CPU time, not the clock: the machine may be busy with the other tests.
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert best < 0.4


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_every_group_answers_help(name: str) -> None:
    done = run_command(name, "--help")
    assert done.code == 0, done.err
    assert done.out.startswith(f"Usage: churnstream {name}")


def test_help_shows_examples_and_exit_codes() -> None:
    out = run_command("--help").out
    assert "Examples:" in out
    assert all(re.search(rf"^ +{code} ", out, re.MULTILINE) for code in (0, 1, 2, 3, 4, 130))
    assert all(name in out for name in GROUPS)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("topic",), {}, "Did you mean 'topics'?"),
        (("config", "show"), {"CHURN_PARTITION": "8"}, "did you mean partitions?"),
        (("config", "show"), {"CHURN_PARTITIONS": "many"}, "setting partitions (environment CHURN_PARTITIONS)"),
        (("--set", "partitions=0", "config", "show"), {}, "setting partitions (flag)"),
        (("--set", "partitions", "config", "show"), {}, "needs NAME=VALUE"),
        (("--config", "no-such-file.toml", "config", "show"), {}, "not found"),
        (("config", "show"), {"CHURN_REDIS_URL": "x"}, "is named REDIS_URL"),
        (("config", "show"), {"CHURN_RATES__USD": "-1"}, "setting rates"),
    ],
)
def test_wrong_usage_exits_2_with_a_hint_and_no_traceback(arguments: tuple[str, ...], environment: dict[str, str], said: str) -> None:
    done = run_command(*arguments, environment={**bare_environment(), **environment})
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    (tmp_path / "churnstream.toml").write_text(
        'partitions = 2\nreplication = 2\nretention_days = 200\n[kafka]\n"security.protocol" = "SSL"\n[rates]\nUSD = 0.92\n'
    )
    (tmp_path / "secret").write_text("hunter2\n")
    environment = {
        **bare_environment(),
        "CHURN_PARTITIONS": "3",
        "CHURN_REPLICATION": "3",
        "CHURN_RATES__gbp": "1.17",
        "CHURN_KAFKA__SASL_PASSWORD_FILE": str(tmp_path / "secret"),
        "REDIS_URL_FILE": str(tmp_path / "secret"),
    }
    done = run_command("--set", "partitions=4", "config", "show", "--json", environment=environment, cwd=tmp_path)
    assert done.code == 0, done.err
    shown = done.json()["settings"]
    assert shown["partitions"] == {"value": 4, "origin": "flag"}
    assert shown["replication"] == {"value": 3, "origin": "environment CHURN_REPLICATION"}
    assert shown["retention_days"] == {"value": 200, "origin": "file churnstream.toml"}
    assert shown["future_allowance_ms"] == {"value": 300_000, "origin": "default"}
    assert shown["kafka"]["value"] == {"security.protocol": "SSL", "sasl.password": "***"}
    assert shown["rates"]["value"] == {"USD": "0.92", "GBP": "1.17"}
    assert shown["redis_url"]["value"] == "***"
    assert "hunter2" not in done.out + done.err


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        [f"{sys.executable} -c 'from streams.cli import main; main()' config show | head -1"],
        shell=True, env=bare_environment(), cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""


def test_imports_point_down() -> None:
    # The command of `make lint`, so that the contract is kept by the tests as well.
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_nothing_of_one_machine_is_in_the_repository() -> None:
    # Written in parts, so that this file does not find itself.
    paths = re.compile("/" + r"(?:work|root|home/\w+)/(?!\*)")
    hosts = re.compile(
        "|".join(("pypi" + r"\.org", "files" + r"\.pythonhosted", "repo1?" + r"\.maven", "registry" + r"\.npmjs", "--index" + "-url http"))
    )
    found = []
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}: {m[0]}" for pattern in (paths, hosts) for m in pattern.finditer(text)]
    assert found == []


def compose() -> dict[str, Any]:
    """docker-compose.kafka.yml as data."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.kafka.yml").read_text(encoding="utf-8"))
    return content


def test_the_compose_file_has_what_a_worker_needs() -> None:
    services = compose()["services"]
    assert {"kafka", "redis", "worker"} <= set(services)
    kafka = services["kafka"]["environment"]
    assert services["kafka"]["image"].startswith("apache/kafka:4.")
    assert kafka["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert int(kafka["KAFKA_MESSAGE_MAX_BYTES"]) > 32 << 20
    advertised = dict(entry.split("://") for entry in kafka["KAFKA_ADVERTISED_LISTENERS"].split(","))
    listening = {entry.split("://")[0] for entry in kafka["KAFKA_LISTENERS"].split(",")}
    assert set(advertised) <= listening
    assert listening == {entry.split(":")[0] for entry in kafka["KAFKA_LISTENER_SECURITY_PROTOCOL_MAP"].split(",")}
    assert "noeviction" in services["redis"]["command"]
    worker = services["worker"]
    assert worker["environment"]["KAFKA_BOOTSTRAP_SERVERS"] == advertised[kafka["KAFKA_INTER_BROKER_LISTENER_NAME"]]
    assert (ROOT / worker["build"]["context"] / worker["build"]["dockerfile"]).is_file()
    assert worker["command"][0] in GROUPS
    assert services["topics"]["command"] == ["topics", "create"]
    assert all(port.startswith("127.0.0.1:") for name in ("kafka", "redis") for port in services[name]["ports"])
    assert worker["restart"] == "unless-stopped"  # a worker that cannot go on ends
    assert int(worker["stop_grace_period"].removesuffix("s")) > 10  # in which a worker stops, or ends hard
    dockerfile = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert ":" in service["image"]
        assert not service["image"].endswith(":latest")
        for mount in service.get("volumes", ()):
            volume, path = mount.split(":")
            assert volume in compose()["volumes"]
            # A volume of ours takes its owner from the image; without the directory there it would be root's.
            assert "build" not in service or f" {path}" in dockerfile.partition("install --directory")[2].splitlines()[0]
    for name in ("worker", "topics"):
        assert set(services[name]["environment"]) <= {variable(field) for field in Settings.model_fields}
    # Transactions and offsets on one node, as on the embedded broker.
    for key in ("OFFSETS_TOPIC_REPLICATION_FACTOR", "TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "TRANSACTION_STATE_LOG_MIN_ISR"):
        assert kafka[f"KAFKA_{key}"] == "1"


def test_the_image_copies_what_there_is() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8").splitlines()
    sources = [part for line in lines if line.startswith("COPY ") and "--from" not in line for part in line.split()[1:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert {"streams", "scoring", "drift", "models", "features", "proto"} <= set(sources)
