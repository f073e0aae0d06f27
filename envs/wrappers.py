"""Adapters that give every vector environment the one autoreset mode that klrl knows."""

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper

from klrl.errors import UsageError


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
            obs = _replace(obs, info["final_obs"], np.flatnonzero(self._resetting))
        return obs, reward, terminated, truncated, info


def _replace(obs: Any, finals: Any, rows: Any) -> Any:
    """``obs`` with the given rows taken from ``finals``, one object per environment."""
    if isinstance(obs, dict):
        per_key = finals if isinstance(finals, dict) else {k: [f and f[k] for f in finals] for k in obs}
        return {key: _replace(part, per_key[key], rows) for key, part in obs.items()}
    obs = obs.copy()
    for row in rows:
        obs[row] = finals[row]
    return obs


def next_step(env: VectorEnv[Any, Any, Any], name: str) -> VectorEnv[Any, Any, Any]:
    """``env`` in NEXT_STEP mode. Raises UsageError for one whose episodes must be reset by hand."""
    mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
    mode = AutoresetMode(mode) if not isinstance(mode, AutoresetMode) else mode
    if mode is AutoresetMode.DISABLED:
        raise UsageError(f"env {name} has autoreset disabled: make it with autoreset_mode NEXT_STEP")
    return SameStepAsNextStep(env) if mode is AutoresetMode.SAME_STEP else env
