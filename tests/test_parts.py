"""The parts that agents are made of: distributions, parameters, networks, projection."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as td

from klrl.kl import kl
from klrl.kl.trust_region import project
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.networks import MLP, Actor, Network
from klrl.policies.parameters import FlatParameters

CPU = torch.device("cpu")


def test_categoricals_agree_with_torch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 2, 3)
    mine, theirs = MultiCategorical(logits), td.Independent(td.Categorical(logits=logits), 1)
    action = theirs.sample()
    assert torch.allclose(mine.log_prob(action), theirs.log_prob(action))
    assert torch.allclose(mine.entropy(), theirs.entropy())
    assert mine.sample((5,)).shape == (5, 6, 2)
    frequency = torch.nn.functional.one_hot(mine.sample((20_000,)), 3).float().mean(0)
    assert torch.allclose(frequency, logits.softmax(-1), atol=0.02)


def test_forbidden_choices_have_no_entropy_and_no_gradient() -> None:
    logits = torch.tensor([[[0.0, 1.0, float("-inf")]]], requires_grad=True)
    dist = MultiCategorical(logits)
    (dist.entropy() + dist.log_prob(torch.tensor([[1]]))).sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert dist.entropy().item() == pytest.approx(float(td.Categorical(logits=torch.tensor([0.0, 1.0])).entropy()))


def test_diagonal_normal_agrees_with_torch() -> None:
    torch.manual_seed(0)
    mean, log_std = torch.randn(6, 3), torch.randn(6, 3)
    mine, theirs = DiagonalNormal(mean, log_std), td.Independent(td.Normal(mean, log_std.exp()), 1)
    action = theirs.sample()
    assert torch.allclose(mine.log_prob(action), theirs.log_prob(action), rtol=1e-5)
    assert torch.allclose(mine.entropy(), theirs.entropy(), rtol=1e-5)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("family", ["categoricals", "padded", "normal"])
def test_gradients_written_out_equal_autograd(family: str, direction: Any) -> None:
    torch.manual_seed(0)
    action: torch.Tensor
    if family == "normal":
        parameters = [torch.randn(6, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        new: Any = DiagonalNormal(*parameters)
        old: Any = DiagonalNormal(torch.randn(6, 3).double(), torch.randn(6, 3).double())
        action = torch.randn(6, 3, dtype=torch.float64)
    else:
        parameters = [torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)]
        mask = torch.tensor([[False, False, family == "padded"], [False] * 3])
        new = MultiCategorical(parameters[0].masked_fill(mask, float("-inf")))
        old = MultiCategorical(torch.randn(6, 2, 3).double().masked_fill(mask, float("-inf")))
        action = torch.randint(2, (6, 2))
    a, k, e = torch.randn(3, 6, dtype=torch.float64)
    divergence = kl(old, new) if direction == "forward" else kl(new, old)
    (a @ new.log_prob(action) + k @ divergence + e @ new.entropy()).backward()
    written_out = new.gradient(action, a, old, k, e, direction)
    assert all(torch.allclose(x, y.grad) for x, y in zip(written_out, parameters, strict=True))  # type: ignore[arg-type]


def test_adam_equals_torch_after_many_steps() -> None:
    torch.manual_seed(0)
    mine, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(mine.state_dict())
    flat, optimizer = FlatParameters(mine), torch.optim.Adam(theirs.parameters(), lr=0.01, eps=1e-5)
    for _ in range(50):
        x = torch.randn(8, 4)
        flat.zero_grad()
        (mine(x) ** 2).mean().backward()
        flat.clip_grad(0.1)
        flat.adam_step(0.01)
        optimizer.zero_grad()
        (theirs(x) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        optimizer.step()
    assert torch.allclose(mine.weight, theirs.weight, atol=1e-6)
    assert torch.allclose(mine.bias, theirs.bias, atol=1e-6)


def test_snapshots_restore_weights_and_optimizer_bit_for_bit() -> None:
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    flat = FlatParameters(first, second)
    flat.grad.normal_()
    flat.adam_step(0.1)
    before, saved = flat.state_dict(), flat.state_dict()
    flat.adam_step(0.1)
    moved = second.weight.clone()
    flat.restore(before, only=0)
    assert flat.steps == [1, 2]
    assert torch.equal(first.weight.flatten(), before["vector"][:4])
    assert torch.equal(second.weight, moved), "the other part stays"
    flat.restore(before)
    assert all(torch.equal(flat.state_dict()[key], saved[key]) for key in ("vector", "first_moment", "second_moment"))
    assert flat.steps == [1, 1]
    with pytest.raises(ValueError, match="weights"):
        FlatParameters(first).load_state_dict(saved)


def test_adam_on_one_module_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
    flat = FlatParameters(first, second)
    before = flat.vector.clone()
    reference = torch.nn.Parameter(before[flat.parts[1]].clone())
    adam = torch.optim.Adam([reference], lr=0.01, eps=1e-5)
    for _ in range(5):
        flat.grad.copy_(torch.randn_like(flat.grad))
        reference.grad = flat.grad[flat.parts[1]].clone()
        flat.adam_step(0.01, only=1)
        adam.step()
    assert torch.equal(flat.vector[flat.parts[0]], before[flat.parts[0]])
    assert torch.allclose(flat.vector[flat.parts[1]], reference.detach(), atol=1e-6)
    assert flat.steps == [0, 5]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_mlp_written_out_equals_autograd_and_numpy(activation: Any) -> None:
    torch.manual_seed(0)
    mlp = MLP([3, 5, 4, 2], activation, 1.0, torch.Generator().manual_seed(0)).double()
    flat = FlatParameters(mlp)
    x, direction = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    (mlp(x) * direction).sum().backward()
    by_autograd = flat.grad.clone()
    flat.zero_grad()
    with torch.no_grad():
        output, pushforward, pullback = mlp.linearize(x)
        pullback(direction)
        along = torch.randn_like(flat.vector)
        moved = pushforward(flat.like(along, 0))
    assert torch.allclose(output, mlp(x))
    assert torch.allclose(flat.grad, by_autograd)
    assert float(by_autograd.abs().sum()) > 0.0
    assert float((moved * direction).sum()) == pytest.approx(float(by_autograd @ along)), "<u, J v> = <J^T u, v>"
    assert np.allclose(mlp.on_host(x.numpy()), output.numpy())
    flat.vector += along
    assert np.allclose(mlp.on_host(x.numpy()), mlp(x).detach().numpy()), "it sees weights that moved"
    mlp.float()
    assert np.allclose(mlp.on_host(x.float().numpy()), mlp(x.float()).detach().numpy(), atol=1e-5), "or went elsewhere"


@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([2, 4, 3]), spaces.MultiBinary(2), spaces.Box(-2.0, 6.0, (2,))], ids=str
)
def test_the_actor_pulls_back_to_all_its_weights(space: spaces.Space[Any]) -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), CPU, normalize=False)
    actor = Actor(encoder, space, (8,), "tanh", -0.5, torch.Generator().manual_seed(0)).double()
    flat = FlatParameters(actor)
    inputs = {"vector": torch.randn(5, 3, dtype=torch.float64)}
    parameters = ("loc", "log_std") if actor.continuous else ("logits",)
    with torch.no_grad():
        dist, _, pullback = actor.linearize(inputs)
        finite = [torch.isfinite(getattr(dist, name)) for name in parameters]
        weights = [torch.randn_like(getattr(dist, name)) * keep for name, keep in zip(parameters, finite, strict=True)]
        pullback(*weights)
    by_pullback = flat.grad.clone()
    flat.zero_grad()
    new = actor(inputs)
    terms = zip(parameters, weights, finite, strict=True)
    sum((getattr(new, name)[keep] * weight[keep]).sum() for name, weight, keep in terms).backward()  # type: ignore[union-attr]
    assert torch.allclose(by_pullback, flat.grad)


def test_an_image_network_pulls_back_to_all_its_weights() -> None:
    space = spaces.Dict({"camera": spaces.Box(0, 255, (36, 36, 1), np.uint8), "speed": spaces.Box(-1, 1, (2,))})
    encoder = ObservationEncoder(space, CPU, normalize=False)
    network = Network(encoder, (8,), 2, "relu", 1.0, torch.Generator().manual_seed(0))
    flat = FlatParameters(network)
    inputs = encoder({key: np.stack([part.sample() for _ in range(4)]) for key, part in space.spaces.items()})
    output, _, pullback = network.linearize(inputs)
    pullback(torch.ones_like(output))
    by_pullback = flat.grad.clone()
    flat.zero_grad()
    network(inputs).sum().backward()
    assert torch.equal(by_pullback, flat.grad)
    assert all(float(p.grad.abs().sum()) > 0 for p in network.parameters() if p.grad is not None)


ACTION_SPACES: list[spaces.Space[Any]] = [
    spaces.Discrete(3),
    spaces.MultiDiscrete([2, 4, 3]),
    spaces.MultiDiscrete([3, 3]),
    spaces.MultiBinary(4),
    spaces.Box(-2.0, 6.0, (2,)),
    spaces.Box(-np.inf, np.inf, (3,)),
]


@pytest.mark.parametrize("space", ACTION_SPACES, ids=str)
def test_acting_in_numpy_samples_the_policy_that_is_learned(space: spaces.Space[Any]) -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), CPU, normalize=False)
    rng = torch.Generator().manual_seed(0)
    actor = Actor(encoder, space, (8,), "tanh", -0.5, rng)
    with torch.no_grad():
        actor.network.mlp.layers[-1].weight.mul_(100)  # type: ignore[union-attr, operator]
    obs = np.array([[0.5, -0.2, 0.1]], np.float32)
    dist = actor(encoder(obs))
    output = np.repeat(actor.network.mlp.on_host(obs), 40_000, axis=0)
    sample = torch.from_numpy(actor.act(output, np.random.default_rng(0)))
    if isinstance(dist, MultiCategorical):
        frequency = torch.nn.functional.one_hot(sample, dist.logits.shape[-1]).float().mean(0)
        assert torch.allclose(frequency, dist.log_probs.exp()[0], atol=0.02)
    else:
        assert torch.allclose(sample.mean(0), dist.loc[0], atol=0.05)
        assert torch.allclose(sample.std(0), dist.log_std.exp()[0], rtol=0.02)
    assert torch.allclose(torch.from_numpy(actor.act(output[:1], None)).float(), dist.mode.detach().float(), atol=1e-5)


def test_bounded_actions_start_in_the_middle_with_the_bounds_as_their_scale() -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), CPU, normalize=False)
    actor = Actor(encoder, spaces.Box(-2.0, 6.0, (1,)), (8,), "tanh", 0.0, torch.Generator().manual_seed(0))
    dist = actor({"vector": torch.zeros(1, 3)})
    assert isinstance(dist, DiagonalNormal)
    assert dist.loc.item() == pytest.approx(2.0, abs=0.1)
    assert dist.log_std.exp().item() == pytest.approx(4.0)


@pytest.mark.parametrize("bound", [3.4e38, 0.0])
def test_bounds_that_bound_nothing_or_everything_still_act_and_learn(bound: float) -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), CPU, normalize=False)
    space = spaces.Box(-bound, bound, (2,))
    actor = Actor(encoder, space, (8,), "tanh", 0.0, torch.Generator().manual_seed(0))
    action = torch.from_numpy(actor.act(np.zeros((4, 2), np.float32), np.random.default_rng(0)))
    assert bool(torch.isfinite(actor({"vector": torch.zeros(4, 3)}).log_prob(action)).all())


def test_projection_ends_inside_the_limit_or_at_the_start() -> None:
    old, weights = torch.zeros(2), torch.tensor([3.0, 4.0])
    kept = project(weights, old, lambda: float(weights @ weights), 1.0, 25.0)
    assert float(weights @ weights) <= 1.0
    assert kept == pytest.approx(0.2, rel=0.02)
    weights = torch.tensor([3.0, 4.0])
    assert project(weights, old, lambda: 5.0, 1.0, 5.0) == 0.0
    assert torch.equal(weights, old)
