"""A policy in torch alone, as it is written to a file that runs without klrl."""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from klrl.errors import UsageError
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.networks import Array
from klrl.policies.observations import Observation
from klrl.policies.policy import Policy
from klrl.policies.spaces import MASK, category_sizes
from klrl.policies.squashed import SquashedNormal

Feed = dict[str, Array]
"""What a file is given, by the names of its inputs: observations or a Dict's parts, noise, state; each [B, ...]."""
_NOISE: dict[type[Any], str] = {
    MultiCategorical: "standard Gumbel, -log(-log(u)) of uniform u",
    DiagonalNormal: "standard normal",
    SquashedNormal: "standard normal",
}


class DeployedPolicy(nn.Module):
    """From observations as the environment shows them to actions as it takes them: a copy, on the CPU."""

    def __init__(self, policy: Policy, noise: bool) -> None:
        """``noise``: whether actions are drawn by noise that is given, instead of the most likely ones.

        Raises UsageError for a head that has no form in torch, or no noise.
        """
        super().__init__()
        self.network, self.head = (copy.deepcopy(part).cpu() for part in (policy.network, _module(policy.head)))
        self.requires_grad_(False)
        self.encoder = copy.copy(policy.encoder)
        self.encoder.device = torch.device("cpu")
        self.encoder.load_state_dict(policy.encoder.state_dict())
        self.keyed = self.encoder.layout.keyed
        self.parts = [*self.encoder.parts, *([MASK] if self.encoder.sizes else [])]
        self.state_size = policy.state_size
        if not hasattr(self.head, "deployed"):
            head = type(self.head).__name__
            raise UsageError(f"a {head} cannot be exported: it has no method deployed(output, noise)")
        self.noise = ""
        self.noise_shape: tuple[int, ...] = ()
        if noise:
            at = self.head(self.network(self.encoder.probe()))
            if type(at) not in _NOISE:
                raise UsageError(f"--noise: no noise is known that draws the actions of a {type(at).__name__}")
            self.noise = _NOISE[type(at)]
            self.noise_shape = (at.logits if isinstance(at, MultiCategorical) else at.loc).shape[1:]

    def forward(self, obs: Any, noise: Tensor | None = None, state: Tensor | None = None) -> Any:
        """Actions [B, *space.shape] at observations [B, *shape], of a Dict its parts by name.

        With a memory, ``state`` [B, S] goes in, zeros where episodes begin, and the next one comes out beside them.
        """
        seen = {}
        for name, part in self.encoder.parts.items():
            value = obs[name] if self.keyed else obs
            seen[name] = _one_hot(value, part) if hasattr(part, "start") else value
        inputs, after = self.encoder.scaled(self.encoder.joined(seen)), None
        if state is None:
            output = self.network(inputs)
        else:
            output, after = self.network.step(inputs, state)  # type: ignore[operator]
        if self.encoder.sizes:
            parts = torch.split(obs[MASK].reshape(output.shape) != 0, self.encoder.sizes, -1)
            allowed = torch.cat([part | ~part.any(-1, keepdim=True) for part in parts], -1)  # as the encoder's
            output = output.masked_fill(~allowed, -torch.inf)
        action: Tensor = self.head.deployed(output, noise)  # type: ignore[operator]
        return action if after is None else (action, after)

    def feed(self, obs: Observation, rng: np.random.Generator) -> Feed:
        """The inputs for observations as ``Layout.batch`` gives them, with noise and states drawn with ``rng``."""
        given = obs if isinstance(obs, dict) else {"": obs}
        feed = {f"obs.{name}" if self.keyed else "obs": given[name] for name in self.parts}
        rows = len(next(iter(feed.values())))
        if self.noise:
            draw: Any = rng.gumbel if self.noise.startswith("standard Gumbel") else rng.standard_normal
            feed["noise"] = draw(size=(rows, *self.noise_shape)).astype(np.float32)
        if self.state_size:
            feed["state"] = rng.uniform(-1, 1, (rows, self.state_size)).astype(np.float32)
        return feed

    def arguments(self, feed: Feed) -> tuple[Any, ...]:
        """``forward``'s arguments."""
        given = {name: torch.from_numpy(part) for name, part in feed.items()}
        noise = given.pop("noise") if self.noise else None
        more = (noise, given.pop("state")) if self.state_size else () if noise is None else (noise,)
        return {n.removeprefix("obs."): part for n, part in given.items()} if self.keyed else given["obs"], *more


def _module(head: Any) -> nn.Module:
    assert isinstance(head, nn.Module)
    return head


def _one_hot(value: Tensor, space: Any) -> Tensor:
    """Choices [B, *shape] one-hot, side by side, [B, sum of n], as the encoder has them."""
    sizes = category_sizes(space)
    index = value.reshape(-1, len(sizes)) - torch.as_tensor(np.asarray(space.start).reshape(-1))
    return torch.cat([index[:, i : i + 1] == torch.arange(n) for i, n in enumerate(sizes)], -1)
