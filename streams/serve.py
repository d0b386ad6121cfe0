"""The lookup service put together: one process, one asyncio loop, gRPC and REST beside each other."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import uvicorn
from prometheus_client import generate_latest
from starlette.types import ASGIApp

from features.catalog import LAYOUT_HASH
from features.facts import TOPICS
from features.redis_store import Seen
from proto.errors import BadUsage, ChurnError
from scoring.explanation import load as load_model
from scoring.fallback import Fallback
from scoring.reasons import Money
from streams.access import Audit, RateLimits, Tokens
from streams.codec import exponent_of
from streams.freshness import Freshness, kafka_ends
from streams.gate import Gate
from streams.grpc_server import GrpcServer, Tls
from streams.log import KafkaLog
from streams.lookups import Lookups
from streams.metrics import LookupMetrics, Metrics
from streams.past_facts import PastFacts
from streams.reload import Reload, ReloadSettings
from streams.rest import rest_app
from streams.settings import Settings
from streams.state_reader import StateReader
from streams.state_store import open_store
from streams.topics import MODELS, SCORES
from streams.training import decoder
from streams.watch import Watch

log = logging.getLogger(__name__)

GRACE_S: Final = 5.0
UNSEEN_MS: Final = 10_000
"""Topics not seen for so long: the service is not ready."""
STORE_PATIENCE_S: Final = 0.3
"""A lookup waits so long for a store that is away, then says so: its caller can try again."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the service listens."""

    grpc: str
    rest: str


class Service:
    """One lookup process from start to end."""

    def __init__(self, settings: Settings, client: dict[str, Any], redis_url: str) -> None:
        self._settings, self._client, self._redis_url = settings, client, redis_url
        self._stop = asyncio.Event()

    def run(self, started: Callable[[Addresses], None] = lambda _: None) -> None:
        """Serve until SIGTERM or SIGINT. started: told where, once calls are answered."""
        asyncio.run(self.serve(started))

    def stop(self) -> None:
        """End `serve`; on its loop."""
        self._stop.set()

    async def serve(self, started: Callable[[Addresses], None]) -> None:
        """Serve until stopped. Raises DependencyUnreachable when Kafka cannot be read, BadUsage for settings that contradict."""
        s, loop = self._settings, asyncio.get_running_loop()
        tokens = Tokens(s.serve_tokens, s.serve_jwt_key.get_secret_value(), audience=s.serve_jwt_audience, issuer=s.serve_jwt_issuer)
        tls = tls_of(s)
        if tokens.open and not loopback(s.serve_host):
            raise BadUsage(f"serve_host {s.serve_host}: whoever reaches it could read everything; set CHURN_SERVE_TOKENS or a JWT key")
        if tokens.open:
            log.warning("no tokens are configured: everybody on this machine may look up everything")
        clock = _wall_ms
        fallback = Fallback(s.fallback_probability)
        money = Money(s.currency, exponent_of(s.currency))
        followed = Metrics()
        reload = Reload(
            ReloadSettings(self._client, s.prefixed(MODELS), s.dependency_timeout_s),
            lambda envelope: load_model(envelope, money=money),
            fallback,
            followed,
        )
        inputs = [s.prefixed(topic) for topic in TOPICS]
        async with AsyncExitStack() as stack:
            await loop.run_in_executor(None, reload.start)
            stack.callback(reload.stop)
            freshness = Freshness(kafka_ends(self._client, inputs, s.partitions, s.dependency_timeout_s), clock)
            await loop.run_in_executor(None, freshness.look)
            freshness.start()
            stack.callback(freshness.stop)
            store = open_store(s, self._redis_url, patience_s=STORE_PATIENCE_S)
            stack.callback(store.close)

            def now_ms(seen: Seen) -> int:
                return seen.watermark_ms if s.serve_clock == "stream" and seen.watermark_ms > 0 else clock()

            metrics = LookupMetrics(followed)
            reader = StateReader(store, reload.current, fallback, s.partitions, now_ms, metrics.state_reads.inc)
            source = KafkaLog(self._client, timeout_s=s.dependency_timeout_s)
            stack.callback(source.close)
            lookups = Lookups(
                reader,
                freshness,
                decoder(s),
                reload.current,
                fallback,
                PastFacts(source, inputs, decoder(s)),
                clock,
                stale_ms=s.serve_stale_ms,
                max_batch=s.serve_max_batch,
                exponent=exponent_of(s.currency),
            )
            stack.callback(lookups.close)
            watch = Watch(self._client, s.prefixed(SCORES), s.dependency_timeout_s)
            stack.callback(watch.close)
            audit = Audit(s.serve_audit, s.digest_key.get_secret_value().encode())
            stack.callback(audit.close)
            gate = Gate(lookups, watch, tokens, RateLimits(s.serve_rate_per_second), audit, metrics, clock, s.serve_deadline_s)
            server = GrpcServer(
                gate,
                f"{s.serve_host}:{s.serve_grpc_port}",
                tls=tls,
                with_reflection=s.serve_reflection,
                max_request_bytes=s.serve_max_request_bytes,
            )
            if not server.port:
                raise BadUsage(f"gRPC port {s.serve_grpc_port} on {s.serve_host} cannot be had; set CHURN_SERVE_GRPC_PORT")
            await server.start()
            stack.push_async_callback(server.stop, GRACE_S)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)

            async def missing() -> list[str]:
                found = []
                try:
                    await reader.standings()
                except ChurnError as error:
                    found.append(str(error))
                if (seen := freshness.seen_ms()) is None or clock() - seen > UNSEEN_MS:
                    found.append("the ends of the input topics were not seen lately: does Kafka answer?")
                return found

            async def exposition() -> bytes:
                with suppress(ChurnError):  # its absence is what is told then
                    for partition, standing in enumerate(await reader.standings()):
                        bound = freshness.bound(partition, standing.applied, clock())
                        metrics.staleness.labels(str(partition)).set(float("nan") if bound is None else bound / 1_000)
                model = reload.current()
                metrics.model.clear()
                metrics.model.labels(model.version, model.digest[:16]).set(1)
                return generate_latest(metrics.registry)

            def about() -> dict[str, Any]:
                model = reload.current()
                named = {"name": model.name, "version": model.version, "digest": model.digest}
                return {"version": version("churnstream"), "contract": "churn.v1", "layout_hash": LAYOUT_HASH, "model": named}

            app = rest_app(
                gate,
                secured=not tokens.open,
                max_request_bytes=s.serve_max_request_bytes,
                ready=missing,
                metrics=exposition,
                about=about,
            )
            rest = await stack.enter_async_context(http_server(app, s))
            await server.ready(True)
            started(Addresses(f"{s.serve_host}:{server.port}", f"{s.serve_host}:{rest}"))
            await self._stop.wait()
            log.info("stopping")


