"""The Store protocol: partition state behind a fencing nonce.

One batch of a partition goes through `intend` -> (scores produced and acknowledged) -> `apply`. Every write presents the
nonce of `claim` and the offsets it follows; the store refuses both a stale owner and a broken chain. A partition whose state
is not whole goes through `begin_rebuild` -> `restore` ... -> `finish_rebuild`; no batch is taken until then.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from struct import Struct
from typing import Final, Protocol

from features.catalog import LAYOUT_HASH
from proto.errors import ChainBroken, Fenced, InvariantBroken, StateDamaged, StoreWentBack

Offsets = Mapping[str, int]
"""Per input topic (name without prefix) the highest offset handled; -1 when none."""

PREFIX: Final = Struct("<HHI")
"""First bytes of `CustomerState.main`: format version, number of closed chunks, number of the first one; all a store reads of it."""
MAX_CUSTOMERS: Final = 1_000
"""Most customers of one apply, of one restore, and of one load call to the server."""
FORMAT: Final = 1
"""Version of the bytes of a customer."""
PARTITION_FORMAT: Final = 2
"""Version of everything stored of a partition: its keys, its meta and the bytes of its customers."""
LAYOUT: Final = f"{PARTITION_FORMAT}/{LAYOUT_HASH[:16]}"
"""What a partition says it holds: format and feature catalog. Carry and vector mean nothing under another catalog."""
MIGRATED: Final = (f"1/{LAYOUT_HASH[:16]}",)
"""Former layouts that a claim turns into LAYOUT. 1 had no list of customers."""
DIGEST_SIZE: Final = 8
"""Bytes of a customer in the list of known customers."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What a batch is going to do, written before it produces anything; after a crash exactly this batch runs first.

    to: offsets the batch ends with; model: digest of the manifest that scores it ("" = no model); scored_at_ms: wall clock
    stamped on its records.
    attempts: how often the batch was begun. trying: (topic index, offset) of the record being handled alone, and how often it
    was; given_up: records that are not handled, since workers ended each time they were.
    """

    to: Offsets
    model: str
    scored_at_ms: int
    attempts: int = 1
    trying: tuple[int, int, int] | None = None
    given_up: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """What a partition looks like to its new owner.

    customers: digests (`digests`) of everybody with state, in order of arrival; after a migration or a rebuild in any order.
    outbox: outputs of the last applied batch, b"" when none were kept. fresh: no batch was ever applied here, as far as the
    store knows. damaged: why the state must be rebuilt, "" when nothing is missing. rebuilding: a rebuild was begun and not
    finished; customers and applied say nothing then.
    plan: never from a store; what was emitted beyond `applied` and has to be handled again in just this order, as (cut of each
    topic ..., index of the source topic) per record. The next batch ends with the last of them (streams/rebuild.py).
    """

    partition: int
    nonce: str
    epoch: int
    applied: Offsets
    intent: Intent | None
    model: str  # digest in force after the last apply, "" when none
    watermark_ms: int  # newest event time handled, -1 when none
    counters: Mapping[str, int]  # events, scores, dead_letters, duplicates, duplicate_conflicts, profile_facts; since the beginning
    customers: bytes = b""
    outbox: bytes = b""
    fresh: bool = False
    damaged: str = ""
    rebuilding: bool = False
    plan: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a partition stands, read in passing. whole: its list of customers is as long as it should be. Not of one moment: while
    a batch is applied, offsets and list may not belong together."""

    nonce: str  # its owner's, "" when nobody's
    applied: Offsets
    whole: bool


@dataclass(frozen=True, slots=True)
class CustomerState:
    """One customer as stored. `main` starts with a prefix the store may read (features/state.py): first and number of closed chunks."""

    main: bytes
    chunks: tuple[bytes, ...]  # closed chunks, oldest first


@dataclass(frozen=True, slots=True)
class CustomerWrite:
    """Changes of one customer: `main` always, closed chunks by number when changed, numbers of chunks that left.

    new: nothing of the customer is stored yet, so apply adds it to the known customers (`restore` sees for itself).
    """

    customer: str
    main: bytes
    chunks: tuple[tuple[int, bytes], ...] = ()
    dropped: tuple[int, ...] = ()
    new: bool = False


@dataclass(frozen=True, slots=True)
class Apply:
    """One batch of one partition, stored all or nothing. `counters` are increments; at most 1,000 customers.

    outbox: the batch's outputs, kept until the next apply replaces them; b"" keeps none.
    """

    partition: int
    nonce: str
    former: Offsets
    to: Offsets
    model: str
    watermark_ms: int
    counters: Mapping[str, int]
    customers: Sequence[CustomerWrite]
    outbox: bytes = b""


