"""gRPC: the contract's methods behind the gate, health, reflection, rich errors."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from proto.churn.v1 import churn_pb2 as pb
from streams.gate import Gate
from streams.refusal import Refusal

log = logging.getLogger(__name__)

SERVICE: Final = "churn.v1.ChurnService"
DOMAIN: Final = "churnstream"


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM bytes; client_ca: authorities of client certificates, which are then required."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None = None


class GrpcServer:
    """One server on the running asyncio loop. address: host:port, port 0 = a free one; `port` says which."""

    def __init__(self, gate: Gate, address: str, *, tls: Tls | None, with_reflection: bool, max_request_bytes: int) -> None:
        self._server = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", max_request_bytes),
                ("grpc.so_reuseport", 0),  # a second service on the port is a mistake, not a share of the load
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.max_concurrent_streams", 1_000),
            )
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        service = pb.DESCRIPTOR.services_by_name["ChurnService"]
        handlers = {method.name: _handler(gate, method) for method in service.methods}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        if with_reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        if tls is None:
            self.port: int = self._server.add_insecure_port(address)
        else:
            credentials = grpc.ssl_server_credentials(
                [(tls.key, tls.certificate)], root_certificates=tls.client_ca, require_client_auth=tls.client_ca is not None
            )
            self.port = self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        """Begin to serve; not ready yet."""
        await self._server.start()
        await self.ready(False)

    async def ready(self, ready: bool) -> None:
        """What the health service says."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and give those in work so long."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


def _handler(gate: Gate, method: Any) -> Any:
    request = message_factory.GetMessageClass(method.input_type)
    response = message_factory.GetMessageClass(method.output_type)
    make = grpc.unary_stream_rpc_method_handler if method.server_streaming else grpc.unary_unary_rpc_method_handler
    behaviour = _stream(gate) if method.server_streaming else _unary(gate, method.name)
    return make(behaviour, request_deserializer=request.FromString, response_serializer=response.SerializeToString)


def _unary(gate: Gate, method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: Any) -> Any:
        try:
            return await gate.call(method, request, _authorization(context), context.time_remaining())
        except Refusal as refusal:
            await context.abort_with_status(rich(refusal))

    return answer


def _stream(gate: Gate) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for response in gate.watch(request, _authorization(context)):
                yield response
        except Refusal as refusal:
            await context.abort_with_status(rich(refusal))

    return answer


def _authorization(context: Any) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            return value if isinstance(value, str) else None
    return None


def rich(refusal: Refusal) -> Any:
    """A refusal as a gRPC status with details: ErrorInfo, and BadRequest where fields are wrong."""
    info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=dict(refusal.details))
    parts: list[Any] = [info]
    if refusal.fields:
        violations = [error_details_pb2.BadRequest.FieldViolation(field=field, description=why) for field, why in refusal.fields.items()]
        parts.append(error_details_pb2.BadRequest(field_violations=violations))
    packed = []
    for part in parts:
        one = AnyMessage()
        one.Pack(part)
        packed.append(one)
    return rpc_status.to_status(status_pb2.Status(code=refusal.code.number, message=str(refusal), details=packed))
