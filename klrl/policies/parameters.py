"""A module's weights as views of one vector, with Adam on that vector.

Snapshot, rollback, projection, the gradient's norm and the optimizer's step are then one operation each instead of
one per weight tensor, which for the small networks of control tasks is most of an update's time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from klrl.errors import UsageError

_TENSORS = ("flat", "first_moment", "second_moment", "count")
BETAS = (0.9, 0.999)  # of Adam, as everywhere


Push = Callable[[Tensor], tuple[Tensor, ...]]
Pull = Callable[[Sequence[Tensor]], Tensor]


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
        self.sync()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.sync()  # a copy's weights are tensors of their own, and no views of its vector

    def sync(self) -> None:
        """Take in what was done to the module since: weights that were moved, copied, replaced or frozen.

        An optimizer of one's own, ``load_state_dict``, a deep copy, pickle and a new layer of the same shape all go on
        from the weights that they left. Raises UsageError that names the parameter where shape, number, dtype or device
        are others.
        """
        now, views = dict(self.module.named_parameters()), self.unflatten(self.flat)
        if now.keys() != self.parameters.keys():
            odd = sorted(now.keys() ^ self.parameters.keys())[0]
            raise UsageError(f"{self.name}.{odd} was added or removed after the agent was made: make a new agent")
        for name, parameter in now.items():
            view = views[name]
            for what in ("shape", "dtype", "device"):
                mine, theirs = getattr(view, what), getattr(parameter, what)
                if mine != theirs:
                    raise UsageError(f"{self.name}.{name} has {what} {theirs}, and was made with {mine}")
            if parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.detach())
                parameter.data = view
        self.parameters = now
        frozen = [not p.requires_grad for p in now.values()]
        if any(frozen):
            sizes = torch.tensor([p.numel() for p in now.values()])
            self.frozen = torch.tensor(frozen).repeat_interleave(sizes).to(self.flat.device)
            self.first_moment[self.frozen] = self.second_moment[self.frozen] = 0.0
        else:
            self.frozen = None

    @property
    def optimizer(self) -> list[Tensor]:
        """Adam's state."""
        return [self.first_moment, self.second_moment, self.count]

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector [P] as views of its pieces, in the shapes of the parameters that bear their names."""
        pieces = torch.split(flat, [p.numel() for p in self.parameters.values()])
        return {name: piece.view(p.shape) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)}

    def adam_step(self, gradient: Tensor, learning_rate: Tensor) -> None:
        """One step of Adam along ``gradient`` [P]; ``learning_rate``: a scalar tensor on the same device."""
        self.count.add_(1)
        if self.frozen is not None:
            gradient = gradient.masked_fill(self.frozen, 0.0)
        torch._fused_adam_(
            [self.flat],
            [gradient],
            [self.first_moment],
            [self.second_moment],
            [],
            [self.count],
            lr=learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )

    def state_dict(self) -> dict[str, Any]:
        """Copies of weights and optimizer state, for ``restore`` and ``load_state_dict``."""
        self.sync()
        # A module's buffers are not learned, but may be random, so that a new module has others.
        buffers = {f"buffer {name}": buffer.clone() for name, buffer in self.module.named_buffers()}
        return {**{name: getattr(self, name).clone() for name in _TENSORS}, **buffers}

    def restore(self, before: dict[str, Any]) -> None:
        """Put weights and optimizer back, bit for bit, as ``state_dict`` gave them."""
        for name in _TENSORS:
            getattr(self, name).copy_(before[name])
        for name, buffer in self.module.named_buffers():
            buffer.copy_(before[f"buffer {name}"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``'s result. Raises ValueError where the number of weights differs."""
        self.sync()
        if any(state[name].shape != getattr(self, name).shape for name in _TENSORS):
            raise ValueError(f"the network has {self.flat.numel()} weights, the saved one {state['flat'].numel()}")
        self.restore(state)


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
    found = torch.autograd.grad(outputs, wanted, weighted, retain_graph=retain_graph, allow_unused=True)
    known = dict(zip(map(id, wanted), found, strict=True))
    parts = [(p, known.get(id(p))) for p in weights]
    return torch.cat([(torch.zeros_like(p) if part is None else part).flatten() for p, part in parts])


def jacobian(outputs: Sequence[Tensor], group: FlatParameters) -> tuple[Push, Pull]:
    """The Jacobian J of ``outputs`` in the weights, from the graph that they carry, as two functions.

    The first takes a direction [P] in weight space to J v, one tensor for each output; the second takes a gradient for
    each output to J^T g, [P].
    """
    weights = {name: p for name, p in group.parameters.items() if p.requires_grad}
    with torch.enable_grad():
        # J^T u is linear in u, and the transpose of that map is J.
        probes = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled = torch.autograd.grad(outputs, list(weights.values()), probes, create_graph=True)

    def push(direction: Tensor) -> tuple[Tensor, ...]:
        pieces = group.unflatten(direction)
        return torch.autograd.grad(pulled, probes, [pieces[name] for name in weights], retain_graph=True)

    return push, lambda weighted: gradients(outputs, group, weighted=weighted, retain_graph=True)


def clip_(gradient: Tensor, max_norm: float) -> Tensor:
    """Scale ``gradient`` [P] down to ``max_norm``, in place, where it is longer; its norm before, a scalar tensor."""
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_((max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm
