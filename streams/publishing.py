"""Who publishes models here and whose signatures count, from the settings; what a command that publishes goes through."""

from __future__ import annotations

import getpass
import time
from dataclasses import dataclass
from pathlib import Path

from models import registry
from models.artifact import Manifest
from models.desk import Desk, Done
from models.signature import PRIVATE_FILE, PUBLIC_FILE, Signer, Trust, create, trusted
from proto.errors import ChurnError
from streams.settings import Settings
from streams.topics import MODELS, client_config, producer_config


def trust(settings: Settings) -> Trust:
    """Whose signatures count. Raises BadUsage for keys that are none."""
    return Trust(trusted(settings.model_public_keys), settings.model_two_persons)


def signer(settings: Settings, believed: Trust) -> Signer:
    """Who publishes: the owner of the key by the list of trusted ones, else CHURN_MODEL_SIGNER, else the user's name."""
    try:
        name = settings.model_signer or getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in containers
        name = "nobody"
    made = Signer(name, settings.model_signing_key.get_secret_value())
    own = believed.keys.get(made.key_id)
    if own is None or settings.model_signer:
        return made
    return Signer(own.owner, settings.model_signing_key.get_secret_value())


def desk(settings: Settings, *, dry_run: bool = False) -> Desk:
    """A visit to the desk of this deployment. Raises BadUsage, DependencyUnreachable."""
    believed = trust(settings)
    return Desk(
        producer_config(settings),
        settings.prefixed(MODELS),
        signer(settings, believed),
        believed,
        lambda: time.time_ns() // 1_000_000,
        timeout_s=settings.dependency_timeout_s,
        dry_run=dry_run,
    )


def published(settings: Settings) -> registry.Published:
    """The model topic as it is now. Raises DependencyUnreachable, BadUsage for keys that are none."""
    return registry.read(client_config(settings), settings.prefixed(MODELS), trust(settings), timeout_s=settings.dependency_timeout_s)


@dataclass(frozen=True, slots=True)
class Released:
    """What became of a model that was to go into service: changed anything, and why it waits in staging ("" when it is champion)."""

    changed: bool
    waits: str


def release(settings: Settings, manifest: Manifest, envelope: bytes, why: str = "") -> Released:
    """Publish a model and make it champion; where two persons are asked for it stays in staging until the other has approved it."""
    at = desk(settings)
    published = at.publish(envelope, why)
    if missing := at.published.ledger.missing_approval(manifest.digest):
        return Released(published.changed, missing)
    promoted: Done = at.promote(manifest.digest, why=why)
    return Released(published.changed or promoted.changed, "")


def own_keys(directory: Path, owner: str) -> dict[str, str]:
    """The settings of a deployment that signs with a pair of its own, made in `directory` when there is none yet."""
    if not (directory / PRIVATE_FILE).exists():
        create(directory, owner)
    if not (directory / PUBLIC_FILE).exists():
        raise ChurnError(f"{directory}: {PRIVATE_FILE} without {PUBLIC_FILE}; remove the directory, then a new pair is made")
    return {
        "CHURN_MODEL_SIGNING_KEY_FILE": str((directory / PRIVATE_FILE).resolve()),
        "CHURN_MODEL_PUBLIC_KEYS": str((directory / PUBLIC_FILE).resolve()),
    }
