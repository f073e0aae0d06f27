"""Buffers hold what the environment said, and nothing that an agent believes about it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces

from klrl.errors import NonFiniteError
from klrl.policies.encoder import Observation

_FACTS = ("action", "reward", "terminated", "truncated", "valid")


class RolloutBuffer:
    """T steps of N environments under Gymnasium's NEXT_STEP autoreset.

    ``obs`` has T + 1 rows: row t is what the agent saw before step t, row T what it sees next. A row whose
    predecessor ended an episode only resets its environment (its action is ignored, its reward is 0): ``valid`` is
    False there, and obs[t + 1] of the step that ended the episode is the true final observation.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        n_steps: int,
        n_envs: int,
    ) -> None:
        self.n_steps, self.n_envs = n_steps, n_envs
        self.obs = _empty(observation_space, (n_steps + 1, n_envs))
        self.action = action_storage(action_space, (n_steps, n_envs))
        self.reward: npt.NDArray[np.float32] = np.zeros((n_steps, n_envs), np.float32)
        self.terminated: npt.NDArray[np.bool_] = np.zeros((n_steps, n_envs), np.bool_)
        self.truncated: npt.NDArray[np.bool_] = np.zeros((n_steps, n_envs), np.bool_)
        self.valid: npt.NDArray[np.bool_] = np.ones((n_steps, n_envs), np.bool_)
        self._ended: npt.NDArray[np.bool_] = np.zeros(n_envs, np.bool_)
        self.filled = 0

    @property
    def full(self) -> bool:
        return self.filled == self.n_steps

    def add(
        self,
        obs: Any,
        action: npt.NDArray[Any],
        reward: npt.NDArray[Any],
        terminated: npt.NDArray[Any],
        truncated: npt.NDArray[Any],
        next_obs: Any,
    ) -> None:
        """Append one step of all N environments; a full buffer starts over.

        obs, next_obs: [N, *shape], or a dict of such; action: as the agent's ``act`` gave it; the others: [N].
        Raises ValueError where ``action`` has another shape.
        """
        if self.full:
            self.filled = 0
        t = self.filled
        if action.shape != self.action.shape[1:]:
            raise ValueError(f"action has shape {action.shape}, the buffer holds {self.action.shape[1:]} a step")
        _store(self.obs, t, obs)
        _store(self.obs, t + 1, next_obs)
        self.action[t] = action
        self.reward[t] = reward
        self.terminated[t] = terminated
        self.truncated[t] = truncated
        self.valid[t] = ~self._ended
        self._ended = self.terminated[t] | self.truncated[t]
        self.filled = t + 1

    def state_dict(self) -> dict[str, Any]:
        """What an unfinished rollout holds; of a full one, only what the next begins with."""
        filled = 0 if self.full else self.filled
        facts = {name: torch.from_numpy(getattr(self, name)[:filled].copy()) for name in _FACTS if filled}
        obs = {key: torch.from_numpy(part[: filled + 1].copy()) for key, part in _parts(self.obs)} if filled else {}
        return {"filled": filled, "ended": self._ended.tolist(), "facts": facts, "obs": obs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``'s result."""
        self.filled = filled = state["filled"]
        self._ended = np.array(state["ended"], np.bool_)
        for name, rows in state["facts"].items():
            getattr(self, name)[:filled] = rows.numpy()
        for key, part in _parts(self.obs):
            if filled:
                part[: filled + 1] = state["obs"][key].numpy()

    def forget_unfinished(self) -> None:
        """Begin anew, as the environments do."""
        self.filled = 0
        self._ended[:] = False

    def check_finite(self) -> None:
        """Raise NonFiniteError naming field, environment index and step of the first observation or reward that is not.

        Of one step, the observation comes first: a nan there makes the action and so the reward nan.
        """
        named = [(f"observation {key!r}" if key else "observation", part) for key, part in _parts(self.obs)]
        fields = [(name, part[: self.filled + 1]) for name, part in named]
        found: list[tuple[int, int, str, float]] = []
        for name, values in [*fields, ("reward", self.reward[: self.filled])]:
            if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                place = tuple(np.argwhere(~np.isfinite(values))[0])
                found.append((int(place[0]), int(place[1]), name, values[place]))
        if found:
            step, env, name, value = min(found, key=lambda entry: entry[0])
            raise NonFiniteError(f"{name} is {value} in env {env} at step {step} of the rollout")


def action_storage(space: spaces.Space[Any], leading: tuple[int, ...]) -> npt.NDArray[Any]:
    """Zeros for actions in the agent's form: float32 [..., d] for a Box, int64 [..., k] otherwise, counted from 0."""
    width = int(np.prod(space.shape)) if space.shape else 1
    return np.zeros((*leading, width), np.float32 if isinstance(space, spaces.Box) else np.int64)


def _parts(obs: Observation) -> list[tuple[str, npt.NDArray[Any]]]:
    return list(obs.items()) if isinstance(obs, dict) else [("", obs)]


def _empty(space: spaces.Space[Any], leading: tuple[int, ...]) -> Observation:
    if isinstance(space, spaces.Dict):
        return {key: _empty(part, leading) for key, part in space.spaces.items()}  # type: ignore[misc]
    dtype = np.dtype(np.float32) if np.issubdtype(space.dtype, np.floating) else space.dtype
    return np.zeros((*leading, *(space.shape or ())), dtype)


def _store(storage: Observation, t: int, obs: Any) -> None:
    if isinstance(storage, dict):
        for key, part in storage.items():
            part[t] = obs[key]
    else:
        storage[t] = obs
