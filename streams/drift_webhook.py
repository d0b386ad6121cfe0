"""Verdicts to an HTTP address, signed so that the receiver knows who speaks and that nothing was changed or repeated."""

from __future__ import annotations

import hmac
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import orjson

log = logging.getLogger(__name__)

TRIES: Final = 4
WAIT_S: Final = 0.5
"""Before the second try; doubled before each further one."""
TIMEOUT_S: Final = 5.0
SIGNATURE: Final = "X-Churnstream-Signature"
TIMESTAMP: Final = "X-Churnstream-Timestamp"


def signature(secret: bytes, timestamp: int, body: bytes) -> str:
    """HMAC-SHA256 of "<timestamp>.<body>", as `sha256=<hexadecimal>`. The timestamp (epoch s) is signed, so old posts can be refused."""
    return "sha256=" + hmac.new(secret, f"{timestamp}.".encode() + body, sha256).hexdigest()


@dataclass(slots=True)
class Webhook:
    """Posts JSON; `send` says whether it was taken (2xx). What was not stays with the caller. One thread at a time."""

    url: str
    secret: bytes
    now_s: Callable[[], float] = time.time
    wait: Callable[[float], None] = time.sleep

    def send(self, verdict: dict[str, Any]) -> bool:
        """Try a few times; 4xx but 408 and 429 is an answer, not a failure of the line, and is not tried again."""
        body = orjson.dumps(verdict)
        for attempt in range(TRIES):
            if attempt:
                self.wait(WAIT_S * 2 ** (attempt - 1))
            timestamp = int(self.now_s())
            headers = {
                "Content-Type": "application/json",
                TIMESTAMP: str(timestamp),
                SIGNATURE: signature(self.secret, timestamp, body),
                "Idempotency-Key": str(verdict["verdict_id"]),
            }
            request = urllib.request.Request(self.url, body, headers, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                    return True
            except urllib.error.HTTPError as error:
                error.close()
                log.warning("webhook: %s answered %d to verdict %s", self.url, error.code, verdict["verdict_id"])
                if 400 <= error.code < 500 and error.code not in (408, 429):
                    return True
            except OSError as error:  # URLError, a timeout, a closed connection
                log.warning("webhook: %s: %s", self.url, error)
        return False
