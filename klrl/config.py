"""Config dataclasses as plain data: built from a dict, checked, merged, written back to a dict.

A field's annotation carries its range (``Annotated[int, Range(1)]``), so that the command line, a TOML file and a
Python keyword are all refused by the same line.
"""

import dataclasses
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from klrl.errors import UsageError
from klrl.spelling import suggest

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values a number may take: from ``low`` (exclusive if ``above``) to ``high``, none that overflows."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        within = self.low <= value <= self.high and abs(value) <= _largest(value)
        return within and not (self.above and value == self.low)

    def words(self, value: float) -> str:
        """What ``value``, which is not among them, should have been."""
        words, largest = [], _largest(value)
        if self.low > -math.inf or value < -largest:
            words.append(f"{'above' if self.above else 'at least'} {max(self.low, -largest):.15g}")
        if self.high < math.inf or value > largest:
            words.append(f"at most {min(self.high, largest):.15g}")
        return " and ".join(words) or "a finite number"


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _largest(value: float) -> float:
    """The largest number that is taken: beyond it float32 overflows or, of whole ones, a product of some in int64."""
    return 1e15 if isinstance(value, int) else 1e38


@dataclasses.dataclass(frozen=True)
class Form:
    """The texts that match ``pattern`` as a whole; ``said`` is how an error describes them."""

    pattern: str
    said: str

    def __contains__(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def words(self, value: str) -> str:
        """What ``value``, which is not among them, should have been."""
        return self.said


@dataclasses.dataclass(frozen=True)
class Length:
    """The lists of at most so many items."""

    most: int

    def __contains__(self, value: tuple[Any, ...]) -> bool:
        return len(value) <= self.most

    def words(self, value: tuple[Any, ...]) -> str:
        """What ``value``, which is not among them, should have been."""
        return f"at most {self.most} of them"


@dataclasses.dataclass(frozen=True)
class Named:
    """The texts ``known``, and those of the form module:Class, which name a class of one's own."""

    known: tuple[str, ...]

    def __contains__(self, value: str) -> bool:
        return value in self.known or re.fullmatch(r"[^\s:]+:[^\s:]+", value) is not None

    def words(self, value: str) -> str:
        """What ``value``, which is not among them, should have been."""
        return f"one of {', '.join(self.known)} or module:Class{suggest(value, self.known)}"


@dataclasses.dataclass(frozen=True)
class Reads:
    """A mark of a field that takes other values, too: ``plain`` makes of them what the field holds."""

    plain: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Needs:
    """A mark of a field that does nothing unless another of its class, ``field``, is ``value``, or is set at all."""

    field: str  # not name: that is what tyro.conf.arg calls an option's own
    value: str = ""

    def met(self, config: Any) -> bool:
        """Whether the field does something in ``config``."""
        found = getattr(config, self.field)
        return found == self.value if self.value else found not in ("", "none", 0, False)


def _drawn(seed: Any) -> Any:
    return int.from_bytes(os.urandom(4)) if seed is None else seed


PositiveInt = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
# Beyond what fits into a machine, so that a slip, or a file of somebody's, is refused before it is tried.
Seed = Annotated[int, Reads(_drawn), Range(0, 2**32 - 1)]
MOST_ENVS = 65_536  # each is an object, or a process
EnvCount = Annotated[int, Range(1, MOST_ENVS)]
Widths = Annotated[tuple[Annotated[int, Range(1, 16_384)], ...], Length(100)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


class Checked:
    """A base of config dataclasses: what their fields are given is converted and checked wherever one is made."""

    group: ClassVar[str] = ""
    """How the command line prefixes the options, as ``kl.``."""

    def __init_subclass__(cls) -> None:
        for name in set(vars(cls)) - set(vars(cls).get("__annotations__", {})) - {"group"}:
            if any(name in vars(base).get("__annotations__", {}) for base in cls.__mro__[1:]):
                raise TypeError(f"{cls.__name__}.{name} has no type, and would change no default: annotate it")

    def __post_init__(self) -> None:
        for name, value in _converted(type(self), vars(self), self.group).items():
            object.__setattr__(self, name, value)


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
    return cls(**_converted(cls, data, path))


def _converted(cls: type, data: Mapping[str, Any], path: str) -> dict[str, Any]:
    fields = field_types(cls)
    # Within a group, what is not given is as this class has it, which need not be the group's own default.
    groups = {name: value for name, value in _defaults(cls).items() if dataclasses.is_dataclass(fields[name])}
    converted = {}
    for key, value in data.items():
        if key not in fields:
            known = [path + name for name in option_names(cls)]
            raise UsageError(f"unknown option {path + key!r}{suggest(path + key, known)}")
        if isinstance(value, Mapping) and dataclasses.is_dataclass(groups.get(key)):
            value = merge(to_dict(groups[key]), value)
        converted[key] = convert(fields[key], value, path + key)
    return converted


def idle(config: Any, usual: Mapping[str, Any] | None = None, path: str = "") -> list[tuple[str, str, str]]:
    """The options that were given, as they are not what ``usual`` or their class has, and do nothing: each with the
    option that it needs, and that one's value where only one will do."""
    found, usual = [], _defaults(type(config)) if usual is None else usual
    for name, kind in field_types(type(config)).items():
        value, default = getattr(config, name), usual[name]
        if dataclasses.is_dataclass(value):
            found += idle(value, vars(default) if dataclasses.is_dataclass(default) else None, f"{path}{name}.")
        elif value != default:
            needs = [mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Needs)]
            found += [(path + name, path + it.field, it.value) for it in needs if not it.met(config)]
    return found


def refuse_idle(config: Any) -> None:
    """Raise UsageError for an option that was given and does nothing without another."""
    for name, needed, value in idle(config):
        raise UsageError(f"{option(name)} does nothing without {option(needed)} {value}".rstrip())


def _defaults(cls: Any) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields}


