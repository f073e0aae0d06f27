"""Action masks: which actions an environment allows, as a part of what it shows."""

import random
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from klrl.envs.guards import FAILURES, time_limit
from klrl.errors import UsageError
from klrl.policies.spaces import MASK, UNMASKED, category_sizes

_METHOD = "action_masks"  # sb3-contrib's name
_DISCRETE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


class ActionMasks(gym.Wrapper[Any, Any, Any, Any]):
    """A wrapper that shows which actions are allowed, as the part "action_mask" of a Dict observation.

    The rest is the part "observation", or the parts of an observation that is a Dict already. The mask is of one 0 or 1
    for each choice of each categorical, side by side: what the environment's method ``action_masks()`` returns, or, if
    it has none, ``info["action_mask"]``; there a tuple has an array for each categorical. What has ended allows all.
    Raises ValueError where a mask is missing, has another shape, or leaves a categorical without any choice.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        """Raises UsageError for continuous actions, and where observations have such a part already."""
        super().__init__(env)
        inner, actions = env.observation_space, env.action_space
        if not isinstance(actions, _DISCRETE):
            raise UsageError(f"--env.action-masks on: masks are of discrete actions, not of {actions}")
        self.keyed = isinstance(inner, spaces.Dict)
        parts: dict[Any, Any] = dict(inner.spaces) if isinstance(inner, spaces.Dict) else {UNMASKED: inner}
        if MASK in parts:
            raise UsageError(f"--env.action-masks on: observations have a part {MASK!r} already")
        self.sizes = category_sizes(actions)
        self.starts = np.cumsum([0, *self.sizes[:-1]])
        self.everything = np.ones(sum(self.sizes), np.int8)
        # Not MultiBinary, whose elements are checked at each step.
        self.observation_space = spaces.Dict({**parts, MASK: spaces.Box(0, 1, self.everything.shape, np.int8)})
        self._ask: Callable[[], Any] | None = env.get_wrapper_attr(_METHOD) if env.has_wrapper_attr(_METHOD) else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        return self._beside(obs, self._mask(info)), info

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        # After an episode's end no action is taken, and many environments have no mask there, or one of zeros.
        mask = self.everything.copy() if terminated or truncated else self._mask(info)
        return self._beside(obs, mask), reward, terminated, truncated, info

    def _beside(self, obs: Any, mask: npt.NDArray[np.int8]) -> dict[Any, Any]:
        return {**(obs if self.keyed else {UNMASKED: obs}), MASK: mask}

    def _mask(self, info: dict[str, Any]) -> npt.NDArray[np.int8]:
        """What the environment allows now, [sum of sizes]."""
        if self._ask is None and MASK not in info:
            raise ValueError(f"it gives no action mask: neither {_METHOD}() nor info[{MASK!r}]")
        given = info[MASK] if self._ask is None else self._ask()
        mask = np.concatenate([np.ravel(part) for part in given]) if isinstance(given, tuple) else np.asarray(given)
        if mask.size != self.everything.size:
            raise ValueError(f"its action mask has {mask.size} entries, its actions {self.everything.size} choices")
        allowed = mask.reshape(-1) != 0
        if mask.dtype != np.bool_ and not (allowed == mask.reshape(-1)).all():
            raise ValueError(f"its action mask holds others than 0 and 1: {given}")
        if not (some := np.logical_or.reduceat(allowed, self.starts)).all():
            where = f" of categorical {int(some.argmin())}" if len(self.sizes) > 1 else ""
            raise ValueError(f"its action mask allows no action{where}")
        return allowed.view(np.int8)


def masking(factory: Callable[[], gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
    """Make an environment that shows its masks."""
    env = factory()
    return ActionMasks(env) if isinstance(env, gym.Env) else env


def offers_masks(env: gym.Env[Any, Any], seconds: float = 0.0) -> bool:
    """Whether an environment says which actions are allowed, and does not show that already.

    With ``seconds`` above 0 it may be reset, which shows whether its infos say so; where that fails, or takes longer,
    the answer is no, and whoever resets the next one will see why. Global random states stay as they are.
    """
    states = random.getstate(), np.random.get_state()
    try:
        shows = isinstance(env.observation_space, spaces.Dict) and MASK in env.observation_space.spaces
        if shows or not isinstance(env.action_space, _DISCRETE):
            return False
        if seconds == 0 or env.has_wrapper_attr(_METHOD):
            return env.has_wrapper_attr(_METHOD)
        with time_limit(seconds):
            return MASK in env.reset(seed=0)[1]
    except FAILURES:
        return False
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
