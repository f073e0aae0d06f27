"""The gradients of PPO's losses and of TRPO's critic for plain MLPs on the CPU, written out.

The same numbers as autograd on ``policy_loss`` and ``value_loss`` gives, with a few calls per layer and no graph. Where
it does not apply (images, a network of one's own, frozen weights, CUDA) the agents use autograd.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from klrl.agents.on_policy import Batch
from klrl.kl import KLLimit
from klrl.kl.closed_form import (
    categorical_kl_of,
    categorical_kl_to_new,
    categorical_kl_to_old,
    normal_kl,
    normal_kl_gradient,
)
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.encoder import Inputs
from klrl.policies.heads import CategoricalHead, NormalHead
from klrl.policies.jacobian import Pull, Push
from klrl.policies.networks import Critic, Network, tanh_
from klrl.policies.parameters import FlatParameters
from klrl.policies.policy import Policy


def applies(network: Any, *groups: FlatParameters) -> bool:
    """Whether ``network`` is a plain MLP whose weights, those of ``groups``, are on the CPU and none is frozen."""
    plain = type(network) is Network and not network.torso.image_keys and network.mlp.is_plain
    return plain and all(group.frozen is None and group.flat.device.type == "cpu" for group in groups)


class FusedMLP:
    """An MLP's forward pass that keeps what the way back needs; made anew for each update."""

    def __init__(self, network: Network) -> None:
        self.layers: list[Any] = [(layer.weight, layer.bias) for layer in network.mlp.layers]
        self.tanh = network.mlp.activation == "tanh"
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs] to [B, outputs]. Call it under ``torch.no_grad``."""
        *hidden, (weight, bias) = self.layers
        self.inputs = [x]
        for hidden_weight, hidden_bias in hidden:
            x = torch.addmm(hidden_bias, x, hidden_weight.t())
            self.inputs.append(tanh_(x) if self.tanh else x.relu_())
        return torch.addmm(bias, x, weight.t())

    def backward(self, grad: Tensor) -> list[Tensor]:
        """The gradient in each weight and bias, in the module's order, of one [B, outputs] in the last output."""
        found: list[Tensor] = []
        for i in range(len(self.layers) - 1, -1, -1):
            found += (grad.sum(0), (grad.t() @ self.inputs[i]).flatten())
            if i > 0:
                grad = self._through(grad @ self.layers[i][0], i)
        return found[::-1]

    def push(self, direction: Iterator[Tensor]) -> Tensor:
        """J v [B, outputs]: how the last output moves where each weight and bias moves along ``direction``'s next."""
        moved = torch.zeros(())
        for i, (weight, _) in enumerate(self.layers):
            along, bias = next(direction), next(direction)
            direct = torch.addmm(bias, self.inputs[i], along.t())
            moved = direct if i == 0 else torch.addmm(direct, self._through(moved, i), weight.t())
        return moved

    def _through(self, grad: Tensor, i: int) -> Tensor:
        """``grad`` times the derivative of the activation that gave layer i's input, which follows from that."""
        if self.tanh:
            return torch.ops.aten.tanh_backward(grad, self.inputs[i])
        return torch.ops.aten.threshold_backward(grad, self.inputs[i], 0.0)


class FusedPolicy(FusedMLP):
    """The policy's network and head, with the gradient of ``policy_loss``."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.network)  # type: ignore[arg-type]
        self.head: Any = policy.head

    def gradient(self, batch: Batch, limit: KLLimit, ent_coef: float) -> tuple[Tensor, list[Tensor]]:
        """-E[ratio A], and the gradient of the whole policy loss in each of the policy's parameters."""
        output = self.forward(batch.inputs["vector"])
        new = self.head(output)
        ratio = torch.exp(new.log_prob(batch.action) - batch.log_prob)
        surrogate = ratio * batch.advantage  # d ratio = ratio * d log pi
        forward, reads_kl = limit.direction == "forward", any(rule.reads_kl and rule.weighs for rule in limit.rules)
        near = _kl(batch.old, new, forward) if reads_kl else None
        to_log_prob = -batch.weight * surrogate * limit.weight(ratio, batch.advantage, batch.old, new, near)
        to_kl = batch.weight * limit.strength(batch.old, new) if limit.penalises else None
        to_entropy = -ent_coef * batch.weight if ent_coef > 0 else None
        slopes = _normal if isinstance(new, DiagonalNormal) else _categorical
        gradient = slopes(new, batch, to_log_prob, to_kl, to_entropy, forward)
        return -(batch.weight @ surrogate), self._to_parameters(output, gradient)

    def _to_parameters(self, output: Tensor, gradient: Sequence[Tensor]) -> list[Tensor]:
        if isinstance(self.head, NormalHead):
            return [*self.backward(gradient[0] * self.head.scale), gradient[1].sum(0)]
        flat = gradient[0].flatten(1)
        if self.head.padded:
            flat = torch.zeros_like(output).index_add_(1, self.head.index, flat)
        return self.backward(flat)

    def linearize(self, inputs: Inputs, params: FlatParameters) -> tuple[Any, Push, Pull]:
        """The policy at encoded observations, and its parameters' Jacobian in the weights as ``jacobian`` has it."""
        output = self.forward(inputs["vector"])

        def push(direction: Tensor) -> tuple[Tensor, ...]:
            pieces = iter(params.unflatten(direction).values())
            moved = self.push(pieces)
            if isinstance(self.head, NormalHead):
                moved = moved * self.head.scale
                return moved, next(pieces).expand_as(moved)
            if self.head.padded:
                moved = moved[:, self.head.index].masked_fill(self.head.padding.flatten(), 0.0)
            return (moved.view(-1, *self.head.shape),)

        return self.head(output), push, lambda gradient: torch.cat(self._to_parameters(output, gradient))


