"""An agent under a governor: it acts by the policy nearest to its own within a KL of a reference, at every state."""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from torch import Tensor

from klrl.agents.actor import Actions, Actor, refuse_recurrent
from klrl.agents.base import Agent
from klrl.agents.reference import UNIFORM
from klrl.config import Range, convert
from klrl.errors import UsageError
from klrl.kl import project_states, reverse_kl
from klrl.policies.distributions import DiagonalNormal, MultiCategorical, uniform_like
from klrl.policies.networks import Array
from klrl.policies.observations import Observation
from klrl.policies.spaces import check_same_spaces
from klrl.policies.squashed import SquashedNormal

_STEPS, _TRIALS = 8, 60  # guesses, and together with the halvings that follow where these take long
_SHORT = 2e-4  # by how much of kappa a KL may stay below it
_total, _largest = np.add.reduce, np.maximum.reduce  # along the first axis, in half the time of an array's methods
Measure = Callable[[Array], tuple[Array, Array]]
"""Weights t [N] of the agent's policy to the geometric means' KL from the reference, and its slope over t, each [N]."""


class Governed(Actor):
    """``agent``, whose every action comes from the policy nearest to its own with KL(policy||reference) <= kappa.

    Of all policies within kappa nats at a state it is the one of the least KL(policy||agent's): a geometric mean
    reference^(1 - t) agent^t, with the largest t that is within, and the agent's own where that is. Sampled actions
    have its distribution; ``deterministic`` takes its most likely action, which is no policy within kappa. Source:
    the dual of Otto et al. (2021), section 4, of which t / (1 - t) is the multiplier.
    """

    def __init__(self, agent: Agent, reference: Agent | Literal["uniform"], kappa: float) -> None:
        """``agent`` and ``reference``: of one environment and one family of actions, as ``klrl.load`` gives them; a
        reference "uniform" takes all discrete actions alike.

        Raises UsageError where they are not, and for a kappa that is not above 0.
        """
        kappa = convert(Annotated[float, Range(0, above=True)], kappa, "kappa")
        if not isinstance(agent, Agent) or not (isinstance(reference, Agent) or reference == UNIFORM):
            raise UsageError("Governed takes two agents, such as klrl.load gives, and a kappa")
        refuse_recurrent(agent, "an agent that is governed")
        self.agent, self.reference, self.kappa = agent, reference, kappa
        self.policy, self.encoder = agent.policy, agent.encoder
        own = agent.policy_at(agent.encoder.probe())
        if isinstance(reference, Agent):
            check_same_spaces(agent, reference, "the reference's", "the agent's ")
            refuse_recurrent(reference, "the reference")
            self._other: Any = reference.policy
            other = reference.policy_at(reference.encoder.probe())
        else:
            self._other, other = None, uniform_like(own)
        self._heads: Any = agent.policy.head, (self._other or agent.policy).head
        if type(own) is not type(other) or not isinstance(own, MultiCategorical | DiagonalNormal | SquashedNormal):
            kinds = f"{type(own).__name__} and {type(other).__name__}"
            raise UsageError(f"a governor mixes two normals, squashed ones, or categoricals, and not {kinds}")
        try:
            reverse_kl(other, own)
        except ValueError as problem:
            raise UsageError(f"the agent or its reference cannot be governed: {problem}") from None

    def distribution(self, obs: Observation) -> Any:
        """The policy that acts at observations [B, *shape], as data, in float64: rounding would leave kappa."""
        own = self.agent.distribution(obs)
        other: Any = self.reference.distribution(obs) if isinstance(self.reference, Agent) else uniform_like(own)
        old, new = (policy.map_parameters(Tensor.double) for policy in (other, own))
        return project_states(old, new, self.kappa, "reverse")

    def act(
        self, obs: Observation, deterministic: bool = False, rng: Any = None, state: Array | None = None
    ) -> Actions:
        """Actions [N, d] for a batch of observations [N, *shape], as ``Agent.act``."""
        head, of_reference = self._heads
        outputs = self.policy.outputs(obs)
        forbidden = np.isneginf(outputs)  # by a mask
        others = np.where(forbidden, outputs, 0) if self._other is None else self._other.outputs(obs)
        mine, theirs = head.numbers(outputs), of_reference.numbers(others)
        one, many = _GOVERN[len(mine)]
        numbers = (one if len(outputs) == 1 else many)(*mine, *theirs, self.kappa)
        action = head.draw(*numbers, None if deterministic else self.agent.rng if rng is None else rng)
        return action.astype(np.float32) if action.dtype == np.float64 else action


