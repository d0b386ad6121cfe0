"""The Store on Redis: one function library (functions.lua) does every write; this side speaks, retries within a bound, and explains."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from typing import Any, Final, TypeVar

import orjson
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from features.facts import TOPICS
from features.redis_health import Health, ask, refusal
from features.redis_nodes import open_nodes
from features.store import (
    DIGEST_SIZE,
    LAYOUT,
    MAX_CUSTOMERS,
    MIGRATED,
    Apply,
    Claim,
    CustomerState,
    CustomerWrite,
    Intent,
    Offsets,
    Standing,
    broken,
    check,
    check_size,
    chunk_missing,
    damage,
    digests,
    fenced,
    gone,
    list_damaged,
    not_rebuilding,
    rebuild_went_back,
    rebuilding,
    unknown_format,
)
from proto.errors import ChainBroken, ChurnError, Fenced, InvariantBroken, StoreUnavailable

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Command = tuple[str | bytes | int, ...]

# Answers of the functions (functions.lua).
DONE: Final = 1
REPEATED: Final = 0
FENCED: Final = -1
BROKEN: Final = -2
UNKNOWN_FORMAT: Final = -3
REBUILDING: Final = -4
LIST_DAMAGED: Final = -5
TO_MIGRATE: Final = -6
WENT_BACK: Final = -7

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 1.0

_REFUSED_LOGIN: Final = (AuthenticationError, AuthorizationError, NoPermissionError)
_PASSING: Final = (
    ConnectionError,
    TimeoutError,
    BusyLoadingError,
    ReadOnlyError,  # a replica just demoted; its successor answers soon
    ClusterDownError,
    TryAgainError,
    AskError,  # a slot under way to another node; MOVED is one too
    OutOfMemoryError,
)
_PASSING_TEXTS: Final = ("MISCONF", "NOREPLICAS", "BUSY ", "UNBLOCKED")
_MOVING_TEXTS: Final = ("during rehashing of the slot", "access a non local key")
"""What a function is told that reads a customer's keys while their slot is half here and half on another node."""
_COUNTER: Final = b"count:"
_APPLIED: Final = b"applied:"
_SCAN: Final = 1_000
_SCANS: Final = 10


def library(text: str | None = None) -> tuple[str, str]:
    """The function library with its version filled in, and that version: a digest of the text. text: another one, for tests."""
    if text is None:
        text = files("features").joinpath("functions.lua").read_text("utf-8")
    version = blake2b(text.encode(), digest_size=8).hexdigest()
    return text.replace("@VERSION@", version), version


@dataclass(frozen=True, slots=True)
class Size:
    """What one customer takes: bytes of its values, and bytes of the server's memory for all its keys."""

    customer: str
    value_bytes: int
    memory_bytes: int
    keys: int


@dataclass(frozen=True, slots=True)
class Seen:
    """Customers of a partition and where it stands, of one moment. fresh: no batch was ever applied here."""

    partition: int
    applied: Offsets
    watermark_ms: int
    rebuilding: bool
    fresh: bool
    states: Sequence[CustomerState | None]


