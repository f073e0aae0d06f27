"""An agent under a governor: it acts by the policy nearest to its own within a KL of a reference, at every state."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
from torch import Tensor

from klrl.agents.actor import Actions, Actor, check_forgets
from klrl.agents.base import Agent
from klrl.config import Range, convert
from klrl.errors import UsageError
from klrl.kl import project_states, reverse_kl
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.networks import Array
from klrl.policies.observations import Observation
from klrl.policies.squashed import SquashedNormal

_NEWTON, _TRIALS = 8, 60  # steps of Newton's method, and together with the halvings that follow where it is slow
_TINY = 1e-8
_SHORT = 1e-3  # by how much of kappa a KL may stay below it
Measure = Callable[[Array], tuple[Array, Array]]
"""Weights [N] of the agent's policy to the geometric means' KL from the reference and its slope, each [N]."""


class Governed(Actor):
    """``agent``, whose every action comes from the policy nearest to its own with KL(policy||reference) <= kappa.

    Of all policies within kappa nats at a state it is the one of the least KL(policy||agent's): a geometric mean
    reference^(1 - t) agent^t, with the largest t that is within, and the agent's own where that is. Sampled actions
    have its distribution; ``deterministic`` takes its most likely action, which is no policy within kappa. Source:
    the dual of Otto et al. (2021), section 4, of which t / (1 - t) is the multiplier.
    """

    def __init__(self, agent: Agent, reference: Agent, kappa: float) -> None:
        """``agent`` and ``reference``: of one environment and one family of actions, as ``klrl.load`` gives them.

        Raises UsageError where they are not, and for a kappa that is not above 0.
        """
        kappa = convert(Annotated[float, Range(0, above=True)], kappa, "kappa")
        if not (isinstance(agent, Agent) and isinstance(reference, Agent)):
            raise UsageError("Governed takes two agents, such as klrl.load gives, and a kappa")
        for part in ("observation_space", "action_space"):
            mine, theirs = getattr(agent, part), getattr(reference, part)
            if mine != theirs:
                raise UsageError(f"the reference's {part.replace('_', ' ')} is {theirs}, not the agent's {mine}")
        check_forgets(agent, "an agent that is governed")
        check_forgets(reference, "the reference")
        self.agent, self.reference, self.kappa = agent, reference, kappa
        self.policy, self.encoder = agent.policy, agent.encoder
        probe = agent.encoder.probe()
        self._heads: Any = agent.policy.head, reference.policy.head
        own, other = agent.policy_at(probe), reference.policy_at(reference.encoder.probe())
        if type(own) is not type(other) or not isinstance(own, MultiCategorical | DiagonalNormal | SquashedNormal):
            raise UsageError(f"no geometric mean of {type(own).__name__} and {type(other).__name__} policies is known")
        try:
            reverse_kl(other, own)
        except ValueError as problem:
            raise UsageError(f"the agent or its reference cannot be governed: {problem}") from None

    def distribution(self, obs: Observation) -> Any:
        """The policy that acts at observations [B, *shape], as data, in float64: rounding would leave kappa."""
        old, new = (agent.distribution(obs).map_parameters(Tensor.double) for agent in (self.reference, self.agent))
        return project_states(old, new, self.kappa, "reverse")

    def act(
        self, obs: Observation, deterministic: bool = False, rng: Any = None, state: Array | None = None
    ) -> Actions:
        """Actions [N, d] for a batch of observations [N, *shape], as ``Agent.act``."""
        mine, theirs = (
            head.numbers(agent.policy.outputs(obs))
            for head, agent in zip(self._heads, (self.agent, self.reference), strict=True)
        )
        one: Any = govern_categorical if len(mine) == 1 else govern_normal
        many: Any = govern_categoricals if len(mine) == 1 else govern_normals
        numbers = (one if len(mine[0]) == 1 else many)(*mine, *theirs, self.kappa)
        action = self._heads[0].draw(*numbers, None if deterministic else self.agent.rng if rng is None else rng)
        return action.astype(np.float32) if action.dtype == np.float64 else action


def weights(measure: Measure, reached: Array, kappa: float) -> Array:
    """The largest weights, [N], whose KL is within ``kappa``, from what is ``reached`` at 1, [N].

    Newton's method on the root of the KL, from where either its tangent at 0 or its chord to 1 says that kappa is
    reached: the first of these is not beyond it where the root is concave or convex. A step that leaves what is known
    to hold the solution halves that instead.
    """
    done = reached <= kappa
    low, high, aim = done.astype(np.float64), np.ones(len(reached)), math.sqrt(kappa * (1 - _SHORT / 2))
    tangent = np.sqrt(0.5 * measure(np.full(len(reached), _TINY))[1] / _TINY)
    weight = np.where(done, 1.0, aim / np.fmax(tangent, np.sqrt(reached)))
    for trial in range(1, _TRIALS):
        reached, slope = measure(weight)
        inside = reached <= kappa
        low = np.where(inside & ~done, weight, low)
        done = done | (inside & (reached >= kappa * (1 - _SHORT)))
        if done.all():
            break
        high = np.where(inside, high, weight)
        root = np.sqrt(reached)
        newton = weight + 2 * root * (aim - root) / slope
        fits = done | ((newton > low) & (newton < high) & (trial < _NEWTON))  # false for nan
        weight = newton if fits.all() else np.where(fits, newton, _middle(low, high))
    return low


def _middle(low: Array, high: Array) -> Array:
    """Halfway in log-odds, as a solution may be next to 0."""
    odds = [np.log(np.maximum(x, 1e-30)) - np.log(np.maximum(1 - x, 1e-16)) for x in (low, high)]
    return 1 / (1 + np.exp(-sum(odds) / 2))


def govern_categoricals(logits: Array, reference: Array, kappa: float) -> tuple[Array]:
    """The logits [N, k, n] of the nearest policy to that of ``logits`` within ``kappa`` of that of ``reference``."""
    with np.errstate(all="ignore"):
        new, old = _normalised(logits), _normalised(reference)
        apart, base = new - old, np.exp(old)
        reached = _expected(np.exp(new), apart).sum(-1)
        if (reached <= kappa).all():
            return (logits,)
        one_forbids = np.isneginf(new) | np.isneginf(old)  # then every mean but the ends does
        if one_forbids.any():
            base, apart = np.where(one_forbids, 0.0, base), np.where(one_forbids, 0.0, apart)
        powers = np.stack([np.ones_like(apart), apart, apart * apart], -1)

        def measure(weight: Array) -> tuple[Array, Array]:
            # d/dt KL = t Var[log agent - log reference], under the mean at t
            t = weight[:, None]
            mean = base * np.exp(t[..., None] * apart)
            total, first, second = ((mean[..., None, :] @ powers)[..., 0, i] for i in range(3))
            first, second = first / total, second / total
            return (t * first - np.log(total)).sum(-1), (t * (second - first * first)).sum(-1)

        t = weights(measure, reached, kappa)[:, None, None]
        mixed = np.where(one_forbids, -np.inf, old + t * apart)
    return (np.where(t == 1, logits, np.where(t == 0, reference, mixed)),)


def _normalised(logits: Array) -> Array:
    """Log-probabilities, float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    x -= np.log(np.exp(x).sum(-1, keepdims=True))
    return x


def _expected(probs: Array, x: Array) -> Array:
    """E[x] over the last axis; what has no probability has no part in it."""
    return np.where(probs > 0, probs * x, 0.0).sum(-1)


def govern_normals(
    mean: Array, log_std: Array, mean_reference: Array, log_std_reference: Array, kappa: float
) -> tuple[Array, Array]:
    """Mean and log standard deviation [N, d] of the nearest policy within ``kappa``, as ``govern_categoricals``."""
    with np.errstate(all="ignore"):
        ratio = np.exp(2 * (log_std_reference.astype(np.float64) - log_std))
        z_squared = np.square((mean - mean_reference) * np.exp(-log_std_reference.astype(np.float64)))

        def measure(weight: Array | float) -> tuple[Array, Array]:
            t = np.asarray(weight)[..., None]
            precision = (1 - t) + t * ratio  # in the reference's
            variance = 1 / precision
            share = t * ratio * variance
            divergence = variance - 1 + np.log(precision) + share * share * z_squared
            slope = variance * variance * (t * (ratio - 1) ** 2 + 2 * share * ratio * z_squared)
            return 0.5 * divergence.sum(-1), 0.5 * slope.sum(-1)

        reached, _ = measure(1.0)
        if (reached <= kappa).all():
            return mean, log_std
        t = weights(measure, reached, kappa)[:, None]
        precision = (1 - t) + t * ratio
        share = t * ratio / precision
        mixed = mean_reference + share * (mean - mean_reference), log_std_reference - 0.5 * np.log(precision)
    return np.where(t == 1, mean, mixed[0]), np.where(t == 1, log_std, mixed[1])


# One state at a time, where an action is waited for: in plain Python, as NumPy's calls on a handful of numbers take
# several times longer than the agent does. The same mathematics; the tests compare both.


def weight_of(measure: Callable[[float], tuple[float, float]], reached: float, kappa: float) -> float:
    """``weights`` of one state, whose KL at 1 is above ``kappa``."""
    low, high, aim = 0.0, 1.0, math.sqrt(kappa * (1 - _SHORT / 2))
    tangent = math.sqrt(max(0.5 * measure(_TINY)[1] / _TINY, 0.0))
    weight = aim / max(tangent, math.sqrt(reached))
    for trial in range(1, _TRIALS):
        reached, slope = measure(weight)
        if reached <= kappa:
            low = weight
            if reached >= kappa * (1 - _SHORT):
                break
        else:
            high = weight
        root = math.sqrt(max(reached, 0.0))
        weight += 2 * root * (aim - root) / slope if slope > 0 else math.inf
        if not (low < weight < high and trial < _NEWTON):
            weight = float(_middle(np.array(low), np.array(high)))
    return low


def govern_categorical(logits: Array, reference: Array, kappa: float) -> tuple[Array]:
    """``govern_categoricals`` of one state, [1, k, n]."""
    parts = []
    for mine, theirs in zip(logits[0].tolist(), reference[0].tolist(), strict=True):
        if -math.inf in mine or -math.inf in theirs:
            return govern_categoricals(logits, reference, kappa)
        top, apart = max(theirs), [a - b for a, b in zip(mine, theirs, strict=True)]
        base, most = [math.exp(b - top) for b in theirs], max(apart)
        whole = sum(base)
        parts.append([(b / whole, a - most) for b, a in zip(base, apart, strict=True)])

    def measure(t: float) -> tuple[float, float]:
        divergence = slope = 0.0
        for part in parts:
            total = first = second = 0.0
            for base, apart in part:
                mean = base * math.exp(t * apart)
                total += mean
                first += mean * apart
                second += mean * apart * apart
            if total == 0.0:
                return math.inf, math.nan
            first /= total
            divergence += t * first - math.log(total)
            slope += t * (second / total - first * first)
        return divergence, slope

    reached, _ = measure(1.0)
    if reached <= kappa:
        return (logits,)
    if not reached < math.inf:
        return govern_categoricals(logits, reference, kappa)
    t = weight_of(measure, reached, kappa)
    return (reference + t * (logits.astype(np.float64) - reference),)


def govern_normal(
    mean: Array, log_std: Array, mean_reference: Array, log_std_reference: Array, kappa: float
) -> tuple[Array, Array]:
    """``govern_normals`` of one state, [1, d]."""
    spreads = [x.reshape(-1).tolist() for x in (log_std, log_std_reference)]
    parts = []
    for a, b, mine, theirs in zip(mean[0].tolist(), mean_reference[0].tolist(), *spreads, strict=True):
        if not (abs(mine) < 100 and abs(theirs) < 100 and abs(a - b) < 1e50):
            return govern_normals(mean, log_std, mean_reference, log_std_reference, kappa)
        parts.append((math.exp(2 * (theirs - mine)), ((a - b) * math.exp(-theirs)) ** 2))

    def measure(t: float) -> tuple[float, float]:
        divergence = slope = 0.0
        for ratio, z_squared in parts:
            precision = (1 - t) + t * ratio
            variance = 1 / precision
            share = t * ratio * variance
            divergence += variance - 1 + math.log(precision) + share * share * z_squared
            slope += variance * variance * (t * (ratio - 1) ** 2 + 2 * share * ratio * z_squared)
        return 0.5 * divergence, 0.5 * slope

    reached, _ = measure(1.0)
    if reached <= kappa:
        return mean, log_std
    t = weight_of(measure, reached, kappa)
    moved = [(t * ratio / ((1 - t) + t * ratio), 0.5 * math.log((1 - t) + t * ratio)) for ratio, _ in parts]
    share, narrower = np.array(moved).T
    return mean_reference + share * (mean - mean_reference), (log_std_reference - narrower).reshape(1, -1)
