"""The command as users type it, in a process of its own: output, exit codes, and one line for every mistake."""

import io
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from klrl.agents import registry
from klrl.agents.trpo import TRPOConfig
from klrl.cli.main import main
from klrl.envs.make import presets
from klrl.training.run import resolve

QUICK = [
    "--total-timesteps",
    "600",
    "--n-envs",
    "2",
    "--n-steps",
    "64",
    "--batch-size",
    "64",
    "--n-epochs",
    "1",
    "--eval-every",
    "0",
]
MAIN = "from klrl.cli.main import main; main()"


def klrl(*words: str, code: str = MAIN, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


def refused(*words: str, code: str = MAIN) -> str:
    """The one line that a bad command line gets: exit code 2, no traceback, no run folder."""
    if code == MAIN:  # in this process, where torch is imported already
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main(words)
        status, shown, complaint = stop.value.code, out.getvalue(), err.getvalue()
    else:
        done = klrl(*words, code=code)
        status, shown, complaint = done.returncode, done.stdout, done.stderr
    lines = [line for line in complaint.splitlines() if "settotalmass" not in line and line]
    assert status == 2, complaint
    assert len(lines) == 1, complaint
    assert lines[0].startswith("klrl: ")
    assert shown == ""
    assert not Path("runs").exists()
    return lines[0]


@pytest.mark.parametrize("agent", ["ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("trpo", "sac"))])
def test_train_eval_list_end_to_end(agent: str) -> None:
    words = QUICK if agent == "ppo" else [*QUICK[:8], *QUICK[10:]]  # without --n-epochs
    if agent == "sac":
        words = [*QUICK[:4], *QUICK[10:], "--learning-starts", "100", "--kl.every", "50", "--hidden-sizes", "16"]
    done = klrl("train", agent, "CartPole-v1", *words, "--seed", "3")
    assert done.returncode == 0, done.stderr
    evaluation, run, watch = done.stdout.splitlines()[-3:]
    assert evaluation.startswith("evaluation")
    assert evaluation.endswith("over 20 episodes")
    assert watch == "watch       tensorboard --logdir runs"
    folder = run.split()[1]
    assert Path(folder).name.startswith(f"{agent}-CartPole-v1-3-")
    result = json.loads(klrl("eval", folder, "--episodes", "3", "--json").stdout)
    assert len(result["returns"]) == 3
    assert result["mean"] == pytest.approx(sum(result["returns"]) / 3)
    text = klrl("eval", next(str(p) for p in Path(folder, "checkpoints").glob("step-*")), "--episodes", "2").stdout
    assert text.endswith("over 2 episodes of CartPole-v1\n")
    again = klrl("train", agent, "CartPole-v1", "--config", f"{folder}/config.toml", "--quiet")
    assert again.stdout.splitlines()[0] == evaluation
    listed = klrl("list").stdout
    assert "CartPole-v1" in listed
    assert "HalfCheetah-v5" in listed


PRESET = """[ppo]
source = "tuned here, from the hyperparameters of rl-baselines3-zoo"
[ppo.config]
n_envs = 8
[ppo.measured]
mean = 12.3
std = 4.5
seeds = [0, 1, 2]
steps = 10000
[ppo.scores.clip]
mean = 6.7
std = 0.8
seeds = [0, 1]
steps = 20000
[ppo.scores."reverse 0.05"]
mean = -9
std = 1
seeds = [3]
steps = 30000
[trpo]
source = "tuned here"
[trpo.measured]
mean = 1.0
std = 0.0
seeds = [0]
steps = 10
"""


def test_the_list_shows_a_presets_scores_with_other_rules_beneath_it_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tomllib.loads(PRESET)
    monkeypatch.setattr("klrl.envs.make.presets", lambda: {"MountainCarContinuous-v0": temporary})
    main(["list"])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", line.strip()) for line in lines] == [
        ["ppo", "MountainCarContinuous-v0", "10,000", "12.3 +- 4.5", "0 1 2", temporary["ppo"]["source"]],
        ["with clip", "20,000", "6.7 +- 0.8", "0 1"],
        ["with reverse 0.05", "30,000", "-9.0 +- 1.0", "3"],
        ["trpo", "MountainCarContinuous-v0", "10", "1.0 +- 0.0", "0", "tuned here"],
    ]
    monkeypatch.setattr("klrl.analysis.tables.is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    main(["list"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "a name is folded, not cut"
    assert all(word in text for word in ("with clip", "6.7 +- 0.8", "-9.0 +- 1.0", "rl-baselines3-"))


def test_every_preset_says_what_was_measured_how_and_when() -> None:
    for env_id, entries in presets().items():
        for agent, entry in entries.items():
            assert "measured" in entry or env_id == "ALE", "of a whole namespace, nothing may be measured"
            for score in (*[entry[key] for key in ("measured",) if key in entry], *entry.get("scores", {}).values()):
                assert score.keys() == {"mean", "std", "seeds", "steps", "command", "date"}
                assert score["command"].startswith(f"klrl train {agent} {env_id} ")


def test_module_and_numbers_and_env_arguments() -> None:
    words = [*QUICK[2:], "--total-timesteps", "3e2", "--seed", "1_0", "--quiet"]
    done = klrl("train", "ppo", "klrl.envs:klrl/RewardByAction-v0", *words, "--env.kwargs", "action=box",
                code="import runpy; runpy.run_module('klrl', run_name='__main__')")  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = next(Path("runs").iterdir()) / "config.toml"
    assert 'action = "box"' in config.read_text()
    assert "seed = 10" in config.read_text()
    assert "total_timesteps = 300" in config.read_text()


@pytest.mark.slow
def test_import_registers_a_packages_environments() -> None:
    Path("myenvs.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Mine-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=50)\n"
    )
    done = klrl("train", "ppo", "Mine-v0", *QUICK, "--import", "myenvs", env={"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr
    folder = done.stdout.splitlines()[-2].split()[1]
    again = klrl(
        "train", "ppo", "Mine-v0", "--config", f"{folder}/config.toml", "--import", "myenvs", env={"PYTHONPATH": "."}
    )
    assert again.returncode == 0, again.stderr
    assert klrl("eval", folder, "--episodes", "1", "--import", "myenvs", env={"PYTHONPATH": "."}).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tain"], "unknown command 'tain' (did you mean 'train'?)"),
        (["train", "pop", "CartPole-v1"], "unknown agent 'pop' (did you mean 'ppo'?)"),
        (["train", "ppo"], "train needs an agent and an env"),
        (["train", "ppo", "CartPole-v11"], "unknown env 'CartPole-v11' (did you mean 'CartPole-v1'?)"),
        (["train", "ppo", "nowhere:Env-v0"], "env 'nowhere:Env-v0': no module named 'nowhere'"),
        (["train", "ppo", ":CartPole-v1"], "env ':CartPole-v1': importing '' failed"),
        (["train", "ppo", "phys2d/CartPole-v1"], "needs a package that is not installed"),
        (["train", "ppo", "LunarLander-v3", "--env.kwargs", "gravity=5"], "--env.kwargs {'gravity': 5} does not fit"),
        (["train", "ppo", "CartPole-v1", "--seed", "1e30"], "--seed must be at least 0 and at most 4294967295"),
        (["train", "ppo", "CartPole-v1", "--n-steps", "1"], "--n-steps must be at least 2, got 1"),
        (["train", "ppo", "CartPole-v1", "--import", "nowhere"], "--import nowhere"),
        (["train", "ppo", "CartPole-v1", "--n-env", "4"], "unknown option '--n-env' (did you mean '--n-envs'?)"),
        (["train", "ppo", "CartPole-v1", "--kl.targt", "4"], "(did you mean '--kl.target'?)"),
        (["train", "ppo", "CartPole-v1", "--n-envs", "0"], "--n-envs must be at least 1 and at most 65536, got 0"),
        (["train", "ppo", "CartPole-v1", "--n-envs", "two"], "--n-envs"),
        (["train", "ppo", "CartPole-v1", "--n-envs", "2.5"], "--n-envs"),
        (["train", "ppo", "CartPole-v1", "--n-envs"], "--n-envs"),
        (["train", "ppo", "CartPole-v1", "--learning-rate", "nan"], "--learning-rate must be above 0, got nan"),
        (["train", "ppo", "CartPole-v1", "--learning-rate", "0"], "--learning-rate must be above 0, got 0"),
        (
            ["train", "ppo", "CartPole-v1", "--kl.target", "inf"],
            "--kl.target must be at least 0 and at most 1e+38, got inf",
        ),
        (["train", "ppo", "CartPole-v1", "--kl.target", "-1"], "--kl.target must be at least 0, got -1"),
        (["train", "ppo", "CartPole-v1", "--gamma", "1.5"], "--gamma must be at least 0 and at most 1, got 1.5"),
        (
            ["train", "ppo", "CartPole-v1", "--hidden-sizes", "64", "0"],
            "--hidden-sizes must be at least 1 and at most 16384, got 0",
        ),
        (["train", "ppo", "CartPole-v1", "--kl.on-overshoot", "panic"], "--kl.on-overshoot"),
        (["train", "ppo", "CartPole-v1", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["train", "ppo", "CartPole-v1", "--device", "cuda"], "--device cuda: no CUDA device"),
        (["train", "ppo", "CartPole-v1", "--run-dir", "/proc/none"], "--run-dir /proc/none"),
        (
            ["train", "ppo", "CartPole-v1", "--env.kwargs", "speed=3"],
            "--env.kwargs {'speed': 3} does not fit CartPole-v1",
        ),
        (["train", "ppo", "CartPole-v1", "--env.kwargs", "speed"], "name=value"),
        (["train", "ppo", "CartPole-v1", "--config", "none.toml"], "--config none.toml: No such file"),
        (["train", "ppo", "Blackjack-v1"], "observation space Discrete(32) is not supported"),
        (["eval"], "eval needs a run folder"),
        (["eval", "nothing"], "no run or checkpoint at nothing"),
        (["eval", "."], "is not a run folder"),
        (["eval", "nothing", "--episodes", "0"], "--episodes must be at least 1 and at most 65536, got 0"),
        (["list", "all"], "list takes no arguments, got 'all'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(words: list[str], message: str) -> None:
    if "Discrete(32)" in message:
        message = (
            "MultiDiscrete, MultiBinary and a Dict of those; gymnasium.wrappers.FlattenObservation turns most others"
        )
    assert message in refused(*words)


def test_a_group_given_in_part_keeps_the_agents_own_defaults_for_the_rest() -> None:
    _, config = resolve(registry.find("trpo"), None, {"kl": {"target": 0.02}})
    assert config.kl == replace(TRPOConfig().kl, target=0.02)
    assert resolve(registry.find("sac"), None, {"kl": {"target": 0.03}})[1].kl.penalty == "adaptive"


def test_unknown_and_broken_keys_in_a_config_file() -> None:
    for text, message in (
        ("n_env = 4", "unknown option 'n_env' (did you mean 'n_envs'?)"),
        ("[kl]\ntagret = 0.1", "unknown option 'kl.tagret' (did you mean 'kl.target'?)"),
        ("n_envs = 'four'", "--n-envs must be a whole number, got 'four'"),
        ("kl = 3", "--kl must be a table"),
        ("n_envs = = 3", "is not valid TOML"),
        ("agent = 'sac'", "is of another agent"),
    ):
        Path("f.toml").write_text(text)
        assert message in refused("train", "ppo", "CartPole-v1", "--config", "f.toml")


@pytest.mark.parametrize(("space", "kind"), [("Text(5)", "observation"), ("Graph(Discrete(2), None)", "action")])
def test_unsupported_spaces_are_named_with_a_remedy(space: str, kind: str) -> None:
    Path("odd.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.spaces import *\nfrom klrl.envs.probes import OneStep\n"
        "class Odd(OneStep):\n"
        f"    def __init__(self):\n        super().__init__()\n        self.{kind}_space = {space}\n"
        "gym.register('Odd-v0', entry_point=Odd)\n"
    )
    line = refused("train", "ppo", "Odd-v0", "--import", "odd", code=f"import sys; sys.path.insert(0, ''); {MAIN}")
    assert f"{kind} space {space.split('(')[0]}" in line
    assert "gymnasium.wrappers" in line


def test_a_missing_extra_is_named_with_its_install_line() -> None:
    without = f"import sys; sys.modules['mujoco'] = None; {MAIN}"
    assert "pip install 'klrl[mujoco]'" in refused("train", "ppo", "HalfCheetah-v5", code=without)
    without = f"import sys; sys.modules['Box2D'] = None; {MAIN}"
    assert "pip install 'klrl[box2d]'" in refused("train", "ppo", "LunarLander-v3", code=without)


def test_a_checkpoint_of_another_env_or_a_truncated_one() -> None:
    done = klrl("train", "ppo", "CartPole-v1", *QUICK, "--quiet")
    folder = done.stdout.splitlines()[1].split()[1]
    Path("runs").rename("elsewhere")
    folder = folder.replace("runs", "elsewhere")
    line = refused("eval", folder, "--env-id", "Acrobot-v1")
    assert "was trained on CartPole-v1: Acrobot-v1's observation space is Box" in line
    weights = next(Path(folder).rglob("tensors.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is damaged: tensors.safetensors does not match its manifest" in refused("eval", folder)


def test_a_run_dir_that_cannot_be_written_to() -> None:
    Path("file").write_text("")
    assert "--run-dir file/runs" in refused("train", "ppo", "CartPole-v1", "--run-dir", "file/runs")


def test_a_nan_in_training_is_one_line_and_exit_code_1() -> None:
    Path("bad.py").write_text(
        "import gymnasium as gym\nfrom klrl.envs.probes import OneStep\n"
        "class Bad(OneStep):\n    def reward(self, action):\n        return float('nan')\n"
        "gym.register('Bad-v0', entry_point=Bad)\n"
    )
    done = klrl("train", "ppo", "Bad-v0", "--import", "bad", *QUICK, code=f"import sys; sys.path.insert(0, ''); {MAIN}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("klrl: reward is nan in env 0 at step 0 of the rollout, 64 steps")
    assert "Traceback" not in done.stderr


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('torch' in sys.modules)); {MAIN}"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = klrl("--help", code=code)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert done.stdout.splitlines()[-1] == "False"
        assert "klrl train AGENT ENV" in done.stdout
    assert min(times) < 0.4
    details = klrl("train", "ppo", "--help")
    assert details.returncode == 0
    assert "--kl.on-overshoot {keep,rollback,project}" in details.stdout
    assert "--hidden-sizes" in details.stdout
    assert "Limit on the KL(old||new)" in details.stdout
