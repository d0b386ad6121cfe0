"""The public contracts as JSON Schema (2020-12), one file per kind of record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from pydantic import BaseModel

from proto.drift import DRIFT_OUTPUTS
from proto.events import MODELS
from proto.outcomes import OUTCOME_INPUTS
from proto.scores import OUTPUTS

_INPUTS: Final = ("transactions", "logins", "support-tickets", "customer-profiles")
CONTRACTS: Final[dict[str, type[BaseModel]]] = {
    **dict[str, type[BaseModel]](zip(_INPUTS, MODELS, strict=True)),
    **OUTPUTS,
    **DRIFT_OUTPUTS,
    **OUTCOME_INPUTS,
}
"""Contract by name of its schema file."""


def schemas() -> dict[str, str]:
    """File name to text of every schema; the same sources give the same bytes."""
    texts = {}
    for name, model in CONTRACTS.items():
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema(mode="validation")}
        texts[f"{name}.json"] = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    return texts


def differences(directory: Path) -> list[str]:
    """Files under `directory` that are missing, stale or not ours, each with what is the matter."""
    wanted, found = schemas(), {path.name: path.read_text("utf-8") for path in directory.glob("*.json")}
    problems = [f"{name}: missing" for name in wanted if name not in found]
    problems += [f"{name}: differs from the contract" for name, text in wanted.items() if name in found and found[name] != text]
    return problems + [f"{name}: belongs to no contract" for name in sorted(set(found) - set(wanted))]
