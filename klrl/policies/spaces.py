"""Which Gymnasium spaces klrl takes, refused in one line otherwise, and their form in a checkpoint."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from klrl.errors import UsageError

MASK, UNMASKED = "action_mask", "observation"
"""The part of an observation that says which actions are allowed, and that of all else, by PettingZoo's names."""
_MAX_JOINT = 4096
_MOST_NUMBERS = 2**26  # of an observation or action
_LARGE, _SMALLEST = 36, 5  # sides of images for the net of Mnih et al., and for any
_UNBOUNDED = 1e9  # bounds further apart stand for "no bounds", as float32's largest numbers often do


def check_action_space(space: spaces.Space[Any]) -> None:
    """Raise UsageError unless ``space`` is a Box of floats, Discrete, MultiDiscrete or MultiBinary."""
    if isinstance(space, spaces.Box):
        if not np.issubdtype(space.dtype, np.floating):
            raise UsageError(
                f"action space {space} holds whole numbers: use a Discrete or MultiDiscrete space "
                "(gymnasium.wrappers.TransformAction can map it)"
            )
        return
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise UsageError(
            f"action space {space} is not supported: klrl takes Box, Discrete, MultiDiscrete and MultiBinary; "
            "gymnasium.wrappers.TransformAction can map yours to one of them"
        )


def is_bounded(space: spaces.Box) -> npt.NDArray[np.bool_]:
    """Which of a Box's numbers have bounds, [*shape]: those so far apart that they stand for none do not count."""
    return space.high.astype(np.float64) - space.low < _UNBOUNDED


def check_bounded(space: spaces.Box, whose: str = "SAC's actions") -> None:
    """Raise UsageError unless every bound of the action space is finite, as ``whose`` must be."""
    if not is_bounded(space).all():
        raise UsageError(
            f"action space {space} has infinite bounds, and {whose} are finite: "
            "gymnasium.wrappers.TransformAction(env, lambda action: action, Box(-1, 1, shape)) gives it finite ones"
        )


def category_sizes(space: spaces.Space[Any]) -> list[int]:
    """How many choices each categorical of a Discrete, MultiDiscrete or MultiBinary space has."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    if isinstance(space, spaces.MultiDiscrete):
        return [int(n) for n in space.nvec.flatten()]
    assert space.shape is not None
    return [2] * int(np.prod(space.shape))


def mask_sizes(observation: spaces.Space[Any], action: spaces.Space[Any]) -> list[int]:
    """How many choices each categorical of the actions has, where the observation's part MASK says which are allowed;
    empty where there is no such part, or it has another size."""
    part = observation.spaces.get(MASK) if isinstance(observation, spaces.Dict) else None
    if isinstance(action, spaces.Box) or not isinstance(part, spaces.Box | spaces.MultiBinary):
        return []
    sizes = category_sizes(action)
    return sizes if math.prod(part.shape) == sum(sizes) else []


def check_joint(space: spaces.Space[Any], actions: int) -> None:
    """Raise UsageError where the space has more joint actions than a network can put a value on, one by one."""
    if actions > _MAX_JOINT:
        raise UsageError(f"action space {space} has {actions:,} joint actions: SAC takes at most {_MAX_JOINT:,}")


def leaves(space: spaces.Space[Any], path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], spaces.Space[Any]]]:
    """The spaces that a Dict consists of, at any depth, each with the keys that lead to it; any other is its own."""
    if not isinstance(space, spaces.Dict):
        return [(path, space)]
    return [leaf for key, part in space.spaces.items() for leaf in leaves(part, (*path, key))]


def check_observation_space(space: spaces.Space[Any]) -> None:
    """Raise UsageError unless ``space`` is a Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of those or Dicts."""
    parts = leaves(space)
    if not parts:
        raise UsageError(f"observation space {space} is empty: there is nothing to learn from")
    names = [".".join(map(str, path)) for path, _ in parts]
    if len(set(names)) < len(names):
        raise UsageError(f"observation space {space} has keys that read the same: {', '.join(names)}")
    if bad := [key for path, _ in parts for key in path if not isinstance(key, str | int)]:
        raise UsageError(f"observation space {space} has the key {bad[0]!r}: keys are text or whole numbers")
    for _, part in parts:
        if isinstance(part, spaces.Box) and part.dtype == np.uint8 and len(part.shape) > 3:
            raise UsageError(
                f"observation space {part} is not supported: images have 3 dimensions; "
                "gymnasium.wrappers.ReshapeObservation can merge stacked frames into channels"
            )
        if not isinstance(part, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            raise UsageError(
                f"observation space {part} is not supported: klrl takes Box, Discrete, MultiDiscrete, MultiBinary and "
                "a Dict of those; gymnasium.wrappers.FlattenObservation turns most others into a Box"
            )
        if 0 in (part.shape or ()):
            raise UsageError(f"observation space {part} is empty: an observation of it says nothing")


class Numbers(spaces.Box):
    """A Box that is no image, whatever its shape: how runs have theirs that began before such were taken for images."""


def check_same_spaces(mine: Any, theirs: Any, whose: str, than: str = "") -> None:
    """Raise UsageError where a space of an agent is not that of another, or of what else has them.

    A vector environment's are those of each environment. ``whose``, ``than``: what the message calls ``theirs`` and
    ``mine``, such as "the reference's" and "the agent's ".
    """
    for part in ("observation_space", "action_space"):
        names = (f"single_{part}" if hasattr(has, f"single_{part}") else part for has in (mine, theirs))
        one, other = map(getattr, (mine, theirs), names)
        if one != other:
            raise UsageError(f"{whose} {part.replace('_', ' ')} is {other}, not {than}{one}")


def is_image(space: spaces.Space[Any]) -> bool:
    """Whether ``space`` holds images that are kept as they are until a convolutional net: of 36 x 36 pixels or more,
    [H, W, C] or [C, H, W] of bytes, truth values or floats from 0 to 1 or to 255, or [H, W] of bytes.

    Others, such as [36, 3, 36], whose channels stand nowhere that is known, are vectors.
    """
    if not isinstance(space, spaces.Box) or isinstance(space, Numbers):
        return False
    grey = len(space.shape) == 2 and space.dtype == np.uint8 and min(space.shape) >= _LARGE
    return grey or _is_large(space) or _smaller_side(space) >= _LARGE


def is_small_image(space: spaces.Space[Any]) -> bool:
    """Whether ``space`` holds images [H, W, C] or [C, H, W] of 5 x 5 pixels or more that ``is_image`` is not for: among
    the other numbers, and normalised with them, as their bytes are codes as often as brightness."""
    return _smaller_side(space) >= _SMALLEST and not is_image(space)


def channels_first(space: spaces.Space[Any]) -> tuple[int, int, int]:
    """The shape [C, H, W] of an image's space; where both ends are alike, the channels are the first."""
    assert space.shape is not None
    if len(space.shape) == 2:
        return (1, *space.shape)
    first, middle, last = space.shape
    return (first, middle, last) if first <= last else (last, first, middle)