class _Http(uvicorn.Server):
    """Signals are the service's own."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def http_server(app: ASGIApp, settings: Settings) -> AsyncIterator[int]:
    """Serve an application meanwhile; gives the port. Raises BadUsage when it cannot be had."""
    s = settings
    mutual = {} if s.serve_tls_client_ca is None else {"ssl_ca_certs": str(s.serve_tls_client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=int(GRACE_S),
        ssl_certfile=s.serve_tls_cert,
        ssl_keyfile=s.serve_tls_key,
        **mutual,  # type: ignore[arg-type]  # of the two types these have
    )
    try:
        listening = socket.create_server(
            (s.serve_host, s.serve_rest_port), family=socket.AF_INET6 if ":" in s.serve_host else socket.AF_INET
        )
    except OSError as error:
        raise BadUsage(f"REST port {s.serve_rest_port} on {s.serve_host}: {error.strerror}; set CHURN_SERVE_REST_PORT") from error
    with listening:
        server = _Http(config)
        running = asyncio.create_task(server.serve([listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await running


def log_to_stderr(level: str) -> None:
    """Log lines of the process to stderr; libraries only from warnings up."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("streams").setLevel(level)


def tls_of(settings: Settings) -> Tls | None:
    """Certificates of the settings, None for plain text. Raises BadUsage when one of a pair is missing or cannot be read."""
    certificate, key, authorities = settings.serve_tls_cert, settings.serve_tls_key, settings.serve_tls_client_ca
    if certificate is None and key is None and authorities is None:
        return None
    if certificate is None or key is None:
        raise BadUsage("TLS of the lookup service needs both CHURN_SERVE_TLS_CERT and CHURN_SERVE_TLS_KEY")
    try:
        return Tls(certificate.read_bytes(), key.read_bytes(), None if authorities is None else authorities.read_bytes())
    except OSError as error:
        raise BadUsage(f"TLS of the lookup service: {error}") from error


def loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        addresses = {row[4][0] for row in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise BadUsage(f"serve_host {host}: {error}") from error
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
