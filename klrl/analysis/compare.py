"""What ``klrl compare`` prints and draws of a comparison: text, JSON, a figure."""

import json
import math
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from klrl.analysis import tables
from klrl.analysis.calibration import CriticCalibration, PolicyCalibration
from klrl.analysis.comparison import (
    KEYS,
    QUANTILES,
    SHOWN,
    CompareConfig,
    Comparison,
    Elsewhere,
    StateComparison,
    compare_policies,
    summary,
)
from klrl.analysis.shift import Shift
from klrl.console import printable
from klrl.errors import needs
from klrl.training.load import load_policy

_NAMES = ("KL(A||B)", "KL(B||A)", "JS")
_SHIFTS = ("KL(here||there)", "KL(there||here)", "JS")
_FEW = 8  # episodes, to tell an error from
_NUMBERS = 6  # in the text, of a longer observation or action


def compare(a: str, b: str, config: CompareConfig) -> str:
    """The text that ``klrl compare A B`` prints. Raises as ``compare_policies``, and UsageError for a bad --figure."""
    if config.figure:  # checked before the work
        with needs("plot", "matplotlib"):
            from klrl.analysis.plots import figure_path
        path = figure_path(config.figure, "--figure")
    old, new = (load_policy(path, config.checkpoint, config.imports) for path in (a, b))
    found = compare_policies(old, new, config)
    if config.figure:
        draw(found).savefig(path, dpi=150)
    return to_json(found) if config.json else to_text(found)


def to_json(found: Comparison) -> str:
    """The comparison as one line of JSON."""
    content: dict[str, Any] = {"env": found.env, "seed": found.config.seed, "steps": found.config.steps}
    parts = (found.policies, found.returns, found.visited, found.critics, found.predictions)
    for side, trained, score, part, critic, prediction in zip("AB", *parts, strict=True):
        about = {"path": trained.path, "agent": type(trained.agent).__name__, "env": trained.env, "step": trained.step}
        content[side] = {**about, "return": score._asdict(), "visited": _spread_data(part)}
        content[side] |= {"critic": _critic_data(critic), "says_of_the_other": _prediction_data(prediction)}
    content["disagreements"] = found.states
    if (there := found.elsewhere) is not None:
        sides = zip("AB", there.visited, there.shifts, strict=True)
        both = {side: {"visited": _spread_data(part), "shift": _shift_data(shift)} for side, part, shift in sides}
        content["elsewhere"] = {"env": there.env, "kwargs": there.kwargs, **both}
    # Infinity is not JSON: it is written as text.
    return json.dumps(tree_map(lambda x: str(x) if isinstance(x, float) and not math.isfinite(x) else x, content))


def _spread_data(part: StateComparison) -> dict[str, Any]:
    measured: dict[str, Any] = {name: summary(x) for name, x in zip(KEYS, part.joint, strict=True)}
    measured["js"]["stderr"] = part.js_stderr
    means = [dict(zip(KEYS, row, strict=True)) for row in part.dimensions.mean(-1).tolist()]
    return {**measured, "mean_by_dimension": means}


def _critic_data(critic: CriticCalibration | None) -> dict[str, Any] | None:
    if critic is None:
        return None
    columns = (critic.value.tolist(), critic.returns.tolist(), critic.stderr.tolist())
    bins = [{"value": v, "return": g, "stderr": error} for v, g, error in zip(*columns, strict=True)]
    explained = {"value": critic.explained_variance, "stderr": critic.explained_stderr}
    about = {"states": critic.states, "return_std": critic.spread, "error": critic.error}
    return {**about, "explained_variance": explained, "bins": bins}


def _prediction_data(prediction: PolicyCalibration | None) -> dict[str, Any] | None:
    if prediction is None:
        return None
    data = {name: getattr(prediction, name) for name in ("states", "temperature", "confidence", "accuracy")}
    pairs = {name: dict(zip(("before", "after"), getattr(prediction, name), strict=True)) for name in ("nll", "ece")}
    return {**data, **pairs}


