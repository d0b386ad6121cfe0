"""Bytes to facts: what is checked, in which order, and that the compiled readers say what the plain ones say."""

from __future__ import annotations

import random
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from features.facts import ID, KIND, KINDS, LEVEL, NONE, OFFSET, TIME, VALUE, A, B, C, D, pack_profile, pack_ticket
from features.texts import SATURATED, UNSURE, amounts, digests, key_of, times
from proto.errors import BadUsage, Reason
from proto.events import epoch_ms
from streams.codec import Decoder, Records, minor_units

NOW = 1_700_000_000_000
UINT64 = np.uint64


class Message:
    def __init__(self, value: bytes | None, key: bytes | None, offset: int = 0, append_ms: int = NOW) -> None:
        self._it = value, key, offset, append_ms

    def value(self) -> bytes | None:
        return self._it[0]

    def key(self) -> bytes | None:
        return self._it[1]

    def offset(self) -> int:
        return self._it[2]

    def timestamp(self) -> tuple[int, int]:
        return 2, self._it[3]


def decoder(currency: str = "EUR", **rates: str) -> Decoder:
    rated = {code: Decimal(rate) for code, rate in rates.items()}
    return Decoder(currency=currency, rates=rated, future_ms=300_000, max_bytes=1_000_000, digest_key=b"key")


def decode(topic: int, *events: dict[str, Any], by: Decoder | None = None, append_ms: int = NOW) -> Records:
    base = {"event_id": "e", "customer_id": "c", "event_time": NOW}
    messages = []
    for i, event in enumerate(events):
        whole = base | event
        messages.append(Message(orjson.dumps(whole), str(whole["customer_id"]).encode(), i, append_ms))
    return (by or decoder()).decode(topic, 3, messages)


def value_of(amount: object, currency: str | None = None, by: Decoder | None = None) -> tuple[int, Reason]:
    records = decode(0, {"kind": "payment", "amount": amount, "currency": currency}, by=by)
    return int(records.facts[0, VALUE]), Reason(records.reason[0])


# --- facts


def test_each_topic_becomes_its_columns() -> None:
    by = decoder()
    text = key_of(b"key", "text")

    def of(*words: str) -> list[int]:
        return [int(d) for d in digests(list(words), text)]

    (payment,) = decode(0, {"kind": "refund", "amount": "1.005", "product": "p", "method": "card", "channel": "web"}, by=by).facts
    assert payment[[TIME, OFFSET, KIND, VALUE, LEVEL]].tolist() == [NOW, 0, KINDS["refund"], 100, 0]
    assert payment[[A, B, C, D]].tolist() == of("p", "card", "web", "")
    (login,) = decode(1, {"kind": "feature_use", "device": "d", "session_id": "s", "feature": "f", "country": "DE", "duration_ms": 7}).facts
    assert login[[KIND, VALUE, A, B, C, D]].tolist() == [KINDS["feature_use"], 7, *of("d", "s", "f", "DE")]
    (ticket,) = decode(
        2, {"kind": "satisfaction", "ticket_id": "t", "category": "c", "channel": "mail", "priority": "high", "nps": 0}
    ).facts
    assert ticket[[VALUE, LEVEL, A, B, C, D]].tolist() == [NONE, pack_ticket(3, None, 0), *of("t", "c", "mail", "")]
    profile = {
        "kind": "profile",
        "signup_date": "1970-01-11",
        "contract_end": "1970-01-21",
        "consent": True,
        "plan": "p",
        "age_band": "30-39",
    }
    (row,) = decode(3, profile).facts
    assert row[[KIND, VALUE, LEVEL, A, B, C, D]].tolist() == [KINDS["profile"], 10, pack_profile(20, True), *of("p", "", "", "30-39")]


def test_the_same_event_id_is_another_id_on_another_topic() -> None:
    ids = [int(decode(t, {"kind": k, "amount": 1}).facts[0, ID]) for t, k in enumerate(("payment", "login", "opened", "profile"))]
    assert len(set(ids)) == 4
    assert all(ids)


def test_leading_zeros_and_unicode_survive_in_ids() -> None:
    records = decode(1, {"kind": "login", "customer_id": "00042", "event_id": "Ä\u0000"}, {"kind": "login", "customer_id": "42"})
    assert records.customer == ["00042", "42"]
    assert records.event_id == ["Ä\u0000", "e"]
    assert not records.reason.any()


