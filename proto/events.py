"""Events in: the four kinds of record a producer may write, as models whose JSON Schemas are the public contract.

Slow and obvious on purpose: `read` is the reference and judges what the fast decoder (streams/codec.py) does not accept.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from math import isfinite
from typing import Annotated, Any, Final, Literal, NoReturn

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from proto.errors import Reason

MAX_DEPTH: Final = 64
"""Deepest nesting of arrays and objects accepted: far below what any parser on the way follows, so no stack decides."""
MAX_TEXT: Final = 256
"""Longest text of any field, in Unicode code points."""
MAX_DURATION_MS: Final = 10**10
MAX_WAIT_SECONDS: Final = 10**9
FIRST_SIGNUP: Final = date(1900, 1, 1)
FIRST_CONTRACT_END: Final = date(1970, 1, 2)  # day 0 stands for absent in a fact

TIME_PATTERN: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
AMOUNT_PATTERN: Final = r"^[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
DATE_PATTERN: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
# A `$` of Python would also match before a last line feed; fullmatch does not.
_TIME: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})[Tt ]([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]+))?(?:[Zz]|([+-])([0-9]{2}):([0-9]{2}))"
)
_AMOUNT: Final = re.compile(AMOUNT_PATTERN[1:-1])
_DATE: Final = re.compile(DATE_PATTERN[1:-1])
_NOT_FINITE: Final = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY: Final = date(1970, 1, 1)
_MS: Final = timedelta(milliseconds=1)


class Refused(ValueError):
    """A record is not an event; `reason` is the code of its dead letter."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


# --- values


def epoch_ms(text: str) -> int:
    """Milliseconds since 1970-01-01 UTC of an RFC 3339 date-time.

    More than three decimals are cut off towards the past. Second 60 is accepted only where a leap second can be (23:59:60 UTC) and
    is the instant after it. Raises ValueError for anything else, in particular for a date-time without a zone.

    >>> epoch_ms("1970-01-01T01:00:00.0019+01:00")
    1
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError("needs an RFC 3339 date-time with a zone, or integer epoch milliseconds")
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    leap = second == 60
    # datetime has no year 0: the calendar repeats every 400 years.
    cycle = 400 if year == 0 else 0
    instant = datetime(year + cycle, month, day, hour, minute, 59 if leap else second, tzinfo=UTC)
    ms = (instant - _EPOCH) // _MS - (146_097 * 86_400_000 if cycle else 0)
    if match[8]:
        hours, minutes = int(match[9]), int(match[10])
        if hours > 23 or minutes > 59:
            raise ValueError("offset out of range")
        ms -= (1 if match[8] == "+" else -1) * (hours * 60 + minutes) * 60_000
    if leap:
        ms += 1000
        if ms % 86_400_000:
            raise ValueError("second 60 outside 23:59:60 UTC")
    return ms + int(((match[7] or "") + "000")[:3])


def number(text: str) -> Decimal:
    """The exact value of a decimal text; Infinity when it exceeds a 64-bit float, 0 when it is closer to 0 than any of them."""
    size = float(text)
    if size in (float("inf"), float("-inf")):
        return Decimal(size)
    if size == 0.0:
        negative = text.startswith("-") and re.search("[1-9]", re.split("[eE]", text)[0]) is not None
        return Decimal("-1e-400") if negative else Decimal(0)
    return Decimal(text)


def _whole(text: str) -> int:
    # int() refuses more than 4,300 digits; so long a number is out of every range anyway.
    return int(text) if len(text) <= 4000 else (-1 if text[0] == "-" else 1) * 10**4000


def _time(value: object) -> int:
    if isinstance(value, str):
        try:
            return epoch_ms(value)
        except ValueError as error:
            raise PydanticCustomError("event_time", "{why}", {"why": str(error)}) from error
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise PydanticCustomError("event_time", "needs an RFC 3339 date-time with a zone, or integer epoch milliseconds")


def _amount(value: object) -> Decimal | None:
    if value is None:
        return None
    if isinstance(value, str):
        if _NOT_FINITE.fullmatch(value):
            raise PydanticCustomError("not_finite", "not a finite number")
        if not _AMOUNT.fullmatch(value):
            raise PydanticCustomError("amount", "needs a number or a decimal text such as 12.50")
        value = number(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        value = number(str(value)) if abs(value) < 10**310 else Decimal("Infinity")
    elif isinstance(value, float):  # from a file, never from `read`
        value = number(repr(value)) if isfinite(value) else Decimal(value)
    if not isinstance(value, Decimal):
        raise PydanticCustomError("amount", "needs a number or a decimal text such as 12.50")
    if not value.is_finite():
        raise PydanticCustomError("not_finite", "not a finite number")
    if value < 0:
        raise PydanticCustomError("amount", "must not be negative: the sign comes from the kind")
    return value


def _day(value: object) -> date | None:
    if value is None or (isinstance(value, date) and not isinstance(value, datetime)):
        return value
    if not isinstance(value, str) or not _DATE.fullmatch(value):
        raise PydanticCustomError("date", "needs a date YYYY-MM-DD")
    try:
        return date.fromisoformat(value)
    except ValueError as error:
        raise PydanticCustomError("date", "{why}", {"why": str(error)}) from error


def _not_before(first: date) -> BeforeValidator:
    def check(value: object) -> date | None:
        day = _day(value)
        if day is not None and day < first:
            raise PydanticCustomError("date", "must not be before {first}", {"first": first.isoformat()})
        return day

    return BeforeValidator(check)


def days(value: date) -> int:
    """Days since 1970-01-01."""
    return (value - _EPOCH_DAY).days


def _schema(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(kinds)}, mode="validation")


_NULL: Final[dict[str, Any]] = {"type": "null"}
Id = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Time = Annotated[
    int, BeforeValidator(_time), _schema({"type": "string", "format": "date-time", "pattern": TIME_PATTERN}, {"type": "integer"})
]
Amount = Annotated[
    Decimal | None,
    BeforeValidator(_amount),
    _schema({"type": "number", "minimum": 0}, {"type": "string", "pattern": AMOUNT_PATTERN}, _NULL),
]
_DAY_SCHEMA: Final = _schema({"type": "string", "format": "date", "pattern": DATE_PATTERN}, _NULL)
Signup = Annotated[date | None, _not_before(FIRST_SIGNUP), _DAY_SCHEMA]
ContractEnd = Annotated[date | None, _not_before(FIRST_CONTRACT_END), _DAY_SCHEMA]

# --- events


class Event(BaseModel):
    """What every event has. Unknown fields are ignored; `null` in an optional field means the same as leaving it out."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    event_id: Id = Field(description="Unique within the topic; an event sent twice with the same id counts once.")
    customer_id: Id = Field(description="Text, also when it looks like a number: leading zeros survive. Equals the record key (UTF-8).")
    event_time: Time = Field(
        description="When it happened: RFC 3339 with a zone (cut to milliseconds), or integer milliseconds since 1970 UTC."
    )


