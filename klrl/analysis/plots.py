"""Figures that explain KL, for ``klrl plot``. Needs the extra ``plot`` (matplotlib)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch import distributions as td

from klrl.analysis.figures import COLOURS, GREY, tidy
from klrl.config import Checked
from klrl.errors import UsageError
from klrl.kl import jeffreys, js, kl, renyi, reverse_kl, total_variation

OLD, NEW, OTHER = COLOURS[0], COLOURS[1], GREY
_GRID_CELLS = 20_000


@dataclass(frozen=True)
class PlotConfig(Checked):
    """Draw FIGURE: kl-gaussian, kl-2d, fit or families."""

    output: str = ""
    """File to write, .png or .svg; by default the figure's name as .png, here."""
    old: tuple[str, ...] = ("categorical", "0.7", "0.2", "0.1")
    """For families: normal MEAN STD, beta A B, bernoulli P, or categorical P1 P2 ..."""
    new: tuple[str, ...] = ("categorical", "0.4", "0.4", "0.2")
    """For families: the other distribution, of the same family."""


def kl_gaussian() -> Figure:
    """KL between N(0, 1) and N(m, s), both ways: against the shift of the mean, and against the ratio of the stds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    old = td.Normal(torch.zeros(301), torch.ones(301))
    shift = torch.linspace(-3, 3, 301)
    for std, colour in ((0.7, OLD), (1.0, OTHER), (1.5, NEW)):
        new = td.Normal(shift, std * torch.ones(301))
        left.plot(shift, kl(old, new), color=colour, label=f"std of new = {std:g}")
        left.plot(shift, reverse_kl(old, new), color=colour, linestyle="--")
    left.set(xlabel="mean of new, in standard deviations of old", ylabel="nats", title="a shifted mean")
    ratio = torch.logspace(-1, 1, 301)
    new = td.Normal(torch.zeros(301), ratio)
    right.plot(ratio, kl(old, new), color=OTHER, label="KL(old || new)")
    right.plot(ratio, reverse_kl(old, new), color=OTHER, linestyle="--", label="KL(new || old)")
    right.set(xscale="log", xlabel="std of new / std of old", ylabel="nats", ylim=(0, 8), title="another width")
    for axes in (left, right):
        tidy(axes)
        axes.legend(frameon=False)
    figure.suptitle("KL of old = N(0, 1): solid KL(old || new), dashed KL(new || old)")
    return figure


def kl_2d() -> Figure:
    """Contours of pairs of two-dimensional normals, with both KLs."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    old = td.MultivariateNormal(torch.zeros(2), torch.eye(2))
    pairs = {
        "shifted by one std": td.MultivariateNormal(torch.tensor([1.0, 0.0]), torch.eye(2)),
        "twice as wide": td.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2)),
        "correlated (0.9)": td.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.9], [0.9, 1.0]])),
    }
    line = torch.linspace(-4.5, 4.5, 201)
    x, y = torch.meshgrid(line, line, indexing="xy")
    points = torch.stack([x, y], dim=-1)
    for axes, (name, new) in zip(figure.subplots(1, 3, sharey=True), pairs.items(), strict=True):
        for dist, colour, style in ((old, OLD, "solid"), (new, NEW, "dashed")):
            peak = float(_log_prob(dist, dist.loc))
            levels = [peak - r * r / 2 for r in (2, 1)]  # two standard deviations, and one
            axes.contour(x, y, _log_prob(dist, points), levels=levels, colors=colour, linestyles=style)
        forward, backward = float(kl(old, new)), float(reverse_kl(old, new))
        axes.set_title(f"{name}\nKL(old || new) = {forward:.2f}, KL(new || old) = {backward:.2f}", fontsize=10)
        axes.set_aspect("equal")
        tidy(axes)
    figure.suptitle("old (solid) and new (dashed) at 1 and 2 standard deviations; KL in nats")
    return figure


class Fit(NamedTuple):
    """A normal fitted to a target, and the divergence that it was fitted by, in nats."""

    mean: float
    std: float
    divergence: float


