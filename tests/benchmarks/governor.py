"""What a governor costs: the return of a policy held within kappa of another at every state, and the time to act.

    python tests/benchmarks/governor.py [--figure FILE]

A policy is trained, and a worse one with few steps is its reference. Returns are of 40 episodes with sampled actions;
times of one call of ``act``, the least of seven rounds of 200, the agent's and the governor's in turn.
"""

import argparse
import timeit
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import klrl
from klrl import Governed
from klrl.agents.actor import Actor
from klrl.analysis.figures import COLOURS, tidy
from klrl.envs.make import EnvConfig, make_vector
from klrl.training.evaluation import run_episodes

TASKS = {"CartPole-v1": (100_000, 2_000), "Hopper-v5": (500_000, 100_000)}
KAPPAS = (1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def score(agent: Actor, env: str) -> float:
    """The mean return of sampled actions."""
    with closing(make_vector(env, 8, EnvConfig())) as envs:
        return run_episodes(agent, envs, 123, deterministic=False, episodes=40).mean


def latency(agent: Any, reference: Any, kappa: float, rows: int) -> tuple[float, float]:
    """Microseconds of the agent's own act, and of the governor's, at one batch of observations."""
    shape = agent.observation_space.shape
    obs = np.random.default_rng(0).normal(size=(rows, *shape)).astype(np.float32)
    actors = agent, Governed(agent, reference, kappa)
    rounds = [
        [timeit.timeit(lambda actor=actor: actor.act(obs), number=200) / 200 for actor in actors] for _ in range(7)
    ]
    own, governed = 1e6 * np.min(rounds, 0)
    return float(own), float(governed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--run-dir", default="runs/governor")
    parser.add_argument("--figure", type=Path, help="draw the returns into a file")
    given = parser.parse_args()
    figure = Figure(figsize=(4.2 * len(given.tasks), 3.4), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(given.tasks)))
    quiet: dict[str, Any] = {"quiet": True, "eval_every": 0, "final_episodes": 0, "run_dir": given.run_dir}
    for axes, env in zip(plots, given.tasks, strict=True):
        rate = {"learning_rate": 1e-3} if env == "CartPole-v1" else {}
        agent, reference = (klrl.train("ppo", env, total_timesteps=n, **quiet, **rate).agent for n in TASKS[env])
        ends = score(reference, env), score(agent, env)
        reached = [score(Governed(agent, reference, kappa), env) for kappa in KAPPAS]
        cells = " | ".join(f"{value:.0f}" for value in (ends[0], *reached, ends[1]))
        print(f"| {env} | {cells} |")
        for rows in (1, 8, 64, 1024):
            own, governed = latency(agent, reference, 0.03, rows)
            print(f"{env}, {rows} observations: {own:.0f} us, governed {governed:.0f} us, {governed / own:.1f} times")
        axes.plot(KAPPAS, reached, "o-", color=COLOURS[0], label="governed")
        for value, label, colour in zip(ends, ("reference", "agent"), COLOURS[1:3], strict=True):
            axes.axhline(value, color=colour, linestyle="--", label=label)
        axes.set(title=env, xscale="log", xlabel="kappa, nats at each state", ylabel="return")
        tidy(axes)
        axes.legend(frameon=False)
    if given.figure:
        figure.savefig(given.figure)


if __name__ == "__main__":
    main()
