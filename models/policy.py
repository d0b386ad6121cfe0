"""What is required of a model before it goes into service, as figures a business can change; and what holds where nobody can reach it."""

import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proto.errors import BadInput

Share = Annotated[float, Field(ge=0, le=1)]
Group = Literal["plan", "segment", "region", "age_band"]
GROUPS: Final[tuple[Group, ...]] = ("plan", "segment", "region", "age_band")
"""Groups of a report, in the order of models.dataset.PROFILE_COLUMNS."""


class Policy(BaseModel):
    """Bounds of all gates, each on the test rows of a named label. docs/decisions/attainable-gates.md says what `near` and `strict` do."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    auc: Share = Field(0.85, description="Area under the ROC curve, at least.")
    precision_high: Share = Field(0.85, description="Precision in the high band, at least.")
    precision_contact: Share = Field(0.80, description="Precision from the contact (medium) threshold on, at least.")
    recall_contact: Share = Field(0.80, description="Recall there, at least.")
    f1_contact: Share = Field(0.82, description="F1 there, at least.")
    calibration_error: Share = Field(0.02, description="Expected calibration error, at most.")
    protected: tuple[Group, ...] = Field(("age_band",), description="Groups whose churned customers have to be found equally often.")
    fairness: Share = Field(0.10, description="Equal opportunity difference between two of them, at most (lower end of its interval).")
    group_churned: int = Field(50, ge=2, description="A group with fewer churned rows is reported and not judged.")
    noise: Share = Field(0.02, description="AUC lost when every value is off by 5 %, at most.")
    spike: Share = Field(0.05, description="AUC lost when everything of the last 7 days came ten times, at most.")
    source: Share = Field(0.60, description="AUC when a source is silent, for each source but the one that says most, at least.")
    latency_us: float = Field(100.0, gt=0, description="Microseconds of CPU per row in batches of 512, at most.")
    near: Share = Field(0.03, description="How far below the observer a figure may lie that the observer does not reach either.")
    strict: bool = Field(False, description="Never excuse a gate.")

    @property
    def performance(self) -> dict[str, float]:
        """Bounds of the figures of models.attainable.figures, by name."""
        return {name: getattr(self, name) for name in PERFORMANCE}


PERFORMANCE: Final = ("auc", "precision_high", "precision_contact", "recall_contact", "f1_contact", "calibration_error")


def load(path: Path) -> Policy:
    """A policy file (TOML, the names of Policy; what is left out keeps its default). Raises BadInput naming what is wrong with it."""
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BadInput(f"gates {path}: {error.strerror}; give a TOML file of bounds, e.g. recall_contact = 0.7") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(f"gates {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise BadInput(f"gates {path}: {error}") from error
