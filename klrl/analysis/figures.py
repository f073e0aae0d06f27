"""The report's figures, and the style of all figures. Needs the extra ``plot`` (matplotlib)."""

import base64
import io
import math
from collections.abc import Callable
from itertools import cycle
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from klrl.analysis.scores import Group
from klrl.rundir.history import Column, History

# Told apart by colour-blind readers (Okabe and Ito), and by lightness in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a")
GREY, _RED = "#8a8a8a", "#b3261e"


def kl_trajectory(run: History) -> Figure | None:
    """Each update's KL over states, mean and 95th percentile, against its limit; early stops and undoing are marked."""
    if not run.has("kl/mean"):
        return None
    figure, axes = _panel()
    direction = run.options["kl"]["direction"]
    shown = "kl/reverse" if direction == "reverse" else "kl/mean"
    _line(axes, run, "kl/p95", COLOURS[5], 0.7, "95th percentile of states")
    _line(axes, run, shown, COLOURS[0], 1.2, f"mean KL, {direction}")
    _marks(axes, run, run[shown])
    if run.has("kl/limit"):
        label = "limit" if _limited(run) == "the mean" else f"limit of {_limited(run)}"
        axes.axhline(run.last("kl/limit"), color=_RED, linestyle="--", linewidth=1.2, label=label)
    positive = run[shown][(run[shown] > 0) & np.isfinite(run[shown])]
    if len(positive):
        heights = np.concatenate([positive, run["kl/p95"], run["kl/limit"]])
        top = 2 * heights[np.isfinite(heights)].max()
        axes.set(yscale="log", ylim=(min(np.quantile(positive, 0.02), top / 2) / 2, top))
    axes.set(ylabel="nats")
    return _finish(figure, axes)


def _line(axes: Axes, run: History, tag: str, colour: str, width: float, label: str) -> None:
    """Draw a column over the steps; a single number as a dot, for a line of one point shows nothing."""
    kept, marker = thinned(run[tag]), "o" if np.isfinite(run[tag]).sum() == 1 else ""
    style: dict[str, Any] = {"color": colour, "linewidth": width, "marker": marker, "markersize": 3.5}
    axes.plot(run["step"][kept], run[tag][kept], label=label, **style)


# How KL is spread over states: what was logged, its colour and width, and what it is called.
_SPREAD = (
    ("kl/max", COLOURS[6], 0.9, "largest"),
    ("kl/p99", COLOURS[3], 0.8, "99th percentile"),
    ("kl/p95", COLOURS[5], 0.8, "95th percentile"),
    ("kl/p50", COLOURS[2], 0.8, "median"),
    ("kl/mean", COLOURS[0], 1.4, "mean"),
)


def kl_over_states(run: History) -> Figure | None:
    """How each update's KL is spread over states, against its limits; beneath it the share of states held back."""
    if not run.has("kl/max"):
        return None
    held = run.has("kl/held_states")
    figure = Figure(figsize=(10.5, 4.2 if held else 3.4), layout="constrained")
    axes, *below = figure.subplots(1 + held, sharex=True, squeeze=False, height_ratios=(3, 1)[: 1 + held])[:, 0]
    for tag, colour, width, label in _SPREAD:
        if run.has(tag):
            _line(axes, run, tag, colour, width, label)
    other = ", of KL(new || old)" if run.options["kl"]["direction"] == "reverse" else ""
    for tag, style, of in (("kl/limit", "--", _limited(run)), ("kl/max_limit", ":", "every state")):
        if run.has(tag):
            axes.axhline(run.last(tag), color=_RED, linestyle=style, linewidth=1.2, label=f"limit of {of}{other}")
    drawn = np.concatenate([run[tag] for tag in ("kl/limit", "kl/max_limit", *(tag for tag, *_ in _SPREAD))])
    drawn, typical = (x[(x > 0) & np.isfinite(x)] for x in (drawn, run["kl/p50" if run.has("kl/p50") else "kl/mean"]))
    if len(drawn):
        bottom = np.quantile(typical if len(typical) else drawn, 0.02) / 2
        axes.set(yscale="log", ylim=(max(bottom, 1e-6 * drawn.max()), 2 * drawn.max()))
    axes.set(ylabel="nats, KL(old || new)")
    for lower in below:
        _line(lower, run, "kl/held_states", COLOURS[1], 1.0, "states held back")
        lower.set(ylabel="share", ylim=(0, None))
        lower.yaxis.set_major_formatter(PercentFormatter(1))
    for one in (axes, *below):
        _tidy_steps(one)
        one.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), handlelength=1.6)
    figure.axes[-1].set_xlabel("environment steps")
    return figure


