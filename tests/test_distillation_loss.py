"""``distillation_loss``: known values, its gradient at high temperatures, and families that have no temperature."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical

from klrl.kl import distillation_loss, joint, kl
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.policies.squashed import SquashedNormal

# At T = 2 the teacher's odds of 9 to 1 become 3 to 1, and the student's stay even: 4 KL((1/4, 3/4) || (1/2, 1/2)).
TEACHER, STUDENT = torch.tensor([[0.0, 2 * math.log(3)]]), torch.zeros(1, 2)
KNOWN = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))


@pytest.mark.parametrize(
    "pair",
    [
        (Categorical(logits=TEACHER), Categorical(logits=STUDENT)),
        (Categorical(probs=torch.tensor([[0.1, 0.9]])), Categorical(probs=torch.tensor([[0.5, 0.5]]))),
        (Bernoulli(logits=TEACHER[:, 1]), Bernoulli(logits=STUDENT[:, 1])),
        (Bernoulli(probs=torch.tensor([0.9])), Bernoulli(probs=torch.tensor([0.5]))),
        (MultiCategorical(TEACHER[:, None]), MultiCategorical(STUDENT[:, None])),
        (OneHotCategorical(logits=TEACHER), OneHotCategorical(logits=STUDENT)),
    ],
)
def test_the_loss_is_t_squared_times_the_softened_kl(pair: tuple[torch.distributions.Distribution, ...]) -> None:
    loss = distillation_loss(pair[0], pair[1], temperature=2.0)
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(KNOWN, rel=1e-6)
    assert torch.allclose(distillation_loss(pair[0], pair[1]), kl(pair[0], pair[1]), rtol=1e-6)


def test_action_dimensions_are_summed_whatever_they_are_wrapped_in() -> None:
    wide = [logits[None].expand(1, 3, 2) for logits in (TEACHER, STUDENT)]
    pairs = [
        [joint(Categorical(logits=x)) for x in wide],
        [Independent(Bernoulli(logits=x[..., 1]), 1) for x in wide],
        [joint([Categorical(logits=x[:, 0])] * 3) for x in wide],
        [MultiCategorical(x) for x in wide],
        [joint(OneHotCategorical(logits=x)) for x in wide],
    ]
    for teacher, student in pairs:
        assert distillation_loss(teacher, student, 2.0).tolist() == pytest.approx([3 * KNOWN], rel=1e-6)


def test_at_a_high_temperature_logits_of_mean_0_are_matched_by_their_squared_distance() -> None:
    teacher, student = torch.randn(2, 5, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher, student = (x - x.mean(-1, keepdim=True) for x in (teacher, student))
    student.requires_grad_()
    distillation_loss(MultiCategorical(teacher), MultiCategorical(student), 1e4).sum().backward()
    assert student.grad is not None  # Hinton et al. (2015), equation 4, times T^2
    assert torch.allclose(student.grad, (student - teacher).detach() / 4, rtol=1e-3, atol=1e-3)


def test_what_both_forbid_has_no_part_and_no_gradient() -> None:
    mask = torch.tensor([[[0.0, 0.0, -math.inf]]])
    teacher, logits = MultiCategorical(torch.nn.functional.pad(TEACHER, (0, 1))[None] + mask), torch.zeros(1, 1, 3)
    student = MultiCategorical(logits.requires_grad_() + mask)
    loss = distillation_loss(teacher, student, 2.0)
    assert loss.tolist() == pytest.approx([KNOWN], rel=1e-6)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([2 * (0.5 - 0.25), 2 * (0.5 - 0.75), 0.0], rel=1e-6)
    assert distillation_loss(MultiCategorical(torch.zeros(1, 1, 3)), student, 2.0).item() == math.inf


@pytest.mark.parametrize("family", [DiagonalNormal, SquashedNormal, lambda m, s: joint(Normal(m, s.exp()))])
def test_normals_have_no_temperature(family: type[DiagonalNormal]) -> None:
    old, new = (family(torch.full((2, 3), m), torch.full((2, 3), s)) for m, s in ((0.0, 0.0), (1.0, 0.5)))
    exact = 3 * (0.5 + (1 + 1) / (2 * math.e) - 0.5)
    assert distillation_loss(old, new, 5.0).tolist() == pytest.approx([exact, exact], rel=1e-5)


def test_temperatures_shapes_and_nan_are_refused() -> None:
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be finite and above 0"):
            distillation_loss(Categorical(logits=TEACHER), Categorical(logits=STUDENT), bad)
    with pytest.raises(ValueError, match="one shape"):
        distillation_loss(Categorical(logits=TEACHER), Categorical(logits=torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="new is a MultiCategorical with parameters that are nan"):
        distillation_loss(MultiCategorical(TEACHER[:, None]), MultiCategorical(STUDENT[:, None] * math.nan))
    with pytest.raises(ValueError, match="no closed-form KL"):
        distillation_loss(DiagonalNormal(TEACHER, TEACHER), SquashedNormal(STUDENT, STUDENT))
