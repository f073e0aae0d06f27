"""What a GPU does, on a CPU: steps that are recorded and done again, and what would be waited for."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import collect
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from klrl import PPO, SAC, PPOConfig, SACConfig
from klrl.kl import KLLimit
from klrl.policies.parameters import FlatParameters
from klrl.training.captured import captured

# The last makes a tensor of numbers, which then goes to the device.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "lift_fresh")


BOX = spaces.Box(-2, 2, (3,))


class _Tape(TorchDispatchMode):
    """Notes the operations on tensors, to be done again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        views = [x.untyped_storage().data_ptr() in given for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        new = [] if any(views) else [x for x in tree_leaves(outputs) if isinstance(x, torch.Tensor)]
        self.operations.append((func, args, kwargs or {}, new))
        return outputs

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, outputs in self.operations:
            again = func(*args, **kwargs)
            new = [x for x in tree_leaves(again) if isinstance(x, torch.Tensor)] if outputs else ()
            for mine, now in zip(outputs, new, strict=True):
                mine.copy_(now)


class Stand:
    """Records as CUDA does: after warm-up runs, the operations on tensors, and nothing that Python does beside them."""

    def __init__(self) -> None:
        self.recorded, self.repeated = 0, 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        self.recorded += 1
        run()
        with _Tape() as tape:
            outputs = run()

        def repeat() -> None:
            self.repeated += 1
            tape.play()

        return repeat, outputs


class _Waits(TorchDispatchMode):
    """Counts what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.split(".")[-1]
        by_mask = name.startswith("index") and any(x is not None and x.dtype == torch.bool for x in args[1] or ())
        if name in _WAITS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def _counted(found: Counter[str], name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        found[name] += 1
        return method(*args)

    return call


@contextmanager
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What of the block would wait for a GPU, by name."""
    mode = _Waits()
    with monkeypatch.context() as patch, mode:
        for name in ("cpu", "tolist", "__array__"):  # which on the CPU are no operations
            patch.setattr(torch.Tensor, name, _counted(mode.found, name, getattr(torch.Tensor, name)))
        yield mode.found


def by_torch(patch: pytest.MonkeyPatch) -> None:
    """Let networks and their gradients go by torch, as they do where NumPy cannot; runs record their steps."""
    for name in ("ppo.applies", "trpo.applies", "trpo.suits"):
        patch.setattr(f"klrl.agents.{name}", lambda *_: False)
    patch.setattr("klrl.policies.networks.MLP.forward", lambda mlp, x: mlp.layers[-1](mlp.hidden(x)))
    patch.setattr("klrl.training.loop.captured", partial(captured, record=Stand()))


def to_meta(agent: Any, patch: pytest.MonkeyPatch) -> None:
    """Move what an agent's steps read to the device "meta", whose tensors have shapes and no numbers: what looks at one
    raises, and what mixes devices does, as on a GPU."""
    agent.device = torch.device("meta")
    for name, part in vars(agent).items():
        if isinstance(part, FlatParameters):
            part.module.to("meta")
            part.parameters = dict(part.module.named_parameters())
            for tensor in ("flat", "first_moment", "second_moment", "count"):
                setattr(part, tensor, getattr(part, tensor).to("meta"))
        elif isinstance(limit := getattr(part, "limit", part), KLLimit):
            limit.beta = limit.beta.to("meta")
        elif isinstance(part, torch.Tensor):
            setattr(agent, name, part.to("meta"))

    def adam(*lists: list[torch.Tensor], lr: torch.Tensor, **_: Any) -> None:
        assert {x.device.type for x in (lr, *itertools.chain(*lists))} == {"meta"}

    patch.setattr(torch, "_fused_adam_", adam)  # which is not written for it
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)


def ppo(env: Any, config: PPOConfig, **more: Any) -> tuple[PPO, Any]:
    agent = PPO(env.single_observation_space, env.single_action_space, config, **more)
    buffer = agent.new_buffer(env.num_envs)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    return agent, buffer


def sac(action: spaces.Space[Any], config: SACConfig) -> tuple[SAC, Any]:
    agent, rng = SAC(BOX, action, config), np.random.default_rng(0)
    buffer, no, obs = agent.new_buffer(1), np.zeros(1, bool), rng.normal(size=(41, 1, 3)).astype(np.float32)
    for step in range(40):
        buffer.add(obs[step], agent.act(obs[step]), rng.normal(size=1), no, no, obs[step + 1])
    return agent, buffer


def everything(agent: Any) -> torch.Tensor:
    """All weights, and Adam's state."""
    groups = [part for part in vars(agent).values() if isinstance(part, FlatParameters)]
    return torch.cat([part.flatten() for group in groups for part in (group.flat, *group.optimizer)])
