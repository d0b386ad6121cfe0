"""What was decided about models, by whom, when and why: an append-only chain of signed decisions, and what follows from it.

Every decision is a record of its own on the model topic, key `log/<number>-<8 digits of its sha256>`, so compaction never removes one.
It names the sha256 of the decision before it. Of two with one number the first on the topic counts. The record `alias/<name>` repeats
the decision an alias stands for.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.signature import DECISION, Signer, Trust
from proto.errors import BadUsage, Untrusted

LOG: Final = "log/"
CHAMPION: Final = "champion"
ALIASES: Final = (CHAMPION, "challenger", "shadow")
MAX_BYTES: Final = 16 * 1024
POINTING: Final = ("promote", "rollback")
Action = Literal["publish", "approve", "promote", "rollback", "archive"]


class Decision(BaseModel):
    """One entry of the log. `digest` is the model it is about, `former` the one an alias stood for before ("" for none)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: int = Field(ge=1, le=2**53)
    at_ms: int = Field(ge=0, le=2**53)
    action: Action
    alias: str = Field("", pattern=r"^([a-z0-9-]{1,32})?$")
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    version: str = Field(max_length=64)
    former: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    who: str = Field(min_length=1, max_length=64)
    why: str = Field("", max_length=500)
    previous: str = Field("", pattern=r"^([0-9a-f]{64})?$")  # sha256 of the decision before
    key_id: str = Field("", pattern=r"^([0-9a-f]{16})?$")
    signature: str = Field("", max_length=100)

    def message(self) -> bytes:
        """What is signed: everything but the signature, as canonical JSON."""
        return orjson.dumps(self.model_dump(mode="json", exclude={"signature"}), option=orjson.OPT_SORT_KEYS)

    def encode(self) -> bytes:
        """The record's value."""
        return orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)

    @property
    def sha256(self) -> str:
        """Name of this very decision, signature included."""
        return sha256(self.encode()).hexdigest()

    @property
    def key(self) -> str:
        """Key of its record."""
        return f"{LOG}{self.number:08d}-{self.sha256[:8]}"

    def signed_by(self, signer: Signer) -> Decision:
        """The same with a signature, or without one when the signer has no key."""
        named = self.model_copy(update={"who": signer.owner, "key_id": signer.key_id})
        return named.model_copy(update={"signature": base64.b64encode(signer.sign(DECISION, named.message())).decode()})

    def proven(self, trust: Trust) -> bool:
        """Whether a trusted key signed it. `who` is then not just said: it must be the owner's name."""
        key = trust.keys.get(self.key_id)
        if key is None or key.owner != self.who:
            return False
        try:
            return key.verifies(base64.b64decode(self.signature, validate=True), DECISION + self.message())
        except (binascii.Error, ValueError):
            return False


def parse(value: bytes) -> Decision | None:
    """A decision, None when the bytes are none; canonical form only, so that a decision has one sha256."""
    if len(value) > MAX_BYTES:
        return None
    try:
        decision = Decision.model_validate_json(value)
    except ValidationError:
        return None
    return decision if decision.encode() == value else None