BIMODAL = td.MixtureSameFamily(
    td.Categorical(probs=torch.tensor([0.6, 0.4], dtype=torch.float64)),
    td.Normal(torch.tensor([-2.0, 2.5], dtype=torch.float64), torch.tensor([0.7, 0.9], dtype=torch.float64)),
)


def fit_normal(target: td.Distribution, direction: Literal["forward", "reverse"], mean: float) -> Fit:
    """The normal q nearest to ``target`` on the real line by KL(target || q) or KL(q || target), found from ``mean``.

    By L-BFGS on the mean and log std, with the integral as a sum over [-15, 15]. The forward KL has one optimum, the
    target's mean and standard deviation; the reverse has one near each mode that stands far enough apart, and between
    them often a shallow one that covers both.
    """
    x = torch.linspace(-15, 15, 6001, dtype=torch.float64)
    log_p, step = _log_prob(target, x), float(x[1] - x[0])
    parameters = torch.tensor([mean, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def divergence() -> Tensor:
        log_q = _log_prob(td.Normal(parameters[0], parameters[1].exp()), x)
        first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
        return (first.exp() * (first - second)).sum() * step

    def closure() -> float:
        optimizer.zero_grad()
        loss = divergence()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return Fit(float(parameters[0]), float(parameters[1].exp()), float(divergence()))


def fit() -> Figure:
    """One normal fitted to a target of two modes: the forward KL covers both, the reverse KL seeks either."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    x = torch.linspace(-7, 8, 1001, dtype=torch.float64)
    axes.fill_between(x, _log_prob(BIMODAL, x).exp(), color="#dddddd", label="target p")
    covering = fit_normal(BIMODAL, "forward", 0.0)
    seeking = sorted((fit_normal(BIMODAL, "reverse", start) for start in (-2.0, 0.0, 2.5)), key=lambda f: f.divergence)
    for found, colour, style, name in (
        (covering, OLD, "solid", "forward, its only optimum: KL(p || q)"),
        (seeking[0], NEW, "solid", "reverse, the global optimum: KL(q || p)"),
        (seeking[2], NEW, "dashed", "reverse, a local optimum, the other mode: KL(q || p)"),
        (seeking[1], NEW, "dotted", "reverse, a local optimum, shallow: KL(q || p)"),
    ):
        density = _log_prob(td.Normal(found.mean, found.std), x).exp()
        axes.plot(x, density, color=colour, linestyle=style, label=f"{name} = {found.divergence:.2f}")
    axes.set(xlabel="action", ylabel="density", ylim=(0, 0.95), title="one normal for two modes, found by optimisation")
    tidy(axes)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    return figure


def families(old: td.Distribution, new: td.Distribution) -> Figure:
    """A bar for each divergence between two distributions of one number. Raises UsageError if they are unlike."""
    if type(old) is not type(new):
        raise UsageError(f"--old is a {type(old).__name__} and --new a {type(new).__name__}: give two of one family")
    if isinstance(old, td.Categorical) and isinstance(new, td.Categorical) and old.probs.shape != new.probs.shape:
        raise UsageError(f"--old has {len(old.probs)} outcomes and --new {len(new.probs)}: give as many probabilities")
    tables = (old, new) if isinstance(old, td.Categorical | td.Bernoulli) else _on_grid(old, new)
    measures: dict[str, float] = {
        "KL(old || new)": float(kl(old, new)),
        "KL(new || old)": float(reverse_kl(old, new)),
        "Jeffreys": float(jeffreys(old, new)),
        "Renyi, order 1/2": float(renyi(*tables, 0.5)),
        "Jensen-Shannon": float(js(*tables)),
        "total variation": float(total_variation(*tables)),
    }
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    finite = [value for value in measures.values() if math.isfinite(value)]
    longest = max([*finite, 1e-12])
    shown = [value if math.isfinite(value) else 1.15 * longest for value in measures.values()]
    bars = axes.barh(list(measures), shown, color=[OLD, NEW, *[OTHER] * 4])
    axes.bar_label(bars, [f"{value:.4g}" for value in measures.values()], padding=4)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.3 * longest), xlabel="nats (total variation: no unit)")
    axes.set_title(f"old {_describe(old)}, new {_describe(new)}", fontsize=11)
    tidy(axes)
    return figure


FIGURES: dict[str, Callable[[PlotConfig], Figure]] = {
    "kl-gaussian": lambda config: kl_gaussian(),
    "kl-2d": lambda config: kl_2d(),
    "fit": lambda config: fit(),
    "families": lambda config: families(distribution(config.old, "--old"), distribution(config.new, "--new")),
}


def figure_path(text: str, option: str) -> Path:
    """The file to save a figure in. Raises UsageError, naming ``option``, for another format and a missing folder."""
    path = Path(text)
    if path.suffix not in (".png", ".svg") or not path.parent.is_dir():
        raise UsageError(f"{option} {path}: must end in .png or .svg and lie in a folder that exists")
    return path


def distribution(words: tuple[str, ...], option: str) -> td.Distribution:
    """Parse ``normal 0 1``, ``beta 2 5``, ``bernoulli 0.3`` or ``categorical 0.2 0.8``. Raises UsageError otherwise."""
    kinds = {"normal": td.Normal, "beta": td.Beta, "bernoulli": td.Bernoulli, "categorical": td.Categorical}
    usage = {"normal": "MEAN STD", "beta": "A B", "bernoulli": "P", "categorical": "P1 P2 ... summing to 1"}
    name = words[0] if words else "nothing"
    if name not in usage:
        raise UsageError(f"{option} must begin with one of {', '.join(usage)}, got {' '.join(words) or name}")
    try:
        numbers = torch.tensor([float(word) for word in words[1:]], dtype=torch.float64)
        if not numbers.isfinite().all():
            raise ValueError("infinite or nan")
        if name == "categorical" and abs(numbers.sum() - 1) > 1e-4:
            raise ValueError("torch would scale them")
        return kinds[name](*([numbers] if name == "categorical" else numbers), validate_args=True)
    except (ValueError, TypeError):
        raise UsageError(f"{option} {' '.join(words)}: needs {name} {usage[name]}, within their range") from None


def _on_grid(old: td.Distribution, new: td.Distribution) -> tuple[td.Categorical, td.Categorical]:
    """Both densities as categoricals over fine cells, where a measure has no closed form."""
    both = (old, new)
    if isinstance(old, td.Beta):
        # In the logit u of x the density is smooth, however it rises towards 0 and 1: x^a (1 - x)^b.
        shapes = [(float(d.concentration1), float(d.concentration0)) for d in both]  # type: ignore[attr-defined]
        reach = 40 / min(1.0, *(x for pair in shapes for x in pair))
        u = torch.linspace(-reach, reach, 10 * _GRID_CELLS, dtype=torch.float64)
        log_x, log_1_minus_x = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
        first, second = (a * log_x + b * log_1_minus_x for a, b in shapes)
        return td.Categorical(logits=first), td.Categorical(logits=second)
    spans = [torch.linspace(-12, 12, _GRID_CELLS, dtype=torch.float64) * d.stddev + d.mean for d in both]
    edges = torch.cat(spans).sort().values  # fine where either is narrow
    centres, widths = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]).clamp_min(1e-300)
    return tuple(td.Categorical(logits=d.log_prob(centres) + widths.log()) for d in both)  # type: ignore[return-value]


def _describe(dist: td.Distribution) -> str:
    match dist:
        case td.Normal():
            return f"N({float(dist.loc):g}, {float(dist.scale):g})"
        case td.Beta():
            return f"Beta({float(dist.concentration1):g}, {float(dist.concentration0):g})"
        case td.Bernoulli():
            return f"Bernoulli({float(dist.probs):g})"
    assert isinstance(dist, td.Categorical)
    return f"({', '.join(f'{p:g}' for p in dist.probs.tolist())})"


def _log_prob(dist: Any, x: Tensor) -> Tensor:
    """``dist.log_prob(x)``, which some of torch's distributions leave without types."""
    return dist.log_prob(x)
