"""Output records as bytes: one score per scored event, one dead letter per record set aside."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from features.blake2b import blake2b_rows
from features.catalog import LAYOUT_HASH
from features.facts import SILENCE, SOURCES, TIME, TOPICS
from features.written import Field, Pieces, fill
from proto.errors import Reason
from proto.scores import BANDS, SCHEMA_VERSION
from streams.merge import Batch

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


class Model(Protocol):
    """What turns vectors into scores (scoring.scorer.Scorer, scoring.fallback.Fallback); `digest` is "" for the fallback."""

    @property
    def digest(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def threshold_version(self) -> str: ...
    @property
    def edges(self) -> Sequence[float]:
        """Where the medium and the high band begin; nothing for a fallback."""
        ...

    @property
    def fallback(self) -> bool: ...
    @property
    def reasons_method(self) -> str: ...

    def score(self, vectors: FloatArray) -> FloatArray:
        """Probabilities, shape (k,); NaN where it fails on a vector."""
        ...

    def bands(self, probability: FloatArray) -> ByteArray:
        """Band codes, shape (k,), positions in proto.scores.BANDS; "unknown" of NaN."""
        ...

    def reasons(self, vectors: FloatArray, band: ByteArray, former: ByteArray, top: int) -> list[bytes]:
        """Per score the strongest reasons as JSON; an empty list where the band is low and has not moved."""
        ...


@dataclass(frozen=True, slots=True)
class Scored:
    """The k scored records of a batch: `rows` are their positions in it, the rest is aligned with `rows`."""

    rows: npt.NDArray[np.intp] | IntArray
    customers: Sequence[str]
    at: IntArray
    late: npt.NDArray[np.bool_]
    vectors: FloatArray
    probability: FloatArray
    band: ByteArray
    former_alert: ByteArray  # band last alerted before the score
    alert: ByteArray  # and with it
    former_source: npt.NDArray[np.int8]  # of the customer's score before it, index into SOURCES; -1 when there was none
    former_offset: IntArray
    reasons: Sequence[bytes]


def judged(model: Model, fallback: Model, vectors: FloatArray) -> tuple[FloatArray, ByteArray]:
    """Probability and band of each vector. Where the model fails the fallback's, whose band says so: one row costs no batch."""
    probability = model.score(vectors)
    band = model.bands(probability)
    failed = np.isnan(probability)
    if failed.any():
        probability = np.where(failed, fallback.score(vectors), probability)
        band = np.where(failed, fallback.bands(probability), band)
    return probability, band


def together(pieces: Sequence[Scored]) -> Scored:
    """All of them, one after the other; `rows` stay as they are."""
    columns: dict[str, Any] = {}
    for column in fields(Scored):
        parts = [getattr(piece, column.name) for piece in pieces]
        columns[column.name] = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [x for part in parts for x in part]
    return Scored(**columns)


def vector_hashes(vectors: FloatArray) -> list[str]:
    """blake2b-128 of each row's float32 little-endian bytes, in hex."""
    return [digest.tobytes().hex() for digest in blake2b_rows(vectors)]


_FIELD: Final = b"\0"
_SHAPE: Final = (
    b'{"score_id":"\0-%d-\0","customer_id":\0,"event_id":\0,"event_time":\0,"at":\0,"scored_at":%d,"probability":\0,"band":"\0",'
    b'"alert_band":"\0","threshold_version":%b,"model_name":%b,"model_version":%b,"model_digest":%b,"layout_hash":"%b",'
    b'"vector_hash":"\0","cause":"\0","late":\0,"fallback":\0,"supersedes":\0,"reasons":\0,"reasons_method":%b,'
    b'"source":{"topic":"\0","partition":%d,"offset":\0},"cut":{%b},"schema_version":%d}'
)
"""A score record with its fields left open; no text in JSON holds the byte 0."""
_CUT: Final = b",".join(b'"%b":\0' % name.encode() for name in TOPICS)
_TOPIC_BYTES: Final = tuple(name.encode() for name in SOURCES)
_BAND_BYTES: Final = tuple(band.encode() for band in BANDS)
_LOW: Final = BANDS.index("low")
_UNKNOWN: Final = BANDS.index("unknown")
_CAUSE_BYTES: Final = (b"event", b"late", b"silence")
_BOOL_BYTES: Final = (b"false", b"true")


