"""What every call passes, whatever its protocol: who calls, what they may see, how much; then the answer, the trace, the figures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

from google.protobuf.message import Message

from proto.errors import ChainBroken, ChurnError, DependencyUnreachable
from streams.access import ACCESS, PERSONAL, Audit, Caller, Group, RateLimits, Tokens, prune
from streams.lookups import Call, Lookups
from streams.metrics import LookupMetrics
from streams.refusal import Code, Refusal
from streams.watch import Watch

log = logging.getLogger(__name__)

BEARER: Final = "bearer "


class Gate:
    """Calls go through here. deadline_s: the longest one may take."""

    def __init__(
        self,
        lookups: Lookups,
        watch: Watch,
        tokens: Tokens,
        limits: RateLimits,
        audit: Audit,
        metrics: LookupMetrics,
        clock_ms: Callable[[], int],
        deadline_s: float,
    ) -> None:
        self._lookups, self._watch, self._tokens, self._limits, self._audit, self._metrics = lookups, watch, tokens, limits, audit, metrics
        self._clock_ms, self._deadline_s = clock_ms, deadline_s

    async def call(self, method: str, request: Any, authorization: str | None, left_s: float | None = None) -> Message:
        """The answer to a request, pruned for the caller. left_s: until the caller's own deadline. Raises Refusal."""
        began = time.perf_counter()
        caller: Caller | None = None
        outcome = "INTERNAL"
        try:
            caller = self._identify(authorization)
            groups = self._admit(method, caller, request)
            ends_s = self._deadline_s if left_s is None else min(left_s, self._deadline_s)
            try:
                async with asyncio.timeout(ends_s):
                    answer: Message = await self._lookups.methods[method](request, Call(asyncio.get_running_loop().time() + ends_s))
            except TimeoutError as error:
                raise Refusal(Code.DEADLINE_EXCEEDED, "DEADLINE", f"no answer within {ends_s:.3g} s") from error
            prune(answer, groups)
            outcome = "OK"
            return answer
        except ChurnError as error:
            refusal = refusal_of(error)
            outcome = refusal.reason
            raise refusal from error
        finally:
            self._note(method, caller, _customers(request), outcome, time.perf_counter() - began)

    async def watch(self, request: Any, authorization: str | None) -> AsyncIterator[Message]:
        """Scores as they come, pruned for the caller, until the caller leaves. Raises Refusal."""
        async for score in await self.admitted_watch(request, authorization):
            yield score

    async def admitted_watch(self, request: Any, authorization: str | None) -> AsyncIterator[Message]:
        """As `watch`, with the caller judged before the first score is waited for."""
        caller: Caller | None = None
        customers = list(request.customer_ids) or ["*"]
        try:
            caller = self._identify(authorization)
            groups = self._admit("WatchScores", caller, request)
            scores = self._watch.scores(request)
        except ChurnError as error:
            refusal = refusal_of(error)
            self._note("WatchScores", caller, customers, refusal.reason, 0.0)
            raise refusal from error
        self._note("WatchScores", caller, customers, "OK", 0.0)
        return self._pruned(scores, groups)

    async def _pruned(self, scores: AsyncIterator[Any], groups: frozenset[Group]) -> AsyncIterator[Message]:
        try:
            async for score in scores:
                prune(score, groups)
                yield score
        except ChurnError as error:
            raise refusal_of(error) from error

    def _identify(self, authorization: str | None) -> Caller:
        if authorization is None:
            return self._tokens.identify(None)
        if authorization[: len(BEARER)].lower() != BEARER:
            raise Refusal(Code.UNAUTHENTICATED, "NO_TOKEN", "needs a bearer token: authorization: Bearer TOKEN")
        return self._tokens.identify(authorization[len(BEARER) :].strip())

    def _admit(self, method: str, caller: Caller, request: Any) -> frozenset[Group]:
        groups = ACCESS[method].get(caller.role)
        if groups is None:
            raise Refusal(
                Code.PERMISSION_DENIED, "ROLE", f"the role {caller.role.value} may not call {method}", details={"role": caller.role.value}
            )
        self._limits.take(caller, len(_customers(request)))
        return groups

    def _note(self, method: str, caller: Caller | None, customers: Sequence[str], outcome: str, seconds: float) -> None:
        self._metrics.note(method, outcome, seconds)
        if method in PERSONAL:
            self._audit.note(caller, method, customers, outcome, at_ms=self._clock_ms())


def refusal_of(error: ChurnError) -> Refusal:
    """What an error of ours means to a caller."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, DependencyUnreachable):
        return Refusal(Code.UNAVAILABLE, "UNREACHABLE", str(error))
    if isinstance(error, ChainBroken):
        return Refusal(Code.UNAVAILABLE, "STATE", str(error))
    log.error("%s", error)
    return Refusal(Code.INTERNAL, "INTERNAL", "something went wrong; the log says what")


def _customers(request: Any) -> list[str]:
    fields = request.DESCRIPTOR.fields_by_name
    if "customer_id" in fields:
        return [request.customer_id]
    return list(request.customer_ids) if "customer_ids" in fields else []
