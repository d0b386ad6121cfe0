"""What became of customers, on `churn-outcomes`: labels, interventions, answers and opinions, to be joined to past scores."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

KINDS: Final = ("churned", "stayed", "intervention", "campaign_response", "feedback")
Id = Annotated[str, Field(min_length=1, max_length=256)]


class Outcome(BaseModel):
    """One record on `churn-outcomes`, key = customer_id. An outcome_id counts once; the first record wins."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    outcome_id: Id
    customer_id: Id = Field(description="Equals the record key (UTF-8).")
    at: int = Field(ge=946_684_800_000, description="When it happened, or up to when the customer is known to have stayed. Epoch ms.")
    kind: Literal["churned", "stayed", "intervention", "campaign_response", "feedback"]
    campaign: str = Field("", max_length=256, description="Interventions and responses: which campaign.")
    arm: Literal["treatment", "holdout"] | None = Field(None, description="Interventions: whether the customer was treated or held out.")
    score_id: str = Field("", max_length=256, description="Interventions and feedback: the score that was acted on or judged.")
    accepted: bool | None = Field(None, description="Campaign responses: whether the offer was taken.")
    agrees: bool | None = Field(None, description="Feedback of a business user: whether the score is believed.")
    value_minor: int | None = Field(
        None, ge=0, description="Yearly value of the customer at that time, minor units of the account currency."
    )
    cost_minor: int | None = Field(None, ge=0, description="Interventions: what it cost, minor units.")
    note: str = Field("", max_length=2_000)

    @model_validator(mode="after")
    def _whole(self) -> Outcome:
        if self.kind == "intervention" and self.arm is None:
            raise ValueError("an intervention needs its arm: treatment or holdout")
        if self.kind == "campaign_response" and self.accepted is None:
            raise ValueError("a campaign_response needs accepted")
        if self.kind == "feedback" and self.agrees is None:
            raise ValueError("feedback needs agrees")
        return self


OUTCOME_INPUTS: Final[dict[str, type[BaseModel]]] = {"churn-outcomes": Outcome}