class RedisStore:
    """State of partitions on one Redis server or on a Redis Cluster. Not for several threads at once.

    url: see `open_nodes`. timeout_s bounds one try; what may pass (no answer, a full disk or memory, a failover) is tried
    again for patience_s, with pauses that double from 0.05 s to 1 s. oldest: see `redis_health.refusal`. library_text replaces
    functions.lua, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "churn",
        timeout_s: float = 3.0,
        patience_s: float = 6.0,
        oldest: str = "",
        library_text: str | None = None,
    ) -> None:
        self._namespace = namespace
        self._restored: dict[int, int] = {}  # parts of the rebuild under way
        self._patience_s = patience_s
        self._library, self._version = library(library_text)
        self._nodes = open_nodes(url, timeout_s=timeout_s)
        self._oldest, self._trusted = oldest, False

    # -- the protocol

    def claim(self, partition: int, nonce: str) -> Claim:
        """As in Store. The first claim looks at the servers first and raises ChurnError for one that must not hold state."""
        if not self._trusted:
            self._trust()
        command = self._function("claim", self._own(partition), nonce, LAYOUT, *MIGRATED)
        answer = self._call(partition, *command)
        if answer[0] == TO_MIGRATE:
            self._migrate(partition, nonce, answer[1])
            answer = self._call(partition, *command)
        if answer[0] == UNKNOWN_FORMAT:
            raise unknown_format(partition, answer[1].decode())
        if answer[0] == TO_MIGRATE:
            raise InvariantBroken(f"partition {partition}: still of format {answer[1].decode()} after its migration")
        return _claim(partition, answer)

    def look(self, partition: int) -> Claim:
        """Where the partition stands, without claiming it; the nonce is its owner's, "" when nobody's."""
        return _claim(partition, self._call(partition, *self._function("look", self._own(partition), read_only=True)))

    def standings(self, partitions: Sequence[int]) -> list[Standing]:
        """Where partitions stand: one round trip, and cheap whatever they hold."""
        fields = (b"owner", b"customers", *(_APPLIED + name.encode() for name in TOPICS))
        commands: list[tuple[int, Command]] = []
        for partition in partitions:
            meta, who, _ = self._own(partition)
            commands += [(partition, ("HMGET", meta, *fields)), (partition, ("STRLEN", who))]
        answers = iter(self._call_all(commands))
        found = []
        for answer, listed in zip(answers, answers, strict=True):
            owner, counted, *applied = _raised(answer)
            offsets = {name: -1 if offset is None else int(offset) for name, offset in zip(TOPICS, applied, strict=True)}
            found.append(Standing((owner or b"").decode(), offsets, _raised(listed) == DIGEST_SIZE * int(counted or 0)))
        return found

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        """As in Store."""
        offsets = [part for topic, offset in former.items() for part in (topic, str(offset))]
        answer = self._call(partition, *self._function("intend", self._own(partition)[:2], nonce, _intent_text(intent), *offsets))
        _accept(_batch_refusal(answer, partition, former))

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        """As in Store, 1,000 customers a call; each call sees one moment."""
        parts = [customers[first : first + MAX_CUSTOMERS] for first in range(0, len(customers), MAX_CUSTOMERS)]
        if not parts:
            return []
        prefixes = (self._prefix(partition, b"c"), self._prefix(partition, b"f"))
        meta = self._own(partition)[:1]
        answers = self._call_all([(partition, self._function("load", meta, *prefixes, *map(_key, part), read_only=True)) for part in parts])
        found = [state for answer in answers for state in _raised(answer)]
        return [_state(partition, customer, state) for customer, state in zip(customers, found, strict=True)]

    def lookup(self, asked: Sequence[tuple[int, Sequence[str]]]) -> list[Seen]:
        """Customers by partition (at most 1,000 each), for reading only: in one round trip, each partition of one moment.

        Raises StateDamaged for a missing chunk, ChainBroken for state of another format.
        """
        commands: list[tuple[int, Command]] = []
        for partition, customers in asked:
            prefixes = (self._prefix(partition, b"c"), self._prefix(partition, b"f"))
            meta = self._own(partition)[:1]
            commands.append((partition, self._function("lookup", meta, *prefixes, *map(_key, customers), read_only=True)))
        answers = self._call_all(commands)
        return [_seen(*one, _raised(answer)) for one, answer in zip(asked, answers, strict=True)]

    def apply(self, batches: Sequence[Apply]) -> None:
        """As in Store, in one round trip. Every batch is tried; the first refusal is raised after all answers are in."""
        for batch in batches:
            check(batch)
        answers = self._call_all([(batch.partition, self._apply_command(batch)) for batch in batches])
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if failures:
            raise self._failure(failures[0])
        refusals = [_batch_refusal(answer, batch.partition, batch.former) for batch, answer in zip(batches, answers, strict=True)]
        for refused in refusals:
            _accept(refused)

    def release(self, partition: int, nonce: str) -> None:
        """As in Store."""
        self._call(partition, *self._function("release", self._own(partition)[:1], nonce))

    def begin_rebuild(self, partition: int, nonce: str) -> None:
        """As in Store."""
        own = self._own(partition)
        _accept(_rebuild_refusal(self._call(partition, *self._function("begin_rebuild", own, nonce)), partition))
        self._restored[partition] = 0
        for _ in range(_SCANS):  # a server restarted under a scan may leave keys out: one that finds nothing says that nothing is left
            found = False
            for keys in self._scan(partition, self._start(partition)):
                others = [key for key in keys if key not in own]
                if others:
                    found = True
                    answer = self._call(partition, *self._function("clear", (own[0], *others), nonce))
                    _accept(_rebuild_refusal(answer, partition))
            if not found:
                return
        raise InvariantBroken(f"partition {partition}: its keys are there again after {_SCANS} removals")

    def restore(self, partition: int, nonce: str, customers: Sequence[CustomerWrite]) -> None:
        """As in Store."""
        check_size(partition, customers)
        prefix, facts = self._prefix(partition, b"c"), self._prefix(partition, b"f")
        names = [_key(write.customer) for write in customers]
        mains = [prefix + name for name in names]
        chunks = [facts + name + b":%d" % number for name, write in zip(names, customers, strict=True) for number, _ in write.chunks]
        dropped = [facts + name + b":%d" % number for name, write in zip(names, customers, strict=True) for number in write.dropped]
        command = self._function(
            "restore",
            (*self._own(partition)[:2], *mains, *chunks, *dropped),
            nonce,
            str(len(mains)),
            str(len(chunks)),
            digests(write.customer for write in customers),
            str(self._restored.get(partition, 0)),
            *(write.main for write in customers),
            *(chunk for write in customers for _, chunk in write.chunks),
        )
        _accept(_rebuild_refusal(self._call(partition, *command), partition))
        self._restored[partition] = self._restored.get(partition, 0) + 1

    def finish_rebuild(
        self,
        partition: int,
        nonce: str,
        applied: Offsets,
        model: str,
        watermark_ms: int,
        counters: Mapping[str, int],
        intent: Intent | None = None,
    ) -> None:
        """As in Store."""
        offsets = [part for topic, offset in applied.items() for part in (topic, str(offset))]
        counts = [part for name, count in counters.items() for part in (_COUNTER + name.encode(), str(count))]
        command = self._function(
            "finish_rebuild",
            self._own(partition)[:2],
            nonce,
            "" if intent is None else _intent_text(intent),
            model,
            str(watermark_ms),
            str(len(applied)),
            str(len(counters)),
            str(self._restored.get(partition, 0)),
            *offsets,
            *counts,
        )
        _accept(_rebuild_refusal(self._call(partition, *command), partition))

    def close(self) -> None:
        """Close the connections."""
        self._nodes.close()

    # -- around it

    def load_functions(self) -> None:
        """Put our function library on the server, beside those of other versions. Raises StoreUnavailable when the user may not."""
        try:
            self._patiently(self._load_functions)
        except RedisError as error:
            raise self._failure(error) from error

    def health(self) -> list[Health]:
        """What each server that takes writes says of itself."""
        try:
            return self._patiently(lambda: [ask(client) for client in self._nodes.primaries()])
        except RedisError as error:
            raise self._failure(error) from error

    def customers(self, partition: int) -> Iterator[str]:
        """Every customer of the partition, in no order; one that comes or goes meanwhile may or may not be among them."""
        prefix = self._prefix(partition, b"c")
        seen: set[bytes] = set()  # SCAN may name a key twice
        for keys in self._scan(partition, prefix):
            for key in keys:
                if key not in seen:
                    seen.add(key)
                    yield key[len(prefix) :].decode("utf-8", "surrogatepass")

    def sizes(self, partition: int, customers: Sequence[str] | None = None) -> list[Size]:
        """Bytes of customers (all of them when not named), for figures: a round trip of several commands per 1,000 customers."""
        names = list(self.customers(partition)) if customers is None else list(customers)
        sizes = []
        for first in range(0, len(names), MAX_CUSTOMERS):
            part = names[first : first + MAX_CUSTOMERS]
            states = self.load(partition, part)
            keys = [self._keys(partition, name, state) for name, state in zip(part, states, strict=True)]
            asked: list[tuple[int, Command]] = [(partition, ("MEMORY", "USAGE", key, "SAMPLES", 0)) for of_one in keys for key in of_one]
            memory = iter(self._call_all(asked))
            for name, state, of_one in zip(part, states, keys, strict=True):
                if state is not None:
                    values = len(state.main) + sum(map(len, state.chunks))
                    sizes.append(Size(name, values, sum(_raised(next(memory)) or 0 for _ in of_one), len(of_one)))
        return sizes

    # -- keys

    def _own(self, partition: int) -> tuple[bytes, bytes, bytes]:
        """Keys of the partition itself: meta, list of customers, outbox."""
        start = self._start(partition)
        return start + b"meta", start + b"who", start + b"outbox"

    def _start(self, partition: int) -> bytes:
        return f"{self._namespace}:{{{partition}}}:".encode()

    def _prefix(self, partition: int, what: bytes) -> bytes:
        return self._start(partition) + what + b":"

    def _keys(self, partition: int, customer: str, state: CustomerState | None) -> list[bytes]:
        if state is None:
            return []
        first = int.from_bytes(state.main[4:8], "little")
        chunk = self._prefix(partition, b"f") + _key(customer) + b":%d"
        return [self._prefix(partition, b"c") + _key(customer), *(chunk % (first + i) for i in range(len(state.chunks)))]

    def _function(self, name: str, keys: Sequence[bytes], *args: str | bytes, read_only: bool = False) -> Command:
        return ("FCALL_RO" if read_only else "FCALL", f"churn_{name}_{self._version}", len(keys), *keys, *args)

    def _apply_command(self, batch: Apply) -> Command:
        prefix, facts = self._prefix(batch.partition, b"c"), self._prefix(batch.partition, b"f")
        keys: list[bytes] = []
        values: list[bytes] = []
        dropped: list[bytes] = []
        new: list[str] = []
        for write in batch.customers:
            name = _key(write.customer)
            keys.append(prefix + name)
            values.append(write.main)
            if write.chunks:
                keys += [facts + name + b":%d" % number for number, _ in write.chunks]
                values += [chunk for _, chunk in write.chunks]
            if write.dropped:
                dropped += [facts + name + b":%d" % number for number in write.dropped]
            if write.new:
                new.append(write.customer)
        offsets = [part for topic, former in batch.former.items() for part in (topic, str(former), str(batch.to[topic]))]
        counters = [part for name, count in batch.counters.items() for part in (_COUNTER + name.encode(), str(count))]
        return self._function(
            "apply",
            (*self._own(batch.partition), *keys, *dropped),
            batch.nonce,
            batch.model,
            str(batch.watermark_ms),
            digests(new),
            batch.outbox,
            str(len(batch.former)),
            str(len(batch.counters)),
            str(len(values)),
            *offsets,
            *counters,
            *values,
        )

    # -- the wire

    def _migrate(self, partition: int, nonce: str, found: bytes) -> None:
        """Format 1 -> 2: a list of customers, in the order of their digests. Nobody writes meanwhile: the former nonce is gone."""
        listed = b"".join(sorted(digests([customer]) for customer in self.customers(partition)))
        answer = self._call(partition, *self._function("migrate", self._own(partition)[:2], nonce, found, LAYOUT, listed))
        _accept(_rebuild_refusal(answer, partition))

    def _call(self, partition: int, *command: str | bytes | int) -> Any:
        return _raised(self._call_all([(partition, command)])[0])

    def _call_all(self, commands: Sequence[tuple[int, Command]]) -> list[Any]:
        """Answers to commands, each about one partition; one the server refuses for good comes as an exception in its place.

        Everything is sent again when an answer fails to come, so every command must be safe to repeat: ours are.
        """

        def send() -> list[Any]:
            answers: list[Any] = [None] * len(commands)
            by_node: dict[Any, list[int]] = {}
            for position, (partition, _) in enumerate(commands):
                by_node.setdefault(self._nodes.of(self._own(partition)[0]), []).append(position)
            for client, positions in by_node.items():
                pipeline = client.pipeline(transaction=False)
                for position in positions:
                    pipeline.execute_command(*commands[position][1])
                for position, answer in zip(positions, pipeline.execute(raise_on_error=False), strict=True):
                    if isinstance(answer, Exception) and (_passes(answer) or isinstance(answer, _REFUSED_LOGIN) or _no_function(answer)):
                        raise answer
                    answers[position] = answer
            return answers

        try:
            try:
                return self._patiently(send)
            except ResponseError as error:
                if not _no_function(error):
                    raise
            # A new server, or one that came back empty. Whether it still has our state is for the functions to say.
            self._trust()
            self._patiently(self._load_functions)
            return self._patiently(send)
        except RedisError as error:
            raise self._failure(error) from error

    def _trust(self) -> None:
        for health in self.health():
            if reason := refusal(health, self._oldest):
                raise ChurnError(f"Redis at {health.address}: {reason}")
            if not health.version:
                log.warning("Redis at %s does not say its version to this user; grant +info", health.address)
        self._trusted = True

    def _load_functions(self) -> None:
        for client in self._nodes.primaries():
            client.execute_command("FUNCTION", "LOAD", "REPLACE", self._library)

    def _patiently(self, send: Callable[[], Answer]) -> Answer:
        """What `send` answers, tried again while its errors are of those that pass."""
        pause_s, began = FIRST_PAUSE_S, time.monotonic()
        waiting = False
        while True:
            try:
                answer = send()
            except RedisError as error:
                self._nodes.forget()
                strange = isinstance(error, AskError) and not self._nodes.many
                if strange or not _passes(error) or time.monotonic() + pause_s - began > self._patience_s:
                    raise
                if not waiting:
                    log.warning("Redis at %s: %s; trying again for %g s", self._nodes.address, error, self._patience_s)
                    waiting = True
            else:
                if waiting:
                    log.warning("Redis at %s answers again after %.1f s", self._nodes.address, time.monotonic() - began)
                return answer
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _scan(self, partition: int, prefix: bytes) -> Iterator[list[bytes]]:
        """Keys that begin with the prefix, some at a time; one may come twice."""
        cursor = 0
        while True:
            answer = self._call(partition, "SCAN", cursor, "MATCH", prefix + b"*", "COUNT", _SCAN)
            cursor = int(answer[0])
            yield answer[1]
            if cursor == 0:
                return

    def _failure(self, error: Exception) -> Exception:
        """What an error of the client means to ours. The address never carries the password."""
        where = f"Redis at {self._nodes.address}"
        if isinstance(error, _REFUSED_LOGIN):
            return StoreUnavailable(f"{where} refuses this user: {error}")
        if isinstance(error, MovedError):
            return StoreUnavailable(f"{where} is a node of a Redis Cluster: use redis+cluster:// or rediss+cluster://")
        if _passes(error):
            return StoreUnavailable(f"{where} did not answer within {self._patience_s:g} s: {error}")
        return InvariantBroken(f"{where} answered with an error nobody expects: {error}")


def redis_bytes(store: RedisStore, partitions: Sequence[int]) -> dict[str, float]:
    """Figures over all customers of some partitions: how many, and median and p99 of value and of memory bytes."""
    sizes = [size for partition in partitions for size in store.sizes(partition)]
    if not sizes:
        return {"customers": 0}
    values, memory = sorted(size.value_bytes for size in sizes), sorted(size.memory_bytes for size in sizes)

    def at(ordered: Sequence[int], percent: int) -> int:
        return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]

    return {
        "customers": len(sizes),
        "keys_mean": sum(size.keys for size in sizes) / len(sizes),
        "value_bytes_p50": at(values, 50),
        "value_bytes_p99": at(values, 99),
        "value_bytes_mean": sum(values) / len(sizes),
        "memory_bytes_p50": at(memory, 50),
        "memory_bytes_p99": at(memory, 99),
        "memory_bytes_mean": sum(memory) / len(sizes),
    }


def _key(customer: str) -> bytes:
    # A customer id from JSON may hold a lone surrogate; it stays itself.
    return customer.encode("utf-8", "surrogatepass")


def _raised(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise InvariantBroken(f"Redis answered with an error nobody expects: {answer}") from answer
    return answer


def _no_function(error: Exception) -> bool:
    return isinstance(error, ResponseError) and "Function not found" in str(error)


def _passes(error: Exception) -> bool:
    if isinstance(error, _REFUSED_LOGIN):
        return False
    if isinstance(error, _PASSING):
        return True
    text = str(error)
    return isinstance(error, ResponseError) and (text.startswith(_PASSING_TEXTS) or any(moving in text for moving in _MOVING_TEXTS))


def _batch_refusal(answer: Any, partition: int, former: Offsets) -> Fenced | ChainBroken | None:
    if answer in (DONE, REPEATED):
        return None
    if answer[0] == BROKEN:
        return broken(partition, former, dict(zip(former, map(int, answer[1:]), strict=True)))
    if answer[0] == REBUILDING:
        return rebuilding(partition)
    return _refusal(answer, partition)


def _rebuild_refusal(answer: Any, partition: int) -> Fenced | ChainBroken | None:
    if answer in (DONE, REPEATED):
        return None
    if answer[0] == BROKEN:
        return gone(partition)
    if answer[0] == REBUILDING:
        return not_rebuilding(partition)
    if answer[0] == UNKNOWN_FORMAT:
        return unknown_format(partition, answer[1].decode())
    return _refusal(answer, partition)


def _refusal(answer: Any, partition: int) -> Fenced | ChainBroken:
    if answer[0] == FENCED:
        return fenced(partition)
    if answer[0] == LIST_DAMAGED:
        return list_damaged(partition)
    if answer[0] == WENT_BACK:
        return rebuild_went_back(partition)
    raise InvariantBroken(f"partition {partition}: the store answered {answer!r}")


def _accept(refusal: Exception | None) -> None:
    if refusal is not None:
        raise refusal


def _intent_text(intent: Intent) -> bytes:
    said: dict[str, Any] = {"to": dict(intent.to), "model": intent.model, "scored_at_ms": intent.scored_at_ms}
    if intent.tick_ms >= 0:
        said["tick_ms"] = intent.tick_ms
    if intent.attempts > 1:
        said |= {"attempts": intent.attempts, "trying": intent.trying, "given_up": intent.given_up}
    return orjson.dumps(said)


def _claim(partition: int, answer: Sequence[Any]) -> Claim:
    pairs, customers, outbox = answer
    fields: Mapping[bytes, bytes] = dict(zip(pairs[::2], pairs[1::2], strict=True))
    applied = {name[len(_APPLIED) :].decode(): int(value) for name, value in fields.items() if name.startswith(_APPLIED)}
    text = fields.get(b"intent")
    intent = None
    if text is not None:
        said = orjson.loads(text)
        trying, given_up = said.get("trying"), said.get("given_up", ())
        intent = Intent(
            said["to"],
            said["model"],
            said["scored_at_ms"],
            said.get("attempts", 1),
            None if trying is None else tuple(trying),
            tuple((topic, offset) for topic, offset in given_up),
            said.get("tick_ms", -1),
        )
    fresh, under_way = not applied, b"rebuilding" in fields
    counted, outbox_counted = int(fields.get(b"customers", 0)), int(fields.get(b"outbox", 0))
    return Claim(
        partition=partition,
        nonce=fields.get(b"owner", b"").decode(),
        epoch=int(fields.get(b"epoch", 0)),
        applied=dict.fromkeys(TOPICS, -1) | applied,
        intent=intent,
        model=fields.get(b"model", b"").decode(),
        watermark_ms=int(fields.get(b"watermark", -1)),
        counters={name[len(_COUNTER) :].decode(): int(value) for name, value in fields.items() if name.startswith(_COUNTER)},
        customers=customers,
        outbox=outbox,
        fresh=fresh,
        damaged=damage(fresh, under_way, counted, len(customers), outbox_counted, len(outbox)),
        rebuilding=under_way,
    )


def _state(partition: int, customer: str, answer: Any) -> CustomerState | None:
    if answer is None:
        return None
    if isinstance(answer, bytes):
        return CustomerState(answer, ())
    main, *chunks = answer
    if None in chunks:
        raise chunk_missing(partition, customer)
    return CustomerState(main, tuple(chunks))


def _seen(partition: int, customers: Sequence[str], answer: Any) -> Seen:
    pairs, states = answer
    fields: Mapping[bytes, bytes] = dict(zip(pairs[::2], pairs[1::2], strict=True))
    found = fields.get(b"format", LAYOUT.encode()).decode()
    if found != LAYOUT and found not in MIGRATED:
        raise unknown_format(partition, found)
    applied = {name: int(fields.get(_APPLIED + name.encode(), -1)) for name in TOPICS}
    return Seen(
        partition,
        applied,
        int(fields.get(b"watermark", -1)),
        b"rebuilding" in fields,
        not any(name.startswith(_APPLIED) for name in fields),
        [_state(partition, customer, state) for customer, state in zip(customers, states, strict=True)],
    )
