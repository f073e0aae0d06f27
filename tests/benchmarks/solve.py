"""How long CartPole-v1 takes to be solved, from the start of the process, imports included.

    python tests/benchmarks/solve.py [--seeds 5] [--option --compile ...]

Solved: the mean return of the last 100 episodes is at least 475. klrl with its preset, a process for each seed.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--option", nargs=argparse.REMAINDER, default=[], help="further options of klrl train")
    given = parser.parse_args()
    start = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    print(f"import torch  {time.time() - start:.2f} s")
    seconds = [seconds_to_solve(seed, given.option) for seed in range(given.seeds)]
    print(f"solved after  {statistics.median(seconds):.2f} s, of {', '.join(f'{one:.2f}' for one in sorted(seconds))}")


if __name__ == "__main__":
    main()
