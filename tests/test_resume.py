"""train(N) and resume(2N) are train(2N): weights, optimizer, normaliser, coefficients, replay rows, logged figures."""

import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import klrl
from klrl.rundir import checkpoint

SMALL = {
    "ppo": {"n_envs": 4, "n_steps": 64, "batch_size": 64, "n_epochs": 2},
    "trpo": {"n_envs": 4, "n_steps": 50, "batch_size": 50},
    "sac": {
        "n_envs": 2,
        "gradient_steps": 1,
        "learning_starts": 100,
        "batch_size": 32,
        "hidden_sizes": (16, 16),
        "kl": {"every": 70},
        "buffer_size": 700,
    },
}


def content(folder: Path) -> dict[str, Any]:
    """All that the last checkpoint holds, but for times and where the total is named."""
    path = checkpoint.resolve(folder)
    whole = checkpoint.load(path, with_rows=True)
    whole["state"]["loop"]["progress"].pop("training_time")
    for key in [k for k in whole["state"]["loop"]["progress"]["figures"] or {} if k.startswith("time/")]:
        whole["state"]["loop"]["progress"]["figures"].pop(key)
    whole["state"]["options"].pop("run_dir")
    capacity: dict[int, Any] = {}
    for start, parts in checkpoint.load_rows(path, whole.pop("rows")):
        for i, row in enumerate(parts["rows"]):
            capacity[start + i] = row
    loop = whole["state"]["loop"]["buffer"]
    whole["replay"] = {i: row for i, row in capacity.items() if i >= loop.get("written", 0) - loop.get("size", 0)}
    return whole


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{path}.{key} is in one only" for key in a.keys() ^ b.keys()]
        return missing + [line for key in a.keys() & b.keys() for line in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        same = a == b or (a != a and b != b)
    return [] if same else [f"{path}: {a} is not {b}"]


def seed_globals(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def check_same(agent: str, task: Any, steps: int, **options: Any) -> None:
    options = {
        **SMALL[agent],
        "quiet": True,
        "seed": 3,
        "eval_every": 3,
        "eval_episodes": 2,
        "histogram_every": 2,
        **options,
    }
    seed_globals(0)
    whole = klrl.train(agent, task, total_timesteps=2 * steps, run_dir="whole", **options)
    seed_globals(0)
    half = klrl.train(agent, task, total_timesteps=steps, run_dir="half", **options)
    seed_globals(1)
    resumed = klrl.resume(half.folder, None if isinstance(task, str) else task, total_timesteps=2 * steps)
    assert resumed.folder == half.folder
    assert not differences(content(whole.folder), content(half.folder))
    assert not differences(dict(enumerate(rows(whole.folder))), dict(enumerate(rows(half.folder))))
    assert resumed.score == whole.score
    events = EventAccumulator(str(half.folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    steps_shown = [event.step for event in events.Scalars("kl/mean")]
    assert steps_shown == [row["step"] for row in rows(half.folder)], "TensorBoard shows no step twice, and each"
    assert len(list(half.folder.glob("events.*"))) == 2
    histograms = [event.step for event in events.Histograms("kl/log10_per_state")]
    assert histograms == steps_shown[options["histogram_every"] - 1 :: options["histogram_every"]]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_resumed_run_is_the_same_run(vectorization: str) -> None:
    check_same("ppo", "CartPole-v1", 1000, env={"vectorization": vectorization})


def test_an_agent_that_sees_images_goes_on() -> None:
    def probe() -> Any:
        return gym.make("klrl/RewardByBoth-v0", action="discrete", observation="image")

    check_same("sac", probe, 100, kl={"every": 20}, learning_starts=40)


class Rounding(gym.Wrapper[Any, Any, Any, Any]):
    """Shows float64 where its space says float32, changes the action it is given, and draws when it is made."""

    def __init__(self) -> None:
        super().__init__(gym.make("Pendulum-v1"))
        self.scale = 1 + float(np.random.random()) * 0

    def step(self, action: Any) -> Any:
        action *= 0.5 * self.scale
        obs, *rest = super().step(action)
        return np.asarray(obs, np.float64) / 3.0, *rest


def test_an_environment_that_rounds_and_meddles_is_replayed_and_its_evaluation_leaves_no_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_same("ppo", Rounding, 500)
    assert "cannot be replayed" not in capsys.readouterr().err


@pytest.mark.parametrize("agent", ["ppo", "trpo", "sac"])
def test_the_seed_alone_decides_what_is_logged(agent: str) -> None:
    logged = []
    for state in (0, 1):
        seed_globals(state)  # a new process has torch's generator in a state of its own
        run = klrl.train(agent, "Pendulum-v1", total_timesteps=400, run_dir=str(state), quiet=True, **SMALL[agent])
        logged.append(rows(run.folder))
    assert len(logged[0]) >= 2
    assert logged[0] == logged[1]


class Noisy(gym.RewardWrapper[Any, Any]):
    """Draws from every global generator, as users' environments do."""

    def reward(self, reward: Any) -> float:
        return float(reward) + random.random() + np.random.normal() + float(torch.rand(()))


def test_the_global_generators_go_on() -> None:
    check_same("ppo", lambda: Noisy(gym.make("CartPole-v1")), 500)


@pytest.mark.parametrize(
    ("agent", "env", "steps"),
    [
        pytest.param("ppo", "HalfCheetah-v5", 600, marks=pytest.mark.slow),
        ("ppo", "LunarLander-v3", 1000),
        ("trpo", "Pendulum-v1", 800),  # where all episodes end, and the next rows only reset
        ("sac", "CartPole-v1", 450),
        ("sac", "Pendulum-v1", 400),
        ("sac", "LunarLander-v3", 450),
    ],
)
def test_a_resumed_run_is_the_same_run_for_every_agent(agent: str, env: str, steps: int) -> None:
    options = {"lr_schedule": "constant"} if agent == "ppo" else {}  # a schedule depends on the total
    check_same(agent, env, steps, **options)


@pytest.mark.slow
@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v5", "LunarLander-v3"])
@pytest.mark.parametrize("agent", ["ppo", "trpo", "sac"])
def test_a_resumed_run_is_the_same_run_everywhere(agent: str, env: str, vectorization: str) -> None:
    options = {"lr_schedule": "constant"} if agent == "ppo" else {}
    check_same(agent, env, 600, env={"vectorization": vectorization}, **options)