def test_good_records_stay_good_beside_bad_ones() -> None:
    good = orjson.dumps({"event_id": "e", "customer_id": "c", "event_time": NOW, "kind": "login", "device": "d"})
    bad: list[bytes | None] = [None, b"", b"{", b"\xff", b"[" * 5_000, b"{}", b'{"a":"' + b"x" * 1_000_000 + b'"}']
    records = decoder().decode(1, 0, [Message(value, b"c", i) for i, value in enumerate([good, *bad, good])])
    assert [Reason(r) for r in records.reason] == [
        Reason.ACCEPTED, Reason.EMPTY, Reason.EMPTY, Reason.NOT_JSON, Reason.NOT_UTF8, Reason.NESTING, Reason.MISSING_FIELD,
        Reason.TOO_LARGE, Reason.ACCEPTED,
    ]  # fmt: skip
    first, last = records.facts[0].copy(), records.facts[-1].copy()
    assert (first[OFFSET], last[OFFSET]) == (0, 8)
    first[OFFSET] = last[OFFSET] = 0
    assert first.tolist() == last.tolist() == decode(1, {"kind": "login", "device": "d"}).facts[0].tolist()
    assert records.raw[3] == (b"c", b"{")
    assert records.size.tolist()[:2] == [len(good) + 1, 1]


# --- order of checks


def test_key_mismatch_comes_before_time_and_time_before_amount() -> None:
    def reason(key: bytes | None, event_time: object, amount: object) -> Reason:
        event = {"event_id": "e", "customer_id": "c", "kind": "payment", "event_time": event_time, "amount": amount}
        return Reason(decoder().decode(0, 0, [Message(orjson.dumps(event), key)]).reason[0])

    assert reason(b"x", 0, 1e30) is Reason.KEY_MISMATCH
    assert reason(None, NOW, 1) is Reason.KEY_MISMATCH
    assert reason(b"c", 0, 1e30) is Reason.BEFORE_2000
    assert reason(b"c", NOW + 300_001, 1e30) is Reason.FUTURE
    assert reason(b"c", NOW + 300_000, 1e30) is Reason.AMOUNT_RANGE
    assert reason(b"c", 2**62, 1) is Reason.FUTURE


@pytest.mark.parametrize(
    ("event_time", "reason"),
    [
        (946_684_799_999, Reason.BEFORE_2000),
        (946_684_800_000, Reason.ACCEPTED),
        ("1999-12-31T23:59:59.9999Z", Reason.BEFORE_2000),
        ("2000-01-01T00:00:00+00:00", Reason.ACCEPTED),
        (-(10**30), Reason.BEFORE_2000),
        (10**30, Reason.FUTURE),
    ],
)
def test_edges_of_time(event_time: object, reason: Reason) -> None:
    # orjson writes no integer beyond 64 bits.
    stated = f'"{event_time}"' if isinstance(event_time, str) else str(event_time)
    value = '{"event_id":"e","customer_id":"c","kind":"login","event_time":' + stated + "}"
    records = decoder().decode(1, 0, [Message(value.encode(), b"c")])
    assert Reason(records.reason[0]) is reason
    assert (records.facts[0, TIME] == NONE) == (abs(event_time) > 2**62 if isinstance(event_time, int) else False)


def test_without_an_append_time_nothing_is_future() -> None:
    assert not decode(1, {"kind": "login", "event_time": NOW * 2}, append_ms=-1).reason.any()


# --- money


@pytest.mark.parametrize(
    ("amount", "minor"),
    [
        (0.005, 0),
        (0.015, 2),
        ("0.025", 2),
        ("0.0250000000000000000000000001", 3),
        (12, 1200),
        ("1e2", 10_000),
        (1e13, 10**15),
        ("-0.0", 0),
        ("1e-400", 0),
    ],
)
def test_amounts_round_half_even_from_the_decimal_text(amount: object, minor: int) -> None:
    assert value_of(amount) == (minor, Reason.ACCEPTED)


def test_amounts_beyond_ten_to_the_fifteen_minor_units_are_refused() -> None:
    assert value_of("10000000000000.005")[1] is Reason.ACCEPTED  # rounds to 10**15
    assert value_of("10000000000000.006")[1] is Reason.AMOUNT_RANGE
    assert value_of("1e300")[1] is Reason.AMOUNT_RANGE
    assert value_of(10**17)[1] is Reason.AMOUNT_RANGE


@pytest.mark.parametrize(("currency", "minor"), [("JPY", 2), ("EUR", 150), ("KWD", 1500), ("CLF", 15_000)])
def test_minor_units_follow_iso_4217(currency: str, minor: int) -> None:
    assert value_of("1.5", by=decoder(currency)) == (minor, Reason.ACCEPTED)


