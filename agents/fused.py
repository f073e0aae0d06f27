"""The gradients of PPO's losses and of TRPO's critic for plain MLPs on the CPU, written out in NumPy.

The same numbers as autograd on ``policy_loss`` and ``value_loss`` gives, without a graph: on 64 to 256 rows a step is
about as long as its calls, and NumPy's take a third of torch's time. Where it does not apply (images, a network of
one's own, a memory, a shared network, a bottleneck, other heads, layer norm, silu and gelu, frozen weights, CUDA) the
agents use autograd.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce, wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from klrl.agents.fused_heads import CategoricalSlopes, NormalSlopes
from klrl.agents.on_policy import Batch
from klrl.kl import KLLimit
from klrl.kl.rules import ARRAY_RULES, weigh
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.encoder import Inputs
from klrl.policies.heads import CategoricalHead, NormalHead
from klrl.policies.jacobian import Pull, Push
from klrl.policies.networks import MLP, Array, Critic, Network, activated
from klrl.policies.parameters import FlatParameters
from klrl.policies.policy import Policy, masked

F = TypeVar("F", bound=Callable[..., Any])
_SLOPES: dict[str, Callable[[Array], Array]] = {
    "tanh": lambda x: 1 - x * x,
    "relu": lambda x: (x > 0).astype(x.dtype),
    "elu": lambda x: np.minimum(x, 0.0) + 1,
}
"""Activations whose derivative follows from what they gave."""
_CACHED = 4096  # rows whose activations stay in a processor's cache


def _in_pieces(function: F) -> F:
    """Let a sum over a batch's rows, of a loss and of its gradient, be that over pieces of the batch."""

    @wraps(function)
    def whole(self: Any, batch: Batch, *args: Any) -> tuple[Tensor, Tensor]:
        rows = len(batch.weight)
        if rows <= _CACHED:
            return function(self, batch, *args)
        total, gradient = torch.zeros(()), torch.zeros(())
        for i in range(0, rows, _CACHED):
            loss, found = function(self, batch.take(slice(i, i + _CACHED)), *args)
            total, gradient = total + loss, gradient + found
        return total, gradient

    return whole  # type: ignore[return-value]


def _quiet(function: F) -> F:
    """Let what overflows be infinite or nan without a warning, as torch does: it is found in the weights."""
    quiet: Any = np.errstate(all="ignore")(function)
    return quiet


def applies(module: Any, *groups: FlatParameters) -> bool:
    """Whether the network of a critic or policy is a plain MLP without hooks, whose weights, those of ``groups``, are
    on the CPU and none is frozen."""
    network = module.network
    plain = type(module) in (Policy, Critic) and type(network) is Network and network.torso.is_plain
    plain = plain and type(network.mlp) is MLP and network.mlp.is_plain and network.mlp.activation in _SLOPES
    plain = plain and not any(map(hooked, module.modules()))
    return plain and all(group.frozen is None and group.flat.device.type == "cpu" for group in groups)


def hooked(module: nn.Module) -> bool:
    """Whether hooks have a part in the module's outputs or gradients."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or any(p._backward_hooks for p in module._parameters.values() if p is not None)


def suits(policy: Policy, *groups: FlatParameters) -> bool:
    """Whether ``FusedPolicy`` serves ``policy``."""
    return type(policy.head) in (NormalHead, CategoricalHead) and applies(policy, *groups)


@dataclass(frozen=True)
class Rows(Batch):
    """A batch as NumPy arrays, views of its tensors.

    ``old`` is a pair: means and log standard deviations [B, d], or log-probabilities and probabilities [B, k, n]. So is
    ``reference``, where there is one.
    """

    @classmethod
    def of(cls, batch: Batch) -> "Rows":
        inputs: Any = {key: part.numpy() for key, part in batch.inputs.items()}
        parts = (batch.action, batch.log_prob, batch.value, batch.advantage, batch.returns, batch.weight)
        old, reference = _arrays(batch.old), _arrays(batch.reference)
        return cls(inputs, old, *(part.numpy() for part in parts), reference=reference)  # type: ignore[arg-type, misc]

    def take(self, index: Any, scale: float = 1.0) -> "Rows":
        inputs: Any = {key: part[index] for key, part in self.inputs.items()}
        old, reference = (pair and (pair[0][index], pair[1][index]) for pair in (self.old, self.reference))
        weight = self.weight[index]
        parts: Any = (self.action, self.log_prob, self.value, self.advantage, self.returns)
        action, log_prob, value, advantage, returns = (part[index] for part in parts)
        weight = weight if scale == 1 else weight * scale
        return Rows(inputs, old, action, log_prob, value, advantage, returns, weight, reference)


def _arrays(policy: Any) -> tuple[Array, Array] | None:
    """A policy's parameters as ``Rows`` has them; None of one that is not written out."""
    if isinstance(policy, DiagonalNormal):
        return policy.loc.numpy(), policy.log_std.numpy()
    return (policy.log_probs.numpy(), policy.probs.numpy()) if isinstance(policy, MultiCategorical) else None


