"""Completion of the command line by the shell: a script that knows commands, agents, environments and options."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, Literal, get_args, get_origin

from klrl.agents import registry
from klrl.cli.options import options_of
from klrl.config import Named
from klrl.envs.make import presets
from klrl.errors import UsageError
from klrl.spelling import suggest

_CONFIGS = {
    "resume": "klrl.training.options:ResumeConfig",
    "sweep": "klrl.sweep.sweep:SweepConfig",
    "eval": "klrl.training.evaluation:EvalConfig",
    "report": "klrl.analysis.report:ReportConfig",
    "compare": "klrl.analysis.compare:CompareConfig",
    "record": "klrl.analysis.record:RecordConfig",
    "export": "klrl.analysis.export:ExportConfig",
    "push": "klrl.analysis.push:PushConfig",
}
_FIRST = {"bash": "", "zsh": "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"}


def script(shell: str, commands: Iterable[str]) -> str:
    """The script that completes klrl's ``commands`` in bash or zsh. Raises UsageError for another shell."""
    if shell not in _FIRST:
        near = suggest(shell, _FIRST)
        raise UsageError(f"completion needs one of {', '.join(_FIRST)}, got {shell or 'nothing'}{near}")
    agents, run = registry.names(), options_of(_config("klrl.training.loop:RunConfig"))
    options = {f"train {name}": run | options_of(registry.find(name).Config) | {"--config": str} for name in agents}
    options["distill *"] = options["train student"]
    options |= {f"{command} *": options_of(_config(path)) for command, path in _CONFIGS.items()}
    places: dict[str, Iterable[str]] = {
        "1 * *": commands,
        "2 completion *": _FIRST,
        "2 train *": agents,
        "2 sweep *": agents,
    }
    places |= {"3 train *": presets(), "3 sweep *": presets()}
    if find_spec("matplotlib") is not None:
        places["2 plot *"] = _config("klrl.analysis.plots:FIGURES")
        options["plot *"] = options_of(_config("klrl.analysis.plots:PlotConfig"))
    choices = {name: _choices(kind) for known in options.values() for name, kind in known.items() if _choices(kind)}
    return f"""{_FIRST[shell]}_klrl() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=
    if [[ $word == -* ]]; then
        case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{_cases(options)}
        esac
    else
        case "$COMP_CWORD ${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{_cases(places)}
        esac
        case "$before" in
{_cases(choices)}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _klrl klrl
"""


def _config(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _choices(kind: Any) -> list[str]:
    """The values of an option that has only a few."""
    while get_origin(kind) is Annotated:
        kind, *marks = get_args(kind)
        if named := [mark for mark in marks if isinstance(mark, Named)]:
            return [*named[0].known]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _cases(words: Mapping[str, Iterable[str]]) -> str:
    """Lines of a shell's case: each key is a pattern of words, in which only * is not taken as it stands."""
    patterns = ['"' + pattern.replace("*", '"*"') + '"' for pattern in words]
    listed = [" ".join(part) for part in words.values()]
    return "\n".join(f'            {p}) words="{text}" ;;' for p, text in zip(patterns, listed, strict=True))
