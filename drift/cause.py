"""Why an alarm: broken records told apart from changed behaviour; topic, kind of event, segment and features, the likeliest first."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from drift.monitor import Finding
from drift.quality import Fault
from drift.series import ALL
from features.catalog import ATTRIBUTES, CATALOG, CLOCKS, EVENTS, LASTS, MEASURES, PURCHASE, TICKET, Feature, Field, Op

Nature = Literal["breakage", "behaviour", "unexplained"]

BREAKAGES: Final = ("schema", "nulls", "range", "cardinality", "duplicates", "stall")
"""Rules that no customer breaks."""
NAMES: Final = {"range": "units", "cardinality": "schema"}
"""What a broken rule is called as a cause."""
WEIGHT: Final = {"schema": 4.0, "duplicates": 4.0, "stall": 3.0, "nulls": 3.0, "range": 2.5, "cardinality": 2.0}
"""Breakages that explain others come first: what is not read is not counted, what is missing has no distribution."""
HALF: Final = 0.5
TOP: Final = 5

_MEASURES_OF_B: Final = {Op.RATIO, Op.SHARE, Op.PRODUCT}
_CLOCK_OF_A: Final = {Op.AGE_DAYS, Op.AGE_HOURS, Op.TENURE_DAYS, Op.MEAN_GAP_DAYS, Op.AGE_PER_GAP}
_ATTRIBUTE_OF_A: Final = {Op.DISTINCT, Op.DISTINCT_RATIO}
_TIME: Final = {Op.HOUR_SIN, Op.HOUR_COS, Op.WEEKDAY_SIN, Op.WEEKDAY_COS}
_PROFILE: Final = {Op.PROFILE_KNOWN, Op.SIGNUP_DAYS, Op.CONTRACT_DAYS, Op.CONSENT}


def kinds_of(feature: Feature) -> tuple[str, ...]:
    """The kinds of events a feature is computed from."""
    if feature.op in _TIME:
        return EVENTS
    if feature.op in _PROFILE:
        return ("profile",)
    if feature.op in (Op.LAST, Op.KNOWN, Op.LAST_PER_MEAN):
        return PURCHASE if LASTS[feature.a] == "purchase_amount" else TICKET
    if feature.op in _CLOCK_OF_A:
        return CLOCKS[feature.a].kinds
    if feature.op in _ATTRIBUTE_OF_A:
        return ATTRIBUTES[feature.a].kinds
    kinds = MEASURES[feature.a].kinds
    return tuple(dict.fromkeys((*kinds, *MEASURES[feature.b].kinds))) if feature.op in _MEASURES_OF_B else kinds


def uses_number(feature: Feature) -> bool:
    """Whether the number an event carries (amount, duration, wait) goes into a feature, not only that it happened."""
    if feature.op in (Op.LAST, Op.LAST_PER_MEAN):
        return True
    if feature.op in _TIME | _PROFILE | _CLOCK_OF_A | _ATTRIBUTE_OF_A:
        return False
    return MEASURES[feature.a].field not in (Field.ONE, Field.URGENT)


KINDS_OF: Final[Mapping[str, tuple[str, ...]]] = {feature.name: kinds_of(feature) for feature in CATALOG}
NUMBERS: Final = frozenset(feature.name for feature in CATALOG if uses_number(feature))
TOPIC_OF: Final[Mapping[str, str]] = {feature.name: feature.source for feature in CATALOG}


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
    """Whether there is anything to page for: a budgeted finding, or a record that is broken. Volumes and mixes only explain."""
    return bool(findings) or any(fault.rule in BREAKAGES for fault in faults)


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
    causes = [_cause(nature, topic, members, moved, segments) for (nature, topic, _), members in groups.items()]  # type: ignore[arg-type]
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
    faults = sorted(faults, key=lambda fault: -fault.strength)
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
        _where(best, faults, segments),
        best.strength * weight * support if nature == "breakage" else best.strength * support,
        tuple(fitting[:TOP]),
        best.detail,
    )


def _where(best: Fault, faults: Iterable[Fault], segments: Sequence[str]) -> tuple[str, ...]:
    """The segments in which the strongest symptom shows; ("all",) when it does in most, or cannot be told."""
    same = {f.segment: f for f in faults if (f.rule, f.kind, f.field) == (best.rule, best.kind, best.field)}
    own = {name: fault.strength for name, fault in same.items() if name != ALL}
    if not own:
        return (ALL,)
    clear = [name for name in own if own[name] >= HALF * max(own.values())]
    if len(clear) > len(segments) / 2:
        return (ALL,)
    # One segment alone: what it does to everybody is a thinner copy of it.
    return tuple(sorted(clear, key=lambda name: -own[name]))


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
        return Cause("unexplained", "score", "", (), "", segments[:1] or (ALL,), max(moved.values(), default=0.0), tuple(moved)[:TOP], detail)
    ranked = sorted(votes, key=lambda place: -votes[place])
    topic = ranked[0][0]
    fitting = tuple(name for name in moved if TOPIC_OF.get(name) == topic)[:TOP]
    detail = f"{', '.join(fitting)} moved"
    kinds = tuple(kind for source, kind in ranked if source == topic)
    return Cause("behaviour", "features", topic, kinds, "", segments[:1] or (ALL,), votes[ranked[0]], fitting, detail)
