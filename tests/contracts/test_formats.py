"""Two versions of the state format on one server: the former one's state is migrated, and the former version is kept away from ours.

format_1.json is what version 0.1.0 left of a partition on a real server (strings in hex), with the digests of the states it read
back; format_1.lua is its function library. So a rolling upgrade can be played here with the former version's own code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from features.facts import TOPICS
from features.history import Histories, digest
from features.redis_store import RedisStore
from features.state import decode
from features.store import LAYOUT, MIGRATED, Apply, Intent, digests
from proto.errors import ChainBroken, Fenced, InvariantBroken
from tests.contracts.redis_servers import RedisServer, running

pytestmark = pytest.mark.servers

HERE = Path(__file__).parent
RECORDED: dict[str, Any] = json.loads((HERE / "format_1.json").read_text(encoding="utf-8"))
META = "churn:{3}:meta"
APPLIED = {**dict.fromkeys(TOPICS, -1), "logins": 599}
UNKNOWN_FORMAT, FENCED = -3, -1


class Former:
    """Version 0.1.0 as far as its function library goes."""

    def __init__(self, client: Any) -> None:
        self._client = client
        client.execute_command("FUNCTION", "LOAD", "REPLACE", (HERE / "format_1.lua").read_text(encoding="utf-8"))

    def claim(self, nonce: str) -> Any:
        return self._client.execute_command("FCALL", "churn_claim", 1, META, nonce, MIGRATED[0])

    def intend(self, nonce: str) -> Any:
        offsets = [part for topic, offset in APPLIED.items() for part in (topic, str(offset))]
        intent = json.dumps({"to": {**APPLIED, "logins": 600}, "model": "m", "scored_at_ms": 5})
        return self._client.execute_command("FCALL", "churn_intend", 1, META, nonce, intent, *offsets)

    def apply(self, nonce: str) -> Any:
        offsets = [part for topic, offset in APPLIED.items() for part in (topic, str(offset), str(offset + 1))]
        head = [nonce, "m", "5", str(len(APPLIED)), "0", "1"]
        return self._client.execute_command("FCALL", "churn_apply", 2, META, "churn:{3}:c:000", *head, *offsets, b"written by the former")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    found = RedisServer(tmp_path_factory.mktemp("formats"))
    with running(found):
        yield found


@pytest.fixture
def client(server: RedisServer) -> Iterator[Any]:
    """A server that holds the recorded partition, and the former version's library."""
    with closing(server.client()) as found:
        found.flushall()
        found.function_flush()
        for key, value in RECORDED["keys"].items():
            name = key.encode("utf-8", "surrogatepass")
            if isinstance(value, dict):
                found.hset(name, mapping=value)
            else:
                found.set(name, bytes.fromhex(value))
        yield found


def everything(client: Any) -> dict[bytes, Any]:
    return {key: client.hgetall(key) if client.type(key) == b"hash" else client.get(key) for key in client.scan_iter()}


def test_the_record_is_of_the_catalog_in_force() -> None:
    # Another catalog gives every stored vector and carry another meaning: then there is nothing to migrate, and this record,
    # the former format and its migration go together.
    assert RECORDED["keys"][META]["format"] == MIGRATED[0]
    assert LAYOUT.startswith("2/")


def test_the_state_of_version_1_is_migrated_byte_for_byte(server: RedisServer, client: Any) -> None:
    before = everything(client)
    names = list(RECORDED["digests"])
    with closing(RedisStore(server.url)) as store:
        claim = store.claim(3, "ours")
        assert (claim.damaged, claim.fresh, claim.rebuilding, claim.outbox) == ("", False, False, b"")
        assert claim.customers == b"".join(sorted(digests([name]) for name in names))
        assert claim.applied == APPLIED
        assert claim.intent == Intent({**APPLIED, "logins": 699}, "digest", 1_700_000_000_999)
        assert claim.counters["events"] == 600
        after = everything(client)
        assert {key for key in after if after[key] != before.get(key)} == {META.encode(), b"churn:{3}:who"}
        assert store.claim(3, "ours") == claim

        states = store.load(3, names)
        assert {name: digest(state) for name, state in zip(names, states, strict=True) if state is not None} == RECORDED["digests"]
        decoded = [decode(state) for state in states if state is not None]
        assert {(customer.band, customer.alert_band) for customer in decoded} == {(2, 0)}

        # And the work goes on: histories are read, changed and written back in our format.
        histories = Histories(known=claim.customers)
        histories.load(names, states)
        writes = histories.changes(names)
        assert not any(write.new for write in writes)
        to = {**APPLIED, "logins": 699}
        store.apply([Apply(3, "ours", APPLIED, to, "digest", 1_700_049_700_000, {"events": 100}, writes, b"outputs")])
        fresh = Histories(known=store.claim(3, "next").customers)
        fresh.load(names, store.load(3, names))
        assert {name: fresh.digest(name) for name in names} == RECORDED["digests"]


