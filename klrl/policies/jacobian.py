"""The Jacobian of a policy's parameters in its weights, as an operator: what a natural gradient needs of a network."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from klrl.policies.parameters import FlatParameters, gradients

Push = Callable[[Tensor], tuple[Tensor, ...]]
Pull = Callable[[Sequence[Tensor]], Tensor]


def jacobian(outputs: Sequence[Tensor], group: FlatParameters) -> tuple[Push, Pull]:
    """The Jacobian J of ``outputs`` in the weights, from the graph that they carry, as two functions.

    The first takes a direction [P] in weight space to J v, one tensor for each output; the second takes a gradient for
    each output to J^T g, [P].
    """
    weights = {name: p for name, p in group.parameters.items() if p.requires_grad}
    if not weights:  # all are frozen
        return lambda _: tuple(torch.zeros_like(output) for output in outputs), lambda _: torch.zeros_like(group.flat)
    with torch.enable_grad():
        # J^T u is linear in u, and the transpose of that map is J.
        probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled = torch.autograd.grad(outputs, list(weights.values()), probes, create_graph=True)

    def push(direction: Tensor) -> tuple[Tensor, ...]:
        pieces = group.unflatten(direction)
        return torch.autograd.grad(pulled, probes, [pieces[name] for name in weights], retain_graph=True)

    return push, lambda weighted: gradients(outputs, group, weighted=weighted, retain_graph=True)
