"""churnstream-faults: the fault campaign and its parts. Each part is a module that offers `add_arguments` and `main`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

PARTS: Final = {
    "run": ("bench.faults.campaign", "process rounds on real servers that are broken on purpose; resumes where the ledger ends"),
    "soak": ("bench.faults.soak", "one deployment, a steady stream, all faults mixed"),
    "faults": ("bench.faults.nemesis", "the table of faults"),
    "report": ("bench.faults.report", "write the generated parts of docs/reliability.md from the committed ledgers"),
    "simulate": ("bench.faults.sim_campaign", "deterministic simulation: many seeds, every promise checked after each"),
    "poison": ("bench.faults.poison", "hostile records by the million: none crashes, hangs or gets lost"),
    "mutants": ("bench.faults.mutants", "deliberately broken builds, each of which must be caught"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part; its exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="churnstream-faults", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, (module, text) in PARTS.items():
        part = parts.add_parser(name, help=text, description=text)
        if name in words:  # only the part that is asked for is imported
            import_module(module).add_arguments(part)
    parsed = parser.parse_args(words)
    return int(import_module(PARTS[parsed.part][0]).main(parsed))


if __name__ == "__main__":
    sys.exit(main())
