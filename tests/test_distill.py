"""``klrl distill``: whose environment it takes, what it prints and refuses, and what its run is good for."""

import contextlib
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from helpers import QUICK

import klrl
from klrl.cli.main import main

SHORT = ["--total-timesteps", "400", "--n-steps", "32", "--final-episodes", "2", "--hidden-sizes", "6"]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with contextlib.suppress(SystemExit):  # of --help
        main(words)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def teacher_of(task: Any, **more: Any) -> str:
    options = {**QUICK, "total_timesteps": 200, "final_episodes": 0, "run_dir": "teachers", "eval_every": 0, **more}
    return str(klrl.train("ppo", task, **options).folder)


def test_a_student_takes_its_teachers_environment_and_ends_as_a_run_like_any_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = teacher_of("Pendulum-v1", n_envs=3, gamma=0.9, normalize_observation=False, env={"kwargs": {"g": 8.0}})
    text = shown(capsys, "distill", teacher, *SHORT, "--seed", "4")
    run = next(line.split()[1] for line in text.splitlines() if line.startswith("run "))
    assert Path(run).name.startswith("student-Pendulum-v1-4-")
    lines = text.splitlines()
    assert "from teacher " in lines[0]
    # 3 x 6 + 6 + 6 + 1 and a log_std, of 3 x 64 + 64 + 64 x 64 + 64 + 64 + 1 and a log_std.
    assert lines[-1] == "weights     32 of the teacher's 4,482 (0.7%)"
    options = tomllib.loads((Path(run) / "config.toml").read_text())
    assert options["env_id"] == "Pendulum-v1"
    assert options["teachers"] == [teacher]
    taken = ("n_envs", "gamma", "normalize_observation", "hidden_sizes", "head")
    assert [options[name] for name in taken] == [3, 0.9, False, [6], "plain"]
    assert options["env"]["kwargs"] == {"g": 8.0}
    compared = json.loads(shown(capsys, "compare", teacher, run, "--steps", "50", "--episodes", "1", "--json"))
    shutil.rmtree("teachers")
    assert "of Pendulum-v1" in shown(capsys, "eval", run, "--episodes", "2")
    assert compared
    resumed = shown(capsys, "resume", run, "--total-timesteps", "600", "--verbose")
    assert "669 steps" in resumed  # of 672 rows, three only reset
    metrics = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    assert {"distill/kl", "distill/kl_before", "distill/mean_difference", "kl/mean"} <= metrics[-1].keys()
    assert [row["train/learning_rate"] for row in metrics][:2] == pytest.approx([3e-3, 3e-3 * (1 - 96 / 400)])


def test_the_family_is_the_teachers_and_the_environment_may_be_a_function() -> None:
    small = {"learning_starts": 50, "hidden_sizes": (8,), "kl": {"every": 50}}
    sac = klrl.train(
        "sac", "Pendulum-v1", total_timesteps=100, n_envs=1, quiet=True, eval_every=0, final_episodes=0, **small
    )
    options: dict[str, Any] = {"total_timesteps": 300, "n_steps": 64, "quiet": True, "final_episodes": 0}
    assert klrl.distill(sac.folder, **options).agent.config.head == "squashed"

    def task() -> Any:
        return gym.make("klrl/RewardByBoth-v0", action="multibinary")

    joint = {"batch_size": 32, "learning_starts": 64, "hidden_sizes": (8,), "kl": {"every": 50}}
    teacher = klrl.train("sac", task, total_timesteps=200, n_envs=2, quiet=True, eval_every=0, **joint).folder
    with pytest.raises(klrl.UsageError, match="which is no env id here"):
        klrl.distill(teacher, **options)
    student = klrl.distill(teacher, env=task, **options)
    assert (student.agent.config.head, student.config.n_envs) == ("joint", 2)


def test_an_environment_of_images_is_learned_from() -> None:
    def task() -> Any:
        return gym.make("klrl/RewardByBoth-v0", observation="image")

    teacher = klrl.PPO(task().observation_space, task().action_space).save("teacher")
    options = {**QUICK, "total_timesteps": 64, "n_steps": 16, "eval_every": 0, "final_episodes": 0}
    run = klrl.train("student", task, teachers=[teacher], **options)
    assert klrl.load(run.folder).predict(task().reset(seed=0)[0])[0] in (-1, 0, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("distill", "distill needs a run folder or checkpoint: klrl distill runs/ppo-CartPole-v1-0-..."),
        ("distill --hidden-sizes 16", "distill needs a run folder"),
        ("distill nowhere", "nowhere"),
        ("distill TEACHER OTHER", "its observation space is Box"),
        (
            "distill TEACHER SQUASHED",
            "no closed-form KL between SquashedNormal and DiagonalNormal; teach by runs of one family",
        ),
        ("distill TEACHER --observation-keys x", "--observation-keys: the observation has no part 'x': it is no Dict"),
        ("distill TEACHER --head joint", "--head joint makes no policy over the actions Box"),
        ("distill TEACHER --temprature 3", "unknown option '--temprature' (did you mean '--temperature'?)"),
        ("distill TEACHER --temperature 0", "--temperature must be above 0"),
        ("train student Pendulum-v1", "a student learns from --teachers RUN...: klrl distill RUN names them"),
    ],
)
def test_what_it_cannot_do_is_one_line_and_writes_nothing(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spaces = [gym.make(name) for name in ("Pendulum-v1", "CartPole-v1")]
    first, other = ((env.observation_space, env.action_space) for env in spaces)
    klrl.SAC(*first).save("SQUASHED")
    klrl.PPO(*other).save("OTHER")
    if "TEACHER" in words:
        shutil.move(teacher_of("Pendulum-v1", total_timesteps=1, n_steps=2), "TEACHER")
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_its_help_shows_a_students_options(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "distill", "--help")
    assert "klrl distill RUN..." in text
    assert "(default: 200000)" in text
    assert all(option in text for option in ("--temperature", "--observation-keys", "--hidden-sizes", "--run-dir"))


@pytest.mark.slow
def test_a_student_of_a_twelfth_of_the_weights_balances_the_pole_as_its_teacher_does() -> None:
    teacher = klrl.train("ppo", "CartPole-v1", quiet=True)
    student = klrl.distill(teacher.folder, hidden_sizes=(16, 16), total_timesteps=60_000, quiet=True)
    assert teacher.score.mean > 490
    assert student.evaluate(100).mean > 0.97 * teacher.score.mean


def test_nothing_is_imported_because_a_teacher_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(".")
    Path("said_by_a_file.py").write_text("")
    teacher = teacher_of("CartPole-v1", imports=["said_by_a_file"])
    del sys.modules["said_by_a_file"]
    with pytest.raises(klrl.UsageError, match="said_by_a_file"):
        klrl.distill(teacher, env=lambda: gym.make("CartPole-v1"), **QUICK)
    assert "said_by_a_file" not in sys.modules
