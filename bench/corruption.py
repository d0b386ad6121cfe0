"""2,500 corrupted and hostile models, layer by layer, and against a worker's reload on a real Kafka: none is accepted, the champion serves.

    python -m bench.corruption [--cases 2500] [--no-servers] [--json]

A signature refuses every flipped bit, so what lies behind it would never be asked. Each layer is therefore also tried with the ones
before it taken away:

signature   a sealed record, damaged; a trusted key is asked
digest      the same damage, no signature: the name is the sha256 of the manifest, which names graph and tables
structure   the damage inside graph or tables, every digest made right again; and hostile graphs
golden      what the structure lets pass, opened and scored in a process of its own that may die

At `signature` and `digest` a case is wrongly accepted when the model differs from the original in any byte, at `structure` when the
graph is not one of the kind we run or a hostile one, at `golden` when golden rows score otherwise. A leaf that no golden row reaches
can only be told by digest or signature: `other_scores_without_digest` counts those.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Final

import numpy as np
import onnx
import zstandard
from onnx import helper

from bench.small_model import Small, manifest_of, small, vectors
from features.catalog import N_FEATURES
from models.artifact import MAGIC, Artifact, unpack
from models.session import Session
from models.signature import PublicKey, Signer, Trust
from proto.errors import ArtifactRejected

CASES: Final = 2_500
FLIPS: Final = 0.8
"""Share of the cases that are flipped bits; the rest: cuts, swapped pieces, zeroed runs, repeated pieces."""
LAYERS: Final = ("signature", "digest", "structure", "golden")


@dataclass(slots=True)
class Tally:
    """Of one layer. crashes: anything but ArtifactRejected, or a process that died."""

    tried: int = 0
    refused: int = 0
    unchanged: int = 0  # accepted, and the model is the original to the byte
    passed_on: int = 0  # accepted by this layer, for the next one to judge
    accepted_wrong: int = 0
    crashes: int = 0
    wrong: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {name: getattr(self, name) for name in ("tried", "refused", "unchanged", "passed_on", "accepted_wrong", "crashes", "wrong")}


def damaged(data: bytes, other: bytes, cases: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(what was done, the bytes): bits flipped at positions spread over all of it, then cuts, swaps, zeroed runs, repetitions."""
    rng = np.random.default_rng(seed)
    flips = int(cases * FLIPS)
    for position in np.linspace(0, len(data) - 1, flips).astype(int).tolist():
        changed = bytearray(data)
        changed[position] ^= 1 << int(rng.integers(8))
        yield f"flip at {position}", bytes(changed)
    for number in range(cases - flips):
        a, b = sorted(rng.integers(0, len(data), 2).tolist())
        size = int(rng.integers(1, 400))
        match number % 5:
            case 0:
                yield f"cut at {a}", data[:a]
            case 1:
                first, second = data[a : a + size], data[b : b + size]
                yield f"swap {a} and {b}", data[:a] + second + data[a + size : b] + first + data[b + size :]
            case 2:
                yield f"zeros at {a}", data[:a] + bytes(len(data[a : a + size])) + data[a + size :]
            case 3:
                yield f"repeat {a} to {b}", data[:b] + data[a:b] + data[b:]
            case _:
                yield f"another model's from {a}", data[:a] + other[a:]


