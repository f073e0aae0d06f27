"""Torsos: from encoded observations to one vector, by convolutions where they have images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from klrl.policies.encoder import Inputs, ObservationEncoder
from klrl.policies.spaces import channels_first

_IMAGE_FEATURES, _SMALL_FEATURES = 512, 128


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
