"""The simulated population as files: a part per block of customers and topic, in arrival order; and from there to a topic or JSON lines."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow.parquet import ParquetFile, write_table

from features.facts import TOPICS
from features.window import DAY_MS
from models import behaviour
from models.behaviour import ABSENT, NUMBERS, TEXTS, Events
from models.population import CAUSES, HIDDEN, NEVER, SEGMENTS, YEAR_DAYS, People, Scenario, Truth
from proto.errors import BadInput
from streams.feed import Record

SCENARIO: Final = "scenario.json"
ROW_GROUP: Final = 16_384
"""Rows read at once of each part when parts are merged: bounds the memory of a feed to parts * 16,384 rows."""


def write(scenario: Scenario, out: Path, *, processes: int = 0, on_block: Callable[[int, int], None] = lambda blocks, events: None) -> int:
    """Simulate into `out`, block by block over so many processes (0 = one per core); returns the number of events.

    on_block(blocks done, events so far). Raises BadInput when `out` holds something else already.
    """
    scenario = scenario.calibrated()
    out.mkdir(parents=True, exist_ok=True)
    described = orjson.dumps(asdict(scenario), option=orjson.OPT_INDENT_2)
    marker = out / SCENARIO
    if marker.exists() and marker.read_bytes() != described:
        raise BadInput(f"{out} holds another simulation; give another directory, or delete it")
    if not marker.exists() and any(out.iterdir()):
        raise BadInput(f"{out} is not empty and holds no simulation; give another directory")
    for name in (*TOPICS, "truth", "hidden"):
        (out / name).mkdir(exist_ok=True)
    events = 0
    workers = min(processes or len(os.sched_getaffinity(0)), scenario.blocks)
    jobs = [(scenario, block, out) for block in range(scenario.blocks)]
    if workers == 1:
        for done, count in enumerate(map(_write_block, jobs), 1):
            events += count
            on_block(done, events)
    else:
        # Not forked: the parent may hold threads of Arrow.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for done, count in enumerate(pool.map(_write_block, jobs), 1):
                events += count
                on_block(done, events)
    # Last, so that a directory without it is known to be unfinished.
    marker.write_bytes(described)
    return events


def part(block: int) -> str:
    """File name of a block in every directory."""
    return f"part-{block:05d}.parquet"


def parts(directory: Path) -> list[int]:
    """Blocks of a simulation. Raises BadInput when the directory holds none, or an unfinished one."""
    if not (directory / SCENARIO).exists():
        raise BadInput(f"{directory}: no finished simulation (no {SCENARIO}); `churnstream simulate --out {directory}` makes one")
    return sorted(int(path.stem.removeprefix("part-")) for path in (directory / TOPICS[0]).glob("part-*.parquet"))


def span(directory: Path) -> tuple[int, int]:
    """First and last instant of a finished simulation (ms)."""
    scenario = orjson.loads((directory / SCENARIO).read_bytes())
    days = round(scenario["months"] * YEAR_DAYS / 12)
    return scenario["start_ms"], scenario["start_ms"] + days * DAY_MS


def _write_block(job: tuple[Scenario, int, Path]) -> int:
    scenario, block, out = job
    who, truth, topics = behaviour.simulate(scenario, block)
    for events in topics:
        _save(table(events, block, who), out / events.topic / part(block))
    _save(_truth(scenario, who, truth), out / "truth" / part(block))
    _save(_hidden(scenario, who, truth), out / "hidden" / part(block))
    return sum(map(len, topics))


def _save(content: Any, path: Path) -> None:
    scratch = path.with_suffix(".tmp")
    plain = [name for name in ("event_id", "session_id", "ticket_id") if name in content.column_names]
    repeated = [name for name in content.column_names if name not in plain]
    write_table(content, scratch, compression="zstd", compression_level=1, row_group_size=ROW_GROUP, use_dictionary=repeated)
    scratch.replace(path)


def table(events: Events, block: int, who: People) -> Any:
    """Events as an Arrow table: the contract's fields (amount in minor units), and `arrived`, in arrival order."""
    columns = events.columns
    found = {
        "event_id": _tagged(columns["number"], block),
        "customer_id": _ids(columns["customer"], who),
        "event_time": pa.array(columns["time"]),
        "arrived": pa.array(columns["arrived"]),
    }
    for name, texts in TEXTS[events.topic].items():
        codes = columns[name]
        indices = pa.array(np.maximum(codes, 0).astype(np.int8), mask=codes == ABSENT)
        found[name] = pa.DictionaryArray.from_arrays(indices, pa.array(texts))
    for name in NUMBERS[events.topic]:
        values = columns[name]
        if name in ("session_id", "ticket_id"):
            found[name] = _tagged(values, block)
        elif name in ("signup_date", "contract_end"):
            found[name] = pa.array(values.astype(np.int32), pa.date32(), mask=values == ABSENT)
        elif name == "consent":
            found[name] = pa.array(values > 0)
        else:
            found[name] = pa.array(values, pa.int64(), mask=values == ABSENT)
    return pa.table(found)


def _tagged(numbers: Any, block: int) -> Any:
    """Unique texts of a block's numbers."""
    return pc.binary_join_element_wise(f"{block}", pc.cast(pa.array(numbers), pa.string()), "-")


