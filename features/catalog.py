"""The table of every feature: the only place where one is declared; layout, kernel programme, docs and reasons follow from it.

A row names an operation over integers the kernel keeps per customer:
- measures: sums over facts, per window (`MEASURES`);
- clocks: newest (and first) event time per class of facts (`CLOCKS`);
- distinct counts: different values of an attribute, per window (`ATTRIBUTES`);
- the newest fact that carries a value: last purchase amount, CSAT, NPS, profile (`LASTS`).
Floats appear only in the operation, in float64, in the order written at `Op`, and are rounded once to float32.
"""

from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from typing import Final

import orjson

from features.window import D7, D14, D30, D60, D90, H1, H24, LIFE, WINDOW_NAMES

PURCHASE: Final = ("payment", "renewal", "upgrade", "downgrade")
"""Kinds that bring money in. The churn label "no purchase" means these too."""
ACTIONS: Final = ("feature_use", "page_view")
PROBLEMS: Final = ("error", "outage", "slow_response")
TICKET: Final = ("opened", "resolved", "reopened", "satisfaction")
LOGINS: Final = ("login", "failed_login", "logout", *ACTIONS, *PROBLEMS)
MONEY: Final = (*PURCHASE, "failed_payment", "refund", "cancellation")
EVENTS: Final = (*MONEY, *LOGINS, *TICKET)
"""Everything but profile facts."""


class Field(IntEnum):
    """What one fact adds to a measure."""

    ONE = 0
    VALUE = 1  # the VALUE column, 0 when absent
    VALUE_KNOWN = 2  # 1 when the VALUE column is present
    CSAT = 3
    CSAT_KNOWN = 4
    NPS = 5
    NPS_KNOWN = 6
    URGENT = 7  # 1 when the ticket's priority is high or urgent


@dataclass(frozen=True, slots=True)
class Measure:
    """An integer sum over the facts of some kinds, kept for every window."""

    name: str
    kinds: tuple[str, ...]
    field: Field


MEASURES: Final = (
    Measure("events", EVENTS, Field.ONE),
    Measure("purchases", PURCHASE, Field.ONE),
    Measure("spend", PURCHASE, Field.VALUE),
    Measure("renewals", ("renewal",), Field.ONE),
    Measure("refunds", ("refund",), Field.ONE),
    Measure("refunded", ("refund",), Field.VALUE),
    Measure("failed_payments", ("failed_payment",), Field.ONE),
    Measure("upgrades", ("upgrade",), Field.ONE),
    Measure("downgrades", ("downgrade",), Field.ONE),
    Measure("cancellations", ("cancellation",), Field.ONE),
    Measure("logins", ("login",), Field.ONE),
    Measure("failed_logins", ("failed_login",), Field.ONE),
    Measure("actions", ACTIONS, Field.ONE),
    Measure("feature_uses", ("feature_use",), Field.ONE),
    Measure("usage_ms", LOGINS, Field.VALUE),
    Measure("problems", PROBLEMS, Field.ONE),
    Measure("opened", ("opened",), Field.ONE),
    Measure("resolved", ("resolved",), Field.ONE),
    Measure("reopened", ("reopened",), Field.ONE),
    Measure("urgent", ("opened", "reopened"), Field.URGENT),
    Measure("wait_seconds", TICKET, Field.VALUE),
    Measure("waits", TICKET, Field.VALUE_KNOWN),
    Measure("csat_sum", TICKET, Field.CSAT),
    Measure("csat_n", TICKET, Field.CSAT_KNOWN),
    Measure("nps_sum", TICKET, Field.NPS),
    Measure("nps_n", TICKET, Field.NPS_KNOWN),
    Measure("profile_updates", ("profile",), Field.ONE),
)
M: Final = {measure.name: index for index, measure in enumerate(MEASURES)}


