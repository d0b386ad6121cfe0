"""Which server a key lives on: the only one, or a primary of a Redis Cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from redis import ConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.crc import key_slot
from redis.exceptions import ClusterDownError, ConnectionError, RedisError, ResponseError
from redis.retry import Retry

from proto.errors import BadUsage

CLUSTER_SCHEMES: Final = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
"""Schemes of an address that names a cluster, and what its nodes are spoken to with."""

Address = tuple[str, int]


class Nodes(Protocol):
    """Clients by key. A client is the library's, without its own retries and answer callbacks."""

    address: str
    """What to call it in a message; never with a password."""
    many: bool
    """Whether a key may live elsewhere tomorrow."""

    def of(self, key: bytes) -> Any:
        """Client of the server that holds the key. Raises what the library does when none answers."""
        ...

    def primaries(self) -> list[Any]:
        """Clients of all servers that take writes."""
        ...

    def forget(self) -> None:
        """Something went wrong: look again where keys live before the next one is asked for."""
        ...

    def close(self) -> None: ...


def open_nodes(url: str, *, timeout_s: float) -> Nodes:
    """What the address names; nothing is asked yet. timeout_s bounds connecting and each answer.

    url: redis://, rediss:// or unix:// for one server; redis+cluster:// or rediss+cluster:// for a cluster, with any number of
    `host:port` separated by commas, of which one must answer. Raises BadUsage for an address nobody can read.
    """
    options = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),  # the store's own: it knows which errors pass
        "protocol": 2,
        "client_name": "churnstream",
    }
    scheme, separator, rest = url.partition("://")
    try:
        if scheme not in CLUSTER_SCHEMES:
            return _One(url, options)
        head, mark, tail = (rest, "", "") if "/" not in rest else rest.partition("/")
        if not mark and "?" in head:
            head, mark, tail = rest.partition("?")
        credentials, at, hosts = head.rpartition("@")
        places = [f"{CLUSTER_SCHEMES[scheme]}{separator}{credentials}{at}{host}{mark}{tail}" for host in hosts.split(",")]
        return _Cluster(places, options)
    except ValueError as error:
        raise BadUsage(f"address of Redis ({scheme}{separator}...): {error}") from error


class _One:
    """A single server."""

    many = False

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self._client = _client(ConnectionPool.from_url(url, **options))
        known = self._client.connection_pool.connection_kwargs
        self.address: str = known["path"] if "path" in known else f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"

    def of(self, key: bytes) -> Any:
        return self._client

    def primaries(self) -> list[Any]:
        return [self._client]

    def forget(self) -> None:
        pass

    def close(self) -> None:
        self._client.close()


class _Cluster:
    """Any number of servers that say themselves who serves which slots.

    The library's own cluster client is not used: it asks a server for the keys of every function call, and connects when made.
    """

    many = True

    def __init__(self, urls: Sequence[str], options: dict[str, Any]) -> None:
        self._seeds: list[Address] = []
        for url in urls:
            said: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped
            if "path" in said or said.get("db", 0) != 0:
                raise ValueError("a cluster has neither a socket file nor a database number")
            place = urlsplit(url)
            self._seeds.append((place.hostname or "localhost", place.port or 6379))
            said.pop("host", None)
            said.pop("port", None)
            said.pop("db", None)
        self._options = {**options, **said}  # parse_url also says the class of connection, for TLS
        self._clients: dict[Address, Any] = {}
        self._slots: list[tuple[int, int, Address]] = []
        self.address = ",".join(f"{host}:{port}" for host, port in self._seeds)

    def of(self, key: bytes) -> Any:
        slot = key_slot(key)
        for first, last, address in self._known():
            if first <= slot <= last:
                return self._at(address)
        raise ClusterDownError(f"no node of the cluster serves slot {slot}")

    def primaries(self) -> list[Any]:
        return [self._at(address) for address in dict.fromkeys(address for _, _, address in self._known())]

    def forget(self) -> None:
        self._slots = []

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def _at(self, address: Address) -> Any:
        client = self._clients.get(address)
        if client is None:
            client = _client(ConnectionPool(host=address[0], port=address[1], **self._options))
            self._clients[address] = client
        return client

    def _known(self) -> list[tuple[int, int, Address]]:
        if not self._slots:
            self._slots = self._ask()
        return self._slots

    def _ask(self) -> list[tuple[int, int, Address]]:
        """The slots as the first node says that answers; the next call begins with another: one may be behind the others."""
        known = list(dict.fromkeys([*self._clients, *self._seeds]))
        failure: RedisError = ConnectionError("no node of the cluster answers")
        for address in known:
            try:
                answer = self._at(address).execute_command("CLUSTER", "SLOTS")
            except ResponseError as error:
                if "cluster support disabled" in str(error):
                    raise BadUsage(f"Redis at {address[0]}:{address[1]} is not part of a cluster: use redis:// or rediss://") from error
                failure = error
            except RedisError as error:
                failure = error
            else:
                self._clients[address] = self._clients.pop(address)  # to the end of the line
                return [(first, last, ((node[0] or b"").decode() or address[0], node[1])) for first, last, node, *_ in answer]
        raise failure


def _client(pool: ConnectionPool) -> Any:  # Any: the client's general calls carry no types
    client: Any = Redis(connection_pool=pool)
    client.response_callbacks.clear()  # answers as the server gives them
    return client
