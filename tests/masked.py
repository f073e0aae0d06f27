"""An environment whose illegal actions end the episode, for the tests of action masks; ids for the command."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

PENALTY = -100.0


class Picky(gym.Env[Any, Any]):
    """Twenty steps; at each, half of the choices are allowed, 1 for the lowest of the first categorical's. A choice
    that is not allowed ends the episode with PENALTY. ``says``: how the mask is told, "method", "info" or "obs"."""

    crimes = 0
    """Steps of all instances, in this process, that were not allowed."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own declaration)

    def __init__(self, sizes: Any = (6,), says: str = "method", allowed: float = 0.5, render_mode: str | None = None):
        self.sizes, self.allowed, self.render_mode = list(sizes), allowed, render_mode
        self.starts = np.cumsum([0, *self.sizes[:-1]])
        self.action_space = spaces.Discrete(self.sizes[0]) if len(sizes) == 1 else spaces.MultiDiscrete(self.sizes)
        self.observation_space: Any = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.says = says
        if says == "method":
            self.action_masks = lambda: self.mask.tolist()
        if says == "obs":
            mask = spaces.Box(0, 1, (sum(sizes),), np.int8)
            self.observation_space = spaces.Dict({"board": self.observation_space, "action_mask": mask})

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._shown()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = np.atleast_1d(action)
        legal = bool(self.mask[self.starts + chosen].all())
        reward = float(chosen[0] == np.flatnonzero(self.mask)[0]) if legal else PENALTY
        Picky.crimes += not legal
        self.steps += 1
        obs, info = self._shown()
        return obs, reward, not legal, self.steps >= 20, info

    def _shown(self) -> tuple[Any, dict[str, Any]]:
        self.mask = self.np_random.random(sum(self.sizes)) < self.allowed
        for start, n in zip(self.starts, self.sizes, strict=True):
            self.mask[start + self.np_random.integers(n)] = True
        if self.steps >= 20 and self.says != "method":
            self.mask[:] = False  # as many environments have it once the episode has ended
        obs: Any = self.np_random.normal(size=3).astype(np.float32)
        if self.says == "obs":
            obs = {"board": obs, "action_mask": self.mask.astype(np.int8)}
        return obs, {"action_mask": tuple(np.split(self.mask, self.starts[1:]))} if self.says == "info" else {}

    def render(self) -> Any:
        return np.zeros((32, 32, 3), np.uint8)


gym.register("Picky-v0", Picky)
