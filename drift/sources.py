"""Which events a feature is made of, read off the catalog."""

from collections.abc import Mapping
from typing import Final

from drift.series import Series
from features.catalog import ATTRIBUTES, CATALOG, CLOCKS, EVENTS, LASTS, MEASURES, PURCHASE, TICKET, Feature, Field, Op
from features.window import LIFE

_MEASURES_OF_B: Final = {Op.RATIO, Op.SHARE, Op.PRODUCT}
_CLOCK_OF_A: Final = {Op.AGE_DAYS, Op.AGE_HOURS, Op.TENURE_DAYS, Op.MEAN_GAP_DAYS, Op.AGE_PER_GAP}
_ATTRIBUTE_OF_A: Final = {Op.DISTINCT, Op.DISTINCT_RATIO}
_LASTING: Final = {
    Op.TENURE_DAYS, Op.MEAN_GAP_DAYS, Op.AGE_PER_GAP, Op.PER_LIFE_DAY, Op.KNOWN, Op.PROFILE_KNOWN, Op.SIGNUP_DAYS,
    Op.CONTRACT_DAYS, Op.CONSENT, Op.LAST, Op.LAST_PER_MEAN, Op.OPEN_TICKETS,
}  # fmt: skip
_WINDOWED: Final = {Op.TOTAL, Op.RATIO, Op.SHARE, Op.TREND, Op.BEFORE, Op.CHANGE, Op.RATE, Op.DISTINCT, Op.DISTINCT_RATIO}
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


def lasting(feature: Feature) -> bool:
    """Whether a feature looks back over the whole life of a customer."""
    return feature.op in _LASTING or (feature.op in _WINDOWED and LIFE in (feature.wa, feature.wb))


KINDS_OF: Final[Mapping[str, tuple[str, ...]]] = {feature.name: kinds_of(feature) for feature in CATALOG}
NUMBERS: Final = frozenset(feature.name for feature in CATALOG if uses_number(feature))
TOPIC_OF: Final[Mapping[str, str]] = {feature.name: feature.source for feature in CATALOG}
WATCHED: Final = tuple(i for i, feature in enumerate(CATALOG) if feature.op not in _TIME)
"""Columns of a vector that are watched: what the calendar says does not drift."""
FEATURES: Final = tuple(
    Series(CATALOG[i].name, "feature", CATALOG[i].source, KINDS_OF[CATALOG[i].name], lasting=lasting(CATALOG[i])) for i in WATCHED
)
SCORE: Final = Series("score", "score")
