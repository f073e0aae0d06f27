"""A rollout as tensors on a device, and what is made of its rewards there; no single step waits for the device."""

from typing import Any

import torch
from torch import Tensor

from klrl.buffers.returns import RewardScale
from klrl.buffers.rollout import RolloutBuffer

_HELD = ("obs", "action", "reward", "terminated", "truncated", "valid", "begins", "_ended")


class DeviceRollout(RolloutBuffer):
    """A ``RolloutBuffer`` whose arrays are tensors, of environments under NEXT_STEP autoreset that show one array.

    Its ``state_dict`` is a ``RolloutBuffer``'s, so that a run goes on with either.
    """

    obs: Any
    action: Any
    reward: Any
    terminated: Any
    truncated: Any
    valid: Any
    begins: Any
    _ended: Any

    def __init__(self, host: RolloutBuffer, device: torch.device) -> None:
        """``host``: a buffer in NumPy of the form wanted, which is this one's from now on."""
        self.n_steps, self.n_envs, self.autoreset = host.n_steps, host.n_envs, host.autoreset
        self._host, self._device = host, device
        self._take_over()

    def add(
        self, obs: Any, action: Any, reward: Any, terminated: Any, truncated: Any, next_obs: Any, final_obs: Any = None
    ) -> None:
        """Append one step of all N environments, tensors on the device; a full buffer starts over."""
        t = 0 if self.full else self.filled
        if t == 0:
            self.obs[0] = obs
        self.obs[t + 1] = next_obs
        self.action[t], self.reward[t] = action, reward
        self.terminated[t], self.truncated[t] = terminated, truncated
        self.valid[t], self.begins = ~self._ended, self._ended
        self._ended, self.filled = terminated | truncated, t + 1

    def check_finite(self) -> None:
        parts = (self.obs[: self.filled + 1], self.action[: self.filled], self.reward[: self.filled])
        if not bool(torch.stack([part.isfinite().all() for part in parts]).all()):
            self.on_host().check_finite()

    def on_host(self) -> RolloutBuffer:
        """The same steps in NumPy."""
        for name in _HELD:
            setattr(self._host, name, getattr(self, name).cpu().numpy())
        self._host.filled = self.filled
        return self._host

    def state_dict(self) -> dict[str, Any]:
        return self.on_host().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.on_host().load_state_dict(state)
        self._take_over()

    def forget_unfinished(self) -> None:
        self.on_host().forget_unfinished()
        self._take_over()

    def _take_over(self) -> None:
        for name in _HELD:
            setattr(self, name, torch.from_numpy(getattr(self._host, name)).to(self._device))
        self.filled = self._host.filled


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    ended: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """``returns.gae`` of tensors."""
    delta = reward + gamma * next_value * ~terminated - value
    decay = (gamma * gae_lambda) * (~ended).double()
    advantage, following = torch.empty_like(delta), torch.zeros_like(decay[0])
    for t in range(len(delta) - 1, -1, -1):
        following = delta[t] + decay[t] * following
        advantage[t] = following
    return advantage, advantage + value


def scaled(scale: RewardScale, reward: Tensor, ended: Tensor, valid: Tensor) -> Tensor:
    """``scale(reward, ended, valid)`` of tensors: it reads the returns' moments, and copies what goes on, once."""
    if not scale.enabled:
        return reward
    fits = len(scale.running) == reward.shape[1]
    running = torch.from_numpy(scale.running).to(reward.device) if fits else reward.new_zeros(reward.shape[1]).double()
    discounted = torch.empty_like(reward, dtype=torch.float64)
    for t in range(len(reward)):
        running = running * scale.gamma + reward[t]
        discounted[t] = running
        running = running * ~ended[t]
    scale.running = running.cpu().numpy()
    share = valid / valid.sum().double()
    mean = (share * discounted).sum()
    moments = torch.stack([valid.sum(), mean, (share * (discounted - mean).square()).sum()])
    return (reward.double() / float(scale.take_in([moments.tolist()]))).float()
