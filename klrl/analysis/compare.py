"""Comparison of two trained policies: KL both ways and JS over the states that each visits, and their returns.

A is old and B new: forward is KL(A||B). ``compare_policies`` measures; ``to_text``, ``to_json`` and ``draw`` show it.
"""

import json
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from klrl.agents.base import Agent
from klrl.analysis import tables
from klrl.config import Checked, EnvCount, Range, Seed
from klrl.console import printable
from klrl.envs.make import Imports
from klrl.errors import NonFiniteError, UsageError, needs
from klrl.kl import concatenate, js, kl, reverse_kl, select
from klrl.kl.state import own_noise
from klrl.policies.distributions import MultiCategorical
from klrl.policies.observations import Observation
from klrl.policies.spaces import category_sizes
from klrl.policies.squashed import SquashedHead, SquashedNormal
from klrl.training.evaluation import Evaluation, evaluation_seed, run_episodes
from klrl.training.load import LoadedPolicy, load_policy
from klrl.training.loop import Envs

_ENVS = 2  # few, so that long episodes are seen to their end
_SAMPLES = 64  # of each policy at a state, for a JS without closed form
_ROWS = 128  # states at a time: a joint action space is written out, or sampled, for each
_SHOWN = 10  # states, and in the text action dimensions
_NUMBERS = 6  # in the text, of a longer observation or action
_KEYS, _NAMES = ("forward", "reverse", "js"), ("KL(A||B)", "KL(B||A)", "JS")
_QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True)
class CompareConfig(Checked):
    """How policies A and B differ at the states that each of them visits."""

    env: str = ""
    """Another environment with the same spaces; the one that A was trained on by default."""
    imports: Imports = ()
    steps: Annotated[int, Range(1, 10_000_000)] = 2000
    """Environment steps that each policy takes, with sampled actions, to visit states."""
    episodes: EnvCount = 10
    """Episodes of each policy for its returns, with its most likely actions; the same seeds for both."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints."""
    seed: Seed = 0
    """Seed of the environments, the sampled actions, and the samples that JS is estimated from."""
    json: bool = False
    """Print JSON."""
    figure: str = ""
    """File to draw the comparison in, .png or .svg."""


@dataclass(frozen=True)
class StateComparison:
    """S states that one policy visited, and how A and B differ there: float64, in nats."""

    obs: Observation
    """[S, *shape]."""
    policies: Sequence[Any]
    """A's and B's there; where they are squashed, the normals before tanh, which have the same divergences."""
    joint: Tensor
    """[3, S]: KL(A||B) and KL(B||A), exact, infinite without support; and Jensen-Shannon, 0 to log 2."""
    js_stderr: float
    """Of the mean joint JS. 0 where JS is exact: up to 65,536 joint discrete actions. Elsewhere it is sampled."""
    dimensions: Tensor
    """[d, 3, S]: the same of each action dimension alone. Its KLs sum to the joint ones; its JS do not."""


@dataclass(frozen=True)
class Comparison:
    """The result of ``compare_policies``. Of each pair, the first is A's and the second B's."""

    policies: Sequence[LoadedPolicy]
    config: CompareConfig
    env: str
    visited: Sequence[StateComparison]
    returns: Sequence[Evaluation]
    states: list[dict[str, Any]]
    """The ten distinct states of the largest KL(A||B) + KL(B||A), where that is not 0: visited by whom, at which of its
    steps, and what A and B do there, which is their most likely action as the environment takes it, with its
    probability, or with mean and std of the normal (before tanh where it is squashed)."""


def compare(a: str, b: str, config: CompareConfig) -> str:
    """The text that ``klrl compare A B`` prints. Raises as ``compare_policies``, and UsageError for a bad --figure."""
    if config.figure:  # checked before the work
        with needs("plot", "matplotlib"):
            from klrl.analysis.plots import figure_path
        path = figure_path(config.figure, "--figure")
    old, new = (load_policy(path, config.checkpoint, config.imports) for path in (a, b))
    found = compare_policies(old, new, config)
    if config.figure:
        draw(found).savefig(path, dpi=150)
    return to_json(found) if config.json else to_text(found)


def compare_policies(old: LoadedPolicy, new: LoadedPolicy, config: CompareConfig) -> Comparison:
    """Run both policies in one environment and measure how they differ at the states of each, reproducibly by seed.

    Raises UsageError for different spaces, for a normal and a squashed normal, and as ``LoadedPolicy.make_envs``;
    NonFiniteError where a policy is nan.
    """
    _check_alike(old, new)
    agents, seed = (old.agent, new.agent), evaluation_seed("afterwards", config.seed)
    visited, returns = [], []
    for agent in agents:
        with closing(old.make_envs(min(_ENVS, config.steps), config.env)) as envs:
            visited.append(compare_at(*agents, collect_states(agent, envs, config.steps, seed), config.seed))
        with closing(old.make_envs(config.episodes, config.env)) as envs:
            returns.append(run_episodes(agent, envs, seed, episodes=config.episodes))
    return Comparison((old, new), config, config.env or old.env, visited, returns, _disagreements(agents, visited))


