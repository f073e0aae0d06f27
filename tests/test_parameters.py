"""Flat parameters: Adam as torch has it, derivatives as vectors, and what others do to the module meanwhile."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from klrl.errors import UsageError
from klrl.policies.jacobian import jacobian
from klrl.policies.parameters import FlatParameters, adam_step, clip_, gradients

RATE = torch.tensor(0.01)


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def flattened(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def step(flat: FlatParameters, seed: int = 0) -> None:
    """One step on a loss, as an agent makes it."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    gradient = gradients((flat.module(x) ** 2).mean(), flat)
    with torch.no_grad():
        adam_step(gradient, RATE, flat)


@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_adam_and_clipping_equal_torch_after_many_steps(eps: float) -> None:
    mine, theirs = network(), network()
    flat, optimizer = FlatParameters(mine, "mine", eps), torch.optim.Adam(theirs.parameters(), lr=0.01, eps=eps)
    before, clipped = flattened(theirs), 0
    for i in range(20):
        x = torch.randn(8, 4)
        gradient = gradients((mine(x) ** 2).mean(), flat)
        norm = clip_(gradient, 0.2)
        with torch.no_grad():
            adam_step(gradient, RATE, flat)
        optimizer.zero_grad()
        (theirs(x) ** 2).mean().backward()
        assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)), rel=1e-4)
        clipped += float(norm) > 0.2
        optimizer.step()
        assert int(flat.count) == i + 1
    assert 0 < clipped < 20, "both kinds of step were seen"
    assert torch.allclose(flattened(mine), flattened(theirs), atol=1e-6)
    assert torch.equal(flattened(mine), flat.flat), "the module's weights are the vector's"
    assert not torch.allclose(flat.flat, before, atol=1e-2)


def test_snapshots_restore_weights_and_optimizer_bit_for_bit() -> None:
    flat = FlatParameters(network(), "mine")
    step(flat)
    before, saved = flat.state_dict(), flat.state_dict()
    step(flat)
    assert not torch.equal(flat.flat, before["flat"])
    flat.load_state_dict(before)
    assert all(torch.equal(part, saved[name]) for name, part in flat.state_dict().items())
    assert int(flat.count) == 1
    assert torch.equal(flattened(flat.module), saved["flat"])
    step(flat)
    assert not torch.equal(before["flat"], flat.flat), "a snapshot is a copy"
    with pytest.raises(ValueError, match="weights"):
        FlatParameters(nn.Linear(2, 2), "other").load_state_dict(saved)


