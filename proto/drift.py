"""What drift detection says, on `churn-drift`: pages within a budget, their causes, and the action that follows."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class DriftFinding(_Record):
    """One detector that has moved."""

    series: str = Field(description="score, or the name of a feature.")
    segment: str
    detector: Literal["adwin", "psi", "ks"]
    window: Literal["block", "day", "week", "adaptive"]
    statistic: float = Field(description="Distance or shift of the mean rank; beyond `threshold`.")
    threshold: float
    before: float = Field(description="Mean rank expected by the cycle of day and week, in [0, 1].")
    after: float
    since: int = Field(description="Where the change begins, as far as the detector can tell. Epoch ms.")


class DriftCause(_Record):
    """One explanation; they come with the likeliest first."""

    nature: Literal["breakage", "behaviour", "unexplained"] = Field(
        description="breakage: records are damaged, customers are as they were."
    )
    what: str = Field(description="schema, nulls, units, duplicates, stall, coverage; volume, shift, mix, features, score.")
    topic: str
    kinds: list[str] = Field(description="Kinds of events, the likeliest first; empty = all of the topic.")
    field: str
    segments: list[str] = Field(description='"all", or those in which it shows.')
    strength: float = Field(description="How far beyond its bound, for the order of causes only.")
    features: list[str] = Field(description="Features that moved and are explained by it, the farthest first.")
    detail: str


class DriftVerdict(_Record):
    """One record on `churn-drift`, key = the episode's key. A page opens an episode; updates belong to it; over ends it.

    Reader rule: verdict_id is unique; records come once (read with isolation.level=read_committed).
    """

    schema_version: Literal[1]
    verdict_id: str
    kind: Literal["page", "update", "over"]
    episode: int = Field(description="Number of the episode since the watch began.")
    key: str = Field(description="What makes alarms one episode: nature, rule, topic.")
    at: int = Field(description="Event time up to which was looked. Epoch ms.")
    made_at: int = Field(description="Wall clock of the watch, epoch ms.")
    summary: str
    action: Literal["repair-upstream", "review-and-retrain", "look", "none"]
    causes: list[DriftCause]
    findings: list[DriftFinding]
    findings_total: int = Field(ge=0, description="All findings of the moment; `findings` holds the strongest.")
    baseline: str = Field(description="blake2b-128 of the baseline's bytes, hexadecimal.")
    budget_pages_per_30_days: float = Field(gt=0)


DRIFT_OUTPUTS: Final[dict[str, type[BaseModel]]] = {"churn-drift": DriftVerdict}
