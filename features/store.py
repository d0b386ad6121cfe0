"""The Store protocol: partition state behind a fencing nonce.

One batch of a partition goes through `intend` -> (scores produced and acknowledged) -> `apply`. Every write presents the
nonce of `claim` and the offsets it follows; the store refuses both a stale owner and a broken chain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final, Protocol

from features.catalog import LAYOUT_HASH
from proto.errors import InvariantBroken

Offsets = Mapping[str, int]
"""Per input topic (name without prefix) the highest offset handled; -1 when none."""

PREFIX: Final = Struct("<HHI")
"""First bytes of `CustomerState.main`: format version, number of closed chunks, number of the first one; all a store reads of it."""
MAX_CUSTOMERS: Final = 1_000
"""Most customers of one apply and of one load call to the server."""
FORMAT: Final = 1
"""Version of everything stored: the keys of a partition, its meta and the bytes of a customer."""
LAYOUT: Final = f"{FORMAT}/{LAYOUT_HASH[:16]}"
"""What a partition says it holds: format and feature catalog. Carry and vector mean nothing under another catalog."""


@dataclass(frozen=True, slots=True)
class Intent:
    """What a batch is going to do, written before it produces anything; after a crash exactly this batch runs first.

    to: offsets the batch ends with; model: digest of the manifest that scores it ("" = no model); scored_at_ms: wall clock
    stamped on its records.
    """

    to: Offsets
    model: str
    scored_at_ms: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What a partition looks like to its new owner."""

    partition: int
    nonce: str
    epoch: int
    applied: Offsets
    intent: Intent | None
    model: str  # digest in force after the last apply, "" when none
    watermark_ms: int  # newest event time handled, -1 when none
    counters: Mapping[str, int]  # events, scores, dead_letters, duplicates, duplicate_conflicts, profile_facts; since the beginning


@dataclass(frozen=True, slots=True)
class CustomerState:
    """One customer as stored. `main` starts with a prefix the store may read (features/state.py): first and number of closed chunks."""

    main: bytes
    chunks: tuple[bytes, ...]  # closed chunks, oldest first


@dataclass(frozen=True, slots=True)
class CustomerWrite:
    """Changes of one customer: `main` always, closed chunks by number when changed, numbers of chunks that left."""

    customer: str
    main: bytes
    chunks: tuple[tuple[int, bytes], ...] = ()
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Apply:
    """One batch of one partition, stored all or nothing. `counters` are increments; at most 1,000 customers."""

    partition: int
    nonce: str
    former: Offsets
    to: Offsets
    model: str
    watermark_ms: int
    counters: Mapping[str, int]
    customers: Sequence[CustomerWrite]


class Store(Protocol):
    """State of partitions. Every method may raise StoreUnavailable; `intend` and `apply` raise Fenced or ChainBroken."""

    def claim(self, partition: int, nonce: str) -> Claim:
        """Make `nonce` the only writer of the partition and say where it stands. Raises ChainBroken for an unknown state format."""
        ...

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        """Record the intent under the nonce, if the applied offsets are `former`."""
        ...

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        """States in the order asked; None for a customer never seen."""
        ...

    def apply(self, batches: Sequence[Apply]) -> None:
        """Store batches of different partitions, each atomically; a repeated apply of the same batch is accepted once."""
        ...

    def release(self, partition: int, nonce: str) -> None:
        """Give the partition up on a graceful stop; silently nothing when already fenced."""
        ...


def check(batch: Apply) -> None:
    """Refuse an apply no store could keep its promises for: it must advance, and never go back, on the topics it follows.

    A batch that advances nothing could not be told from its own repetition. Raises InvariantBroken.
    """
    if batch.former.keys() != batch.to.keys() or any(batch.to[topic] < offset for topic, offset in batch.former.items()):
        raise InvariantBroken(f"partition {batch.partition}: a batch from {dict(batch.former)} to {dict(batch.to)} goes back")
    if batch.former == batch.to:
        raise InvariantBroken(f"partition {batch.partition}: a batch that ends where it began, {dict(batch.to)}")
    if len(batch.customers) > MAX_CUSTOMERS:
        raise InvariantBroken(f"partition {batch.partition}: {len(batch.customers)} customers in one batch, at most {MAX_CUSTOMERS}")