class Transaction(Event):
    """Topic `transactions`: money moved, or a plan changed."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"kind": {"enum": ["payment", "refund", "renewal"]}}},
            "then": {"required": ["amount"], "properties": {"amount": {"not": _NULL}}},
        }
    )

    kind: Literal["payment", "failed_payment", "refund", "renewal", "upgrade", "downgrade", "cancellation"]
    amount: Amount = Field(
        None,
        description="Not negative (the sign comes from kind), in units of `currency`; number or decimal text. Required for payment, refund "
        "and renewal; absent = the event counts, without a value.",
    )
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] | None = Field(None, description="ISO 4217 code; absent = the account currency.")
    product: Text | None = Field(None, description="What was paid for; absent = unknown.")
    method: Text | None = Field(None, description="How it was paid, e.g. card; absent = unknown.")
    channel: Text | None = Field(None, description="Where, e.g. web; absent = unknown.")

    @model_validator(mode="after")
    def _needs_amount(self) -> Transaction:
        if self.amount is None and self.kind in AMOUNT_REQUIRED:
            raise PydanticCustomError("missing", "amount is required for {kind}", {"kind": self.kind})
        return self


AMOUNT_REQUIRED: Final = frozenset({"payment", "refund", "renewal"})


class Login(Event):
    """Topic `logins`: the customer used the product, or met a problem with it."""

    kind: Literal["login", "failed_login", "logout", "feature_use", "page_view", "error", "outage", "slow_response"]
    device: Text | None = Field(None, description="Device or device class; absent = unknown.")
    country: Text | None = Field(None, description="Country code; absent = unknown.")
    session_id: Text | None = Field(None, description="Session the event belongs to; absent = unknown.")
    feature: Text | None = Field(None, description="Feature or page used; absent = unknown.")
    duration_ms: Annotated[int, Field(ge=0, le=MAX_DURATION_MS)] | None = Field(None, description="Duration (ms); absent = unknown.")


class SupportTicket(Event):
    """Topic `support-tickets`: a ticket moved, or the customer rated the service."""

    kind: Literal["opened", "resolved", "reopened", "satisfaction"]
    ticket_id: Text | None = Field(None, description="Ticket; absent = unknown.")
    category: Text | None = Field(None, description="What it is about; absent = unknown.")
    priority: Literal["low", "normal", "high", "urgent"] | None = Field(None, description="Absent = not stated.")
    channel: Text | None = Field(None, description="Phone, mail, chat, ...; absent = unknown.")
    wait_seconds: Annotated[int, Field(ge=0, le=MAX_WAIT_SECONDS)] | None = Field(
        None, description="How long the customer waited (s); absent = unknown."
    )
    csat: Annotated[int, Field(ge=1, le=5)] | None = Field(None, description="Satisfaction rating 1-5; absent = not given.")
    nps: Annotated[int, Field(ge=0, le=10)] | None = Field(None, description="Recommendation rating 0-10; absent = not given.")


class CustomerProfile(Event):
    """Topic `customer-profiles`: who the customer is from `event_time` on; replaces the former profile as a whole, gives no score."""

    kind: Literal["profile"] = "profile"
    signup_date: Signup = Field(None, description=f"First day as a customer, from {FIRST_SIGNUP}; absent = unknown.")
    plan: Text | None = Field(None, description="Plan or tariff; absent = unknown.")
    segment: Text | None = Field(None, description="Business segment; absent = unknown.")
    region: Text | None = Field(None, description="Region; absent = unknown.")
    age_band: Text | None = Field(None, description="Age band, e.g. 30-39; absent = unknown.")
    contract_end: ContractEnd = Field(None, description=f"Last day of the contract, from {FIRST_CONTRACT_END}; absent = unknown or open.")
    consent: bool | None = Field(None, description="Consent to be contacted; absent = unknown.")


MODELS: Final[tuple[type[Event], ...]] = (Transaction, Login, SupportTicket, CustomerProfile)
"""By topic index (features.facts.TOPICS)."""

# --- records

_STRINGS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STEP: Final = np.zeros(256, np.int64)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def too_deep(value: bytes) -> bool:
    """Whether arrays and objects are nested deeper than MAX_DEPTH in a JSON text; linear in its length whatever it holds."""
    if value.count(b"[") + value.count(b"{") <= MAX_DEPTH:
        return False
    steps = _STEP[np.frombuffer(_STRINGS.sub(b"", value), np.uint8)]
    return int(steps.cumsum().max(initial=0)) > MAX_DEPTH


def _constant(text: str) -> NoReturn:
    raise Refused(Reason.NOT_FINITE, f"{text} is not JSON and not a number")


def read(topic: int, value: bytes | None, *, max_bytes: int = 1_000_000) -> Event:
    """The event in one record value. topic: index in features.facts.TOPICS.

    Raises Refused with the first reason in this order: too_large, empty, not_utf8, nesting, not_json, missing_field, wrong_type,
    not_finite. Of a key given twice the last value counts. Key, time range and amount range are the decoder's business.
    """
    if value is None:
        raise Refused(Reason.EMPTY, "no value")
    if len(value) > max_bytes:
        raise Refused(Reason.TOO_LARGE, f"{len(value)} bytes, at most {max_bytes} are accepted")
    if not value:
        raise Refused(Reason.EMPTY, "zero bytes")
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise Refused(Reason.NOT_UTF8, f"byte {error.start}: {error.reason}") from error
    if too_deep(value):
        raise Refused(Reason.NESTING, f"nested deeper than {MAX_DEPTH}")
    try:
        fields = json.loads(text, parse_float=number, parse_int=_whole, parse_constant=_constant)
        json.dumps(fields, ensure_ascii=False, default=str).encode()  # raises for half a surrogate pair, anywhere
    except Refused:
        raise
    except ValueError as error:  # JSONDecodeError, UnicodeEncodeError
        raise Refused(Reason.NOT_JSON, str(error).partition("\n")[0][:200]) from error
    if not isinstance(fields, dict):
        raise Refused(Reason.WRONG_TYPE, f"a JSON object is needed, not {type(fields).__name__}")
    try:
        return MODELS[topic].model_validate(fields)
    except ValidationError as error:
        raise _refused(error) from error


def _refused(error: ValidationError) -> Refused:
    by_rank: dict[Reason, str] = {}
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        reason = {"missing": Reason.MISSING_FIELD, "not_finite": Reason.NOT_FINITE}.get(item["type"], Reason.WRONG_TYPE)
        where = str(item["loc"][0]) if item["loc"] else ""
        by_rank.setdefault(reason, f"{where}: {item['msg']}" if where else item["msg"])
    for reason in (Reason.MISSING_FIELD, Reason.WRONG_TYPE, Reason.NOT_FINITE):
        if reason in by_rank:
            return Refused(reason, by_rank[reason])
    raise error
