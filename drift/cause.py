"""Why an alarm: broken records told apart from changed behaviour; topic, kind of event, segment and features, the likeliest first."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from drift.monitor import Finding
from drift.quality import Fault
from drift.series import ALL
from drift.sources import KINDS_OF, NUMBERS, TOPIC_OF

Nature = Literal["breakage", "behaviour", "unexplained"]

BREAKAGES: Final = ("schema", "nulls", "range", "cardinality", "duplicates", "stall", "coverage")
"""Rules that no customer breaks."""
NAMES: Final = {"range": "units", "cardinality": "schema"}
"""What a broken rule is called as a cause."""
WEIGHT: Final = {"schema": 4.0, "duplicates": 4.0, "stall": 3.0, "nulls": 3.0, "range": 2.5, "cardinality": 2.0}
"""Breakages that explain others come first: what is not read is not counted, what is missing has no distribution."""
HALF: Final = 0.5
TOP: Final = 5


@dataclass(frozen=True, slots=True)
class Cause:
    """One explanation. kinds: the likeliest first; features: those moved that it explains, the farthest moved first."""

    nature: Nature
    what: str
    topic: str
    kinds: tuple[str, ...]
    field: str
    segments: tuple[str, ...]
    strength: float
    features: tuple[str, ...]
    detail: str

    @property
    def key(self) -> str:
        """What makes two alarms one episode: the same nature in the same topic."""
        return f"{self.nature}:{self.what if self.nature == 'breakage' else ''}:{self.topic}"


def pages(findings: Sequence[Finding], faults: Iterable[Fault]) -> bool:
    """Whether there is anything to page for: a budgeted finding, or a record that is broken. What is less certain only explains."""
    return bool(findings) or any(fault.pages and not fault.segment.startswith("!") for fault in faults)


def explain(findings: Sequence[Finding], faults: Sequence[Fault], segments: Sequence[str]) -> list[Cause]:
    """The causes of findings and faults of the same time, the likeliest first; at least one when there is a finding.

    segments: all that are watched, without "all". Breakage comes before behaviour: it changes counts and distributions downstream,
    what customers do breaks no record.
    """
    groups: dict[tuple[str, str, str], list[Fault]] = defaultdict(list)
    for fault in faults:
        breakage = fault.rule in BREAKAGES
        # Of a changed behaviour the topic is the root; a fault has its field as well.
        groups["breakage" if breakage else "behaviour", fault.topic, fault.rule + ":" + fault.field if breakage else ""].append(fault)
    moved = _moved(findings)
    suspected = {TOPIC_OF[name] for name in moved if name in TOPIC_OF}
    causes = [
        _cause(nature, topic, members, moved, segments)  # type: ignore[arg-type]  # the two natures of above
        for (nature, topic, _), members in groups.items()
        # A weak symptom counts where features made of the same topic have moved.
        if max(fault.strength for fault in members) >= 1 or topic in suspected
    ]
    causes = _without_consequences(causes)
    if not causes and findings:
        causes = [_from_features(findings, moved)]
    return sorted(causes, key=lambda cause: (cause.nature != "breakage", -cause.strength))


def _moved(findings: Sequence[Finding]) -> dict[str, float]:
    """Series that moved, by how far beyond their threshold."""
    moved: dict[str, float] = {}
    for finding in findings:
        moved[finding.series] = max(moved.get(finding.series, 0.0), finding.statistic / max(finding.threshold, 1e-9))
    return dict(sorted(moved.items(), key=lambda item: -item[1]))


def _cause(nature: Nature, topic: str, faults: list[Fault], moved: Mapping[str, float], segments: Sequence[str]) -> Cause:
    # Of a segment and the rest of it only the segment is a name.
    faults = sorted(faults, key=lambda fault: (fault.segment.startswith("!"), -fault.strength))
    best = faults[0]
    by_kind: dict[str, float] = {}
    for fault in faults:
        if fault.kind:
            by_kind[fault.kind] = max(by_kind.get(fault.kind, 0.0), fault.strength)
    kinds = tuple(sorted(by_kind, key=lambda kind: -by_kind[kind]))
    numeric = best.rule in ("range", "shift", "nulls") and best.field in ("amount_minor", "duration_ms", "wait_seconds")
    fitting = [
        name
        for name in moved
        if TOPIC_OF.get(name) in (topic, "all events")
        and (not kinds or set(kinds) & set(KINDS_OF.get(name, ())))
        and (not numeric or name in NUMBERS)
    ]
    weight = WEIGHT.get(best.rule, 1.0)
    # Support: a cause from which moved features are computed is likelier than one nothing follows from.
    support = 1 + 0.5 * min(len(fitting), TOP) / TOP
    return Cause(
        nature,
        NAMES.get(best.rule, best.rule),
        topic,
        kinds,
        best.field,
        _where(faults, segments),
        best.strength * weight * support if nature == "breakage" else best.strength * support,
        tuple(fitting[:TOP]),
        best.detail,
    )


def _where(faults: Sequence[Fault], segments: Sequence[str]) -> tuple[str, ...]:
    """The segments in which the strongest symptom that can tell shows; ("all",) when it does in most, in the rest too, or none can tell.

    faults: strongest first.
    """
    symptoms = list(dict.fromkeys((f.rule, f.kind, f.field) for f in faults))
    for symptom in symptoms:
        same = {f.segment: f for f in faults if (f.rule, f.kind, f.field) == symptom}
        own = {name: fault.strength for name, fault in same.items() if name in segments}
        if not own or max(own.values()) < HALF:
            continue
        first = max(own, key=lambda name: own[name])
        rest = f"!{first}"
        if rest not in same[first].told:
            continue  # where nobody can see the rest, the next symptom may
        least = HALF**2 if symptom[0] in ("shift", "mix") else HALF
        clear = [name for name in own if own[name] >= least * own[first]]
        # One segment alone: what it does to everybody is a thinner copy of it.
        if len(clear) > len(segments) / 2 or (rest in same and _alike(same[rest], same[first])):
            return (ALL,)
        return tuple(sorted(clear, key=lambda name: -own[name]))
    return (ALL,)


def _alike(rest: Fault, one: Fault) -> bool:
    """Whether the rest moved as far as the one segment, at least by half."""
    if rest.factor > 0 and one.factor > 0:
        far, there = abs(math.log(rest.factor)), abs(math.log(one.factor))
        return far >= HALF * there and (rest.factor > 1) == (one.factor > 1)
    return rest.strength >= HALF**2 * one.strength  # a distance grows with the square of the shift


def _without_consequences(causes: list[Cause]) -> list[Cause]:
    """A topic that stalls, repeats or cannot be read has other counts and mixes too: those are no causes of their own."""
    roots = {cause.topic for cause in causes if cause.what in ("stall", "schema", "duplicates") and cause.nature == "breakage"}
    return [cause for cause in causes if cause.nature == "breakage" or cause.topic not in roots]


def _from_features(findings: Sequence[Finding], moved: Mapping[str, float]) -> Cause:
    """What the moved features have in common, when the raw records say nothing."""
    votes: dict[tuple[str, str], float] = defaultdict(float)
    for name, far in moved.items():
        kinds = KINDS_OF.get(name, ())
        for kind in kinds:
            # A feature of one kind points at it, one of twenty kinds hardly at any.
            votes[TOPIC_OF[name], kind] += far / len(kinds)
    segments = tuple(dict.fromkeys(f.segment for f in sorted(findings, key=lambda f: -f.statistic / max(f.threshold, 1e-9))))
    if not votes:
        names = ", ".join(list(moved)[:TOP])
        detail = f"{names} moved, and no watched input did: look at the model and at what is not watched"
        return Cause(
            "unexplained", "score", "", (), "", segments[:1] or (ALL,), max(moved.values(), default=0.0), tuple(moved)[:TOP], detail
        )
    ranked = sorted(votes, key=lambda place: -votes[place])
    topic = ranked[0][0]
    fitting = tuple(name for name in moved if TOPIC_OF.get(name) == topic)[:TOP]
    detail = f"{', '.join(fitting)} moved"
    kinds = tuple(kind for source, kind in ranked if source == topic)
    return Cause("behaviour", "features", topic, kinds, "", segments[:1] or (ALL,), votes[ranked[0]], fitting, detail)
