"""The contract of events, in examples; tests/streams/test_codec.py holds the fast decoder to it."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import Reason
from proto.events import MAX_DEPTH, MODELS, Refused, Transaction, epoch_ms, read, too_deep

PAYMENT: dict[str, Any] = {"event_id": "e1", "customer_id": "007", "kind": "payment", "event_time": 1_700_000_000_000, "amount": 12.5}


def payment(**fields: Any) -> bytes:
    return orjson.dumps(PAYMENT | fields)


def verdict(topic: int, value: bytes | None, **options: int) -> Reason:
    try:
        read(topic, value, **options)
    except Refused as refused:
        return refused.reason
    return Reason.ACCEPTED


def test_a_payment_is_read_with_its_defaults() -> None:
    event = read(0, payment(unknown={"ignored": [1]}))
    assert isinstance(event, Transaction)
    assert (event.customer_id, event.amount, event.currency, event.product) == ("007", Decimal("12.5"), None, None)


@pytest.mark.parametrize("required", ["event_id", "customer_id", "kind", "event_time", "amount"])
def test_a_missing_field_is_named(required: str) -> None:
    fields = {name: value for name, value in PAYMENT.items() if name != required}
    with pytest.raises(Refused, match=required) as refused:
        read(0, orjson.dumps(fields))
    assert refused.value.reason is Reason.MISSING_FIELD


@pytest.mark.parametrize("kind", ["failed_payment", "upgrade", "downgrade", "cancellation"])
def test_some_kinds_need_no_amount(kind: str) -> None:
    assert verdict(0, payment(kind=kind, amount=None)) is Reason.ACCEPTED


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"customer_id": 7}, Reason.WRONG_TYPE),
        ({"customer_id": ""}, Reason.WRONG_TYPE),
        ({"customer_id": "x" * 257}, Reason.WRONG_TYPE),
        ({"kind": "login"}, Reason.WRONG_TYPE),
        ({"kind": None}, Reason.WRONG_TYPE),
        ({"event_time": "2024-01-01T00:00:00"}, Reason.WRONG_TYPE),
        ({"event_time": "1700000000000"}, Reason.WRONG_TYPE),
        ({"event_time": 1.7e12 + 0.5}, Reason.WRONG_TYPE),
        ({"event_time": True}, Reason.WRONG_TYPE),
        ({"amount": True}, Reason.WRONG_TYPE),
        ({"amount": -1}, Reason.WRONG_TYPE),
        ({"amount": "1,5"}, Reason.WRONG_TYPE),
        ({"amount": "NaN"}, Reason.NOT_FINITE),
        ({"amount": "-Infinity"}, Reason.NOT_FINITE),
        ({"currency": "euro"}, Reason.WRONG_TYPE),
        ({"product": 5}, Reason.WRONG_TYPE),
        ({"customer_id": "x" * 256, "product": "é" * 256, "amount": "-0.00", "currency": "JPY"}, Reason.ACCEPTED),
        ({"amount": "1e2"}, Reason.ACCEPTED),
        # the first reason in the stated order wins
        ({"customer_id": 7, "amount": "NaN"}, Reason.WRONG_TYPE),
    ],
)
def test_verdicts_on_fields(fields: dict[str, Any], reason: Reason) -> None:
    assert verdict(0, payment(**fields)) is reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, Reason.EMPTY),
        (b"", Reason.EMPTY),
        (b" ", Reason.NOT_JSON),
        (b"\xff", Reason.NOT_UTF8),
        (payment(extra="x").replace(b'"x"', b'"\xff"'), Reason.NOT_UTF8),
        (payment(extra="x").replace(b'"x"', b'"\\udc00"'), Reason.NOT_JSON),
        (payment(extra="x").replace(b'"x"', b"NaN"), Reason.NOT_FINITE),
        (payment(amount=0).replace(b'"amount":0', b'"amount":1e999'), Reason.NOT_FINITE),
        (payment(amount=0).replace(b'"amount":0', b'"amount":' + b"9" * 5_000), Reason.NOT_FINITE),
        (b"\xef\xbb\xbf" + payment(), Reason.NOT_JSON),
        ("{}".encode("utf-16"), Reason.NOT_UTF8),
        (b"[" * 10_000 + b"]" * 10_000, Reason.NESTING),
        (b"[" * 64 + b"]" * 64, Reason.WRONG_TYPE),
        (b"null", Reason.WRONG_TYPE),
        (b"{}", Reason.MISSING_FIELD),
        (b'{"event_id":1,' + payment()[1:], Reason.ACCEPTED),  # of a key given twice the last one counts
    ],
)
def test_verdicts_on_bytes(value: bytes | None, reason: Reason) -> None:
    assert verdict(0, value) is reason


def test_size_is_looked_at_before_anything_else() -> None:
    assert verdict(0, b"\xff" * 1_000_001) is Reason.TOO_LARGE
    assert verdict(0, b"\xff" * 1_000_000) is Reason.NOT_UTF8
    assert verdict(0, payment(), max_bytes=20) is Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("topic", "fields", "reason"),
    [
        (1, {"kind": "login", "duration_ms": 0}, Reason.ACCEPTED),
        (1, {"kind": "login", "duration_ms": -1}, Reason.WRONG_TYPE),
        (1, {"kind": "login", "duration_ms": 1.0}, Reason.WRONG_TYPE),
        (2, {"kind": "satisfaction", "csat": 5, "nps": 10}, Reason.ACCEPTED),
        (2, {"kind": "satisfaction", "csat": 0}, Reason.WRONG_TYPE),
        (2, {"kind": "satisfaction", "csat": True}, Reason.WRONG_TYPE),
        (2, {"kind": "satisfaction", "nps": 11}, Reason.WRONG_TYPE),
        (2, {"kind": "opened", "priority": "critical"}, Reason.WRONG_TYPE),
        (3, {"kind": "profile", "signup_date": "2020-02-29", "contract_end": "2030-01-01", "consent": False}, Reason.ACCEPTED),
        (3, {"signup_date": None}, Reason.ACCEPTED),
        (3, {"kind": "profile", "signup_date": "2021-02-29"}, Reason.WRONG_TYPE),
        (3, {"kind": "profile", "signup_date": "20200229"}, Reason.WRONG_TYPE),
        (3, {"kind": "profile", "signup_date": "1899-12-31"}, Reason.WRONG_TYPE),
        (3, {"kind": "profile", "contract_end": "1970-01-01"}, Reason.WRONG_TYPE),
        (3, {"kind": "profile", "consent": "yes"}, Reason.WRONG_TYPE),
    ],
)
def test_verdicts_by_topic(topic: int, fields: dict[str, Any], reason: Reason) -> None:
    base = {"event_id": "e", "customer_id": "c", "event_time": 1_700_000_000_000}
    assert verdict(topic, orjson.dumps(base | fields)) is reason


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01t00:00:00.0019z", 1),
        ("1970-01-01 01:00:00+01:00", 0),
        ("1969-12-31T23:59:59.9999Z", -1),
        ("2016-12-31T23:59:60Z", 1_483_228_800_000),
        ("2017-01-01T00:59:60.5+01:00", 1_483_228_800_500),
        ("0000-03-01T00:00:00Z", -62_162_035_200_000),
        ("9999-12-31T23:59:59-23:59", 253_402_387_139_000),
    ],
)
def test_times(text: str, ms: int) -> None:
    assert epoch_ms(text) == ms


@pytest.mark.parametrize(
    "text",
    ["2024-01-01T00:00:00", "2024-01-01", "2024-02-30T00:00:00Z", "2024-01-01T24:00:00Z", "2024-01-01T12:00:60Z", "2024-01-01T00:00:00.Z",
     "2024-01-01T00:00:00+24:00", "2024-01-01T00:00:00+0100", "\uff12024-01-01T00:00:00Z", "2024-01-01T00:00:00Z\n", "2024-1-1T00:00:00Z"],
)  # fmt: skip
def test_texts_that_are_no_time(text: str) -> None:
    with pytest.raises(ValueError):
        epoch_ms(text)


@given(
    st.recursive(
        st.just(0), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text('a[]{}\\"', max_size=3), inner, max_size=2)
    )
)
def test_depth_is_that_of_the_parsed_value(value: Any) -> None:
    def depth(inner: Any) -> int:
        below = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else None
        return 0 if below is None else 1 + max(map(depth, below), default=0)

    # Brackets in a text beside it force the exact count.
    pad = "[" * (MAX_DEPTH + 1)
    deep: Any = value
    for _ in range(MAX_DEPTH - 1 - depth(value)):
        deep = [deep]
    assert not too_deep(orjson.dumps([pad, deep]))
    assert too_deep(orjson.dumps([pad, [deep]]))


def test_every_topic_has_its_model_in_the_order_of_the_topic_index() -> None:
    assert [model.__name__ for model in MODELS] == ["Transaction", "Login", "SupportTicket", "CustomerProfile"]
