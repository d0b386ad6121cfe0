"""Public data sets through the product's own commands, beside a reference: the same label, cut-offs and split, and the same test rows.

    python -m bench.real [--data DIR] [--only NAME] [--learners LEARNERS] [--json]

DIR holds the folders online_retail_ii, complete_journey and oulad; what is not there is left out and said. Each set is trained by
`churnstream models train` with mapping files, and judged on the rows it kept. The reference is gradient boosting (scikit-learn's
histogram trees as they come) on 14 recency, frequency and amount features, measured on the same rows: its figures are the ones stated
below, and the number of rows and the base rate are compared with its own, so that nothing else was judged.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pyarrow.parquet import ParquetFile

from models.evaluate import auc, auc_interval

DATA: Final = "BENCH_DATA"
ROOT: Final = Path(__file__).parent.parent
WANTED: Final = 0.01
SUSPICIOUS: Final = 0.9


@dataclass(frozen=True, slots=True)
class Task:
    """One label on one set. sources: (file, mapping). reference: AUC with its interval, rows, base rate. judged: which customers count;
    person: of a customer, whose rows are drawn together."""

    name: str
    sources: tuple[tuple[str, str], ...]
    label: str
    first: str
    split: str
    reference: tuple[float, float, float]
    rows: int
    base_rate: float
    currency: str = "EUR"
    judged: Callable[[str], bool] = lambda customer: True
    person: Callable[[str], str] = lambda customer: customer


_SHOP: Final = (("online_retail_ii/invoices.csv.gz", "online_retail_ii"),)
_GROCERY: Final = (
    ("complete_journey/transactions.parquet", "complete_journey"),
    ("complete_journey/coupon_redemptions.csv.gz", "complete_journey_coupons"),
)
_REGISTRATION, _ASSESSMENT = "oulad/student_registration.csv.gz", "oulad/student_assessment.csv.gz"
_COURSES: Final = (
    (_REGISTRATION, "oulad_registrations"),
    (_REGISTRATION, "oulad_openings"),
    (_REGISTRATION, "oulad_withdrawals"),
    (_ASSESSMENT, "oulad_submissions"),
    (_ASSESSMENT, "oulad_marks"),
)
TASKS: Final = (
    Task("shop-90d", _SHOP, "no-purchase-90d", "2010-03-01", "2010-12-01", (0.762, 0.749, 0.775), 30_458, 0.600, "GBP"),
    Task("shop-30d", _SHOP, "no-purchase-30d", "2010-03-01", "2010-12-01", (0.754, 0.742, 0.765), 27_689, 0.736, "GBP"),
    Task("grocery-14d", _GROCERY, "no-purchase-14d", "2017-03-02", "2017-09-01", (0.824, 0.815, 0.833), 17_892, 0.247, "USD"),
    Task("grocery-30d", _GROCERY, "no-purchase-30d-of-60d", "2017-03-02", "2017-09-01", (0.841, 0.828, 0.851), 15_644, 0.122, "USD"),
    Task(
        "oulad-28d",
        _COURSES,
        "leaves-course-28d",
        "2013-02-15",
        "2014-03-01",
        (0.718, 0.709, 0.726),
        195_369,
        0.027,
        judged=lambda customer: "-2014" in customer,  # the courses of 2013 are learnt from
        person=lambda customer: customer.rsplit("-", 1)[1],
    ),
)


def run(task: Task, data: Path, learners: str) -> dict[str, Any]:
    """Train, take the kept rows, judge. Raises CalledProcessError when a command fails."""
    began = time.monotonic()
    sources = [part for file, mapping in task.sources for part in ("--events", str(data / file), "--mapping", mapping)]
    command = [str(Path(sys.executable).with_name("churnstream")), "--set", f"currency={task.currency}", "models", "train", *sources]
    command += ["--label", task.label, "--first", task.first, "--split", task.split, "--learners", learners, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    trained = json.loads(done.stdout.splitlines()[-1])
    table = ParquetFile(Path(trained["evaluation"]) / "rows.parquet").read()
    customers = table["customer_id"].to_pylist()
    judged = np.fromiter((task.judged(customer) for customer in customers), np.bool_, len(customers))
    people: dict[str, int] = {}
    number = np.fromiter((people.setdefault(task.person(customer), len(people)) for customer in customers), np.int64, len(customers))[
        judged
    ]
    y, score = np.asarray(table["churned"])[judged], np.asarray(table["probability"])[judged]
    low, high = auc_interval(y, score, number, np.random.default_rng(0))
    found = auc(y, score)
    return {
        "task": task.name,
        "label": trained["label"],
        "learner": trained["learner"]["learner"],
        "auc": round(found, 4),
        "auc_interval": [round(low, 4), round(high, 4)],
        "auc_reference": task.reference[0],
        "reference_interval": list(task.reference[1:]),
        "gain": round(found - task.reference[0], 4),
        "reached": bool(found - task.reference[0] >= WANTED),
        "auc_recency": round(auc(y, np.asarray(table["recency"])[judged]), 4),
        "rows": len(y),
        "rows_differ": len(y) - task.rows,
        "base_rate": round(float(y.mean()), 4),
        "same_rows": len(y) == task.rows and abs(float(y.mean()) - task.base_rate) < 0.0006,
        "suspicious": found > SUSPICIOUS,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = ROOT.parent / "shared" / "data"
    default = Path(os.environ.get(DATA) or (shared if shared.is_dir() else ROOT / "data"))
    parser.add_argument("--data", type=Path, default=default, help=f"directory of the sets; default: ${DATA}, ../shared/data, data")
    parser.add_argument("--only", action="append", help="a task by name; may be repeated")
    parser.add_argument("--learners", default="xgboost-d3,xgboost-d4,xgboost,logistic", help="as for `churnstream models train`")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    given = parser.parse_args()
    found, left_out = {}, []
    for task in TASKS:
        if given.only and task.name not in given.only:
            continue
        if missing := [file for file, _ in task.sources if not (given.data / file).exists()]:
            left_out.append(task.name)
            print(f"{task.name}: left out, {given.data / missing[0]} is not there", file=sys.stderr)
            continue
        one = run(task, given.data.resolve(), given.learners)
        found[task.name] = one
        said = "reached" if one["reached"] else f"NOT reached (+{WANTED} wanted)"
        same = "same rows" if one["same_rows"] else f"{one['rows_differ']:+,} rows against the reference"
        print(
            f"{task.name}: AUC {one['auc']:.4f} {one['auc_interval']} against {one['auc_reference']} {one['reference_interval']}: "
            f"{one['gain']:+.4f}, {said}; {same}; {one['learner']}, {one['seconds']} s",
            file=sys.stderr,
            flush=True,
        )
    result = {"tasks": found, "left_out": left_out, "reached": sum(one["reached"] for one in found.values())}
    result["suspicious"] = sum(one["suspicious"] for one in found.values())
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
