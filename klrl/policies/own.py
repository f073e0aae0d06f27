"""Classes of one's own as parts, by the name "module:Class": found where the module is imported, and never imported."""

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import tyro

from klrl.config import Named, Reads, flatten, option
from klrl.errors import UsageError

OPTIONS = ("network", "head", "kl.penalty", "kl.per_state")
"""The options that may name a class."""


def name_of(part: Any) -> Any:
    """A class's "module:Class", which ``find_class`` finds where it stands in a module; anything else as it is."""
    return f"{part.__module__}:{part.__qualname__}" if isinstance(part, type) else part


def metavar(*known: str) -> Any:
    """How the command's help shows an option that takes one of the ``known`` names, or a class's."""
    return tyro.conf.arg(metavar="{" + ",".join([*known, "module:Class"]) + "}")


def names_in(options: Mapping[str, Any]) -> dict[str, str]:
    """The names of classes in a run's options, each under its option's path."""
    found = {path: name for path, name in flatten(options).items() if path in OPTIONS and isinstance(name, str)}
    return {path: name for path, name in found.items() if ":" in name}


def find_class(name: str, base: type, what: str, path: str) -> Any:
    """The class called "module:Class", derived from ``base``.

    Raises UsageError that names ``what`` it was to be, and the option at ``path``, where no imported module has one.
    """
    module, _, inner = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in inner.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        kind = {"object": "class", "Module": "nn.Module class"}.get(base.__name__, base.__name__)
        unknown = ":" in name and module and module not in sys.modules
        advice = f"{option(path)} module:Class names one"
        if "<locals>" in name:
            advice = "define it outside of a function, so that its name leads to it"
        elif unknown:
            advice = f"--import {module}, if you trust it"
        raise UsageError(f"{what} {name!r} is no imported {kind}: {advice}")
    return found


def make_own(name: str, base: type, what: str, path: str, needs: tuple[str, ...], *arguments: Any) -> Any:
    """An instance of the class called ``name``, made with ``arguments``.

    Raises UsageError where that fails, and where the class, which a run may name, lacks the methods that it ``needs``.
    """
    cls = find_class(name, base, what, path)
    if lacks := [method for method in needs if not callable(getattr(cls, method, None))]:
        raise UsageError(f"{what} {name} cannot be used: it has no method {' and no '.join(lacks)}")
    try:
        return cls(*arguments)
    except Exception as problem:
        raise unusable(what, name, problem) from None


def unusable(what: str, name: str, problem: Exception) -> UsageError:
    """The error that says why a part of one's own cannot be used."""
    text = " ".join(f"{type(problem).__name__}: {problem}".split())
    return UsageError(f"{what} {name} cannot be used: {text}")


_HEADS = ("plain", "state-dependent-std", "beta")
HeadName = Annotated[str, Reads(name_of), Named(_HEADS), metavar(*_HEADS)]
