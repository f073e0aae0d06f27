"""README's Python and CONTRIBUTING's, run as they stand, block after block; and the commands, with fewer steps."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import klrl
from klrl.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(AGENT,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)

COMMANDS = re.findall(r"^\$ (?:python3 .* && )?(?:\.venv/bin/)?((?:klrl|tensorboard) .*)$", README, re.MULTILINE)
NETWORK = (ROOT / "tests/examples/own_network.py").read_text().split("\nif __name__")[0]
MY_PACKAGE = f"""import gymnasium as gym
gym.register("MyEnv-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv", max_episode_steps=50)
{NETWORK}
MyNet = Residual
{AGENT}"""


def shortened(words: list[str]) -> list[str]:
    """The same command with a few hundred steps, of training and of everything else."""
    words = [re.sub(r"total_timesteps=.*", "total_timesteps=300", word) for word in words]
    for option, number in (("--total-timesteps", "300" if words[0] == "train" else "3000"), ("--episodes", "1")):
        if option in words:
            words[words.index(option) + 1] = number
        elif words[0] in ("train", "distill") and option == "--total-timesteps":
            words += [option, number]
    return words


@pytest.fixture
def _my_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package that README speaks of: an environment, a network and an agent."""
    Path("my_package.py").write_text(MY_PACKAGE)
    monkeypatch.syspath_prepend(".")


@pytest.mark.usefixtures("_my_package")
def test_every_command_runs_in_order(capsys: pytest.CaptureFixture[str]) -> None:
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
    used = {command.split()[1] for command in COMMANDS}
    assert used >= {"train", "resume", "sweep", "eval", "report", "compare", "record", "list", "distill", "export"}


def test_the_picture_is_there() -> None:
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert (ROOT / picture).stat().st_size > 1000


@pytest.mark.usefixtures("_my_package")
def test_python_blocks_run_in_order_and_are_short() -> None:
    assert len(BLOCKS) == 3
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block.replace("50_000", "5_000"), "README.md", "exec"), names)
    assert [len([line for line in block.splitlines() if line]) for block in BLOCKS] == [5, 11, 18]
    assert names["run"].agent.action_space == names["agent"].action_space
    assert names["result"].kl.mean >= 0
    assert 0 < names["move"].report.mean <= 0.01
    assert names["update"].report.mean > 0
    assert names["divergence"].tolist() == [pytest.approx(3 * 0.1**2 / 2)] * 8


@pytest.mark.usefixtures("_my_package")
def test_ones_own_network_and_agent_train_from_python() -> None:
    names: dict[str, Any] = {"klrl": klrl}
    exec("from my_package import VPG, MyNet", names)
    section = README.split("## Your own parts\n")[1].split("\n## ")[0]
    calls = re.findall(r"`klrl\.train\((.*?)\)`", section)
    assert len(calls) == 2
    for call in calls:
        run = eval(f"klrl.train({call}, total_timesteps=2_000, n_envs=8, quiet=True)", names)
        assert (run.folder / "metrics.jsonl").read_text().count('"kl/mean"') > 0


def test_the_section_on_kl_alone_is_short() -> None:
    section = README.split("## Use only the KL\n")[1].split("\nAlso there:")[0]
    assert section.count("```python") == 1
    assert len([line for line in section.splitlines() if line]) <= 25


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 250


def test_install_commands_are_those_that_ci_runs() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    command = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]"'
    command += " && .venv/bin/pytest -n auto --maxprocesses 8"
    assert f"$ {command}\n" in README
    assert f"\n{command}\n" in ci
