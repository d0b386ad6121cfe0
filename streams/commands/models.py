"""`churnstream models`: train and judge models; publishing them is in streams.commands.registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streams.commands import gatekeeping, judging
from streams.commands import registry as desk

if TYPE_CHECKING:
    from models.artifact import Manifest
    from models.labels import Label
    from streams.settings import Settings
    from streams.training import Facts

app = typer.Typer(no_args_is_help=True)
desk.add_to(app)
app.command("report", epilog="Example: churnstream models report --out report.html")(judging.report)
app.command("what-if", epilog="Example: churnstream models what-if --cost 5 --benefit spend --success 0.3 --capacity 500")(judging.what_if)
app.command("build-dataset", epilog="Example: churnstream models build-dataset --from-topics --label silent-30d")(judging.build_dataset)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
FromTopics = Annotated[bool, typer.Option("--from-topics", help="Take the events of the input topics up to their present end.")]
Events = Annotated[list[Path] | None, typer.Option("--events", metavar="FILE", help="Take the events of files; may be repeated.")]
Mappings = Annotated[
    list[str] | None, typer.Option("--mapping", help="Mapping of the files, as for `churnstream feed`: one for all, or one for each.")
]
LabelName = Annotated[
    str | None, typer.Option("--label", help="A label by name, or a TOML file; default: by --label-days and --active-days.")
]
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


def _facts(settings: Settings, from_topics: bool, events: list[Path] | None, mapping: list[str] | None) -> list[Facts]:
    from streams import training

    if from_topics:
        return training.from_topics(settings)
    sources = judging.pairs(events or [], mapping)
    # One mapping: the files' own order is the order of arrival. Several: nobody knows how they lay beside each other.
    return training.from_mapped(sources, settings, in_order=len({name for _, name in sources}) == 1)


def _label(name: str | None, days: int, active_days: int) -> Label:
    from models import labels

    return labels.load(name) if name else labels.Label(days, active_days)


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
    first_cutoff: Annotated[
        str | None, typer.Option("--first", metavar="DAY", help="First training cut-off; default: 90 days after the first event.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="simulated", help="Simulate a population and train on it (docs/simulation.md).")
    ] = None,
    customers: Annotated[int, typer.Option(min=100, help="With --data simulated: how many customers.")] = 100_000,
    months: Annotated[int, typer.Option(min=6, max=60, help="With --data simulated: how long.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="With --data simulated.")] = 0,
    label_name: LabelName = None,
    from_topics: FromTopics = False,
    events: Events = None,
    mapping: Mappings = None,
    label_days: LabelDays = 90,
    active_days: ActiveDays = 180,
    medium: Annotated[float, typer.Option(help="Probability from which the band is medium.")] = 0.3,
    high: Annotated[float, typer.Option(help="Probability from which the band is high.")] = 0.6,
    publish: Annotated[bool, typer.Option(help="Publish the model as champion when it passed all gates.")] = False,
    allow_high_auc: Annotated[bool, typer.Option(help="Go on although an AUC above 0.95 looks like leakage.")] = False,
    gates: Annotated[Path | None, typer.Option(metavar="FILE", help="Bounds of the gates as TOML (docs/models.md).")] = None,
    strict_gates: Annotated[bool, typer.Option(help="With --data simulated: no gate is excused as not attainable.")] = False,
    learning_curve: Annotated[bool, typer.Option(help="Also train on parts of the customers: would more of them help?")] = False,
    blind_spots: Annotated[bool, typer.Option(help="With --data simulated: which hidden causes the features cannot see.")] = False,
    tune: Annotated[int, typer.Option(min=0, help="Try so many settings of boosted trees; a broken run goes on where it was.")] = 0,
    learners: Annotated[
        str | None, typer.Option(help="quick (two boosted trees), all, or names; default: quick, with --data simulated all.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Pass only if better than this kept model (digest), or `champion`, by a paired test."),
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the page of the evaluation there.")] = None,
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
        extra = {
            "learners": learners or "all",
            "curve": learning_curve,
            "blind": blind_spots,
            "tune": tune,
            "against": against,
            "report": report,
        }
        _train_simulated(customers, months, seed, label_name or "silent-30d", publish, gates, strict_gates, extra, json_output)
        return
    _one_source(from_topics, events)
    if split is None:
        raise BadUsage("say where training ends: --split YYYY-MM-DD")
    split_ms = _day(split)

    from features.window import DAY_MS
    from models import attainable, registry, safety, tuning
    from models.dataset import build, concatenate
    from models.learners import LEARNERS, QUICK
    from models.policy import Policy
    from models.policy import load as load_policy
    from models.split import Split
    from models.train import HELD_OUT_MS, Options
    from models.train import train as fit
    from proto.errors import ArtifactRejected
    from streams.console import Console
    from streams.settings import load

    begin = time.monotonic()
    settings = load()
    console = Console(json_output=json_output)
    parts = _facts(settings, from_topics, events, mapping)
    first, newest = _bounds(parts)
    label = _label(label_name, label_days, active_days)
    opening = judging.day(first_cutoff) if first_cutoff else first - first % DAY_MS + MIN_HISTORY_DAYS * DAY_MS
    plan = Split(split_ms, opening, newest, label)
    cutoffs = [*plan.train_cutoffs(), *plan.test_cutoffs()]
    rows = concatenate(
        [build(part.customers, part.facts, label, cutoffs, events=(plan.first, plan.train_last), known_to_ms=newest) for part in parts]
    )
    console.say(f"{len(rows):,} rows from {sum(len(part.facts) for part in parts):,} facts in {time.monotonic() - begin:.1f} s")
    policy = Policy() if gates is None else load_policy(gates)
    named, tuned = gatekeeping.learners_of(learners or "quick"), None
    chosen, folds = tuple(LEARNERS[name] for name in named), 1 if named == QUICK else 3
    if tune:
        wish = tuning.Wish(tune, settings.data_dir / "tuning" / "studies.log")
        tuned = tuning.tune(rows, plan, wish, HELD_OUT_MS, folds, rows.digest(), console.say)
        chosen = (*chosen, tuned.learner)
    options = Options(
        medium=medium,
        high=high,
        allow_high_auc=allow_high_auc,
        learners=chosen,
        folds=folds,
        ensembles=named != QUICK,
        board=named != QUICK,
        curve=CURVE if learning_curve else (),
        tuning=tuned.as_dict() if tuned else None,
    )
    trained = fit(rows, plan, options)
    manifest = trained.manifest
    judged = gates is not None or strict_gates
    thresholds = manifest.thresholds
    reached = attainable.figures(trained.test.y, trained.score(trained.test.x), thresholds.medium, thresholds.high)
    found = safety.measure(
        trained.test,
        trained.score,
        thresholds.medium,
        manifest.gates,
        policy,
        session=trained.session,
        rival=gatekeeping.rival(settings, _published, against, label.name, trained.test),
        judged=judged,
    )
    table = [*attainable.table(reached, None, None, policy, judged=judged), *found.gates]
    gatekeeping.gate_table(console, table, manifest)
    path = registry.save(settings.data_dir / "models", manifest, trained.envelope, trained.baseline_onnx)
    home = gatekeeping.keep(settings, trained, table, found, {}, {}, report)
    failed = [row for row in table if not row.passed]
    changed = publish and not failed and _publish(settings, manifest, trained.envelope)
    _say(console.say, manifest)
    console.say(f"{'published as champion, and kept' if publish and not failed else 'kept'} as {path}")
    console.result(
        {
            **_summary(manifest),
            "rows": len(rows),
            "file": str(path),
            "evaluation": str(home),
            "published": publish and not failed,
            "changed": changed,
            "learner": manifest.training["chosen"],
            "leaderboard": trained.board,
            "metrics": manifest.metrics,
            "baseline": manifest.baseline["metrics"],
            "gates": manifest.gates,
            "gate_table": [row.as_dict() for row in table],
            "learning_curve": trained.curve,
            "tuning": manifest.training.get("tuning"),
            "against_champion": found.champion,
            "seconds": round(time.monotonic() - begin, 2),
        }
    )
    if failed:
        raise ArtifactRejected(gatekeeping.refusal(failed))


CURVE = (0.125, 0.25, 0.5, 1.0)
"""Shares of the customers a learning curve is drawn over."""


def _train_simulated(
    customers: int,
    months: int,
    seed: int,
    label: str,
    publish: bool,
    gates: Path | None,
    strict: bool,
    extra: dict[str, Any],
    json_output: bool,
) -> None:
    import time

    from models import registry
    from models.policy import Policy
    from models.policy import load as load_policy
    from models.population import Scenario
    from models.tuning import Wish
    from proto.errors import ArtifactRejected
    from streams import simulated_training
    from streams.console import Console
    from streams.settings import load

    begin = time.perf_counter()
    settings = load()
    console = Console(json_output=json_output)
    policy = Policy() if gates is None else load_policy(gates)
    done = simulated_training.run(
        settings,
        Scenario(customers, months, seed),
        label,
        learners=gatekeeping.learners_of(extra["learners"]),
        policy=policy.model_copy(update={"strict": policy.strict or strict}),
        curve=CURVE if extra["curve"] else (),
        blind=extra["blind"],
        tune=Wish(extra["tune"], settings.data_dir / "tuning" / "studies.log") if extra["tune"] else None,
        rival=lambda test, named: gatekeeping.rival(settings, _published, extra["against"], named, test),
        say=console.say,
    )
    manifest = done.trained.manifest
    path = registry.save(settings.data_dir / "models", manifest, done.trained.envelope, done.trained.baseline_onnx)
    columns = ("learner", "served", "validation AUC", "test AUC", "new", "existing", "Brier", "parity")
    console.table(columns, [_board_line(entry) for entry in done.trained.board], title="leaderboard")
    if done.blind:
        lines = [(entry["told"], entry["auc"], entry["gained"]) for entry in done.blind]
        console.table(("the vector and", "AUC", "gained"), lines, title="what the vector cannot see, by a pupil of the oracle")
    gatekeeping.gate_table(console, done.gates, manifest)
    result = {**_summary(manifest), "file": str(path), **simulated_training.report(done), "base_rate": _test_of(manifest)["base_rate"]}
    told = {
        "oracle": done.oracle,
        "observer": done.observer,
        "blind_spots": done.blind,
        "warnings": done.quality["warnings"],
        "lint": [finding.as_dict() for finding in done.findings],
    }
    home = gatekeeping.keep(
        settings, done.trained, done.gates, done.safety, told, simulated_training.group_names(settings), extra["report"]
    )
    result["evaluation"] = str(home)
    failed = [row for row in done.gates if not row.passed]
    result["published"] = publish and not failed
    result["changed"] = bool(result["published"]) and _publish(settings, manifest, done.trained.envelope)
    result["seconds"] = round(time.perf_counter() - begin, 1)
    _say(console.say, manifest)
    console.say(f"{'published as champion, and kept' if result['published'] else 'kept'} as {path}, {result['seconds']} s in all")
    console.result(result)
    if failed:
        raise ArtifactRejected(gatekeeping.refusal(failed))


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
    mapping: Mappings = None,
    label_name: LabelName = None,
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
    from models.split import Split
    from proto.errors import BadInput
    from scoring.scorer import Scorer
    from streams.console import Console
    from streams.settings import load

    settings = load()
    console = Console(json_output=json_output)
    parts = _facts(settings, from_topics, events, mapping)
    _, newest = _bounds(parts)
    label = _label(label_name, label_days, active_days)
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
