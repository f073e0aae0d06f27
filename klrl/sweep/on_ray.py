"""A sweep's trials on Ray: each takes its cores and GPUs of a cluster, and poor ones may be stopped early."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from klrl.console import FOLLOW
from klrl.errors import one_line
from klrl.rundir.folder import replace_file
from klrl.sweep.trial import Trial
from klrl.training.on_ray import connected
from klrl.training.options import RayConfig
from klrl.training.signals import Signals

_POLL, _METRIC = 0.5, "eval/mean_reward"


def run_on_ray(trials: list[Trial], config: RayConfig, scheduler: str, show: Callable[[], None]) -> None:
    """Let Ray Tune work until every trial is finished, failed or stopped by its scheduler.

    "asha": of trials that have come as far, those in the lower three quarters by their last evaluation are stopped
    (Li et al. 2020). All processes need to see the sweep's folder.
    """
    waiting = [trial for trial in trials if trial.status not in ("finished", "stopped")]
    if not waiting:
        return
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # tables of its own
    folder = tempfile.TemporaryDirectory(prefix="klrl-ray-")
    # The signals once more, as Ray takes SIGTERM for itself.
    with connected(config.address), Signals() as signals, folder as storage:
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        longest = max(trial.setting.options["total_timesteps"] for trial in waiting)
        tuner = tune.Tuner(
            tune.with_resources(partial(_work, waiting, os.getcwd(), list(sys.path)), config.resources()),
            param_space={"trial": tune.grid_search(list(range(len(waiting))))},
            tune_config=tune.TuneConfig(
                metric=_METRIC,
                mode="max",
                scheduler=ASHAScheduler("steps", max_t=longest, grace_period=max(1, longest // 10))
                if scheduler == "asha"
                else None,
            ),
            run_config=tune.RunConfig(storage_path=storage, name="klrl", verbose=0),
        )
        results: list[Any] = []
        problems: list[BaseException] = []

        def fit() -> None:
            try:
                results.extend(tuner.fit())
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while thread.is_alive():
            for trial in waiting:
                trial.look()
            show()
            signals.check()  # what then ends Ray ends the trials' processes, which save
            time.sleep(_POLL)
        if problems:
            raise ChildProcessError(f"Ray could not run the sweep: {one_line(problems[0])}") from problems[0]
        for result in results:
            _settle(waiting[result.config["trial"]], result, scheduler)
        show()


def _settle(trial: Trial, result: Any, scheduler: str) -> None:
    """Note how a trial ended that Ray is done with."""
    if trial.read():
        return
    if result.error is not None:
        trial.status, trial.problem = "failed", str(result.error).strip().splitlines()[-1]
        return
    if scheduler == "none":
        trial.status, trial.problem = "failed", "Ray ended it before it was done"
        return
    reached = result.metrics.get(_METRIC, float("nan"))
    replace_file(trial.stopped, f"stopped early at {reached:.1f} after {result.metrics.get('steps', 0):,} steps\n")
    trial.read()


def _work(trials: list[Trial], folder: str, path: list[str], told: dict[str, Any]) -> None:
    """Work on a trial in a process of its own, and report its evaluations to Ray."""
    from ray import tune

    os.chdir(folder)
    sys.path[:] = path
    os.environ[FOLLOW] = "1"
    trial, reported = trials[told["trial"]], 0.0
    while trial.begin():
        while trial.status == "running":
            time.sleep(_POLL)
            trial.poll()
            trial.read()
            history = trial.history
            if history is not None and history.has(_METRIC):
                steps = history["step"][np.isfinite(history[_METRIC])]
                if steps[-1] > reported:
                    reported = float(steps[-1])
                    tune.report({_METRIC: history.last(_METRIC), "steps": int(reported)})
        if trial.status == "failed":
            raise RuntimeError(trial.problem)
        if trial.status == "finished":
            return
        time.sleep(_POLL)  # another process is at work on it
