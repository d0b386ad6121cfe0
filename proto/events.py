"""What may arrive on the input topics: the documented contract of events and profile facts.

The hot path decodes with msgspec (`streams/codec.py`); a property test holds the two to the same verdicts and values.
"""

from __future__ import annotations

import re
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, WithJsonSchema

MAX_ID_CHARS: Final = 256
MAX_TEXT_CHARS: Final = 1_024

Id = Annotated[str, Field(strict=True, min_length=1, max_length=MAX_ID_CHARS)]
Text = Annotated[str, Field(strict=True, max_length=MAX_TEXT_CHARS)]


_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII)


def epoch_ms(text: str) -> int:
    """RFC 3339 with offset to epoch milliseconds; digits below a millisecond are cut off, a leap second counts as second 59.

    Raises ValueError for anything else, also a time without offset.

    >>> epoch_ms("2026-01-31T12:00:00.1239Z") - epoch_ms("2026-01-31T13:00:00+01:00")
    123
    """
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise ValueError("must be RFC 3339 with an offset, e.g. 2026-01-31T12:00:00Z, or integer epoch milliseconds")
    day, minute, second, fraction, sign, hours, minutes = match.groups()
    moment = datetime.fromisoformat(f"{day}T{minute}:{'59' if second == '60' else second}+00:00")
    ms = int(moment.timestamp()) * 1_000 + int(((fraction or "") + "000")[:3])
    if sign:
        if int(hours) > 23 or int(minutes) > 59:
            raise ValueError("offset out of range")
        shift = (int(hours) * 60 + int(minutes)) * 60_000
        ms += shift if sign == "-" else -shift
    return ms


def _event_time(value: Any) -> Any:
    if isinstance(value, str):
        return epoch_ms(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("must be RFC 3339 text or integer epoch milliseconds")


EventTime = Annotated[
    int,
    BeforeValidator(_event_time),
    WithJsonSchema({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "integer"}]}),
]


def _amount(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number or decimal text")
    return str(value) if isinstance(value, float) else value


def _finite(value: Decimal) -> Decimal:
    if not value.is_finite():
        raise ValueError("must be finite")
    if value < 0:
        raise ValueError("must not be negative: the sign comes from the kind")
    return value


Amount = Annotated[Decimal, Field(allow_inf_nan=True), BeforeValidator(_amount), AfterValidator(_finite)]
Count = Annotated[int, Field(strict=True, ge=0, le=10**15)]


class Event(BaseModel):
    """What every record has. Unknown fields are ignored; a record's key is its customer_id."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    event_id: Id = Field(description="Unique within the topic: a second record with it is a duplicate.")
    customer_id: Id = Field(description="Text; leading zeros count.")
    event_time: EventTime = Field(description="RFC 3339 with offset, or integer epoch milliseconds; digits below 1 ms are cut off.")


class Transaction(Event):
    """A record on `transactions`."""

    kind: Literal["payment", "failed_payment", "refund", "renewal", "upgrade", "downgrade", "cancellation"]
    amount: Amount | None = Field(
        None,
        description="Number or decimal text in units of `currency`, not negative (the kind gives the sign); rounded half-even to minor "
        "units. Absent: the event counts, its money does not.",
    )
    currency: Annotated[str, Field(strict=True, pattern=r"^[A-Z]{3}$")] | None = Field(
        None, description="ISO 4217; default: the account currency."
    )
    product: Text | None = None
    method: Text | None = None
    channel: Text | None = None


class Login(Event):
    """A record on `logins`: sessions, use, and trouble while using."""

    kind: Literal["login", "failed_login", "logout", "feature_use", "page_view", "error", "outage", "slow_response"]
    device: Text | None = None
    country: Text | None = None
    session_id: Text | None = None
    feature: Text | None = None
    duration_ms: Count | None = Field(None, description="Milliseconds.")


class SupportTicket(Event):
    """A record on `support-tickets`."""

    kind: Literal["opened", "resolved", "reopened", "satisfaction"]
    ticket_id: Text | None = None
    category: Text | None = None
    priority: Literal["low", "normal", "high", "urgent"] | None = None
    channel: Text | None = None
    wait_seconds: Count | None = Field(None, description="Seconds.")
    csat: Annotated[int, Field(strict=True, ge=1, le=5)] | None = Field(None, description="1 (worst) to 5.")
    nps: Annotated[int, Field(strict=True, ge=0, le=10)] | None = Field(None, description="0 to 10.")


def _iso_day(value: Any) -> Any:
    if not isinstance(value, str) or len(value) != 10:
        raise ValueError("must be a date as YYYY-MM-DD")
    return value


Day = Annotated[date, BeforeValidator(_iso_day)]


class CustomerProfile(Event):
    """A record on `customer-profiles`: replaces the profile from its event_time on; an absent field is then unknown."""

    kind: Literal["profile"] = "profile"
    signup_date: Day | None = None
    plan: Text | None = None
    segment: Text | None = None
    region: Text | None = None
    age_band: Text | None = None
    contract_end: Annotated[Day, Field(description="After 1970.")] | None = None
    consent: StrictBool | None = Field(None, description="Whether the customer may be contacted.")


CONTRACTS: Final = {
    "transactions": Transaction,
    "logins": Login,
    "support-tickets": SupportTicket,
    "customer-profiles": CustomerProfile,
}
"""Contract by topic name without prefix, in topic-index order."""
