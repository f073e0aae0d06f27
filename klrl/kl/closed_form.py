"""The KL formulas themselves, on parameter tensors, with their gradients in closed form.

Each is one autograd function: the value is computed in float64 without a graph, and the backward pass is the
derivative written out, which is both exact and several times cheaper than differentiating the forward pass.
"""

from typing import Any

import torch
from torch import Tensor

_NO_MASS = 1e-300  # a probability below this is 0: its products with e^x could overflow before they cancel


def phi(x: Tensor) -> Tensor:
    """e^x - 1 - x for float64 ``x``, elementwise, >= 0: the excess of e^x over its tangent at 0."""
    return torch.expm1(x).sub_(x).clamp_min_(0.0)


def categorical_kl(logits_old: Tensor, logits_new: Tensor) -> Tensor:
    """KL(old || new) of categoricals given by unnormalised logits of shape [..., n]; the result has shape [...].

    -inf marks a forbidden action. Gradients: d/d logits_new = softmax(new) - softmax(old), finite wherever the logits
    are; d/d logits_old = p * (log p - log q - KL).
    """
    result: Tensor = _CategoricalKL.apply(logits_old, logits_new)  # type: ignore[no-untyped-call]
    return result


def categorical_kl_of(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Tensor:
    """The same without gradients, from each side's ``exact_probs``, which a loop of measurements computes once."""
    (log_p, p), (log_q, q) = old, new
    x = log_q - log_p
    # Where old forbids an action (p = 0, x = inf or nan) the term's limit is q; where only new does, it is inf.
    return torch.where(p < _NO_MASS, q, phi(x).mul_(p)).sum(dim=-1)


def exact_probs(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log-probabilities and probabilities in float64, [..., n]."""
    log_probs = torch.log_softmax(logits.double(), dim=-1)
    return log_probs, log_probs.exp()


def normal_kl(mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor) -> Tensor:
    """KL(old || new) per dimension of normals, elementwise: ((mu_new - mu_old)/sigma_new)^2/2 + phi(2 log ratio)/2.

    The four tensors have one shape, and so has the result, in ``mean_new``'s dtype.
    Source: the standard form log(s_new/s_old) + (s_old^2 + d^2)/(2 s_new^2) - 1/2, regrouped so that it cannot cancel.
    """
    result: Tensor = _NormalKL.apply(mean_old, log_std_old, mean_new, log_std_new)  # type: ignore[no-untyped-call]
    return result


class _CategoricalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_old: Tensor, logits_new: Tensor) -> Tensor:
        old, new = exact_probs(logits_old), exact_probs(logits_new)
        value = categorical_kl_of(old, new)
        ctx.save_for_backward(*old, *new, value)
        return value.to(logits_new.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        log_p, p, log_q, q, value = ctx.saved_tensors
        grad = grads[0].double().unsqueeze(-1)
        to_old = to_new = None
        if ctx.needs_input_grad[0]:
            to_old = grad * torch.where(p < _NO_MASS, 0.0, p * (log_p - log_q - value.unsqueeze(-1)))
        if ctx.needs_input_grad[1]:
            to_new = grad * (q - p)
        return to_old, to_new


class _NormalKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean_old: Tensor, log_std_old: Tensor, mean_new: Tensor, log_std_new: Tensor) -> Tensor:
        log_std = log_std_new.double()
        u = 2.0 * (log_std_old.double() - log_std)
        inverse_std = torch.exp(-log_std)
        z = (mean_new.double() - mean_old.double()) * inverse_std
        ctx.save_for_backward(z, u, inverse_std)
        ctx.dtypes = (mean_old.dtype, log_std_old.dtype, mean_new.dtype, log_std_new.dtype)
        return (0.5 * (z * z + phi(u))).to(mean_new.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, u, inverse_std = ctx.saved_tensors
        grad = grads[0].double()
        to_mean = grad * z * inverse_std
        growth = torch.expm1(u)
        to_log_std_new = -grad * (z * z + growth)
        gradients = (-to_mean, grad * growth, to_mean, to_log_std_new)
        return tuple(
            gradient.to(dtype) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=True)
        )
