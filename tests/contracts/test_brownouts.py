"""A store in trouble: full, slow, restarted, promoted with a tail missing, of another version. What may pass is waited for."""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot
from redis.exceptions import OutOfMemoryError, TimeoutError

from features import redis_store
from features.facts import TOPICS
from features.redis_health import Health, refusal
from features.redis_store import RedisStore
from features.store import FORMAT, PREFIX, Apply, CustomerWrite, Intent, Offsets
from proto.errors import ChainBroken, ChurnError, StateDamaged, StoreUnavailable, StoreWentBack
from streams.metrics import Metrics
from streams.state_store import StoreWatch
from tests.contracts.redis_servers import Proxy, RedisCluster, RedisServer, free_port, running, until

pytestmark = pytest.mark.servers

START: dict[str, int] = dict.fromkeys(TOPICS, -1)
WAIT_S = 30.0


def main(body: bytes = b"") -> bytes:
    return PREFIX.pack(FORMAT, 0, 0) + body


def batch(former: Offsets, nonce: str = "n1", partition: int = 3, size: int = 100) -> Apply:
    """The batch of the next login, with a customer of its own: what is in the store says which batches were applied."""
    to = {**former, "logins": former["logins"] + 1}
    customer = CustomerWrite(f"c{to['logins']}", main(b"x" * size), new=True)
    return Apply(partition, nonce, former, to, "m", to["logins"], {"events": 1}, (customer,), b"outputs of %d" % to["logins"])


class Writer:
    """One worker as far as the store is concerned: batch after batch, in a thread."""

    def __init__(self, store: RedisStore, *, partition: int = 3, size: int = 100) -> None:
        self.store, self.partition, self._size = store, partition, size
        self.applied: Offsets = store.claim(partition, "n1").applied
        self.failure: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def step(self) -> None:
        one = batch(self.applied, partition=self.partition, size=self._size)
        self.store.intend(self.partition, "n1", one.former, Intent(one.to, "m", 1))
        self.store.apply([one])
        self.applied = one.to

    @property
    def done(self) -> int:
        """Batches applied so far."""
        return self.applied["logins"] + 1

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self.step()
        except Exception as error:
            self.failure = error

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join(60)
            assert not self._thread.is_alive()

    def whole(self) -> None:
        """Every batch is in once, and nothing else is."""
        assert self.failure is None
        claim = self.store.look(self.partition)
        names = [f"c{number}" for number in range(self.done)]
        assert (claim.applied, claim.counters, claim.damaged) == (self.applied, {"events": self.done}, "")
        assert len(claim.customers) == 8 * self.done
        assert sorted(self.store.customers(self.partition)) == sorted(names)
        assert None not in self.store.load(self.partition, names)
        assert claim.outbox == b"outputs of %d" % self.applied["logins"]


def waits(writer: Writer, seconds: float = 0.5) -> bool:
    """Whether nothing is applied for so long; the batch under way when it began may end."""
    time.sleep(0.1)
    before = writer.done
    time.sleep(seconds)
    return writer.done == before


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    found = RedisServer(tmp_path / "redis")
    with running(found):
        yield found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    found = RedisCluster(tmp_path_factory.mktemp("cluster"))
    with running(found):
        yield found


def test_a_full_server_is_waited_for_and_answers_meanwhile(own: RedisServer) -> None:
    with closing(RedisStore(own.url, patience_s=WAIT_S)) as store, closing(own.client()) as admin:
        writer = Writer(store, size=20_000)
        with writer.at_work():
            until(lambda: writer.done > 20, "batches are applied")
            used = admin.info("memory")["used_memory"]
            admin.config_set("maxmemory", used + 2_000_000)
            until(lambda: admin.info("errorstats").get("errorstat_OOM"), "the server is full")
            until(lambda: waits(writer), "batches wait")  # at the very edge one or the other still finds room
            with closing(RedisStore(own.url, patience_s=0)) as reader:
                assert reader.look(3).applied["logins"] >= 20
                assert reader.load(3, ["c0"])[0] is not None
                with pytest.raises(StoreUnavailable, match="maxmemory"):
                    reader.apply([batch(reader.look(3).applied)])
                # What makes room, and what a restart of a worker needs, is not refused.
                reader.claim(4, "n9")
                reader.begin_rebuild(4, "n9")
                reader.release(4, "n9")
            seen = writer.done
            admin.config_set("maxmemory", 0)
            until(lambda: writer.done > seen + 20, "batches go on")
        writer.whole()


