"""How long CartPole-v1 takes to be solved, from the start of the process, imports included.

    python tests/benchmarks/solve.py [--seeds 5] [--peer] [--option --env.vectorization vector ...]

Solved: the mean return of the last 100 episodes is at least 475. klrl with its preset, a process for each seed; with
``--peer`` Stable-Baselines3's PPO with the RL Zoo's settings beside it, in alternation.
"""

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def seconds_to_solve(seed: int, options: list[str]) -> float:
    """Seconds from the start of ``klrl train`` to the first logged update that shows it solved; infinite if none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "klrl", "train", "ppo", "CartPole-v1", "--seed", str(seed), "--quiet"]
        more = ["--eval-every", "0", "--final-episodes", "0", "--run-dir", folder]
        start = time.time()
        subprocess.run([*command, *more, *options], check=True, capture_output=True)
        (run,) = Path(folder).iterdir()
        events = EventAccumulator(str(run), {"scalars": 0})
        events.Reload()
        means = events.Scalars("rollout/ep_rew_mean")
    return min((event.wall_time - start for event in means if event.value >= 475), default=math.inf)


PEER = """
import sys, time
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

class Solved(BaseCallback):
    def _on_step(self):
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        if len(returns) == 100 and sum(returns) >= 47_500:
            print(time.time())
            return False
        return True

import torch
torch.set_num_threads(1)
seed = int(sys.argv[1])
settings = {"n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0}
schedules = {"learning_rate": lambda left: 0.001 * left, "clip_range": lambda left: 0.2 * left}
model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 8, seed=seed), seed=seed, device="cpu", **settings, **schedules)
model.learn(100_000, Solved())
"""


def seconds_of_peer(seed: int) -> float:
    """Seconds from the start of the process until SB3's PPO has solved it; infinite where 100,000 steps do not do."""
    start = time.time()
    done = subprocess.run([sys.executable, "-c", PEER, str(seed)], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) - start if done.stdout.strip() else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="Stable-Baselines3 beside it")
    parser.add_argument("--option", nargs=argparse.REMAINDER, default=[], help="further options of klrl train")
    given = parser.parse_args()
    start = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    print(f"import torch  {time.time() - start:.2f} s")
    seconds: dict[str, list[float]] = {"klrl": [], **({"SB3": []} if given.peer else {})}
    for seed in range(given.seeds):
        for name, found in seconds.items():
            found.append(seconds_to_solve(seed, given.option) if name == "klrl" else seconds_of_peer(seed))
    for name, found in seconds.items():
        print(f"{name} after  {statistics.median(found):.2f} s, of {', '.join(f'{x:.2f}' for x in sorted(found))}")


if __name__ == "__main__":
    main()
