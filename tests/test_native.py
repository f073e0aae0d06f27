"""The environments written in torch are Gymnasium's, step by step, end and begin as theirs, and resume exactly."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import klrl
from klrl.envs.make import EnvConfig, make_vector
from klrl.envs.native import CartPole, Pendulum, TorchVectorEnv


def moved(env: TorchVectorEnv, theirs: Any, state: np.ndarray, action: Any) -> None:
    """Compare one step from ``state`` with that of Gymnasium's environment."""
    theirs.reset(seed=0)
    theirs.unwrapped.state = state
    obs, reward, terminated, _, _ = theirs.unwrapped.step(action[0])
    env.state = torch.from_numpy(state)[None].double()
    mine = env.step(action)
    assert np.abs(mine[0][0] - obs).max() < 1e-6
    assert abs(mine[1][0] - reward) < 1e-6
    assert bool(mine[2][0]) == terminated
    assert np.abs(env.state[0].numpy() - np.asarray(theirs.unwrapped.state)).max() < 1e-6
    env.reset()


def test_cartpole_moves_as_gymnasiums_step_by_step() -> None:
    env, theirs, rng = CartPole(1), gym.make("CartPole-v1"), np.random.default_rng(0)
    for _ in range(300):
        moved(env, theirs, rng.uniform(-1, 1, 4) * [2.4, 3.0, 0.21, 3.0], rng.integers(2, size=1))


def test_pendulum_moves_as_gymnasiums_step_by_step() -> None:
    env, theirs, rng = Pendulum(1), gym.make("Pendulum-v1"), np.random.default_rng(0)
    for _ in range(300):
        moved(env, theirs, rng.uniform(-1, 1, 2) * [12.0, 8.0], rng.uniform(-3, 3, (1, 1)).astype(np.float32))


@pytest.mark.parametrize(
    ("env_id", "theirs"), [("klrl/CartPole-v1", "CartPole-v1"), ("klrl/Pendulum-v1", "Pendulum-v1")]
)
def test_spaces_time_limits_and_resets_are_gymnasiums(env_id: str, theirs: str) -> None:
    envs, one = make_vector(env_id, 64, EnvConfig()), gym.make(theirs)
    assert envs.single_observation_space == one.observation_space
    assert envs.single_action_space == one.action_space
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.unwrapped.max_episode_steps == one.spec.max_episode_steps  # type: ignore[union-attr, attr-defined]
    first, _ = envs.reset(seed=0)
    ended, lengths, seen = np.zeros(64, bool), np.zeros(64, int), []
    rng = np.random.default_rng(0)
    for _ in range(500):
        action = rng.integers(2, size=64) if env_id.endswith("Pole-v1") else np.zeros((64, 1), np.float32)
        obs, reward, terminated, truncated, info = envs.step(action)
        assert (obs.dtype, terminated.dtype, info) == (np.float32, np.bool_, {})
        assert (reward[ended] == 0).all(), "a row that only resets has no reward"
        assert not (terminated | truncated)[ended].any()
        lengths = np.where(ended, 0, lengths + 1)
        ended = terminated | truncated
        seen += lengths[ended].tolist()
        assert (lengths[truncated] == one.spec.max_episode_steps).all()  # type: ignore[union-attr]
    assert len(seen) > 64
    assert (np.abs(first) <= (0.05 if env_id.endswith("Pole-v1") else 1.0)).all()
    assert not (first == envs.reset()[0]).all(), "without a seed, other episodes"
    assert (first == envs.reset(seed=0)[0]).all()


def test_cartpoles_returns_under_a_fixed_policy_are_gymnasiums() -> None:
    lengths = []
    for env_id in ("klrl/CartPole-v1", "CartPole-v1"):
        envs = make_vector(env_id, 100, EnvConfig())
        obs, _ = envs.reset(seed=0)
        running, steps = np.ones(100, bool), np.zeros(100)
        while running.any():
            obs, _, terminated, truncated, _ = envs.step((obs[:, 2] + 0.5 * obs[:, 3] > 0.02).astype(np.int64))
            steps += running
            running &= ~(terminated | truncated)
        lengths.append(steps.mean())
        envs.close()
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


@pytest.mark.parametrize("env_id", ["klrl/CartPole-v1", "klrl/Pendulum-v1"])
def test_a_resumed_run_is_the_same_run(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small: Any = {"n_envs": 8, "n_steps": 50, "quiet": True, "eval_every": 0, "final_episodes": 0}
    whole = klrl.train("ppo", env_id, total_timesteps=2000, run_dir="whole", lr_schedule="constant", **small)
    half = klrl.train("ppo", env_id, total_timesteps=1000, run_dir="half", lr_schedule="constant", **small)
    again = klrl.resume(half.folder, total_timesteps=2000)
    assert torch.equal(whole.agent.policy_params.flat, again.agent.policy_params.flat)  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [CartPole, Pendulum])
def test_a_step_on_the_gpu_is_the_cpus_and_stays_there(kind: Any) -> None:
    near, far = kind(16), kind(16, device="cuda")
    near.reset(seed=0)
    far.reset(seed=0)
    far.state = near.state.cuda()
    action = np.random.default_rng(0).integers(2, size=16) if kind is CartPole else np.ones((16, 1), np.float32)
    obs, reward, *_ = far.step(torch.as_tensor(action, device="cuda"))
    mine = near.step(action)
    assert obs.device.type == reward.device.type == "cuda"
    assert np.abs(obs.cpu().numpy() - mine[0]).max() < 1e-6
