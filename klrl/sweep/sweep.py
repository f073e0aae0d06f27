"""Training a grid of settings and seeds on this machine's cores, a process for each trial, with a report at the end."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from klrl.agents import registry
from klrl.agents.base import Agent
from klrl.analysis import tables
from klrl.analysis.report import ReportConfig, report
from klrl.analysis.scores import score_of
from klrl.config import Checked, Count, PositiveInt, Range, cores, option
from klrl.console import attempt, is_terminal, printable, say, warn
from klrl.envs.make import Imports, check, import_module, import_packages, make_vector, module_of
from klrl.errors import Interrupted, UsageError, refusals
from klrl.policies.own import names_in
from klrl.sweep.grid import Setting, expand, file_name, parse_choices
from klrl.sweep.on_ray import run_on_ray
from klrl.sweep.search import Proposals, ranges_in
from klrl.sweep.trial import Status, Trial
from klrl.training.options import RayConfig
from klrl.training.run import config_of
from klrl.training.signals import Signals
from klrl.training.start import start_from

_POLL, _REDRAW = 0.1, 1.0  # seconds


@dataclass(frozen=True)
class SweepConfig(Checked):
    seeds: Annotated[int, Range(1, 10_000)] = 5
    """Runs of each setting, with the seeds 0, 1, 2 and so on."""
    set: Annotated[
        tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="OPTION=VALUE,...")
    ] = ()
    """Options of klrl train: one value holds for all runs, several make a dimension of the grid.
    Values are TOML's, texts without quotes: --set kl.target=0.01,0.02 kl.stop=1,2 "hidden_sizes=[64,64],[256]"."""
    jobs: Count = 0
    """Processes at once; 0 is one for each core."""
    run_dir: str = "runs"
    """The folder in which the sweep's own folder lies."""
    name: str = ""
    """The sweep's folder, by default sweep-AGENT-ENV. In it lies one for each setting, with a run for each seed."""
    quiet: bool = False
    """Print only the final scores and where the report lies."""
    imports: Imports = ()
    network: str = ""
    """A network of one's own for all runs, module:Class, as for klrl train; --set network=a:A,b:B compares some."""
    search: Literal["grid", "optuna"] = "grid"
    """Every combination, or such as Optuna proposes (the extra optuna), where a --set may be a range:
    learning_rate=log:1e-4..1e-2 batch_size=32..512"""
    trials: PositiveInt = 20
    """How many settings optuna proposes, each with all seeds."""
    on: Literal["here", "ray"] = "here"
    """Work in this machine's processes, or on Ray (the extra ray), whose machines all see --run-dir."""
    scheduler: Literal["none", "asha"] = "none"
    """On Ray: stop trials early whose evaluations are among the poorer (asha)."""
    ray: RayConfig = field(default_factory=RayConfig)


def sweep(agent: str, env: str, config: SweepConfig) -> None:
    """Train every setting with every seed, in processes of their own, and write a report on them.

    Everything is validated before anything is written. Running the same command again continues the sweep: finished
    trials are left alone, stopped ones resumed, and those that another process works on waited for. A failing trial
    does not stop the others. Raises UsageError for bad input, ChildProcessError at the end where a trial failed, and
    Interrupted after SIGINT, SIGTERM or SIGHUP, once every process has saved; a second SIGINT ends them at once.
    """
    import_packages(config.imports)
    registry.find(agent, env)
    check(env)
    words = [word for words in config.set for word in words or [""]]
    ranges = ranges_in(words) if config.search == "optuna" else {}
    choices = parse_choices(word for word in words if word.partition("=")[0] not in ranges)
    if config.scheduler != "none" and config.on != "ray":
        raise UsageError(f"--scheduler {config.scheduler} is Ray's: give --on ray, too")
    made = partial(expand, agent, env, imports=config.imports, network=config.network)
    if config.on == "ray" and find_spec("ray") is None:
        raise UsageError('this needs ray: pip install "klrl[ray]"')
    propose = Proposals(made, choices, ranges) if config.search == "optuna" else None
    settings = made(choices) if propose is None else [propose.example()]
    check_settings(registry.find(agent, env), env, settings)
    folder = Path(config.run_dir) / file_name(config.name or f"sweep-{agent.lower()}-{env}")
    with refusals(f"--run-dir {config.run_dir}"):
        folder.mkdir(parents=True, exist_ok=True)
    trials: list[Trial] = []

    def run(settings: Sequence[Setting]) -> list[Trial]:
        new = [Trial(one, seed, folder.absolute() / one.name) for one in settings for seed in range(config.seeds)]
        known = {(trial.folder, trial.seed): trial for trial in trials}  # what is proposed again is not run again
        trials.extend(trial for trial in new if (trial.folder, trial.seed) not in known)
        new = [known.get((trial.folder, trial.seed), trial) for trial in new]
        for trial in new:
            trial.read()
        if config.on == "ray":
            run_on_ray(new, config.ray, config.scheduler, show)
        else:
            run_trials(new, config.jobs or cores(), signals, show)
        return new

    with Signals() as signals:
        try:
            with _display(trials, config.quiet) as show:
                if propose is None:
                    run(settings)
                else:
                    propose.search(folder, config.trials, run)
        except BaseException as problem:
            stop_trials(trials, problem.signum if isinstance(problem, Interrupted) else signal.SIGTERM)
            raise
    _finish(trials, folder)


