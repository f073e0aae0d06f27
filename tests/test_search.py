"""Sweeps whose settings Optuna proposes: ranges, what they become, and a study that goes on."""

import math
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest

from klrl.cli.main import main
from klrl.errors import UsageError
from klrl.sweep.grid import Setting, expand
from klrl.sweep.search import Proposals, ranges_in

QUICK = ["total_timesteps=512", "n_envs=2", "n_steps=64", "final_episodes=2", "eval_every=0"]


class Done:
    """A trial whose run's return is known."""

    status = "finished"

    def __init__(self, value: float) -> None:
        self.history: Any = type("History", (), {"final_return": value})()


def test_ranges_are_optunas_distributions() -> None:
    found = ranges_in(["learning_rate=log:1e-4..1e-2", "n_epochs=2..8", "gamma=0.9..0.99", "clip_range=0.1,0.2"])
    assert found == {
        "learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "n_epochs": optuna.distributions.IntDistribution(2, 8),
        "gamma": optuna.distributions.FloatDistribution(0.9, 0.99),
    }
    with pytest.raises(UsageError, match=r"--set n_epochs=8\.\.2"):
        ranges_in(["n_epochs=8..2"])


def test_proposals_climb_and_go_on_where_they_were_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klrl.sweep.search.score_of", lambda runs: type("Score", (), {"mean": runs[0].final_return}))
    made: list[dict[str, Any]] = []

    def run(settings: Any) -> Any:
        (setting,) = settings
        made.append(setting.options)
        rate, widths = setting.options["learning_rate"], setting.options["hidden_sizes"]
        return [Done(-abs(rate - 3e-3) - (0 if widths == [16, 16] else 1))]

    choices = {"hidden_sizes": [[8], [16, 16], [32]], "n_steps": [64]}
    base = partial(expand, "ppo", "CartPole-v1")
    proposals = Proposals(base, choices, ranges_in(["learning_rate=log:1e-5..1e-1"]))
    proposals.search(tmp_path, 30, run)
    assert len(made) == 30
    assert all(options["n_steps"] == 64 and 1e-5 <= options["learning_rate"] <= 1e-1 for options in made)
    # Of the ten random ones, a third has these widths, and of the range a quarter is as near to the best rate.
    assert sum(options["hidden_sizes"] == [16, 16] for options in made[10:]) >= 9
    near = [abs(math.log10(options["learning_rate"] / 3e-3)) < 0.5 for options in made[10:]]
    assert sum(near) >= 8, near
    before, made[:] = list(made), []
    proposals.search(tmp_path, 32, run)
    assert made[:30] == before  # to be found finished
    assert len(made) == 32
    setting = proposals._setting({"learning_rate": 0.00123456, "hidden_sizes": 0, "n_steps": 0})
    assert isinstance(setting, Setting)
    assert setting.label == "hidden_sizes=8 learning_rate=0.0012346"
    edge = proposals._setting({"learning_rate": 0.09999999, "hidden_sizes": 0, "n_steps": 0})
    assert edge.options["learning_rate"] == 0.1  # rounded, and within the range


def test_a_search_by_the_command_and_its_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "ppo", "CartPole-v1", "--seeds", "1", "--search", "optuna", "--run-dir", "s"]
    ranged = ["--set", *QUICK, "learning_rate=log:1e-4..1e-2"]
    main([*command, "--trials", "1", *ranged])
    main([*command, "--trials", "2", *ranged])
    out = capsys.readouterr().out
    assert out.count("running") == 2  # the first trial was left alone
    assert out.count("1 of 1") == 3
    assert (
        len(
            optuna.load_study(
                study_name="klrl",
                storage=optuna.storages.JournalStorage(
                    optuna.storages.journal.JournalFileBackend("s/sweep-ppo-CartPole-v1/optuna.log")
                ),
            ).trials
        )
        == 2
    )
    for words, said in (
        ([], "needs a --set to search in"),
        (["--set", "learning_rate=1e-2..1e-4"], "--set learning_rate=1e-2..1e-4"),
        (["--set", "learning_rate=-1.0..0.1"], "--learning-rate must be above 0"),
        (["--set", "nonsense=1..2"], "unknown option 'nonsense'"),
        (["--set", "n_steps=8..64", "--scheduler", "asha"], "--scheduler asha is Ray's"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*command, *words])
        assert stop.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
@pytest.mark.parametrize("command", [["train", "ppo", "CartPole-v1"], ["sweep", "ppo", "CartPole-v1"]])
def test_ray_is_asked_for_by_name_before_anything_is_written(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--on", "ray"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == 'klrl: this needs ray: pip install "klrl[ray]"\n'
    assert not Path("runs").exists()
