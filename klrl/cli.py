"""The command: ``klrl train | resume | eval | list | plot``. torch is imported only inside the commands."""

import contextlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from klrl import __version__
from klrl.config import build, suggest, to_dict
from klrl.errors import EnvironmentFault, Interrupted, NonFiniteError, UsageError

_USAGE = """usage: klrl COMMAND ...

Reinforcement learning that always knows how far each update moved the policy.

commands:
  klrl train AGENT ENV [options]   train an agent, e.g. klrl train ppo CartPole-v1
  klrl resume RUN [options]        go on with a run that was stopped, as if it had not been
  klrl eval RUN [options]          evaluate a run or checkpoint
  klrl list                        agents, presets and their measured scores
  klrl plot FIGURE [options]       kl-gaussian, kl-2d, fit or families, as .png or .svg
  klrl COMMAND --help              a command's options
  klrl --version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 training failed, 2 bad input, both with one line on stderr.

    A run stopped by SIGINT or SIGTERM was saved and exits with 130 or 143.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _dispatch(arguments)
    except UsageError as problem:
        sys.exit(_complain(problem, 2))
    except (NonFiniteError, EnvironmentFault, OSError) as problem:
        sys.exit(_complain(problem, 1))
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(problem: Exception, code: int) -> int:
    print(f"klrl: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return
    if arguments[0] == "--version":
        print(f"klrl {__version__}")
        return
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "resume": _resume,
        "eval": _eval,
        "list": _list,
        "plot": _plot,
    }
    if arguments[0] not in commands:
        raise UsageError(f"unknown command {arguments[0]!r}{suggest(arguments[0], commands)}; see klrl --help")
    commands[arguments[0]](arguments[1:])


def _train(arguments: list[str]) -> None:
    help_wanted = any(word in ("-h", "--help") for word in arguments)
    from klrl import agents

    if help_wanted and (not arguments or arguments[0].startswith("-")):
        arguments = [next(iter(agents.AGENTS)), *arguments]
    names = [word for word in arguments[:2] if not word.startswith("-")]
    if not names or (len(names) < 2 and not help_wanted):
        raise UsageError("train needs an agent and an env: klrl train ppo CartPole-v1")

    from klrl.envs.make import check, import_module
    from klrl.training import RunConfig, resolve, run_training

    agent, env, options = names[0], (names[1] if len(names) == 2 else None), arguments[len(names) :]
    _, config_class = agents.find(agent)
    files = _values(options, "--config")
    saved = _read_config(files[-1], agent) if files else {}
    run_config, agent_config = resolve(agent, env, saved)
    for package in [*run_config.imports, *_values(options, "--import")]:
        import_module(package, f"--import {package}")
    if env is not None:
        check(env)

    import tyro

    whole = tyro.conf.arg(name="")
    command = make_dataclass(
        "options",
        [
            (
                "config",
                Annotated[str, tyro.conf.arg(help="TOML file of options, such as a run's config.toml.")],
                "",
            ),
            ("run", Annotated[RunConfig, whole], run_config),
            ("agent", Annotated[config_class, whole], agent_config),
        ],
        frozen=True,
    )
    given: Any = _parse(command, options, f"klrl train {agent} {env or 'ENV'}")
    run = build(RunConfig, to_dict(given.run))
    run_training(agent, env or "", run, build(config_class, to_dict(given.agent)))


def _resume(arguments: list[str]) -> None:
    help_wanted = any(word in ("-h", "--help") for word in arguments)
    if not help_wanted and (not arguments or arguments[0].startswith("-")):
        raise UsageError("resume needs a run folder: klrl resume runs/ppo-CartPole-v1-0-...")
    path, words = ("RUN", arguments) if help_wanted else (arguments[0], arguments[1:])
    from klrl.training import ResumeConfig, resume

    given = build(ResumeConfig, asdict(_parse(ResumeConfig, words, "klrl resume RUN")))
    resume(path, total_timesteps=given.total_timesteps)


def _eval(arguments: list[str]) -> None:
    help_wanted = any(word in ("-h", "--help") for word in arguments)
    if not help_wanted and (not arguments or arguments[0].startswith("-")):
        raise UsageError("eval needs a run folder or checkpoint: klrl eval runs/ppo-CartPole-v1-0-...")
    path, words = ("RUN", arguments) if help_wanted else (arguments[0], arguments[1:])

    from klrl import training
    from klrl.envs.make import import_module, make_vector, registered
    from klrl.evaluation import FRESH_SEED, EvalConfig, run_episodes

    given = build(EvalConfig, asdict(_parse(EvalConfig, words, "klrl eval RUN")))
    agent, options = training.load_with_options(path, given.checkpoint)
    run_config, _ = training.config_of(options)
    for package in [*run_config.imports, *given.imports]:
        import_module(package, f"--import {package}")
    env = given.env_id or options["env_id"]
    if not given.env_id and not registered(env):
        raise UsageError(f"{path} was trained on {env!r}, which is no env id here: name one with --env-id or --import")
    envs = make_vector(env, given.episodes, run_config.env)
    for name in ("observation_space", "action_space"):
        mine, theirs = getattr(agent, name), getattr(envs, f"single_{name}")
        if mine != theirs:
            raise UsageError(f"{path} was trained on {options['env_id']} with {name} {mine}, but {env} has {theirs}")
    score = run_episodes(agent, envs, run_config.seed + FRESH_SEED, not given.stochastic)
    envs.close()
    if given.json:
        print(json.dumps({"env_id": env, **score._asdict()}))
    else:
        print(f"{score.mean:.1f} +- {score.std:.1f} over {given.episodes} episodes of {env}")


def _list(arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"list takes no arguments, got {arguments[0]!r}")
    from rich.console import Console
    from rich.table import Table

    from klrl.envs.make import presets

    table = Table(box=None, pad_edge=False)
    for column in ("agent", "env", "steps", "mean return", "seeds", "preset from"):
        table.add_column(column, justify="right" if column in ("steps", "mean return") else "left")
    for env_id, entries in presets().items():
        for agent, entry in entries.items():
            measured = entry["measured"]
            score = f"{measured['mean']:.1f} +- {measured['std']:.1f}"
            seeds = " ".join(map(str, measured["seeds"]))
            table.add_row(agent, env_id, f"{measured['steps']:,}", score, seeds, entry["source"])
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _plot(arguments: list[str]) -> None:
    try:
        from klrl import plots
    except ModuleNotFoundError as problem:
        if not (problem.name or "").startswith("matplotlib"):
            raise
        raise UsageError('klrl plot needs matplotlib: pip install "klrl[plot]"') from None
    help_wanted = any(word in ("-h", "--help") for word in arguments)
    name, words = ("FIGURE", arguments) if help_wanted else ("".join(arguments[:1]), arguments[1:])
    given = _parse(plots.PlotConfig, words, f"klrl plot {name}")
    if name not in plots.FIGURES:
        raise UsageError(
            f"plot needs one of {', '.join(plots.FIGURES)}, got {name or 'nothing'}{suggest(name, plots.FIGURES)}"
        )
    path = Path(given.output or f"{name}.png")
    if path.suffix not in (".png", ".svg") or not path.parent.is_dir():
        raise UsageError(f"--output {path}: must end in .png or .svg and lie in a folder that exists")
    plots.FIGURES[name](given).savefig(path, dpi=150)
    print(path)


def _read_config(path: str, agent: str) -> dict[str, Any]:
    try:
        options = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as problem:
        raise UsageError(f"--config {path}: {problem.strerror or problem}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UsageError(f"--config {path} is not valid TOML: {problem}") from None
    if options.pop("agent", agent) != agent:
        raise UsageError(f"--config {path} is of another agent than {agent!r}")
    options.pop("env_id", None)
    return options


def _values(arguments: Sequence[str], name: str) -> list[str]:
    """The words that follow option ``name``, up to the next option: what must be known before the rest is parsed."""
    found: list[str] = []
    taking = False
    for word in arguments:
        if word.startswith(name + "="):
            found.append(word.removeprefix(name + "="))
        taking = (taking and not word.startswith("--")) or word == name
        if taking and word != name:
            found.append(word)
    return found


def _parse(cls: Any, arguments: Sequence[str], prog: str) -> Any:
    """tyro's parser, with numbers like 1e5 and 100_000, name=value tables, and errors of one line."""
    import tyro
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def whole_numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda words: _whole_number(words[0]),
            is_instance=lambda value: isinstance(value, int),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def tables(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[dict[str, Any]] | None:
        if info.type_origin is not dict and info.type != dict[str, Any]:
            return None
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME=VALUE ...]",
            instance_from_str=lambda words: dict(_pair(word) for word in words),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{key}={json.dumps(part)}" for key, part in value.items()],
        )

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                cls, prog=prog, args=list(arguments), return_unknown_args=True, registry=registry
            )
    except SystemExit as stop:
        if stop.code:
            raise UsageError(_one_line(errors.getvalue())) from None
        sys.exit(0)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}{suggest(unknown[0], _option_names(cls))}")
    return parsed


def _option_names(cls: Any, prefix: str = "--") -> list[str]:
    """Every option of a dataclass as it is spelled on the command line."""
    from dataclasses import is_dataclass
    from typing import get_args, get_origin

    from klrl.config import hints

    names: list[str] = []
    for name, annotation in hints(cls).items():
        kind = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
        if is_dataclass(kind):
            merged = name in ("run", "agent")
            names += _option_names(kind, prefix if merged else f"{prefix}{name.replace('_', '-')}.")
        else:
            names.append(prefix + ("import" if name == "imports" else name.replace("_", "-")))
    return names


def _whole_number(word: str) -> int:
    """100000, 100_000 and 1e5."""
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
    """What tyro prints in a box, up to its rule, as one line."""
    lines = [re.sub(r"[╭╮╰╯│]", " ", line).strip() for line in text.splitlines()]
    kept: list[str] = []
    for line in lines[1:]:
        if line.startswith("───"):
            break
        kept.append(line)
    return " ".join(" ".join(kept).split()) or "bad command line; see --help"
