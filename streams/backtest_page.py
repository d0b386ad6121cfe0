"""A backtest as one HTML file that needs nothing else: tables, and figures as SVG within it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Backtest: {{ title }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}figure{margin:1.5rem 0}figcaption{color:#555}svg{max-width:100%;height:auto}
</style></head><body>
<h1>Backtest: {{ title }}</h1>
<p>{{ facts }} facts. For each period a model was trained on what was known before it, with a gap as long as the label
({{ label }}), and measured on the snapshots within it. Intervals: 95 %, customers drawn whole.</p>
<figure>{{ auc | safe }}<figcaption>AUC by period. Frozen: the first period's model, never trained again. Recency: days since the last
purchase alone.</figcaption></figure>
<table><tr><th>period</th><th>snapshots</th><th>churned</th><th>mean score</th><th>AUC</th><th>95 %</th><th>frozen</th><th>recency</th>
<th>Brier</th><th>calibration error</th></tr>
{% for p in periods %}<tr><td>{{ p.period }}</td><td>{{ p.rows }}</td><td>{{ p.base_rate }}</td><td>{{ p.mean_score }}</td>
<td>{{ p.auc }}</td><td>{{ p.auc_interval[0] }} to {{ p.auc_interval[1] }}</td><td>{{ p.auc_frozen }}</td><td>{{ p.auc_recency }}</td>
<td>{{ p.brier }}</td><td>{{ p.calibration_error }}</td></tr>
{% endfor %}</table>
<figure>{{ calibration | safe }}<figcaption>Churned share against mean score, ten bins
of equally many snapshots; on the diagonal a probability means what it says.</figcaption></figure>
<h2>By segment</h2>
<table><tr><th>period</th><th>segment</th><th>snapshots</th><th>churned</th><th>mean score</th><th>AUC</th></tr>
{% for p in periods %}{% for name, s in p.segments.items() %}<tr><td>{{ p.period }}</td><td>{{ name }}</td><td>{{ s.rows }}</td>
<td>{{ s.base_rate }}</td><td>{{ s.mean_score }}</td><td>{{ s.auc }}</td></tr>
{% endfor %}{% endfor %}</table>
<h2>Cost of a customer</h2>
<p>Assumed: a contact costs {{ costs.contact }}, a loss {{ costs.loss }}, and {{ costs.saved }} of the
leavers who are contacted stay. These are the reader's numbers, not measured ones.</p>
<table><tr><th>period</th><th>medium and above</th><th>contacted</th><th>nobody</th><th>everybody</th><th>best in hindsight</th></tr>
{% for p in periods %}<tr><td>{{ p.period }}</td><td>{{ p.cost.medium_and_above }}</td><td>{{ p.cost.contacted }}</td>
<td>{{ p.cost.nobody }}</td><td>{{ p.cost.everybody }}</td><td>{{ p.cost.best_in_hindsight }}</td></tr>
{% endfor %}</table>
{% if skipped %}<h2>Not measured</h2><ul>{% for name, why in skipped.items() %}<li>{{ name }}: {{ why }}</li>{% endfor %}</ul>{% endif %}
</body></html>
"""


def page(report: Mapping[str, Any], *, title: str, label: str, facts: int, costs: Mapping[str, float]) -> str:
    """The HTML of a report (models.backtest.Backtest.report)."""
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(
        title=title,
        label=label,
        facts=f"{facts:,}",
        costs=costs,
        periods=report["periods"],
        skipped=report["skipped"],
        auc=_auc(report["periods"]),
        calibration=_calibration(report["calibration"]),
    )


def _auc(periods: Sequence[Mapping[str, Any]]) -> str:
    figure, axes = _figure(7.5, 3.2)
    names = [one["period"] for one in periods]
    values = [one["auc"] for one in periods]
    errors = [[one["auc"] - one["auc_interval"][0] for one in periods], [one["auc_interval"][1] - one["auc"] for one in periods]]
    axes.errorbar(names, values, yerr=errors, marker="o", capsize=3, label="trained for the period")
    axes.plot(names, [one["auc_frozen"] for one in periods], marker="s", linestyle="--", label="frozen")
    axes.plot(names, [one["auc_recency"] for one in periods], marker="^", linestyle=":", label="recency")
    axes.set_ylabel("AUC")
    axes.legend(frameon=False)
    return _svg(figure)


def _calibration(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    figure, axes = _figure(4.5, 4.5)
    axes.plot([0, 1], [0, 1], color="#bbb", linewidth=1)
    for name, points in curves.items():
        axes.plot([point[0] for point in points], [point[1] for point in points], marker=".", label=name)
    axes.set_xlabel("mean score")
    axes.set_ylabel("churned share")
    axes.legend(frameon=False, fontsize="small")
    return _svg(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    out = io.StringIO()
    # Ids and dates are the same whenever the page is made again.
    with rc_context({"svg.hashsalt": "churnstream"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
