"""Exactness in float32: 210,000 random pairs per family, seven decades of closeness, and the cases that break others.

The reference is mpmath with 50 digits, or a form in float64 that does not cancel and is not the one under test.
"""

import math
from typing import Any

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch import distributions as td

from klrl.kl import categorical_kl, joint, kl
from klrl.policies.distributions import DiagonalNormal, MultiCategorical

mp.mp.dps = 50
INF = float("inf")
DECADES = [10.0**-k for k in range(7)]
PER_DECADE = 30_000


def assert_exact(value: Tensor, exact: Tensor) -> None:
    value, exact = value.detach().double(), exact.detach().double()
    assert bool((value >= 0).all())
    assert bool((value[exact == 0] == 0).all())
    error = ((value - exact).abs() / exact)[exact > 0]
    exact = exact[exact > 0]
    assert float(error.median()) <= 1e-6
    for size, worst in ((1e-6, 1e-3), (1e-8, 1e-2)):
        if bool((exact >= size).any()):
            assert float(error[exact >= size].max()) <= worst


def near(x: Tensor, scale: float, rng: torch.Generator) -> Tensor:
    return x + scale * torch.randn(x.shape, generator=rng)


def exact_from_log_probs(log_p: Tensor, log_q: Tensor) -> Tensor:
    x = log_q - log_p
    return (log_p.exp() * (torch.expm1(x) - x)).sum(-1)


@pytest.mark.parametrize("scale", DECADES)
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_categoricals(scale: float, shift: float) -> None:
    rng = torch.Generator().manual_seed(0)
    old = 2 * torch.randn(PER_DECADE, 6, generator=rng)
    new = near(old, scale, rng) + shift
    exact = exact_from_log_probs(*(torch.log_softmax(x.double(), -1) for x in (old, new)))
    assert_exact(categorical_kl(old, new), exact)
    both = old + shift, near(old, scale, rng) + shift
    exact = exact_from_log_probs(*(torch.log_softmax(x.double(), -1) for x in both))
    assert_exact(categorical_kl(*both), exact)


@pytest.mark.parametrize("scale", DECADES)
def test_categoricals_given_by_probabilities(scale: float) -> None:
    rng = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(PER_DECADE, 4, generator=rng)
    pair = [td.Categorical(probs=torch.softmax(x, -1)) for x in (logits, near(logits, scale, rng))]
    p, q = (dist.probs.double() / dist.probs.double().sum(-1, keepdim=True) for dist in pair)
    assert_exact(kl(*pair), exact_from_log_probs(p.log(), q.log()))


@pytest.mark.parametrize("scale", DECADES)
def test_bernoullis(scale: float) -> None:
    rng = torch.Generator().manual_seed(2)
    old = 4 * torch.randn(PER_DECADE, generator=rng)
    new = near(old, scale, rng)

    def exact(old: Tensor, new: Tensor) -> Tensor:  # of float64 logits
        softplus = torch.nn.functional.softplus
        tables = [torch.stack([-softplus(x), -softplus(-x)], -1) for x in (old, new)]
        return exact_from_log_probs(*tables)

    assert_exact(kl(td.Bernoulli(logits=old), td.Bernoulli(logits=new)), exact(old.double(), new.double()))
    p, q = (torch.sigmoid(x.double()).float().clamp(1e-7, 1 - 1e-7) for x in (old, new))
    wanted = exact(*(torch.log(x.double()) - torch.log1p(-x.double()) for x in (p, q)))
    assert_exact(kl(td.Bernoulli(probs=p), td.Bernoulli(probs=q)), wanted)


@pytest.mark.parametrize("scale", DECADES)
def test_multidiscretes_padded_and_as_a_list(scale: float) -> None:
    rng = torch.Generator().manual_seed(3)
    old = 2 * torch.randn(PER_DECADE, 3, 4, generator=rng)
    new = near(old, scale, rng)
    for logits in (old, new):
        logits[:, 1, 2:] = -INF
        logits[:, 2, 3:] = -INF
    sizes = (4, 2, 3)
    exact = sum(
        exact_from_log_probs(*(torch.log_softmax(x[:, i, :n].double(), -1) for x in (old, new)))
        for i, n in enumerate(sizes)
    )
    assert isinstance(exact, Tensor)
    assert_exact(kl(MultiCategorical(old), MultiCategorical(new)), exact)
    parts = [joint([td.Categorical(logits=x[:, i, :n]) for i, n in enumerate(sizes)]) for x in (old, new)]
    logits = [[part.logits.double() for part in dist.parts] for dist in parts]  # type: ignore[attr-defined]
    exact = sum(
        exact_from_log_probs(torch.log_softmax(a, -1), torch.log_softmax(b, -1)) for a, b in zip(*logits, strict=True)
    )
    assert isinstance(exact, Tensor)
    assert_exact(kl(*parts), exact)


