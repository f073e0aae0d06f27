"""klrl in other people's code: Stable-Baselines3's evaluation, and KL tracked around its PPO."""

import gymnasium as gym
import pytest
from stable_baselines3 import A2C
from stable_baselines3 import PPO as SB3PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import klrl
from klrl.kl import at_most, joint, kl, track


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
