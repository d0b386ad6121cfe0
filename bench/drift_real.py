"""Real data: does a shop's autumn alarm once rather than ten times, and is a call centre's month like itself and unlike another?

    python -m bench.drift_real [--bank calls_1999_01.csv.gz --other calls_1999_10.csv.gz ...] --json

Online Retail II (CC BY 4.0): features by the kernel, baseline February to August 2010, watched to June 2011. Bank calls (Technion; not in
this repository, give the files): the baseline is January's first three weeks; its rest must be quiet, and other months are compared.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drift.baseline import Baseline, fit
from drift.cause import explain
from drift.monitor import Finding, Monitor
from drift.policy import Pager
from drift.report import compare
from drift.series import Series, Tally, edges_of
from drift.sources import FEATURES, WATCHED
from features.history import Histories
from features.window import DAY_MS, HOUR_MS

SHOP: Final = Path(__file__).parent.parent / "data" / "online_retail_ii" / "invoices.csv.gz"
CALLS: Final = ("vru_seconds", "queue_seconds", "service_seconds", "gave_up", "priority", "kind")


def ms(year: int, month: int, day: int) -> int:
    """Epoch ms of a day, UTC."""
    return int(datetime(year, month, day, tzinfo=UTC).timestamp() * 1_000)


def pages(base: Baseline, at: Any, values: Any, who: Any) -> list[dict[str, Any]]:
    """What the watch would have paged for, with the cause, and how many findings each episode had."""
    monitor, pager = Monitor(base), Pager()
    tally = Tally.of(base.edges, 0, base.block_ms)
    tally.add(at, values, np.zeros(len(at), np.int64), who)
    found: dict[int, dict[str, Any]] = {}
    for start, counts in tally.close(2**62):
        findings: list[Finding] = monitor.update(start, counts)
        if findings:
            cause = explain(findings, [], ())[0]
            episode, first = pager.note(cause.key, monitor.reached_ms, len(findings))
            if first:
                when = datetime.fromtimestamp(monitor.reached_ms / 1_000, UTC).date().isoformat()
                found[episode.number] = {"at": when, "topic": cause.topic, "kinds": list(cause.kinds[:3]), "features": list(cause.features)}
            found[episode.number]["findings"] = episode.findings
    return list(found.values())


def shop() -> dict[str, Any]:
    """The invoices through the kernel, then through the watch."""
    from streams.settings import Settings
    from streams.training import from_files

    facts = from_files([SHOP], "online_retail_ii", Settings(currency="GBP"))[0]
    step = Histories(create=True, max_facts=2**40).step(facts.customers, facts.facts)
    at, values = step.at[step.rows], step.vectors[:, WATCHED]
    names: dict[str, int] = {}
    who = np.array([names.setdefault(facts.customers[i], len(names)) for i in step.rows.tolist()])
    first, last = ms(2010, 2, 1), ms(2010, 9, 1)
    quiet = (at >= first) & (at < last)
    edges = edges_of(values[quiet])
    tally = Tally.of(edges, 0, DAY_MS)
    tally.add(at[quiet], values[quiet], np.zeros(int(quiet.sum()), np.int64), who[quiet])
    slots = tally.close(2**62)
    base = fit(FEATURES, (), edges, np.array([s for s, _ in slots]), np.array([c for _, c in slots]))
    later = at >= last
    found = pages(base, at[later], values[later], who[later])
    autumn = [page for page in found if page["at"] < "2011-01-01"]
    return {"events": len(at), "block_hours": base.block_ms / HOUR_MS, "pages": found, "pages_in_autumn": len(autumn)}


def calls(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Instants and values (n, len(CALLS)) of a month of calls; times are taken as UTC, 0 s of queue = did not queue."""
    at, rows = [], []
    kinds = {name: i for i, name in enumerate(("PS", "NW", "IN", "NE", "TT", "PE"))}
    with gzip.open(path, "rt", encoding="latin-1") as file:
        for row in csv.DictReader(file):
            day = datetime.strptime(f"{row['date']} {row['vru_entry']}", "%y%m%d %H:%M:%S").replace(tzinfo=UTC)
            queue, service = float(row["q_time"]), float(row["ser_time"])
            at.append(int(day.timestamp() * 1_000))
            rows.append(
                (
                    float(row["vru_time"]), queue if queue > 0 else np.nan, service if service > 0 else np.nan,
                    float(row["outcome"] == "HANG"), float(row["priority"]), float(kinds.get(row["type"], 9)),
                )
            )  # fmt: skip
    order = np.argsort(at, kind="stable")
    return np.array(at, np.int64)[order], np.array(rows)[order]


def bank(january: Path, others: list[Path]) -> dict[str, Any]:
    """Three weeks as baseline; the rest of January and other months against it."""
    at, values = calls(january)
    cut = int(at.min()) // DAY_MS * DAY_MS + 21 * DAY_MS
    quiet = at < cut
    edges = edges_of(values[quiet])
    tally = Tally.of(edges, 0, HOUR_MS)
    tally.add(at[quiet], values[quiet], np.zeros(int(quiet.sum()), np.int64))
    slots = tally.close(2**62)
    series = [Series(name, "field", "calls") for name in CALLS]
    base = fit(series, (), edges, np.array([s for s, _ in slots]), np.array([c for _, c in slots]))
    none = np.zeros(int((~quiet).sum()), np.int64)
    rest = compare(base, at[~quiet], values[~quiet], none)
    monitor = Monitor(base)
    after = Tally.of(edges, 0, base.block_ms)
    after.add(at[~quiet], values[~quiet], none)
    early = [finding for start, counts in after.close(2**62) for finding in monitor.update(start, counts)]
    found: dict[str, Any] = {
        "calls": len(at), "block_hours": base.block_ms / HOUR_MS, "rest_of_january": {r.name: round(r.psi, 3) for r in rest.rows},
        "rest_findings": [f"{f.series} {f.detector}/{f.window} {f.statistic:.2f} > {f.threshold:.2f}" for f in early],
    }  # fmt: skip
    for path in others:
        when, what = calls(path)
        month = compare(base, when, what, np.zeros(len(when), np.int64))
        moved = [row.name for row in month.rows if row.over]
        found[path.name] = {"calls": len(when), "moved": moved, "psi": {r.name: round(r.psi, 3) for r in month.rows}}
    return found


def main() -> int:
    """Run; 0 when the shop's autumn pages at most once, the rest of January is quiet, and every other month given has moved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--bank", type=Path, help="January of the bank's calls")
    parser.add_argument("--other", type=Path, action="append", default=[], help="another month")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    report: dict[str, Any] = {"shop": shop()}
    report["autumn_pages"] = report["shop"]["pages_in_autumn"]
    ok = report["autumn_pages"] <= 1
    if args.bank:
        report["bank"] = bank(args.bank, args.other)
        ok = ok and not report["bank"]["rest_findings"] and all(report["bank"][path.name]["moved"] for path in args.other)
    report["ok"] = ok
    print(json.dumps(report) if args.json else json.dumps(report, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
