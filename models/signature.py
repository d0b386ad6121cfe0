"""Ed25519 signatures: who sealed a model, who decided about it, and whose word counts.

A sealed model is magic, key id (8 bytes), signature (64 bytes), envelope. The signature is over the model's name and the sha256 of the
envelope, so it is checked before a byte of the envelope is decompressed or parsed, and a sound model cannot stand under another's name.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from proto.errors import BadUsage, Untrusted

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MAGIC: Final = b"CHURNSIG\x01\x00\x00\x00"
KEY_ID_BYTES: Final = 8
SIGNATURE_BYTES: Final = 64
HEADER_BYTES: Final = len(MAGIC) + KEY_ID_BYTES + SIGNATURE_BYTES
MODEL: Final = b"churnstream model\x00"
DECISION: Final = b"churnstream decision\x00"
"""What a signature is for, so that one made for the one is none for the other."""
PREFIX: Final = "ed25519:"
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
PRIVATE_FILE: Final = "signing.pem"
PUBLIC_FILE: Final = "trusted.pub"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key whose word counts, and whose it is."""

    raw: bytes
    owner: str

    @property
    def key_id(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of the key."""
        return sha256(self.raw).hexdigest()[: 2 * KEY_ID_BYTES]

    @property
    def line(self) -> str:
        """As it stands in a file of trusted keys."""
        return f"{PREFIX}{base64.b64encode(self.raw).decode()} {self.owner}"

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the owner of this key signed the message."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True


class Signer:
    """A private key and the name of its owner. Without a key signatures are empty: for trials, and where no key is trusted."""

    def __init__(self, owner: str, pem: str = "") -> None:
        """Raises BadUsage for a name or a key that is none."""
        if not NAME.fullmatch(owner):
            raise BadUsage(f"signer {owner!r}: needs a name of letters, digits and . _ @ - (CHURN_MODEL_SIGNER)")
        self.owner = owner
        self._key = _private(pem) if pem else None
        self.public = None if self._key is None else PublicKey(self._key.public_key().public_bytes_raw(), owner)

    @property
    def key_id(self) -> str:
        """Id of the public key; "" without one."""
        return "" if self.public is None else self.public.key_id

    def sign(self, purpose: bytes, message: bytes) -> bytes:
        """64 bytes; none without a key. Equal messages have equal signatures."""
        return b"" if self._key is None else self._key.sign(purpose + message)

    def seal(self, envelope: bytes, digest: str) -> bytes:
        """The model as it goes to the topic; without a key the envelope itself."""
        if self._key is None:
            return envelope
        return MAGIC + bytes.fromhex(self.key_id) + self.sign(MODEL, _statement(envelope, digest)) + envelope


def _private(pem: str) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem.encode(), None)
    except (ValueError, TypeError) as error:
        raise BadUsage("the signing key is not a PEM private key without a password; `churnstream keys create DIR` makes one") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadUsage("the signing key is not an Ed25519 key; `churnstream keys create DIR` makes one")
    return key


def _statement(envelope: bytes, digest: str) -> bytes:
    return bytes.fromhex(digest) + sha256(envelope).digest()


def envelope_of(value: bytes) -> bytes:
    """The envelope in a sealed model, unverified; an unsealed one as it is."""
    return value[HEADER_BYTES:] if value.startswith(MAGIC) else value


@dataclass(frozen=True, slots=True)
class Trust:
    """The keys whose word counts, by id, and whether one person's word is enough. Without keys everything is believed."""

    keys: Mapping[str, PublicKey] = field(default_factory=dict)
    two_persons: bool = False

    @property
    def checks(self) -> bool:
        """Whether signatures are checked at all."""
        return bool(self.keys)

    def open(self, value: bytes, digest: str) -> bytes:
        """The envelope of a sealed model. Raises Untrusted unless one of the keys sealed exactly these bytes under this name."""
        if not self.checks:
            return envelope_of(value)
        what = f"model {digest[:16]} refused"
        if not DIGEST.fullmatch(digest):
            raise Untrusted(f"{what}: that is no sha256")
        if not value.startswith(MAGIC) or len(value) <= HEADER_BYTES:
            raise Untrusted(
                f"{what}: it is not signed, and public keys are configured (CHURN_MODEL_PUBLIC_KEYS); publish it with a signing key"
            )
        key = self.keys.get(sealed_by(value))
        if key is None:
            raise Untrusted(f"{what}: signed by key {sealed_by(value)}, which is not trusted; trusted are {self.names}")
        envelope = value[HEADER_BYTES:]
        if not key.verifies(value[len(MAGIC) + KEY_ID_BYTES : HEADER_BYTES], MODEL + _statement(envelope, digest)):
            raise Untrusted(f"{what}: the signature is not that of {key.owner} ({key.key_id}) over these bytes and this name")
        return envelope

    @property
    def names(self) -> str:
        """Ids and owners of the keys, for people."""
        return ", ".join(f"{key.key_id} ({key.owner})" for key in self.keys.values())


def sealed_by(value: bytes) -> str:
    """Id of the key a sealed model names; "" when it is not sealed."""
    return value[len(MAGIC) : len(MAGIC) + KEY_ID_BYTES].hex() if value.startswith(MAGIC) else ""


def trusted(text: str) -> dict[str, PublicKey]:
    """Keys by id. text: keys as `ed25519:BASE64 [owner]`, or paths of files (one key a line) or directories (*.pub), comma-separated.

    Raises BadUsage for what is neither, and for a place that holds no key: nobody then means "check nothing".
    """
    keys: dict[str, PublicKey] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        lines = [(item, "CHURN_MODEL_PUBLIC_KEYS")] if item.startswith(PREFIX) else _lines(Path(item))
        for line, where in lines:
            key = _public(line, where)
            keys[key.key_id] = key
    return keys


def _lines(path: Path) -> list[tuple[str, str]]:
    files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
    try:
        found = [(line.strip(), str(file)) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadUsage(
            f"public keys {path}: {error}; set CHURN_MODEL_PUBLIC_KEYS to keys, a file of keys or a directory of *.pub"
        ) from error
    found = [(line, where) for line, where in found if line and not line.startswith("#")]
    if not found:
        raise BadUsage(f"public keys {path}: no key there; `churnstream keys create DIR` makes a pair")
    return found


def _public(line: str, where: str) -> PublicKey:
    text, _, owner = line.partition(" ")
    try:
        raw = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadUsage(f"{where}: {text[:24]}... is no base64") from error
    if not text.startswith(PREFIX) or len(raw) != 32:
        raise BadUsage(f"{where}: needs lines of `{PREFIX}BASE64 OWNER`, the key having 32 bytes")
    return PublicKey(raw, owner.strip() or "unnamed")


def create(directory: Path, owner: str) -> PublicKey:
    """A new pair: <directory>/signing.pem (mode 0600) and <directory>/trusted.pub. Raises BadUsage when there is one already."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    if not NAME.fullmatch(owner):
        raise BadUsage(f"owner {owner!r}: needs a name of letters, digits and . _ @ -")
    directory.mkdir(parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    try:
        handle = os.open(directory / PRIVATE_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise BadUsage(f"{directory / PRIVATE_FILE} exists; a new pair goes into a directory of its own") from error
    with os.fdopen(handle, "wb") as stream:
        stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = PublicKey(key.public_key().public_bytes_raw(), owner)
    (directory / PUBLIC_FILE).write_text(public.line + "\n", encoding="utf-8")
    return public