@dataclass(frozen=True, slots=True)
class Clock:
    """Newest event time over the facts of some kinds, and the first one (both over the whole life)."""

    name: str
    kinds: tuple[str, ...]


CLOCKS: Final = (
    Clock("event", EVENTS),
    Clock("purchase", PURCHASE),
    Clock("refund", ("refund",)),
    Clock("failed_payment", ("failed_payment",)),
    Clock("login", ("login",)),
    Clock("failed_login", ("failed_login",)),
    Clock("action", ACTIONS),
    Clock("problem", PROBLEMS),
    Clock("opened", ("opened",)),
    Clock("resolved", ("resolved",)),
    Clock("cancellation", ("cancellation",)),
    Clock("plan_change", ("upgrade", "downgrade")),
)
CLOCK: Final = {clock.name: index for index, clock in enumerate(CLOCKS)}


@dataclass(frozen=True, slots=True)
class Attribute:
    """A value whose different occurrences are counted per window; `column` is a fact column name, or "DAY" (UTC day of event time).

    Value 0 (absent text) is not counted. For DAY attributes the count over LIFE exists as well, since a day can be folded
    into the carry; for the others LIFE is not kept.
    """

    name: str
    kinds: tuple[str, ...]
    column: str


ATTRIBUTES: Final = (
    Attribute("active_days", EVENTS, "DAY"),
    Attribute("purchase_days", PURCHASE, "DAY"),
    Attribute("products", PURCHASE, "A"),
    Attribute("devices", LOGINS, "A"),
    Attribute("sessions", LOGINS, "B"),
    Attribute("features", LOGINS, "C"),
    Attribute("countries", LOGINS, "D"),
    Attribute("categories", TICKET, "B"),
)
ATTRIBUTE: Final = {attribute.name: index for index, attribute in enumerate(ATTRIBUTES)}

LASTS: Final = ("purchase_amount", "csat", "nps")
"""Newest known value, newest by (event_time, topic index, offset): VALUE of a PURCHASE, CSAT, NPS of a TICKET. Absent values do not replace."""
LAST: Final = {name: index for index, name in enumerate(LASTS)}


class Op(IntEnum):
    """How a feature is computed from the kept integers at `at` (ms). All in float64; NaN is the one canonical quiet NaN.

    T(m, w) is measure m over window w. Windows of a call are (at - W, at]. age(c) = at - newest(c).
    """

    TOTAL = 0  # T(a, wa)
    RATIO = 1  # T(a, wa) / T(b, wb); NaN when T(b, wb) == 0
    SHARE = 2  # T(a, wa) / (T(a, wa) + T(b, wb)); NaN when the sum is 0
    TREND = 3  # (T(a, wa) / days(wa)) / (T(a, wb) / days(wb)); NaN when T(a, wb) == 0     [wb is the longer]
    BEFORE = 4  # T(a, wb) - T(a, wa), in integers, then one conversion: the period before wa, as long as wa (wb = 2 wa)
    CHANGE = 5  # T(a, wa) - (T(a, wb) - T(a, wa)), in integers, then one conversion
    RATE = 6  # T(a, wa) / days(wa): moving average per day
    PER_MINUTE = 7  # T(a, H1) / 60
    AGE_DAYS = 8  # age(a) / 86_400_000; NaN when never
    AGE_HOURS = 9  # age(a) / 3_600_000; NaN when never
    TENURE_DAYS = 10  # (at - first(a)) / 86_400_000; NaN when never
    MEAN_GAP_DAYS = 11  # ((newest(a) - first(a)) / 86_400_000) / (D(b, LIFE) - 1); a = clock, b = DAY attribute; NaN when D <= 1
    AGE_PER_GAP = 12  # (age(a) / 86_400_000) / MEAN_GAP_DAYS(a, b); NaN when the gap is NaN or 0
    DISTINCT = 13  # D(a, wa): different values of attribute a in wa
    DISTINCT_RATIO = 14  # D(a, wa) / D(b, wb); NaN when D(b, wb) == 0
    LAST = 15  # newest known value a; NaN when none
    LAST_PER_MEAN = 16  # last(a) / (T(b, wa) / T(c, wa)); NaN when none or the mean is 0 or undefined; c in `wb`
    ZSCORE = 17  # (T(a, wa) - e) / sqrt(e + 1), e = (T(a, wb) / days(wb)) * days(wa)
    HOUR_SIN = 18  # HOURS_SIN[(at // 3_600_000) % 24], UTC
    HOUR_COS = 19
    WEEKDAY_SIN = 20  # WEEKDAYS_SIN[(at // 86_400_000 + 3) % 7], Monday = 0, UTC
    WEEKDAY_COS = 21
    KNOWN = 22  # 1.0 when last(a) exists, else 0.0
    PROFILE_KNOWN = 23  # 1.0 when a profile fact exists
    SIGNUP_DAYS = 24  # (at - signup_day * 86_400_000) / 86_400_000; NaN when unknown
    CONTRACT_DAYS = 25  # (contract_end_day * 86_400_000 - at) / 86_400_000; NaN when unknown
    CONSENT = 26  # 1.0 given, 0.0 refused, NaN unknown
    PRODUCT = 27  # T(a, wa) * T(b, wb)
    OPEN_TICKETS = 28  # T(a, LIFE) + T(wa, LIFE) - T(b, LIFE), at least 0; the middle measure index stands in wa
    PER_LIFE_DAY = 29  # T(a, LIFE) / ((at - first(b)) / 86_400_000); NaN when never or 0 days; b = clock