def _shift_data(shift: Shift) -> dict[str, Any]:
    normal, categories = ({k: x._asdict() for k, x in part.items()} for part in (shift.normal, shift.categories))
    rows = zip(shift.names, shift.by_dimension.T.tolist(), strict=True)
    dimensions = [{"name": name, **dict(zip(KEYS, row, strict=True))} for name, row in rows]
    fitted = {"covariance": shift.covariance, **normal}
    return {
        "normal": fitted,
        "categories": categories,
        "by_dimension": dimensions,
        "left_out": shift.left_out,
        "episodes": shift.episodes,
    }


def to_text(found: Comparison) -> str:
    """The comparison as tables, in about 40 lines."""
    config = found.config
    about, spread = [], []
    for side, trained, score, part in zip("AB", found.policies, found.returns, found.visited, strict=True):
        kind, where = type(trained.agent).__name__, f"step {trained.step:,} on {trained.env}"
        about.append([side, trained.path, kind, where, f"return {score.mean:.1f} +- {score.std:.1f}"])
        spread += _spread_rows(f"at {config.steps:,} states that {side} visited", part)
    note = f"Returns of {config.episodes} episodes on {found.env}, seed {config.seed}; KL and JS in nats."
    blocks = [[*tables.as_text(about, "<<<<<"), note], tables.as_text(spread, "<>>>>>>")]
    means = torch.cat([part.dimensions.mean(-1) for part in found.visited], dim=-1)
    if len(means) > 1:
        worst = means[:, [0, 1, 3, 4]].sum(-1).argsort(descending=True, stable=True)[:SHOWN].tolist()
        title = ["mean by action dimension", *(f"{side}: {name}" for side in "AB" for name in _NAMES)]
        rows = [[f"  {i}", *(f"{x:.4g}" for x in means[i].tolist())] for i in worst]
        rows += [[f"  and {len(means) - SHOWN} with less", *[""] * 6]] if len(means) > SHOWN else []
        blocks.append(tables.as_text([title, *rows], "<>>>>>>"))
    blocks += [_critic_lines(found), _prediction_lines(found)]
    if found.elsewhere is not None:
        blocks += _elsewhere_blocks(found.elsewhere, found)
    states = [["by", "step", *_NAMES[:2], "A does", "B does", "observation"]]
    for state in found.states:
        numbers = [str(state["step"]), *(f"{state[name]:.4g}" for name in KEYS[:2])]
        words = [*(_action_text(**state[side]) for side in "AB"), _short(state["obs"])]
        states.append(["+".join(state["visited_by"]), *numbers, *words])
    worst_states = ["where they disagree most, by KL(A||B) + KL(B||A)", *tables.as_text(states, "<>>><<<")]
    blocks.append(worst_states if found.states else ["they agree at every state"])
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _spread_rows(title: str, part: StateComparison) -> list[list[str]]:
    rows = [[title, "mean", *QUANTILES]]
    for name, values in zip(_NAMES, part.joint, strict=True):
        rows.append([f"  {name}", *(f"{x:.4g}" for x in summary(values).values())])
    rows[-1][0] += f" (sampled, mean +- {part.js_stderr:.1g})" if part.js_stderr else ""
    return rows


def _critic_lines(found: Comparison) -> list[str]:
    """How right each critic is, with the lowest and highest bin of its reliability curve."""
    titles = ("states", "std of return", "V off by", "explained", "lowest V", "return", "highest V", "return")
    rows = [["critics", *titles]]
    for side, critic in zip("AB", found.critics, strict=True):
        if critic is None:
            rows.append([f"  {side}: no value, or no return that is known to 1 %", "0", *["-"] * 7])
            continue
        cells = [f"{critic.states:,}", f"{critic.spread:.3g}", f"{critic.error:.3g}"]
        cells.append(f"{critic.explained_variance:.3g} +- {critic.explained_stderr:.1g}")
        for i in (0, -1):
            cells += [f"{critic.value[i]:.4g}", f"{critic.returns[i]:.4g} +- {critic.stderr[i]:.1g}"]
        rows.append([f"  {side}", *cells])
    return tables.as_text(rows, "<>>>>>>>>")


