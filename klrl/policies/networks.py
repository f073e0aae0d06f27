"""Networks: an MLP over encoded observations (after convolutions for images), the policy and its head, the critic."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from klrl.policies.distributions import Categoricals, DiagonalNormal, PolicyDistribution
from klrl.policies.encoder import Inputs, ObservationEncoder

Activation = Literal["tanh", "relu"]
Array = np.ndarray[Any, Any]
Tangent = Mapping[Tensor, Tensor]  # a direction in weight space: for each weight, a tensor of its shape
Linearized = tuple[Tensor, Callable[[Tangent], Tensor], Callable[[Tensor], None]]
_IMAGE_FEATURES = 512
_UNBOUNDED = 1e9  # bounds further apart than this stand for "no bounds", as float32's largest numbers often do


class MLP(nn.Module):
    """Linear layers with an activation between them: x [B, inputs] to [B, outputs].

    Beside ``forward``, the function that autograd differentiates, there are two forms of it for the two places where
    the cost of many small calls would exceed that of the arithmetic: ``on_host`` for acting, and ``linearize``
    for learning.
    """

    def __init__(self, sizes: Sequence[int], activation: Activation, output_gain: float, rng: torch.Generator) -> None:
        super().__init__()
        gains = [2**0.5] * (len(sizes) - 2) + [output_gain]
        self.linears = [linear(a, b, g, rng) for a, b, g in zip(sizes, sizes[1:], gains, strict=False)]
        self.layers = nn.ModuleList(self.linears)
        self.activation = activation
        self._host: tuple[int, list[tuple[Array, Array]]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.linearize(x)[0]  # in place where it can be
        for layer in self.linears[:-1]:
            x = layer(x)
            x = torch.tanh(x) if self.activation == "tanh" else torch.relu(x)
        return self.linears[-1](x)

    def linearize(self, x: Tensor) -> Linearized:
        """The output as data, with J, the Jacobian in the weights at this x, as two functions.

        The first takes a direction in weight space, a tensor for each weight, to J v [B, outputs]; the second adds
        J^T g to the weights' ``.grad`` for a gradient g [B, outputs]. The derivatives are written out: a few calls per
        layer and no graph. Call all three under ``torch.no_grad``. The weights need a ``.grad``, as ``FlatParameters``
        gives them; x gets no gradient.
        """
        inputs = [x]
        for layer in self.linears[:-1]:
            x = torch.addmm(layer.bias, x, layer.weight.t())
            inputs.append(x.tanh_() if self.activation == "tanh" else x.relu_())
        output = torch.addmm(self.linears[-1].bias, x, self.linears[-1].weight.t())

        def pushforward(tangent: Tangent) -> Tensor:
            moved: Tensor | None = None
            for i, layer in enumerate(self.linears):
                weight, bias = tangent[layer.weight], tangent[layer.bias]
                if moved is not None:
                    moved = _back(moved, inputs[i], self.activation) @ layer.weight.t()
                direct = torch.addmm(bias, inputs[i], weight.t())
                moved = direct if moved is None else moved.add_(direct)
            assert moved is not None
            return moved

        def pullback(grad: Tensor) -> None:
            for i in range(len(self.linears) - 1, -1, -1):
                weight, bias = self.linears[i].weight, self.linears[i].bias
                assert weight.grad is not None
                assert bias.grad is not None
                bias.grad += grad.sum(0)
                weight.grad.addmm_(grad.t(), inputs[i])
                if i > 0:
                    grad = _back(grad @ weight, inputs[i], self.activation)

        return output, pushforward, pullback

    def on_host(self, x: Array) -> Array:
        """The forward pass on views of the weights, which must lie in CPU memory."""
        first = self.linears[0].weight
        if self._host is None or self._host[0] != first.data_ptr():  # the weights lie elsewhere than they did
            views = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in self.linears]
            self._host = first.data_ptr(), views
        views = self._host[1]
        last = len(views) - 1
        for i, (weight, bias) in enumerate(views):
            x = x @ weight
            x += bias
            if i < last:
                x = np.tanh(x, out=x) if self.activation == "tanh" else np.maximum(x, 0.0, out=x)
        return x


def _back(grad: Tensor, output: Tensor, activation: Activation) -> Tensor:
    """``grad`` times the activation's derivative, which follows from its output; forward it is the same product."""
    if activation == "tanh":
        return torch.ops.aten.tanh_backward(grad, output)
    return torch.ops.aten.threshold_backward(grad, output, 0.0)


