"""PPO in one and in several processes, in alternation: steps per second, and the share of time spent in reductions.

    python tests/benchmarks/ranks.py [--processes 2] [--rounds 3] [--figure tests/pictures/ranks.svg]

Each process has its preset's environments, rows and minibatches, so that several learn from as many times the steps.
Then, on paper: at how many ranks a step's all-reduce takes a fifth of an update, by the bytes of a ring over a network
of so many GB/s and its latency, beside the measured time of one process's step.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from klrl import PPO, PPOConfig
from klrl.rundir.history import read_history
from klrl.training.randomness import random_state_kept

WORK = {"CartPole-v1": 150_000, "HalfCheetah-v5": 40_000}
NETWORKS = {"gloo over 10 Gb/s": (1.1, 50e-6), "NCCL in one machine": (50.0, 10e-6)}  # GB/s, seconds a hop


def measured(env: str, processes: int) -> tuple[float, float]:
    """Steps per second of a run without evaluations, and its reductions' share of the time."""
    with tempfile.TemporaryDirectory() as folder:
        steps = WORK[env] * processes
        words = ["--total-timesteps", str(steps), "--processes", str(processes), "--run-dir", folder, "--quiet"]
        words += ["--final-episodes", "0", "--eval-every", "0"]
        subprocess.run([sys.executable, "-m", "klrl", "train", "ppo", env, *words], check=True, capture_output=True)
        history = read_history(next(Path(folder).iterdir()))
        return history.last("time/fps"), float(np.nanmean(history["time/reduce_share"])) if processes > 1 else 0.0


def projected() -> None:
    """The number of ranks at which a ring's all-reduce takes a fifth of an update's time."""
    print("| network | weights | a step alone | " + " | ".join(NETWORKS) + " |\n|---|---|---|---|---|")
    for width in (64, 256):
        seconds, weights = step_seconds(width)
        cells = []
        for rate, latency in NETWORKS.values():
            for ranks in range(2, 100_000):
                # A ring passes 2 (n - 1) pieces of 1/n of the vector.
                moved = 2 * (ranks - 1) * (latency + 4 * weights / ranks / (rate * 1e9))
                if moved > 0.25 * seconds:
                    break
            cells.append(f"{ranks}")
        print(f"| {width} x {width} | {weights:,} | {1e6 * seconds:,.0f} us | {' | '.join(cells)} |")


def step_seconds(width: int) -> tuple[float, int]:
    """The time of a minibatch step of 256 rows of HalfCheetah's size, and the number of weights."""
    box, action = spaces.Box(-np.inf, np.inf, (17,)), spaces.Box(-1, 1, (6,))
    with random_state_kept(0):
        agent = PPO(box, action, PPOConfig(n_steps=64, batch_size=256, n_epochs=10, hidden_sizes=(width, width)))
        buffer: Any = agent.new_buffer(32)
        rng, no = np.random.default_rng(0), np.zeros(32, bool)
        seconds = []
        for _ in range(4):
            for _ in range(64):
                obs = rng.normal(size=(32, 17)).astype(np.float32)
                buffer.add(obs, agent.act(obs), rng.normal(size=32), no, no, obs)
            start = time.perf_counter()
            agent.update(buffer)
            seconds.append((time.perf_counter() - start) / 80)
    return min(seconds), agent.policy_params.flat.numel() + agent.critic_params.flat.numel()


def draw(path: Path, found: dict[str, dict[int, float]]) -> None:
    """Draw steps per second beside one process's, for each environment."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3))
    most = max(max(rates) for rates in found.values())
    axes.plot([1, most], [1, most], color="0.7", linewidth=1, label="as many times")
    for env, rates in found.items():
        axes.plot(list(rates), [rate / rates[1] for rate in rates.values()], marker="o", label=env)
    axes.set(xlabel="processes on two cores", ylabel="times one process's steps per second", xticks=range(1, most + 1))
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| environment | processes | steps/s | times one | share of reductions |\n|---|---|---|---|---|", flush=True)
    found: dict[str, dict[int, float]] = {}
    for env in WORK:
        rates: dict[int, list[tuple[float, float]]] = {n: [] for n in (1, *given.processes)}
        for _ in range(given.rounds):
            for processes, seen in rates.items():
                seen.append(measured(env, processes))
        for processes, seen in rates.items():
            fps, share = (statistics.median(each) for each in zip(*seen, strict=True))
            found.setdefault(env, {})[processes] = fps
            ratios = [theirs / one for (theirs, _), (one, _) in zip(seen, rates[1], strict=True)]
            print(f"| {env} | {processes} | {fps:,.0f} | {statistics.median(ratios):.2f} | {share:.0%} |", flush=True)
    print()
    projected()
    if given.figure is not None:
        draw(given.figure, found)


if __name__ == "__main__":
    main()
