"""The drift watch on real Kafka: a baseline from the topics, a broken unit named, state and offsets that survive, signed webhooks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import orjson
import pytest
from confluent_kafka import Producer

from features.window import DAY_MS
from proto.drift import DriftVerdict
from proto.errors import BadInput, BadUsage
from streams import drift_baseline
from streams.drift_state import BASELINE, STATE, latest
from streams.drift_watch import DriftWatch
from streams.drift_webhook import SIGNATURE, TIMESTAMP, Webhook, signature
from streams.log import KafkaLog
from streams.settings import Settings
from streams.topics import DRIFT, DRIFT_STATE, client_config, create, producer_config

BEGIN = 1_700_000_000_000 // DAY_MS * DAY_MS
CUSTOMERS = 300
SECRET = b"a secret of the two of us"


def customer(number: int) -> str:
    return f"c{number:04d}"


def send(settings: Settings, first: int, last: int, *, unit_from: int = 10**6, seed: int = 5) -> None:
    """Days [first, last) of log-ins and their scores as a worker would write them; durations in seconds from a day on."""
    producer = Producer(producer_config(settings))
    offset = first * 10_000
    for day in range(first, last):
        rng = np.random.default_rng([seed, day])
        for n in range(200):
            who = customer(int(rng.integers(0, CUSTOMERS)))
            at = BEGIN + day * DAY_MS + n * (DAY_MS // 200)
            duration = int(rng.lognormal(10, 1))
            kind = "page_view" if n % 2 else "login"
            event = {"event_id": f"e{day}-{n}", "customer_id": who, "event_time": at, "kind": kind, "device": "phone"}
            event["duration_ms"] = duration // 1_000 if day >= unit_from else duration
            producer.produce(settings.prefixed("logins"), orjson.dumps(event), who.encode(), partition=0)
            score = {
                "customer_id": who, "at": at, "probability": float(rng.beta(2, 5)), "fallback": False,
                "source": {"topic": "logins", "partition": 0, "offset": offset + n},
            }  # fmt: skip
            producer.produce(settings.prefixed("churn-scores"), orjson.dumps(score), who.encode(), partition=0)
        offset += 10_000
    assert producer.flush(30) == 0


def profiles(settings: Settings) -> None:
    producer = Producer(producer_config(settings))
    for n in range(CUSTOMERS):
        profile = {
            "event_id": f"p{n}",
            "customer_id": customer(n),
            "event_time": BEGIN - 40 * DAY_MS,
            "segment": "gold" if n % 3 else "silver",
        }
        producer.produce(settings.prefixed("customer-profiles"), orjson.dumps(profile), customer(n).encode(), partition=0)
    assert producer.flush(30) == 0


def verdicts(settings: Settings) -> list[DriftVerdict]:
    source = KafkaLog(client_config(settings), timeout_s=10)
    topic = settings.prefixed(DRIFT)
    found = [DriftVerdict.model_validate_json(m.value() or b"") for ms in source.read(topic, 0, *source.ends(topic, 0)) for m in ms]
    source.close()
    return found


def watched(settings: Settings, **more: Any) -> dict[str, Any]:
    return DriftWatch(settings, client_config(settings), until_idle_s=1.0, **more).run()


@contextmanager
def receiver(status: list[int]) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """An HTTP server that answers with the given statuses one after another, the last one for ever, and keeps what it was sent."""
    got: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status.pop(0) if len(status) > 1 else status[0])
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/drift", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.servers
@pytest.mark.slow
def test_a_watch_names_a_broken_unit_once_whatever_happens_to_its_process(settings: Settings) -> None:
    with receiver([503, 200]) as (url, got):
        here = settings.model_copy(
            update={"drift_webhook_url": url, "drift_webhook_secret": type(settings.drift_webhook_secret)(SECRET.decode())}
        )
        create(here)
        with pytest.raises(BadUsage, match="no baseline"):
            DriftWatch(here, client_config(here))
        profiles(here)
        send(here, 0, 28)
        with pytest.raises(BadInput, match="at least 14 days"):
            drift_baseline.make(here, from_ms=BEGIN, to_ms=BEGIN + 5 * DAY_MS, days=14, share=1.0)
        reference = drift_baseline.make(here, from_ms=None, to_ms=None, days=28, share=1.0)
        assert reference.baseline.segments == ("gold", "silver")
        drift_baseline.publish(here, reference)

        # Quiet days, in two runs: the second goes on where the first stopped.
        send(here, 28, 31)
        first = watched(here)
        assert first["verdicts"] == 0
        assert first["scores"] == 31 * 200
        send(here, 31, 33)
        second = watched(here)
        assert (second["scores"], second["records"]) == (33 * 200, 33 * 400 + CUSTOMERS)

        send(here, 33, 35, unit_from=33)
        assert watched(here)["verdicts"] >= 1
        assert watched(here)["verdicts"] == 0  # nothing new, nothing said
        said = verdicts(here)
        assert [one.kind for one in said].count("page") == 1
        page = said[0]
        assert (page.causes[0].nature, page.causes[0].what, page.causes[0].topic) == ("breakage", "units", "logins")
        assert (page.causes[0].field, page.action) == ("duration_ms", "repair-upstream")
        assert BEGIN + 33 * DAY_MS < page.at <= BEGIN + 34 * DAY_MS
        assert page.baseline == reference.digest

        # The first post failed, so it was sent again; each is signed over its very bytes.
        assert len(got) == len(said) + 1
        for headers, body in got:
            assert headers[SIGNATURE] == signature(SECRET, int(headers[TIMESTAMP]), body)
        assert orjson.loads(got[1][1])["verdict_id"] == page.verdict_id

        # Read anew from the beginning, the same verdict comes out.
        watched(here, afresh=True)
        again = verdicts(here)[len(said) :]
        assert [(one.verdict_id, one.at) for one in again if one.kind == "page"] == [(page.verdict_id, page.at)]
    source = KafkaLog(client_config(settings), timeout_s=10)
    assert set(latest(source, settings.prefixed(DRIFT_STATE))) == {BASELINE, STATE}
    source.close()


def test_a_webhook_tries_again_until_it_is_answered() -> None:
    waits: list[float] = []
    with receiver([500, 503, 200]) as (url, got):
        hook = Webhook(url, SECRET, now_s=lambda: 1_700_000_000.0, wait=waits.append)
        assert hook.send({"verdict_id": "v1"})
    assert len(got) == 3
    assert waits == [0.5, 1.0]
    assert got[0][0][SIGNATURE] != signature(b"another secret", 1_700_000_000, got[0][1])
    assert not Webhook("http://127.0.0.1:9/", SECRET, wait=waits.append).send({"verdict_id": "v2"})
    with receiver([410]) as (url, got):
        assert Webhook(url, SECRET, wait=waits.append).send({"verdict_id": "v3"})
    assert len(got) == 1