def check_settings(agent_class: type[Agent], env: str, settings: Sequence[Setting]) -> None:
    """Raise UsageError for a setting whose agent could not begin to learn, as its options contradict each other."""
    spaces: dict[str, Any] = {}
    for setting in settings:
        for path, name in names_in(setting.options).items():
            import_module(module_of(name), f"{option(path)} {name}")
        run, own = config_of(agent_class, setting.options)
        if (key := json.dumps(setting.options["env"])) not in spaces:
            with closing(make_vector(env, 1, run.env)) as envs:
                spaces[key] = envs.single_observation_space, envs.single_action_space
        agent = agent_class(spaces[key][0], spaces[key][1], own, network=run.network or None)
        agent.prepare()
        if run.init_from:
            start_from(agent, run.init_from)


def run_trials(trials: list[Trial], jobs: int, signals: Signals, show: Callable[[], None]) -> None:
    """Let at most ``jobs`` processes work until every trial is finished or failed."""
    while True:
        for trial in trials:
            trial.poll()
        free = jobs - sum(trial.status in ("running", "elsewhere") for trial in trials)
        for trial in trials:
            if trial.status == "elsewhere":
                trial.begin()  # it may have ended, there
            elif trial.status == "waiting" and free > 0:
                free -= trial.begin()
        show()
        signals.check()
        if all(trial.status in ("finished", "stopped", "failed") for trial in trials):
            return
        time.sleep(_POLL)


def stop_trials(trials: list[Trial], signum: int) -> None:
    """Send the signal to every process and wait until it has saved; a second signal meanwhile kills them."""
    processes = [trial.process for trial in trials if trial.process is not None]
    try:
        for process in processes:
            process.send_signal(signum)
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    for trial in trials:
        trial.poll()
    done = sum(trial.status == "finished" for trial in trials)
    text = f"stopped with {done} of {len(trials)} trials finished; the same command goes on"
    say(text, "stderr")


@contextmanager
def _display(trials: list[Trial], quiet: bool) -> Iterator[Callable[[], None]]:
    """What shows the trials' progress: in a live table on a terminal; elsewhere a line where one begins and ends."""
    shown: dict[int, str] = {}
    due = 0.0

    def print_changes() -> None:
        for i, trial in enumerate(trials):
            if trial.status not in ("waiting", shown.get(i)):
                shown[i] = trial.status
                say("  ".join(text for text in [*row(trial), trial.problem] if text))

    def redraw() -> None:
        nonlocal due
        if (start := time.monotonic()) >= due:
            for trial in trials:
                if trial.status in ("running", "elsewhere"):
                    trial.read()
            attempt(lambda: live.update(table(trials, live.console.height - 4), refresh=True))
            due = time.monotonic() + max(_REDRAW, 20 * (time.monotonic() - start))  # reading takes time, too

    if quiet or not is_terminal():
        yield (lambda: None) if quiet else print_changes
    else:
        with Live(console=Console(), auto_refresh=False) as live:
            yield redraw
            attempt(lambda: live.update(table(trials, len(trials)), refresh=True))


def row(trial: Trial) -> list[str]:
    """A trial's setting, seed, status, progress, speed, return and KL, as words; "" for what is not known yet."""
    history, total = trial.history, trial.setting.options["total_timesteps"]
    words = [trial.setting.label, f"seed {trial.seed}", trial.status]
    if history is None or not history.steps:
        return [*words, "", "", "", ""]
    metrics = {tag: history.last(tag) for tag in ("time/fps", "kl/mean", "kl/limit")}
    limit = f" of {metrics['kl/limit']:g}" if history.has("kl/limit") else ""
    words += [f"{100 * min(history.steps / total, 1):.0f}%", f"{metrics['time/fps']:,.0f}/s"]
    score = "" if math.isnan(history.final_return) else f"return {history.final_return:.1f}"
    return [*words, score, f"KL {metrics['kl/mean']:.4f}{limit}"]


def table(trials: Sequence[Trial], room: int) -> Table:
    """A table with a row for each trial; where not all fit, running ones go first, then failed, waiting, finished."""
    ranks = get_args(Status)
    shown = sorted(trials, key=lambda trial: ranks.index(trial.status))[: max(room, 1)]
    counts = {status: sum(trial.status == status for trial in trials) for status in ranks}
    caption = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    drawn = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for i in range(7):
        drawn.add_column(justify="right" if i > 2 else "left", no_wrap=True)
    for trial in trials:
        if trial in shown:
            drawn.add_row(*(escape(printable(word)) for word in row(trial)))
    return drawn


def _finish(trials: Sequence[Trial], folder: Path) -> None:
    """Print the scores, write the report, and name what failed."""
    scores = []
    for setting in dict.fromkeys(trial.setting.name for trial in trials):
        here = [trial for trial in trials if trial.setting.name == setting]
        runs = [trial.history for trial in here if trial.status == "finished" and trial.history is not None]
        score = score_of(runs)
        text = "-" if score is None else f"{score.mean:.1f} +- {score.std:.1f}"
        scores.append((here[0].setting.label, f"{len(runs)} of {len(here)}", text))
    attempt(lambda: tables.show(("setting", "seeds", "mean return"), scores, "<>>"))
    if any(trial.status == "finished" for trial in trials):
        # On every run in the folder, those of an earlier grid included.
        form: Literal["html", "md"] = "html" if find_spec("matplotlib") else "md"
        say(f"report      {report([str(folder)], ReportConfig(str(folder / f'report.{form}'), form))}")
    failed = [trial for trial in trials if trial.status == "failed"]
    for trial in failed:
        warn(f"{trial.setting.label} seed {trial.seed} failed: {trial.problem}")
    if failed:
        raise ChildProcessError(f"{len(failed)} of {len(trials)} trials failed; the same command tries them again")
