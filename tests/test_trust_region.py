"""The trust region's linear algebra and its line search, by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from klrl.kl.trust_region import conjugate_gradient, line_search, natural_step, project


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_conjugate_gradient_solves_in_as_many_steps_as_there_are_dimensions() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, b = root @ root.T + 0.1 * torch.eye(6), torch.randn(6, dtype=torch.float64)
    found = conjugate_gradient(lambda v: matrix @ v, b, 10)
    assert torch.allclose(found.x, torch.linalg.solve(matrix, b), rtol=1e-4)
    assert found.iterations <= 7
    assert found.residual == pytest.approx(float((b - matrix @ found.x).norm() / b.norm()), abs=1e-6)
    assert found.positive
    early = conjugate_gradient(lambda v: matrix @ v, b, 2)
    assert early.iterations == 2
    assert early.residual > found.residual


def test_conjugate_gradient_stops_at_curvature_that_is_not_positive() -> None:
    for matrix in (torch.diag(double(1.0, -2.0)), torch.zeros(2, 2).double(), torch.full((2, 2), math.nan).double()):
        found = conjugate_gradient(lambda v, a=matrix: a @ v, double(0.1, 1.0), 10)  # type: ignore[misc]
        assert not found.positive
        assert bool(found.x.isfinite().all())


def test_the_natural_step_matches_a_hand_computed_example() -> None:
    # F = diag(4, 1), g = (4, 2): F^-1 g = (1, 2), whose s^T F s = 8; the limit 0.04 makes the step 0.1 of it.
    fisher = torch.diag(double(4.0, 1.0))
    found = natural_step(lambda v: fisher @ v, double(4.0, 2.0), 0.04, 0.0, 10)
    assert found is not None
    assert found.step.tolist() == pytest.approx([0.1, 0.2])
    assert found.improvement == pytest.approx(0.8)
    assert float(found.step @ fisher @ found.step) / 2 == pytest.approx(0.04)
    assert found.damping == 0.0


def test_damping_rises_where_the_curvature_is_negative_and_gives_up_where_it_stays_so() -> None:
    matrix = torch.diag(double(1.0, -0.5))
    found = natural_step(lambda v: matrix @ v, double(1.0, 0.1), 0.01, 0.1, 10)
    assert found is not None
    assert found.damping == pytest.approx(1.0)
    assert natural_step(lambda v: -1e9 * v, double(1.0, 1.0), 0.01, 0.1, 10) is None
    assert natural_step(lambda v: 0.0 * v, double(1.0, 1.0), 0.01, 0.1, 10) is None
    assert natural_step(lambda v: math.nan * v, double(1.0, 1.0), 0.01, 0.1, 10) is None


def test_a_singular_fisher_matrix_is_solved_within_its_range() -> None:
    matrix = torch.diag(double(2.0, 0.0))
    found = natural_step(lambda v: matrix @ v, double(1.0, 0.0), 0.01, 0.0, 10)
    assert found is not None
    assert found.step.tolist() == pytest.approx([0.1, 0.0])


def search(kl_of: Any, improvement_of: Any, limit: float = 1.0) -> tuple[Any, Tensor]:
    """A line search from 0 along 1 with the given laws of KL and improvement."""
    weights = torch.zeros(1)
    found = line_search(
        weights,
        torch.ones(1, dtype=torch.float64),
        lambda: (improvement_of(float(weights)), kl_of(float(weights))),
        limit,
        10,
    )
    return found, weights


def test_the_line_search_takes_the_whole_step_where_it_may_and_else_just_enough() -> None:
    found, weights = search(lambda x: 0.9 * x * x, lambda x: x)
    assert found == (1.0, 1.0, 0.9, 0.9, "")
    assert float(weights) == 1.0
    found, weights = search(lambda x: 1.2 * x * x, lambda x: x)
    assert found.fraction == pytest.approx(math.sqrt(0.96 / 1.2))
    assert found.kl == pytest.approx(0.96, rel=1e-6)
    assert found.first_kl == pytest.approx(1.2)
    assert float(weights) == pytest.approx(found.fraction)
    found, _ = search(lambda x: 0.1 * x * x, lambda x: 0.5 - x)  # beyond half of the step nothing improves
    assert found.fraction == pytest.approx(0.8**4)


@pytest.mark.parametrize(
    ("kl_of", "improvement_of", "reason"),
    [
        (lambda x: 9e9, lambda x: 1.0, "kl"),
        (lambda x: 0.0, lambda x: 0.0, "no_improvement"),
        (lambda x: 0.0, lambda x: -x, "no_improvement"),
        (lambda x: math.nan, lambda x: 1.0, "nonfinite"),
        (lambda x: 0.0, lambda x: math.inf, "nonfinite"),
    ],
)
def test_a_failed_line_search_leaves_the_weights_bit_for_bit(kl_of: Any, improvement_of: Any, reason: str) -> None:
    found, weights = search(kl_of, improvement_of)
    assert (found.fraction, found.rejected) == (0.0, reason)
    assert float(weights) == 0.0


def test_projection_ends_inside_the_limit_or_at_the_start() -> None:
    reached, weights = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])

    def place(fraction: float) -> None:
        weights.copy_(fraction * reached)

    kept = project(place, lambda: float(weights @ weights), 1.0, 25.0)
    assert 0.9 < float(weights @ weights) <= 1.0
    assert kept == pytest.approx(0.2, rel=0.06)
    assert torch.equal(weights, kept * reached)
    assert project(place, lambda: 5.0, 1.0, 5.0) == 0.0
    assert torch.equal(weights, torch.zeros(2))
    place(1.0)
    assert project(place, lambda: math.nan if weights.any() else 0.0, 1.0, math.inf) == 0.0
    assert torch.equal(weights, torch.zeros(2)), "nothing known of it is taken for inside"