def brightest(space: spaces.Box) -> float:
    """The upper bound of floats that run from 0 to 1, or to 255; 0 where they do not."""
    low, high = space.low, space.high
    within = np.issubdtype(space.dtype, np.floating) and (low == 0).all() and (high == high.flat[0]).all()
    return float(high.flat[0]) if within and high.flat[0] in (1, 255) else 0.0


def _smaller_side(space: spaces.Space[Any]) -> int:
    """Of an image of three dimensions, in pixels; 0 of what is none."""
    if not isinstance(space, spaces.Box) or isinstance(space, Numbers) or len(space.shape) != 3:
        return 0
    channels, *sides = channels_first(space)
    shown = space.dtype in (np.uint8, np.bool_) or brightest(space) > 0
    return min(sides) if shown and channels <= min(sides) else 0


def _is_large(space: spaces.Box) -> bool:
    """Whether bytes are what was taken for an image at first."""
    if space.dtype != np.uint8 or len(space.shape) != 3:
        return False
    first, middle, last = space.shape
    return middle >= _LARGE and max(first, last) >= _LARGE


def _is_newly_image(space: spaces.Box) -> bool:
    return (is_image(space) or is_small_image(space)) and not _is_large(space)


def to_json(space: spaces.Space[Any]) -> dict[str, Any]:
    """A supported space as JSON; ``from_json`` gives an equal one back."""
    match space:
        case spaces.Dict():
            if all(isinstance(key, str) for key in space.spaces):
                return {"type": "Dict", "spaces": {key: to_json(part) for key, part in space.spaces.items()}}
            # JSON's keys are text: others are kept as values.
            return {"type": "Dict", "spaces": [[key, to_json(part)] for key, part in space.spaces.items()]}
        case spaces.Discrete():
            return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
        case spaces.MultiDiscrete():
            nvec, start = space.nvec.tolist(), space.start.tolist()
            return {"type": "MultiDiscrete", "nvec": nvec, "start": start, "dtype": str(space.dtype)}
        case spaces.MultiBinary():
            return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.shape)}
        case spaces.Box():
            return {
                "type": "Box",
                "shape": list(space.shape),
                "dtype": str(space.dtype),
                "low": _bounds_to_json(space.low),
                "high": _bounds_to_json(space.high),
                **({"image": True} if _is_newly_image(space) else {}),
            }
    raise UsageError(f"space {space} is not supported")


def from_json(data: dict[str, Any]) -> spaces.Space[Any]:
    """The space that ``to_json`` wrote. Raises ValueError or KeyError for anything else, or of an absurd size."""
    size = data.get("shape", data.get("n", 1))
    if math.prod(size if isinstance(size, list) else [size]) > _MOST_NUMBERS:
        raise ValueError(f"a space of {size} numbers")
    match data["type"]:
        case "Dict":
            parts = data["spaces"] if isinstance(data["spaces"], list) else data["spaces"].items()
            return spaces.Dict({key: from_json(part) for key, part in parts})
        case "Discrete":
            return spaces.Discrete(data["n"], start=data["start"], dtype=np.dtype(data["dtype"]).type)
        case "MultiDiscrete":
            dtype = np.dtype(data["dtype"])
            return spaces.MultiDiscrete(np.array(data["nvec"]), dtype.type, start=np.array(data["start"], dtype))
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
        case "Box":
            dtype, shape = np.dtype(data["dtype"]), tuple(data["shape"])
            low, high = (np.broadcast_to(np.array(data[k], dtype), shape) for k in ("low", "high"))
            box = spaces.Box(low, high, shape, dtype.type)
            vector = _is_newly_image(box) and not data.get("image")
            return Numbers(low, high, shape, dtype.type) if vector else box
    raise ValueError(f"unknown space type {data['type']!r}")


def _bounds_to_json(bounds: np.ndarray[Any, Any]) -> Any:
    """One number where all bounds are equal, which keeps an image's space short; Python's JSON writes Infinity."""
    return bounds.flat[0].item() if bounds.size and (bounds == bounds.flat[0]).all() else bounds.tolist()
