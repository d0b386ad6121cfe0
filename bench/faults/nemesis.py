"""The table of faults: what each does to a running round, and what the round around it looks like."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import orjson

from bench.faults.proxy import DOWN, UP, Weather
from bench.faults.rounds import DIRTY, Mix, poison, stream
from streams import engine
from streams.settings import Settings

if TYPE_CHECKING:
    from bench.faults.checker import Evidence
    from bench.faults.rounds import Round

Stream = Callable[[int, int], Iterator[tuple[str, bytes | None, bytes]]]


def calm(seed: int, count: int) -> Iterator[tuple[str, bytes | None, bytes]]:
    """The ordinary stream: a few duplicates, late and broken records."""
    return stream(seed, count, Mix())


def dirty(seed: int, count: int) -> Iterator[tuple[str, bytes | None, bytes]]:
    """Half a year, much of it twice, late, wrong or from another age."""
    return stream(seed, count, DIRTY)


def touching(seed: int, count: int) -> Iterator[tuple[str, bytes | None, bytes]]:
    """The ordinary stream, and at its end one event of every customer: whoever's state is damaged is met."""
    mix = Mix()
    yield from stream(seed, count - mix.customers, mix)
    for i in range(mix.customers):
        event = {"event_id": f"last{i}", "customer_id": f"c{i:04d}", "kind": "login", "event_time": mix.start_ms + count * mix.span_ms}
        yield "logins", f"c{i:04d}".encode(), orjson.dumps(event)