def test_a_server_that_would_throw_state_away_is_refused(own: RedisServer) -> None:
    with closing(RedisStore(own.url)) as store, closing(own.client()) as admin:
        admin.config_set("maxmemory", "100mb")
        admin.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ChurnError, match=r"allkeys-lru.*noeviction"):
            store.claim(3, "n1")
        admin.config_set("maxmemory-policy", "noeviction")
        store.claim(3, "n1")


def test_a_disk_that_is_full_is_waited_for(tmp_path: Path) -> None:
    own = RedisServer(tmp_path / "redis")
    with ExitStack() as stack:
        stack.enter_context(running(own))
        admin = stack.enter_context(closing(own.client()))
        store, store_of_the_watch = (stack.enter_context(closing(RedisStore(own.url, patience_s=patience))) for patience in (WAIT_S, 0))
        writer = Writer(store, size=5_000)
        metrics = Metrics()
        watch = StoreWatch(store_of_the_watch, metrics)
        watch.look()
        assert metrics.registry.get_sample_value("churn_store_writable") == 1
        with writer.at_work():
            until(lambda: writer.done > 20, "batches are applied")
            own.bound_files(1 << 20)
            until(lambda: admin.info("persistence")["aof_last_write_status"] == "err", "the append-only file cannot grow")
            assert waits(writer)
            watch.look()
            assert metrics.registry.get_sample_value("churn_store_writable") == 0
            with closing(RedisStore(own.url, patience_s=0)) as other, pytest.raises(StoreUnavailable, match="MISCONF"):
                other.intend(3, "n1", writer.applied, Intent(writer.applied, "m", 1))
            seen = writer.done
            own.bound_files(-1)
            until(lambda: writer.done > seen + 20, "batches go on")
        writer.whole()
        own.stop(hard=True)
        own.start()
        writer.whole()


def test_too_few_replicas_are_waited_for(own: RedisServer) -> None:
    with closing(RedisStore(own.url, patience_s=WAIT_S)) as store, closing(own.client()) as admin:
        writer = Writer(store)
        admin.config_set("min-replicas-to-write", 1)
        with writer.at_work():
            assert waits(writer)
            admin.config_set("min-replicas-to-write", 0)
            until(lambda: writer.done > 20, "batches go on")
        writer.whole()


def test_a_slow_server_answers_late_and_the_batch_is_in_once(own: RedisServer) -> None:
    with closing(RedisStore(own.url, timeout_s=0.2, patience_s=WAIT_S)) as store, closing(own.client()) as admin:
        writer = Writer(store)
        with writer.at_work():
            for seconds, what in ((0.5, "ALL"), (1.0, "WRITE"), (0.7, "ALL")):
                seen = writer.done
                until(lambda: writer.done > seen + 5, "batches are applied")  # noqa: B023 - called within this turn of the loop
                admin.execute_command("CLIENT", "PAUSE", int(1_000 * seconds), what)
                time.sleep(seconds + 0.1)  # the pause ends by itself
        writer.whole()


def test_a_frozen_server_is_waited_for(own: RedisServer) -> None:
    with closing(RedisStore(own.url, timeout_s=0.3, patience_s=WAIT_S)) as store:
        writer = Writer(store)
        with writer.at_work():
            until(lambda: writer.done > 20, "batches are applied")
            own.freeze()
            assert waits(writer, 1.5)
            own.thaw()
            seen = writer.done
            until(lambda: writer.done > seen + 20, "batches go on")
        writer.whole()


