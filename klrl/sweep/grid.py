"""The settings of a sweep: every combination of the values that options are given, each complete and validated."""

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from klrl.agents import registry
from klrl.config import flatten, idle, merge, refuse_idle, to_dict
from klrl.errors import UsageError
from klrl.training.run import resolve

_MOST_SETTINGS = 10_000
_OWN = {"seed": "--seeds", "run_dir": "--run-dir", "quiet": "--quiet", "verbose": "--quiet", "imports": "--import"}


@dataclass(frozen=True)
class Setting:
    name: str
    """Every option that was set, also the folder's name."""
    label: str
    """Those that differ between settings."""
    options: dict[str, Any]
    """A run's ``config.toml``, seed aside."""


def parse_choices(words: Iterable[str]) -> dict[str, list[Any]]:
    """Each option's values, from words like ``kl.target=0.01,0.02``. Raises UsageError for words of another form."""
    choices: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        values = parse_values(text)
        if not name or not equals or not values:
            raise UsageError(f"--set {word}: must be OPTION=VALUE[,VALUE...], as kl.target=0.01,0.02")
        if name in _OWN:
            raise UsageError(f"--set {word}: the sweep has {_OWN[name]} for that")
        if any(f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}.") for other in choices):
            raise UsageError(f"--set {word}: {name} is given twice; separate its values by commas")
        choices[name] = values
    return choices


def parse_values(text: str) -> list[Any]:
    """The values between commas, each read as TOML, or as text where it is not TOML."""
    try:
        return tomllib.loads(f"values = [{text}]")["values"]
    except tomllib.TOMLDecodeError:
        return [value for part in text.split(",") for value in parse_values(part)] if "," in text else [text.strip()]


def expand(
    agent: str,
    env: str,
    choices: Mapping[str, Sequence[Any]],
    imports: Sequence[str] = (),
    network: str = "",
    *,
    named: Collection[str] = (),
) -> list[Setting]:
    """Every combination of the choices' values, complete. Raises UsageError where ``klrl train`` would refuse one.

    An option that does nothing where a choice leaves out what it needs (``bottleneck.target`` without a
    ``bottleneck.size``) is not set there. ``named``: the options that settings' labels name even where they have one
    value.
    """
    settings: list[Setting] = []
    if (count := math.prod(map(len, choices.values()))) > _MOST_SETTINGS:
        raise UsageError(f"--set gives {count:,} combinations: at most {_MOST_SETTINGS:,}")
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        base = {"imports": list(imports), "network": network}
        run, own = resolve(registry.find(agent, env), env, _tree(base, chosen))
        if unused := {name for name, needed, _ in idle(own) if needed in choices}:
            used = {name: value for name, value in chosen.items() if name not in unused}
            run, own = resolve(registry.find(agent, env), env, _tree(base, used))
        refuse_idle(own)
        options = {"agent": agent.lower(), "env_id": env, **to_dict(run), **to_dict(own)}
        texts = {key: f"{key}={_text(flatten(options).get(key, chosen[key]))}" for key in sorted(choices)}
        name = file_name(",".join(texts.values()) or "default")
        label = " ".join(text for key, text in texts.items() if key in named or len(choices[key]) > 1) or env
        settings.append(Setting(name, label, options))
    return list({json.dumps(setting.options, sort_keys=True): setting for setting in reversed(settings)}.values())[::-1]


def _tree(base: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with options that are named as ``kl.target``."""
    options = dict(base)
    for path, value in chosen.items():
        options = merge(options, reduce(lambda part, key: {key: part}, reversed(path.split(".")), value))
    return options


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def file_name(text: str) -> str:
    """``text`` as the name of a file or folder: safe and at most 200 bytes long."""
    safe = re.sub(r"[/\\:]", "_", text)
    return safe if len(safe.encode()) <= 200 else f"{safe[:120]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
