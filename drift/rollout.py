"""Champion and challenger: who gets which, and when the evidence is enough, however often somebody looks at it.

Pure, so that the stream, a lookup and a replay split alike and decide alike.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Literal

Arm = Literal["champion", "challenger"]
Step = Literal["canary", "ramp", "promoted", "stopped"]

RAMP: Final = (0.05, 0.10, 0.25, 0.50)
"""Shares of customers on the challenger, stage by stage; the first two are the canary, the rest needs proof."""
CANARY: Final = 0.10
"""More than that only for a challenger that has been shown to be no worse."""
BETS: Final = tuple(0.5 * 2.0**-i for i in range(1, 9))
"""Stakes of the wealth processes: half of the most a bounded loss allows, and halves of it. Their mean is a wealth process too."""


def share_of(customer: str, salt: str) -> float:
    """Where a customer stands in [0, 1): the same in all places and for ever under one salt, independent between salts."""
    return int.from_bytes(blake2b(f"{salt}\0{customer}".encode(), digest_size=8).digest(), "big") / 2**64


def arm_of(customer: str, salt: str, share: float) -> Arm:
    """Whose score is acted on. Who is with the challenger at 5 % stays with it at 10 %."""
    return "challenger" if share_of(customer, salt) < share else "champion"


@dataclass(slots=True)
class Evidence:
    """An e-process on paired losses: wealth of bets that the mean of x - margin is positive, x in [-1, 1] one at a time.

    Under the hypothesis that it is not, given all that came before, the wealth is a non-negative supermartingale that starts at 1, so the
    chance that it ever reaches 1 / alpha is at most alpha (Ville): looking every hour, stopping when one likes, costs nothing.
    """

    margin: float = 0.0
    wealth: list[float] = field(default_factory=lambda: [0.0] * len(BETS))  # logarithms, one per stake
    n: int = 0
    total: float = 0.0
    best: float = 0.0  # highest logarithm of the mean wealth so far

    def __post_init__(self) -> None:
        if not -1 < self.margin < 1:
            raise ValueError(f"a margin of losses lies between -1 and 1, got {self.margin}")

    def add(self, differences: Iterable[float]) -> None:
        """Further x. Raises ValueError outside [-1, 1]."""
        # The largest loss of one bet is 1 + margin: no stake loses more than half.
        stakes = [bet / (1 + self.margin) for bet in BETS]
        for x in differences:
            if not -1 <= x <= 1:
                raise ValueError(f"a difference of losses lies in [-1, 1], got {x}")
            gain = x - self.margin
            self.wealth = [w + math.log1p(stake * gain) for w, stake in zip(self.wealth, stakes, strict=True)]
            self.n += 1
            self.total += x
            self.best = max(self.best, self.log_e)

    @property
    def log_e(self) -> float:
        """Logarithm of the e-value: of the mean wealth of all stakes."""
        top = max(self.wealth)
        return top + math.log(sum(math.exp(w - top) for w in self.wealth) / len(self.wealth))

    def shown(self, alpha: float) -> bool:
        """Whether at any time so far the hypothesis could be given up at level alpha."""
        return self.best >= -math.log(alpha)

    @property
    def p(self) -> float:
        """Anytime-valid p-value."""
        return min(1.0, math.exp(-self.best))


def brier_gain(y: int, champion: float, challenger: float) -> float:
    """How much smaller the challenger's squared error of one customer is, in [-1, 1]."""
    return (champion - y) ** 2 - (challenger - y) ** 2


def interval(n: int, mean: float, variance: float, alpha: float = 0.05, rho: float = 0.002) -> tuple[float, float]:
    """Confidence sequence of a mean of values in [-1, 1]: valid at all n together (normal mixture, asymptotic).

    rho tunes at which n it is tightest, about 1 / rho. Source: Waudby-Smith et al., Time-uniform central limit theory (2021).
    """
    if n < 2:
        return -1.0, 1.0
    width = math.sqrt(max(variance, 1e-12) * 2 * (n * rho + 1) / (n**2 * rho) * math.log(math.sqrt(n * rho + 1) / alpha))
    return max(-1.0, mean - width), min(1.0, mean + width)