def test_another_currency_is_converted_by_its_rate_or_only_counted() -> None:
    by = decoder("EUR", USD="0.92")
    assert value_of("10.005", "USD", by)[0] == 920  # 9.2046
    assert value_of("10", "EUR", by)[0] == 1_000
    records = decode(0, {"kind": "payment", "amount": 1, "currency": "CHF"}, {"kind": "payment", "amount": 1, "currency": "USD"}, by=by)
    assert records.facts[:, VALUE].tolist() == [NONE, 92]
    assert records.unconverted == 1
    assert value_of("-1", "CHF", by)[1] is Reason.WRONG_TYPE
    assert value_of("1e999", "CHF", by)[1] is Reason.NOT_FINITE


def test_a_currency_that_is_none_is_bad_usage() -> None:
    with pytest.raises(BadUsage, match="ISO 4217"):
        decoder("euro")


@given(st.decimals(min_value=0, max_value=10**13, allow_nan=False, allow_infinity=False), st.sampled_from([0, 2, 3, 4]))
@example(Decimal("0.5"), 0)
def test_minor_units_equal_the_plain_definition(amount: Decimal, exponent: int) -> None:
    expected = (
        (amount * 10**exponent).quantize(Decimal(1), ROUND_HALF_EVEN) if amount < 10**12 and len(amount.as_tuple().digits) < 20 else None
    )
    if expected is not None:
        assert minor_units(amount, exponent) == int(expected)


@given(st.from_regex(r"[0-9]{1,21}(\.[0-9]{1,30})?", fullmatch=True), st.sampled_from([0, 2, 3, 4]), st.booleans())
def test_the_compiled_reader_of_amounts_equals_the_exact_one(text: str, exponent: int, quoted: bool) -> None:
    raw = (f'"{text}"' if quoted else text).encode()
    assert int(amounts([raw], [len(raw)], exponent)[0]) == min(minor_units(Decimal(text), exponent), SATURATED)


@given(st.text('0123456789.-+eE "n', max_size=12))
def test_the_compiled_reader_leaves_whatever_is_not_plain(text: str) -> None:
    raw = text.encode()
    read = int(amounts([raw], [len(raw)], 2)[0])
    body = text[1:-1] if len(text) >= 2 and text[0] == text[-1] == '"' else text
    plain = body.replace(".", "", 1).isdigit() and body[0] != "." and body[-1] != "."
    assert (read not in (UNSURE, NONE)) == plain


# --- times


@given(st.datetimes(), st.integers(-1439, 1439), st.text("0123456789", max_size=9))
def test_the_compiled_reader_of_times_equals_the_plain_one(moment: Any, offset: int, fraction: str) -> None:
    sign, minutes = "-" if offset < 0 else "+", abs(offset)
    zone = "Z" if offset == 0 else f"{sign}{minutes // 60:02d}:{minutes % 60:02d}"
    text = f"{moment.isoformat(timespec='seconds')}{'.' + fraction if fraction else ''}{zone}"
    assert times([text, text]).tolist() == [epoch_ms(text)] * 2


@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_reader_never_accepts_a_time_the_plain_one_refuses(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(3_000):
        text = list("2024-02-29T23:59:58.120+01:30"[: rng.choice((19, 23, 29, 29, 29))] + rng.choice(("", "Z")))
        for _ in range(rng.randrange(3)):
            text[rng.randrange(len(text))] = rng.choice("0123456789-:TZ+. ٣")
        read = int(times(["".join(text)])[0])
        if read != UNSURE:
            assert read == epoch_ms("".join(text))


# --- digests


@pytest.mark.parametrize(
    ("length", "digest"),
    # Aumasson and Bernstein, SipHash: a fast short-input PRF: the paper's example (15 bytes) and the authors' published vectors.
    [
        (1, "fd67dc93c539f874"),
        (2, "5a4fa9d909806c0d"),
        (3, "2d7efbd796666785"),
        (7, "37d1018bf50002ab"),
        (8, "6224939a79f5f593"),
        (15, "e545be4961ca29a1"),
    ],
)
def test_digests_are_siphash_2_4(length: int, digest: str) -> None:
    key = np.frombuffer(bytes(range(16)), "<u8")
    text = bytes(range(length)).decode()
    assert digests(["x", text, ""], (key[0], key[1]))[1].tobytes().hex() == digest


def test_digests_depend_on_key_and_purpose_and_not_on_the_process() -> None:
    assert int(digests(["café"], key_of(b"a", "text"))[0]) == PINNED
    assert len({int(digests(["café"], key_of(secret, purpose))[0]) for secret in (b"a", b"b") for purpose in ("text", "id logins")}) == 4
    assert digests(["", "é", "a", "é"], key_of(b"a", "text")).tolist()[0] == 0


PINNED = 8219871893395011652
