"""Writers of a run's metrics: to TensorBoard, metrics.jsonl and the terminal."""

import json
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram_raw

from klrl.rundir.console import attempt, is_open, say
from klrl.rundir.folder import replace_file
from klrl.rundir.history import Column, read_rows

# Custom Scalars: what belongs together in one chart, for every agent, as patterns of tags.
_LAYOUT = {
    "KL": {
        "KL and its limit": ["^kl/mean$", "^kl/p95$", "^kl/limit$"],
        "largest KL of a state": ["^kl/max$"],
        "share of the limit": ["^kl/of_limit$"],
        "coefficients: KL penalty, temperature": ["^kl/coef$", "^train/ent_coef$"],
        "predicted and measured": ["^kl/predicted$", "^kl/mean$"],
        "forward and reverse": ["^kl/mean$", "^kl/reverse$"],
        "exact and sampled": ["^kl/mean$", "^kl/k1$", "^kl/k3$"],
    },
    "policy": {
        "return": ["^rollout/ep_rew_mean$", "^eval/mean_reward$"],
        "entropy": ["^entropy/mean$", "^entropy/target$"],
    },
}


class Logger:
    """A writer of each update's metrics: one TensorBoard event that holds all of them, and one line of JSON.

    ``resume_step``: the step from which a resumed run writes; what lies there from before is dropped, in both.
    """

    def __init__(self, folder: Path, hparams: dict[str, Any], resume_step: int | None = None) -> None:
        self._start = time.time()
        if resume_step is not None:
            self._start -= _cut(folder / "metrics.jsonl", resume_step)
            # TensorBoard reads files in the order of their names, which begin with the second.
            while any(folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
                time.sleep(0.05)
        self._events = EventFileWriter(str(folder))
        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=resume_step, session_log=start))
            return
        charts = {title: {name: ("Multiline", tags) for name, tags in part.items()} for title, part in _LAYOUT.items()}
        self._add(custom_scalars(charts), 0)  # type: ignore[no-untyped-call]
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
        self._add(hparams_pb(plain, trial_id=folder.name), 0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``metrics`` (tag to value) at ``step``."""
        self._add(Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]), step)
        # Infinity and NaN are not JSON: they are written as text.
        safe = {k: v if abs(v) < float("inf") else str(v) for k, v in metrics.items()}
        self._lines.write(json.dumps({"step": step, "wall": round(time.time() - self._start, 3), **safe}) + "\n")
        self._lines.flush()

    def write_histogram(self, step: int, tag: str, values: Column) -> None:
        """Record how ``values`` are spread, in 30 bins."""
        counts, edges = np.histogram(values, 30)
        spread = values.min(), values.max(), len(values), values.sum(), np.square(values).sum()
        bins = edges[1:].tolist(), counts.tolist()
        self._add(histogram_raw(tag, *spread, *bins), step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._events.close()
        self._lines.close()

    def _add(self, summary: Summary, step: int) -> None:
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _cut(path: Path, step: int) -> float:
    """Drop the lines from ``step`` on and unreadable ones. Returns the wall-clock seconds of the last one kept."""
    kept, wall = [], 0.0
    for line, row in read_rows(path) if path.exists() else []:
        if row["step"] < step:
            kept.append(line + "\n")
            wall = row.get("wall", wall)
    replace_file(path, "".join(kept))
    return wall


def warn(text: str) -> None:
    """Print a line on stderr, even where ``quiet``."""
    say(f"klrl: {text}", "stderr")


class Pace:
    """A run's steps per second over the last minute, evaluations and saves included, to tell the time left.

    Nothing before the first update counts: until then an off-policy agent does not learn, and is much faster.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def seconds_left(self, step: int, total: int) -> float | None:
        """The seconds from ``step``, reached now, to ``total``; None before there is a pace."""
        now = self._clock()
        self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[1][0] >= 60:
            self._seen.popleft()
        (then, before), gained = self._seen[0], step - self._seen[0][1]
        return max(total - step, 0) * (now - then) / gained if step > before else None


class Console:
    """A run's progress: one live line on a terminal; elsewhere a plain line each tenth, and at least each minute.

    ``verbose`` prints a plain line for each update, also on a terminal; ``quiet`` prints none.
    """

    def __init__(self, total: int, quiet: bool = False, verbose: bool = False) -> None:
        self._total, self._quiet, self._verbose = total, quiet, verbose
        self._next_step, self._next_time = 0.0, 0.0
        self._pace = Pace()
        self._progress: Any = None
        if not (quiet or verbose) and is_open("stdout") and sys.stdout.isatty():
            from rich.progress import Progress, TextColumn
            from rich.table import Column

            column = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            self._progress = Progress(column, auto_refresh=False)  # by a thread, which a closed terminal would end
            self._task = self._progress.add_task("")
            attempt(self._progress.start)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show where the run stands."""
        if self._quiet:
            return
        if self._progress is not None:
            left = self._pace.seconds_left(step, self._total)
            done = f"{100 * min(step / self._total, 1):.0f}%" + ("" if left is None else f" {_clock_time(left)} left")
            line = "  ".join([done, *_words(step, metrics)]).replace(" of ", "/")  # 80 columns hold it
            attempt(partial(self._progress.update, self._task, description=line, refresh=True))
        elif self._verbose or step >= self._next_step or time.monotonic() >= self._next_time:
            self._next_step, self._next_time = (step * 10 // self._total + 1) * self._total / 10, time.monotonic() + 60
            widths = (">15", ">9", ">13", "", "")
            words = [f"{word:{width}}" for word, width in zip(_words(step, metrics), widths, strict=False)]
            say("  ".join([f"{100 * min(step / self._total, 1):3.0f}%", *words]).rstrip())

    def close(self) -> None:
        """Leave the live line as it is and give the terminal back."""
        if self._progress is not None:
            attempt(self._progress.stop)
            self._progress = None


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _words(step: int, metrics: dict[str, float]) -> list[str]:
    limit = f" of {metrics['kl/limit']:g}" if "kl/limit" in metrics else ""
    return [
        f"{step:,} steps",
        f"{metrics['time/fps']:,.0f}/s",
        f"return {metrics['rollout/ep_rew_mean']:.1f}" if "rollout/ep_rew_mean" in metrics else "",
        f"KL {metrics['kl/mean']:.4f}{limit}",
        f"coef {metrics['kl/coef']:.2g}" if metrics["kl/coef"] > 0 else "",
    ]
