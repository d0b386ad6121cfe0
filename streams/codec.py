"""Bytes to facts: every record is accepted as a row of integers or rejected with a reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from hashlib import blake2b
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from features.facts import (
    KINDS,
    MAX_AMOUNT_MINOR,
    NONE,
    PRIORITIES,
    PROFILE,
    WIDTH,
    YEAR_2000_MS,
    pack_profile,
    pack_ticket,
)
from proto.errors import Reason
from proto.events import MAX_TEXT, epoch_ms

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

ISO_EXPONENTS: Final = {
    **dict.fromkeys(
        ("BIF", "CLP", "DJF", "GNF", "ISK", "JPY", "KMF", "KRW", "PYG", "RWF", "UGX", "UYI", "VND", "VUV", "XAF", "XOF", "XPF"), 0
    ),
    **dict.fromkeys(["BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"], 3),
    **dict.fromkeys(["CLF", "UYW"], 4),
}
"""ISO 4217 minor-unit exponents that are not 2."""

INTERNED: Final = 200_000
"""Bound of remembered text digests (products, devices, ...) and customer keys."""
_INT64_MAX: Final = 2**63 - 1

_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT)]
_Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]


class RawMessage(Protocol):
    """The part of a Kafka message that is read; a confluent_kafka.Message is one."""

    def value(self) -> bytes | None: ...
    def key(self) -> bytes | str | None: ...
    def offset(self) -> int: ...
    def timestamp(self) -> tuple[int, int]: ...


class _Event(msgspec.Struct):
    event_id: _Id
    customer_id: _Id
    event_time: int | str


class _Transaction(_Event):
    kind: Literal["payment", "failed_payment", "refund", "renewal", "upgrade", "downgrade", "cancellation"]
    amount: Decimal | None = None
    currency: Annotated[str, msgspec.Meta(pattern=r"^[A-Z]{3}$")] | None = None
    product: _Text | None = None
    method: _Text | None = None
    channel: _Text | None = None


class _Login(_Event):
    kind: Literal["login", "failed_login", "logout", "feature_use", "page_view", "error", "outage", "slow_response"]
    device: _Text | None = None
    session_id: _Text | None = None
    feature: _Text | None = None
    country: _Text | None = None
    duration_ms: _Count | None = None


class _Ticket(_Event):
    kind: Literal["opened", "resolved", "reopened", "satisfaction"]
    ticket_id: _Text | None = None
    category: _Text | None = None
    channel: _Text | None = None
    priority: Literal["low", "normal", "high", "urgent"] | None = None
    wait_seconds: _Count | None = None
    csat: Annotated[int, msgspec.Meta(ge=1, le=5)] | None = None
    nps: Annotated[int, msgspec.Meta(ge=0, le=10)] | None = None


class _Profile(_Event):
    kind: Literal["profile"] = "profile"
    signup_date: _Text | None = None
    plan: _Text | None = None
    segment: _Text | None = None
    region: _Text | None = None
    age_band: _Text | None = None
    contract_end: _Text | None = None
    consent: bool | None = None


class Rejected(Exception):
    """One record cannot become a fact."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class Records:
    """Decoded records of one (topic, partition) in offset order; n of them.

    facts (n, WIDTH): of a rejected row only OFFSET holds, and TIME where it was readable (else NONE). customer, event_id: ""
    where unreadable. reason: proto.errors.Reason, 0 accepted; detail by position for the rejected ones.
    """

    topic: int
    partition: int
    append_ms: IntArray
    size: IntArray  # bytes of the value
    facts: IntArray
    customer: list[str]
    event_id: list[str]
    reason: ByteArray
    detail: dict[int, str] = field(default_factory=dict)

    @property
    def offset(self) -> IntArray:
        """Source offsets, shape (n,)."""
        offsets: IntArray = self.facts[:, 1]
        return offsets


_ISO_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)


