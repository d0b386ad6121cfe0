"""`churnstream models report`, `what-if` and `build-dataset`: what a kept evaluation says, and the rows a model learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Model = Annotated[str | None, typer.Option("--model", help="Digest of a model, or its beginning; default: the one trained last.")]


def report(
    model: Model = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the page; default: it stays where it is kept.")] = None,
    json_output: Json = False,
) -> None:
    """The page of a model's evaluation: figures with intervals, curves, groups, robustness, gates. One file, no outside links.

    The same as JSON lies beside it, and is what --json prints.
    """
    from models import pages
    from proto.errors import BadInput
    from streams import evaluations
    from streams.console import Console
    from streams.settings import load

    console = Console(json_output=json_output)
    home = evaluations.find(load().data_dir / "evaluations", model)
    body = evaluations.body_of(home)
    page = out or home / evaluations.PAGE
    try:
        page.write_text(pages.html(body), encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{page}: {error.strerror}; give another --out") from error
    figures = [(name, *(("" if x is None else f"{x:.4f}") for x in value)) for name, value in body["figures"].items()]
    console.table(("figure", "value", "from", "to"), figures, title=f"{body['model']['version']} on {body['rows']:,} rows")
    failed = [gate["gate"] for gate in body["gates"] if not gate["passed"]]
    console.say(f"gates: {'all passed' if not failed else 'not passed: ' + ', '.join(failed)}")
    console.say(f"page: {page}")
    console.result({**body, "page": str(page)})


def what_if(
    cost: Annotated[float, typer.Option(min=0, help="What one offer costs.")] = 10.0,
    benefit: Annotated[
        str, typer.Option(help="Revenue kept when a customer stays: an amount, or `spend`: a year at the pace of the last 90 days.")
    ] = "spend",
    success: Annotated[float, typer.Option(min=0, max=1, help="Share of the contacted churners who stay because of the offer.")] = 0.3,
    capacity: Annotated[int, typer.Option(min=0, help="Most contacts of one campaign; 0 = no bound.")] = 0,
    budget: Annotated[float | None, typer.Option(min=0, help="Most money of one campaign.")] = None,
    recall: Annotated[float | None, typer.Option(min=0, max=1, help="Instead of money: a threshold with at least this recall,")] = None,
    precision: Annotated[float | None, typer.Option(min=0, max=1, help="and at least this precision.")] = None,
    by: Annotated[str, typer.Option(help="Group of the table by group: plan, segment, region or age_band.")] = "segment",
    flips: Annotated[int, typer.Option(min=0, help="How many of the customers to list who would be treated otherwise than today.")] = 20,
    model: Model = None,
    json_output: Json = False,
) -> None:
    """What a campaign would have brought at each threshold, on the judged rows of a model, whose outcome is known.

    Figures are means of one campaign at one instant. With --recall and --precision the threshold that meets both, or how far off they are
    (exit code 1).
    """
    from proto.errors import BadUsage

    if (recall is None) != (precision is None):
        raise BadUsage("--recall and --precision go together")

    import numpy as np

    from models import what_if as rules
    from models.policy import GROUPS
    from proto.errors import ChurnError
    from streams import evaluations
    from streams.codec import exponent_of
    from streams.console import Console
    from streams.settings import load

    if by not in GROUPS:
        raise BadUsage(f"--by {by}: needs one of {', '.join(GROUPS)}")
    settings = load()
    console = Console(json_output=json_output)
    home = evaluations.find(settings.data_dir / "evaluations", model)
    rows, body = evaluations.rows_of(home), evaluations.body_of(home)
    result: dict[str, Any] = {"model": body["model"]["version"], "digest": home.name, "label": body["label"]["name"], "rows": len(rows.y)}
    if recall is not None and precision is not None:
        found = rules.by_constraint(rows.y, rows.score, recall, precision)
        if found["feasible"]:
            console.say(f"threshold {found['threshold']}: recall {found['recall']:.3f}, precision {found['precision']:.3f}")
        console.result({**result, **found})
        if not found["feasible"]:
            raise ChurnError(
                f"infeasible: at precision {precision:g} the recall is {_or_none(found['best_recall_at_precision'])} at best, "
                f"at recall {recall:g} the precision is {_or_none(found['best_precision_at_recall'])} at best"
            )
        return

    number = np.unique(np.array(rows.customer), return_inverse=True)[1].astype(np.int64)
    worth = _benefit(benefit, rows.spend_minor, 10 ** exponent_of(settings.currency))
    campaign = rules.Campaign(cost, success, capacity, budget)
    table = rules.over_thresholds(rows.y, rows.score, rows.at, number, worth, campaign)
    best = max(table, key=lambda entry: entry["net"])
    today = float(body["thresholds"]["contact"])
    groups = rules.by_group(rows.y, rows.score, rows.at, rows.groups[by], worth, campaign, best["threshold"])
    newest = rows.at == rows.at.max()
    before = rules.contacted(rows.score, rows.at, today, campaign.contacts)
    after = rules.contacted(rows.score, rows.at, best["threshold"], campaign.contacts)
    flipped = np.flatnonzero(newest & (before != after))
    flipped = flipped[np.argsort(-rows.score[flipped], kind="stable")]
    listed = [
        {"customer_id": rows.customer[i], "probability": round(float(rows.score[i]), 4), "contacted": bool(after[i])}
        for i in flipped[:flips].tolist()
    ]
    heads = ("threshold", "contacts", "churned", "cost", "saved_revenue", "net", "from", "to")
    shown = [entry for i, entry in enumerate(table) if i % 4 == 3 or entry is best]
    lines = [(*(entry[name] for name in heads[:6]), *entry["net_interval"]) for entry in shown]
    console.table(heads, lines, title=f"one campaign, {settings.currency}, an offer keeps {success:.0%} of the churners it reaches")
    console.table(
        (by, "contacts", "cost", "saved_revenue", "net"), [tuple(entry.values()) for entry in groups], title=f"at {best['threshold']}"
    )
    console.say(f"best threshold {best['threshold']}: {best['net']:,.2f} net {best['net_interval']}; today's is {today:g}")
    console.say(
        f"{len(flipped):,} customers at the newest instant would be treated otherwise; the model's bands stay until it is trained again"
    )
    console.result(
        {
            **result,
            "campaign": {"cost": cost, "benefit": benefit, "success": success, "capacity": capacity, "budget": budget},
            "thresholds": table,
            "best": best,
            "contact_threshold_today": today,
            "by_group": groups,
            "flips": len(flipped),
            "flipped_customers": listed,
        }
    )


def _or_none(value: float | None) -> str:
    return "out of reach" if value is None else f"{value:.3f}"


def _benefit(text: str, spend_minor: Any, minor: int) -> Any:
    import numpy as np

    from proto.errors import BadUsage

    if text == "spend":
        return np.nan_to_num(spend_minor) / minor * 365 / 90
    try:
        amount = float(text)
    except ValueError:
        raise BadUsage(f"--benefit {text}: an amount, or `spend`") from None
    if not 0 <= amount < 1e15:
        raise BadUsage(f"--benefit {text}: a positive amount")
    return np.full(len(spend_minor), amount)


def build_dataset(
    label_name: Annotated[str, typer.Option("--label", help="A label by name, or a TOML file.")] = "no-purchase-90d",
    from_topics: Annotated[
        bool, typer.Option("--from-topics", help="Take the events of the input topics up to their present end.")
    ] = False,
    events: Annotated[
        list[Path] | None, typer.Option("--events", metavar="FILE", help="Take the events of files; may be repeated.")
    ] = None,
    mapping: Annotated[list[str] | None, typer.Option("--mapping", help="Mapping of the files: one for all, or one for each.")] = None,
    simulation: Annotated[Path | None, typer.Option(metavar="DIR", help="Take the files of `churnstream simulate --out DIR`.")] = None,
    first: Annotated[str | None, typer.Option(metavar="DAY", help="First cut-off; default: 90 days after the first event.")] = None,
    step_days: Annotated[int, typer.Option(min=1, help="Days between cut-offs.")] = 15,
    corrected: Annotated[bool, typer.Option(help="As if every event had come when it happened, which live scoring never sees.")] = False,
    json_output: Json = False,
) -> None:
    """Make labelled rows at cut-offs and keep them with a manifest: digest, leakage lint, state of the data. Exit code 1 for a leak.

    Rows whose label is not mature are kept without one. The same events give the same digest.
    """
    import time

    from proto.errors import BadUsage

    if sum((from_topics, bool(events), simulation is not None)) != 1:
        raise BadUsage("say where the events are: --from-topics, --events FILE (with --mapping), or --simulation DIR")

    from features.window import DAY_MS
    from models import labels, lint
    from streams import datasets, simulate, training
    from streams.console import Console
    from streams.settings import load

    begin = time.monotonic()
    settings = load()
    console = Console(json_output=json_output)
    label = labels.load(label_name)
    if simulation is not None:
        blocks = simulate.parts(simulation)
        start, end = simulate.span(simulation)
        source: dict[str, Any] = {"kind": "simulation", "directory": simulation.name}
    else:
        parts = training.from_topics(settings) if from_topics else training.from_mapped(pairs(events or [], mapping), settings)
        start, end = datasets.bounds(parts)
        source = {"kind": "topics" if from_topics else "files", "names": [file.name for file in events or []]}
    opening = day(first) if first else start - start % DAY_MS + 90 * DAY_MS
    cutoffs = tuple(range(opening, end + 1, step_days * DAY_MS))
    if not cutoffs:
        raise BadUsage(f"no cut-off: the first lies after the newest event ({(end - start) / DAY_MS:.0f} days of data); give --first DAY")
    plan = datasets.Plan(label, cutoffs, None, end, corrected=corrected)
    dataset = datasets.of_simulation(simulation, blocks, plan, settings) if simulation is not None else datasets.of_parts(parts, plan)
    home = datasets.save(dataset, plan, settings.data_dir / "datasets", source)
    rows = dataset.rows
    mature = rows.y >= 0
    base = float(rows.y[mature].mean()) if mature.any() else None
    for finding in dataset.findings:
        console.say(f"lint: {finding.feature}: {finding.message}{'' if finding.error else ' (for a person to judge)'}")
    for warning in dataset.quality["warnings"]:
        console.say(f"quality: {warning}")
    console.say(
        f"{len(rows):,} rows at {len(cutoffs)} cut-offs, {int(mature.sum()):,} with a label {label.name}, base rate "
        f"{'-' if base is None else f'{base:.4f}'}; {time.monotonic() - begin:.1f} s"
    )
    console.say(f"kept as {home}")
    console.result(
        {
            "digest": rows.digest(),
            "directory": str(home),
            "label": label.name,
            "rows": len(rows),
            "labelled": int(mature.sum()),
            "customers": len(rows.names),
            "base_rate": None if base is None else round(base, 4),
            "cutoffs": len(cutoffs),
            "lint": [finding.as_dict() for finding in dataset.findings],
            "warnings": dataset.quality["warnings"],
            "seconds": round(time.monotonic() - begin, 2),
        }
    )
    lint.check(dataset.findings)


def pairs(files: list[Path], mappings: list[str] | None) -> list[tuple[Path, str]]:
    """Files with their mappings: one for all, or one for each. Raises BadUsage."""
    from proto.errors import BadUsage

    names = mappings or ["jsonl"]
    if len(names) not in {1, len(files)}:
        raise BadUsage(f"{len(files)} --events and {len(names)} --mapping: give one mapping for all files, or one for each")
    return list(zip(files, names * len(files) if len(names) == 1 else names, strict=True))


def day(text: str) -> int:
    """Midnight of YYYY-MM-DD (UTC) in ms. Raises BadUsage."""
    from proto.errors import BadUsage
    from proto.events import epoch_ms

    try:
        return epoch_ms(f"{text}T00:00:00Z")
    except ValueError as error:
        raise BadUsage(f"{text}: needs a day as YYYY-MM-DD") from error