@dataclass(frozen=True, slots=True)
class Rules:
    """What a challenger must show, and what stops it at once."""

    alpha: float = 0.05  # of promoting one that is not better
    harm_alpha: float = 0.05  # of stopping one that is not worse
    better_by: float = 0.0  # Brier score
    worse_by: float = 0.0
    least_labels: int = 500
    hours_per_stage: float = 24.0
    errors: float = 0.001  # share of scores that failed
    slower_ms: float = 20.0  # p99 above the champion's
    shift: float = 0.25  # PSI of the scores against the champion's
    calibration: float = 0.05  # mean score minus mean outcome


@dataclass(frozen=True, slots=True)
class Health:
    """How the challenger does right now."""

    errors: float = 0.0
    slower_ms: float = 0.0
    shift: float = 0.0
    calibration: float | None = None  # None before labels

    def broken(self, rules: Rules) -> str:
        """The guardrail it has run into, "" when none."""
        found = [
            (self.errors > rules.errors, f"{self.errors:.2%} of its scores failed"),
            (self.slower_ms > rules.slower_ms, f"its p99 is {self.slower_ms:.0f} ms above the champion's"),
            (self.shift > rules.shift, f"its scores are shifted (PSI {self.shift:.2f})"),
            (self.calibration is not None and abs(self.calibration) > rules.calibration, "its calibration is off"),
        ]
        return next((text for is_broken, text in found if is_broken), "")


@dataclass(slots=True)
class Rollout:
    """One challenger on its way: canary, ramp, promotion, or the end."""

    salt: str
    rules: Rules = field(default_factory=Rules)
    step: Step = "canary"
    stage: int = 0
    since_hours: float = 0.0
    why: str = ""
    better: Evidence = field(init=False)
    worse: Evidence = field(init=False)

    def __post_init__(self) -> None:
        self.better, self.worse = Evidence(self.rules.better_by), Evidence(self.rules.worse_by)

    @property
    def share(self) -> float:
        """Of customers whose challenger score is acted on."""
        return {"promoted": 1.0, "stopped": 0.0}.get(self.step, RAMP[self.stage])

    def label(self, gains: Iterable[float]) -> None:
        """Labels that have come, late or not, as `brier_gain`s of customers scored by both. Each customer once.

        The order of their coming must not depend on the gains themselves: label by the calendar, not when somebody complains.
        """
        gains = list(gains)
        self.better.add(gains)
        self.worse.add(-gain for gain in gains)

    def look(self, hours: float, health: Health) -> str:
        """Decide at `hours` since the start; as often as one likes. Returns what happened, "" for nothing."""
        if self.step in ("promoted", "stopped"):
            return ""
        if reason := health.broken(self.rules):
            return self._end("stopped", reason)
        if self.worse.shown(self.rules.harm_alpha):
            return self._end("stopped", f"it is worse (p {self.worse.p:.2g} after {self.worse.n} labels)")
        proven = self.better.n >= self.rules.least_labels and self.better.shown(self.rules.alpha)
        if hours - self.since_hours < self.rules.hours_per_stage:
            return ""
        if self.stage + 1 < len(RAMP) and (RAMP[self.stage + 1] <= CANARY or proven):
            self.stage, self.since_hours = self.stage + 1, hours
            self.step = "canary" if RAMP[self.stage] <= CANARY else "ramp"
            return f"{RAMP[self.stage]:.0%} of customers"
        if self.stage + 1 == len(RAMP) and proven:
            return self._end("promoted", f"it is better (p {self.better.p:.2g} after {self.better.n} labels)")
        return ""

    def _end(self, step: Step, why: str) -> str:
        self.step, self.why = step, why
        return why

    def state(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "step": self.step, "share": self.share, "why": self.why, "labels": self.better.n,
            "gain": self.better.total / self.better.n if self.better.n else None, "p_better": self.better.p, "p_worse": self.worse.p,
        }  # fmt: skip
