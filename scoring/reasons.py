"""Why this score: what each feature contributes to the margin, and the strongest ones in business words.

Contributions + bias = margin, where probability = 1 / (1 + exp(-margin)). They are exact Shapley values (scoring/treeshap.py) where no
path of the model asks too many features. For others they are Saabas': walking a row down a tree, every step changes what the tree
expects; the change is credited to the feature that was asked.
Source: Saabas (2014), Interpreting random forests; XGBoost calls it `approx_contribs`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isnan
from typing import Any, Final, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import orjson

from features.catalog import CATALOG, Feature, Op
from features.compiled import kernel
from models.artifact import Artifact
from models.graph import Forest
from scoring.trees import siblings_together
from scoring.treeshap import MOST_POINTS, TreeShap, points_of
from scoring.wording import DECIMALS, Form, Wording, Words, strongest

Vectors = npt.NDArray[np.float32]


class Reason(TypedDict):
    """One reason as it is written into a score. value is null where the feature is unknown; contribution is in log-odds."""

    feature: str
    value: float | None
    contribution: float
    text: str


@kernel("void(float32[:, ::1], int32[::1], int32[::1], float32[::1], uint8[::1], int32[::1], float64[::1], float64[:, ::1])")
def _walk(vectors: Any, root: Any, feature: Any, value: Any, missing_yes: Any, yes: Any, change: Any, contributions: Any) -> None:
    # Trees outside, rows inside: a tree's nodes stay in the nearest cache. `no` is `yes + 1`, so that the next node is a sum instead
    # of a branch the processor would have to guess.
    for t in range(root.shape[0]):
        start = root[t]
        for r in range(vectors.shape[0]):
            node = start
            asked = feature[node]
            while asked >= 0:
                x = vectors[r, asked]
                goes_yes = (x < value[node]) | ((np.isnan(x)) & (missing_yes[node] != 0))
                node = yes[node] + (1 - goes_yes)
                contributions[r, asked] += change[node]
                asked = feature[node]


def expected_values(forest: Forest, share: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean of the leaves below each node, weighted as in training: what the margin would be on average from there; float64 (nodes,)."""
    expected: list[float] = forest.weight.tolist()
    yes, no, shares = forest.yes.tolist(), forest.no.tolist(), share.tolist()
    # Children stand behind their parent.
    for node in np.flatnonzero(forest.feature >= 0)[::-1].tolist():
        expected[node] = shares[node] * expected[yes[node]] + (1 - shares[node]) * expected[no[node]]
    return np.array(expected)


class _Saabas:
    """The walk's view of a forest. Memory: about 30 bytes per tree node."""

    def __init__(self, forest: Forest, expected: npt.NDArray[np.float64]) -> None:
        order, _ = siblings_together(forest)
        place = np.empty(forest.n_nodes, np.int32)
        place[order] = np.arange(forest.n_nodes, dtype=np.int32)
        change = np.zeros(forest.n_nodes)
        branch = np.flatnonzero(forest.feature >= 0)
        for child in (forest.yes, forest.no):
            change[child[branch]] = expected[child[branch]] - expected[branch]
        self._root = place[forest.root]
        self._feature = forest.feature[order]
        self._value = forest.value[order]
        self._missing_yes = forest.missing_yes[order].astype(np.uint8)
        self._yes = np.where(self._feature >= 0, place[forest.yes[order]], 0).astype(np.int32)
        self._change = change[order]

    def contributions(self, vectors: Vectors) -> npt.NDArray[np.float64]:
        found = np.zeros(vectors.shape)
        _walk(
            np.ascontiguousarray(vectors, np.float32),
            self._root,
            self._feature,
            self._value,
            self._missing_yes,
            self._yes,
            self._change,
            found,
        )
        return found


