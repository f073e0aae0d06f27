"""Environment wrappers: episodes that can be replayed, named faults, and NEXT_STEP autoreset for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from klrl.console import warn
from klrl.envs.answers import check_reset, check_step
from klrl.envs.guards import CLOSE_SECONDS, FAILURES, time_limit
from klrl.errors import EnvironmentFailedError, UsageError, one_line
from klrl.policies.encoder import replace_rows
from klrl.policies.observations import Layout
from klrl.policies.spaces import MASK

T = TypeVar("T")
RESTARTED = "klrl.restarted"
"""The key of an info that says why an episode was truncated, and the next one begun."""
LEARNED = "klrl.learned"
"""The key of an info that says what an agent is to learn from in place of a step's reward and end: two numbers, the
reward and whether, for the agent, the episode terminated there though it goes on."""
_FIRST = "klrl.first"


@dataclass(frozen=True)
class EpisodePosition:
    """An environment's episode by number, the actions taken in it so far, and the last observation."""

    episode: int
    actions: Any
    """[T, *action shape]: those taken in this episode."""
    obs: Any
    ended: bool
    """Whether the last action ended the episode, so that the next step only resets."""


def as_learned(reward: Any, terminated: Any, info: dict[str, Any]) -> tuple[Any, Any]:
    """The rewards and terminations [N] that an agent learns from: those of the step, but where its info has LEARNED.

    The row after such a termination is taken for one that resets: left out of losses and statistics.
    """
    if LEARNED not in info:
        return reward, terminated
    said, (rewards, ends) = info[f"_{LEARNED}"], info[LEARNED].T
    return np.where(said, rewards, reward), terminated | (said & (ends > 0))


def counted_from(first: int) -> dict[str, Any] | None:
    """Options for ``reset`` that number the environments from ``first``."""
    return {_FIRST: first} if first else None


class SeededEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper that seeds each episode from ``reset``'s seed, this environment's index and the episode's number.

    An environment therefore has no state to save: its ``EpisodePosition`` brings it back. The first ``reset`` replays
    ``position``. Where the replay ends at another observation, and where a step fails under ``on_error`` "restart",
    the episode is truncated at the last observation, and RESTARTED in the info says why. A step fails where it raises,
    asks the interpreter to exit, or returns what no environment may. The environment's own infos end here, but for
    LEARNED: training reads no other, and those of several environments need not fit into one.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        index: int,
        on_error: str = "raise",
        position: EpisodePosition | None = None,
        hints: bool = False,
    ) -> None:
        """``hints``: whether to say so where infos have action masks, which nobody obeys."""
        super().__init__(env)
        self.place = self.index = index
        self.on_error, self.position, self.hints = on_error, position, hints
        self.seed, self.episode, self.steps = 0, 0, 0
        self._shows: Any = env.observation_space
        self.obs: Any = None
        self.next: Callable[[], tuple[Any, float, bool, bool, dict[str, Any]]] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode; with a seed, the first one, or the one at ``position``; see ``counted_from``."""
        position, self.position, self.next, self.steps = self.position, None, None, 0
        if seed is None:
            self.episode += 1
        else:
            self.seed, self.episode = seed, position.episode if position else 0
            self.index = self.place + (options or {}).get(_FIRST, 0)
        options = None if options is None or _FIRST in options else options
        words = np.random.SeedSequence([self.seed, self.index, self.episode]).generate_state(1)
        try:
            self.obs, info = check_reset(self._shows, self.env.reset(seed=int(words[0]), options=options))
        except FAILURES as problem:
            raise self._failure(problem, "reset") from None
        if self.hints and MASK in info and MASK not in getattr(self._shows, "spaces", {}):
            warn("this environment's infos have action masks: --env.action-masks on lets policies obey them")
        self.hints = False
        if position is not None:
            self._replay(position)
        return self.obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.next is not None:
            special, self.next = self.next, None
            return special()
        try:
            answer = check_step(self._shows, self.env.step(action))
        except FAILURES as problem:
            failure = self._failure(problem, f"step {self.steps + 1}")
            if self.on_error == "raise":
                raise failure from None
            return self._truncate(str(failure))
        obs, reward, terminated, truncated, info = answer
        self.obs = obs
        self.steps += 1
        return obs, reward, terminated, truncated, {LEARNED: info[LEARNED]} if LEARNED in info else {}

    def close(self) -> None:
        close_or_warn(self.env, self.index)

    def _replay(self, position: EpisodePosition) -> None:
        ended, shown = False, Layout(self._shows).as_shown(position.obs)
        try:
            for action in position.actions:
                self.obs, _, terminated, truncated, _ = check_step(self._shows, self.env.step(action))
                ended = terminated or truncated
                self.steps += 1
            same = ended == position.ended and _same(self.obs, shown)
        except FAILURES:
            same = False
        self.obs = shown
        if position.ended:
            self.next = self._reset_row
        elif not same:
            self.next = lambda: self._truncate(f"env {self.index}: episode {self.episode} cannot be replayed")

    def _reset_row(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, info = self.reset()
        return obs, 0.0, False, False, info

    def _truncate(self, why: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.obs, 0.0, False, True, {RESTARTED: why}

    def _failure(self, problem: BaseException, where: str) -> EnvironmentFailedError:
        what = f"env {self.index} failed at {where} of episode {self.episode}"
        return EnvironmentFailedError(f"{what}: {one_line(problem)}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return all(_same(a[key], part) for key, part in b.items())
    expected = np.asarray(b)
    shown = np.asarray(a).astype(expected.dtype)  # an environment may show float64 where its space says float32
    return np.array_equal(shown, expected, equal_nan=np.issubdtype(expected.dtype, np.inexact))


def close_or_warn(env: Any, name: object) -> None:
    """Close the environment; say so where that fails or takes too long, as nothing depends on it any more."""
    try:
        with time_limit(CLOSE_SECONDS):
            env.close()
    except FAILURES as problem:
        warn(f"env {name} failed at close: {one_line(problem)}")


class NamedFaults(VectorWrapper):
    """A vector environment that comes as one: its faults are EnvironmentFailedErrors, as those of single ones are."""

    def __init__(self, env: VectorEnv[Any, Any, Any], name: str) -> None:
        super().__init__(env)
        self.name, self.steps, self.ended = name, 0, False
        self._layout = Layout(env.single_observation_space)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        def checked() -> tuple[Any, dict[str, Any]]:
            obs, info = self.env.reset(**kwargs)
            return self._layout.batch(obs, self.num_envs), info

        return self._named("reset", checked)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        def checked() -> tuple[Any, Any, Any, Any, dict[str, Any]]:
            obs, reward, terminated, truncated, info = self.env.step(actions)
            for name, part in (("reward", reward), ("terminated", terminated), ("truncated", truncated)):
                if np.shape(part) != (self.num_envs,):
                    raise ValueError(f"its {name} has shape {np.shape(part)}, not ({self.num_envs},)")
            return self._layout.batch(obs, self.num_envs), reward, terminated, truncated, info

        self.steps += 1
        return self._named("step", checked)

    def close(self, **kwargs: Any) -> None:
        if not self.ended:
            self.ended = True
            close_or_warn(self.env, self.name)

    def _named(self, what: str, call: Callable[[], T]) -> T:
        try:
            return call()
        except FAILURES as problem:
            where = f"env {self.name} failed at {what} after {self.steps} steps"
            raise EnvironmentFailedError(f"{where}: {one_line(problem)}") from None


class SameStepAsNextStep(VectorWrapper):
    """A SAME_STEP vector environment seen as NEXT_STEP: the true final observation, then a row that only resets.

    A SAME_STEP environment has already begun its next episode when the last one ends, and it cannot wait. Its first
    step of each episode therefore happens in the reset row, with an action that the agent chose for something else
    and a reward that nobody sees. Prefer NEXT_STEP where the environment offers it.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self.metadata = {**env.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self._resetting = np.zeros(env.num_envs, np.bool_)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self._resetting[:] = False
        return self.env.reset(**kwargs)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        # An episode that ends in its hidden first step is never seen: the row shows the start of the one after it.
        seen = ~self._resetting
        terminated, truncated, reward = terminated & seen, truncated & seen, np.where(seen, reward, 0.0)
        self._resetting = terminated | truncated
        if self._resetting.any():
            obs = replace_rows(obs, info["final_obs"], np.flatnonzero(self._resetting))
        return obs, reward, terminated, truncated, info


def next_step(env: VectorEnv[Any, Any, Any], name: str) -> VectorEnv[Any, Any, Any]:
    """``env`` in NEXT_STEP mode. Raises UsageError for one whose episodes must be reset by hand."""
    mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    if mode is AutoresetMode.DISABLED:
        raise UsageError(f"env {name} has autoreset disabled: make it with autoreset_mode NEXT_STEP")
    return SameStepAsNextStep(env) if mode is AutoresetMode.SAME_STEP else env
