"""Modules' weights as views of one vector, with Adam on that vector.

Snapshot, rollback, projection, the gradient's norm and the optimizer's step are then one operation each instead of
one per weight tensor, which for the small networks of control tasks is most of an update's time.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

_TENSORS = ("vector", "first_moment", "second_moment")


class FlatParameters:
    """The modules' parameters as views of ``vector``, their gradients as views of ``grad``, and an Adam state.

    ``parts[i]`` is where the i-th module lies in the vector. The modules keep working as before; move them to their
    device first, since a later ``module.to(...)`` would cut the views.
    Adam is Kingma and Ba (2015), algorithm 1, and equals torch.optim.Adam with the same betas and eps.
    """

    def __init__(self, *modules: nn.Module, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-5) -> None:
        sizes = [sum(p.numel() for p in module.parameters()) for module in modules]
        self.modules = modules
        self.parts = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
        parameters = [p for module in modules for p in module.parameters()]
        self.vector = torch.cat([p.detach().flatten() for p in parameters])
        self.grad = torch.zeros_like(self.vector)
        self.first_moment = torch.zeros_like(self.vector)
        self.second_moment = torch.zeros_like(self.vector)
        self.steps = [0] * len(modules)
        self.betas, self.eps = betas, eps
        start = 0
        for p in parameters:
            end = start + p.numel()
            p.data = self.vector[start:end].view(p.shape)
            p.grad = self.grad[start:end].view(p.shape)
            start = end

    def like(self, vector: Tensor, part: int) -> dict[Tensor, Tensor]:
        """``vector``, of the size of module ``part``, as views of its pieces, one for each of that module's weights."""
        parameters = list(self.modules[part].parameters())
        pieces = torch.split(vector, [p.numel() for p in parameters])
        return {p: piece.view(p.shape) for p, piece in zip(parameters, pieces, strict=True)}

    def zero_grad(self) -> None:
        """Set the gradient to 0, in place: autograd then accumulates into the views."""
        self.grad.zero_()

    def clip_grad(self, max_norm: float) -> Tensor:
        """Scale the gradient down to ``max_norm`` where it is longer; returns its norm before, a scalar tensor."""
        norm = torch.linalg.vector_norm(self.grad)
        self.grad.mul_((max_norm / (norm + 1e-6)).clamp_max(1.0))
        return norm

    def adam_step(self, learning_rate: float, only: int | None = None) -> None:
        """One step of Adam along ``grad``, of module ``only`` alone where given."""
        self.steps = [count + (only in (None, i)) for i, count in enumerate(self.steps)]
        if only is not None:
            self._adam(self.parts[only], self.steps[only], learning_rate)
            return
        # The parts differ in their count, and so in their bias correction, once one of them was restored alone.
        together = len(set(self.steps)) == 1
        for part, count in [(slice(None), self.steps[0])] if together else zip(self.parts, self.steps, strict=True):
            self._adam(part, count, learning_rate)

    def _adam(self, part: slice, count: int, learning_rate: float) -> None:
        beta1, beta2 = self.betas
        grad, first, second = self.grad[part], self.first_moment[part], self.second_moment[part]
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # Both bias corrections are folded into the step and into eps, which saves a pass over the vector.
        correction1, correction2 = 1 - beta1**count, math.sqrt(1 - beta2**count)
        # Dead units leave exact zeros, whose square roots take twenty times as long; 1e-37 is lost beside eps.
        denominator = second.add(1e-37).sqrt_().add_(self.eps * correction2)
        self.vector[part].addcdiv_(first, denominator, value=-learning_rate * correction2 / correction1)

    def state_dict(self) -> dict[str, Any]:
        """Copies of weights and optimizer state, for ``restore`` and ``load_state_dict``."""
        return {**{name: getattr(self, name).clone() for name in _TENSORS}, "steps": list(self.steps)}

    def restore(self, before: dict[str, Any], only: int | None = None) -> None:
        """Weights and optimizer as ``state_dict`` gave them, bit for bit; of module ``only`` alone where given."""
        for i in range(len(self.parts)) if only is None else [only]:
            part = self.parts[i]
            for name in _TENSORS:
                getattr(self, name)[part] = before[name][part]
            self.steps[i] = before["steps"][i]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the number of weights differs."""
        fits = all(state[name].shape == self.vector.shape for name in _TENSORS)
        if not fits or len(state["steps"]) != len(self.parts):
            raise ValueError(f"the network has {self.vector.numel()} weights, the saved one {state['vector'].numel()}")
        self.restore(state)