def test_gradients_of_several_groups_are_one_vector() -> None:
    first, second = FlatParameters(network(0), "first"), FlatParameters(network(1), "second")
    x = torch.randn(8, 4)

    def loss() -> Tensor:
        return first.module(x).square().mean() + 3 * second.module(x).mean()

    for module in (first.module, second.module):
        module.zero_grad()
    loss().backward()
    expected = [torch.cat([p.grad.flatten() for p in g.module.parameters()]) for g in (first, second)]  # type: ignore[union-attr]
    assert torch.equal(gradients(loss(), first, second), torch.cat(expected))
    assert torch.equal(gradients(loss(), second), expected[1])
    alone = gradients(first.module(x).sum(), first, second)
    assert float(alone[: first.flat.numel()].abs().sum()) > 0
    assert not bool(alone[first.flat.numel() :].any()), "no part in it, no gradient"


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch.func imports what still uses it
def test_the_jacobian_pushes_and_pulls_as_torch_does() -> None:
    flat = FlatParameters(network().double(), "mine")
    x = torch.randn(6, 4, dtype=torch.float64)

    def outputs(weights: Any) -> tuple[Tensor, Tensor]:
        out = torch.func.functional_call(flat.module, weights, (x,))
        return out[:, :2].square(), out[:, 2].exp()

    weights = {name: p.detach() for name, p in flat.module.named_parameters()}
    with torch.no_grad():  # as agents call it
        push, pull = jacobian(_with_graph(outputs, flat), flat)
    direction = torch.randn_like(flat.flat)
    _, expected = torch.func.jvp(outputs, (weights,), (dict(flat.unflatten(direction)),))
    for _ in range(2):  # it can be asked again
        for mine, theirs in zip(push(direction), expected, strict=True):
            assert torch.allclose(mine, theirs)
    cotangent = (torch.randn(6, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    _, pulled = torch.func.vjp(outputs, weights)
    by_torch = torch.cat([part.flatten() for part in pulled(cotangent)[0].values()])
    for _ in range(2):
        assert torch.allclose(pull(cotangent), by_torch)
    assert float(by_torch.abs().sum()) > 0
    products = [(a * b).sum() for a, b in zip(cotangent, push(direction), strict=True)]
    assert float(torch.stack(products).sum()) == pytest.approx(float(by_torch @ direction)), "<u, J v> = <J^T u, v>"


def _with_graph(outputs: Callable[..., Any], flat: FlatParameters) -> Any:
    with torch.enable_grad():
        return outputs(dict(flat.module.named_parameters()))


def test_frozen_weights_have_no_part_in_the_jacobian() -> None:
    flat = FlatParameters(network(), "mine")
    flat.module[0].weight.requires_grad_(False)
    flat.sync()
    push, pull = jacobian([flat.module(torch.randn(6, 4))], flat)
    pulled = flat.unflatten(pull([torch.ones(6, 3)]))
    assert not bool(pulled["0.weight"].any())
    assert bool(pulled["0.bias"].any())
    direction = torch.zeros_like(flat.flat)
    direction[:20] = 1.0  # the frozen weights, which come first
    assert not bool(push(direction)[0].any())


# What one may do to a module between two updates; it is to go on from where that left it, as ``reference`` does.


def no_gradients(module: Any) -> None:
    (module(torch.ones(2, 4)) ** 2).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).zero_grad()


def steps_of_torch(module: Any) -> None:
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (module(torch.ones(2, 4)) ** 2).sum().backward()
        optimizer.step()


def other_weights(module: Any) -> None:
    module.load_state_dict(network(7).state_dict())


def there_and_back(module: Any) -> None:
    module.double().float()


def another_layer(module: Any) -> None:
    torch.manual_seed(3)
    module[2] = nn.Linear(5, 3)


def new_parameter(module: Any) -> None:
    module[0].weight = nn.Parameter(torch.full((5, 4), 0.2))


@pytest.mark.parametrize(
    "change", [no_gradients, steps_of_torch, other_weights, there_and_back, another_layer, new_parameter]
)
def test_what_others_did_to_the_module_is_gone_on_from(change: Callable[[Any], None]) -> None:
    flat = FlatParameters(network(), "mine")
    step(flat)
    reference, moments = copy.deepcopy(flat.module), flat.first_moment.clone()
    change(flat.module)
    change(reference)
    flat.sync()
    assert torch.equal(flat.flat, flattened(reference))
    assert torch.equal(flat.first_moment, moments), "Adam goes on"
    loss = (flat.module(torch.ones(2, 4)) ** 2).sum()
    expected = torch.autograd.grad(loss, list(flat.module.parameters()), retain_graph=True)
    assert torch.equal(gradients(loss, flat), torch.cat([part.flatten() for part in expected]))
    for i in range(3):
        step(flat, i + 1)
    assert torch.equal(flattened(flat.module), flat.flat), "and the module follows"
    for mine, before in zip(flat.module.parameters(), reference.parameters(), strict=True):
        assert not torch.equal(mine, before), "all of them learn"
    assert int(flat.count) == 4


def by_pickle(flat: FlatParameters) -> Any:
    return pickle.loads(pickle.dumps(flat))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_a_copy_learns_as_the_original_does_and_apart_from_it(duplicate: Callable[[Any], Any]) -> None:
    flat = FlatParameters(network(), "mine")
    step(flat)
    twin = duplicate(flat)
    assert torch.equal(flattened(twin.module), twin.flat)
    twin.flat.add_(1.0)
    assert torch.equal(flattened(twin.module), twin.flat), "its weights are views of its own vector at once"
    twin.flat.copy_(flat.flat)
    before = flat.flat.clone()
    step(twin, 1)
    assert torch.equal(flat.flat, before)
    step(flat, 1)
    assert torch.equal(flat.flat, twin.flat)
    assert torch.equal(flattened(twin.module), twin.flat)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_a_module_replaced_by_its_copy_trains_on(duplicate: Callable[[Any], Any]) -> None:
    flat = FlatParameters(network(), "mine")
    step(flat)
    flat.module = duplicate(flat.module)
    flat.sync()
    step(flat, 1)
    assert torch.equal(flattened(flat.module), flat.flat)


def test_frozen_weights_stay_where_they_are_even_with_momentum() -> None:
    flat, free = FlatParameters(network(), "mine"), FlatParameters(network(), "mine")
    for i in range(3):
        step(flat, i)
        step(free, i)
    assert float(flat.first_moment[:20].abs().min()) > 0
    flat.module[0].weight.requires_grad_(False)
    flat.sync()
    weight, bias = flat.module[0].weight.clone(), flat.module[0].bias.clone()
    for i in range(5):
        step(flat, i)
        with torch.no_grad():  # nor does a gradient that was made otherwise move them
            adam_step(torch.ones_like(flat.flat), RATE, flat)
    assert torch.equal(flat.module[0].weight, weight)
    assert not torch.equal(flat.module[0].bias, bias)
    flat.module[0].weight.requires_grad_(True)
    flat.sync()
    assert flat.frozen is None
    step(flat)
    assert not torch.equal(flat.module[0].weight, weight), "and move again once they may"


def test_all_weights_frozen_is_a_gradient_of_zero() -> None:
    flat = FlatParameters(network(), "mine")
    flat.module.requires_grad_(False)
    flat.sync()
    assert not bool(gradients(flat.module(torch.ones(2, 4)).sum(), flat).any())


def wider(module: Any) -> None:
    module[2] = nn.Linear(5, 4)


def to_double(module: Any) -> None:
    module.double()


def deeper(module: Any) -> None:
    module.append(nn.Linear(3, 3))


def to_meta(module: Any) -> None:
    module[2].weight = nn.Parameter(torch.empty(3, 5, device="meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wider, r"policy\.2\.weight has shape .*\[4, 5\].* was made with .*\[3, 5\]"),
        (to_double, r"policy\.0\.weight has dtype torch\.float64, and was made with torch\.float32"),
        (to_meta, r"policy\.2\.weight has device meta, and was made with cpu"),
        (deeper, r"policy\.3\.bias was added or removed"),
    ],
)
def test_a_network_that_is_another_is_refused_by_the_parameters_name(
    change: Callable[[Any], None], message: str
) -> None:
    flat = FlatParameters(network(), "policy")
    change(flat.module)
    with pytest.raises(UsageError, match=message):
        flat.sync()


def test_weights_that_were_transposed_in_place_are_taken_in_as_they_are() -> None:
    module = torch.nn.Linear(3, 3)
    flat = FlatParameters(module, "policy")
    wanted = module.weight.detach().t().clone()
    module.weight.data = module.weight.data.t()
    flat.sync()
    assert torch.equal(module.weight, wanted)
    assert torch.equal(flat.flat[:9].view(3, 3), wanted)
    module.bias.data = flat.flat[:3].view(1, 3)
    with pytest.raises(UsageError, match=r"policy.bias has shape"):
        flat.sync()
