"""Networks: an MLP over what a torso makes of observations, one's own, and the critics."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional

from klrl.errors import UsageError
from klrl.kl import Ranks
from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.own import find_class
from klrl.policies.spaces import MASK
from klrl.policies.torso import Torso, brightness, linear

Activation = Literal["tanh", "relu", "silu", "gelu", "elu"]
Array = np.ndarray[Any, Any]
OwnNetwork = nn.Module | Callable[[spaces.Space[Any]], nn.Module]
"""A network of one's own, which is copied for each use, or what makes one for an observation space."""
# Of a layer's outputs, which tanh and relu overwrite: the way back of the others may read them.
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh_,
    "relu": torch.relu_,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "elu": functional.elu,
}
# NumPy's tanh of an element: 0.2 ns with AVX-512, but 3 without, where torch's sigmoid is 1 and torch's tanh 4.
_NUMPY_IS_FAST = torch.backends.cpu.get_cpu_capability() == "AVX512"


class MLP(nn.Module):
    """Linear layers with an activation between them: x [B, inputs] to [B, outputs].

    ``layer_norm``: what goes into an activation is normalised first. Source: Ba et al. (2016), "Layer normalization".
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Activation,
        output_gain: float,
        rng: torch.Generator,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        gains = [2**0.5] * (len(sizes) - 2) + [output_gain]
        self.layers = nn.ModuleList(linear(a, b, g, rng) for (a, b), g in zip(pairwise(sizes), gains, strict=True))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes[1:-1]) if layer_norm else None
        self.activation = activation
        self._numpy: tuple[list[int], list[tuple[Array, Array]]] = [], []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_numpy": ([], [])}  # a copy's weights lie elsewhere, or by chance at the same address

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and x.device.type == "cpu" and not torch.compiler.is_compiling():
            found = self.forward_numpy(x.numpy())
            if found is not None:
                return torch.from_numpy(found)
        return self.layers[-1](self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """What the last layer takes, [B, width]."""
        for i, layer in enumerate(self.layers[:-1]):
            x = layer(x) if self.norms is None else self.norms[i](layer(x))
            x = _ACTIVATIONS[self.activation](x)
        return x

    @property
    def is_plain(self) -> bool:
        """Whether every layer is what it was made as, so that its weights say all of it: no subclass, no hook."""
        return self._find() is not None

    def _find(self) -> list[int] | None:
        """Where the weights and biases lie, None where a layer is no plain one, or the MLP."""
        if type(self) is not MLP or self.norms is not None or self._forward_hooks or self._forward_pre_hooks:
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
                    x = activated(x, self.activation)
        return x


def activated(x: Array, activation: Activation) -> Array:
    """The activation of ``x``, which it may overwrite."""
    if activation == "tanh":
        return tanh_(x)
    if activation == "relu":
        return np.maximum(x, 0.0, out=x)
    return _ACTIVATIONS[activation](torch.from_numpy(x)).numpy()


def tanh_(x: Array) -> Array:
    """tanh in place, by what is fastest on this processor: 2 sigmoid(2 x) - 1 is within 2e-7 of it."""
    if _NUMPY_IS_FAST or x.size < 2048:
        return np.tanh(x, out=x)
    x *= 2
    torch.from_numpy(x).sigmoid_()
    x *= 2
    x -= 1
    return x


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
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.torso = Torso(encoder, rng)
        self.mlp = MLP([self.torso.width, *hidden_sizes, outputs], activation, output_gain, rng, layer_norm)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.mlp.layers[-1](inputs["hidden"]) if "hidden" in inputs else self.mlp(self.torso(inputs))

    def hidden(self, inputs: Inputs) -> Tensor:
        """The last hidden layer's numbers, [B, width]."""
        return inputs["hidden"] if "hidden" in inputs else self.mlp.hidden(self.torso(inputs))


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
            # A copy in any case: policy and critic share no weights unless ``SharedCritic`` is asked for.
            features = copy.deepcopy(own if isinstance(own, nn.Module) else own(encoder.space))
            if not isinstance(features, nn.Module):
                raise UsageError(f"network= is to make an nn.Module, and made {features!r}")
            # In evaluation mode, as a policy is a function of its weights: no dropout, no batch's statistics.
            self.features = features.eval()
            try:
                with torch.no_grad():
                    seen = self.features(self._given(encoder.zeros(2)))
                (rows, width) = seen.shape if seen.dim() == 2 else (0, 0)
            except Exception as problem:
                text = " ".join(f"{type(problem).__name__}: {problem}".split())
                raise UsageError(f"network {type(features).__name__} cannot be used: {text}") from None
            if rows != 2:
                shape = list(seen.shape)
                raise UsageError(f"network {type(features).__name__} returns {shape} for 2 rows: it must return [B, F]")
            self.output = linear(width, outputs, output_gain, rng)

    def train(self, mode: bool = True) -> "FeatureNetwork":
        return super().train(False)

    def forward(self, inputs: Inputs) -> Tensor:
        return self.output(self.hidden(inputs))

    def hidden(self, inputs: Inputs) -> Tensor:
        """The features, [B, F]."""
        return inputs["hidden"] if "hidden" in inputs else self.features(self._given(inputs))

    @staticmethod
    def _given(inputs: Inputs) -> Tensor | Inputs:
        shown = {key: part for key, part in inputs.items() if key != MASK}
        scaled = {key: brightness(part) if key.startswith("image ") else part for key, part in shown.items()}
        return next(iter(scaled.values())) if len(scaled) == 1 else scaled