@pytest.mark.parametrize("hard", [False, True])
def test_restarts_under_load_lose_nothing(hard: bool, own: RedisServer) -> None:
    with closing(RedisStore(own.url, patience_s=WAIT_S)) as store:
        writer = Writer(store)
        seconds = []
        with writer.at_work():
            for _ in range(5):
                seen = writer.done
                until(lambda: writer.done > seen + 50, "batches are applied")  # noqa: B023 - called within this turn of the loop
                own.stop(hard=hard)
                began = time.monotonic()
                own.start()
                seen = writer.done
                until(lambda: writer.done > seen, "batches go on")  # noqa: B023 - called within this turn of the loop
                seconds.append(time.monotonic() - began)
        writer.whole()
        assert max(seconds) < 3


def test_a_replica_waits_for_its_promotion(tmp_path: Path) -> None:
    primary, replica = RedisServer(tmp_path / "primary"), RedisServer(tmp_path / "replica")
    with ExitStack() as stack:
        for server in (primary, replica):
            stack.enter_context(running(server))
        admin = stack.enter_context(closing(replica.client()))
        proxy = stack.enter_context(closing(Proxy(primary.port)))
        store = stack.enter_context(closing(RedisStore(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.5, patience_s=WAIT_S)))
        admin.replicaof("127.0.0.1", primary.port)
        writer = Writer(store)
        with writer.at_work():
            until(lambda: writer.done > 50, "batches are applied")
            # A promotion in good order: the replica has everything before it takes over.
            with closing(primary.client()) as old:
                old.execute_command("CLIENT", "PAUSE", 20_000, "WRITE")
                until(
                    lambda: admin.info("replication")["slave_repl_offset"] == old.info("replication")["master_repl_offset"], "it is level"
                )
            primary.stop(hard=True)
            proxy.switch(replica.port)
            assert waits(writer)
            seen = writer.done
            admin.replicaof("NO", "ONE")
            until(lambda: writer.done > seen + 20, "batches go on")
        writer.whole()


def test_a_replica_promoted_without_the_tail_is_noticed_and_the_chain_goes_on_from_what_it_has(tmp_path: Path) -> None:
    primary, replica = RedisServer(tmp_path / "primary"), RedisServer(tmp_path / "replica")
    with ExitStack() as stack:
        for server in (primary, replica):
            stack.enter_context(running(server))
        admin = stack.enter_context(closing(replica.client()))
        proxy = stack.enter_context(closing(Proxy(primary.port)))
        store = stack.enter_context(closing(RedisStore(f"redis://127.0.0.1:{proxy.port}", timeout_s=0.5, patience_s=WAIT_S)))
        admin.replicaof("127.0.0.1", primary.port)
        until(lambda: admin.info("replication")["master_link_status"] == "up", "the replica is linked")
        writer = Writer(store)
        for _ in range(30):
            writer.step()
        until(lambda: admin.hget("churn:{3}:meta", "applied:logins") == b"29", "the replica has it")
        admin.replicaof("NO", "ONE")  # the link is cut; the old primary goes on and does not know
        for _ in range(7):
            writer.step()
        one = batch(writer.applied)
        store.intend(3, "n1", one.former, Intent(one.to, "m", 1))
        primary.stop(hard=True)
        proxy.switch(replica.port)
        with pytest.raises(StoreWentBack, match=r"'logins': 36.*'logins': 29.*went back"):
            store.apply([one])
        with pytest.raises(StoreWentBack):
            store.intend(3, "n1", one.former, Intent(one.to, "m", 1))
        claim = store.claim(3, "n2")
        assert (claim.applied["logins"], claim.intent, claim.damaged, claim.fresh) == (29, None, "", False)
        assert claim.outbox == b"outputs of 29"
        assert len(claim.customers) == 8 * 30
        writer.applied = claim.applied
        store.apply([batch(claim.applied, "n2")])


def test_a_store_emptied_under_a_worker_takes_nothing_from_it(own: RedisServer) -> None:
    with closing(RedisStore(own.url)) as store, closing(own.client()) as admin:
        writer = Writer(store)
        with writer.at_work():
            until(lambda: writer.done > 20, "batches are applied")
            admin.flushall()
            until(lambda: writer.failure is not None, "the worker is refused")
        assert isinstance(writer.failure, StoreWentBack)
        assert admin.dbsize() == 0  # not even a key of its own is left by the refused calls
        claim = store.claim(3, "n2")
        assert (claim.fresh, claim.damaged, claim.applied) == (True, "", START)


