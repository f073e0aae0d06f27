"""The rollout buffer: T steps of N environments, for on-policy agents."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode

from klrl.buffers.protocol import Buffer, autoreset_mode, check_continues, flags, led_to, numbers
from klrl.errors import NonFiniteError, UsageError
from klrl.policies.observations import Layout, Observation
from klrl.policies.spaces import category_sizes

_FACTS = ("action", "reward", "terminated", "truncated", "valid")


class RolloutBuffer(Buffer):
    """T steps of N environments.

    ``obs`` has T + 1 rows: row t is what the agent saw before step t, row T what it sees next. Under Gymnasium's
    NEXT_STEP autoreset, the default, a row whose predecessor ended an episode only resets its environment (its action
    is ignored, its reward is 0): ``valid`` is False there, and obs[t + 1] of the step that ended the episode is the
    true final observation. Under SAME_STEP and DISABLED ``obs`` shows the next episode there, and the final
    observations of truncated episodes are kept apart.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        n_steps: int,
        n_envs: int,
        autoreset: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        """``autoreset``: the environments' ``metadata["autoreset_mode"]``."""
        self.n_steps, self.n_envs, self.autoreset = n_steps, n_envs, autoreset_mode(autoreset)
        self.layout = Layout(observation_space)
        empty = {name: _empty(part, (n_steps + 1, n_envs)) for name, part in self.layout.parts.items()}
        self.obs: Observation = empty if self.layout.keyed else empty[""]
        self.action = action_storage(action_space, (n_steps, n_envs))
        self._sizes = None if isinstance(action_space, spaces.Box) else category_sizes(action_space)
        self.reward: npt.NDArray[np.float32] = np.zeros((n_steps, n_envs), np.float32)
        self.terminated: npt.NDArray[np.bool_] = np.zeros((n_steps, n_envs), np.bool_)
        self.truncated: npt.NDArray[np.bool_] = np.zeros((n_steps, n_envs), np.bool_)
        self.valid: npt.NDArray[np.bool_] = np.ones((n_steps, n_envs), np.bool_)
        self._ended: npt.NDArray[np.bool_] = np.zeros(n_envs, np.bool_)
        self.begins: npt.NDArray[np.bool_] = np.ones(n_envs, np.bool_)
        """[N]: which environments show an episode's first observation now; under NEXT_STEP autoreset."""
        self._finals: dict[tuple[int, int], Any] = {}
        self._shown = False  # whether obs holds what the environments showed last
        self.filled = 0

    @property
    def full(self) -> bool:
        return self.filled == self.n_steps

    def check_full(self) -> None:
        """Raise ValueError unless the rollout is full."""
        if not self.full:
            raise ValueError(f"the rollout holds {self.filled} of {self.n_steps} steps: fill it before update")

    def add(
        self, obs: Any, action: Any, reward: Any, terminated: Any, truncated: Any, next_obs: Any, final_obs: Any = None
    ) -> None:
        """Append one step of all N environments; a full buffer starts over.

        Raises UsageError where a part has another shape, and ValueError where the observations are not those that the
        autoreset mode would show.
        """
        one = (self.n_envs,)
        action, reward = numbers("action", action, self.action.shape[1:]), numbers("reward", reward, one)
        if self._sizes is not None and action.dtype.kind == "f":
            raise UsageError("actions are fractions, where whole numbers are wanted: give those of act")
        terminated, truncated = flags("terminated", terminated, one), flags("truncated", truncated, one)
        ended = terminated | truncated
        plain = self.autoreset is AutoresetMode.NEXT_STEP and final_obs is None
        reached = next_obs if plain else led_to(self.autoreset, next_obs, ended, final_obs)
        obs, next_obs = self.layout.batch(obs, self.n_envs), self.layout.batch(next_obs, self.n_envs)
        if self._ended.any() and self._shown:
            check_continues(_row(self.obs, self.filled), obs, self._ended)
        if self.full:
            self.filled, self._finals = 0, {}
        t = self.filled
        _store(self.obs, t, obs)
        _store(self.obs, t + 1, next_obs)
        self.action[t], self.reward[t] = action, reward
        self.terminated[t], self.truncated[t] = terminated, truncated
        self.valid[t], self.begins = ~self._ended, self._ended
        if self.autoreset is AutoresetMode.NEXT_STEP:
            self._ended = ended  # only then the next step resets, and nothing else
        else:
            reached = self.layout.batch(reached, self.n_envs)
            for env in np.flatnonzero(truncated & ~terminated):
                self._finals[t, int(env)] = {key: np.array(part[env]) for key, part in _parts(reached)}
        self.filled, self._shown = t + 1, True

    def values_of_next(self, value: Any, value_at: Callable[[Any], Any]) -> npt.NDArray[np.float32]:
        """The value of what each step led to, [T, N], from that of every row of ``obs``, [T + 1, N].

        ``value_at``: values [K] of observations [K, ...], for final observations that are not among the rows.
        """
        following = np.array(value[1:])
        if self._finals:
            parts = {key: np.stack([final[key] for final in self._finals.values()]) for key, _ in _parts(self.obs)}
            steps, envs = zip(*self._finals, strict=True)
            following[steps, envs] = value_at(parts.get("", parts))
        return following

    def obs_before_steps(self) -> Observation:
        """Observations [T, N, ...]: what the agent saw before each step."""
        return _row(self.obs, slice(-1))

    def state_dict(self) -> dict[str, Any]:
        """What an unfinished rollout holds; of a full one, only what the next begins with."""
        filled = 0 if self.full else self.filled
        facts = {name: torch.from_numpy(getattr(self, name)[:filled].copy()) for name in _FACTS if filled}
        obs = {key: torch.from_numpy(part[: filled + 1].copy()) for key, part in _parts(self.obs)} if filled else {}
        finals = {
            f"{t} {env}": {key: torch.from_numpy(part) for key, part in final.items()}
            for (t, env), final in self._finals.items()
            if t < filled
        }
        flags = {"ended": self._ended.tolist(), "begins": self.begins.tolist()}
        return {"filled": filled, **flags, "facts": facts, "obs": obs, "finals": finals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.filled = filled = state["filled"]
        self._ended, self._shown = np.array(state["ended"], np.bool_), filled > 0
        self.begins = np.array(state.get("begins", state["ended"]), np.bool_)
        for place, final in state["finals"].items():
            t, env = map(int, place.split())
            self._finals[t, env] = {key: part.numpy() for key, part in final.items()}
        for name, rows in state["facts"].items():
            getattr(self, name)[:filled] = rows.numpy()
        for key, part in _parts(self.obs):
            if filled:
                part[: filled + 1] = state["obs"][key].numpy()

    def forget_unfinished(self) -> None:
        self.filled, self._finals = 0, {}
        self._ended, self.begins = np.zeros_like(self._ended), np.ones_like(self._ended)

    def check_finite(self) -> None:
        """Raise NonFiniteError naming field, environment index and step of the first value that is not finite.

        Of one step, the observation comes first: a nan there makes the action and so the reward nan. Raises UsageError
        for actions that the space does not have.
        """
        taken = self.action[: self.filled]
        if self._sizes is not None and taken.size and ((taken < 0) | (taken >= self._sizes)).any():
            raise UsageError(f"actions lie in {taken.min()} to {taken.max()}: give those of act, counted from 0")
        named = [(f"observation {key!r}" if key else "observation", part) for key, part in _parts(self.obs)]
        fields = [(name, part[: self.filled + 1]) for name, part in named]
        found: list[tuple[int, int, str, float]] = []
        for name, values in [*fields, ("action", taken), ("reward", self.reward[: self.filled])]:
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


def _empty(space: spaces.Space[Any], leading: tuple[int, ...]) -> npt.NDArray[Any]:
    dtype = np.dtype(np.float32) if np.issubdtype(space.dtype, np.floating) else space.dtype
    return np.zeros((*leading, *(space.shape or ())), dtype)


def _row(storage: Observation, t: Any) -> Observation:
    return {key: part[t] for key, part in storage.items()} if isinstance(storage, dict) else storage[t]


def _store(storage: Observation, t: int, obs: Any) -> None:
    if isinstance(storage, dict):
        for key, part in storage.items():
            part[t] = obs[key]
    else:
        storage[t] = obs