def make_network(
    own: OwnNetwork | None,
    encoder: ObservationEncoder,
    activation: Activation,
    layer_norm: bool,
    rng: torch.Generator,
    hidden_sizes: Sequence[int],
    outputs: int,
    output_gain: float,
) -> nn.Module:
    """The network from encoded observations to outputs: on features of one's own where ``own`` is given."""
    if own is not None:
        return FeatureNetwork(own, encoder, outputs, output_gain, rng)
    return Network(encoder, hidden_sizes, outputs, activation, output_gain, rng, layer_norm)


def name_of_network(own: OwnNetwork) -> str:
    """Its "module:Class", which ``named_network`` finds where it is a class of modules.

    Raises UsageError for what is no network, nor makes one.
    """
    if not callable(own):
        raise UsageError(f"network= takes an nn.Module, or what makes one for a space, not {own!r}")
    cls = own if isinstance(own, type) or not isinstance(own, nn.Module) else type(own)
    return f"{cls.__module__}:{getattr(cls, '__qualname__', type(cls).__qualname__)}"


def named_network(name: str) -> type[nn.Module]:
    """The network class called "module:Class", of a module that is imported. Raises UsageError where there is none."""
    try:
        found: type[nn.Module] = find_class(name, nn.Module, "network", "network")
    except UsageError as problem:
        raise UsageError(f"{problem}; from Python, give network=") from None
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

    def seen(self, inputs: Inputs) -> Inputs:
        """The inputs of policy and critic, with what both make of them, where they share a network."""
        return inputs

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
        activation: Activation = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.torso = Torso(encoder, rng)
        sizes = [self.torso.width + action_width, *hidden_sizes, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = 1 / math.sqrt(a)  # torch's own initialisation of a linear layer
            self.weights.append(nn.Parameter((2 * torch.rand(2, a, b, generator=rng) - 1) * bound))
            self.biases.append(nn.Parameter((2 * torch.rand(2, 1, b, generator=rng) - 1) * bound))
        self.gains, self.shifts = nn.ParameterList(), nn.ParameterList()
        for width in hidden_sizes if layer_norm else ():
            self.gains.append(nn.Parameter(torch.ones(2, 1, width)))
            self.shifts.append(nn.Parameter(torch.zeros(2, 1, width)))

    def forward(self, inputs: Inputs, *action: Tensor) -> Tensor:
        x = self.torso(inputs, *action)
        x = x.expand(2, *x.shape)
        *hidden, (weight, bias) = zip(self.weights, self.biases, strict=True)
        for i, (hidden_weight, hidden_bias) in enumerate(hidden):
            x = torch.baddbmm(hidden_bias, x, hidden_weight)
            if len(self.gains):
                x = torch.addcmul(self.shifts[i], self.gains[i], functional.layer_norm(x, x.shape[-1:]))
            x = _ACTIVATIONS[self.activation](x)
        return torch.baddbmm(bias, x, weight)
