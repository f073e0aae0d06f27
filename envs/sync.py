"""Environments stepped one after another in this process."""

from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv


class Sync(SyncVectorEnv):
    """Gymnasium's ``SyncVectorEnv``, whose environments' observations have their space's shape and kind of numbers, as
    ``SeededEpisodes`` makes sure.

    The same answers in less time in NEXT_STEP mode, where observations and actions are arrays: of small environments, a
    sixth of a step goes into what serves all spaces and modes. Each answer is a copy.
    """

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        plain = isinstance(self.single_observation_space, spaces.Box) and isinstance(actions, np.ndarray)
        if not plain or self.autoreset_mode is not AutoresetMode.NEXT_STEP:
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
