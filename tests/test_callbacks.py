"""Callbacks: what a run tells them, what they may log, and that they stop it as its last step would."""

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers import QUICK, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_ranks import torchrun
from test_resume import SMALL, content, differences

import klrl
from klrl.cli.main import main
from klrl.errors import UsageError
from klrl.rundir import checkpoint
from klrl.rundir.history import STOPPED_EARLY, read_history

WATCHED: dict[str, Any] = {"quiet": True, "seed": 3, "eval_every": 3, "eval_episodes": 2}
LONG: dict[str, Any] = {**SMALL["ppo"], **WATCHED}


class StopsAfter(klrl.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_update(self, run: klrl.LiveRun, result: klrl.UpdateResult) -> bool:
        return run.steps >= self.steps


def without_the_stop(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a run's last checkpoint holds, and its rows, but for what names its total or that it was stopped."""
    saved, logged = content(folder), rows(folder)
    saved["state"]["options"].pop("total_timesteps")
    saved["state"]["loop"]["progress"].pop("stopped")
    return saved, [{tag: value for tag, value in row.items() if tag != STOPPED_EARLY} for row in logged]


@pytest.mark.parametrize(("agent", "env", "stop"), [("ppo", "CartPole-v1", 700), ("sac", "Pendulum-v1", 350)])
def test_a_run_that_a_callback_stops_ends_as_at_its_last_step_and_goes_on_as_if_it_had_not(
    agent: str, env: str, stop: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = WATCHED | SMALL[agent] | {"quiet": False}
    stopped = klrl.train(agent, env, total_timesteps=2 * stop, callbacks=[StopsAfter(stop)], **options)
    assert stop <= stopped.steps < 2 * stop
    assert f"stopped     after {stopped.steps:,} steps, by StopsAfter" in capsys.readouterr().out
    whole = klrl.train(agent, env, total_timesteps=stopped.steps, **options)
    assert stopped.score == whole.score
    saved, logged = without_the_stop(stopped.folder)
    theirs, others = without_the_stop(whole.folder)
    assert not differences(saved, theirs)
    assert logged == others
    assert rows(stopped.folder)[-1][STOPPED_EARLY] == 1
    assert read_history(stopped.folder).state == "finished"

    resumed = klrl.resume(stopped.folder)
    whole = klrl.train(agent, env, total_timesteps=2 * stop, **options)
    assert resumed.score == whole.score
    assert not differences(content(resumed.folder), content(whole.folder))
    assert rows(resumed.folder) == rows(whole.folder)


def test_ones_own_numbers_are_logged_beside_klrls() -> None:
    class Logs:
        """No Callback: any of the methods is enough."""

        def on_update(self, run: klrl.LiveRun, result: klrl.UpdateResult) -> None:
            assert run.figures["kl/mean"] == result.kl.mean
            run.log("own/steps", run.steps)

        def on_evaluation(self, run: klrl.LiveRun, evaluation: Any) -> None:
            run.log("own/worst", min(evaluation.returns))

    run = klrl.train("ppo", "CartPole-v1", **QUICK, callbacks=[Logs()])
    logged = rows(run.folder)
    assert [row["own/steps"] for row in logged] == [row["step"] for row in logged]
    assert ["own/worst" in row for row in logged] == ["eval/mean_reward" in row for row in logged]
    assert logged[-1]["own/worst"] == min(run.score.returns)
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0}).Reload()
    assert [event.value for event in events.Scalars("own/steps")] == [row["step"] for row in logged]


def test_hooks_are_called_in_order_and_an_evaluation_may_stop_the_run() -> None:
    told: list[tuple[str, int]] = []

    class Watches(klrl.Callback):
        def on_update(self, run: klrl.LiveRun, result: klrl.UpdateResult) -> None:
            told.append(("update", run.steps))

        def on_evaluation(self, run: klrl.LiveRun, evaluation: Any) -> bool:
            told.append((f"evaluation of {len(evaluation.returns)}", run.steps))
            return True

        def on_end(self, run: klrl.LiveRun) -> None:
            told.append(("end", checkpoint.step_of(checkpoint.steps(run.folder / "checkpoints")[-1])))

    run = klrl.train("ppo", "CartPole-v1", **QUICK, final_episodes=3, callbacks=[Watches()])
    first, second = [row["step"] for row in rows(run.folder)]
    assert told == [
        ("update", first),
        ("update", second),
        ("evaluation of 2", second),
        ("evaluation of 3", second),
        ("end", second),
    ]
    assert rows(run.folder)[-1]["eval/mean_reward"] == run.score.mean
    assert len(run.score.returns) == 3


def test_what_a_callback_raises_comes_through_once_the_run_is_saved() -> None:
    class Fails:
        def on_update(self, run: klrl.LiveRun, result: klrl.UpdateResult) -> None:
            if run.steps > 700:
                run.log("step", 1.0)

    with pytest.raises(UsageError, match="each row has that already") as caught:
        klrl.train("ppo", "CartPole-v1", total_timesteps=1500, callbacks=[Fails()], **LONG)
    (folder,) = Path("runs").iterdir()
    (note,) = caught.value.__notes__
    assert note.startswith("saved after ")
    assert str(folder.absolute()) in note
    resumed = klrl.resume(folder)
    whole = klrl.train("ppo", "CartPole-v1", total_timesteps=1500, **LONG)
    assert not differences(content(resumed.folder), content(whole.folder))
    assert rows(resumed.folder) == rows(whole.folder)


def test_a_stopped_run_whose_final_evaluation_was_cut_short_only_ends() -> None:
    class Cuts(StopsAfter):
        def on_evaluation(self, run: klrl.LiveRun, evaluation: Any) -> None:
            if len(evaluation.returns) == 20:
                raise KeyError("cut")

    with pytest.raises(KeyError):
        klrl.train("ppo", "CartPole-v1", total_timesteps=1500, callbacks=[Cuts(700)], **LONG)
    (folder,) = Path("runs").iterdir()
    stopped = klrl.resume(folder)
    assert 700 <= stopped.steps < 1000
    assert len(stopped.score.returns) == 20
    assert klrl.resume(folder).steps >= 1500


@pytest.mark.parametrize("wrong", [klrl.Callback, StopsAfter, print, 3])
def test_what_is_no_callback_is_refused_before_anything_is_written(wrong: Any) -> None:
    with pytest.raises(UsageError, match="callbacks"):
        klrl.train("ppo", "CartPole-v1", **QUICK, callbacks=[wrong])
    with pytest.raises(UsageError, match="callbacks takes a list"):
        klrl.train("ppo", "CartPole-v1", **QUICK, callbacks=wrong)
    assert not Path("runs").exists()


def test_a_run_stops_at_a_return_and_goes_on_to_another(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "ppo", "CartPole-v1", "--n-envs", "4", "--n-steps", "64", "--total-timesteps", "50000"]
    main([*command, "--stop-at-return", "60", "--eval-every", "0", "--final-episodes", "2"])
    assert "by --stop-at-return 60\n" in capsys.readouterr().out
    (folder,) = Path("runs").iterdir()
    returns = [row.get("rollout/ep_rew_mean", 0.0) for row in rows(folder)]
    assert returns[-1] >= 60 > max(returns[:-1])
    history = read_history(folder)
    assert history.state == "finished"
    assert history.final_return == rows(folder)[-1]["eval/final_return"]
    for more in ([], ["--total-timesteps", "60000"]):
        with pytest.raises(SystemExit) as stop:
            main(["resume", str(folder), *more])
        assert stop.value.code == 2
        assert "--stop-at-return 60: give another one, or inf" in capsys.readouterr().err
    main(["resume", str(folder), "--stop-at-return", "90"])
    assert max(row["rollout/ep_rew_mean"] for row in rows(folder)[:-1]) < 90 <= rows(folder)[-1]["rollout/ep_rew_mean"]
    assert len(rows(folder)) > len(returns)
    main(["resume", str(folder), "--stop-at-return", "inf", "--total-timesteps", str(history.steps + 20_000)])
    assert read_history(folder).steps >= history.steps + 20_000
    assert STOPPED_EARLY not in rows(folder)[-1]


def test_an_evaluation_that_reaches_the_return_stops_and_few_episodes_do_not() -> None:
    lengthy = QUICK | {"final_episodes": 0, "eval_every": 3, "n_steps": 200, "total_timesteps": 8000}
    run = klrl.train("ppo", "Pendulum-v1", **lengthy, stop_at_return=-1e4)  # which every episode reaches
    logged = rows(run.folder)
    assert len(logged) == 3, "4 episodes end with each update, and the third is evaluated"
    assert "eval/mean_reward" in logged[-1]
    unwatched = klrl.train("ppo", "Pendulum-v1", **lengthy | {"eval_every": 0}, stop_at_return=-1e4)
    assert len(rows(unwatched.folder)) == 6, "20 episodes, after which there are enough"


def test_optuna_prunes() -> None:
    def objective(trial: optuna.Trial) -> float:
        class Prune(klrl.Callback):
            def on_evaluation(self, run: klrl.LiveRun, evaluation: Any) -> None:
                trial.report(evaluation.mean, run.updates)
                if trial.should_prune():
                    raise optuna.TrialPruned

        rate = trial.suggest_float("learning_rate", 1e-8, 1e-2, log=True)
        return klrl.train("ppo", "CartPole-v1", **options, learning_rate=rate, callbacks=[Prune()]).score.mean

    options = QUICK | {"total_timesteps": 4000, "lr_schedule": "constant", "n_epochs": 4, "eval_every": 3}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=8)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for rate in (3e-3, 1e-8):
        study.enqueue_trial({"learning_rate": rate})
    study.optimize(objective, n_trials=2)
    learnt, pruned = study.trials
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert sorted(pruned.intermediate_values) == [3, 6, 9], "of 16 updates"
    assert pruned.intermediate_values[9] < learnt.intermediate_values[9]


@pytest.mark.slow
def test_ranks_stop_together_where_one_says_so_and_save_where_one_fails(tmp_path: Path) -> None:
    folder = Path(torchrun("callbacks.py", 2, tmp_path))
    (steps, returns, lost), (same, equal, why) = (json.loads(Path(f"{rank}.json").read_text()) for rank in (0, 1))
    assert steps == same
    assert 1000 < steps < 1500
    assert returns == equal
    assert lost.startswith("RankLostError")
    assert "LookupError('mine')" in why
    assert f"saved after {steps:,} steps" not in why
    assert str(folder) in why
    assert checkpoint.step_of(checkpoint.steps(folder / "checkpoints")[-1]) > steps
    assert math.isfinite(rows(folder)[-1]["kl/mean"])
