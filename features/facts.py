"""A fact as numbers: the one row layout that codec, histories, kernel and state format share.

A batch of facts is an int64 array of shape (n, WIDTH). Texts are 64-bit keyed digests (0 = absent), absent numbers are
NONE, money is integer minor units, times are epoch milliseconds (UTC), days are days since 1970-01-01.
"""

from typing import Final

TOPICS: Final = ("transactions", "logins", "support-tickets", "customer-profiles")
"""Input topics without prefix; the position is the topic index used in ties and in the cut."""

SOURCES: Final = (*TOPICS, "silence")
"""Where a score comes from: a record of an input topic, or a tick of the partition's clock (streams/silence.py)."""
SILENCE: Final = len(TOPICS)

TIME, OFFSET, KIND, VALUE, LEVEL, A, B, C, D, ID = range(10)
WIDTH: Final = 10
NONE: Final = -(2**63)

# Columns by topic
#   transactions       VALUE amount (minor, >= 0)   LEVEL 0              A product   B method    C channel   D -
#   logins             VALUE duration_ms            LEVEL 0              A device    B session   C feature   D country
#   support-tickets    VALUE wait_seconds           LEVEL packed ticket  A ticket_id B category  C channel   D -
#   customer-profiles  VALUE signup day             LEVEL packed profile A plan      B segment   C region    D age_band
# ID is the digest of (topic, event_id), so one index serves all topics.

KINDS: Final = {
    "payment": 0,
    "failed_payment": 1,
    "refund": 2,
    "renewal": 3,
    "upgrade": 4,
    "downgrade": 5,
    "cancellation": 6,
    "login": 8,
    "failed_login": 9,
    "logout": 10,
    "feature_use": 11,
    "page_view": 12,
    "error": 13,
    "outage": 14,
    "slow_response": 15,
    "opened": 16,
    "resolved": 17,
    "reopened": 18,
    "satisfaction": 19,
    "profile": 24,
}
"""Kind code; `code >> 3` is the topic index."""
N_KINDS: Final = 32
PROFILE: Final = 24

PRIORITIES: Final = {"low": 1, "normal": 2, "high": 3, "urgent": 4}  # 0 = not stated

MAX_AMOUNT_MINOR: Final = 10**15
MAX_SUM_MINOR: Final = 2**62
YEAR_2000_MS: Final = 946_684_800_000
DAY_MS: Final = 86_400_000


def pack_ticket(priority: int, csat: int | None, nps: int | None) -> int:
    """LEVEL of a support fact: priority 0-4 (0 absent), csat 1-5, nps 0-10."""
    return priority << 16 | (csat or 0) << 8 | (0 if nps is None else nps + 1)


def pack_profile(contract_end_day: int | None, consent: bool | None) -> int:
    """LEVEL of a profile fact: contract end in days since 1970 (after 1970), consent."""
    return (0 if contract_end_day is None else contract_end_day) << 2 | (0 if consent is None else 1 + consent)
