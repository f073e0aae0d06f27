"""Projections of single states: at their limit and no further, the nearest policy there, with their own gradient."""

from typing import Any

import pytest
import torch
from torch import distributions as td

from klrl.kl import (
    KLLimit,
    NoClosedFormError,
    Product,
    Project,
    at_most,
    geometric_mean,
    joint,
    kl,
    project_states,
    reverse_kl,
)
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.squashed import SquashedNormal


def families() -> dict[str, tuple[td.Distribution, td.Distribution]]:
    """Pairs over 6 states: the first as near as can be, the others from near to far."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.0, 0.02, 0.1, 0.5, 1.0, 3.0], dtype=torch.float64)

    def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (torch.randn(6, *shape, generator=rng, dtype=torch.float64) for _ in range(2))
        return a, a + scale.view(-1, *[1] * len(shape)) * b

    (m, m2), (s, s2), (x, x2) = pair(3), pair(3), pair(2, 4)
    (p, p2), (b, b2) = pair(4), pair(2)
    return {
        "normal": (DiagonalNormal(m, 0.3 * s), DiagonalNormal(m2, 0.3 * s2)),
        "squashed": (SquashedNormal(m, 0.3 * s), SquashedNormal(m2, 0.3 * s2)),
        "categoricals": (MultiCategorical(x), MultiCategorical(x2)),
        "torch's normal": (joint(td.Normal(m, s.exp())), joint(td.Normal(m2, s2.exp()))),
        "torch's categorical": (td.Categorical(logits=p), td.Categorical(logits=p2)),
        "one-hot": (td.OneHotCategorical(logits=p), td.OneHotCategorical(logits=p2)),
        "Dirichlet": (td.Dirichlet(p.exp()), td.Dirichlet(p2.exp())),
        "torch's Bernoulli": (joint(td.Bernoulli(logits=b)), joint(td.Bernoulli(logits=b2))),
        "product": (
            Product([td.Categorical(logits=p), td.Normal(m[:, 0], 1.0)]),
            Product([td.Categorical(logits=p2), td.Normal(m2[:, 0], 1.0)]),
        ),
    }


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("most", [0.003, 0.05, 0.2])
def test_a_projected_state_is_at_its_limit_and_the_others_stay(family: str, direction: Any, most: float) -> None:
    old, new = families()[family]
    measure = kl if direction == "forward" else reverse_kl
    before = measure(old, new)
    after = measure(old, project_states(old, new, most, direction))
    assert bool((before > most).any()), "some states are beyond it"
    assert bool((after <= most * (1 + 1e-9)).all())
    assert torch.allclose(after, before.clamp(max=most), rtol=1e-4)


def test_a_projection_is_the_nearest_policy_within_the_limit() -> None:
    # Among all categoricals of 3 choices with KL(p || old) <= 0.1, by brute force, none is nearer to new.
    old, new = (td.Categorical(logits=torch.tensor([x], dtype=torch.float64)) for x in ([0.0, 0.3, -0.2], [2.0, -1, 0]))
    found = project_states(old, new, 0.1, "reverse")
    p = torch.rand(200_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = p.square() / p.square().sum(-1, keepdim=True)
    q = td.Categorical(probs=p)
    within = kl(q, td.Categorical(logits=old.logits.expand_as(p))) <= 0.1
    distance = kl(q, td.Categorical(logits=new.logits.expand_as(p)))[within]
    assert float(kl(found, new)) == pytest.approx(float(distance.min()), rel=0.02)
    assert float(kl(found, new)) <= float(distance.min()) + 1e-9


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_projection_has_its_own_gradient(direction: Any) -> None:
    old = DiagonalNormal(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    point = torch.tensor([0.5, 0.1, -0.2, 0.3], dtype=torch.float64)
    log_std = torch.tensor([[0.2, -0.1], [0.0, 0.1]], dtype=torch.float64)

    def outcome(mean: torch.Tensor) -> torch.Tensor:
        policy = project_states(old, DiagonalNormal(mean.view(2, 2), log_std), 0.03, direction)
        return torch.cat([policy.loc.flatten(), policy.log_std.flatten()])

    assert torch.autograd.gradcheck(outcome, point.clone().requires_grad_(), rtol=1e-4, atol=1e-6)


def test_what_either_forbids_stays_forbidden_in_the_mean() -> None:
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]]]), torch.tensor([[[1.0, 0.0, -torch.inf]]])
    old, new = (MultiCategorical(x.requires_grad_()) for x in logits)
    for weight in (0.0, 0.5, 1.0):
        mixed = geometric_mean(old, new, torch.tensor([weight]))
        expected = torch.softmax(torch.tensor([weight, 0.0]), -1).tolist()
        assert mixed.probs.flatten().tolist() == pytest.approx([*expected, 0.0], rel=1e-6)
        (slope,) = torch.autograd.grad(mixed.log_prob(torch.zeros(1, 1, dtype=torch.int64)).sum(), new.logits)
        assert bool(slope.isfinite().all())


def test_a_policy_that_forbids_what_the_old_one_did_goes_back_to_it() -> None:
    old = MultiCategorical(torch.zeros(2, 1, 3))
    logits = torch.tensor([[[0.0, 0.0, -torch.inf]], [[3.0, 0.0, 1.0]]], requires_grad=True)
    found = project_states(old, MultiCategorical(logits), 0.01)
    assert kl(old, found).tolist() == pytest.approx([0.0, 0.01], abs=1e-6)
    (slope,) = torch.autograd.grad(found.log_prob(torch.zeros(2, 1, dtype=torch.int64)).sum(), logits)
    assert bool(slope.isfinite().all())
    assert float(slope[1].abs().sum()) > 0


def test_a_family_without_a_mean_is_refused_by_name() -> None:
    beta = td.Beta(torch.ones(2), torch.ones(2))
    with pytest.raises(NoClosedFormError, match="no geometric mean of Beta is known"):
        project_states(beta, td.Beta(torch.full((2,), 5.0), torch.ones(2)), 0.01)
    with pytest.raises(NoClosedFormError, match="no geometric mean of Beta is known"):
        project_states(beta, beta, 0.01)  # also before a state moved too far
    with pytest.raises(NoClosedFormError, match="of Beta and Normal"):
        geometric_mean(beta, td.Normal(torch.zeros(2), 1.0), torch.ones(2))
    with pytest.raises(ValueError, match="limit must be above 0"):
        project_states(beta, beta, 0.0)


def test_a_projected_policy_draws_the_network_to_it() -> None:
    old = td.Normal(torch.zeros(2, dtype=torch.float64), 1.0)
    means = torch.tensor([0.1, 2.0], dtype=torch.float64, requires_grad=True)
    limit = KLLimit(at_most(0.02), penalty="none", rules=[Project(0.02, strength=0.5)])
    new = td.Normal(means, 1.0)
    within = limit.within(old, new)
    assert within.loc.tolist() == pytest.approx([0.1, 0.2], rel=1e-4)  # 0.2^2 / 2 = 0.02
    with pytest.raises(ValueError, match=r"a rule draws the policy to what within\(old, new\) makes of it"):
        limit.term(old, new)
    pull = limit.term(old, new, within)
    assert pull.tolist() == pytest.approx([0.0, 0.5 * 1.8**2 / 2], rel=1e-4)  # type: ignore[union-attr]
    (slope,) = torch.autograd.grad(pull.sum(), means)  # type: ignore[union-attr]
    assert slope.tolist() == pytest.approx([0.0, 0.5 * 1.8], rel=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("log_std", [-5.0, -40.0, 8.0])
def test_a_projection_from_far_away_is_within_and_has_a_finite_gradient(log_std: float, direction: Any) -> None:
    old = DiagonalNormal(torch.zeros(2, 1), torch.zeros(2, 1))
    width = torch.tensor([[log_std], [0.1]], requires_grad=True)
    found = project_states(old, DiagonalNormal(torch.ones(2, 1), width), 0.05, direction)
    assert float((kl if direction == "forward" else reverse_kl)(old, found).detach().max()) <= 0.05 * (1 + 1e-5)
    if log_std == -5.0:  # the weight is 5e-5
        assert float((kl if direction == "forward" else reverse_kl)(old, found)[0].detach()) > 0.999 * 0.05
    (slope,) = torch.autograd.grad(found.log_prob(torch.ones(2, 1)).sum(), width)
    assert bool(slope.isfinite().all())


def test_probabilities_in_float32_are_projected() -> None:
    old, new = (td.Categorical(probs=torch.tensor([p, [0.5, 0.5]])) for p in ([0.5, 0.5], [0.9, 0.1]))
    assert kl(old, project_states(old, new, 0.05)).tolist() == pytest.approx([0.05, 0.0], rel=1e-3, abs=1e-6)
