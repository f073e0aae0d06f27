"""Transforms with parameters of their own: frozen by value, compared by value, or refused by name."""

import functools
import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

from klrl.kl import KLLimit, NoClosedFormError, at_most, concatenate, freeze, joint, kl, measure, select, track

STATES = 64


def policy(*transforms: td.Transform) -> td.Distribution:
    base = td.Normal(torch.zeros(STATES, 1), torch.ones(STATES, 1))
    return joint(td.TransformedDistribution(base, list(transforms)))


class Flow(nn.Module):
    """y = scale * x by a network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.unused = nn.Sequential(nn.Linear(1, 2), nn.Tanh())
        self.nonlinearity = torch.tanh

    def scale(self) -> Tensor:
        return self.log_scale.exp()


class Flowing(td.Transform):
    domain = codomain = td.constraints.real
    bijective = True

    def __init__(self, network: Flow) -> None:
        super().__init__(cache_size=1)
        self.network = network

    def _call(self, x: Tensor) -> Tensor:
        return x * self.network.scale()

    def _inverse(self, y: Tensor) -> Tensor:
        return y / self.network.scale()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.network.log_scale.expand_as(x)


class ModuleTransform(Flowing, nn.Module):
    """The same, itself a module, as in Pyro."""

    __hash__ = nn.Module.__hash__  # torch's Transform has none

    def __init__(self, network: Flow) -> None:
        nn.Module.__init__(self)
        super().__init__(network)


def affine() -> tuple[td.Transform, Tensor]:
    scale = torch.ones(())
    return td.AffineTransform(0.0, scale), scale


def composed() -> tuple[td.Transform, Tensor]:
    inner, scale = affine()
    return td.ComposeTransform([td.AffineTransform(1.0, 3.0), inner]), scale


def independent() -> tuple[td.Transform, Tensor]:
    inner, scale = affine()
    return td.IndependentTransform(inner, 1), scale


def inverse() -> tuple[td.Transform, Tensor]:
    inner, scale = affine()
    return inner.inv, scale


def cached() -> tuple[td.Transform, Tensor]:
    scale = torch.ones(())
    return td.AffineTransform(0.0, scale, cache_size=1).inv.inv, scale


@pytest.mark.parametrize("make", [affine, composed, independent, inverse, cached])
def test_a_scale_doubled_in_place_is_a_move(make: Any) -> None:
    transform, scale = make()
    for _ in range(2):
        with track(lambda: policy(transform), at_most(0.01)) as update:
            scale *= 2
        # Of N(0, 1) and N(0, 2), or of N(1, 3) and N(1, 6); the inverse halves.
        exact = math.log(2) - 0.375 if make is not inverse else 1.5 - math.log(2)
        assert update.report.estimated
        assert update.report.mean == pytest.approx(exact, rel=0.1 if make is not composed else 0.3)
    with track(lambda: policy(transform), at_most(0.01)) as update:
        pass
    assert (update.report.estimated, update.report.max) == (False, 0.0)


@pytest.mark.parametrize("cls", [Flowing, ModuleTransform])
def test_a_flow_that_learns_is_measured(cls: Any) -> None:
    flow = Flow()
    transform = cls(flow)
    with track(lambda: policy(transform), at_most(0.01)) as update:
        policy(transform).rsample()  # which the transform remembers, with its graph
    assert update.report.max == 0.0
    with track(lambda: policy(transform), at_most(0.01)) as update, torch.no_grad():
        flow.log_scale += math.log(2)
    assert update.report.estimated
    assert update.report.mean == pytest.approx(math.log(2) - 0.375, rel=0.1)
    frozen = freeze(policy(transform))
    sample = frozen.sample()
    expected = frozen.log_prob(sample)
    with torch.no_grad():
        flow.log_scale += 1.0
    assert torch.equal(frozen.log_prob(sample), expected)
    assert not torch.equal(policy(transform).log_prob(sample), expected)


def test_the_kl_of_a_flow_that_learns_has_no_gradient_and_says_so() -> None:
    transform = Flowing(Flow())
    old = freeze(policy(transform))
    with pytest.raises(NoClosedFormError, match=r"parameters learn: under torch.no_grad\(\) it is measured"):
        kl(old, policy(transform))
    with torch.no_grad():
        assert float(kl(old, policy(transform)).max()) == 0.0


def test_a_rule_can_take_a_transform_back() -> None:
    scale = torch.ones(())
    limit = KLLimit(at_most(0.05), penalty="none", on_overshoot="project")
    with limit.update(lambda: policy(td.AffineTransform(0.0, scale)), scale) as move:
        scale *= 2
    assert 1.0 < float(scale) < 1.9
    assert move.report.mean <= 0.05
    assert move.report.attempted > 0.2


def test_transforms_made_anew_with_equal_values_are_the_same() -> None:
    exact = kl(policy(td.AffineTransform(0.0, 2.0)), policy(td.AffineTransform(0.0, torch.tensor(2.0))))
    assert exact.tolist() == [0.0] * STATES
    assert kl(policy(td.TanhTransform()), policy(td.TanhTransform(cache_size=1))).tolist() == [0.0] * STATES
    for other in (td.AffineTransform(0.0, 3.0), td.TanhTransform(), td.AffineTransform(0.0, 2 * torch.ones(1, 1))):
        with pytest.raises(NoClosedFormError, match="different transforms"):
            kl(policy(td.AffineTransform(0.0, 2.0)), policy(other))


class Scaled(td.TanhTransform):
    """Inherits an == that looks at the type alone."""

    codomain = td.constraints.real

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def _call(self, x: Tensor) -> Tensor:
        return self.scale * x

    def _inverse(self, y: Tensor) -> Tensor:
        return y / self.scale

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.full_like(x, math.log(self.scale))


def test_an_inherited_equality_is_not_trusted() -> None:
    with pytest.raises(NoClosedFormError, match="different transforms"):
        kl(policy(Scaled(1.0)), policy(Scaled(2.0)))
    assert measure(policy(Scaled(1.0)), policy(Scaled(2.0))).mean == pytest.approx(math.log(2) - 0.375, rel=0.1)


NETWORK = Flow()


class Slotted(Scaled):
    __slots__ = ("hidden",)


class OfItsClass(Scaled):
    weight = torch.ones(())


def holding(value: Any) -> td.Transform:
    transform = Scaled(1.0)
    transform.held = value  # type: ignore[attr-defined]
    return transform


@pytest.mark.parametrize(
    ("transform", "named"),
    [
        (Slotted(1.0), "Slotted has state .* __slots__"),
        (OfItsClass(1.0), "OfItsClass has state .*weight belongs to its class"),
        (holding(NETWORK.scale), "Flow.scale has state"),
        (holding(torch.Generator()), "Generator has state"),
    ],
)
def test_a_transform_whose_state_cannot_be_read_is_refused_by_name(transform: td.Transform, named: str) -> None:
    with pytest.raises(ValueError, match=named), track(lambda: policy(transform)):
        pass
    with torch.no_grad():
        assert kl(policy(transform), policy(transform)).tolist() == [0.0] * STATES, "one object is equal to itself"


OUTSIDE = {"scale": torch.ones(()), "net": NETWORK}


def scaled_by_the_outside(x: Tensor) -> Tensor:
    return x * OUTSIDE["scale"]


class ReadsElsewhere(td.transforms.Transform):
    """A transform that computes with what lies outside of it, in the way that ``how`` says."""

    domain = codomain = td.constraints.real
    bijective = True

    def __init__(self, how: str) -> None:
        super().__init__()
        scale = OUTSIDE["scale"]
        self.net = how  # a global of this module may be called so, too
        self.function = {
            "helper": scaled_by_the_outside,
            "closure": lambda x: x * scale,
            "default": lambda x, by=scale: x * by,
            "partial": functools.partial(torch.mul, scale),
        }.get(how)

    def _call(self, x: Tensor) -> Tensor:
        return x * OUTSIDE["scale"] if self.function is None else self.function(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return y / OUTSIDE["scale"]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.log(OUTSIDE["scale"]).expand_as(x)


net = NETWORK


@pytest.mark.parametrize("how", ["global", "helper", "closure", "default"])
def test_what_a_transform_reads_elsewhere_is_seen_to_change(how: str) -> None:
    OUTSIDE["scale"].fill_(1.0)
    transform = ReadsElsewhere(how)
    with track(lambda: policy(transform)) as update:
        pass
    assert update.report.mean == 0.0
    assert not update.report.estimated
    with pytest.raises(ValueError, match="reads what lies outside of it and has changed"):  # noqa: SIM117
        with track(lambda: policy(transform)):
            OUTSIDE["scale"].fill_(2.0)
    frozen, live = freeze(policy(transform)), policy(transform)
    OUTSIDE["scale"].fill_(1.0)
    for pair in ((frozen, live), (live, frozen)):
        with pytest.raises(ValueError, match="reads what lies outside of it and has changed"):
            kl(*pair)


def test_what_a_composition_remembers_is_no_part_of_it() -> None:
    first, second = (
        policy(td.transforms.ComposeTransform([Scaled(2.0), td.transforms.TanhTransform()])) for _ in range(2)
    )
    assert first.base_dist.transforms[0].bijective  # is remembered, once it was asked for
    for pair in ((first, second), (second, first)):
        assert float(kl(*pair).max()) == 0.0


@pytest.mark.parametrize(
    "held",
    [
        torch.tanh,
        functools.lru_cache,
        None,
        {"a": [1, (2.0, torch.ones(1))]},
        {1, 2},
        torch.Size(),
        np.float32(1.0),
        lambda x: x,
        lambda x, sizes=(1, [2]): x,
        inspect.FullArgSpec([], None, None, None, [], None, {}),
    ],
)
def test_ordinary_attributes_are_read(held: Any) -> None:
    assert kl(freeze(policy(holding(held))), policy(holding(held))).tolist() == [0.0] * STATES


def test_an_index_leaves_the_transforms_parameters() -> None:
    transform, _ = affine()
    parts = [select(policy(transform), rows) for rows in (slice(0, 10), slice(10, STATES))]
    whole = concatenate(parts)
    assert whole.batch_shape == (STATES,)
    assert float(kl(policy(transform), whole).max()) == 0.0
