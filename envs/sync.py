"""Environments stepped one after another in this process."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv


class Sync(SyncVectorEnv):
    """Gymnasium's ``SyncVectorEnv`` in NEXT_STEP mode, of environments whose observations have their space's shape.

    The same answers in less time where observations and actions are arrays: of small environments, a fifth of a step
    goes into what serves all spaces and modes.
    """

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        if not isinstance(self.single_observation_space, spaces.Box) or not isinstance(actions, np.ndarray):
            return super().step(actions)
        rewards, terminated, truncated, shown = self._rewards, self._terminations, self._truncations, self._env_obs
        infos: dict[str, Any] = {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            if self._autoreset_envs[i]:
                shown[i], info = env.reset()
                rewards[i], terminated[i], truncated[i] = 0.0, False, False
            else:
                shown[i], rewards[i], terminated[i], truncated[i], info = env.step(action)
            if info:
                infos = self._add_info(infos, info, i)
        self._autoreset_envs = terminated | truncated
        obs: Any = np.array(shown, self.single_observation_space.dtype)
        return obs, rewards.copy(), terminated.copy(), truncated.copy(), infos
