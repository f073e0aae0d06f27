"""PPO on pixels, klrl's beside Stable-Baselines3's: steps a second of processor time, on one core.

    python tests/benchmarks/pixels.py [--rounds 3] [--updates 4] [--work pong carracing]

Both learn from the same wrapped environments (klrl's --env.wrappers), 8 of them by 128 steps, in minibatches of 256 for
4 epochs, with the convolutional net of Mnih et al.: as many gradient steps. klrl trains as ``klrl train`` does, with
exact KL, projection and logs; SB3 logs nothing. In a round each is a process of its own, one after the other; what
counts is the ratio within a round. Processor time leaves out what other processes take of the core.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

WORKS: dict[str, dict[str, Any]] = {
    "pong": {"env": "ALE/Pong-v5", "wrappers": ["atari"]},
    "carracing": {"env": "CarRacing-v3", "wrappers": ["grayscale", "resize:84", "stack:4"]},
}
ALIKE = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "learning_rate": 2.5e-4, "gae_lambda": 0.95, "gamma": 0.99}
N_ENVS, ROWS = 8, 8 * 128
PEERS = ("klrl", "stable-baselines3")


def klrl(env: str, wrappers: list[str], updates: int, **options: Any) -> list[float]:
    """The processor time at the end of each update of ``klrl.train``."""
    from klrl import PPO, train
    from klrl.config import option_names

    class Timed(PPO):
        ends: list[float] = []  # noqa: RUF012

        def update(self, *args: Any, **kwargs: Any) -> Any:
            result = super().update(*args, **kwargs)
            self.ends.append(time.process_time())
            return result

    with tempfile.TemporaryDirectory() as folder:
        how = {"run_dir": folder, "quiet": True, "eval_every": 0, "final_episodes": 0, "hidden_sizes": []}
        how |= {"share_network": True} if "share_network" in option_names(PPO.Config) else {}
        steps = (updates + 1) * ROWS - N_ENVS * 100  # rows that only reset are no steps
        train(Timed, env, total_timesteps=steps, env={"wrappers": wrappers}, **how, **ALIKE, **options)
    return Timed.ends


def sb3(env: str, wrappers: list[str], updates: int, **options: Any) -> list[float]:
    """The processor time at the end of each ``train`` of SB3's PPO."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    from klrl.envs.make import EnvConfig, check, env_arguments
    from klrl.envs.pixels import named_wrappers, wrapped

    class Timed(PPO):
        ends: list[float] = []  # noqa: RUF012

        def train(self) -> None:
            super().train()
            self.ends.append(time.process_time())

    check(env)
    make = partial(gym.make, env, **env_arguments(env, EnvConfig(wrappers=tuple(wrappers))))
    envs = make_vec_env(lambda: wrapped(make, named_wrappers(wrappers)), N_ENVS)
    Timed("CnnPolicy", envs, device="cpu", **ALIKE, **options).learn((updates + 1) * ROWS)
    return Timed.ends


def rate(who: str, work: str, updates: int) -> float:
    """Steps per second of processor time, the first update left out."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    ends = {"klrl": klrl, "stable-baselines3": sb3}[who](**WORKS[work], updates=updates)
    return (len(ends) - 1) * ROWS / (ends[-1] - ends[0])


def measured(who: str, work: str, updates: int) -> float:
    """``rate`` in a process of its own."""
    command = [sys.executable, __file__, "--one", who, "--work", work, "--updates", str(updates)]
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    if done.returncode:
        raise SystemExit(f"{who} on {work} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--one", choices=PEERS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(rate(given.one, given.work[0], given.updates))
        return
    print("| work | klrl steps/s | SB3 steps/s | ratio: median (min to max) |\n|---|---|---|---|")
    for work in given.work:
        pairs = [[measured(who, work, given.updates) for who in PEERS] for _ in range(given.rounds)]
        ratios = [mine / theirs for mine, theirs in pairs]
        mine, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
        span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {work} | {mine:,.0f} | {theirs:,.0f} | {span} |", flush=True)


if __name__ == "__main__":
    main()
