"""A model of a stated size for benchmarks: fitted on vectors of the measured stream, with a label that means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from features.catalog import LAYOUT_HASH, N_FEATURES, NAMES
from features.facts import TIME, TOPICS
from features.history import Histories
from streams.codec import Decoder
from streams.settings import Settings
from streams.topics import client_config, producer_config

if TYPE_CHECKING:
    from models.artifact import Manifest
    from models.session import Session

SAMPLE: Final = 60_000
CHUNK: Final = 1 << 15
NOT_LOW: Final = 0.21
"""Share of the sample's rows above the medium threshold: these get reasons, and those that moved to another band."""


def vectors(settings: Settings, count: int = SAMPLE) -> npt.NDArray[np.float32]:
    """About `count` vectors from all over the events on the input topics, stepped in event-time order.

    Not of the first events: windows are still filling there, and a threshold fitted to those says little about the others.
    """
    from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

    decoder = Decoder(
        currency=settings.currency,
        rates={},
        future_ms=settings.future_allowance_ms,
        max_bytes=settings.max_event_bytes,
        digest_key=settings.digest_key.get_secret_value().encode(),
    )
    consumer = Consumer({**client_config(settings), "group.id": "bench-sample", "auto.offset.reset": "earliest"})
    found: dict[tuple[str, int], list[Any]] = {}
    try:
        names = [settings.prefixed(topic) for topic in TOPICS]
        consumer.assign([TopicPartition(name, number, OFFSET_BEGINNING) for name in names for number in range(settings.partitions)])
        while messages := consumer.consume(5_000, 2.0):
            for message in messages:
                found.setdefault((message.topic() or "", message.partition() or 0), []).append(message)
    finally:
        consumer.close()
    parts = [decoder.decode(names.index(name), partition, messages) for (name, partition), messages in found.items()]
    facts = np.concatenate([part.facts[part.reason == 0] for part in parts])
    customers = [name for part in parts for name, reason in zip(part.customer, part.reason.tolist(), strict=True) if not reason]
    order, histories = np.argsort(facts[:, TIME], kind="stable"), Histories(create=True)
    pieces, stride = [], max(1, len(order) // count)
    for first in range(0, len(order), CHUNK):
        these = order[first : first + CHUNK]
        pieces.append(histories.step([customers[i] for i in these.tolist()], facts[these]).vectors[::stride].copy())
    return np.concatenate(pieces)


def labels(x: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """A noisy rule over a few features, about 15 % positive: it makes trees grow to their full depth."""
    column = {name: np.nan_to_num(x[:, i].astype(np.float64)) for i, name in enumerate(NAMES)}
    risk = (
        0.4 * np.log1p(column["ticket_count_30d"])
        + 0.1 * column["login_age_days"]
        - 0.25 * np.log1p(column["purchase_count_30d"])
        + 1.5 * column["failed_login_share_7d"]
        - 0.1 * np.log1p(column["login_count_7d"])
        + 0.3 * np.sin(column["spend_minor_mean_90d"] / 900)
        + np.random.default_rng(3).normal(0, 0.8, len(x))
    )
    return (risk > np.quantile(risk, 0.85)).astype(np.int8)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model packed for publishing, and the session that says what it scores."""

    manifest: Manifest
    envelope: bytes
    session: Session

    def publish(self, settings: Settings) -> str:
        """Make it the champion; returns the digest."""
        from models import registry

        registry.publish(producer_config(settings), settings.prefixed("churn-models"), self.manifest, self.envelope)
        return self.manifest.digest


def fit(
    x: npt.NDArray[np.float32], *, trees: int, depth: int, columns: Sequence[int] = range(N_FEATURES), not_low: float = NOT_LOW
) -> Fitted:
    """Fit on the given columns of vectors (rows, N_FEATURES); `not_low` of these rows lie above the medium threshold."""
    import xgboost

    from models import export, gates, graph
    from models.artifact import Calibration, Manifest, Tables, Thresholds, pack
    from models.calibrate import Platt
    from models.session import Session

    chosen = np.array(columns, np.intp)
    data = xgboost.DMatrix(x[:, chosen], label=labels(x))
    # One thread: beside other programs two wait for each other most of the time.
    options = {"objective": "binary:logistic", "tree_method": "hist", "max_depth": depth, "eta": 0.05, "seed": 1, "nthread": 1}
    booster = xgboost.train(options, data, trees)
    margin = np.asarray(booster.predict(xgboost.DMatrix(x[:, chosen]), output_margin=True), np.float64)
    forest = export.forest_of(booster, chosen, Platt(1.0, 0.0))
    onnx = graph.write(forest, N_FEATURES)
    session = Session(onnx)
    probability = Platt(1.0, 0.0).probabilities(margin)
    medium, high = (round(float(np.quantile(probability, 1 - share)), 6) for share in (not_low, not_low / 4))
    passed = gates.check_scores(session, x[:5_000], probability[:5_000], (medium, high))
    golden = x[:: len(x) // 64]
    tables = Tables(export.shares(forest, export.covers(booster)), golden, session.probabilities(golden))
    manifest = Manifest(
        name="bench",
        version=f"{trees}x{depth}" + ("" if len(chosen) == N_FEATURES else f"-{len(chosen)}"),
        layout_hash=LAYOUT_HASH,
        features_used=[NAMES[column] for column in chosen.tolist()],
        onnx_sha256=sha256(onnx).hexdigest(),
        tables_sha256=sha256(tables.encode()).hexdigest(),
        calibration=Calibration(slope=1.0, offset=0.0),
        thresholds=Thresholds(medium=medium, high=high, version="bench"),
        label={"name": "none"},
        data={"rows": len(x)},
        training={"trees": trees, "depth": depth, "nodes": forest.n_nodes},
        metrics={},
        baseline={},
        gates=passed.as_dict(),
        runtime={},
    )
    return Fitted(manifest, pack(manifest, onnx, tables), session)


def publish_model(settings: Settings, *, trees: int, depth: int, not_low: float = NOT_LOW) -> str:
    """Fit on events of the input topics and publish as champion; returns the digest."""
    return fit(vectors(settings), trees=trees, depth=depth, not_low=not_low).publish(settings)
