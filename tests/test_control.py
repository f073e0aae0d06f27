"""Bounds and coefficients: their formulas, their ranges, their step responses."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from klrl.kl import Adaptive, Annealed, Coefficient, Dual, Fixed, Penalty, at_least, at_most

INF = float("inf")


def test_bounds_know_their_side() -> None:
    assert at_most(0.02).holds(0.02)
    assert not at_most(0.02).holds(0.021)
    assert not at_most(0.02).holds(float("nan"))
    assert at_least(1.0).excess(0.75) == 0.25
    assert at_most(0.02).scaled(1.5).limit == pytest.approx(0.03)


def test_banded_moves_once_per_answer_outside_its_band() -> None:
    beta = Adaptive(1.0)
    beta.adapt(0.0301, at_most(0.02))
    assert beta.value == pytest.approx(2.0)
    beta.adapt(0.02, at_most(0.02))
    assert beta.value == pytest.approx(2.0)
    beta.adapt(0.0132, at_most(0.02))
    assert beta.value == pytest.approx(1.0)
    beta.adapt(INF, at_most(0.02))
    beta.adapt(float("nan"), at_most(0.02))
    assert beta.value == pytest.approx(4.0), "what cannot be measured counts as too large"


def test_banded_stays_in_its_range_and_resumes() -> None:
    beta = Adaptive(1.0, minimum=1e-3, maximum=1e3)
    for _ in range(100):
        beta.adapt(0.0, at_most(0.02))
    assert beta.value == pytest.approx(1e-3)
    for _ in range(5):
        beta.adapt(1.0, at_most(0.02))
    again = Adaptive(1.0, minimum=1e-3, maximum=1e3)
    again.load_state_dict(beta.state_dict())
    assert again.value == beta.value


def test_banded_settles_a_plant_within_twenty_updates() -> None:
    for start in (1e-3, 1e3):
        beta, bound = Adaptive(start), at_most(0.02)
        history = []
        for _ in range(40):
            measured = 0.05 / (1 + beta.value)
            history.append(measured / bound.limit)
            beta.adapt(measured, bound)
        assert all(1 / 1.5 <= share <= 1.5 for share in history[20:])


def test_coefficients_refuse_what_means_nothing() -> None:
    for bad in (-1.0, float("nan"), INF):
        with pytest.raises(ValueError, match="must"):
            Fixed(bad)
        with pytest.raises(ValueError, match="must"):
            Adaptive(bad)


def test_a_band_refuses_a_bound_that_it_would_answer_the_wrong_way() -> None:
    beta = Adaptive(1.0)
    for bound in (at_least(1.0), at_most(-1.0)):
        with pytest.raises(ValueError, match=r"Adaptive answers at_most a limit of 0 or more, not Bound.*Dual"):
            Penalty(bound, beta).adapt(0.5)
    assert beta.value == 1.0


MAKERS = {"value": lambda: Fixed(0.5), "log_value": lambda: Adaptive(2.0), "count": lambda: Annealed(0.0, 1.0, 100)}


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_takes_numbers_of_any_type_and_nothing_else(name: str) -> None:
    for number in (1, 1.0, np.float32(1.0), np.int64(1), torch.tensor(1.0)):
        coefficient: Any = MAKERS[name]()
        coefficient.load_state_dict({name: number})
        assert coefficient.state_dict() == {name: 1.0}
        assert type(coefficient.state_dict()[name]) is float
    for bad in ("1.0", None, [1.0], math.nan, INF, np.ones(2)):
        with pytest.raises(ValueError, match=f"{name} of the state must be a finite number, got"):
            MAKERS[name]().load_state_dict({name: bad})
    with pytest.raises(ValueError, match=f"the state has no '{name}', but 'other': of another rule"):
        MAKERS[name]().load_state_dict({"other": 1.0})


@pytest.mark.parametrize("make", [Adaptive, Dual])
def test_a_state_from_beyond_the_range_is_taken_to_its_edge(make: Any) -> None:
    coefficient = make(1.0, minimum=0.1, maximum=10.0)
    for saved, value in ((1000.0, 10.0), (-1000.0, 0.1), (0.0, 1.0)):
        coefficient.load_state_dict({"log_value": saved})
        assert coefficient.value == pytest.approx(value)


def test_a_dual_takes_its_last_excess_as_a_number() -> None:
    dual = Dual(1.0, proportional=1.0)
    dual.load_state_dict({"log_value": np.float64(0.5), "last_excess": np.float32(0.25)})
    assert dual.state_dict() == {"log_value": 0.5, "last_excess": 0.25}
    with pytest.raises(ValueError, match="last_excess of the state must be a finite number, got 'x'"):
        dual.load_state_dict({"log_value": 0.5, "last_excess": "x"})


def test_penalty_term_points_against_the_excess() -> None:
    x = torch.tensor(0.5)
    assert float(Penalty(at_most(0.1), Fixed(2.0)).term(x)) == 1.0
    assert float(Penalty(at_least(0.1), Fixed(2.0)).term(x)) == -1.0


def test_a_penalty_refuses_what_is_no_coefficient() -> None:
    for wrong in (0.5, Adaptive):
        with pytest.raises(ValueError, match=r"a penalty needs a Coefficient, such as Fixed\(0.5\)"):
            Penalty(at_most(1.0), wrong)  # type: ignore[arg-type]


def test_rllib_and_paper_presets_follow_their_published_rules() -> None:
    paper, rllib = Adaptive.preset("paper"), Adaptive.preset("rllib")
    for measured, by_paper, by_rllib in ((0.041, 2.0, 0.3), (0.031, 4.0, 0.3), (0.011, 2.0, 0.3), (0.009, 1.0, 0.15)):
        paper.adapt(measured, at_most(0.02))
        rllib.adapt(measured, at_most(0.02))
        assert (paper.value, rllib.value) == (pytest.approx(by_paper), pytest.approx(by_rllib))
    with pytest.raises(ValueError, match="name must be"):
        Adaptive.preset("other")  # type: ignore[arg-type]


def test_dual_is_a_gradient_step_in_log_space() -> None:
    alpha = Dual(1.0, rate=0.5)
    alpha.adapt(0.4, at_least(1.0))  # the entropy is 0.6 too low: the temperature rises
    assert alpha.value == pytest.approx(math.exp(0.5 * 0.6))
    alpha.adapt(INF, at_most(1.0))
    assert alpha.value == pytest.approx(math.exp(0.3 + 1.0)), "one step is at most a factor e"


def test_dual_with_a_proportional_term_rings_less() -> None:
    def overshoot(proportional: float) -> float:
        """The plant answers the coefficient with a delay: its log follows slowly."""
        beta, bound, state = Dual(1e-2, rate=25.0, proportional=50.0 * proportional), at_most(0.02), 0.0
        signs = []
        for _ in range(200):
            state += 0.2 * (math.log(beta.value) - state)
            measured = 0.1 / (1 + math.exp(state))
            signs.append(measured - bound.limit)
            beta.adapt(measured, bound)
        return float(np.abs(signs[20:]).sum())

    assert overshoot(2.0) < 0.5 * overshoot(0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda start: Adaptive(start),
        lambda start: Adaptive.preset("rllib", start),
        lambda start: Dual(start, rate=25.0),
        lambda start: Dual(start, rate=25.0, proportional=25.0),
    ],
)
@pytest.mark.parametrize("start", [1e-2, 1.0, 1e2])
def test_controllers_settle_a_plant_within_twenty_updates_without_ringing(make: Any, start: float) -> None:
    coefficient, bound = make(start), at_most(0.02)
    shares = []
    for _ in range(60):
        measured = 0.1 / (1 + coefficient.value)
        shares.append(measured / bound.limit)
        coefficient.adapt(measured, bound)
    settled = shares[20:]
    assert all(0.5 <= share <= 2.0 for share in settled)
    turns = sum((b - a) * (c - b) < -1e-12 for a, b, c in zip(settled, settled[1:], settled[2:], strict=False))
    assert turns <= 1


@pytest.mark.parametrize("make", [lambda: Adaptive(1.0), lambda: Dual(1.0, rate=10.0, proportional=3.0)])
def test_no_coefficient_drifts_out_of_its_range_in_a_million_adversarial_steps(make: Any) -> None:
    coefficient, rng = make(), np.random.default_rng(0)
    extremes = [0.0, INF, float("nan"), 1e-300, 1e300, 0.02]
    choices = rng.integers(len(extremes), size=1_000_000)
    phases = np.repeat(rng.integers(len(extremes), size=1000), 1000)  # long stretches of one extreme
    for i, (choice, phase) in enumerate(zip(choices.tolist(), phases.tolist(), strict=True)):
        coefficient.adapt(extremes[phase if i % 3 else choice], at_most(0.02))
    assert 0.0 < coefficient.value < INF
    for _ in range(40):
        coefficient.adapt(1e3, at_most(0.02))
    high = coefficient.value
    for _ in range(200):
        coefficient.adapt(0.0, at_most(0.02))
    assert coefficient.value < high, "and it still answers"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("linear", [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        ("cosine", [0.0, 0.5 - 0.5 * math.cos(math.pi / 4), 0.5, 0.5 + 0.5 * math.cos(math.pi / 4), 1.0, 1.0]),
        ("cyclical", [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]),
    ],
)
def test_annealed_follows_its_shape(shape: Any, expected: list[float]) -> None:
    weight = Annealed(0.0, 1.0, 4, shape=shape, cycles=2)
    seen = []
    for _ in expected:
        seen.append(weight.value)
        weight.adapt(0.0, at_most(1.0))
    assert seen == pytest.approx(expected)


def test_annealed_over_one_step_and_after_a_warm_up() -> None:
    one = Annealed(3.0, 1.0, 1, warmup=2)
    seen = []
    for _ in range(5):
        seen.append(one.value)
        one.adapt(0.0, at_most(1.0))
    assert seen == [3.0, 3.0, 3.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="steps"):
        Annealed(0.0, 1.0, 0)


@pytest.mark.parametrize(
    "make",
    [lambda: Fixed(0.5), lambda: Adaptive(2.0), lambda: Dual(2.0, proportional=1.0), lambda: Annealed(0.0, 1.0, 100)],
)
def test_every_coefficient_resumes_exactly(make: Any) -> None:
    first: Coefficient = make()
    measurements = list(itertools.islice(itertools.cycle([0.001, 0.5, 0.02, 0.1]), 37))
    for measured in measurements:
        first.adapt(measured, at_most(0.02))
    second: Coefficient = make()
    second.load_state_dict(first.state_dict())
    for measured in measurements:
        for coefficient in (first, second):
            coefficient.adapt(measured, at_most(0.02))
        assert first.value == second.value
