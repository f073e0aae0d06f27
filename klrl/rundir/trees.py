"""A checkpoint's state as a tree, nested dicts whose leaves are tensors and JSON values: its tensors apart, and one
rank's beside another's."""

from typing import Any

import torch
from torch import Tensor

_TENSOR, _OWN = "$tensor", "$own"


def split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with every tensor moved to ``tensors`` and replaced by a reference to it."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {key: split(part, f"{path}.{key}" if path else key, tensors) for key, part in value.items()}
    return value


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What ``split`` took apart."""
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: join(part, tensors) for key, part in value.items()}
    return value


def difference(own: Any, other: Any) -> dict[str, Any]:
    """What it takes to make ``own`` of ``other``: nothing, or what differs, in its place."""
    if isinstance(own, dict) and isinstance(other, dict) and own.keys() == other.keys():
        parts = {key: difference(part, other[key]) for key, part in own.items()}
        return {key: part for key, part in parts.items() if part}
    return {} if _same(own, other) else {_OWN: own}


def restored(other: Any, own: dict[str, Any]) -> Any:
    """The tree of which ``own`` is the ``difference`` from ``other``."""
    if set(own) == {_OWN}:
        return own[_OWN]
    return {key: restored(part, own[key]) if key in own else part for key, part in other.items()} if own else other


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
