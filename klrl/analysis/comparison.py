"""Comparison of two trained policies: KL both ways and JS over the states that each visits, and their returns.

A is old and B new: forward is KL(A||B). ``klrl.analysis.compare`` shows what ``compare_policies`` measures.
"""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils._pytree import tree_map

from klrl.agents.base import Agent
from klrl.analysis.calibration import CriticCalibration, PolicyCalibration, calibrate_critic, calibrate_policy
from klrl.analysis.shift import Shift, shift
from klrl.analysis.visits import Visits, visit
from klrl.config import Checked, EnvCount, Range, Seed
from klrl.envs.make import Imports
from klrl.errors import NonFiniteError, UsageError
from klrl.kl import concatenate, js, kl, reverse_kl, select
from klrl.kl.state import own_noise
from klrl.policies.beta import JointBeta
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.observations import Observation
from klrl.policies.spaces import category_sizes, check_same_spaces
from klrl.policies.squashed import SquashedHead, SquashedNormal
from klrl.training.evaluation import Evaluation, evaluation_seed, run_episodes
from klrl.training.load import LoadedPolicy

_KINDS = (MultiCategorical, DiagonalNormal, SquashedNormal, JointBeta)
_ENVS = 2  # few, so that long episodes are seen to their end
_SAMPLES = 64  # of each policy at a state, for a JS without closed form
_ROWS = 128  # states at a time: a joint action space is written out, or sampled, for each
SHOWN = 10  # states, and in the text action dimensions
KEYS = ("forward", "reverse", "js")
QUANTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


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
    states_of: str = ""
    """A further environment with the same spaces: how A and B differ there, and how far each one's states shift."""
    env_kwargs: Annotated[dict[str, Any], tyro.conf.arg(name="env.kwargs")] = field(default_factory=dict)
    """Arguments for the environment of --states-of, beside those that A was trained with: --env.kwargs g=15."""
    seed: Seed = 0
    """Seed of the environments, of the sampled actions, and of what is resampled or estimated from samples."""
    json: bool = False
    """Print JSON."""
    figure: str = ""
    """File to draw the comparison in, .png or .svg."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.env_kwargs and not self.states_of:
            raise UsageError("--env.kwargs goes with --states-of ENV, whose arguments they are")


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
class Elsewhere:
    """The two policies in the environment of --states-of. Of each pair, the first is A's and the second B's."""

    env: str
    kwargs: dict[str, Any]
    visited: Sequence[StateComparison]
    shifts: Sequence[Shift]
    """From the states that each visited in the first environment."""


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
    critics: Sequence[CriticCalibration | None]
    """How right each one's critic is about its own visits."""
    predictions: Sequence[PolicyCalibration | None]
    """How well A says what B does where B went, and B what A does where A went; None unless actions are discrete."""
    elsewhere: Elsewhere | None


def compare_policies(old: LoadedPolicy, new: LoadedPolicy, config: CompareConfig) -> Comparison:
    """Run both policies in one environment and measure how they differ at the states of each, reproducibly by seed.

    Raises UsageError for different spaces, for a normal and a squashed normal, and as ``LoadedPolicy.make_envs``;
    NonFiniteError where a policy is nan.
    """
    _check_alike(old, new)
    agents, seed = (old.agent, new.agent), evaluation_seed("afterwards", config.seed)
    visits, visited, returns = [], [], []
    for agent in agents:
        with closing(old.make_envs(min(_ENVS, config.steps), config.env)) as envs:
            visits.append(visit(agent, envs, config.steps, seed))
        visited.append(compare_at(*agents, visits[-1].states, config.seed))
        with closing(old.make_envs(config.episodes, config.env)) as envs:
            returns.append(run_episodes(agent, envs, seed, episodes=config.episodes))
    critics = [
        calibrate_critic(agent, part, np.random.default_rng(config.seed))
        for agent, part in zip(agents, visits, strict=True)
    ]
    predictions = [calibrate_policy(*visited[1].policies), calibrate_policy(*visited[0].policies[::-1])]
    return Comparison(
        (old, new),
        config,
        config.env or old.env,
        visited,
        returns,
        _disagreements(agents, visited),
        critics,
        predictions,
        _elsewhere(old, agents, visits, config) if config.states_of else None,
    )


def _elsewhere(
    old: LoadedPolicy, agents: tuple[Agent, Agent], visits: Sequence[Visits], config: CompareConfig
) -> Elsewhere:
    # Other episodes than here: with the same, equal environments would seem to agree more than their states do.
    seed = evaluation_seed("afterwards", config.seed, 1)
    visited, shifts = [], []
    for agent, here in zip(agents, visits, strict=True):
        with closing(old.make_envs(min(_ENVS, config.steps), config.states_of, **config.env_kwargs)) as envs:
            there = visit(agent, envs, config.steps, seed)
        visited.append(compare_at(*agents, there.states, config.seed))
        shifts.append(shift(here, there, agent.encoder, config.seed))
    return Elsewhere(config.states_of, config.env_kwargs, visited, shifts)


def _check_alike(old: LoadedPolicy, new: LoadedPolicy) -> None:
    different = "no KL between policies with different spaces:"
    check_same_spaces(old.agent, new.agent, f"{different} {new.path}'s", f"{old.path}'s ")
    if len({isinstance(trained.agent.policy.head, SquashedHead) for trained in (old, new)}) == 2:
        raise UsageError(f"no closed-form KL between a normal and a squashed normal policy: {old.path} and {new.path}")
    kinds = [type(trained.agent.policy_at(trained.agent.encoder.probe())) for trained in (old, new)]
    if len({*kinds}) == 2 or not issubclass(kinds[0], _KINDS):
        names = " and ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"compare takes two policies of one of klrl's families, not {names}")


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
    rows = list(worst.values())[:SHOWN]
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
        columns |= {"mean": dist.mean, "std": dist.stddev if isinstance(dist, JointBeta) else dist.log_std.exp()}
    return [{name: column[i].tolist() for name, column in columns.items()} for i in range(len(dist.mode))]


def summary(values: Tensor) -> dict[str, float]:
    """Mean and quantiles over the states [S]; a quantile is the value of one state, so that infinity stays infinity."""
    ordered = values.sort().values
    quantiles = {name: float(ordered[round(rank * (len(ordered) - 1))]) for name, rank in QUANTILES.items()}
    return {"mean": float(values.mean()), **quantiles}
