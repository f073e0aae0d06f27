"""Calibration of class probabilities: temperatures and errors that are known, and those at the ends of the range."""

import math

import pytest
import torch
from torch import Tensor

from klrl.kl import expected_calibration_error, temperature_scale
from klrl.kl.calibration import nll, reliability


def logits_of(rows: int, classes: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.02, 0.3, 1.0, 4.0, 60.0])
def test_the_temperature_that_made_a_target_is_found(temperature: float) -> None:
    logits = logits_of(200, 5, min(3.0, 100 * temperature))
    target = (logits / temperature).softmax(-1)
    assert temperature_scale(logits, target) == pytest.approx(temperature, rel=1e-6)
    assert temperature_scale(logits / temperature, target) == pytest.approx(1.0, rel=1e-6)


def test_of_two_classes_at_one_gap_the_temperature_is_the_gap_over_the_log_odds() -> None:
    # Right 3 times of 4 with logits 0 and 6: sigmoid(6 / T) = 3/4.
    logits, target = torch.tensor([[0.0, 6.0]]).expand(4, 2), torch.tensor([1, 1, 0, 1])
    assert temperature_scale(logits, target) == pytest.approx(6 / math.log(3), rel=1e-9)
    assert nll(logits / (6 / math.log(3)), target) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_no_temperature_on_a_grid_has_less_nll() -> None:
    logits, generator = logits_of(300, 4), torch.Generator().manual_seed(1)
    target = torch.multinomial((0.4 * logits).softmax(-1), 1, generator=generator).squeeze(-1)
    best = temperature_scale(logits, target)
    assert 1.5 < best < 4
    assert all(nll(logits / best, target) <= nll(logits / t, target) for t in torch.logspace(-2, 2, 401).tolist())


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_perfect_and_hopeless_predictions_end_at_the_ends_of_the_range(size: float) -> None:
    logits = size * logits_of(50, 3)
    assert temperature_scale(logits, logits.argmax(-1)) == 0.01
    assert temperature_scale(logits, logits.argmin(-1)) == 100
    assert temperature_scale(torch.zeros(5, 3), torch.tensor([0, 1, 2, 0, 0])) == 1


def test_an_impossible_class_changes_nothing_unless_it_comes_true() -> None:
    logits = logits_of(100, 3)
    target = (logits / 2).softmax(-1)
    wide, padded = (torch.nn.functional.pad(x, (0, 1), value=v) for x, v in ((logits, -math.inf), (target, 0.0)))
    assert temperature_scale(wide, padded) == pytest.approx(2.0, rel=1e-6)
    assert nll(wide, padded) == pytest.approx(nll(logits, target), rel=1e-12)
    wrong = torch.full((100,), 3)
    assert nll(wide, wrong) == math.inf
    with pytest.raises(ValueError, match="infinite at every temperature"):
        temperature_scale(wide, wrong)


def test_nll_of_a_distribution_is_its_entropy_and_the_kl() -> None:
    p, q = (torch.distributions.Categorical(logits=logits_of(rows, 4)[:20]) for rows in (20, 21))
    expected = (p.entropy() + torch.distributions.kl_divergence(p, q)).mean()
    assert nll(q.logits, p.probs) == pytest.approx(float(expected), rel=1e-12)


def test_the_calibration_error_is_that_by_hand() -> None:
    # Two bins: three predictions sure by 0.8, of which one is right; one sure by 0.5, at the edge, and right.
    probs = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    target = torch.tensor([0, 1, 0, 0])
    found = reliability(probs.log(), target, bins=2)
    assert found.number.tolist() == [1, 3]
    assert found.confidence.tolist() == pytest.approx([0.5, 0.8])
    assert found.accuracy.tolist() == pytest.approx([1.0, 1 / 3])
    expected = (1 * 0.5 + 3 * (0.8 - 1 / 3)) / 4
    assert expected_calibration_error(probs.log(), target, bins=2) == pytest.approx(expected)
    # In one bin the gaps cancel: right 2 times of 4, sure by 0.725.
    assert expected_calibration_error(probs.log(), target, bins=1) == pytest.approx(0.225)
    assert expected_calibration_error(probs.log(), probs) == pytest.approx(0.0, abs=1e-12)


def test_scaling_by_the_temperature_takes_the_error_of_overconfident_predictions_away() -> None:
    true = logits_of(20_000, 4, 1.5)
    target = torch.multinomial(true.softmax(-1), 1, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    sure = 3 * true
    temperature = temperature_scale(sure[:10_000], target[:10_000])
    assert temperature == pytest.approx(3.0, rel=0.05)
    held = target[10_000:]
    assert expected_calibration_error(sure[10_000:], held) > 0.15
    assert expected_calibration_error(sure[10_000:] / temperature, held) < 0.025


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0).long(), "at least one prediction"),
        (torch.zeros(3), torch.zeros(3).long(), r"shape \[N, n\]"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "class numbers of 0 to 2"),
        (torch.zeros(2, 3), torch.zeros(2, 2), r"class numbers \[2\] or distributions \[2, 3\]"),
        (torch.zeros(2, 3), torch.zeros(2), r"class numbers \[2\] or"),
        (torch.zeros(2, 3), torch.ones(2, 3), "sum to 1"),
        (torch.full((2, 3), math.nan), torch.tensor([0, 1]), "nan"),
        (torch.full((2, 3), -math.inf), torch.tensor([0, 1]), "every class"),
    ],
)
def test_what_is_no_prediction_or_target_is_refused(logits: Tensor, target: Tensor, message: str) -> None:
    for function in (temperature_scale, expected_calibration_error, nll):
        with pytest.raises(ValueError, match=message):
            function(logits, target)
