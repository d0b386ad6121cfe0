"""What `churnstream models train` does around a training: which learners, the model to beat, the gate table, the kept evaluation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.artifact import Manifest
    from models.dataset import Rows
    from models.safety import Rival
    from models.train import Trained
    from streams.settings import Settings


def learners_of(text: str) -> tuple[str, ...]:
    """Names of learners. Raises BadUsage for one that is none."""
    from models.learners import ALL, LEARNERS, QUICK
    from proto.errors import BadUsage

    names = {"quick": QUICK, "all": ALL}.get(text) or tuple(text.split(","))
    if unknown := [name for name in names if name not in LEARNERS]:
        raise BadUsage(f"--learners {text}: no learner {unknown[0]}; there are quick, all, {', '.join(LEARNERS)}")
    return names


def rival(settings: Settings, published: Callable[[], Any], against: str | None, label: str, test: Rows) -> Rival | None:
    """The model to beat, and what it says of the test rows. published: reads the model topic.

    Raises BadInput when it answers another question.
    """
    if against is None:
        return None
    import numpy as np

    from models import registry
    from models.artifact import unpack
    from models.safety import Rival
    from proto.errors import BadInput
    from scoring.scorer import Scorer

    champion = published().champion() if against == "champion" else unpack(registry.take(settings.data_dir / "models", against))
    if champion.manifest.label.get("name") != label:
        raise BadInput(f"--against {against}: that model was trained for {champion.manifest.label.get('name')}, this one for {label}")
    scores = np.asarray(Scorer(champion).score(test.x), np.float64)
    return Rival(champion.manifest.version, champion.digest, scores)


def keep(
    settings: Settings, trained: Trained, table: list[Any], found: Any, extra: dict[str, Any], names: dict[int, str], page: Path | None
) -> Path:
    """Keep the evaluation of a model, and write its page where it is asked for."""
    from models import report
    from proto.errors import BadInput
    from streams import evaluations

    home = evaluations.save(settings.data_dir / "evaluations", trained, report.body(trained, table, found, extra), names)
    if page is not None:
        try:
            page.write_text((home / evaluations.PAGE).read_text(encoding="utf-8"), encoding="utf-8")
        except OSError as error:
            raise BadInput(f"{page}: {error.strerror}; give another --report; the model and its evaluation are kept in {home}") from error
    return home


def gate_table(console: Any, rows: list[Any], manifest: Manifest) -> None:
    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"

    cells = [
        (
            row.gate,
            ("<= " if row.at_most else "> ") + f"{row.required:g}",
            shown(row.reached),
            shown(row.attainable),
            shown(row.observable),
            row.verdict,
        )
        for row in rows
    ]
    parts: Any = manifest.metrics
    base = (parts.get("test") or parts["validation"])["base_rate"]
    title = f"gates on {manifest.label['name']}, base rate {base}"
    if any(row.observable is not None for row in rows):
        title += "; attainable: by the oracle, from events: by its pupil"
    console.table(("gate", "required", "reached", "attainable", "from events", "verdict"), cells, title=title)


def refusal(failed: list[Any]) -> str:
    """One line on what refused a model, and by how much."""
    said = []
    for row in failed:
        bound = row.required if row.observable is None or not row.unattainable or row.strict else row.observable - row.near
        said.append(f"{row.gate}: {row.reached:.4g} reached, {bound:.4g} needed, short by {abs(bound - row.reached):.4g}")
    return "not fit for service, gate " + "; ".join(said)
