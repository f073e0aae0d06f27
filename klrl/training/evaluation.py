"""Whole episodes with an agent that does not learn: during training, at its end, and whenever one asks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from gymnasium.vector import VectorEnv

from klrl.agents.base import Agent
from klrl.config import Checked, EnvCount
from klrl.envs.make import Imports
from klrl.policies.encoder import Observation

# Evaluations are seeded this far from training: those along the way, the final one, and those asked for afterwards.
EVAL_SEED, FINAL_SEED, FRESH_SEED = 1_000_000, 1_000_001, 2_000_000
_MOST_EVAL_STEPS = 27_000  # of an episode that neither the environment nor the policy ends; Atari's half hour


class Evaluation(NamedTuple):
    """Undiscounted returns of whole episodes."""

    mean: float
    std: float
    returns: list[float]
    lengths: list[int]


@dataclass(frozen=True)
class EvalConfig(Checked):
    episodes: EnvCount = 20
    """Episodes to run, each in an environment of its own."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints."""
    env_id: str = ""
    """Another environment with the same spaces; the run's own by default."""
    imports: Imports = ()
    stochastic: bool = False
    """Sample actions instead of taking the most likely ones."""
    json: bool = False
    """Print one line of JSON."""


def run_episodes(
    agent: Agent,
    envs: VectorEnv[Any, Any, Any],
    seed: int,
    deterministic: bool = True,
    watch: Callable[[Observation, Any, Any, int], None] = lambda *_: None,
    max_steps: int = 0,
) -> Evaluation:
    """The first episode of each environment, so that short ones do not count twice.

    Sampled actions follow from ``seed`` and leave the agent's own random state alone. An episode that goes on for
    ``max_steps``, or 27,000, steps is cut off. ``watch`` is called at each state, the last one included, and may raise:
    with the observations [N, *shape], which of them are of these episodes [N], the returns so far [N], and the step.
    """
    rng = None if deterministic else np.random.default_rng(seed)
    obs, _ = envs.reset(seed=seed)
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    running = np.ones(envs.num_envs, np.bool_)
    watch(obs, running, returns, 0)
    while running.any() and lengths.max() < (max_steps or _MOST_EVAL_STEPS):
        obs, reward, terminated, truncated, _ = envs.step(agent.env_action(agent.act(obs, deterministic, rng)))
        returns += reward * running
        lengths += running
        watch(obs, running, returns, int(lengths.max()))
        running &= ~(terminated | truncated)
    return Evaluation(float(returns.mean()), float(returns.std()), returns.tolist(), lengths.tolist())
