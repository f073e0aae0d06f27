"""Networks: an MLP over encoded observations (after convolutions for images), one's own, and the critics."""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from klrl.errors import UsageError
from klrl.kl import Ranks
from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.spaces import channels_first

Activation = Literal["tanh", "relu"]
Array = np.ndarray[Any, Any]
OwnNetwork = nn.Module | Callable[[spaces.Space[Any]], nn.Module]
"""A network of one's own, which is copied for each use, or what makes one for an observation space."""
_IMAGE_FEATURES, _SMALL_FEATURES = 512, 128
# NumPy's tanh of an element: 0.2 ns with AVX-512, but 3 without, where torch's sigmoid is 1 and torch's tanh 4.
_NUMPY_IS_FAST = torch.backends.cpu.get_cpu_capability() == "AVX512"


class MLP(nn.Module):
    """Linear layers with an activation between them: x [B, inputs] to [B, outputs]."""

    def __init__(self, sizes: Sequence[int], activation: Activation, output_gain: float, rng: torch.Generator) -> None:
        super().__init__()
        gains = [2**0.5] * (len(sizes) - 2) + [output_gain]
        self.layers = nn.ModuleList(linear(a, b, g, rng) for (a, b), g in zip(pairwise(sizes), gains, strict=True))
        self.activation = activation
        self._numpy: tuple[list[int], list[tuple[Array, Array]]] = [], []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_numpy": ([], [])}  # a copy's weights lie elsewhere, or by chance at the same address

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling():
            found = self.forward_numpy(x.numpy())
            if found is not None:
                return torch.from_numpy(found)
        *hidden, last = self.layers
        for layer in hidden:
            x = layer(x)
            x = x.tanh_() if self.activation == "tanh" else x.relu_()
        return last(x)

    @property
    def is_plain(self) -> bool:
        """Whether every layer is what it was made as, so that its weights say all of it: no subclass, no hook."""
        return self._find() is not None

    def _find(self) -> list[int] | None:
        """Where the weights and biases lie, None where a layer is no plain one, or the MLP."""
        if type(self) is not MLP or self._forward_hooks or self._forward_pre_hooks:
            return None
        modules: Any = self._modules["layers"]
        lie_at: list[int] = []
        for layer in modules._modules.values():
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            if type(layer) is not nn.Linear or bias is None or layer._forward_hooks or layer._forward_pre_hooks:
                return None
            lie_at += (weight.data_ptr(), bias.data_ptr())
        return lie_at

    def forward_numpy(self, x: Array) -> Array | None:
        """The forward pass on views of the weights, which must lie in CPU memory: on a handful of rows, torch's calls
        would cost more than the arithmetic. None where a layer is no plain one."""
        lie_at = self._find()
        if lie_at is None:
            return None
        if self._numpy[0] != lie_at:  # a layer is new, or lies elsewhere than it did
            views = [(layer.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in self.layers]  # type: ignore[operator]
            self._numpy = lie_at, views
        views, last = self._numpy[1], len(lie_at) // 2 - 1
        with np.errstate(all="ignore"):  # as torch
            for i, (weight, bias) in enumerate(views):
                x = x @ weight
                x += bias
                if i < last:
                    x = tanh_(x) if self.activation == "tanh" else np.maximum(x, 0.0, out=x)
        return x


def tanh_(x: Array) -> Array:
    """tanh in place, by what is fastest on this processor: 2 sigmoid(2 x) - 1 is within 2e-7 of it."""
    if _NUMPY_IS_FAST or x.size < 2048:
        return np.tanh(x, out=x)
    x *= 2
    torch.from_numpy(x).sigmoid_()
    x *= 2
    x -= 1
    return x


class Torso(nn.Module):
    """Encoded observations as one vector [B, width]: what a convolutional net sees in each image, then the numbers."""

    def __init__(self, encoder: ObservationEncoder, rng: torch.Generator) -> None:
        super().__init__()
        self.image_keys = [f"image {key}" for key in encoder.images]
        self.image_nets = nn.ModuleList(image_net(shape, rng) for shape in encoder.images.values())
        self.small = [(columns, space.shape or (), channels_first(space)) for columns, space in encoder.small_images]
        self.small_nets = nn.ModuleList(small_image_net(shape, rng) for *_, shape in self.small)
        ends = [0, *(end for columns, *_ in self.small for end in (columns.start, columns.stop)), encoder.features]
        self.others = [slice(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True) if a < b]
        numbers = sum(columns.stop - columns.start for columns in self.others)
        self.is_plain = not (self.image_keys or self.small)
        """Whether there is nothing to it but the numbers."""
        self.width = numbers + _IMAGE_FEATURES * len(self.image_keys) + _SMALL_FEATURES * len(self.small)

    def forward(self, inputs: Inputs, *more: Tensor) -> Tensor:
        """``more``: further numbers to append, each [B, d]."""
        nets = zip(self.image_nets, self.image_keys, strict=True)
        parts = [net(brightness(inputs[key])) for net, key in nets]
        if self.small:
            parts += self._look(inputs["vector"])
        elif "vector" in inputs:
            parts.append(inputs["vector"])
        parts += more
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _look(self, vector: Tensor) -> list[Tensor]:
        """What is seen of the small images in a vector, and the numbers that are none of theirs."""
        seen = []
        for net, (columns, shape, first) in zip(self.small_nets, self.small, strict=True):
            image = vector[:, columns].reshape(-1, *shape)
            seen.append(net(image if shape == first else image.permute(0, 3, 1, 2)))
        return seen + [vector[:, columns] for columns in self.others]


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
        return self.mlp(self.torso(inputs))


class FeatureNetwork(nn.Module):
    """A network of one's own, to features [B, F], and a linear layer from those to outputs [B, outputs].

    It is given a float tensor [B, ...] where the observation is one vector or one image (0 to 1, channels first), else
    a dict of them: "vector", and "image KEY" for each image.
    Raises UsageError where it does not take that, or does not return [B, F].
    """

    def __init__(
        self, own: OwnNetwork, encoder: ObservationEncoder, outputs: int, output_gain: float, rng: torch.Generator
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            # A copy in any case: policy and critic never share weights, whose KL could not be held.
            features = copy.deepcopy(own if isinstance(own, nn.Module) else own(encoder.space))
            # In evaluation mode, as a policy is a function of its weights: no dropout, no batch's statistics.
            self.features = features.eval()
            try:
                with torch.no_grad():
                    seen = self.features(self._given(encoder.zeros(2)))
                rows, width = seen.shape
            except Exception as problem:
                text = " ".join(f"{type(problem).__name__}: {problem}".split())
                raise UsageError(f"network {type(features).__name__} cannot be used: {text}") from None
            if rows != 2:
                raise UsageError(f"network {type(features).__name__} returns {rows} rows for 2: it must return [B, F]")
            self.output = linear(width, outputs, output_gain, rng)

    def train(self, mode: bool = True) -> "FeatureNetwork":
        return super().train(False)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.output(self.features(self._given(inputs)))

    @staticmethod
    def _given(inputs: Inputs) -> Tensor | Inputs:
        scaled = {key: brightness(part) if key.startswith("image ") else part for key, part in inputs.items()}
        return next(iter(scaled.values())) if len(scaled) == 1 else scaled


def make_network(
    own: OwnNetwork | None,
    encoder: ObservationEncoder,
    hidden_sizes: Sequence[int],
    activation: Activation,
    rng: torch.Generator,
    outputs: int,
    output_gain: float,
) -> nn.Module:
    """The network from encoded observations to outputs: on features of one's own where ``own`` is given."""
    if own is not None:
        return FeatureNetwork(own, encoder, outputs, output_gain, rng)
    return Network(encoder, hidden_sizes, outputs, activation, output_gain, rng)


def name_of_network(own: OwnNetwork) -> str:
    """Its "module:Class", which ``named_network`` finds where it is a class of modules."""
    cls = own if isinstance(own, type) or not isinstance(own, nn.Module) else type(own)
    return f"{cls.__module__}:{getattr(cls, '__qualname__', type(cls).__qualname__)}"


def named_network(name: str) -> type[nn.Module]:
    """The network class called "module:Class", of a module that is imported. Raises UsageError where there is none."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        unknown = ":" in name and module and module not in sys.modules
        advice = f"--import {module}, if you trust it" if unknown else "--network module:Class names one"
        raise UsageError(f"network {name!r} is no imported nn.Module class: {advice}; from Python, give network=")
    return found


class Critic(nn.Module):
    """The state value: encoded observations to V(s), shape [B]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Inputs) -> Tensor:
        value: Tensor = self.network(inputs)
        return value.squeeze(-1)

    def cost(self, batch: Any) -> Tensor | float:
        """What a minibatch's loss counts beside the values' errors; of weights that are numbers, nothing."""
        return 0.0

    def metrics(self, batch: Any, ranks: Ranks) -> dict[str, float]:
        """What is worth logging of the values' certainty at a batch's states, of all ranks."""
        return {}


class TwinCritic(nn.Module):
    """Two critics Q(s, a) of one shape, their weights stacked, so that each layer is one product: to [2, B, outputs].

    ``action_width`` 0: discrete actions, one output for each. The convolutions of image observations are shared.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        action_width: int,
        outputs: int,
        hidden_sizes: Sequence[int],
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
        x = self.torso(inputs, *action)
        x = x.expand(2, *x.shape)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for hidden_weight, hidden_bias in hidden:
            x = torch.baddbmm(hidden_bias, x, hidden_weight).relu_()
        return torch.baddbmm(bias, x, weight)


def linear(inputs: int, outputs: int, gain: float, rng: torch.Generator) -> nn.Linear:
    """A linear layer with orthogonal weights (Saxe et al. 2014) times ``gain`` and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=rng)
    nn.init.zeros_(layer.bias)
    return layer


