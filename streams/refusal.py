"""Why a lookup is refused: one code for gRPC and HTTP, a reason for programs, words for people."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from proto.errors import ChurnError


class Code(Enum):
    """(name of the gRPC status, its number, HTTP status)."""

    INVALID_ARGUMENT = ("INVALID_ARGUMENT", 3, 400)
    DEADLINE_EXCEEDED = ("DEADLINE_EXCEEDED", 4, 504)
    NOT_FOUND = ("NOT_FOUND", 5, 404)
    PERMISSION_DENIED = ("PERMISSION_DENIED", 7, 403)
    RESOURCE_EXHAUSTED = ("RESOURCE_EXHAUSTED", 8, 429)
    FAILED_PRECONDITION = ("FAILED_PRECONDITION", 9, 409)
    OUT_OF_RANGE = ("OUT_OF_RANGE", 11, 409)
    INTERNAL = ("INTERNAL", 13, 500)
    UNAVAILABLE = ("UNAVAILABLE", 14, 503)
    UNAUTHENTICATED = ("UNAUTHENTICATED", 16, 401)

    @property
    def number(self) -> int:
        """The gRPC status code."""
        return self.value[1]

    @property
    def http(self) -> int:
        """The HTTP status code."""
        return self.value[2]


class Refusal(ChurnError):
    """A lookup that gets no answer. reason: UPPER_SNAKE_CASE, stable; fields: (field of the request, what is wrong with it)."""

    def __init__(
        self, code: Code, reason: str, message: str, *, details: Mapping[str, str] | None = None, fields: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason
        self.details: Mapping[str, str] = details or {}
        self.fields: Mapping[str, str] = fields or {}


def wrong(field: str, why: str) -> Refusal:
    """A field of the request that no answer can be given to."""
    return Refusal(Code.INVALID_ARGUMENT, "WRONG_FIELD", f"{field}: {why}", fields={field: why})
