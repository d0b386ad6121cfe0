"""Outcomes read from their topic and joined to the scores that predicted them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from drift.outcomes import Labels, Scored, Treated, at_risk, by_month, expected, interventions, labelled, quality
from features.window import DAY_MS
from proto.outcomes import Outcome
from streams.log import KafkaLog
from streams.settings import Settings
from streams.topics import OUTCOMES, client_config
from streams.training import emitted_scores


@dataclass(frozen=True, slots=True)
class Read:
    """Outcomes, each id once, and how many records were none."""

    outcomes: list[Outcome]
    refused: int
    repeated: int


def read(settings: Settings) -> Read:
    """All of the topic. A record that is no outcome, or has another key than its customer, is counted and left out."""
    source = KafkaLog(client_config(settings), timeout_s=settings.dependency_timeout_s)
    topic = settings.prefixed(OUTCOMES)
    found: dict[str, Outcome] = {}
    refused = repeated = 0
    try:
        for partition in range(source.partitions(topic)):
            for messages in source.read(topic, partition, *source.ends(topic, partition)):
                for message in messages:
                    try:
                        one = Outcome.model_validate_json(message.value() or b"")
                    except ValidationError:
                        refused += 1
                        continue
                    if message.key() != one.customer_id.encode():
                        refused += 1
                    elif one.outcome_id in found:
                        repeated += 1
                    else:
                        found[one.outcome_id] = one
    finally:
        source.close()
    return Read(list(found.values()), refused, repeated)


def report(settings: Settings, *, horizon_days: int, threshold: float, seed: int = 0) -> dict[str, Any]:
    """Live quality of mature scores, the estimate for the others, money and interventions; see docs/drift.md."""
    got = read(settings)
    emitted = emitted_scores(settings, 0)
    names = {name: i for i, name in enumerate(dict.fromkeys([*emitted.customers, *(one.customer_id for one in got.outcomes)]))}
    whole = Scored(np.array([names[c] for c in emitted.customers], np.int64), emitted.at, emitted.probability.astype(np.float64))
    scores = whole.one_per_period(DAY_MS)
    horizon = horizon_days * DAY_MS
    said = [one for one in got.outcomes if one.kind in ("churned", "stayed")]
    labels = Labels(
        np.array([names[one.customer_id] for one in said], np.int64),
        np.array([one.at for one in said], np.int64),
        np.array([one.kind == "churned" for one in said], np.bool_),
    )
    known_to = int(labels.at.max()) if said else 0
    y = labelled(scores, labels, horizon, known_to)
    rng = np.random.default_rng(seed)
    mature, early = y >= 0, scores.at + horizon > known_to
    feedback = [one for one in got.outcomes if one.kind == "feedback"]
    responses = [one for one in got.outcomes if one.kind == "campaign_response"]
    return {
        "horizon_days": horizon_days,
        "threshold": threshold,
        "outcomes": dict(Counter(one.kind for one in got.outcomes)),
        "refused": got.refused,
        "repeated": got.repeated,
        "scores": len(scores.at),
        "labelled": int(mature.sum()),
        "live": quality(y[mature], scores.probability[mature], scores.customer[mature], threshold, rng) if mature.any() else None,
        "live_by_month": by_month(y[mature], scores.probability[mature], scores.at[mature], scores.customer[mature], threshold, rng),
        "unlabelled_yet": int(early.sum()),
        "estimate": expected(scores.probability[early], threshold, rng),
        "revenue_at_risk": _at_risk(whole, got.outcomes, names, threshold),
        "interventions": _campaigns(got.outcomes, labels, names, horizon, known_to, rng),
        "responses": {"offers": len(responses), "accepted": sum(bool(one.accepted) for one in responses)},
        "feedback": {"opinions": len(feedback), "agree": sum(bool(one.agrees) for one in feedback)},
    }


def _at_risk(scores: Scored, outcomes: list[Outcome], names: dict[str, int], threshold: float) -> dict[str, Any]:
    """Of the customers whose value some outcome states, by their newest score."""
    worth = {names[one.customer_id]: float(one.value_minor) for one in sorted(outcomes, key=lambda o: o.at) if one.value_minor is not None}
    newest = scores.one_per_period(2**62)
    value = np.array([worth.get(customer, np.nan) for customer in newest.customer.tolist()], np.float64)
    return at_risk(newest.probability, value, threshold)


def _campaigns(
    outcomes: list[Outcome], labels: Labels, names: dict[str, int], horizon: int, known_to: int, rng: np.random.Generator
) -> dict[str, Any]:
    found = {}
    acts = [one for one in outcomes if one.kind == "intervention"]
    for campaign in sorted({one.campaign for one in acts}):
        mine = [one for one in acts if one.campaign == campaign]

        def number(values: list[int | None]) -> npt.NDArray[np.float64]:
            return np.array([np.nan if value is None else value for value in values], np.float64)

        customer, at = np.array([names[one.customer_id] for one in mine], np.int64), np.array([one.at for one in mine], np.int64)
        churned = labelled(Scored(customer, at, np.zeros(len(at))), labels, horizon, known_to)
        arm = np.array([one.arm == "treatment" for one in mine], np.bool_)
        money = number([one.value_minor for one in mine]), number([one.cost_minor for one in mine])
        found[campaign or "unnamed"] = interventions(Treated(customer, at, arm, churned, *money), rng)
    return found
