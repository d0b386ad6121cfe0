"""Whatever arrives is accepted or has a reason; the fast decoder and the contract never disagree."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from random import Random
from time import process_time

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.facts import KIND, LEVEL, NONE, TIME, VALUE, pack_profile, pack_ticket
from proto.errors import Reason
from proto.events import MODELS, CustomerProfile, Event, Login, Refused, SupportTicket, Transaction, days, read
from streams.codec import Decoder, minor_units
from streams.fuzz import APPEND_MS, FuzzRecord, fuzz_records

PRIORITY = {None: 0, "low": 1, "normal": 2, "high": 3, "urgent": 4}
LATER = {Reason.ACCEPTED, Reason.KEY_MISMATCH, Reason.BEFORE_2000, Reason.FUTURE, Reason.AMOUNT_RANGE}
"""Verdicts on records whose value keeps the contract."""


class Message:
    def __init__(self, record: FuzzRecord, offset: int) -> None:
        self._record, self._offset = record, offset

    def value(self) -> bytes | None:
        return self._record.value

    def key(self) -> bytes | None:
        return self._record.key

    def offset(self) -> int:
        return self._offset

    def timestamp(self) -> tuple[int, int]:
        return 2, APPEND_MS


def decoder() -> Decoder:
    return Decoder(currency="EUR", rates={"USD": Decimal("0.9")}, future_ms=300_000, max_bytes=1_000_000, digest_key=b"k")


def contract(topic: int, value: bytes | None) -> Event | Refused:
    try:
        return read(topic, value)
    except Refused as refused:
        return refused


def expected_value(event: Event) -> tuple[int, int]:
    """VALUE and LEVEL, said again in the plainest words."""
    match event:
        case Transaction():
            rate = {None: Decimal(1), "EUR": Decimal(1), "USD": Decimal("0.9")}.get(event.currency)
            return (NONE if event.amount is None or rate is None else minor_units(event.amount, 2, rate)), 0
        case Login():
            return (NONE if event.duration_ms is None else event.duration_ms), 0
        case SupportTicket():
            level = pack_ticket(PRIORITY[event.priority], event.csat, event.nps)
            return (NONE if event.wait_seconds is None else event.wait_seconds), level
        case CustomerProfile():
            level = pack_profile(None if event.contract_end is None else days(event.contract_end), event.consent)
            return (NONE if event.signup_date is None else days(event.signup_date)), level
    raise AssertionError(type(event))


def check(records: list[FuzzRecord], batch: int) -> Counter[str]:
    """Decode in batches and compare each verdict and value with the contract's."""
    fast, seen = decoder(), Counter[str]()
    for topic in range(4):
        part = [record for record in records if record.topic == topic]
        for start in range(0, len(part), batch):
            chunk = part[start : start + batch]
            decoded = fast.decode(topic, 0, [Message(record, start + i) for i, record in enumerate(chunk)])
            assert decoded.offset.tolist() == list(range(start, start + len(chunk)))
            assert set(decoded.detail) == set(decoded.raw) == set(np.flatnonzero(decoded.reason).tolist())
            for i, record in enumerate(chunk):
                reason = Reason(decoded.reason[i])
                seen[reason.name] += 1
                if reason:
                    assert decoded.raw[i] == (record.key, record.value)
                event = contract(topic, record.value)
                if isinstance(event, Refused):
                    assert (reason, decoded.detail.get(i)) == (event.reason, event.detail), record
                    continue
                assert reason in LATER, (record, reason, decoded.detail.get(i))
                assert (decoded.customer[i], decoded.event_id[i]) == (event.customer_id, event.event_id)
                if reason is Reason.ACCEPTED:
                    fact = decoded.facts[i]
                    assert (fact[TIME], fact[VALUE], fact[LEVEL]) == (event.event_time, *expected_value(event)), record
                    assert fact[KIND] >> 3 == topic
    return seen


@pytest.mark.parametrize("seed", range(2))
def test_every_hostile_record_has_the_verdict_of_the_contract(seed: int) -> None:
    seen = check(list(fuzz_records(seed, 10_000, huge_bytes=1_000_001)), batch=500)
    assert sum(seen.values()) == 10_000
    assert seen["ACCEPTED"] > 2_500
    never_by_the_codec = {"TOO_LATE", "CRASH"}
    assert {reason.name for reason in Reason} - set(seen) <= never_by_the_codec, seen


def test_the_same_seed_gives_the_same_records() -> None:
    assert list(fuzz_records(7, 300)) == list(fuzz_records(7, 300)) != list(fuzz_records(8, 300))


def test_a_verdict_does_not_depend_on_its_batch() -> None:
    records = [record for record in fuzz_records(3, 3_000) if record.topic == 0]
    fast = decoder()
    messages = [Message(record, i) for i, record in enumerate(records)]
    whole = fast.decode(0, 0, messages)
    alone = [fast.decode(0, 0, [message]) for message in messages]
    assert np.array_equal(whole.facts, np.concatenate([one.facts for one in alone]))
    assert whole.reason.tolist() == [int(one.reason[0]) for one in alone]
    assert whole.unconverted == sum(one.unconverted for one in alone)


@pytest.mark.slow
def test_a_hundred_thousand_hostile_records_within_bounded_time() -> None:
    records = list(fuzz_records(11, 100_000, huge_bytes=1_000_001))
    fast, total, started = decoder(), 0, process_time()
    for topic in range(4):
        part = [Message(record, i) for i, record in enumerate(r for r in records if r.topic == topic)]
        for start in range(0, len(part), 1_000):
            decoded = fast.decode(topic, 0, part[start : start + 1_000])
            total += len(decoded)
            assert set(decoded.detail) == set(np.flatnonzero(decoded.reason).tolist())
    assert total == 100_000
    # Two thirds of them take the slow way; 0.6 ms each would be a flood that stops a worker.
    assert process_time() - started < 60


RAW = st.one_of(
    st.sampled_from(
        [b"null", b"true", b"1", b"-1", b"5", b"6", b"10", b"11", b'"low"', b'"EUR"', b'"2024-02-29"', b'"profile"', b'"login"']
    ),
    st.integers(-(2**70), 2**70).map(lambda i: str(i).encode()),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda f: repr(f).encode()),
    st.decimals(allow_nan=False, allow_infinity=False).map(lambda d: b'"%b"' % str(d).encode()),
    st.datetimes(timezones=st.timezones()).map(lambda t: b'"%b"' % t.isoformat().encode()),
    st.text(max_size=300).map(orjson.dumps),
    st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2)).map(
        orjson.dumps
    ),
)
NAMES = [sorted(model.model_fields) for model in MODELS]


@given(st.integers(0, 3), st.randoms(use_true_random=False), st.lists(st.tuples(st.integers(0, 20), RAW), max_size=4))
def test_any_fields_have_the_verdict_and_values_of_the_contract(topic: int, random: Random, changes: list[tuple[int, bytes]]) -> None:
    usable = (r for r in fuzz_records(random.randrange(2**32), 1_000) if r.topic == topic and r.value and r.value.endswith(b"}"))
    record = next(usable)
    body = record.value or b"{}"
    for index, raw in changes:
        body = body[:-1] + b',"%b":%b}' % (NAMES[topic][index % len(NAMES[topic])].encode(), raw)
    check([FuzzRecord(topic, record.key, body)], batch=1)