def option_names(cls: type) -> list[str]:
    """The dataclass's options, those of groups as ``kl.target``."""
    names: list[str] = []
    for name, kind in field_types(cls).items():
        group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        names += [f"{name}.{inner}" for inner in option_names(kind)] if group else [name]
    return names


def convert(annotation: Any, value: Any, path: str) -> Any:
    """Convert ``value`` to the type ``annotation`` and check its range. Raises UsageError that names ``path``."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = to_dict(value)
        if not isinstance(value, Mapping):
            raise UsageError(f"{option(path)} must be a table of options, got {value!r}")
        return build(annotation, value, path + ".")
    value = _plain(value)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for mark in arguments[1:]:
            value = mark.plain(value) if isinstance(mark, Reads) else value
        converted = convert(arguments[0], value, path)
        for mark in arguments[1:]:
            if isinstance(mark, Range | Form | Length | Named) and converted not in mark:
                raise UsageError(f"{option(path)} must be {mark.words(converted)}, got {_short(value)}")
        return converted
    if origin is Literal:
        if value not in arguments:
            choices = ", ".join(map(str, arguments))
            raise UsageError(f"{option(path)} must be one of {choices}, got {value!r}{suggest(str(value), arguments)}")
        return value
    if origin is tuple:
        single = isinstance(value, str) or not isinstance(value, Iterable)
        return tuple(convert(arguments[0], item, path) for item in ([value] if single else value))
    if origin in (Union, types.UnionType):
        raise TypeError(f"{path}: optional fields have no TOML form; use a value that means 'off'")
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UsageError(f"{option(path)} must be a table of names and values, got {value!r}")
        return dict(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(min(max(value, -(10**300)), 10**300))  # more is no float, and refused as too large below
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e5 in a TOML file
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise UsageError(f"{option(path)} must be {_TYPE_NAMES.get(annotation, annotation)}, got {value!r}")
    if annotation is str and any("\ud800" <= c <= "\udfff" for c in value):
        raise UsageError(f"{option(path)} must be a text in UTF-8, got {value!r}")
    return value


def _short(value: Any) -> str:
    return str(value) if len(str(value)) <= 80 else f"{str(value)[:77]}..."


def _plain(value: Any) -> Any:
    """The value as JSON has it, where it has it: Python's own number for numpy's or torch's, a path's text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.item() if getattr(value, "shape", None) == () else value


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