def score_records(batch: Batch, model: Model, scored_at_ms: int, scored: Scored) -> list[dict[str, Any]]:
    """Score records as {"key", "value"} in merge order. A pure function of its arguments: a repeated batch gives equal bytes."""
    rows, count = scored.rows, len(scored.rows)
    if not count:
        return []
    text = msgspec.json.encode
    shape = _SHAPE % (
        batch.partition,
        scored_at_ms,
        text(model.threshold_version),
        text(model.name),
        text(model.version),
        text(model.digest),
        LAYOUT_HASH.encode(),
        text(model.reasons_method),
        batch.partition,
        _CUT,
        SCHEMA_VERSION,
    )
    event_id = batch.event_id if count == len(batch) else [batch.event_id[row] for row in rows.tolist()]
    pieces = Pieces()
    topic, offset = pieces.choice(_TOPIC_BYTES, batch.topic[rows]), batch.offset[rows]
    fields: list[Field] = [
        topic,
        offset,
        pieces.array(text(scored.customers), count),
        pieces.array(text(event_id), count),
        batch.facts[rows, TIME],
        scored.at,
        pieces.array(text(scored.probability.astype(np.float64).tolist()), count),
        pieces.choice(_BAND_BYTES, scored.band),
        pieces.choice(_BAND_BYTES, scored.alert),
        blake2b_rows(scored.vectors),
        pieces.choice(_CAUSE_BYTES, np.where(batch.topic[rows] == SILENCE, 2, scored.late)),
        pieces.choice(_BOOL_BYTES, scored.late.view(np.uint8)),
        pieces.choice(_BOOL_BYTES, (scored.band == _UNKNOWN).view(np.uint8)),
        _superseded(pieces, batch.partition, scored),
        pieces.each(scored.reasons),
        topic,
        offset,
        *batch.cuts()[rows].T,
    ]
    return _records(shape, fields, pieces, scored.customers)


def _superseded(pieces: Pieces, partition: int, scored: Scored) -> Field:
    """The id of the score that each late one corrects, as JSON: the customer's last one before it."""
    names = [b"null"]
    which = np.zeros(len(scored.rows), np.intp)
    for i in np.flatnonzero(scored.late & (scored.former_source >= 0)).tolist():
        which[i] = len(names)
        names.append(b'"%b-%d-%d"' % (SOURCES[scored.former_source[i]].encode(), partition, scored.former_offset[i]))
    return pieces.choice(names, which)


def crossed(former: ByteArray, alert: ByteArray) -> npt.NDArray[np.bool_]:
    """Which scores are alerts, from the alert band before and with each; a first one that is low is none."""
    alerts: npt.NDArray[np.bool_] = (former != alert) & ((former != 0) | (alert > _LOW))
    return alerts


_ALERT: Final = (
    b'{"schema_version":%d,"alert_id":"\0-%d-\0","customer_id":\0,"event_id":\0,"event_time":\0,"at":\0,"scored_at":%d,"from_band":"\0",'
    b'"to_band":"\0","probability":\0,"thresholds":%b,"hysteresis":%b,"threshold_version":%b,"model_name":%b,"model_version":%b,'
    b'"model_digest":%b,"source":{"topic":"\0","partition":%d,"offset":\0},"cut":{%b}}'
)
"""An alert likewise."""


def alert_records(batch: Batch, model: Model, hysteresis: float, scored_at_ms: int, scored: Scored) -> list[dict[str, Any]]:
    """The alerts among the scores of a batch, as {"key", "value"} in merge order; a pure function of its arguments."""
    alerts = np.flatnonzero(crossed(scored.former_alert, scored.alert))
    count = len(alerts)
    if not count:
        return []
    text, rows, picks = msgspec.json.encode, scored.rows[alerts], alerts.tolist()
    shape = _ALERT % (
        SCHEMA_VERSION,
        batch.partition,
        scored_at_ms,
        text(dict(zip(BANDS[_LOW + 1 :], model.edges, strict=False))),
        text(hysteresis),
        text(model.threshold_version),
        text(model.name),
        text(model.version),
        text(model.digest),
        batch.partition,
        _CUT,
    )
    customers = [scored.customers[i] for i in picks]
    pieces = Pieces()
    topic, offset = pieces.choice(_TOPIC_BYTES, batch.topic[rows]), batch.offset[rows]
    fields: list[Field] = [
        topic,
        offset,
        pieces.array(text(customers), count),
        pieces.array(text([batch.event_id[row] for row in rows.tolist()]), count),
        batch.facts[rows, TIME],
        scored.at[alerts],
        pieces.choice(_BAND_BYTES, scored.former_alert[alerts]),
        pieces.choice(_BAND_BYTES, scored.alert[alerts]),
        pieces.array(text(scored.probability[alerts].astype(np.float64).tolist()), count),
        topic,
        offset,
        *batch.cuts()[rows].T,
    ]
    return _records(shape, fields, pieces, customers)


def _records(shape: bytes, fields: Sequence[Field], pieces: Pieces, keys: Sequence[str]) -> list[dict[str, Any]]:
    together, ends = fill(shape.split(_FIELD), fields, pieces.joined(), len(keys))
    return [{"key": key, "value": together[start:end]} for key, start, end in zip(keys, [0, *ends], ends, strict=False)]


def dead_letter_record(batch: Batch, row: int, reason: Reason, cut: Sequence[int]) -> dict[str, Any]:
    """The dead letter of one record of a batch: where it came from, why, and its original bytes in base64. cut: its row of `cuts`."""
    message = batch.messages[row]
    key, value = message.key(), message.value()
    body = {
        "schema_version": SCHEMA_VERSION,
        "reason": reason.name.lower(),
        "detail": batch.detail.get(row, ""),
        "source": {"topic": TOPICS[int(batch.topic[row])], "partition": batch.partition, "offset": int(batch.offset[row])},
        "cut": dict(zip(TOPICS, cut, strict=True)),
        "append_time": int(batch.append_ms[row]),
        "key": None if key is None else b64encode(key).decode(),
        "value": None if value is None else b64encode(value).decode(),
    }
    return {"key": key, "value": orjson.dumps(body)}
