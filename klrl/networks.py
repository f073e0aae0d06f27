"""Networks: torsos over encoded observations, a policy head per action space, a critic."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from klrl.distributions import Categoricals, DiagonalNormal, PolicyDistribution
from klrl.observations import Inputs, ObservationEncoder

Activation = Literal["tanh", "relu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
_IMAGE_FEATURES = 512


class Torso(nn.Module):
    """Encoded observations to features [B, ``out``]: a convolutional net per image, then an MLP over everything."""

    def __init__(
        self, encoder: ObservationEncoder, hidden_sizes: Sequence[int], activation: Activation, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.image_nets = nn.ModuleDict({_key(k): image_net(shape, rng) for k, shape in encoder.images.items()})
        self.image_keys = list(encoder.images)
        self.has_vector = encoder.features > 0
        width = encoder.features + _IMAGE_FEATURES * len(self.image_keys)
        layers: list[nn.Module] = []
        for size in hidden_sizes:
            layers += [linear(width, size, 2**0.5, rng), _ACTIVATIONS[activation]()]
            width = size
        self.mlp = nn.Sequential(*layers)
        self.out = width

    def forward(self, inputs: Inputs) -> Tensor:
        if not self.image_keys:
            features: Tensor = self.mlp(inputs["vector"])
            return features
        parts = [self.image_nets[_key(key)](inputs[key].float() / 255.0) for key in self.image_keys]
        if self.has_vector:
            parts.append(inputs["vector"])
        features = self.mlp(torch.cat(parts, dim=-1))
        return features


class Actor(nn.Module):
    """The policy: encoded observations to a distribution over actions.

    Box actions are scaled to their bounds where these are finite: the network's output 0 is the middle, 1 the upper
    bound, so that one initial standard deviation suits every environment. KL does not depend on that scale.
    """

    def __init__(self, torso: Torso, space: spaces.Space[Any], log_std_init: float, rng: torch.Generator) -> None:
        super().__init__()
        self.torso = torso
        self.continuous = isinstance(space, spaces.Box)
        if isinstance(space, spaces.Box):
            low, high = (torch.as_tensor(x, dtype=torch.float32).flatten() for x in (space.low, space.high))
            bounded = torch.isfinite(low) & torch.isfinite(high)
            scale = torch.where(bounded, (high - low) / 2, 1.0)
            self.register_buffer("center", torch.where(bounded, (high + low) / 2, 0.0))
            self.register_buffer("scale", scale)
            self.head = linear(torso.out, len(scale), 0.01, rng)
            self.log_std = nn.Parameter(torch.full((len(scale),), log_std_init) + scale.log())
        else:
            sizes = choices(space)
            self.head = linear(torso.out, sum(sizes), 0.01, rng)
            self.shape = (len(sizes), max(sizes))
            # Where the sizes differ, every categorical is padded to the largest with forbidden choices.
            starts = np.cumsum([0, *sizes[:-1]])
            index = [[start + min(i, n - 1) for i in range(max(sizes))] for start, n in zip(starts, sizes, strict=True)]
            padding = [[i >= n for i in range(max(sizes))] for n in sizes]
            self.padded = len(set(sizes)) > 1
            self.register_buffer("index", torch.tensor(index).flatten())
            self.register_buffer("padding", torch.tensor(padding))

    def forward(self, inputs: Inputs) -> PolicyDistribution:
        output: Tensor = self.head(self.torso(inputs))
        if self.continuous:
            mean = torch.addcmul(self.center, output, self.scale)  # type: ignore[call-overload]
            return DiagonalNormal(mean, self.log_std.expand_as(mean))
        if self.padded:
            logits = output[:, self.index].view(-1, *self.shape)  # type: ignore[index]
            return Categoricals(logits.masked_fill(self.padding, float("-inf")))  # type: ignore[arg-type]
        return Categoricals(output.view(-1, *self.shape))


class Critic(nn.Module):
    """The state value: encoded observations to V(s), shape [B]."""

    def __init__(self, torso: Torso, rng: torch.Generator) -> None:
        super().__init__()
        self.torso = torso
        self.head = linear(torso.out, 1, 1.0, rng)

    def forward(self, inputs: Inputs) -> Tensor:
        value: Tensor = self.head(self.torso(inputs))
        return value.squeeze(-1)


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
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
        channels = out
    layers.append(nn.Flatten())
    with torch.no_grad():
        flat = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, linear(flat, _IMAGE_FEATURES, 2**0.5, rng), nn.ReLU())


def _key(name: str) -> str:
    """A module name for an observation's key: ModuleDict forbids dots and the empty name."""
    return "image_" + name.replace(".", "_dot_")
