"""What a bottleneck does where observations distract: PPO on CartPole-v1 with 20 columns of noise.

    python tests/benchmarks/bottleneck.py [--seeds 0 1 2 3 4]

Each policy learns with noise of standard deviation 1, and is evaluated with other noise of that size and with noise
three times as large. Rate and I(S; A) are the last update's, in nats.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np

import klrl
from klrl.agents.base import Agent
from klrl.envs.make import EnvConfig, make_vector
from klrl.training.evaluation import run_episodes

COLUMNS = 20
POLICIES: dict[str, dict[str, Any]] = {
    "no bottleneck": {},
    "rate held at 2 nats (lagrange)": {"size": 8, "target": 2.0},
    "rate held at 0.7 nats (lagrange)": {"size": 8, "target": 0.7},
    "coefficient annealed from 1e-4 to 1e-2": {
        "size": 8,
        "target": 0.0,
        "rule": "annealed",
        "coef": 1e-4,
        "anneal_to": 1e-2,
        "anneal_over": 60,
    },
}
OPTIONS: dict[str, Any] = {"n_envs": 8, "n_steps": 128, "batch_size": 256, "learning_rate": 1e-3, "gamma": 0.98}


class Distracting(gym.ObservationWrapper[Any, Any, Any]):
    """The environment with columns of white noise behind its observations."""

    def __init__(self, env: gym.Env[Any, Any], scale: float) -> None:
        super().__init__(env)
        self.scale, self.noise = scale, np.random.default_rng(0)
        high = np.concatenate([env.observation_space.high, np.full(COLUMNS, np.inf)]).astype(np.float32)
        self.observation_space = gym.spaces.Box(-high, high, dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self.noise = np.random.default_rng([seed, 1])
        return super().reset(seed=seed, options=options)

    def observation(self, observation: Any) -> Any:
        noise = self.scale * self.noise.standard_normal(COLUMNS)
        return np.concatenate([observation, noise]).astype(np.float32)


def distracting(scale: float) -> Callable[[], gym.Env[Any, Any]]:
    """What makes CartPole-v1 with noise of this standard deviation."""
    return lambda: Distracting(gym.make("CartPole-v1"), scale)


def score(agent: Agent, scale: float) -> float:
    """The mean return of 40 episodes with the most likely actions."""
    with closing(make_vector(distracting(scale), 8, EnvConfig())) as envs:
        return run_episodes(agent, envs, 123, episodes=40).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--run-dir", default="runs/bottleneck")
    given = parser.parse_args()
    common: dict[str, Any] = {"quiet": True, "eval_every": 0, "final_episodes": 0, "run_dir": given.run_dir}
    rows = []
    for name, bottleneck in POLICIES.items():
        found = []
        for seed in given.seeds:
            options = {**OPTIONS, **common, "total_timesteps": 50_000, "seed": seed, "bottleneck": bottleneck}
            run = klrl.train("ppo", distracting(1.0), **options)
            last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
            known = [last.get(f"bottleneck/{tag}", np.nan) for tag in ("rate", "information")]
            found.append([score(run.agent, 1.0), score(run.agent, 3.0), *known])
        mean, std = np.mean(found, 0), np.std(found, 0)
        rate = "" if np.isnan(mean[2]) else f"{mean[2]:.2f} | {mean[3]:.2f}"
        returns = " | ".join(f"{m:.0f} ± {s:.0f}" for m, s in zip(mean[:2], std[:2], strict=True))
        rows.append(f"| {name} | {returns} | {rate or ' | '} |")
    print("| policy | noise as in training | three times as large | rate | I(S; A) |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
