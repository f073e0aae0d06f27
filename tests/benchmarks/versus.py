"""What the comparisons with Stable-Baselines3 share: each measurement a process of its own, the two in alternation."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

Work = dict[str, dict[str, Any]]


def klrl_speed(agent: str, env: str, n_envs: int, steps: int, warm_up: int, **config: Any) -> float:
    """Steps per second of ``klrl.train`` between the second logged update, at ``warm_up`` steps, and the last."""
    import klrl

    with tempfile.TemporaryDirectory() as folder:
        run = klrl.train(
            agent,
            env,
            run_dir=folder,
            total_timesteps=steps + warm_up,
            n_envs=n_envs,
            eval_every=0,
            save_every=0,
            quiet=True,
            **config,
        )
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return (rows[-1]["step"] - rows[1]["step"]) / (rows[-1]["wall"] - rows[1]["wall"])


def sb3_speed(algorithm: Any, env: str, n_envs: int, steps: int, warm_up: int, **config: Any) -> float:
    """Steps per second of SB3's ``learn`` after ``warm_up`` steps."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    model = algorithm("MlpPolicy", make_vec_env(env, n_envs), device="cpu", **config)
    model.learn(warm_up)
    before, start = model.num_timesteps, time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return (model.num_timesteps - before) / (time.perf_counter() - start)


def compare(script: str, doc: str | None, work: Work, klrl: Callable[..., float], sb3: Callable[..., float]) -> None:
    """Run the comparison as the command line asks: medians of both, and the median of the paired ratios."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs="+", choices=list(work), default=list(work))
    parser.add_argument("--one", choices=["klrl", "sb3"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + str((klrl if options.one == "klrl" else sb3)(**work[options.work[0]])))
        return
    for name in options.work:
        speeds: dict[str, list[float]] = {"klrl": [], "sb3": []}
        for _ in range(options.rounds):
            for one, measured in speeds.items():
                command = [sys.executable, script, "--one", one, "--work", name]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                measured.append(float(out.splitlines()[-1]))
        mine, theirs = (statistics.median(speeds[one]) for one in ("klrl", "sb3"))
        ratio = statistics.median(a / b for a, b in zip(speeds["klrl"], speeds["sb3"], strict=True))
        line = f"klrl {mine:8,.0f} steps/s   SB3 {theirs:8,.0f} steps/s   ratio {ratio:.2f}"
        print(f"{work[name]['env']:16} {line}", flush=True)
