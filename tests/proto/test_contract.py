"""The gRPC contract: its code is current, its form follows buf's rules, and no release takes anything back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import dashboards
from bench.stubs import CONTRACT, stale
from proto.churn.v1 import churn_pb2 as pb
from tests.conftest import ROOT

SHAPE = Path(__file__).with_name("contract.json")
"""(field numbers and types) by message, values by enum, methods: what callers were promised. A new line may join, none may go."""


def shape() -> dict[str, Any]:
    """What a caller relies on."""
    file = pb.DESCRIPTOR
    messages = {
        message.name: {
            str(field.number): [field.name, field.type, field.is_repeated, (field.message_type or field.enum_type or field).full_name]
            for field in message.fields
        }
        for message in file.message_types_by_name.values()
    }
    enums = {enum.name: {str(value.number): value.name for value in enum.values} for enum in file.enum_types_by_name.values()}
    methods = {
        method.name: [method.input_type.name, method.output_type.name, method.client_streaming, method.server_streaming]
        for method in file.services_by_name["ChurnService"].methods
    }
    return {"messages": messages, "enums": enums, "methods": methods}


def broken(before: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """What was promised before and is not so now."""
    found = []
    for name, value in before.items():
        place = f"{where}/{name}"
        if name not in now:
            found.append(f"{place} is gone")
        elif isinstance(value, dict):
            found += broken(value, now[name], place)
        elif value != now[name]:
            found.append(f"{place} was {value}, is {now[name]}")
    return found


def test_committed_code_and_dashboards_are_made_from_what_is_there() -> None:
    assert stale() == []
    assert dashboards.stale() == []


def test_nothing_promised_is_taken_back() -> None:
    before, now = json.loads(SHAPE.read_text("utf-8")), shape()
    assert broken(before, now) == []
    assert before == now, "the contract has grown: write tests/proto/contract.json anew"
    taken = json.loads(SHAPE.read_text("utf-8"))
    taken["messages"]["Score"]["99"] = ["gone", 9, False, "churn.v1.Score.gone"]
    taken["messages"]["Score"]["4"][1] = 2
    assert len(broken(taken, now)) == 2


def test_the_form_follows_the_rules_of_buf() -> None:
    file = pb.DESCRIPTOR
    assert (file.package, CONTRACT) == ("churn.v1", "proto/churn/v1/churn.proto")
    (service,) = file.services_by_name.values()
    assert service.name.endswith("Service")
    for method in service.methods:
        assert (method.input_type.name, method.output_type.name) == (f"{method.name}Request", f"{method.name}Response")
    for enum in file.enum_types_by_name.values():
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert enum.values[0].name == f"{prefix}UNSPECIFIED"
        assert all(value.name.startswith(prefix) for value in enum.values)
    for message in file.message_types_by_name.values():
        assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name) for field in message.fields), message.name
    text = (ROOT / CONTRACT).read_text("utf-8").splitlines()
    assert [line for before, line in pairwise(text) if line.startswith("  rpc ") and "//" not in before] == []


def test_every_alert_fires_when_it_should_and_none_when_all_is_well() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on the PATH (Debian: prometheus)")
    command = [promtool, "test", "rules", "deploy/prometheus/rules_test.yml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
