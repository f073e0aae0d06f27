"""klrl's PPO against Stable-Baselines3's on the same work, in alternation: steps per second of collecting and learning.

    python tests/benchmarks/ppo_vs_sb3.py [--rounds 5] [--work cartpole halfcheetah]

Both run every epoch of every update (klrl's early stop is off, its penalty and its exact-KL report are on) with one
thread and Gymnasium's own environments. Each measurement is a process of its own; what is timed begins after a
warm-up of two rollouts, so imports and construction do not count. klrl also writes its logs, SB3 does not.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

WORK = {
    "cartpole": {"env": "CartPole-v1", "n_envs": 8, "n_steps": 128, "batch_size": 256, "n_epochs": 4, "steps": 60_000},
    "halfcheetah": {
        "env": "HalfCheetah-v5",
        "n_envs": 1,
        "n_steps": 2048,
        "batch_size": 64,
        "n_epochs": 10,
        "steps": 20_480,
    },
}


def klrl_speed(env: str, n_envs: int, n_steps: int, batch_size: int, n_epochs: int, steps: int) -> float:
    """Steps per second of ``klrl.train`` between the second logged update and the last."""
    import klrl

    with tempfile.TemporaryDirectory() as folder:
        run = klrl.train(
            "ppo",
            env,
            run_dir=folder,
            total_timesteps=steps + 2 * n_envs * n_steps,
            n_envs=n_envs,
            n_steps=n_steps,
            batch_size=batch_size,
            n_epochs=n_epochs,
            hidden_sizes=(64, 64),
            activation="tanh",
            eval_every=0,
            save_every=0,
            quiet=True,
            kl={"stop": 0.0, "check": "update"},
        )
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return (rows[-1]["step"] - rows[1]["step"]) / (rows[-1]["wall"] - rows[1]["wall"])


def sb3_speed(env: str, n_envs: int, n_steps: int, batch_size: int, n_epochs: int, steps: int) -> float:
    """Steps per second of SB3's ``learn`` after a warm-up of two rollouts."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    model = PPO(
        "MlpPolicy",
        make_vec_env(env, n_envs),
        n_steps=n_steps,
        batch_size=batch_size,
        n_epochs=n_epochs,
        device="cpu",
        policy_kwargs={"net_arch": [64, 64]},
    )
    model.learn(2 * n_envs * n_steps)
    before, start = model.num_timesteps, time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    return (model.num_timesteps - before) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--one", choices=["klrl", "sb3"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        speed = klrl_speed if options.one == "klrl" else sb3_speed
        print("\n" + str(speed(**WORK[options.work[0]])))  # type: ignore[arg-type]
        return
    for work in options.work:
        speeds: dict[str, list[float]] = {"klrl": [], "sb3": []}
        for _ in range(options.rounds):
            for one, measured in speeds.items():
                command = [sys.executable, __file__, "--one", one, "--work", work]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                measured.append(float(out.splitlines()[-1]))
        mine, theirs = (statistics.median(speeds[one]) for one in ("klrl", "sb3"))
        ratio = statistics.median(a / b for a, b in zip(speeds["klrl"], speeds["sb3"], strict=True))
        print(
            f"{WORK[work]['env']:16} klrl {mine:8,.0f} steps/s   SB3 {theirs:8,.0f} steps/s   ratio {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
