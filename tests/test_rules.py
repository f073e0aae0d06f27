"""The rules of single states: each formula by hand, projections against brute force, and what they hold in training."""

import math
from typing import Any

import pytest
import torch
from helpers import train
from torch import distributions as td

from klrl.agents.base import KLConfig
from klrl.agents.ppo import PPOConfig
from klrl.errors import UsageError
from klrl.kl import (
    PENALTIES,
    SPO,
    Annealed,
    Clip,
    Dual,
    Gate,
    KLLimit,
    NoClosedFormError,
    Product,
    Project,
    Reverse,
    at_most,
    geometric_mean,
    joint,
    kl,
    project_states,
    reverse_kl,
)
from klrl.kl.rules import Start
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.squashed import SquashedNormal

RATIO = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1])
ADVANTAGE = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
FAR = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.01])  # nats; the last state is near


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Clip(0.2), [1, 0, 0, 1, 1]),  # outside of 0.8 to 1.2, and further out
        (Gate(0.05), [1, 0, 0, 1, 1]),
        (Gate(0.2), [1, 1, 1, 1, 1]),
        (Reverse(0.05, 0.3), [1, -0.3, -0.3, 1, 1]),
        (SPO(0.2), [3.5, -1.5, -1.5, 3.5, 0.5]),  # 1 - sign(A) (ratio - 1) / 0.2
    ],
)
def test_what_each_rule_leaves_of_a_states_gradient(rule: Any, expected: list[float]) -> None:
    assert rule.weight(RATIO, ADVANTAGE, FAR).tolist() == pytest.approx(expected)


