"""The state of a training set, for people and for its manifest: what is missing, what never moves, what changed on the way."""

from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from features.catalog import NAMES
from features.facts import KIND, TIME, TOPICS
from features.window import DAY_MS
from models.dataset import IntArray, Rows

Floats = npt.NDArray[np.float64]

UNIT_FACTOR: Final = 20.0
"""A typical value that changes so many times between two cut-offs is reported as a change of unit."""


def of_facts(facts: IntArray, rejected: int) -> dict[str, JsonValue]:
    """Counts per topic, days without any fact between its first and last one, and facts out of time order; facts (n, WIDTH)."""
    out: dict[str, JsonValue] = {"facts": len(facts), "rejected": rejected}
    for topic, name in enumerate(TOPICS):
        times = facts[facts[:, KIND] >> 3 == topic, TIME]
        days = np.unique(times // DAY_MS)
        out[name] = {
            "facts": len(times),
            "days": len(days),
            "days_without": int(days[-1] - days[0] + 1 - len(days)) if len(days) else 0,
            "out_of_order_share": round(float(np.mean(times < np.maximum.accumulate(times))), 5) if len(times) else 0.0,
        }
    return out


def summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Reports of several partitions as one: counts added; of days without a fact and shares the smallest and the mean."""
    total: dict[str, Any] = {name: sum(part[name] for part in parts) for name in ("facts", "rejected")}
    for name in TOPICS:
        own = [part[name] for part in parts]
        total[name] = {
            "facts": sum(p["facts"] for p in own),
            "days": max((p["days"] for p in own), default=0),
            "days_without": min((p["days_without"] for p in own), default=0),
            "out_of_order_share": round(float(np.mean([p["out_of_order_share"] for p in own])) if own else 0.0, 5),
        }
    return total


def of_rows(rows: Rows) -> dict[str, Any]:
    """Per cut-off: rows, maturity, base rate. Per feature: share missing, quartiles, and whether its typical size jumps between two."""
    instants = []
    for at in np.unique(rows.at[rows.kind == 1]).tolist():
        y = rows.y[(rows.at == at) & (rows.kind == 1)]
        known = y[y >= 0]
        instants.append(
            {"at": at, "rows": len(y), "labelled": len(known), "base_rate": round(float(known.mean()), 4) if len(known) else None}
        )
    columns = {name: _column(rows, column) for column, name in enumerate(NAMES)}
    warnings = [f"{name}: {text}" for name, entry in columns.items() for text in entry.pop("warnings")]
    return {"cutoffs": instants, "features": columns, "warnings": warnings}


def _column(rows: Rows, column: int) -> dict[str, Any]:
    values = rows.x[:, column].astype(np.float64)
    known = values[~np.isnan(values)]
    warnings = []
    if not len(known):
        warnings.append("never known")
        return {"missing": 1.0, "warnings": warnings}
    if len(known) == len(values) and known.min() == known.max():
        warnings.append("the same in every row")
    typical = [float(np.median(part)) for at in np.unique(rows.at) if len(part := _known_at(values, rows.at == at)) > 30]
    for before, after in pairwise(typical):
        if before > 0 and after > 0 and not 1 / UNIT_FACTOR < after / before < UNIT_FACTOR:
            warnings.append(f"its median goes from {before:g} to {after:g} between two cut-offs: a change of unit?")
            break
    return {
        "missing": round(1 - len(known) / len(values), 4),
        "quartiles": [float(f"{q:.6g}") for q in np.quantile(known, (0, 0.25, 0.5, 0.75, 1))],
        "warnings": warnings,
    }


def _known_at(values: Floats, where: Any) -> Floats:
    """The known values of some rows that are not 0 (most counts are 0 most of the time, and hide a change)."""
    part: Floats = values[where]
    known: Floats = part[(part > 0) & ~np.isnan(part)]
    return known