def _check_alike(old: LoadedPolicy, new: LoadedPolicy) -> None:
    for part in ("action_space", "observation_space"):
        mine, theirs = getattr(old.agent, part), getattr(new.agent, part)
        if mine != theirs:
            raise UsageError(
                f"no KL between policies with different spaces: {part.replace('_', ' ')} {mine} and {theirs}"
            )
    if len({isinstance(trained.agent.policy.head, SquashedHead) for trained in (old, new)}) == 2:
        raise UsageError(f"no closed-form KL between a normal and a squashed normal policy: {old.path} and {new.path}")


def collect_states(agent: Agent, envs: Envs, steps: int, seed: int) -> Observation:
    """The first ``steps`` observations [steps, *shape] that ``agent`` acts on, with sampled actions.

    Rows that only reset an environment are not among them. The agent's own random state is left alone.
    """
    rng = np.random.default_rng(seed)
    obs, _ = envs.reset(seed=seed)
    acting, count = np.ones(envs.num_envs, np.bool_), 0
    states: list[Observation] = []
    while count < steps:
        count += acting.sum()
        states.append(tree_map(lambda part, rows=acting: part[rows], agent.encoder.layout.batch(obs)))
        obs, _, terminated, truncated, _ = envs.step(agent.env_action(agent.act(obs, rng=rng)))
        acting = ~(terminated | truncated)
    return tree_map(lambda *parts: np.concatenate(parts)[:steps], *states)


def compare_at(old: Agent, new: Agent, obs: Observation, seed: int = 0) -> StateComparison:
    """Measure how two agents differ at the observations [S, *shape]. Raises NonFiniteError where a policy is nan."""
    both = [agent.distribution(obs) for agent in (old, new)]
    # Between the normals before tanh all divergences are the same, and cancel less.
    both = [dist.base if isinstance(dist, SquashedNormal) else dist for dist in both]
    first, second = (dist.map_parameters(Tensor.double) for dist in both)
    if isinstance(first, MultiCategorical) and first.event_shape != second.event_shape:
        first, second = (_joined(dist, category_sizes(old.action_space)) for dist in (first, second))
    columns = [slice(i, i + 1) for i in range(first.event_shape[0])]
    alone = [[dist.map_parameters(lambda p, i=i: p[:, i]) for dist in (first, second)] for i in columns]
    try:
        joint, js_stderr = divergences(first, second, seed)
        parts = [divergences(a, b, seed)[0] for a, b in alone]
    except ValueError as problem:
        raise NonFiniteError(str(problem)) from None
    return StateComparison(obs, (first, second), joint, js_stderr, torch.stack(parts))


def _joined(dist: Any, sizes: Sequence[int]) -> MultiCategorical:
    """Independent categoricals as one over all joint actions, [B, 1, prod(sizes)], the last one running fastest."""
    if len(sizes) != dist.event_shape[0]:
        return dist
    table = dist.log_probs.new_zeros(len(dist.logits), 1)
    for i, size in enumerate(sizes):
        table = (table.unsqueeze(-1) + dist.log_probs[:, i, :size].unsqueeze(-2)).flatten(1)
    return MultiCategorical(table.unsqueeze(1))


def divergences(old: Any, new: Any, seed: int = 0) -> tuple[Tensor, float]:
    """The ``joint`` and ``js_stderr`` of a StateComparison, for two policies at S states. Raises as ``klrl.kl.kl``."""
    forward, reverse = kl(old, new), reverse_kl(old, new)
    with own_noise(seed):
        chunks = [slice(i, i + _ROWS) for i in range(0, len(forward), _ROWS)]
        parts = [_jensen_shannon(select(old, rows), select(new, rows)) for rows in chunks]
    value, variance = (torch.cat(column) for column in zip(*parts, strict=True))
    value = torch.where(forward == 0, 0.0, value)  # of equal policies, the exact form leaves a rounding error
    return torch.stack([forward, reverse, value]), float(variance.sum().sqrt()) / len(value)