def test_spo_has_the_gradient_of_its_parabola() -> None:
    log_ratio = RATIO.log().requires_grad_()
    ratio = log_ratio.exp()
    loss = ratio * ADVANTAGE - ADVANTAGE.abs() * (ratio - 1) ** 2 / (2 * 0.2)
    (expected,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert torch.allclose(SPO(0.2).weight(RATIO, ADVANTAGE, None) * RATIO * ADVANTAGE, expected)


def test_of_several_rules_the_most_cautious_says() -> None:
    limit = KLLimit(at_most(0.02), rules=[Reverse(0.05, 1.0), Clip(0.05)])
    old, new = (td.Normal(torch.tensor(mean), 1.0) for mean in ([0.0] * 5, [0.5] * 4 + [0.0]))
    # The last state's ratio is beyond 1.05, but its KL is 0: clipping drops what the other leaves.
    assert limit.weight(RATIO, ADVANTAGE, old, new).tolist() == [1, -1, -1, 1, 0]  # type: ignore[union-attr]
    assert KLLimit(at_most(0.02)).weight(RATIO, ADVANTAGE, old, new) == 1.0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_rule_reads_the_kl_in_the_limited_direction(direction: Any) -> None:
    old, new = td.Normal(torch.zeros(1), 1.0), td.Normal(torch.zeros(1), 2.0)
    forward, reverse = math.log(2) - 0.375, 1.5 - math.log(2)  # 0.318 and 0.807
    between = (forward + reverse) / 2
    weight = KLLimit(rules=[Gate(between)], direction=direction).weight(torch.tensor([2.0]), torch.ones(1), old, new)
    assert weight.tolist() == [1.0 if direction == "forward" else 0.0]  # type: ignore[union-attr]


def test_a_states_pull_grows_no_further_than_its_influence() -> None:
    old = td.Normal(torch.zeros(3), 1.0)
    means = torch.tensor([0.1, 0.2, 2.0], requires_grad=True)  # KL 0.005, 0.02, 2
    limit = KLLimit(at_most(0.01), penalty="fixed", coef=3.0, influence=2.0)
    term = limit.term(old, td.Normal(means, 1.0))
    (pull,) = torch.autograd.grad(term.sum(), means)  # type: ignore[union-attr]
    assert pull.tolist() == pytest.approx([0.3, 0.6, 0.6], rel=1e-5)  # beta * mean, and beta * 0.2 from there on
    unbounded = KLLimit(penalty="fixed", coef=3.0, influence=2.0)
    assert unbounded.strength(old, old) is unbounded.beta, "without a limit there is nothing to measure influence by"


def test_penalties_by_name_move_as_they_say() -> None:
    start = Start(1.0, at_most(0.02), end=0.1, updates=4)
    made = {name: make(start) for name, make in PENALTIES.items()}
    values: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(4):
        for name, coefficient in made.items():
            coefficient.adapt(0.06, at_most(0.02))
            values[name].append(coefficient.value)
    assert values["adaptive"] == pytest.approx([2, 4, 8, 16])
    assert values["lagrange"] == pytest.approx([math.e**k for k in (1, 2, 3, 4)])  # rate 0.5 / limit, excess 2 limits
    assert values["fixed"] == [1.0] * 4
    assert values["annealed"] == pytest.approx([0.775, 0.55, 0.325, 0.1])
    assert values["cyclical"] == pytest.approx([1.0, 1.0, 1.0, 0.1])  # four ramps in four updates: each at its start
    assert values["reciprocal"] == pytest.approx([1 / (1 + 9 * k / 4) for k in (1, 2, 3, 4)])
    assert values["none"] == [0.0] * 4
    assert PENALTIES["lagrange"](Start(1.0, at_most(math.inf))).value == 0.0
    with pytest.raises(ValueError, match="above 0"):
        Annealed(1.0, 0.0, 10, shape="reciprocal")


def test_the_lagrange_penalty_finds_the_multiplier_of_its_limit() -> None:
    # Gain m, KL m^2 / 2: the best m under beta is 1 / beta, so KL 0.02 needs beta = 5.
    coefficient: Any = PENALTIES["lagrange"](Start(1.0, at_most(0.02)))
    assert isinstance(coefficient, Dual)
    for _ in range(200):
        coefficient.adapt(0.5 / coefficient.value**2, at_most(0.02))
    assert coefficient.value == pytest.approx(5.0, rel=1e-3)


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
    pull = limit.term(old, new, within)
    assert pull.tolist() == pytest.approx([0.0, 0.5 * 1.8**2 / 2], rel=1e-4)  # type: ignore[union-attr]
    (slope,) = torch.autograd.grad(pull.sum(), means)  # type: ignore[union-attr]
    assert slope.tolist() == pytest.approx([0.0, 0.5 * 1.8], rel=1e-4)


BASE: dict[str, Any] = {"n_steps": 256, "batch_size": 64, "n_epochs": 20, "learning_rate": 3e-3}


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("rule", ["gate", "reverse", "project"])
def test_no_state_moves_far_beyond_its_limit(env: str, rule: Any) -> None:
    free = KLConfig(penalty="none", stop=0.0)
    held = KLConfig(penalty="none", stop=0.0, per_state=rule, state_limit=0.02)
    farthest = [max(report.kl.max for report in train(PPOConfig(**BASE, kl=kl), env, 4)[1]) for kl in (free, held)]
    assert farthest[1] < 0.35 * farthest[0]


@pytest.mark.parametrize("of", ["mean", "p95", "max"])
@pytest.mark.parametrize("on_overshoot", ["rollback", "project"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_both_limits_hold_after_every_update(of: Any, on_overshoot: Any, direction: Any) -> None:
    kl = KLConfig(of=of, target=0.01, max_target=0.03, on_overshoot=on_overshoot, direction=direction)
    reports = [result.kl for result in train(PPOConfig(**BASE, kl=kl), "Pendulum-v1", 6)[1]]
    for report in reports:
        assert report.limited <= 0.01
        assert report.furthest <= 0.03
        assert report.excess == max(report.of_limit, report.max_of_limit) <= 1
        if direction == "forward":
            assert report.limited == {"mean": report.mean, "p95": report.p95, "max": report.max}[of]
            assert report.furthest == report.max
    assert any(report.rolled_back > 0 for report in reports)


def test_a_limit_on_the_largest_alone_is_held_and_logged() -> None:
    kl = KLConfig(target=0.0, max_target=0.02, penalty="none", stop=0.0, on_overshoot="project")
    reports = [result.kl for result in train(PPOConfig(**BASE, kl=kl), "Pendulum-v1", 4)[1]]
    logged: dict[str, float] = {}
    reports[-1].write(logged.__setitem__)
    assert logged["kl/max_limit"] == 0.02
    assert logged["kl/max_of_limit"] == pytest.approx(reports[-1].max / 0.02)
    assert "kl/of_limit" not in logged
    assert all(report.max <= 0.02 for report in reports)


def test_a_rule_that_needs_the_kl_says_where_there_is_none() -> None:
    mixture = td.MixtureSameFamily(td.Categorical(logits=torch.zeros(2, 2)), td.Normal(torch.zeros(2, 2), 1.0))
    with pytest.raises(NoClosedFormError, match="no rule of states"):
        KLLimit(rules=[Gate()]).weight(torch.ones(2), torch.ones(2), mixture, mixture)
    assert KLLimit(rules=[Clip()]).weight(torch.ones(2), torch.ones(2), mixture, mixture).tolist() == [1, 1]  # type: ignore[union-attr]


def test_clipping_apart_leaves_the_smaller_gradient_alone() -> None:
    from gymnasium import spaces

    from klrl.agents.ppo import PPO

    agent = PPO(spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    end = agent.policy_params.flat.numel()
    gradient = torch.cat([torch.full((end,), 1e-3), torch.ones(agent.critic_params.flat.numel())])
    apart = gradient.clone()
    norm = agent.take_step(apart, torch.tensor(0.0), 0.5, apart=True)
    assert float(norm) == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert torch.equal(apart[:end], gradient[:end]), "shorter than 0.5 by itself"
    assert float(apart[end:].norm()) == pytest.approx(0.5, rel=1e-4)


def test_a_schedule_and_a_state_limit_are_checked_where_they_are_given() -> None:
    with pytest.raises(UsageError, match=r"kl\.state-limit"):
        KLConfig(state_limit=0.0)
    with pytest.raises(UsageError, match=r"kl\.anneal-over"):
        KLConfig(anneal_over=0)
