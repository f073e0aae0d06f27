"""Calibration of agents: whether a critic's values are the returns that follow, and a policy's probabilities another's
actions."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils._pytree import tree_map

from klrl.agents.base import Agent
from klrl.analysis.visits import Visits, resamples, sums_by_episode
from klrl.kl import expected_calibration_error, select, temperature_scale
from klrl.kl.calibration import Reliability, nll, reliability
from klrl.policies.distributions import MultiCategorical

Floats = npt.NDArray[np.float64]
_BINS = 10  # of a critic's values, of equally many states
_KNOWN = 0.01  # the most that a return may owe to the critic


@dataclass(frozen=True)
class CriticCalibration:
    """A critic's values against the returns that were had from the same states, in units of its own rewards."""

    states: int
    """Those whose return is known."""
    spread: float
    """The standard deviation of these returns: where it is next to nothing, nothing is there to be explained."""
    error: float
    """The root of the mean square of return - V."""
    explained_variance: float
    """1 - Var(return - V) / Var(return): 1 where V says each return, below 0 where a constant says more; nan where the
    returns do not vary."""
    explained_stderr: float
    """Its standard error, by a bootstrap over episodes; nan of one episode."""
    value: Floats
    """[10], or fewer of fewer than 20 states: mean V of bins of equally many states, by rising V."""
    returns: Floats
    """The mean return of each bin."""
    stderr: Floats
    """That mean's standard error, in which an episode counts as one; nan where one episode fills the bin."""


@dataclass(frozen=True)
class PolicyCalibration:
    """One policy's probabilities as predictions of what another does. Each pair: before and after scaling."""

    states: int
    """Held out: the later half of the states. The temperature is fitted on the earlier one."""
    temperature: float
    """nan where the predictor forbids an action that the other takes."""
    confidence: float
    """The mean probability of the predictor's most likely choice."""
    accuracy: float
    """How often the other makes that choice."""
    nll: tuple[float, float]
    """Cross-entropy, in nats for each choice: the other's entropy, and KL(other || predictor)."""
    ece: tuple[float, float]
    curves: tuple[Reliability, Reliability]


