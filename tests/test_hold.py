"""hold_states: the gradient of any loss weighed in each state by rules of its own KL, and SAC's windows held so."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import SMALL_SAC, train_sac, within_a_window
from test_sac import one_step, still
from torch import Tensor
from torch import distributions as td

from klrl.agents.limits import OffPolicyKLConfig
from klrl.agents.sac import SAC
from klrl.buffers.replay import Transitions
from klrl.kl import Clip, Gate, Product, Project, Reverse, StateRule, freeze, hold_states, joint, kl, reverse_kl
from klrl.kl.parameters import map_parameters, parameters_of
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.parameters import gradients
from klrl.policies.squashed import SquashedNormal


@pytest.mark.parametrize(("rule", "turned"), [(Gate(0.1), 0.0), (Reverse(0.1, 0.3), -0.3)])
def test_a_states_gradient_is_multiplied_where_it_is_beyond_the_limit_and_would_go_further(
    rule: StateRule, turned: float
) -> None:
    # KL(old || new) = l + (1 + m^2) / (2 e^2l) - 1/2; at l = 0 it is m^2 / 2, and its gradient (m, -m^2).
    mean = torch.tensor([[1.0], [1.0], [0.1], [-1.0], [1.0], [1.0]], requires_grad=True)
    log_std = torch.zeros(6, 1, requires_grad=True)
    old, new = DiagonalNormal(torch.zeros(6, 1), torch.zeros(6, 1)), DiagonalNormal(mean, log_std)
    held = hold_states(old, new, [rule])
    assert torch.equal(held.loc, mean)
    assert torch.equal(held.log_std, log_std)
    to_mean = torch.tensor([[-1.0], [1.0], [-1.0], [1.0], [-1.0], [-1.0]])
    to_log_std = torch.tensor([[0.0], [0.0], [0.0], [0.0], [2.0], [-2.0]])
    # outwards; back; outwards, but within the limit; outwards on the other side; outwards in both parameters; outwards
    # in the mean, but further back in the log_std, so that the KL falls
    factors = torch.tensor([[turned], [1.0], [1.0], [turned], [turned], [1.0]])
    (to_mean * held.loc + to_log_std * held.log_std).sum().backward()
    assert mean.grad is not None
    assert log_std.grad is not None
    assert torch.allclose(mean.grad, factors * to_mean)
    assert torch.allclose(log_std.grad, factors * to_log_std)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded(seed: int) -> MultiCategorical:
    logits = noise(40, 2, 3, seed=seed)
    logits[:, 0, 2] = -math.inf
    return MultiCategorical(logits)


FAMILIES: dict[str, Any] = {
    "squashed": lambda seed: SquashedNormal(noise(40, 2, seed=seed), 0.5 * noise(40, 2, seed=seed + 1)),
    "padded": padded,
    "normal": lambda seed: joint(td.Normal(noise(40, 2, seed=seed), noise(40, 2, seed=seed + 1).exp())),
    "dirichlet": lambda seed: td.Dirichlet(noise(40, 3, seed=seed).exp()),
    "numbers": lambda seed: td.Normal(noise(40, seed=seed), noise(40, seed=seed + 1).exp()),
    "correlated": lambda seed: td.MultivariateNormal(
        noise(40, 2, seed=seed), scale_tril=torch.eye(2).double() + 0.3 * noise(40, 2, 2, seed=seed + 1).tril()
    ),
}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_further_is_where_a_small_step_down_the_loss_raises_the_kl(family: str, direction: Any) -> None:
    old, new = FAMILIES[family](0), FAMILIES[family](10)
    measure = kl if direction == "forward" else reverse_kl
    leaf = map_parameters(new, lambda parameter: parameter.clone().requires_grad_())
    slopes = [torch.where(p.isfinite(), noise(*p.shape, seed=3), 0.0) for p in parameters_of(leaf)]

    def gradient(policy: Any) -> tuple[Tensor, ...]:
        finite = [p.clamp_min(-1e9) for p in parameters_of(policy)]
        loss = sum((p.sin() * s).reshape(40, -1).sum(1) for p, s in zip(finite, slopes, strict=True))
        return torch.autograd.grad(torch.linspace(0.5, 2, 40).double() @ loss, parameters_of(leaf))  # type: ignore[operator]

    free = gradient(leaf)
    steps = iter(free)
    moved = map_parameters(new, lambda parameter: parameter - 1e-7 * next(steps))
    rises, limit = measure(old, moved) > measure(old, new), float(measure(old, new).median())
    beyond = rises & (measure(old, new) > limit)
    assert 5 < int(beyond.sum()) < 20
    for rule, turned in ((Gate(limit), 0.0), (Reverse(limit, 0.5), -0.5)):
        found = gradient(hold_states(old, leaf, [rule], direction))
        for mine, plain in zip(found, free, strict=True):
            factor = torch.where(beyond, turned, 1.0).double().view(-1, *[1] * (plain.dim() - 1))
            assert torch.allclose(mine, factor * plain, atol=1e-12)


NORMALISED: dict[str, Any] = {  # what makes its parameters normalised when it is made
    "one": lambda x: td.Categorical(logits=x[:, 0]),
    "probabilities": lambda x: td.Categorical(probs=x[:, 0].softmax(-1)),
    "one-hot": lambda x: td.OneHotCategorical(logits=x[:, 0]),
    "several": lambda x: joint(td.Categorical(logits=x)),
    "product": lambda x: Product([td.Categorical(logits=x[:, 0]), td.Categorical(logits=x[:, 1, :3])]),
}


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", NORMALISED)
def test_further_is_seen_from_the_network_where_parameters_were_normalised(kind: str, direction: Any) -> None:
    make, measure = NORMALISED[kind], kl if direction == "forward" else reverse_kl
    raw = noise(200, 2, 4, seed=1).requires_grad_()
    old, new = make(noise(200, 2, 4, seed=0)), make(raw)
    action = new.sample()
    (free,) = torch.autograd.grad(new.log_prob(action).sum(), raw, retain_graph=True)
    rises = measure(old, make(raw.detach() - 1e-6 * free)) > measure(old, new)
    held = hold_states(old, new, [Gate(1e-9)], direction)
    (found,) = torch.autograd.grad(held.log_prob(action).sum(), raw)
    assert 20 < int(rises.sum()) < 180
    assert torch.allclose(found, torch.where(rises.view(-1, 1, 1), 0.0, free), atol=1e-12)


def test_a_family_whose_parameters_are_views_is_held() -> None:
    concentration = torch.full((6, 2), 5.0, requires_grad=True)
    three = torch.full((6, 2), 3.0)
    old = joint(td.Beta(three, three))
    held = hold_states(old, joint(td.Beta(concentration, three)), [Gate(0.05)])
    (found,) = torch.autograd.grad(-kl(old, held).sum(), concentration)
    assert float(found.abs().sum()) == 0.0


def test_a_state_that_is_infinitely_far_is_held() -> None:
    raw = torch.tensor([[0.0, 1.0, 1.0]], requires_grad=True)
    old = td.Categorical(logits=torch.tensor([[0.0, -torch.inf, 1.0]]))
    held = hold_states(old, td.Categorical(logits=raw), [Gate(0.05)], "reverse")
    (found,) = torch.autograd.grad(-held.log_prob(torch.tensor([1])).sum(), raw)
    assert found.tolist() == [[0.0, 0.0, 0.0]]


def test_the_least_of_several_factors_counts_and_other_rules_leave_the_policy_as_it_is() -> None:
    mean = torch.tensor([[1.0], [0.6]], requires_grad=True)
    old, new = DiagonalNormal(torch.zeros(2, 1), torch.zeros(2, 1)), DiagonalNormal(mean, torch.zeros(2, 1))
    held = hold_states(old, new, [Reverse(0.3, 2.0), Gate(0.1)])
    assert torch.autograd.grad(-held.loc.sum(), mean)[0].tolist() == [[2.0], [0.0]]
    for rules in ([], [Project(0.1)]):
        assert hold_states(old, new, rules) is new
    with pytest.raises(ValueError, match="Clip is about a surrogate's ratio"):
        hold_states(old, new, [Gate(0.1), Clip(0.2)])
    with pytest.raises(ValueError, match=r"wrap it in joint"):
        hold_states(td.Normal(torch.zeros(2, 3), 1.0), td.Normal(torch.ones(2, 3), 1.0), [Gate(0.1)])


@pytest.mark.parametrize("rule", ["gate", "reverse"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("space", [spaces.Box(-2.0, 2.0, (3,)), spaces.MultiDiscrete([2, 3])], ids=str)
def test_sacs_gradient_is_weighed_state_by_state_and_the_penaltys_is_not(space: Any, direction: Any, rule: Any) -> None:
    own: dict[str, Any] = {"penalty": "fixed", "coef": 0.7, "direction": direction}
    held = OffPolicyKLConfig(target=0.01, per_state=rule, state_limit=0.05, turn=0.4, **own)
    agent, _ = one_step(replace(SMALL_SAC, kl=held), space)
    rng = torch.Generator().manual_seed(0)
    for params in (agent.policy_params, agent.old_params, agent.target_params):
        params.flat.add_(0.2 * torch.randn(params.flat.shape, generator=rng))
    inputs = {"vector": torch.randn(64, 1, generator=rng)}
    action = torch.zeros(64, agent.actions.stored_width)
    batch = Transitions(inputs, action, torch.ones(64), torch.ones(64), inputs)
    drawn = agent.actions.draw_noise(agent.rng, 64)
    metrics, _, found = still(agent, batch, drawn, 0.2)

    policy, old = agent.policy(inputs), freeze(agent.old_policy(inputs))
    moved = kl(old, policy) if direction == "forward" else kl(policy, old)
    value, _ = agent.actions.soft_value(policy, agent.critic, inputs, torch.tensor(0.2), drawn[1])
    outward, slopes = (
        torch.cat(
            [x.reshape(64, -1) for x in torch.autograd.grad(y.sum(), parameters_of(policy), retain_graph=True)], 1
        )
        for y in (moved, -value)
    )
    beyond = ((slopes * outward).sum(1) < 0) & (moved > 0.05)
    assert 3 < int(beyond.sum()) < 61
    factor = torch.where(beyond, -0.4 if rule == "reverse" else 0.0, 1.0)
    expected = gradients((-value * factor).mean() + 0.7 * moved.mean(), agent.policy_params)
    assert torch.allclose(found, expected, atol=1e-5)
    assert metrics[2] == pytest.approx(-float(value.detach().mean()), rel=1e-4), "the loss itself is as it was"
    assert metrics[4] == pytest.approx(float((1 - moved.detach() / 0.05).clamp_min(0).mean()), rel=1e-4)


def run(env_id: str, steps: int, rate: float = 3e-3, **rules: Any) -> tuple[float, float]:
    """The median over windows of the 95th percentile of the states' KL, and how far log alpha went."""
    kept = OffPolicyKLConfig(every=50, penalty="none", stop=0.0, **rules)
    _, reports = train_sac(replace(SMALL_SAC, learning_rate=rate, kl=kept), env_id, steps)
    return float(np.median([r.kl.p95 for r in reports[1:]])), abs(math.log(reports[-1].metrics["train/ent_coef"]))