@pytest.mark.parametrize(("key", "expected"), [("meta", StoreWentBack), ("who", StateDamaged)])
def test_a_key_deleted_under_a_worker_stops_it(key: str, expected: type[ChainBroken], own: RedisServer) -> None:
    with closing(RedisStore(own.url)) as store, closing(own.client()) as admin:
        writer = Writer(store)
        with writer.at_work():
            until(lambda: writer.done > 20, "batches are applied")
            admin.delete(f"churn:{{3}}:{key}")
            until(lambda: writer.failure is not None, "the worker is refused")
        assert isinstance(writer.failure, expected)
        assert store.claim(3, "n2").damaged


# -- versions and warnings


@pytest.mark.parametrize(
    ("version", "oldest", "why"),
    [
        ("8.2.3", "", ""),
        ("8.2.2", "", ""),
        ("8.2.1", "", "older than 8.2.2"),
        ("8.1.9", "", "older than 8.2.2"),
        ("8.0.4", "", ""),
        ("7.4.5", "", "older than 7.4.6"),
        ("7.2.11", "", ""),
        ("7.0.15", "", "older than 7.2.11"),
        ("6.2.20", "", "older than 7.2.11"),
        ("8.4.0", "", ""),
        ("10.0", "", ""),
        ("7.0.15", "7.0.15", ""),
        ("7.0.14", "7.0.15", "older than 7.0.15"),
        ("", "", ""),
        ("", "9", ""),
    ],
)
def test_a_server_with_known_holes_is_refused(version: str, oldest: str, why: str) -> None:
    said = refusal(Health("here", version), oldest)
    assert why in said
    assert bool(said) == bool(why)


