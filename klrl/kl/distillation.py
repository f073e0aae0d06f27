"""What a student's policy has yet to learn of a teacher's, state by state, softened where actions are discrete."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl.closed_form import categorical_kl
from klrl.kl.divergence import Product, kl, logits_of, raise_nan, same_shape
from klrl.kl.parameters import parameters_of


def distillation_loss(teacher: td.Distribution, student: td.Distribution, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) of discrete distributions whose logits are divided by T, shape ``batch_shape``.

    Exact, in nats, action dimensions summed; T^2 keeps the gradient's size, which softening divides by about that.
    Other families have no temperature, and theirs is KL(teacher || student), as all are at T = 1. Raises ValueError
    for a T of 0 or less, and as ``kl``. Source: Hinton et al. (2015), "Distilling the knowledge in a neural network",
    section 2.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    same_shape(teacher, student)
    if isinstance(teacher, td.Independent) and isinstance(student, td.Independent):
        parts = distillation_loss(teacher.base_dist, student.base_dist, temperature)
        return _per_state(parts, teacher)
    if isinstance(teacher, Product) and isinstance(student, Product):
        pairs = zip(teacher.parts, student.parts, strict=True)
        return torch.stack([distillation_loss(*pair, temperature) for pair in pairs]).sum(0)
    if isinstance(teacher, td.OneHotCategorical) and isinstance(student, td.OneHotCategorical):
        return distillation_loss(teacher._categorical, student._categorical, temperature)
    logits = [_logits(dist) for dist in (teacher, student)]
    if logits[0] is None or logits[1] is None:
        return kl(teacher, student)
    value = categorical_kl(logits[0] / temperature, logits[1] / temperature) * temperature**2
    if math.isnan(value.detach().sum()):
        raise_nan(teacher, student)
    return _per_state(value, teacher).to(parameters_of(student)[0].dtype)


def _logits(dist: Any) -> Tensor | None:
    """A discrete distribution's logits [*batch, *parts, n]; None for any other."""
    if isinstance(dist, td.Categorical | td.Bernoulli):
        return logits_of(dist)
    logits: Tensor | None = dist.logits if getattr(type(dist), "log_probs_64", None) is not None else None
    return logits


def _per_state(value: Tensor, dist: td.Distribution) -> Tensor:
    """The sums over what follows the batch's dimensions."""
    batch = len(dist.batch_shape)
    return value.flatten(batch).sum(-1) if value.dim() > batch else value
