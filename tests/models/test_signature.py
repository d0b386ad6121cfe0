"""Whose word counts: seals over models and signatures under decisions, and what happens to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.small_model import small
from models import signature
from models.artifact import unpack
from models.ledger import Decision, Ledger, parse
from models.signature import HEADER_BYTES, PublicKey, Signer, Trust, create, sealed_by, trusted
from proto.errors import BadUsage, Untrusted


def person(directory: Path, owner: str) -> tuple[Signer, PublicKey]:
    public = create(directory / owner, owner)
    return Signer(owner, (directory / owner / signature.PRIVATE_FILE).read_text()), public


def trust(*keys: PublicKey, two_persons: bool = False) -> Trust:
    return Trust({key.key_id: key for key in keys}, two_persons)


def test_what_a_trusted_key_sealed_is_opened_and_nothing_else(tmp_path: Path) -> None:
    ada, of_ada = person(tmp_path, "ada")
    bob, of_bob = person(tmp_path, "bob")
    model, other = small(), small(seed=5)
    digest = model.manifest.digest
    sealed = ada.seal(model.envelope, digest)
    believed = trust(of_ada)
    assert believed.open(sealed, digest) == model.envelope
    assert ada.seal(model.envelope, digest) == sealed  # equal models are equal records
    assert unpack(sealed, digest=digest).manifest == model.manifest  # a reader that checks no signature passes over it
    assert trust(of_bob, of_ada).open(sealed, digest) == model.envelope  # a second key while keys are changed
    assert sealed_by(sealed) == of_ada.key_id
    with pytest.raises(Untrusted, match="not signed"):
        believed.open(model.envelope, digest)
    with pytest.raises(Untrusted, match="not trusted"):
        believed.open(bob.seal(model.envelope, digest), digest)
    with pytest.raises(Untrusted, match="not that of ada"):
        believed.open(sealed[:HEADER_BYTES] + other.envelope, digest)
    with pytest.raises(Untrusted, match="not that of ada"):
        believed.open(ada.seal(other.envelope, other.manifest.digest), digest)  # sound and signed, under another's name
    for position in range(0, len(sealed), 97):
        flipped = bytearray(sealed)
        flipped[position] ^= 4
        with pytest.raises(Untrusted):
            believed.open(bytes(flipped), digest)
    for size in (0, 1, len(signature.MAGIC), HEADER_BYTES - 1, HEADER_BYTES, len(sealed) - 1):
        with pytest.raises(Untrusted):
            believed.open(sealed[:size], digest)
    with pytest.raises(Untrusted, match="no sha256"):
        believed.open(sealed, "../../etc")


def test_keys_come_as_text_as_files_and_as_a_directory(tmp_path: Path) -> None:
    (_, ada), (_, bob) = person(tmp_path, "ada"), person(tmp_path, "bob")
    assert (tmp_path / "ada" / signature.PRIVATE_FILE).stat().st_mode & 0o777 == 0o600
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "a.pub").write_text(f"# of the team\n{ada.line}\n")
    (folder / "b.pub").write_text(bob.line)
    both = {ada.key_id: ada, bob.key_id: bob}
    assert trusted(str(folder)) == both
    assert trusted(f"{ada.line}, {folder / 'b.pub'}") == both
    assert trusted("") == {}
    for wrong in (str(tmp_path / "nowhere"), str(tmp_path), "ed25519:AAAA x", "ed25519:???"):
        with pytest.raises(BadUsage):
            trusted(wrong)
    with pytest.raises(BadUsage, match="exists"):
        create(tmp_path / "ada", "ada")
    with pytest.raises(BadUsage, match="PEM"):
        Signer("ada", "no key")


DIGESTS = ("a" * 64, "b" * 64, "c" * 64)


def decided(ledger: Ledger, who: Signer, action: str, digest: str, at_ms: int, **more: str) -> Decision:
    decision = ledger.next(action, digest, digest[:1], who, at_ms, **more)  # type: ignore[arg-type]  # an action by its name
    assert ledger.note(decision.encode()) == decision
    return decision


def test_the_log_says_what_was_live_when_and_by_whom(tmp_path: Path) -> None:
    ada, of_ada = person(tmp_path, "ada")
    ledger = Ledger(trust(of_ada))
    one, two, _ = DIGESTS
    decided(ledger, ada, "promote", one, 1_000, alias="champion", why="first")
    decided(ledger, ada, "promote", two, 2_000, alias="champion", former=one)
    decided(ledger, ada, "promote", two, 2_500, alias="shadow")
    decided(ledger, ada, "rollback", one, 1_500, alias="champion", former=two)  # a clock that went back
    assert [d.digest if d else None for d in (ledger.live_at("champion", t) for t in (999, 1_000, 1_999, 2_000, 2_499, 2_500))] == [
        None, one, one, two, two, one,
    ]  # fmt: skip
    assert ledger.target("champion") == one
    assert ledger.target("shadow") == two
    assert list(ledger.audit()) == []


def test_decisions_of_strangers_changed_ones_and_old_ones_do_not_count(tmp_path: Path) -> None:
    (ada, of_ada), (eve, _) = person(tmp_path, "ada"), person(tmp_path, "eve")
    ledger = Ledger(trust(of_ada))
    one, two, three = DIGESTS
    first = decided(ledger, ada, "promote", one, 1, alias="champion")
    second = decided(ledger, ada, "promote", two, 2, alias="champion")
    assert ledger.note(first.encode()) is None  # replayed
    changed = second.model_copy(update={"number": 3, "digest": three})
    as_eve = ledger.next("promote", three, "c", eve, 3, alias="champion")
    as_ada = as_eve.model_copy(update={"who": "ada"})
    for forged in (changed, as_eve, as_ada, changed.model_copy(update={"signature": ""})):
        with pytest.raises(Untrusted, match="does not count"):
            ledger.note(forged.encode())
        ledger.decisions.pop(3)
    assert ledger.target("champion") == two
    with pytest.raises(Untrusted):
        ledger.note(as_eve.encode())
    genuine = decided(ledger, ada, "rollback", one, 4, alias="champion")  # the stranger took its number, in vain
    assert (genuine.number, ledger.target("champion")) == (3, one)
    assert parse(genuine.encode().replace(b",", b", ", 1)) is None  # one decision, one spelling


def test_of_two_who_decide_at_once_the_first_counts() -> None:
    ledger, me, you = Ledger(), Signer("me"), Signer("you")
    mine, yours = (ledger.next("promote", digest, "x", who, 1, alias="champion") for digest, who in zip(DIGESTS, (me, you), strict=False))
    assert ledger.note(mine.encode()) == mine
    assert ledger.note(yours.encode()) is None
    assert ledger.void == [yours]
    assert ledger.target("champion") == mine.digest


def test_the_audit_finds_a_gap_and_vouches_for_a_retired_key(tmp_path: Path) -> None:
    (ada, of_ada), (bob, of_bob) = person(tmp_path, "ada"), person(tmp_path, "bob")
    ledger = Ledger(trust(of_ada, of_bob))
    decisions = [decided(ledger, who, "publish", DIGESTS[0], at) for at, who in enumerate((ada, ada, bob))]

    def found(believed: Trust, kept: list[Decision]) -> list[str]:
        later = Ledger(believed)
        for decision in kept:
            try:
                later.note(decision.encode())
            except Untrusted:
                continue
        return list(later.audit())

    assert found(trust(of_bob), decisions) == []  # what bob's names is as good as his own
    assert found(trust(of_ada), decisions) == ["3: signed by no trusted key, and no trusted decision follows it"]
    assert found(trust(of_ada, of_bob), [decisions[0], decisions[2]]) == ["3: the decision before it is not on the topic"]
    later = [decisions[0], decisions[1].model_copy(update={"why": "written later"}), decisions[2]]
    assert len(found(trust(of_ada, of_bob), later)) == 2


def test_two_persons_are_two(tmp_path: Path) -> None:
    (ada, of_ada), (bob, of_bob) = person(tmp_path, "ada"), person(tmp_path, "bob")
    ledger = Ledger(trust(of_ada, of_bob, two_persons=True))
    model = DIGESTS[0]
    assert "nobody has published" in ledger.missing_approval(model)
    decided(ledger, ada, "publish", model, 1)
    decided(ledger, ada, "approve", model, 2)
    assert "another person than ada" in ledger.missing_approval(model)
    decided(ledger, bob, "approve", model, 3)
    assert ledger.missing_approval(model) == ""
    assert ledger.missing_approval(DIGESTS[1]) != ""
