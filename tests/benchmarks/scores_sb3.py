"""The scores of Stable-Baselines3's PPO and SAC on klrl's tasks: the same seeds and way of evaluating.

    python tests/benchmarks/scores_sb3.py ppo Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 Swimmer-v5 Walker2d-v5
    python tests/benchmarks/scores_sb3.py sac HalfCheetah-v5 --steps 200000 --learning-starts 10000

PPO has the settings that the RL Zoo gives for MuJoCo's v3 tasks, with VecNormalize; SAC has SB3's own defaults, which
are the zoo's for MuJoCo: 256x256, minibatches of 256, 3e-4, one gradient step for each environment step. The score is
the mean return of 20 deterministic episodes after the last step.
"""

import argparse
import statistics
import time
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

_LARGE = {
    "log_std_init": -2,
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "net_arch": {"pi": [256, 256], "vf": [256, 256]},
}
ZOO: dict[str, dict[str, Any]] = {
    "Ant-v5": {},
    "HalfCheetah-v5": {
        "batch_size": 64,
        "n_steps": 512,
        "gamma": 0.98,
        "learning_rate": 2.0633e-05,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
        "policy_kwargs": _LARGE,
    },
    "Hopper-v5": {
        "batch_size": 32,
        "n_steps": 512,
        "gamma": 0.999,
        "learning_rate": 9.80828e-05,
        "ent_coef": 0.00229519,
        "clip_range": 0.2,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
        "policy_kwargs": _LARGE,
    },
    "Humanoid-v5": {
        "batch_size": 256,
        "n_steps": 512,
        "gamma": 0.95,
        "learning_rate": 3.56987e-05,
        "ent_coef": 0.00238306,
        "clip_range": 0.3,
        "n_epochs": 5,
        "gae_lambda": 0.9,
        "max_grad_norm": 2,
        "vf_coef": 0.431892,
        "policy_kwargs": _LARGE,
    },
    "Swimmer-v5": {"gamma": 0.9999},
    "Walker2d-v5": {
        "batch_size": 32,
        "n_steps": 512,
        "gamma": 0.99,
        "learning_rate": 5.05041e-05,
        "ent_coef": 0.000585045,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.95,
        "max_grad_norm": 1,
        "vf_coef": 0.871923,
    },
}
"""PPO's settings by task, of one environment each; SB3's own defaults for what is not named."""


def score(agent: str, env: str, steps: int, seed: int, learning_starts: int) -> list[float]:
    """The returns of 20 episodes after training."""
    training = DummyVecEnv([lambda: Monitor(gym.make(env))])
    tested: Any = DummyVecEnv([lambda: Monitor(gym.make(env))])
    if agent == "ppo":
        normalised = VecNormalize(training, gamma=ZOO[env].get("gamma", 0.99))
        model: Any = PPO("MlpPolicy", normalised, seed=seed, device="cpu", **ZOO[env])
        tested = VecNormalize(tested, training=False, norm_reward=False)
        tested.obs_rms = normalised.obs_rms
    else:
        model = SAC("MlpPolicy", training, learning_starts=learning_starts, seed=seed, device="cpu")
    model.learn(steps)
    returns, _ = evaluate_policy(model, tested, 20, return_episode_rewards=True)
    return [float(each) for each in returns]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("agent", choices=("ppo", "sac"))
    parser.add_argument("envs", nargs="+", metavar="env")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning-starts", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for env in options.envs:
            began = time.perf_counter()
            returns = score(options.agent, env, options.steps, seed, options.learning_starts)
            mean, std = statistics.mean(returns), statistics.stdev(returns)
            print(f"{env} seed {seed}: {mean:.1f} +- {std:.1f} in {time.perf_counter() - began:.0f} s", flush=True)
