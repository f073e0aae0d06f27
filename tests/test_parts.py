"""The parts that policies are made of: distributions, heads and networks."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as td
from torch.nn import functional

from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.heads import CategoricalHead, JointCategoricalHead, NormalHead, make_head
from klrl.policies.networks import MLP, Network, TwinCritic
from klrl.policies.parameters import FlatParameters, gradients
from klrl.policies.policy import Policy
from klrl.policies.squashed import SquashedHead
from klrl.policies.torso import linear

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


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_mlp_in_numpy_is_the_mlp_in_torch_wherever_its_weights_go(activation: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    mlp = MLP([3, 5, 4, 2], activation, 1.0, rng).double()
    flat = FlatParameters(mlp, "mlp")
    x = torch.randn(6, 3, dtype=torch.float64, generator=rng)
    reference = x
    for i, layer in enumerate(mlp.layers):
        reference = functional.linear(reference, layer.weight, layer.bias)  # type: ignore[arg-type]
        reference = reference if i == 2 else getattr(torch, activation)(reference)
    assert torch.allclose(mlp(x), reference)
    assert np.allclose(mlp.forward_numpy(x.numpy()), reference.detach().numpy())
    flat.flat += torch.randn(flat.flat.shape, generator=rng)
    assert not torch.allclose(mlp(x), reference)
    assert np.allclose(mlp.forward_numpy(x.numpy()), mlp(x).detach().numpy()), "it sees weights that moved"
    mlp.layers[1] = linear(5, 4, 1.0, rng).double()
    assert np.allclose(mlp.forward_numpy(x.numpy()), mlp(x).detach().numpy()), "or were replaced"
    mlp.float()
    assert np.allclose(mlp.forward_numpy(x.float().numpy()), mlp(x.float()).detach().numpy(), atol=1e-5), "or moved"
    kept = x.numpy().copy()
    mlp.double().forward_numpy(x.numpy())
    assert np.array_equal(x.numpy(), kept), "and leaves its input alone"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda mlp: pickle.loads(pickle.dumps(mlp))])
def test_a_copied_mlp_takes_no_views_of_the_originals_weights_along(duplicate: Any) -> None:
    mlp, x = MLP([3, 5, 2], "tanh", 1.0, torch.Generator().manual_seed(0)), np.ones((2, 3), np.float32)
    before = len(pickle.dumps(mlp))
    expected = mlp.forward_numpy(x)
    assert len(pickle.dumps(mlp)) == before
    twin = duplicate(mlp)
    assert twin._numpy == ([], [])
    assert np.array_equal(twin.forward_numpy(x), expected)
    twin.layers[0].weight.data.zero_()
    assert not np.allclose(twin.forward_numpy(x), expected)
    assert np.array_equal(mlp.forward_numpy(x), expected)


def test_all_weights_of_an_image_network_have_a_gradient() -> None:
    space = spaces.Dict({"camera": spaces.Box(0, 255, (36, 36, 1), np.uint8), "speed": spaces.Box(-1, 1, (2,))})
    encoder = ObservationEncoder(space, CPU, normalize=False)
    network = Network(encoder, (8,), 2, "relu", 1.0, torch.Generator().manual_seed(0))
    flat = FlatParameters(network, "network")
    inputs = encoder({key: np.stack([part.sample() for _ in range(4)]) for key, part in space.spaces.items()})
    found = flat.unflatten(gradients(network(inputs).sum(), flat))
    network(inputs).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(found[name], parameter.grad)
        assert float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("outputs", [1, 4])
def test_the_twin_critic_is_two_networks(images: bool, outputs: int) -> None:
    number = spaces.Box(-1, 1, (3,))
    camera = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    space: Any = spaces.Dict({"camera": camera, "number": number}) if images else number
    encoder = ObservationEncoder(space, CPU, normalize=False)
    critic = TwinCritic(encoder, 2, outputs, (8, 5), torch.Generator().manual_seed(0))
    obs = {key: np.stack([part.sample() for _ in range(6)]) for key, part in space.spaces.items()} if images else None
    inputs = encoder(obs if obs is not None else np.stack([number.sample() for _ in range(6)]))
    torch.manual_seed(0)
    action, direction = torch.randn(6, 2, requires_grad=True), torch.randn(2, 6, outputs)
    x = critic.torso(inputs, action)
    values = []
    for one in (0, 1):
        value = x
        for weight, bias in zip(critic.weights[:-1], critic.biases[:-1], strict=True):
            value = (value @ weight[one] + bias[one]).relu()
        values.append(value @ critic.weights[-1][one] + critic.biases[-1][one])
    expected = torch.stack(values)
    assert torch.allclose(critic(inputs, action), expected, atol=1e-5)
    assert not torch.equal(expected[0], expected[1])
    wanted = [action, *critic.parameters()]
    theirs = torch.autograd.grad((expected * direction).sum(), wanted)
    mine = torch.autograd.grad((critic(inputs, action) * direction).sum(), wanted)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
        assert float(b.abs().sum()) > 0


HEADS: list[Any] = [
    (CategoricalHead, spaces.Discrete(3)),
    (CategoricalHead, spaces.MultiDiscrete([2, 4, 3])),
    (CategoricalHead, spaces.MultiDiscrete([3, 3])),
    (CategoricalHead, spaces.MultiBinary(4)),
    (JointCategoricalHead, spaces.MultiDiscrete([2, 3])),
    (NormalHead, spaces.Box(-2.0, 6.0, (2,))),
    (NormalHead, spaces.Box(-np.inf, np.inf, (3,))),
    (SquashedHead, spaces.Box(-2.0, 6.0, (2,))),
]


@pytest.mark.parametrize(("kind", "space"), HEADS, ids=str)
def test_acting_in_numpy_samples_the_policy_that_is_learned(kind: Any, space: spaces.Space[Any]) -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), CPU, normalize=False)
    head = kind(space)
    policy = Policy(encoder, Network(encoder, (8,), head.size, "tanh", 1.0, torch.Generator().manual_seed(0)), head)
    if isinstance(head, NormalHead):
        torch.nn.init.constant_(head.log_std, -0.5)
    obs = np.repeat(np.array([[0.5, -0.2, 0.1]], np.float32), 40_000, axis=0)
    dist = policy(encoder(obs[:1]))
    sample = torch.from_numpy(policy.act(obs, np.random.default_rng(0)))
    assert sample.shape == (40_000, *dist.event_shape)
    if isinstance(dist, MultiCategorical):
        frequency = torch.nn.functional.one_hot(sample, dist.logits.shape[-1]).float().mean(0)
        assert torch.allclose(frequency, dist.log_probs.exp()[0], atol=0.02)
        assert frequency.amax() < 0.95, "it does sample"
    else:
        u = torch.atanh(sample) if kind is SquashedHead else sample
        assert torch.allclose(u.mean(0), dist.loc[0], atol=0.05)
        assert torch.allclose(u.std(0), dist.log_std.exp()[0], rtol=0.02)
    assert torch.allclose(torch.from_numpy(policy.act(obs[:1], None)).float(), dist.mode.detach().float(), atol=1e-5)


@pytest.mark.parametrize(("kind", "space"), HEADS, ids=str)
def test_actions_reach_the_environment_as_its_space_has_them(kind: Any, space: spaces.Space[Any]) -> None:
    head = kind(space)
    output = np.random.default_rng(0).normal(size=(200, head.size)).astype(np.float32) * 3
    taken = head.to_env(head.sample(output, np.random.default_rng(0)))
    assert taken.shape == (200, *(space.shape or ()))
    assert all(space.contains(np.asarray(action, space.dtype)[()]) for action in taken)
    if not isinstance(space, spaces.Box):
        assert len(np.unique(taken, axis=0)) == math.prod(
            [int(space.n)] if isinstance(space, spaces.Discrete) else getattr(space, "nvec", [2] * 4)
        ), "every action is taken"


def test_a_joint_action_counts_the_last_part_fastest() -> None:
    head = JointCategoricalHead(spaces.MultiDiscrete([2, 3], start=[10, 20]))
    assert head.size == 6
    assert head.to_env(np.arange(6)[:, None]).tolist() == [[10 + i, 20 + j] for i in range(2) for j in range(3)]


def test_shapes_and_starts_of_a_space_are_kept() -> None:
    box = spaces.Box(np.float32([[-1.0, 0.0]]), np.float32([[1.0, 0.5]]))
    assert NormalHead(box).to_env(np.float32([[5.0, 0.2]])).tolist() == [[[1.0, pytest.approx(0.2)]]]
    assert SquashedHead(box).to_env(np.float32([[0.5, 0.0]])).tolist() == [[[0.5, 0.25]]]
    assert CategoricalHead(spaces.Discrete(2, start=5)).to_env(np.array([[1], [0]])).tolist() == [6, 5]
    assert CategoricalHead(spaces.MultiBinary([2, 2])).to_env(np.array([[1, 0, 0, 1]])).tolist() == [[[1, 0], [0, 1]]]


def test_bounded_actions_start_in_the_middle_with_the_bounds_as_their_scale() -> None:
    encoder = ObservationEncoder(spaces.Box(-1, 1, (3,)), CPU, normalize=False)
    head = make_head(spaces.Box(-2.0, 6.0, (1,)))
    dist = Policy(encoder, Network(encoder, (8,), 1, "tanh", 0.01, torch.Generator().manual_seed(0)), head)(
        {"vector": torch.zeros(1, 3)}
    )
    assert isinstance(dist, DiagonalNormal)
    assert dist.loc.item() == pytest.approx(2.0, abs=0.1)
    assert dist.log_std.exp().item() == pytest.approx(4.0)
    assert head.metrics() == {"train/std": pytest.approx(1.0)}
    assert head(torch.ones(1, 1)).loc.item() == pytest.approx(6.0), "the output 1 is the upper bound"


@pytest.mark.parametrize("bound", [3.4e38, 0.0])
def test_bounds_that_bound_nothing_or_everything_still_act_and_learn(bound: float) -> None:
    head = NormalHead(spaces.Box(-bound, bound, (2,)))
    action = torch.from_numpy(head.sample(np.zeros((4, 2), np.float32), np.random.default_rng(0)))
    assert bool(torch.isfinite(head(torch.zeros(4, 2)).log_prob(action)).all())
