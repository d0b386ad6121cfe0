"""docs/reliability.md: the parts between the marks are written from the committed ledgers, the rest by hand."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from bench.faults import ledger, mutants, sim_campaign
from bench.faults.nemesis import FAULTS

PAGE: Final = Path(__file__).parent.parent.parent / "docs" / "reliability.md"
SOAK: Final = Path(__file__).parent / "soak.jsonl"


def write(*, check: bool = False, page: Path = PAGE) -> bool:
    """Fill in the generated parts; whether that changes the page. check: leave it as it is."""
    text = page.read_text("utf-8")
    lines = ledger.read(ledger.COMMITTED)
    parts = {
        "totals": totals(lines),
        "violations": violations(lines),
        "faults": table(lines),
        "soak": soak(ledger.read(SOAK)),
        "simulation": simulation(sim_campaign.read(sim_campaign.COMMITTED)),
        "mutants": caught(sim_campaign.read(mutants.COMMITTED)),
    }
    new = text
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name}: generated -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        new = pattern.sub(lambda match, part=part: match[1] + part + match[2], new)  # type: ignore[misc]  # the default binds this turn's value, which mypy cannot type
    if not check and new != text:
        page.write_text(new, "utf-8")
    return new != text


def totals(lines: Sequence[ledger.Line]) -> str:
    """The campaign in a few rows."""
    f = ledger.summary(lines)
    if not lines:
        return "No rounds yet.\n"
    bound = 3 / f["rounds"]
    rows = [
        ("rounds", f"{f['rounds']:,}"),
        ("of them with 20,000 events and more", f"{f['rounds_of_20000_events']}"),
        ("input records", f"{f['events']:,}"),
        ("scores recomputed", f"{f['scores']:,}"),
        ("rounds by delivery", ", ".join(f"{mode} {count}" for mode, count in sorted(f["modes"].items()))),
        ("rounds with a violation", f"{f['violated']}"),
        ("failure rate of a round, 95 % bound when none failed (3 / rounds)", f"{100 * bound:.2f} %" if not f["violated"] else "-"),
        ("worker starts after an end", f"{f['restarts']:,}"),
        ("raw duplicates, all equal to the byte", f"{f['raw_duplicates']:,}"),
        ("worker SIGKILL to lag 0", f"p50 {_s(f['kill_recover_p50_s'])}, p99 {_s(f['kill_recover_p99_s'])}"),
        ("Redis SIGKILL and restart to lag 0", f"p99 {_s(f['redis_recover_p99_s'])}"),
        ("longest pause of a partition, 1 -> 4 -> 2 workers", _s(f["scale_pause_max_s"])),
        (
            "graceful stops under load",
            f"{f['graceful_rounds']}, {f['graceful_raw_duplicates']} raw duplicates, longest {_s(f['graceful_stop_max_s'])}",
        ),
        ("largest resident memory of a worker", f"{f['max_rss_mb']} MB"),
        ("commits", ", ".join(sorted({line["commit"] for line in lines}))),
    ]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def violations(lines: Sequence[ledger.Line]) -> str:
    """Every round with a violation, and what was behind it (`note` of its line, added by hand)."""
    bad = [line for line in lines if line.get("violations")]
    if not bad:
        return "None.\n"
    rows = ["| round | fault | commit | first violation | what it was |\n|---|---|---|---|---|\n"]
    for line in bad:
        first = line["violations"][0][:80].replace("|", "/")
        rows.append(f"| {line['seed']} | `{line['fault']}` | {line['commit']} | {first} | {line.get('note', '?')} |\n")
    return "".join(rows)


def table(lines: Sequence[ledger.Line]) -> str:
    """One row per fault."""
    by_fault = ledger.summary(lines)["by_fault"]
    rows = ["| fault | what | rounds | violated | recovered p50 | p99 |\n|---|---|---|---|---|---|\n"]
    for name, fault in FAULTS.items():
        f: dict[str, Any] = by_fault.get(name, {"rounds": 0, "violated": 0, "recover_p50_s": None, "recover_p99_s": None})
        times = f"{_s(f['recover_p50_s'])} | {_s(f['recover_p99_s'])}"
        rows.append(f"| `{name}` | {fault.what} | {f['rounds']} | {f['violated']} | {times} |\n")
    return "".join(rows)


def soak(lines: Sequence[ledger.Line]) -> str:
    """One row per soak."""
    if not lines:
        return "None yet.\n"
    head = ("at", "minutes", "events", "delivery", "faults", "harm", "starts", "violations", "memory", "slope", "commit")
    rows = [f"| {' | '.join(head)} |\n", "|---" * len(head) + "|\n"]
    for line in lines:
        facts = line["facts"]
        cells = (
            line["at"],
            f"{facts['minutes']:g}",
            f"{line['events']:,}",
            line["mode"],
            sum(facts["faults"].values()),
            "mild" if facts.get("mild") else "all",
            line.get("restarts", 0),
            len(line.get("violations", [])),
            f"{facts['rss_mb']} MB",
            f"{facts['rss_slope_percent_per_hour']} %/h over {facts['rss_watched_s'] / 60:.1f} min",
            line["commit"],
        )
        rows.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join(rows)


def simulation(lines: Sequence[ledger.Line]) -> str:
    """One row per build, and every violation."""
    if not lines:
        return "No seeds yet.\n"
    head = ("build", "commit", "seeds", "violations", "events", "scores", "faults", "steps", "CPU a seed")
    rows = [f"| {' | '.join(head)} |\n", "|---" * len(head) + "|\n"]
    found = sim_campaign.builds(lines)
    for build in found:
        counts = (f"{build[name]:,}" for name in ("seeds", "violations", "events", "scores", "faults_injected", "steps"))
        cells = (build["sources"], build["commit"][:12], *counts, f"{build['ms_per_seed']} ms")
        rows.append(f"| {' | '.join(cells)} |\n")
    last = found[-1]
    bound = f"{300 / last['seeds']:.4f} %" if not last["violations"] else "-"
    rows.append(f"\nOf the last build: failure rate of a seed, 95 % bound when none failed (3 / seeds): {bound}. ")
    rows.append(f"Versions: {', '.join(f'{name} {number}' for name, number in last['versions'].items())}.\n\n")
    rows.append("| fault of the last build | times |\n|---|---|\n")
    rows += [f"| {name} | {count:,} |\n" for name, count in last["faults"].items()]
    for build in found:
        if first := build["first_violation"]:
            rows.append(f"\nViolating seeds of {build['sources']}: {build['violating_seeds']}; the first: {first['what'][:200]}\n")
    return "".join(rows)


def caught(lines: Sequence[ledger.Line]) -> str:
    """One row per mutant, of the last run."""
    if not lines:
        return "Not run yet.\n"
    last = lines[-1]
    rows = [f"{last['caught']} of {last['mutants']} caught (commit {last['commit'][:12]}).\n\n"]
    rows.append("| mutant | what is broken | caught by | at seed |\n|---|---|---|---|\n")
    for result in last["results"]:
        by = result["invariant"] if result["caught"] else "**not caught**"
        rows.append(f"| {result['mutant']} | {result['what']} | {by} | {'-' if result['seed'] is None else result['seed']} |\n")
    return "".join(rows)


def _s(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `report`."""
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the page is not up to date")


def main(arguments: argparse.Namespace) -> int:
    """Write the page, or say whether it is up to date."""
    changed = write(check=arguments.check)
    print(json.dumps({"changed": changed}))
    return int(changed and arguments.check)
