"""EnvPool's environments: many in one process, stepped in C++ threads (Weng et al. 2022)."""

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from klrl.errors import UsageError, needs


class Pool(VectorEnv[Any, Any, Any]):
    """``n_envs`` environments of an EnvPool id, in NEXT_STEP mode.

    Their seeds are fixed when they are made: ``reset`` with a seed makes them anew. Raises UsageError for an id that
    EnvPool does not have, and for a version whose episodes it would not end as Gymnasium does.
    """

    def __init__(self, env_id: str, n_envs: int, **kwargs: Any) -> None:
        with needs("envpool", "envpool"):
            import envpool
        if env_id not in envpool.list_all_envs():
            raise UsageError(f"--env.vectorization envpool: EnvPool {envpool.__version__} has no {env_id}; use sync")
        self._make, self.num_envs = envpool.make, n_envs
        self._options = {"task_id": env_id, "env_type": "gymnasium", "num_envs": n_envs, **kwargs}
        self._pool = self._made(0)
        if AutoresetMode(self._pool.metadata.get("autoreset_mode")) is not AutoresetMode.NEXT_STEP:
            raise UsageError(
                f"EnvPool {envpool.__version__} does not reset as Gymnasium's NEXT_STEP: take 1.2.5 or later"
            )
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = self._pool.single_observation_space
        self.single_action_space = self._pool.single_action_space
        self.observation_space = batch_space(self.single_observation_space, n_envs)
        self.action_space = batch_space(self.single_action_space, n_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._pool.close()
            self._pool = self._made(seed % 2**31)
        obs, _ = self._pool.reset()
        return obs, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        discrete = isinstance(self.single_action_space, spaces.Discrete)
        taken = np.asarray(actions, np.int32 if discrete else self.single_action_space.dtype)
        obs, reward, terminated, truncated, _ = self._pool.step(taken)
        return obs, reward, terminated, truncated, {}

    def close_extras(self, **kwargs: Any) -> None:
        self._pool.close()

    def _made(self, seed: int) -> Any:
        pool = self._make(seed=seed, **self._options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that its spaces' bounds, made when first asked for, are cast to float32
            _ = pool.single_observation_space, pool.single_action_space
        return pool
