"""Hostile records by the million through the decoder and the engine: each is scored or accounted for, nothing crashes, nothing hangs.

    churnstream-faults poison [--count 1000000] [--seed 1] [--worker 100000] [--json]

In pieces of 20,000 (streams/fuzz.py, by seed) the records are decoded, merged and taken through the real engine on a store in
memory; every tenth verdict is compared with the contract's (proto.events.read). A process that dies and a piece that does not
return are counted. `--worker` more go through real topics and a real worker (bench/fuzz.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from multiprocessing import get_context
from typing import Any, Final

import orjson

from features.facts import TOPICS
from features.memory_store import MemoryStore
from proto.errors import Reason
from proto.events import Refused, read
from scoring.fallback import Fallback
from streams.codec import Decoder, RawMessage, Records
from streams.engine import Engine, EngineSettings
from streams.fuzz import APPEND_MS, FuzzRecord, fuzz_records
from streams.merge import Merge, Slice
from streams.metrics import Metrics
from streams.scores import Model

PIECE: Final = 20_000
SLICE: Final = 500
"""Records of one topic decoded at once, as one fetch would bring them."""
BATCH: Final = 250
"""Records taken through the engine at once: few, so that one that takes too long shows."""
CONTRACT: Final = 10
"""Every so many-th record is read by the contract too."""
HUGE_BYTES: Final = 10_000_000
HANG_S: Final = 1.0
PIECE_TIMEOUT_S: Final = 600.0
"""A piece that waits for something takes no CPU time; this ends it."""
LATER: Final = frozenset({Reason.ACCEPTED, Reason.KEY_MISMATCH, Reason.BEFORE_2000, Reason.FUTURE, Reason.AMOUNT_RANGE})
"""Verdicts on a value that keeps the contract: what else is wrong with the record."""

Decode = Callable[[int, int, Sequence[RawMessage]], Records]


@dataclass(frozen=True, slots=True)
class Message:
    """A fuzzed record as the consumer would give it."""

    record: FuzzRecord
    place: int

    def value(self) -> bytes | None:
        return self.record.value

    def key(self) -> bytes | None:
        return self.record.key

    def offset(self) -> int:
        return self.place

    def timestamp(self) -> tuple[int, int]:
        return 2, APPEND_MS


@dataclass(slots=True)
class Outputs:
    """A sink that keeps the source of everything it is given, and compares the bytes of dead letters with the originals."""

    originals: dict[tuple[str, int], FuzzRecord]
    scored: Counter[tuple[str, int]] = field(default_factory=Counter)
    set_aside: Counter[tuple[str, int]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    altered: int = 0

    def scores(self, partition: int, records: list[dict[str, Any]]) -> None:
        self.scored.update(self._source(record) for record in records)

    def dead_letters(self, partition: int, records: list[dict[str, Any]]) -> None:
        from streams.dead_letter import original

        for record in records:
            letter = orjson.loads(record["value"])
            source = letter["source"]["topic"], letter["source"]["offset"]
            self.set_aside[source] += 1
            self.reasons[letter["reason"]] += 1
            sent = self.originals[source]
            self.altered += (original(letter["key"]), original(letter["value"])) != (sent.key, sent.value)

    def alerts(self, partition: int, records: list[dict[str, Any]]) -> None:
        """None can come: the fallback has no bands."""

    def features(self, partition: int, records: list[dict[str, Any]]) -> None:
        """None can come: the feature log is off."""

    def flush(self) -> None:
        """Nothing waits."""

    def _source(self, record: dict[str, Any]) -> tuple[str, int]:
        source = orjson.loads(record["value"])["source"]
        return source["topic"], source["offset"]


class Shelf:
    """No model: every score is a fallback."""

    def __init__(self) -> None:
        self._fallback = Fallback(0.5)

    def current(self) -> Model:
        return self._fallback

    def by_digest(self, digest: str) -> Model:
        return self._fallback


@dataclass(slots=True)
class Found:
    """What pieces came to. slowest_s: CPU seconds of the longest call of the decoder or the engine; hangs: calls above HANG_S."""

    records: int = 0
    scores: int = 0
    dead_letters: int = 0
    duplicates: int = 0
    profile_facts: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    unaccounted: int = 0
    twice: int = 0
    altered: int = 0
    checked: int = 0
    disagreements: list[str] = field(default_factory=list)
    hangs: int = 0
    slowest_s: float = 0.0
    crashes: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Take in another piece."""
        for name in (
            "records",
            "scores",
            "dead_letters",
            "duplicates",
            "profile_facts",
            "unaccounted",
            "twice",
            "altered",
            "checked",
            "hangs",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.reasons.update(other.reasons)
        self.disagreements += other.disagreements
        self.crashes += other.crashes
        self.slowest_s = max(self.slowest_s, other.slowest_s)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """One call of the decoder or the engine, in CPU seconds: what others do on the machine is no hang of ours."""
        begin = time.thread_time()
        yield
        took = time.thread_time() - begin
        self.slowest_s = max(self.slowest_s, took)
        self.hangs += took > HANG_S

    def failures(self, count: int) -> list[str]:
        """What was promised and did not hold."""
        return [
            text
            for text, bad in (
                (f"{len(self.crashes)} crashes, first: {self.crashes[0] if self.crashes else ''}", self.crashes),
                (f"{self.hangs} calls took over {HANG_S:g} s, the longest {self.slowest_s:.1f} s", self.hangs),
                (f"{self.unaccounted} records are neither scored nor accounted for", self.unaccounted),
                (f"{self.twice} records have two outputs", self.twice),
                (f"{self.altered} dead letters do not carry the bytes that came", self.altered),
                (
                    f"{len(self.disagreements)} verdicts are not the contract's: {self.disagreements[0] if self.disagreements else ''}",
                    self.disagreements,
                ),
                (f"{self.records} of {count} records were tried", self.records != count),
                ("not both scores and dead letters came", not (self.scores and self.dead_letters)),
            )
            if bad
        ]


def piece(seed: int, count: int, decode: Decode | None = None) -> Found:
    """`count` records of a seed through decoder and engine, accounted for one by one. decode: another decoder than the real one."""
    decode = decode or decoder().decode
    found = Found(records=count)
    topics: list[list[FuzzRecord]] = [[] for _ in TOPICS]
    for record in fuzz_records(seed, count, huge_bytes=HUGE_BYTES):
        topics[record.topic].append(record)
    outputs = Outputs({(TOPICS[i], offset): record for i, records in enumerate(topics) for offset, record in enumerate(records)})
    engine = Engine(EngineSettings(10**7, 3), MemoryStore(), Shelf(), outputs, lambda: APPEND_MS, Metrics())
    claim = engine.assign(0, "n")
    merge = Merge.of(claim)
    for index, records in enumerate(topics):
        merge.buffers[index].reach(0, len(records))
    readers = [_slices(index, records, decode, found) for index, records in enumerate(topics)]
    counters: Counter[str] = Counter()
    while not merge.caught_up:
        for index, reader in enumerate(readers):
            if merge.buffers[index].count < BATCH and (part := next(reader, None)) is not None:
                merge.buffers[index].add(part)
                merge.buffers[index].reach(int(part.messages[-1].offset()) + 1)
        batch = merge.take(BATCH)
        if batch is not None:
            with found.timed():
                counters.update(engine.process([batch]).counters)
    found.scores, found.dead_letters = sum(outputs.scored.values()), sum(outputs.set_aside.values())
    found.duplicates, found.profile_facts = counters["duplicates"], counters["profile_facts"]
    found.reasons = outputs.reasons
    found.unaccounted = abs(count - found.scores - found.dead_letters - found.duplicates - found.profile_facts) + sum(
        abs(left) for left in engine.residues().values()
    )
    found.twice = sum(n > 1 for n in (outputs.scored + outputs.set_aside).values())
    found.altered = outputs.altered
    return found


def decoder() -> Decoder:
    """The decoder of a deployment with a foreign currency."""
    return Decoder(currency="EUR", rates={"USD": Decimal("0.9")}, future_ms=300_000, max_bytes=1_000_000, digest_key=b"poison")


def _slices(topic: int, records: list[FuzzRecord], decode: Decode, found: Found) -> Iterator[Slice]:
    for start in range(0, len(records), SLICE):
        messages = [Message(record, start + i) for i, record in enumerate(records[start : start + SLICE])]
        with found.timed():
            decoded = decode(topic, 0, messages)
        for i in range(start % CONTRACT and CONTRACT - start % CONTRACT, len(decoded), CONTRACT):
            _compare(topic, messages[i].record, decoded, i, found)
        yield Slice(decoded, messages)


def _compare(topic: int, record: FuzzRecord, decoded: Records, i: int, found: Found) -> None:
    """One verdict against the contract's."""
    found.checked += 1
    reason = Reason(int(decoded.reason[i]))
    try:
        event = read(topic, record.value)
    except Refused as refused:
        agree = (reason, decoded.detail.get(i)) == (refused.reason, refused.detail)
        wanted = refused.reason.name
    else:
        agree = reason in LATER and (bool(reason) or (decoded.customer[i], decoded.event_id[i]) == (event.customer_id, event.event_id))
        wanted = "accepted"
    if not agree:
        found.disagreements.append(f"{TOPICS[topic]}: {reason.name}, contract {wanted}: {(record.value or b'')[:300]!r}")


def pieces(count: int, seed: int, jobs: int) -> Found:
    """All pieces in `jobs` processes. A process that dies ends the run: which piece it was is in `crashes`."""
    sizes = [min(PIECE, count - start) for start in range(0, count, PIECE)]
    total = Found()
    # spawn: a child of its own, with nothing inherited that could hide a crash
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {seed * 1_000_003 + number: pool.submit(piece, seed * 1_000_003 + number, size) for number, size in enumerate(sizes)}
        for number, (name, future) in enumerate(futures.items(), 1):
            try:
                total.add(future.result(PIECE_TIMEOUT_S))
            except TimeoutError:
                total.hangs += 1
                total.crashes.append(f"piece of seed {name} did not return within {PIECE_TIMEOUT_S:g} s")
                for process in pool._processes.values():  # they would be waited for
                    process.kill()
                break
            except BrokenProcessPool:
                total.crashes.append(f"a process died at or near the piece of seed {name}")
                break
            except Exception as error:
                total.crashes.append(f"piece of seed {name}: {type(error).__name__}: {error}")
            print(f"{number}/{len(sizes)} pieces, {total.records:,} records, {total.dead_letters:,} dead letters", file=sys.stderr)
    return total


def _report(total: Found, count: int, seed: int, worker: dict[str, Any] | None) -> int:
    failures = total.failures(count)
    if worker is not None:
        failures += [f"worker: {failure}" for failure in worker["failures"]]
    figures = {
        "records": total.records,
        "seed": seed,
        "crashes": len(total.crashes),
        "hangs_over_1_s": total.hangs,
        "slowest_call_cpu_ms": round(total.slowest_s * 1_000, 1),
        "unaccounted": total.unaccounted,
        "two_outputs": total.twice,
        "altered_dead_letters": total.altered,
        "scores": total.scores,
        "dead_letters": total.dead_letters,
        "duplicates": total.duplicates,
        "profile_facts": total.profile_facts,
        "by_reason": dict(total.reasons.most_common()),
        "contract_checked": total.checked,
        "contract_disagreements": len(total.disagreements),
        "worker": worker,
        "failures": failures,
    }
    print(json.dumps(figures), flush=True)
    return int(bool(failures))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its arguments."""
    parser.add_argument("--count", type=int, default=1_000_000, help="records through decoder and engine in process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", type=int, default=0, metavar="N", help="this many more through real topics and a real worker")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line (always so)")


def main(arguments: argparse.Namespace) -> int:
    """Run it; 1 when a promise did not hold."""
    total = pieces(arguments.count, arguments.seed, arguments.jobs)
    worker = None
    if arguments.worker:
        from bench.fuzz import measure

        worker = measure(arguments.worker, arguments.seed)
    return _report(total, arguments.count, arguments.seed, worker)
