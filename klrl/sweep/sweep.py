"""Training a grid of settings and seeds on this machine's cores, a process for each cell, with a report at the end."""

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Self, get_args

import tyro
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from klrl.analysis.report import ReportConfig, report
from klrl.analysis.scores import score_of
from klrl.config import Count, PositiveInt
from klrl.envs.make import EnvConfig, check, import_module, make_vector
from klrl.errors import Interrupted, UsageError
from klrl.sweep.grid import expand, file_name, parse_choices
from klrl.sweep.trial import Cell, State
from klrl.training.signals import Signals

_POLL, _REDRAW = 0.1, 1.0  # seconds


@dataclass(frozen=True)
class SweepConfig:
    seeds: PositiveInt = 5
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
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Packages to import first, for the environments they register."""


def sweep(agent: str, env: str, config: SweepConfig) -> None:
    """Train every setting with every seed, in processes of their own, and write a report on them.

    Everything is validated before anything is written. The same command again goes on: cells that are finished are
    left alone, others resumed, those that another process is at work on waited for. A failing cell does not stop the
    others. Raises UsageError for bad input, ChildProcessError at the end where a cell failed, and Interrupted after
    SIGINT or SIGTERM, once every process has saved; a second SIGINT ends them at once.
    """
    for package in config.imports:
        import_module(package, f"--import {package}")
    check(env)
    settings = expand(agent, env, parse_choices(word for words in config.set for word in words or [""]), config.imports)
    for i, setting in enumerate(settings):
        if setting.options["env"] not in [other.options["env"] for other in settings[:i]]:
            make_vector(env, 1, EnvConfig(kwargs=setting.options["env"]["kwargs"])).close()
    folder = Path(config.run_dir) / file_name(config.name or f"sweep-{agent}-{env}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UsageError(f"--run-dir {config.run_dir}: {problem.strerror or problem}") from None
    cells = [Cell(setting, seed, folder / setting.name) for setting in settings for seed in range(config.seeds)]
    for cell in cells:
        cell.read()
    with Signals() as signals:
        try:
            with Display(cells, config.quiet) as display:
                _work(cells, config.jobs or _cores(), signals, display)
        except BaseException as problem:
            _stop(cells, problem.signum if isinstance(problem, Interrupted) else signal.SIGTERM)
            raise
    _conclude(cells, folder)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(cells: list[Cell], jobs: int, signals: Signals, display: "Display") -> None:
    """Let at most ``jobs`` processes work until every cell is finished or failed."""
    while True:
        for cell in cells:
            cell.poll()
        free = jobs - sum(cell.state in ("running", "elsewhere") for cell in cells)
        for cell in cells:
            if cell.state == "elsewhere":
                cell.begin()  # it may have ended, there
            elif cell.state == "waiting" and free > 0:
                free -= cell.begin()
        display.show()
        signals.check()
        if all(cell.state in ("finished", "failed") for cell in cells):
            return
        time.sleep(_POLL)


def _stop(cells: list[Cell], signum: int) -> None:
    """Let every process save and end."""
    processes = [cell.process for cell in cells if cell.process is not None]
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
    for cell in cells:
        cell.poll()
    done = sum(cell.state == "finished" for cell in cells)
    print(f"stopped with {done} of {len(cells)} cells finished; the same command goes on", file=sys.stderr, flush=True)


class Display:
    """The cells' progress: a live table on a terminal; elsewhere a line when a cell begins and when it ends."""

    def __init__(self, cells: list[Cell], quiet: bool) -> None:
        self._cells, self._quiet = cells, quiet
        self._shown: dict[int, str] = {}
        self._next = 0.0
        self._live: Live | None = None
        if not quiet and sys.stdout.isatty():
            self._live = Live(console=Console(), auto_refresh=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._live is not None:
            if kind is None:
                self._live.update(table(self._cells, len(self._cells)), refresh=True)
            self._live.stop()

    def show(self) -> None:
        """Show what has changed."""
        if self._live is not None and time.monotonic() >= self._next:
            start = time.monotonic()
            for cell in self._cells:
                if cell.state in ("running", "elsewhere"):
                    cell.read()
            self._live.update(table(self._cells, self._live.console.height - 4), refresh=True)
            self._next = time.monotonic() + max(_REDRAW, 20 * (time.monotonic() - start))  # reading takes time, too
        elif self._live is None and not self._quiet:
            for i, cell in enumerate(self._cells):
                if cell.state not in ("waiting", self._shown.get(i)):
                    self._shown[i] = cell.state
                    print("  ".join(text for text in [*row(cell), cell.problem] if text), flush=True)


def row(cell: Cell) -> list[str]:
    """What is known of a cell: setting, seed, state, progress, speed, return, KL; "" for what is not yet."""
    history, total = cell.history, cell.setting.options["total_timesteps"]
    words = [cell.setting.label, f"seed {cell.seed}", cell.state]
    if history is None or not history.steps:
        return [*words, "", "", "", ""]
    figures = {tag: history.last(tag) for tag in ("time/fps", "kl/mean", "kl/limit")}
    limit = f" of {figures['kl/limit']:g}" if history.has("kl/limit") else ""
    words += [f"{100 * min(history.steps / total, 1):.0f}%", f"{figures['time/fps']:,.0f}/s"]
    score = "" if math.isnan(history.final_return) else f"return {history.final_return:.1f}"
    return [*words, score, f"KL {figures['kl/mean']:.4f}{limit}"]


def table(cells: Sequence[Cell], room: int) -> Table:
    """A row for each cell; where there is no room for all, for those at work, failed, waiting and finished, in turn."""
    ranks = get_args(State)
    shown = sorted(cells, key=lambda cell: ranks.index(cell.state))[: max(room, 1)]
    counts = {state: sum(cell.state == state for cell in cells) for state in ranks}
    caption = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    drawn = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for i in range(7):
        drawn.add_column(justify="right" if i > 2 else "left", no_wrap=True)
    for cell in cells:
        if cell in shown:
            drawn.add_row(*map(escape, row(cell)))
    return drawn


def _conclude(cells: Sequence[Cell], folder: Path) -> None:
    """Print the scores, write the report, and name what failed."""
    scores = Table(box=None, pad_edge=False)
    for name in ("setting", "seeds", "mean return"):
        scores.add_column(name, justify="left" if name == "setting" else "right")
    for setting in dict.fromkeys(cell.setting.name for cell in cells):
        here = [cell for cell in cells if cell.setting.name == setting]
        runs = [cell.history for cell in here if cell.state == "finished" and cell.history is not None]
        score = score_of(runs)
        text = "-" if score is None else f"{score.mean:.1f} +- {score.std:.1f}"
        scores.add_row(escape(here[0].setting.label), f"{len(runs)} of {len(here)}", text)
    Console(width=None if sys.stdout.isatty() else 140).print(scores)
    if any(cell.state == "finished" for cell in cells):
        print(f"report      {_report(folder)}", flush=True)
    failed = [cell for cell in cells if cell.state == "failed"]
    for cell in failed:
        print(f"klrl: {cell.setting.label} seed {cell.seed} failed: {cell.problem}", file=sys.stderr, flush=True)
    if failed:
        raise ChildProcessError(f"{len(failed)} of {len(cells)} cells failed; the same command tries them again")


def _report(folder: Path) -> str:
    """On every run in the sweep's folder, those of an earlier grid included."""
    if find_spec("matplotlib"):
        return report([str(folder)], ReportConfig(str(folder / "report.html")))
    return report([str(folder)], ReportConfig(str(folder / "report.md"), "md"))
