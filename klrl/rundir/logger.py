"""Writers of a run's metrics: to TensorBoard, metrics.jsonl and the terminal."""

import json
import math
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, histogram_raw

from klrl.console import live_line, printable, say
from klrl.rundir.folder import replace_file
from klrl.rundir.history import Column, read_rows

_EVENT_FILE = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.")
# Custom Scalars: what belongs together in one chart, for every agent, as patterns of tags.
_LAYOUT = {
    "KL": {
        "KL and its limit": ["^kl/mean$", "^kl/p95$", "^kl/limit$"],
        "largest KL of a state": ["^kl/max$", "^kl/max_limit$"],
        "share of the limit": ["^kl/of_limit$", "^kl/max_of_limit$", "^reference/of_limit$"],
        "coefficients: KL penalty, temperature": ["^kl/coef$", "^train/ent_coef$"],
        "learning rate": ["^train/learning_rate$"],
        "predicted and measured": ["^kl/predicted$", "^kl/mean$"],
        "forward and reverse": ["^kl/mean$", "^kl/reverse$"],
        "exact and sampled": ["^kl/mean$", "^kl/k1$", "^kl/k3$"],
    },
    "policy": {
        "return": ["^rollout/ep_rew_mean$", "^eval/mean_reward$"],
        "entropy": ["^entropy/mean$", "^entropy/target$"],
        "distance from teachers": ["^distill/kl_before$", "^distill/kl$"],
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
        self._events = _event_writer(folder)
        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        if resume_step is not None:
            self._add(Event(step=resume_step, session_log=SessionLog(status=SessionLog.START)))
            return
        charts = {title: {name: ("Multiline", tags) for name, tags in part.items()} for title, part in _LAYOUT.items()}
        self._add(Event(summary=custom_scalars(charts)))  # type: ignore[no-untyped-call]
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in hparams.items()}
        plain |= {k: str(v) for k, v in plain.items() if v in (math.inf, -math.inf)}  # TensorBoard shows them as JSON
        self._add(Event(summary=hparams_pb(plain, trial_id=printable(folder.name))))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record ``metrics`` (tag to value) at ``step``."""
        values = [Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        self._add(Event(step=step, summary=Summary(value=values)))
        # Infinity and NaN are not JSON: they are written as text.
        safe = {k: v if abs(v) < float("inf") else str(v) for k, v in metrics.items()}
        self._lines.write(json.dumps({"step": step, "wall": round(time.time() - self._start, 3), **safe}) + "\n")
        self._lines.flush()

    def write_histogram(self, step: int, tag: str, values: Column) -> None:
        """Record how ``values`` are spread, in 30 bins."""
        counts, edges = np.histogram(values, 30)
        spread = values.min(), values.max(), len(values), values.sum(), np.square(values).sum()
        bins = edges[1:].tolist(), counts.tolist()
        self._add(Event(step=step, summary=histogram_raw(tag, *spread, *bins)))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._events.close()
        self._lines.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.add_event(event)


class EventFile:
    """An event file, each event on its way to the disk once it is added."""

    def __init__(self, path: Path) -> None:
        self._records = RecordWriter(open(path, "xb"))  # noqa: SIM115 (closed in close)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_event(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _event_writer(folder: Path) -> Any:
    """A new event file, or the writer that another package (wandb with sync_tensorboard) put in TensorBoard's place."""
    common = event_file_writer.EventFileWriter
    ours = common.__module__ == event_file_writer.__name__
    return EventFile(_event_file(folder)) if ours else common(str(folder))


def _event_file(folder: Path) -> Path:
    """A new event file's name, which sorts after all that lie there, as TensorBoard reads them in that order.

    It begins with the second; where the clock was set back, with the one after the latest that was used.
    """
    used = [int(match[1]) for path in folder.iterdir() if (match := _EVENT_FILE.match(path.name))]
    second = max([int(time.time()), *(number + 1 for number in used)])
    return folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"


def _cut(path: Path, step: int) -> float:
    """Drop the lines from ``step`` on and unreadable ones. Returns the wall-clock seconds of the last one kept."""
    wall = 0.0

    def kept() -> Iterator[str]:
        nonlocal wall
        for line, row in read_rows(path) if path.exists() else []:
            if row["step"] < step:
                wall = row.get("wall", wall)
                yield line + "\n"

    replace_file(path, kept())
    return wall


_STANDSTILL = 5  # updates in a row that were taken back


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
    """A run's progress: one live line on a terminal or in a notebook; elsewhere a plain line each tenth, and at least
    each minute.

    ``verbose`` prints a plain line for each update, also on a terminal; ``quiet`` prints none.
    """

    def __init__(self, total: int, quiet: bool = False, verbose: bool = False) -> None:
        self._total, self._quiet, self._verbose = total, quiet, verbose
        self._next_step, self._next_time = 0.0, 0.0
        self._pace = Pace()
        self._line = None if quiet or verbose else live_line()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show where the run stands."""
        if self._quiet:
            return
        if self._line is not None:
            left = self._pace.seconds_left(step, self._total)
            done = f"{100 * min(step / self._total, 1):.0f}%" + ("" if left is None else f" {_clock_time(left)} left")
            self._line.show("  ".join([done, *_words(step, metrics)]).replace(" of ", "/"))  # 80 columns hold it
        elif self._verbose or step >= self._next_step or time.monotonic() >= self._next_time:
            self._next_step, self._next_time = (step * 10 // self._total + 1) * self._total / 10, time.monotonic() + 60
            widths = (">15", ">9", ">13", "", "")
            words = [f"{word:{width}}" for word, width in zip(_words(step, metrics), widths, strict=False)]
            say("  ".join([f"{100 * min(step / self._total, 1):3.0f}%", *words]).rstrip())

    def evaluating(self, done: int, total: int) -> None:
        """Show how far the final evaluation is: on the live line, elsewhere once a minute."""
        if time.monotonic() < self._next_time:
            return
        line, self._next_time = f"evaluation: {done} of {total} episodes", time.monotonic() + 60
        if self._line is not None:
            self._next_time = time.monotonic() + 0.2
            self._line.show(line)
        elif not self._quiet:
            say(line)

    def close(self) -> None:
        """Leave the live line as it is and give the terminal back."""
        if self._line is not None:
            self._line.close()
            self._line = None


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _words(step: int, metrics: dict[str, float]) -> list[str]:
    limit = f" of {metrics['kl/limit']:g}" if "kl/limit" in metrics else ""
    undone = metrics.get("health/undone_in_a_row", 0)
    reference = f"{metrics['reference/kl']:.3g} from reference" if "reference/kl" in metrics else ""
    return [
        f"{step:,} steps",
        f"{metrics['time/fps']:,.0f}/s",
        f"return {metrics['rollout/ep_rew_mean']:.1f}" if "rollout/ep_rew_mean" in metrics else "",
        f"KL {metrics['kl/mean']:.4f}{limit}" if undone < _STANDSTILL else f"{undone:.0f} undone: nothing moves",
        f"coef {metrics['kl/coef']:.2g}" if metrics["kl/coef"] > 0 else _learning_rate(metrics),
        *([reference] if reference else []),
    ]


def _learning_rate(metrics: dict[str, float]) -> str:
    if "distill/kl" in metrics:
        return f"from teacher {metrics['distill/kl']:.4f}"
    return f"lr {metrics['train/learning_rate']:.1e}" if "train/learning_rate" in metrics else ""