@dataclass(frozen=True, slots=True)
class Feature:
    """One row: `a`, `wa`, `b`, `wb` are the arguments of `op` (indices; 0 where the operation has none)."""

    name: str
    group: str
    source: str
    op: Op
    a: int
    wa: int
    b: int
    wb: int
    unit: str
    meaning: str

    @property
    def aggregate(self) -> str:
        """The operation's name in lower case."""
        return self.op.name.lower()

    @property
    def window(self) -> str:
        """The window(s) as people write them; "-" where the feature has none."""
        return _window_text(self)


_ONE_WINDOW: Final = {Op.TOTAL, Op.RATE, Op.DISTINCT, Op.LAST_PER_MEAN}
_TWO_WINDOWS: Final = {Op.RATIO, Op.SHARE, Op.TREND, Op.BEFORE, Op.CHANGE, Op.DISTINCT_RATIO, Op.ZSCORE, Op.PRODUCT}
_LIFE: Final = {Op.MEAN_GAP_DAYS, Op.AGE_PER_GAP, Op.OPEN_TICKETS, Op.TENURE_DAYS, Op.PER_LIFE_DAY}


def _window_text(feature: Feature) -> str:
    if feature.op is Op.PER_MINUTE:
        return WINDOW_NAMES[H1]
    if feature.op in _ONE_WINDOW:
        return WINDOW_NAMES[feature.wa]
    if feature.op in _TWO_WINDOWS:
        first, second = WINDOW_NAMES[feature.wa], WINDOW_NAMES[feature.wb]
        return first if first == second else f"{first}/{second}"
    return WINDOW_NAMES[LIFE] if feature.op in _LIFE else "-"


def _row(name: str, group: str, source: str, op: Op, args: tuple[int, int, int, int], unit: str, meaning: str) -> Feature:
    return Feature(name, group, source, op, *args, unit, meaning)


_TX, _LG, _SP, _PR, _ALL = "transactions", "logins", "support-tickets", "customer-profiles", "all events"
_R, _B, _E, _F, _S, _D, _N = (
    "recency/frequency/monetary",
    "behaviour",
    "engagement",
    "financial",
    "satisfaction",
    "demographic",
    "real-time",
)

