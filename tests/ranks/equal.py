"""Run by torchrun: two ranks learn from half of what one agent alone learns from; how far they end apart, as JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces

from klrl.agents.ppo import PPO
from klrl.agents.reference import FrozenPolicy
from klrl.agents.sac import SAC
from klrl.agents.student import Student
from klrl.agents.trpo import TRPO
from klrl.buffers.replay import Transitions
from klrl.kl import Ranks
from klrl.training.launch import joined

BOX = spaces.Box(-np.inf, np.inf, (5,), np.float32)
ACTIONS = {
    "box": spaces.Box(-1, 1, (3,), np.float32),
    "discrete": spaces.Discrete(4),
    "mixed": spaces.MultiDiscrete([3, 2]),
}
STEPS, ENVS, BATCH = 33, 4, 50  # of a rank; 132 rows leave a last minibatch of 32
BASE: dict[str, Any] = {"n_steps": STEPS, "hidden_sizes": (16, 16)}
MINI: dict[str, Any] = {**BASE, "batch_size": BATCH, "n_epochs": 2, "learning_rate": 1e-3}
TIGHT = {"target": 1e-4}  # which these updates go beyond
CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ppo": (PPO, "box", MINI),
    "ppo discrete": (PPO, "discrete", MINI),
    "ppo penalty": (PPO, "mixed", {**MINI, "clip_range": 0.0, "kl": {"penalty": "adaptive", "influence": 1.0}}),
    "ppo stop": (PPO, "box", {**MINI, "kl": {**TIGHT, "stop": 1.5, "check": "minibatch", "on_overshoot": "keep"}}),
    "ppo rollback": (PPO, "box", {**MINI, "kl": {**TIGHT, "on_overshoot": "rollback"}}),
    "ppo project": (PPO, "box", {**MINI, "kl": {**TIGHT, "on_overshoot": "project"}}),
    "ppo p95": (PPO, "box", {**MINI, "kl": {**TIGHT, "of": "p95"}}),
    "ppo max": (PPO, "box", {**MINI, "kl": {"max_target": 1e-4}}),
    "ppo gate": (PPO, "box", {**MINI, "kl": {"per_state": "gate", "state_limit": 1e-5}}),
    "ppo reverse": (PPO, "discrete", {**MINI, "kl": {"per_state": "reverse", "state_limit": 1e-5}}),
    "ppo states projected": (PPO, "box", {**MINI, "kl": {"per_state": "project", "state_limit": 1e-5}}),
    "ppo spo apart": (PPO, "box", {**MINI, "clip_rule": "spo", "clip_grads_apart": True, "clip_range_vf": 0.2}),
    "trpo": (TRPO, "box", {**BASE, "batch_size": BATCH, "n_critic_updates": 2}),
    "trpo discrete": (TRPO, "discrete", {**BASE, "batch_size": BATCH, "n_critic_updates": 2, "kl": {"of": "p95"}}),
    "student": (Student, "mixed", MINI),
    "student limited": (Student, "box", {**MINI, "kl": TIGHT}),
}
UNIFORM = {"reference": {"run": "uniform", "target": 1e-3, "coef": 0.5}}
CASES |= {
    "ppo reference": (PPO, "discrete", {**MINI, **UNIFORM}),
    "ppo bayesian critic": (PPO, "box", {**MINI, "critic": "bayesian", "critic_kl": 0.1}),
    "trpo reference": (TRPO, "mixed", {**BASE, "batch_size": BATCH, "n_critic_updates": 2, **UNIFORM}),
}
SAC_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sac": ("box", {}),
    "sac discrete": ("discrete", {}),
    "sac limited": ("box", {"kl": {"target": 1e-4, "every": 6, "stop": 0.5, "on_overshoot": "project"}}),
    "sac reference": ("discrete", {**UNIFORM, "kl": {"every": 6}}),
    "sac gate": ("box", {"kl": {"per_state": "gate", "state_limit": 1e-4, "every": 6}}),
}


class Order:
    """A generator whose permutations are given."""

    def __init__(self, orders: list[Any]) -> None:
        self.orders = orders

    def permutation(self, rows: int) -> Any:
        order = self.orders.pop(0)
        assert len(order) == rows
        return order


def orders(passes: int) -> tuple[list[list[Any]], list[Any]]:
    """The minibatches' order of each rank, and that of one process with minibatches twice as large."""
    of_rank = [[np.random.default_rng([r, i]).permutation(STEPS * ENVS) for i in range(passes)] for r in (0, 1)]
    whole = []
    for i in range(passes):
        places = [order[i] // ENVS * 2 * ENVS + order[i] % ENVS + r * ENVS for r, order in enumerate(of_rank)]
        starts = range(0, STEPS * ENVS, BATCH)
        whole.append(np.concatenate([place[start : start + BATCH] for start in starts for place in places]))
    return of_rank, whole


def facts(action_space: Any) -> list[dict[str, Any]]:
    """What eight environments said, step by step; the second rank's rewards and episodes are others."""
    rng, told, ended = np.random.default_rng(7), [], np.zeros(2 * ENVS, bool)
    shape = (2 * ENVS, *BOX.shape)
    obs = rng.normal(size=shape).astype(np.float32) * 3 + 1
    for t in range(STEPS):
        following = np.where(ended[:, None], rng.normal(size=shape), obs + rng.normal(size=shape)).astype(np.float32)
        over = (rng.random(2 * ENVS) < np.repeat([0.05, 0.3], ENVS)) & ~ended
        if isinstance(action_space, spaces.Box):
            action = rng.normal(size=(2 * ENVS, 3)).astype(np.float32)
        else:
            sizes = [4] if isinstance(action_space, spaces.Discrete) else [3, 2]
            action = rng.integers(0, sizes, (2 * ENVS, len(sizes)))
        reward = np.where(ended, 0.0, rng.normal(size=2 * ENVS) + np.repeat([0.0, 2.0], ENVS))
        told.append({"obs": obs, "action": action, "reward": reward, "ended": over, "next": following, "t": t})
        obs, ended = following, over
    return told


def filled(agent: Any, told: list[dict[str, Any]], rows: slice, envs: int) -> Any:
    buffer = agent.new_buffer(envs)
    for step in told:
        obs, action, reward, over, following = (step[k][rows] for k in ("obs", "action", "reward", "ended", "next"))
        cut = over & (np.arange(len(over)) % 2 == 0)
        buffer.add(obs, action, reward, over & ~cut, cut, following)
    return buffer


def state_of(agent: Any) -> dict[str, Any]:
    parts = {"policy": agent.policy_params.flat, "critic": agent.critic_params.flat}
    if isinstance(agent, SAC):
        return {
            **parts,
            "alpha": torch.tensor(agent.alpha.value),
            "beta": agent.limit.beta,
            "b": agent.reference.limit.beta,
        }
    scale = torch.tensor(
        [agent.reward_scale.count, agent.reward_scale.mean, agent.reward_scale.var], dtype=torch.float64
    )
    more = {"mean": agent.encoder.mean, "var": agent.encoder.var, "scale": scale, "beta": agent.limit.beta}
    more["b"] = agent.reference.limit.beta
    rate = torch.tensor(agent.learning_rate.value) if isinstance(agent, PPO) else torch.zeros(())
    return {**parts, **more, "rate": rate}


def on_policy(kind: Any, space: str, config: dict[str, Any], ranks: Ranks, rank: int | None) -> tuple[Any, Any]:
    """An agent after two updates, and its last report; of one process alone where ``rank`` is None."""
    agent = kind(BOX, ACTIONS[space], config)
    if kind is Student:
        agent.teachers = [FrozenPolicy(PPO(BOX, ACTIONS[space], BASE, seed=seed)) for seed in (1, 2)]
    agent.join(ranks)
    passes = 2 * config.get("n_epochs", 0) + 2 * config.get("n_critic_updates", 0)
    of_rank, whole = orders(passes)
    if rank is None:
        agent.config = type(agent.config)(**{**vars(agent.config), "batch_size": 2 * BATCH})
    agent.rng = Order(whole if rank is None else of_rank[rank])
    told = facts(ACTIONS[space])
    rows, envs = (slice(None), 2 * ENVS) if rank is None else (slice(rank * ENVS, (rank + 1) * ENVS), ENVS)
    result = None
    for _ in range(2):
        result = agent.update(filled(agent, told, rows, envs))
    return agent, result


def off_policy(space: str, config: dict[str, Any], ranks: Ranks, rank: int | None) -> tuple[Any, Any]:
    """SAC after a window of six steps, each on 64 transitions, of which a rank has half."""
    agent = SAC(BOX, ACTIONS[space], {"hidden_sizes": (16, 16), "learning_rate": 1e-3, **config})
    agent.join(ranks)
    rng, width = np.random.default_rng(3), agent.actions.stored_width
    rows = slice(None) if rank is None else slice(32 * rank, 32 * rank + 32)

    def numbers(*shape: int) -> Any:
        return torch.from_numpy(rng.normal(size=(64, *shape)).astype(np.float32))[rows]

    window = agent._open({"vector": numbers(5)})
    for _ in range(6):
        action = (
            numbers(width).tanh() if space == "box" else torch.from_numpy(rng.integers(0, 4, (64, 1)))[rows].float()
        )
        batch = Transitions({"vector": numbers(5)}, action, numbers(), numbers().sigmoid(), {"vector": numbers(5)})
        noise = torch.from_numpy(rng.normal(size=(2, 64, width)).astype(np.float32))[:, rows]
        agent.actions.draw_noise = lambda *_, noise=noise: noise
        with torch.no_grad():
            agent._gradient_step(window, batch)
    with torch.no_grad():
        return agent, agent._end_window(window)


def apart(ours: Any, alone: Any) -> float:
    """The largest difference between two agents' states and reports."""
    (mine, result), (theirs, expected) = ours, alone
    gaps = [float((part - state_of(theirs)[name]).abs().max()) for name, part in state_of(mine).items()]
    figures = ("mean", "max", "p50", "p95", "p99", "reverse", "entropy", "limited", "attempted", "rolled_back")
    gaps += [abs(getattr(result.kl, name) - getattr(expected.kl, name)) for name in figures]
    assert result.kl.stopped_at == expected.kl.stopped_at, (result.kl.stopped_at, expected.kl.stopped_at)
    assert result.metrics.keys() == expected.metrics.keys()
    gaps += [abs(figure - expected.metrics[tag]) / max(1.0, abs(figure)) for tag, figure in result.metrics.items()]
    return max(gaps)


def main(output: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, float] = {}
    with joined() as near:
        group = dist.group.WORLD
        assert group is not None
        for name, (kind, space, config) in CASES.items():
            alone = on_policy(kind, space, config, Ranks(), None)
            for way, ranks in {"memory": near, "network": Ranks(group)}.items():
                found[f"{name} {way}"] = apart(on_policy(kind, space, config, ranks, near.rank), alone)
        for name, (space, config) in SAC_CASES.items():
            alone = off_policy(space, config, Ranks(), None)
            for way, ranks in {"memory": near, "network": Ranks(group)}.items():
                found[f"{name} {way}"] = apart(off_policy(space, config, ranks, near.rank), alone)
        worst = near.objects(found)
    output.write_text(json.dumps({name: max(each[name] for each in worst) for name in found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    threads = [Path(f"/proc/self/task/{number}/comm").read_text() for number in os.listdir("/proc/self/task")]
    assert not [name for name in threads if "gloo" in name], "the interpreter's end would abort what they wait for"
