"""Whether customers of different groups are served alike: found equally often, called equally often, judged equally well."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from models.evaluate import auc
from models.measures import Draws, Floats, Ints


def by_group(
    y: npt.NDArray[np.integer], score: Floats, contact: float, group: Ints, names: Mapping[int, str], least: int
) -> list[dict[str, Any]]:
    """Per group (n,) of labels and scores: rows, base rate, AUC, recall and share called at the threshold, mean score less base rate.

    names: of the groups; others are shown by number. least: with fewer churned rows a group is not judged.
    """
    found = []
    for number in np.unique(group).tolist():
        at = group == number
        churned = at & (y == 1)
        found.append(
            {
                "group": names.get(number, "unknown" if number == 0 else f"#{number & 0xFFFFFF:06x}"),
                "rows": int(at.sum()),
                "churned": int(churned.sum()),
                "base_rate": round(float(y[at].mean()), 4),
                "auc": _rounded(auc(y[at], score[at])),
                "recall": round(float((score[churned] >= contact).mean()), 4) if churned.any() else None,
                "called": round(float((score[at] >= contact).mean()), 4),
                "calibration": round(float(score[at].mean() - y[at].mean()), 4),
                "judged": bool(churned.sum() >= least),
            }
        )
    return found


def differences(
    y: npt.NDArray[np.integer], score: Floats, contact: float, group: Ints, customer: Ints, least: int, draws: int = 200
) -> dict[str, Any]:
    """Largest difference between two judged groups: equal opportunity (recall) with its interval, demographic parity (share called).

    The interval of a largest difference begins above 0 by chance alone, so the one of the pair that is furthest apart is given.
    """
    judged = [number for number in np.unique(group).tolist() if int(((group == number) & (y == 1)).sum()) >= least]
    if len(judged) < 2:
        return {"groups": len(judged), "equal_opportunity": None, "interval": None, "demographic_parity": None}
    called = (score >= contact).astype(np.float64)
    places = [np.flatnonzero((group == number) & (y == 1)) for number in judged]
    recalls = [float(called[place].mean()) for place in places]
    shares = [float(called[group == number].mean()) for number in judged]
    high, low = places[int(np.argmax(recalls))], places[int(np.argmin(recalls))]
    drawn: list[float] = []
    for weight in Draws(customer, draws).weights():
        if weight[high].sum() and weight[low].sum():
            drawn.append(float(np.average(called[high], weights=weight[high]) - np.average(called[low], weights=weight[low])))
    ends: Sequence[float] = np.quantile(drawn, (0.025, 0.975)).tolist()
    return {
        "groups": len(judged),
        "equal_opportunity": round(max(recalls) - min(recalls), 4),
        "interval": [round(end, 4) for end in ends],
        "demographic_parity": round(max(shares) - min(shares), 4),
    }


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)
