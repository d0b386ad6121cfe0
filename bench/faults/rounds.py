"""One round: a deployment of its own, a stream of events, worker processes under a supervisor, one fault, and the check of what is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from pydantic import SecretStr
from redis import Redis, RedisError

from bench.faults.checker import Evidence, Output, Record, Rules, Verdict, check
from bench.faults.nursery import Child, Starter
from bench.faults.servers import Ground
from features.catalog import LAYOUT_HASH
from features.facts import TOPICS
from features.redis_store import RedisStore
from features.store import CustomerState
from models import registry
from proto.errors import ArtifactRejected, ChurnError
from scoring.fallback import Fallback
from scoring.reasons import Money
from scoring.scorer import load
from streams.fuzz import fuzz_records
from streams.scores import Model
from streams.settings import Settings
from streams.stack import _free_port as free_port
from streams.topics import client_config, create, producer_config

if TYPE_CHECKING:
    from bench.faults.nemesis import Fault

START_MS: Final = 1_700_000_000_000
PATIENCE_S: Final = 60.0
"""I7: everything is handled so long after the last fault at the latest."""
STOP_S: Final = 10.0
"""A graceful stop takes no longer."""
LOOK_S: Final = 0.05
LEEWAY_S: Final = 0.3
"""A stream never stands still: "caught up" means with everything that had been acknowledged so long before."""
MAX_RSS_MB: Final = 900
MAX_FILES: Final = 256
MAX_RESTARTS: Final = 25
TOPIC_SHARES: Final = (0.4, 0.42, 0.12, 0.06)
Place = tuple[str, int]


# -- the stream


@dataclass(frozen=True, slots=True)
class Mix:
    """What a stream is made of. Shares of all records; span_ms between two event times; customers drawn by a power law."""

    start_ms: int = START_MS
    customers: int = 60
    span_ms: int = 60_000
    duplicates: float = 0.03
    late: float = 0.04
    too_late: float = 0.0
    broken: float = 0.01
    odd_time: float = 0.005


DIRTY: Final = Mix(customers=20, span_ms=6_000_000, duplicates=0.1, late=0.15, too_late=0.02, broken=0.05, odd_time=0.05)
"""Half a year in a few thousand events, so that facts leave and some come too late; much is sent twice, wrong, or from another age."""


def stream(seed: int, count: int, mix: Mix) -> Iterator[tuple[str, bytes | None, bytes]]:
    """`count` records as (topic, key, value); the same seed gives the same bytes."""
    draw = random.Random(seed)
    sent: list[tuple[str, bytes, bytes]] = []
    weights = [1 / (i + 3) for i in range(mix.customers)]
    whom = draw.choices([f"c{i:04d}" for i in range(mix.customers)], weights, k=count)
    for i in range(count):
        if sent and draw.random() < mix.duplicates:
            topic, key, value = draw.choice(sent[-500:])
            if draw.random() < 0.2:  # the same id with other content
                value = orjson.dumps({**orjson.loads(value), "event_time": mix.start_ms + i * mix.span_ms})
            yield topic, key, value
            continue
        at = mix.start_ms + i * mix.span_ms + draw.randrange(mix.span_ms)
        if draw.random() < mix.late:
            at -= draw.randrange(1, 40 * mix.span_ms)
        if draw.random() < mix.too_late:
            at -= 91 * 86_400_000
        if draw.random() < mix.odd_time:
            at = draw.choice((0, 86_399_999, 946_684_799_999, 4_102_444_800_000))  # 1970, 1999, 2100
        topic = draw.choices(TOPICS, TOPIC_SHARES)[0]
        event = {"event_id": f"e{i}", "customer_id": whom[i], "event_time": at, **_content(draw, topic, i)}
        key, value = whom[i].encode(), orjson.dumps(event)
        if draw.random() < mix.broken:
            spoilt: tuple[bytes | None, bytes] = draw.choice(
                ((key, value[: draw.randrange(1, len(value))]), (key, b"\xff" + value), (b"other", value), (key, b"[]"), (key, b"{}"))
            )
            yield topic, *spoilt
            continue
        sent.append((topic, key, value))
        yield topic, key, value


def _content(draw: random.Random, topic: str, i: int) -> dict[str, Any]:
    if topic == "transactions":
        kind = draw.choice(("payment", "payment", "failed_payment", "refund", "renewal", "upgrade", "cancellation"))
        amount = f"{draw.randrange(1, 1_000_000) / 1_000:.3f}" if draw.random() < 0.9 or kind in ("payment", "refund", "renewal") else None
        currency = draw.choice(("EUR", "EUR", "EUR", None, "USD"))
        return {"kind": kind, "amount": amount, "currency": currency, "product": f"p{draw.randrange(30)}", "channel": "web"}
    if topic == "logins":
        kind = draw.choice(("login", "login", "failed_login", "feature_use", "page_view", "error", "logout"))
        return {
            "kind": kind,
            "device": f"d{draw.randrange(4)}",
            "session_id": f"s{i // 4}",
            "feature": f"f{draw.randrange(9)}",
            "country": "DE",
            "duration_ms": draw.choice((None, draw.randrange(60_000))),
        }
    if topic == "support-tickets":
        kind = draw.choice(("opened", "resolved", "reopened", "satisfaction"))
        return {
            "kind": kind,
            "ticket_id": f"t{i // 2}",
            "category": f"k{draw.randrange(6)}",
            "priority": draw.choice(("low", "high", "urgent", None)),
            "csat": draw.choice((None, 1, 3, 5)),
            "nps": draw.choice((None, 0, 7, 10)),
            "wait_seconds": draw.choice((None, 30, 900)),
        }
    return {
        "plan": f"plan{draw.randrange(4)}",
        "region": "north",
        "signup_date": "2020-02-29",
        "contract_end": draw.choice((None, "2026-01-01")),
        "consent": draw.choice((True, False, None)),
    }


def poison(seed: int, count: int) -> Iterator[tuple[str, bytes | None, bytes]]:
    """Hostile records (streams/fuzz.py)."""
    for record in fuzz_records(seed, count):
        # A compacted topic takes no record without a key.
        key = b"" if record.key is None and TOPICS[record.topic] == "customer-profiles" else record.key
        yield TOPICS[record.topic], key, record.value or b""


class Feeder:
    """Sends a stream and knows what has been acknowledged: `ends` is the highest offset of every (topic, partition)."""

    def __init__(
        self, settings: Settings, records: Sequence[tuple[str, bytes | None, bytes]], *, transactions: random.Random | None = None
    ):
        self.ends: dict[Place, int] = {}
        self.sent = 0
        self.aborted = 0
        self.failure: BaseException | None = None
        self._settings, self._records, self._transactions = settings, records, transactions
        patience_ms = 50_000 if transactions else 120_000
        config = {**producer_config(settings), "linger.ms": 2, "delivery.timeout.ms": patience_ms, "on_delivery": self._report}
        self._producer = Producer(config | ({"transactional.id": f"{settings.topic_prefix}feeder"} if transactions else {}))
        self._topics = {settings.prefixed(name): name for name in TOPICS}
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        if transactions:
            self._producer.init_transactions(30)

    def _report(self, error: KafkaError | None, message: Any) -> None:
        if error is None:
            place = self._topics[message.topic()], message.partition()
            self.ends[place] = max(self.ends.get(place, -1), message.offset())
        elif self._transactions is None:
            self.failure = KafkaException(error)

    def send(self, count: int, per_second: float = 0.0) -> None:
        """Send the next records, at a steady pace unless 0, and wait for the acknowledgements."""
        part = self._records[self.sent : self.sent + count]
        begin = time.monotonic()
        size = 200 if self._transactions else max(1, int(per_second / 50)) if per_second else 1_000
        for start in range(0, len(part), size):
            piece = part[start : start + size]
            if self._transactions is None:
                self._produce(piece)
            else:
                self._transaction(piece, self._transactions)
            if per_second and not self._hurry.is_set():
                while (wait := begin + (start + size) / per_second - time.monotonic()) > 0 and not self._hurry.is_set():
                    self._producer.poll(min(wait, 0.02))
            self._producer.poll(0)
        if self._producer.flush(120):
            raise TimeoutError("Kafka did not take the stream of the round")
        self.sent += len(part)
        if self.failure is not None:
            raise self.failure

    def _produce(self, piece: Sequence[tuple[str, bytes | None, bytes]]) -> None:
        for topic, key, value in piece:
            while True:
                try:
                    self._producer.produce(self._settings.prefixed(topic), value, key)
                    break
                except BufferError:
                    self._producer.poll(0.1)

    def _transaction(self, piece: Sequence[tuple[str, bytes | None, bytes]], draw: random.Random) -> None:
        """Offsets of an aborted transaction, and of the marker that ends any, are holes: nobody ever reads a record there."""
        while True:
            before = dict(self.ends)
            self._producer.begin_transaction()
            self._produce(piece)
            if draw.random() < 0.6:
                self._producer.commit_transaction(30)
                return
            self._producer.flush(30)
            self._producer.abort_transaction(30)
            self.aborted += len(piece)
            self.ends = before

    def begin(self, per_second: float) -> None:
        """Send the rest from a thread of its own."""

        def run() -> None:
            try:
                self.send(len(self._records) - self.sent, per_second)
            except BaseException as error:
                self.failure = error

        self._thread = threading.Thread(target=run, name="feeder", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Send what is left as fast as it goes; returns when all is acknowledged."""
        self._hurry.set()
        if self._thread is not None:
            self._thread.join()
        if self.failure is not None:
            raise self.failure


