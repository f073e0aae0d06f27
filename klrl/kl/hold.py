"""Rules of single states for a loss of any form: a policy whose gradient is weighed in each state on the way back."""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributions as td
from torch.autograd.function import once_differentiable

from klrl.kl.divergence import Product, kl, reverse_kl
from klrl.kl.measure import Direction
from klrl.kl.parameters import map_parameters, parameters_of
from klrl.kl.rules import StateRule

D = TypeVar("D", bound=td.Distribution)


def hold_states(old: td.Distribution, new: D, rules: Iterable[StateRule], direction: Direction = "forward") -> D:
    """``new`` as it is, but for its gradient: in each state, what a loss of it sends back is multiplied by the rules.

        new = hold_states(old, policy(obs), [Gate(0.05)])
        loss(new).backward()

    With g the gradient of the loss in the parameters of a state's distribution (of a Categorical, in its logits), and k
    that of the state's KL in the limited direction, a step down the loss takes the state further where <g, k> < 0. The
    least ``factor`` of the rules counts, and 1 of a rule that has none, such as ``Project``. A loss may weigh its
    states as it likes.

    Raises ValueError for a rule about a ratio, which has a meaning for a surrogate alone, where ``old`` and ``new`` do
    not have batch shape [B], and as ``klrl.kl.kl`` does.
    """
    rules = [rule for rule in rules if rule.weighs]
    for rule in rules:
        if type(rule).factor is StateRule.factor:
            raise ValueError(f"{type(rule).__name__} is about a surrogate's ratio: KLLimit.weight takes it")
    if not rules:
        return new
    if len(new.batch_shape) != 1:
        raise ValueError(f"the policy has batch shape {tuple(new.batch_shape)}, not [B]: wrap it in joint(...)")
    with torch.enable_grad():
        leaf, leaves = as_leaves(new)
        divergence = (kl if direction == "forward" else reverse_kl)(old, leaf)
        slopes = torch.autograd.grad(divergence.sum(), leaves)
    reached = divergence.detach()
    outward = [k if of is None else of(k) for k, of in zip(slopes, _outwards(leaf), strict=True)]

    def factors(gradient: Iterable[Tensor]) -> Tensor:
        parts = [g * k for g, k in zip(gradient, outward, strict=True)]
        along = torch.stack([part.flatten(1).sum(1) if part.dim() > 1 else part for part in parts]).sum(0)
        further = ~(along >= 0) | reached.isinf()  # an infinite KL has no slope to go by
        return reduce(torch.minimum, [rule.factor(reached, further) for rule in rules])

    held = iter(_Weighed.apply(factors, *parameters_of(new)))  # type: ignore[no-untyped-call]
    return map_parameters(new, lambda _: next(held))


def as_leaves(dist: D) -> tuple[D, list[Tensor]]:
    """``dist`` on detached parameters that ask for gradients, and those, in order."""
    leaves: list[Tensor] = []  # what parameters_of gives of a Beta is a view that its KL does not read

    def detached(parameter: Tensor) -> Tensor:
        leaves.append(parameter.detach().requires_grad_())
        return leaves[-1]

    return map_parameters(dist, detached), leaves


def _outwards(dist: Any) -> list[Callable[[Tensor], Tensor] | None]:
    """What a ``td.Categorical`` makes of the KL's slope in its parameters, each; None for others, which leave it.

    It normalised its logits when it was made, so that a loss sends back a gradient g which is still to lose its part
    along the probabilities p: what reaches the network is g - p sum(g), or, where it was given p itself, in logits that
    p is the softmax of, p g - p sum(p g). Instead of g, the other factor of the product loses it.
    """
    if isinstance(dist, Product):
        return [outward for part in dist.parts for outward in _outwards(part)]
    if isinstance(dist, td.Independent | td.TransformedDistribution):
        return _outwards(dist.base_dist)
    if isinstance(dist, td.MixtureSameFamily):
        return _outwards(dist.mixture_distribution) + _outwards(dist.component_distribution)
    if isinstance(dist, td.OneHotCategorical):
        return _outwards(dist._categorical)
    if isinstance(dist, td.Categorical):
        p = dist.probs.detach()
        if dist._param is dist.__dict__.get("logits"):
            return [lambda k: k - (k * p).sum(-1, True)]
        return [lambda k: p * (p * k - (p * p * k).sum(-1, True))]
    return [None] * len(parameters_of(dist))


class _Weighed(torch.autograd.Function):
    """Parameters as they are; each state's gradient in all of them times what ``factors`` says of that gradient."""

    @staticmethod
    def forward(ctx: Any, factors: Callable[[Iterable[Tensor]], Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.factors = factors
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        factors = ctx.factors(gradient)
        return None, *(factors.view(-1, *[1] * (g.dim() - 1)).to(g.dtype) * g for g in gradient)