def exact_normal(mean_old: Tensor, u: Tensor, mean_new: Tensor, std_new: Tensor) -> Tensor:
    """From float64: u = 2 log(sigma_old / sigma_new)."""
    return 0.5 * (((mean_new - mean_old) / std_new) ** 2 + torch.expm1(u) - u)


@pytest.mark.parametrize("scale", DECADES)
def test_normals(scale: float) -> None:
    rng = torch.Generator().manual_seed(4)
    mean, log_std = torch.randn(2, PER_DECADE, 3, generator=rng)
    mean_new, log_std_new = near(mean, scale, rng), near(log_std, scale, rng)
    a, b = mean.double(), mean_new.double()
    u = 2 * (log_std.double() - log_std_new.double())
    exact = exact_normal(a, u, b, log_std_new.double().exp()).sum(-1)
    assert_exact(kl(DiagonalNormal(mean, log_std), DiagonalNormal(mean_new, log_std_new)), exact)
    std, std_new = log_std.exp(), log_std_new.exp()
    u = 2 * torch.log1p((std.double() - std_new.double()) / std_new.double())
    exact = exact_normal(a, u, b, std_new.double())
    assert_exact(kl(joint(td.Normal(mean, std)), joint(td.Normal(mean_new, std_new))), exact.sum(-1))
    one_dimension = slice(0, None), 0  # without the others, whose KL would hide this one's error
    assert_exact(kl(td.Normal(mean, std), td.Normal(mean_new, std_new))[one_dimension], exact[one_dimension])
    same_mean = kl(td.Normal(mean, std), td.Normal(mean, std_new))
    assert_exact(same_mean, exact_normal(a, u, a, std_new.double()))


@pytest.mark.parametrize("scale", DECADES)
def test_full_covariances(scale: float) -> None:
    rng = torch.Generator().manual_seed(5)
    mean, factor = torch.randn(PER_DECADE, 3, generator=rng), torch.randn(PER_DECADE, 3, 3, generator=rng).tril()
    mean_new, factor_new = near(mean, scale, rng), near(factor, scale, rng).tril()
    for x in (factor, factor_new):
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_((diagonal / 2).exp())
    # Independently of the code: by the eigenvalues of L_new^-1 S_old L_new^-T, of which it takes only triangles.
    old, new = factor.double(), factor_new.double()
    whitened = torch.linalg.inv(new) @ old
    excess = torch.linalg.eigvalsh(whitened @ whitened.mT) - 1
    shift = torch.linalg.inv(new) @ (mean_new.double() - mean.double()).unsqueeze(-1)
    exact = 0.5 * ((excess - torch.log1p(excess)).sum(-1) + shift.square().sum((-2, -1)))
    pair = td.MultivariateNormal(mean, scale_tril=factor), td.MultivariateNormal(mean_new, scale_tril=factor_new)
    assert_exact(kl(*pair), exact)


def betas(scale: float, pairs: int) -> None:
    rng = torch.Generator().manual_seed(6)
    old = torch.exp(2 * torch.randn(pairs, 2, generator=rng))
    new = old * torch.exp(scale * torch.randn(pairs, 2, generator=rng))

    def exact(a: float, b: float, c: float, d: float) -> float:
        def log_beta(x: Any, y: Any) -> Any:
            return mp.loggamma(x) + mp.loggamma(y) - mp.loggamma(x + y)

        a, b, c, d = map(mp.mpf, (a, b, c, d))
        slopes = (a - c) * mp.psi(0, a) + (b - d) * mp.psi(0, b) + (c - a + d - b) * mp.psi(0, a + b)
        return float(log_beta(c, d) - log_beta(a, b) + slopes)

    rows = torch.cat([old, new], -1).tolist()
    wanted = torch.tensor([exact(*row) for row in rows], dtype=torch.float64)
    assert_exact(kl(td.Beta(old[:, 0], old[:, 1]), td.Beta(new[:, 0], new[:, 1])), wanted)