def test_the_version_is_looked_at_before_anything_is_claimed(own: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    with closing(own.client()) as admin:
        with (
            closing(RedisStore(own.url, oldest="99")) as store,
            pytest.raises(ChurnError, match=r"redis-server \d+\.\d+\.\d+ is older than 99.*redis_oldest_version"),
        ):
            store.claim(3, "n1")
        assert admin.dbsize() == 0
        assert admin.execute_command("FUNCTION", "LIST") == []
        with closing(RedisStore(own.url)) as store:
            store.claim(3, "n1")
        admin.execute_command("ACL", "SETUSER", "blind", "reset", "on", ">pw", "~*", "+@all", "-info")
        with closing(RedisStore(f"redis://blind:pw@127.0.0.1:{own.port}", oldest="99")) as store, caplog.at_level(logging.WARNING):
            store.claim(3, "n2")
        assert "does not say its version" in caplog.text


def test_a_server_that_fills_up_is_said_once_and_measured(own: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with closing(RedisStore(own.url, patience_s=0)) as store, closing(own.client()) as admin, caplog.at_level(logging.INFO):
        watch = StoreWatch(store, metrics)

        def filled() -> float:
            watch.look()
            return metrics.registry.get_sample_value("churn_store_memory_ratio") or 0.0

        assert filled() == 0.0
        used = admin.info("memory")["used_memory"]
        admin.config_set("maxmemory", used * 2)
        assert 0.4 < filled() < 0.6
        assert caplog.text == ""
        admin.config_set("maxmemory", int(used * 1.15))
        assert filled() > 0.8
        watch.look()
        assert caplog.text.count("has filled 80%") == 1
        admin.config_set("maxmemory", used * 2)
        watch.look()
        assert "over: has filled" in caplog.text
        admin.config_set("maxmemory", int(used * 1.15))
        watch.look()
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
        admin.config_set("maxmemory", 0)


def test_the_watch_outlives_a_server_that_is_away(own: RedisServer) -> None:
    metrics = Metrics()
    watch = StoreWatch(RedisStore(own.url, patience_s=0), metrics, every_s=0.02)
    watch.start()
    until(lambda: metrics.registry.get_sample_value("churn_store_writable") == 1, "it has looked")
    own.stop()
    time.sleep(0.2)  # looks at a server that is not there must not end the watch
    metrics.store_writable.set(-1)
    own.start()
    until(lambda: metrics.registry.get_sample_value("churn_store_writable") == 1, "it looks again")
    watch.stop()
    watch._thread.join(10)
    assert not watch._thread.is_alive()


# -- a cluster


def test_a_failover_in_good_order_is_not_noticed(cluster: RedisCluster) -> None:
    with ExitStack() as stack:
        writers = []
        for partition in (0, 1, 2, 5):
            store = stack.enter_context(closing(RedisStore(cluster.url, namespace="order", patience_s=WAIT_S)))
            writers.append(Writer(store, partition=partition))
            stack.enter_context(writers[-1].at_work())
        for primary in cluster.primaries():
            seen = [writer.done for writer in writers]
            until(lambda: all(w.done > s + 20 for w, s in zip(writers, seen, strict=True)), "batches are applied")  # noqa: B023 - called within this turn of the loop
            replica = cluster.replica_of(primary)
            assert replica is not None
            with closing(replica.client()) as client:
                client.execute_command("CLUSTER", "FAILOVER")
                until(lambda: client.execute_command("ROLE")[0] == b"master", "it has taken over")
        seen = [writer.done for writer in writers]
        until(lambda: all(w.done > s + 20 for w, s in zip(writers, seen, strict=True)), "batches go on")
        stack.close()
        for writer in writers:
            with closing(RedisStore(cluster.url, namespace="order")) as writer.store:
                writer.whole()


def test_a_primary_killed_is_replaced_and_what_it_took_along_is_noticed(cluster: RedisCluster) -> None:
    with closing(RedisStore(cluster.url, namespace="killed", patience_s=WAIT_S)) as store:
        writer = Writer(store)
        home = cluster.primary_of("killed:{3}:meta")
        with writer.at_work():
            until(lambda: writer.done > 50, "batches are applied")
            home.stop(hard=True)
            seen, began = writer.done, time.monotonic()
            # Replication does not wait: the last batches may be gone, and then the next one does not follow.
            until(lambda: writer.done > seen + 20 or writer.failure is not None, "batches go on")
            assert time.monotonic() - began < 15
        if writer.failure is not None:
            assert isinstance(writer.failure, StoreWentBack)
            writer.failure, writer.applied = None, store.claim(3, "n1").applied
            writer.step()
        writer.whole()
        home.start()
        until(lambda: cluster.replica_of(cluster.primary_of("killed:{3}:meta")) is home, "the old primary is a replica now")


def test_a_whole_cluster_that_restarts_is_waited_for(cluster: RedisCluster) -> None:
    with closing(RedisStore(cluster.url, namespace="restart", patience_s=WAIT_S)) as store:
        writers = [Writer(store, partition=partition) for partition in (0, 1, 2)]
        for node in cluster.nodes:
            node.stop(hard=True)
        for node in cluster.nodes:
            node.start()
        for writer in writers:
            for _ in range(5):
                writer.step()
            writer.whole()


def customers_of(client: Any, slot: int) -> list[bytes]:
    """Keys of customers in a slot."""
    return [key for key in client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10_000) if b":c:" in key]


def test_a_slot_that_moves_to_another_node_is_waited_for(cluster: RedisCluster) -> None:
    meta = "moving:{3}:meta"
    slot = key_slot(meta.encode())
    source = cluster.primary_of(meta)
    target = next(node for node in cluster.primaries() if node is not source)
    with ExitStack() as stack:
        store, reader = (stack.enter_context(closing(RedisStore(cluster.url, namespace="moving", patience_s=WAIT_S))) for _ in range(2))
        here, there = stack.enter_context(closing(source.client())), stack.enter_context(closing(target.client()))
        here_id, there_id = (client.execute_command("CLUSTER", "MYID").decode() for client in (here, there))
        writer = Writer(store)
        stack.enter_context(writer.at_work())
        loaded: list[Exception | int] = []

        def read() -> None:
            """Customers are loaded all the time: either all of them, or an error."""
            while not ended.is_set():
                names = [f"c{number}" for number in range(20)]
                try:
                    loaded.append(sum(state is not None for state in reader.load(3, names)))
                except Exception as error:
                    loaded.append(error)

        until(lambda: writer.done > 200, "batches are applied")
        ended, thread = threading.Event(), threading.Thread(target=read, daemon=True)
        thread.start()
        there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", here_id)
        here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", there_id)
        # The customers first: what says where the partition stands is still here, so functions begin here and miss a customer.
        here.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *customers_of(here, slot))
        time.sleep(0.5)  # some batches and some reads meet that
        while keys := here.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 40):
            here.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, "KEYS", *keys)
        for client in (there, here):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", there_id)
        seen, read_before = writer.done, len(loaded)
        until(lambda: writer.done > seen + 50, "batches go on")
        until(lambda: len(loaded) > read_before + 5, "reading goes on")
        ended.set()
        thread.join(30)
        assert set(loaded) == {20}
    with closing(RedisStore(cluster.url, namespace="moving")) as writer.store:
        writer.whole()
    assert cluster.primary_of(meta) is target


