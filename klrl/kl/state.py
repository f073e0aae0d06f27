"""What a transform, a network or one of torch's distributions holds: copied, compared and recomputed by value."""

import copy
import enum
import numbers
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

_INVERSE: Any = td.transforms._InverseTransform
# What a transform remembers beside its state: its inverse, which it makes again, and the last value it was given.
_MEMORY = {"_inv": None, "_cached_x_y": (None, None)}
_PLAIN = numbers.Number | str | bytes | None | type | types.ModuleType | enum.Enum
_LEAVES = _PLAIN | types.BuiltinFunctionType | torch.dtype | torch.device | torch.Size | td.constraints.Constraint


class NotSupportedError(ValueError):
    """What the distribution consists of is not known, so that it cannot be frozen or indexed."""


def map_state(x: Any, function: Callable[[Any], Any]) -> Any:
    """A twin of ``x`` that shares nothing with it that changes, each of its tensors replaced by ``function`` of it.

    ``function`` is also called with the types, names and constants of which the rest consists, which are kept.
    Raises NotSupportedError where a part of the state cannot be read.
    """
    return _twin(x, function, {})


def _twin(x: Any, function: Callable[[Any], Any], seen: dict[int, Any]) -> Any:
    if isinstance(x, _LEAVES):
        function(x)
        return x
    if id(x) in seen:
        return seen[id(x)]
    if isinstance(x, Tensor):
        seen[id(x)] = function(x)
        return seen[id(x)]
    if isinstance(x, types.FunctionType):
        _refuse_hidden(x, x)
        function(x)
        return x
    function(type(x))
    if isinstance(x, set | frozenset):
        function(frozenset(x))
        return copy.copy(x)
    if isinstance(x, tuple):
        return tuple.__new__(type(x), [_twin(item, function, seen) for item in x])
    if isinstance(x, list):
        twin: Any = copy.copy(x)
        seen[id(x)] = twin
        twin[:] = [_twin(item, function, seen) for item in x]
    elif isinstance(x, dict):
        seen[id(x)] = twin = copy.copy(x)
        for key, value in x.items():
            function(key)
            twin[key] = _twin(value, function, seen)
    else:
        seen[id(x)] = twin = _bare(x)
        memory = _MEMORY if isinstance(x, td.Transform) and not isinstance(x, _INVERSE) else {}
        for key, value in vars(x).items():
            if key in memory:
                twin.__dict__[key] = memory[key]
            elif key == "_cache_size":
                twin.__dict__[key] = value
            else:
                function(key)
                twin.__dict__[key] = _twin(value, function, seen)
    return twin


def _bare(x: Any) -> Any:
    """An object of the type of ``x`` without any of its state."""
    cls = type(x)
    if not isinstance(getattr(x, "__dict__", None), dict) or isinstance(x, types.MethodType):
        raise _unreadable(x, "it is not a Python object with attributes")
    for base in cls.__mro__:
        if not base.__module__.startswith("torch."):
            if base is not object and vars(base).get("__slots__"):
                raise _unreadable(x, "it has __slots__")
            for name, value in vars(base).items():
                if isinstance(value, Tensor | nn.Module):
                    raise _unreadable(x, f"{name} belongs to its class")
                if isinstance(value, types.FunctionType):
                    _refuse_hidden(x, value)
    try:
        return object.__new__(cls)
    except TypeError:
        raise _unreadable(x, "its class is not written in Python") from None


def _refuse_hidden(x: Any, function: types.FunctionType) -> None:
    """Raise NotSupportedError where ``function`` reads tensors or what else may change from outside of itself."""
    kept = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
    kept += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    used = [function.__globals__.get(name) for name in function.__code__.co_names]
    if not all(map(_is_constant, kept)) or any(isinstance(x, Tensor | nn.Module | td.Transform) for x in used):
        raise _unreadable(x, f"{function.__qualname__} reads variables from outside of it")


def _is_constant(x: Any) -> bool:
    if isinstance(x, dict):
        return all(map(_is_constant, x.values()))
    return all(map(_is_constant, x)) if isinstance(x, list | tuple) else isinstance(x, _LEAVES | types.FunctionType)


def _unreadable(x: object, why: str) -> NotSupportedError:
    name = getattr(x, "__qualname__", type(x).__name__)
    return NotSupportedError(
        f"{name} has state that cannot be copied or compared ({why}): keep what it computes with in attributes"
    )


def _leaves(x: Any) -> list[Any]:
    found: list[Any] = []

    def collect(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    map_state(x, collect)
    return found


def same_state(first: Any, second: Any) -> bool:
    """Whether the two are one object, or of one type and equal in every tensor and constant that they hold; False for
    nan. Raises as ``map_state`` does."""
    if first is second:
        return True
    both = _leaves(first), _leaves(second)
    return len(both[0]) == len(both[1]) and all(_same(a, b) for a, b in zip(*both, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        plain = [x.item() if isinstance(x, Tensor) and not x.dim() else x for x in (a, b)]
        return all(isinstance(x, int | float) for x in plain) and bool(plain[0] == plain[1])
    return bool(a == b)


def tensors_of(x: Any) -> Iterator[Tensor]:
    """Every tensor that ``x`` holds. Raises as ``map_state`` does."""
    return (leaf for leaf in _leaves(x) if isinstance(leaf, Tensor))


def copied(leaf: Any) -> Any:
    """A detached copy of a tensor; anything else as it is."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def in_float64(dist: Any) -> Any:
    """One of torch's distributions in float64, differentiable in its parameters; what it derived from them is dropped,
    to be computed again."""
    twin = map_state(dist, lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)
    for derived in [name for name in vars(twin) if name in ("probs", "logits")][1:]:  # what was given came first
        del twin.__dict__[derived]
    return twin
