"""The model card: what a model is for, what it was made from, how it did, where it must not be trusted; from its manifest and the log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from models.artifact import Manifest
from models.ledger import Decision

Rows = Sequence[tuple[str, str]]

MARKDOWN: Final = """\
# Model card: {{ title }}
{% for section in sections %}
## {{ section.title }}
{% for line in section.lines %}
{{ line }}
{% endfor %}
{%- if section.rows %}
| | |
|---|---|
{% for name, value in section.rows -%}
| {{ name | replace("|", "\\\\|") }} | {{ value | replace("|", "\\\\|") }} |
{% endfor %}
{%- endif %}
{%- endfor %}
"""

HTML: Final = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Model card: {{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; background: #fff }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .25rem .75rem .25rem 0; vertical-align: top;
  border-bottom: 1px solid #d8dee4; overflow-wrap: anywhere } th { font-weight: 500; width: 16rem } h2 { margin-top: 2rem }
@media print { body { margin: 0; max-width: none } h2 { break-after: avoid } }
</style></head><body>
<h1>Model card: {{ title }}</h1>
{% for section in sections %}<section><h2>{{ section.title }}</h2>
{% for line in section.lines %}<p>{{ line }}</p>
{% endfor %}{% if section.rows %}<table>{% for name, value in section.rows %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}
</table>{% endif %}</section>
{% endfor %}</body></html>
"""

AUC_OF_CHANCE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with sentences and a table of two columns."""

    title: str
    lines: Sequence[str] = ()
    rows: Rows = ()


def card(manifest: Manifest, decisions: Sequence[Decision] = (), *, html: bool = False) -> str:
    """The card as Markdown, or as one HTML page without links to anywhere. decisions: what the log says about this model."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=html, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    template = environment.from_string(HTML if html else MARKDOWN)
    return template.render(title=f"{manifest.name} {manifest.version}", sections=list(_sections(manifest, decisions)))


def _sections(m: Manifest, decisions: Sequence[Decision]) -> Iterator[Section]:
    label = m.label.get("name", "no label")
    yield Section(
        "Purpose",
        (
            f"Gives the probability that a customer churns by the label {label}, for every event, with reasons. Meant to choose whom to "
            "contact and in which order.",
            "Not meant for decisions of legal or similar weight for a person, nor for customers outside the label's population.",
        ),
        (
            ("model", f"{m.name} {m.version}"),
            ("digest", m.digest),
            ("follows", m.parent or "no other model"),
            ("bands", f"medium from {m.thresholds.medium:g}, high from {m.thresholds.high:g} ({m.thresholds.version})"),
        ),
    )
    yield Section("Label", ("What counts as churned, and who is asked.",), _flat(m.label))
    yield Section(
        "Data",
        ("Each row is a customer at an instant, from what was known then. The feature layout is fixed by its hash.",),
        (*_flat(m.data), ("features used", str(len(m.features_used))), ("feature layout", m.layout_hash)),
    )
    yield Section("Training", (), (*_flat(m.training), ("calibration", _calibration(m))))
    for part, figures in m.metrics.items():
        recency = _under(_under(m.baseline, "metrics"), part)
        more = [("AUC of recency alone", _text(recency["auc"]))] if recency.get("auc") is not None else []
        yield Section(f"Figures: {part}", (), (*_flat(figures), *more))
    yield Section("Gates", ("Passed before the model was packed, or it would not exist.",), _flat(m.gates))
    yield Section("Limits", tuple(_limits(m)))
    score, why = risk(m)
    yield Section("Risk", (f"{score} of 5: " + "; ".join(why),))
    yield Section("Made with", (), _flat(m.runtime))
    if decisions:
        yield Section("Decisions", ("From the signed log, oldest first.",), [(_when(d.at_ms), _decided(d)) for d in decisions])


def _limits(m: Manifest) -> Iterator[str]:
    yield "Probabilities are calibrated on the time before the split; the base rate moves on. The order of customers lasts longer."
    yield "A value that the training data did not hold (a new product, a new channel) is read as the nearest one the trees know."
    yield "Reasons say what moved this score, not what caused the churn."
    if not _under(m.metrics, "test"):
        yield "There is no test after the split: the figures are those of validation and tend to be too good."
    if not any("fair" in name or "group" in name for name in (*m.gates, *m.metrics)):
        yield "Groups of people were not compared; whether the model errs more for some of them is unknown."


def risk(m: Manifest) -> tuple[int, list[str]]:
    """1 (little) to 5, and why: one point for each thing that makes the figures less believable or the model less useful."""
    figures = _under(m.metrics, "test") or _under(m.metrics, "validation")
    why = []
    if not _under(m.metrics, "test"):
        why.append("no test after the split")
    interval = figures.get("auc_interval")
    if not isinstance(interval, list) or None in interval:
        why.append("no interval of the AUC")
    elif interval[1] - interval[0] > 0.05:
        why.append(f"the AUC is known to {interval[1] - interval[0]:.3f} only")
    recency = _under(_under(m.baseline, "metrics"), "test" if _under(m.metrics, "test") else "validation").get("auc")
    if isinstance(interval, list) and None not in interval and isinstance(recency, float) and interval[0] <= max(recency, AUC_OF_CHANCE):
        why.append("not shown to be better than recency alone")
    mean, rate = figures.get("mean_score"), figures.get("base_rate")
    if isinstance(mean, float) and isinstance(rate, float) and abs(mean - rate) > 0.05:
        why.append(f"mean score {mean:.3f} against a base rate of {rate:.3f}")
    return 1 + min(4, len(why)), why or ["nothing in the manifest speaks against it"]


def _under(values: Any, name: str) -> Mapping[str, Any]:
    found = values.get(name) if isinstance(values, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _flat(values: Any, before: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as rows of name and text."""
    rows: list[tuple[str, str]] = []
    for name, value in (values if isinstance(values, Mapping) else {"": values}).items():
        path = f"{before} {name}".strip().replace("_", " ")
        rows += _flat(value, path) if isinstance(value, Mapping) and value else [(path, _text(value))]
    return rows


def _text(value: Any) -> str:
    match value:
        case None:
            return "unknown"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.6g}"
        case int():
            return str(value)
        case Mapping():
            return ", ".join(f"{name} {_text(each)}" for name, each in value.items()) or "none"
        case list():
            return ", ".join(_text(each) for each in value) or "none"
    return str(value).replace("\n", " ")


def _calibration(m: Manifest) -> str:
    c = m.calibration
    return f"{c.method}: slope {c.slope:.6g}, offset {c.offset:.6g}"


def _when(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1_000, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _decided(d: Decision) -> str:
    return f"{d.action}{' as ' + d.alias if d.alias else ''} by {d.who}{': ' + d.why if d.why else ''}"