def brightness(image: Tensor) -> Tensor:
    """Images [B, C, H, W] of ``Inputs`` from 0 to 1, laid out as an encoder gives them."""
    image = image.contiguous(memory_format=torch.channels_last)  # those of a replay buffer are not
    return image.float().div_(255.0) if image.dtype == torch.uint8 else image


def image_net(shape: tuple[int, int, int], rng: torch.Generator) -> nn.Sequential:
    """The convolutional net of Mnih et al. (2015) for images [C, H, W], to 512 features."""
    return _convolutional(shape, ((32, 8, 4), (64, 4, 2), (64, 3, 1)), _IMAGE_FEATURES, rng)


def small_image_net(shape: tuple[int, int, int], rng: torch.Generator) -> nn.Sequential:
    """A convolutional net for images [C, H, W] that are too small for ``image_net``, to 128 features."""
    return _convolutional(shape, ((16, 3, 1 if min(shape[1:]) < 14 else 2), (32, 3, 2)), _SMALL_FEATURES, rng)


def _convolutional(
    shape: tuple[int, int, int], sizes: Sequence[tuple[int, int, int]], features: int, rng: torch.Generator
) -> nn.Sequential:
    """Convolutions, of each its outputs, kernel and stride, and a linear layer to features."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for out, kernel, stride in sizes:
        layer = nn.Conv2d(channels, out, kernel, stride)
        nn.init.orthogonal_(layer.weight, 2**0.5, generator=rng)
        layer.bias.data.zero_()  # type: ignore[union-attr]
        layers += [layer, nn.ReLU(inplace=True)]
        channels = out
    layers.append(nn.Flatten())
    with torch.no_grad():
        flat = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, linear(flat, features, 2**0.5, rng), nn.ReLU(inplace=True))