class FusedMLP:
    """An MLP's forward pass that keeps what the way back needs; made anew for each update."""

    def __init__(self, network: Network, more: int = 0) -> None:
        """``more``: how many weights follow the MLP's, whose gradient is ``rest``."""
        layers: Any = network.mlp.layers
        self.layers = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in layers]
        self.activation: Any = network.mlp.activation
        self.inputs: list[Array] = []
        self.slopes: dict[int, Array] = {}
        sizes = [part.size for layer in self.layers for part in layer]
        self.found = torch.zeros(sum(sizes) + more, dtype=layers[0].weight.dtype)
        *parts, self.rest = np.split(self.found.numpy(), np.cumsum(sizes))
        self.slots = [(parts[2 * i].reshape(w.shape), parts[2 * i + 1]) for i, (w, _) in enumerate(self.layers)]

    def forward(self, x: Array) -> Array:
        """x [B, inputs] to [B, outputs]."""
        self.inputs, self.slopes = [], {}
        for i, (weight, bias) in enumerate(self.layers):
            if i > 0:
                x = activated(x, self.activation)
            self.inputs.append(x)
            x = x @ weight.T
            x += bias
        return x

    def backward(self, grad: Array) -> Tensor:
        """The gradient in all weights, in the module's order, of one [B, outputs] in the last output: ``found`` [P],
        which the next call overwrites."""
        for i in range(len(self.layers) - 1, -1, -1):
            to_weight, to_bias = self.slots[i]
            np.matmul(grad.T, self.inputs[i], out=to_weight)
            np.add.reduce(grad, 0, out=to_bias)
            if i > 0:
                weight = self.layers[i][0]
                # NumPy's product of a column and a row takes twice as long as the same numbers one by one.
                grad = grad @ weight if len(weight) > 1 else grad * weight
                grad *= self._slope(i)
        return self.found

    def push(self, direction: Iterator[Array]) -> Array:
        """J v [B, outputs]: how the last output moves where each weight and bias moves along ``direction``'s next."""
        moved: Any = 0.0
        for i, (weight, _) in enumerate(self.layers):
            direct = self.inputs[i] @ next(direction).T
            direct += next(direction)
            moved = direct if i == 0 else direct + (moved * self._slope(i)) @ weight.T
        return moved

    def _slope(self, i: int) -> Array:
        """The derivative of the activation that gave layer i's input, which follows from that."""
        if i not in self.slopes:
            self.slopes[i] = _SLOPES[self.activation](self.inputs[i])
        return self.slopes[i]


class FusedCritic(FusedMLP):
    """The critic's network, with the gradient of ``value_loss``."""

    def __init__(self, critic: Critic) -> None:
        super().__init__(critic.network)  # type: ignore[arg-type]

    @_in_pieces
    @_quiet
    def gradient(self, batch: Batch, clip_range_vf: float, vf_coef: float) -> tuple[Tensor, Tensor]:
        """E[(V - return)^2], and ``vf_coef`` times its gradient in the critic's parameters, as ``backward`` has it."""
        rows: Any = batch
        value = self.forward(rows.inputs["vector"])[:, 0]
        error = value - rows.returns
        squared = error * error
        if clip_range_vf > 0:
            clipped = np.clip(value, rows.value - clip_range_vf, rows.value + clip_range_vf) - rows.returns
            clipped *= clipped
            error *= squared >= clipped
            squared = np.maximum(squared, clipped)
        to_value = rows.weight * error
        to_value *= 2 * vf_coef
        return torch.tensor(rows.weight @ squared), self.backward(to_value[:, None])


