"""A module's weights as views of one vector, with Adam on that vector.

Snapshot, rollback, projection, the gradient's norm and the optimizer's step are then one operation each instead of
one per weight tensor, which for the small networks of control tasks is most of an update's time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from klrl.errors import UsageError

_TENSORS = ("flat", "first_moment", "second_moment", "count")
_ADAM: Any = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "amsgrad": False, "maximize": False}


class FlatParameters:
    """The module's parameters as views of ``flat`` [P], and an Adam state beside it, all tensors.

    The module remains an ordinary one: ``sync`` takes in what others did to it. Parameters with ``requires_grad`` False
    do not move. Adam is Kingma and Ba (2015), algorithm 1, and equals torch.optim.Adam with the same eps.
    """

    def __init__(self, module: nn.Module, name: str, eps: float = 1e-5) -> None:
        """``name``: how the module is called in an error."""
        self.module, self.name, self.eps = module, name, eps
        self.parameters = dict(module.named_parameters())
        self.flat = torch.cat([p.detach().flatten() for p in self.parameters.values()])
        self.first_moment, self.second_moment = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.count = torch.zeros((), device=self.flat.device)
        self.frozen: Tensor | None = None
        self.views = self.unflatten(self.flat)
        self.sync()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.views = self.unflatten(self.flat)
        self.sync()  # a copy's weights are tensors of their own, and no views of its vector

    def sync(self) -> None:
        """Take in what was done to the module since: weights that were moved, copied, replaced or frozen.

        An optimizer of one's own, ``load_state_dict``, a deep copy, pickle and a new layer of the same shape all go on
        from the weights that they left. Raises UsageError that names the parameter where shape, number, dtype or device
        are others.
        """
        now = dict(self.module.named_parameters())
        if now.keys() != self.parameters.keys():
            odd = sorted(now.keys() ^ self.parameters.keys())[0]
            raise UsageError(f"{self.name}.{odd} was added or removed after the agent was made: make a new agent")
        for name, view in self.views.items():
            parameter = now[name]
            same = all(getattr(parameter, what) == getattr(view, what) for what in ("dtype", "shape"))
            if same and parameter.data_ptr() == view.data_ptr() and parameter.stride() == view.stride():
                continue
            for what in ("shape", "dtype", "device"):
                mine, theirs = getattr(view, what), getattr(parameter, what)
                if mine != theirs:
                    raise UsageError(f"{self.name}.{name} has {what} {theirs}, and was made with {mine}")
            view.copy_(parameter.detach().clone())  # which may be another view of the same vector
            parameter.data = view
        self.parameters, frozen = now, [not p.requires_grad for p in now.values()]
        self.frozen = None
        if any(frozen):
            parts = [torch.full_like(p, f, dtype=torch.bool) for p, f in zip(now.values(), frozen, strict=True)]
            self.frozen = torch.cat([part.flatten() for part in parts])
            self.first_moment[self.frozen] = self.second_moment[self.frozen] = 0.0

    @property
    def optimizer(self) -> list[Tensor]:
        """Adam's state."""
        return [self.first_moment, self.second_moment, self.count]

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector [P] as views of its pieces, in the shapes of the parameters that bear their names."""
        pieces = torch.split(flat, [p.numel() for p in self.parameters.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Copies of weights, buffers and optimizer."""
        self.sync()
        # A module's buffers are not learned, but may be random, so that a new module has others.
        buffers = {f"buffer {name}": buffer.clone() for name, buffer in self.module.named_buffers()}
        return {**{name: getattr(self, name).clone() for name in _TENSORS}, **buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put everything back, bit for bit. Raises ValueError where the number of weights differs."""
        self.sync()
        if any(state[name].shape != getattr(self, name).shape for name in _TENSORS):
            raise ValueError(f"the network has {self.flat.numel()} weights, the saved one {state['flat'].numel()}")
        for name in _TENSORS:
            getattr(self, name).copy_(state[name])
        for name, buffer in self.module.named_buffers():
            buffer.copy_(state[f"buffer {name}"])


def gradients(
    outputs: Tensor | Sequence[Tensor],
    *groups: FlatParameters,
    weighted: Sequence[Tensor] | None = None,
    retain_graph: bool = False,
) -> Tensor:
    """d outputs / d weights of all ``groups`` as one vector, zero where a weight is frozen or has no part in them.

    ``outputs``: a scalar, or tensors with a gradient for each in ``weighted``.
    """
    weights = [p for group in groups for p in group.parameters.values()]
    wanted = [p for p in weights if p.requires_grad]
    if not wanted:
        return torch.cat([torch.zeros_like(group.flat) for group in groups])
    found = iter(torch.autograd.grad(outputs, wanted, weighted, retain_graph=retain_graph, allow_unused=True))
    parts = [(p, next(found) if p.requires_grad else None) for p in weights]
    return torch.cat([(torch.zeros_like(p) if part is None else part).flatten() for p, part in parts])


def adam_step(gradient: Tensor, learning_rate: Tensor, *groups: FlatParameters) -> None:
    """One step of Adam with all ``groups`` and the first's eps, along ``gradient``: those of each in turn.

    learning_rate: a scalar tensor on their device, or one number for each group, [groups].
    """
    parts = torch.split(gradient, [group.flat.numel() for group in groups])
    if learning_rate.dim() > 0:
        for part, rate, group in zip(parts, learning_rate, groups, strict=True):
            adam_step(part, rate, group)
        return
    along = [p if g.frozen is None else p.masked_fill(g.frozen, 0.0) for g, p in zip(groups, parts, strict=True)]
    for group in groups:
        group.count.add_(1)
    flat, first, second, count = ([getattr(group, name) for group in groups] for name in _TENSORS)
    torch._fused_adam_(flat, along, first, second, [], count, lr=learning_rate, eps=groups[0].eps, **_ADAM)


def clip_(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale ``gradient`` [P] down to ``max_norm``, in place, where it is longer; its norm before, a scalar tensor."""
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_((max_norm / (norm + 1e-6)).clamp_max_(1.0))
    return norm
