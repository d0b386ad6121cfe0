"""The worker's command in a process whose kernel aborts on one record, as a fault in native code would."""

import os
from typing import Any

from features.facts import TIME
from features.history import Histories
from streams.cli import main

POISON_MS = 1_700_050_000_123
healthy = Histories.step


def step(self: Histories, customers: Any, facts: Any, skip: Any = None) -> Any:
    if (facts[:, TIME] == POISON_MS).any():
        os.abort()
    return healthy(self, customers, facts, skip)


Histories.step = step  # type: ignore[method-assign]  # the fault is planted so
main()