class Reasons:
    """Contributions and reason texts of one model. most_points: bound of what exact ones may take, beyond it they are Saabas'."""

    method: Literal["treeshap", "saabas"]

    def __init__(self, artifact: Artifact, *, money: "Money | None" = None, most_points: int = MOST_POINTS) -> None:
        forest, share = artifact.forest, artifact.tables.share
        expected = expected_values(forest, share)
        self.bias = float(expected[forest.root].sum() + forest.base)
        self._of: TreeShap | _Saabas
        if points_of(forest) <= most_points:
            self.method, self._of = "treeshap", TreeShap(forest, share, len(CATALOG))
        else:
            self.method, self._of = "saabas", _Saabas(forest, expected)
        money = money or Money()
        self._texts = [_text_of(f, money) for f in CATALOG]
        self._wording = Wording([_words_of(f) for f in CATALOG], money.currency, money.exponent, _way(1), _way(-1))

    def contributions(self, vectors: Vectors) -> npt.NDArray[np.float64]:
        """Contribution of each feature to the margin in log-odds, float64 of the vectors' shape (k, N_FEATURES)."""
        return self._of.contributions(vectors)

    def top(self, vectors: Vectors, top: int = 3) -> list[list[Reason]]:
        """The `top` strongest contributions of each row, either way, strongest first; ties in catalog order; zero is no reason."""
        return self._python(vectors, *strongest(self.contributions(vectors), top))

    def written(self, vectors: Vectors, top: int = 3) -> list[bytes]:
        """What `top` gives, as JSON."""
        if len(vectors) == 0 or top == 0:
            return [b"[]"] * len(vectors)
        chosen, amounts = strongest(self.contributions(vectors), top)
        values = np.take_along_axis(vectors, chosen, axis=1).astype(np.float64)
        return [
            orjson.dumps(self._python(vectors[i : i + 1], chosen[i : i + 1], amounts[i : i + 1])[0]) if text is None else text
            for i, text in enumerate(self._wording.write(chosen, values, amounts))
        ]

    def _python(self, vectors: Vectors, chosen: npt.NDArray[np.int64], amounts: npt.NDArray[np.float64]) -> list[list[Reason]]:
        values = np.take_along_axis(vectors, chosen, axis=1).tolist()
        return [
            [self._reason(f, v, c) for f, v, c in zip(*row, strict=True) if f >= 0]
            for row in zip(chosen.tolist(), values, amounts.tolist(), strict=True)
        ]

    def text(self, feature: int, value: float) -> str:
        """How a value of a feature (catalog position) reads; NaN is "never" or "unknown"."""
        return self._texts[feature](value)

    def _reason(self, feature: int, value: float, contribution: float) -> Reason:
        return {
            "feature": CATALOG[feature].name,
            "value": None if isnan(value) else value,
            "contribution": round(contribution, DECIMALS),
            "text": f"{self._texts[feature](value)}{_way(contribution)}",
        }


@dataclass(frozen=True, slots=True)
class Money:
    """How amounts in minor units are written: the account currency's code and its number of decimals."""

    currency: str = ""
    exponent: int = 2

    def text(self, minor: float) -> str:
        """An amount for people: "1,234.50 GBP"."""
        return f"{minor / 10**self.exponent:,.{self.exponent}f} {self.currency}".rstrip()


_NEVER: Final = {Op.AGE_DAYS, Op.AGE_HOURS, Op.TENURE_DAYS}
_FLAG: Final = {Op.KNOWN, Op.PROFILE_KNOWN, Op.CONSENT}


def _way(contribution: float) -> str:
    return ", raises the risk" if contribution > 0 else ", lowers the risk"


def _words_of(feature: Feature) -> Words:
    """The pieces of what is said of a feature."""
    meaning, unit = feature.meaning, feature.unit
    form = Form.COUNTED
    if feature.op in _FLAG:
        form = Form.FLAG
    elif unit == "minor units":
        form = Form.MONEY
    elif unit == "share":
        form = Form.SHARE
    elif unit in {"-", "ratio", "product"} or meaning.startswith(unit):
        form = Form.BARE  # "purchases so far: 19", not "19 purchases": the meaning already says what is counted
    # Units are written in the plural ("purchases", "points 1-5"); a single one drops its s.
    one = unit[:-1] if unit.endswith("s") and " " not in unit else unit
    return Words(feature.name, f"{meaning}: ", "never" if feature.op in _NEVER else "unknown", form, f" {unit}", f" {one}")


def _text_of(feature: Feature, money: Money) -> Callable[[float], str]:
    """How a value of this feature reads: "time since the last purchase: 83 days"."""
    words = _words_of(feature)

    def text(value: float) -> str:
        if isnan(value):
            return words.meaning + words.unknown
        match words.form:
            case Form.FLAG:
                return words.meaning + ("yes" if value else "no")
            case Form.MONEY:
                return words.meaning + money.text(value)
            case Form.SHARE:
                return f"{words.meaning}{100 * value:.0f} %"
        number = _number(value)
        if words.form == Form.BARE:
            return words.meaning + number
        return words.meaning + number + (words.one_unit if number == "1" else words.unit)

    return text


def _number(value: float) -> str:
    """Whole where large or whole, one or two decimals where small."""
    size = abs(value)
    if value == int(value) or size >= 10:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 1 else f"{value:.2f}"
