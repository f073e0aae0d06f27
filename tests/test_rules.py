"""The rules of single states: each formula by hand, projections against brute force, and what they hold in training."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import train
from torch import distributions as td

from klrl.agents.limits import KLConfig, KLTarget
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
    Project,
    Reverse,
    at_most,
)
from klrl.kl.rules import Start

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
    unasked: Any = None
    assert unbounded.strength(unasked) is unbounded.beta, "without a limit there is nothing to measure influence by"


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


BASE: dict[str, Any] = {"n_steps": 128, "batch_size": 64, "n_epochs": 10, "learning_rate": 3e-3, "clip_range": 0.0}


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("rule", ["gate", "reverse", "project"])
def test_no_state_moves_far_beyond_its_limit(env: str, rule: Any) -> None:
    free = KLConfig(on_overshoot="keep")
    held = replace(free, per_state=rule, state_limit=0.02)
    farthest = [max(report.kl.max for report in train(PPOConfig(**BASE, kl=kl), env, 2)[1]) for kl in (free, held)]
    assert farthest[1] < 0.35 * farthest[0]


@pytest.mark.parametrize("of", ["mean", "p95", "max"])
@pytest.mark.parametrize("on_overshoot", ["rollback", "project"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_both_limits_hold_after_every_update(of: Any, on_overshoot: Any, direction: Any) -> None:
    kl = KLConfig(of=of, target=0.01, max_target=0.03, on_overshoot=on_overshoot, direction=direction)
    reports = [result.kl for result in train(PPOConfig(**BASE, kl=kl), "Pendulum-v1", 3)[1]]
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


def test_what_a_config_of_ones_own_names_is_taken() -> None:
    @dataclass(frozen=True)
    class Own(KLTarget):
        stop: float = 3.0
        on_overshoot: str = "rollback"

    limit = Own(target=0.01).make_limit(torch.device("cpu"))
    assert (limit.stop, limit.on_overshoot, limit.penalises) == (3.0, "rollback", False)


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


def test_what_no_rule_can_act_by_is_refused() -> None:
    for make in (
        lambda x: Clip(x),
        lambda x: SPO(x),
        lambda x: Gate(x),
        lambda x: Project(x),
        lambda x: Reverse(0.1, x),
    ):
        for bad in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="must be above 0 and finite"):
                make(bad)
    with pytest.raises(ValueError, match="'gate' is no rule of single states"):
        KLLimit(rules=["gate"])  # type: ignore[list-item]
    old = td.Normal(torch.zeros(3, 3), 1.0)
    with pytest.raises(ValueError, match="wrap in joint"):
        KLLimit(rules=[Gate()]).weight(torch.ones(3), torch.ones(3), old, old)
    with pytest.raises(ValueError, match=r"advantage has shape \(3, 1\), the ratio \(3,\): one per state"):
        KLLimit(rules=[Clip()]).weight(torch.ones(3), torch.ones(3, 1), old, old)


def test_infinite_kls_are_no_nan() -> None:
    old = td.Categorical(probs=torch.full((100, 2), 0.5))
    logits = torch.zeros(100, 2)
    logits[0, 1] = -math.inf
    new = td.Categorical(logits=logits)
    influenced = KLLimit(at_most(0.02), penalty="fixed", influence=2.0).term(old, new)
    assert influenced[0] == math.inf  # type: ignore[index]
    for overshoot, of in (("keep", "p95"), ("rollback", "mean"), ("project", "mean")):
        limit = KLLimit(at_most(0.02 if of == "p95" else math.inf), of=of, on_overshoot=overshoot)  # type: ignore[arg-type]
        weights = torch.zeros(100, 2)
        with limit.update(lambda: td.Categorical(logits=weights), [weights]) as move:  # noqa: B023
            weights.copy_(logits)
        assert move.report.excess == 0.0, "what is limited is within its limit"
        assert move.report.rolled_back == 0.0
        assert float(limit.beta) <= 1.0


@pytest.mark.parametrize("penalty", ["adaptive", "lagrange", Dual(1.0), Annealed(1.0, 0.5, 10)])
def test_a_penalty_answers_the_limit_on_the_largest_where_it_is_the_only_one(penalty: Any) -> None:
    limit, weights = KLLimit(max_limit=0.01, penalty=penalty), torch.zeros(4, 3)
    with limit.update(lambda: td.Categorical(logits=weights), [weights]):
        weights[:, 0] += 0.5
    assert math.isfinite(float(limit.beta))
    assert float(limit.beta) > 1.0 or isinstance(penalty, Annealed)
    assert KLConfig(target=0.0, max_target=0.01, penalty="adaptive").make_limit(torch.device("cpu")).penalises


def test_a_schedule_and_a_state_limit_are_checked_where_they_are_given() -> None:
    with pytest.raises(UsageError, match=r"--kl\.penalty reciprocal, with --kl\.coef and --kl\.anneal-to: .*above 0"):
        train(PPOConfig(**BASE, kl=KLConfig(penalty="reciprocal")), "CartPole-v1", 1)
    with pytest.raises(UsageError, match="--clip-rule spo needs a --clip-range above 0"):
        train(PPOConfig(**BASE, clip_rule="spo"), "CartPole-v1", 1)
    with pytest.raises(UsageError, match=r"kl\.state-limit"):
        KLConfig(state_limit=0.0)
    with pytest.raises(UsageError, match=r"kl\.anneal-over"):
        KLConfig(anneal_over=0)
