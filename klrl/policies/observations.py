"""Observations as agents and buffers hold them: arrays of their space's shape, by name, or refused in one line."""

from typing import Any

import numpy as np
from gymnasium import spaces

from klrl.errors import UsageError
from klrl.policies.spaces import MASK, channels_first, check_observation_space, is_image, leaves

Observation = np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]]


class Layout:
    """Which arrays an observation of a space consists of: one, or one for each part of a Dict, at any depth.

    A part's name is its key, or its keys joined by dots.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        check_observation_space(space)
        self.keyed = isinstance(space, spaces.Dict)
        self._paths = {".".join(map(str, path)): path for path, _ in leaves(space)}
        # Sorted: equal Dict spaces may list their keys in another order, and the weights must not depend on that.
        self.parts: dict[str, spaces.Space[Any]] = dict(
            sorted((".".join(map(str, path)), part) for path, part in leaves(space))
        )
        self.images = {name: channels_first(part) for name, part in self.parts.items() if is_image(part)}
        self._usual = [(name, part.shape or (), part.dtype) for name, part in self.parts.items()]
        self._last: tuple[int, ...] | None = None  # the shape of the last batch without a key, and of most that follow

    def arrays(self, obs: Any) -> Observation:
        """Observations with any leading shape [..., *shape], one for all parts; lists and tensors become arrays.

        An image whose channels stand at the other end is transposed. Raises UsageError for another shape or for what
        are no such numbers.
        """
        if not self.keyed:
            return self._array("", obs)
        found = {name: self._array(name, self._part(name, obs)) for name in self.parts}
        leading = {name: value.shape[: value.ndim - len(self.parts[name].shape or ())] for name, value in found.items()}
        if len(set(leading.values())) > 1:
            raise UsageError(f"the parts of an observation have different leading shapes: {leading}")
        return found

    def batch(self, obs: Any, rows: int | None = None) -> Observation:
        """Observations [N, *shape] as ``arrays`` gives them. Raises UsageError unless there are ``rows``, if given."""
        same = type(obs) is np.ndarray and obs.shape == self._last and obs.dtype == self._usual[0][2]
        if same and rows in (None, len(obs)):
            return obs
        if self._is_usual(obs, rows):
            self._last = None if self.keyed else obs.shape
            return obs
        checked = self.arrays(obs)
        name, first = next(iter(checked.items())) if isinstance(checked, dict) else ("", checked)
        shape = self.parts[name].shape or ()
        if first.ndim != len(shape) + 1 or rows not in (None, len(first)):
            hint = ": a batch is wanted, and predict alone takes one observation" if first.shape == shape else ""
            raise UsageError(f"{_called(name)} has shape {first.shape}, expected {_wanted(shape, rows or 'N')}{hint}")
        return checked

    def _is_usual(self, obs: Any, rows: int | None) -> bool:
        """Whether there is nothing to do: found in a microsecond, as environments give nothing else."""
        if self.keyed and type(obs) is not dict:
            return False
        for name, shape, dtype in self._usual:
            part = obs.get(name) if self.keyed else obs
            if type(part) is not np.ndarray or part.dtype != dtype:
                return False
            count, *rest = part.shape or (None,)
            if count is None or tuple(rest) != shape or rows not in (None, count):
                return False
            rows = count
        return True

    def is_single(self, obs: Observation) -> bool:
        """Whether what ``arrays`` gave is one observation, without a leading shape."""
        name, first = next(iter(obs.items())) if isinstance(obs, dict) else ("", obs)
        return first.ndim == len(self.parts[name].shape or ())

    def as_shown(self, obs: Any) -> Any:
        """One observation as the environment shows it: what ``arrays`` gave by name, along the keys of its space."""
        if not self.keyed:
            return obs
        shown: dict[Any, Any] = {}
        for name, (*path, last) in self._paths.items():
            inner = shown
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = obs[name]
        return shown

    def _part(self, name: str, obs: Any) -> Any:
        """A part of an observation, by its name or along its keys."""
        if not isinstance(obs, dict):
            hint = f"; its {MASK} may be given to predict as action_masks=" if MASK in self.parts else ""
            raise UsageError(f"an observation is a dict of {', '.join(self.parts)}, got {type(obs).__name__}{hint}")
        if name in obs:
            return obs[name]
        for key in self._paths[name]:
            if not isinstance(obs, dict) or key not in obs:
                raise UsageError(f"the observation has no {name!r}: expected {', '.join(self.parts)}")
            obs = obs[key]
        return obs

    def _array(self, name: str, value: Any) -> np.ndarray[Any, Any]:
        part = self.parts[name]
        if not isinstance(value, np.ndarray):
            value = _from_others(_called(name), value)
        shape = part.shape or ()
        given = value.shape[value.ndim - len(shape) :] if value.ndim >= len(shape) else None
        if given != shape:
            if name not in self.images or given != _transposed(shape, self.images[name]):
                raise UsageError(f"{_called(name)} has shape {value.shape}, expected {_wanted(shape, '...')}")
            value = np.moveaxis(value, *((-3, -1) if shape != self.images[name] else (-1, -3)))
        if value.dtype != part.dtype:
            value = _converted(_called(name), value, part)
        return value


def _called(name: str) -> str:
    return f"observation {name!r}" if name else "observation"


def _wanted(shape: tuple[int, ...], leading: int | str) -> str:
    return f"({', '.join(map(str, (leading, *shape)))}{'' if shape else ','})"


def _from_others(called: str, value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):  # a tensor, on whatever device
        value = value.detach().cpu()
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as problem:  # lists of different lengths
        raise UsageError(f"{called} is no array of numbers: {problem}") from None


def _converted(called: str, value: np.ndarray[Any, Any], part: spaces.Space[Any]) -> np.ndarray[Any, Any]:
    """``value`` of another type than its space's, which it may stand for."""
    in_bytes = isinstance(part, spaces.Box) and part.dtype == np.uint8
    whole = in_bytes or isinstance(part, spaces.Discrete | spaces.MultiDiscrete)
    if value.dtype.kind not in ("iub" if whole else "iubf"):
        expected = "whole numbers" if whole else "numbers"
        raise UsageError(f"{called} is of type {value.dtype}, expected {expected}, as its space's {part.dtype}")
    if not np.issubdtype(part.dtype, np.integer) or value.dtype.kind == "f":
        return value
    bounds = np.iinfo(part.dtype)
    if value.size and (value.min() < bounds.min or value.max() > bounds.max):
        raise UsageError(f"{called} lies in {value.min()} to {value.max()}, expected {bounds.min} to {bounds.max}")
    return value.astype(part.dtype)


def _transposed(shape: tuple[int, ...], first: tuple[int, int, int]) -> tuple[int, ...]:
    """The shape of the same image with its channels at the other end."""
    channels, height, width = first
    return (height, width, channels) if shape == first else first
