"""Heads: from a network's outputs to a distribution, to sampled actions, and to what the environment takes."""

import math
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from klrl.errors import UsageError
from klrl.kl import freeze
from klrl.policies.beta import BetaHead
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.networks import Array
from klrl.policies.own import make_own, unusable
from klrl.policies.policy import Head
from klrl.policies.spaces import category_sizes, check_joint, is_bounded


class CategoricalHead(nn.Module):
    """Discrete, MultiDiscrete and MultiBinary actions: logits [B, sum of sizes] to a ``MultiCategorical``."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        super().__init__()
        self.space = space
        sizes = category_sizes(space)
        self.size = sum(sizes)
        self.shape = (len(sizes), max(sizes))
        # Where the sizes differ, every categorical is padded to the largest with forbidden choices.
        self.padded = len(set(sizes)) > 1
        starts = np.cumsum([0, *sizes[:-1]])
        index = [[start + min(i, n - 1) for i in range(max(sizes))] for start, n in zip(starts, sizes, strict=True)]
        self.index = nn.Buffer(torch.tensor(index).flatten())
        self.padding = nn.Buffer(torch.tensor([[i >= n for i in range(max(sizes))] for n in sizes]))

    def forward(self, output: Tensor) -> MultiCategorical:
        if not self.padded:
            return MultiCategorical(output.view(-1, *self.shape))
        logits = output[:, self.index].view(-1, *self.shape)
        return MultiCategorical(logits.masked_fill(self.padding, float("-inf")))

    def numbers(self, output: Array) -> tuple[Array]:
        """The logits [B, k, n] that outputs stand for, -inf where a choice is padding."""
        logits = output[:, self.index.cpu().numpy()] if self.padded else output
        logits = logits.reshape(-1, *self.shape)
        return (np.where(self.padding.cpu().numpy(), -np.inf, logits) if self.padded else logits,)

    def sample(self, output: Array, rng: Any) -> Array:
        """Actions [B, k], counted from 0."""
        return self.draw(*self.numbers(output), rng)

    def draw(self, logits: Array, rng: Any) -> Array:
        """``sample`` by logits [B, k, n]."""
        if rng is not None:  # the Gumbel-max rule: -log of an exponential is a standard Gumbel
            logits = logits - np.log(rng.standard_exponential(logits.shape))
        return logits.argmax(axis=-1)

    def to_env(self, action: Array) -> Array:
        """Actions [N, k] as the environment counts and shapes them, [N, *space.shape]."""
        shaped = action.reshape(len(action), *(self.space.shape or ()))
        counted = shaped + getattr(self.space, "start", 0)
        return counted if counted.dtype == self.space.dtype else counted.astype(self.space.dtype)

    def deployed(self, output: Tensor, noise: Tensor | None) -> Tensor:
        """``to_env`` of the mode, or of the action that standard Gumbel noise [N, k, n] draws, in torch."""
        logits = self(output).logits
        return self.counted((logits if noise is None else logits + noise).argmax(-1))

    def counted(self, action: Tensor) -> Tensor:
        """``to_env`` in torch."""
        start = torch.as_tensor(getattr(self.space, "start", 0))
        shaped = action.reshape(-1, *(self.space.shape or ())) + start
        return shaped.to(torch.from_numpy(np.zeros(0, self.space.dtype)).dtype)

    def metrics(self) -> dict[str, float]:
        return {}


class JointCategoricalHead(CategoricalHead):
    """The same spaces as one categorical over all joint actions, each a number from 0: logits [B, product of sizes]."""

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.sizes = category_sizes(space)
        check_joint(space, math.prod(self.sizes))
        super().__init__(spaces.Discrete(math.prod(self.sizes)))
        self.parts = CategoricalHead(space)

    def to_env(self, action: Array) -> Array:
        return self.parts.to_env(np.stack(np.unravel_index(action[:, 0], self.sizes), axis=-1))

    def counted(self, action: Tensor) -> Tensor:
        below = [math.prod(self.sizes[i + 1 :]) for i in range(len(self.sizes))]
        return self.parts.counted(action // torch.tensor(below) % torch.tensor(self.sizes))


class NormalHead(nn.Module):
    """Box actions: means [B, d] to a ``DiagonalNormal`` with one standard deviation for all states.

    Actions are scaled to the bounds where these are finite: the output 0 is the middle, 1 the upper bound, so that one
    initial standard deviation suits every environment. KL does not depend on that scale.
    """

    def __init__(self, space: spaces.Box, log_std_init: float = 0.0) -> None:
        super().__init__()
        self.space = space
        bounded = is_bounded(space).flatten()
        low, high = (np.where(bounded, x.flatten(), 0.0).astype(np.float64) for x in (space.low, space.high))
        half = (high - low) / 2
        self._center = ((high + low) / 2).astype(np.float32)
        self._scale = np.where(half > 0, half, 1.0).astype(np.float32)
        self.center, self.scale = nn.Buffer(torch.from_numpy(self._center)), nn.Buffer(torch.from_numpy(self._scale))
        self.log_std = nn.Parameter(log_std_init + self.scale.log())
        self.size = len(low)

    def forward(self, output: Tensor) -> DiagonalNormal:
        mean = torch.addcmul(self.center, output, self.scale)
        return DiagonalNormal(mean, self.log_std.expand_as(mean))

    def numbers(self, output: Array) -> tuple[Array, Array]:
        """The means [B, d] that outputs stand for, and the log standard deviations [d]."""
        return self._center + output * self._scale, self._parameters["log_std"].detach().cpu().numpy()  # type: ignore[union-attr]

    def sample(self, output: Array, rng: Any) -> Array:
        return self.draw(*self.numbers(output), rng)

    def draw(self, mean: Array, log_std: Array, rng: Any) -> Array:
        """``sample`` by means [B, d] and log standard deviations, [d] or [B, d]."""
        if rng is None:
            return mean
        noise = rng.standard_normal(mean.shape, dtype=np.float32)
        noise *= np.exp(log_std)
        noise += mean
        return noise

    def to_env(self, action: Array) -> Array:
        """Actions [N, d] clipped to the bounds, [N, *space.shape]; their density is that of the unclipped action."""
        shaped = action.reshape(len(action), *self.space.shape)
        within = np.minimum(np.maximum(shaped, self.space.low), self.space.high)  # np.clip takes twice as long
        return within if within.dtype == self.space.dtype else within.astype(self.space.dtype)

    def deployed(self, output: Tensor, noise: Tensor | None) -> Tensor:
        """``to_env`` of the mode, or of the action that standard normal noise [N, d] draws, in torch."""
        policy, (low, high) = self(output), (torch.from_numpy(x) for x in (self.space.low, self.space.high))
        action = policy.mode if noise is None else torch.addcmul(policy.loc, policy.log_std.exp(), noise)
        return action.reshape(-1, *low.shape).clamp(low, high).to(low.dtype)

    def metrics(self) -> dict[str, float]:
        """The mean standard deviation, in half ranges where the space is bounded."""
        return {"train/std": float((self.log_std.detach().exp() / self.scale).mean())}


class StateDependentNormalHead(NormalHead):
    """A ``NormalHead`` whose standard deviation depends on the state: outputs [B, 2d], means and what the logarithms
    of the standard deviations are more than ``log_std``."""

    def __init__(self, space: spaces.Box, log_std_init: float = 0.0) -> None:
        super().__init__(space, log_std_init)
        self.dimensions, self.size = self.size, 2 * self.size

    def forward(self, output: Tensor) -> DiagonalNormal:
        mean, more = output.tensor_split(2, dim=-1)
        return DiagonalNormal(torch.addcmul(self.center, mean, self.scale), self.log_std + more)

    def numbers(self, output: Array) -> tuple[Array, Array]:
        """The means and log standard deviations, each [B, d], that outputs stand for."""
        mean, log_std = super().numbers(output[:, : self.dimensions])
        return mean, log_std + output[:, self.dimensions :]

    def metrics(self) -> dict[str, float]:
        return {}


def make_head(space: spaces.Space[Any], log_std_init: float = 0.0, name: str = "plain") -> Head:
    """The head called ``name`` for an action space: a normal or categoricals, as that is, "state-dependent-std",
    "beta", or a "module:Class" that is made with the space. Raises UsageError where it does not suit."""
    if ":" in name:
        return _own(space, name)
    if name not in HEADS:
        return NormalHead(space, log_std_init) if isinstance(space, spaces.Box) else CategoricalHead(space)
    if not isinstance(space, spaces.Box):
        raise UsageError(f"--head {name} makes no policy over the actions {space}: it needs a Box")
    return HEADS[name](space, log_std_init)


HEADS: dict[str, Any] = {"state-dependent-std": StateDependentNormalHead, "beta": BetaHead}
"""The heads of Boxes that ``make_head`` makes by name, each from the space and ``log_std_init``."""


def _own(space: spaces.Space[Any], name: str) -> Any:
    """A head of one's own, which was seen to give distributions and actions."""
    head = make_own(name, nn.Module, "head", "head", ("forward", "sample", "to_env", "metrics"), space)
    try:
        policy = freeze(head(torch.zeros(2, head.size)))
        action = head.sample(np.zeros((2, head.size), np.float32), np.random.default_rng(0))
        if policy.log_prob(torch.as_tensor(action)).shape != (2,):
            raise ValueError("its distributions' batch shape is not [B]: wrap them in klrl.kl.joint")
        taken = head.to_env(action)
        if taken.shape != (2, *(space.shape or ())):
            raise ValueError(f"to_env gives {taken.shape} for 2 actions of {space}")
        with torch.no_grad():
            head.metrics()
    except Exception as problem:
        raise unusable("head", name, problem) from None
    return head
