"""A run's evaluations, on environments of their own, spread over its ranks."""

from collections.abc import Callable
from typing import Any

from klrl.agents.base import Agent
from klrl.envs.make import EnvFactory, make_vector
from klrl.training.evaluation import NO_EPISODES, Evaluation, joint_score, run_episodes
from klrl.training.meeting import Meetings
from klrl.training.options import RunConfig
from klrl.training.randomness import random_state_kept


class Evaluations:
    """Each rank runs its share of an evaluation's episodes, and all get the score of all of them."""

    def __init__(self, agent: Agent, env: str | EnvFactory, config: RunConfig, meetings: Meetings) -> None:
        self.agent, self.env, self.config, self.meetings = agent, env, config, meetings
        self._envs: Any = None

    def run(self, episodes: int, seed: int, show: Callable[[int], object] = lambda _: None) -> Evaluation:
        """So many episodes, the same on any number of ranks. ``show`` is told how many this rank has done."""
        ranks = self.meetings.ranks
        begin, end = (episodes * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
        score = self._share(begin, end - begin, seed, show) if end > begin else NO_EPISODES
        while not self.meetings.meet(done=True):
            pass  # others go on, and meet meanwhile
        parts: list[Any] = ranks.objects(list(score))
        return score if ranks.size == 1 else joint_score([Evaluation(*part) for part in parts])

    def _share(self, begin: int, episodes: int, seed: int, show: Callable[[int], object]) -> Evaluation:
        """So many episodes, numbered from ``begin``, that leave the global generators as they were: training does not
        depend on them."""
        with random_state_kept():
            width = min(episodes, self.config.n_envs)
            if self._envs is None or self._envs.num_envs != width:
                self.close()
                self._envs = make_vector(self.env, width, self.config.env)

            def watch(obs: Any, running: Any, returns: Any, step: int, first: int) -> None:
                self.meetings.step()
                show(min(first + len(running), episodes) - int(running.sum()))

            return run_episodes(self.agent, self._envs, seed, watch=watch, episodes=episodes, begin=begin)

    def close(self) -> None:
        """Close the environments; ``run`` makes new ones."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None
