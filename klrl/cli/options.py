"""Parsing of the command line: positional words, options by tyro, and errors of one line."""

import contextlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, TypeVar, get_args, get_origin

from klrl.config import field_types
from klrl.errors import UsageError
from klrl.spelling import suggest

C = TypeVar("C")


def parse_command(
    cls: type[C], arguments: Sequence[str], usage: str, least: int, most: float, example: str
) -> tuple[list[str], C]:
    """The positional words, before or after the options, and the dataclass ``cls`` from the options, checked.

    Raises UsageError, with the ``example`` where there are fewer than ``least`` words or more than ``most``.
    """
    parsed, words = _parse(cls, arguments, f"klrl {usage}")
    if not least <= len(words) <= most:
        raise UsageError(example)
    return words, parsed


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether --help is among the arguments, with which no positional word is needed."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def parse(cls: Any, arguments: Sequence[str], prog: str, about: str | None = None) -> Any:
    """Parse with tyro, and with numbers like 1e5 and 100_000, name=value tables, and errors of one line.

    ``about`` is the help's first line, by default the docstring of ``cls``.
    """
    parsed, words = _parse(cls, arguments, prog, about)
    if words:
        raise UsageError(f"unknown option {words[0]!r}{suggest(words[0], options_of(cls))}")
    return parsed


def _parse(cls: Any, arguments: Sequence[str], prog: str, about: str | None = None) -> tuple[Any, list[str]]:
    """What ``parse`` returns, and the words that belong to no option."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    whole_number = PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: _whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )
    table = PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=lambda words: dict(_pair(word) for word in words),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{key}={json.dumps(part)}" for key, part in value.items()],
    )
    registry = ConstructorRegistry()
    registry.primitive_rule(lambda info: whole_number if info.type is int else None)
    registry.primitive_rule(lambda info: table if dict in (info.type, info.type_origin) else None)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                cls, prog=prog, description=about, args=list(arguments), return_unknown_args=True, registry=registry
            )
    except SystemExit as stop:
        if stop.code:
            raise _refusal(stop) or UsageError(_one_line(errors.getvalue())) from None
        sys.exit(0)
    for word in unknown:
        if word.startswith("-"):
            raise UsageError(f"unknown option {word!r}{suggest(word, options_of(cls))}")
    return parsed, unknown


def _refusal(problem: BaseException | None) -> UsageError | None:
    """What a config raised where it was made, from the exception that tyro made of it."""
    while problem is not None and not isinstance(problem, UsageError):
        problem = problem.__context__
    return problem


def options_of(cls: Any, prefix: str = "--") -> dict[str, Any]:
    """A dataclass's options as they are spelled on the command line, and the type of each."""
    options: dict[str, Any] = {}
    for field, annotation in field_types(cls).items():
        kind, *marks = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        named = [mark.name for mark in marks if getattr(mark, "name", None) is not None]  # by tyro.conf.arg
        name = named[0] if named else field.replace("_", "-")
        if is_dataclass(kind):
            options |= options_of(kind, f"{prefix}{name}." if name else prefix)
        else:
            options[prefix + name] = annotation
    return options


def _whole_number(word: str) -> int:
    """The number that ``word`` spells as 100000, 100_000 or 1e5."""
    try:
        return int(word)
    except ValueError:
        number = float(word)
    if not number.is_integer():
        raise ValueError(f"{word} is not a whole number")
    return int(number)


def _pair(word: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals:
        raise ValueError(f"{word!r} is not of the form name=value")
    try:
        return name, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return name, text


def _one_line(text: str) -> str:
    """The text in the box that tyro prints, up to its rule, as one line."""
    lines = [re.sub(r"[╭╮╰╯│]", " ", line).strip() for line in text.splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if line.startswith("───"):
            break
        kept.append(line)
    return " ".join(" ".join(kept).split()) or "bad command line; see --help"
