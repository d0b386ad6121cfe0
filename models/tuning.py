"""Boosted trees tuned by Optuna on the chain of later and later slices: poor trials are cut short, and a study on disk goes on later."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from models.compete import slices
from models.dataset import Rows
from models.learners import Learner, tuned
from models.split import Split
from models.train import columns_of

WARM_UP: Final = 5
"""Trials before any is cut short."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How much to try. trials: in all, those of an earlier run with the same data and storage included; storage: a file, None = memory."""

    trials: int
    storage: Path | None = None


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best learner found; trials: how many were finished and cut short; auc: mean over the slices."""

    learner: Learner
    auc: float
    finished: int
    pruned: int
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """For a person."""
        return f"{self.finished} trials finished, {self.pruned} cut short, best validation AUC {self.auc:.4f} with {self.parameters}"

    def as_dict(self) -> dict[str, Any]:
        """For a manifest: no times in it, so that equal data give equal models."""
        return {
            "trials": self.finished + self.pruned,
            "pruned": self.pruned,
            "validation_auc": round(self.auc, 5),
            "parameters": self.parameters,
        }


def tune(rows: Rows, split: Split, wish: Wish, held_out_ms: int, folds: int, study_name: str, say: Callable[[str], None]) -> Tuned:
    """Search on the training rows only. study_name: the data's digest, so that a kept study is never continued on other data."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    training = rows.where((rows.y >= 0) & (rows.at >= split.first) & (rows.at <= split.train_last))
    chain = slices(training, split, held_out_ms, folds)
    columns, _ = columns_of(training.x)
    storage = None
    if wish.storage is not None:
        wish.storage.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(wish.storage)))
    study = optuna.create_study(
        study_name=study_name[:32],
        storage=storage,
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=WARM_UP),
    )

    def trial_of(trial: optuna.Trial) -> float:
        learner = tuned(
            {
                "max_depth": trial.suggest_int("max_depth", 3, 8),
                "eta": round(trial.suggest_float("eta", 0.02, 0.2, log=True), 4),
                "min_child_weight": round(trial.suggest_float("min_child_weight", 1, 100, log=True), 2),
                "subsample": round(trial.suggest_float("subsample", 0.5, 1.0), 3),
                "colsample_bynode": round(trial.suggest_float("colsample_bynode", 0.2, 1.0), 3),
                "lambda": round(trial.suggest_float("lambda", 0.1, 30, log=True), 3),
                "gamma": round(trial.suggest_float("gamma", 1e-3, 5, log=True), 4),
            }
        )
        areas: list[float] = []
        for step, part in enumerate(chain):
            areas.append(part.auc(learner.fit(part.early, columns).margin(part.late.x)))
            trial.report(float(np.mean(areas)), step)
            if step + 1 < len(chain) and trial.should_prune():
                raise optuna.TrialPruned
        return float(np.mean(areas))

    def progress(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        state = "cut short" if trial.state is optuna.trial.TrialState.PRUNED else f"AUC {trial.value:.4f}"
        best = study.best_value if study.best_trials else float("nan")
        say(f"tune: trial {trial.number + 1} of {wish.trials}, {state}, best {best:.4f}")

    left = wish.trials - len([trial for trial in study.trials if trial.state.is_finished()])
    if left > 0:
        study.optimize(trial_of, n_trials=left, callbacks=[progress], gc_after_trial=False)
    states = [trial.state for trial in study.trials]
    best = study.best_params
    rounded = {name: value if isinstance(value, int) else round(value, _DIGITS[name]) for name, value in best.items()}
    return Tuned(
        tuned(rounded),
        float(study.best_value),
        states.count(optuna.trial.TrialState.COMPLETE),
        states.count(optuna.trial.TrialState.PRUNED),
        rounded,
    )


_DIGITS: Final = {"eta": 4, "min_child_weight": 2, "subsample": 3, "colsample_bynode": 3, "lambda": 3, "gamma": 4}
