"""The contract of a Store: one list of checks, held by the store in memory and by the one on a real Redis.

The checks are plain functions over a `World`, so that they can also be pointed at a function library with a fault planted
in it: a check that never failed proves nothing.
"""

import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Protocol, TypeVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from features.facts import TOPICS
from features.history import Histories
from features.memory_store import MemoryStore
from features.redis_store import RedisStore, redis_bytes
from features.store import (
    FORMAT,
    LAYOUT,
    MIGRATED,
    PREFIX,
    Apply,
    Claim,
    CustomerState,
    CustomerWrite,
    Intent,
    Offsets,
    Store,
    digests,
)
from proto.errors import ChainBroken, Fenced, InvariantBroken, StateDamaged, StoreUnavailable
from tests.contracts.redis_servers import Proxy, RedisCluster, RedisServer, running

Subject = TypeVar("Subject")

START: dict[str, int] = dict.fromkeys(TOPICS, -1)
EVERY_BYTE = bytes(range(256))


class Extended(Store, Protocol):
    """What both stores offer beside the contract."""

    def look(self, partition: int) -> Claim: ...
    def customers(self, partition: int) -> Iterator[str]: ...


class World(Protocol):
    """Some stores over the same state, and what can happen to that state."""

    def store(self) -> Extended: ...
    def remember(self) -> Callable[[], None]:
        """Note the state as it is now; calling the answer brings it back, as a server does that lost its tail."""
        ...

    def lose_everything(self) -> None: ...
    def lose_meta(self, partition: int) -> None: ...
    def lose_list(self, partition: int) -> None: ...
    def lose_outbox(self, partition: int) -> None: ...
    def lose_customer(self, partition: int, customer: str) -> None: ...
    def lose_chunk(self, partition: int, customer: str, number: int) -> None: ...
    def write_format(self, partition: int, layout: str) -> None: ...
    def be_of_format_1(self, partition: int) -> None: ...


class MemoryWorld:
    def __init__(self) -> None:
        self._store = MemoryStore()

    def store(self) -> Extended:
        return self._store

    def remember(self) -> Callable[[], None]:
        noted = self._store.snapshot()
        return lambda: self._store.go_back(noted)

    def lose_everything(self) -> None:
        self._store.go_back({})

    def lose_meta(self, partition: int) -> None:
        self._store.lose_meta(partition)

    def lose_list(self, partition: int) -> None:
        self._store.lose_list(partition)

    def lose_outbox(self, partition: int) -> None:
        self._store.lose_outbox(partition)

    def lose_customer(self, partition: int, customer: str) -> None:
        self._store.lose_customer(partition, customer)

    def lose_chunk(self, partition: int, customer: str, number: int) -> None:
        self._store.lose_chunk(partition, customer, number)

    def write_format(self, partition: int, layout: str) -> None:
        meta = self._store._partitions[partition].meta
        assert meta is not None
        meta.format = layout

    def be_of_format_1(self, partition: int) -> None:
        found = self._store._partitions[partition]
        assert found.meta is not None
        found.meta.format, found.meta.customers = MIGRATED[0], 0
        found.who.clear()


class RedisWorld:
    def __init__(self, server: RedisServer | RedisCluster, library_text: str | None = None) -> None:
        self._server = server
        self._clients = server.clients()
        for client in self._clients:
            client.flushall()
        self._url, self._library, self._stores = server.url, library_text, list[RedisStore]()

    def store(self) -> Extended:
        self._stores.append(RedisStore(self._url, library_text=self._library))
        return self._stores[-1]

    def remember(self) -> Callable[[], None]:
        dumps = [(client, {key: client.dump(key) for key in client.scan_iter()}) for client in self._clients]

        def bring_back() -> None:
            for client, values in dumps:
                client.flushall()
                for key, dump in values.items():
                    client.restore(key, 0, dump)

        return bring_back

    def lose_everything(self) -> None:
        for client in self._clients:
            client.flushall()
            client.function_flush()

    def lose_meta(self, partition: int) -> None:
        self._lose(partition, "meta")

    def lose_list(self, partition: int) -> None:
        self._lose(partition, "who")

    def lose_outbox(self, partition: int) -> None:
        self._lose(partition, "outbox")

    def lose_customer(self, partition: int, customer: str) -> None:
        if self._lose(partition, f"c:{customer}") == 0:
            raise KeyError(customer)

    def lose_chunk(self, partition: int, customer: str, number: int) -> None:
        if self._lose(partition, f"f:{customer}:{number}") == 0:
            raise KeyError((customer, number))

    def write_format(self, partition: int, layout: str) -> None:
        key = f"churn:{{{partition}}}:meta"
        with closing(self._server.client_of(key)) as client:
            client.hset(key, "format", layout)

    def be_of_format_1(self, partition: int) -> None:
        self.write_format(partition, MIGRATED[0])
        key = f"churn:{{{partition}}}:meta"
        with closing(self._server.client_of(key)) as client:
            client.hdel(key, "customers", "outbox")
        self.lose_list(partition)

    def close(self) -> None:
        for closed in (*self._stores, *self._clients):
            closed.close()

    def _lose(self, partition: int, name: str) -> int:
        key = f"churn:{{{partition}}}:{name}"
        with closing(self._server.client_of(key)) as client:
            gone: int = client.delete(key)
            return gone


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    with running(found):
        yield found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    found = RedisCluster(tmp_path_factory.mktemp("cluster"))
    with running(found):
        yield found


@pytest.fixture
def redis_world(server: RedisServer) -> Iterator[RedisWorld]:
    with closing(RedisWorld(server)) as made:
        yield made


@pytest.fixture
def cluster_world(cluster: RedisCluster) -> Iterator[RedisWorld]:
    with closing(RedisWorld(cluster)) as made:
        yield made


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.servers), pytest.param("cluster", marks=pytest.mark.servers)])
def world(request: pytest.FixtureRequest) -> World:
    found: World = MemoryWorld() if request.param == "memory" else request.getfixturevalue(f"{request.param}_world")
    return found


# -- values


def main(closed: int = 0, first: int = 0, body: bytes = b"") -> bytes:
    """Bytes a store takes for a customer's main."""
    return PREFIX.pack(FORMAT, closed, first) + body


def batch(nonce: str, former: Offsets, steps: dict[str, int], **more: object) -> Apply:
    to = {topic: former[topic] + steps.get(topic, 0) for topic in former}
    plain = Apply(3, nonce, former, to, "model-1", 1_000, {"events": 5, "scores": 5}, (CustomerWrite("c1", main()),))
    return replace(plain, **more)  # type: ignore[arg-type]  # fields of Apply, by name


