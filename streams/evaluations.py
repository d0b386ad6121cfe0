"""Evaluations kept beside the models: the judged rows as Parquet, everything about them as JSON, and the page of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
from pyarrow.parquet import ParquetFile, write_table

from features.catalog import NAMES
from models import pages
from models.policy import GROUPS
from models.train import Trained
from proto.errors import BadInput

ROWS: Final = "rows.parquet"
BODY: Final = "evaluation.json"
PAGE: Final = "report.html"
SPEND: Final = NAMES.index("spend_minor_sum_90d")


@dataclass(frozen=True, slots=True)
class Judged:
    """The judged rows of a model (n,): what it said, what happened, what the customer spent in 90 days (minor units), and their groups."""

    customer: list[str]
    at: npt.NDArray[np.int64]
    y: npt.NDArray[np.int8]
    score: npt.NDArray[np.float64]
    spend_minor: npt.NDArray[np.float64]
    groups: dict[str, list[str]]


def save(directory: Path, trained: Trained, body: Mapping[str, Any], names: Mapping[int, str]) -> Path:
    """Keep an evaluation as <directory>/<digest>/; a second time overwrites it. Returns its home."""
    home = directory / trained.manifest.digest
    home.mkdir(parents=True, exist_ok=True)
    test = trained.test
    columns: dict[str, Any] = {
        "customer_id": pa.array([test.names[i] for i in test.customer.tolist()]),
        "at": pa.array(test.at),
        "churned": pa.array(test.y),
        "probability": pa.array(trained.score(test.x)),
        "recency": pa.array(trained.recency),
        "spend_minor": pa.array(test.x[:, SPEND].astype(np.float64)),
    }
    for column, name in enumerate(GROUPS):
        texts = {
            number: names.get(number, "unknown" if number == 0 else f"#{number & 0xFFFFFF:06x}")
            for number in np.unique(test.profile[:, column]).tolist()
        }
        columns[name] = pa.array([texts[number] for number in test.profile[:, column].tolist()])
    write_table(pa.table(columns), home / ROWS, compression="zstd")
    (home / BODY).write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
    (home / PAGE).write_text(pages.html(orjson.loads((home / BODY).read_bytes())), encoding="utf-8")
    return home


def find(directory: Path, digest: str | None) -> Path:
    """The kept evaluation whose digest begins so; None = the newest. Raises BadInput."""
    homes = sorted((home for home in directory.glob("*") if (home / BODY).exists()), key=lambda home: (home / BODY).stat().st_mtime)
    found = homes[-1:] if digest is None else [home for home in homes if home.name.startswith(digest)]
    if len(found) != 1:
        said = "none is kept" if not homes else f"{len(found)} kept evaluations begin so"
        raise BadInput(f"evaluation {digest or 'of the newest model'}: {said}; `churnstream models train` makes one with every model")
    return found[0]


def body_of(home: Path) -> dict[str, Any]:
    """The evaluation as JSON. Raises BadInput when it cannot be read."""
    try:
        body: dict[str, Any] = orjson.loads((home / BODY).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise BadInput(f"{home / BODY}: {error}; train the model again") from error
    return body


def rows_of(home: Path) -> Judged:
    """The judged rows. Raises BadInput when they cannot be read."""
    try:
        table = ParquetFile(home / ROWS).read()
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{home / ROWS}: {error}; train the model again") from error
    return Judged(
        table["customer_id"].to_pylist(),
        np.asarray(table["at"]),
        np.asarray(table["churned"]),
        np.asarray(table["probability"]),
        np.asarray(table["spend_minor"]),
        {name: table[name].to_pylist() for name in GROUPS},
    )