def _prediction_lines(found: Comparison) -> list[str]:
    """How well each policy says what the other does; empty unless actions are discrete."""
    rows = [["what one says the other does", "states", "sure", "right", "NLL", "at T", "ECE", "at T", "T"]]
    for said, side, part in zip(("A of B", "B of A"), "BA", found.predictions, strict=True):
        if part is not None:
            shares = (part.confidence, part.accuracy, *part.nll, *part.ece, part.temperature)
            rows.append([f"  {said}, where {side} went", f"{part.states:,}", *(f"{x:.3g}" for x in shares)])
    return tables.as_text(rows, "<>>>>>>>>") if any(found.predictions) else []


def _elsewhere_blocks(there: Elsewhere, found: Comparison) -> list[list[str]]:
    """The spread of KL and JS in the other environment, and how far each policy's states shift to it."""
    place = " ".join([there.env, *(f"{name}={value}" for name, value in there.kwargs.items())])
    spread, moved, notes = [], [[f"own states, from {found.env} to {place}", *_SHIFTS]], []
    for side, part, shift in zip("AB", there.visited, there.shifts, strict=True):
        spread += _spread_rows(f"at {found.config.steps:,} states that {side} visited on {place}", part)
        for name, measured in ((f"normals, {shift.covariance}", shift.normal), ("categories", shift.categories)):
            cells = [f"{x.value:.3g} +- {x.stderr:.1g} ({x.floor:.2g})" for x in measured.values()]
            moved += [[f"  {side}: {name}", *cells, *["-"] * (3 - len(cells))]] if cells else []
        if shift.names:
            most = int(shift.by_dimension[2].argmax())
            moved[-1][0] += f", most in {shift.names[most]}"
        few = min(shift.episodes)
        notes += [f"{side}'s {few} episodes tell errors but roughly: take more --steps"] if few < _FEW else []
        notes += [f"{', '.join(shift.left_out)} left out: too many dimensions"] if shift.left_out else []
    words = "In brackets what it comes to where nothing shifts. Categories: the mean over observation dimensions."
    lines = [*tables.as_text(moved, "<>>>"), words] if len(moved) > 1 else []
    return [tables.as_text(spread, "<>>>>>>"), [*lines, *dict.fromkeys(notes)]]


def _action_text(action: Any, probability: float | None = None, mean: Any = None, std: Any = ()) -> str:
    words = f" (p {probability:.3g})" if probability is not None else ""
    return _short(action) + (f" (std {_short(std)})" if 0 < len(std) <= 2 else words)


