"""A/A and worse challengers through the rollout, looked at every hour, with labels that come late.

    python -m bench.rollout [--quick] [--fault peeking] --json

Each run is 60 days with 20 customers labelled an hour, each 30 days after its score. A/A: two models of the same quality that err apart;
the share of runs that promote is held against 5 %. Worse: a challenger whose AUC is two points lower; how much traffic it gets at most.
--fault peeking replaces the anytime-valid test by a fixed-sample z-test looked at every hour: the check must then fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from drift.rollout import BETS, CANARY, RAMP, Health, Rollout, Rules, arm_of

Floats = npt.NDArray[np.float64]
HOURS: Final = 60 * 24
A_DAY: Final = 20
DELAY: Final = 30 * 24
BASE: Final = 0.2


def gains(rng: np.random.Generator, n: int, noise: float) -> tuple[Floats, Floats, Floats, Floats]:
    """Brier gains of n customers for a challenger that sees the truth through so much more noise; outcomes and both scores too."""
    margin = rng.normal(-1.7, 1.0, n)
    y = (rng.random(n) < 1 / (1 + np.exp(-margin))).astype(np.float64)
    # Each sees the margin with an error of its own and shrinks what it sees: both are calibrated.
    scores = []
    for sd in (0.6, 0.6 + noise):
        seen = margin + rng.normal(0, sd, n)
        shrunk = -1.7 + (seen + 1.7) / (1 + sd**2)
        left = sd**2 / (1 + sd**2)
        scores.append(1 / (1 + np.exp(-shrunk / np.sqrt(1 + np.pi * left / 8))))
    return (scores[0] - y) ** 2 - (scores[1] - y) ** 2, y, scores[0], scores[1]


def auc(y: Floats, p: Floats) -> float:
    """Area under the ROC curve."""
    order = np.argsort(np.argsort(p)) + 1
    ones = y.sum()
    return float((order[y == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(y) - ones)))


def ever(x: Floats, alpha: float, fault: bool) -> npt.NDArray[np.bool_]:
    """Of runs (r, n): whether, looked at after every hour (A_DAY labels), the mean was ever shown to be positive."""
    least = Rules().least_labels
    if fault:
        n = np.arange(1, x.shape[1] + 1)
        mean, square = np.cumsum(x, axis=1) / n, np.cumsum(x**2, axis=1) / n
        z = mean / np.sqrt(np.maximum(square - mean**2, 1e-12) / n)
        return np.asarray((z[:, least - 1 :: A_DAY] > float(norm.isf(alpha))).any(axis=1), np.bool_)
    # The same wealth as drift.rollout.Evidence, vectorised over runs; a test holds the two together.
    total = np.zeros_like(x)
    for bet in BETS:
        total += np.exp(np.minimum(np.cumsum(np.log1p(bet * x), axis=1), 500)) / len(BETS)
    return np.asarray((np.maximum.accumulate(total, axis=1)[:, least - 1 :: A_DAY] >= 1 / alpha).any(axis=1), np.bool_)


def through(seed: int, noise: float, health: Health) -> Rollout:
    """One run through the whole rollout, hour by hour."""
    rng = np.random.default_rng([seed, 9])
    rollout = Rollout(f"run-{seed}")
    x = gains(rng, HOURS * A_DAY, noise)[0]
    for hour in range(1, HOURS * 2):
        if 0 <= (first := (hour - DELAY) * A_DAY) < len(x):
            rollout.label(x[first : first + A_DAY].tolist())
        rollout.look(hour, health)
        if rollout.step in ("promoted", "stopped"):
            break
    return rollout


def main() -> int:
    """Run; 0 when A/A promotes in at most 5 % and a worse model never gets more than a tenth of the traffic."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="2,000 runs instead of 10,000")
    parser.add_argument("--fault", choices=("peeking",), help="a test that must not be peeked at")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    cpu = time.process_time()
    runs, labels, chunk = (2_000 if args.quick else 10_000), 28_800, 50
    fault = bool(args.fault)
    alpha = Rules().alpha
    rng = np.random.default_rng(3)
    noise, lost = 0.0, 0.0
    while lost < 0.02:  # the noise that costs two points of AUC
        noise += 0.02
        _, y, a, b = gains(np.random.default_rng(1), 400_000, noise)
        lost = auc(y, a) - auc(y, b)
    false = sum(int(ever(gains(rng, chunk * labels, 0.0)[0].reshape(chunk, labels), alpha, fault).sum()) for _ in range(runs // chunk))
    worse_runs = runs // 10
    above = sum(
        int(ever(gains(rng, chunk * labels, noise)[0].reshape(chunk, labels), alpha, fault).sum()) for _ in range(worse_runs // chunk)
    )

    whole: list[dict[str, Any]] = []
    for name, gap, health in (
        ("better", -0.35, Health()), ("worse", noise, Health()), ("failing", 0.0, Health(errors=0.02)), ("shifted", 0.0, Health(shift=0.6)),
    ):  # fmt: skip
        found = through(1, gap, health)
        whole.append({"challenger": name, **found.state()})
    customers = [f"c{i}" for i in range(20_000)]
    stays = all(arm_of(c, "s", 0.10) == "challenger" for c in customers if arm_of(c, "s", 0.05) == "challenger")
    at_ten = sum(arm_of(c, "s", 0.10) == "challenger" for c in customers) / len(customers)
    report = {
        "aa_runs": runs,
        "aa_false_promotions": false,
        "aa_false_rate": round(false / runs, 5),
        "auc_points_worse": round(100 * lost, 2),
        "worse_runs": worse_runs,
        "worse_above_canary": above,
        "worse_largest_share": CANARY if above == 0 else RAMP[2],
        "labels_per_run": labels,
        "looks_per_run": labels // A_DAY,
        "whole_way": whole,
        "sticky": stays,
        "share_at_10_percent": round(at_ten, 4),
        "fault": args.fault,
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }
    ends = {row["challenger"]: row["step"] for row in whole}
    expected = {"better": "promoted", "worse": "stopped", "failing": "stopped", "shifted": "stopped"}
    report["ok"] = false <= 0.05 * runs and above == 0 and stays and ends == expected
    print(json.dumps(report) if args.json else json.dumps(report, indent=2))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
