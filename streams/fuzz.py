"""Hostile records by seed: mutated valid events, random bytes and known traps of JSON, for every input topic."""

from __future__ import annotations

import gzip
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Final

import orjson

from features.facts import KINDS

APPEND_MS: Final = 1_750_000_000_000
"""Append time the fuzzed event times lie around; a real broker's clock is later, so nothing valid here is "future" there."""
_KINDS: Final = tuple(tuple(name for name, code in KINDS.items() if code >> 3 == topic) for topic in range(4))
_ODD_VALUES: Final[tuple[bytes, ...]] = (
    b"null", b"true", b"false", b"0", b"-0", b"-1", b"1.0", b"1e2", b"1e999", b"-1e999", b"1e-999", b"9223372036854775807",
    b"9223372036854775808", b"-9223372036854775809", b"1" * 400, b"1" * 5000, b"0." + b"3" * 500, b"NaN", b"Infinity", b"-Infinity",
    b'"NaN"', b'"-Infinity"', b'"1e999"', b'"12,50"', b'"1_000"', b'" 1 "', b'"\\u0031\\u0032"', b'"0x10"', b"0.005", b"0.015", b'"12.345"',
    b"01", b"1.", b".5", b"+1", b'""', b'"a"', b'"' + b"x" * 257 + b'"', b'"' + b"y" * 256 + b'"', b"[]", b"{}", b"[1,2]", b'{"a":1}',
    b'"\\ud800"', b'"\\udc00"', b'"\\ud83d\\ude00"', b'"\xf0\x9f\x98\x80"', b'"\xff"', b'"\xed\xa0\x80"', b'"\\u0000"', b'"a\nb"', b'"\\q"',
    b'"2025-02-29T00:00:00Z"', b'"2024-02-29T23:59:60Z"', b'"2016-12-31T23:59:60Z"', b'"2025-01-01T00:00:00"', b'"2025-01-01"',
    b'"2025-01-01T00:00:00.123456789+05:30"', b'"0000-01-01T00:00:00Z"', b'"9999-12-31T23:59:59-23:59"', b'"1999-12-31T23:59:59.999Z"',
    b'"2000-01-01t00:00:00z"', b'"2025-01-01T24:00:00Z"', b'"1750000000000"', b"946684799999", b"946684800000", b"1750000300001",
    b"1e15", b"1000000000000000", b"10000000000000.01", b'"JPY"', b'"eur"', b'"low"', b"6", b"11", b'"1970-01-01"', b'"1899-12-31"',
)  # fmt: skip
_WHOLE: Final[tuple[bytes, ...]] = (
    b"", b" ", b"\x00", b"null", b"[]", b'"text"', b"1", b"{}", b"{", b"}", b'{"a"', b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b"NaN",
    b"[" * 100_000, b'{"a":' * 10_000, b"[" * 10_000 + b"]" * 10_000, b'"' + b'\\"' * 50_000, b"[]" * 50_000, b"{}{}", b"{}\n{}", b"// {}",
)  # fmt: skip
_FIELDS: Final = (
    ("amount", "currency", "product", "method", "channel"),
    ("device", "country", "session_id", "feature", "duration_ms"),
    ("ticket_id", "category", "priority", "channel", "wait_seconds", "csat", "nps"),
    ("signup_date", "plan", "segment", "region", "age_band", "contract_end", "consent"),
)


@dataclass(frozen=True, slots=True)
class FuzzRecord:
    """One record for an input topic (index in features.facts.TOPICS)."""

    topic: int
    key: bytes | None
    value: bytes | None


def fuzz_records(seed: int, n: int, *, huge_bytes: int = 1_000_001) -> Iterator[FuzzRecord]:
    """`n` records, the same for the same seed: about a third of them valid. One in 5,000 has a value of `huge_bytes` bytes."""
    random = Random(seed)
    for i in range(n):
        topic = random.randrange(4)
        event = _event(random, topic, i)
        key: bytes | None = str(event["customer_id"]).encode()
        value: bytes | None = orjson.dumps(event)
        assert value is not None
        match random.randrange(16):
            case 0 | 1 | 2 | 12:
                pass
            case 3:  # a field of the contract with an odd value
                value = _put(value, random.choice((*_FIELDS[topic], "event_time", "kind")), random.choice(_ODD_VALUES))
            case 4:
                value = _put(value, random.choice(("event_id", "customer_id", "event_time", *_FIELDS[topic])), random.choice(_ODD_VALUES))
            case 5:  # a field nobody knows
                value = _put(value, "extra", random.choice(_ODD_VALUES))
            case 6:
                event.pop(random.choice(list(event)))
                value = orjson.dumps(event)
            case 7:  # bytes changed, removed, doubled
                value = _mutated(random, value)
            case 8:
                value = random.randbytes(random.choice((1, 7, 64, 300)))
            case 9:
                value = random.choice(_WHOLE) if random.randrange(20) == 0 else value[: random.randrange(len(value))]
            case 13:  # an event of another topic
                topic = (topic + random.randrange(1, 4)) % 4
            case 14:  # every field twice, in any order, one of them odd
                value = _doubled(random, event, topic)
            case 15:
                value = _foreign(random, value)
            case 10:
                key = random.choice((None, b"", b"other", key, b"\xff", b" " + (key or b"")))
            case _:
                depth = random.choice((1, 62, 63, 64, 65, 200)) if random.randrange(4) else 10_000
                opened, closed = random.choice(((b"[", b"]"), (b'{"k":', b"}")))
                value = _put(value, "extra", opened * depth + b"1" + closed * depth)
        if random.randrange(5_000) == 0:
            value = random.choice((None, b"x" * huge_bytes, _put(orjson.dumps(event), "extra", b'"' + b"x" * huge_bytes + b'"')))
        yield FuzzRecord(topic, key, value)