def _short(value: Any) -> str:
    """Numbers to three digits, the first few of many."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(part)}" for key, part in value.items())
    numbers = np.ravel(value).tolist()
    return " ".join(f"{x:.3g}" for x in numbers[:_NUMBERS]) + (" ..." if len(numbers) > _NUMBERS else "")


def draw(found: Comparison) -> Any:
    """A matplotlib Figure: the KL of each state, its mean by action dimension, the returns, and where there are such,
    the reliability of critics and of discrete policies, and the shift of states by dimension."""
    from matplotlib.figure import Figure

    from klrl.analysis.figures import tidy
    from klrl.analysis.plots import NEW, OLD

    more: list[Any] = [draw for draw, wanted in _panels(found) if wanted]
    figure = Figure(figsize=(13, 8 if more else 4), layout="constrained")
    spread, bars, scores, *rest = figure.subplots(2 if more else 1, 3).flat
    for i, (side, part, colour) in enumerate(zip("AB", found.visited, (OLD, NEW), strict=True)):
        for name, values, style in zip(_NAMES, part.joint[:2], ("-", "--"), strict=False):
            positive = values[(values > 0) & values.isfinite()].sort().values  # what a logarithmic axis can show
            fractions = (int((values == 0).sum()) + 1 + torch.arange(len(positive))) / len(values)
            spread.step(positive, fractions, where="post", color=colour, ls=style, label=f"{name} where {side} went")
            spread.set_xscale("log" if len(positive) else spread.get_xscale())
        means = part.dimensions[:, 0].mean(-1).numpy()
        positions = np.arange(len(means)) + 0.4 * i - 0.2
        bars.bar(positions, np.where(np.isfinite(means), means, 0.0), 0.4, color=colour, zorder=2)
        for x in positions[np.isinf(means)]:
            bars.text(x, 0, "inf", ha="center", va="bottom")
        scores.plot(found.returns[i].returns, np.full(found.config.episodes, i), "|", color=colour, markersize=30)
    spread.legend(frameon=False, fontsize=8)
    spread.set(xlabel="KL of a state, nats", ylabel="share of states at or below", ylim=(0, 1), title="KL by state")
    bars.set(xlabel="action dimension", ylabel="nats", title="mean KL(A||B) by action dimension")
    bars.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    labels = [f"{side}\n{score.mean:.1f}\n+- {score.std:.1f}" for side, score in zip("AB", found.returns, strict=True)]
    scores.set(xlabel="return of an episode", yticks=[0, 1], yticklabels=labels, ylim=(1.6, -0.6), title="returns")
    for draw_panel, axes in zip(more, rest, strict=False):
        draw_panel(axes, found)
    for axes in rest[len(more) :]:
        axes.remove()
    for axes in (spread, bars, scores, *rest[: len(more)]):
        tidy(axes)
    titles = [f"{side}: {p.path} at step {p.step:,}" for side, p in zip("AB", found.policies, strict=True)]
    figure.suptitle(printable("\n".join(titles)), parse_math=False)
    return figure


def _panels(found: Comparison) -> list[tuple[Any, bool]]:
    """What draws a further panel, and whether there is anything to draw."""
    shifted = found.elsewhere is not None and any(part.names for part in found.elsewhere.shifts)
    return [(_draw_critics, any(found.critics)), (_draw_predictions, any(found.predictions)), (_draw_shifts, shifted)]


def _draw_critics(axes: Any, found: Comparison) -> None:
    from klrl.analysis.plots import NEW, OLD

    for side, critic, colour in zip("AB", found.critics, (OLD, NEW), strict=True):
        if critic is not None:
            errors = np.nan_to_num(critic.stderr)
            label = f"{side}: explained variance {critic.explained_variance:.3g}"
            axes.errorbar(critic.value, critic.returns, errors, fmt="o-", color=colour, markersize=4, label=label)
            ends = [critic.value[0], critic.value[-1]]
            axes.plot(ends, ends, ":", color="black", linewidth=1, zorder=3)
    axes.legend(frameon=False, fontsize=8)
    axes.set(
        xlabel="mean V of a tenth of the states",
        ylabel="mean return that followed",
        title="critics; dotted: return = V",
    )


def _draw_predictions(axes: Any, found: Comparison) -> None:
    from klrl.analysis.plots import NEW, OLD

    sides = zip(("A of B", "B of A"), found.predictions, (OLD, NEW), strict=True)
    for said, part, colour in sides:
        if part is not None:
            for curve, style, when in zip(
                part.curves, ("o-", "o--"), ("", f" at T = {part.temperature:.3g}"), strict=True
            ):
                kept = curve.number > 0
                label = f"{said}{when}"
                axes.plot(curve.confidence[kept], curve.accuracy[kept], style, color=colour, markersize=4, label=label)
    axes.plot([0, 1], [0, 1], ":", color="black", linewidth=1)
    axes.legend(frameon=False, fontsize=8)
    axes.set(
        xlabel="how sure one is of the other's action",
        ylabel="how often it is right",
        title="policies; dotted: right as often as sure",
    )


def _draw_shifts(axes: Any, found: Comparison) -> None:
    from klrl.analysis.plots import NEW, OLD

    assert found.elsewhere is not None
    for i, (side, shift, colour) in enumerate(zip("AB", found.elsewhere.shifts, (OLD, NEW), strict=True)):
        places = np.arange(len(shift.names)) + 0.4 * i - 0.2
        axes.bar(places, shift.by_dimension[2].numpy(), 0.4, color=colour, label=side, zorder=2)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False, fontsize=8)
    axes.set(xlabel="observation dimension", ylabel="JS, nats", title=f"shift of own states to {found.elsewhere.env}")
