"""What an on-policy agent remembers of running episodes: the states of its recurrent networks between two steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from klrl.agents.base import State
from klrl.buffers.rollout import RolloutBuffer
from klrl.errors import UsageError
from klrl.policies.encoder import Inputs
from klrl.policies.memory import SEQUENCE, STATE, make_recurrent
from klrl.policies.networks import Array, make_network

_SAVED = ("now", "before", "critic", "begin")


class Memory:
    """The states of ``agent``'s recurrent policy and critic; without ``--memory`` there are none, and nothing to do.

    An update learns from whole sequences: the stretch of each episode that lies in the rollout, from the state that
    was carried there. Old and new policy begin from the same state, so that KL is exact for what was done since.
    """

    def __init__(self, agent: Any) -> None:
        """``agent``: an ``OnPolicyAgent``. Raises UsageError where it has options that go with no memory."""
        config = agent.config
        self.agent, self.kind, self.size = agent, config.memory, config.memory_size
        self.now, self.critic = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)
        """[N, S]: the policy's state before the next step, and the critic's where the next rollout begins."""
        self.before = self.now
        """[N, S]: the policy's state before the last step."""
        self.begin = np.zeros((0, 2, 0), np.float32)
        """[N, 2, S]: those of both where the running rollout began."""
        self.collected = 0
        """How many of its steps were taken with this memory."""
        if self.kind == "none":
            return
        for option, given in [
            ("--bottleneck.size", getattr(config, "bottleneck", None) and config.bottleneck.size),
            ("--share-network (--no-share-network, where a preset has it)", getattr(config, "share_network", False)),
            ("--fisher-fraction below 1", getattr(config, "fisher_fraction", 1) < 1),
        ]:
            if given:
                raise UsageError(f"--memory {self.kind} does not go with {option}")

    def make(self, of_critic: bool) -> Callable[..., nn.Module]:
        """What makes the policy's network or the critic's, called as ``make_network`` is."""
        return make_network if self.kind == "none" else partial(make_recurrent, self.kind, self.size, of_critic)

    def carry(self, buffer: RolloutBuffer) -> Array | None:
        """The policy's states [N, S] for the step that ``buffer`` takes next, which acting moves on.

        Raises UsageError where the buffer's environments show an episode's end in the same step as the next one's
        beginning, or are reset by hand.
        """
        if self.kind == "none":
            return None
        if buffer.autoreset is not AutoresetMode.NEXT_STEP:
            raise UsageError(f"--memory {self.kind} takes environments with autoreset NEXT_STEP, Gymnasium's default")
        if len(self.now) != buffer.n_envs:
            self.now, self.critic = (self.agent.initial_state(buffer.n_envs) for _ in range(2))
            self.collected = 0
        done = 0 if buffer.full else buffer.filled
        if self.collected == done + 1:  # the last step failed, as there is no row of it
            self.now[:] = self.before
        in_step = done == 0 or self.collected in (done, done + 1)
        self.collected = done + 1 if in_step else -1
        self.now[buffer.begins] = 0.0
        if done == 0:
            self.critic[buffer.begins] = 0.0
            self.begin = np.stack([self.now, self.critic], 1)
        self.before = self.now.copy()
        return self.now

    def sequences(self, rollout: RolloutBuffer, inputs: Inputs) -> Inputs:
        """The encoded observations [(T + 1) N] of a rollout, with which of them follow each other, and from what.

        Raises UsageError where the rollout was not collected with this memory.
        """
        if self.kind == "none":
            return inputs
        if self.collected != rollout.n_steps:
            raise UsageError(f"--memory {self.kind} learns from steps that agent.collect(obs, buffer) took")
        n_envs, device = rollout.n_envs, self.agent.device
        begins = np.concatenate([np.ones((1, n_envs), np.bool_), ~rollout.valid])  # a row that resets ends an episode
        environment = np.broadcast_to(np.arange(n_envs), begins.shape)
        sequence = np.stack([environment, begins.cumsum(0) * n_envs + environment], -1).reshape(-1, 2)
        state = np.zeros((len(sequence), *self.begin.shape[1:]), np.float32)
        state[:n_envs] = self.begin
        more = {SEQUENCE: torch.from_numpy(sequence).to(device), STATE: torch.from_numpy(state).to(device)}
        inputs = {**inputs, **more}
        rows = {key: part[:-n_envs] for key, part in inputs.items()}
        self.critic = self.agent.critic.network.last_states(rows, n_envs).cpu().numpy()
        return inputs

    def state_dict(self) -> State:
        if self.kind == "none":
            return {}
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _SAVED}
        return {**arrays, "collected": self.collected}

    def load_state_dict(self, state: State) -> None:
        if self.kind != "none":
            for name in _SAVED:
                setattr(self, name, state[name].numpy().copy())
            self.collected = int(state["collected"])
