"""REST: the contract's methods as HTTP, through the same gate; health, metrics and the OpenAPI page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import date
from decimal import Decimal
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any, Final, Literal

import orjson
from fastapi import Body, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from features.facts import TOPICS, YEAR_2000_MS
from proto.churn.v1 import churn_pb2 as pb
from proto.events import Amount, ContractEnd, CustomerProfile, Login, Signup, SupportTicket, Transaction
from streams.gate import Gate
from streams.lookups import LATEST_MS, LONGEST_ID, MOST_DAYS
from streams.plain import plain, schema
from streams.refusal import Code, Refusal

MOST_EVENTS: Final = 1_000
MOST_OFFSET: Final = 2**62

CustomerId = Annotated[str, Path(min_length=1, max_length=LONGEST_ID, description="customer_id of the events.")]
Instant = Annotated[int | None, Query(ge=YEAR_2000_MS, le=LATEST_MS, description="Epoch milliseconds; absent: now.")]
MaxAge = Annotated[
    int | None,
    Query(ge=0, le=MOST_OFFSET, description="Everything taken in up to so many ms before must be in the answer; 409 when it is not."),
]
Offsets = Annotated[
    list[Annotated[str, Field(pattern=rf"^({'|'.join(TOPICS)}):[0-9]{{1,18}}$")]],
    Query(max_length=16, description="topic:offset that must be applied (read-your-write)."),
]


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is the integer 5, wherever it stands."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return [_whole(one) for one in value] if isinstance(value, list) else value


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:
        return _whole(value)


class DemandIn(_In):
    """What the answer must include."""

    max_age_ms: int | None = Field(None, ge=0, le=MOST_OFFSET)
    min_offset: dict[
        Literal["transactions", "logins", "support-tickets", "customer-profiles"], Annotated[int, Field(ge=0, le=MOST_OFFSET)]
    ] = {}


class BatchIn(_In):
    """Which customers, when."""

    customer_ids: list[Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]] = Field(min_length=1, max_length=1_000)
    at_ms: int | None = Field(None, ge=YEAR_2000_MS, le=LATEST_MS)
    demand: DemandIn = DemandIn()


class _Hypothetical(BaseModel):
    """An event that did not happen (yet): no ids, and without a time it happens at the instant looked at."""

    event_id: Literal[""] = ""
    customer_id: Literal[""] = ""
    event_time: Annotated[int, Field(ge=YEAR_2000_MS, le=LATEST_MS)] | None = None


def _described(*kinds: dict[str, Any]) -> WithJsonSchema:
    """What may be sent here, as narrow as JSON Schema can say it."""
    return WithJsonSchema({"anyOf": [*kinds, {"type": "null"}]}, mode="validation")


_AMOUNT: Final = _described(
    {"type": "number", "minimum": 0, "maximum": 10**12}, {"type": "string", "pattern": r"^[0-9]{1,12}(\.[0-9]{1,6})?$"}
)
_SIGNUP: Final = _described({"type": "string", "format": "date", "pattern": "^(19|20)[0-9]{2}-[0-9]{2}-[0-9]{2}$"})
_CONTRACT_END: Final = _described({"type": "string", "format": "date", "pattern": "^20[0-9]{2}-[0-9]{2}-[0-9]{2}$"})


class TransactionIn(_Hypothetical, Transaction):
    """As on `transactions`."""

    amount: Annotated[Amount, _AMOUNT] = None


class LoginIn(_Hypothetical, Login):
    """As on `logins`."""


class SupportTicketIn(_Hypothetical, SupportTicket):
    """As on `support-tickets`."""


class CustomerProfileIn(_Hypothetical, CustomerProfile):
    """As on `customer-profiles`."""

    kind: Literal["profile"]  # tells it from the others, so it must be there
    signup_date: Annotated[Signup, _SIGNUP] = None
    contract_end: Annotated[ContractEnd, _CONTRACT_END] = None


EventIn = Annotated[TransactionIn | LoginIn | SupportTicketIn | CustomerProfileIn, Field(discriminator="kind")]


class WhatIfIn(_In):
    """Events that did not happen (yet)."""

    events: list[EventIn] = Field(max_length=MOST_EVENTS)
    at_ms: int | None = Field(None, ge=YEAR_2000_MS, le=LATEST_MS)
    demand: DemandIn = DemandIn()


class HistoryIn(_In):
    """A whole history."""

    events: list[EventIn] = Field(min_length=1, max_length=MOST_EVENTS)
    at_ms: int | None = Field(None, ge=YEAR_2000_MS, le=LATEST_MS)


def _event(event: BaseModel) -> pb.Event:
    fields: dict[str, Any] = {}
    for name, value in event.model_dump(exclude_none=True, exclude={"event_id", "customer_id", "event_time"}).items():
        fields[name] = value.isoformat() if isinstance(value, date) else format(value, "f") if isinstance(value, Decimal) else value
    return pb.Event(event_time_ms=getattr(event, "event_time", None), **fields)


def _demand(max_age_ms: int | None, offsets: list[str]) -> pb.Demand:
    return pb.Demand(max_age_ms=max_age_ms, min_offset=_offsets(offsets))


def _offsets(texts: list[str]) -> dict[str, int]:
    return {topic: int(offset) for topic, _, offset in (text.partition(":") for text in texts)}


def _demanded(demand: DemandIn) -> pb.Demand:
    return pb.Demand(max_age_ms=demand.max_age_ms, min_offset=dict[str, int](demand.min_offset.items()))


def problem(refusal: Refusal) -> Response:
    """A refusal as JSON."""
    body: dict[str, Any] = {"code": refusal.code.name, "reason": refusal.reason, "message": str(refusal)}
    body |= {"details": dict(refusal.details), "fields": dict(refusal.fields)}
    headers = {"WWW-Authenticate": "Bearer"} if refusal.code is Code.UNAUTHENTICATED else {}
    if refusal.code is Code.RESOURCE_EXHAUSTED:
        headers["Retry-After"] = "1"
    return JSONResponse(body, refusal.code.http, headers)


_PROBLEM: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "code": {"type": "string"},
        "reason": {"type": "string"},
        "message": {"type": "string"},
        "details": {"type": "object", "additionalProperties": {"type": "string"}},
        "fields": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "required": ["code", "reason", "message", "details", "fields"],
}
_MEANINGS: Final = {
    400: "a field of the request is wrong",
    401: "no valid token",
    403: "the role may not call this",
    404: "nothing is stored of this customer",
    409: "the state does not meet the demand, or reaches not so far",
    413: "the request is too large",
    429: "too many customers a second",
    503: "Redis or Kafka does not answer",
    504: "no answer within the deadline",
}


def rest_app(
    gate: Gate,
    *,
    secured: bool,
    max_request_bytes: int,
    ready: Callable[[], Awaitable[list[str]]],
    metrics: Callable[[], Awaitable[bytes]],
    about: Callable[[], Mapping[str, Any]],
) -> ASGIApp:
    """The application. ready: what is missing for it to answer, [] when nothing is; metrics: the text exposition; about: /version."""
    app = FastAPI(title="churnstream lookups", version=version("churnstream"), redoc_url=None, docs_url="/docs")
    schemas: dict[str, Any] = {"Problem": dict(_PROBLEM)}

    async def answer(method: str, request: Any, http: Request) -> Response:
        try:
            message = await gate.call(method, request, http.headers.get("authorization"))
        except Refusal as refusal:
            return problem(refusal)
        return Response(orjson.dumps(plain(message)), media_type="application/json")

    def described(method: str) -> dict[str, Any]:
        output = pb.DESCRIPTOR.services_by_name["ChurnService"].methods_by_name[method].output_type
        found: dict[int | str, Any] = {200: {"description": "the answer", "content": _json(schema(output, schemas))}}
        refused = _json({"$ref": "#/components/schemas/Problem"})
        codes = [code for code in _MEANINGS if secured or code not in (401, 403)]
        found |= {code: {"description": _MEANINGS[code], "content": refused} for code in codes}
        return {"responses": found, "operation_id": method, "response_class": Response}

    @app.get("/v1/customers/{customer_id}/score", tags=["lookups"], **described("GetScore"))
    async def get_score(
        http: Request,
        customer_id: CustomerId,
        at_ms: Instant = None,
        max_age_ms: MaxAge = None,
        min_offset: Offsets = [],  # noqa: B006 - FastAPI makes a new one for each call
    ) -> Response:
        """The score of a customer now, or as of a later instant."""
        demand = _demand(max_age_ms, min_offset)
        return await answer("GetScore", pb.GetScoreRequest(customer_id=customer_id, at_ms=at_ms, demand=demand), http)

    @app.post("/v1/scores", tags=["lookups"], **described("BatchGetScores"))
    async def batch_get_scores(http: Request, body: Annotated[BatchIn, Body()]) -> Response:
        """The same for many customers, in the order asked."""
        request = pb.BatchGetScoresRequest(customer_ids=body.customer_ids, at_ms=body.at_ms, demand=_demanded(body.demand))
        return await answer("BatchGetScores", request, http)

    @app.get("/v1/customers/{customer_id}/features", tags=["lookups"], **described("GetFeatures"))
    async def get_features(
        http: Request,
        customer_id: CustomerId,
        at_ms: Instant = None,
        cut: Annotated[Offsets, Query(description="topic:offset up to which facts count: as known then.")] = [],  # noqa: B006 - FastAPI makes a new one for each call
        max_age_ms: MaxAge = None,
        min_offset: Offsets = [],  # noqa: B006 - FastAPI makes a new one for each call
    ) -> Response:
        """Every feature of a customer: at any time as known today, or as it was known at a cut."""
        demand = _demand(max_age_ms, min_offset)
        request = pb.GetFeaturesRequest(customer_id=customer_id, at_ms=at_ms, cut=_offsets(cut), demand=demand)
        return await answer("GetFeatures", request, http)

    @app.get("/v1/customers/{customer_id}/explanation", tags=["lookups"], **described("Explain"))
    async def explain(
        http: Request,
        customer_id: CustomerId,
        at_ms: Instant = None,
        max_age_ms: MaxAge = None,
        min_offset: Offsets = [],  # noqa: B006 - FastAPI makes a new one for each call
    ) -> Response:
        """What every feature adds to the score; contributions and bias add up to the margin."""
        demand = _demand(max_age_ms, min_offset)
        return await answer("Explain", pb.ExplainRequest(customer_id=customer_id, at_ms=at_ms, demand=demand), http)

    @app.post("/v1/customers/{customer_id}/what-if", tags=["lookups"], **described("WhatIf"))
    async def what_if(http: Request, customer_id: CustomerId, body: Annotated[WhatIfIn, Body()]) -> Response:
        """The score if further events had happened; nothing is stored."""
        request = pb.WhatIfRequest(
            customer_id=customer_id, events=map(_event, body.events), at_ms=body.at_ms, demand=_demanded(body.demand)
        )
        return await answer("WhatIf", request, http)

    @app.get("/v1/customers/{customer_id}/plans", tags=["lookups"], **described("Counterfactual"))
    async def counterfactual(
        http: Request,
        customer_id: CustomerId,
        below: Annotated[float | None, Query(gt=0, le=1, description="Absent: below the band the customer is in.")] = None,
        days: Annotated[int, Query(ge=1, le=MOST_DAYS)] = 7,
        at_ms: Instant = None,
        max_age_ms: MaxAge = None,
        min_offset: Offsets = [],  # noqa: B006 - FastAPI makes a new one for each call
    ) -> Response:
        """Plans of events that would bring the score below a threshold, each checked by running it."""
        demand = _demand(max_age_ms, min_offset)
        request = pb.CounterfactualRequest(customer_id=customer_id, below=below, days=days, at_ms=at_ms, demand=demand)
        return await answer("Counterfactual", request, http)

    @app.get("/v1/customers/{customer_id}/history", tags=["lookups"], **described("ListHistory"))
    async def list_history(
        http: Request,
        customer_id: CustomerId,
        limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
        before_ms: Annotated[int | None, Query(ge=YEAR_2000_MS, le=LATEST_MS)] = None,
        max_age_ms: MaxAge = None,
        min_offset: Offsets = [],  # noqa: B006 - FastAPI makes a new one for each call
    ) -> Response:
        """The kept facts of a customer, newest first."""
        demand = _demand(max_age_ms, min_offset)
        request = pb.ListHistoryRequest(customer_id=customer_id, limit=limit, before_ms=before_ms, demand=demand)
        return await answer("ListHistory", request, http)

    @app.post("/v1/score-history", tags=["lookups"], **described("ScoreHistory"))
    async def score_history(http: Request, body: Annotated[HistoryIn, Body()]) -> Response:
        """The score of a history the caller brings along; nothing is read or stored."""
        return await answer("ScoreHistory", pb.ScoreHistoryRequest(events=map(_event, body.events), at_ms=body.at_ms), http)

    @app.get("/v1/scores/stream", include_in_schema=False)
    async def watch(
        http: Request,
        band: Annotated[list[Literal["unknown", "low", "medium", "high"]], Query()] = [],  # noqa: B006 - FastAPI makes a new one for each call
        min_probability: Annotated[float | None, Query(ge=0, le=1)] = None,
        customer_id: Annotated[list[str], Query(max_length=100)] = [],  # noqa: B006 - FastAPI makes a new one for each call
    ) -> Response:
        """Scores as they are made, one JSON object a line, without an end: not in the document, whose calls all end."""
        bands = [getattr(pb, f"BAND_{name.upper()}") for name in band]
        request = pb.WatchScoresRequest(bands=bands, min_probability=min_probability, customer_ids=customer_id)
        try:
            scores = await gate.admitted_watch(request, http.headers.get("authorization"))
        except Refusal as refusal:
            return problem(refusal)

        async def lines() -> AsyncIterator[bytes]:
            async for score in scores:
                yield orjson.dumps(plain(score)) + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    said = {"type": "object", "properties": {"missing": {"type": "array", "items": {"type": "string"}}}}
    _operations(app, ready, metrics, about, said)
    _console(app)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        fields = {".".join(map(str, one["loc"])): str(one["msg"]) for one in error.errors()}
        first = next(iter(fields.items()), ("request", "wrong"))
        return problem(Refusal(Code.INVALID_ARGUMENT, "WRONG_FIELD", f"{first[0]}: {first[1]}", fields=fields))

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> Response:
        body = {"code": "NOT_FOUND" if error.status_code == 404 else "HTTP", "reason": "HTTP", "message": str(error.detail)}
        return JSONResponse(body | {"details": {}, "fields": {}}, error.status_code, error.headers)

    made = app.openapi

    def document() -> dict[str, Any]:
        found = made()
        for path in found["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # what is not valid is answered with 400, as by gRPC
                if secured and "lookups" in operation.get("tags", ()):
                    operation["security"] = [{"bearer": []}]
        components = found.setdefault("components", {})
        components.setdefault("schemas", {}).update(schemas)
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        if secured:
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return found

    app.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation does it
    return Bounded(app, max_request_bytes)


def _operations(
    app: FastAPI,
    ready: Callable[[], Awaitable[list[str]]],
    metrics: Callable[[], Awaitable[bytes]],
    about: Callable[[], Mapping[str, Any]],
    said: Mapping[str, Any],
) -> None:
    """What keeps the service running asks for."""

    @app.get(
        "/livez", tags=["operations"], response_class=Response, responses={200: {"description": "the process runs", "content": _json(said)}}
    )
    async def livez() -> Response:
        """Whether the process runs; depends on nothing else."""
        return JSONResponse({"missing": []})

    states: dict[int | str, Any] = {
        200: {"description": "it answers", "content": _json(said)},
        503: {"description": "what it waits for", "content": _json(said)},
    }

    @app.get("/readyz", tags=["operations"], response_class=Response, responses=states)
    async def readyz() -> Response:
        """Whether it answers lookups: Redis answers, and the topics were seen lately."""
        missing = await ready()
        return JSONResponse({"missing": missing}, 503 if missing else 200)

    text: dict[int | str, Any] = {
        200: {"description": "Prometheus text exposition", "content": {"text/plain": {"schema": {"type": "string"}}}}
    }

    @app.get("/metrics", tags=["operations"], response_class=Response, responses=text)
    async def exposition() -> Response:
        """Prometheus metrics."""
        return Response(await metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    versions: dict[int | str, Any] = {200: {"description": "versions", "content": _json({"type": "object"})}}

    @app.get("/version", tags=["operations"], response_class=Response, responses=versions)
    async def told() -> Response:
        """Version of the service, of the contract, and the model in force."""
        return JSONResponse(dict(about()))


_CONSOLE: Final = {"index.html": "text/html", "app.js": "text/javascript", "style.css": "text/css"}
_POLICY: Final = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def _console(app: FastAPI) -> None:
    """The page for people; it asks the same lookups with the token its reader types in."""

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file("index.html")

    @app.get("/console/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in _CONSOLE:
            raise HTTPException(404)
        return _file(name)


def _file(name: str) -> Response:
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
    return Response(files("streams.web").joinpath(name).read_bytes(), headers=headers, media_type=f"{_CONSOLE[name]}; charset=utf-8")


_FORGOTTEN: Final = 8
"""Times the limit that is read of a request that is too large."""


class Bounded:
    """Refuses bodies larger than so many bytes, whatever they say of their length."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        seen, begun = int(stated) if stated.isdigit() else 0, False
        if seen > self._limit:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise _TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal begun
            if begun or seen <= self._limit:  # what the application makes of the error is not said
                begun = True
                await send(message)

        try:
            await self._app(scope, bounded, watched)
        except _TooLarge:
            if begun:
                raise
        if seen > self._limit and not begun:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Read on for a while and forget: a caller cut off in the middle of its sending would never see the answer.
        left = _FORGOTTEN * self._limit
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        body: dict[str, Any] = {"code": "RESOURCE_EXHAUSTED", "reason": "TOO_LARGE", "message": f"more than {self._limit} bytes"}
        await JSONResponse(body | {"details": {}, "fields": {}}, 413, {"Connection": "close"})(scope, receive, send)


class _TooLarge(Exception):
    pass


def _json(content: Mapping[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": dict(content)}}