class Torso(nn.Module):
    """Encoded observations as one vector [B, width]: what a convolutional net sees in each image, then the numbers."""

    def __init__(self, encoder: ObservationEncoder, rng: torch.Generator) -> None:
        super().__init__()
        self.image_keys = [f"image {key}" for key in encoder.images]
        self.image_nets = nn.ModuleList(image_net(shape, rng) for shape in encoder.images.values())
        self.width = encoder.features + _IMAGE_FEATURES * len(self.image_keys)

    def forward(self, inputs: Inputs, *more: Tensor) -> Tensor:
        """``more``: further numbers to append, each [B, d]."""
        nets = zip(self.image_nets, self.image_keys, strict=True)
        parts = [net(inputs[key].float() / 255.0) for net, key in nets]
        parts += [inputs["vector"], *more] if "vector" in inputs else more
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class Network(nn.Module):
    """Encoded observations to outputs [B, outputs]: an MLP on a torso."""

    def __init__(
        self,
        encoder: ObservationEncoder,
        hidden_sizes: Sequence[int],
        outputs: int,
        activation: Activation,
        output_gain: float,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.torso = Torso(encoder, rng)
        self.mlp = MLP([self.torso.width, *hidden_sizes, outputs], activation, output_gain, rng)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.mlp(self.torso(inputs)) if self.torso.image_keys else self.mlp(inputs["vector"])

    def linearize(self, inputs: Inputs) -> Linearized:
        """As ``MLP.linearize``; with images by autograd."""
        if not self.torso.image_keys:
            return self.mlp.linearize(inputs["vector"])
        weights = list(self.parameters())
        with torch.enable_grad():
            output: Tensor = self(inputs)

        @cache
        def transposed() -> tuple[Tensor, tuple[Tensor, ...]]:
            with torch.enable_grad():
                u = torch.zeros_like(output, requires_grad=True)
                return u, torch.autograd.grad(output, weights, u, create_graph=True)

        def pushforward(tangent: Tangent) -> Tensor:
            u, pulled = transposed()  # J^T u is linear in u: the transpose of that map is J
            return torch.autograd.grad(pulled, u, [tangent[weight] for weight in weights], retain_graph=True)[0]

        return output.detach(), pushforward, lambda grad: output.backward(grad, retain_graph=True)  # type: ignore[no-untyped-call]


class Actor(nn.Module):
    """The policy: encoded observations to a distribution over actions.

    Box actions are scaled to their bounds where these are finite: the network's output 0 is the middle, 1 the upper
    bound, so that one initial standard deviation suits every environment. KL does not depend on that scale.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        space: spaces.Space[Any],
        hidden_sizes: Sequence[int],
        activation: Activation,
        log_std_init: float,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.continuous = isinstance(space, spaces.Box)
        if isinstance(space, spaces.Box):
            low, high = (torch.as_tensor(x, dtype=torch.float64).flatten() for x in (space.low, space.high))
            half = (high - low) / 2
            bounded = half < _UNBOUNDED
            self.center = nn.Buffer(torch.where(bounded, (high + low) / 2, 0.0).float())
            self.scale = nn.Buffer(torch.where(bounded & (half > 0), half, 1.0).float())
            self.log_std = nn.Parameter(log_std_init + self.scale.log())
            outputs = len(low)
        else:
            sizes = choices(space)
            self.shape = (len(sizes), max(sizes))
            # Where the sizes differ, every categorical is padded to the largest with forbidden choices.
            self.padded = len(set(sizes)) > 1
            starts = np.cumsum([0, *sizes[:-1]])
            index = [[start + min(i, n - 1) for i in range(max(sizes))] for start, n in zip(starts, sizes, strict=True)]
            self.index = nn.Buffer(torch.tensor(index).flatten())
            self.padding = nn.Buffer(torch.tensor([[i >= n for i in range(max(sizes))] for n in sizes]))
            outputs = sum(sizes)
        self.network = Network(encoder, hidden_sizes, outputs, activation, 0.01, rng)

    def forward(self, inputs: Inputs) -> PolicyDistribution:
        return self.head(self.network(inputs))

    def head(self, output: Tensor) -> PolicyDistribution:
        """The network's outputs [B, outputs] as a distribution."""
        if self.continuous:
            mean = torch.addcmul(self.center, output, self.scale)
            return DiagonalNormal(mean, self.log_std.expand_as(mean))
        if self.padded:
            logits = output[:, self.index].view(-1, *self.shape)
            return Categoricals(logits.masked_fill(self.padding, float("-inf")))
        return Categoricals(output.view(-1, *self.shape))

    def linearize(
        self, inputs: Inputs
    ) -> tuple[PolicyDistribution, Callable[[Tangent], tuple[Tensor, ...]], Callable[..., None]]:
        """The policy as data, with its Jacobian in the weights as two functions, as ``MLP.linearize`` has it.

        A direction in weight space goes to one in the distribution's parameters (logits, or mean and log_std), one
        tensor for each; gradients with respect to those parameters go to the weights' ``.grad``.
        """
        output, push_network, pull_network = self.network.linearize(inputs)

        def pushforward(tangent: Tangent) -> tuple[Tensor, ...]:
            moved = push_network(tangent)
            if self.continuous:
                moved = moved * self.scale
                return moved, tangent[self.log_std].expand_as(moved)
            if self.padded:
                return (moved[:, self.index].view(-1, *self.shape).masked_fill(self.padding, 0.0),)
            return (moved.view(-1, *self.shape),)

        def pullback(*gradient: Tensor) -> None:
            if self.continuous:
                to_mean, to_log_std = gradient
                assert self.log_std.grad is not None
                self.log_std.grad += to_log_std.sum(0)
                pull_network(to_mean * self.scale)
            elif self.padded:
                pull_network(torch.zeros_like(output).index_add_(1, self.index, gradient[0].flatten(1)))
            else:
                pull_network(gradient[0].flatten(1))

        return self.head(output), pushforward, pullback

    def act(self, output: Array, rng: np.random.Generator | None) -> Array:
        """Actions [B, d] from the network's outputs, sampled with ``rng``, or the mode where it is None.

        The same distribution as ``head``, in NumPy: a handful of numbers per step, where torch's calls cost more
        than their arithmetic.
        """
        if self.continuous:
            center, scale, log_std = (x.detach().cpu().numpy() for x in (self.center, self.scale, self.log_std))
            mean = center + output * scale
            if rng is None:
                return mean
            noise: Array = rng.standard_normal(mean.shape, dtype=np.float32)
            return mean + noise * np.exp(log_std)
        logits = output[:, self.index.cpu().numpy()] if self.padded else output
        logits = logits.reshape(-1, *self.shape)
        if self.padded:
            logits = np.where(self.padding.cpu().numpy(), -np.inf, logits)
        if rng is not None:  # the Gumbel-max rule: -log of an exponential is a standard Gumbel
            logits = logits - np.log(rng.standard_exponential(logits.shape))
        return logits.argmax(axis=-1)


class Critic(nn.Module):
    """The state value: encoded observations to V(s), shape [B]."""

    def __init__(
        self,
        encoder: ObservationEncoder,
        hidden_sizes: Sequence[int],
        activation: Activation,
        rng: torch.Generator,
    ) -> None:
        super().__init__()
        self.network = Network(encoder, hidden_sizes, 1, activation, 1.0, rng)

    def forward(self, inputs: Inputs) -> Tensor:
        value: Tensor = self.network(inputs)
        return value.squeeze(-1)

    def linearize(self, inputs: Inputs) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The values [B] as data, and the function that takes a gradient with respect to them to ``.grad``."""
        output, _, pull_network = self.network.linearize(inputs)
        return output.squeeze(-1), lambda grad: pull_network(grad.unsqueeze(-1))


def choices(space: spaces.Space[Any]) -> list[int]:
    """How many choices each categorical of a discrete action space has."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.flatten()]
    assert space.shape is not None
    return [2] * int(np.prod(space.shape))


def linear(inputs: int, outputs: int, gain: float, rng: torch.Generator) -> nn.Linear:
    """A linear layer with orthogonal weights (Saxe et al. 2014) times ``gain`` and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=rng)
    nn.init.zeros_(layer.bias)
    return layer


def image_net(shape: tuple[int, int, int], rng: torch.Generator) -> nn.Sequential:
    """The convolutional net of Mnih et al. (2015) for images [C, H, W], to 512 features."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for out, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
        layer = nn.Conv2d(channels, out, kernel, stride)
        nn.init.orthogonal_(layer.weight, 2**0.5, generator=rng)
        layer.bias.data.zero_()  # type: ignore[union-attr]
        layers += [layer, nn.ReLU()]
        channels = out
    layers.append(nn.Flatten())
    with torch.no_grad():
        flat = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, linear(flat, _IMAGE_FEATURES, 2**0.5, rng), nn.ReLU())
