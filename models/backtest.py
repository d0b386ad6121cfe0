"""A model through time: for each period trained on what was known before it, measured on what came after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models import evaluate
from models.dataset import SNAPSHOT, Rows
from models.session import Session
from models.split import Split
from models.train import NEW_DAYS, TENURE, Options, train
from proto.errors import ArtifactRejected, BadInput

Floats = npt.NDArray[np.float64]

BINS: Final = 10
"""Points of a calibration curve, equally many rows each."""
LEAST: Final = 50
"""Rows a segment needs to be measured."""
DRAWS: Final = 400


@dataclass(frozen=True, slots=True)
class Costs:
    """In one unit: of contacting a customer, of losing one, and the share of contacted leavers who stay."""

    contact: float = 1.0
    loss: float = 10.0
    saved: float = 0.3

    def of(self, label: npt.NDArray[np.integer], contacted: npt.NDArray[np.bool_]) -> float:
        """Mean cost of a customer when these are contacted."""
        lost = label.astype(np.float64) * np.where(contacted, 1 - self.saved, 1.0)
        return float(np.mean(self.contact * contacted + self.loss * lost))


@dataclass(frozen=True, slots=True)
class Period:
    """Instants [from_ms, to_ms) that share one training."""

    name: str
    from_ms: int
    to_ms: int


def quarters(first_ms: int, last_ms: int) -> list[Period]:
    """Calendar quarters (UTC) that begin at or after `first_ms` and no later than `last_ms`."""
    return _periods(first_ms, last_ms, 3, lambda year, month: f"{year}-Q{month // 3 + 1}")


def months(first_ms: int, last_ms: int) -> list[Period]:
    """The same by month."""
    return _periods(first_ms, last_ms, 1, lambda year, month: f"{year}-{month + 1:02d}")


def _periods(first_ms: int, last_ms: int, length: int, name: Callable[[int, int], str]) -> list[Period]:
    found = []
    year, month = datetime.fromtimestamp(first_ms / 1_000, UTC).year, 0
    while (begin := _start(year, month)) <= last_ms:
        year_after, month_after = divmod(year * 12 + month + length, 12)
        if begin >= first_ms:
            found.append(Period(name(year, month), begin, _start(year_after, month_after)))
        year, month = year_after, month_after
    return found


def _start(year: int, month: int) -> int:
    return int(datetime(year, month + 1, 1, tzinfo=UTC).timestamp()) * 1_000


@dataclass(frozen=True, slots=True)
class Backtest:
    """periods: figures of each; skipped: why others have none; curves: calibration points (mean score, churned share, rows)."""

    periods: list[dict[str, Any]]
    skipped: dict[str, str]
    curves: dict[str, list[tuple[float, float, int]]]

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "periods": self.periods,
            "skipped": self.skipped,
            "auc_by_period": {one["period"]: one["auc"] for one in self.periods},
            "auc_lowest": min((one["auc"] for one in self.periods), default=None),
            "calibration": {name: [list(point) for point in points] for name, points in self.curves.items()},
        }


def run(
    rows: Rows, plan: Split, periods: Sequence[Period], costs: Costs, options: Options, say: Callable[[str], None] = lambda _: None
) -> Backtest:
    """Train for each period on the rows before it (with the label's gap), measure on its snapshots whose label is complete.

    rows: snapshots and events over all periods. plan: says where rows begin and end. The model of the first period that could be
    trained is also measured in every later one, as if nobody had trained again (`frozen`).
    """
    found: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    curves: dict[str, list[tuple[float, float, int]]] = {}
    frozen: Session | None = None
    for period in periods:
        split = replace_at(plan, period.from_ms)
        inside = (rows.kind == SNAPSHOT) & (rows.y >= 0) & (rows.at >= period.from_ms) & (rows.at < min(period.to_ms, plan.test_last + 1))
        test = rows.where(inside)
        if split is None or len(np.unique(test.y)) < 2:
            skipped[period.name] = "too little before it to train on" if split is None else "no snapshot in it has a complete label"
            continue
        known = rows.where((rows.at < period.from_ms) | inside)
        try:
            trained = train(known, split, options)
        except (ArtifactRejected, BadInput) as error:
            skipped[period.name] = str(error)
            continue
        if frozen is None:
            frozen = Session(trained_onnx(trained.envelope))
        score = trained.score(test.x)
        manifest: dict[str, Any] = trained.manifest.model_dump()
        figures: dict[str, Any] = {
            "period": period.name,
            **evaluate.measure(test.y, score, test.customer, draws=DRAWS).as_dict(),
            "calibration_error": round(evaluate.calibration_error(test.y, score), 4),
            "auc_recency": manifest["baseline"]["metrics"].get("test", {}).get("auc"),
            "auc_frozen": round(evaluate.auc(test.y, frozen.probabilities(test.x)), 4),
            "training_rows": manifest["data"]["rows"]["training"],
            "learner": manifest["training"]["chosen"]["learner"],
            "segments": segments(test, score),
            "cost": cost(costs, test.y, score, trained.manifest.thresholds.medium),
        }
        curves[period.name] = calibration(test.y, score)
        found.append(figures)
        low, high = figures["auc_interval"]
        say(f"{period.name}: AUC {figures['auc']:.3f} [{low:.3f}, {high:.3f}] on {len(test):,} snapshots")
    return Backtest(found, skipped, curves)


def replace_at(plan: Split, at_ms: int) -> Split | None:
    """The split at another instant; None when nothing could be trained before it."""
    try:
        return replace(plan, at=at_ms)
    except BadInput:
        return None


def trained_onnx(envelope: bytes) -> bytes:
    """The graph of an artifact."""
    from models.artifact import unpack

    return unpack(envelope).onnx


def segments(rows: Rows, score: Floats) -> dict[str, dict[str, Any]]:
    """Figures by group of customers: new and established, and by the profile's segment where it states one."""
    new = rows.x[:, TENURE] < NEW_DAYS
    groups = {f"new (under {NEW_DAYS} days)": new, "established": ~new}
    segment = rows.profile[:, 1]
    for digest in np.unique(segment[segment != 0]).tolist():
        groups[f"segment {digest & 0xFFFFFFFF:08x}"] = segment == digest
    found = {}
    for name, these in groups.items():
        if np.count_nonzero(these) >= LEAST and len(np.unique(rows.y[these])) == 2:
            y, p = rows.y[these], score[these]
            found[name] = {
                "rows": len(y),
                "base_rate": round(float(y.mean()), 4),
                "auc": round(evaluate.auc(y, p), 4),
                "mean_score": round(float(p.mean()), 4),
            }
    return found


def cost(costs: Costs, label: npt.NDArray[np.integer], score: Floats, threshold: float) -> dict[str, float]:
    """Mean cost of a customer by policy: contact from the medium band on, nobody, everybody, and the cheapest threshold in hindsight."""
    edges = np.quantile(score, np.linspace(0, 1, 101))
    everybody = np.ones(len(label), np.bool_)
    return {
        "medium_and_above": round(costs.of(label, score >= threshold), 4),
        "nobody": round(costs.of(label, ~everybody), 4),
        "everybody": round(costs.of(label, everybody), 4),
        "best_in_hindsight": round(min(costs.of(label, score >= edge) for edge in edges.tolist()), 4),
        "contacted": round(float(np.mean(score >= threshold)), 4),
    }


def calibration(label: npt.NDArray[np.integer], score: Floats) -> list[tuple[float, float, int]]:
    """Mean score, churned share and rows of bins of equally many rows, by score."""
    order = np.argsort(score, kind="stable")
    parts = [part for part in np.array_split(order, BINS) if len(part)]
    return [(round(float(score[part].mean()), 4), round(float(label[part].mean()), 4), len(part)) for part in parts]
