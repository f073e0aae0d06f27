"""The replay buffer: transitions of any number of environments, packed in rows, for off-policy agents."""

import os
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from klrl.buffers.protocol import Buffer, autoreset_mode, check_continues, flags, led_to, numbers
from klrl.errors import NonFiniteError, UsageError
from klrl.policies.encoder import Inputs, ObservationEncoder, replace_rows

Rows = npt.NDArray[np.float32]
_COUNTS = ("size", "steps", "written", "new_steps")


@dataclass(frozen=True)
class Transitions:
    """B transitions: what was before, done and earned, and what was before n steps later."""

    inputs: Inputs
    action: Tensor
    """[B, d], as the agent's ``act`` gave it."""
    reward: Tensor
    """[B]: the discounted sum of the n rewards."""
    discount: Tensor
    """[B]: gamma^n, or 0 where the episode terminated; a truncated one goes on from what was before last."""
    next_inputs: Inputs


class ReplayBuffer(Buffer):
    """The last ``capacity`` transitions, sampled uniformly. A full buffer overwrites its oldest.

    A transition's numbers lie side by side in one float32 row, so that a sample is one gather: 4 * (2F + d + 2) bytes
    for F observation features and d action dimensions, and twice its bytes for each image. With ``folder`` they lie in
    files there that are mapped into memory and vanish with the process, for buffers larger than memory.

    Under NEXT_STEP autoreset, the default, a row that only resets its environment is not stored, and the observation
    after an episode's last step is the true final one. With ``n_step`` above 1, an episode's end cuts the sum short.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_width: int,
        capacity: int,
        n_envs: int,
        gamma: float,
        n_step: int = 1,
        folder: str = "",
        autoreset: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    ) -> None:
        """``autoreset``: the environments' ``metadata["autoreset_mode"]``."""
        self.autoreset = autoreset_mode(autoreset)
        self.capacity, self.n_envs, self.gamma, self.n_step = capacity, n_envs, gamma, n_step
        self.action_width = action_width
        self.encoder = ObservationEncoder(observation_space, torch.device("cpu"), normalize=False)
        features = self.encoder.features
        ends = np.cumsum([0, features, action_width, 1, 1, features])
        self._columns = [slice(a, b) for a, b in pairwise(ends)]
        self._rows: Rows = _storage((capacity, int(ends[-1])), np.float32, folder)
        types = {torch.uint8: np.uint8, torch.float32: np.float32}
        self._images = {
            f"image {key}": _storage((2, capacity, *shape), types[self.encoder.image_types[key]], folder)
            for key, shape in self.encoder.images.items()
        }
        self.size, self.steps, self.written = 0, 0, 0
        self.new_steps = 0  # that the agent has not learned from yet; it counts them down
        self._ended: npt.NDArray[np.bool_] = np.zeros(n_envs, np.bool_)
        self._shown: Any = None  # what the environments showed last, where one of them ended
        # Of each environment, the steps whose sum of n rewards is not complete: inputs, action, reward.
        self._pending: list[list[tuple[dict[str, Any], Any, float]]] = [[] for _ in range(n_envs)]

    def add(
        self, obs: Any, action: Any, reward: Any, terminated: Any, truncated: Any, next_obs: Any, final_obs: Any = None
    ) -> None:
        """Take one step of all N environments.

        Raises NonFiniteError naming the environment where a value is not finite, UsageError where a
        part has another shape, and ValueError where ``final_obs`` does not go with the autoreset mode.
        """
        layout, one = self.encoder.layout, (self.n_envs,)
        action, reward = numbers("action", action, (*one, self.action_width)), numbers("reward", reward, one)
        terminated, truncated = flags("terminated", terminated, one), flags("truncated", truncated, one)
        ended = terminated | truncated
        reached = layout.batch(led_to(self.autoreset, next_obs, ended, final_obs), *one)
        obs, next_obs = layout.batch(obs, *one), layout.batch(next_obs, *one)
        if self._shown is not None:
            check_continues(self._shown, obs, self._ended)
        before, after = ({k: v.numpy() for k, v in self.encoder(x).items()} for x in (obs, reached))
        with np.errstate(over="ignore"):
            reward = reward.astype(np.float32)
        for name, values in (
            *(("observation", part) for seen in (before, after) for part in seen.values() if part.dtype != np.uint8),
            ("action", action),
            ("reward", reward[:, None]),
        ):
            if not np.isfinite(values).all():
                env = int(np.argwhere(~np.isfinite(values))[0, 0])
                raise NonFiniteError(f"{name} is not finite in env {env} after {self.steps} steps")
        valid = np.flatnonzero(~self._ended)
        if self.n_step == 1:
            discount = self.gamma * (1.0 - terminated.astype(np.float32))
            self._write(_pick(before, valid), action[valid], reward[valid], discount[valid], _pick(after, valid))
        else:
            for env in map(int, valid):
                copies = {key: part[env].copy() for key, part in before.items()}
                self._pending[env].append((copies, action[env].copy(), float(reward[env])))
                done = bool(terminated[env] or truncated[env])
                while len(self._pending[env]) == self.n_step or (done and self._pending[env]):
                    self._write_first(env, bool(terminated[env]), _pick(after, env))
        self.steps += len(valid)
        self.new_steps += len(valid)
        self._ended = ended & (self.autoreset is AutoresetMode.NEXT_STEP)
        self._shown = replace_rows(next_obs, next_obs, ()) if self._ended.any() else None

    def rows(self, start: int) -> dict[str, Tensor]:
        index = np.arange(start, self.written) % self.capacity
        images = {key: torch.from_numpy(np.ascontiguousarray(part[:, index])) for key, part in self._images.items()}
        return {"rows": torch.from_numpy(self._rows[index]), **images}

    def put_rows(self, start: int, rows: dict[str, Tensor]) -> None:
        index = np.arange(start, start + len(rows["rows"])) % self.capacity
        self._rows[index] = rows["rows"].numpy()
        for key, images in self._images.items():
            images[:, index] = rows[key].numpy()

    def take_over(self, rows: dict[str, Tensor], which: slice) -> None:
        part = {key: value[which] if key == "rows" else value[:, which] for key, value in rows.items()}
        self.put_rows(self.written, part)
        self.written += len(part["rows"])
        self.size = min(self.written, self.capacity)

    def state_dict(self) -> dict[str, Any]:
        pending: dict[str, Any] = {}
        for env, steps in enumerate(self._pending):
            for i, (before, action, reward) in enumerate(steps):
                copies = {key: torch.from_numpy(part) for key, part in before.items()}
                pending[f"{env} {i}"] = {"before": copies, "action": torch.from_numpy(action), "reward": reward}
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "ended": self._ended.tolist(), "pending": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name])
        self._ended = np.array(state["ended"], np.bool_)
        self._pending = [[] for _ in range(self.n_envs)]
        for place, step in state["pending"].items():
            before = {key: part.numpy() for key, part in step["before"].items()}
            self._pending[int(place.split()[0])].append((before, step["action"].numpy(), step["reward"]))

    def forget_unfinished(self) -> None:
        """Drop the steps whose n rewards are not complete."""
        self._ended, self._shown = np.zeros(self.n_envs, np.bool_), None
        self._pending = [[] for _ in range(self.n_envs)]

    def check_finite(self) -> None:
        """Find nothing: ``add`` refuses what is not finite."""

    def _write_first(self, env: int, terminated: bool, after: dict[str, Any]) -> None:
        """Complete the oldest pending step of an environment, as the latest one leads to ``after``."""
        pending = self._pending[env]
        total = sum(self.gamma**i * reward for i, (_, _, reward) in enumerate(pending))
        discount = 0.0 if terminated else self.gamma ** len(pending)
        before, action, _ = pending.pop(0)
        one = {key: part[None] for key, part in before.items()}
        self._write(one, action[None], [total], [discount], {key: part[None] for key, part in after.items()})

    def _write(self, before: dict[str, Any], action: Any, reward: Any, discount: Any, after: dict[str, Any]) -> None:
        count = len(action)
        if count == 0:
            return
        start = self.written % self.capacity
        if start + count <= self.capacity:
            index: Any = slice(start, start + count)
        else:
            index = (start + np.arange(count)) % self.capacity
        parts = (
            before.get("vector"),
            action,
            np.asarray(reward)[:, None],
            np.asarray(discount)[:, None],
            after.get("vector"),
        )
        for column, part in zip(self._columns, parts, strict=True):
            if part is not None:
                self._rows[index, column] = part
        for key, images in self._images.items():
            images[0, index], images[1, index] = before[key], after[key]
        self.written += count
        self.size = min(self.size + count, self.capacity)

    def sample(self, batch_size: int, rng: np.random.Generator, device: torch.device) -> Transitions:
        """``batch_size`` transitions, uniform over those stored, with replacement. Raises ValueError where none is."""
        if self.size == 0:
            raise ValueError("the replay buffer is empty")
        index = rng.integers(self.size, size=batch_size)
        rows = torch.from_numpy(self._rows[index]).to(device)
        before, action, reward, discount, after = (rows[:, column] for column in self._columns)
        inputs, next_inputs = ({"vector": part} if self.encoder.features else {} for part in (before, after))
        for key, images in self._images.items():
            inputs[key], next_inputs[key] = (torch.from_numpy(part[index]).to(device) for part in images)
        return Transitions(inputs, action, reward.squeeze(-1), discount.squeeze(-1), next_inputs)


def _pick(inputs: dict[str, Any], index: Any) -> dict[str, Any]:
    return {key: part[index] for key, part in inputs.items()}


def _storage(shape: tuple[int, ...], dtype: Any, folder: str) -> Any:
    try:
        if not folder:
            return np.zeros(shape, dtype)
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the name, and nothing else does
            return np.memmap(file, dtype, "w+", shape=shape)
    except (MemoryError, ValueError):
        raise UsageError(
            f"--buffer-size {max(shape):,} does not fit into memory; --buffer-folder maps a file"
        ) from None
    except OSError as problem:
        raise UsageError(f"--buffer-folder {folder}: {problem.strerror or problem}") from None
