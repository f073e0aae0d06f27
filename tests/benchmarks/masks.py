"""PPO with action masks beside sb3-contrib's MaskablePPO: returns, and steps a second of processor time.

    python tests/benchmarks/masks.py [--seeds 0 1]

Both take the same rollouts, minibatches and epochs, with their own defaults otherwise, in alternation, on one thread.
Returns are of 20 deterministic episodes.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any

import gymnasium as gym
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3.common.env_util import make_vec_env

import klrl
from klrl.envs.make import EnvConfig, make_vector

N_ENVS = 8
ALIKE: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 10, "learning_rate": 1e-3}


def taxi() -> Any:
    """Taxi-v4, whose masks are in its infos, with sb3-contrib's method."""
    made: Any = gym.make("Taxi-v4")
    return ActionMasker(made, lambda env: made.unwrapped.action_mask(made.unwrapped.s))


def identity() -> Any:
    """A task of 50 actions, of which 40 are forbidden at each step."""
    return InvalidActionEnvDiscrete(dim=50, n_invalid_actions=40)


def ours(env: Callable[[], Any], steps: int, seed: int) -> Any:
    """klrl's agent after training."""
    with closing(make_vector(env, N_ENVS, EnvConfig())) as envs:
        agent = klrl.PPO(envs.single_observation_space, envs.single_action_space, klrl.PPOConfig(**ALIKE), seed=seed)
        buffer, (obs, _) = agent.new_buffer(N_ENVS), envs.reset(seed=seed)
        for _ in range(steps // N_ENVS):
            action, last_obs = agent.act(obs), obs
            obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
            buffer.add(last_obs, action, reward, terminated, truncated, obs)
            if buffer.full:
                agent.update(buffer)
    return agent


def theirs(env: Callable[[], Any], steps: int, seed: int) -> Any:
    """sb3-contrib's agent after training."""
    return MaskablePPO("MlpPolicy", make_vec_env(env, N_ENVS, seed=seed), seed=seed, device="cpu", **ALIKE).learn(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(
        "| task | seed | klrl steps/s | return | MaskablePPO steps/s | return | ratio |\n|---|---|---|---|---|---|---|"
    )
    for env, steps in ((taxi, 100_352), (identity, 30_720)):
        for seed in given.seeds:
            words, rates = [], []
            for train in (ours, theirs):
                begun = time.process_time()
                agent = train(env, steps, seed)
                rates.append(steps / (time.process_time() - begun))
                mean = evaluate_policy(agent, make_vec_env(env, 1, seed=1000), 20, warn=False)[0]
                words.append(f"{rates[-1]:,.0f} | {mean:.1f}")
            print(f"| {env.__name__} | {seed} | {' | '.join(words)} | {rates[0] / rates[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