def _jensen_shannon(old: Any, new: Any) -> tuple[Tensor, Tensor]:
    """JS and the variance of its estimate, [B]; sampled where it has no closed form or too many joint actions.

    JS is what an action, drawn from either at even odds, tells about which one it came from: the mean of log 2 - H(w)
    with w = p_old / (p_old + p_new), within 0 to log 2 for every sample. Source: Lin (1991), section IV.
    """
    try:
        exact = js(old, new).double()
        return exact, torch.zeros_like(exact)
    except ValueError:
        samples = [dist.sample((_SAMPLES,)) for dist in (old, new)]
    if isinstance(old, MultiCategorical):
        old, new = (MultiCategorical(dist.logits.expand(_SAMPLES, *dist.logits.shape)) for dist in (old, new))
    t = torch.stack([torch.tanh((old.log_prob(x) - new.log_prob(x)) / 2) for x in samples])  # 2w - 1
    terms = 0.5 * (torch.xlogy(1 + t, 1 + t) + torch.xlogy(1 - t, 1 - t)).clamp_min(0.0)
    return terms.mean((0, 1)), terms.var(1).sum(0) / (4 * _SAMPLES)


def _disagreements(agents: Sequence[Agent], visited: Sequence[StateComparison]) -> list[dict[str, Any]]:
    """The list that is ``Comparison.states``. Of an image it has only the shape."""
    steps = len(visited[0].joint[0])
    obs = tree_map(lambda *parts: np.concatenate(parts), *(part.obs for part in visited))
    forward, reverse, _ = torch.cat([part.joint for part in visited], dim=-1)
    parts = list(obs.values()) if isinstance(obs, dict) else [obs]
    keys = [hash(tuple(part[row].tobytes() for part in parts)) for row in range(2 * steps)]
    visitors = {"A": set(keys[:steps]), "B": set(keys[steps:])}
    worst: dict[int, int] = {}
    for row in (forward + reverse).sort(descending=True, stable=True).indices.tolist():
        worst.setdefault(keys[row], row)
    rows = list(worst.values())[:_SHOWN]
    chosen = tree_map(lambda part: part[rows], obs)
    both = [concatenate(list(pair)) for pair in zip(*(part.policies for part in visited), strict=True)]
    actions = [
        _likely_actions(agent, select(dist, torch.tensor(rows)), chosen)
        for agent, dist in zip(agents, both, strict=True)
    ]
    found = []
    for i, (row, a, b) in enumerate(zip(rows, *actions, strict=True)):
        by = [side for side, visited_keys in visitors.items() if keys[row] in visited_keys]
        kls = {"forward": float(forward[row]), "reverse": float(reverse[row])}
        shown = tree_map(lambda part, i=i: part[i].tolist() if part.ndim < 4 else {"shape": part[i].shape}, chosen)
        found.append({"visited_by": by, "step": row % steps, **kls, "A": a, "B": b, "obs": shown})
    return [state for state in found if state["forward"] + state["reverse"] > 0]


def _likely_actions(agent: Agent, dist: Any, obs: Observation) -> list[dict[str, Any]]:
    columns: dict[str, Any] = {"action": agent.env_action(agent.act(obs, deterministic=True))}
    if isinstance(dist, MultiCategorical):
        columns["probability"] = dist.log_prob(dist.mode).exp()
    else:
        columns |= {"mean": dist.mean, "std": dist.log_std.exp()}
    return [{name: column[i].tolist() for name, column in columns.items()} for i in range(len(dist.mode))]


def summary(values: Tensor) -> dict[str, float]:
    """Mean and quantiles over the states [S]; a quantile is the value of one state, so that infinity stays infinity."""
    ordered = values.sort().values
    quantiles = {name: float(ordered[round(rank * (len(ordered) - 1))]) for name, rank in _QUANTILES.items()}
    return {"mean": float(values.mean()), **quantiles}


def to_json(found: Comparison) -> str:
    """The comparison as one line of JSON."""
    content: dict[str, Any] = {"env": found.env, "seed": found.config.seed, "steps": found.config.steps}
    for side, trained, score, part in zip("AB", found.policies, found.returns, found.visited, strict=True):
        about = {"path": trained.path, "agent": type(trained.agent).__name__, "env": trained.env, "step": trained.step}
        measured: dict[str, Any] = {name: summary(x) for name, x in zip(_KEYS, part.joint, strict=True)}
        measured["js"]["stderr"] = part.js_stderr
        means = [dict(zip(_KEYS, row, strict=True)) for row in part.dimensions.mean(-1).tolist()]
        content[side] = {**about, "return": score._asdict(), "visited": {**measured, "mean_by_dimension": means}}
    content["disagreements"] = found.states
    # Infinity is not JSON: it is written as text.
    return json.dumps(tree_map(lambda x: str(x) if isinstance(x, float) and not math.isfinite(x) else x, content))