def hostile() -> Iterator[tuple[str, bytes]]:
    """Graphs that want something: files, memory, endless work, code of others."""

    def changed(change: Callable[[onnx.ModelProto], None]) -> bytes:
        model = onnx.load_from_string(small().onnx)
        change(model)
        return bytes(model.SerializeToString())

    def external(location: str) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            tensor = model.graph.initializer[0]
            tensor.ClearField("int64_data")
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=location)

        return change

    def constant(shape: list[int]) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            model.graph.initializer.append(helper.make_tensor("shape", onnx.TensorProto.INT64, [len(shape)], shape))
            model.graph.node.append(helper.make_node("ConstantOfShape", ["shape"], ["huge"]))

        return change

    def loop(model: onnx.ModelProto) -> None:
        body = helper.make_graph(
            [helper.make_node("Identity", ["go"], ["on"])],
            "body",
            [
                helper.make_tensor_value_info("i", onnx.TensorProto.INT64, []),
                helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            ],
            [helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, [])],
        )
        model.graph.initializer.append(helper.make_tensor("times", onnx.TensorProto.INT64, [], [2**62]))
        model.graph.initializer.append(helper.make_tensor("yes", onnx.TensorProto.BOOL, [], [True]))
        model.graph.node.append(helper.make_node("Loop", ["times", "yes"], [], body=body))

    def node(operator: str, domain: str = "") -> Callable[[onnx.ModelProto], None]:
        return lambda model: model.graph.node.append(helper.make_node(operator, ["features"], ["x"], domain=domain))

    def function(model: onnx.ModelProto) -> None:
        opset = [helper.make_opsetid("", 17)]
        inner = helper.make_node("Again", ["a"], ["b"], domain="d")
        model.functions.append(helper.make_function("d", "Again", ["a"], ["b"], [inner], opset))  # calls itself
        model.opset_import.append(helper.make_opsetid("d", 1))
        model.graph.node.append(helper.make_node("Again", ["features"], ["x"], domain="d"))

    def opset(version: int) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            model.opset_import[0].version = version

        return change

    def attribute(name: str, values: Callable[[Any], None]) -> Callable[[onnx.ModelProto], None]:
        return lambda model: values(next(a for a in model.graph.node[0].attribute if a.name == name))

    def ints(position: int, value: int) -> Callable[[Any], None]:
        def change(found: Any) -> None:
            found.ints[position] = value

        return change

    for location in ("/etc/passwd", "../../../etc/shadow", "/dev/zero", "/proc/self/mem", ""):
        yield f"external data {location!r}", changed(external(location))
    for shape in ([2**40], [2**20, 2**20], [2**62], [-1]):
        yield f"constant of shape {shape}", changed(constant(shape))
    yield "endless loop", changed(loop)
    yield "function that calls itself", changed(function)
    for operator in ("If", "Scan", "Sequence", "RandomUniform", "StringNormalizer", "Optional", "Gemm", "MatMul", "Log", "Identity"):
        yield f"operator {operator}", changed(node(operator))
    for domain in ("com.microsoft", "ai.onnx.contrib", "custom", "ai.onnx.preview.training"):
        yield f"operator of {domain}", changed(node("PyCustomOp", domain))
    for version in (0, -1, 1, 16, 18, 2**31, 2**62):
        yield f"opset {version}", changed(opset(version))
    for name in (
        "nodes_featureids",
        "nodes_truenodeids",
        "nodes_falsenodeids",
        "nodes_treeids",
        "nodes_nodeids",
        "class_ids",
        "class_nodeids",
    ):
        for value in (-1, 2**31, 2**62):
            yield f"{name} {value}", changed(attribute(name, ints(0, value)))
    for count in (10**5, 10**6):
        yield f"{count} bytes of nothing", b"\x0a" + bytes(count)
    yield "a graph of 64 MiB", b"\x00" * (64 << 20)
    yield "nested deeply", b"\x3a\x7e" * 20_000


def sealed_with(model: Small, onnx_bytes: bytes, tables: bytes) -> bytes:
    """An envelope around any bytes whatever, every digest right: what somebody who may sign can send."""
    manifest = manifest_of(model.onnx, model.tables).model_copy(
        update={"onnx_sha256": sha256(onnx_bytes).hexdigest(), "tables_sha256": sha256(tables).hexdigest()}
    )
    canonical = manifest.canonical()
    parts = (MAGIC, len(canonical).to_bytes(4, "little"), canonical, len(onnx_bytes).to_bytes(4, "little"), onnx_bytes, tables)
    return zstandard.compress(b"".join(parts))


def same(found: Artifact, model: Small) -> bool:
    """Whether it is the model to the byte."""
    return found.manifest == model.manifest and found.onnx == model.onnx and found.tables.encode() == model.tables.encode()


def well_formed(found: Artifact) -> bool:
    """What the structure check promises: every index inside, every number finite, every walk ends."""
    f = found.forest
    branch = f.feature >= 0
    at = np.arange(f.n_nodes)
    return bool(
        np.all(f.feature < N_FEATURES)
        and np.all((f.yes[branch] > at[branch]) & (f.yes[branch] < f.n_nodes) & (f.no[branch] > at[branch]) & (f.no[branch] < f.n_nodes))
        and np.all(np.isfinite(f.weight))
        and np.all(np.isfinite(f.value))
        and np.isfinite(f.base)
    )