def weights(measure: Measure, steep: Array, reached: Array, kappa: float) -> Array:
    """The largest weights, [N], whose KL is within ``kappa``.

    ``steep``: the slope of the KL's root at a weight of 0, ``reached``: the KL at 1, above kappa; both [N]. Root over
    weight is nearly a line in the root: at first that between the two, then the parabola that has ``steep`` and the
    value and slope at the last guess. Of three KLs the third is mostly kappa's; a guess that leaves what is known to
    hold the solution halves it instead.
    """
    aim = math.sqrt(kappa * (1 - _SHORT / 2))
    weight = aim / np.fmax(aim + steep * (1 - aim / np.sqrt(reached)), aim)
    low, high = np.zeros(len(weight)), np.ones(len(weight))
    for trial in range(_TRIALS):
        reached, curvature = measure(weight)
        off = np.abs(reached - aim * aim)
        if _largest(off) < 0.49 * _SHORT * kappa:  # false for nan
            return weight
        root = np.sqrt(reached)
        rise, x = root / weight, aim / root
        first = rise - steep
        second = rise - 2 * rise * rise * rise / curvature - first
        guess = aim / np.fmax(steep + x * (first - second + x * second), aim)  # at most 1, even where it is nan
        if trial > 0:  # where the first guess did not do
            done = off < 0.49 * _SHORT * kappa
            inside = done | (reached <= aim * aim)
            low, high = np.where(inside, weight, low), np.where(inside, high, weight)
            fits = (guess > low) & (guess < high) & (trial < _STEPS)
            guess = np.where(done, weight, np.where(fits, guess, _middle(low, high)))
        weight = guess
    return low


def _middle(low: Array, high: Array) -> Array:
    """Halfway in log-odds, as a solution may be next to 0."""
    odds = [np.log(np.maximum(x, 1e-30)) - np.log(np.maximum(1 - x, 1e-16)) for x in (low, high)]
    return 1 / (1 + np.exp(-sum(odds) / 2))


def _solved(
    family: Callable[..., tuple[Measure, Array]], parts: tuple[Array, ...], beyond: Any, kappa: float
) -> tuple[Array, Array]:
    """Where the agent's policy is outside of ``kappa``, or ``beyond`` any, and the weights of the means that ``family``
    measures by parts [..., N]: both [N]."""
    measure, steep = family(*parts)
    reached, _ = measure(np.ones(1))
    if beyond is not None:
        reached[beyond] = np.inf
    outside = ~(reached <= kappa)
    if outside.all():
        return outside, weights(measure, steep, reached, kappa)
    t = np.ones(len(reached))
    if outside.any():
        measure, steep = family(*(part[..., outside] for part in parts))
        t[outside] = weights(measure, steep, reached[outside], kappa)
    return outside, t


def govern_categoricals(logits: Array, reference: Array, kappa: float) -> tuple[Array]:
    """The logits [N, k, n] of the nearest policy to that of ``logits`` within ``kappa`` of that of ``reference``."""
    with np.errstate(all="ignore"):
        # States come last, so that what NumPy's loops run over is long: [n, k, N].
        old, new = (np.ascontiguousarray(part.T, np.float64) for part in (reference, logits))
        base, apart = np.exp(old - _largest(old)), new - old
        base /= _total(base)
        never: Any = None
        beyond: Any = None
        if not math.isfinite(_total(apart, None)):  # one of the two forbids a choice: then every mean but the ends does
            never, beyond = np.isneginf(old) | np.isneginf(new), (np.isneginf(old) & ~np.isneginf(new)).any((0, 1))
            base, apart = np.where(never, 0.0, base), np.where(never, -np.inf, apart)
        apart -= _largest(apart)
        if never is not None:
            apart = np.where(never, 0.0, apart)
        outside, t = _solved(_tilts, (base, apart), beyond, kappa)
        if not outside.any():
            return (logits,)
        mixed = np.where(outside, old + t * apart, new)
        if never is not None:
            mixed = np.where(never & outside & (t > 0), -np.inf, mixed)
    return (np.ascontiguousarray(mixed.T),)


