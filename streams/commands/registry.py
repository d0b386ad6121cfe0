"""`churnstream models publish` and what comes after it: approval, aliases, the way back, the log, the card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.artifact import Manifest
    from models.desk import Desk, Done
    from models.ledger import Decision
    from models.registry import Published
    from streams.settings import Settings

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]
Why = Annotated[str, typer.Option(metavar="TEXT", help="A reason, for the log.")]
Alias = Annotated[str, typer.Option(help="champion (scores count), challenger or shadow (compared with it).")]
Name = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="8 digits of its digest or more, its version, an alias, or models:/churn@champion."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to `churnstream models`."""
    for command, name, example in (
        (publish, None, "publish 3fb0c1d2 --promote"),
        (approve, None, "approve 3fb0c1d2 --why 'calibration looked at'"),
        (promote, None, "promote 3fb0c1d2"),
        (rollback, None, "rollback --why 'too many alerts'"),
        (archive, None, "archive 3fb0c1d2"),
        (list_models, "list", "list"),
        (show, None, "show models:/churn@champion"),
        (live_at, "live-at", "live-at 2026-02-01T12:00:00Z"),
        (log, None, "log"),
        (card, None, "card champion --out card.html"),
    ):
        app.command(name, epilog=f"Example: churnstream models {example}")(command)


