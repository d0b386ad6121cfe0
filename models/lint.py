"""Does a training set know what it must not: features that read past the cut, ids, single features too good to be true."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import JsonValue

from features.catalog import NAMES
from models.dataset import Rows
from models.evaluate import auc
from proto.errors import ArtifactRejected

TOO_GOOD: Final = 0.95
"""AUC of one feature alone from which it is taken for the label itself."""
SAMPLE: Final = 50_000
ID_SHARE: Final = 0.95
IDENTITY_CUSTOMERS: Final = 4_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One suspicion. `error` ones stop the training; the others are for a person to judge."""

    check: str
    feature: str
    value: float
    message: str
    error: bool

    def as_dict(self) -> dict[str, JsonValue]:
        """JSON types."""
        return {
            "check": self.check,
            "feature": self.feature,
            "value": round(self.value, 4),
            "message": self.message,
            "error": self.error,
        }


def lint(rows: Rows, names: tuple[str, ...] = NAMES) -> list[Finding]:
    """All suspicions about labelled rows; columns are named by `names`."""
    labelled = rows.where(rows.y >= 0)
    if len(labelled) > SAMPLE:
        keep = np.zeros(len(labelled), np.bool_)
        keep[np.random.default_rng(0).choice(len(labelled), SAMPLE, replace=False)] = True
        labelled = labelled.where(keep)
    found = []
    if len(np.unique(labelled.y)) == 2:
        for column, name in enumerate(names):
            found += _single(name, labelled.x[:, column], labelled.y)
    return found + _identities(rows, names)


def _single(name: str, values: npt.NDArray[np.float32], y: npt.NDArray[np.int8]) -> list[Finding]:
    # A missing value may mean either end, so both are tried.
    best = max(abs(auc(y, np.where(np.isnan(values), end, values)) - 0.5) for end in (np.float32(-3e38), np.float32(3e38))) + 0.5
    if best > TOO_GOOD:
        return [Finding("too_good", name, best, f"AUC {best:.3f} alone: it may be the label in another form", True)]
    known = ~np.isnan(values)
    of_churned, of_stayed = float(known[y == 1].mean()), float(known[y == 0].mean())
    if of_churned > 0.2 and of_stayed < 0.01 * of_churned:
        share = of_stayed / of_churned
        return [Finding("only_churned", name, share, f"known of {of_churned:.0%} of the churned and {of_stayed:.2%} of the stayed", False)]
    return []


def _identities(rows: Rows, names: tuple[str, ...]) -> list[Finding]:
    """Columns that are the same in all rows of a customer, and different between customers; every row of a few thousand customers."""
    order = np.argsort(rows.customer, kind="stable")
    begin = np.flatnonzero(np.diff(rows.customer[order], prepend=-1))[:IDENTITY_CUSTOMERS]
    if len(begin) < 50 or len(rows) < 1.5 * len(begin):
        return []
    x = rows.x[order[: len(order) if len(begin) < IDENTITY_CUSTOMERS else begin[-1]]]
    begin = begin[begin < len(x)]
    # NaN beside a value is no difference: fmin and fmax pass over it.
    low, high = np.fmin.reduceat(x, begin, axis=0), np.fmax.reduceat(x, begin, axis=0)
    found = []
    for column in np.flatnonzero((low == high).mean(axis=0) > ID_SHARE).tolist():
        known = low[~np.isnan(low[:, column]), column]
        share = len(np.unique(known)) / len(begin)
        if share > ID_SHARE:
            found.append(Finding("identity", names[column], share, "one value per customer, hardly ever shared: an id", True))
    return found


def past_the_cut(rows: Rows, rebuilt: Callable[[int], Rows], names: tuple[str, ...] = NAMES) -> list[Finding]:
    """Compare vectors with those made without what came after their instant.

    rebuilt(at): the rows of instant `at` from facts cut off there. A feature that differs has read what was not known yet.
    """
    found = []
    for at in np.unique(rows.at).tolist():
        own, short = rows.where(rows.at == at), rebuilt(at)
        a, b = (part.x[np.argsort(part.customer, kind="stable")] for part in (own, short))
        if a.shape != b.shape:
            found.append(Finding("past_the_cut", "-", abs(len(a) - len(b)), f"{len(a)} rows at {at}, {len(b)} without the future", True))
            continue
        for column in np.flatnonzero((a.view(np.uint32) != b.view(np.uint32)).any(axis=0)).tolist():
            share = float((a[:, column].view(np.uint32) != b[:, column].view(np.uint32)).mean())
            found.append(Finding("past_the_cut", names[column], share, f"{share:.1%} of the rows at {at} change without the future", True))
    return found


def check(findings: list[Finding]) -> None:
    """Raises ArtifactRejected with the first error, naming the feature."""
    errors = [finding for finding in findings if finding.error]
    if errors:
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise ArtifactRejected(f"leakage lint: {first.feature}: {first.message}{more}; drop the feature, or look for the leak")