def state(*, body: bytes = b"", first: int = 0, chunks: tuple[bytes, ...] = ()) -> CustomerState:
    return CustomerState(main(len(chunks), first, body), chunks)


# -- checks


def a_new_partition_begins_before_the_first_record(world: World) -> None:
    claim = world.store().claim(3, "n1")
    assert claim == Claim(3, "n1", 1, START, None, "", -1, {}, fresh=True)


def a_claim_repeated_by_the_same_owner_changes_nothing(world: World) -> None:
    store = world.store()
    assert store.claim(3, "n1") == store.claim(3, "n1")
    assert store.claim(3, "n2").epoch == 2


def a_batch_is_there_after_it_was_applied(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 10}, watermark_ms=1_234_567_890_123, model="m", counters={"events": 7})
    store.apply([one])
    two = batch("n1", one.to, {"transactions": 2**52}, watermark_ms=5, model="m2", counters={"events": 2**40, "scores": 1})
    store.apply([two])
    claim = world.store().claim(3, "n2")
    assert claim.applied == START | {"logins": 9, "transactions": 2**52 - 1}
    assert (claim.model, claim.epoch, claim.intent) == ("m2", 2, None)
    assert claim.watermark_ms == 1_234_567_890_123  # it never goes back
    assert claim.counters == {"events": 2**40 + 7, "scores": 1}
    assert store.load(3, ["c1", "c2"]) == [state(), None]