CATALOG: Final[tuple[Feature, ...]] = (
    # recency, frequency, monetary
    _row("purchase_age_days", _R, _TX, Op.AGE_DAYS, (CLOCK["purchase"], 0, 0, 0), "days", "time since the last purchase"),
    _row("purchase_tenure_days", _R, _TX, Op.TENURE_DAYS, (CLOCK["purchase"], 0, 0, 0), "days", "time since the first purchase"),
    _row("purchase_mean_gap_days", _R, _TX, Op.MEAN_GAP_DAYS, (CLOCK["purchase"], 0, ATTRIBUTE["purchase_days"], 0), "days", "average pause between days with a purchase"),
    _row("purchase_age_per_gap", _R, _TX, Op.AGE_PER_GAP, (CLOCK["purchase"], 0, ATTRIBUTE["purchase_days"], 0), "ratio", "current pause compared with the customer's usual one"),
    _row("purchase_count_24h", _R, _TX, Op.TOTAL, (M["purchases"], H24, 0, 0), "purchases", "purchases in the last 24 hours"),
    _row("purchase_count_7d", _R, _TX, Op.TOTAL, (M["purchases"], D7, 0, 0), "purchases", "purchases in the last 7 days"),
    _row("purchase_count_30d", _R, _TX, Op.TOTAL, (M["purchases"], D30, 0, 0), "purchases", "purchases in the last 30 days"),
    _row("purchase_count_90d", _R, _TX, Op.TOTAL, (M["purchases"], D90, 0, 0), "purchases", "purchases in the last 90 days"),
    _row("purchase_count_life", _R, _TX, Op.TOTAL, (M["purchases"], LIFE, 0, 0), "purchases", "purchases so far"),
    _row("purchase_days_90d", _R, _TX, Op.DISTINCT, (ATTRIBUTE["purchase_days"], D90, 0, 0), "days", "days with a purchase in the last 90 days"),
    _row("purchase_days_life", _R, _TX, Op.DISTINCT, (ATTRIBUTE["purchase_days"], LIFE, 0, 0), "days", "days with a purchase so far"),
    _row("purchase_rate_life", _R, _TX, Op.PER_LIFE_DAY, (M["purchases"], 0, CLOCK["purchase"], 0), "purchases/day", "purchases per day since the first one"),
    _row("purchase_count_prev_30d", _R, _TX, Op.BEFORE, (M["purchases"], D30, 0, D60), "purchases", "purchases in the 30 days before the last 30"),
    _row("purchase_count_change_30d", _R, _TX, Op.CHANGE, (M["purchases"], D30, 0, D60), "purchases", "change in purchases against the 30 days before"),
    _row("spend_minor_sum_24h", _R, _TX, Op.TOTAL, (M["spend"], H24, 0, 0), "minor units", "spending in the last 24 hours"),
    _row("spend_minor_sum_7d", _R, _TX, Op.TOTAL, (M["spend"], D7, 0, 0), "minor units", "spending in the last 7 days"),
    _row("spend_minor_sum_30d", _R, _TX, Op.TOTAL, (M["spend"], D30, 0, 0), "minor units", "spending in the last 30 days"),
    _row("spend_minor_sum_90d", _R, _TX, Op.TOTAL, (M["spend"], D90, 0, 0), "minor units", "spending in the last 90 days"),
    _row("spend_minor_sum_life", _R, _TX, Op.TOTAL, (M["spend"], LIFE, 0, 0), "minor units", "spending so far"),
    _row("spend_minor_prev_30d", _R, _TX, Op.BEFORE, (M["spend"], D30, 0, D60), "minor units", "spending in the 30 days before the last 30"),
    _row("spend_minor_change_30d", _R, _TX, Op.CHANGE, (M["spend"], D30, 0, D60), "minor units", "change in spending against the 30 days before"),
    _row("spend_minor_mean_90d", _R, _TX, Op.RATIO, (M["spend"], D90, M["purchases"], D90), "minor units", "average purchase in the last 90 days"),
    _row("spend_minor_mean_life", _R, _TX, Op.RATIO, (M["spend"], LIFE, M["purchases"], LIFE), "minor units", "average purchase so far"),
    _row("spend_trend_30d_90d", _R, _TX, Op.TREND, (M["spend"], D30, 0, D90), "ratio", "spending of the last 30 days against the 90-day pace"),
    _row("purchase_trend_30d_90d", _R, _TX, Op.TREND, (M["purchases"], D30, 0, D90), "ratio", "purchases of the last 30 days against the 90-day pace"),
    _row("last_purchase_per_mean", _R, _TX, Op.LAST_PER_MEAN, (LAST["purchase_amount"], LIFE, M["spend"], M["purchases"]), "ratio", "last purchase compared with the customer's average"),
    _row("last_purchase_minor", _R, _TX, Op.LAST, (LAST["purchase_amount"], 0, 0, 0), "minor units", "amount of the last purchase"),
    # behaviour and adoption
    _row("products_distinct_30d", _B, _TX, Op.DISTINCT, (ATTRIBUTE["products"], D30, 0, 0), "products", "different products bought in the last 30 days"),
    _row("products_distinct_90d", _B, _TX, Op.DISTINCT, (ATTRIBUTE["products"], D90, 0, 0), "products", "different products bought in the last 90 days"),
    _row("features_distinct_7d", _B, _LG, Op.DISTINCT, (ATTRIBUTE["features"], D7, 0, 0), "features", "different features used in the last 7 days"),
    _row("features_distinct_30d", _B, _LG, Op.DISTINCT, (ATTRIBUTE["features"], D30, 0, 0), "features", "different features used in the last 30 days"),
    _row("feature_adoption_7d_90d", _B, _LG, Op.DISTINCT_RATIO, (ATTRIBUTE["features"], D7, ATTRIBUTE["features"], D90), "ratio", "share of the features known from 90 days still used this week"),
    _row("devices_distinct_30d", _B, _LG, Op.DISTINCT, (ATTRIBUTE["devices"], D30, 0, 0), "devices", "different devices in the last 30 days"),
    _row("countries_distinct_90d", _B, _LG, Op.DISTINCT, (ATTRIBUTE["countries"], D90, 0, 0), "countries", "different countries in the last 90 days"),
    _row("sessions_distinct_7d", _B, _LG, Op.DISTINCT, (ATTRIBUTE["sessions"], D7, 0, 0), "sessions", "sessions in the last 7 days"),
    _row("sessions_distinct_30d", _B, _LG, Op.DISTINCT, (ATTRIBUTE["sessions"], D30, 0, 0), "sessions", "sessions in the last 30 days"),
    _row("usage_ms_per_session_30d", _B, _LG, Op.RATIO, (M["usage_ms"], D30, M["actions"], D30), "ms/action", "time spent per action in the last 30 days"),
    _row("feature_use_share_30d", _B, _LG, Op.RATIO, (M["feature_uses"], D30, M["actions"], D30), "share", "share of feature use among all actions in the last 30 days"),
    # engagement: moving averages and trends
    _row("login_age_days", _E, _LG, Op.AGE_DAYS, (CLOCK["login"], 0, 0, 0), "days", "time since the last login"),
    _row("login_count_24h", _E, _LG, Op.TOTAL, (M["logins"], H24, 0, 0), "logins", "logins in the last 24 hours"),
    _row("login_count_7d", _E, _LG, Op.TOTAL, (M["logins"], D7, 0, 0), "logins", "logins in the last 7 days"),
    _row("login_count_30d", _E, _LG, Op.TOTAL, (M["logins"], D30, 0, 0), "logins", "logins in the last 30 days"),
    _row("login_count_90d", _E, _LG, Op.TOTAL, (M["logins"], D90, 0, 0), "logins", "logins in the last 90 days"),
    _row("login_rate_30d", _E, _LG, Op.RATE, (M["logins"], D30, 0, 0), "logins/day", "logins per day, averaged over 30 days"),
    _row("login_trend_7d_30d", _E, _LG, Op.TREND, (M["logins"], D7, 0, D30), "ratio", "logins of the last week against the 30-day pace"),
    _row("login_trend_30d_90d", _E, _LG, Op.TREND, (M["logins"], D30, 0, D90), "ratio", "logins of the last 30 days against the 90-day pace"),
    _row("login_count_prev_7d", _E, _LG, Op.BEFORE, (M["logins"], D7, 0, D14), "logins", "logins in the week before the last"),
    _row("login_count_change_7d", _E, _LG, Op.CHANGE, (M["logins"], D7, 0, D14), "logins", "change in logins against the week before"),
    _row("action_count_7d", _E, _LG, Op.TOTAL, (M["actions"], D7, 0, 0), "actions", "page views and feature uses in the last 7 days"),
    _row("action_trend_7d_30d", _E, _LG, Op.TREND, (M["actions"], D7, 0, D30), "ratio", "actions of the last week against the 30-day pace"),
    _row("active_days_7d", _E, _ALL, Op.DISTINCT, (ATTRIBUTE["active_days"], D7, 0, 0), "days", "days with any event in the last 7 days"),
    _row("active_days_30d", _E, _ALL, Op.DISTINCT, (ATTRIBUTE["active_days"], D30, 0, 0), "days", "days with any event in the last 30 days"),
    _row("active_days_90d", _E, _ALL, Op.DISTINCT, (ATTRIBUTE["active_days"], D90, 0, 0), "days", "days with any event in the last 90 days"),
    _row("active_day_mean_gap_days", _E, _ALL, Op.MEAN_GAP_DAYS, (CLOCK["event"], 0, ATTRIBUTE["active_days"], 0), "days", "average pause between days with any event"),
    _row("tenure_days", _E, _ALL, Op.TENURE_DAYS, (CLOCK["event"], 0, 0, 0), "days", "time since the first event of any kind"),
    # financial
    _row("payment_failure_count_30d", _F, _TX, Op.TOTAL, (M["failed_payments"], D30, 0, 0), "payments", "failed payments in the last 30 days"),
    _row("payment_consistency_90d", _F, _TX, Op.SHARE, (M["purchases"], D90, M["failed_payments"], D90), "share", "share of payments that went through in the last 90 days"),
    _row("payment_failure_age_days", _F, _TX, Op.AGE_DAYS, (CLOCK["failed_payment"], 0, 0, 0), "days", "time since the last failed payment"),
    _row("refund_count_90d", _F, _TX, Op.TOTAL, (M["refunds"], D90, 0, 0), "refunds", "refunds in the last 90 days"),
    _row("refund_count_life", _F, _TX, Op.TOTAL, (M["refunds"], LIFE, 0, 0), "refunds", "refunds so far"),
    _row("refund_minor_sum_90d", _F, _TX, Op.TOTAL, (M["refunded"], D90, 0, 0), "minor units", "money refunded in the last 90 days"),
    _row("refund_share_life", _F, _TX, Op.RATIO, (M["refunded"], LIFE, M["spend"], LIFE), "share", "money refunded compared with money spent so far"),
    _row("refund_per_purchase_life", _F, _TX, Op.RATIO, (M["refunds"], LIFE, M["purchases"], LIFE), "ratio", "refunds per purchase so far"),
    _row("refund_age_days", _F, _TX, Op.AGE_DAYS, (CLOCK["refund"], 0, 0, 0), "days", "time since the last refund"),
    _row("upgrade_count_90d", _F, _TX, Op.TOTAL, (M["upgrades"], D90, 0, 0), "upgrades", "plan upgrades in the last 90 days"),
    _row("downgrade_count_90d", _F, _TX, Op.TOTAL, (M["downgrades"], D90, 0, 0), "downgrades", "plan downgrades in the last 90 days"),
    _row("plan_change_age_days", _F, _TX, Op.AGE_DAYS, (CLOCK["plan_change"], 0, 0, 0), "days", "time since the plan was changed"),
    _row("cancellation_age_days", _F, _TX, Op.AGE_DAYS, (CLOCK["cancellation"], 0, 0, 0), "days", "time since the last cancellation"),
    _row("renewal_count_life", _F, _TX, Op.TOTAL, (M["renewals"], LIFE, 0, 0), "renewals", "renewals so far"),
    # satisfaction
    _row("ticket_count_7d", _S, _SP, Op.TOTAL, (M["opened"], D7, 0, 0), "tickets", "support tickets opened in the last 7 days"),
    _row("ticket_count_30d", _S, _SP, Op.TOTAL, (M["opened"], D30, 0, 0), "tickets", "support tickets opened in the last 30 days"),
    _row("ticket_count_90d", _S, _SP, Op.TOTAL, (M["opened"], D90, 0, 0), "tickets", "support tickets opened in the last 90 days"),
    _row("ticket_count_change_30d", _S, _SP, Op.CHANGE, (M["opened"], D30, 0, D60), "tickets", "change in tickets against the 30 days before"),
    _row("ticket_open_count", _S, _SP, Op.OPEN_TICKETS, (M["opened"], M["reopened"], M["resolved"], 0), "tickets", "tickets still open"),
    _row("ticket_urgent_count_30d", _S, _SP, Op.TOTAL, (M["urgent"], D30, 0, 0), "tickets", "high or urgent tickets in the last 30 days"),
    _row("ticket_reopened_count_90d", _S, _SP, Op.TOTAL, (M["reopened"], D90, 0, 0), "tickets", "tickets reopened in the last 90 days"),
    _row("ticket_categories_distinct_90d", _S, _SP, Op.DISTINCT, (ATTRIBUTE["categories"], D90, 0, 0), "categories", "different kinds of support issue in the last 90 days"),
    _row("ticket_wait_seconds_mean_90d", _S, _SP, Op.RATIO, (M["wait_seconds"], D90, M["waits"], D90), "seconds", "average wait in support in the last 90 days"),
    _row("ticket_age_days", _S, _SP, Op.AGE_DAYS, (CLOCK["opened"], 0, 0, 0), "days", "time since the last ticket was opened"),
    _row("csat_last", _S, _SP, Op.LAST, (LAST["csat"], 0, 0, 0), "points 1-5", "last satisfaction rating"),
    _row("csat_known", _S, _SP, Op.KNOWN, (LAST["csat"], 0, 0, 0), "flag", "a satisfaction rating is known"),
    _row("csat_mean_90d", _S, _SP, Op.RATIO, (M["csat_sum"], D90, M["csat_n"], D90), "points 1-5", "average satisfaction in the last 90 days"),
    _row("csat_last_per_mean", _S, _SP, Op.LAST_PER_MEAN, (LAST["csat"], LIFE, M["csat_sum"], M["csat_n"]), "ratio", "last satisfaction rating against the customer's average"),
    _row("nps_last", _S, _SP, Op.LAST, (LAST["nps"], 0, 0, 0), "points 0-10", "last recommendation rating"),
    _row("nps_mean_life", _S, _SP, Op.RATIO, (M["nps_sum"], LIFE, M["nps_n"], LIFE), "points 0-10", "average recommendation rating so far"),
    _row("tickets_times_failures_30d", _S, _ALL, Op.PRODUCT, (M["opened"], D30, M["failed_payments"], D30), "product", "tickets and failed payments together in the last 30 days"),
    _row("tickets_per_purchase_90d", _S, _ALL, Op.RATIO, (M["opened"], D90, M["purchases"], D90), "ratio", "tickets per purchase in the last 90 days"),
    # demographic
    _row("profile_known", _D, _PR, Op.PROFILE_KNOWN, (0, 0, 0, 0), "flag", "a customer profile is known"),
    _row("signup_days", _D, _PR, Op.SIGNUP_DAYS, (0, 0, 0, 0), "days", "time since signing up"),
    _row("contract_days_left", _D, _PR, Op.CONTRACT_DAYS, (0, 0, 0, 0), "days", "time until the contract ends"),
    _row("consent_given", _D, _PR, Op.CONSENT, (0, 0, 0, 0), "flag", "consent to contact is given"),
    _row("profile_update_count_90d", _D, _PR, Op.TOTAL, (M["profile_updates"], D90, 0, 0), "updates", "profile changes in the last 90 days"),
    # real-time
    _row("event_count_1h", _N, _ALL, Op.TOTAL, (M["events"], H1, 0, 0), "events", "events in the last hour"),
    _row("events_per_minute_1h", _N, _ALL, Op.PER_MINUTE, (M["events"], H1, 0, 0), "events/minute", "events per minute in the last hour"),
    _row("activity_anomaly_24h_30d", _N, _ALL, Op.ZSCORE, (M["events"], H24, 0, D30), "standard deviations", "activity of the last day against the usual"),
    _row("failed_login_count_1h", _N, _LG, Op.TOTAL, (M["failed_logins"], H1, 0, 0), "logins", "failed logins in the last hour"),
    _row("failed_login_count_24h", _N, _LG, Op.TOTAL, (M["failed_logins"], H24, 0, 0), "logins", "failed logins in the last 24 hours"),
    _row("failed_login_share_7d", _N, _LG, Op.SHARE, (M["failed_logins"], D7, M["logins"], D7), "share", "share of logins that failed in the last 7 days"),
    _row("problem_count_24h", _N, _LG, Op.TOTAL, (M["problems"], H24, 0, 0), "problems", "errors, outages and slow answers in the last 24 hours"),
    _row("problem_count_7d", _N, _LG, Op.TOTAL, (M["problems"], D7, 0, 0), "problems", "errors, outages and slow answers in the last 7 days"),
    _row("problem_age_hours", _N, _LG, Op.AGE_HOURS, (CLOCK["problem"], 0, 0, 0), "hours", "time since the last error, outage or slow answer"),
    _row("problem_anomaly_24h_30d", _N, _LG, Op.ZSCORE, (M["problems"], H24, 0, D30), "standard deviations", "problems of the last day against the usual"),
    _row("hour_sin", _N, _ALL, Op.HOUR_SIN, (0, 0, 0, 0), "-", "time of day, first coordinate"),
    _row("hour_cos", _N, _ALL, Op.HOUR_COS, (0, 0, 0, 0), "-", "time of day, second coordinate"),
    _row("weekday_sin", _N, _ALL, Op.WEEKDAY_SIN, (0, 0, 0, 0), "-", "day of the week, first coordinate"),
    _row("weekday_cos", _N, _ALL, Op.WEEKDAY_COS, (0, 0, 0, 0), "-", "day of the week, second coordinate"),
)  # fmt: skip

NAMES: Final = tuple(feature.name for feature in CATALOG)
N_FEATURES: Final = len(CATALOG)


def _layout_hash() -> str:
    rows = [[f.name, int(f.op), f.a, f.wa, f.b, f.wb, "float32"] for f in CATALOG]
    tables = [
        [[m.name, m.kinds, int(m.field)] for m in MEASURES],
        [[c.name, c.kinds] for c in CLOCKS],
        [[a.name, a.kinds, a.column] for a in ATTRIBUTES],
        LASTS,
    ]
    return blake2b(orjson.dumps([rows, tables]), digest_size=16).hexdigest()


LAYOUT_HASH: Final = _layout_hash()
"""blake2b-128 of names, operations, arguments, order and dtype: two vectors compare only when this is equal."""
