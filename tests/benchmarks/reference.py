"""What a limit on KL(policy||reference) keeps and costs where the task changes: a frontier of two returns.

    python tests/benchmarks/reference.py [--tasks cartpole-short hopper ...] [--seeds 0 1 2] [--figure FILE]

A policy learns one task, and goes on in a changed one from its own weights, without a reference and held within limits
of several sizes to what it was. Each is then evaluated in both tasks. Finished runs become lines of reference.jsonl
beside this file, which are not run again.
"""

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from matplotlib.figure import Figure

import klrl
from klrl.agents.base import Agent
from klrl.analysis.figures import COLOURS, tidy
from klrl.envs.make import EnvConfig, EnvFactory, make_vector
from klrl.training.evaluation import run_episodes

RESULTS = Path(__file__).parent / "reference.jsonl"
EPISODES = 40


class Task(NamedTuple):
    """A task and what it changes into."""

    env: str
    change: str
    """In words."""
    changed: EnvFactory
    steps: int
    more_steps: int
    targets: tuple[float, ...]
    """In nats; 0: without a reference."""
    options: dict[str, Any]
    """Of the second training, whose environment has no preset."""


def cartpole(length: float) -> EnvFactory:
    """CartPole-v1 with a pole of another half length; its own is 0.5."""

    def make() -> gym.Env[Any, Any]:
        env = gym.make("CartPole-v1")
        cart: Any = env.unwrapped
        cart.length, cart.polemass_length = length, cart.masspole * length
        return env

    return make


def hopper(gravity: float) -> EnvFactory:
    """Hopper-v5 with another gravity; its own is -9.81."""

    def make() -> gym.Env[Any, Any]:
        env = gym.make("Hopper-v5")
        simulation: Any = env.unwrapped
        simulation.model.opt.gravity[2] = gravity
        return env

    return make


LIMITS = (0.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
CART: dict[str, Any] = {"n_envs": 8, "n_steps": 128, "batch_size": 256, "learning_rate": 1e-3, "gamma": 0.98}
HOP: dict[str, Any] = {"n_envs": 4, "n_steps": 512, "batch_size": 128}
TASKS = {
    "cartpole-short": Task("CartPole-v1", "pole of 0.1", cartpole(0.1), 100_000, 50_000, LIMITS, CART),
    "cartpole-long": Task("CartPole-v1", "pole of 2", cartpole(2.0), 100_000, 50_000, LIMITS, CART),
    "hopper": Task("Hopper-v5", "gravity of -8", hopper(-8.0), 500_000, 300_000, (0.0, 5.0, 1.0, 0.2, 0.05), HOP),
}


def score(agent: Agent, env: str | EnvFactory) -> float:
    """The mean return of 40 episodes with the most likely actions."""
    with closing(make_vector(env, 8, EnvConfig())) as envs:
        return run_episodes(agent, envs, 123, episodes=EPISODES).mean


def run(name: str, seed: int, folder: Path, known: set[tuple[str, int, float]]) -> None:
    """Train on the task, and on the changed one under every limit that is not ``known``."""
    task = TASKS[name]
    wanted = [target for target in task.targets if (name, seed, target) not in known]
    if not wanted:
        return
    common: dict[str, Any] = {"seed": seed, "quiet": True, "eval_every": 0, "final_episodes": 0}
    rate = {"learning_rate": task.options["learning_rate"]} if "learning_rate" in task.options else {}
    first = klrl.train("ppo", task.env, **common, **rate, total_timesteps=task.steps, run_dir=str(folder / name))
    before = score(first.agent, task.env), score(first.agent, task.changed)
    for target in wanted:
        held = {"run": str(first.folder), "target": target} if target else {}
        options = {**common, **task.options, "total_timesteps": task.more_steps, "init_from": str(first.folder)}
        second = klrl.train("ppo", task.changed, **options, reference=held, run_dir=str(folder / name))
        after = score(second.agent, task.env), score(second.agent, task.changed)
        rows = [json.loads(line) for line in (second.folder / "metrics.jsonl").read_text().splitlines()]
        reached = [row["reference/kl"] for row in rows if "reference/kl" in row]
        figures = {"first_kept": after[0], "changed": after[1], "first_before": before[0], "changed_before": before[1]}
        line = {"task": name, "seed": seed, "target": target, **{k: round(v, 1) for k, v in figures.items()}}
        line |= {"kl": round(reached[-1], 4), "largest_kl": round(max(reached), 4)} if reached else {}
        with RESULTS.open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(line, flush=True)


def table(lines: list[dict[str, Any]]) -> str:
    """The returns by task and limit: mean and deviation over seeds."""
    rows = [
        "| task | limit | first task | changed task | largest KL of an update | seeds |",
        "|---|---|---|---|---|---|",
    ]

    def spread(of: list[float]) -> str:
        return f"{np.mean(of):.0f} ± {np.std(of):.0f}"

    for name, task in TASKS.items():
        mine = [line for line in lines if line["task"] == name]
        if not mine:
            continue
        start = [spread([line[key] for line in mine]) for key in ("first_before", "changed_before")]
        rows.append(f"| {task.env}, then {task.change} | before | {start[0]} | {start[1]} | | |")
        for target in task.targets:
            here = [line for line in mine if line["target"] == target]
            if here:
                kept, now = (spread([line[key] for line in here]) for key in ("first_kept", "changed"))
                largest = f"{max(line['largest_kl'] for line in here):.4g}" if target else ""
                rows.append(f"| | {target or 'none'} | {kept} | {now} | {largest} | {len(here)} |")
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]]) -> Figure:
    """For each task, the returns in it and in the changed one against the limit."""
    names = [name for name in TASKS if any(line["task"] == name for line in lines)]
    figure = Figure(figsize=(4 * len(names), 3.6), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        task, mine = TASKS[name], [line for line in lines if line["task"] == name]
        targets = [*sorted(target for target in task.targets if target), 0.0]
        for key, before, label, colour in (
            ("first_kept", "first_before", "first task", COLOURS[0]),
            ("changed", "changed_before", "changed task", COLOURS[1]),
        ):
            returns = [[line[key] for line in mine if line["target"] == target] for target in targets]
            mean = np.array([np.mean(x) for x in returns])
            std = np.array([np.std(x) for x in returns])
            places = np.arange(len(targets))
            axes.errorbar(places, mean, std, fmt="o-", color=colour, capsize=3, label=label)
            axes.axhline(np.mean([line[before] for line in mine]), color=colour, linestyle=":", linewidth=1)
        axes.set_xticks(places, [f"{target:g}" if target else "none" for target in targets])
        axes.set(title=f"{task.env}, then {task.change}", xlabel="limit on KL(policy||reference), nats", ylim=(0, None))
        tidy(axes)
    figure.axes[0].set_ylabel("return; dotted: before")
    figure.axes[0].legend(frameon=False, loc="lower left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/reference"))
    parser.add_argument("--figure", type=Path, help="draw the results into a file")
    given = parser.parse_args()

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []

    for seed in given.seeds:
        for name in given.tasks:
            run(name, seed, given.run_dir, {(line["task"], line["seed"], line["target"]) for line in lines()})
    print(table(lines()))
    if given.figure:
        draw(lines()).savefig(given.figure)


if __name__ == "__main__":
    main()
