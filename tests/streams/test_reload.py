"""Models arriving damaged, half, or not at all: the one in force stays, and a worker without any starts all the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
from confluent_kafka import Producer

from bench.small_model import Small, small
from models import registry
from models.desk import Desk
from models.signature import Signer, Trust
from proto.errors import ArtifactRejected, ChurnError
from scoring.fallback import Fallback
from scoring.scorer import load
from streams.metrics import Metrics
from streams.reload import Reload, ReloadSettings
from streams.scores import Model
from streams.settings import Settings
from streams.topics import client_config, create, producer_config
from tests.models.test_signature import person

pytestmark = pytest.mark.servers


class Shelf:
    """The model topic of a test, and what a worker makes of it."""

    def __init__(self, settings: Settings) -> None:
        create(settings)
        self.settings, self.topic = settings, settings.prefixed("churn-models")
        self.tried: list[int] = []
        self.metrics = Metrics()

    def publish(self, model: Small) -> None:
        registry.publish(producer_config(self.settings), self.topic, model.manifest, model.envelope)

    def write(self, key: str, value: bytes | None) -> None:
        producer = Producer(producer_config(self.settings))
        producer.produce(self.topic, value, key)
        assert producer.flush(20) == 0

    def write_as_champion(self, model: Small, envelope: bytes) -> None:
        """The name of a model with other bytes under it."""
        self.write(f"artifact/{model.manifest.digest}", envelope)
        self.write("alias/champion", orjson.dumps({"digest": model.manifest.digest, "version": "1"}))

    def _load(self, envelope: bytes) -> Model:
        self.tried.append(len(envelope))
        return load(envelope)

    @contextmanager
    def worker(self, trust: Trust | None = None) -> Iterator[Reload]:
        reload = Reload(ReloadSettings(client_config(self.settings), self.topic, 10), self._load, Fallback(0.5), self.metrics, trust)
        reload.start()
        try:
            yield reload
        finally:
            reload.stop()

    def desk(self, signer: Signer, trust: Trust) -> Desk:
        return Desk(producer_config(self.settings), self.topic, signer, trust, lambda: 1_000)

    @property
    def unsigned(self) -> float:
        return float(self.metrics.registry.get_sample_value("churn_models_rejected_total", {"what": "signature"}) or 0)

    @property
    def rejected(self) -> float:
        return float(self.metrics.registry.get_sample_value("churn_models_rejected_total", {"what": "artifact"}) or 0)


@pytest.fixture
def shelf(settings: Settings) -> Shelf:
    return Shelf(settings)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def flipped(envelope: bytes, at: int) -> bytes:
    return envelope[:at] + bytes([envelope[at] ^ 1]) + envelope[at + 1 :]


DAMAGE: dict[str, Callable[[Small], bytes]] = {
    "empty": lambda _: b"",
    "not an envelope": lambda _: b"\x00" * 1_000,
    "cut in half": lambda model: model.envelope[: len(model.envelope) // 2],
    "one byte short": lambda model: model.envelope[:-1],
    "a byte more": lambda model: model.envelope + b"\x00",
    "a bit at the beginning": lambda model: flipped(model.envelope, 5),
    "a bit in the middle": lambda model: flipped(model.envelope, len(model.envelope) // 2),
    "another model": lambda _: small(seed=9).envelope,
}


def test_without_a_model_scores_are_fallbacks(shelf: Shelf) -> None:
    with shelf.worker() as reload:
        assert reload.current().fallback
        assert reload.current().digest == ""


def test_a_damaged_model_is_refused_once_and_the_one_in_force_stays(shelf: Shelf) -> None:
    good = small()
    shelf.publish(good)
    with shelf.worker() as reload:
        for number, (name, damage) in enumerate(DAMAGE.items(), 1):
            assert reload.current().digest == good.manifest.digest
            bad = small(seed=20 + number)
            shelf.write_as_champion(bad, damage(bad))
            until(lambda number=number: shelf.rejected == number)  # type: ignore[misc]  # the default binds this turn's value
            tried = len(shelf.tried)
            shelf.write("artifact/other", b"anything")  # more news on the topic is no reason to try again
            shelf.write("alias/champion", orjson.dumps({"digest": bad.manifest.digest, "version": "1"}))
            time.sleep(0.3)  # a second try would come with the news
            assert (len(shelf.tried), shelf.rejected) == (tried, number), name
            assert reload.current().digest == good.manifest.digest
            assert reload.failure is None
            with pytest.raises(ArtifactRejected):
                reload.by_digest(bad.manifest.digest)
            shelf.write_as_champion(bad, bad.envelope)  # put right: new bytes are tried
            until(lambda bad=bad: reload.current().digest == bad.manifest.digest)  # type: ignore[misc]  # the default binds this turn's value
            good = bad


def test_a_worker_starts_on_a_topic_with_nothing_but_damaged_models(shelf: Shelf) -> None:
    model = small()
    shelf.write_as_champion(model, model.envelope[:-1])
    for _ in range(2):
        with shelf.worker() as reload:  # again and again, as a supervisor would
            assert reload.current().fallback
            assert reload.failure is None
    assert shelf.rejected == 2


def test_an_alias_ahead_of_its_artifact_or_without_sense_changes_nothing(shelf: Shelf) -> None:
    good, coming = small(), small(seed=5)
    shelf.publish(good)
    with shelf.worker() as reload:
        for senseless in (b"", b"{", b"[]", b"null", b'{"version":"1"}', b'{"digest":7}', b"\xff", None):
            shelf.write("alias/champion", senseless)
        shelf.write("alias/champion", orjson.dumps({"digest": coming.manifest.digest, "version": "1"}))
        time.sleep(0.5)  # nothing is to happen: there is no condition to wait for
        assert reload.current().digest == good.manifest.digest
        assert reload.failure is None
        shelf.write(f"artifact/{coming.manifest.digest}", coming.envelope)
        until(lambda: reload.current().digest == coming.manifest.digest)
        shelf.write(f"artifact/{coming.manifest.digest}", None)  # what is in force stays in force
        time.sleep(0.3)  # as above
        assert reload.current().digest == coming.manifest.digest
        assert reload.by_digest(coming.manifest.digest).digest == coming.manifest.digest
    assert shelf.rejected == 0


def test_with_public_keys_only_what_is_signed_moves_the_worker(shelf: Shelf, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (ada, of_ada), (eve, _) = person(tmp_path, "ada"), person(tmp_path, "eve")
    trust = Trust({of_ada.key_id: of_ada})
    good, bad, worse, better = (small(seed=seed) for seed in (0, 5, 7, 6))
    desk = shelf.desk(ada, trust)
    desk.publish(good.envelope)
    first = desk.promote(good.manifest.digest).decision
    assert first is not None
    with shelf.worker(trust) as reload:

        def stays(model: Small, refused: int) -> None:
            until(lambda: shelf.unsigned == refused)
            assert reload.current().digest == model.manifest.digest
            assert reload.failure is None

        stays(good, 0)
        shelf.publish(bad)  # neither the model nor the alias is signed
        stays(good, 1)
        stranger = shelf.desk(eve, Trust())
        stranger.publish(worse.envelope)
        stranger.promote(worse.manifest.digest)  # in the log twice, and under the alias
        stays(good, 4)
        desk = shelf.desk(ada, trust)
        desk.publish(better.envelope)
        shelf.write(f"artifact/{better.manifest.digest}", better.envelope)  # somebody takes the signature away
        desk.promote(better.manifest.digest)
        stays(good, 5)
        shelf.desk(ada, trust).publish(better.envelope)
        until(lambda: reload.current().digest == better.manifest.digest)
        shelf.write("alias/champion", first.encode())  # genuine, but of yesterday
        stays(better, 6)
        assert "not signed" in caplog.text
        assert "is not trusted" in caplog.text
        shelf.desk(ada, trust).rollback()
        until(lambda: reload.current().digest == good.manifest.digest)
    with shelf.worker(trust) as reload:  # and a worker that starts on all this
        assert reload.current().digest == good.manifest.digest


def test_a_worker_that_starts_on_a_damaged_champion_takes_the_one_before(shelf: Shelf) -> None:
    good, bad = small(), small(seed=5)
    desk = shelf.desk(Signer("ada"), Trust())
    for model in (good, bad):
        desk.publish(model.envelope)
        desk.promote(model.manifest.digest)
    shelf.write(f"artifact/{bad.manifest.digest}", bad.envelope[:-1])
    with shelf.worker() as reload:
        assert reload.current().digest == good.manifest.digest
        assert shelf.rejected == 1
        shelf.write(f"artifact/{bad.manifest.digest}", bad.envelope)
        until(lambda: reload.current().digest == bad.manifest.digest)


def test_two_desks_at_once_do_not_both_win(shelf: Shelf) -> None:
    ada, bob = (shelf.desk(Signer(name), Trust()) for name in ("ada", "bob"))
    ada.publish(small().envelope)
    with pytest.raises(ChurnError, match="at the same time"):
        bob.publish(small(seed=5).envelope)
    shelf.desk(Signer("bob"), Trust()).publish(small(seed=5).envelope)