def _tilts(base: Array, apart: Array) -> tuple[Measure, Array]:
    """Of policies base * exp(t apart), normalised, [n, k, N], where base sums to 1: d/dt KL = t Var[apart]."""

    def moments(mean: Array) -> tuple[Array, Array, Array]:
        whole = _total(mean)
        mean *= apart
        first = _total(mean) / whole
        mean *= apart
        return np.log(whole), first, _total(_total(mean) / whole - first * first)

    def measure(t: Array) -> tuple[Array, Array]:
        mean = np.exp(t * apart)
        mean *= base
        whole, first, variance = moments(mean)
        return _total(t * first - whole), variance

    return measure, np.sqrt(moments(base.copy())[2] / 2)


def govern_normals(
    mean: Array, log_std: Array, mean_reference: Array, log_std_reference: Array, kappa: float
) -> tuple[Array, Array]:
    """Mean and log standard deviation [N, d] of the nearest policy within ``kappa``, as ``govern_categoricals``."""
    with np.errstate(all="ignore"):
        wide = log_std_reference.astype(np.float64)
        ratio, z = np.exp(2 * (wide - log_std)), (mean - mean_reference) * np.exp(-wide)
        ratio, z_squared = np.ascontiguousarray(np.broadcast_to(ratio, z.shape).T), np.square(z.T, order="C")
        outside, t = _solved(_blends, (ratio, z_squared), None, kappa)
        if not outside.any():
            return mean, log_std
        precision = (1 - t) + t * ratio
        share, narrower = (t * ratio / precision).T, 0.5 * np.log(precision.T)
        mixed = mean_reference + share * (mean - mean_reference), log_std_reference - narrower
    outside = outside[:, None]
    return np.where(outside, mixed[0], mean), np.where(outside, mixed[1], log_std)


def _blends(ratio: Array, z_squared: Array) -> tuple[Measure, Array]:
    """Of normals with precisions (1 - t) + t ratio, [d, N], in the reference's, whose ends' means are apart by
    ``z_squared`` in its variances."""
    of_ratio, of_mean = np.square(ratio - 1), 2 * ratio * ratio * z_squared

    def measure(t: Array) -> tuple[Array, Array]:
        share = t * ratio
        precision = (1 - t) + share
        variance = 1 / precision
        share *= variance
        share *= share
        share *= z_squared
        share += variance
        share += np.log(precision)
        curvature = of_mean * variance
        curvature += of_ratio
        curvature *= variance
        curvature *= variance
        return 0.5 * (_total(share) - len(ratio)), 0.5 * _total(curvature)

    return measure, np.sqrt(_total(of_ratio + of_mean) / 4)


# One state at a time, where an action is waited for: in plain Python, as NumPy's calls on a handful of numbers take
# several times longer than the agent does. The same mathematics; the tests compare both.


def weight_of(measure: Callable[[float], tuple[float, float]], steep: float, reached: float, kappa: float) -> float:
    """``weights`` of one state."""
    low, high, aim = 0.0, 1.0, math.sqrt(kappa * (1 - _SHORT / 2))
    weight = aim / (aim + steep * (1 - aim / math.sqrt(reached)))
    for trial in range(_TRIALS):
        reached, curvature = measure(weight)
        if reached <= kappa:
            low = weight
            if reached >= kappa * (1 - _SHORT):
                break
        else:
            high = weight
        if trial < _STEPS and reached > 0 and curvature > 0:
            root = math.sqrt(reached)
            rise, x = root / weight, aim / root
            first = rise - steep
            second = rise - 2 * rise**3 / curvature - first
            weight = aim / max(steep + x * (first - second + x * second), aim)
        if not low < weight < high:
            weight = float(_middle(np.array(low), np.array(high)))
    return low


