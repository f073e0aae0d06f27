"""A run's options and metrics, read from its folder while it runs, after its end, or after it was killed."""

import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from klrl.config import flatten
from klrl.errors import UsageError
from klrl.rundir.folder import in_use

Column = npt.NDArray[np.float64]
_WATCHING = ("eval_every", "eval_episodes", "save_every", "histogram_every", "quiet", "verbose")
_NOT_A_SETTING = ("seed", "run_dir", "device", "threads", *_WATCHING)


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
    return {key: value for key, value in flatten(options).items() if key not in _NOT_A_SETTING}


def read_history(path: str | Path) -> History:
    """The history of the run in folder ``path``. Raises UsageError where it is none."""
    folder = Path(path)
    try:
        options = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        total = int(options["total_timesteps"])
        known = str(options["agent"]), str(options["env_id"]), int(options["seed"])
        _ = options["kl"]["direction"]
        rows = [row for _, row in read_rows(folder / "metrics.jsonl")]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as problem:
        why = f"{problem.strerror}: {problem.filename}" if isinstance(problem, OSError) else f"config.toml: {problem}"
        raise UsageError(f"{path} is not a run's folder: {why}") from None
    tags = dict.fromkeys(["step", "wall", *(tag for row in rows for tag in row)])
    columns = {tag: np.array([row.get(tag, math.nan) for row in rows], np.float64) for tag in tags}
    evaluated = bool(rows) and ("eval/mean_reward" in rows[-1] or options.get("final_episodes") == 0)
    done = evaluated and rows[-1]["step"] >= total
    state: Literal["finished", "running", "stopped"] = "running" if in_use(folder) else "stopped"
    return History(folder, options, *known, "finished" if done else state, columns)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """The lines of a run's metrics.jsonl, each with its metrics by tag; incomplete and malformed ones are left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = {tag: float(value) for tag, value in json.loads(line).items()}
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
            continue
        if math.isfinite(row.get("step", math.nan)):
            yield line, row
