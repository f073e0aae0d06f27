"""How far the states that one policy visits lie apart in two environments, as domain adaptation measures its domains.

Twice: by normals that are fitted to the states, which see how numbers move together and nothing but means and
covariances; and by categories, which see any change of a dimension, and of no two together.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from torch import Tensor
from torch import distributions as td

from klrl.analysis.visits import RESAMPLES, Visits, resamples
from klrl.errors import NonFiniteError
from klrl.kl import joint, js, kl, reverse_kl
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.spaces import is_image

Floats = npt.NDArray[np.float64]
RIDGE = 1e-6  # on the variances of the normals, where the pooled variance of a dimension is 1
_MOST_FULL = 128  # dimensions of a full covariance, which is taken for each of hundreds of resamples
ENOUGH = 10  # states for each dimension, for a full covariance
_CELLS = 10  # of a dimension of a Box, by quantiles of both environments' states together


class Measured(NamedTuple):
    """A divergence in nats."""

    value: float
    stderr: float
    """By a bootstrap over episodes of states, drawn in each environment by itself; nan where one has only one."""
    floor: float
    """What it comes to where nothing shifts, as all estimates of it are above 0: the mean over 200 random divisions of
    the episodes of both environments together."""


@dataclass(frozen=True)
class Shift:
    """From the states visited here to those visited elsewhere: forward is KL(here || elsewhere)."""

    episodes: tuple[int, int]
    """How many there were here and elsewhere; of few, the errors are rough, and a floor is near the value itself."""
    normal: dict[str, Measured]
    """"forward" and "reverse" of the normals; empty where no number varies."""
    covariance: str
    """"full", or "diagonal" of fewer than ten states for each dimension."""
    categories: dict[str, Measured]
    """"forward", "reverse" and "js", the mean over dimensions; empty where there are none. KL is that of counts with
    1/2 added to each cell that either environment saw (Krichevsky and Trofimov 1981); JS that of the counts."""
    by_dimension: Tensor
    """[3, D]: the same of each dimension."""
    names: list[str]
    """[D]: the dimensions, as index, or as key and index where there are several parts."""
    left_out: list[str]
    """Images, which have too many dimensions to fit."""


class Features(NamedTuple):
    """States as columns."""

    values: Floats
    """[S, D]."""
    numbers: npt.NDArray[np.bool_]
    """[D]: which are numbers of a Box; the others are categories."""
    names: list[str]
    left_out: list[str]


def features_of(obs: Any, encoder: ObservationEncoder) -> Features:
    """Observations [S, *shape] as columns, one for each number and each category; images are left out."""
    columns, numbers, names, left_out = [], [], [], []
    for name, space in encoder.layout.parts.items():
        part = np.asarray(obs[name] if isinstance(obs, dict) else obs)
        if is_image(space):
            left_out.append(name or "the image")
            continue
        flat = part.reshape(len(part), -1).astype(np.float64)
        columns.append(flat)
        numbers += [isinstance(space, spaces.Box)] * flat.shape[1]
        names += [f"{name} {i}".strip() for i in range(flat.shape[1])]
    rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
    return Features(np.concatenate([np.zeros((rows, 0)), *columns], axis=1), np.array(numbers, bool), names, left_out)


def shift(here: Visits, there: Visits, encoder: ObservationEncoder, seed: int = 0) -> Shift:
    """How far the states of ``there`` lie from those of ``here``. Raises NonFiniteError where a state is not finite."""
    both = [features_of(visits.states, encoder) for visits in (here, there)]
    _, numbers, names, left_out = both[0]
    if not all(np.isfinite(part.values).all() for part in both):
        raise NonFiniteError("no shift between states that are not finite")
    x, rng = np.concatenate([part.values for part in both]), np.random.default_rng(seed)
    episodes = [visits.episodes for visits in (here, there)]
    sizes = [int(part.max()) + 1 for part in episodes]
    joined = np.concatenate([episodes[0], episodes[1] + sizes[0]])
    # How often each episode is taken for here and for elsewhere, [R, episodes] each: as it is, resampled, and mixed.
    sides = np.repeat([0, 1], sizes)
    as_is = [(sides == side).astype(float)[None] for side in (0, 1)]
    drawn = [np.zeros((RESAMPLES, len(sides))) for _ in (0, 1)]
    for side in (0, 1):
        drawn[side][:, sides == side] = resamples(sizes[side], rng)
    shuffled = rng.permuted(np.tile(sides, (RESAMPLES, 1)), axis=1)
    mixed = [(shuffled == side).astype(float) for side in (0, 1)]
    weights = [np.concatenate(parts) for parts in zip(as_is, drawn, mixed, strict=True)]
    known = min(sizes) > 1

    def measured(values: Floats) -> Measured:
        spread, rest = np.split(values[1:], 2)
        return Measured(float(values[0]), float(spread.std(ddof=1)) if known else np.nan, float(rest.mean()))

    normal, covariance = _normals(x[:, numbers], joined, weights, min(len(part.values) for part in both))
    table = _categories(x, numbers, joined, weights)
    keys = ("forward", "reverse", "js")
    return Shift(
        (sizes[0], sizes[1]),
        {key: measured(values) for key, values in zip(keys, normal, strict=False)},
        covariance,
        {key: measured(values.mean(-1)) for key, values in zip(keys, table, strict=True)} if len(names) else {},
        torch.from_numpy(table[:, 0]),
        names,
        left_out,
    )


def _normals(
    x: Floats, episodes: npt.NDArray[np.int64], weights: list[Floats], states: int
) -> tuple[list[Floats], str]:
    """KL both ways, [R] each, of normals fitted to the weighted episodes of the rows of ``x``, and their covariance."""
    x = x[:, np.ptp(x, axis=0) > 0]
    count, full = x.shape[1], x.shape[1] <= _MOST_FULL and states >= ENOUGH * x.shape[1]
    if not count:
        return [], "full"
    x = (x - x.mean(0)) / x.std(0)
    # By episode, so that a resample is a sum of a few dozen of these: 1, x, and x x' or its diagonal.
    order = np.argsort(episodes, kind="stable")
    parts = np.split(x[order], np.flatnonzero(np.diff(episodes[order])) + 1)
    seconds = [(part.T @ part).ravel() if full else (part**2).sum(0) for part in parts]
    sums = np.stack([np.concatenate([[len(p)], p.sum(0), second]) for p, second in zip(parts, seconds, strict=True)])
    fitted: list[Any] = []
    for weight in weights:
        moments = torch.from_numpy(weight @ sums)
        mean, second = moments[:, 1 : count + 1] / moments[:, :1], moments[:, count + 1 :] / moments[:, :1]
        if full:
            covariance = second.view(-1, count, count) - mean[:, :, None] * mean[:, None, :]
            factor = torch.linalg.cholesky(covariance + RIDGE * torch.eye(count, dtype=torch.float64))
            fitted.append(td.MultivariateNormal(mean, scale_tril=factor, validate_args=False))
        else:
            std = ((second - mean**2).clamp_min(0.0) + RIDGE).sqrt()
            fitted.append(joint(td.Normal(mean, std, validate_args=False)))
    old, new = fitted
    return [of(old, new).numpy() for of in (kl, reverse_kl)], "full" if full else "diagonal"


def _categories(
    x: Floats, numbers: npt.NDArray[np.bool_], episodes: npt.NDArray[np.int64], weights: list[Floats]
) -> Floats:
    """KL both ways and JS of each column's categories, [3, R, D], by the weighted episodes."""
    table = np.zeros((3, len(weights[0]), x.shape[1]))
    for i, column in enumerate(x.T):
        seen = np.unique(column)
        shares = np.arange(1, _CELLS) / _CELLS
        edges = np.unique(np.quantile(column, shares, method="inverted_cdf")) if numbers[i] else seen
        edges = edges[edges < seen[-1]]  # a cell ends with a value that was seen; the last is what lies above them all
        sums = np.zeros((weights[0].shape[1], len(edges) + 1))
        np.add.at(sums, (episodes, np.searchsorted(edges, column)), 1.0)
        counts = [torch.from_numpy(weight @ sums) for weight in weights]
        old, new = (td.Categorical(logits=(part + 0.5).log(), validate_args=False) for part in counts)
        first, second = (td.Categorical(logits=part.log(), validate_args=False) for part in counts)
        table[:, :, i] = np.stack([kl(old, new).numpy(), reverse_kl(old, new).numpy(), js(first, second).numpy()])
    return table
