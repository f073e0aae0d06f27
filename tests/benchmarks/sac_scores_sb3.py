"""The score of Stable-Baselines3's SAC on the work of a klrl preset: the same seeds, steps and way of evaluating.

    python tests/benchmarks/sac_scores_sb3.py HalfCheetah-v5 --steps 200000 --seeds 0 1 --learning-starts 10000

SB3's own defaults otherwise, which are those of its zoo for MuJoCo: 256x256, minibatches of 256, 3e-4, one gradient
step for each environment step. The score is the mean return of 20 deterministic episodes after the last step.
"""

import argparse
import statistics

import gymnasium as gym
import torch
from stable_baselines3 import SAC
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning-starts", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        env = Monitor(gym.make(options.env))
        model = SAC("MlpPolicy", env, learning_starts=options.learning_starts, seed=seed, device="cpu")
        model.learn(options.steps)
        returns, _ = evaluate_policy(model, Monitor(gym.make(options.env)), 20, return_episode_rewards=True)
        mean, std = statistics.mean(returns), statistics.stdev(returns)
        print(f"{options.env} seed {seed}: {mean:.1f} +- {std:.1f}", flush=True)
