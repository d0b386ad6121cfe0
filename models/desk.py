"""The desk where models are published, approved, promoted, rolled back and put away: each a signed entry of the log, a second time none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from models import registry
from models.artifact import unpack
from models.ledger import ALIASES, CHAMPION, LOG, Action, Decision
from models.signature import Signer, Trust
from proto.errors import ArtifactRejected, BadUsage, ChurnError

NO_KEY: Final = "public keys are configured, so decisions have to be signed: set CHURN_MODEL_SIGNING_KEY_FILE"


@dataclass(frozen=True, slots=True)
class Done:
    """What an action came to. `decision` is what was (or with a dry run would be) written, None when there was nothing to do."""

    digest: str
    version: str
    decision: Decision | None

    @property
    def changed(self) -> bool:
        """Whether anything was to be done."""
        return self.decision is not None


class Desk:
    """One visit: the topic as it is now, and a person who acts on it.

    producer: settings of an idempotent librdkafka producer. now: Unix time in ms. With `dry_run` nothing is written.
    Raises BadUsage when the person's key is not one that workers trust, DependencyUnreachable when Kafka does not answer.
    """

    def __init__(
        self,
        producer: Mapping[str, Any],
        topic: str,
        signer: Signer,
        trust: Trust,
        now: Callable[[], int],
        *,
        timeout_s: float = 30.0,
        dry_run: bool = False,
    ) -> None:
        if trust.checks:
            if signer.public is None:
                raise BadUsage(NO_KEY)
            own = trust.keys.get(signer.key_id)
            if own is None:
                raise BadUsage(
                    f"your key {signer.key_id} is not among the trusted ones, workers would refuse it; trusted are {trust.names}"
                )
            if own.owner != signer.owner:
                raise BadUsage(f"key {own.key_id} is that of {own.owner}, not of {signer.owner} (CHURN_MODEL_SIGNER)")
        self._producer, self._topic, self._signer, self._now, self._dry_run = producer, topic, signer, now, dry_run
        self.published = registry.read(producer, topic, trust, timeout_s=timeout_s)
        self._envelopes = dict(self.published.envelopes)
        self._read_to = dict(self.published.ends)

    def publish(self, envelope: bytes, why: str = "") -> Done:
        """Put a model on the topic, in staging: no alias stands for it yet. Raises ArtifactRejected for a bad one."""
        artifact = unpack(envelope)
        digest, version = artifact.digest, artifact.manifest.version
        sealed = self._signer.seal(envelope, digest)
        ledger = self.published.ledger
        logged = any(d.action == "publish" and d.digest == digest for d in ledger.proven.values()) and not ledger.archived(digest)
        if self._envelopes.get(digest) == sealed and logged:
            return Done(digest, version, None)
        if not self._dry_run:
            registry.send(self._producer, self._topic, f"{registry.ARTIFACT}{digest}", sealed)
        self._envelopes[digest] = sealed
        return self._decide("publish", digest, version, why=why)

    def approve(self, name: str, why: str = "") -> Done:
        """Say that a published model may go into service. Raises BadUsage when its publisher says so and two persons are asked for."""
        digest, version = self._sound(name)
        ledger, me = self.published.ledger, self._signer.owner
        if any(d.action == "approve" and d.digest == digest and d.who == me for d in ledger.proven.values()):
            return Done(digest, version, None)
        publishers = {d.who for d in ledger.proven.values() if d.action == "publish" and d.digest == digest}
        if ledger.trust.two_persons and me in publishers:
            raise BadUsage(f"model {digest[:12]} was published by {me}: another person has to approve it (CHURN_MODEL_TWO_PERSONS)")
        return self._decide("approve", digest, version, why=why)

    def promote(self, name: str, alias: str = CHAMPION, why: str = "") -> Done:
        """Point an alias at a published model. Raises ArtifactRejected when an approval is missing, or it is put away."""
        digest, version = self._sound(name)
        return self._point("promote", digest, version, alias, why)

    def rollback(self, alias: str = CHAMPION, to: str | None = None, why: str = "") -> Done:
        """Point an alias back at the model it stood for before, or at one named. Raises BadUsage when there is no former one."""
        now = self.published.aliases.get(alias, "")
        if to is None:
            # Every model that was rolled back from is passed over: a second rollback goes one further back, not forth again.
            former = self._former(alias)
            if not former:
                raise BadUsage(f"{alias}: the log names no model before {now[:12] or 'this'}; name one with --to")
            to = former
        digest, version = self._sound(to)
        return self._point("rollback", digest, version, alias, why)

    def archive(self, name: str, why: str = "") -> Done:
        """Put a model away: it stays on the topic, for scores to be explained by, and cannot be promoted. Raises BadUsage while in use."""
        digest = self.published.named(name)
        version = self.published.version(digest)
        if self.published.ledger.archived(digest):
            return Done(digest, version, None)
        used = sorted(alias for alias, target in self.published.aliases.items() if target == digest)
        if used:
            raise BadUsage(f"model {digest[:12]} is {', '.join(used)}: promote another one first")
        return self._decide("archive", digest, version, why=why)

    def _former(self, alias: str) -> str:
        """What the alias stood for before, going back along the log; a rollback has undone what lies between."""
        stack: list[str] = []
        for decision in reversed(self.published.ledger.targets(alias)):
            if not stack and decision.former:
                stack.append(decision.former)
            if decision.action == "rollback" and decision.digest in stack:
                del stack[stack.index(decision.digest) + 1 :]
            else:
                stack.append(decision.digest)
        return stack[-2] if len(stack) > 1 else ""

    def _sound(self, name: str) -> tuple[str, str]:
        digest = name if name in self._envelopes else self.published.named(name)
        value = self._envelopes[digest]
        manifest = unpack(self.published.ledger.trust.open(value, digest), digest=digest).manifest
        return digest, manifest.version

    def _point(self, action: Action, digest: str, version: str, alias: str, why: str) -> Done:
        if alias not in ALIASES:
            raise BadUsage(f"alias {alias}: there are {', '.join(ALIASES)}")
        former = self.published.aliases.get(alias, "")
        if former == digest:
            return Done(digest, version, None)
        ledger = self.published.ledger
        if alias == CHAMPION and (missing := ledger.missing_approval(digest)):
            raise ArtifactRejected(missing)
        if ledger.archived(digest):
            raise ArtifactRejected(f"model {digest[:12]} is archived; `churnstream models publish` takes it out again")
        return self._decide(action, digest, version, alias=alias, former=former, why=why)

    def _decide(self, action: Action, digest: str, version: str, *, alias: str = "", former: str = "", why: str = "") -> Done:
        ledger = self.published.ledger
        decision = ledger.next(action, digest, version, self._signer, self._now(), alias=alias, former=former, why=why)
        if self._dry_run:
            ledger.note(decision.encode())  # what follows from it is tried too
            return Done(digest, version, decision)
        partition, offset = registry.send(self._producer, self._topic, decision.key, decision.encode())
        for found, at, key, value in registry.records(self._producer, self._topic, self._read_to):
            self._read_to[found] = at + 1
            if (found, at) < (partition, offset) and key.startswith(LOG):
                ledger.note(value)
        ledger.note(decision.encode())
        if ledger.proven.get(decision.number) != decision:
            raise ChurnError("somebody else decided about models at the same time, so this did not count; look, and run it again")
        if alias:
            registry.send(self._producer, self._topic, f"{registry.ALIAS}{alias}", decision.encode())
            self.published = registry.Published(
                self._envelopes, {**self.published.aliases, alias: digest}, ledger, self.published.ends, self.published.doubtful
            )
        return Done(digest, version, decision)
