"""Who may look up what: roles, the one table of what each sees, bearer tokens, and the trace a read leaves."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

import jwt
import orjson
from google.protobuf.message import Message
from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from proto.errors import BadUsage
from streams.refusal import Code, Refusal

log = logging.getLogger(__name__)


class Role(Enum):
    """What a caller is."""

    AGENT = "agent"  # talks with customers
    ANALYST = "analyst"  # looks at scores and reasons
    ENGINEER = "engineer"  # keeps the service running; no business with persons
    AUDITOR = "auditor"  # checks what was done, facts included
    ADMIN = "admin"


class Group(Enum):
    """Fields that are shown or hidden together."""

    OUTCOME = "outcome"  # probability, band, the stream's last score
    WORDS = "words"  # reasons in business words
    NUMBERS = "numbers"  # features by name, their values and contributions
    PROVENANCE = "provenance"  # model, cut, hashes
    FACTS = "facts"  # what happened, one by one


ALL: Final = frozenset(Group)
_SPOKEN: Final = frozenset({Group.OUTCOME, Group.WORDS})
_SEEN: Final = ALL - {Group.FACTS}
_TECHNICAL: Final = frozenset({Group.PROVENANCE})
_A, _N, _E, _U, _M = Role.AGENT, Role.ANALYST, Role.ENGINEER, Role.AUDITOR, Role.ADMIN

ACCESS: Final[Mapping[str, Mapping[Role, frozenset[Group]]]] = {
    # method          agent          analyst      engineer         auditor     admin; a role that is not named may not call it
    "GetScore": {_A: _SPOKEN, _N: _SEEN, _E: _TECHNICAL, _U: ALL, _M: ALL},
    "BatchGetScores": {_N: _SEEN, _E: _TECHNICAL, _U: ALL, _M: ALL},
    "GetFeatures": {_N: _SEEN, _U: ALL, _M: ALL},
    "Explain": {_A: _SPOKEN, _N: _SEEN, _U: ALL, _M: ALL},
    "WhatIf": {_A: _SPOKEN, _N: _SEEN, _U: ALL, _M: ALL},
    "Counterfactual": {_A: _SPOKEN, _N: _SEEN, _U: ALL, _M: ALL},
    "ListHistory": {_U: ALL, _M: ALL},
    "ScoreHistory": {_N: _SEEN, _E: _SEEN, _U: ALL, _M: ALL},
    "WatchScores": {_N: _SEEN, _E: _TECHNICAL, _U: ALL, _M: ALL},
}

PERSONAL: Final = frozenset(ACCESS) - {"ScoreHistory"}
"""Methods whose answers are about a person the service knows: each call leaves a trace."""

FIELDS: Final[Mapping[str, Group]] = {
    "Score.probability": Group.OUTCOME,
    "Score.band": Group.OUTCOME,
    "Score.last": Group.OUTCOME,
    "Score.vector_hash": Group.PROVENANCE,
    "Score.model": Group.PROVENANCE,
    "Freshness.cut": Group.PROVENANCE,
    "Freshness.partition": Group.PROVENANCE,
    "GetFeaturesResponse.features": Group.NUMBERS,
    "GetFeaturesResponse.vector_hash": Group.PROVENANCE,
    "GetFeaturesResponse.layout_hash": Group.PROVENANCE,
    "Contribution.feature": Group.NUMBERS,
    "Contribution.value": Group.NUMBERS,
    "Contribution.contribution": Group.NUMBERS,
    "Contribution.text": Group.WORDS,
    "Contribution.raises": Group.WORDS,
    "ExplainResponse.bias": Group.NUMBERS,
    "ExplainResponse.margin": Group.NUMBERS,
    "Plan.probability": Group.OUTCOME,
    "Plan.band": Group.OUTCOME,
    "ListHistoryResponse.facts": Group.FACTS,
    "WatchScoresResponse.probability": Group.OUTCOME,
    "WatchScoresResponse.band": Group.OUTCOME,
    "WatchScoresResponse.alert_band": Group.OUTCOME,
    "WatchScoresResponse.reasons": Group.WORDS,
    "WatchScoresResponse.model": Group.PROVENANCE,
}
"""Field -> group; those not named are shown to everybody who may call the method."""


def prune(message: Message, groups: frozenset[Group]) -> None:
    """Clear every field the groups do not cover, in place, however deep."""
    if groups == ALL:
        return
    hidden, inner = _plan(message.DESCRIPTOR, groups)
    for name in hidden:
        message.ClearField(name)
    for name, many in inner:
        if many:
            for part in getattr(message, name):
                prune(part, groups)
        elif message.HasField(name):
            prune(getattr(message, name), groups)


@cache
def _plan(descriptor: Any, groups: frozenset[Group]) -> tuple[Sequence[str], Sequence[tuple[str, bool]]]:
    """(fields to clear, fields with messages to look into and whether they are repeated) of one type."""
    hidden, inner = [], []
    for field in descriptor.fields:
        group = FIELDS.get(f"{descriptor.name}.{field.name}")
        if group is not None and group not in groups:
            hidden.append(field.name)
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            inner.append((field.name, bool(field.is_repeated)))
    return hidden, inner


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and as what."""

    subject: str
    role: Role


