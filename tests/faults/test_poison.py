"""The campaign with hostile records: sound as things are, and red with a decoder that is not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from bench.faults import poison
from features.facts import TIME
from proto.errors import Reason
from streams.codec import Decoder, RawMessage, Records
from streams.fuzz import APPEND_MS

COUNT = 6_000


def test_every_hostile_record_is_scored_or_accounted_for() -> None:
    found = poison.piece(3, COUNT)
    assert found.failures(COUNT) == []
    assert found.checked >= COUNT // poison.CONTRACT
    assert {"not_json", "not_utf8", "nesting", "wrong_type", "missing_field", "not_finite", "key_mismatch", "too_late"} <= set(
        found.reasons
    )


def test_more_than_one_piece_in_processes_of_their_own() -> None:
    found = poison.pieces(poison.PIECE + 500, seed=4, jobs=1)
    assert found.failures(poison.PIECE + 500) == []


class Dropping(Decoder):
    """Mutant: what cannot be read is skipped."""

    def decode(self, topic: int, partition: int, messages: Sequence[RawMessage]) -> Records:
        kept = [message for message in messages if not super(Dropping, self).decode(topic, partition, [message]).reason[0]]
        return super().decode(topic, partition, kept or messages[-1:])


class Lenient(Decoder):
    """Mutant: a wrong type is taken as it is."""

    def decode(self, topic: int, partition: int, messages: Sequence[RawMessage]) -> Records:
        decoded = super().decode(topic, partition, messages)
        wrong = decoded.reason == Reason.WRONG_TYPE
        decoded.facts[wrong, TIME] = APPEND_MS
        return replace(decoded, reason=np.where(wrong, np.uint8(Reason.ACCEPTED), decoded.reason))


class Misnaming(Decoder):
    """Mutant: one reason for all."""

    def decode(self, topic: int, partition: int, messages: Sequence[RawMessage]) -> Records:
        decoded = super().decode(topic, partition, messages)
        return replace(decoded, reason=np.minimum(decoded.reason, np.uint8(Reason.NOT_JSON)))


class Slow(Decoder):
    """Mutant: a deep record holds it up."""

    def decode(self, topic: int, partition: int, messages: Sequence[RawMessage]) -> Records:
        end = time.thread_time() + 0.3 * any((message.value() or b"").count(b"[") > 9_000 for message in messages)
        while time.thread_time() < end:
            pass
        return super().decode(topic, partition, messages)


class Crashing(Decoder):
    """Mutant: half a surrogate pair is not expected."""

    def decode(self, topic: int, partition: int, messages: Sequence[RawMessage]) -> Records:
        for message in messages:
            if rb"\ud800" in (message.value() or b""):
                raise UnicodeError("half a pair")
        return super().decode(topic, partition, messages)


@pytest.mark.parametrize(
    ("mutant", "says"),
    [(Dropping, "neither scored nor accounted"), (Lenient, "not the contract's"), (Misnaming, "not the contract's"), (Slow, "took over")],
)
def test_a_decoder_that_is_not_sound_makes_it_red(mutant: type[Decoder], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "HANG_S", 0.25)
    broken = mutant(currency="EUR", rates={}, future_ms=300_000, max_bytes=1_000_000, digest_key=b"poison")
    found = poison.piece(3, 2_000, broken.decode)
    assert any(says in failure for failure in found.failures(2_000)), found.failures(2_000)


def test_a_decoder_that_raises_is_not_survived() -> None:
    broken = Crashing(currency="EUR", rates={}, future_ms=300_000, max_bytes=1_000_000, digest_key=b"poison")
    with pytest.raises(UnicodeError, match="half a pair"):
        poison.piece(3, COUNT, broken.decode)
