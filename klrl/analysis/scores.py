"""Groups of runs that differ by their seed alone: their curves and final scores, with uncertainty."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from klrl.rundir.history import Column, History, setting_of

_RESAMPLES = 2000


class Score(NamedTuple):
    """Final returns over runs."""

    mean: float
    std: float
    iqm: float
    """The interquartile mean: of the runs that are left without the lowest and the highest quarter."""
    low: float
    high: float
    """The middle 95 % of the IQMs of bootstrap samples of the runs."""


@dataclass(frozen=True)
class Group:
    """Runs of one setting."""

    letter: str
    name: str
    """Agent and environment, and those options that tell this setting from the other groups of both."""
    runs: list[History]

    def curve(self, tag: str, points: int = 200) -> tuple[Column, Column, Column, Column] | None:
        """Steps, mean over runs, and the ends of the middle 95 % of bootstrapped means, each up to [points]; or None.

        Where a shorter run has ended the others go on alone, as long as they are more than half of all.
        """
        logged = [(run["step"][known], run[tag][known]) for run in self.runs if (known := np.isfinite(run[tag])).any()]
        if not logged:
            return None
        grid = np.linspace(min(step[0] for step, _ in logged), max(step[-1] for step, _ in logged), points)
        table = np.array([np.interp(grid, step, value, left=math.nan, right=math.nan) for step, value in logged])
        kept = np.isfinite(table).sum(0) > len(table) / 2
        if not kept.any():  # their steps do not overlap
            return None
        grid, table = grid[kept], table[:, kept]
        means = np.ma.masked_invalid(_resampled(table)).mean(axis=1).filled(math.nan)
        low, high = np.nanquantile(means, (0.025, 0.975), axis=0)
        return grid, np.ma.masked_invalid(table).mean(axis=0).filled(math.nan), low, high


def score_of(runs: Sequence[History]) -> Score | None:
    """The score of the finished runs, or of all where none is finished; None where there is no return yet."""
    finals = np.array([run.final_return for run in [run for run in runs if run.state == "finished"] or runs])
    finals = finals[~np.isnan(finals)]
    if not len(finals):
        return None
    low, high = np.quantile(iqm(_resampled(finals)), (0.025, 0.975)).tolist()
    return Score(float(finals.mean()), float(finals.std()), float(iqm(finals)), low, high)


def group_runs(runs: Sequence[History]) -> list[Group]:
    """Group ``runs`` by their setting, in the order of their first run, and name each group by what differs."""
    settings: dict[str, list[History]] = {}
    for run in runs:
        settings.setdefault(json.dumps(setting_of(run.options), sort_keys=True, default=str), []).append(run)
    firsts = [members[0] for members in settings.values()]
    return [
        Group(_letter(i), _name(members[0], firsts), sorted(members, key=lambda run: run.seed))
        for i, members in enumerate(settings.values())
    ]


def _letter(i: int) -> str:
    """The letter of group ``i``: A to Z, then AA, AB and so on."""
    return (_letter(i // 26 - 1) if i >= 26 else "") + chr(ord("A") + i % 26)


def _name(run: History, others: list[History]) -> str:
    mine = setting_of(run.options)
    rivals = [setting_of(other.options) for other in others if (other.agent, other.env) == (run.agent, run.env)]
    telling = [key for key in mine if any(rival.get(key) != mine[key] for rival in rivals)]
    return " ".join([run.agent.upper(), run.env, *(f"{key}={_short(mine[key])}" for key in telling)])


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def iqm(values: Column) -> Any:
    """The interquartile mean along the last axis (Agarwal et al. 2021): a quarter, rounded down, cut at either end."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def _resampled(rows: Column) -> Column:
    """[2000, n, ...]: bootstrap samples of the n first-axis entries, the same each time."""
    return rows[np.random.default_rng(0).integers(len(rows), size=(_RESAMPLES, len(rows)))]