# -- workers


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process."""

    number: int
    process: Child
    out: Path
    log: Path
    metrics_port: int
    began: float
    frozen: bool = False

    def lines(self) -> list[str]:
        """What it has logged so far."""
        return self.log.read_text("utf-8", "replace").strip().splitlines() if self.log.exists() else []

    def last_words(self) -> str:
        lines = [line for line in self.lines() if line.strip() and line[0] not in "┌│└├"]  # Faust draws its settings
        return lines[-1][-300:] if lines else ""

    def has_started(self) -> bool:
        """Whether it hears signals."""
        return any(" started" in line and " worker " in line for line in self.lines())

    def holds_partitions(self) -> bool:
        """Whether its last word about partitions is that it reads some."""
        lines = [line for line in self.lines() if "partitions [" in line and "assigned" not in line]
        return bool(lines) and "reading partitions [" in lines[-1] and not lines[-1].endswith("[]")


@dataclass(frozen=True, slots=True)
class End:
    """How a worker ended."""

    number: int
    code: int
    words: str


class Crew:
    """Keeps `want` workers alive as a supervisor does: one that ends is started again."""

    def __init__(self, starter: Starter, environment: Mapping[str, str], directory: Path) -> None:
        self.starter, self.environment, self.directory = starter, environment, directory
        self.workers: list[Worker] = []
        self.ends: list[End] = []
        self.want = 0
        self.started = 0
        self.most_starts = MAX_RESTARTS
        self.spared: set[int] = set()
        self.next_variables: dict[str, str] = {}
        self.lock = threading.RLock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def start(self) -> Worker:
        """Start one more worker."""
        with self.lock:
            number, self.started = self.started, self.started + 1
            out, log, port = self.directory / f"out{number}", self.directory / f"log{number}", free_port()
            variables, self.next_variables = self.next_variables, {}
            environment = {**self.environment, "CHURN_METRICS_PORT": str(port), **variables}
            process = self.starter.start(["worker", "--json"], environment, out, log)
            worker = Worker(number, process, out, log, port, time.monotonic())
            self.workers.append(worker)
            return worker

    def scale(self, want: int) -> None:
        """Have so many workers; the youngest are stopped gracefully."""
        with self.lock:
            self.want = want
            while len(self.workers) < want:
                self.start()
            for worker in self.workers[want:]:
                worker.process.send_signal(signal.SIGTERM)

    def holding(self) -> int:
        """Workers that hold partitions."""
        with self.lock:
            return sum(worker.holds_partitions() for worker in self.workers)

    def settled(self) -> bool:
        """Whether all wanted workers hold partitions: a stop before that would leave the ownership of one that was killed."""
        with self.lock:
            return len(self.workers) == self.want == self.holding() and all(worker.process.poll() is None for worker in self.workers)

    def victim(self, draw: random.Random) -> Worker:
        """A worker to do harm to; never a spared one."""
        with self.lock:
            return draw.choice([worker for worker in self.workers if worker.number not in self.spared] or self.workers)

    def _run(self) -> None:
        while not self._stop.wait(LOOK_S):
            with self.lock:
                for worker in list(self.workers):
                    code = worker.process.poll()
                    if code is not None:
                        self.workers.remove(worker)
                        self.ends.append(End(worker.number, code, worker.last_words()))
                while len(self.workers) < self.want and self.started < self.most_starts:
                    self.start()

    def stop(self) -> list[tuple[int, float, dict[str, Any]]]:
        """Stop all gracefully; (exit code, seconds, summary) of each. One that does not stop within 15 s is killed (code -9)."""
        self._stop.set()
        self._thread.join()
        begin = time.monotonic()
        found = []
        for worker in self.workers:
            worker.process.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                code = worker.process.wait(max(0.1, begin + 15 - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                code = worker.process.wait()
            seconds = time.monotonic() - begin
            if code == -signal.SIGTERM and not worker.has_started():
                code = 0  # it held nothing yet
            lines = worker.out.read_text("utf-8").splitlines()
            found.append((code, seconds, json.loads(lines[-1]) if lines else {}))
            self.ends.append(End(worker.number, code, worker.last_words()))
        self.workers = []
        return found

    def kill(self) -> None:
        """End everything at once."""
        self._stop.set()
        self._thread.join()
        for worker in self.workers:
            with suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGCONT)
            worker.process.kill()
            worker.process.wait()


# -- what is seen while a round runs


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the store: applied offset by (topic, partition), epoch and nonce by partition; and what had been sent then."""

    at: float
    applied: Mapping[Place, int]
    owners: Mapping[int, tuple[int, str]]
    ends: Mapping[Place, int]

    def lag(self, ends: Mapping[Place, int]) -> int:
        return sum(max(0, end - self.applied.get(place, -1)) for place, end in ends.items())


