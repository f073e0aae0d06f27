"""A run's options and metrics, read from its folder while it runs, after its end, or after it was killed."""

import json
import math
import tomllib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from klrl.config import flatten
from klrl.errors import UsageError
from klrl.rundir.folder import in_use, open_file

Column = npt.NDArray[np.float64]
STOPPED_EARLY = "train/stopped_early"
"""Logged in the last row of a run that a callback stopped."""
_WATCHING = ("eval_every", "eval_episodes", "save_every", "log", "histogram_every", "quiet", "verbose", "rank_timeout")
_NOT_A_SETTING = ("seed", "run_dir", "device", "threads", "final_episodes", *_WATCHING)
# What runs lack that were begun before there were these.
_AS_BEFORE = {"processes": 1, "stop_at_return": math.inf, "env.action_masks": "off"}
# Beyond what any run writes, and little enough to be read: a folder may be anyone's.
_MOST_CONFIG, _MOST_METRICS, _LONGEST_LINE = 1 << 18, 1 << 31, 1 << 20  # bytes
_MOST_TAGS, _LONGEST_TAG, _MOST_STEPS = 300, 200, 1e15
_MOST_DOTS = 1000  # in a line: tomllib takes minutes for a key of thousands of parts
_LARGEST = 1e100  # number that means something, and whose square is one


@dataclass(frozen=True)
class History:
    """The metrics of one run's updates, a column for each tag, in the order of steps."""

    folder: Path
    options: dict[str, Any]
    """``config.toml``, groups as tables."""
    agent: str
    env: str
    seed: int
    state: Literal["finished", "running", "stopped"]
    columns: dict[str, Column]
    """[rows] for each tag, nan where a row lacks it; "step" and "wall" (seconds) are among them."""

    @property
    def steps(self) -> int:
        """The environment steps of its last logged update; 0 before the first."""
        return int(self["step"][-1]) if len(self["step"]) else 0

    def __getitem__(self, tag: str) -> Column:
        """A column; all nan where the run never logged ``tag``."""
        return self.columns.get(tag, np.full(len(self.columns["step"]), math.nan))

    def has(self, tag: str) -> bool:
        """Whether the run logged ``tag`` at all."""
        return bool(np.isfinite(self[tag]).any())

    def last(self, tag: str) -> float:
        """The last logged value of ``tag``; nan where there is none."""
        column = self[tag]
        logged = column[~np.isnan(column)]
        return float(logged[-1]) if len(logged) else math.nan

    @property
    def final_return(self) -> float:
        """The final evaluation's mean; of a run without one, the last 100 training episodes'."""
        evaluated = self.state == "finished" and self.options.get("final_episodes") != 0
        return self.last("eval/mean_reward" if evaluated else "rollout/ep_rew_mean")


def setting_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options that define a run's setting: runs that agree in them differ by their seeds alone."""
    flat = {key: value for key, value in flatten(options).items() if key not in _NOT_A_SETTING}
    return {key: value for key, value in flat.items() if key not in _AS_BEFORE or value != _AS_BEFORE[key]}


def read_history(path: str | Path) -> History:
    """The history of the run in folder ``path``. Raises UsageError where it is none."""
    folder = Path(path)
    try:
        with open_file(folder / "config.toml", _MOST_CONFIG) as file:
            text = file.read().decode()
        if max(line.count(".") for line in text.split("\n")) > _MOST_DOTS:
            raise ValueError("a key of too many parts")
        options = tomllib.loads(text)
        total = int(options["total_timesteps"])
        known = str(options["agent"]), str(options["env_id"]), int(options["seed"])
        kl = options["kl"]
        _ = str(kl["direction"]), float(kl.get("coef", 1.0)), setting_of(options)  # as those who read it need it
        columns = _read_columns(folder / "metrics.jsonl")
    except OSError as problem:
        raise UsageError(f"{path} is not a run's folder: {problem.strerror}: {problem.filename}") from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as problem:
        raise UsageError(f"{path} is not a run's folder: config.toml: {problem}") from None
    ended = [columns["step"][-1:]]
    if options.get("final_episodes") != 0:
        ended.append(columns.get("eval/mean_reward", columns["step"][:0])[-1:])
    early = (columns.get(STOPPED_EARLY, columns["step"][:0])[-1:] == 1).any()
    done = all(map(len, ended)) and bool(ended[0] >= total or early) and not np.isnan(ended[-1])
    state: Literal["finished", "running", "stopped"] = "running" if in_use(folder) else "stopped"
    return History(folder, options, *known, "finished" if done else state, columns)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """The lines of a run's metrics.jsonl, each with its metrics by tag; incomplete and malformed ones are left out."""
    with open_file(path, _MOST_METRICS) as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                text = line.decode()
                row = {tag: float(value) for tag, value in json.loads(text).items()}
            except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
                continue
            if abs(row.get("step", math.nan)) <= _MOST_STEPS:
                yield text.rstrip(), row


def _read_columns(path: Path) -> dict[str, Column]:
    """The rows of a metrics.jsonl by tag, nan where one lacks it: one number at a time, as a long run's are many."""
    columns, count = {"step": array("d"), "wall": array("d")}, 0
    for _, row in read_rows(path):
        for tag, value in row.items():
            if tag not in columns and (len(columns) >= _MOST_TAGS or len(tag) > _LONGEST_TAG):
                continue
            column = columns.setdefault(tag, array("d"))
            column.extend(repeat(math.nan, count - len(column)))
            column.append(math.copysign(math.inf, value) if abs(value) > _LARGEST else value)
        count += 1
    for column in columns.values():
        column.extend(repeat(math.nan, count - len(column)))
    return {tag: np.array(column, np.float64) for tag, column in columns.items()}