class FusedPolicy(FusedMLP):
    """The policy's network and head, with the gradient of ``policy_loss``."""

    def __init__(self, policy: Policy) -> None:
        self.head: Any = policy.head
        normal, network = isinstance(self.head, NormalHead), policy.network
        super().__init__(network, self.head.size if normal else 0)  # type: ignore[arg-type]
        family: Any = NormalSlopes if normal else CategoricalSlopes
        self.family = family(self.head, self.rest)

    @_in_pieces
    @_quiet
    def gradient(
        self, batch: Batch, limit: KLLimit, ent_coef: float, reference: KLLimit | None = None
    ) -> tuple[Tensor, Tensor]:
        """-E[ratio A], and the gradient of the whole policy loss in the policy's parameters, as ``backward`` has it."""
        rows: Any = batch
        new = self.family
        output = self.forward(rows.inputs["vector"])
        ratio = new.move(output, rows)
        ratio -= rows.log_prob
        np.exp(ratio, out=ratio)
        surrogate = ratio * rows.advantage
        reads_kl = any(rule.reads_kl and rule.weighs for rule in limit.rules) or limit.influence > 0
        known = new.kl(limit.direction) if reads_kl else None
        to_log_prob = rows.weight * -surrogate  # d ratio = ratio * d log pi
        loss = to_log_prob.sum()
        to_log_prob *= weights(limit, ratio, rows.advantage, known)
        to_kl = rows.weight * strength(limit, known) if limit.penalises else None
        to_entropy = rows.weight * -ent_coef if ent_coef > 0 else None
        to_output = new.gradient(to_log_prob, to_kl, to_entropy, limit.direction)
        if reference is not None:
            so_far = self.rest.copy()
            new.move(output, replace(rows, old=rows.reference))
            to_kl = rows.weight * reference.beta.item()
            to_output += new.gradient(np.zeros_like(to_log_prob), to_kl, None, reference.direction)
            self.rest += so_far
        return torch.tensor(loss), self.backward(to_output)

    @_quiet
    def linearize(self, inputs: Inputs, params: FlatParameters) -> tuple[Any, Push, Pull]:
        """The policy at encoded observations, and its parameters' Jacobian in the weights as ``jacobian`` has it."""
        output = self.forward(inputs["vector"].numpy())

        @_quiet
        def push(direction: Tensor) -> tuple[Tensor, ...]:
            pieces = (piece.numpy() for piece in params.unflatten(direction).values())
            return tuple(map(torch.as_tensor, self.family.push(self.push(pieces), pieces)))

        @_quiet
        def pull(gradient: Sequence[Tensor]) -> Tensor:
            return self.backward(self.family.pull(*(part.numpy() for part in gradient))).clone()

        return self.head(masked(torch.from_numpy(output), inputs)), push, pull


def weights(limit: KLLimit, ratio: Array, advantage: Array, kl: Array | None) -> Array | float:
    """``limit.weight`` of arrays [B]."""
    rules = [rule for rule in limit.rules if rule.weighs]
    if all(type(rule) in ARRAY_RULES for rule in rules):
        found: Any = [rule.weight(ratio, advantage, kl) for rule in rules]  # type: ignore[arg-type]
        return reduce(np.minimum, found) if found else 1.0
    known: Any = None if kl is None else torch.from_numpy(kl)
    weight: Any = weigh(rules, torch.from_numpy(ratio), torch.from_numpy(advantage), lambda: known)
    return weight.numpy()


def strength(limit: KLLimit, kl: Array | None) -> Array | float:
    """``limit.strength`` of arrays [B]."""
    return limit.strength(lambda: torch.from_numpy(kl)).numpy()
