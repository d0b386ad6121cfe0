"""Training sets: rows of all partitions made in parallel, kept as Parquet with a manifest, read back as the same rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
from pyarrow.parquet import ParquetFile, write_table

from features.catalog import LAYOUT_HASH, NAMES
from features.facts import TIME
from features.texts import digests, key_of
from models import lint, quality
from models.dataset import PROFILE_COLUMNS, Rows, build, concatenate
from models.labels import Label
from proto.errors import BadInput
from streams.settings import Settings
from streams.training import Facts, from_simulation

MANIFEST: Final = "manifest.json"
ROWS: Final = "rows.parquet"
_LINT_CUSTOMERS: Final = 60
_LINT_CUTOFFS: Final = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """What rows to make: instants (ms) at which all of the label's population give one, the span of event rows, up to when data are
    complete; share of the snapshot rows that is kept (by customer and instant, the same ones every time)."""

    label: Label
    snapshots: tuple[int, ...]
    events: tuple[int, int] | None
    known_to_ms: int
    share: float = 1.0
    corrected: bool = False


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows, what the lint found, and the state of the data."""

    rows: Rows
    findings: list[lint.Finding]
    quality: dict[str, Any]


def of_parts(parts: Sequence[Facts], plan: Plan) -> Dataset:
    """The rows of facts in memory."""
    made = [_made(part, plan) for part in parts]
    return _together(made)


def of_simulation(
    directory: Path,
    blocks: Sequence[int],
    plan: Plan,
    settings: Settings,
    *,
    processes: int = 0,
    on_block: Callable[[int], None] = lambda done: None,
) -> Dataset:
    """The rows of a simulation, block by block over so many processes (0 = one per core); a process holds one block's facts."""
    jobs = [(directory, block, plan, settings) for block in blocks]
    workers = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    made = []
    if workers == 1:
        for done, one in enumerate(map(_of_block, jobs), 1):
            made.append(one)
            on_block(done)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for done, one in enumerate(pool.map(_of_block, jobs), 1):
                made.append(one)
                on_block(done)
    return _together(made)


_Made = tuple[Rows, list[lint.Finding], dict[str, Any]]


def _of_block(job: tuple[Path, int, Plan, Settings]) -> _Made:
    directory, block, plan, settings = job
    return _made(from_simulation(directory, block, settings), plan)


def _made(part: Facts, plan: Plan) -> _Made:
    rows = build(
        part.customers,
        part.facts,
        plan.label,
        plan.snapshots,
        events=plan.events,
        known_to_ms=plan.known_to_ms,
        corrected=plan.corrected,
    )
    findings = [] if plan.corrected else _past_the_cut(part, plan, rows)
    if plan.share < 1:
        # By name and instant, so that another number of partitions takes the same rows.
        drawn = digests(
            [f"{rows.names[c]}@{at}" for c, at in zip(rows.customer.tolist(), rows.at.tolist(), strict=True)], key_of(b"", "rows")
        )
        rows = rows.where((drawn >> 11) & 0xFFFFFFFF < int(plan.share * 2**32))
    return rows, findings, quality.of_facts(part.facts, part.rejected)


