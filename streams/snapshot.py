"""The whole state of a partition in one file, as it was after one batch: taken while the next ones go on, checked before it is used."""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from struct import Struct
from typing import Any, BinaryIO, Final, Protocol

import numpy as np
import orjson
import zstandard

from features.store import LAYOUT, MAX_CUSTOMERS, PREFIX, Claim, CustomerState, CustomerWrite, digests
from proto.errors import ChurnError, StateDamaged
from streams.metrics import Metrics

log = logging.getLogger(__name__)

MAGIC: Final = b"churnstream snapshot 1\n"
SUFFIX: Final = ".snapshot"
ABANDONED_S: Final = 86_400.0
"""A snapshot that is so much older than the newest one, and not finished, will not be."""
BACKFILL: Final = "backfill"
"""Name of the note beside the snapshots that says whether a partition was filled from files."""
DIGEST_BYTES: Final = 32
PAUSE_S: Final = 0.005
"""Rest of the copying thread after every 1,000 customers: the store and the processor are there for the stream first."""
LEVEL: Final = 3
_BLOCK: Final = 1 << 20
_LENGTH: Final = Struct("<I")


class SnapshotDamaged(ChurnError):
    """A snapshot file is not what was written: cut off, changed, or of another kind."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Where a partition stands: what `finish_rebuild` is told. taken_ms: wall clock."""

    partition: int
    applied: dict[str, int]
    model: str
    watermark_ms: int
    counters: dict[str, int]
    customers: int
    taken_ms: int
    layout: str = LAYOUT

    @property
    def place(self) -> int:
        """Later states have a higher one."""
        return sum(self.applied.values())


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A file and what its end says. `verify` before trusting any of it."""

    path: Path
    stand: Stand
    bytes: int
    packed: int  # bytes of the customers

    def verify(self) -> None:
        """Raises SnapshotDamaged unless every byte is as it was written."""
        content = blake2b(digest_size=DIGEST_BYTES)
        with self.path.open("rb") as stream:
            left = self.bytes - DIGEST_BYTES
            while left > 0:
                block = stream.read(min(_BLOCK, left))
                if not block:
                    raise SnapshotDamaged(f"{self.path}: it ends too early")
                content.update(block)
                left -= len(block)
            if stream.read() != content.digest():
                raise SnapshotDamaged(f"{self.path}: the digest does not hold")

    def customers(self) -> Iterator[tuple[str, CustomerState]]:
        """Every customer with its state. Raises SnapshotDamaged when they are not as many as the end says."""
        count = 0
        with self.path.open("rb") as stream:
            stream.seek(len(MAGIC))
            part: Any = _Stretch(stream, self.packed)  # it has the one method that is needed
            with zstandard.ZstdDecompressor().stream_reader(part, closefd=False) as packed:
                unpacked = io.BufferedReader(packed, _BLOCK)
                while (name := _read_piece(unpacked)) is not None:
                    main, number = _needed(unpacked), _LENGTH.unpack(unpacked.read(_LENGTH.size))[0]
                    yield name.decode("utf-8", "surrogatepass"), CustomerState(main, tuple(_needed(unpacked) for _ in range(number)))
                    count += 1
        if count != self.stand.customers:
            raise SnapshotDamaged(f"{self.path}: {count} customers, its end speaks of {self.stand.customers}")

    def writes(self) -> Iterator[list[CustomerWrite]]:
        """The customers as a store takes them, MAX_CUSTOMERS at a time."""
        some: list[CustomerWrite] = []
        for customer, state in self.customers():
            first = PREFIX.unpack_from(state.main)[2]
            chunks = tuple((first + i, chunk) for i, chunk in enumerate(state.chunks))
            some.append(CustomerWrite(customer, state.main, chunks, new=True))
            if len(some) == MAX_CUSTOMERS:
                yield some
                some = []
        if some:
            yield some


class _Stretch(io.RawIOBase):
    """The next `left` bytes of a stream, as one that ends there."""

    def __init__(self, stream: BinaryIO, left: int) -> None:
        self._stream, self._left = stream, left

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; all that are left for -1."""
        data = self._stream.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _read_piece(stream: BinaryIO | io.BufferedReader) -> bytes | None:
    head = stream.read(_LENGTH.size)
    return stream.read(_LENGTH.unpack(head)[0]) if head else None


def _needed(stream: BinaryIO | io.BufferedReader) -> bytes:
    piece = _read_piece(stream)
    if piece is None:
        raise SnapshotDamaged("a customer ends too early")
    return piece