class Observer:
    """Looks at the store every 50 ms, at the workers' memory, files and metrics every half second."""

    def __init__(self, redis_port: int, settings: Settings, feeder: Feeder, crew: Crew, *, every_s: float = LOOK_S) -> None:
        self.looks: list[Look] = []
        self.violations: list[str] = []
        self.max_rss_mb = 0
        self.max_files = 0
        self.scrapes = 0
        self.rss: list[tuple[int, float, float]] = []  # worker, moment, MB
        self.port = redis_port
        self._every_s = every_s
        self._settings, self._feeder, self._crew = settings, feeder, crew
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._look, self._weigh)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _look(self) -> None:
        client: Any = Redis(port=self.port, socket_timeout=2, socket_connect_timeout=1)
        names = [f"{self._settings.namespace}:{{{partition}}}:meta" for partition in range(self._settings.partitions)]
        port = self.port
        while not self._stop.wait(self._every_s):
            if port != self.port:
                client, port = Redis(port=self.port, socket_timeout=2, socket_connect_timeout=1), self.port
            try:
                pipe = client.pipeline(transaction=False)
                for name in names:
                    pipe.hgetall(name)
                metas = pipe.execute()
            except (RedisError, OSError):
                continue
            applied: dict[Place, int] = {}
            owners: dict[int, tuple[int, str]] = {}
            for partition, meta in enumerate(metas):
                if meta.get(b"rebuilding", b"0") not in (b"0", b""):
                    continue
                for key, value in meta.items():
                    if key.startswith(b"applied:"):
                        applied[key[8:].decode(), partition] = int(value)
                owners[partition] = (int(meta.get(b"epoch", 0)), meta.get(b"owner", b"").decode())
            self.looks.append(Look(time.monotonic(), applied, owners, dict(self._feeder.ends)))
        client.close()

    def _weigh(self) -> None:
        import urllib.request

        while not self._stop.wait(0.5):
            with self._crew.lock:
                workers = [worker for worker in self._crew.workers if not worker.frozen]
            for worker in workers:
                try:
                    fields = Path(f"/proc/{worker.process.pid}/statm").read_text().split()
                    files = len(os.listdir(f"/proc/{worker.process.pid}/fd"))
                except (OSError, ValueError):
                    continue
                rss = int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if len(fields) > 1 else 0.0
                self.rss.append((worker.number, time.monotonic(), rss))
                self.max_rss_mb, self.max_files = max(self.max_rss_mb, round(rss)), max(self.max_files, files)
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{worker.metrics_port}/metrics", timeout=1) as answer:
                        text = answer.read().decode()
                except OSError:
                    continue
                self.scrapes += 1
                for line in text.splitlines():
                    if line.startswith("churn_accounting_residue{") and float(line.rpartition(" ")[2]):
                        self.violations.append(f"I9 residue: {line}")

    def last(self) -> Look | None:
        return self.looks[-1] if self.looks else None

    def handled(self) -> int:
        """Offsets handled so far (holes included), 0 before the first."""
        look = self.last()
        return sum(offset + 1 for offset in look.applied.values()) if look else 0

    def caught_up_at(self, since: float) -> float | None:
        """When the workers had caught up with the stream after `since`: with all that was acknowledged LEEWAY_S before, some of it since.

        None when that has not happened, or when the stream had ended by then.
        """
        j = 0
        looks = self.looks
        known = next((look.ends for look in looks if look.at >= since), None)
        for look in looks:
            while j + 1 < len(looks) and looks[j + 1].at <= look.at - LEEWAY_S:
                j += 1
            # Before that, what is asked for may be what had been handled before the harm was done.
            if looks[j].at >= since + LEEWAY_S and looks[j].ends != known and look.lag(looks[j].ends) == 0:
                return look.at
        return None

    def longest_pause(self, since: float, until: float) -> float:
        """Longest time (s) in which a partition with lag did not move, between two moments."""
        longest = 0.0
        moved: dict[int, float] = {}
        former: Look | None = None
        for look in self.looks:
            if not since <= look.at <= until:
                continue
            for partition in range(self._settings.partitions):
                places = [(topic, partition) for topic in TOPICS]
                behind = any(look.ends.get(place, -1) > look.applied.get(place, -1) for place in places)
                moves = former is None or any(look.applied.get(place, -1) != former.applied.get(place, -1) for place in places)
                if moves or not behind:
                    moved[partition] = look.at
                longest = max(longest, look.at - moved.setdefault(partition, look.at))
            former = look
        return longest

    def check_chain(self, rollback: bool) -> list[str]:
        """I6 as far as looks can tell: epochs and offsets never go back, and an epoch has one owner."""
        found = list(self.violations)
        owners: dict[tuple[int, int], str] = {}
        former: Look | None = None
        for look in self.looks:
            for partition, (epoch, nonce) in look.owners.items():
                if nonce and not rollback and owners.setdefault((partition, epoch), nonce) != nonce:
                    found.append(f"I6 two owners: partition {partition} epoch {epoch}")
                if former is not None and not rollback and former.owners.get(partition, (0, ""))[0] > epoch:
                    found.append(f"I6 epoch went back: partition {partition} to {epoch}")
            if former is not None and not rollback:
                found += [
                    f"I6 offset went back: {place} from {offset} to {look.applied.get(place, -1)}"
                    for place, offset in former.applied.items()
                    if look.applied.get(place, -1) < offset and place[1] in look.owners
                ]
            former = look
        return found[:10]


