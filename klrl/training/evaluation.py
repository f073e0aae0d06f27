"""Whole episodes with an agent that does not learn: during training, at its end, and whenever one asks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

from klrl.agents.actor import Actor
from klrl.config import Checked, EnvCount, Needs, Range
from klrl.envs.make import Imports, can_replay
from klrl.envs.wrappers import counted_from
from klrl.policies.observations import Observation

_PURPOSES = ("during", "final", "afterwards")
_MOST_EVAL_STEPS = 27_000  # of an episode that neither the environment nor the policy ends; Atari's half hour


def evaluation_seed(purpose: Literal["during", "final", "afterwards"], run_seed: int, number: int = 0) -> int:
    """The seed of a run's evaluations, below 2^31: hashed, so that those of neighbouring runs share no episode.

    ``number``: of evaluations that are asked for afterwards, each with episodes of its own.
    """
    words = np.random.SeedSequence([run_seed, number], spawn_key=(_PURPOSES.index(purpose),)).generate_state(1)
    return int(words[0]) >> 1


class Evaluation(NamedTuple):
    """Undiscounted returns of whole episodes."""

    mean: float
    std: float
    returns: list[float]
    lengths: list[int]
    terminated: list[bool]
    """Whether each episode ended by itself; the others were truncated, by the environment or as they took too long."""


def summary(score: Evaluation, what: str = "") -> str:
    """The mean and deviation over the episodes, ``what`` they are of, and how many of them were cut."""
    count, cut = len(score.returns), score.terminated.count(False)
    note = f" ({cut} of {count} cut at the time limit)" if cut else ""
    return f"{score.mean:.1f} +- {score.std:.1f} over {count} episodes{what}{note}"


NO_EPISODES = Evaluation(math.nan, math.nan, [], [], [])


@dataclass(frozen=True)
class EvalConfig(Checked):
    episodes: EnvCount = 20
    """Episodes to run, as many side by side as the run had environments."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints."""
    env_id: str = ""
    """Another environment with the same spaces; the run's own by default."""
    imports: Imports = ()
    stochastic: bool = False
    """Sample actions instead of taking the most likely ones."""
    govern: str = ""
    """A run or checkpoint whose policy is the reference, or uniform: act by the nearest policy within kappa of it. Only
    what is sampled (--stochastic) keeps within; otherwise that policy's most likely actions are taken."""
    kappa: Annotated[float, Range(0, above=True), Needs("govern")] = 0.1
    """The most that the policy which acts may be from that reference at a state, KL(policy||reference) in nats."""
    json: bool = False
    """Print one line of JSON."""


def run_episodes(
    agent: Actor,
    envs: VectorEnv[Any, Any, Any],
    seed: int,
    deterministic: bool = True,
    watch: Callable[[Observation, Any, Any, int, int], None] = lambda *_: None,
    max_steps: int = 0,
    episodes: int = 0,
    begin: int = 0,
) -> Evaluation:
    """``episodes`` in rounds of one in each environment, by default one round; short ones therefore count no more. They
    are numbered from ``begin``.

    With the most likely actions, an episode is the same however many run side by side, where its environment was made
    and seeded by itself.
    Sampled actions follow from ``seed`` and leave the agent's own random state alone. An episode that goes on for
    ``max_steps``, or 27,000, steps is cut off. ``watch`` is called at each state, the last one included, and may raise:
    with the observations [N, *shape], which of them are of these episodes [N], the returns so far [N], the step, and
    the number of the round's first episode.
    """
    rng = None if deterministic else np.random.default_rng(seed)
    count, width = episodes or envs.num_envs, envs.num_envs
    returns, lengths = np.zeros(count), np.zeros(count, np.int64)
    itself = np.zeros(count, np.bool_)
    for first in range(0, count, width):
        here = slice(first, first + width)
        rows = len(returns[here])
        number = begin + first
        obs, _ = envs.reset(seed=seed + number, options=counted_from(number) if can_replay(envs) else None)
        running, total = np.arange(width) < rows, np.zeros(width)
        state = agent.initial_state(width)
        remembered = (state,) if state.size else ()  # an agent of one's own need not know of any
        watch(obs, running, total, 0, first)
        for step in range(1, 1 + (max_steps or _MOST_EVAL_STEPS)):
            action = agent.act(obs, deterministic, rng, *remembered)
            obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
            total += np.where(running, reward, 0.0)  # what comes after an episode may be infinite
            lengths[here] += running[:rows]
            watch(obs, running, total, step, first)
            itself[here] |= (running & terminated)[:rows]
            running &= ~(terminated | truncated)
            if not running.any():
                break
        returns[here] = total[:rows]
    return joint_score([Evaluation(0.0, 0.0, returns.tolist(), lengths.tolist(), itself.tolist())])


def joint_score(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of all their episodes."""
    returns = [x for part in parts for x in part.returns]
    lengths, itself = [x for part in parts for x in part.lengths], [x for part in parts for x in part.terminated]
    return Evaluation(float(np.mean(returns)), float(np.std(returns)), returns, lengths, itself)