def _past_the_cut(part: Facts, plan: Plan, rows: Rows) -> list[lint.Finding]:
    """The lint that needs facts: some customers at some instants, made again from what had arrived by then."""
    instants = plan.snapshots[:: max(1, len(plan.snapshots) // _LINT_CUTOFFS)][:_LINT_CUTOFFS]
    chosen = set(rows.names[:: max(1, len(rows.names) // _LINT_CUSTOMERS)][:_LINT_CUSTOMERS])
    mine = np.fromiter((name in chosen for name in part.customers), np.bool_, len(part.customers))
    names = [name for name in part.customers if name in chosen]
    facts = part.facts[mine]
    # When the whole partition passes an instant, which the chosen customers alone need not show.
    passed = np.maximum.accumulate(part.facts[:, TIME])[mine] if len(part.facts) else facts[:, 0]
    sample = rows.where(
        np.isin(rows.at, instants) & (rows.kind == 1) & np.isin(rows.customer, [i for i, n in enumerate(rows.names) if n in chosen])
    )

    def rebuilt(at: int) -> Rows:
        known = passed <= at
        again = build([n for n, k in zip(names, known.tolist(), strict=True) if k], facts[known], plan.label, [at], known_to_ms=at)
        place = {name: i for i, name in enumerate(rows.names)}
        order = np.argsort([place[again.names[c]] for c in again.customer.tolist()], kind="stable")
        ordered = again.where(order)  # type: ignore[arg-type]  # positions select as a mask does
        return Rows(
            ordered.x,
            ordered.y,
            ordered.at,
            np.arange(len(order)),
            ordered.kind,
            ordered.profile,
            again.names,
            again.known_to_ms,
        )

    return lint.past_the_cut(sample, rebuilt)


def _together(made: Sequence[_Made]) -> Dataset:
    rows = concatenate([rows for rows, _, _ in made])
    findings = [finding for _, found, _ in made for finding in found] + lint.lint(rows)
    report = {"facts": quality.summed([facts for _, _, facts in made]), **quality.of_rows(rows)}
    return Dataset(rows, findings, report)


# --- kept


def save(dataset: Dataset, plan: Plan, directory: Path, source: dict[str, Any]) -> Path:
    """Keep a training set as <directory>/<digest>/rows.parquet and manifest.json; the digest is of the rows a model sees."""
    rows = dataset.rows
    home = directory / rows.digest()
    home.mkdir(parents=True, exist_ok=True)
    customer = pa.DictionaryArray.from_arrays(pa.array(rows.customer.astype(np.int32)), pa.array(rows.names))
    columns = {"customer_id": customer, "at": pa.array(rows.at), "kind": pa.array(rows.kind), "churned": pa.array(rows.y)}
    columns |= {f"profile_{i}": pa.array(rows.profile[:, i]) for i in range(len(PROFILE_COLUMNS))}
    # NaN stays NaN: the same bits come back.
    columns |= {name: pa.array(rows.x[:, i], from_pandas=False) for i, name in enumerate(NAMES)}
    write_table(pa.table(columns), home / ROWS, compression="zstd", compression_level=1)
    manifest = {
        "schema_version": 1,
        "digest": rows.digest(),
        "layout_hash": LAYOUT_HASH,
        "label": plan.label.as_dict(),
        "snapshots": list(plan.snapshots),
        "events": plan.events,
        "known_to_ms": rows.known_to_ms,
        "view": "corrected" if plan.corrected else "known then",
        "share_of_rows": plan.share,
        "rows": len(rows),
        "customers": len(rows.names),
        "source": source,
        "lint": [finding.as_dict() for finding in dataset.findings],
        "quality": dataset.quality,
        "rows_sha256": sha256((home / ROWS).read_bytes()).hexdigest(),
    }
    (home / MANIFEST).write_bytes(orjson.dumps(manifest, option=orjson.OPT_INDENT_2))
    return home


def load(home: Path) -> tuple[Rows, dict[str, Any]]:
    """A kept training set and its manifest. Raises BadInput when it is none, damaged, or of another feature layout."""
    try:
        manifest: dict[str, Any] = orjson.loads((home / MANIFEST).read_bytes())
        table = ParquetFile(home / ROWS).read()
    except (OSError, orjson.JSONDecodeError, pa.ArrowException) as error:
        raise BadInput(f"{home}: no training set ({error}); `churnstream models build-dataset` makes one") from error
    if manifest["layout_hash"] != LAYOUT_HASH:
        raise BadInput(f"{home}: made for another feature layout; build it again")
    x = np.column_stack([np.asarray(table[name]) for name in NAMES])
    customer = table["customer_id"].combine_chunks()
    rows = Rows(
        x,
        np.asarray(table["churned"]),
        np.asarray(table["at"]),
        np.asarray(customer.indices).astype(np.int64),
        np.asarray(table["kind"]),
        np.column_stack([np.asarray(table[f"profile_{i}"]) for i in range(len(PROFILE_COLUMNS))]),
        tuple(customer.dictionary.to_pylist()),
        manifest["known_to_ms"],
    )
    if rows.digest() != manifest["digest"]:
        raise BadInput(f"{home}: the rows are not those of the manifest; build it again")
    return rows, manifest


def bounds(parts: Sequence[Facts]) -> tuple[int, int]:
    """First and newest event time of all partitions (ms). Raises BadInput when there is none."""
    times = [part.facts[:, TIME] for part in parts if len(part.facts)]
    if not times:
        raise BadInput("no events: nothing to learn from or to judge by")
    return min(int(time.min()) for time in times), max(int(time.max()) for time in times)
