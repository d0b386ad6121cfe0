"""All that is known of a trained model, as one JSON object: what a report shows and a what-if computes on."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from features.catalog import NAMES
from models import evaluate, measures, safety
from models.attainable import Row
from models.measures import Floats
from models.safety import Safety
from models.train import NEW_DAYS, TENURE, Trained

SCHEMA_VERSION: Final = 1
IMPORTANCE_ROWS: Final = 3_000
SHOWN: Final = 20
MISSED_PER_NEEDLESS: Final = (2, 5, 10)
"""What a missed churner costs, in needless contacts, for the cost curve."""


def body(trained: Trained, gates: Sequence[Row], found: Safety, extra: Mapping[str, Any], *, draws: int = measures.DRAWS) -> dict[str, Any]:
    """The evaluation of a model on its test rows. extra: what only the caller knows (quality, lint, oracle, blind spots)."""
    manifest, test = trained.manifest, trained.test
    score, contact, high = trained.score(test.x), manifest.thresholds.medium, manifest.thresholds.high
    scored = measures.Scored(test.y, score, contact)
    hits, false = scored.curve()
    new = test.x[:, TENURE] < NEW_DAYS
    sample = np.linspace(0, len(test) - 1, min(len(test), IMPORTANCE_ROWS)).astype(np.intp)
    ranked = safety.importance(trained.score, test.x[sample], test.y[sample], trained.columns.tolist())
    return {
        "schema_version": SCHEMA_VERSION,
        "model": {
            "name": manifest.name,
            "version": manifest.version,
            "digest": manifest.digest,
            "learner": manifest.training["chosen"],
            "features_used": len(manifest.features_used),
            "dropped": manifest.training["dropped"],
        },
        "label": manifest.label,
        "data": manifest.data,
        "judged_on": "test rows" if trained.tested else "late rows: no label after the split is mature",
        "rows": len(test),
        "customers": len(np.unique(test.customer)),
        "base_rate": round(float(test.y.mean()), 4),
        "mean_score": round(float(score.mean()), 4),
        "thresholds": {"contact": contact, "high": high},
        "figures": measures.measure(test.y, score, test.customer, contact, draws),
        "recency": {"auc": round(evaluate.auc(test.y, trained.recency), 4)},
        "new_customers": _part(test.y, score, new),
        "existing_customers": _part(test.y, score, ~new),
        "confusion": {"contact": confusion(test.y, score, contact), "high": confusion(test.y, score, high)},
        "calibration": measures.calibration(test.y, score),
        "roc": measures.thinned(np.append(0, false / false[-1]), np.append(0, hits / hits[-1])),
        "precision_recall": measures.thinned(hits / hits[-1], hits / (hits + false)),
        "cost": cost_curve(test.y, score),
        "learning_curve": trained.curve,
        "importance": [{"feature": NAMES[column], "auc_lost": round(lost, 5)} for column, lost in ranked[:SHOWN]],
        "leaderboard": trained.board,
        "groups": found.groups,
        "fairness": found.differences,
        "robustness": found.robustness,
        "against_champion": found.champion,
        "gates": [row.as_dict() for row in gates],
        "gates_passed": all(row.passed for row in gates),
        **extra,
    }


def _part(y: npt.NDArray[np.integer], score: Floats, at: npt.NDArray[np.bool_]) -> dict[str, Any]:
    area = evaluate.auc(y[at], score[at])
    return {
        "rows": int(at.sum()),
        "base_rate": round(float(y[at].mean()), 4) if at.any() else None,
        "auc": None if np.isnan(area) else round(area, 4),
    }


def confusion(y: npt.NDArray[np.integer], score: Floats, threshold: float) -> dict[str, Any]:
    """Counts at a threshold, the edge itself called."""
    called, churned = score >= threshold, y == 1
    return {
        "threshold": threshold,
        "true_positive": int((called & churned).sum()),
        "false_positive": int((called & ~churned).sum()),
        "false_negative": int((~called & churned).sum()),
        "true_negative": int((~called & ~churned).sum()),
    }


def cost_curve(y: npt.NDArray[np.integer], score: Floats) -> list[dict[str, Any]]:
    """Mean cost of a customer over thresholds, in needless contacts, for several prices of a missed churner."""
    thresholds = np.linspace(0.01, 0.99, 99)
    order = np.sort(score[y == 1]), np.sort(score[y == 0])
    missed = np.searchsorted(order[0], thresholds, side="left")
    needless = len(order[1]) - np.searchsorted(order[1], thresholds, side="left")
    found = []
    for price in MISSED_PER_NEEDLESS:
        cost = (price * missed + needless) / len(y)
        best = int(np.argmin(cost))
        found.append(
            {
                "missed_costs": price,
                "points": [[round(float(t), 2), round(float(c), 5)] for t, c in zip(thresholds, cost, strict=True)],
                "best_threshold": round(float(thresholds[best]), 2),
                "best_cost": round(float(cost[best]), 5),
            }
        )
    return found
