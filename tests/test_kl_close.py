"""Close pairs in float32 of every family: never negative, and what mpmath finds with 50 digits.

``tests/test_kl_accuracy.py`` has more of the families that klrl computes itself.
"""

from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import NoClosedFormError, joint, kl
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.squashed import SquashedNormal

mp.mp.dps = 50
PAIRS = 40


def mp_gamma(a: Any, b: Any, c: Any, d: Any) -> Any:
    return (a - c) * mp.psi(0, a) - mp.loggamma(a) + mp.loggamma(c) + c * mp.log(b / d) + a * (d - b) / b


def mp_dirichlet(*x: Any) -> Any:
    old, new = x[: len(x) // 2], x[len(x) // 2 :]
    value = mp.loggamma(sum(old)) - mp.loggamma(sum(new))
    for a, c in zip(old, new, strict=True):
        value += mp.loggamma(c) - mp.loggamma(a) + (a - c) * (mp.psi(0, a) - mp.psi(0, sum(old)))
    return value


def mp_bernoulli(p: Any, q: Any) -> Any:
    return p * mp.log(p / q) + (1 - p) * mp.log((1 - p) / (1 - q))


def mp_gumbel(a: Any, s: Any, b: Any, t: Any) -> Any:
    shift = mp.log(t / s) + mp.euler * (s / t - 1) + mp.exp((b - a) / t) * mp.gamma(1 + s / t) - 1
    return shift + (a - b) / t


def mp_laplace(a: Any, s: Any, b: Any, t: Any) -> Any:
    d = abs(a - b)
    return mp.log(t / s) + d / t + s / t * mp.exp(-d / s) - 1


def mp_continuous_bernoulli(p: Any, q: Any) -> Any:
    def log_constant(x: Any) -> Any:
        return mp.log(2 * mp.atanh(1 - 2 * x) / (1 - 2 * x))

    mean = p / (2 * p - 1) + 1 / (2 * mp.atanh(1 - 2 * p))
    slope = mp.log(p / (1 - p)) - mp.log(q / (1 - q))
    return mean * slope + mp.log((1 - p) / (1 - q)) + log_constant(p) - log_constant(q)


def mp_normal(a: Any, s: Any, b: Any, t: Any) -> Any:
    return mp.log(t / s) + (s**2 + (a - b) ** 2) / (2 * t**2) - mp.mpf(1) / 2


def mp_log_scaled(a: Any, s: Any, b: Any, t: Any) -> Any:
    return mp_normal(a, mp.exp(s), b, mp.exp(t))


def mp_categorical(*x: Any) -> Any:
    tables = [[mp.exp(one) for one in part] for part in (x[: len(x) // 2], x[len(x) // 2 :])]
    p, q = ([one / sum(table) for one in table] for table in tables)
    return sum(a * mp.log(a / b) for a, b in zip(p, q, strict=True))


def mp_logit(exact: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda x, y: exact(1 / (1 + mp.exp(-x)), 1 / (1 + mp.exp(-y)))


def mp_rate(a: Any, b: Any) -> Any:
    return mp.log(a / b) + b / a - 1


# The family, the kind of each parameter (r: any number, p: above 0, u: between 0 and 1), and its exact KL.
FAMILIES: dict[str, tuple[Callable[..., td.Distribution], str, Callable[..., Any]]] = {
    "gamma": (td.Gamma, "pp", mp_gamma),
    "large gamma": (lambda a, b: td.Gamma(a, b), "Pp", mp_gamma),
    "inverse gamma": (td.InverseGamma, "pp", mp_gamma),
    "dirichlet": (lambda *x: td.Dirichlet(torch.stack(x, -1)), "pppp", mp_dirichlet),
    "poisson": (td.Poisson, "p", lambda a, b: a * mp.log(a / b) + b - a),
    "exponential": (td.Exponential, "p", mp_rate),
    "pareto": (lambda a: td.Pareto(torch.ones_like(a), a), "p", mp_rate),
    "laplace": (td.Laplace, "rp", mp_laplace),
    "gumbel": (td.Gumbel, "rp", mp_gumbel),
    "cauchy": (
        td.Cauchy,
        "rp",
        lambda a, s, b, t: mp.log(((s + t) ** 2 + (a - b) ** 2) / (4 * s * t)),
    ),
    "half-normal": (td.HalfNormal, "p", lambda s, t: mp_normal(0, s, 0, t)),
    "log-normal": (td.LogNormal, "rp", mp_normal),
    "geometric": (td.Geometric, "u", lambda p, q: mp_bernoulli(p, q) / p),
    "geometric of logits": (lambda x: td.Geometric(logits=x), "r", mp_logit(lambda p, q: mp_bernoulli(p, q) / p)),
    "binomial": (lambda p: td.Binomial(7, p), "u", lambda p, q: 7 * mp_bernoulli(p, q)),
    "binomial of logits": (lambda x: td.Binomial(7, logits=x), "r", mp_logit(lambda p, q: 7 * mp_bernoulli(p, q))),
    "normal": (td.Normal, "rp", mp_normal),
    "diagonal normal": (lambda a, s: DiagonalNormal(a[:, None], s[:, None]), "rr", mp_log_scaled),
    "squashed normal": (lambda a, s: SquashedNormal(a[:, None], s[:, None]), "rr", mp_log_scaled),
    "one full normal": (
        lambda a, s: td.MultivariateNormal(a[:, None], scale_tril=s[:, None, None]),
        "rp",
        mp_normal,
    ),
    "beta": (td.Beta, "pp", mp_dirichlet),
    "bernoulli": (td.Bernoulli, "u", mp_bernoulli),
    "bernoulli of logits": (lambda x: td.Bernoulli(logits=x), "r", mp_logit(mp_bernoulli)),
    "categorical": (lambda *x: MultiCategorical(torch.stack(x, -1)[:, None]), "rrrr", mp_categorical),
    "continuous bernoulli": (td.ContinuousBernoulli, "u", mp_continuous_bernoulli),
}


def drawn(kinds: str, distance: float) -> tuple[list[Tensor], list[Tensor]]:
    """Float32 parameters of each kind, [PAIRS], and others that far from them."""
    torch.manual_seed(0)
    old, new = [], []
    for kind in kinds:
        x = torch.randn(PAIRS)
        y = x + distance * (0.5 + torch.rand(PAIRS)) * torch.randn(PAIRS).sign()
        function = {"r": lambda z: z, "p": torch.exp, "P": lambda z: 1000 * torch.exp(z), "u": torch.sigmoid}[kind]
        old.append(function(x))
        new.append(function(y))
    return old, new


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 1.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exact_however_close(name: str, distance: float) -> None:
    make, kinds, formula = FAMILIES[name]
    old, new = drawn(kinds, distance)
    pair = make(*old), make(*new)
    _ = [getattr(dist, tag, None) for dist in pair for tag in ("probs", "logits")]  # torch keeps these in float32
    value = kl(*pair)
    exact = [float(formula(*map(mp.mpf, row))) for row in torch.stack(old + new, -1).tolist()]
    assert value.dtype == torch.float32
    assert bool((value >= 0).all())
    assert value.tolist() == pytest.approx(exact, rel=1e-3, abs=0.0)
    assert float(kl(make(*old), make(*old)).max()) < 1e-13


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 1.0])
def test_low_rank_normals_are_exact_however_close(distance: float) -> None:
    torch.manual_seed(0)
    old = torch.randn(PAIRS, 4), torch.randn(PAIRS, 4, 2), torch.randn(PAIRS, 4).exp()
    new = old[0], old[1] + distance * torch.randn(PAIRS, 4, 2), old[2] * torch.exp(distance * torch.randn(PAIRS, 4))
    pair = td.LowRankMultivariateNormal(*old), td.LowRankMultivariateNormal(*new)
    # By the eigenvalues of S_new^-1 S_old, of which the code takes none.
    covariances = [w.double() @ w.double().mT + torch.diag_embed(d.double()) for _, w, d in (old, new)]
    excess = torch.linalg.eigvals(torch.linalg.solve(covariances[1], covariances[0] - covariances[1])).real
    exact = 0.5 * (excess - torch.log1p(excess)).sum(-1)
    value = kl(*pair)
    assert value.dtype == torch.float32
    assert bool((value >= 0).all())
    assert value.tolist() == pytest.approx(exact.tolist(), rel=1e-3)
    assert kl(pair[0], td.LowRankMultivariateNormal(*old)).tolist() == [0.0] * PAIRS
    full = td.MultivariateNormal(new[0].double(), covariance_matrix=covariances[1])
    mixed = td.LowRankMultivariateNormal(*(x.double() for x in old))
    assert torch.allclose(kl(mixed, full), exact, rtol=1e-6)


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2])
def test_one_hot_categoricals_are_the_categoricals(distance: float) -> None:
    torch.manual_seed(0)
    old = torch.randn(PAIRS, 5)
    pair = old, old + distance * torch.randn(PAIRS, 5)
    expected = kl(*(td.Categorical(logits=x) for x in pair))
    assert bool((expected > 0).all())
    assert torch.equal(kl(*(td.OneHotCategorical(logits=x) for x in pair)), expected)


def test_gradients_of_what_torch_computes_are_kept() -> None:
    torch.manual_seed(0)
    parameters = [torch.rand(5).add(0.5).requires_grad_() for _ in range(4)]
    for dtype in (torch.float32, torch.float64):
        a, b, c, d = (x.to(dtype) for x in parameters)
        gradients = torch.autograd.grad(kl(joint(td.Gamma(a, b)), joint(td.Gamma(c, d))).sum(), parameters)
        exact = torch.autograd.grad(
            td.kl_divergence(td.Gamma(*(x.double() for x in (a, b))), td.Gamma(*(x.double() for x in (c, d)))).sum(),
            parameters,
        )
        for gradient, wanted in zip(gradients, exact, strict=True):
            assert torch.allclose(gradient, wanted, rtol=1e-5)


class Own(td.Gamma):
    """A family of one's own, whose KL is registered as it is."""


@td.register_kl(Own, Own)  # type: ignore[no-untyped-call, untyped-decorator]
def _kl_own(old: Own, new: Own) -> Tensor:
    return torch.full_like(old.rate, 7.0)


def test_a_kl_of_ones_own_is_taken_as_it_is_and_a_pair_without_is_named() -> None:
    one = torch.ones(3)
    assert kl(Own(one, one), Own(one, one)).tolist() == [7.0] * 3
    with pytest.raises(NoClosedFormError, match="StudentT and StudentT"):
        kl(td.StudentT(one), td.StudentT(2 * one))
