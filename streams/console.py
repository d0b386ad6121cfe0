"""How a command speaks: tables and lines for people, one JSON object as the last line for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Console:
    """Output of one command. With `json_output` everything human goes to stderr and `result` prints one JSON object to stdout."""

    def __init__(self, *, json_output: bool) -> None:
        self.json_output = json_output

    def say(self, line: str = "") -> None:
        """A line for a person."""
        print(line, file=sys.stderr if self.json_output else sys.stdout, flush=True)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
        """Rows for a person: numbers right-aligned, None as an empty cell."""
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        cells = [tuple(row) for row in rows]
        table = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            numeric = bool(cells) and all(isinstance(row[i], int | float) or row[i] is None for row in cells)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        RichConsole(stderr=self.json_output).print(table)

    def result(self, values: Mapping[str, Any]) -> None:
        """The last line: printed only with --json. Values must be JSON types; NaN is refused."""
        if self.json_output:
            sys.stderr.flush()
            print(json.dumps(values, ensure_ascii=False, allow_nan=False), flush=True)