class Store(Protocol):
    """State of partitions. Every method may raise StoreUnavailable; every write but `claim` and `release` raises Fenced when
    another has claimed the partition, and ChainBroken when the stored offsets, or a rebuild begun or not begun, forbid it
    (StateDamaged when the list of known customers is not whole). A call whose answer was lost may be repeated."""

    def claim(self, partition: int, nonce: str) -> Claim:
        """Make `nonce` the only writer of the partition and say where it stands; state of a former format is migrated first.

        Raises ChainBroken for an unknown state format, Fenced when another claims the partition while it is migrated.
        """
        ...

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        """Record the intent under the nonce, if the applied offsets are `former`."""
        ...

    def standings(self, partitions: Sequence[int]) -> list[Standing]:
        """Where partitions stand, cheap whatever they hold."""
        ...

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        """States in the order asked; None for a customer of whom nothing is stored. Raises StateDamaged for a missing chunk."""
        ...

    def apply(self, batches: Sequence[Apply]) -> None:
        """Store batches of different partitions, each atomically; a repeated apply of the same batch is accepted once."""
        ...

    def release(self, partition: int, nonce: str) -> None:
        """Give the partition up on a graceful stop; silently nothing when already fenced."""
        ...

    def begin_rebuild(self, partition: int, nonce: str) -> None:
        """Remove all customers, their list and the outbox; from here to `finish_rebuild` no batch is taken. Meta keeps its offsets.

        Called again, it begins again.
        """
        ...

    def restore(self, partition: int, nonce: str, customers: Sequence[CustomerWrite]) -> None:
        """Write at most 1,000 customers, each atomically with the others, while rebuilding; the same one may be written again.

        Each call follows the one before: raises ChainBroken when the store has lost one since (the server counts, and so does this).
        """
        ...

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
        """Take batches again, from here: this replaces the offsets, model, watermark, counters and intent of meta."""
        ...


def digests(customers: Iterable[str]) -> bytes:
    """8 bytes for each customer, one after the other: blake2b of its id (UTF-8, a lone surrogate stays itself)."""
    return b"".join([blake2b(customer.encode("utf-8", "surrogatepass"), digest_size=DIGEST_SIZE).digest() for customer in customers])


def damage(fresh: bool, rebuilding: bool, counted: int, listed: int, outbox_counted: int, outbox: int) -> str:
    """Why the keys of a partition do not belong together, "" when they do.

    counted: customers by meta; listed: bytes of their list; outbox_counted, outbox: its bytes by meta, and those found.
    """
    if rebuilding:
        return ""  # incomplete by nature
    if fresh and listed:
        return f"a list of {listed / DIGEST_SIZE:g} customers was found without its meta"
    if listed != DIGEST_SIZE * counted:
        return f"{counted} customers are stored, the list of them holds {listed / DIGEST_SIZE:g}"
    if outbox != outbox_counted:
        return f"the outbox holds {outbox} bytes, {outbox_counted} were written"
    return ""


def check(batch: Apply) -> None:
    """Refuse an apply no store could keep its promises for: it must advance, and never go back, on the topics it follows.

    A batch that advances nothing could not be told from its own repetition. Raises InvariantBroken.
    """
    if batch.former.keys() != batch.to.keys() or any(batch.to[topic] < offset for topic, offset in batch.former.items()):
        raise InvariantBroken(f"partition {batch.partition}: a batch from {dict(batch.former)} to {dict(batch.to)} goes back")
    if batch.former == batch.to:
        raise InvariantBroken(f"partition {batch.partition}: a batch that ends where it began, {dict(batch.to)}")
    check_size(batch.partition, batch.customers)


def check_size(partition: int, customers: Sequence[CustomerWrite]) -> None:
    """Raises InvariantBroken for more customers than one call takes."""
    if len(customers) > MAX_CUSTOMERS:
        raise InvariantBroken(f"partition {partition}: {len(customers)} customers in one batch, at most {MAX_CUSTOMERS}")


# -- refusals, in the words of every store


def fenced(partition: int) -> Fenced:
    """Another nonce owns the partition."""
    return Fenced(f"partition {partition} has another owner now")


def broken(partition: int, former: Offsets, stored: Offsets) -> ChainBroken:
    """A batch that follows other offsets than the stored ones."""
    text = f"partition {partition}: this batch follows {dict(former)}, the store holds {dict(stored)}"
    if all(stored[topic] <= offset for topic, offset in former.items()):
        return StoreWentBack(f"{text}: it went back")
    return ChainBroken(text)


def unknown_format(partition: int, found: str) -> ChainBroken:
    """State written by another version, or under another catalog."""
    version, _, catalog = found.partition("/")
    newer = version.isdigit() and int(version) > PARTITION_FORMAT
    why = "was written by a newer version" if newer else f"is under another catalog ({catalog})" if LAYOUT.startswith(f"{version}/") else ""
    return ChainBroken(
        f"partition {partition}: state format {found} {why or 'is of a version that is not migrated'}; this version reads {LAYOUT}: "
        "use the version that wrote it, or rebuild from the input topics in another namespace"
    )


def gone(partition: int) -> ChainBroken:
    """A rebuild goes on, but the partition's meta is not there any more."""
    return StoreWentBack(f"partition {partition}: nothing of it is stored any more; claim it again")


def rebuilding(partition: int) -> ChainBroken:
    """A batch came while the partition is rebuilt."""
    return ChainBroken(f"partition {partition} is being rebuilt: it takes no batch before that is finished")


def not_rebuilding(partition: int) -> ChainBroken:
    """A customer to restore, or the end of a rebuild, and none was begun."""
    return ChainBroken(f"partition {partition} is not being rebuilt")


def rebuild_went_back(partition: int) -> ChainBroken:
    """A part of a rebuild follows parts that are not there: the store has lost its newest writes meanwhile."""
    return StoreWentBack(f"partition {partition}: the store went back while it was rebuilt; begin again")


def list_damaged(partition: int) -> StateDamaged:
    """The list of known customers is shorter or longer than meta counts."""
    return StateDamaged(f"partition {partition}: its list of customers is not whole; rebuild the partition")


def chunk_missing(partition: int, customer: str) -> StateDamaged:
    """A closed chunk that `main` counts is not stored."""
    return StateDamaged(f"partition {partition}: a closed chunk of customer {customer!r} is missing; rebuild the partition")
