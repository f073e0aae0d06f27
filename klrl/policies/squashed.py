"""What SAC needs beside the other networks: two critics evaluated as one, an actor whose noise depends on the state."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from klrl.policies.distributions import DiagonalNormal
from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.networks import Activation, Array, Network, Tangent, Torso

_LOG_STD = (-20.0, 2.0)  # where the logarithm of the standard deviation is cut off, as in SB3


class TwinCritic(nn.Module):
    """Two critics Q(s, a) of one shape, their weights stacked, so that each layer is one product: to [2, B, outputs].

    ``action_width`` 0: discrete actions, one output for each. The convolutions of image observations are shared.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        action_width: int,
        hidden_sizes: Sequence[int],
        outputs: int,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.torso = Torso(encoder, rng)
        sizes = [self.torso.width + action_width, *hidden_sizes, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = 1 / math.sqrt(a)  # torch's own initialisation of a linear layer
            self.weights.append(nn.Parameter((2 * torch.rand(2, a, b, generator=rng) - 1) * bound))
            self.biases.append(nn.Parameter((2 * torch.rand(2, 1, b, generator=rng) - 1) * bound))

    def forward(self, inputs: Inputs, *action: Tensor) -> Tensor:
        return self._layers(self.torso(inputs, *action))[-1]

    def linearize(
        self, inputs: Inputs, *action: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], None], Callable[[Tensor], Tensor]]:
        """The values [2, B, outputs] as data, and two functions of a gradient with respect to them.

        The first adds the gradient in the weights to their ``.grad``; the second returns that in the action, [B, d],
        and leaves the weights alone.
        """
        images = bool(self.torso.image_keys)
        with torch.set_grad_enabled(images):
            seen = self.torso(inputs, *action)
        layers = self._layers(seen.detach())

        def pull(grad: Tensor) -> None:
            for i in range(len(self.weights) - 1, -1, -1):
                weight, bias = self.weights[i], self.biases[i]
                bias.grad += grad.sum(1, keepdim=True)
                weight.grad.baddbmm_(layers[i].mT, grad)
                if i > 0 or images:
                    grad = _back(grad, weight)
                if i > 0:
                    grad = torch.ops.aten.threshold_backward(grad, layers[i], 0.0)
            if images:
                seen.backward(grad.sum(0))

        def to_action(grad: Tensor) -> Tensor:
            for i in range(len(self.weights) - 1, 0, -1):
                grad = torch.ops.aten.threshold_backward(_back(grad, self.weights[i]), layers[i], 0.0)
            return (grad @ self.weights[0][:, -action[0].shape[-1] :].mT).sum(0)

        return layers[-1], pull, to_action

    def _layers(self, x: Tensor) -> list[Tensor]:
        """Each layer's input, the first [2, B, F], and the output at the end."""
        layers = [x.expand(2, *x.shape)]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, layers[-1], weight)
            layers.append(x.relu_() if i < len(self.weights) - 1 else x)
        return layers


def _back(grad: Tensor, weight: Tensor) -> Tensor:
    """A layer's gradient in its input; the product of a column and a row is faster as that of two numbers each."""
    return grad * weight.mT if grad.shape[-1] == 1 else grad @ weight.mT


class CorrelatedNoise:
    """Standard normal noise for each environment, correlated with the one before: x' = c x + sqrt(1 - c^2) n.

    Independent noise averages out over the many steps that some tasks need in one direction; each single action has the
    policy's distribution either way. (Eberhard et al. 2023 study such noise; theirs is pink.)
    """

    def __init__(self, rng: np.random.Generator, correlation: float) -> None:
        self.rng, self.correlation = rng, correlation
        self.last: Array | None = None

    def standard_normal(self, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        """The next noise; it begins anew where ``shape`` is not that of the last."""
        noise: Array = self.rng.standard_normal(shape, dtype=dtype)
        if self.correlation > 0 and self.last is not None and self.last.shape == shape:
            noise = self.correlation * self.last + math.sqrt(1 - self.correlation**2) * noise
        self.last = noise
        return noise

    def state_dict(self) -> dict[str, Any]:
        return {"last": None if self.last is None else torch.from_numpy(self.last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = None if state["last"] is None else state["last"].numpy()

    def uniform(self, shape: tuple[int, ...]) -> Array:
        """The next noise through the normal's distribution function: uniform on -1 to 1."""
        result: Array = torch.erf(torch.from_numpy(self.standard_normal(shape)) / math.sqrt(2)).numpy()
        return result


class SquashedActor(nn.Module):
    """The policy of a Box: tanh of a normal whose mean and log std are both functions of the state.

    ``head`` gives the normal, whose KL is the policy's, as tanh is invertible. Actions are in (-1, 1).
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        dimensions: int,
        hidden_sizes: Sequence[int],
        activation: Activation,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.network = Network(encoder, hidden_sizes, 2 * dimensions, activation, 1.0, rng)
        self.dimensions = dimensions

    def forward(self, inputs: Inputs) -> DiagonalNormal:
        return self.head(self.network(inputs))

    def head(self, output: Tensor) -> DiagonalNormal:
        """The network's outputs [B, 2d] as a normal before tanh."""
        mean, log_std = output.tensor_split(2, dim=-1)
        return DiagonalNormal(mean, log_std.clamp(*_LOG_STD))

    def linearize(
        self, inputs: Inputs
    ) -> tuple[DiagonalNormal, Callable[[Tangent], tuple[Tensor, ...]], Callable[[Tensor, Tensor], None]]:
        """The normal as data, with its Jacobian in the weights as two functions, as ``Actor.linearize`` has it."""
        output, push, pull = self.network.linearize(inputs)
        log_std = output[:, self.dimensions :]
        inside = (log_std >= _LOG_STD[0]) & (log_std <= _LOG_STD[1])

        def pushforward(tangent: Tangent) -> tuple[Tensor, ...]:
            to_mean, to_log_std = push(tangent).tensor_split(2, dim=-1)
            return to_mean, to_log_std * inside

        def pullback(to_mean: Tensor, to_log_std: Tensor) -> None:
            pull(torch.cat([to_mean, to_log_std * inside], dim=-1))

        return self.head(output), pushforward, pullback

    def act(self, output: Array, rng: CorrelatedNoise | None) -> Array:
        """Actions [B, d] in [-1, 1] from the network's outputs, sampled with ``rng``, or tanh of the mean."""
        mean, log_std = output[:, : self.dimensions], output[:, self.dimensions :]
        if rng is None:
            return np.tanh(mean)
        noise: Any = rng.standard_normal(mean.shape, dtype=np.float32)
        return np.tanh(mean + noise * np.exp(log_std.clip(*_LOG_STD)))