@pytest.mark.parametrize("scale", DECADES)
def test_betas(scale: float) -> None:
    betas(scale, 300)


@pytest.mark.slow  # mpmath takes 0.7 ms for each
@pytest.mark.parametrize("scale", DECADES)
def test_210_000_betas(scale: float) -> None:
    betas(scale, PER_DECADE)


def mp_categorical(old: Tensor, new: Tensor) -> float:
    def probabilities(logits: Tensor) -> list[Any]:
        weights = [mp.exp(mp.mpf(float(x))) for x in logits]
        return [w / sum(weights) for w in weights]

    terms = [
        p * mp.log(p / q) if q > 0 else mp.inf
        for p, q in zip(probabilities(old), probabilities(new), strict=True)
        if p > 0
    ]
    return float(sum(terms))


BASE = torch.tensor([0.3, -1.2, 0.7])
HARD_LOGITS = {
    "both masked by -1e9": ([-1e9, 0.0, 1.0], [-1e9, 0.5, 1.0]),
    "only old masked by -1e9": ([-1e9, 0.0, 1.0], [0.0, 0.5, 1.0]),
    "only new masked by -1e9": ([0.0, 0.0, 1.0], [-1e9, 0.5, 1.0]),
    "both masked by -inf": ([-INF, 0.0, 1.0], [-INF, 0.5, 1.0]),
    "only old masked by -inf": ([-INF, 0.0, 1.0], [0.0, 0.5, 1.0]),
    "gap of 200": ([200.0, 0.0, 0.0], [0.0, 200.0, 0.0]),
    "gap of 200 on one side": ([200.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    "gap of 200 the other way": ([0.0, 0.0, 0.0], [200.0, 0.0, 0.0]),
    "gap of 720, where old underflows": ([-720.0, 0.0, 0.0], [-4.0, 0.0, 0.0]),
    "logits of 1e30": ([1e30, 0.0, 0.0], [1e30, 0.0, 5.0]),
    "common shift of 1e-5": (BASE.tolist(), (BASE + 1e-5).tolist()),
    "common shift of 1e6": (BASE.tolist(), (BASE + 1e6).tolist()),
    "one logit by 1e-5": (BASE.tolist(), (BASE + torch.tensor([1e-5, 0.0, 0.0])).tolist()),
    "a rare action moves, common ones by 1e-5": ([-18.0, 0.0, 0.0], [-15.0, 1e-5, 0.0]),
}


@pytest.mark.parametrize("case", HARD_LOGITS)
def test_hard_logits(case: str) -> None:
    old, new = (torch.tensor(x) for x in HARD_LOGITS[case])
    assert float(categorical_kl(old, new)) == pytest.approx(mp_categorical(old, new), rel=1e-6)
    assert float(categorical_kl(new, new.clone())) == 0.0
    leaves = [x.clone().requires_grad_() for x in (old, new)]
    categorical_kl(*leaves).backward()
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)
    finite = old.isfinite() & new.isfinite()
    if float(torch.cat([old[finite], new[finite]]).abs().max()) <= 1e4:  # a difference of 1e-6 is not lost in it
        pair = [x[finite].double().requires_grad_() for x in (old, new)]
        assert torch.autograd.gradcheck(categorical_kl, pair)


@pytest.mark.parametrize(("old", "new"), [(100.0, -100.0), (100.0, 90.0), (-30.0, 2.0), (1000.0, 0.0), (40.0, 40.001)])
def test_saturated_bernoullis(old: float, new: float) -> None:
    pair = [torch.tensor(x, requires_grad=True) for x in (old, new)]
    value = kl(td.Bernoulli(logits=pair[0]), td.Bernoulli(logits=pair[1]))
    logits = [torch.stack([torch.zeros(()), x.detach()]) for x in pair]
    assert float(value.detach()) == pytest.approx(mp_categorical(*logits), rel=1e-6, abs=1e-40)
    value.backward()
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite()) for leaf in pair)


