"""The Store in memory: the same rules as on Redis, for tests, simulations and a look without servers."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

from features.facts import TOPICS
from features.store import (
    DIGEST_SIZE,
    LAYOUT,
    MIGRATED,
    PREFIX,
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
from proto.errors import ChainBroken, Fenced


@dataclass(slots=True)
class _Meta:
    owner: str | None = None
    format: str = LAYOUT
    epoch: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    intent: Intent | None = None
    model: str = ""
    watermark_ms: int = -1
    counters: dict[str, int] = field(default_factory=dict)
    customers: int = 0
    outbox: int = 0
    rebuilding: int = 0  # 0 no, else one more than the parts restored so far


@dataclass(slots=True)
class _Partition:
    """What Redis holds under one key each: any of it can be lost alone."""

    meta: _Meta | None = None
    who: bytearray = field(default_factory=bytearray)
    outbox: bytes = b""
    mains: dict[str, bytes] = field(default_factory=dict)
    chunks: dict[tuple[str, int], bytes] = field(default_factory=dict)


class MemoryStore:
    """Partitions in dictionaries. One writer thread at a time, as everywhere."""

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition] = {}
        self._restored: dict[int, int] = {}  # parts of the rebuild under way, as its owner knows: not lost with the state

    def claim(self, partition: int, nonce: str) -> Claim:
        """As in Store."""
        found = self._partitions.setdefault(partition, _Partition())
        meta = found.meta = found.meta or _Meta()
        if meta.format != LAYOUT:
            if meta.format not in MIGRATED:
                raise unknown_format(partition, meta.format)
            found.who = bytearray(b"".join(sorted(digests([customer]) for customer in found.mains)))
            meta.customers, meta.format = len(found.mains), LAYOUT
        if meta.owner != nonce:
            meta.owner = nonce
            meta.epoch += 1
        return self.look(partition)

    def look(self, partition: int) -> Claim:
        """Where the partition stands, without claiming it; the nonce is its owner's, "" when nobody's."""
        found = self._found(partition)
        meta = found.meta or _Meta()
        fresh = not meta.applied
        return Claim(
            partition=partition,
            nonce=meta.owner or "",
            epoch=meta.epoch,
            applied=dict.fromkeys(TOPICS, -1) | meta.applied,
            intent=meta.intent,
            model=meta.model,
            watermark_ms=meta.watermark_ms,
            counters=dict(meta.counters),
            customers=bytes(found.who),
            outbox=found.outbox,
            fresh=fresh,
            damaged=damage(fresh, meta.rebuilding > 0, meta.customers, len(found.who), meta.outbox, len(found.outbox)),
            rebuilding=meta.rebuilding > 0,
        )

    def standings(self, partitions: Sequence[int]) -> list[Standing]:
        """Where partitions stand."""
        looks = map(self.look, partitions)
        return [Standing(found.nonce, found.applied, not found.damaged) for found in looks]

    def intend(self, partition: int, nonce: str, former: Offsets, intent: Intent) -> None:
        """As in Store."""
        _, meta = self._batch(partition, nonce, former)
        if _stored(meta, former) != dict(former):
            raise broken(partition, former, _stored(meta, former))
        meta.intent = replace(intent, to=dict(intent.to))

    def load(self, partition: int, customers: Sequence[str]) -> list[CustomerState | None]:
        """As in Store."""
        found = self._found(partition)
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
        if found is not None and found.meta is not None and found.meta.owner == nonce:
            found.meta.owner = None

    def begin_rebuild(self, partition: int, nonce: str) -> None:
        """As in Store."""
        found, meta = self._rebuild(partition, nonce)
        meta.rebuilding, meta.customers, meta.outbox = 1, 0, 0
        self._restored[partition] = 0
        found.who.clear()
        found.outbox = b""
        found.mains.clear()
        found.chunks.clear()

    def restore(self, partition: int, nonce: str, customers: Sequence[CustomerWrite]) -> None:
        """As in Store."""
        check_size(partition, customers)
        found, meta = self._rebuild(partition, nonce)
        if not meta.rebuilding:
            raise not_rebuilding(partition)
        if meta.rebuilding != self._restored.get(partition, 0) + 1:
            raise rebuild_went_back(partition)
        _check_list(partition, found, meta)
        meta.rebuilding += 1
        self._restored[partition] = meta.rebuilding - 1
        for write in customers:
            if write.customer not in found.mains:
                found.who += digests([write.customer])
                meta.customers += 1
            _write(found, write)

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
        found, meta = self._rebuild(partition, nonce)
        if not meta.rebuilding:
            if _stored(meta, applied) == dict(applied):
                return  # finished already: the answer was lost
            raise not_rebuilding(partition)
        if meta.rebuilding != self._restored.get(partition, 0) + 1:
            raise rebuild_went_back(partition)
        _check_list(partition, found, meta)
        meta.applied, meta.counters, meta.rebuilding = dict(applied), dict(counters), 0
        meta.model, meta.watermark_ms = model, watermark_ms
        meta.intent = None if intent is None else replace(intent, to=dict(intent.to))

    def customers(self, partition: int) -> Iterator[str]:
        """Every customer of the partition, in no order."""
        yield from list(self._found(partition).mains)

    def snapshot(self) -> Mapping[int, object]:
        """A copy of everything, for `go_back`."""
        return deepcopy(self._partitions)

    def go_back(self, snapshot: Mapping[int, object]) -> None:
        """Be as at a snapshot again, as a server is that lost its tail."""
        self._partitions = {key: deepcopy(value) for key, value in snapshot.items() if isinstance(value, _Partition)}

    def lose_meta(self, partition: int) -> None:
        """Lose one key, as when somebody deletes it."""
        self._found(partition).meta = None

    def lose_list(self, partition: int) -> None:
        """Lose the list of known customers."""
        self._found(partition).who.clear()

    def lose_outbox(self, partition: int) -> None:
        """Lose the outbox."""
        self._found(partition).outbox = b""

    def lose_customer(self, partition: int, customer: str) -> None:
        """Lose the main key of a customer. Raises KeyError when it has none."""
        del self._found(partition).mains[customer]

    def lose_chunk(self, partition: int, customer: str, number: int) -> None:
        """Lose a closed chunk. Raises KeyError when there is none."""
        del self._found(partition).chunks[customer, number]

    def _found(self, partition: int) -> _Partition:
        return self._partitions.get(partition, _Partition())

    def _owned(self, partition: int, nonce: str) -> tuple[_Partition, _Meta] | None:
        """None when nothing is stored of the partition. Raises Fenced."""
        found = self._partitions.get(partition)
        if found is None or found.meta is None:
            return None
        if found.meta.owner != nonce:
            raise fenced(partition)
        return found, found.meta

    def _rebuild(self, partition: int, nonce: str) -> tuple[_Partition, _Meta]:
        """What a rebuild writes to."""
        owned = self._owned(partition, nonce)
        if owned is None:
            raise gone(partition)
        return owned

    def _batch(self, partition: int, nonce: str, former: Offsets) -> tuple[_Partition, _Meta]:
        """What a batch writes to, once everything but its offsets is in order."""
        owned = self._owned(partition, nonce)
        if owned is None:  # it lost what it had: nobody writes before a claim
            raise broken(partition, former, dict.fromkeys(former, -1))
        found, meta = owned
        if meta.rebuilding:
            raise rebuilding(partition)
        _check_list(partition, found, meta)
        return found, meta

    def _apply(self, batch: Apply) -> Fenced | ChainBroken | None:
        try:
            found, meta = self._batch(batch.partition, batch.nonce, batch.former)
        except (Fenced, ChainBroken) as refusal:
            return refusal
        stored = _stored(meta, batch.to)
        if stored == dict(batch.to):
            return None  # this very batch is in already: its answer was lost
        if stored != dict(batch.former):
            return broken(batch.partition, batch.former, stored)
        for write in batch.customers:
            if write.new:
                found.who += digests([write.customer])
                meta.customers += 1
            _write(found, write)
        for name, count in batch.counters.items():
            meta.counters[name] = meta.counters.get(name, 0) + count
        meta.applied.update(batch.to)
        meta.watermark_ms = max(meta.watermark_ms, batch.watermark_ms)
        meta.model, meta.intent = batch.model, None
        found.outbox, meta.outbox = batch.outbox, len(batch.outbox)
        return None


def _write(found: _Partition, write: CustomerWrite) -> None:
    found.mains[write.customer] = write.main
    found.chunks.update({(write.customer, number): chunk for number, chunk in write.chunks})
    for number in write.dropped:
        found.chunks.pop((write.customer, number), None)


def _check_list(partition: int, found: _Partition, meta: _Meta) -> None:
    if len(found.who) != DIGEST_SIZE * meta.customers:
        raise list_damaged(partition)


def _stored(meta: _Meta, topics: Offsets) -> dict[str, int]:
    return {topic: meta.applied.get(topic, -1) for topic in topics}


def _state(partition: int, found: _Partition, customer: str) -> CustomerState | None:
    main = found.mains.get(customer)
    if main is None:
        return None
    _, closed, first = PREFIX.unpack_from(main)
    chunks = [found.chunks.get((customer, number)) for number in range(first, first + closed)]
    present = tuple(chunk for chunk in chunks if chunk is not None)
    if len(present) < closed:
        raise chunk_missing(partition, customer)
    return CustomerState(main, present)