def test_one_round_trip_applies_batches_of_partitions_on_all_nodes(cluster: RedisCluster) -> None:
    partitions = range(16)
    homes = {cluster.primary_of(f"many:{{{partition}}}:meta").port for partition in partitions}
    assert len(homes) == 3
    with closing(RedisStore(cluster.url, namespace="many")) as store:
        for partition in partitions:
            store.claim(partition, "n1")
        store.apply([batch(START, partition=partition) for partition in partitions])
        for partition in partitions:
            assert store.look(partition).applied["logins"] == 0
        for client in cluster.clients():
            with closing(client):
                assert any(name.startswith(b"churnstream_") for _, name, *_ in client.execute_command("FUNCTION", "LIST"))


def test_an_address_that_is_no_cluster_or_one_of_a_cluster_says_what_to_write(own: RedisServer, cluster: RedisCluster) -> None:
    with closing(RedisStore(f"redis+cluster://127.0.0.1:{own.port}")) as store, pytest.raises(ChurnError, match="use redis://"):
        store.claim(3, "n1")
    place = cluster.url.removeprefix("redis+cluster://").split(",")[0]
    began = time.monotonic()
    elsewhere = next(p for p in range(16) if cluster.primary_of(f"wrong:{{{p}}}:meta").port != int(place.split(":")[1]))
    with (
        closing(RedisStore(f"redis://{place}", namespace="wrong")) as store,
        pytest.raises(StoreUnavailable, match=r"use redis\+cluster://"),
    ):
        store.claim(elsewhere, "n1")
    assert time.monotonic() - began < 3
    nobody = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    with (
        closing(RedisStore(f"redis+cluster://user:geheim@{nobody}", patience_s=0)) as store,
        pytest.raises(StoreUnavailable, match=f"{nobody} did not answer") as raised,
    ):
        store.claim(3, "n1")
    assert "geheim" not in str(raised.value)


def test_a_user_with_few_rights_is_enough_on_a_cluster(cluster: RedisCluster) -> None:
    rights = "+fcall +fcall_ro +hget +hmget +hset +hdel +hincrby +hgetall +get +mget +set +mset +append +strlen +exists +del +unlink"
    rights += " +scan +info +cluster|slots +client|setname +client|setinfo"
    with closing(RedisStore(cluster.url, namespace="few")) as store:
        store.claim(3, "admin")  # the library is loaded by a user who may
    for node in cluster.nodes:
        with closing(node.client()) as admin:
            admin.execute_command("ACL", "SETUSER", "churn", "reset", "on", ">geheim", "~few:*", *rights.split())
    with closing(RedisStore(cluster.url.replace("://", "://churn:geheim@"), namespace="few")) as store:
        for partition in range(8):
            store.claim(partition, "n1")
            store.begin_rebuild(partition, "n1")
            store.restore(partition, "n1", batch(START).customers)
            store.finish_rebuild(partition, "n1", START, "", -1, {})
            store.apply([batch(START, partition=partition)])
        assert store.health()[0].version
    with closing(RedisStore(cluster.url.replace("://", "://churn:falsch@"), namespace="few")) as store:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="refuses this user") as raised:
            store.claim(3, "n1")
        assert time.monotonic() - began < 1
        assert "falsch" not in str(raised.value)


