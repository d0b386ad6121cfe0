"""`churnstream explain`: why a customer was scored so, then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from streams.explain import Explainer, Explanation
    from streams.settings import Settings

app = typer.Typer()


@app.command(
    epilog="Example: churnstream explain --score-id transactions-2-8123\n\n"
    "Example: churnstream explain --customer 13085 --at 2026-01-31T12:00:00Z"
)
def explain(
    score_id: Annotated[str | None, typer.Option("--score-id", metavar="ID", help="score_id of a score record.")] = None,
    customer: Annotated[str | None, typer.Option("--customer", metavar="ID", help="The customer's last score at --at.")] = None,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="RFC 3339 or a day; without it now.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Reasons and facts shown.")] = 10,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
) -> None:
    """Rebuild the vector of a past score at its stored cut, run that very model, compare, and show what mattered.

    Exit code 1 when the score could not be made again bit for bit: history is then not what it was, and that is said. It reaches
    back as far as the input topics, or the state in Redis, hold the facts the score was made of.
    """
    import time

    from proto.errors import BadUsage, ChurnError
    from streams.commands.feed import instant
    from streams.console import Console
    from streams.partitioner import partition_of
    from streams.past import opened
    from streams.settings import load

    if (score_id is None) == (customer is None):
        raise BadUsage("needs --score-id ID, or --customer ID (with --at TIME)")
    began = time.perf_counter()
    settings = opened(load())
    console = Console(json_output=json_output)
    explainer = explainer_of(settings, top)
    if score_id is not None:
        score = explainer.score(score_id)
    else:
        assert customer is not None
        at_ms = instant(at, "--at")
        score = explainer.latest(customer, partition_of(customer, explainer.partitions), 2**62 if at_ms is None else at_ms)
    found = explainer.explain(score)
    if not json_output:
        _show(console, found)
    console.result(
        {
            "proven": found.proven,
            "problems": list(found.problems),
            "source": found.source,
            "score": dict(found.score),
            "features_apart": list(found.features),
            "reasons": list(found.reasons),
            "timeline": list(found.timeline),
            "facts_weighed": found.weighed,
            "seconds": round(time.perf_counter() - began, 3),
        }
    )
    if not found.proven:
        raise ChurnError("; ".join(found.problems))


def explainer_of(settings: Settings, top: int) -> Explainer:
    """For a deployment: Redis first, the topics where it does not answer or has forgotten."""
    from features.state import decode
    from proto.errors import DependencyUnreachable
    from streams.explain import Explainer, Known
    from streams.log import KafkaLog
    from streams.past import Past
    from streams.stack import endpoints
    from streams.state_store import open_store
    from streams.topics import client_config

    past = Past(settings)
    past.close()
    # Many short reads: fetch little ahead, and do not wait a second before more is fetched, as the client does by default.
    small = {
        "queued.min.messages": 1,
        "queued.max.messages.kbytes": 16_384,
        "fetch.message.max.bytes": 1 << 17,
        "fetch.queue.backoff.ms": 1,
    }
    log = KafkaLog({**client_config(settings), **small}, timeout_s=settings.dependency_timeout_s)
    count = log.partitions(past.topics.inputs[0])
    try:
        store = open_store(settings, endpoints(settings).redis, patience_s=0)
    except DependencyUnreachable:
        store = None

    def stored(partition: int, customer: str) -> Known | None:
        try:
            state = None if store is None else store.load(partition, [customer])[0]
        except DependencyUnreachable:
            return None
        if state is None:
            return None
        found = decode(state, customer)
        return Known(found.facts, found.carry, "Redis")

    return Explainer(log, past.topics, past.decoder, past.models.by_digest, past.rules.fallback, count, stored, top)


def _show(console: object, found: Explanation) -> None:
    from datetime import UTC, datetime, timedelta

    from streams.console import Console

    assert isinstance(console, Console)
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    score = found.score

    def when(ms: int) -> str:
        return f"{epoch + timedelta(milliseconds=ms):%Y-%m-%d %H:%M:%S}"

    console.say(f"{score['score_id']}: customer {score['customer_id']} at {when(score['at'])}")
    console.say(f"{score['probability']:.4f} {score['band']} by model {score['model_version']} ({score['model_digest'][:12]})")
    if found.proven:
        console.say(f"made again from {found.source}: vector, probability, band and reasons are the emitted ones")
    for problem in found.problems:
        console.say(f"NOT as it was: {problem}")
    console.table(("why", "contribution"), [(reason["text"], reason["contribution"]) for reason in found.reasons])
    if found.timeline:
        rows = [
            (when(fact["time"]), fact["kind"], fact["value"], f"{fact['topic']} {fact['offset']}", f"{fact['effect']:+.4f}")
            for fact in found.timeline
        ]
        console.table(("happened", "kind", "value", "record", "moves the score by"), rows, title="facts that mattered")
