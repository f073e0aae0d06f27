"""What a memory does where observations hide the state: PPO on CartPole-v1 without velocities.

    python tests/benchmarks/memory.py [--seeds 0 1 2 3 4] [--policies lstm gru none recurrent-ppo]
    python tests/benchmarks/memory.py --speed

Beside klrl's defaults, sb3-contrib's RecurrentPPO with the settings of the RL Zoo for that task, observations and
rewards normalised. With ``--speed``: processor time for the same 8 x 256 steps, batches, epochs and networks, in
alternation, on one thread.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

import klrl


class Hidden(gym.ObservationWrapper[Any, Any, Any]):
    """CartPole-v1 that shows positions alone."""

    def __init__(self) -> None:
        super().__init__(gym.make("CartPole-v1"))
        space: Any = self.env.observation_space
        self.observation_space = gym.spaces.Box(space.low[[0, 2]], space.high[[0, 2]])

    def observation(self, observation: Any) -> Any:
        return observation[[0, 2]]


def peer(seed: int, **options: Any) -> tuple[RecurrentPPO, VecNormalize]:
    """sb3-contrib's agent and its environments."""
    envs = VecNormalize(make_vec_env(Hidden, 8, seed=seed))
    return RecurrentPPO("MlpLstmPolicy", envs, seed=seed, device="cpu", **options), envs


def score(policy: str, seed: int, steps: int, run_dir: str) -> float:
    """The mean return of 20 deterministic episodes after training."""
    if policy != "recurrent-ppo":
        options: dict[str, Any] = {"memory": policy, "seed": seed, "total_timesteps": steps}
        return klrl.train("ppo", Hidden, **options, run_dir=run_dir, quiet=True).evaluate(episodes=20).mean

    def linear(start: float) -> Any:
        return lambda left: left * start

    parts = {"ortho_init": False, "activation_fn": torch.nn.ReLU, "lstm_hidden_size": 64, "enable_critic_lstm": True}
    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20}
    settings |= {"learning_rate": linear(1e-3), "clip_range": linear(0.2)}
    model, envs = peer(seed, **settings, policy_kwargs={**parts, "net_arch": {"pi": [64], "vf": [64]}})
    model.learn(steps)
    envs.training = envs.norm_reward = False
    return float(evaluate_policy(model, envs, 20)[0])  # type: ignore[arg-type]


def speed(policy: str) -> float:
    """Steps per second of processor time, over four rollouts and updates."""
    steps, begun = 4 * 8 * 256, 0.0
    if policy == "recurrent-ppo":
        parts = {"lstm_hidden_size": 64, "net_arch": [64, 64]}
        model, _ = peer(0, n_steps=256, batch_size=256, n_epochs=10, policy_kwargs=parts)
        begun = time.process_time()
        model.learn(steps)
        return steps / (time.process_time() - begun)
    envs = gym.vector.SyncVectorEnv([Hidden] * 8)
    agent = klrl.PPO(envs.single_observation_space, envs.single_action_space, klrl.PPOConfig(memory=policy))  # type: ignore[arg-type]
    buffer = agent.new_buffer(8)
    begun, (obs, _) = time.process_time(), envs.reset(seed=0)
    for _ in range(steps // 8):
        action, last_obs = agent.collect(obs, buffer), obs
        obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
        buffer.add(last_obs, action, reward, terminated, truncated, obs)
        if buffer.full:
            agent.update(buffer)
    return steps / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["lstm", "gru", "none", "recurrent-ppo"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--total-timesteps", type=int, default=300_000)
    parser.add_argument("--run-dir", default="runs/memory")
    parser.add_argument("--speed", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.speed:
        found: dict[str, list[float]] = {policy: [] for policy in given.policies}
        for _ in range(3):
            for policy, rates in found.items():
                rates.append(speed(policy))
        for policy, rates in found.items():
            print(f"| {policy} | {statistics.median(rates):,.0f} steps/s |", flush=True)
        return
    for policy in given.policies:
        returns = [score(policy, seed, given.total_timesteps, given.run_dir) for seed in given.seeds]
        each = ", ".join(f"{one:.0f}" for one in returns)
        print(f"| {policy} | {np.mean(returns):.1f} ± {np.std(returns):.1f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
