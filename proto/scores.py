"""What leaves the service: score, dead-letter and model-alias records as documented contracts."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from proto.errors import Reason as DeadLetterReason

SCHEMA_VERSION: Final = 1
"""Grows only with an incompatible change; fields may be added without one, so readers ignore those they do not know."""

BANDS: Final = ("unknown", "low", "medium", "high")
"""Band by code; 0 marks a fallback score, and "no score yet" in stored state."""

Offset = Annotated[int, Field(ge=-1)]
Band = Literal["low", "medium", "high", "unknown"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Source(_Record):
    """The input record that caused this one."""

    topic: str
    partition: int
    offset: int


class ScoreReason(_Record):
    """A feature that moved the score."""

    feature: str
    value: float | None = Field(description="The feature's value; null = unknown.")
    contribution: float = Field(description="What it adds to the margin (log-odds); positive raises the risk.")
    text: str


class ScoreRecord(_Record):
    """One record on `churn-scores`, key = customer_id. With `cut` and the digests in it the score can be recomputed bit for bit.

    Reader rule: records of one (source topic, source partition) come in offset order; drop those not above the highest seen.
    """

    schema_version: Literal[1]
    score_id: str = Field(description="<topic>-<partition>-<offset> of the source.")
    customer_id: str
    event_id: str
    event_time: int = Field(description="Epoch ms.")
    at: int = Field(description="Instant the vector is evaluated at: max(event_time, the customer's newest). Epoch ms.")
    scored_at: int = Field(description="Wall clock of the worker, epoch ms.")
    probability: float = Field(ge=0, le=1, description="Calibrated probability of churn; the float32 value written in full.")
    band: Band = Field(description="unknown: a fallback.")
    alert_band: Band = Field(
        "unknown", description="The band the customer was last alerted at, this score included; unknown: no model has scored it yet."
    )
    threshold_version: str
    model_name: str
    model_version: str
    model_digest: str = Field(description="sha256 of the manifest, hexadecimal; empty when there was no model.")
    layout_hash: str
    vector_hash: str = Field(description="blake2b-128 of the vector's little-endian float32 bytes, hexadecimal.")
    cause: Literal["event", "late", "silence"] = Field(
        description="event: of the event itself; late: the event lies before the customer's newest; silence: no event, time has passed."
    )
    late: bool = Field(description="event_time lies before the customer's newest.")
    fallback: bool = Field(
        description="Made without a model; or the model that is named failed on this vector: probability and band are the fallback's."
    )
    supersedes: str | None = Field(
        description="late: score_id of the customer's last score before this one, null when there was none; else null."
    )
    reasons: list[ScoreReason] = Field(description="Strongest first; empty where the band is low and has not moved.")
    reasons_method: Literal["treeshap", "saabas"]
    source: Source
    cut: dict[str, Offset] = Field(description="Per input topic the highest offset handled up to and including this event; -1 = none.")


class AlertThresholds(_Record):
    """Where the bands of the model begin; the edge itself belongs to the higher band."""

    medium: float
    high: float


class AlertRecord(_Record):
    """One record on `churn-alerts`, key = customer_id: the score that moved a customer from one alert band to another.

    A higher band is alerted at once, a lower one when the probability is `hysteresis` below the threshold (at most half of it).
    A first score that is low is no alert. Reader rule as for scores.
    """

    schema_version: Literal[1]
    alert_id: str = Field(description="score_id of the score that crossed.")
    customer_id: str
    event_id: str
    event_time: int = Field(description="Epoch ms.")
    at: int = Field(description="Instant of the score, epoch ms.")
    scored_at: int = Field(description="Wall clock of the worker, epoch ms.")
    from_band: Band = Field(description="unknown: the customer's first score by a model.")
    to_band: Literal["low", "medium", "high"] = Field(description="Also the band of the score.")
    probability: float = Field(ge=0, le=1, description="The float32 value written in full.")
    thresholds: AlertThresholds
    hysteresis: float = Field(ge=0, description="CHURN_ALERT_HYSTERESIS, as probability.")
    threshold_version: str
    model_name: str
    model_version: str
    model_digest: str = Field(description="sha256 of the manifest, hexadecimal.")
    source: Source
    cut: dict[str, Offset] = Field(description="Per input topic the highest offset handled up to and including this event; -1 = none.")


class DeadLetter(_Record):
    """One record on `churn-dead-letters`: a record that could not be handled, with its original bytes."""

    schema_version: Literal[1]
    reason: str = Field(description="Lower-case reason code.", json_schema_extra={"enum": [r.name.lower() for r in DeadLetterReason if r]})
    detail: str
    source: Source
    cut: dict[str, Offset] | None = Field(
        None, description="Per input topic the highest offset handled up to and including this record; -1 = none. Version 0.1.0 wrote none."
    )
    append_time: int = Field(description="When the broker wrote the record, epoch ms.")
    key: str | None = Field(description="Original key, base64; null = none.")
    value: str | None = Field(description="Original value, base64; null = none.")


class ModelAlias(_Record):
    """Value of `alias/<name>` on `churn-models`."""

    digest: str = Field(description="Key suffix of the artifact record `artifact/<digest>`.")
    version: str


OUTPUTS: Final[dict[str, type[BaseModel]]] = {
    "churn-scores": ScoreRecord,
    "churn-alerts": AlertRecord,
    "churn-dead-letters": DeadLetter,
    "churn-models-alias": ModelAlias,
}
