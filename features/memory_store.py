"""The Store in memory: the same rules as on Redis, for tests, simulations and a look without servers."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

from features.facts import TOPICS
from features.store import LAYOUT, PREFIX, Apply, Claim, CustomerState, Intent, Offsets, check
from proto.errors import ChainBroken, Fenced, StateDamaged


@dataclass(slots=True)
class _Partition:
    owner: str | None = None
    format: str = LAYOUT
    epoch: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    intent: Intent | None = None
    model: str = ""
    watermark_ms: int = -1
    counters: dict[str, int] = field(default_factory=dict)
    mains: dict[str, bytes] = field(default_factory=dict)
    chunks: dict[tuple[str, int], bytes] = field(default_factory=dict)


class MemoryStore:
    """Partitions in dictionaries. One writer thread at a time, as everywhere."""

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition] = {}

    def claim(self, partition: int, nonce: str) -> Claim:
        """As in Store."""
        found = self._partitions.setdefault(partition, _Partition())
        if found.format != LAYOUT:
            raise ChainBroken(f"partition {partition}: state format {found.format} is not the one of this version and catalog ({LAYOUT})")
        if found.owner != nonce:
            found.owner = nonce
            found.epoch += 1
        return self.look(partition)

    def look(self, partition: int) -> Claim:
        """Where the partition stands, without claiming it; the nonce is its owner's, "" when nobody's."""
        found = self._partitions.get(partition, _Partition())
        applied = dict.fromkeys(TOPICS, -1) | found.applied
        return Claim(
            partition, found.owner or "", found.epoch, applied, found.intent, found.model, found.watermark_ms, dict(found.counters)
        )

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        """As in Store."""
        found = self._owned(partition, nonce, former)
        if _stored(found, former) != dict(former):
            raise ChainBroken(_broken(partition, former, _stored(found, former)))
        found.intent = replace(intent, to=dict(intent.to))

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        """As in Store."""
        found = self._partitions.get(partition, _Partition())
        return [_state(partition, found, customer) for customer in customers]

    def apply(self, batches: Sequence[Apply]) -> None:
        """As in Store. Every batch is tried; the first refusal is raised after the last."""
        for batch in batches:
            check(batch)
        refusals = [refusal for batch in batches if (refusal := self._apply(batch)) is not None]
        if refusals:
            raise refusals[0]

    def release(self, partition: int, nonce: str) -> None:
        """As in Store."""
        found = self._partitions.get(partition)
        if found is not None and found.owner == nonce:
            found.owner = None

    def customers(self, partition: int) -> Iterator[str]:
        """Every customer of the partition, in no order."""
        yield from list(self._partitions.get(partition, _Partition()).mains)

    def snapshot(self) -> Mapping[int, object]:
        """A copy of everything, for `restore`."""
        return deepcopy(self._partitions)

    def restore(self, snapshot: Mapping[int, object]) -> None:
        """Go back to a snapshot, as a server does that lost its tail."""
        self._partitions = {key: deepcopy(value) for key, value in snapshot.items() if isinstance(value, _Partition)}

    def _owned(self, partition: int, nonce: str, former: Offsets) -> _Partition:
        found = self._partitions.get(partition)
        if found is None:  # it lost what it had: nobody writes before a claim
            raise ChainBroken(_broken(partition, former, dict.fromkeys(former, -1)))
        if found.owner != nonce:
            raise Fenced(f"partition {partition} has another owner now")
        return found

    def _apply(self, batch: Apply) -> Fenced | ChainBroken | None:
        try:
            found = self._owned(batch.partition, batch.nonce, batch.former)
        except (Fenced, ChainBroken) as refusal:
            return refusal
        stored = _stored(found, batch.to)
        if stored == dict(batch.to):
            return None  # this very batch is in already: its answer was lost
        if stored != dict(batch.former):
            return ChainBroken(_broken(batch.partition, batch.former, stored))
        for write in batch.customers:
            found.mains[write.customer] = write.main
            found.chunks.update({(write.customer, number): chunk for number, chunk in write.chunks})
            for number in write.dropped:
                found.chunks.pop((write.customer, number), None)
        for name, count in batch.counters.items():
            found.counters[name] = found.counters.get(name, 0) + count
        found.applied.update(batch.to)
        found.watermark_ms = max(found.watermark_ms, batch.watermark_ms)
        found.model, found.intent = batch.model, None
        return None


def _stored(found: _Partition, topics: Offsets) -> dict[str, int]:
    return {topic: found.applied.get(topic, -1) for topic in topics}


def _broken(partition: int, former: Offsets, stored: Offsets) -> str:
    return f"partition {partition}: this batch follows {dict(former)}, the store holds {dict(stored)}"


def _state(partition: int, found: _Partition, customer: str) -> CustomerState | None:
    main = found.mains.get(customer)
    if main is None:
        return None
    _, closed, first = PREFIX.unpack_from(main)
    chunks = [found.chunks.get((customer, number)) for number in range(first, first + closed)]
    present = tuple(chunk for chunk in chunks if chunk is not None)
    if len(present) < closed:
        raise StateDamaged(f"partition {partition}: a closed chunk of customer {customer!r} is missing; rebuild the partition")
    return CustomerState(main, present)