def publish(
    model: Annotated[str, typer.Argument(help="Digest of a model kept here (8 digits or more), or an artifact file.")],
    champion: Annotated[bool, typer.Option("--promote", help="Also make it champion, as `models promote` does.")] = False,
    why: Why = "",
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Check a model as a worker would, sign it and put it on the topic, in staging. A second time changes nothing."""
    from models import registry
    from proto.errors import BadInput
    from scoring.scorer import load as open_scorer
    from streams.settings import load

    settings = load()
    if Path(model).is_file():
        try:
            envelope = Path(model).read_bytes()
        except OSError as error:
            raise BadInput(f"{model}: {error.strerror}; `churnstream models train` says where it keeps a model") from error
    else:
        envelope = registry.take(settings.data_dir / "models", model)
    # Opened as a worker would open it: golden rows, batch sizes.
    digest = open_scorer(envelope).digest

    def act(at: Desk) -> list[Done]:
        done = [at.publish(envelope, why)]
        return [*done, at.promote(digest, why=why)] if champion else done

    _act(settings, act, dry_run, json_output)


def approve(model: Name, why: Why = "", dry_run: DryRun = False, json_output: Json = False) -> None:
    """Say that a published model may go into service. With CHURN_MODEL_TWO_PERSONS it takes another person than its publisher."""
    _act(None, lambda at: [at.approve(model, why)], dry_run, json_output)


def promote(model: Name, alias: Alias = "champion", why: Why = "", dry_run: DryRun = False, json_output: Json = False) -> None:
    """Let an alias stand for a published model; as champion, workers take it over between two batches."""
    _act(None, lambda at: [at.promote(model, alias, why)], dry_run, json_output)


def rollback(
    alias: Alias = "champion",
    to: Annotated[str | None, typer.Option(metavar="MODEL", help="Back to this one; default: the one before.")] = None,
    why: Why = "",
    dry_run: DryRun = False,
    json_output: Json = False,
) -> None:
    """Let an alias stand for the model before again. A second rollback goes one further back."""
    _act(None, lambda at: [at.rollback(alias, to, why)], dry_run, json_output)


def archive(model: Name, why: Why = "", dry_run: DryRun = False, json_output: Json = False) -> None:
    """Put a model away: it cannot be promoted, and stays on the topic so that its scores can be explained."""
    _act(None, lambda at: [at.archive(model, why)], dry_run, json_output)


def _act(settings: Settings | None, act: Callable[[Desk], list[Done]], dry_run: bool, json_output: bool) -> None:
    from streams.console import Console
    from streams.publishing import desk
    from streams.settings import load

    console = Console(json_output=json_output)
    done = act(desk(settings or load(), dry_run=dry_run))
    for step in done:
        if step.decision is None:
            console.say(f"no changes: {step.version} ({step.digest[:16]}) is so already")
        else:
            console.say(f"{'would: ' if dry_run else ''}{_words(step.decision)}")
    last = done[-1]
    console.result(
        {
            "digest": last.digest,
            "version": last.version,
            "changed": any(step.changed for step in done) and not dry_run,
            "dry_run": dry_run,
            "decisions": [step.decision.model_dump(mode="json") for step in done if step.decision is not None],
        }
    )


def _words(decision: Decision) -> str:
    """A decision as a line for people."""
    where = f" as {decision.alias}" if decision.alias else " in staging" if decision.action == "publish" else ""
    former = f", before it {decision.former[:16]}" if decision.former else ""
    why = f": {decision.why}" if decision.why else ""
    return f"{decision.number} {decision.action} {decision.version} ({decision.digest[:16]}){where}{former}, by {decision.who}{why}"


def list_models(
    local: Annotated[bool, typer.Option("--local", help="Models kept on this machine; Kafka is not asked.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Archived ones too.")] = False,
    json_output: Json = False,
) -> None:
    """Every model on the model topic, oldest first, its stage and who signed it; with --local those kept here."""
    from models import registry
    from streams.console import Console
    from streams.publishing import published
    from streams.settings import load

    console = Console(json_output=json_output)
    settings = load()
    if local:
        directory = settings.data_dir / "models"
        models = [_entry(digest, lambda digest: _kept(directory, digest)) for digest in registry.kept(directory)]
        hidden = 0
    else:
        topic = published(settings)
        every = [_entry(digest, topic.artifact) | _stage(topic, digest) for digest in topic.envelopes]
        models = [entry for entry in every if everything or entry["stage"] != "archived"]
        hidden = len(every) - len(models)
        for line in topic.doubtful:
            console.say(f"warning: {line}")
    columns = ("version", "digest", "stage", "signed by", "label", "AUC", "refused")
    keys = ("version", "digest", "stage", "signed_by", "label", "auc", "refused")
    if models:
        console.table(columns, [tuple(m.get(key) if key != "digest" else m["digest"][:16] for key in keys) for m in models])
    else:
        console.say("no models yet: `churnstream models train --help` says how to make one")
    if hidden:
        console.say(f"{hidden} archived; --all shows them")
    console.result({"models": models})


def _entry(digest: str, artifact: Callable[[str], Any]) -> dict[str, Any]:
    from proto.errors import ArtifactRejected

    try:
        return {**summary(artifact(digest).manifest), "refused": None}
    except ArtifactRejected as error:
        # One bad record must not hide the good ones.
        return {"version": None, "digest": digest, "label": None, "auc": None, "refused": str(error)}


def _kept(directory: Path, digest: str) -> Any:
    from models import registry
    from models.artifact import unpack

    return unpack(registry.take(directory, digest), digest=digest)


def _stage(topic: Published, digest: str) -> dict[str, Any]:
    """Aliases and stage of a published model, and the key that sealed it."""
    from models.signature import sealed_by

    aliases = sorted(name for name, target in topic.aliases.items() if target == digest)
    approved = any(d.action == "approve" and d.digest == digest for d in topic.ledger.proven.values())
    stage = ", ".join(aliases) or ("archived" if topic.ledger.archived(digest) else "approved" if approved else "staging")
    key = sealed_by(topic.envelopes[digest])
    known = topic.ledger.trust.keys.get(key)
    return {"aliases": aliases, "stage": stage, "signed_by": known.owner if known else key or None}


def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `promote`.")] = "champion",
    json_output: Json = False,
) -> None:
    """The manifest of a published model: what it is, on what it was trained, how it did; and what was decided about it."""
    import orjson

    from streams.console import Console
    from streams.publishing import published
    from streams.settings import load

    console = Console(json_output=json_output)
    topic = published(load())
    artifact = _published_model(topic, model)
    body = artifact.manifest.model_dump(mode="json")
    about = [d for d in topic.ledger.proven.values() if d.digest == artifact.digest]
    if not json_output:
        console.say(orjson.dumps(body, option=orjson.OPT_INDENT_2).decode())
        for decision in about:
            console.say(_line(decision))
    decisions = [d.model_dump(mode="json") for d in about]
    console.result({"digest": artifact.digest, **body, **_stage(topic, artifact.digest), "decisions": decisions})


def _published_model(topic: Published, name: str) -> Any:
    return topic.champion() if name == "champion" else topic.artifact(topic.named(name))


def live_at(
    time: Annotated[str, typer.Argument(metavar="TIME", help="RFC 3339, or a day (its beginning, UTC).")],
    alias: Alias = "champion",
    json_output: Json = False,
) -> None:
    """Which model an alias stood for at an instant, by the log: since when, who decided it and why. Exit code 1 when the log says none."""
    from proto.errors import ChurnError
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.publishing import published
    from streams.settings import load

    console = Console(json_output=json_output)
    at_ms = instant(time, "TIME")
    decision = published(load()).ledger.live_at(alias, at_ms or 0)
    if decision is None:
        raise ChurnError(f"at {time} {alias} stood for no model, as far as the log goes back (`churnstream models log`)")
    console.say(_line(decision))
    console.result({"at_ms": at_ms, "digest": decision.digest, "version": decision.version, "decision": decision.model_dump(mode="json")})


def log(json_output: Json = False) -> None:
    """Everything that was decided about models, oldest first, and whether the chain is whole. Exit code 1 when it is not."""
    from proto.errors import ChurnError
    from streams.console import Console
    from streams.publishing import published
    from streams.settings import load

    console = Console(json_output=json_output)
    topic = published(load())
    ledger = topic.ledger
    for number in sorted(ledger.decisions):
        console.say(_line(ledger.decisions[number]) + ("" if number in ledger.proven else "   [not signed by a trusted key]"))
    faults = list(ledger.audit())
    console.result(
        {
            "decisions": [ledger.decisions[n].model_dump(mode="json") for n in sorted(ledger.decisions)],
            "faults": faults,
            "chain_whole": not faults,
        }
    )
    if faults:
        raise ChurnError("the log is not whole: " + "; ".join(faults))
    console.say(f"{len(ledger.decisions)} decisions, the chain is whole")


def _line(decision: Decision) -> str:
    from datetime import UTC, datetime

    return f"{datetime.fromtimestamp(decision.at_ms / 1_000, UTC):%Y-%m-%d %H:%M:%S}  {_words(decision)}"


def card(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for `promote`; with --local a digest kept here.")] = "champion",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there, *.html as HTML; default: Markdown to stdout.")] = None,
    local: Annotated[bool, typer.Option("--local", help="Of a model kept on this machine; Kafka is not asked.")] = False,
    json_output: Json = False,
) -> None:
    """The model card: purpose, data, label, figures, limits and risk of a model, from its manifest and the log."""
    from models import registry
    from models.card import card as write
    from streams.console import Console
    from streams.publishing import published
    from streams.settings import load

    console = Console(json_output=json_output)
    settings = load()
    if local:
        directory = settings.data_dir / "models"
        artifact, decisions = _kept(directory, next((d for d in registry.kept(directory) if d.startswith(model)), model)), []
    else:
        topic = published(settings)
        artifact = _published_model(topic, model)
        decisions = [d for d in topic.ledger.proven.values() if d.digest == artifact.digest]
    html = out is not None and out.suffix == ".html"
    text = write(artifact.manifest, decisions, html=html)
    if out is not None:
        out.write_text(text, encoding="utf-8")
        console.say(f"{out}: the card of {artifact.manifest.version} ({artifact.digest[:16]})")
    elif not json_output:
        console.say(text)
    console.result(
        {
            "digest": artifact.digest,
            "version": artifact.manifest.version,
            "file": str(out) if out else None,
            "format": "html" if html else "markdown",
        }
    )


def summary(manifest: Manifest) -> dict[str, Any]:
    """A model in one line."""
    test: Any = manifest.metrics.get("test") or manifest.metrics.get("validation") or {}
    return {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "label": manifest.label.get("name"),
        "auc": test.get("auc"),
        "auc_interval": test.get("auc_interval"),
        "features_used": len(manifest.features_used),
    }
