"""A stretch of scores and features against the baseline, as one page that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drift.baseline import Baseline
from drift.budget import Budget
from drift.monitor import Monitor
from drift.series import ALL, BINS, MISSING, Ints, tally
from drift.series import codes as bins_of
from drift.statistics import ks, psi
from features.window import DAY_MS

SHOWN: Final = 25
"""Series drawn; the table has all."""
MODERATE, LARGE = 0.10, 0.25
"""Customary readings of PSI."""
ACTIONS: Final = {
    "repair-upstream": "Repair the source named below. Do not retrain: a model fitted to damaged records is damaged itself.",
    "review-and-retrain": "Look at the features named below; if the change is real and stays, train a challenger and let the gates judge.",
    "watch": "Nothing to do now. Some series have moved moderately; see whether they go on.",
    "none": "Nothing to do.",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One series: distances from the baseline, where it is largest, and its histograms as shares (BINS,)."""

    name: str
    topic: str
    psi: float
    ks: float
    missing_before: float
    missing_now: float
    level_before: float
    level_now: float
    segment: str
    segment_psi: float
    lasting: bool
    over: bool
    expected: tuple[float, ...]
    found: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What the page says. weeks: (begin ms, PSI of the score, events)."""

    since_ms: int
    until_ms: int
    events: int
    rows: tuple[Row, ...]
    weeks: tuple[tuple[int, float, int], ...]
    action: str
    verdicts: tuple[Mapping[str, Any], ...]

    def json(self) -> dict[str, Any]:
        """As JSON types, without the histograms."""
        rows = [
            {
                "series": r.name, "topic": r.topic, "psi": round(r.psi, 4), "ks": round(r.ks, 4), "segment": r.segment,
                "segment_psi": round(r.segment_psi, 4), "missing": [round(r.missing_before, 4), round(r.missing_now, 4)],
                "level": [round(r.level_before, 4), round(r.level_now, 4)], "lasting": r.lasting, "over_threshold": r.over,
            }
            for r in self.rows
        ]  # fmt: skip
        return {
            "from_ms": self.since_ms, "to_ms": self.until_ms, "events": self.events, "action": self.action, "advice": ACTIONS[self.action],
            "moved": [r.name for r in self.rows if r.over and not r.lasting], "series": rows,
            "weeks": [{"from_ms": at, "score_psi": round(p, 4), "events": n} for at, p, n in self.weeks],
        }  # fmt: skip


def compare(
    base: Baseline,
    at_ms: Ints,
    values: npt.NDArray[np.floating],
    segment: npt.NDArray[np.integer],
    *,
    verdicts: Sequence[Mapping[str, Any]] = (),
    budget: Budget | None = None,
) -> Report:
    """The report of values (n, S) at instants (n,) of segments (n,); verdicts: as on `churn-drift`, in its order.

    Raises ValueError for no rows.
    """
    if not len(at_ms):
        raise ValueError("a report needs at least one row")
    g = len(base.segments)
    counts = tally(bins_of(values, base.edges), segment, g)
    # By the cells of the week in which the rows lie, so that a report of two Mondays is held against Mondays.
    cell = (at_ms - 3 * DAY_MS) // base.block_ms % base.cells
    weight = np.bincount(cell, minlength=base.cells) / len(at_ms)
    expected = np.tensordot(weight, base.expected, axes=1)
    distance, other = psi(expected * counts.sum(axis=-1)[..., None], counts), ks(expected, counts)
    limits = Monitor(base, budget).limits("psi", "day")
    before, now = base.level(expected), base.level(counts)
    share = counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    far = np.where(counts[:, 1:].sum(axis=-1) >= 100, distance[:, 1:], 0.0)
    rows = []
    for i, one in enumerate(base.series):
        where = int(far[i].argmax()) if g else 0
        rows.append(
            Row(
                one.name, one.topic or "-", float(distance[i, 0]), float(other[i, 0]), float(expected[i, 0, MISSING]),
                float(share[i, 0, MISSING]), float(before[i, 0]), float(now[i, 0]), base.segments[where] if g else ALL,
                float(far[i, where]) if g else float(distance[i, 0]), bool(base.ageing[i, 0]), bool(distance[i, 0] > limits[i, 0]),
                tuple(np.round(expected[i, 0], 4).tolist()), tuple(np.round(share[i, 0], 4).tolist()),
            )
        )  # fmt: skip
    rows.sort(key=lambda row: (-row.over, row.lasting, -row.psi))
    weeks = []
    for week in np.unique(at_ms // (7 * DAY_MS)).tolist():
        which = at_ms // (7 * DAY_MS) == week
        histogram = tally(bins_of(values[which, :1], base.edges[:1]), np.zeros(int(which.sum()), np.int64), 0)[0, 0]
        weeks.append((week * 7 * DAY_MS, float(psi(expected[0, 0] * histogram.sum(), histogram)), int(which.sum())))
    return Report(int(at_ms.min()), int(at_ms.max()), len(at_ms), tuple(rows), tuple(weeks), _action(rows, verdicts), tuple(verdicts[-10:]))


def _action(rows: Sequence[Row], verdicts: Sequence[Mapping[str, Any]]) -> str:
    over = {verdict["key"] for verdict in verdicts if verdict["kind"] == "over"}
    open_ones = [verdict for verdict in verdicts if verdict["kind"] == "page" and verdict["key"] not in over]
    if any(verdict["action"] == "repair-upstream" for verdict in open_ones):
        return "repair-upstream"
    told = [row for row in rows if not row.lasting]
    if any(row.over and row.psi > MODERATE for row in told) or open_ones:
        return "review-and-retrain"
    return "watch" if any(row.psi > MODERATE for row in told) else "none"


def bars(expected: Sequence[float], found: Sequence[float]) -> list[tuple[float, float, float, str]]:
    """(x, y, height, class) of the bars of two histograms in a box of 240 x 60."""
    top = max(*expected, *found, 1e-9)
    width = 240 / BINS
    out = []
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        for offset, value, name in ((0.0, a, "b"), (width * 0.42, b, "n")):
            height = round(56 * value / top, 1)
            out.append((round(i * width + offset, 1), round(58 - height, 1), height, name))
    return out


def html(report: Report, made_at_ms: int) -> str:
    """The page: no script, no link to anywhere, readable in print."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["day"] = lambda ms: str(np.datetime64(int(ms), "ms").astype("datetime64[m]")).replace("T", " ")
    environment.globals["bars"] = bars
    template = environment.from_string(_PAGE)
    return template.render(r=report, advice=ACTIONS[report.action], made_at=made_at_ms, shown=SHOWN, moderate=MODERATE, large=LARGE)