def judge(tally: Tally, name: str, act: Callable[[], Any], verdict: Callable[[Any], str]) -> Any:
    """Run one case; `verdict` of what was accepted is "unchanged", "passed_on" or what is wrong with it. The accepted, or None."""
    tally.tried += 1
    try:
        found = act()
    except ArtifactRejected:
        tally.refused += 1
        return None
    except BrokenProcessPool:
        raise
    except Exception as error:  # exactly what is looked for
        tally.crashes += 1
        tally.wrong.append(f"{name}: {type(error).__name__}: {error}"[:200])
        return None
    match verdict(found):
        case "unchanged":
            tally.unchanged += 1
        case "passed_on":
            tally.passed_on += 1
        case what:
            tally.accepted_wrong += 1
            tally.wrong.append(f"{name}: {what}"[:200])
    return found


def layers(cases: int, seed: int = 0) -> dict[str, Any]:
    """Tallies by layer, and how many models that score otherwise somewhere only a digest could tell."""
    model, other = small(), small(seed=5)
    digest = model.manifest.digest
    signer, trust = signing()
    tallies = {name: Tally() for name in LAYERS}
    sealed, sealed_other = (signer.seal(each.envelope, each.manifest.digest) for each in (model, other))

    for name, value in damaged(sealed, sealed_other, cases, seed):
        judge(tallies["signature"], name, partial(trust.open, value, digest), lambda found: "" if found == model.envelope else "opened")

    def verdict(found: Artifact) -> str:
        return "unchanged" if same(found, model) else "another model under this name"

    for name, value in damaged(model.envelope, other.envelope, cases, seed + 1):
        judge(tallies["digest"], name, partial(unpack, value, digest=digest), verdict)
    passed: list[tuple[str, Artifact]] = []

    def structure(name: str, envelope: bytes, wrong: str = "") -> None:
        def of(found: Artifact) -> str:
            if wrong or not well_formed(found):
                return wrong or "not well formed"
            return "unchanged" if found.onnx == model.onnx and found.tables.encode() == model.tables.encode() else "passed_on"

        found = judge(tallies["structure"], name, lambda: unpack(envelope), of)
        if found is not None and not wrong:
            passed.append((name, found))

    tables, tables_other = model.tables.encode(), other.tables.encode()
    graphs = round(cases * len(model.onnx) / (len(model.onnx) + len(tables)))
    for name, value in damaged(model.onnx, other.onnx, graphs, seed + 2):
        structure(f"graph, {name}", sealed_with(model, value, tables))
    for name, value in damaged(tables, tables_other, cases - graphs, seed + 3):
        structure(f"tables, {name}", sealed_with(model, model.onnx, value))
    for name, value in hostile():
        structure(f"hostile, {name}", sealed_with(model, value, tables), "a hostile graph was accepted")
    elsewhere = golden(tallies["golden"], passed)
    return {"layers": {name: tally.as_dict() for name, tally in tallies.items()}, "other_scores_without_digest": elsewhere}


