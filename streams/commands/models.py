"""`churnstream models`: train and judge models; publishing them is in streams.commands.registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streams.commands import registry as desk

if TYPE_CHECKING:
    from models.artifact import Manifest
    from streams.settings import Settings
    from streams.training import Facts

app = typer.Typer(no_args_is_help=True)
desk.add_to(app)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
FromTopics = Annotated[bool, typer.Option("--from-topics", help="Take the events of the input topics up to their present end.")]
Events = Annotated[list[Path] | None, typer.Option("--events", metavar="FILE", help="Take the events of files; may be repeated.")]
MappingName = Annotated[str, typer.Option("--mapping", help="Mapping of the files, as for `churnstream feed`.")]
SplitDay = Annotated[str, typer.Option("--split", metavar="DAY", help="Where training ends and testing begins, YYYY-MM-DD (UTC).")]
LabelDays = Annotated[int, typer.Option("--label-days", min=1, help="Churned = no purchase in so many days after the instant.")]
ActiveDays = Annotated[int, typer.Option("--active-days", min=1, help="Asked of customers with a purchase in so many days before it.")]

MIN_HISTORY_DAYS = 90
"""The first training cut-off lies so many days after the first event: before that every window is half empty."""


@app.callback()
def group() -> None:
    """Train, publish, look at and judge models."""


def _one_source(from_topics: bool, events: list[Path] | None) -> None:
    from proto.errors import BadUsage

    if from_topics == bool(events):
        raise BadUsage("say where the events are: --from-topics, or --events FILE (with --mapping)")


def _facts(settings: Settings, from_topics: bool, events: list[Path] | None, mapping: str) -> list[Facts]:
    from streams import training

    return training.from_topics(settings) if from_topics else training.from_files(events or [], mapping, settings)


def _day(text: str) -> int:
    from proto.errors import BadUsage
    from proto.events import epoch_ms

    try:
        return epoch_ms(f"{text}T00:00:00Z")
    except ValueError as error:
        raise BadUsage(f"--split {text}: needs a day as YYYY-MM-DD") from error


def _bounds(parts: list[Facts]) -> tuple[int, int]:
    """First and newest event time of all partitions (ms)."""
    from features.facts import TIME
    from proto.errors import BadInput

    times = [part.facts[:, TIME] for part in parts if len(part.facts)]
    if not times:
        raise BadInput("no events: nothing to learn from or to judge by")
    return min(int(time.min()) for time in times), max(int(time.max()) for time in times)


@app.command(
    epilog="Example: churnstream models train --from-topics --split 2010-12-01 --publish\n\n"
    "Example: churnstream models train --events data/online_retail_ii/invoices.csv.gz --mapping online_retail_ii --split 2010-12-01"
)
def train(
    split: Annotated[str | None, typer.Option(metavar="DAY", help="Where training ends and testing begins, YYYY-MM-DD (UTC).")] = None,
    data: Annotated[
        str | None, typer.Option(metavar="simulated", help="Simulate a population and train on it (docs/simulation.md).")
    ] = None,
    customers: Annotated[int, typer.Option(min=100, help="With --data simulated: how many customers.")] = 100_000,
    months: Annotated[int, typer.Option(min=6, max=60, help="With --data simulated: how long.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="With --data simulated.")] = 0,
    label_file: Annotated[str, typer.Option("--label", help="With --data simulated: a label by name, or a TOML file.")] = "silent-30d",
    from_topics: FromTopics = False,
    events: Events = None,
    mapping: MappingName = "jsonl",
    label_days: LabelDays = 90,
    active_days: ActiveDays = 180,
    medium: Annotated[float, typer.Option(help="Probability from which the band is medium.")] = 0.3,
    high: Annotated[float, typer.Option(help="Probability from which the band is high.")] = 0.6,
    publish: Annotated[bool, typer.Option(help="Publish the model as champion when it passed all gates.")] = False,
    allow_high_auc: Annotated[bool, typer.Option(help="Go on although an AUC above 0.95 looks like leakage.")] = False,
    json_output: Json = False,
) -> None:
    """Train, calibrate and export a model on what was known before the split; keep it as a file, and publish it if asked to.

    Rows are event instants plus a snapshot of every active customer every 15 days, with cut-offs up to the split less the label's
    days. Exit code 1 when a gate refuses the model.
    """
    import time

    from proto.errors import BadUsage

    # What is wrong with the command is said before seconds go into imports.
    if not 0 < medium < high < 1:
        raise BadUsage(f"--medium {medium:g} --high {high:g}: needs 0 < medium < high < 1")
    if data is not None:
        if data != "simulated":
            raise BadUsage(f"--data {data}: only `simulated` is known; for other data say --from-topics or --events FILE")
        _train_simulated(customers, months, seed, label_file, publish, json_output)
        return
    _one_source(from_topics, events)
    if split is None:
        raise BadUsage("say where training ends: --split YYYY-MM-DD")
    split_ms = _day(split)

    from features.window import DAY_MS
    from models import registry
    from models.dataset import build, concatenate
    from models.labels import Label
    from models.split import Split
    from models.train import Options
    from models.train import train as fit
    from streams.console import Console
    from streams.settings import load

    begin = time.monotonic()
    settings = load()
    console = Console(json_output=json_output)
    parts = _facts(settings, from_topics, events, mapping)
    first, newest = _bounds(parts)
    label = Label(label_days, active_days)
    plan = Split(split_ms, first - first % DAY_MS + MIN_HISTORY_DAYS * DAY_MS, newest, label)
    cutoffs = [*plan.train_cutoffs(), *plan.test_cutoffs()]
    rows = concatenate(
        [build(part.customers, part.facts, label, cutoffs, events=(plan.first, plan.train_last), known_to_ms=newest) for part in parts]
    )
    console.say(f"{len(rows):,} rows from {sum(len(part.facts) for part in parts):,} facts in {time.monotonic() - begin:.1f} s")
    trained = fit(rows, plan, Options(medium=medium, high=high, allow_high_auc=allow_high_auc))
    path = registry.save(settings.data_dir / "models", trained.manifest, trained.envelope, trained.baseline_onnx)
    changed = publish and _publish(settings, trained.manifest, trained.envelope)
    _say(console.say, trained.manifest)
    console.say(f"{'published as champion, and kept' if publish else 'kept'} as {path}")
    console.result(
        {
            **_summary(trained.manifest),
            "rows": len(rows),
            "file": str(path),
            "published": publish,
            "changed": changed,
            "metrics": trained.manifest.metrics,
            "baseline": trained.manifest.baseline["metrics"],
            "gates": trained.manifest.gates,
            "seconds": round(time.monotonic() - begin, 2),
        }
    )


def _train_simulated(customers: int, months: int, seed: int, label: str, publish: bool, json_output: bool) -> None:
    import time

    from models import registry
    from models.population import Scenario
    from proto.errors import ArtifactRejected
    from streams import simulated_training
    from streams.console import Console
    from streams.settings import load

    begin = time.perf_counter()
    settings = load()
    console = Console(json_output=json_output)
    done = simulated_training.run(settings, Scenario(customers, months, seed), label, say=console.say)
    manifest = done.trained.manifest
    path = registry.save(settings.data_dir / "models", manifest, done.trained.envelope, done.trained.baseline_onnx)
    columns = ("learner", "served", "validation AUC", "test AUC", "new", "existing", "Brier", "parity")
    console.table(columns, [_board_line(entry) for entry in done.trained.board], title="leaderboard")
    words = [
        (
            row.gate,
            row.required,
            round(row.reached, 4),
            row.attainable and round(row.attainable, 4),
            _verdict(row.met, row.unattainable, row.passed),
        )
        for row in done.gates
    ]
    console.table(("gate", "required", "reached", "attainable", "verdict"), words, title=f"gates on {manifest.label['name']}")
    result = {**_summary(manifest), "file": str(path), **simulated_training.report(done), "base_rate": _test_of(manifest)["base_rate"]}
    failed = [row for row in done.gates if not row.passed]
    result["published"] = publish and not failed
    result["changed"] = bool(result["published"]) and _publish(settings, manifest, done.trained.envelope)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    _say(console.say, manifest)
    console.say(f"{'published as champion, and kept' if result['published'] else 'kept'} as {path}, {result['seconds']} s in all")
    console.result(result)
    if failed:
        first = failed[0]
        raise ArtifactRejected(
            f"gate {first.gate}: {first.reached:.4f} reached, {first.required:g} required, {first.attainable} attainable"
        )


def _verdict(met: bool, unattainable: bool, passed: bool) -> str:
    if met:
        return "met"
    return ("not attainable; near the oracle" if passed else "not attainable; too far from the oracle") if unattainable else "failed"


def _board_line(entry: dict[str, Any]) -> tuple[object, ...]:
    test = entry.get("test") or {}
    parity = entry.get("parity")
    shown = None if parity is None else f"{parity:.1e}"
    names = ("learner", "servable", "validation_mean")
    return (*(entry[name] for name in names), test.get("auc"), entry.get("auc_new"), entry.get("auc_existing"), test.get("brier"), shown)


def _test_of(manifest: Manifest) -> Any:
    return manifest.metrics.get("test") or manifest.metrics["validation"]


def _publish(settings: Settings, manifest: Manifest, envelope: bytes) -> bool:
    """Into service, or where two persons are asked for into staging; whether that changed anything."""
    from streams.publishing import release

    released = release(settings, manifest, envelope)
    if released.waits:
        typer.echo(f"in staging: {released.waits}", err=True)
    return released.changed


@app.command(epilog="Example: churnstream models evaluate --from-topics --split 2010-12-01 --scores")
def evaluate(
    split: SplitDay,
    from_topics: FromTopics = False,
    events: Events = None,
    mapping: MappingName = "jsonl",
    label_days: LabelDays = 90,
    active_days: ActiveDays = 180,
    model: Annotated[str | None, typer.Option(help="Digest of a model kept here (8 digits or more); default: the champion.")] = None,
    scores: Annotated[bool, typer.Option(help="Also judge the scores that were given live, from the score topic.")] = False,
    json_output: Json = False,
) -> None:
    """Judge the published champion by what happened: snapshots every 15 days after the split, as known then, with mature labels.

    The interval is a bootstrap over customers. --scores joins the live scores of active customers since the split to the same label.
    """
    _one_source(from_topics, events)
    at = _day(split)

    import numpy as np

    from features.catalog import NAMES
    from models import evaluate as judge
    from models import registry
    from models.artifact import unpack
    from models.dataset import build, concatenate
    from models.labels import Label
    from models.split import Split
    from proto.errors import BadInput
    from scoring.scorer import Scorer
    from streams.console import Console
    from streams.settings import load

    settings = load()
    console = Console(json_output=json_output)
    parts = _facts(settings, from_topics, events, mapping)
    _, newest = _bounds(parts)
    label = Label(label_days, active_days)
    plan = Split(at, at - label.horizon_ms, newest, label)
    cutoffs = plan.test_cutoffs()
    if not cutoffs:
        raise BadInput(f"no snapshot: less than {label.days} days of data lie after {split}, so no label is mature")
    rows = concatenate([build(part.customers, part.facts, label, cutoffs, known_to_ms=newest) for part in parts])
    rows = rows.where(rows.y >= 0)
    kept = None if model is None else unpack(registry.take(settings.data_dir / "models", model))
    scorer = Scorer(kept or _published().champion())
    found = judge.measure(rows.y, scorer.score(rows.x), rows.customer).as_dict()
    recency = judge.auc(rows.y, rows.x[:, NAMES.index("purchase_age_days")])
    result: dict[str, Any] = {
        "model_version": scorer.version,
        "model_digest": scorer.digest,
        "label": label.name,
        "snapshots": len(cutoffs),
        "snapshot_rows": len(rows),
        "auc": found["auc"],
        "auc_interval": found["auc_interval"],
        "auc_baseline": round(recency, 4),
        "base_rate": found["base_rate"],
        "mean_score": found["mean_score"],
        "brier": found["brier"],
        "average_precision": found["average_precision"],
    }
    if scores:
        live, y = _live(settings, parts, label, at, newest)
        result |= {
            "auc_events": round(judge.auc(y, live), 4),
            "scored_events_judged": len(y),
            "base_rate_events": round(float(np.mean(y)), 4),
        }
    console.table(("figure", "value"), [(name, str(value)) for name, value in result.items()])
    console.result(result)


def _live(settings: Settings, parts: list[Facts], label: Any, from_ms: int, known_to_ms: int) -> tuple[Any, Any]:
    """Probabilities of the live scores since `from_ms` whose label is mature, customers active then, and their labels."""
    import numpy as np

    from models.labels import Outcomes
    from streams.training import emitted_scores

    emitted = emitted_scores(settings, from_ms)
    number: dict[str, int] = {}
    who = np.fromiter((number.setdefault(name, len(number)) for part in parts for name in part.customers), np.int64)
    outcomes = Outcomes(who, np.concatenate([part.facts for part in parts]), label)
    # -1: a score of a customer whose facts came after we read the topics, or of another source.
    customer = np.fromiter((number.get(name, -1) for name in emitted.customers), np.int64, len(emitted.customers))
    keep = (customer >= 0) & label.mature(emitted.at, known_to_ms) & outcomes.active(customer, emitted.at)
    y = outcomes.churned(customer[keep], emitted.at[keep]).astype(np.int8)
    return emitted.probability[keep], y


def _published() -> Any:
    from streams.publishing import published
    from streams.settings import load

    return published(load())


def _summary(manifest: Manifest) -> dict[str, Any]:
    return desk.summary(manifest)


def _say(say: Any, manifest: Manifest) -> None:
    say(f"model {manifest.version} ({manifest.digest[:16]}), {len(manifest.features_used)} features, label {manifest.label['name']}")
    baseline: Any = manifest.baseline["metrics"]
    metrics: Any = manifest.metrics  # by part, as of Metrics.as_dict
    for part, f in metrics.items():
        low, high = f["auc_interval"]
        say(
            f"  {part}: AUC {f['auc']:.3f} [{low:.3f}, {high:.3f}] on {f['rows']:,} rows, base rate {f['base_rate']:.3f}, "
            f"Brier {f['brier']:.3f}; recency alone {baseline[part]['auc']:.3f}"
        )
