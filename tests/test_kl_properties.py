"""What must hold of KL for every pair of policies: hypothesis looks for the pair that breaks it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as td

from klrl.kl import categorical_kl, joint, kl, normal_kl

FLOATS = st.floats(-60, 60, width=32)
EVERY = settings(max_examples=200, deadline=None)


def logits(size: int = 4) -> st.SearchStrategy[Tensor]:
    return st.lists(FLOATS, min_size=size, max_size=size).map(lambda x: torch.tensor(x, dtype=torch.float32))


@EVERY
@given(logits(), logits())
def test_kl_is_never_negative_and_zero_at_identity(p: Tensor, q: Tensor) -> None:
    assert float(categorical_kl(p, q)) >= 0.0
    assert float(categorical_kl(p, p.clone())) == 0.0


@EVERY
@given(FLOATS, st.floats(-20, 20, width=32), FLOATS, st.floats(-20, 20, width=32))
def test_kl_of_normals_is_never_negative_and_zero_at_identity(a: float, s: float, b: float, t: float) -> None:
    old, new = ((torch.tensor(m), torch.tensor(x)) for m, x in ((a, s), (b, t)))
    assert float(normal_kl(*old, *new)) >= 0.0
    assert float(normal_kl(*old, *old)) == 0.0


@EVERY
@given(logits(), logits(), st.permutations(range(4)))
def test_the_order_of_the_actions_does_not_matter(p: Tensor, q: Tensor, order: list[int]) -> None:
    assert torch.allclose(categorical_kl(p, q), categorical_kl(p[order], q[order]), rtol=1e-5, atol=1e-12)


@EVERY
@given(logits(), logits(), st.floats(-100, 100, width=32))
def test_a_common_shift_of_the_logits_does_not_matter(p: Tensor, q: Tensor, shift: float) -> None:
    exact = (q.double() + shift).float().double() - shift  # what float32 kept of the shifted logits
    moved, kept = categorical_kl(p, q + shift), categorical_kl(p.double(), exact)
    assert torch.allclose(moved.double(), kept, rtol=1e-4, atol=1e-12)


@EVERY
@given(logits(), logits(), logits(), logits())
def test_independent_parts_add_up(p: Tensor, q: Tensor, r: Tensor, s: Tensor) -> None:
    parts = categorical_kl(p, q) + categorical_kl(r, s)
    product = categorical_kl(
        (torch.log_softmax(p, 0)[:, None] + torch.log_softmax(r, 0)).flatten(),
        (torch.log_softmax(q, 0)[:, None] + torch.log_softmax(s, 0)).flatten(),
    )
    assert torch.allclose(parts, product, rtol=1e-3, atol=1e-5)
    old, new = ([td.Categorical(logits=x[None]) for x in pair] for pair in ((p, r), (q, s)))
    assert torch.allclose(kl(joint(old), joint(new)), parts, rtol=1e-4, atol=1e-7)


@EVERY
@given(logits(), logits())
def test_merging_actions_never_raises_kl(p: Tensor, q: Tensor) -> None:
    merged = [torch.stack([x[0].logaddexp(x[1]), x[2], x[3]]) for x in (p.double(), q.double())]
    assert float(categorical_kl(*merged)) <= float(categorical_kl(p.double(), q.double())) * (1 + 1e-9) + 1e-12


@EVERY
@given(logits(), logits(), logits(), logits(), st.floats(0.01, 0.99))
def test_kl_is_jointly_convex(p: Tensor, q: Tensor, r: Tensor, s: Tensor, share: float) -> None:
    a, b, c, d = (torch.softmax(x.double(), 0) for x in (p, q, r, s))
    mixed = categorical_kl((share * a + (1 - share) * c).log(), (share * b + (1 - share) * d).log())
    bound = share * categorical_kl(a.log(), b.log()) + (1 - share) * categorical_kl(c.log(), d.log())
    assert float(mixed) <= float(bound) * (1 + 1e-9) + 1e-12