def signing() -> tuple[Signer, Trust]:
    """A key of this run."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    signer = Signer("bench", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())
    public = PublicKey(key.public_key().public_bytes_raw(), "bench")
    return signer, Trust({public.key_id: public})


def golden(tally: Tally, passed: list[tuple[str, Artifact]]) -> int:
    """Open and score what got so far, in a process that may die. How many of the accepted score 500 other vectors otherwise."""
    elsewhere = 0
    pool = ProcessPoolExecutor(1)
    try:
        for name, artifact in passed:
            try:
                job = pool.submit(_prove, artifact.onnx, artifact.tables.golden, artifact.tables.golden_probability)
                found = judge(tally, name, job.result, lambda found: "passed_on" if found["sound"] else "no probability")
            except BrokenProcessPool:
                tally.crashes += 1
                tally.wrong.append(f"{name}: the process died")
                pool = ProcessPoolExecutor(1)
                continue
            elsewhere += bool(found is not None and not found["same"])
    finally:
        pool.shutdown()
    return elsewhere


def _prove(graph_bytes: bytes, rows: Any, expected: Any) -> dict[str, bool]:
    session = Session(graph_bytes)
    session.prove(rows, expected)
    x = vectors(500, 77)
    scores = session.probabilities(x)
    original = Session(small().onnx).probabilities(x)
    return {"sound": bool(np.all((scores >= 0) & (scores <= 1))), "same": scores.tobytes() == original.tobytes()}


def served(settings: Any, cases: int, *, signed: bool, seed: int = 0) -> dict[str, Any]:
    """A worker's reload on a real Kafka while every case is put under the champion's name: what it did, and whether it stayed."""
    import threading

    from confluent_kafka import Producer

    from models import registry
    from models.desk import Desk
    from scoring.fallback import Fallback
    from scoring.scorer import load
    from streams.metrics import Metrics
    from streams.reload import Reload, ReloadSettings
    from streams.topics import client_config, create, producer_config

    create(settings)
    topic, producer, metrics = settings.prefixed("churn-models"), producer_config(settings), Metrics()
    signer, trust = signing() if signed else (Signer("bench"), Trust())
    good, other, wanted = small(), small(seed=5), small(seed=6)
    digest = wanted.manifest.digest
    desk = Desk(producer, topic, signer, trust, lambda: 0)
    desk.publish(good.envelope)
    desk.promote(good.manifest.digest)
    reload = Reload(ReloadSettings(client_config(settings), topic, 30), load, Fallback(0.5), metrics, trust)
    reload.start()
    probe = vectors(16, 3)
    expected = reload.current().score(probe).tobytes()
    looked, strayed, stop = 0, 0, threading.Event()

    def watch() -> None:
        nonlocal looked, strayed
        while not stop.wait(0.002):
            current = reload.current()
            looked += 1
            strayed += current.digest != good.manifest.digest or current.score(probe).tobytes() != expected

    watcher = threading.Thread(target=watch)
    watcher.start()

    def rejected() -> float:
        return sum(
            metrics.registry.get_sample_value("churn_models_rejected_total", {"what": what}) or 0 for what in ("artifact", "signature")
        )

    def until(condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end and reload.failure is None:
            time.sleep(0.02)
        return condition()

    sound = signer.seal(wanted.envelope, digest)
    corpus = list(damaged(sound, signer.seal(other.envelope, other.manifest.digest), cases, seed))
    for name, value in hostile():
        if len(value) < 1 << 20:
            corpus.append((name, signer.seal(sealed_with(wanted, value, wanted.tables.encode()), digest)))
    # The first one before the decision: nothing sound ever lies under the name.
    registry.send(producer, topic, f"artifact/{digest}", corpus[0][1])
    decision = desk.published.ledger.next("promote", digest, "1", signer, 0, alias="champion", former=good.manifest.digest)
    registry.send(producer, topic, decision.key, decision.encode())
    registry.send(producer, topic, "alias/champion", decision.encode())
    client = Producer({**producer, "compression.type": "none", "linger.ms": 5})
    for _, value in corpus[1:]:
        client.produce(topic, value, f"artifact/{digest}")
        client.poll(0)
    client.flush(60)
    harmless = 0
    if not signed:
        for _, value in corpus:
            try:
                harmless += same(unpack(value, digest=digest), wanted)
            except ArtifactRejected:
                continue
    all_seen = until(lambda: rejected() >= len(corpus) - harmless, 300)
    stop.set()
    watcher.join()
    registry.send(producer, topic, f"artifact/{digest}", sound)
    recovered = until(lambda: reload.current().digest == digest, 30)
    failure = reload.failure
    reload.stop()
    return {
        "cases": len(corpus),
        "refused": int(rejected()),
        "harmless": harmless,
        "all_seen": all_seen,
        "looks": looked,
        "looks_without_champion": int(strayed) if not harmless else None,
        "thread_failures": int(failure is not None),
        "sound_one_taken_afterwards": recovered,
    }


def main() -> int:
    """Measure, print, and fail when anything was accepted that should not be, or crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--no-servers", action="store_true", help="the layers alone, without a worker's reload on Kafka")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    figures = layers(arguments.cases)
    figures["cases"] = arguments.cases
    figures["hostile"] = sum(1 for _ in hostile())
    tallies = figures["layers"].values()
    figures["accepted_wrong"] = sum(tally["accepted_wrong"] for tally in tallies)
    figures["crashes"] = sum(tally["crashes"] for tally in tallies)
    failed = figures["accepted_wrong"] or figures["crashes"]
    if not arguments.no_servers:
        from streams.settings import load
        from streams.stack import from_settings, up
        from streams.trial import Trial

        started = up(load())
        try:
            for signed in (True, False):
                trial = Trial(load(), started.endpoints.kafka, started.endpoints.redis, "corruption")
                found = served(trial.settings, arguments.cases, signed=signed)
                figures["reload_signed" if signed else "reload_unsigned"] = found
                failed = failed or found["looks_without_champion"] or found["thread_failures"] or not found["all_seen"]
        finally:
            if started.started:
                from_settings(load()).down(started.started)
    figures["seconds"] = round(time.perf_counter() - begin, 1)
    if not arguments.json:
        for name, tally in figures["layers"].items():
            print(name, tally, file=sys.stderr)
    print(json.dumps(figures))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
