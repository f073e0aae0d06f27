"""The command: ``klrl train | resume | distill | sweep | eval | report | compare | record | export | push | list |
plot | completion``.

torch is imported only inside the commands.
"""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from klrl import __version__
from klrl.cli.options import parse, parse_command, wants_help
from klrl.config import refuse_idle
from klrl.console import fail, keep_standard_files, printable, rank, say
from klrl.errors import (
    LOST,
    EnvironmentFailedError,
    Interrupted,
    NonFiniteError,
    RankLostError,
    RanksDifferError,
    UsageError,
    needs,
    one_line,
)
from klrl.spelling import suggest

# What NumPy and torch say, as ValueError or RuntimeError, of sizes that no machine has.
_OUT_OF_MEMORY = ("memory", "array is too big", "Maximum allowed dimension", "calculation overflowed")
_USAGE = """usage: klrl COMMAND ...

Reinforcement learning that always knows how far each update moved the policy.

commands:
  klrl train AGENT ENV [options]   train an agent, e.g. klrl train ppo CartPole-v1
  klrl resume RUN [options]        go on with a run that was stopped, as if it had not been
  klrl distill RUN... [options]    train a student to act as a trained agent does, or several
  klrl sweep AGENT ENV [options]   train a grid of settings and seeds, and report on it
  klrl eval RUN [options]          evaluate a run or checkpoint
  klrl report RUN... [options]     one file that shows what runs did: figures, scores, anomalies
  klrl compare A B [options]       how two policies differ: KL both ways, JS, returns
  klrl record RUN [options]        a video of a run's policy
  klrl export RUN [options]        the policy as an ONNX or torch file that runs without klrl
  klrl push RUN USER/NAME          the run to the Hugging Face Hub, with a card
  klrl list                        agents, presets and their measured scores
  klrl plot FIGURE [options]       kl-gaussian, kl-2d, fit or families, as .png or .svg
  klrl completion SHELL            a script that completes all this in bash or zsh, e.g. for bash
                                   klrl completion bash > ~/.local/share/bash-completion/completions/klrl
  klrl COMMAND --help              a command's options
  klrl COMMAND ... --debug         the traceback behind an error of one line
  klrl --version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 training failed, 2 bad input, both with one line on stderr.

    A run stopped by SIGHUP, SIGINT or SIGTERM was saved and exits with 129, 130 or 143.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    keep_standard_files()
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    try:
        _dispatch(arguments)
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UsageError, NonFiniteError, EnvironmentFailedError, OSError) as problem:
        if debug:
            say(_traceback(problem), "stderr")
        fail(" ".join(str(problem).split()))
        sys.exit(2 if isinstance(problem, UsageError) else 1)
    except (RankLostError, RanksDifferError) as problem:
        fail(str(problem))
        sys.exit(LOST if isinstance(problem, RankLostError) else 1)
    except (MemoryError, RuntimeError, ValueError) as problem:
        if not (isinstance(problem, MemoryError) or any(word in str(problem) for word in _OUT_OF_MEMORY)):
            raise
        fail(f"there is not enough memory for these options: {one_line(problem)}")
        sys.exit(2)
    except Interrupted as stop:
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        sys.exit(130)


def _traceback(problem: BaseException) -> str:
    """The traceback with those of the exceptions behind it, which ``from None`` leaves out."""
    behind: BaseException | None = problem
    while behind is not None:
        behind.__suppress_context__ = False
        behind = behind.__cause__ or behind.__context__
    return "".join(traceback.format_exception(problem)).rstrip()


def _dispatch(arguments: list[str]) -> None:
    if not arguments or wants_help(arguments[:1]) or arguments == ["help"]:
        print(_USAGE, end="")
        return
    if arguments[0] == "--version":
        print(f"klrl {__version__}")
        return
    if arguments[0] not in _COMMANDS:
        raise UsageError(f"unknown command {arguments[0]!r}{suggest(arguments[0], _COMMANDS)}; see klrl --help")
    _COMMANDS[arguments[0]](arguments[1:])


def _train(arguments: list[str]) -> None:
    from klrl.cli.train import train

    train(arguments)


def _distill(arguments: list[str]) -> None:
    from klrl.cli.train import distill

    distill(arguments)


def _resume(arguments: list[str]) -> None:
    from klrl.training.launch import launch
    from klrl.training.options import ResumeConfig
    from klrl.training.run import processes_of, resume

    example = "resume needs a run folder: klrl resume runs/ppo-CartPole-v1-0-..."
    (run,), given = parse_command(ResumeConfig, arguments, "resume RUN", 1, 1, example)
    if rank() is None and (processes := given.processes or processes_of(run)) > 1:
        launch(["resume", *arguments], processes)
    resume(run, **vars(given))


def _sweep(arguments: list[str]) -> None:
    from klrl.sweep.sweep import SweepConfig, sweep

    example = "sweep needs an agent and an env: klrl sweep ppo CartPole-v1 --seeds 5"
    (agent, env), given = parse_command(SweepConfig, arguments, "sweep AGENT ENV", 2, 2, example)
    sweep(agent, env, given)


def _report(arguments: list[str]) -> None:
    from klrl.analysis.report import ReportConfig, report

    example = "report needs run folders: klrl report runs/ppo-CartPole-v1-0-..."
    _show(report(*parse_command(ReportConfig, arguments, "report RUN...", 1, math.inf, example)))


def _compare(arguments: list[str]) -> None:
    from klrl.analysis.compare import compare
    from klrl.analysis.comparison import CompareConfig

    example = "compare needs two runs or checkpoints: klrl compare runs/a runs/b"
    (a, b), given = parse_command(CompareConfig, arguments, "compare A B", 2, 2, example)
    _show(compare(a, b, given))


def _record(arguments: list[str]) -> None:
    from klrl.analysis.record import RecordConfig, record

    example = "record needs a run folder or checkpoint: klrl record runs/a"
    (run,), given = parse_command(RecordConfig, arguments, "record RUN", 1, 1, example)
    _show(*map(str, record(run, given)))


def _export(arguments: list[str]) -> None:
    from klrl.analysis.export import ExportConfig, export

    example = "export needs a run folder or checkpoint: klrl export runs/a --output policy.onnx"
    (run,), given = parse_command(ExportConfig, arguments, "export RUN", 1, 1, example)
    written = export(run, **vars(given))
    _show(f"{written.path}: acts as klrl on {written.check}")


def _push(arguments: list[str]) -> None:
    from klrl.analysis.push import PushConfig, push

    example = "push needs a run folder and the repository's name: klrl push runs/a user/name"
    (run, name), given = parse_command(PushConfig, arguments, "push RUN USER/NAME", 2, 2, example)
    _show(push(run, name, given))


def _eval(arguments: list[str]) -> None:
    from klrl.agents.actor import Actor
    from klrl.agents.governed import Governed
    from klrl.agents.reference import UNIFORM
    from klrl.training.evaluation import EvalConfig, evaluation_seed, run_episodes, summary
    from klrl.training.load import load_policy

    example = "eval needs a run folder or checkpoint: klrl eval runs/ppo-CartPole-v1-0-..."
    (run,), given = parse_command(EvalConfig, arguments, "eval RUN", 1, 1, example)
    refuse_idle(given)
    trained = load_policy(run, given.checkpoint, given.imports)
    agent: Actor = trained.agent
    if given.govern:
        reference: Any = UNIFORM if given.govern == UNIFORM else load_policy(given.govern).agent
        agent = Governed(trained.agent, reference, given.kappa)
    with closing(trained.make_envs(given.episodes, given.env_id)) as envs:
        seed = evaluation_seed("afterwards", trained.config.seed)
        score = run_episodes(agent, envs, seed, not given.stochastic, episodes=given.episodes)
    env = given.env_id or trained.env
    governed = {"govern": given.govern, "kappa": given.kappa} if given.govern else {}
    if given.json:
        print(json.dumps({"env_id": env, **governed, **score._asdict()}))
    else:
        note = f", within {given.kappa:g} nats of {given.govern}" if given.govern else ""
        _show(summary(score, f" of {env}{note}"))


def _list(arguments: list[str]) -> None:
    if wants_help(arguments[:1]):
        print(
            "usage: klrl list\n\nAgents, presets and their measured scores; beneath a preset, those with other rules."
        )
        return
    if arguments:
        raise UsageError(f"list takes no arguments, got {arguments[0]!r}")
    from klrl.analysis import tables
    from klrl.envs.make import presets

    rows = []
    for env_id, entries in presets().items():
        for agent, entry in entries.items():
            rows.append((agent, env_id, *_measured(entry.get("measured")), entry["source"]))
            rows += [("", f"with {rule}", *_measured(of), "") for rule, of in entry.get("scores", {}).items()]
    tables.show(("agent", "env", "steps", "mean return", "seeds", "preset from"), rows, "<<>><<")


def _measured(score: dict[str, Any] | None) -> tuple[str, str, str]:
    """Steps, mean return and seeds of a preset's score, as cells."""
    if score is None:
        return "", "not measured", ""
    seeds = " ".join(map(str, score["seeds"]))
    return f"{score['steps']:,}", f"{score['mean']:.1f} +- {score['std']:.1f}", seeds


