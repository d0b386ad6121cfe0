"""What "churned" means: versioned definitions, and the answer for any customer and instant once it can be known."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from features.catalog import PURCHASE
from features.facts import KIND, KINDS, LEVEL, NONE, PROFILE, TIME
from features.window import DAY_MS
from proto.errors import BadInput

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Kind = Literal["inactivity", "event", "expiry"]

CHURNED, STAYED, UNKNOWN = 1, 0, -1
DEFINITIONS: Final = Path(__file__).parent / "definitions"
_FAR: Final = 2**44
"""Beyond every event time (the year 2527): customer * _FAR + time sorts by customer, then time."""


@dataclass(frozen=True, slots=True)
class Label:
    """The question put to the model at an instant; docs/models.md has it in words.

    kind: "inactivity" = none of `events` in the horizon; "event" = one of them in it; "expiry" = the contract known then ends in the
    horizon, and none of `events` until `grace_days` after its end. The horizon is (at + gap, at + gap + days].
    Population: one of `active_by` in (at - active_days, at] and none of `unless` in it, as known then; the newest of `active_by` at least
    `settled_days` old; with `within_contract` the contract known then lasts to the end of the horizon or longer.
    """

    days: int = 90
    active_days: int = 180
    kind: Kind = "inactivity"
    events: tuple[str, ...] = PURCHASE
    active_by: tuple[str, ...] = PURCHASE
    unless: tuple[str, ...] = ()
    gap_days: int = 0
    grace_days: int = 0
    settled_days: int = 0
    within_contract: bool = False
    title: str = "no-purchase"
    version: int = 1

    def __post_init__(self) -> None:
        if self.days <= 0 or self.active_days <= 0:
            raise ValueError(f"label and activity need positive days, got {self.days} and {self.active_days}")
        if not 0 <= self.settled_days < self.active_days:
            raise ValueError(f"settled days lie between 0 and the days of activity, got {self.settled_days}")
        if self.gap_days < 0 or self.grace_days < 0 or (self.grace_days and self.kind != "expiry"):
            raise ValueError("gap and grace are not negative, and only an expiry has a grace")

    @property
    def name(self) -> str:
        """The definition in one word; another definition has another name."""
        gap = f"/gap-{self.gap_days}d" if self.gap_days else ""
        return f"{self.title}-{self.days}d/active-{self.active_days}d{gap}/{self.version}"

    @property
    def horizon_ms(self) -> int:
        """How far ahead of the instant the label looks, gap and grace included: the gap between training and test."""
        return (self.gap_days + self.days + self.grace_days) * DAY_MS

    @property
    def active_ms(self) -> int:
        """Length of the time in which an event makes a customer active."""
        return self.active_days * DAY_MS

    def active(self, newest: IntArray, at: IntArray | int) -> BoolArray:
        """Whether the newest activity known then (NONE = never) lies in (at - M, at]; shape of the inputs."""
        known = newest != NONE
        inside: BoolArray = known & (np.where(known, newest, 0) > np.asarray(at) - self.active_ms) & (newest <= at)
        return inside

    def asked(self, newest: IntArray, ended: IntArray, contract_end: IntArray, at: IntArray | int) -> BoolArray:
        """Whether a customer belongs to the population: newest activity, newest of `unless`, end of the contract (ms), NONE = none."""
        found = self.active(newest, at) & ~self.active(ended, at)
        if self.settled_days:
            found &= newest <= np.asarray(at) - self.settled_days * DAY_MS
        if self.within_contract:
            found &= contract_end >= np.asarray(at) + self.horizon_ms
        if self.kind == "expiry":
            begin = np.asarray(at) + self.gap_days * DAY_MS
            found &= (contract_end > begin) & (contract_end <= begin + self.days * DAY_MS)
        return found

    def mature(self, at: IntArray, known_to_ms: int) -> BoolArray:
        """Whether the label's whole time is over at `known_to_ms`; before that nobody is called churned or stayed."""
        return at + self.horizon_ms <= known_to_ms

    def as_dict(self) -> dict[str, JsonValue]:
        """The definition as it stands in a manifest."""
        return {
            "name": self.name,
            "days": self.days,
            "active_days": self.active_days,
            "kind": self.kind,
            "events": list(self.events),
            "active_by": list(self.active_by),
            "unless": list(self.unless),
            "gap_days": self.gap_days,
            "grace_days": self.grace_days,
            "settled_days": self.settled_days,
            "within_contract": self.within_contract,
            "version": self.version,
        }


