"""Config dataclasses as plain data: built from a dict, checked, merged, written back to a dict.

A field's annotation carries its range (``Annotated[int, Range(1)]``), so that the command line, a TOML file and a
Python keyword are all refused by the same line.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from klrl.errors import UsageError

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values a number may take: finite, from ``low`` (exclusive if ``above``) to ``high``."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return abs(value) < math.inf and (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        words = []
        if self.low > -math.inf:
            words.append(f"{'above' if self.above else 'at least'} {self.low:.15g}")
        if self.high < math.inf:
            words.append(f"at most {self.high:.15g}")
        return " and ".join(words) or "a finite number"


@dataclasses.dataclass(frozen=True)
class AtMost:
    """The most that is tried of a number, or of a list's items: beyond that, no machine has room for it."""

    size: float
    of: str = ""

    def allows(self, value: Any) -> bool:
        return (len(value) if isinstance(value, tuple) else abs(value)) <= self.size

    def __str__(self) -> str:
        return f"at most {self.size:,.15g}{self.of}"


PositiveInt = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
# Beyond what fits into a machine, so that a slip, or a file of somebody's, is refused before it is tried.
Copies = Annotated[int, Range(1), AtMost(100_000)]
Widths = Annotated[tuple[Annotated[int, Range(1), AtMost(65_536)], ...], AtMost(100, " of them")]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Real = Annotated[float, Range()]


def suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def option(path: str) -> str:
    """A field's path as the command line spells it: ``kl.on_overshoot`` is ``--kl.on-overshoot``."""
    return "--" + path.replace("_", "-")


def field_types(cls: type) -> dict[str, Any]:
    """The dataclass's fields with their full annotations, in order."""
    annotations = get_type_hints(cls, include_extras=True)
    return {f.name: annotations[f.name] for f in dataclasses.fields(cls)}


def build(cls: type[C], data: Mapping[str, Any], path: str = "") -> C:
    """Build the dataclass ``cls`` from plain values, each checked for type and range.

    Raises UsageError that names the option for an unknown key, a wrong type or a value out of range.
    """
    fields = field_types(cls)
    # Within a group, what is not given is as this class has it, which need not be the group's own default.
    groups = {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    data = {
        key: merge(to_dict(groups[key]), value)
        if dataclasses.is_dataclass(groups.get(key)) and isinstance(value, Mapping)
        else value
        for key, value in data.items()
    }
    for key in data:
        if key not in fields:
            raise UsageError(f"unknown option {path + key!r}{suggest(path + key, (path + name for name in fields))}")
    return cls(**{key: convert(fields[key], value, path + key) for key, value in data.items()})


def convert(annotation: Any, value: Any, path: str) -> Any:
    """Convert ``value`` to the type ``annotation`` and check its range. Raises UsageError that names ``path``."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = to_dict(value)
        if not isinstance(value, Mapping):
            raise UsageError(f"{option(path)} must be a table of options, got {value!r}")
        return build(annotation, value, path + ".")
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        converted = convert(arguments[0], value, path)
        for limit in (*arguments[1:], _LARGEST.get(arguments[0])):
            if isinstance(limit, Range) and converted not in limit:
                raise UsageError(f"{option(path)} must be {limit}, got {value}")
            if isinstance(limit, AtMost) and not limit.allows(converted):
                raise UsageError(f"{option(path)} must be {limit}")
        return converted
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise UsageError(f"{option(path)} must be one of {choices}, got {value!r}{suggest(str(value), arguments)}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise UsageError(f"{option(path)} must be a list, got {value!r}")
        return tuple(convert(arguments[0], item, path) for item in value)
    if origin in (Union, types.UnionType):
        raise TypeError(f"{path}: optional fields have no TOML form; use a value that means 'off'")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{option(path)} must be a table of names and values, got {value!r}")
        return dict(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(min(max(value, -(10**300)), 10**300))
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e5 in a TOML file
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise UsageError(f"{option(path)} must be {_TYPE_NAMES.get(annotation, annotation)}, got {value!r}")
    if annotation is str and any("\ud800" <= c <= "\udfff" for c in value):
        raise UsageError(f"{option(path)} must be a text in UTF-8, got {value!r}")
    return value


_LARGEST = {int: AtMost(1e15), float: AtMost(1e30)}  # of which float32 would make infinity, were it much more
_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain nested dicts and lists, ready for TOML or JSON."""

    def table(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in items}

    return dataclasses.asdict(config, dict_factory=table)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``over`` laid on top, tables merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options without groups, under keys like ``kl.target``."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