def test_the_former_version_is_refused_after_us_and_changes_nothing(server: RedisServer, client: Any) -> None:
    former = Former(client)
    assert former.claim("theirs")[0] != UNKNOWN_FORMAT  # it owned the partition
    assert former.intend("theirs") == 1
    with closing(RedisStore(server.url)) as store:
        claim = store.claim(3, "ours")
        ours = everything(client)
        # A worker of the former version that still works: its nonce is gone. One that starts: it does not know the format.
        assert former.intend("theirs") == [FENCED]
        assert former.apply("theirs") == [FENCED]
        assert former.claim("theirs") == [UNKNOWN_FORMAT, LAYOUT.encode()]
        assert former.claim("another") == [UNKNOWN_FORMAT, LAYOUT.encode()]
        Former(client)  # it loads its library at its start: ours stays
        assert everything(client) == ours
        store.intend(3, "ours", claim.applied, Intent({**APPLIED, "logins": 699}, "digest", 5))
        store.release(3, "ours")
        assert former.claim("another") == [UNKNOWN_FORMAT, LAYOUT.encode()]
        assert store.claim(3, "again").damaged == ""


def test_the_former_version_may_still_have_what_we_began_to_migrate(server: RedisServer, client: Any) -> None:
    former = Former(client)

    class Interrupted(RedisStore):
        def customers(self, partition: int) -> Iterator[str]:
            yield from super().customers(partition)
            former.claim("theirs")

    with closing(Interrupted(server.url)) as store, pytest.raises(Fenced):
        store.claim(3, "ours")
    assert former.intend("theirs") == 1
    assert former.apply("theirs") == 1
    with closing(RedisStore(server.url)) as ours:
        claim = ours.claim(3, "ours")
        assert (claim.damaged, claim.applied["logins"]) == ("", 600)
        assert len(claim.customers) == 8 * len(RECORDED["digests"])


def test_a_migration_that_dies_half_way_is_made_again(server: RedisServer, client: Any) -> None:
    class Dies(RedisStore):
        def customers(self, partition: int) -> Iterator[str]:
            raise KeyboardInterrupt

    with closing(Dies(server.url)) as store, pytest.raises(KeyboardInterrupt):
        store.claim(3, "first")
    assert client.hget(META, "format").decode() == MIGRATED[0]
    with closing(RedisStore(server.url)) as ours:
        assert ours.look(3).customers == b""
        assert len(ours.claim(3, "second").customers) == 8 * len(RECORDED["digests"])


def test_a_newer_format_than_ours_is_refused_by_name(server: RedisServer, client: Any) -> None:
    newer = f"3/{LAYOUT.split('/')[1]}"
    client.hset(META, "format", newer)
    before = everything(client)
    with closing(RedisStore(server.url)) as store, pytest.raises(ChainBroken, match=f"{newer} was written by a newer version"):
        store.claim(3, "ours")
    assert everything(client) == before


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("redis.call('HSET', keys[1], 'format', args[3])", ""),  # the former version would not be kept away
        ("append(keys[1], keys[2], args[4])", ""),  # nobody would be known
        ("redis.call('HSET', meta, 'owner', args[1])", ""),  # the former owner could go on
    ],
)
def test_a_fault_in_the_migration_is_seen(right: str, wrong: str, server: RedisServer, client: Any) -> None:
    text = Path(__file__).parents[2].joinpath("features/functions.lua").read_text(encoding="utf-8")
    assert text.count(right) == 1
    with closing(RedisStore(server.url, library_text=text.replace(right, wrong))) as store:
        assert not migrates(store, client)
    client.hset(META, "format", MIGRATED[0])
    with closing(RedisStore(server.url)) as store:
        assert migrates(store, client)


def migrates(store: RedisStore, client: Any) -> bool:
    """Whether a claim ends with everybody known, and the former version kept away."""
    former = Former(client)
    former.claim("theirs")
    try:
        claim = store.claim(3, "ours")
    except (Fenced, InvariantBroken):
        return False
    known = len(claim.customers) == 8 * len(RECORDED["digests"])
    return known and former.claim("theirs") == [UNKNOWN_FORMAT, LAYOUT.encode()] and former.apply("theirs") == [FENCED]
