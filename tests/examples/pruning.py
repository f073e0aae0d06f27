"""Optuna: a callback reports evaluations to a trial, which ends where it is worse than the others were."""

from typing import Any

import optuna

import klrl


class Prune(klrl.Callback):
    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_evaluation(self, run: klrl.LiveRun, evaluation: Any) -> None:
        self.trial.report(evaluation.mean, run.updates)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def objective(trial: optuna.Trial) -> float:
    options: dict[str, Any] = {"total_timesteps": 4_000, "n_steps": 64, "eval_every": 2, "eval_episodes": 3}
    options["learning_rate"] = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
    return klrl.train("ppo", "CartPole-v1", **options, callbacks=[Prune(trial)], quiet=True).evaluate(5).mean


study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
study.optimize(objective, n_trials=3)
print(f"{study.best_value:.0f} with {study.best_params}")
