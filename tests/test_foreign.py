"""klrl in other people's code: Stable-Baselines3's evaluation, and KL tracked around its PPO."""

from statistics import fmean
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3 import A2C
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import klrl
from klrl.kl import at_most, joint, kl, track
from klrl.sb3 import KLCallback


def test_sb3_evaluates_a_klrl_agent() -> None:
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=20_000, eval_every=0, quiet=True)
    mean, _ = evaluate_policy(run.agent, make_vec_env("CartPole-v1", 2, seed=0), n_eval_episodes=10)
    assert mean > 150
    single, _ = evaluate_policy(run.agent, gym.make("CartPole-v1"), n_eval_episodes=2, warn=False)
    assert single > 50


@pytest.mark.parametrize(
    ("algorithm", "env_id"), [(SB3PPO, "CartPole-v1"), (SB3PPO, "Pendulum-v1"), (A2C, "Pendulum-v1")]
)
def test_track_measures_a_foreign_update_exactly(algorithm: type, env_id: str) -> None:
    model = algorithm("MlpPolicy", make_vec_env(env_id, 2, seed=0), n_steps=64, seed=0, device="cpu")
    model.learn(128)
    obs, _ = model.policy.obs_to_tensor(model.rollout_buffer.observations.reshape(-1, *model.observation_space.shape))

    def policy() -> object:
        return joint(model.policy.get_distribution(obs).distribution)

    old = policy()
    with track(policy, at_most(0.02)) as update:  # type: ignore[arg-type]
        model.train()
    assert update.report.mean > 0.0
    # The policy as it was when track began stays what it was: the KL to it is that of SB3's whole update.
    assert kl(old, policy()).mean().item() == pytest.approx(update.report.mean, rel=1e-4)  # type: ignore[arg-type]
    assert update.report.of_limit == pytest.approx(update.report.mean / 0.02)


def test_track_in_a_plain_torch_loop_stops_it_at_the_limit() -> None:
    torch.manual_seed(0)
    envs = gym.make_vec("CartPole-v1", 8)
    policy = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.001)

    def pi(obs: torch.Tensor) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(logits=policy(obs))

    obs, _ = envs.reset(seed=0)
    for _ in range(5):
        seen, taken, rewards = [], [], []
        for _ in range(64):
            seen.append(torch.as_tensor(obs))
            with torch.no_grad():
                taken.append(pi(seen[-1]).sample())
            obs, reward, *_ = envs.step(taken[-1].numpy())
            rewards.append(torch.as_tensor(reward))
        batch, actions = torch.cat(seen), torch.cat(taken)
        returns = torch.stack(rewards).flip(0).cumsum(0).flip(0).flatten().float()
        advantage = (returns - returns.mean()) / returns.std()
        before = pi(batch)
        with track(pi, at_most(0.005), obs=batch, actions=actions) as update:
            path = []
            while len(path) < 100:
                optimizer.zero_grad()
                (-(pi(batch).log_prob(actions) * advantage).mean()).backward()
                optimizer.step()
                path.append(update.check().of_limit)
                if path[-1] > 1.0:
                    break
        report = update.report
        assert max(path[:-1]) <= 1.0 < path[-1] == report.of_limit < 4.0
        assert report.mean == pytest.approx(kl(before, pi(batch)).mean().item(), rel=1e-6)
        assert report.k1 is not None
        assert abs(report.k1.value - report.mean) < 5 * report.k1.stderr


class SixDimensions(gym.Env[Any, Any]):
    """One step, six action dimensions that are rewarded alike and independently."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (6,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), -float(np.square(action - 0.5).sum()), True, False, {}


@pytest.mark.parametrize("algorithm", [SB3PPO, A2C, TRPO])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_the_callback_logs_every_update_of_sb3(algorithm: Any, env_id: str) -> None:
    model = algorithm("MlpPolicy", make_vec_env(env_id, 2, seed=0), n_steps=64, seed=0, device="cpu")
    callback = KLCallback(at_most(0.01))
    model.learn(5 * 128, callback=callback)
    assert len(callback.reports) == 5
    assert all(report.mean >= 0.0 for report in callback.reports)
    assert any(report.mean > 0.0 for report in callback.reports)
    recorded = model.logger.name_to_value
    assert recorded["kl/mean"] == callback.reports[-1].mean
    assert recorded["kl/of_limit"] == pytest.approx(callback.reports[-1].mean / 0.01)


def test_trpo_of_sb3_contrib_bounds_the_mean_over_dimensions_of_the_reverse_kl() -> None:
    model = TRPO("MlpPolicy", make_vec_env(SixDimensions, 8, seed=0), n_steps=64, seed=0, target_kl=0.01, device="cpu")
    theirs = []

    class Watch(KLCallback):
        def _on_rollout_start(self) -> None:
            if self._old is not None:
                theirs.append(float(self.logger.name_to_value["train/kl_divergence_loss"]))
            super()._on_rollout_start()

    callback = Watch(at_most(0.01))
    model.learn(6 * 512, callback=callback)
    moved = [(report, kl) for report, kl in zip(callback.reports, theirs, strict=True) if kl > 1e-4]
    assert len(moved) >= 3
    for report, their_kl in moved:
        assert report.reverse == pytest.approx(6 * their_kl, rel=1e-3), "KL(new || old), divided by six dimensions"
    assert fmean(report.mean for report, _ in moved) > 0.03, "the joint KL is far beyond the limit of 0.01"
