"""The evaluation of a model as one HTML page: everything inside it, no outside links, charts as SVG; it prints on A4."""

from io import StringIO
from pathlib import Path
from re import DOTALL, sub
from typing import Any, Final

TEMPLATES: Final = Path(__file__).parent / "templates"
_INK: Final = ("#1f5fa8", "#c2571a", "#3a7d44", "#7a4fa3")


def html(body: dict[str, Any]) -> str:
    """The page of an evaluation (models.report.body). The same evaluation gives the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure
    return environment.get_template("report.html").render(e=body, charts=charts(body))


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def charts(body: dict[str, Any]) -> dict[str, str]:
    """SVG texts by name."""
    calibration = [(p["score"], p["churned"]) for p in body["calibration"]]
    figures = body["figures"]
    base = body["base_rate"]
    found = {
        "calibration": _lines(
            "mean score", "churned share", [("bins of equal size", calibration, "o-"), ("perfect", [(0, 0), (1, 1)], ":")], "calibration"
        ),
        "roc": _lines(
            "false positive rate",
            "true positive rate",
            [(f"AUC {figures['auc'][0]}", body["roc"], "-"), ("chance", [(0, 0), (1, 1)], ":")],
            "ROC",
        ),
        "precision_recall": _lines(
            "recall",
            "precision",
            [(f"PR-AUC {figures['pr_auc'][0]}", body["precision_recall"], "-"), ("base rate", [(0, base), (1, base)], ":")],
            "precision over recall",
        ),
        "cost": _lines(
            "threshold",
            "cost per customer",
            [(f"a missed churner costs {c['missed_costs']} contacts", c["points"], "-") for c in body["cost"]],
            "cost",
        ),
        "importance": _bars(
            [(entry["feature"], entry["auc_lost"]) for entry in body["importance"]], "AUC lost when shuffled", "importance"
        ),
    }
    if body["learning_curve"]:
        points = [(p["customers"], p["auc"]) for p in body["learning_curve"]]
        found["learning_curve"] = _lines(
            "training customers", "test AUC", [(body["learning_curve"][0]["learner"], points, "o-")], "learning curve"
        )
    return found


def _lines(x: str, y: str, series: list[tuple[str, Any, str]], title: str) -> str:
    figure, axes = _axes(4.2, 3.0)
    for i, (label, points, style) in enumerate(series):
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            style,
            color="#888888" if style == ":" else _INK[i % 4],
            label=label,
            markersize=3.5,
        )
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure)


def _bars(entries: list[tuple[str, float]], x: str, title: str) -> str:
    figure, axes = _axes(6.4, 0.6 + 0.2 * max(len(entries), 1))
    axes.barh([name for name, _ in entries][::-1], [value for _, value in entries][::-1], color=_INK[0])
    axes.set_xlabel(x)
    axes.set_title(title, fontsize=10)
    axes.tick_params(axis="y", labelsize=7)
    return _svg(figure)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(
        {"svg.hashsalt": "churnstream", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots()


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    out = StringIO()
    with rc_context({"svg.hashsalt": "churnstream", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    # Without prologue and metadata: they name addresses that a page on its own does not need.
    text = sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=DOTALL)
    return text.replace('xmlns:xlink="http://www.w3.org/1999/xlink" ', "").replace("xlink:href", "href")