# -- the round


@dataclass(slots=True)
class Outcome:
    """What a round found; one line of the ledger."""

    seed: str
    fault: str
    mode: str
    events: int
    workers: int
    commit: str
    at: str = ""
    violations: list[str] = field(default_factory=list)
    scores: int = 0
    letters: int = 0
    alerts: int = 0
    raw_duplicates: int = 0
    oracle_vectors: int = 0
    recover_s: float | None = None
    pause_s: float | None = None
    stop_s: float | None = None
    max_rss_mb: int = 0
    max_files: int = 0
    scrapes: int = 0
    restarts: int = 0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        """As JSON."""
        return json.dumps({key: value for key, value in asdict(self).items() if value not in (None, [], {})})


class Round:
    """A running round, as a fault sees it."""

    def __init__(self, ground: Ground, fault: Fault, seed: str, events: int, mode: str, shelf: Shelf, directory: Path) -> None:
        self.ground, self.fault, self.seed, self.events, self.mode, self.shelf = ground, fault, seed, events, mode, shelf
        self.random = random.Random(seed)
        self.directory = directory
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        name = f"r{abs(hash(seed)) % 10**6:06d}{time.monotonic_ns() % 10**8:08d}"
        self.settings = Settings(
            kafka_bootstrap_servers=ground.kafka,
            redis_url=SecretStr(ground.redis.url),
            topic_prefix=f"{name}-",
            namespace=name,
            group_id="g",
            replication=ground.nodes,
            data_dir=directory / "data",
        )
        self.batch = self.random.choice((50, 200, 1_000, 4_000))
        self.facts: dict[str, Any] = {"batch": self.batch}
        self.crew: Crew
        self.feeder: Feeder
        self.observer: Observer
        self.since: float | None = None
        self.rollback = fault.rollback
        self.began_ms = time.time_ns() // 1_000_000

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this round's workers."""
        proxied = self.fault.proxied
        mine = {
            "KAFKA_BOOTSTRAP_SERVERS": self.ground.proxied_kafka if "kafka" in proxied else self.ground.kafka,
            "REDIS_URL": self.ground.proxied_redis if "redis" in proxied else self.ground.redis.url,
            "CHURN_TOPIC_PREFIX": self.settings.topic_prefix,
            "CHURN_NAMESPACE": self.settings.namespace,
            "CHURN_GROUP_ID": self.settings.group_id,
            "CHURN_BATCH_MAX_EVENTS": str(self.batch),
            "CHURN_PROGRESS_TIMEOUT_S": "15",
            **self.fault.variables,
        }
        if "delivery" in Settings.model_fields:
            mine["CHURN_DELIVERY"] = self.mode
        kept = {key: value for key, value in os.environ.items() if not key.startswith("CHURN_") or key == "CHURN_DATA_DIR"}
        return kept | mine

    def open(self) -> None:
        """Empty the store and make the topics."""
        client = self.ground.redis.client
        client.flushall()
        client.function_flush()
        client.bgrewriteaof()
        create(self.settings)
        admin = AdminClient(client_config(self.settings))
        # The controller answers before every broker knows the topics.
        self.until(lambda: self.settings.prefixed("churn-models") in admin.list_topics(timeout=10).topics)

    # -- what faults use

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def until(self, condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> bool:
        """Wait for a condition; whether it came."""
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def mark(self) -> None:
        """The moment from which recovery counts."""
        self.since = time.monotonic()

    def moved(self) -> None:
        """The store is at another address now."""
        self.settings = self.settings.model_copy(update={"redis_url": SecretStr(self.ground.redis.url)})
        self.observer.port = self.ground.redis.port

    def publish(self, envelope: bytes) -> None:
        """Make a model the champion."""
        manifest = self.shelf.model(envelope).manifest
        registry.publish(producer_config(self.settings), self.settings.prefixed("churn-models"), manifest, envelope)

    def produce(self, topic: str, key: bytes, value: bytes | None) -> None:
        """One record past the feeder."""
        producer = Producer(producer_config(self.settings))
        producer.produce(self.settings.prefixed(topic), value, key)
        producer.flush(30)


CLOCK: Final = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  Dl_info who;
  const char *off = getenv("CLOCK_OFF_S");
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int r = real(id, t);
  if (!r && off && id == CLOCK_REALTIME && dladdr(__builtin_return_address(0), &who) && strstr(who.dli_fname, "python")
      && !strstr(who.dli_fname, "site-packages"))
    t->tv_sec += atol(off);
  return r;
}
"""
"""The interpreter's wall clock is off by a stated number of seconds; the monotonic one is not, nor the waits of C libraries."""


