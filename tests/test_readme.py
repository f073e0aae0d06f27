"""README's Python, run as it stands, block after block; and its commands, each with fewer steps."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from klrl.cli.main import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

COMMANDS = re.findall(r"^\$ (?:\.venv/bin/)?((?:klrl|tensorboard) .*)$", README, re.MULTILINE)
MY_PACKAGE = """import gymnasium as gym
gym.register("MyEnv-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv", max_episode_steps=50)
"""


def shortened(words: list[str]) -> list[str]:
    """The same command with a few hundred steps, of training and of everything else."""
    words = [re.sub(r"total_timesteps=.*", "total_timesteps=300", word) for word in words]
    for option, number in (("--total-timesteps", "300" if words[0] == "train" else "3000"), ("--episodes", "1")):
        if option in words:
            words[words.index(option) + 1] = number
        elif words[0] == "train" and option == "--total-timesteps":
            words += [option, number]
    return words


def test_every_command_runs_in_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my_package.py").write_text(MY_PACKAGE)
    monkeypatch.syspath_prepend(".")
    named = dict.fromkeys(re.findall(r"runs/(ppo-CartPole-v1-(\d)-[\d-]+)", README))
    assert [seed for _, seed in named] == ["0", "1"]
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if program == "tensorboard":
            inspect = [sys.executable, "-m", "tensorboard.main", *words, "--inspect"]
            assert "kl/mean" in subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
            continue
        try:
            main(shortened(words))
        except SystemExit as stop:
            assert stop.code == 0, f"{command}: {capsys.readouterr().err}"  # noqa: PT017 (--help exits, too)
        for name, seed in named:  # the runs that README names are those it made first
            made = sorted(Path("runs").glob(f"ppo-CartPole-v1-{seed}-*"))
            if made and not (Path("runs") / name).exists():
                shutil.move(made[0], Path("runs") / name)
    assert {command.split()[1] for command in COMMANDS} >= {"train", "resume", "sweep", "eval", "report", "compare"}


def test_the_picture_is_there() -> None:
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert (Path(__file__).resolve().parent.parent / picture).stat().st_size > 1000


def test_python_blocks_run_in_order_and_are_short() -> None:
    assert len(BLOCKS) == 6
    names: dict[str, Any] = {}
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line]) <= 10
        exec(compile(block.replace("50_000", "5_000"), "README.md", "exec"), names)
    assert names["agent"].action_space == names["run"].agent.action_space
    assert names["report"].kl.mean >= 0
    assert names["update"].report.mean > 0
    assert names["divergence"].tolist() == [pytest.approx(3 * 0.1**2 / 2)] * 8


def test_the_section_on_kl_alone_is_short() -> None:
    section = README.split("## Use only the KL\n")[1].split("\n| what | for |")[0]
    assert section.count("```python") == 3
    assert len([line for line in section.splitlines() if line]) <= 25


def test_install_commands_are_those_that_ci_runs() -> None:
    ci = (Path(__file__).resolve().parent.parent / ".ci" / "run").read_text()
    command = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]" && .venv/bin/pytest'
    assert f"$ {command}\n" in README
    assert f"\n{command}\n" in ci