@pytest.mark.parametrize(("env_id", "rate", "limit"), [("Pendulum-v1", 3e-3, 0.02), ("CartPole-v1", 0.01, 0.005)])
def test_each_states_kl_stays_near_its_limit_in_a_window_of_sac(env_id: str, rate: float, limit: float) -> None:
    free, _ = run(env_id, 300, rate)
    assert free > 20 * limit
    for rule, times in (("gate", 8.0), ("reverse", 4.0), ("project", 5.0)):
        held, _ = run(env_id, 300, rate, per_state=rule, state_limit=limit)
        assert 0.2 * limit < held < times * limit, rule


@pytest.mark.parametrize("rule", ["gate", "reverse", "project"])
def test_states_that_may_hardly_move_do_not_wind_the_temperature_up(rule: Any) -> None:
    (_, free), (_, held) = run("Pendulum-v1", 200), run("Pendulum-v1", 200, per_state=rule, state_limit=1e-4)
    assert held < 0.3 * free


def test_a_window_with_a_rule_goes_on_from_its_state_as_it_would_have() -> None:
    rules = OffPolicyKLConfig(every=50, per_state="reverse", state_limit=0.01)
    agent, buffer = within_a_window(rules)
    twin = SAC(agent.observation_space, agent.action_space, agent.config, seed=9)
    twin.load_state_dict(copy.deepcopy(agent.state_dict()))
    results = [one.update(copy.deepcopy(buffer)) for one in (agent, twin)]
    assert results[0] is not None
    assert results[0] == results[1]
    assert torch.equal(agent.policy_params.flat, twin.policy_params.flat)