# mean_old, std_old, mean_new, std_new
HARD_NORMALS = [
    (0.0, 1e-20, 0.0, 1.0),
    (0.3, 1.0, 0.0, 1e-15),
    (0.0, 1e10, 0.0, 1e-9),
    (0.0, 1e-20, 5e-21, 1e-20),
    (0.0, 1e-20, 0.0, 1.00001e-20),
    (1.0, 1.0, 1.00001, 1.0),
    (1e6, 1.0, 1e6 + 1, 1.0),
    (0.0, 1.0, 0.0, 1.00001),
    (0.0, 0.05, 0.0, 0.9),
]


@pytest.mark.parametrize("parameters", HARD_NORMALS)
def test_hard_normals(parameters: tuple[float, ...]) -> None:
    leaves = [torch.tensor(x, requires_grad=True) for x in parameters]
    a, s, b, t = (mp.mpf(float(x.detach())) for x in leaves)
    exact = float(mp.log(t / s) + (s * s + (b - a) ** 2) / (2 * t * t) - mp.mpf(1) / 2)
    value = kl(td.Normal(*leaves[:2]), td.Normal(*leaves[2:]))
    assert float(value.detach()) == pytest.approx(exact, rel=1e-6)
    value.backward()
    to_mean, to_std = (a - b) / t**2, (s * s + (b - a) ** 2) / t**3
    for leaf, wanted in zip(leaves, (to_mean, s / t**2 - 1 / s, -to_mean, 1 / t - to_std), strict=True):
        overflows = abs(wanted) > torch.finfo(torch.float32).max
        assert float(leaf.grad) == pytest.approx(math.copysign(INF, wanted) if overflows else float(wanted), rel=1e-4)  # type: ignore[arg-type]
    factors = [leaf.detach().view(1, 1) for leaf in leaves]
    full = [td.MultivariateNormal(m.view(1), scale_tril=c) for m, c in (factors[:2], factors[2:])]
    assert float(kl(*full)) == pytest.approx(exact, rel=1e-6)


def test_a_ratio_of_1e20_has_a_finite_kl_one_way_and_overflows_float32_the_other() -> None:
    narrow, wide = td.Normal(torch.tensor(0.0), torch.tensor(1e-20)), td.Normal(torch.tensor(0.0), torch.tensor(1.0))
    assert float(kl(narrow, wide)) == pytest.approx(20 * math.log(10) - 0.5, rel=1e-6)
    assert float(kl(wide, narrow)) == INF  # 5e39, beyond float32
    both = [td.Normal(d.loc.double(), d.scale.double()) for d in (wide, narrow)]
    assert float(kl(*both)) == pytest.approx(0.5 / float(narrow.scale) ** 2, rel=1e-6)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_gradients_and_second_derivatives_equal_finite_differences(spread: float) -> None:
    torch.manual_seed(0)

    def pair(*shape: int) -> list[Tensor]:
        first = torch.randn(shape, dtype=torch.float64)
        return [first.requires_grad_(), (first.detach() + spread * torch.randn(shape).double()).requires_grad_()]

    def normal(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return kl(td.Normal(a, s.exp()), td.Normal(b, t.exp()))

    def diagonal(a: Tensor, s: Tensor, b: Tensor, t: Tensor) -> Tensor:
        return kl(DiagonalNormal(a, s), DiagonalNormal(b, t))

    def beta(x: Tensor, y: Tensor) -> Tensor:
        old, new = x.exp(), y.exp()
        return kl(td.Beta(old[..., 0], old[..., 1]), td.Beta(new[..., 0], new[..., 1]))

    def full(x: Tensor, y: Tensor) -> Tensor:
        factors = [z.tril(-1) + torch.diag_embed(z.diagonal(dim1=-2, dim2=-1).exp()) for z in (x, y)]
        return kl(*(td.MultivariateNormal(z[..., 0], scale_tril=f) for z, f in zip((x, y), factors, strict=True)))

    (a, b), (s, t) = pair(3, 2), pair(3, 2)
    for function, inputs in (
        (categorical_kl, pair(3, 4)),
        (lambda x, y: kl(td.Bernoulli(logits=x), td.Bernoulli(logits=y)), pair(5)),
        (lambda x, y: kl(MultiCategorical(x), MultiCategorical(y)), pair(2, 2, 3)),
        (normal, [a, s, b, t]),
        (diagonal, [a, s, b, t]),
        (beta, pair(3, 2)),
        (full, pair(2, 3, 3)),
    ):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
