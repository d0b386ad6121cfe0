"""The gates beside the figures of performance: exactness, fairness, robustness, latency, and a comparison with the model in service."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models import fairness, gates, measures, robust
from models.attainable import Row
from models.dataset import FloatArray, Rows
from models.measures import Floats
from models.policy import GROUPS, Policy
from models.session import Session

LATENCY_ROWS: Final = 512
LATENCY_REPEATS: Final = 9


@dataclass(frozen=True, slots=True)
class Safety:
    """All gates, and what was measured for them."""

    gates: list[Row]
    groups: dict[str, list[dict[str, Any]]]  # by group column, models.fairness.by_group
    differences: dict[str, dict[str, Any]]
    robustness: dict[str, Any]
    champion: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Rival:
    """The model in service, and its scores of the same rows."""

    version: str
    digest: str
    score: Floats


def measure(
    test: Rows,
    score: Callable[[FloatArray], Floats],
    contact: float,
    measured: Mapping[str, Any],
    policy: Policy,
    *,
    session: Session | None = None,
    names: Mapping[int, str] | None = None,
    rival: Rival | None = None,
    judged: bool = True,
) -> Safety:
    """Everything on the test rows (their labels mature). score: of vectors; contact: the threshold; measured: gates of the manifest.

    names: texts of the groups' digests. judged: whether fairness, robustness and latency stop a publication.
    """
    probability = score(test.x)
    groups: dict[str, list[dict[str, Any]]] = {}
    differences: dict[str, dict[str, Any]] = {}
    rows = _exactness(measured)
    for column, name in enumerate(GROUPS):
        group = test.profile[:, column]
        if len(np.unique(group)) < 2:
            continue
        groups[name] = fairness.by_group(test.y, probability, contact, group, names or {}, policy.group_churned)
        differences[name] = fairness.differences(test.y, probability, contact, group, test.customer, policy.group_churned)
    for name in policy.protected:
        found = differences.get(name)
        if found is None or found["interval"] is None:
            continue
        apart, (low, high) = found["equal_opportunity"], found["interval"]
        note = f"difference {apart:.3f} [{low:.3f}, {high:.3f}] between {found['groups']} groups; the lower end is judged"
        rows.append(Row(f"fairness_{name}", policy.fairness, max(low, 0.0), at_most=True, judged=judged, note=note))
    stands = robust.robustness(score, test.x, test.y)
    rows += _robustness(stands, policy, judged)
    if session is not None:
        rows.append(Row("latency_us", policy.latency_us, latency_us(session, test.x), at_most=True, judged=judged, note="CPU per row"))
    champion = None
    if rival is not None:
        apart, low, high = measures.difference(test.y, probability, rival.score, test.customer)
        champion = {
            "version": rival.version,
            "digest": rival.digest,
            "auc_difference": round(apart, 4),
            "interval": [round(low, 4), round(high, 4)],
        }
        note = f"AUC {apart:+.4f} [{low:+.4f}, {high:+.4f}] against {rival.version}, paired bootstrap; the lower end is judged"
        rows.append(Row("better_than_champion", 0.0, low, note=note))
    return Safety(rows, groups, differences, stands, champion)


def _exactness(measured: Mapping[str, Any]) -> list[Row]:
    """What check_scores measured, and would have refused: always met here, shown so that one table says everything."""
    return [
        Row("parity", gates.PARITY, float(measured["onnx_parity_max"]), at_most=True, note="largest distance of graph and trainer"),
        Row("threshold_flips", 0.0, float(measured["threshold_flips"]), at_most=True),
        Row("batch_dependent_rows", 0.0, float(measured["batch_dependent_rows"]), at_most=True),
    ]


def _robustness(stands: Mapping[str, Any], policy: Policy, judged: bool) -> list[Row]:
    faults, auc = stands["faults"], stands["auc"]
    rows = [
        Row("robust_noise", policy.noise, auc - faults["noise"]["auc"], at_most=True, judged=judged, note="AUC lost, values off by 5 %"),
        Row(
            "robust_spike",
            policy.spike,
            auc - faults["spike"]["auc"],
            at_most=True,
            judged=judged,
            note="AUC lost, tenfold events of a week",
        ),
    ]
    # Without its strongest source nobody can be asked for much: that one is shown, not judged.
    without = sorted((faults[f"without {source}"]["auc"], source) for source in robust.SOURCES)
    strongest = without[0][1]
    rows += [
        Row(f"robust_without_{source}", policy.source, found, judged=judged and source != strongest, note=f"AUC when {source} is silent")
        for found, source in without[:2]
    ]
    broken = [name for name, fault in faults.items() if not fault["finite"]]
    rows.append(Row("robust_finite", 0.0, float(len(broken)), at_most=True, note="faults that give no probability"))
    return rows


def latency_us(session: Session, x: FloatArray) -> float:
    """Microseconds of CPU per row in batches of LATENCY_ROWS, the median of some; it belongs to the machine, so not into a manifest."""
    batch = np.ascontiguousarray(x[np.arange(LATENCY_ROWS) % len(x)])
    taken = []
    for _ in range(LATENCY_REPEATS):
        begin = time.process_time_ns()
        session.probabilities(batch)
        taken.append((time.process_time_ns() - begin) / 1_000 / LATENCY_ROWS)
    return float(np.median(taken))


def importance(
    score: Callable[[FloatArray], Floats], x: FloatArray, y: npt.NDArray[np.integer], columns: list[int]
) -> list[tuple[int, float]]:
    """(column, AUC lost when its values are shuffled between the rows), most important first: of the columns a model may use."""
    rng = np.random.default_rng(0)
    plain = measures.Scored(y, score(x), 0.5).figures()["auc"]
    lost = []
    for column in columns:
        changed = x.copy()
        changed[:, column] = x[rng.permutation(len(x)), column]
        lost.append((column, plain - measures.Scored(y, score(changed), 0.5).figures()["auc"]))
    return sorted(lost, key=lambda entry: -entry[1])