# -- faults planted in our side: the tests above must see each of them


def _without(texts: tuple[str, ...], text: str) -> tuple[str, ...]:
    return tuple(kept for kept in texts if kept != text)


FAULTS: dict[str, tuple[str, object, str]] = {
    "a full server taken for a broken one": (
        "features.redis_store._PASSING",
        tuple(kind for kind in redis_store._PASSING if kind is not OutOfMemoryError),
        "test_a_full_server_is_waited_for_and_answers_meanwhile",
    ),
    "a full disk taken for a broken server": (
        "features.redis_store._PASSING_TEXTS",
        _without(redis_store._PASSING_TEXTS, "MISCONF"),
        "test_a_disk_that_is_full_is_waited_for",
    ),
    "missing replicas taken for a broken server": (
        "features.redis_store._PASSING_TEXTS",
        _without(redis_store._PASSING_TEXTS, "NOREPLICAS"),
        "test_too_few_replicas_are_waited_for",
    ),
    "a timeout taken for a broken server": (
        "features.redis_store._PASSING",
        tuple(kind for kind in redis_store._PASSING if kind is not TimeoutError),
        "test_a_slow_server_answers_late_and_the_batch_is_in_once",
    ),
    "a slot on its way taken for a broken server": (
        "features.redis_store._MOVING_TEXTS",
        (),
        "test_a_slot_that_moves_to_another_node_is_waited_for",
    ),
    "any version trusted": (
        "features.redis_store.refusal",
        lambda health, oldest: "",
        "test_the_version_is_looked_at_before_anything_is_claimed",
    ),
    "a store that went back taken for another writer": (
        "features.redis_store.broken",
        lambda partition, former, stored: ChainBroken("another writer"),
        "test_a_store_emptied_under_a_worker_takes_nothing_from_it",
    ),
    "never warned": ("streams.state_store.FULL", 2.0, "test_a_server_that_fills_up_is_said_once_and_measured"),
    "where keys live asked once for all": (
        "features.redis_nodes._Cluster.forget",
        lambda self: None,
        "test_a_failover_in_good_order_is_not_noticed",
    ),
    "functions on one primary only": (
        "features.redis_nodes._Cluster.primaries",
        lambda self: [self._at(self._known()[0][2])],
        "test_one_round_trip_applies_batches_of_partitions_on_all_nodes",
    ),
    "any node of a cluster asked": (
        "features.redis_nodes._Cluster.of",
        lambda self, key: self._at(self._known()[0][2]),
        "test_one_round_trip_applies_batches_of_partitions_on_all_nodes",
    ),
}
"""What is replaced, by what, and the test that must fail."""


def _run(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
    """One of the tests above with less patience, and with a fault planted once its servers are up."""
    monkeypatch.setattr("tests.contracts.test_brownouts.WAIT_S", 3.0)
    monkeypatch.setattr("tests.contracts.redis_servers.PATIENCE_S", 6.0)
    test = globals()[name]
    arguments = {parameter: request.getfixturevalue(parameter) for parameter in inspect.signature(test).parameters}
    if isinstance(found := arguments.get("cluster"), RedisCluster):
        for client in found.clients():
            with closing(client):
                client.function_flush()
                client.flushall()
    fault()
    test(**arguments)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_ours_turns_a_test_red(fault: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    target, wrong, name = FAULTS[fault]
    with pytest.raises((AssertionError, ChurnError, pytest.fail.Exception)):
        _run(name, request, monkeypatch, lambda: monkeypatch.setattr(target, wrong))


@pytest.mark.parametrize("name", dict.fromkeys(name for _, _, name in FAULTS.values()))
def test_without_a_fault_the_same_test_is_green(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(name, request, monkeypatch, lambda: None)
