"""The two processes of an open-loop run, each with an interpreter of its own: one sends at a fixed pace, one reads the scores.

    python -m bench.peers.openloop send  (commands on stdin: `phase RATE EVENTS WARM`)
    python -m bench.peers.openloop read  (commands on stdin: `count`, `save PATH`)

Event i of a phase is meant to be sent at the phase's start + i / rate, whatever became of those before it: a slow engine does not slow
the sender down, and a sender that is late itself makes the latency longer, not shorter. Times are CLOCK_MONOTONIC in ns, one clock for
all processes of the machine.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from array import array
from itertools import islice
from pathlib import Path
from typing import Any, Final

TICK_S: Final = 0.0005


def send(servers: str, prefix: str, seed: int, count: int, peers: Path | None) -> None:
    """Send phases of the stream as they are asked for; a line of JSON when one is warm and one when it is over."""
    from confluent_kafka import Producer

    from bench.peers.workload import INPUTS, events

    names = [prefix + name for name in INPUTS]
    stream = [(names[topic], key, value) for topic, key, value in events(count, seed, peers)]
    producer = Producer(
        {
            "bootstrap.servers": servers,
            "linger.ms": 1,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 2_000_000,
            "delivery.report.only.error": True,
        }
    )
    sent = 0
    _say({"ready": len(stream)})
    for line in sys.stdin:
        rate, number, warm = (float(x) for x in line.split()[1:])
        end = min(sent + int(number), len(stream))
        first, start_ns, late_ns = sent, time.monotonic_ns() + 1_000_000, 0
        told = False
        while sent < end:
            now = time.monotonic_ns()
            due = min(end, first + int((now - start_ns) * rate / 1e9) + 1 if now >= start_ns else first)
            if due > sent:
                late_ns = max(late_ns, now - start_ns - int((sent - first) / rate * 1e9)) if told else 0
                for topic, key, value in islice(stream, sent, due):
                    producer.produce(topic, value, key)
                sent = due
            producer.poll(0)
            if not told and sent - first >= warm:
                told = True
                _say({"warm": True})
            time.sleep(max(TICK_S, min(1.0, (start_ns + (sent - first) / rate * 1e9 - time.monotonic_ns()) / 1e9)))
        producer.flush(10)
        _say({"first": first, "sent": sent, "start_ns": start_ns, "rate": rate, "late_ms": round(late_ns / 1e6, 2)})


def read(servers: str, topic: str, partitions: int) -> None:
    """Note when each score can be read by a read_committed consumer: place of its event, ns, whether it is explained."""
    from confluent_kafka import Consumer, TopicPartition

    from bench.peers.workload import index_of

    index, seen, explained = array("q"), array("q"), array("b")
    stop = threading.Event()

    def follow() -> None:
        consumer = Consumer(
            {
                "bootstrap.servers": servers,
                "group.id": f"bench-reader-{time.time_ns()}",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 5,
            }
        )
        consumer.assign([TopicPartition(topic, number, 0) for number in range(partitions)])
        while not stop.is_set():
            messages = consumer.consume(1_000, 0.001)
            now = time.monotonic_ns()
            for message in messages:
                if message.error() is None:
                    value = message.value() or b""
                    start = value.index(b'"event_id":"') + 12
                    index.append(index_of(value[start : value.index(b'"', start)].decode()))
                    seen.append(now)
                    explained.append(b'"reasons":[{' in value)
        consumer.close()

    thread = threading.Thread(target=follow)
    thread.start()
    _say({"ready": 0})
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        if command == "save":
            import numpy as np

            stop.set()
            thread.join()
            np.savez(path, index=np.array(index), seen_ns=np.array(seen), explained=np.array(explained))
        _say({"count": len(index)})
    stop.set()
    thread.join()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    if sys.argv[1] == "send":
        send(asked["servers"], asked["prefix"], asked["seed"], asked["count"], Path(asked["peers"]) if asked["peers"] else None)
    else:
        read(asked["servers"], asked["topic"], asked["partitions"])
