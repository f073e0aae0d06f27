"""Rollouts that stay on the agent's device: environments in torch, and statistics of episodes as tensors."""

from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from klrl.agents.base import Agent, State
from klrl.agents.device import suits
from klrl.buffers.device import DeviceRollout
from klrl.envs.native import TorchVectorEnv
from klrl.errors import UsageError
from klrl.kl import Ranks
from klrl.training.episodes import Episodes

Envs = VectorEnv[Any, Any, Any]


def rollouts_stay(agent: Agent, envs: Envs, ranks: Ranks) -> bool:
    """Whether the agent's rollouts can stay on its device: on one other than the CPU, of klrl's own environments, of a
    process alone."""
    elsewhere = agent.device.type != "cpu" and ranks.size == 1
    return elsewhere and isinstance(envs.unwrapped, TorchVectorEnv) and suits(agent)


def moved(agent: Any, envs: Envs, episodes: Episodes) -> tuple[Envs, DeviceRollout, "DeviceEpisodes"]:
    """The environments, which move to the agent's device, a buffer there, and ``episodes`` gone on with there.

    Raises UsageError where they do not fit into the device's memory.
    """
    own: Any = envs.unwrapped  # what is wrapped around it looks at its answers
    try:
        own.to(agent.device)
        buffer = DeviceRollout(agent.new_buffer(envs.num_envs), agent.device)
        return own, buffer, DeviceEpisodes(episodes, agent.device)
    except torch.OutOfMemoryError:
        size = f"--n-steps {agent.config.n_steps:,} of {envs.num_envs:,} environments"
        raise UsageError(f"{size} do not fit into the memory of {agent.device}") from None


class DeviceEpisodes(Episodes):
    """``Episodes`` by rewards and ends that are tensors, read together when someone asks."""

    def __init__(self, before: Episodes, device: torch.device) -> None:
        """``before``: what to go on from."""
        super().__init__(len(before._returns))
        self.steps, self.restarted, self.done = before.steps, before.restarted, before.done
        ended = np.isin(np.arange(len(self._returns)), before._resetting)
        parts = (before._returns, before._lengths, ended)
        self._now: Any = tuple(torch.from_numpy(part).to(device) for part in parts)

    @property
    def steps(self) -> int:
        self._read()
        return self._steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._steps, self._rows = count, list[tuple[Tensor, ...]]()

    def add(self, action: Any, reward: Any, ended: Any) -> None:
        returns, lengths, resetting = self._now
        returns, lengths = returns + reward, lengths + 1
        self._rows.append((returns, lengths, ended, resetting))
        self._now = returns.masked_fill(ended, 0.0), lengths.masked_fill(ended, -1), ended

    def _read(self) -> None:
        """Take in the rows since the last time: how many steps they are, and the last 100 episodes that ended."""
        if not self._rows:
            return
        returns, lengths, ended, resetting = (torch.stack(parts).flatten() for parts in zip(*self._rows, strict=True))
        places = torch.arange(len(ended), device=ended.device)
        last = torch.where(ended, places, -1).topk(min(100, len(ended))).values.flip(0)  # -1: there are no more
        index = last.clamp_min(0)
        found = torch.stack([last.double(), returns[index], lengths[index].double()], 1).tolist()
        self.steps = self._steps + int(resetting.logical_not().sum())
        self.done.extend((total, int(length)) for place, total, length in found if place >= 0)

    def figures(self, ranks: Ranks) -> dict[str, float]:
        self._read()
        return super().figures(ranks)

    def forget_unfinished(self) -> None:
        self._read()
        super().forget_unfinished()
        self._now = tuple(torch.zeros_like(part) for part in self._now)

    def state_dict(self) -> State:
        self._read()
        self._returns[:], self._lengths[:], ended = (part.cpu().numpy() for part in self._now)
        self._resetting = ended.nonzero()[0]
        return super().state_dict()
