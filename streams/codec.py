"""Bytes to facts: every record becomes a row of integers or a reason; whole slices at a time, with few Python objects per event."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from features.facts import (
    ID,
    KIND,
    KINDS,
    LEVEL,
    MAX_AMOUNT_MINOR,
    NONE,
    OFFSET,
    PRIORITIES,
    PROFILE,
    TIME,
    TOPICS,
    VALUE,
    WIDTH,
    YEAR_2000_MS,
    A,
    B,
    C,
    D,
    pack_profile,
    pack_ticket,
)
from features.texts import SATURATED, UNSURE, amounts, digests, key_of, times
from proto.errors import BadUsage, Reason
from proto.events import (
    AMOUNT_PATTERN,
    AMOUNT_REQUIRED,
    FIRST_CONTRACT_END,
    FIRST_SIGNUP,
    MAX_DEPTH,
    MAX_DURATION_MS,
    MAX_TEXT,
    MAX_WAIT_SECONDS,
    CustomerProfile,
    Event,
    Login,
    Refused,
    SupportTicket,
    Transaction,
    days,
    number,
    read,
    too_deep,
)

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

ISO_EXPONENTS: Final = (
    dict.fromkeys(
        ["BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"], 0
    )
    | dict.fromkeys(["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"], 3)
    | dict.fromkeys(["CLF", "UYW"], 4)
)
"""ISO 4217 minor-unit exponents that are not 2."""
_CURRENCY: Final = re.compile(r"[A-Z]{3}")
_AMOUNT: Final = re.compile(AMOUNT_PATTERN[1:-1])
_EXACT: Final = Context(prec=MAX_PREC, Emax=MAX_EMAX, Emin=MIN_EMIN, rounding=ROUND_HALF_EVEN)
_FAR: Final = 2**62
"""Times beyond this are as good as this: refused on either side."""


def exponent_of(currency: str) -> int:
    """Decimals of the minor unit of an ISO 4217 currency (EUR 2, JPY 0, KWD 3). Raises BadUsage when it is no currency code."""
    if not _CURRENCY.fullmatch(currency):
        raise BadUsage(f"currency {currency!r}: needs an ISO 4217 code such as EUR")
    return ISO_EXPONENTS.get(currency, 2)


def minor_units(amount: Decimal, exponent: int, rate: Decimal = Decimal(1)) -> int:
    """`amount` times `rate` in minor units, rounded half-even once from the exact product; SATURATED when beyond every accepted amount."""
    product = _EXACT.multiply(amount, rate)
    if product and product.adjusted() > 18:
        return SATURATED
    if product.adjusted() < -20:  # rounds to nothing; the exact way would write out all its zeros
        return 0
    return min(int(_EXACT.quantize(_EXACT.scaleb(product, exponent), Decimal(1))), SATURATED)


# --- the shapes msgspec reads, one per topic; what they refuse goes to proto.events.read for the verdict

_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] | None
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT)]


class _Event(msgspec.Struct, gc=False):
    event_id: _Id
    customer_id: _Id
    event_time: int | str


class _Transaction(_Event, gc=False, kw_only=True):
    kind: Literal["payment", "failed_payment", "refund", "renewal", "upgrade", "downgrade", "cancellation"]
    amount: msgspec.Raw = msgspec.Raw()
    currency: str | None = None
    product: _Text = None
    method: _Text = None
    channel: _Text = None


class _Login(_Event, gc=False, kw_only=True):
    kind: Literal["login", "failed_login", "logout", "feature_use", "page_view", "error", "outage", "slow_response"]
    device: _Text = None
    country: _Text = None
    session_id: _Text = None
    feature: _Text = None
    duration_ms: Annotated[int, msgspec.Meta(ge=0, le=MAX_DURATION_MS)] | None = None


class _Ticket(_Event, gc=False, kw_only=True):
    kind: Literal["opened", "resolved", "reopened", "satisfaction"]
    ticket_id: _Text = None
    category: _Text = None
    priority: Literal["low", "normal", "high", "urgent"] | None = None
    channel: _Text = None
    wait_seconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_WAIT_SECONDS)] | None = None
    csat: Annotated[int, msgspec.Meta(ge=1, le=5)] | None = None
    nps: Annotated[int, msgspec.Meta(ge=0, le=10)] | None = None


class _Profile(_Event, gc=False, kw_only=True):
    kind: Literal["profile"] = "profile"
    signup_date: str | None = None
    plan: _Text = None
    segment: _Text = None
    region: _Text = None
    age_band: _Text = None
    contract_end: str | None = None
    consent: bool | None = None


_SHAPES: Final = (_Transaction, _Login, _Ticket, _Profile)
_UNREADABLE: Final = -(2**40)
_PRIORITY: Final = dict[str | None, int](PRIORITIES) | {None: 0}


@lru_cache(maxsize=65_536)
def _day(text: str, first: date) -> int:
    """Days since 1970 of a date text; _UNREADABLE where the complete reader has to look."""
    try:
        value = date.fromisoformat(text)
    except ValueError:
        return _UNREADABLE
    # fromisoformat also reads 20240101 and week dates.
    return days(value) if value >= first and value.isoformat() == text else _UNREADABLE


# --- records


class RawMessage(Protocol):
    """What the decoder needs of a Kafka message (confluent_kafka.Message has it)."""

    def value(self) -> bytes | None: ...
    def key(self) -> bytes | None: ...
    def offset(self) -> int: ...
    def timestamp(self) -> tuple[int, int]: ...


@dataclass(frozen=True, slots=True)
class Records:
    """One slice of a (topic, partition) as columns of n records in offset order."""

    topic: int
    partition: int
    offset: IntArray
    append_ms: IntArray  # -1 when the broker gave no time: then nothing is "future"
    size: IntArray  # bytes of key and value
    facts: IntArray  # (n, WIDTH); of a rejected record only OFFSET, and TIME when it was readable, else NONE
    customer: list[str]  # "" where it could not be read
    event_id: list[str]
    reason: ByteArray  # proto.errors.Reason, 0 accepted
    detail: dict[int, str]  # of rejected records, by position
    raw: dict[int, tuple[bytes | None, bytes | None]]  # (key, value) of rejected records
    unconverted: int = 0  # accepted transactions in a currency without a rate: counted, their amount is not

    def __len__(self) -> int:
        return len(self.customer)


@dataclass(slots=True)
class _Draft:
    """Records in the making."""

    facts: IntArray
    customer: list[str]
    event_id: list[str]
    reason: ByteArray
    detail: dict[int, str] = field(default_factory=dict)
    unconverted: set[int] = field(default_factory=set)

    def refuse(self, i: int, reason: Reason, detail: str) -> None:
        self.reason[i] = reason
        self.detail[i] = detail


class Decoder:
    """Bytes to facts for one deployment.

    currency: ISO 4217 code of the account; rates: units of it per unit of another currency; future_ms: how far an event time may lie
    beyond the append time; max_bytes: largest value; digest_key: key of all text digests. Raises BadUsage for a bad currency.

    Checks in order: too_large, empty, not_utf8, nesting, not_json, missing_field, wrong_type, not_finite, key_mismatch, before_2000,
    future, amount_range. `decode` raises nothing for any bytes.
    """

    def __init__(self, *, currency: str, rates: Mapping[str, Decimal], future_ms: int, max_bytes: int, digest_key: bytes) -> None:
        self._currency = currency
        self._exponent = exponent_of(currency)
        self._rates = {code: Decimal(rate) for code, rate in rates.items() if code != currency}
        self._future_ms = future_ms
        self._max_bytes = max_bytes
        self._text_key = key_of(digest_key, "text")
        self._id_keys = tuple(key_of(digest_key, f"id {topic}") for topic in TOPICS)
        self._decoders = tuple(msgspec.json.Decoder(shape) for shape in _SHAPES)

    def decode(self, topic: int, partition: int, messages: Sequence[RawMessage]) -> Records:
        """The messages of one (topic, partition) as facts or reasons. topic: index in features.facts.TOPICS."""
        n = len(messages)
        values = [message.value() for message in messages]
        keys = [message.key() for message in messages]
        append_ms = np.fromiter([message.timestamp()[1] for message in messages], np.int64, n)
        sizes = np.fromiter([len(value) if value else 0 for value in values], np.int64, n)
        facts = np.zeros((n, WIDTH), np.int64)
        facts[:, TIME] = NONE
        facts[:, VALUE] = NONE
        facts[:, OFFSET] = [message.offset() for message in messages]
        draft = _Draft(facts, [""] * n, [""] * n, np.zeros(n, np.uint8))

        positions, events = self._parse(topic, values, sizes)
        slow = np.ones(n, bool)
        if events:
            sound = self._columns(topic, positions, events, draft)
            slow[positions[sound]] = False
        for i in np.flatnonzero(slow).tolist():
            self._judge(topic, i, values[i], draft)
        self._check(keys, append_ms, draft)
        return Records(
            topic=topic,
            partition=partition,
            offset=facts[:, OFFSET].copy(),
            append_ms=append_ms,
            size=sizes + np.fromiter([len(key) if key else 0 for key in keys], np.int64, n),
            facts=facts,
            customer=draft.customer,
            event_id=draft.event_id,
            reason=draft.reason,
            detail=draft.detail,
            raw={i: (keys[i], values[i]) for i in np.flatnonzero(draft.reason).tolist()},
            unconverted=sum(not draft.reason[i] for i in draft.unconverted),
        )

    def _parse(self, topic: int, values: list[bytes | None], sizes: IntArray) -> tuple[IntArray, list[Any]]:
        """Positions and structs of the records that the fast parser takes as they are."""
        decode = self._decoders[topic].decode
        events: list[Any] = []
        if len(values) and sizes.min() > 0 and sizes.max() <= self._max_bytes:
            together = b"\n".join(values)  # type: ignore[arg-type]  # no value is None: all sizes are above 0
            # One look at all bytes instead of one per record. With no more brackets than records, and each record an object,
            # none is nested deeper than the rest.
            if _is_utf8(together) and together.count(b"[") + together.count(b"{") < len(values) + MAX_DEPTH:
                try:
                    for value in values:
                        events.append(decode(value))  # type: ignore[arg-type]  # as above
                except (ValueError, RecursionError):
                    events.clear()
                else:
                    return np.arange(len(values)), events
        positions: list[int] = []
        for i, value in enumerate(values):
            if value and len(value) <= self._max_bytes and _is_utf8(value) and not too_deep(value):
                try:
                    events.append(decode(value))
                except (ValueError, RecursionError):
                    continue
                positions.append(i)
        return np.array(positions, np.int64), events

    def _columns(self, topic: int, positions: IntArray, events: list[Any], draft: _Draft) -> BoolArray:
        """Write the facts of `events`; returns which of them are beyond doubt. The others are left to the complete reader."""
        k = len(events)
        rows = np.zeros((k, WIDTH), np.int64)
        rows[:, OFFSET] = draft.facts[positions, OFFSET]
        rows[:, VALUE] = NONE
        rows[:, TIME] = _times_of([event.event_time for event in events])
        sound: BoolArray = rows[:, TIME] != UNSURE
        ids = [event.event_id for event in events]
        rows[:, ID] = digests(ids, self._id_keys[topic])
        rows[:, KIND] = [KINDS[event.kind] for event in events]
        if topic == 0:
            sound &= self._money(events, rows, positions, draft)
            texts = [[e.product or "" for e in events], [e.method or "" for e in events], [e.channel or "" for e in events]]
        elif topic == 1:
            rows[:, VALUE] = [NONE if event.duration_ms is None else event.duration_ms for event in events]
            texts = [
                [e.device or "" for e in events],
                [e.session_id or "" for e in events],
                [e.feature or "" for e in events],
                [e.country or "" for e in events],
            ]
        elif topic == 2:
            rows[:, VALUE] = [NONE if event.wait_seconds is None else event.wait_seconds for event in events]
            rows[:, LEVEL] = [pack_ticket(_PRIORITY[event.priority], event.csat, event.nps) for event in events]
            texts = [[e.ticket_id or "" for e in events], [e.category or "" for e in events], [e.channel or "" for e in events]]
        else:
            signup = [NONE if e.signup_date is None else _day(e.signup_date, FIRST_SIGNUP) for e in events]
            ends = [None if e.contract_end is None else _day(e.contract_end, FIRST_CONTRACT_END) for e in events]
            rows[:, VALUE] = signup
            rows[:, LEVEL] = [pack_profile(end, e.consent) for end, e in zip(ends, events, strict=True)]
            sound &= (rows[:, VALUE] != _UNREADABLE) & np.array([end != _UNREADABLE for end in ends])
            texts = [
                [e.plan or "" for e in events],
                [e.segment or "" for e in events],
                [e.region or "" for e in events],
                [e.age_band or "" for e in events],
            ]
        for column, values in zip((A, B, C, D), texts, strict=False):
            rows[:, column] = digests(values, self._text_key)
        customers = [event.customer_id for event in events]
        if k == len(draft.customer) and sound.all():
            draft.facts[:] = rows
            draft.customer, draft.event_id = customers, ids
        else:
            draft.facts[positions[sound]] = rows[sound]
            for j in np.flatnonzero(sound).tolist():
                i = int(positions[j])
                draft.customer[i], draft.event_id[i] = customers[j], ids[j]
        return sound

    def _money(self, events: list[Any], rows: IntArray, positions: IntArray, draft: _Draft) -> BoolArray:
        raw = [event.amount for event in events]
        minor = amounts(raw, list(map(len, raw)), self._exponent)
        currencies = [event.currency for event in events]
        foreign = set(currencies) - {None, self._currency}
        if foreign:
            for j, currency in enumerate(currencies):
                if currency in foreign and minor[j] != NONE:
                    minor[j] = self._foreign(raw[j], currency) if _CURRENCY.fullmatch(currency) else UNSURE
                    if minor[j] == NONE:
                        draft.unconverted.add(int(positions[j]))
        rows[:, VALUE] = minor
        sound: BoolArray = minor != UNSURE
        if (minor == NONE).any():
            for j in np.flatnonzero(minor == NONE).tolist():
                event, currency = events[j], currencies[j]
                valued = len(raw[j]) > 0 and bytes(raw[j]) != b"null"
                sound[j] = (valued or event.kind not in AMOUNT_REQUIRED) and (currency is None or bool(_CURRENCY.fullmatch(currency)))
        return sound

    def _foreign(self, raw: msgspec.Raw, currency: str) -> int:
        """Minor units at the stated rate, NONE without one, UNSURE where the complete reader has to look."""
        text = bytes(raw).decode().strip('"')
        if not _AMOUNT.fullmatch(text):
            return UNSURE
        amount = number(text)
        if not amount.is_finite() or amount < 0:
            return UNSURE
        rate = self._rates.get(currency)
        return NONE if rate is None else minor_units(amount, self._exponent, rate)

    def _judge(self, topic: int, i: int, value: bytes | None, draft: _Draft) -> None:
        """The complete reader's verdict on one record."""
        try:
            event = read(topic, value, max_bytes=self._max_bytes)
        except Refused as refused:
            draft.refuse(i, refused.reason, refused.detail)
            return
        draft.facts[i] = self._fact(topic, event, i, draft)
        draft.customer[i], draft.event_id[i] = event.customer_id, event.event_id

    def _fact(self, topic: int, event: Event, i: int, draft: _Draft) -> IntArray:
        row = np.zeros(WIDTH, np.int64)
        row[TIME] = max(-_FAR, min(_FAR, event.event_time))
        row[OFFSET] = draft.facts[i, OFFSET]
        row[VALUE] = NONE
        texts: tuple[str | None, ...] = ()
        match event:
            case Transaction():
                row[KIND], texts = KINDS[event.kind], (event.product, event.method, event.channel)
                if event.amount is not None:
                    rate = Decimal(1) if event.currency in (None, self._currency) else self._rates.get(event.currency or "")
                    if rate is None:
                        draft.unconverted.add(i)
                    else:
                        row[VALUE] = minor_units(event.amount, self._exponent, rate)
            case Login():
                row[KIND], texts = KINDS[event.kind], (event.device, event.session_id, event.feature, event.country)
                row[VALUE] = NONE if event.duration_ms is None else event.duration_ms
            case SupportTicket():
                row[KIND], texts = KINDS[event.kind], (event.ticket_id, event.category, event.channel)
                row[VALUE] = NONE if event.wait_seconds is None else event.wait_seconds
                row[LEVEL] = pack_ticket(_PRIORITY[event.priority], event.csat, event.nps)
            case CustomerProfile():
                row[KIND], texts = PROFILE, (event.plan, event.segment, event.region, event.age_band)
                row[VALUE] = NONE if event.signup_date is None else days(event.signup_date)
                row[LEVEL] = pack_profile(None if event.contract_end is None else days(event.contract_end), event.consent)
        row[A : A + len(texts)] = digests([text or "" for text in texts], self._text_key)
        row[ID] = digests([event.event_id], self._id_keys[topic])[0]
        return row

    def _check(self, keys: list[bytes | None], append_ms: IntArray, draft: _Draft) -> None:
        """Refusals that need more than the record's value, for all records at once."""
        facts, reason = draft.facts, draft.reason
        encoded: list[bytes | None] = [customer.encode() for customer in draft.customer]
        if encoded != keys:
            for i, (expected, key) in enumerate(zip(encoded, keys, strict=True)):
                if expected != key and not reason[i]:
                    why = "the record has no key" if key is None else "the record key is not the customer_id"
                    draft.refuse(i, Reason.KEY_MISMATCH, why)
        time = facts[:, TIME]
        # Rare, so found by comparing columns and spelt out one by one.
        for i in np.flatnonzero((reason == 0) & (time < YEAR_2000_MS)).tolist():
            draft.refuse(i, Reason.BEFORE_2000, f"event_time {time[i]} ms is before 2000-01-01")
        ahead = (reason == 0) & (append_ms >= 0) & (time > append_ms + self._future_ms)
        for i in np.flatnonzero(ahead).tolist():
            draft.refuse(i, Reason.FUTURE, f"event_time {time[i]} ms is {time[i] - append_ms[i]} ms after the broker received it")
        if len(facts):
            money = (reason == 0) & (facts[:, KIND] < 8)
            for i in np.flatnonzero(money & (facts[:, VALUE] > MAX_AMOUNT_MINOR)).tolist():
                draft.refuse(i, Reason.AMOUNT_RANGE, f"amount above {MAX_AMOUNT_MINOR} minor units")
        for i in np.flatnonzero(reason).tolist():
            kept, offset = time[i] if abs(int(time[i])) < _FAR else NONE, facts[i, OFFSET]
            facts[i, :] = 0
            facts[i, TIME], facts[i, OFFSET], facts[i, VALUE] = kept, offset, NONE


def _is_utf8(value: bytes) -> bool:
    if value.isascii():
        return True
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _times_of(stated: list[int | str]) -> IntArray:
    """Epoch milliseconds of event times as parsed, shape (n,); UNSURE where the complete reader has to look."""
    kinds = set(map(type, stated))
    if kinds == {str}:
        return times(stated)  # type: ignore[arg-type]  # all of them are texts
    if kinds == {int}:
        try:
            return np.array(stated, np.int64)
        except OverflowError:
            pass
    out = times([value if isinstance(value, str) else "" for value in stated])
    for i, value in enumerate(stated):
        if isinstance(value, int):
            out[i] = max(-_FAR, min(_FAR, value))
    return out