EventKind = Annotated[str, Field(pattern="^(" + "|".join(KINDS) + ")$")]


class _Definition(BaseModel):
    """One TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = Field(pattern=r"^[a-z][a-z0-9-]{0,31}$")
    version: int = Field(ge=1)
    meaning: str
    kind: Kind
    events: tuple[EventKind, ...] = Field(min_length=1)
    active_by: tuple[EventKind, ...] = Field(min_length=1)
    unless: tuple[EventKind, ...] = ()
    days: int = Field(ge=1, le=3650)
    active_days: int = Field(ge=1, le=3650)
    gap_days: int = Field(0, ge=0, le=3650)
    grace_days: int = Field(0, ge=0, le=3650)
    settled_days: int = Field(0, ge=0, le=3650)
    within_contract: bool = False


def load(name: str) -> Label:
    """A definition file, or one of ours by name. Raises BadInput naming the file and what is wrong with it."""
    path = Path(name) if name.endswith(".toml") else DEFINITIONS / f"{name}.toml"
    try:
        found: dict[str, Any] = _Definition.model_validate(tomllib.loads(path.read_text(encoding="utf-8"))).model_dump(exclude={"meaning"})
        return Label(**found)
    except OSError as error:
        ours = ", ".join(shipped())
        raise BadInput(f"label {name}: {error.strerror}; give a TOML file, or one of: {ours}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadInput(f"label {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except ValueError as error:
        raise BadInput(f"label {path}: {error}") from error


def shipped() -> dict[str, str]:
    """Our definitions by name, with what they mean."""
    return {path.stem: tomllib.loads(path.read_text(encoding="utf-8"))["meaning"] for path in sorted(DEFINITIONS.glob("*.toml"))}


def of_kinds(facts: IntArray, kinds: tuple[str, ...]) -> BoolArray:
    """Which facts (n, WIDTH) are of some kinds; shape (n,)."""
    return np.isin(facts[:, KIND], [KINDS[kind] for kind in kinds])


def contract_ends(facts: IntArray) -> IntArray:
    """Where facts (n, WIDTH) state a contract's last day, the instant it is over (ms); else NONE; shape (n,)."""
    day = np.where(facts[:, KIND] == PROFILE, facts[:, LEVEL] >> 2, 0)
    return np.where(day > 0, (day + 1) * DAY_MS, NONE)


class Outcomes:
    """What happened, by customer, to answer a label with. Built from customer numbers (n,) and facts (n, WIDTH), in any order."""

    def __init__(self, customer: IntArray, facts: IntArray, label: Label) -> None:
        self._label = label
        keys = customer * _FAR + facts[:, TIME]
        self._events = np.sort(keys[of_kinds(facts, label.events)])
        self._active = np.sort(keys[of_kinds(facts, label.active_by)])
        self._unless = np.sort(keys[of_kinds(facts, label.unless)])

    def churned(self, customer: IntArray, at: IntArray, contract_end: IntArray | None = None) -> BoolArray:
        """Whether the customer churned, by the label; shape of the inputs. contract_end: as known then (ms), for an expiry."""
        label = self._label
        begin = at + label.gap_days * DAY_MS
        if label.kind == "expiry":
            assert contract_end is not None
            return ~_some(self._events, customer, at, contract_end + label.grace_days * DAY_MS)
        found = _some(self._events, customer, begin, begin + label.days * DAY_MS)
        return found if label.kind == "event" else ~found

    def too_soon(self, customer: IntArray, at: IntArray) -> BoolArray:
        """Whether the label's event came in the gap, before anybody could act: such a row is neither churned nor stayed."""
        if self._label.kind != "event":
            return np.zeros(len(at), np.bool_)
        return _some(self._events, customer, at, at + self._label.gap_days * DAY_MS)

    def active(self, customer: IntArray, at: IntArray) -> BoolArray:
        """Whether the customer was active and not `unless`, by all that is known now; shape of the inputs."""
        since = at - self._label.active_ms
        return _some(self._active, customer, since, at) & ~_some(self._unless, customer, since, at)


def _some(keys: IntArray, customer: IntArray, begin: IntArray, end: IntArray) -> BoolArray:
    """Whether one of the sorted keys lies in (begin, end] of its customer."""
    after = np.searchsorted(keys, customer * _FAR + begin, side="right")
    found: BoolArray = np.searchsorted(keys, customer * _FAR + end, side="right") > after
    return found