class FusedCritic(FusedMLP):
    """The critic's network, with the gradient of ``value_loss``."""

    def __init__(self, critic: Critic) -> None:
        super().__init__(critic.network)  # type: ignore[arg-type]

    def gradient(self, batch: Batch, clip_range_vf: float, vf_coef: float) -> tuple[Tensor, list[Tensor]]:
        """E[(V - return)^2], and ``vf_coef`` times its gradient in each of the critic's parameters."""
        value = self.forward(batch.inputs["vector"]).squeeze(-1)
        error = value - batch.returns
        squared = error * error
        if clip_range_vf > 0:
            clipped = value.clamp(batch.value - clip_range_vf, batch.value + clip_range_vf) - batch.returns
            error = error * (squared >= clipped * clipped)
            squared = torch.maximum(squared, clipped * clipped)
        to_value = (2 * vf_coef) * batch.weight * error
        return batch.weight @ squared, self.backward(to_value.unsqueeze(-1))


def suits(policy: Policy, *groups: FlatParameters) -> bool:
    """Whether ``FusedPolicy`` serves ``policy``."""
    return type(policy.head) in (NormalHead, CategoricalHead) and applies(policy.network, *groups)


def _kl(old: Any, new: Any, forward: bool) -> Tensor:
    """The KL of each state, [B], for a rule to compare: ``klrl.kl.kl`` without its checks, and of categoricals in
    float32."""
    if not forward:
        old, new = new, old
    if isinstance(new, DiagonalNormal):
        return normal_kl(old.loc, old.log_std, new.loc, new.log_std).sum(-1)
    return categorical_kl_of(old.log_probs, new.log_probs).sum(-1)


def _categorical(
    new: MultiCategorical, batch: Batch, to_log_prob: Tensor, to_kl: Tensor | None, to_entropy: Tensor | None, fwd: bool
) -> tuple[Tensor, ...]:
    """d/d logits of sum_b to_log_prob * log pi(a) + to_kl * KL + to_entropy * H, each weight [B].

    Per categorical onehot(a) - p, the KL's own gradient, and -p * (log p + H).
    """
    a, log_p = to_log_prob[:, None, None], new.log_probs
    p = log_p.exp()
    result = p * -a
    if to_kl is not None:
        to_new = (
            categorical_kl_to_new(batch.old.log_probs, log_p)
            if fwd
            else categorical_kl_to_old(log_p, batch.old.log_probs)
        )
        result += to_new * to_kl[:, None, None]
    if to_entropy is not None:
        finite = log_p.clamp_min(torch.finfo(p.dtype).min)
        result -= p * (finite - (p * finite).sum(-1, keepdim=True)) * to_entropy[:, None, None]
    index = batch.action.unsqueeze(-1)
    return (result.scatter_add_(-1, index, a.expand_as(index)),)


def _normal(
    new: DiagonalNormal, batch: Batch, to_log_prob: Tensor, to_kl: Tensor | None, to_entropy: Tensor | None, fwd: bool
) -> tuple[Tensor, ...]:
    """The same in mean and log_std: with z = (a - mu)/sigma (z/sigma, z^2 - 1), the KL's own gradient, and (0, 1)."""
    inverse_std = torch.exp(-new.log_std)
    a, z = to_log_prob[:, None], (batch.action - new.loc) * inverse_std
    to_mean, to_log_std = a * z * inverse_std, a * (z * z - 1)
    if to_kl is not None:
        k, old = to_kl[:, None], (batch.old.loc, batch.old.log_std)
        if fwd:
            kl_to_mean, kl_to_log_std, _ = normal_kl_gradient(*old, new.loc, new.log_std)
        else:
            minus, _, kl_to_log_std = normal_kl_gradient(new.loc, new.log_std, *old)
            kl_to_mean = -minus
        to_mean += k * kl_to_mean
        to_log_std += k * kl_to_log_std
    if to_entropy is not None:
        to_log_std += to_entropy[:, None]
    return to_mean, to_log_std