MODELS: Final = ((20, 3), (30, 4))
"""Trees and depth of the two models."""


class Shelf:
    """Models for the rounds: made once per catalog, kept in the data directory. And a wrong clock."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.envelopes: list[bytes] = []
        self._models: dict[bytes, Any] = {}
        self.by_digest: dict[str, Model] = {"": Fallback(0.5)}

    def model(self, envelope: bytes) -> Any:
        """The model of an envelope."""
        if envelope not in self._models:
            model = self._models[envelope] = load(envelope, money=Money("EUR", 2))
            self.by_digest[model.digest] = model
        return self._models[envelope]

    def clock(self, off_s: int) -> dict[str, str]:
        """Variables that give a process a wall clock off by so much; needs a C compiler."""
        library = self.home / f"clock{blake2b(CLOCK.encode(), digest_size=4).hexdigest()}.so"
        if not library.exists():
            source = self.home / "clock.c"
            source.write_text(CLOCK, encoding="utf-8")
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True, capture_output=True)
        return {"LD_PRELOAD": str(library), "CLOCK_OFF_S": str(off_s)}

    def fill(self, base: Settings) -> None:
        """Read the kept models, or make them on these servers when there are none of this version."""
        self.home.mkdir(parents=True, exist_ok=True)
        files = [self.home / f"{LAYOUT_HASH[:16]}-{trees}.zst" for trees, _ in MODELS]
        try:
            self.envelopes = [file.read_bytes() for file in files]
            for envelope in self.envelopes:
                self.model(envelope)
        except (FileNotFoundError, ArtifactRejected):
            self.envelopes = list(self._make(base))
            for file, envelope in zip(files, self.envelopes, strict=True):
                self.model(envelope)
                scratch = file.with_suffix(f".{os.getpid()}")
                scratch.write_bytes(envelope)
                scratch.replace(file)

    def _make(self, base: Settings) -> Iterator[bytes]:
        from bench.model import publish_model

        settings = base.model_copy(update={"topic_prefix": f"shelf{time.monotonic_ns()}-"})
        create(settings)
        Feeder(settings, list(stream(1, 8_000, Mix()))).send(8_000)
        for trees, depth in MODELS:
            digest = publish_model(settings, trees=trees, depth=depth)
            yield registry.read(client_config(settings), settings.prefixed("churn-models")).envelopes[digest]


def read_topic(client: Mapping[str, Any], name: str) -> Iterator[Any]:
    """Every committed message of a topic, each partition in order."""
    consumer = Consumer(
        {
            **client,
            "group.id": "faults-reader",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",
            "fetch.message.max.bytes": 32 << 20,
            "fetch.wait.max.ms": 20,
            "isolation.level": "read_committed",
        }
    )
    try:
        partitions = consumer.list_topics(name, timeout=10).topics[name].partitions
        consumer.assign([TopicPartition(name, number, OFFSET_BEGINNING) for number in partitions])
        ended: set[int] = set()
        end = time.monotonic() + 60
        while len(ended) < len(partitions):
            first = consumer.poll(0.5)  # `consume` alone would wait out its time at the end of the topic
            for message in [] if first is None else [first, *consumer.consume(5_000, 0.02)]:
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    ended.add(message.partition() or 0)
                elif error.fatal():
                    raise KafkaException(error)
            if time.monotonic() > end:
                raise TimeoutError(f"{name} could not be read to its end")
    finally:
        consumer.close()


def gather(settings: Settings, models: Mapping[str, Model], began_ms: int) -> Evidence:
    """Everything a deployment left, read straight from Kafka and Redis."""
    client = client_config(settings)
    partitions = range(settings.partitions)
    inputs: dict[int, list[Record]] = {partition: [] for partition in partitions}
    for topic, name in enumerate(TOPICS):
        for m in read_topic(client, settings.prefixed(name)):
            inputs[m.partition()].append(Record(topic, m.partition(), m.offset(), m.timestamp()[1], m.key(), m.value()))
    outputs: list[dict[int, list[Output]]] = []
    for name in ("churn-scores", "churn-dead-letters", "churn-alerts"):
        found: dict[int, list[Output]] = {partition: [] for partition in partitions}
        for m in read_topic(client, settings.prefixed(name)):
            found[m.partition()].append(Output(m.key(), m.value() or b""))
        outputs.append(found)
    store = RedisStore(settings.redis_url.get_secret_value(), namespace=settings.namespace)
    try:
        states: dict[int, dict[str, CustomerState]] = {}
        for partition in partitions:
            states[partition] = {}
            for name in store.customers(partition):
                # One by one: what of a damaged one is missing is for the checker to say.
                try:
                    state = store.load(partition, [name])[0]
                except ChurnError:
                    state = CustomerState(b"", ())
                if state is not None:
                    states[partition][name] = state
        stands = {partition: store.look(partition) for partition in partitions}
    finally:
        store.close()
    ended_ms = time.time_ns() // 1_000_000
    return Evidence(inputs, outputs[0], outputs[1], outputs[2], stands, states, models, began_ms, ended_ms)


def run_round(
    ground: Ground, starter: Starter, fault: Fault, seed: str, *, events: int, mode: str, shelf: Shelf, commit: str, directory: Path
) -> Outcome:
    """Run one round from an empty deployment to the verdict."""
    begin = time.monotonic()
    this = Round(ground, fault, seed, events, mode, shelf, directory)
    this.open()
    workers = fault.workers
    outcome = Outcome(seed, fault.name, mode, events, workers, commit, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    records = list(fault.stream(int.from_bytes(seed.encode()[-6:], "little"), events))
    holes = this.random if fault.holes else None
    this.feeder = Feeder(this.settings, records, transactions=holes)
    if fault.model and this.random.random() < fault.model:
        this.publish(shelf.envelopes[0])
    this.crew = Crew(starter, this.environment, directory)
    this.observer = Observer(ground.redis.port, this.settings, this.feeder, this.crew)
    stopped: list[tuple[int, float, dict[str, Any]]] = []
    try:
        this.feeder.send(int(len(records) * fault.backlog))
        if fault.prepare is not None:
            fault.prepare(this)
        this.crew.scale(workers)
        if not this.until(lambda: (this.observer.handled() > 0 and this.crew.holding() == workers) or bool(this.crew.ends)):
            outcome.violations.append("I7 progress: nothing was handled after the start")
        this.feeder.begin((len(records) - this.feeder.sent) / this.random.uniform(*fault.feed_s))
        fault.inject(this)
        this.feeder.finish()
        fed = time.monotonic()
        since = fed if this.since is None else this.since
        # A look from before the harm was done may show everything handled.
        done = this.until(
            lambda: (
                (look := this.observer.last()) is not None
                and look.at >= since + LEEWAY_S
                and bool(look.ends)
                and look.lag(this.feeder.ends) == 0
            )
        )
        if not done:
            look = this.observer.last()
            lag = look.lag(this.feeder.ends) if look else -1
            outcome.violations.append(f"I7 progress: lag {lag} for {PATIENCE_S:g} s; workers ended {_words(this.crew.ends)}")
        this.until(lambda: this.observer.caught_up_at(since) is not None, 2.0)
        caught_up = this.observer.caught_up_at(since)
        if this.since is not None and caught_up is not None:
            outcome.recover_s = round(caught_up - since, 3)
            outcome.pause_s = round(this.observer.longest_pause(since, caught_up), 3)
        this.until(this.crew.settled, 20.0)
        stopped = this.crew.stop()
    except BaseException:
        this.crew.kill()
        raise
    finally:
        this.observer.stop()
        for link in (ground.redis_link, *ground.kafka_links):
            link.clear()
    for code, seconds, summary in stopped:
        if code != 0 or seconds > STOP_S:
            outcome.violations.append(f"graceful stop: exit code {code} after {seconds:.1f} s; {_words(this.crew.ends)}")
        if summary and summary.get("residue"):
            outcome.violations.append(f"I9 residue: {summary['residue']}")
    outcome.stop_s = round(max((seconds for _, seconds, _ in stopped), default=0.0), 3)
    _check(this, outcome, stopped=all(code == 0 for code, _, _ in stopped))
    _bounds(this, outcome)
    _clean(this)
    outcome.restarts = this.crew.started - workers
    outcome.facts = this.facts
    outcome.seconds = round(time.monotonic() - begin, 2)
    return outcome


def _words(ends: Sequence[End]) -> str:
    return "; ".join(f"#{end.number} code {end.code}: {end.words}" for end in ends[-4:])


def _check(this: Round, outcome: Outcome, *, stopped: bool) -> Verdict:
    evidence = gather(this.settings, this.shelf.by_digest, this.began_ms)
    rules = Rules(exactly_once=this.mode == "exactly_once", stopped=stopped, clock_s=this.fault.clock_s)
    verdict = check(evidence, rules, sample=this.fault.sample, seed=outcome.events)
    outcome.violations += verdict.violations
    outcome.events = verdict.records
    outcome.scores, outcome.letters, outcome.alerts = verdict.scores, verdict.letters, verdict.alerts
    outcome.raw_duplicates = verdict.raw_duplicates
    outcome.oracle_vectors = verdict.oracle_vectors
    if this.fault.no_duplicates and verdict.raw_duplicates:
        outcome.violations.append(f"graceful stop: {verdict.raw_duplicates} raw duplicates")
    if this.fault.expect is not None:
        outcome.violations += this.fault.expect(this, evidence)
    return verdict


def _bounds(this: Round, outcome: Outcome) -> None:
    watched = this.observer
    outcome.violations += watched.check_chain(this.rollback)
    outcome.max_rss_mb, outcome.max_files, outcome.scrapes = watched.max_rss_mb, watched.max_files, watched.scrapes
    if watched.max_rss_mb > MAX_RSS_MB or watched.max_files > MAX_FILES:
        outcome.violations.append(f"I8 bounds: {watched.max_rss_mb} MB, {watched.max_files} files")
    codes = Counter(end.code for end in this.crew.ends)
    this.facts["exit_codes"] = {str(code): count for code, count in sorted(codes.items())}
    words = [end.words for end in this.crew.ends if end.code not in (0, -9, 70)]
    if words:
        this.facts["words"] = words[-2:]
    if this.crew.started >= this.crew.most_starts:
        outcome.violations.append(f"I7 crash loop: {this.crew.started} starts; {_words(this.crew.ends)}")


def _clean(this: Round) -> None:
    """Topics go, so the broker stays as light as in the first round."""
    admin = AdminClient(client_config(this.settings))
    with suppress(KafkaException):
        names = [name for name in admin.list_topics(timeout=10).topics if name.startswith(this.settings.topic_prefix)]
        for future in admin.delete_topics(names, operation_timeout=10).values():
            with suppress(KafkaException):
                future.result(10)