def partitions_do_not_share_anything(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.claim(4, "n2")
    store.apply([batch("n1", START, {"logins": 1}), batch("n2", START, {"logins": 2}, partition=4, customers=())])
    assert (store.look(3).applied["logins"], store.look(4).applied["logins"]) == (0, 1)
    assert store.load(4, ["c1"]) == [None]
    assert list(store.customers(3)) == ["c1"]
    assert list(store.customers(4)) == []


def looking_claims_nothing(world: World) -> None:
    store = world.store()
    assert store.look(3) == Claim(3, "", 0, START, None, "", -1, {}, fresh=True)
    store.claim(3, "n1")
    store.look(3)
    store.apply([batch("n1", START, {"logins": 1})])


def a_former_owner_can_write_no_more(world: World) -> None:
    old, new = world.store(), world.store()
    old.claim(3, "n1")
    new.claim(3, "n2")
    with pytest.raises(Fenced, match="partition 3"):
        old.apply([batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c1", main(body=b"zombie")),))])
    with pytest.raises(Fenced, match="partition 3"):
        old.intend(3, "n1", START, Intent(START | {"logins": 4}, "m", 1))
    claim = new.look(3)
    assert (claim.applied, claim.intent, claim.counters) == (START, None, {})
    assert new.load(3, ["c1"]) == [None]


def a_batch_that_does_not_follow_is_refused(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.apply([batch("n1", START, {"logins": 10})])
    ahead = START | {"logins": 20}
    with pytest.raises(ChainBroken, match=r"partition 3.*'logins': 20.*'logins': 9"):
        store.apply([batch("n1", ahead, {"logins": 1}, customers=(CustomerWrite("c9", main()),))])
    behind = START | {"logins": 4}
    with pytest.raises(ChainBroken):
        store.apply([batch("n1", behind, {"logins": 10})])
    other = START | {"logins": 9, "transactions": 7}  # one topic fits, another does not
    with pytest.raises(ChainBroken):
        store.apply([batch("n1", other, {"logins": 1})])
    assert store.look(3).counters == {"events": 5, "scores": 5}
    assert store.load(3, ["c9"]) == [None]


def an_apply_sent_twice_is_applied_once(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 10})
    store.apply([one])
    store.apply([one])
    store.apply([one, one])
    assert store.look(3).counters == {"events": 5, "scores": 5}


def a_repeated_apply_of_a_fenced_owner_is_fenced(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 10})
    store.apply([one])
    world.store().claim(3, "n2")
    with pytest.raises(Fenced):
        store.apply([one])


def a_batch_has_to_advance(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    for one in (
        batch("n1", START, {}),
        batch("n1", START, {"logins": -1}),
        batch("n1", START, {"logins": 5}, to={"logins": 4}),
        batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c", main()),) * 1_001),
    ):
        with pytest.raises(InvariantBroken, match="partition 3"):
            store.apply([one])
    assert store.look(3).applied == START


def an_intent_is_open_until_its_batch_is_applied(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    intent = Intent(START | {"logins": 9}, "digest", 1_700_000_000_123)
    store.intend(3, "n1", START, intent)
    store.intend(3, "n1", START, intent)
    claim = world.store().claim(3, "n2")
    assert claim.intent == intent
    assert claim.applied == START
    store.apply([batch("n2", START, {"logins": 10})])
    assert store.look(3).intent is None


def an_intent_has_to_follow_too(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    former = START | {"transactions": 5}
    with pytest.raises(ChainBroken, match=r"partition 3.*'transactions': 5.*'transactions': -1"):
        store.intend(3, "n1", former, Intent(former | {"logins": 1}, "m", 1))
    assert store.look(3).intent is None


def a_released_partition_is_nobodys(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    world.store().claim(3, "n2")
    store.release(3, "n1")  # fenced already: nothing
    assert store.look(3).nonce == "n2"
    store.release(3, "n2")
    assert store.look(3).nonce == ""
    with pytest.raises(Fenced):
        store.apply([batch("n2", START, {"logins": 1})])
    store.release(5, "n1")  # never claimed: nothing


def a_store_that_went_back_is_noticed(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 10})
    store.apply([one])
    go_back = world.remember()
    two = batch("n1", one.to, {"logins": 10})
    store.apply([two])
    three = batch("n1", two.to, {"logins": 10})
    store.intend(3, "n1", two.to, Intent(three.to, "m", 1))
    go_back()
    with pytest.raises(ChainBroken, match=r"'logins': 19.*'logins': 9"):
        store.apply([three])
    claim = store.claim(3, "n2")
    assert (claim.applied, claim.intent) == (one.to, None)
    store.apply([replace(two, nonce="n2")])
    assert store.look(3).counters == {"events": 10, "scores": 10}


def an_empty_store_takes_no_batch(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 10})
    store.apply([one])
    world.lose_everything()
    with pytest.raises(ChainBroken, match=r"'logins': 9.*'logins': -1"):
        store.apply([batch("n1", one.to, {"logins": 10})])
    with pytest.raises(ChainBroken):
        store.intend(3, "n1", one.to, Intent(one.to, "m", 1))
    with pytest.raises(ChainBroken, match="partition 3"):  # not even the very first batch: nobody writes before a claim
        store.apply([one])
    writes: list[Callable[[], None]] = [
        lambda: store.begin_rebuild(3, "n1"),
        lambda: store.restore(3, "n1", one.customers),
        lambda: store.finish_rebuild(3, "n1", one.to, "m", 1, {}),
    ]
    for write in writes:
        with pytest.raises(ChainBroken, match=r"partition 3.*claim it again"):
            write()
    assert store.look(3).epoch == 0
    assert store.load(3, ["c1"]) == [None]
    assert store.claim(3, "n2").fresh


def an_unknown_format_is_refused(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.release(3, "n1")
    version, catalog = LAYOUT.split("/")
    for other, why in (
        (f"99/{catalog}", "newer version"),
        (f"{version}/{catalog[::-1]}", "another catalog"),
        (f"1/{catalog[::-1]}", "not migrated"),
        (f"0/{catalog}", "not migrated"),
    ):
        world.write_format(3, other)
        with pytest.raises(ChainBroken, match=f"partition 3.*state format {other}.*{why}"):
            store.claim(3, "n2")
    assert (store.look(3).epoch, store.look(3).nonce) == (1, "")


def state_of_the_former_format_gets_a_list_of_customers(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    names = [f"c{i}" for i in range(2_500)]
    at = START
    for first in range(0, 2_500, 1_000):
        one = batch("n1", at, {"logins": 9}, customers=[CustomerWrite(name, main()) for name in names[first : first + 1_000]])
        store.apply([one])
        at = dict(one.to)
    store.intend(3, "n1", at, Intent(at, "m", 5))
    world.be_of_format_1(3)
    claim = world.store().claim(3, "n2")
    assert claim.customers == b"".join(sorted(digests([name]) for name in names))
    assert (claim.damaged, claim.fresh, claim.applied, claim.epoch) == ("", False, at, 2)
    assert (claim.intent, claim.counters) == (Intent(at, "m", 5), {"events": 15, "scores": 15})
    with pytest.raises(Fenced):
        store.apply([batch("n1", at, {"logins": 1})])
    store.apply([batch("n2", at, {"logins": 1}, customers=(CustomerWrite("new", main(), new=True),))])
    assert store.claim(3, "n3").customers == claim.customers + digests(["new"])


def customers_are_listed_in_order_of_arrival(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.claim(4, "n1")
    names = ["b", "\ud800", "a", ""]
    one = batch("n1", START, {"logins": 10}, customers=[CustomerWrite(name, main(), new=True) for name in names])
    store.apply([one])
    store.apply([one])  # once more: nobody is listed twice
    two = batch("n1", one.to, {"logins": 1}, customers=(CustomerWrite("a", main()), CustomerWrite("z", main(), new=True)))
    store.apply([two])
    for claim in (store.look(3), world.store().claim(3, "n2")):
        assert claim.customers == digests([*names, "z"])
        assert (claim.damaged, claim.fresh) == ("", False)
    assert store.look(4).customers == b""
    with pytest.raises(Fenced):
        store.apply([batch("n1", two.to, {"logins": 1}, customers=(CustomerWrite("y", main(), new=True),))])
    assert store.look(3).customers == digests([*names, "z"])


def a_digest_is_eight_bytes_that_never_change(world: World) -> None:
    assert digests(["a", "Zoë", "\ud800"]).hex() == "40f89e395b66422f" + "789fb70695ef899a" + "4208783e927d0d68"


def the_outbox_is_replaced_by_every_batch(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 1}, outbox=EVERY_BYTE * 1_000)
    store.apply([one])
    store.apply([one])
    assert world.store().claim(3, "n2").outbox == EVERY_BYTE * 1_000
    two = batch("n2", one.to, {"logins": 1}, outbox=b"small")
    store.apply([two])
    assert store.look(3).outbox == b"small"
    with pytest.raises(ChainBroken):
        store.apply([batch("n2", one.to, {"logins": 5}, outbox=b"wrong")])
    store.intend(3, "n2", two.to, Intent(two.to, "m", 1))
    assert (store.look(3).outbox, store.look(3).damaged) == (b"small", "")
    store.apply([batch("n2", two.to, {"logins": 1})])
    assert (store.look(3).outbox, store.look(3).damaged) == (b"", "")


def a_partition_is_fresh_until_a_batch_is_applied(world: World) -> None:
    store = world.store()
    assert store.claim(3, "n1").fresh
    store.intend(3, "n1", START, Intent(START | {"logins": 4}, "m", 1))
    assert world.store().claim(3, "n2").fresh  # the first owner may have died at once: nothing is known of it yet
    store.apply([batch("n2", START, {"logins": 1})])
    assert not store.claim(3, "n3").fresh


def a_lost_list_is_noticed(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c1", main(), new=True), CustomerWrite("c2", main(), new=True)))
    store.apply([one])
    world.lose_list(3)
    two = batch("n1", one.to, {"logins": 1}, customers=(CustomerWrite("c3", main(), new=True),))
    with pytest.raises(StateDamaged, match=r"partition 3.*list of customers"):
        store.intend(3, "n1", one.to, Intent(two.to, "m", 1))
    with pytest.raises(StateDamaged, match=r"partition 3.*list of customers"):
        store.apply([two])
    assert store.look(3).applied == one.to
    for nonce in ("n2", "n2", "n3"):
        assert store.claim(3, nonce).damaged == "2 customers are stored, the list of them holds 0"


def a_lost_meta_is_noticed(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.apply([batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c1", main(), new=True),))])
    store.claim(4, "n1")
    store.apply([batch("n1", START, {"logins": 1}, partition=4, customers=(), outbox=b"not sent yet")])
    world.lose_meta(3)
    world.lose_meta(4)
    with pytest.raises(ChainBroken):
        store.intend(3, "n1", START, Intent(START, "m", 1))
    for _ in range(2):  # a claim makes a new meta, and does not heal it
        claim = store.claim(3, secrets.token_hex(8))
        assert (claim.fresh, claim.damaged) == (True, "a list of 1 customers was found without its meta")
        assert store.claim(4, "n2").damaged == "the outbox holds 12 bytes, 0 were written"
    with pytest.raises(StateDamaged):
        store.intend(3, claim.nonce, START, Intent(START, "m", 1))


def a_lost_outbox_is_noticed(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.apply([batch("n1", START, {"logins": 1}, outbox=b"twelve bytes")])
    world.lose_outbox(3)
    assert store.claim(3, "n2").damaged == "the outbox holds 0 bytes, 12 were written"


def a_lost_customer_is_nobody_to_the_store(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.apply([batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c1", main(), new=True),))])
    world.lose_customer(3, "c1")
    assert store.load(3, ["c1"]) == [None]  # so whoever loads has to ask the list: `Histories` does
    claim = store.claim(3, "n2")
    assert claim.customers == digests(["c1"])
    with pytest.raises(StateDamaged, match="'c1' is known, and nothing of it is stored"):
        Histories(known=claim.customers).load(["c1"], store.load(3, ["c1"]))


def rebuilt(store: Extended, nonce: str, *customers: CustomerWrite, at: Offsets) -> None:
    store.begin_rebuild(3, nonce)
    store.restore(3, nonce, customers)
    store.finish_rebuild(3, nonce, at, "model-2", 7, {"events": 1})


def a_rebuild_begins_with_nothing_and_ends_whole(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    old = [CustomerWrite(f"old{i}", main(1, 0), ((0, b"chunk"),), new=True) for i in range(1_000)]
    one = batch("n1", START, {"logins": 10}, customers=old, outbox=b"outputs", watermark_ms=99)
    store.apply([one])
    store.claim(4, "n1")
    store.apply([replace(one, partition=4)])
    intent = Intent(one.to, "m", 1)
    store.intend(3, "n1", one.to, intent)
    store.begin_rebuild(3, "n1")
    claim = world.store().claim(3, "n2")
    assert (claim.rebuilding, claim.damaged, claim.customers, claim.outbox) == (True, "", b"", b"")
    assert (claim.applied, claim.intent, claim.watermark_ms) == (one.to, intent, 99)  # what is known of it stays until the end
    assert list(store.customers(3)) == []
    assert store.load(3, ["old0"]) == [None]
    store.restore(3, "n2", [CustomerWrite("b", main(2, 0), ((0, b"0"), (1, b"1"))), CustomerWrite("a", main())])
    store.restore(3, "n2", [CustomerWrite("c", main()), CustomerWrite("b", main(1, 1), ((1, b"one"),), (0,))])
    store.finish_rebuild(3, "n2", {"logins": 4, "transactions": 7}, "model-2", 7, {"events": 3})
    claim = world.store().claim(3, "n3")
    expected = START | {"logins": 4, "transactions": 7}
    assert claim == Claim(3, "n3", 3, expected, None, "model-2", 7, {"events": 3}, customers=digests(["b", "a", "c"]))
    assert store.load(3, ["b", "a", "c"]) == [state(first=1, chunks=(b"one",)), state(), state()]
    store.apply([batch("n3", expected, {"logins": 1})])
    assert len(list(store.customers(4))) == 1_000
    assert store.look(4).damaged == ""
    # A chunk of a customer that was removed is not there for one that comes later.
    store.apply([batch("n3", store.look(3).applied, {"logins": 1}, customers=(CustomerWrite("old0", main(1, 0)),))])
    with pytest.raises(StateDamaged):
        store.load(3, ["old0"])


def no_batch_is_taken_while_a_partition_is_rebuilt(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.begin_rebuild(3, "n1")
    one = batch("n1", START, {"logins": 1})
    writes: list[Callable[[], None]] = [lambda: store.apply([one]), lambda: store.intend(3, "n1", START, Intent(one.to, "m", 1))]
    for write in writes:
        with pytest.raises(ChainBroken, match="partition 3 is being rebuilt"):
            write()
    assert world.store().claim(3, "n2").rebuilding
    with pytest.raises(ChainBroken, match="partition 3 is being rebuilt"):
        store.apply([replace(one, nonce="n2")])
    store.finish_rebuild(3, "n2", START, "", -1, {})
    store.apply([replace(one, nonce="n2")])


def a_rebuild_belongs_to_the_owner(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c1", main(), new=True),))
    store.apply([one])
    store.claim(3, "n2")
    with pytest.raises(Fenced):
        store.begin_rebuild(3, "n1")
    assert store.load(3, ["c1"]) == [state()]
    store.begin_rebuild(3, "n2")
    store.restore(3, "n2", one.customers)
    store.claim(3, "n3")
    with pytest.raises(Fenced):
        store.restore(3, "n2", (CustomerWrite("c2", main()),))
    with pytest.raises(Fenced):
        store.finish_rebuild(3, "n2", one.to, "", -1, {})
    assert store.look(3).rebuilding
    assert store.look(3).customers == digests(["c1"])


def a_rebuild_that_was_not_begun_is_refused(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    one = batch("n1", START, {"logins": 1})
    store.apply([one])
    with pytest.raises(ChainBroken, match="partition 3 is not being rebuilt"):
        store.restore(3, "n1", (CustomerWrite("c1", main(body=b"x")),))
    with pytest.raises(ChainBroken, match="partition 3 is not being rebuilt"):
        store.finish_rebuild(3, "n1", START, "", -1, {})
    assert store.load(3, ["c1"]) == [state()]
    assert store.look(3).applied == one.to
    with pytest.raises(InvariantBroken, match="1001 customers"):
        store.restore(3, "n1", (CustomerWrite("c", main()),) * 1_001)


def every_step_of_a_rebuild_may_come_twice(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.begin_rebuild(3, "n1")
    store.restore(3, "n1", [CustomerWrite("lost", main())])
    store.begin_rebuild(3, "n1")
    store.begin_rebuild(3, "n1")
    writes = [CustomerWrite(name, main(1, 0, name.encode()), ((0, b"x"),)) for name in ("b", "a", "b")]
    store.restore(3, "n1", writes)
    store.restore(3, "n1", writes)
    intent = Intent(START | {"logins": 9}, "m", 3)
    for _ in range(2):
        store.finish_rebuild(3, "n1", START | {"logins": 4}, "m", 5, {"events": 2}, intent)
    claim = store.look(3)
    assert claim == Claim(3, "n1", 1, START | {"logins": 4}, intent, "m", 5, {"events": 2}, customers=digests(["b", "a"]))
    with pytest.raises(ChainBroken, match="not being rebuilt"):  # not the same: somebody has lost the thread
        store.finish_rebuild(3, "n1", START | {"logins": 5}, "m", 5, {"events": 2}, intent)


def a_list_lost_in_a_rebuild_is_noticed(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.begin_rebuild(3, "n1")
    store.restore(3, "n1", [CustomerWrite("a", main())])
    world.lose_list(3)
    with pytest.raises(StateDamaged, match=r"partition 3.*list of customers"):
        store.restore(3, "n1", [CustomerWrite("b", main())])
    with pytest.raises(StateDamaged, match=r"partition 3.*list of customers"):
        store.finish_rebuild(3, "n1", START, "", -1, {})
    assert store.look(3).rebuilding
    rebuilt(store, "n1", CustomerWrite("a", main()), at=START)
    assert (store.look(3).damaged, store.look(3).customers, store.look(3).fresh) == ("", digests(["a"]), False)


def a_store_that_goes_back_in_a_rebuild_is_noticed(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.begin_rebuild(3, "n1")
    store.restore(3, "n1", [CustomerWrite("a", main())])
    back = world.remember()
    store.restore(3, "n1", [CustomerWrite("a", main(body=b"later"))])
    store.restore(3, "n1", [CustomerWrite("b", main())])
    back()
    with pytest.raises(ChainBroken, match=r"partition 3.*went back"):
        store.restore(3, "n1", [CustomerWrite("c", main())])
    with pytest.raises(ChainBroken, match=r"partition 3.*went back"):
        store.finish_rebuild(3, "n1", START, "", -1, {})
    assert store.look(3).rebuilding
    rebuilt(store, "n1", CustomerWrite("a", main()), at=START)
    assert store.look(3).customers == digests(["a"])


def every_byte_and_every_name_survives(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    names = ["", "007", "a:1", "a", "a:1:2", "{x}", "ключ", "\x00\n\r *?[", "\ud800", "x" * 1_000]
    writes = [CustomerWrite(name, main(1, 5, EVERY_BYTE + name.encode("utf-8", "replace")), ((5, EVERY_BYTE[::-1]),)) for name in names]
    store.apply([batch("n1", START, {"logins": 1}, customers=writes)])
    expected = [CustomerState(write.main, (EVERY_BYTE[::-1],)) for write in writes]
    assert store.load(3, names) == expected
    assert sorted(store.customers(3)) == sorted(names)


def changed_chunks_are_replaced_and_dropped_ones_go(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    write = CustomerWrite("c1", main(3, 0), ((0, b"zero"), (1, b"one"), (2, b"two")))
    one = batch("n1", START, {"logins": 1}, customers=(write,))
    store.apply([one])
    assert store.load(3, ["c1"]) == [state(chunks=(b"zero", b"one", b"two"))]
    two = batch("n1", one.to, {"logins": 1}, customers=(CustomerWrite("c1", main(3, 1), ((2, b"TWO"), (3, b"three")), (0,)),))
    store.apply([two])
    assert store.load(3, ["c1"]) == [state(first=1, chunks=(b"one", b"TWO", b"three"))]
    # What was dropped is gone, not merely left out.
    store.apply([batch("n1", two.to, {"logins": 1}, customers=(CustomerWrite("c1", main(4, 0)),))])
    with pytest.raises(StateDamaged, match=r"partition 3.*chunk.*'c1'"):
        store.load(3, ["c1"])


def a_missing_chunk_is_never_taken_for_nothing(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    write = CustomerWrite("c1", main(3, 70_000), ((70_000, b"a"), (70_001, b"b"), (70_002, b"c")))
    store.apply([batch("n1", START, {"logins": 1}, customers=(write, CustomerWrite("c2", main())))])
    assert store.load(3, ["c1"]) == [state(first=70_000, chunks=(b"a", b"b", b"c"))]
    world.lose_chunk(3, "c1", 70_001)
    with pytest.raises(StateDamaged, match=r"partition 3.*chunk.*'c1'"):
        store.load(3, ["c2", "c1"])
    assert store.load(3, ["c2"]) == [state()]


def the_largest_batch_goes_through(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    names = [f"c{i:04}" for i in range(1_000)]
    writes = [CustomerWrite(name, main(2, 0, name.encode()), ((0, b"0" + name.encode()), (1, b"1" + name.encode()))) for name in names]
    one = batch("n1", START, {"logins": 1_000}, customers=writes)
    store.apply([one])
    asked = [*reversed(names), "nobody", *names, *names]  # more than one call to the server
    states = {write.customer: CustomerState(write.main, tuple(chunk for _, chunk in write.chunks)) for write in writes}
    assert store.load(3, asked) == [states.get(name) for name in asked]
    assert store.load(3, []) == []
    dropping = [CustomerWrite(name, main(0, 2), (), (0, 1)) for name in names]
    store.apply([batch("n1", one.to, {"logins": 1}, customers=dropping)])
    assert store.load(3, ["c0999"]) == [state(first=2)]


def a_customer_may_have_thousands_of_chunks(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    chunks = tuple((number, b"%d" % number) for number in range(2_500))
    store.apply([batch("n1", START, {"logins": 1}, customers=(CustomerWrite("hot", main(2_500, 0), chunks),))])
    assert store.load(3, ["hot"]) == [state(chunks=tuple(chunk for _, chunk in chunks))]


def a_refused_batch_does_not_hold_up_the_others(world: World) -> None:
    store = world.store()
    store.claim(3, "n1")
    store.claim(4, "n2")
    store.claim(5, "n3")
    world.store().claim(4, "other")
    with pytest.raises(Fenced, match="partition 4"):
        store.apply(
            [
                batch("n1", START, {"logins": 1}),
                batch("n2", START, {"logins": 1}, partition=4),
                batch("n3", START, {"logins": 1}, partition=5),
            ]
        )
    assert [store.look(partition).applied["logins"] for partition in (3, 4, 5)] == [0, -1, 0]


CHECKS = (
    a_new_partition_begins_before_the_first_record,
    a_claim_repeated_by_the_same_owner_changes_nothing,
    a_batch_is_there_after_it_was_applied,
    partitions_do_not_share_anything,
    looking_claims_nothing,
    a_former_owner_can_write_no_more,
    a_batch_that_does_not_follow_is_refused,
    an_apply_sent_twice_is_applied_once,
    a_repeated_apply_of_a_fenced_owner_is_fenced,
    a_batch_has_to_advance,
    an_intent_is_open_until_its_batch_is_applied,
    an_intent_has_to_follow_too,
    a_released_partition_is_nobodys,
    a_store_that_went_back_is_noticed,
    an_empty_store_takes_no_batch,
    an_unknown_format_is_refused,
    state_of_the_former_format_gets_a_list_of_customers,
    customers_are_listed_in_order_of_arrival,
    a_digest_is_eight_bytes_that_never_change,
    the_outbox_is_replaced_by_every_batch,
    a_partition_is_fresh_until_a_batch_is_applied,
    a_lost_list_is_noticed,
    a_lost_meta_is_noticed,
    a_lost_outbox_is_noticed,
    a_lost_customer_is_nobody_to_the_store,
    a_rebuild_begins_with_nothing_and_ends_whole,
    no_batch_is_taken_while_a_partition_is_rebuilt,
    a_rebuild_belongs_to_the_owner,
    a_rebuild_that_was_not_begun_is_refused,
    every_step_of_a_rebuild_may_come_twice,
    a_list_lost_in_a_rebuild_is_noticed,
    a_store_that_goes_back_in_a_rebuild_is_noticed,
    every_byte_and_every_name_survives,
    changed_chunks_are_replaced_and_dropped_ones_go,
    a_missing_chunk_is_never_taken_for_nothing,
    the_largest_batch_goes_through,
    a_customer_may_have_thousands_of_chunks,
    a_refused_batch_does_not_hold_up_the_others,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[World], None], world: World) -> None:
    check(world)


# -- faults planted in the function library: the checks must see each of them

FAULTS = {
    "no nonce check": ("if owner[1] ~= nonce then return {FENCED} end", "", a_former_owner_can_write_no_more),
    "no compare-and-set": (
        "if not equal(offsets, args, 10, 3) then return {BROKEN, unpack(offsets)} end",
        "",
        a_batch_that_does_not_follow_is_refused,
    ),
    "compare-and-set on the first topic only": (
        "for i = 1, #offsets do\n    if offsets[i] ~= args[first",
        "for i = 1, 1 do\n    if offsets[i] ~= args[first",
        a_batch_that_does_not_follow_is_refused,
    ),
    "a repeated batch taken again": ("if equal(offsets, args, 11, 3) then return 0 end", "", an_apply_sent_twice_is_applied_once),
    "an intent without compare-and-set": (
        "if not equal(offsets, args, 4, 2) then return {BROKEN, unpack(offsets)} end",
        "",
        an_intent_has_to_follow_too,
    ),
    "the intent left open": ("redis.call('HDEL', meta, 'intent')", "", an_intent_is_open_until_its_batch_is_applied),
    "offsets not stored": ("update[#update + 1] = args[8 + 3 * i]", "update[#update + 1] = '-1'", a_batch_is_there_after_it_was_applied),
    "a watermark that goes back": ("if watermark >= known then", "if true then", a_batch_is_there_after_it_was_applied),
    "dropped chunks kept": ("  unlink(keys, 3 + sets)\n", "", changed_chunks_are_replaced_and_dropped_ones_go),
    "an empty store taken for an owner's": ("if not owner[2] then", "if false then", an_empty_store_takes_no_batch),
    "any format accepted": ("if not known and not migrated then", "if false then", an_unknown_format_is_refused),
    "a former format taken for ours": (
        "if migrated then return {TO_MIGRATE, found[2]} end",
        "",
        state_of_the_former_format_gets_a_list_of_customers,
    ),
    "a migration that leaves the list out": ("append(keys[1], keys[2], args[4])", "", state_of_the_former_format_gets_a_list_of_customers),
    "release by anybody": ("if redis.call('HGET', keys[1], 'owner') == args[1] then", "if true then", a_released_partition_is_nobodys),
    "an epoch for every claim": ("if found[1] ~= args[1] then", "if true then", a_claim_repeated_by_the_same_owner_changes_nothing),
    "chunks beyond one slice lost": (
        "slices(closed, function",
        "slices(math.min(closed, SLICE), function",
        a_customer_may_have_thousands_of_chunks,
    ),
    "the chunk number cut to 16 bits": ("a + 256 * (b + 256 * (c + 256 * d))", "a + 256 * b", a_missing_chunk_is_never_taken_for_nothing),
    "new customers not listed": ("append(meta, keys[2], digests)", "", customers_are_listed_in_order_of_arrival),
    "new customers listed and not counted": (
        "redis.call('HINCRBY', meta, 'customers', #digests / DIGEST)",
        "",
        customers_are_listed_in_order_of_arrival,
    ),
    "a lost list not noticed": ("if redis.call('STRLEN', who) ~= DIGEST * counted then", "if false then", a_lost_list_is_noticed),
    "an outbox left over": (" else redis.call('UNLINK', keys[3]) end", " end", the_outbox_is_replaced_by_every_batch),
    "an outbox not counted": ("{'outbox', #outbox, 'model', model}", "{'model', model}", the_outbox_is_replaced_by_every_batch),
    "a batch taken while rebuilding": (
        "if rebuilding ~= nil and (owner[3] ~= false) ~= rebuilding then",
        "if rebuilding and not owner[3] then",
        no_batch_is_taken_while_a_partition_is_rebuilt,
    ),
    "a customer restored without a rebuild": (
        "if rebuilding ~= nil and (owner[3] ~= false) ~= rebuilding then",
        "if rebuilding == false and owner[3] then",
        a_rebuild_that_was_not_begun_is_refused,
    ),
    "a part lost in a rebuild not noticed": (
        "if parts ~= before and parts ~= before + 1 then return {WENT_BACK} end",
        "",
        a_store_that_goes_back_in_a_rebuild_is_noticed,
    ),
    "a part lost at the end of a rebuild not noticed": (
        "if tonumber(parts) - 1 ~= tonumber(args[7]) then return {WENT_BACK} end",
        "",
        a_store_that_goes_back_in_a_rebuild_is_noticed,
    ),
    "a rebuild that forgets what was known": (
        "'rebuilding', '1', 'customers'",
        "'applied:logins', '-1', 'rebuilding', '1', 'customers'",
        a_rebuild_begins_with_nothing_and_ends_whole,
    ),
    "a rebuild that keeps the list": (
        "redis.call('UNLINK', keys[2], keys[3])\n  return 1",
        "return 1",
        every_step_of_a_rebuild_may_come_twice,
    ),
    "a rebuild that removes nothing": ("  unlink(keys, 1)\n", "", a_rebuild_begins_with_nothing_and_ends_whole),
    "a customer restored twice is listed twice": (
        "if redis.call('EXISTS', keys[2 + i]) == 0 then",
        "if true then",
        every_step_of_a_rebuild_may_come_twice,
    ),
    "a rebuild that ends in the old offsets": ("  redis.call('DEL', meta)\n", "", a_rebuild_begins_with_nothing_and_ends_whole),
    "a rebuild ended by anybody": (
        "local meta, topics = keys[1], tonumber(args[5])\n  local refusal = refused(meta, args[1], nil, 0)",
        "local meta, topics = keys[1], tonumber(args[5])\n  local refusal = refused(meta, redis.call('HGET', meta, 'owner'), nil, 0)",
        a_rebuild_belongs_to_the_owner,
    ),
    "a rebuild that ends with half a list": (
        "  refusal = list_damaged(meta, keys[2])\n  if refusal then return refusal end\n",
        "",
        a_list_lost_in_a_rebuild_is_noticed,
    ),
}
"""What is written, what instead of it, and the check that must fail."""


@pytest.mark.servers
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_library_turns_the_suite_red(fault: str, server: RedisServer) -> None:
    right, wrong, check = FAULTS[fault]
    text = files("features").joinpath("functions.lua").read_text("utf-8")
    assert text.count(right) == 1
    with (
        closing(RedisWorld(server, text.replace(right, wrong))) as faulty,
        pytest.raises((AssertionError, pytest.fail.Exception, ChainBroken, Fenced, InvariantBroken)),
    ):
        check(faulty)
    with closing(RedisWorld(server)) as world:
        check(world)


# -- both stores, step by step


def _random_step(random: Random, known: list[Offsets]) -> Callable[[Extended], object]:
    """One call with arguments that fit often and fail often; run on both stores."""
    partition, nonce = random.randrange(2), random.choice(["n1", "n2", "n3"])
    former = random.choice(known[-3:])
    to = {topic: offset + random.choice([0, 0, 1, 5]) for topic, offset in former.items()}
    names = random.sample(["a", "b", "c:1", "\x00"], random.randrange(4))
    kind = random.randrange(14)
    if kind < 2:
        return lambda store: store.claim(partition, nonce)
    if kind == 2:
        return lambda store: store.release(partition, nonce)
    if kind == 3:
        return lambda store: store.look(partition)
    if kind == 4:
        intent = Intent(to, random.choice(["", "m"]), random.randrange(2**41))
        return lambda store: store.intend(partition, nonce, former, intent)
    if kind == 5:
        return lambda store: store.load(partition, [*names, "nobody"])
    if kind == 6:
        return lambda store: sorted(store.customers(partition))
    if kind == 7:
        return lambda store: store.begin_rebuild(partition, nonce)
    writes = []
    for name in names:
        closed, first = random.randrange(3), random.randrange(3)
        chunks = tuple((first + i, random.randbytes(random.randrange(20))) for i in range(closed) if random.random() < 0.8)
        new = random.random() < 0.5
        writes.append(CustomerWrite(name, main(closed, first, random.randbytes(30)), chunks, tuple(range(first)), new))
    if kind == 8:
        return lambda store: store.restore(partition, nonce, writes)
    model, watermark, counters = random.choice(["", "m"]), random.randrange(-1, 99), {"events": random.randrange(9)}
    if kind == 9:
        intent_or_none = random.choice([None, Intent(to, model, 1)])
        return lambda store: store.finish_rebuild(partition, nonce, former, model, watermark, counters, intent_or_none)
    known.append(to)
    one = Apply(partition, nonce, former, to, model, watermark, counters, writes, random.choice([b"", b"outputs", b"more outputs"]))
    many = [one] if random.random() < 0.7 else [one, replace(one, partition=1 - partition)]
    return lambda store: store.apply(many)


def _random_loss(random: Random) -> Callable[[World], object]:
    """Something a server may lose."""
    partition, name = random.randrange(2), random.choice(["a", "b", "c:1"])
    losses: list[Callable[[World], object]] = [
        lambda world: world.lose_meta(partition),
        lambda world: world.lose_list(partition),
        lambda world: world.lose_outbox(partition),
        lambda world: world.lose_customer(partition, name),
        lambda world: world.lose_chunk(partition, name, 1),
        lambda world: world.lose_everything(),
    ]
    return random.choice(losses)


def _outcome(step: Callable[[Subject], object], subject: Subject) -> object:
    try:
        return step(subject)
    except KeyError:
        return "nothing to lose"
    except (Fenced, ChainBroken, InvariantBroken) as error:
        return type(error), str(error)


@pytest.mark.servers
@pytest.mark.parametrize(("where", "seed"), [("redis", seed) for seed in range(30)] + [("cluster", seed) for seed in range(30, 40)])
def test_both_stores_say_the_same_at_every_step(where: str, seed: int, request: pytest.FixtureRequest) -> None:
    redis_world: RedisWorld = request.getfixturevalue(f"{where}_world")
    random = Random(seed)
    known: list[Offsets] = [START]
    memory_world = MemoryWorld()
    here, there = memory_world.store(), redis_world.store()
    done = refused = 0
    for number in range(300):
        if random.random() < 0.04:
            loss = _random_loss(random)
            assert _outcome(loss, memory_world) == _outcome(loss, redis_world), f"seed {seed}, step {number}"
            continue
        step = _random_step(random, known)
        expected = _outcome(step, here)
        assert _outcome(step, there) == expected, f"seed {seed}, step {number}"
        refused += isinstance(expected, tuple)
        done += not isinstance(expected, tuple)
        if random.random() < 0.2:  # stay near what is stored, or nearly everything would be refused
            known.append(here.look(random.randrange(2)).applied)
    assert done > 20
    assert refused > 20


# -- the wire and the server


@pytest.mark.servers
def test_an_answer_lost_on_the_way_does_no_harm(server: RedisServer, redis_world: RedisWorld) -> None:
    with closing(Proxy(server.port)) as proxy, closing(RedisStore(f"redis://127.0.0.1:{proxy.port}")) as store:
        store.claim(3, "n1")
        proxy.cut_next_answer_to = b"churn_claim"
        assert store.claim(3, "n2").epoch == 2
        proxy.cut_next_answer_to = b"churn_intend"
        one = batch("n2", START, {"logins": 1})
        store.intend(3, "n2", START, Intent(one.to, "m", 1))
        proxy.cut_next_answer_to = b"churn_apply"
        store.apply([one])
        proxy.cut_next_answer_to = b"churn_load"
        assert store.load(3, ["c1"]) == [state()]
        proxy.cut_next_answer_to = b"churn_release"
        store.release(3, "n2")
        assert proxy.cuts == 5
        claim = store.look(3)
        assert (claim.counters, claim.applied, claim.epoch, claim.nonce) == ({"events": 5, "scores": 5}, one.to, 2, "")


@pytest.mark.servers
@pytest.mark.parametrize("hard", [False, True])
def test_a_server_restarted_in_between_is_waited_for(hard: bool, tmp_path: Path) -> None:
    own = RedisServer(tmp_path)
    with running(own), closing(RedisStore(own.url)) as store:
        store.claim(3, "n1")
        one = batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c1", main(body=EVERY_BYTE)),))
        store.apply([one])
        own.stop(hard=hard)
        later = threading.Timer(0.3, own.start)
        later.start()
        two = batch("n1", one.to, {"logins": 1}, customers=(CustomerWrite("c2", main()),))
        store.apply([two])
        later.join()
        assert store.load(3, ["c1", "c2"]) == [state(body=EVERY_BYTE), state()]
        assert store.look(3).applied == two.to


def test_a_server_that_is_not_there_is_an_error_within_the_bound() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, not listening: refused
        port = nobody.getsockname()[1]
        began = time.monotonic()
        with closing(RedisStore(f"redis://user:geheim@127.0.0.1:{port}/0", patience_s=0.5)) as store:
            with pytest.raises(StoreUnavailable, match=rf"127\.0\.0\.1:{port} did not answer within 0.5 s") as raised:
                store.claim(3, "n1")
            with pytest.raises(StoreUnavailable):
                store.load(3, ["c1"])
        assert time.monotonic() - began < 5
        assert "geheim" not in str(raised.value)


def test_a_server_that_never_answers_is_an_error_within_the_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        address = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with closing(RedisStore(address, timeout_s=0.2, patience_s=1)) as store, pytest.raises(StoreUnavailable):
            store.apply([batch("n1", START, {"logins": 1})])
        assert time.monotonic() - began < 5


@pytest.mark.servers
def test_a_full_server_refuses_the_batch_whole_and_takes_it_later(server: RedisServer, redis_world: RedisWorld) -> None:
    store = RedisStore(server.url, patience_s=0.3)
    with closing(store), closing(server.client()) as admin:
        store.claim(3, "n1")
        one = batch("n1", START, {"logins": 1})
        admin.config_set("maxmemory", "1mb")
        try:
            with pytest.raises(StoreUnavailable, match="maxmemory"):
                store.apply([one])
        finally:
            admin.config_set("maxmemory", "0")
        assert store.look(3).applied == START
        assert store.load(3, ["c1"]) == [None]
        store.apply([one])
        assert store.look(3).applied == one.to


@pytest.mark.servers
def test_two_versions_of_the_library_serve_side_by_side(server: RedisServer, redis_world: RedisWorld) -> None:
    text = files("features").joinpath("functions.lua").read_text("utf-8")
    other = RedisStore(server.url, library_text=text.replace("return {FENCED}", "return {-77}"))
    with closing(other), closing(server.client()) as admin:
        ours = redis_world.store()
        for store in (other, ours, other):
            store.claim(3, "n1")
            store.claim(3, "n2")
        with pytest.raises(Fenced):
            ours.apply([batch("n1", START, {"logins": 1})])
        with pytest.raises(InvariantBroken, match="-77"):  # its own text, although ours was loaded later
            other.apply([batch("n1", START, {"logins": 1})])
        names = [library[1] for library in admin.execute_command("FUNCTION", "LIST")]
        assert len([name for name in names if name.startswith(b"churnstream_")]) >= 2


@pytest.mark.servers
def test_a_user_with_few_rights_is_enough(server: RedisServer, redis_world: RedisWorld) -> None:
    redis_world.store().claim(9, "admin")  # the library is loaded by a user who may
    rights = "+fcall +fcall_ro +hget +hmget +hset +hdel +hincrby +hgetall +get +mget +set +mset +append +strlen +exists +del +unlink +scan"
    rights += " +client|setname +client|setinfo"
    with closing(server.client()) as admin:
        admin.execute_command("ACL", "SETUSER", "churn", "reset", "on", ">ge:h/eim", "~churn:*", *rights.split())
        try:
            with closing(RedisStore(f"redis://churn:ge%3Ah%2Feim@127.0.0.1:{server.port}/0")) as store:
                store.claim(3, "n1")
                store.intend(3, "n1", START, Intent(START, "m", 1))
                store.apply([batch("n1", START, {"logins": 1}, customers=(CustomerWrite("c1", main(1, 0), ((0, b"x"),), (7,)),))])
                assert store.load(3, ["c1"]) == [state(chunks=(b"x",))]
                assert list(store.customers(3)) == ["c1"]
                store.begin_rebuild(3, "n1")
                store.restore(3, "n1", [CustomerWrite("c1", main(1, 0), ((0, b"x"),), (7,))])
                store.finish_rebuild(3, "n1", START, "", -1, {})
                redis_world.be_of_format_1(3)
                assert store.claim(3, "n1").customers == digests(["c1"])
                store.release(3, "n1")
            with closing(RedisStore(f"redis://churn:falsch@127.0.0.1:{server.port}/0")) as store:
                began = time.monotonic()
                with pytest.raises(StoreUnavailable, match="refuses this user") as raised:
                    store.claim(3, "n1")
                assert time.monotonic() - began < 1  # a wrong password does not become right by waiting
                assert "falsch" not in str(raised.value)
            redis_world.lose_everything()
            with (
                closing(RedisStore(f"redis://churn:ge%3Ah%2Feim@127.0.0.1:{server.port}/0")) as store,
                pytest.raises(StoreUnavailable, match=r"refuses this user.*function"),
            ):
                store.claim(3, "n1")
        finally:
            admin.execute_command("ACL", "DELUSER", "churn")


def _certificate(home: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = home / "cert.pem", home / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return paths


@pytest.mark.servers
def test_an_encrypted_line_works_and_an_unknown_certificate_does_not(server: RedisServer, redis_world: RedisWorld, tmp_path: Path) -> None:
    # The server of the wheel has no TLS of its own; the proxy stands for one that has.
    certificate, key = _certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with closing(Proxy(server.port, tls)) as proxy:
        with closing(RedisStore(f"rediss://localhost:{proxy.port}/0?ssl_ca_certs={certificate}")) as store:
            store.claim(3, "n1")
            store.apply([batch("n1", START, {"logins": 1})])
            assert store.load(3, ["c1"]) == [state()]
        with (
            closing(RedisStore(f"rediss://localhost:{proxy.port}/0", patience_s=0)) as store,
            pytest.raises(StoreUnavailable, match="certificate"),
        ):
            store.claim(3, "n1")


@pytest.mark.servers
def test_the_bytes_of_customers_are_counted_over_all_their_keys(server: RedisServer, redis_world: RedisWorld) -> None:
    with closing(RedisStore(server.url)) as store:
        assert redis_bytes(store, [3]) == {"customers": 0}
        store.claim(3, "n1")
        large = CustomerWrite("large", main(2, 7), ((7, b"x" * 100), (8, b"y" * 300)))
        small = [CustomerWrite(secrets.token_hex(4), main(body=b"z" * 12)) for _ in range(9)]
        store.apply([batch("n1", START, {"logins": 1}, customers=[large, *small])])
        sizes = {size.customer: size for size in store.sizes(3)}
        assert len(sizes) == 10
        assert (sizes["large"].value_bytes, sizes["large"].keys) == (408, 3)
        assert 408 < sizes["large"].memory_bytes < 1_000
        figures = redis_bytes(store, [3, 4])
        assert (figures["customers"], figures["value_bytes_p50"], figures["value_bytes_p99"]) == (10, 20, 408)