def hostile(seed: int, count: int) -> Iterator[tuple[str, bytes | None, bytes]]:
    """Every second record hostile."""
    good, bad = stream(seed, count // 2, Mix()), poison(seed, count - count // 2)
    for record in bad:
        yield record
        yield from (one for one in [next(good, None)] if one is not None)


@dataclass(frozen=True, slots=True)
class Fault:
    """One row of the table.

    inject: does the harm while the stream flows and undoes what an operator would undo; prepare: before the workers start. proxied: links
    that go through the proxy. backlog: share of the stream that lies there before the workers start; feed_s: how long the rest takes.
    rollback: the store may go back. model: share of rounds with a published model. expect: further violations, found at the end.
    """

    name: str
    inject: Callable[[Round], None]
    what: str
    workers: int = 1
    events: int = 3_000
    proxied: tuple[str, ...] = ()
    stream: Stream = calm
    prepare: Callable[[Round], None] | None = None
    expect: Callable[[Round, Evidence], list[str]] | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    backlog: float = 0.4
    feed_s: tuple[float, float] = (1.5, 3.0)
    holes: bool = False
    rollback: bool = False
    model: float = 0.7
    no_duplicates: bool = False
    sample: int = 100
    nodes: int = 1  # brokers
    fresh: bool = False  # needs worker processes started as in production
    clock_s: int = 0  # how far the workers' clocks may be off
    mode: str | None = None  # only in this delivery mode
    share: int = 5  # rounds of a campaign of 300


# -- workers


def nothing(this: Round) -> None:
    """A quiet round: the checker has to be content with it."""
    this.mark()


def kill_random(this: Round) -> None:
    """SIGKILL at a random moment; the supervisor starts the next one at once."""
    this.wait(this.random.uniform(0, 1.5))
    victim = this.crew.victim(this.random)
    this.mark()
    victim.process.kill()
    victim.process.wait(10)


def kill_twice(this: Round) -> None:
    """Killed, and its successor killed again while it takes over."""
    kill_random(this)
    this.wait(this.random.uniform(0.5, 8))
    victim = this.crew.victim(this.random)
    victim.process.kill()
    victim.process.wait(10)


def crash_at(place: str) -> Callable[[Round], None]:
    """Let the worker die at a named place: at its n-th item there; the round is set up by `prepare`."""

    def inject(this: Round) -> None:
        if not this.until(lambda: any(end.code == 70 for end in this.crew.ends), 6.0):
            # Places on the way out are reached only by a stop.
            this.crew.victim(this.random).process.send_signal(signal.SIGTERM)
            this.until(lambda: bool(this.crew.ends), 15.0)
        this.facts["crashed"] = any(end.code == 70 for end in this.crew.ends)
        this.mark()

    return inject


def arm(place: str) -> Callable[[Round], None]:
    """The next worker dies at the place."""

    def prepare(this: Round) -> None:
        rare = place in ("after_claim", "on_revoke", "on_stop", "before_hint")
        item = 1 if rare else this.random.randint(1, 4)
        this.facts["place"] = f"{place}:{item}"
        this.crew.next_variables = {"CHURNSTREAM_CRASH_AT": f"{place}:{item}"}

    return prepare


def zombie(this: Round) -> None:
    """Frozen past the session timeout, thawed when others have taken over."""
    this.wait(this.random.uniform(0, 1))
    victim = this.crew.victim(this.random)
    victim.frozen = True
    victim.process.send_signal(signal.SIGSTOP)
    this.mark()
    this.wait(this.random.uniform(7, 9))
    victim.process.send_signal(signal.SIGCONT)
    victim.frozen = False
    this.wait(1)


def storm(this: Round) -> None:
    """Workers come and go every one to three seconds."""
    this.mark()
    for _ in range(4):
        this.crew.scale(this.random.choice((1, 2, 3)))
        this.wait(this.random.uniform(1, 3))
    this.crew.scale(1)


def scale(this: Round) -> None:
    """1 -> 4 -> 2 workers under a steady stream; the pause of any partition is measured."""
    this.mark()
    begin = time.monotonic()
    this.crew.scale(4)
    this.until(lambda: this.crew.holding() == 4, 30)
    this.facts["owners"] = this.crew.holding()
    this.wait(1)
    this.crew.scale(2)
    this.wait(4)
    this.facts["scale_pause_s"] = round(this.observer.longest_pause(begin, time.monotonic()), 3)


def graceful(this: Round) -> None:
    """SIGTERM under load: exit 0 within 10 s and not one raw duplicate; the supervisor starts the next one."""
    this.wait(this.random.uniform(0.2, 1.5))
    victim = this.crew.victim(this.random)
    this.mark()
    begin = time.monotonic()
    victim.process.send_signal(signal.SIGTERM)
    this.until(lambda: any(end.number == victim.number for end in this.crew.ends), 20)
    this.facts["stopped_s"] = round(time.monotonic() - begin, 3)
    this.facts["stopped_code"] = next((end.code for end in this.crew.ends if end.number == victim.number), None)


def gracefully(this: Round, evidence: Evidence) -> list[str]:
    """What a graceful stop promises."""
    if this.facts["stopped_code"] != 0 or this.facts["stopped_s"] > 10:
        return [f"graceful stop: exit code {this.facts['stopped_code']} after {this.facts['stopped_s']} s"]
    return []


# -- links


def weather(link: str, bad: Weather, seconds: tuple[float, float] = (0.5, 4.0), *, reset: bool = False) -> Callable[[Round], None]:
    """Bad weather on a link for a while."""

    def inject(this: Round) -> None:
        proxy = this.ground.redis_link if link == "redis" else this.ground.kafka_link
        this.wait(this.random.uniform(0, 1))
        proxy.set(bad)
        if reset:
            for _ in range(this.random.randint(1, 5)):
                proxy.reset()
                this.wait(this.random.uniform(0, 0.5))
        this.wait(this.random.uniform(*seconds))
        proxy.clear()
        this.mark()

    return inject


IMPATIENT: Final = {"CHURN_KAFKA__SOCKET_TIMEOUT_MS": "3000"}
"""A timeout short enough to be met in a short round."""


def _links() -> Iterator[Fault]:
    kinds: dict[str, tuple[Weather, str]] = {
        "refuse": (Weather(refuse=True), "nobody listens"),
        "blackhole": (Weather(swallow=(UP, DOWN)), "bytes vanish both ways"),
        "half_open_up": (Weather(swallow=(UP,)), "requests vanish"),
        "half_open_down": (Weather(swallow=(DOWN,)), "answers vanish: the ambiguous case"),
        "latency": (Weather(delay_ms=500), "500 ms each way"),
        "slow": (Weather(bytes_per_second=5_000), "5 KB/s"),
        "slice": (Weather(slice_bytes=7), "pieces of seven bytes"),
        "cut": (Weather(cut_after=1), "reset after the request, before the answer"),
    }
    for link in ("redis", "kafka"):
        for name, (bad, what) in kinds.items():
            variables = IMPATIENT if link == "kafka" else {}
            yield Fault(f"{link}_{name}", weather(link, bad), f"link to {link}: {what}", proxied=(link,), variables=variables, share=5)
        yield Fault(
            f"{link}_reset",
            weather(link, Weather(), (0, 0.5), reset=True),
            f"link to {link}: connections reset again and again",
            proxied=(link,),
            share=5,
        )


# -- Redis


def redis_kill(this: Round) -> None:
    """SIGKILL of Redis, started again at once."""
    this.wait(this.random.uniform(0, 1.5))
    this.mark()
    this.ground.redis.process.kill()
    this.ground.redis.process.start()


def redis_power(this: Round) -> None:
    """Power loss: SIGKILL, and the append-only file ends at a random byte of its last 70 %."""
    this.wait(this.random.uniform(0.3, 1.5))
    server = this.ground.redis
    server.process.kill()
    tail = server.tail_file()
    size = tail.stat().st_size
    keep = this.random.randrange(int(size * 0.3), size)
    with tail.open("r+b") as stream:
        stream.truncate(keep)
    this.facts["aof"] = [size, keep]
    server.process.start()
    this.mark()


def redis_backup(this: Round) -> None:
    """The data directory of a moment ago is put back."""
    server = this.ground.redis
    this.wait(this.random.uniform(0, 0.5))
    backup = this.directory / "backup"
    shutil.copytree(server.files, backup)
    this.wait(this.random.uniform(0.5, 2))
    server.process.kill()
    server.put_back(backup)
    server.process.start()
    this.mark()


def redis_flushall(this: Round) -> None:
    """Everything gone."""
    this.wait(this.random.uniform(0, 1.5))
    this.mark()
    this.ground.redis.client.flushall()


def redis_keys(this: Round) -> None:
    """A few keys gone: customers, chunks, lists or the meta of a partition; and a kill, for a worker's memory would hide the loss."""
    this.wait(this.random.uniform(0, 1.5))
    client = this.ground.redis.client
    names = sorted(client.scan_iter(match=f"{this.settings.namespace}:*", count=1_000))
    chosen = this.random.sample(names, min(len(names), this.random.choice((1, 3, 20))))
    this.mark()
    if chosen:
        client.delete(*chosen)
    this.facts["deleted"] = len(chosen)
    victim = this.crew.victim(this.random)
    victim.process.kill()
    victim.process.wait(10)


def redis_full(this: Round) -> None:
    """No memory for writes for a while."""
    this.wait(this.random.uniform(0, 1))
    client = this.ground.redis.client
    client.config_set("maxmemory", max(1, client.info("memory")["used_memory"] - 1))
    this.wait(this.random.uniform(1, 4))
    client.config_set("maxmemory", 0)
    this.mark()


def redis_disk_full(this: Round) -> None:
    """The append-only file cannot grow for a while."""
    this.wait(this.random.uniform(0, 1))
    server = this.ground.redis
    server.limit_file(server.tail_file().stat().st_size + this.random.randrange(50_000))
    this.wait(this.random.uniform(1, 4))
    server.limit_file(None)
    this.mark()


def redis_failover(this: Round) -> None:
    """A replica that has not seen the last writes becomes the master; the old one is gone."""
    replica = this.ground.replica()
    this.wait(this.random.uniform(0.2, 1))
    replica.link.set(Weather(swallow=(UP, DOWN)))
    this.wait(this.random.uniform(0.1, 0.8))
    this.mark()
    this.ground.promote(replica)
    this.moved()


# -- Kafka


def broker_kill(this: Round) -> None:
    """SIGKILL of the broker, started again at once."""
    this.wait(this.random.uniform(0, 1.5))
    this.ground.broker.process.kill()
    this.ground.broker.process.start()
    this.mark()


def broker_restart(this: Round) -> None:
    """The broker stopped cleanly and started again."""
    this.wait(this.random.uniform(0, 1.5))
    this.ground.broker.process.stop()
    this.ground.broker.process.start()
    this.mark()


def broker_of_three(this: Round) -> None:
    """One of three brokers killed, whatever it led or coordinated; started again later."""
    this.wait(this.random.uniform(0, 1.5))
    broker = this.random.choice(this.ground.brokers)
    this.mark()
    broker.process.kill()
    this.wait(this.random.uniform(2, 8))
    broker.process.start()


def quorum_loss(this: Round) -> None:
    """Two of three brokers frozen or killed: nothing can be written; then they are back."""
    this.wait(this.random.uniform(0, 1.5))
    two = this.random.sample(this.ground.brokers, 2)
    killed = this.random.random() < 0.5
    this.facts["killed"] = killed
    for broker in two:
        broker.process.signal(signal.SIGKILL if killed else signal.SIGSTOP)
    this.wait(this.random.uniform(2, 8))
    for broker in two:
        if killed:
            broker.process.kill()
            broker.process.start(wait=False)
        else:
            broker.process.signal(signal.SIGCONT)
    for broker in two:
        broker.process.await_up()
    this.mark()


# -- clocks


def wrong_clocks(this: Round) -> None:
    """Workers whose clocks are an hour fast and an hour slow, one after the other, and a SIGKILL in between."""
    this.crew.next_variables = this.shelf.clock(this.random.choice((-3_600, 3_600, 86_400)))
    kill_random(this)


def wrong_clock(this: Round) -> None:
    """The first worker's clock is wrong."""
    this.crew.next_variables = this.shelf.clock(this.random.choice((-3_600, 3_600)))


# -- models


def reload_kill(this: Round) -> None:
    """A new model under load, and a kill while it is taken over."""
    this.publish(this.shelf.envelopes[1])
    this.wait(this.random.uniform(0, 0.8))
    victim = this.crew.victim(this.random)
    this.mark()
    victim.process.kill()
    victim.process.wait(10)


def corrupt_model(this: Round) -> None:
    """Damaged artifacts are published as champion; what was in force stays."""
    good = this.shelf.envelopes[1]
    digest = this.shelf.model(good).digest
    for _ in range(4):
        bad = bytearray(good)
        match this.random.randrange(4):
            case 0:
                bad[this.random.randrange(len(bad))] ^= 1 << this.random.randrange(8)
            case 1:
                del bad[this.random.randrange(len(bad)) :]
            case 2:
                bad = bytearray(this.random.randbytes(this.random.randrange(1, 5_000)))
            case _:
                bad = bytearray(this.shelf.envelopes[0])  # a sound model under another one's name
        this.produce("churn-models", f"artifact/{digest}".encode(), bytes(bad))
        this.produce("churn-models", b"alias/champion", orjson.dumps({"digest": digest, "version": "bad"}))
        this.wait(0.3)
    this.mark()


def stayed(this: Round, evidence: Evidence) -> list[str]:
    """No score by the model whose artifact was damaged."""
    digest = this.shelf.model(this.shelf.envelopes[1]).digest
    used = {orjson.loads(row.value)["model_digest"] for rows in evidence.scores.values() for row in rows}
    return [f"I4 a damaged model scored: {digest}"] if digest in used else []


def _crashes() -> Iterator[Fault]:
    for place in engine.CRASH_PLACES:
        mode = "exactly_once" if place.startswith("transaction") else None
        if mode is None or "delivery" in Settings.model_fields:
            yield Fault(f"crash_{place}", crash_at(place), f"the worker dies at {place}", prepare=arm(place), mode=mode, share=5)


FAULTS: Final = {
    fault.name: fault
    for fault in (
        Fault("none", nothing, "nothing happens", share=5),
        Fault("kill", kill_random, "worker: SIGKILL at a random moment", share=40),
        Fault("kill_big", kill_random, "worker: SIGKILL in 20,000 events", events=20_000, feed_s=(3, 5), share=10),
        Fault("kill_twice", kill_twice, "worker: SIGKILL, and again while the next one takes over", share=8),
        Fault("kill_one_of_two", kill_random, "one of two workers: SIGKILL", workers=2, share=8),
        *_crashes(),
        Fault("zombie", zombie, "worker frozen past the session timeout, then thawed", workers=2, feed_s=(6, 9), share=8),
        Fault("storm", storm, "workers come and go", feed_s=(6, 9), share=5),
        Fault("scale", scale, "1 -> 4 -> 2 workers", feed_s=(12, 14), events=6_000, share=5),
        Fault("graceful", graceful, "SIGTERM under load", no_duplicates=True, expect=gracefully, share=15),
        Fault("redis_kill", redis_kill, "Redis: SIGKILL and restart", share=12),
        Fault("redis_full", redis_full, "Redis: no memory for writes", share=5),
        Fault("redis_disk_full", redis_disk_full, "Redis: its file cannot grow", share=6),
        Fault("redis_power", redis_power, "Redis: power loss, its file ends at a random byte", rollback=True, share=15),
        Fault("redis_backup", redis_backup, "Redis: an older copy of its data is put back", rollback=True, share=8),
        Fault("redis_flushall", redis_flushall, "Redis: FLUSHALL", rollback=True, share=8),
        Fault("redis_keys", redis_keys, "Redis: some keys deleted; and a SIGKILL", stream=touching, rollback=True, share=8),
        Fault(
            "redis_failover",
            redis_failover,
            "Redis: a replica behind its master takes over",
            proxied=("redis",),
            rollback=True,
            share=8,
        ),
        Fault("broker_kill", broker_kill, "broker: SIGKILL and restart", share=8),
        Fault("broker_restart", broker_restart, "broker: stopped and started", share=5),
        Fault("broker_of_three", broker_of_three, "one of three brokers: SIGKILL", nodes=3, workers=2, feed_s=(4, 8), share=6),
        Fault("quorum_loss", quorum_loss, "two of three brokers frozen or killed, then back", nodes=3, feed_s=(4, 8), share=6),
        *_links(),
        Fault(
            "kafka_ambiguous",
            weather("kafka", Weather(swallow=(DOWN,)), (5, 8)),
            "link to kafka: answers vanish for longer than requests wait",
            proxied=("kafka",),
            variables=IMPATIENT,
        ),
        Fault(
            "kafka_narrow",
            weather("kafka", Weather(bytes_per_second=300_000), (4, 8)),
            "link to kafka: 300 KB/s before a backlog of 20,000 events",
            proxied=("kafka",),
            events=20_000,
            backlog=0.95,
        ),
        Fault("backlog_kill", kill_random, "20,000 events wait; and a SIGKILL", events=20_000, backlog=0.95, share=6),
        Fault("clocks", wrong_clocks, "clocks an hour off; and a SIGKILL", prepare=wrong_clock, fresh=True, clock_s=90_000, share=5),
        Fault("dirty", kill_random, "duplicates, reordered, late, too late, 1970, 2100, a leap day; and a SIGKILL", stream=dirty, share=12),
        Fault("holes", kill_random, "aborted transactions in the inputs; and a SIGKILL", holes=True, share=8),
        Fault("poison", kill_random, "every second record hostile; and a SIGKILL", stream=hostile, share=8),
        Fault("reload_kill", reload_kill, "a new model and a SIGKILL", model=1.0, share=8),
        Fault("corrupt_model", corrupt_model, "damaged artifacts published as champion", model=0.5, expect=stayed, share=8),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `faults`: none."""


def main(arguments: argparse.Namespace) -> int:
    """Print the table."""
    for fault in FAULTS.values():
        print(f"{fault.name:28} {fault.what}")
    print(json.dumps({"faults": len(FAULTS), "rounds_of_a_campaign": sum(fault.share for fault in FAULTS.values())}))
    return 0
