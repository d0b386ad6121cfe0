"""Rows of files before they become events: some left out, columns looked up in a second file, lines of one basket put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from proto.errors import BadInput

Row = Mapping[str, Any]
Numbered = tuple[int, Row]
WITHIN: Final = 100_000


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lookup(_Strict):
    """Columns of a second file beside each row. A row without its match keeps those columns empty."""

    file: str = Field(description="Name of the file, in the directory of the file that is read.")
    on: tuple[str, ...] = Field(min_length=1, description="Columns, named alike in both, whose texts have to be equal.")
    take: tuple[str, ...] = Field(min_length=1, description="Columns of the second file.")


class Group(_Strict):
    """Rows with the same texts in `by` are one: the first of them, with the columns of `sum` added up as exact decimals."""

    by: tuple[str, ...] = Field(min_length=1)
    sum: tuple[str, ...] = ()
    within: int = Field(WITHIN, ge=1, description="Rows of a group lie within so many rows of the file; bounds what is held at once.")


def looked_up(
    rows: Iterable[Numbered], lookups: tuple[Lookup, ...], directory: Path, read: Callable[[Path], Iterator[Numbered]]
) -> Iterator[Numbered]:
    """Each row with the columns of all lookups. Raises BadInput when a second file lacks a column, or has a key twice."""
    tables = [(lookup, _table(lookup, directory / lookup.file, read)) for lookup in lookups]
    for number, row in rows:
        more = dict(row)
        for lookup, table in tables:
            found = table.get(tuple(str(more.get(column)) for column in lookup.on))
            more.update(dict.fromkeys(lookup.take) if found is None else found)
        yield number, more


def _table(lookup: Lookup, path: Path, read: Callable[[Path], Iterator[Numbered]]) -> dict[tuple[str, ...], Row]:
    table: dict[tuple[str, ...], Row] = {}
    for number, row in read(path):
        if missing := [column for column in (*lookup.on, *lookup.take) if column not in row]:
            raise BadInput(f"{path}: no column {missing[0]}, which a lookup asks for")
        key = tuple(str(row[column]) for column in lookup.on)
        if key in table:
            raise BadInput(f"{path}:{number}: {'-'.join(key)} a second time; the columns of `on` have to name one row")
        table[key] = {column: row[column] for column in lookup.take}
    return table


def grouped(rows: Iterable[Numbered], group: Group) -> Iterator[Numbered]:
    """Groups in the order of their first rows, each when no row of it can follow any more. Raises KeyError for a missing column."""
    held: dict[tuple[str, ...], tuple[int, dict[str, Any]]] = {}
    first: dict[tuple[str, ...], int] = {}
    for position, (number, row) in enumerate(rows):
        # In the order of their first rows, so the oldest is in front.
        while held and position - first[oldest := next(iter(held))] >= group.within:
            del first[oldest]
            yield held.pop(oldest)
        key = tuple(str(row[column]) for column in group.by)
        if key in held:
            own = held[key][1]
            for column in group.sum:
                own[column] = Decimal(str(own[column])) + Decimal(str(row[column]))
        else:
            held[key], first[key] = (number, dict(row)), position
    yield from held.values()
