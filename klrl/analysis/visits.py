"""States that a policy visits, with what it did there and was rewarded with, and the episodes to resample them by."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils._pytree import tree_map

from klrl.agents.actor import refuse_recurrent
from klrl.agents.base import Agent
from klrl.policies.observations import Observation
from klrl.training.loop import Envs

RESAMPLES = 200


@dataclass(frozen=True)
class Visits:
    """T steps of N environments with sampled actions, in time order; of them the first S that are no mere resets."""

    obs: Observation
    """[T + 1, N, *shape]: before each step and after the last one; after an episode's end, its true final one."""
    reward: npt.NDArray[np.float64]
    """[T, N]; 0 where the step only resets."""
    terminated: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    acted: npt.NDArray[np.bool_]
    """[T, N]: the rows that are no mere resets."""
    steps: int
    """S."""

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """[S]: which of the T * N rows, flattened, are the states that count."""
        return np.flatnonzero(self.acted)[: self.steps]

    @property
    def states(self) -> Observation:
        """[S, *shape]."""
        return self.at(self.rows)

    def at(self, rows: npt.NDArray[np.int64]) -> Observation:
        """The observations before the steps ``rows`` of the T * N, [R, *shape]."""
        return tree_map(lambda part: part[:-1].reshape(-1, *part.shape[2:])[rows], self.obs)

    @property
    def episodes(self) -> npt.NDArray[np.int64]:
        """Numbers from 0, [S], of the episodes that the states belong to; they are resampled as a whole.

        States of one episode are correlated, often to its end: stretches of a CartPole's episode are not independent.
        """
        ended = self.terminated | self.truncated
        number = np.concatenate([np.zeros((1, ended.shape[1]), np.int64), ended[:-1].cumsum(0)])
        keys = number * ended.shape[1] + np.arange(ended.shape[1])
        return np.unique(keys.flat[self.rows], return_inverse=True)[1].reshape(-1)


def visit(agent: Agent, envs: Envs, steps: int, seed: int) -> Visits:
    """Let ``agent`` act for ``steps`` states, with sampled actions that follow from ``seed``.

    The agent's own random state is left alone. Raises UsageError where the policy has a memory.
    """
    refuse_recurrent(agent, "the agent")
    rng = np.random.default_rng(seed)
    layout = agent.encoder.layout
    shown, _ = envs.reset(seed=seed)
    observed: list[Observation] = [tree_map(np.array, layout.batch(shown))]
    acting, count, answers = np.ones(envs.num_envs, np.bool_), 0, []
    while count < steps:
        count += acting.sum()
        action = agent.act(observed[-1], rng=rng)
        shown, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
        observed.append(tree_map(np.array, layout.batch(shown)))  # copies, as environments may use their memory again
        answers.append((np.where(acting, reward, 0.0), terminated & acting, truncated & acting, acting))
        acting = ~(terminated | truncated)
    reward, terminated, truncated, acted = (np.stack(column) for column in zip(*answers, strict=True))
    obs = tree_map(lambda *parts: np.stack(parts), *observed)
    return Visits(obs, reward, terminated, truncated, acted, steps)


def sums_by_episode(episodes: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``values`` [S, ...] summed over the states of each episode, [E, ...]."""
    sums = np.zeros((int(episodes.max()) + 1, *values.shape[1:]))
    np.add.at(sums, episodes, values)
    return sums


def resamples(count: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """How often each of ``count`` episodes is drawn, [200, count], by the bootstrap. Source: Efron (1979)."""
    return rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