class Writer:
    """A snapshot in the making: a hidden file that gets its name when it is whole and on disk."""

    def __init__(self, directory: Path, partition: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._path = directory / f".{os.getpid()}-{time.monotonic_ns()}.tmp"
        self._content = blake2b(digest_size=DIGEST_BYTES)
        self._stream = self._path.open("wb")
        self._packer = zstandard.ZstdCompressor(level=LEVEL).compressobj()
        self.partition = partition
        self.count = 0
        self._put(MAGIC)

    def add(self, customer: str, state: CustomerState) -> None:
        """One customer."""
        name = customer.encode("utf-8", "surrogatepass")
        pieces = [_LENGTH.pack(len(name)), name, _LENGTH.pack(len(state.main)), state.main, _LENGTH.pack(len(state.chunks))]
        for chunk in state.chunks:
            pieces += (_LENGTH.pack(len(chunk)), chunk)
        self._put(self._packer.compress(b"".join(pieces)))
        self.count += 1

    def finish(self, stand: Stand) -> Path:
        """Write the end, and give the file its name; only then does it exist for a reader."""
        self._put(self._packer.flush())
        end = orjson.dumps(asdict(stand))
        self._put(end + _LENGTH.pack(len(end)))
        self._stream.write(self._content.digest())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        path = self._directory / f"{stand.place:020d}-{stand.taken_ms}{SUFFIX}"
        self._path.rename(path)
        _sync(self._directory)
        return path

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            self._stream.close()
        self._path.unlink(missing_ok=True)

    def _put(self, data: bytes) -> None:
        self._content.update(data)
        self._stream.write(data)


def _changed(path: Path) -> float:
    """When a file was last written, epoch seconds; 0 when another worker has removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class Snapshots:
    """The snapshots of a deployment in a directory; `keep` of each partition stay."""

    directory: Path
    namespace: str
    keep: int = 3

    def place(self, partition: int) -> Path:
        """Where those of a partition lie."""
        return self.directory / self.namespace / str(partition)

    def partitions(self) -> list[int]:
        """Partitions that have any."""
        home = self.directory / self.namespace
        return sorted(int(path.name) for path in home.iterdir() if path.name.isdigit()) if home.is_dir() else []

    def of(self, partition: int) -> list[Snapshot]:
        """All that can be read at their end, the latest state first; the others are named in the log."""
        found = []
        for path in sorted(self.place(partition).glob(f"*{SUFFIX}"), reverse=True):
            try:
                found.append(read(path))
            except (SnapshotDamaged, OSError) as error:
                log.error("snapshot left out: %s", error)
        return found

    def good(self, partition: int) -> Iterator[Snapshot]:
        """Those whose every byte is right and that this version can read, the latest state first."""
        for snapshot in self.of(partition):
            try:
                snapshot.verify()
            except (SnapshotDamaged, OSError) as error:
                log.error("snapshot left out: %s", error)
                continue
            if snapshot.stand.layout != LAYOUT:
                log.error("snapshot left out: %s: it holds %s, this version reads %s", snapshot.path, snapshot.stand.layout, LAYOUT)
                continue
            yield snapshot

    def backfill(self, partition: int) -> bool | None:
        """Whether the partition was filled from files: None never, False begun and not finished, True done."""
        path = self.place(partition) / BACKFILL
        return path.read_text("ascii") == "done" if path.is_file() else None

    def note_backfill(self, partition: int, *, done: bool) -> None:
        """Remember for every later rebuild that the topics do not hold all there was."""
        directory = self.place(partition)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f".{BACKFILL}.tmp"
        path.write_text("done" if done else "begun", "ascii")
        path.rename(directory / BACKFILL)
        _sync(directory)

    def begin(self, partition: int) -> Writer:
        """A new one."""
        return Writer(self.place(partition), partition)

    def prune(self, partition: int) -> list[Path]:
        """Remove all but the latest `keep`, and what workers that were killed have left half written; what was removed."""
        there = sorted(self.place(partition).glob(f"*{SUFFIX}"), reverse=True)
        newest_s = max((_changed(path) for path in there), default=0.0)
        left = [path for path in self.place(partition).glob(".*.tmp") if 0 < _changed(path) < newest_s - ABANDONED_S]
        old = [*there[self.keep :], *left]
        for path in old:
            path.unlink(missing_ok=True)
        return old


def read(path: Path) -> Snapshot:
    """What the end of a file says. Raises SnapshotDamaged."""
    size = path.stat().st_size
    tail = _LENGTH.size + DIGEST_BYTES
    try:
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise SnapshotDamaged(f"{path}: not a snapshot of this kind")
            stream.seek(size - tail)
            length = _LENGTH.unpack(stream.read(_LENGTH.size))[0]
            stream.seek(size - tail - length)
            stand = Stand(**orjson.loads(stream.read(length)))
    except (OSError, ValueError, TypeError) as error:  # orjson's error is a ValueError
        raise SnapshotDamaged(f"{path}: its end cannot be read: {error}") from error
    return Snapshot(path, stand, size, size - tail - length - len(MAGIC))


def check(path: Path) -> int:
    """Look at everything in a file: digest, every customer's bytes, facts that say they came after the snapshot. Customers in it.

    Raises SnapshotDamaged, or ChainBroken of another version or catalog.
    """
    from features.facts import KIND, OFFSET, TOPICS
    from features.state import decode

    snapshot = read(path)
    snapshot.verify()
    highest = np.array([snapshot.stand.applied[name] for name in TOPICS])
    for customer, state in snapshot.customers():
        facts = decode(state, customer).facts
        if (facts[:, OFFSET] > highest[facts[:, KIND] >> 3]).any():
            raise SnapshotDamaged(f"{path}: customer {customer!r} has a fact from beyond the offsets of the snapshot")
    return snapshot.stand.customers


class Source(Protocol):
    """The part of a store that a snapshot is taken from."""

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]: ...
    def look(self, partition: int) -> Claim: ...
    def customers(self, partition: int) -> Iterator[str]: ...


def take(source: Source, snapshots: Snapshots, partition: int, now_ms: int) -> Path:
    """A snapshot of a partition that nobody writes to at the moment.

    Raises ChurnError when it was written to meanwhile: then its worker has to take it (docs/rebuild.md).
    """
    before = source.look(partition)
    if before.rebuilding or before.damaged:
        raise ChurnError(f"partition {partition}: {before.damaged or 'it is being rebuilt'}; there is nothing to take a snapshot of")
    writer = snapshots.begin(partition)
    try:
        written = []
        for names in _pages(source.customers(partition), MAX_CUSTOMERS):
            for customer, state in zip(names, source.load(partition, names), strict=True):
                if state is not None:
                    writer.add(customer, state)
                    written.append(customer)
        after = source.look(partition)
        if after.applied != before.applied or after.nonce != before.nonce:
            raise ChurnError(
                f"partition {partition} was written to while the snapshot was taken; a running worker takes its own "
                "(CHURN_SNAPSHOT_INTERVAL_S), or stop it first"
            )
        _complete(partition, written, after.customers)
        path = writer.finish(_stand(before, len(written), now_ms))
    except BaseException:
        writer.abandon()
        raise
    snapshots.prune(partition)
    return path


def _stand(claim: Claim, customers: int, now_ms: int) -> Stand:
    return Stand(claim.partition, dict(claim.applied), claim.model, claim.watermark_ms, dict(claim.counters), customers, now_ms)


def _complete(partition: int, written: Sequence[str], listed: bytes) -> None:
    """Raises StateDamaged unless exactly the listed customers were written."""
    expected = np.unique(np.frombuffer(listed, "<u8"))
    found = np.unique(np.frombuffer(digests(written), "<u8"))
    if not np.array_equal(expected, found):
        apart = len(np.setxor1d(expected, found))
        raise StateDamaged(f"partition {partition}: {apart} customers are listed and not stored, or stored and not listed")


def _pages(names: Iterator[str], size: int) -> Iterator[list[str]]:
    page: list[str] = []
    for name in names:
        page.append(name)
        if len(page) == size:
            yield page
            page = []
    if page:
        yield page


@dataclass(slots=True)
class _Job:
    """A snapshot being taken: the state after one batch, while later ones change it."""

    claim: Claim
    listed: bytes  # digests of the customers known when it began
    writer: Writer
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: set[str] = field(default_factory=set)  # in the file, or not there when it began
    written: list[str] = field(default_factory=list)
    failed: BaseException | None = None
    closed: bool = False  # nothing is copied any more

    def add(self, customers: Sequence[str], states: Sequence[CustomerState | None], *, last_chance: bool) -> None:
        """Put those in the file that are not yet decided on. last_chance: who is not stored now was not when it began."""
        with self.lock:
            if self.closed:
                return
            for customer, state in zip(customers, states, strict=True):
                if customer in self.done:
                    continue
                if state is not None:
                    self.writer.add(customer, state)
                    self.written.append(customer)
                elif not last_chance:
                    continue
                self.done.add(customer)


class Keeper(Protocol):
    """What the engine tells whoever keeps the state a second time. All calls come from the thread that applies."""

    def before_apply(self, partition: int, customers: Sequence[str]) -> None:
        """These customers are about to be overwritten."""
        ...

    def applied(self, claim: Claim) -> None:
        """A batch is done, outputs and all: where its partition stands now."""
        ...

    def given_up(self, partition: int) -> None:
        """The partition belongs to this worker no longer."""
        ...


class Snapshotter:
    """Takes snapshots of the owned partitions, one at a time, in a thread of its own.

    The state to keep is the one after some batch. The thread copies customer after customer; one that a later batch is about to
    overwrite is copied before that, by the thread that applies: its only pause, at most the load of one batch's customers.
    store: of the engine, for its thread; source: one more, for the copying. A failure is said and counted; the stream goes on.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        store: Source,
        source: Source,
        interval_s: float,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.time,
        page: int = MAX_CUSTOMERS,
    ) -> None:
        self._snapshots, self._store, self._source, self._clock = snapshots, store, source, clock
        self._interval_s, self._metrics, self._page = interval_s, metrics, page
        self._last: dict[int, float] = {}
        self._job: _Job | None = None
        self._queue: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the copying thread."""
        self._thread = threading.Thread(target=self._run, name="snapshot", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a snapshot is being taken."""
        return self._job is not None

    def stop(self) -> None:
        """Abandon what is being taken."""
        if self._job is not None:
            self._job.closed = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(5.0)

    # -- from the engine's thread

    def before_apply(self, partition: int, customers: Sequence[str]) -> None:
        """As in Keeper."""
        job = self._job
        if job is None or job.claim.partition != partition or job.failed is not None or job.closed:
            return
        todo = [customer for customer in customers if customer not in job.done]
        if not todo:
            return
        try:
            job.add(todo, self._store.load(partition, todo), last_chance=True)
        except (OSError, ChurnError) as error:  # the disk is full, the directory is gone; a customer is damaged, the store away
            job.failed = error

    def applied(self, claim: Claim) -> None:
        """As in Keeper. Begins a snapshot when it is time for one and none is being taken."""
        partition = claim.partition
        now = self._clock()
        if partition not in self._last:
            known = self._snapshots.of(partition)
            self._last[partition] = known[0].stand.taken_ms / 1_000 if known else now
        if self._job is None and now - self._last[partition] >= self._interval_s:
            self.begin(claim)

    def begin(self, claim: Claim) -> None:
        """Take a snapshot of the partition as it stands now."""
        self._last[claim.partition] = self._clock()
        try:
            # Who is known is asked now: a customer whose keys were deleted looks like a new one to whoever overwrites it later.
            self._job = _Job(claim, self._store.look(claim.partition).customers, self._snapshots.begin(claim.partition))
        except (OSError, ChurnError) as error:
            self._failed(claim.partition, error)
            return
        self._queue.put(self._job)

    def given_up(self, partition: int) -> None:
        """As in Keeper."""
        self._last.pop(partition, None)
        job = self._job
        if job is not None and job.claim.partition == partition:
            job.closed = True

    # -- the copying thread

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            partition = job.claim.partition
            try:
                path = self._copy(job)
            except Exception as error:
                with job.lock:
                    job.closed = True  # the applying thread may be about to add to it
                job.writer.abandon()
                self._failed(partition, error)
            else:
                if path is None:
                    job.writer.abandon()
                else:
                    self._metrics.snapshots.labels("taken").inc()
                    self._metrics.snapshot_time.labels(str(partition)).set(self._clock())
                    log.info("partition %d: snapshot of %d customers: %s", partition, job.writer.count, path)
            finally:
                self._job = None

    def _copy(self, job: _Job) -> Path | None:
        """The path, or None when the partition was given up meanwhile."""
        claim, source = job.claim, self._source
        for names in _pages(source.customers(claim.partition), self._page):
            if job.closed:
                return None
            if job.failed is not None:
                raise job.failed
            todo = [name for name in names if name not in job.done]
            job.add(todo, source.load(claim.partition, todo), last_chance=False)
            time.sleep(PAUSE_S)
        after = source.look(claim.partition)
        with job.lock:
            if job.closed:
                return None
            job.closed = True
        if job.failed is not None:
            raise job.failed
        if after.nonce != claim.nonce or after.rebuilding or any(after.applied[t] < offset for t, offset in claim.applied.items()):
            return None  # another owner, or a store that went back: whose states these are nobody knows
        _complete(claim.partition, job.written, job.listed)
        path = job.writer.finish(_stand(claim, len(job.written), int(self._clock() * 1_000)))
        self._snapshots.prune(claim.partition)
        return path

    def _failed(self, partition: int, error: BaseException) -> None:
        self._metrics.snapshots.labels("failed").inc()
        log.error("partition %d: no snapshot was taken: %s", partition, error)


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot as JSON types."""
    return {"path": str(snapshot.path), "bytes": snapshot.bytes, **asdict(snapshot.stand)}
