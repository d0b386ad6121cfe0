"""The parts of the lookup service by themselves: freshness, tokens, pruning, reading together, TLS."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr

from features.facts import TOPICS
from features.history import Histories
from features.redis_store import Seen
from features.store import CustomerState, Standing
from proto.churn.v1 import churn_pb2 as pb
from proto.errors import BadUsage, ChainBroken, StateDamaged, StoreUnavailable
from scoring.fallback import Fallback
from streams.access import ALL, FIELDS, Audit, Caller, Group, RateLimits, Role, Tokens, prune
from streams.freshness import Freshness
from streams.grpc_server import GrpcServer, Tls
from streams.refusal import Code, Refusal
from streams.serve import loopback, tls_of
from streams.settings import Settings
from streams.state_reader import StateReader
from tests.models.shop import rhythms

NOW = 1_700_000_000_000


def test_the_staleness_bound_is_the_newest_look_whose_records_are_all_applied() -> None:
    ends: dict[tuple[int, int], int] = {}
    times = iter(range(NOW, NOW + 10_000, 1_000))
    freshness = Freshness(lambda: dict(ends), lambda: next(times))
    applied = dict.fromkeys(TOPICS, -1)
    assert freshness.bound(0, applied, NOW) is None
    freshness.look()  # nothing is there
    ends[0, 0] = 5
    freshness.look()
    ends[0, 0], ends[3, 0] = 9, 1
    freshness.look()
    at = NOW + 3_000
    assert freshness.bound(0, applied, at) == 3_000
    assert freshness.bound(0, applied | {"transactions": 4}, at) == 2_000
    assert freshness.bound(0, applied | {"transactions": 8}, at) == 2_000  # the profile is not applied
    assert freshness.bound(0, applied | {"transactions": 8, "customer-profiles": 0}, at) == 1_000
    assert freshness.bound(1, applied, at) == 1_000  # another partition, in which nothing is


def test_every_hidden_field_is_one_of_the_contract_and_pruning_reaches_all_depths() -> None:
    messages = pb.DESCRIPTOR.message_types_by_name
    assert [name for name in FIELDS if name.split(".")[1] not in messages[name.split(".")[0]].fields_by_name] == []
    score = pb.Score(customer_id="c", probability=0.5, vector_hash="x", freshness=pb.Freshness(cut={"logins": 3}, age_ms=4))
    for groups in (ALL, frozenset[Group](), frozenset({Group.OUTCOME})):
        answer = pb.BatchGetScoresResponse(scores=[score, score])
        prune(answer, groups)
        for one in answer.scores:
            assert one.HasField("probability") == (Group.OUTCOME in groups)
            assert bool(one.freshness.cut) == bool(one.vector_hash) == (Group.PROVENANCE in groups)
            assert one.freshness.age_ms == 4


def test_a_token_file_is_read_again_and_a_broken_one_leaves_the_known_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(token: str, role: str) -> str:
        return f'[[token]]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\nsubject = "s"\nrole = "{role}"\n'

    file = tmp_path / "tokens.toml"
    file.write_text(row("one", "agent"))
    tokens = Tokens(file)
    assert tokens.identify("one") == Caller("s", Role.AGENT)
    monkeypatch.setattr("streams.access.time.monotonic", iter(range(10**9, 2 * 10**9, 100)).__next__)
    file.write_text(row("two", "analyst") + row("three", "admin"))
    assert tokens.identify("two").role is Role.ANALYST
    with pytest.raises(Refusal):
        tokens.identify("one")
    file.write_text(row("four", "king"))
    assert tokens.identify("three").role is Role.ADMIN
    with pytest.raises(BadUsage, match="token file"):
        Tokens(file)
    with pytest.raises(BadUsage, match="32 bytes"):
        Tokens(None, "short")
    assert Tokens(None).open


def test_limits_are_by_subject_and_an_audit_line_names_nobody(tmp_path: Path) -> None:
    limits, one, other = RateLimits(3), Caller("a", Role.AGENT), Caller("b", Role.AGENT)
    limits.take(one, 3)
    with pytest.raises(Refusal) as refused:
        limits.take(one, 3)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED
    limits.take(other, 1)
    audit = Audit(tmp_path / "audit", b"key")
    audit.note(one, "GetScore", ["Ada"], "OK", at_ms=NOW)
    audit.close()
    line = (tmp_path / "audit").read_text()
    assert "Ada" not in line
    assert audit.name("Ada") in line
    assert audit.name("Ada") != Audit(None, b"other").name("Ada")


class Shelf:
    """A store that works, in memory; `bad` customers are damaged, and it may be away."""

    def __init__(self, states: dict[str, CustomerState]) -> None:
        self.states, self.bad, self.away, self.calls = states, set[str](), False, 0

    def lookup(self, asked: Sequence[tuple[int, Sequence[str]]]) -> list[Seen]:
        self.calls += 1
        if self.away:
            raise StoreUnavailable("away")
        for _, names in asked:
            if self.bad.intersection(names):
                raise StateDamaged("damaged")
        return [Seen(p, dict.fromkeys(TOPICS, 7), NOW, False, False, [self.states.get(name) for name in names]) for p, names in asked]

    def standings(self, partitions: Sequence[int]) -> list[Standing]:
        return []


def test_who_waits_together_is_answered_together_and_one_damaged_customer_spoils_one_answer() -> None:
    shop = rhythms(customers=20, days=200)
    histories = Histories(create=True)
    histories.step(shop.customers, shop.facts)
    names = sorted(set(shop.customers))
    shelf = Shelf({name: histories.state(name) for name in names})
    fallback = Fallback(0.5)
    later = int(shop.facts[:, 0].max()) + 86_400_000

    async def ask() -> None:
        reader = StateReader(shelf, lambda: fallback, fallback, 4, lambda _: later)
        found = await asyncio.gather(*(reader.read([name], None) for name in names), reader.read([*names, "nobody", names[0]], None))
        assert shelf.calls < 5
        for name, (one,) in zip(names, found[:-1], strict=True):
            assert (one.customer, one.at_ms) == (name, later)
            np.testing.assert_array_equal(one.vector, histories.vectors_at([name], later)[0])
        assert [one.state is None for one in found[-1]] == [False] * len(names) + [True, False]
        shelf.bad = {names[3]}
        results = await asyncio.gather(*(reader.read([name], None) for name in names), return_exceptions=True)
        assert [isinstance(result, ChainBroken) for result in results] == [name == names[3] for name in names]
        shelf.bad, shelf.away = set(), True
        with pytest.raises(StoreUnavailable):
            await reader.read([names[0]], None)
        shelf.away = False
        early = (await reader.read([names[0]], NOW - 10**11))[0]
        assert early.at_ms == early.newest_ms  # never before the newest event
        reader.close()

    asyncio.run(ask())


def certificates(home: Path) -> None:
    """An authority, and certificates of a server and a client by it, as PEM files."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])

    def signed(name: x509.Name, key: ec.EllipticCurvePrivateKey, ca: bool) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(authority_key, hashes.SHA256())
        )

    (home / "ca.pem").write_bytes(signed(authority, authority_key, True).public_bytes(serialization.Encoding.PEM))
    for who in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)])
        (home / f"{who}.pem").write_bytes(signed(name, key, False).public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (home / f"{who}.key").write_bytes(private)


def test_mutual_tls_lets_in_who_shows_a_certificate(tmp_path: Path) -> None:
    certificates(tmp_path)
    paths = {
        "serve_tls_cert": tmp_path / "server.pem",
        "serve_tls_key": tmp_path / "server.key",
        "serve_tls_client_ca": tmp_path / "ca.pem",
    }
    tls = tls_of(Settings(redis_url=SecretStr(""), **paths))  # type: ignore[arg-type]  # three paths
    assert isinstance(tls, Tls)
    authority = (tmp_path / "ca.pem").read_bytes()
    own = ((tmp_path / "client.key").read_bytes(), (tmp_path / "client.pem").read_bytes())

    async def check(credentials: Any, port: int) -> Any:
        place = f"localhost:{port}"
        channel = grpc.aio.insecure_channel(place) if credentials is None else grpc.aio.secure_channel(place, credentials)
        async with channel:
            return (await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)).status

    async def serve() -> None:
        gate: Any = None  # health asks nobody
        server = GrpcServer(gate, "localhost:0", tls=tls, with_reflection=False, max_request_bytes=1 << 20)
        await server.start()
        await server.ready(True)
        assert await check(grpc.ssl_channel_credentials(authority, *own), server.port) == health_pb2.HealthCheckResponse.SERVING
        for credentials in (grpc.ssl_channel_credentials(authority), None):
            with pytest.raises(grpc.aio.AioRpcError):
                await check(credentials, server.port)
        await server.stop(0)

    asyncio.run(serve())


def test_half_a_certificate_and_an_open_address_are_refused() -> None:
    with pytest.raises(BadUsage, match="needs both"):
        tls_of(Settings(serve_tls_cert=Path("some.pem")))
    assert tls_of(Settings()) is None
    assert loopback("127.0.0.1")
    assert not loopback("0.0.0.0")