def _event(random: Random, topic: int, i: int) -> dict[str, Any]:
    time_ms = APPEND_MS - random.randrange(10**10)
    event: dict[str, Any] = {
        "event_id": f"f{i}",
        "customer_id": random.choice(("0042", "Ünal", "c1", f"c{random.randrange(1_000)}")),
        "kind": random.choice(_KINDS[topic]),
        "event_time": time_ms if random.random() < 0.5 else _rfc3339(random, time_ms),
    }
    whole: dict[str, Any] = {
        "amount": random.choice((12.5, 0, "99.995", 10**6)),
        "currency": random.choice(("EUR", "USD", "CHF", None)),
        "duration_ms": random.randrange(10**6),
        "priority": random.choice(("low", "normal", "high", "urgent", None)),
        "wait_seconds": random.randrange(10**4),
        "csat": random.randint(1, 5),
        "nps": random.randint(0, 10),
        "signup_date": "2020-02-29",
        "contract_end": "2030-01-01",
        "consent": random.choice((True, False, None)),
    }
    for name in _FIELDS[topic]:
        if name == "amount" or random.random() < 0.7:
            event[name] = whole.get(name, f"{name[:3]}{random.randrange(20)}")
    return event


def _rfc3339(random: Random, ms: int) -> str:
    from datetime import UTC, datetime, timedelta, timezone

    zone = timezone(timedelta(minutes=random.randrange(-1_000, 1_000)))
    moment = datetime.fromtimestamp(ms // 1000, UTC).astimezone(zone)
    return moment.isoformat() if random.random() < 0.5 else f"{moment:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}{moment.isoformat()[-6:]}"


def _put(value: bytes, name: str, raw: bytes) -> bytes:
    """The object with one more field at its end: of a key given twice the last one counts."""
    return value[:-1] + b',"' + name.encode() + b'":' + raw + b"}"


def _doubled(random: Random, event: dict[str, Any], topic: int) -> bytes:
    pairs = [b"%b:%b" % (orjson.dumps(name), orjson.dumps(content)) for name, content in event.items() for _ in range(2)]
    odd = random.choice(("event_id", "customer_id", "event_time", "kind", *_FIELDS[topic]))
    pairs.append(b'"%b":%b' % (odd.encode(), random.choice(_ODD_VALUES)))
    random.shuffle(pairs)
    return b"{" + b",".join(pairs) + b"}"


def _foreign(random: Random, value: bytes) -> bytes:
    """The event in another coat, or among more than an event needs."""
    text = value.decode()
    match random.randrange(12):
        case 0:
            return gzip.compress(value, mtime=0)
        case 1:
            return text.encode(random.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
        case 2:
            return b64encode(value)
        case 3:
            return b"\n".join((value, value))
        case 4:
            return b"[" + value + b"]"
        case 5:
            return orjson.dumps(text)  # JSON in a JSON text
        case 6:
            # as Avro behind a registry, protobuf, pickle and msgpack begin
            return random.choice((b"\x00\x00\x00\x00\x01", b"\x08\x01\x12", b"\x80\x04\x95", b"\x82\xa8event_id")) + value
        case 7:
            return value.replace(b'"', random.choice((b"'", b"\xe2\x80\x9c", b'\\"')))
        case 8:  # escapes: half pairs and whole ones, inside texts that count
            escape = random.choice((b"\\ud800", b"\\udfff", b"\\ud83d\\ude00", b"\\ude00\\ud83d", b"\\u0000", b"\\u202e", b"e\\u0301"))
            return value.replace(b'"c', b'"' + escape + b"c", 1)
        case 9:
            at = random.choice(
                (2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 946_684_800_000, APPEND_MS + 300_000)
            )
            return _put(value, "event_time", b"%d" % (at + random.randrange(-1, 2)))
        case 10:
            extra = b",".join(b'"k%d":%d' % (number, number) for number in range(random.choice((1, 100, 3_000))))
            return b"{" + extra + b"," + value[1:]
        case _:
            space = random.choice((b" ", b"\t\r\n", b"\xc2\xa0", b"\x0c", b"/**/")) * random.choice((1, 1_000))
            return value.replace(b":", b":" + space)


def _mutated(random: Random, value: bytes) -> bytes:
    changed = bytearray(value)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed))
        match random.randrange(4):
            case 0:
                changed[at] = random.randrange(256)
            case 1:
                changed[at] ^= 1 << random.randrange(8)
            case 2:
                del changed[at : at + random.randint(1, 8)]
            case _:
                changed[at:at] = changed[at : at + random.randint(1, 20)]
        if not changed:
            changed = bytearray(b"{")
    return bytes(changed)