def govern_categorical(logits: Array, reference: Array, kappa: float) -> tuple[Array]:
    """``govern_categoricals`` of one state, [1, k, n]."""
    exp, parts, variance = math.exp, [], 0.0
    for mine, theirs in zip(logits[0].tolist(), reference[0].tolist(), strict=True):
        if -math.inf in mine or -math.inf in theirs:
            return govern_categoricals(logits, reference, kappa)
        top, apart = max(theirs), [a - b for a, b in zip(mine, theirs, strict=True)]
        base, most = [exp(b - top) for b in theirs], max(apart)
        whole = sum(base)
        part = [(b / whole, a - most) for b, a in zip(base, apart, strict=True)]
        mean = sum([b * a for b, a in part])
        variance += sum([b * a * a for b, a in part]) - mean * mean
        parts.append(part)

    def measure(t: float) -> tuple[float, float]:
        divergence = curvature = 0.0
        for part in parts:
            total = first = second = 0.0
            for base, apart in part:
                mean = base * exp(t * apart)
                total += mean
                mean *= apart
                first += mean
                second += mean * apart
            if total == 0.0:
                return math.inf, math.nan
            first /= total
            divergence += t * first - math.log(total)
            curvature += second / total - first * first
        return divergence, curvature

    reached, _ = measure(1.0)
    if reached <= kappa:
        return (logits,)
    if not reached < math.inf:
        return govern_categoricals(logits, reference, kappa)
    t = weight_of(measure, math.sqrt(max(variance, 0.0) / 2), reached, kappa)
    return (reference + t * (logits.astype(np.float64) - reference),)


def govern_normal(
    mean: Array, log_std: Array, mean_reference: Array, log_std_reference: Array, kappa: float
) -> tuple[Array, Array]:
    """``govern_normals`` of one state, [1, d]."""
    spreads = [x.reshape(-1).tolist() for x in (log_std, log_std_reference)]
    parts, steep = [], 0.0
    for a, b, mine, theirs in zip(mean[0].tolist(), mean_reference[0].tolist(), *spreads, strict=True):
        if not (abs(mine) < 100 and abs(theirs) < 100 and abs(a - b) < 1e50):
            return govern_normals(mean, log_std, mean_reference, log_std_reference, kappa)
        ratio, z = math.exp(2 * (theirs - mine)), (a - b) * math.exp(-theirs)
        of_ratio, of_mean = (ratio - 1) * (ratio - 1), 2 * ratio * ratio * z * z
        parts.append((ratio, z * z, of_ratio, of_mean))
        steep += of_ratio + of_mean

    def measure(t: float) -> tuple[float, float]:
        divergence = curvature = 0.0
        for ratio, z_squared, of_ratio, of_mean in parts:
            share = t * ratio
            precision = (1 - t) + share
            variance = 1 / precision
            share *= variance
            divergence += variance - 1 + math.log(precision) + share * share * z_squared
            curvature += variance * variance * (of_ratio + of_mean * variance)
        return 0.5 * divergence, 0.5 * curvature

    reached, _ = measure(1.0)
    if reached <= kappa:
        return mean, log_std
    t = weight_of(measure, math.sqrt(steep / 4), reached, kappa)
    precisions = [(1 - t) + t * ratio for ratio, *_ in parts]
    share = np.array([t * part[0] / precision for part, precision in zip(parts, precisions, strict=True)])
    narrower = np.array([[0.5 * math.log(precision) for precision in precisions]])
    return mean_reference + share * (mean - mean_reference), log_std_reference - narrower


_GOVERN: dict[int, Any] = {1: (govern_categorical, govern_categoricals), 2: (govern_normal, govern_normals)}
"""Of one state and of many, by how many arrays a head's numbers are."""