def _ids(customer: Any, who: People) -> Any:
    first = int(who.number[0])
    names = pa.array([behaviour.customer_id(number) for number in who.number.tolist()])
    return pa.DictionaryArray.from_arrays(pa.array((customer - first).astype(np.int32)), names)


def _truth(scenario: Scenario, who: People, truth: Truth) -> Any:
    def instant(day: Any) -> Any:
        return pa.array(scenario.start_ms + day * DAY_MS, mask=(day >= NEVER) | (day < 0))

    return pa.table(
        {
            "customer_id": pc.cast(_ids(who.number, who), pa.string()),
            "left_ms": instant(truth.left),
            "cause": pa.array([CAUSES[cause] for cause in truth.cause.tolist()]),
            "decided_ms": instant(truth.decided),
            "offered_ms": instant(np.full(len(who.number), scenario.offer_day)),
            "left_if_offered_ms": instant(truth.left_if_offered),
            "signup_ms": pa.array(scenario.start_ms + who.signup * DAY_MS),
            "segment": pa.array([SEGMENTS[code] for code in who.segment.tolist()]),
        }
    )


def _hidden(scenario: Scenario, who: People, truth: Truth) -> Any:
    days = sorted(truth.hidden)
    values = np.concatenate([truth.hidden[day] for day in days])
    here = ~np.isnan(values[:, 0])
    at = np.repeat([scenario.start_ms + day * DAY_MS for day in days], len(who.number))
    who_at = np.tile(who.number, len(days))
    columns = {name: pa.array(values[here, i]) for i, name in enumerate(HIDDEN)}
    return pa.table({"customer_id": _ids(who_at[here], who), "at": pa.array(at[here]), **columns})


def summary(directory: Path) -> dict[str, Any]:
    """What became of the customers: yearly churn of those there at the start, causes, and what the offer would have saved."""
    described = orjson.loads((directory / SCENARIO).read_bytes())
    truth = pa.concat_tables([ParquetFile(directory / "truth" / part(block)).read() for block in parts(directory)])
    left = np.asarray(truth["left_ms"].fill_null(np.iinfo(np.int64).max))
    otherwise = np.asarray(truth["left_if_offered_ms"].fill_null(np.iinfo(np.int64).max))
    there = np.asarray(truth["signup_ms"]) < described["start_ms"]
    days = round(described["months"] * YEAR_DAYS / 12)
    lost = float(np.mean(left[there] < described["start_ms"] + days * DAY_MS))
    causes = truth["cause"].to_pylist()
    return {
        "yearly_churn": round(1 - (1 - lost) ** (YEAR_DAYS / days), 4),
        "left": {cause: causes.count(cause) for cause in CAUSES[1:]},
        "left_if_offered": int(np.sum(otherwise < np.iinfo(np.int64).max)),
        "base": described["process"]["base"],
    }


# --- onwards


def records(directory: Path) -> Iterator[Record]:
    """All events of a simulation as records to send, in the order of their arrival over all parts and topics.

    A few row groups are held at a time: rows up to the earliest last arrival of the groups in hand are given out.
    """
    sources = [_Source(directory / topic / part(block), topic) for topic in TOPICS for block in parts(directory)]
    waiting = [source for source in sources if source.fill()]
    while waiting:
        until = min(source.last for source in waiting)
        due = [entry for source in waiting for entry in source.take(until)]
        due.sort(key=lambda entry: entry[0])
        for _, record in due:
            yield record
        waiting = [source for source in waiting if source.fill()]


class _Source:
    """One part, read row group by row group."""

    def __init__(self, path: Path, topic: str) -> None:
        self._file = ParquetFile(path)
        self._topic = topic
        self._next = 0
        self._rows: list[tuple[int, Record]] = []
        self.last = 0

    def fill(self) -> bool:
        """Have rows in hand; False at the end."""
        while not self._rows and self._next < self._file.num_row_groups:
            self._rows = [record_of(self._topic, row) for row in self._file.read_row_group(self._next).to_pylist()]
            self._next += 1
        if self._rows:
            self.last = self._rows[-1][0]
        return bool(self._rows)

    def take(self, until: int) -> list[tuple[int, Record]]:
        """Rows that arrived at `until` or before."""
        times = [arrived for arrived, _ in self._rows]
        end = int(np.searchsorted(times, until, side="right"))
        taken, self._rows = self._rows[:end], self._rows[end:]
        return taken


def record_of(topic: Any, row: dict[str, Any]) -> tuple[int, Record]:
    """A row of a part as (when it arrived, the event to send): absent fields left out, the amount as a decimal text."""
    arrived = row.pop("arrived")
    minor = row.pop("amount_minor", None)
    if minor is not None:
        row["amount"] = f"{minor // 100}.{minor % 100:02d}"
    # orjson writes dates as the contract wants them.
    body = {name: value for name, value in row.items() if value is not None}
    key, event_id = row["customer_id"].encode(), row["event_id"]
    return arrived, Record(topic, key, orjson.dumps(body), event_id, row["event_time"])


def to_json_lines(directory: Path, out: Path) -> int:
    """All events as one JSON object a line (`churnstream feed --mapping jsonl` reads it), in arrival order; returns how many."""
    count = 0
    with out.open("wb") as stream:
        for record in records(directory):
            stream.write(record.value + b"\n")
            count += 1
    return count