ANYBODY: Final = Caller("anybody", Role.ADMIN)
"""Without tokens configured: whoever reaches the loopback address."""


class Tokens:
    """Bearer tokens of a file, of which only digests are kept, and signed ones (JWT with `sub`, `role`, `exp`).

    Without both everybody is ANYBODY. Raises BadUsage for a file nobody can read.
    """

    def __init__(self, file: Path | None, key: str = "", *, audience: str = "churnstream", issuer: str = "") -> None:
        self._file, self._key, self._audience, self._issuer = file, key, audience, issuer
        self._algorithms = ["RS256", "ES256", "EdDSA"] if key.startswith("-----BEGIN") else ["HS256"]
        if key and self._algorithms == ["HS256"] and len(key.encode()) < 32:
            raise BadUsage("setting serve_jwt_key: a secret for HS256 needs 32 bytes or more")
        self._read_at = (0, 0)
        self._known: dict[bytes, Caller] = {}
        self._looked_s = 0.0
        self.open = file is None and not key
        if file is not None:
            self._read(file)

    def identify(self, token: str | None) -> Caller:
        """Whose token this is. Raises Refusal UNAUTHENTICATED."""
        if self.open:
            return ANYBODY
        if not token:
            raise Refusal(Code.UNAUTHENTICATED, "NO_TOKEN", "needs a bearer token: authorization: Bearer TOKEN")
        if self._file is not None:
            self._refresh(self._file)
            digest = hashlib.sha256(token.encode()).digest()
            for known, caller in self._known.items():
                if hmac.compare_digest(known, digest):
                    return caller
        if self._key:
            return self._signed(token)
        raise Refusal(Code.UNAUTHENTICATED, "WRONG_TOKEN", "this token is not known")

    def _signed(self, token: str) -> Caller:
        required = ["exp", "sub", "aud"] + (["iss"] if self._issuer else [])
        try:
            claims = jwt.decode(
                token, self._key, self._algorithms, audience=self._audience, issuer=self._issuer or None, options={"require": required}
            )
            return Caller(str(claims["sub"]), Role(claims["role"]))
        except jwt.ExpiredSignatureError as error:
            raise Refusal(Code.UNAUTHENTICATED, "TOKEN_EXPIRED", "this token has expired") from error
        except (jwt.PyJWTError, KeyError, ValueError) as error:
            raise Refusal(Code.UNAUTHENTICATED, "WRONG_TOKEN", "this token is not valid") from error

    def _refresh(self, file: Path) -> None:
        """Look at the file once a second; one that became unreadable leaves the tokens known before in force."""
        now = time.monotonic()
        if now - self._looked_s < 1.0:
            return
        self._looked_s = now
        try:
            self._read(file)
        except BadUsage as error:
            log.error("%s; the tokens known before stay in force", error)

    def _read(self, file: Path) -> None:
        try:
            stat = file.stat()
            if (stat.st_mtime_ns, stat.st_size) == self._read_at:
                return
            rows = tomllib.loads(file.read_text("utf-8")).get("token", [])
            known = {bytes.fromhex(row["sha256"]): Caller(str(row["subject"]), Role(row["role"])) for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadUsage(f"token file {file}: needs [[token]] with sha256, subject and role ({error})") from error
        self._known, self._read_at = known, (stat.st_mtime_ns, stat.st_size)


class RateLimits:
    """So many customers a second for each subject."""

    def __init__(self, per_second: int) -> None:
        self._item = RateLimitItemPerSecond(per_second)
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    def take(self, caller: Caller, customers: int) -> None:
        """Raises Refusal RESOURCE_EXHAUSTED."""
        if not self._limiter.hit(self._item, caller.subject, cost=max(1, customers)):
            raise Refusal(
                Code.RESOURCE_EXHAUSTED,
                "RATE_LIMIT",
                f"more than {self._item.amount} customers a second: wait and try again",
                details={"per_second": str(self._item.amount)},
            )


class Audit:
    """One line of JSON per read of personal data, refused ones included: to a file that is only appended to, else to the log.

    Customers are named by a keyed digest, so the trail holds no id; whoever has an id and the key finds its lines.
    """

    def __init__(self, file: Path | None, key: bytes) -> None:
        self._key = key
        self._stream = None if file is None else file.open("ab", buffering=0)
        self._log = logging.getLogger("streams.audit")

    def note(self, caller: Caller | None, method: str, customers: Iterable[str], outcome: str, *, at_ms: int) -> None:
        """outcome: OK, or the reason of the refusal."""
        line = orjson.dumps(
            {
                "time": at_ms,
                "subject": None if caller is None else caller.subject,
                "role": None if caller is None else caller.role.value,
                "method": method,
                "customers": [self.name(customer) for customer in customers],
                "outcome": outcome,
            }
        )
        if self._stream is not None:
            self._stream.write(line + b"\n")
        else:
            self._log.info("audit %s", line.decode())

    def name(self, customer: str) -> str:
        """What a customer is called in the trail."""
        return hashlib.blake2b(customer.encode("utf-8", "surrogatepass"), digest_size=8, key=self._key[:64]).hexdigest()

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
