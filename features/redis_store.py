"""The Store on Redis: one function library (functions.lua) does every write; this side speaks, retries within a bound, and explains."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.resources import files
from typing import Any, Final, TypeVar, cast

import orjson
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)
from redis.retry import Retry

from features.facts import TOPICS
from features.store import LAYOUT, MAX_CUSTOMERS, Apply, Claim, CustomerState, Intent, Offsets, check
from proto.errors import ChainBroken, Fenced, InvariantBroken, StateDamaged, StoreUnavailable

Answer = TypeVar("Answer")
Command = tuple[str | bytes | int, ...]

DONE: Final = 1
REPEATED: Final = 0
FENCED: Final = -1
BROKEN: Final = -2
UNKNOWN_FORMAT: Final = -3

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
    OutOfMemoryError,
)
_PASSING_TEXTS: Final = ("MISCONF", "NOREPLICAS", "BUSY ", "UNBLOCKED")
_COUNTER: Final = b"count:"
_APPLIED: Final = b"applied:"
_SCAN: Final = 1_000


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


class RedisStore:
    """State of partitions on one Redis server. Not for several threads at once.

    url: redis://, rediss:// or unix://, with user and password where there are any. timeout_s bounds one try, `attempts`
    the number of tries; the pauses between them double from 0.05 s to 1 s. library_text replaces functions.lua, for tests.
    """

    def __init__(
        self, url: str, *, namespace: str = "churn", timeout_s: float = 3.0, attempts: int = 10, library_text: str | None = None
    ) -> None:
        self._namespace = namespace
        self._attempts = max(1, attempts)
        self._library, self._version = library(library_text)
        # Any: the client's general calls carry no types.
        self._client: Any = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),  # ours, below: it knows which errors pass
            protocol=2,
            client_name="churnstream",
        )
        self._client.response_callbacks.clear()  # answers as the server gives them
        known = self._client.connection_pool.connection_kwargs
        self.address: str = known["path"] if "path" in known else f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"

    # -- the protocol

    def claim(self, partition: int, nonce: str) -> Claim:
        """As in Store. Loads the function library first when the server has none or another version."""
        meta = self._meta(partition)
        if self._version_there(meta) != self._version:
            self.load_functions()
        answer = self._call("FCALL", "churn_claim", 1, meta, nonce, LAYOUT)
        if answer and answer[0] == UNKNOWN_FORMAT:
            raise ChainBroken(
                f"partition {partition}: state format {answer[1].decode()} is not the one of this version and catalog ({LAYOUT}); "
                "use the version that wrote it, or rebuild from the input topics in another namespace"
            )
        return _claim(partition, answer)

    def look(self, partition: int) -> Claim:
        """Where the partition stands, without claiming it; the nonce is its owner's, "" when nobody's."""
        return _claim(partition, self._call("HGETALL", self._meta(partition)))

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        """As in Store."""
        text = orjson.dumps({"to": dict(intent.to), "model": intent.model, "scored_at_ms": intent.scored_at_ms})
        offsets = [part for topic, offset in former.items() for part in (topic, str(offset))]
        answer = self._call("FCALL", "churn_intend", 1, self._meta(partition), nonce, text, *offsets)
        refusal = _refusal(answer, partition, former)
        if refusal is not None:
            raise refusal

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        """As in Store, 1,000 customers a call; each call sees one moment."""
        parts = [customers[first : first + MAX_CUSTOMERS] for first in range(0, len(customers), MAX_CUSTOMERS)]
        if not parts:
            return []
        prefixes = (self._prefix(partition, b"c"), self._prefix(partition, b"f"))
        answers = self._call_all(
            [("FCALL_RO", "churn_load", 1, self._meta(partition), *prefixes, *(_key(customer) for customer in part)) for part in parts]
        )
        found = [state for answer in answers for state in _raised(answer)]
        return [_state(partition, customer, state) for customer, state in zip(customers, found, strict=True)]

    def apply(self, batches: Sequence[Apply]) -> None:
        """As in Store, in one round trip. Every batch is tried; the first refusal is raised after all answers are in."""
        for batch in batches:
            check(batch)
        answers = self._call_all([self._apply_command(batch) for batch in batches])
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if failures:
            raise self._failure(failures[0])
        refusals = [_refusal(answer, batch.partition, batch.former) for batch, answer in zip(batches, answers, strict=True)]
        for refusal in refusals:
            if refusal is not None:
                raise refusal

    def release(self, partition: int, nonce: str) -> None:
        """As in Store."""
        self._call("FCALL", "churn_release", 1, self._meta(partition), nonce)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    # -- around it

    def load_functions(self) -> None:
        """Put our function library on the server, in place of any other version. Raises StoreUnavailable when the user may not."""
        self._call("FUNCTION", "LOAD", "REPLACE", self._library)

    def customers(self, partition: int) -> Iterator[str]:
        """Every customer of the partition, in no order; one that comes or goes meanwhile may or may not be among them."""
        prefix = self._prefix(partition, b"c")
        for key in self._scan(prefix):
            yield key[len(prefix) :].decode("utf-8", "surrogatepass")

    def sizes(self, partition: int, customers: Sequence[str] | None = None) -> list[Size]:
        """Bytes of customers (all of them when not named), for figures: a round trip of several commands per 1,000 customers."""
        names = list(self.customers(partition)) if customers is None else list(customers)
        sizes = []
        for first in range(0, len(names), MAX_CUSTOMERS):
            part = names[first : first + MAX_CUSTOMERS]
            states = self.load(partition, part)
            keys = [self._keys(partition, name, state) for name, state in zip(part, states, strict=True)]
            memory = iter(self._call_all([("MEMORY", "USAGE", key, "SAMPLES", 0) for of_one in keys for key in of_one]))
            for name, state, of_one in zip(part, states, keys, strict=True):
                if state is not None:
                    values = len(state.main) + sum(map(len, state.chunks))
                    sizes.append(Size(name, values, sum(_raised(next(memory)) or 0 for _ in of_one), len(of_one)))
        return sizes

    # -- keys

    def _meta(self, partition: int) -> bytes:
        return f"{self._namespace}:{{{partition}}}:meta".encode()

    def _prefix(self, partition: int, what: bytes) -> bytes:
        return f"{self._namespace}:{{{partition}}}:".encode() + what + b":"

    def _keys(self, partition: int, customer: str, state: CustomerState | None) -> list[bytes]:
        if state is None:
            return []
        first = int.from_bytes(state.main[4:8], "little")
        chunk = self._prefix(partition, b"f") + _key(customer) + b":%d"
        return [self._prefix(partition, b"c") + _key(customer), *(chunk % (first + i) for i in range(len(state.chunks)))]

    def _apply_command(self, batch: Apply) -> Command:
        mains, facts = self._prefix(batch.partition, b"c"), self._prefix(batch.partition, b"f")
        keys: list[bytes] = []
        values: list[bytes] = []
        dropped: list[bytes] = []
        for write in batch.customers:
            name = _key(write.customer)
            keys.append(mains + name)
            values.append(write.main)
            if write.chunks:
                keys += [facts + name + b":%d" % number for number, _ in write.chunks]
                values += [chunk for _, chunk in write.chunks]
            if write.dropped:
                dropped += [facts + name + b":%d" % number for number in write.dropped]
        offsets = [part for topic, former in batch.former.items() for part in (topic, str(former), str(batch.to[topic]))]
        counters = [part for name, count in batch.counters.items() for part in (_COUNTER + name.encode(), str(count))]
        counts = (str(len(batch.former)), str(len(batch.counters)), str(len(keys)))
        return (
            "FCALL",
            "churn_apply",
            1 + len(keys) + len(dropped),
            self._meta(batch.partition),
            *keys,
            *dropped,
            batch.nonce,
            batch.model,
            str(batch.watermark_ms),
            *counts,
            *offsets,
            *counters,
            *values,
        )

    # -- the wire

    def _version_there(self, meta: bytes) -> str | None:
        try:
            return cast(bytes, self._patiently(lambda: self._client.execute_command("FCALL_RO", "churn_version", 1, meta))).decode()
        except RedisError as error:
            if _no_function(error):
                return None
            raise self._failure(error) from error

    def _call(self, *command: str | bytes | int) -> Any:
        return _raised(self._call_all([command])[0])

    def _call_all(self, commands: Sequence[Command]) -> list[Any]:
        """Answers to all commands; one the server refuses for good comes as an exception in its place.

        Everything is sent again when an answer fails to come, so every command must be safe to repeat: ours are.
        """

        def send() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
            for answer in answers:
                if isinstance(answer, Exception) and (_passes(answer) or isinstance(answer, _REFUSED_LOGIN) or _no_function(answer)):
                    raise answer
            return answers

        try:
            try:
                return self._patiently(send)
            except ResponseError as error:
                if not _no_function(error):
                    raise
            # The server came back without our library. Whether it still has our state is for the functions to say.
            self._patiently(lambda: self._client.execute_command("FUNCTION", "LOAD", "REPLACE", self._library))
            return self._patiently(send)
        except RedisError as error:
            raise self._failure(error) from error

    def _patiently(self, send: Callable[[], Answer]) -> Answer:
        pause_s = FIRST_PAUSE_S
        for left in range(self._attempts - 1, -1, -1):
            try:
                return send()
            except RedisError as error:
                if left == 0 or not _passes(error):
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _scan(self, prefix: bytes) -> Iterator[bytes]:
        cursor = 0
        seen: set[bytes] = set()  # SCAN may name a key twice
        while True:
            answer = self._call("SCAN", cursor, "MATCH", prefix + b"*", "COUNT", _SCAN)
            cursor = int(answer[0])
            for key in answer[1]:
                if key not in seen:
                    seen.add(key)
                    yield key
            if cursor == 0:
                return

    def _failure(self, error: Exception) -> Exception:
        """What an error of the client means to ours. The address never carries the password."""
        if isinstance(error, _REFUSED_LOGIN):
            return StoreUnavailable(f"Redis at {self.address} refuses this user: {error}")
        if _passes(error):
            return StoreUnavailable(f"Redis at {self.address} did not answer after {self._attempts} tries: {error}")
        return InvariantBroken(f"Redis at {self.address} answered with an error nobody expects: {error}")


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
    return isinstance(error, _PASSING) or (isinstance(error, ResponseError) and str(error).startswith(_PASSING_TEXTS))


def _refusal(answer: Any, partition: int, former: Offsets) -> Fenced | ChainBroken | None:
    if answer in (DONE, REPEATED):
        return None
    if answer[0] == FENCED:
        return Fenced(f"partition {partition} has another owner now")
    if answer[0] == BROKEN:
        stored = dict(zip(former, map(int, answer[1:]), strict=True))
        return ChainBroken(f"partition {partition}: this batch follows {dict(former)}, the store holds {stored}")
    raise InvariantBroken(f"partition {partition}: the store answered {answer!r}")


def _claim(partition: int, answer: Sequence[bytes]) -> Claim:
    fields: Mapping[bytes, bytes] = dict(zip(answer[::2], answer[1::2], strict=True))
    applied = {name[len(_APPLIED) :].decode(): int(value) for name, value in fields.items() if name.startswith(_APPLIED)}
    text = fields.get(b"intent")
    intent = None
    if text is not None:
        said = orjson.loads(text)
        intent = Intent(said["to"], said["model"], said["scored_at_ms"])
    return Claim(
        partition=partition,
        nonce=fields.get(b"owner", b"").decode(),
        epoch=int(fields.get(b"epoch", 0)),
        applied=dict.fromkeys(TOPICS, -1) | applied,
        intent=intent,
        model=fields.get(b"model", b"").decode(),
        watermark_ms=int(fields.get(b"watermark", -1)),
        counters={name[len(_COUNTER) :].decode(): int(value) for name, value in fields.items() if name.startswith(_COUNTER)},
    )


def _state(partition: int, customer: str, answer: Any) -> CustomerState | None:
    if answer is None:
        return None
    if isinstance(answer, bytes):
        return CustomerState(answer, ())
    main, *chunks = answer
    if None in chunks:
        raise StateDamaged(f"partition {partition}: a closed chunk of customer {customer!r} is missing; rebuild the partition")
    return CustomerState(main, tuple(chunks))
