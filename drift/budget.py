"""How many false pages are allowed, and how they are shared out over all detectors together."""

from dataclasses import dataclass
from typing import Final

DAYS: Final = 30
ADWIN_SLACK: Final = 100.0
"""By how much ADWIN's bound exceeds its false alarms, at least: bench/drift_budget.py measures it, on persistent streams too."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Expected false pages per 30 days, all detectors together, and the part of it each family of tests may spend.

    The expectation of a sum is the sum of expectations however the detectors depend on each other, so shares per test (Bonferroni
    over a month) hold without independence. The rest is left unspent, for what the assumptions of the tests miss.
    """

    pages: float = 1.0
    windows: float = 0.25  # PSI and KS of hours, days and weeks
    quality: float = 0.125
    adwin: float = 0.25

    def __post_init__(self) -> None:
        if not self.pages > 0:
            raise ValueError(f"a budget needs a positive number of pages, got {self.pages}")
        if self.windows + self.quality + self.adwin > 1:
            raise ValueError("the families may spend the budget once")

    def alpha(self, share: float, tests: float) -> float:
        """Probability of a false alarm each of `tests` tests within 30 days may have."""
        return min(0.01, self.pages * share / max(tests, 1.0))