def _day(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not _ISO_DAY.fullmatch(text):
        raise Rejected(Reason.WRONG_TYPE, f"{name}: must be a date as YYYY-MM-DD")
    try:
        return date.fromisoformat(text).toordinal() - 719_163
    except ValueError as error:
        raise Rejected(Reason.WRONG_TYPE, f"{name}: {error}") from error


class Digests:
    """64-bit keyed digests of texts, 0 standing for an absent one. Texts that recur are remembered, within a bound."""

    def __init__(self, key: bytes) -> None:
        self._keyed = blake2b(digest_size=8, key=blake2b(key, digest_size=32).digest())
        self._known: dict[str | None, int] = {None: 0, "": 0}

    def text(self, text: str | None) -> int:
        """Digest of an attribute's text."""
        known = self._known.get(text)
        if known is None:
            assert text is not None
            if len(self._known) >= INTERNED:
                self._known = {None: 0, "": 0}
            known = self._known[text] = self._of(text.encode("utf-8", "surrogatepass"))
        return known

    def of_topic(self, topic: int) -> Callable[[str], int]:
        """Digest of an event id, the topic mixed in."""
        keyed = self._keyed.copy()
        keyed.update(bytes([topic]))
        copy, from_bytes = keyed.copy, int.from_bytes

        def identify(event_id: str) -> int:
            state = copy()
            state.update(event_id.encode())
            return from_bytes(state.digest(), "little", signed=True) or 1

        return identify

    def _of(self, text: bytes) -> int:
        state = self._keyed.copy()
        state.update(text)
        return int.from_bytes(state.digest(), "little", signed=True) or 1


class Money:
    """Amounts to minor units of the account currency. Other currencies: by a stated rate, else None (counted only)."""

    def __init__(self, currency: str, rates: Mapping[str, Decimal]) -> None:
        exponent = ISO_EXPONENTS.get(currency, 2)
        self._minor = 10**exponent
        self._account = currency
        self._scales = {code: rate * self._minor for code, rate in rates.items()} | {currency: Decimal(self._minor)}
        self.unconverted = 0

    def minor(self, amount: Decimal | None, currency: str | None) -> int:
        """Minor units, half-even from the decimal text; NONE when there is no amount or no rate. Raises Rejected."""
        if amount is None:
            return NONE
        if not amount.is_finite():
            raise Rejected(Reason.NOT_FINITE, f"amount: {amount} is not a finite number")
        if amount < 0:
            raise Rejected(Reason.WRONG_TYPE, "amount: must not be negative, the sign comes from the kind")
        if amount.adjusted() > 18:
            raise Rejected(Reason.AMOUNT_RANGE, f"amount: above {MAX_AMOUNT_MINOR} minor units")
        scale = self._scales.get(currency or self._account)
        if scale is None:
            self.unconverted += 1
            return NONE
        # A tuple of digits keeps every digit of a long text: the product is exact, then rounded once.
        try:
            minor = int((_EXACT.multiply(amount, scale)).to_integral_value(ROUND_HALF_EVEN))
        except InvalidOperation as error:
            raise Rejected(Reason.AMOUNT_RANGE, "amount: too many digits") from error
        if minor > MAX_AMOUNT_MINOR:
            raise Rejected(Reason.AMOUNT_RANGE, f"amount: above {MAX_AMOUNT_MINOR} minor units")
        return minor


def _exact_context() -> Any:
    from decimal import Context, Inexact

    # 2,000 digits hold any amount that fits the field's bound; an inexact product would round twice, so it traps.
    return Context(prec=2_000, Emax=999_999, Emin=-999_999, traps=[InvalidOperation, Inexact])


_EXACT = _exact_context()


class Decoder:
    """Records of any input topic to columns. One thread at a time.

    currency: account currency; rates: units of it per unit of another; future_ms: allowance beyond the append time;
    max_bytes: largest value accepted; digest_key: key of the text digests.
    """

    def __init__(self, *, currency: str, rates: Mapping[str, Decimal], future_ms: int, max_bytes: int, digest_key: bytes) -> None:
        self._future_ms, self._max_bytes = future_ms, max_bytes
        self.money = Money(currency, rates)
        digests = Digests(digest_key)
        self._text = digests.text
        self._identify = [digests.of_topic(topic) for topic in range(4)]
        self._decode = [msgspec.json.Decoder(t).decode for t in (_Transaction, _Login, _Ticket, _Profile)]
        self._row = [self._transaction, self._login, self._ticket, self._profile]

    def decode(self, topic: int, partition: int, messages: Sequence[RawMessage]) -> Records:
        """Every message as a row, in the order given; a rejected one keeps its place, with a reason."""
        n = len(messages)
        decode, row, identify = self._decode[topic], self._row[topic], self._identify[topic]
        max_bytes, future_ms = self._max_bytes, self._future_ms
        customers, event_ids, rows = [""] * n, [""] * n, []
        sizes, appends = [0] * n, [0] * n
        rejected: dict[int, Rejected] = {}
        for i, message in enumerate(messages):
            value = message.value()
            offset = message.offset()
            append_ms = appends[i] = message.timestamp()[1]
            time = NONE
            try:
                if not value:
                    raise Rejected(Reason.EMPTY, "the record has no value")
                size = sizes[i] = len(value)
                if size > max_bytes:
                    raise Rejected(Reason.TOO_LARGE, f"{size} bytes, at most {max_bytes} are accepted")
                try:
                    if not value.isascii():
                        value.decode()
                    event = decode(value)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise _why(value, error) from None
                customer = event.customer_id
                event_time = event.event_time
                if isinstance(event_time, int):
                    time = event_time
                else:
                    try:
                        time = epoch_ms(event_time)
                    except (ValueError, OverflowError) as error:
                        raise Rejected(Reason.WRONG_TYPE, f"event_time: {error}") from None
                if time > _INT64_MAX or time < -_INT64_MAX:
                    time, beyond = NONE, time
                    raise Rejected(Reason.FUTURE if beyond > 0 else Reason.BEFORE_2000, "event_time: outside 64 bits")
                customers[i], event_ids[i] = customer, event.event_id
                key = message.key()
                if key != customer.encode() and key != customer:
                    raise Rejected(Reason.KEY_MISMATCH, "the record's key is not its customer_id")
                if time < YEAR_2000_MS:
                    raise Rejected(Reason.BEFORE_2000, "event_time: before the year 2000")
                if time > append_ms + future_ms:
                    raise Rejected(Reason.FUTURE, f"event_time: more than {future_ms} ms beyond the append time")
                kind, amount, level, a, b, c, d = row(event)
                rows.append((time, offset, kind, amount, level, a, b, c, d, identify(event.event_id)))
            except Rejected as why:
                rejected[i] = why
                rows.append((time, offset, 0, NONE, 0, 0, 0, 0, 0, 0))
        reason = np.zeros(n, np.uint8)
        for i, rejection in rejected.items():
            reason[i] = rejection.reason
        return Records(
            topic=topic,
            partition=partition,
            append_ms=np.array(appends, np.int64),
            size=np.array(sizes, np.int64),
            facts=np.array(rows, np.int64).reshape(n, WIDTH),
            customer=customers,
            event_id=event_ids,
            reason=reason,
            detail={i: rejection.detail for i, rejection in rejected.items()},
        )

    def _transaction(self, event: Any) -> tuple[int, ...]:
        text = self._text
        return (
            KINDS[event.kind],
            self.money.minor(event.amount, event.currency),
            0,
            text(event.product),
            text(event.method),
            text(event.channel),
            0,
        )

    def _login(self, event: Any) -> tuple[int, ...]:
        text = self._text
        duration = event.duration_ms
        return (
            KINDS[event.kind],
            NONE if duration is None else duration,
            0,
            text(event.device),
            text(event.session_id),
            text(event.feature),
            text(event.country),
        )

    def _ticket(self, event: Any) -> tuple[int, ...]:
        text = self._text
        wait, priority = event.wait_seconds, event.priority
        level = pack_ticket(PRIORITIES[priority] if priority else 0, event.csat, event.nps)
        return (
            KINDS[event.kind],
            NONE if wait is None else wait,
            level,
            text(event.ticket_id),
            text(event.category),
            text(event.channel),
            0,
        )

    def _profile(self, event: Any) -> tuple[int, ...]:
        text = self._text
        signup = _day(event.signup_date, "signup_date")
        end = _day(event.contract_end, "contract_end")
        if end is not None and end <= 0:
            raise Rejected(Reason.WRONG_TYPE, "contract_end: must lie after 1970-01-01")
        return (
            PROFILE,
            NONE if signup is None else signup,
            pack_profile(end, event.consent),
            text(event.plan),
            text(event.segment),
            text(event.region),
            text(event.age_band),
        )


def _why(value: bytes, error: Exception) -> Rejected:
    """The reason behind a failed decode; the slow path, for bad records only."""
    if isinstance(error, UnicodeDecodeError):
        return Rejected(Reason.NOT_UTF8, f"invalid UTF-8 at byte {error.start}")
    if isinstance(error, RecursionError):
        return Rejected(Reason.NESTING, "nested too deeply")
    text = str(error)
    if isinstance(error, msgspec.ValidationError):
        if "missing required field" in text:
            return Rejected(Reason.MISSING_FIELD, text)
        if "Invalid decimal" in text and re.search(rb'"amount"\s*:\s*"?[+-]?\d', value):
            return Rejected(Reason.NOT_FINITE, "amount: an exponent beyond any number")
        return Rejected(Reason.WRONG_TYPE, text)
    if re.search(rb"[:\[,]\s*-?(NaN|Infinity|inf|nan)\b", value):
        return Rejected(Reason.NOT_FINITE, "NaN or infinity where JSON has a number")
    return Rejected(Reason.NOT_JSON, text)