def known_returns(
    reward: Floats,
    value: Floats,
    terminated: npt.NDArray[np.bool_],
    truncated: npt.NDArray[np.bool_],
    gamma: float,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Discounted returns [T, N] from each row, and whether they are known.

    reward, terminated, truncated: [T, N]; value: [T + 1, N], of the states before each step and after the last one.
    What follows a truncation, or the last row, nobody saw: V of the last state stands for it, as the critic was taught,
    and the return counts as known where that has a weight of at most 1 %. Without it returns would fall towards a time
    limit that the critic does not see; with more of it, V would be compared with itself. Episodes that end soon are
    others than those that do not, so that the last rows count all or none: none that is within the horizon of the end,
    or, where that leaves nothing, none from the first on that is not known. (Time limits still choose.)
    """
    returns, weight, open_end = np.zeros_like(reward), np.zeros_like(reward), np.zeros_like(reward)
    following, left, unseen = value[-1], np.ones_like(value[-1]), np.ones_like(value[-1])
    for t in range(len(reward) - 1, -1, -1):
        following = np.where(terminated[t], 0.0, np.where(truncated[t], value[t + 1], following))
        left = np.where(terminated[t], 0.0, np.where(truncated[t], 1.0, left))
        returns[t] = following = reward[t] + gamma * following
        weight[t] = left = gamma * left
        open_end[t] = unseen = gamma * np.where(terminated[t] | truncated[t], 0.0, unseen)
    early = gamma ** np.arange(len(reward), 0, -1) <= _KNOWN
    if not early.any():
        early = np.logical_and.accumulate((open_end <= _KNOWN).all(1))
    return returns, (weight <= _KNOWN) & early[:, None]


def calibrate_critic(agent: Agent, visits: Visits, rng: np.random.Generator) -> CriticCalibration | None:
    """Compare ``agent.value`` with returns of the rewards that it is about (``Agent.critic_reward``).

    None of an agent that has no value, or no gamma in its config, and where fewer than two returns are known.
    """
    gamma, shape = getattr(agent.config, "gamma", None), visits.reward.shape
    if gamma is None:
        return None
    flat = tree_map(lambda part: part.reshape(-1, *part.shape[2:]), visits.obs)
    try:
        value = np.asarray(agent.value(flat).double().cpu()).reshape(shape[0] + 1, shape[1])
    except NotImplementedError:
        return None
    acting, reward = np.flatnonzero(visits.acted), visits.reward.copy()
    reward.flat[acting] = agent.critic_reward(visits.reward.flat[acting], visits.at(acting))
    returns, known = known_returns(reward, value, visits.terminated, visits.truncated, gamma)
    rows = visits.rows
    chosen = known.flat[rows]
    if chosen.sum() < 2:
        return None
    rows = rows[chosen]
    return value_calibration(value.flat[rows], returns.flat[rows], visits.episodes[chosen], rng)


def value_calibration(
    value: Floats, returns: Floats, episodes: npt.NDArray[np.int64], rng: np.random.Generator
) -> CriticCalibration:
    """How values [S] agree with returns [S] of states in ``episodes`` [S].

    Source: explained variance as in OpenAI Baselines; the bins of a reliability curve as Guo et al. (2017), section 2.
    """
    episodes = np.unique(episodes, return_inverse=True)[1].reshape(-1)
    off, centred = returns - value, returns - returns.mean()
    moments = sums_by_episode(episodes, np.stack([np.ones_like(off), centred, centred**2, off, off**2], axis=-1))
    explained = float(_explained(moments.sum(0)))
    drawn = _explained(resamples(len(moments), rng) @ moments)
    spread = float(drawn.std(ddof=1)) if len(moments) > 1 and np.isfinite(drawn).all() else math.nan
    bins = np.array_split(np.argsort(value, kind="stable"), max(1, min(_BINS, len(value) // 2)))
    curve = [(value[rows].mean(), *_mean_and_stderr(returns[rows], episodes[rows])) for rows in bins]
    about = (len(value), float(returns.std()), float(np.sqrt((off**2).mean())), explained, spread)
    return CriticCalibration(*about, *(np.array(column) for column in zip(*curve, strict=True)))


def _explained(moments: Floats) -> Floats:
    """Explained variance from the sums [..., 5]: number, return, return^2, return - V, (return - V)^2."""
    count = moments[..., 0]
    spread, left = (moments[..., i + 1] / count - (moments[..., i] / count) ** 2 for i in (1, 3))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 0, 1 - left / spread, math.nan)


def _mean_and_stderr(values: Floats, episodes: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The mean, and its error where values of one episode count as one. Source: Liang and Zeger (1986)."""
    mean = float(values.mean())
    _, place = np.unique(episodes, return_inverse=True)
    sums = sums_by_episode(place.reshape(-1), values - mean)
    if len(sums) == 1:
        return mean, math.nan
    return mean, float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1))) / len(values)


def calibrate_policy(predictor: Any, other: Any) -> PolicyCalibration | None:
    """How well ``predictor`` says what ``other`` does, at S states in time order where the other acted.

    Both are categorical; None of other families, and of fewer than two states. The other's probabilities are known, so
    they are the target, and no samples of its actions. Of k independent choices each is one prediction, all scaled by
    one temperature. The halves are cut in time, as neighbouring states are all but the same.
    """
    if not isinstance(predictor, MultiCategorical) or len(predictor.logits) < 2:
        return None
    half = len(predictor.logits) // 2
    early, held = (
        [select(dist, rows).log_probs_64.flatten(0, 1) for dist in (predictor, other)]
        for rows in (slice(half), slice(half, None))
    )
    try:
        temperature = temperature_scale(early[0], early[1].exp())
    except ValueError:  # the predictor forbids what the other does
        temperature = math.nan
    target = held[1].exp()
    both = (held[0], held[0] / temperature) if math.isfinite(temperature) else (held[0], held[0])
    curves = [reliability(logits, target) for logits in both]
    first = curves[0]
    confidence, accuracy = (
        float((first.number * x.nan_to_num()).sum() / first.number.sum()) for x in (first.confidence, first.accuracy)
    )
    costs, errors = ([of(logits, target) for logits in both] for of in (nll, expected_calibration_error))
    states = len(predictor.logits) - half
    return PolicyCalibration(
        states, temperature, confidence, accuracy, (costs[0], costs[1]), (errors[0], errors[1]), (curves[0], curves[1])
    )
