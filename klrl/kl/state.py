"""What a transform, a network or one of torch's distributions holds: copied, compared and recomputed by value."""

import contextlib
import copy
import enum
import inspect
import numbers
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.distributions.utils import lazy_property

D = TypeVar("D", bound=td.TransformedDistribution)
_INVERSE: Any = td.transforms._InverseTransform
# What a transform remembers beside its state: its inverse, which it makes again, and the last value it was given.
_MEMORY = {"_inv": None, "_cached_x_y": (None, None)}
_PLAIN = numbers.Number | str | bytes | None | type | types.ModuleType | enum.Enum
_LEAVES = (
    _PLAIN
    | types.FunctionType
    | types.BuiltinFunctionType
    | torch.dtype
    | torch.device
    | torch.Size
    | td.constraints.Constraint
)


@contextlib.contextmanager
def own_noise(seed: int = 0, device: torch.device | None = None) -> Iterator[None]:
    """What is sampled within, on the CPU and on ``device``, follows from ``seed`` alone; torch's generators are left as
    they were."""
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for place in cuda:
            with torch.cuda.device(place):
                torch.cuda.manual_seed(seed)
        yield


class _Looking(threading.local):
    allowed = True


_looking = _Looking()


def may_look() -> bool:
    """Whether a KL may look at its numbers, to take a shorter way where they allow it, and to refuse a nan; a graph,
    which does not depend on its data, may not."""
    return not torch.compiler.is_compiling() and _looking.allowed


@contextlib.contextmanager
def without_looking() -> Iterator[None]:
    """Let no KL of this thread look at its numbers in the block: on a GPU that waits for them, and a recorded step
    cannot. Each takes the way that suits all numbers, and one that is nan raises nothing."""
    before, _looking.allowed = _looking.allowed, False
    try:
        yield
    finally:
        _looking.allowed = before


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
            if isinstance(x, td.Transform) and isinstance(inspect.getattr_static(type(x), key, None), lazy_property):
                continue  # what it once computed of the rest, and will again
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
    try:
        return object.__new__(cls)
    except TypeError:
        raise _unreadable(x, "its class is not written in Python") from None


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


def remember(frozen: D) -> D:
    """Keep what the transforms make of a sample, by which ``check_still`` sees whether they read what has changed."""
    with torch.no_grad(), own_noise(), contextlib.suppress(NotImplementedError):
        x = frozen.base_dist.sample()
        frozen.__dict__["_seen"] = x, _image(frozen.transforms, x)
    return frozen


def check_still(frozen: td.TransformedDistribution, name: str) -> None:
    """Raise NotSupportedError where the transforms no longer make of that sample what they did."""
    x, y = frozen.__dict__.get("_seen", (None, None))
    with torch.no_grad():
        if x is not None and not torch.equal(_image(frozen.transforms, x).nan_to_num(), y.nan_to_num()):
            raise NotSupportedError(
                f"{name}: a transform reads what lies outside of it and has changed since it was frozen: keep what it "
                "computes with in attributes"
            )


def _image(transforms: Sequence[td.Transform], x: Tensor) -> Tensor:
    x = x.clone()  # a new one, of which no transform remembers the value
    for transform in transforms:
        x = transform(x)
    return x
