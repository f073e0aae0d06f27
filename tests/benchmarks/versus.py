"""What the comparisons share: the works, who does them, and how they are measured side by side.

Each measurement is a process of its own (peers.py). In a round klrl and its peers do the same work one after another,
so that a machine whose speed drifts is as slow for each; what counts is the ratio within a round.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_TRPO = {"agent": "trpo", "batch_size": 128, "n_critic_updates": 10, "cg_max_steps": 10, "steps": 20_480}
# klrl logs every 1000 gradient steps, from step 100: its last row before the end is that of step 3099.
_SAC = {"agent": "sac", "n_envs": 1, "batch_size": 256, "learning_starts": 100, "warm_up": 1000, "steps": 2100}
WORKS: dict[str, dict[str, Any]] = {
    "ppo-cartpole": {
        "agent": "ppo",
        "env": "CartPole-v1",
        "n_envs": 8,
        "n_steps": 128,
        "batch_size": 256,
        "n_epochs": 4,
        "warm_up": 2048,
        "steps": 40_960,
    },
    "ppo-halfcheetah": {
        "agent": "ppo",
        "env": "HalfCheetah-v5",
        "n_envs": 1,
        "n_steps": 2048,
        "batch_size": 64,
        "n_epochs": 10,
        "warm_up": 4096,
        "steps": 20_480,
    },
    "trpo-cartpole": {"env": "CartPole-v1", "n_envs": 2, "n_steps": 512, "warm_up": 2048, **_TRPO},
    "trpo-hopper": {"env": "Hopper-v5", "n_envs": 1, "n_steps": 2048, "warm_up": 4096, **_TRPO},
    "sac-halfcheetah": {"env": "HalfCheetah-v5", **_SAC},
    "sac-pendulum": {"env": "Pendulum-v1", **_SAC},
}
WORKS["ppo-pendulum"] = {**WORKS["ppo-cartpole"], "env": "Pendulum-v1"}
_VECTOR = {"env": {"vectorization": "vector"}}
WORKS |= {
    "ppo-cartpole-vector": {**WORKS["ppo-cartpole"], "klrl_options": _VECTOR},
    "sac-halfcheetah-compiled": {**WORKS["sac-halfcheetah"], "klrl_options": {"compile": True}},
    "sac-pendulum-compiled": {**WORKS["sac-pendulum"], "klrl_options": {"compile": True}},
}
"""By name: the agent, what all do alike under SB3's names, the environment steps before and during the clock, and what
klrl alone has an option for."""

_HERE = Path(__file__).resolve().parents[2]
TITLES = {
    "ppo": "PPO, {env}, {n_envs} x {n_steps} steps, minibatch {batch_size}, {n_epochs} epochs",
    "trpo": "TRPO, {env}, {n_envs} x {n_steps} steps, {cg_max_steps} CG steps, {n_critic_updates} critic passes",
    "sac": "SAC, {env}, minibatch {batch_size}, a gradient step for each step",
}
"""By agent: how the table names a work."""

PEERS = {
    "stable-baselines3": tuple(work for work in WORKS if not work.startswith("trpo")),
    "sb3-contrib": ("trpo-cartpole", "trpo-hopper"),
    "skrl": ("ppo-cartpole", "sac-pendulum"),
    "tianshou": ("ppo-cartpole", "sac-pendulum"),
}
"""By the name of its distribution: the works that a peer is compared on."""


def main(doc: str | None, prefix: str = "", peers: Sequence[str] = tuple(PEERS)) -> None:
    """Compare as the command line asks, on the works whose names begin with ``prefix``; one Markdown table.

    peers: who is asked where the command line names none.
    """
    works = {name.removeprefix(prefix): name for name in WORKS if name.startswith(prefix)}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs="+", choices=list(works), default=list(works))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(peers))
    parser.add_argument("--against", type=Path, help="another checkout of klrl, in place of the peers")
    parser.add_argument("--output", type=Path, help="a file for the table, beside the terminal")
    options = parser.parse_args()
    file = options.output.open("w") if options.output else None
    chosen = [works[name] for name in options.work]
    same = [work for work in chosen if "klrl_options" not in WORKS[work]]  # an older one need not have the others
    rows = against(same, options.against, options.rounds) if options.against else None
    for line in rows or table(chosen, options.peers, options.rounds):
        print(line, flush=True)
        if file is not None:
            print(line, file=file, flush=True)


def table(works: list[str], peers: list[str], rounds: int) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured."""
    chosen = [peer for peer in peers if set(PEERS[peer]) & set(works)]
    versions = {peer: installed(peer) for peer in chosen}
    yield machine(rounds)
    yield ""
    yield "| work | klrl steps/s | peer steps/s | ratio: median (min to max) |"
    yield "|---|---|---|---|"
    for work in works:
        others = [peer for peer in chosen if versions[peer] and work in PEERS[peer]]
        speeds: dict[str, list[float]] = {one: [] for one in ("klrl", *others)}
        for _ in range(rounds if others else 0):
            for one, measured in speeds.items():
                measured.append(measure(one, work))
        for peer in others:
            ratios = [mine / theirs for mine, theirs in zip(speeds["klrl"], speeds[peer], strict=True)]
            mine, theirs, ratio = (statistics.median(each) for each in (speeds["klrl"], speeds[peer], ratios))
            span = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            yield f"| {title(work)} | {mine:,.0f} | {peer} {versions[peer]}: {theirs:,.0f} | {span} |"
    missing = [peer for peer in chosen if not versions[peer]]
    if missing:
        yield ""
        yield f"Left out, as not installed: {', '.join(missing)}."


def against(works: list[str], other: Path, rounds: int) -> Iterator[str]:
    """The lines of a table of this checkout and an ``other``, in alternation."""
    yield machine(rounds)
    yield ""
    yield "| work | before steps/s | now steps/s | ratio: median (min to max) |"
    yield "|---|---|---|---|"
    for work in works:
        pairs = [(measure("klrl", work, other.resolve()), measure("klrl", work)) for _ in range(rounds)]
        ratios = [now / before for before, now in pairs]
        before, now, ratio = (statistics.median(each) for each in (*zip(*pairs, strict=True), ratios))
        yield f"| {title(work)} | {before:,.0f} | {now:,.0f} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"


def measure(one: str, work: str, root: Path = _HERE) -> float:
    """Steps per second of klrl (of the checkout ``root``) or of a peer, in a process of its own.

    Exits with what that says where it fails.
    """
    command = [sys.executable, str(root / "tests" / "benchmarks" / "peers.py"), one, json.dumps(WORKS[work])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    if done.returncode:
        raise SystemExit(f"{one} on {work} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def title(work: str) -> str:
    """What is done, as the table names it."""
    return TITLES[WORKS[work]["agent"]].format(**WORKS[work]) + (f": {work}" if "klrl_options" in WORKS[work] else "")


def machine(rounds: int) -> str:
    """When, on what and with which versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    where = f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
    packages = ", ".join(f"{name} {installed(name)}" for name in ("gymnasium", "mujoco", "klrl"))
    python = f"Python {platform.python_version()}, torch {installed('torch')} (1 thread)"
    return f"{datetime.date.today()}, {where}, {python}, {packages}; {rounds} rounds"


def installed(package: str) -> str | None:
    """The version of a distribution, None without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
