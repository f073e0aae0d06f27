"""Which rule on the KL learns best: every rule on six MuJoCo tasks, rerun and gone on with by one command.

    python tests/benchmarks/rules.py [--stage screen | final] [--envs Ant-v5 ...] [--rules reverse ...] [--jobs 2]
    python tests/benchmarks/rules.py --table [--figure FILE [--rules default clip ...]]

Finished runs become lines of rules.jsonl beside this file, which are not run again; stopped ones go on from their last
checkpoint in ``--run-dir``. A run takes half a minute to 6 minutes of one core for each 300,000 steps.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from klrl.analysis.figures import COLOURS, tidy
from klrl.analysis.scores import iqm
from klrl.rundir.history import History
from klrl.sweep.grid import expand
from klrl.sweep.sweep import row, run_trials, stop_trials
from klrl.sweep.trial import Trial
from klrl.training.signals import Interrupted, Signals

RESULTS = Path(__file__).parent / "rules.jsonl"
ENVS = ("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "Swimmer-v5", "Walker2d-v5")
STAGES = {"screen": (300_000, 2), "final": (1_000_000, 5)}  # steps and seeds
# The presets' settings, all written out, so that a rule means the same whatever klrl's defaults become. The first
# standard deviation is 0.5, as "What matters in on-policy reinforcement learning" (Andrychowicz et al. 2021) advises,
# and less where noise is what is in the way: from 1, Ant's first 300,000 steps go into less noise, and a rule scores by
# how fast it lets the noise fall. Swimmer begins with 1: with less it may never find the stroke that leads on.
COMMON: dict[str, Any] = {
    "n_envs": 4,
    "n_steps": 512,
    "batch_size": 128,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "log_std_init": -0.7,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "eval_every": 0,
    "lr_schedule": "constant",
    "clip_range": 0.0,
    "kl.target": 0.02,
    "kl.penalty": "none",
    "kl.stop": 0.0,
    "kl.per_state": "none",
    "kl.on_overshoot": "keep",
}
PPO_ONLY = ("batch_size", "n_epochs", "learning_rate", "lr_schedule", "clip_range")  # and all of kl but its target
ACTIONS = {"Ant-v5": 8, "HalfCheetah-v5": 6, "Hopper-v5": 3, "Humanoid-v5": 17, "Swimmer-v5": 2, "Walker2d-v5": 6}
OWN: dict[str, dict[str, Any]] = {
    "Ant-v5": {"log_std_init": -1.5},
    "Swimmer-v5": {"gamma": 0.9999, "gae_lambda": 0.99, "log_std_init": 0.0},
}
MEAN = {"kl.penalty": "adaptive", "kl.stop": 1.5}
CLIP = {"clip_range": 0.2}
LINEAR = {"lr_schedule": "linear"}
BY_KL = {"lr_schedule": "kl", "kl.target": 0.04}


def at_state(rule: str, limit: float, **more: Any) -> dict[str, Any]:
    return {"kl.per_state": rule, "kl.state_limit": limit, **{f"kl.{name}": value for name, value in more.items()}}


SPO = {"clip_range": 0.2, "clip_rule": "spo"}
PROJECT = {"kl.on_overshoot": "project"}
RULES: dict[str, dict[str, Any]] = {
    "default": CLIP | BY_KL | PROJECT,
    "clip": CLIP,
    "mean": MEAN,
    "clip+mean": CLIP | MEAN,
    "spo": SPO,
    "reverse 0.05": at_state("reverse", 0.05),
    "reverse 0.05 x 0.3": at_state("reverse", 0.05, turn=0.3),
    "gate 0.05": at_state("gate", 0.05),
    "trpo 0.01": {"agent": "trpo", "kl.target": 0.01},
    "trpo 0.02": {"agent": "trpo"},
    "trpo 0.01 a dimension": {"agent": "trpo", "kl.target": 0.01},  # times the number of action dimensions
    "reverse 0.05 + mean": at_state("reverse", 0.05) | MEAN,
    "reverse 0.05 + mean + project": at_state("reverse", 0.05) | MEAN | PROJECT,
    "held": at_state("reverse", 0.05) | MEAN | PROJECT | {"kl.max_target": 0.2},
    "clip + project": CLIP | PROJECT,
    "clip + project 0.04": CLIP | PROJECT | {"kl.target": 0.04},
    "clip + project 0.05": CLIP | PROJECT | {"kl.target": 0.05},
    "clip, lr by KL": CLIP | BY_KL,
    "lr by KL + project": BY_KL | PROJECT,
    "reverse 0.05, lr by KL + project": at_state("reverse", 0.05) | BY_KL | PROJECT,
    "spo, lr by KL + project": SPO | BY_KL | PROJECT,
    "clip+mean + project": CLIP | MEAN | PROJECT,
    "clip+mean, lr by KL + project": CLIP | MEAN | BY_KL | PROJECT,
    "default 0.02": CLIP | BY_KL | PROJECT | {"kl.target": 0.02},
    "default 0.08": CLIP | BY_KL | PROJECT | {"kl.target": 0.08},
    "reverse 0.05 + clip": at_state("reverse", 0.05) | CLIP,
    "spo + project": SPO | PROJECT,
    "reverse 0.1": at_state("reverse", 0.1),
    "reverse 0.03": at_state("reverse", 0.03),
    "spo 0.1": SPO | {"clip_range": 0.1},
    "spo 0.4": SPO | {"clip_range": 0.4},
    "clip 0.1": {"clip_range": 0.1},
    "clip 0.3": {"clip_range": 0.3},
    "gate 0.03": at_state("gate", 0.03),
    "project 0.05": at_state("project", 0.05),
    "project 0.02": at_state("project", 0.02),
    "mean 0.05": MEAN | {"kl.target": 0.05},
    "mean 0.01": MEAN | {"kl.target": 0.01},
    "mean, bounded influence": MEAN | {"kl.influence": 2.0},
    "mean, clipped apart": MEAN | {"clip_grads_apart": True},
    "mean, lagrange": MEAN | {"kl.penalty": "lagrange"},
    "mean, fixed 1": MEAN | {"kl.penalty": "fixed"},
    "mean, MDPO": {"kl.penalty": "reciprocal", "kl.anneal_to": 100.0, "kl.direction": "reverse"},
    "p95 0.05": MEAN | {"kl.of": "p95", "kl.target": 0.05},
    "max 0.1": MEAN | {"kl.of": "max", "kl.target": 0.1},
    "clip, linear": CLIP | LINEAR,
    "clip+mean, linear": CLIP | MEAN | LINEAR,
    "reverse 0.05, linear": at_state("reverse", 0.05) | LINEAR,
    "spo, linear": SPO | LINEAR,
}
# Lines of when klrl's learning rate fell only beyond two targets (of 0.02 where none is named), which it cannot now.
FORMER = (
    "former default",
    "former default 0.01",
    "former default 0.04",
    "former lr by KL + project",
    "former reverse 0.05, lr by KL + project",
    "former spo, lr by KL + project",
    "former clip+mean, lr by KL + project",
)


def options_of(env: str, rule: str, steps: int) -> tuple[str, dict[str, Any]]:
    """The agent of a rule, and all of its settings on a task."""
    options = {**COMMON, **OWN.get(env, {}), **RULES[rule], "total_timesteps": steps}
    agent = options.pop("agent", "ppo")
    if agent == "trpo":
        options = {n: v for n, v in options.items() if n not in PPO_ONLY and (n == "kl.target" or n[:3] != "kl.")}
    if "a dimension" in rule:
        options["kl.target"] *= ACTIONS[env]
    if "MDPO" in rule:
        options["kl.anneal_over"] = -(-steps // (options["n_envs"] * options["n_steps"]))
    return agent, options


def finished() -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def result(run: History, stage: str, env: str, rule: str, seed: int) -> dict[str, Any]:
    """What a run amounts to: its final return, and how far its updates moved the policy, on average and at most."""
    measured = {name: run[f"kl/{name}"] for name in ("mean", "p95", "max")}
    figures = {f"kl_{name}": float(f"{np.nanmean(column):.4g}") for name, column in measured.items()}
    return {
        "stage": stage,
        "env": env,
        "rule": rule,
        "seed": seed,
        "steps": run.steps,
        "return": round(run.final_return, 1),
        "training_return": round(run.last("rollout/ep_rew_mean"), 1),
        **figures,
        "kl_largest": float(f"{np.nanmax(measured['max']):.4g}"),
        "within": round(float(np.mean(run["kl/of_limit"] <= 1)), 3),
        "fps": round(run.last("time/fps")),
        "date": date.today().isoformat(),
    }


def returns(lines: list[dict[str, Any]], rule: str, env: str) -> np.ndarray:
    """The final returns of a rule on a task, one per seed."""
    return np.array([line["return"] for line in lines if (line["rule"], line["env"]) == (rule, env)])


def beside_clipping(lines: list[dict[str, Any]], rule: str) -> tuple[float, float, float]:
    """The IQM of the returns over that of clipping's, the mean over tasks, and its bootstrapped middle 95 %.

    Of the tasks and seeds which both have run: the seeds of each are drawn anew (Agarwal et al. 2021). nan of none.
    """
    seeds = {(line["env"], line["seed"], line["rule"]) for line in lines}
    both = [line for line in lines if {(line["env"], line["seed"], one) for one in ("clip", rule)} <= seeds]
    pairs = [(returns(both, rule, env), returns(both, "clip", env)) for env in ENVS if len(returns(both, rule, env))]
    if not pairs:
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(0)
    drawn = [[iqm(x[rng.integers(len(x), size=(2000, len(x)))]) for x in pair] for pair in pairs]
    low, high = np.quantile(np.mean([mine / theirs for mine, theirs in drawn], axis=0), (0.025, 0.975))
    return float(np.mean([iqm(mine) / iqm(theirs) for mine, theirs in pairs])), float(low), float(high)


def table(lines: list[dict[str, Any]], stage: str) -> str:
    """A row for each rule: the IQM of its returns on each task (seeds), beside clipping, and what KL it reached."""
    here = [line for line in lines if line["stage"] == stage]
    columns = ["rule", *ENVS, "of clipping", "KL: mean", "p95", "max", "largest ever", "within target"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for rule in (*RULES, *FORMER):
        own = [line for line in here if line["rule"] == rule]
        if not own:
            continue
        found = [returns(here, rule, env) for env in ENVS]
        cells = [f"{iqm(one):.0f} ({len(one)})" if len(one) else "" for one in found]
        value, low, high = beside_clipping(here, rule)
        cells.append("" if math.isnan(value) else f"{value:.2f} ({low:.2f} to {high:.2f})")
        cells += [f"{np.mean([line[f'kl_{name}'] for line in own]):.3f}" for name in ("mean", "p95", "max")]
        cells += [f"{max(line['kl_largest'] for line in own):.2f}", f"{np.mean([x['within'] for x in own]):.0%}"]
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(rows)


def figure(lines: list[dict[str, Any]], stage: str, rules: Sequence[str]) -> Figure:
    """Each run's return beside clipping's, and its largest KL of a state, task by task, of rules that ran on all."""
    here = [line for line in lines if line["stage"] == stage]
    whole = [rule for rule in rules if all(len(returns(here, rule, env)) for env in ENVS)]
    drawn = Figure(figsize=(8.4, 1.1 + 0.18 * len(ENVS) * (1 + len(whole))), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    for place, env in enumerate(ENVS):
        for number, rule in enumerate(whole):
            own = [line for line in here if (line["env"], line["rule"]) == (env, rule)]
            height = np.full(len(own), -place + 0.3 - 0.6 * (number + 0.5) / len(whole))
            style: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "ls": "",
                "marker": "o",
                "ms": 5,
                "alpha": 0.85,
            }
            left.plot([line["return"] / iqm(returns(here, "clip", env)) for line in own], height, **style)
            right.plot([line["kl_largest"] for line in own], height, label="" if place else rule, **style)
    left.axvline(1.0, color="0.7", lw=1, zorder=0)
    left.set(yticks=-np.arange(len(ENVS)), yticklabels=ENVS, xlabel="final return / that of clipping")
    left.set_xlim(left=0)
    right.set(xscale="log", xlabel="largest KL of a state in the run, nats")
    tidy(left, "x")
    tidy(right, "x")
    drawn.legend(loc="outside upper center", ncols=len(whole), frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="screen")
    parser.add_argument("--envs", nargs="+", choices=ENVS, default=ENVS)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/rules"))
    parser.add_argument("--table", action="store_true", help="print the table of the results so far")
    parser.add_argument("--figure", type=Path, help="and draw them into a file")
    given = parser.parse_args()
    steps, count = STAGES[given.stage]
    known = {(line["stage"], line["env"], line["rule"], line["seed"]) for line in finished()}
    wanted = [
        (env, rule, seed)
        for seed in given.seeds or range(count)
        for rule in given.rules
        for env in given.envs
        if (given.stage, env, rule, seed) not in known
    ]
    if given.figure is not None:
        figure(finished(), given.stage, given.rules).savefig(given.figure)
    if given.table or given.figure is not None or not wanted:
        print(table(finished(), given.stage))
        return
    trials = {}
    for env, rule, seed in wanted:
        agent, options = options_of(env, rule, steps)
        (setting,) = expand(agent, env, {name: [value] for name, value in options.items()})
        trials[Trial(setting, seed, given.run_dir / given.stage / env / rule.replace(" ", "_"))] = (env, rule, seed)
    reported = set()

    def report() -> None:
        for trial, (env, rule, seed) in trials.items():
            if trial.status == "finished" and trial not in reported and trial.history is not None:
                reported.add(trial)
                line = result(trial.history, given.stage, env, rule, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(time.strftime("%H:%M"), env, rule, *row(trial)[1:], flush=True)

    with Signals() as signals:
        try:
            run_trials(list(trials), given.jobs, signals, report)
        except Interrupted as stop:  # the runs under way save, and go on with the next call
            stop_trials(list(trials), stop.signum)
            sys.exit(128 + stop.signum)
    failed = [f"{env} {rule} {seed}: {t.problem}" for t, (env, rule, seed) in trials.items() if t.status == "failed"]
    sys.exit("\n".join(failed) or None)


if __name__ == "__main__":
    main()