def _limited(run: History) -> str:
    """What of the states' KLs the limit is about, in words."""
    names = {"p95": "the 95th percentile", "max": "the largest"}
    return names.get(str(run.options["kl"].get("of")), "the mean")


def _marks(axes: Axes, run: History, height: Any) -> None:
    step, undone, stopped = run["step"], run["kl/rolled_back"] > 0, run["kl/stopped_at"] > 0
    reached = np.where(np.isfinite(run["kl/attempted"]), run["kl/attempted"], height)
    for rows, marker, label in ((stopped & ~undone, "v", "stopped early"), (undone, "x", "undone or moved back, from")):
        if rows.any():
            marked = np.flatnonzero(rows)
            marked = marked[thinned(reached[marked])]
            axes.scatter(step[marked], reached[marked], s=18, marker=marker, color=_RED, zorder=3, label=label)


def thinned(values: Column, most: int = 1000) -> npt.NDArray[np.intp]:
    """Which of a curve's values to draw, at most ``most``: the lowest and the highest of as many stretches.

    A screen shows no more, and a page that holds all of a long run's takes a browser's memory.
    """
    if len(values) <= most:
        return np.arange(len(values))
    kept: set[int] = set()
    for stretch in np.array_split(np.arange(len(values)), most // 2):
        part = np.nan_to_num(values[stretch], nan=0.0)
        known = ~np.isnan(values[stretch])
        kept.add(int(stretch[np.where(known, part, np.inf).argmin()]))
        kept.add(int(stretch[np.where(known, part, -np.inf).argmax()]))
    return np.array(sorted(kept))


def time_spent(run: History) -> Figure | None:
    """A bar of the seconds spent on collecting, on learning, and on the rest: evaluating, logging, saving."""
    if not len(run["step"]):
        return None
    training = np.diff(run["step"] / run["time/fps"], prepend=0.0)
    collect = float((training * run["time/collect_share"]).sum())
    parts = {"environment": collect, "learning": float(training.sum()) - collect}
    parts["evaluation, saving"] = max(0.0, float(run["wall"][-1]) - sum(parts.values()))
    if not all(math.isfinite(seconds) for seconds in parts.values()):
        return None  # not logged
    figure, axes = _panel(height=1.5)
    start = 0.0
    for (name, seconds), colour in zip(parts.items(), (COLOURS[0], COLOURS[1], GREY), strict=True):
        axes.barh(0, seconds, left=start, color=colour, label=f"{name} {seconds:,.0f} s")
        start += seconds
    axes.set(yticks=[], xlabel="seconds")
    axes.spines[:].set_visible(False)
    _legend(axes)
    return figure


def curves(groups: list[Group], tags: dict[str, str], ylabel: str, log: bool = False) -> Figure | None:
    """Curves of the means over each group's runs, with the middle 95 % of bootstrapped means where there are several.

    tags: what to draw, and what to call it; the first as a line, the others dashed and dotted.
    """
    figure, axes = _panel()
    for group, colour in zip(groups, cycle(COLOURS), strict=False):
        for style, (tag, name) in zip(("-", "--", ":"), tags.items(), strict=False):
            curve = group.curve(tag)
            if curve is None or (log and not (curve[1] > 0).any()):
                continue
            steps, mean, low, high = curve
            label = f"{group.letter if len(groups) > 1 else ''} {name if len(tags) > 1 else ''}".strip()
            axes.plot(steps, mean, style, color=colour, linewidth=1.4, label=label)
            if len(group.runs) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.set(ylabel=ylabel, yscale="log" if log and axes.lines else "linear")
    return _finish(figure, axes) if axes.lines else None


def returns(groups: list[Group]) -> Figure | None:
    """Training returns, drawn by ``curves``; of a single run also the evaluations and their spread over episodes."""
    if len(groups) > 1 or len(groups[0].runs) > 1:
        return curves(groups, {"rollout/ep_rew_mean": "training"}, "return")
    run, (figure, axes) = groups[0].runs[0], _panel()
    if run.has("rollout/ep_rew_mean"):
        kept = thinned(run["rollout/ep_rew_mean"])
        values = run["rollout/ep_rew_mean"][kept]
        axes.plot(run["step"][kept], values, color=COLOURS[0], label="training, last 100 episodes")
    if run.has("eval/mean_reward"):
        known = np.flatnonzero(np.isfinite(run["eval/mean_reward"]))
        known = known[thinned(run["eval/mean_reward"][known])]
        mean, std = run["eval/mean_reward"][known], np.maximum(np.nan_to_num(run["eval/std_reward"][known]), 0.0)
        style: dict[str, Any] = {"fmt": "o", "markersize": 3.5, "elinewidth": 0.8, "color": COLOURS[1]}
        axes.errorbar(run["step"][known], mean, std, **style, label="evaluation, std over episodes")
    axes.set_ylabel("return")
    return _finish(figure, axes) if axes.lines else None


PANELS: dict[str, Callable[[list[Group]], Figure | None]] = {
    "Return": returns,
    "KL as a share of its limit": lambda groups: curves(groups, {"kl/of_limit": "bounded KL"}, "KL / limit"),
    "Coefficient of the KL penalty": lambda groups: curves(groups, {"kl/coef": "coefficient"}, "beta", log=True),
    "Learning rate": lambda groups: curves(
        [group for group in groups if group.runs[0].options.get("lr_schedule") not in (None, "constant")],
        {"train/learning_rate": "learning rate"},
        "Adam's step size",
        log=True,
    ),
    "Temperature": lambda groups: curves(
        [group for group in groups if group.runs[0].has("entropy/target")],
        {"train/ent_coef": "temperature"},
        "alpha",
        log=True,
    ),
    "Entropy": lambda groups: curves(groups, {"entropy/mean": "entropy", "entropy/target": "target"}, "nats"),
    "Clip fraction": lambda groups: curves(
        [group for group in groups if group.runs[0].options.get("clip_range")],
        {"train/clip_fraction": "clipped"},
        "share of samples",
    ),
    "Share of the TRPO step taken": lambda groups: curves(groups, {"train/step_fraction": "share"}, "share"),
    "KL to the reference": lambda groups: curves(
        groups, {"reference/kl": "mean", "reference/limit": "limit", "reference/max": "largest"}, "nats", log=True
    ),
    "Coefficient of the KL to the reference": lambda groups: curves(groups, {"reference/coef": "b"}, "b", log=True),
    "Bottleneck": lambda groups: curves(
        groups, {"bottleneck/rate": "rate", "bottleneck/information": "I(S; A)"}, "nats"
    ),
    "Explained variance": lambda groups: curves(groups, {"train/explained_variance": "critic"}, "share"),
    "Certainty of the critic": lambda groups: curves(groups, {"health/value_std": "std of V"}, "std of V, as scaled"),
    "Critic": lambda groups: curves(groups, {"train/q_mean": "mean Q"}, "mean Q"),
}
# Of each run: its KL, how that is spread over states, and its time.
KL_FIGURES: dict[str, Callable[[History], Figure | None]] = {"KL of each update": kl_trajectory}
STATE_FIGURES: dict[str, Callable[[History], Figure | None]] = {"KL over the states of each update": kl_over_states}
TIME_FIGURES: dict[str, Callable[[History], Figure | None]] = {"Where time went": time_spent}


def _panel(height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.0, height), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Axes) -> Figure:
    _tidy_steps(axes)
    axes.set_xlabel("environment steps")
    if len(axes.get_legend_handles_labels()[0]) > 1:
        _legend(axes)
    return figure


def _tidy_steps(axes: Axes) -> None:
    """Tidy axes whose x is a count of steps."""
    tidy(axes, grid="y")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def tidy(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Give the axes a light grid behind the data, and no frame at the top and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, linewidth=0.4, color="#dddddd")
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, in two columns where the labels would not fit into one line."""
    figure: Any = axes.figure
    labels = axes.get_legend_handles_labels()[1]
    columns = len(labels) if sum(map(len, labels)) + 5 * len(labels) < 80 else 2
    figure.legend(
        frameon=False, fontsize=8, ncols=columns, loc="outside upper left", columnspacing=1.2, handlelength=1.6
    )


def as_data(figure: Figure) -> str:
    """The figure as a data: URL of an SVG, for a page that must not load anything; the same one for the same figure."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "klrl", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(text.getvalue().encode()).decode()