_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Drift report</title><style>
body{font:14px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em;margin:0}h2{font-size:1.15em;margin:1.6em 0 .4em}table{border-collapse:collapse;width:100%}
td,th{text-align:right;padding:2px 8px;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}
td:first-child,th:first-child,.l{text-align:left}.act{border-left:4px solid #06c;padding:.4em 1em;background:#f2f6fb}
.repair-upstream{border-color:#c00}.review-and-retrain{border-color:#d80}.none{border-color:#393}
.big{color:#b00;font-weight:600}.mid{color:#a60}.dim{color:#888}.b{fill:#bbb}.n{fill:#06c}
figure{display:inline-block;margin:.3em 1em .3em 0}figcaption{font-size:12px}
@media print{body{margin:0;max-width:none}figure{break-inside:avoid}}
</style></head><body>
<h1>Drift report</h1>
<p>{{ "{:,}".format(r.events) }} rows from {{ r.since_ms|day }} to {{ r.until_ms|day }} UTC against the baseline;
made {{ made_at|day }} UTC.</p>
<div class="act {{ r.action }}"><b>{{ r.action }}</b>: {{ advice }}</div>
{% if r.verdicts %}<h2>Verdicts of the watch</h2><table><tr><th>at (UTC)</th><th class="l">kind</th><th class="l">what</th></tr>
{% for v in r.verdicts %}<tr><td>{{ v.at|day }}</td><td class="l">{{ v.kind }}</td><td class="l">{{ v.summary }}</td></tr>
{% endfor %}</table>{% endif %}
<h2>Score by week</h2><table><tr><th>week of (UTC)</th><th>rows</th><th>PSI</th></tr>
{% for at, p, n in r.weeks %}<tr><td>{{ at|day }}</td><td>{{ "{:,}".format(n) }}</td>
<td class="{{ 'big' if p > large else 'mid' if p > moderate else '' }}">{{ "%.3f"|format(p) }}</td></tr>{% endfor %}</table>
<h2>Series that moved farthest</h2><p class="dim">Shares by bin of the baseline: grey then, blue now; the last bin is unknown.</p>
{% for x in r.rows[:shown] %}<figure><svg width="240" height="60" role="img" aria-label="{{ x.name }}">
{% for a, y, h, c in bars(x.expected, x.found) %}<rect class="{{ c }}" x="{{ a }}" y="{{ y }}" width="8" height="{{ h }}"/>{% endfor %}
</svg><figcaption>{{ x.name }}, PSI {{ "%.3f"|format(x.psi) }}</figcaption></figure>{% endfor %}
<h2>All series</h2><table><tr><th>series</th><th class="l">source</th><th>PSI</th><th>KS</th><th>mean rank</th><th>unknown</th>
<th class="l">most in</th><th>PSI there</th></tr>
{% for x in r.rows %}<tr{% if x.lasting %} class="dim"{% endif %}><td>{{ x.name }}{% if x.lasting %} (ageing){% endif %}</td>
<td class="l">{{ x.topic }}</td><td class="{{ 'big' if x.over else 'mid' if x.psi > moderate else '' }}">{{ "%.3f"|format(x.psi) }}</td>
<td>{{ "%.3f"|format(x.ks) }}</td><td>{{ "%.3f"|format(x.level_before) }} to {{ "%.3f"|format(x.level_now) }}</td>
<td>{{ "%.1f"|format(100 * x.missing_before) }} to {{ "%.1f"|format(100 * x.missing_now) }} %</td>
<td class="l">{{ x.segment }}</td><td>{{ "%.3f"|format(x.segment_psi) }}</td></tr>
{% endfor %}</table>
<p class="dim">Red: beyond the threshold the budget of false alarms allows; PSI above {{ moderate }} is customarily read as moderate, above
{{ large }} as large. Ageing series move as customers grow older and are not judged.</p>
</body></html>
"""