@dataclass(slots=True)
class Ledger:
    """The decisions read so far, by number, and those a trusted key has signed (all of them when no key is configured)."""

    trust: Trust = field(default_factory=Trust)
    decisions: dict[int, Decision] = field(default_factory=dict)
    proven: dict[int, Decision] = field(default_factory=dict)
    void: list[Decision] = field(default_factory=list)  # second with a number: somebody else was quicker

    def note(self, value: bytes | None) -> Decision | None:
        """Take in the value of a log or alias record; the decision when it counts. Raises Untrusted when it does not carry a signature
        that does. Anything that is no decision is passed over."""
        decision = None if value is None else parse(value)
        if decision is None or self.decisions.get(decision.number) == decision:
            return None
        proven = not self.trust.checks or decision.proven(self.trust)
        # A stranger must not take a number away from its owner by being first.
        if decision.number in (self.proven if proven else self.decisions):
            self.void.append(decision)
            return None
        self.decisions[decision.number] = decision
        if not proven:
            raise Untrusted(
                f"decision {decision.number} ({decision.action} {decision.digest[:12]} by {decision.who}) does not count: its key "
                f"{decision.key_id or '(none)'} is not trusted, or did not sign it"
            )
        self.proven[decision.number] = decision
        return decision

    @property
    def last(self) -> Decision | None:
        """The newest decision that counts."""
        return self.proven[max(self.proven)] if self.proven else None

    def targets(self, alias: str) -> list[Decision]:
        """The decisions that pointed the alias somewhere, newest first."""
        found = [d for d in self.proven.values() if d.alias == alias and d.action in POINTING]
        return sorted(found, key=lambda d: -d.number)

    def target(self, alias: str) -> str:
        """Digest the alias stands for, "" when the log does not say."""
        found = self.targets(alias)
        return found[0].digest if found else ""

    def live_at(self, alias: str, at_ms: int) -> Decision | None:
        """The decision that was in force at an instant."""
        return next((d for d in self.targets(alias) if d.at_ms <= at_ms), None)

    def archived(self, digest: str) -> bool:
        """Whether the last word about it was to put it away."""
        about = [d for d in self.proven.values() if d.digest == digest and d.action in ("publish", "archive")]
        return bool(about) and max(about, key=lambda d: d.number).action == "archive"

    def missing_approval(self, digest: str) -> str:
        """Why the model may not become champion, "" when it may: where two persons are asked for, the second has to approve it."""
        if not self.trust.two_persons:
            return ""
        about = [d for d in self.proven.values() if d.digest == digest]
        publishers = {d.key_id or d.who for d in about if d.action == "publish"} | {d.who for d in about if d.action == "publish"}
        approvers = [d for d in about if d.action == "approve"]
        if not publishers:
            return f"model {digest[:12]}: nobody has published it by the log, so nobody can have approved it; `churnstream models publish`"
        if any(d.who not in publishers and (d.key_id or d.who) not in publishers for d in approvers):
            return ""
        who = ", ".join(sorted({d.who for d in about if d.action == "publish"}))
        return f"model {digest[:12]}: another person than {who} has to approve it first (`churnstream models approve {digest[:12]}`)"

    def next(
        self, action: Action, digest: str, version: str, signer: Signer, at_ms: int, *, alias: str = "", former: str = "", why: str = ""
    ) -> Decision:
        """The decision that would follow, signed. Its time is not before that of the one before. Raises BadUsage for a text too long."""
        before = self.last
        number = before.number + 1 if before else max(self.decisions, default=0) + 1
        try:
            decision = Decision(
                number=number,
                at_ms=max(at_ms, before.at_ms if before else 0),
                action=action,
                alias=alias,
                digest=digest,
                version=version,
                former=former,
                who=signer.owner,
                why=why,
                previous=before.sha256 if before else "",
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise BadUsage(f"{first['loc'][0]}: {first['msg']}") from error
        return decision.signed_by(signer)

    def audit(self) -> Iterator[str]:
        """What is wrong with the chain: decisions that do not count, that are missing, or that name another one before them."""
        known = {d.sha256: d for d in self.decisions.values()}
        # What a proven decision names is proven with it, so a key taken out of service does not make the past doubtful.
        vouched: set[str] = set()
        for number in sorted(self.decisions, reverse=True):
            decision = self.decisions[number]
            if number in self.proven or decision.sha256 in vouched:
                vouched.add(decision.previous)
            else:
                yield f"{number}: signed by no trusted key, and no trusted decision follows it"
            if decision.previous and decision.previous not in known:
                yield f"{number}: the decision before it is not on the topic"
            elif not decision.previous and number != min(self.decisions):
                yield f"{number}: names no decision before it"
