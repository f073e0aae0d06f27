"""CartPole and Pendulum written in torch: thousands of environments at once, on any device.

The dynamics are those of Gymnasium's ``CartPole-v1`` and ``Pendulum-v1``, in float64.
"""

import math
import zlib
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor


class TorchVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` environments, their states the rows of one tensor, in NEXT_STEP mode.

    On the CPU observations and all else are NumPy arrays, elsewhere, and after ``to``, tensors on ``device``; actions
    may be either. ``state_dict`` says all that decides what happens next.
    """

    def __init__(self, num_envs: int = 1, max_episode_steps: int = 1000, device: str = "cpu") -> None:
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs, self.max_episode_steps, self.device = num_envs, max_episode_steps, torch.device(device)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.tensors = self.device.type != "cpu"
        self._generator = torch.Generator(self.device)
        self._bounds: tuple[Tensor, ...] | None = None
        self.state = self.first_states()
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self.ended = torch.zeros(num_envs, dtype=torch.bool, device=self.device)

    def to(self, device: torch.device) -> None:
        """Move to ``device``, and show tensors from now on; episodes begin anew, at the next reset with a seed."""
        self.device, self.tensors = device, True
        self._generator, self._bounds = torch.Generator(device), None
        self.state, self.steps, self.ended = (part.to(device) for part in (self.state, self.steps, self.ended))

    @abstractmethod
    def first_states(self) -> Tensor:
        """States in which episodes begin, [N, k]."""

    @abstractmethod
    def move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The states [N, k] that actions lead to, their rewards [N], and whether they end the episode [N]."""

    @abstractmethod
    def observe(self, state: Tensor) -> Tensor:
        """What is seen of states, float32 [N, *shape]."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._generator.manual_seed(seed)
        self.state = self.first_states()
        self.steps, self.ended = torch.zeros_like(self.steps), torch.zeros_like(self.ended)
        return self._shown(self.observe(self.state)), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        resets = self.ended
        state, reward, terminated = self.move(self.state, torch.as_tensor(actions, device=self.device))
        self.steps = self.steps + 1
        if self.tensors or bool(resets.any()):  # on a GPU, asking would wait for it
            state = torch.where(resets.unsqueeze(-1), self.first_states(), state)
            self.steps = self.steps.masked_fill(resets, 0)
            reward, terminated = reward.masked_fill(resets, 0.0), terminated & ~resets
        truncated = self.steps >= self.max_episode_steps
        self.state, self.ended = state, terminated | truncated
        return *(self._shown(part) for part in (self.observe(state), reward, terminated, truncated)), {}

    def state_dict(self) -> dict[str, Tensor]:
        parts = {"state": self.state, "steps": self.steps, "ended": self.ended}
        return {**{name: part.clone() for name, part in parts.items()}, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> Any:
        """Go on from ``state_dict``'s result; the observations there. Raises ValueError for another number of them."""
        if len(state["state"]) != self.num_envs:
            raise ValueError(f"{len(state['state'])} environments were saved, and there are {self.num_envs}")
        self.state, self.steps, self.ended = (state[name].to(self.device) for name in ("state", "steps", "ended"))
        try:
            self._generator.set_state(state["generator"])
        except RuntimeError:  # that of another kind of device
            self._generator.manual_seed(zlib.crc32(state["generator"].numpy().tobytes()))
        return self._shown(self.observe(self.state))

    def _uniform(self, low: list[float], high: list[float]) -> Tensor:
        """Uniform numbers [N, k] between k bounds, which are the same at each call."""
        kind: Any = {"dtype": torch.float64, "device": self.device}
        drawn = torch.rand(self.num_envs, len(low), generator=self._generator, **kind)
        if self._bounds is None:  # a copy to a GPU at each step would wait for it
            self._bounds = torch.tensor([low, high], **kind).unbind()
        bottom, top = self._bounds
        return bottom + (top - bottom) * drawn

    def _shown(self, part: Tensor) -> Any:
        return part if self.tensors else part.numpy()


_WIDE, _ANGLE = 2.4, 12 * math.pi / 180  # where CartPole's episodes end


class CartPole(TorchVectorEnv):
    """Gymnasium's ``CartPole-v1``: Barto, Sutton and Anderson (1983), by Euler's method in steps of 0.02 s."""

    high = np.array([2 * _WIDE, np.inf, 2 * _ANGLE, np.inf], np.float32)
    single_observation_space = spaces.Box(-high, high, dtype=np.float32)
    single_action_space = spaces.Discrete(2)

    def first_states(self) -> Tensor:
        return self._uniform([-0.05] * 4, [0.05] * 4)

    def move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, x_dot, angle, angle_dot = state.unbind(-1)
        sine, cosine = angle.sin(), angle.cos()
        push = (20.0 * action.double() - 10.0 + 0.05 * angle_dot.square() * sine) / 1.1
        angle_acc = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine.square() / 1.1))
        x_acc = push - 0.05 * angle_acc * cosine / 1.1
        state = state + 0.02 * torch.stack((x_dot, x_acc, angle_dot, angle_acc), -1)
        terminated = (state[:, 0].abs() > _WIDE) | (state[:, 2].abs() > _ANGLE)
        return state, torch.ones_like(x), terminated

    def observe(self, state: Tensor) -> Tensor:
        return state.float()


class Pendulum(TorchVectorEnv):
    """Gymnasium's ``Pendulum-v1``: a rod of mass 1 and length 1 under gravity 10, in steps of 0.05 s."""

    high = np.array([1.0, 1.0, 8.0], np.float32)
    single_observation_space = spaces.Box(-high, high, dtype=np.float32)
    single_action_space = spaces.Box(-2.0, 2.0, (1,))

    def first_states(self) -> Tensor:
        return self._uniform([-math.pi, -1.0], [math.pi, 1.0])

    def move(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angle, speed = state.unbind(-1)
        torque = action.double()[:, 0].clamp(-2.0, 2.0)
        from_top = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = from_top.square() + 0.1 * speed.square() + 0.001 * torque.square()
        speed = (speed + (15.0 * angle.sin() + 3.0 * torque) * 0.05).clamp(-8.0, 8.0)
        return torch.stack((angle + 0.05 * speed, speed), -1), -cost, torch.zeros_like(self.ended)

    def observe(self, state: Tensor) -> Tensor:
        angle, speed = state.unbind(-1)
        return torch.stack((angle.cos(), angle.sin(), speed), -1).float()