def to_text(found: Comparison) -> str:
    """The comparison as tables, in about 40 lines."""
    config = found.config
    about, spread = [], []
    for side, trained, score, part in zip("AB", found.policies, found.returns, found.visited, strict=True):
        kind, where = type(trained.agent).__name__, f"step {trained.step:,} on {trained.env}"
        about.append([side, trained.path, kind, where, f"return {score.mean:.1f} +- {score.std:.1f}"])
        spread.append([f"at {config.steps:,} states that {side} visited", "mean", *_QUANTILES])
        for name, values in zip(_NAMES, part.joint, strict=True):
            spread.append([f"  {name}", *(f"{x:.4g}" for x in summary(values).values())])
        spread[-1][0] += f" (sampled, mean +- {part.js_stderr:.1g})" if part.js_stderr else ""
    note = f"Returns of {config.episodes} episodes on {found.env}, seed {config.seed}; KL and JS in nats."
    blocks = [[*tables.as_text(about, "<<<<<"), note], tables.as_text(spread, "<>>>>>>")]
    means = torch.cat([part.dimensions.mean(-1) for part in found.visited], dim=-1)
    if len(means) > 1:
        worst = means[:, [0, 1, 3, 4]].sum(-1).argsort(descending=True, stable=True)[:_SHOWN].tolist()
        title = ["mean by action dimension", *(f"{side}: {name}" for side in "AB" for name in _NAMES)]
        rows = [[f"  {i}", *(f"{x:.4g}" for x in means[i].tolist())] for i in worst]
        rows += [[f"  and {len(means) - _SHOWN} with less", *[""] * 6]] if len(means) > _SHOWN else []
        blocks.append(tables.as_text([title, *rows], "<>>>>>>"))
    states = [["by", "step", *_NAMES[:2], "A does", "B does", "observation"]]
    for state in found.states:
        numbers = [str(state["step"]), *(f"{state[name]:.4g}" for name in _KEYS[:2])]
        words = [*(_action_text(**state[side]) for side in "AB"), _short(state["obs"])]
        states.append(["+".join(state["visited_by"]), *numbers, *words])
    worst_states = ["where they disagree most, by KL(A||B) + KL(B||A)", *tables.as_text(states, "<>>><<<")]
    blocks.append(worst_states if found.states else ["they agree at every state"])
    return "\n\n".join("\n".join(block) for block in blocks)


def _action_text(action: Any, probability: float | None = None, mean: Any = None, std: Any = ()) -> str:
    words = f" (p {probability:.3g})" if probability is not None else ""
    return _short(action) + (f" (std {_short(std)})" if 0 < len(std) <= 2 else words)


def _short(value: Any) -> str:
    """Numbers to three digits, the first few of many."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(part)}" for key, part in value.items())
    numbers = np.ravel(value).tolist()
    return " ".join(f"{x:.3g}" for x in numbers[:_NUMBERS]) + (" ..." if len(numbers) > _NUMBERS else "")


def draw(found: Comparison) -> Any:
    """A matplotlib Figure: the KL of each state, its mean by action dimension, and the returns."""
    from matplotlib.figure import Figure

    from klrl.analysis.figures import tidy
    from klrl.analysis.plots import NEW, OLD

    figure = Figure(figsize=(13, 4), layout="constrained")
    spread, bars, scores = figure.subplots(1, 3)
    for i, (side, part, colour) in enumerate(zip("AB", found.visited, (OLD, NEW), strict=True)):
        for name, values, style in zip(_NAMES, part.joint[:2], ("-", "--"), strict=False):
            positive = values[(values > 0) & values.isfinite()].sort().values  # what a logarithmic axis can show
            fractions = (int((values == 0).sum()) + 1 + torch.arange(len(positive))) / len(values)
            spread.step(positive, fractions, where="post", color=colour, ls=style, label=f"{name} where {side} went")
            spread.set_xscale("log" if len(positive) else spread.get_xscale())
        means = part.dimensions[:, 0].mean(-1).numpy()
        positions = np.arange(len(means)) + 0.4 * i - 0.2
        bars.bar(positions, np.where(np.isfinite(means), means, 0.0), 0.4, color=colour, zorder=2)
        for x in positions[np.isinf(means)]:
            bars.text(x, 0, "inf", ha="center", va="bottom")
        scores.plot(found.returns[i].returns, np.full(found.config.episodes, i), "|", color=colour, markersize=30)
    spread.legend(frameon=False, fontsize=8)
    spread.set(xlabel="KL of a state, nats", ylabel="share of states at or below", ylim=(0, 1), title="KL by state")
    bars.set(xlabel="action dimension", ylabel="nats", title="mean KL(A||B) by action dimension")
    bars.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    labels = [f"{side}\n{score.mean:.1f}\n+- {score.std:.1f}" for side, score in zip("AB", found.returns, strict=True)]
    scores.set(xlabel="return of an episode", yticks=[0, 1], yticklabels=labels, ylim=(1.6, -0.6), title="returns")
    for axes in (spread, bars, scores):
        tidy(axes)
    titles = [f"{side}: {p.path} at step {p.step:,}" for side, p in zip("AB", found.policies, strict=True)]
    figure.suptitle(printable("\n".join(titles)), parse_math=False)
    return figure