def _plot(arguments: list[str]) -> None:
    with needs("plot", "matplotlib"):
        from klrl.analysis import plots
    name, words = ("FIGURE", arguments) if wants_help(arguments) else ("".join(arguments[:1]), arguments[1:])
    given = parse(plots.PlotConfig, words, f"klrl plot {name}")
    if name not in plots.FIGURES:
        raise UsageError(
            f"plot needs one of {', '.join(plots.FIGURES)}, got {name or 'nothing'}{suggest(name, plots.FIGURES)}"
        )
    path = plots.figure_path(given.output or f"{name}.png", "--output")
    plots.FIGURES[name](given).savefig(path, dpi=150)
    print(path)


def _show(*lines: str) -> None:
    """Print what may hold names of others."""
    print(*map(printable, lines), sep="\n")


def _completion(arguments: list[str]) -> None:
    if wants_help(arguments[:1]):
        print("usage: klrl completion bash|zsh\n\nPrint a script that completes commands, agents, envs and options.")
        return
    from klrl.cli.completion import script

    print(script(" ".join(arguments), _COMMANDS), end="")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "resume": _resume,
    "distill": _distill,
    "sweep": _sweep,
    "eval": _eval,
    "report": _report,
    "compare": _compare,
    "record": _record,
    "export": _export,
    "push": _push,
    "list": _list,
    "plot": _plot,
    "completion": _completion,
}
