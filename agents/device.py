"""What an on-policy agent does while its rollouts are tensors on its device, where NumPy does it otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from klrl.agents.on_policy import OnPolicyAgent
from klrl.buffers.device import gae, scaled
from klrl.policies.heads import CategoricalHead, NormalHead, StateDependentNormalHead

_OURS = ("act", "collect", "env_action", "estimates", "make_batch", "end_update", "new_buffer", "stored_space")


def suits(agent: Any) -> bool:
    """Whether ``on_device`` goes with the agent: an ``OnPolicyAgent`` that collects as these do, on plain vectors, by a
    normal or categoricals, without a memory or action masks."""
    kind, usual = type(agent), OnPolicyAgent
    if not issubclass(kind, usual) or any(getattr(kind, name) is not getattr(usual, name) for name in _OURS):
        return False
    plain = agent.encoder.plain and not agent.encoder.sizes and agent.memory.kind == "none"
    return plain and type(agent.policy.head) in (CategoricalHead, NormalHead, StateDependentNormalHead)


@contextmanager
def on_device(agent: Any) -> Iterator[None]:
    """Let the agent, for which that ``suits``, collect by tensors and learn from a ``DeviceRollout`` in the block."""
    own = {"collect": collect, "env_action": _env_action(agent), "estimates": estimates}
    vars(agent).update({name: partial(function, agent) for name, function in own.items()})
    try:
        yield
    finally:
        for name in own:
            delattr(agent, name)


@torch.no_grad()
def collect(agent: OnPolicyAgent, obs: Any, buffer: Any) -> Tensor:
    """Actions [N, d] for observations [N, *shape]; with noise that the agent's generator seeds at each step, so that
    no device's generator has a state to be saved."""
    generator = torch.Generator(obs.device).manual_seed(int(agent.rng.integers(2**63 - 1)))
    action: Tensor = agent.policy(agent.encoder(obs)).sample(generator=generator)
    return action


def _env_action(agent: OnPolicyAgent) -> Any:
    """``env_action`` of arrays and tensors."""
    space: Any = agent.action_space
    shape, kind = space.shape or (), torch.from_numpy(np.zeros(0, space.dtype)).dtype
    # Copied to the device once: at each step, that would wait for it.
    if isinstance(space, spaces.Box):
        low, high = (torch.from_numpy(bound).to(agent.device) for bound in (space.low, space.high))
    else:
        start = torch.as_tensor(np.asarray(getattr(space, "start", 0)), device=agent.device)

    def env_action(agent: OnPolicyAgent, action: Any) -> Any:
        if not isinstance(action, Tensor):  # an evaluation's
            return agent.policy.head.to_env(action)
        shaped = action.reshape(-1, *shape)
        return (shaped.clamp(low, high) if isinstance(space, spaces.Box) else shaped + start).to(kind)

    return env_action


def estimates(agent: OnPolicyAgent, rollout: Any, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``OnPolicyAgent.estimates`` of tensors, of an agent alone."""
    config, valid = agent.config, rollout.valid
    terminated, ended = rollout.terminated, rollout.terminated | rollout.truncated
    reward = scaled(agent.reward_scale, rollout.reward, ended, valid)
    advantage, returns = gae(reward, value[:-1], value[1:], terminated, ended, config.gamma, config.gae_lambda)
    weight = valid / valid.sum().clamp_min(1).double()
    if config.normalize_advantage:
        mean = (weight * advantage).sum()
        deviation = (weight * (advantage - mean).square()).sum().sqrt()
        advantage = ((advantage - mean) / (deviation + 1e-8)).float()
    return advantage, returns, weight.float()
