"""KLLimit: measured, taken back, measured again, adapted; in klrl's order and in anybody's loop."""

import copy
import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch import distributions as td

from klrl.agents.limits import KLConfig, KLTarget, OffPolicyKLConfig
from klrl.kl import (
    PENALTIES,
    RATIO_RULES,
    STATE_RULES,
    Dual,
    KLLimit,
    NoClosedFormError,
    at_least,
    at_most,
    joint,
    kl,
    state_mean,
)
from klrl.kl.limit import Overshoot
from klrl.kl.rules import PenaltyRule, RatioRuleName, StateRuleName

OBS = torch.linspace(-1, 1, 12).view(6, 2)


def policy(network: torch.nn.Module) -> td.Distribution:
    return joint(td.Normal(network(OBS), 1.0))


def made() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(2, 3)


def shift(network: torch.nn.Linear, by: float) -> None:
    """Move every mean by ``by``: KL is 3 by^2 / 2 at each state."""
    with torch.no_grad():
        network.bias += by


def test_the_table_of_rules_is_what_the_options_offer() -> None:
    tables = ((PENALTIES, PenaltyRule), (STATE_RULES, StateRuleName), (RATIO_RULES, RatioRuleName))
    assert all(tuple(table) == get_args(names) for table, names in tables)
    bad_names = ({"penalty": "hard"}, {"of": "p50"}, {"direction": "backward"})
    for bad in (*bad_names, {"check": "epochs"}, {"on_overshoot": "projekt"}):
        with pytest.raises(ValueError, match="is none of"):
            KLLimit(at_most(1.0), **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be a Bound, such as at_most\(0.01\)"):
        KLLimit(0.01)  # type: ignore[arg-type]


def test_numbers_below_zero_are_refused() -> None:
    for name in ("stop", "coef", "max_limit", "influence"):
        for number in (-1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be at least 0, got {number}"):
                KLLimit(at_most(1.0), **{name: number})  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", get_args(Overshoot))
def test_beta_doubles_above_its_upper_edge_and_halves_below_its_lower(rule: Any) -> None:
    upper = 1.5 if rule == "keep" else 1.0
    for of_limit, expected in ((upper * 1.01, 2.0), (upper * 0.99, 1.0), (1.01 / 1.5, 1.0), (0.99 / 1.5, 0.5)):
        network = made()
        limit = KLLimit(at_most(0.02), on_overshoot=rule)
        with limit.update(lambda: policy(network), list(network.parameters())) as move:  # noqa: B023
            shift(network, math.sqrt(of_limit * 0.02 / 1.5))
        assert move.report.attempted == pytest.approx(of_limit * 0.02, rel=1e-4)
        assert float(limit.beta) == expected


def test_a_saved_limit_of_another_rule_is_refused_in_one_line() -> None:
    limit = KLLimit(at_most(0.02))
    with pytest.raises(ValueError, match="the state has no 'log_value', but 'value': of another rule"):
        limit.load_state_dict(KLLimit(at_most(0.02), penalty="fixed").state_dict())
    with pytest.raises(ValueError, match="log_value of the state must be a finite number, got '"):
        limit.load_state_dict({"log_value": "0.5"})  # type: ignore[dict-item]


def test_an_update_is_measured_and_beta_answers_once() -> None:
    network = made()
    limit = KLLimit(at_most(0.02), coef=2.0)
    with limit.update(lambda: policy(network)) as move:
        shift(network, 0.2)
        assert move.excess() == pytest.approx(3.0, rel=1e-5)
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = move.report
        assert float(limit.beta) == 2.0
    assert move.report.mean == move.report.attempted == pytest.approx(0.06, rel=1e-5)
    assert move.report.coefficient == 2.0, "that of the update, not of the next"
    assert float(limit.beta) == 4.0
    shift(network, -0.2)
    with limit.update(lambda: policy(network)):
        shift(network, 0.05)
    assert float(limit.beta) == 2.0


@pytest.mark.parametrize("rule", ["rollback", "project"])
def test_an_overshoot_is_taken_back_and_beta_answers_what_was_reached(rule: Any) -> None:
    network = made()
    weights = list(network.parameters())
    before = [w.detach().clone() for w in weights]
    limit = KLLimit(at_most(0.02), on_overshoot=rule)
    with limit.update(lambda: policy(network), weights) as move:
        shift(network, 1.0)
    report = move.report
    assert report.attempted == pytest.approx(1.5, rel=1e-5)
    assert float(limit.beta) == 2.0, "it adapts to 1.5, not to what was left"
    if rule == "rollback":
        assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
        assert report.mean == 0.0
        assert report.rolled_back == 1.0
    else:
        assert 0.018 < report.mean <= 0.02
        kept = math.sqrt(report.mean / 1.5)
        assert report.rolled_back == pytest.approx(1 - kept, abs=1e-4)
        assert torch.allclose(network.bias, before[1] + kept, atol=1e-5)
    with limit.update(lambda: policy(network), weights) as move:
        shift(network, 0.1)
    assert move.report.rolled_back == 0.0
    with pytest.raises(ValueError, match="takes weights back: give them"):
        limit.begin(lambda: policy(network))


def test_rollback_restores_the_optimizer_beside_the_weights() -> None:
    network, moment = made(), torch.zeros(3)
    limit = KLLimit(at_most(1e-6), on_overshoot="rollback")
    with limit.update(lambda: policy(network), list(network.parameters()), optimizer=[moment]):
        shift(network, 1.0)
        moment += 5.0
    assert moment.tolist() == [0.0] * 3


def test_an_old_policy_that_is_given_may_be_a_view_of_what_learns() -> None:
    std = torch.ones(3, requires_grad=True)
    limit = KLLimit(at_most(math.inf))
    with limit.update(lambda: joint(td.Normal(OBS[:, :1], std)), old=joint(td.Normal(OBS[:, :1], std))) as move:
        for _ in range(2):  # no graph of the old one is walked a second time
            limit.kl(move.old, move.policy()).sum().backward()
        with torch.no_grad():
            std.mul_(2.0)
    assert move.report.mean == pytest.approx(3 * (math.log(2) + 1 / 8 - 1 / 2))


def test_an_update_stops_where_and_when_it_was_asked_to() -> None:
    network = made()
    for check in ("update", "epoch", "minibatch"):
        limit = KLLimit(at_most(0.02), stop=1.5, check=check)  # type: ignore[arg-type]
        move = limit.begin(lambda: policy(network))
        shift(network, 0.15)  # KL 0.034, above 0.03
        assert move.exceeded("minibatch", at=3) == (check == "minibatch")
        assert move.stopped_at == (3 if check == "minibatch" else 0)
        assert move.exceeded("epoch", at=4) == (check == "epoch")
        assert move.exceeded(at=5), "where no occasion is named, it is measured"
        assert move.end().stopped_at == 5
        shift(network, -0.15)
    for still in (KLLimit(at_most(0.02), stop=0.0), KLLimit()):
        move = still.begin(lambda: policy(network))
        shift(network, 1.0)
        assert not move.exceeded()


def test_states_that_do_not_count_decide_nothing() -> None:
    mask = torch.tensor([True, False, True, True, False, False])
    values = torch.tensor([1.0, math.inf, 2.0, 3.0, math.nan, 7.0])
    assert float(state_mean(values, mask)) == 2.0
    assert float(state_mean(values[mask])) == 2.0
    scale = torch.nn.Parameter(torch.ones(6, 1))
    limit = KLLimit(at_most(0.5))
    with limit.update(lambda: joint(td.Normal(scale * torch.ones(6, 2), 1.0)), mask=mask) as move:
        with torch.no_grad():
            scale[1] += 100.0
        assert move.excess() == 0.0
    assert move.report.max == 0.0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_term_is_beta_times_the_limited_kl_with_its_gradient(direction: Any) -> None:
    network, old = made(), joint(td.Normal(torch.zeros(6, 3), 0.5))
    limit = KLLimit(at_most(0.02), penalty="fixed", coef=3.0, direction=direction)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), network.weight)[0]

    new = policy(network)
    expected = 3.0 * (kl(old, new) if direction == "forward" else kl(new, old))
    term = limit.term(old, policy(network))
    assert isinstance(term, Tensor)
    assert torch.allclose(term, expected)
    assert torch.allclose(gradient(term), gradient(expected))
    assert KLLimit(at_most(0.02), penalty="none").term(old, new) == 0.0


def test_a_fixed_penalty_needs_no_target_and_an_adaptive_one_does_nothing_without() -> None:
    device = torch.device("cpu")
    assert KLConfig(target=0.0, penalty="fixed", coef=10.0).make_limit(device).penalises
    assert not KLConfig(target=0.0, penalty="adaptive").make_limit(device).penalises
    assert not KLTarget(target=0.01).make_limit(device).penalises
    assert OffPolicyKLConfig(target=0.1).make_limit(device).penalises


def test_a_coefficient_of_ones_own_does_as_the_rule_and_resumes() -> None:
    network = made()
    limit = KLLimit(at_most(0.02), penalty=Dual(1.0, rate=10.0))
    with limit.update(lambda: policy(network)):
        shift(network, 0.2)
    assert float(limit.beta) == pytest.approx(math.exp(10 * (0.06 - 0.02)), rel=1e-4)
    again = KLLimit(at_most(0.02), penalty=Dual(1.0, rate=10.0))
    again.load_state_dict(limit.state_dict())
    assert float(again.beta) == float(limit.beta)


def test_a_policy_that_is_not_finite_is_infinitely_far_and_adapts_nothing() -> None:
    network = made()
    limit = KLLimit(at_most(0.02))
    move = limit.begin(lambda: policy(network))
    shift(network, math.nan)
    assert move.excess() == math.inf
    assert move.exceeded()
    with pytest.raises(ValueError, match="nan"):
        move.end()
    assert float(limit.beta) == 1.0


def test_a_policy_without_a_closed_form_is_estimated() -> None:
    means = torch.nn.Parameter(torch.zeros(6, 2))

    def mixture() -> td.Distribution:
        return td.MixtureSameFamily(td.Categorical(logits=torch.zeros(6, 2)), td.Normal(means, 1.0))

    with KLLimit(at_most(0.02), stop=1.5).update(mixture) as move:
        with torch.no_grad():
            means += 1.0
        assert move.exceeded()
    assert move.report.estimated
    with pytest.raises(NoClosedFormError, match=r"MixtureSameFamily; .*penalty='none' .* stop and on_overshoot"):
        KLLimit(at_most(0.02)).term(move.old, mixture())
    assert KLLimit(at_most(0.02), penalty="none").term(move.old, mixture()) == 0.0
    assert move.report.mean == pytest.approx(0.5, rel=0.2)


def test_a_fresh_torch_optimizer_is_restored_to_having_no_state() -> None:
    network = made()
    optimizer = torch.optim.Adam(network.parameters(), lr=1.0)
    limit = KLLimit(at_most(1e-6), on_overshoot="rollback")
    for steps in (0, 1):
        before = copy.deepcopy(optimizer.state_dict())
        assert len(before["state"]) == steps  # the bias alone has a gradient
        with limit.update(lambda: policy(network), list(network.parameters()), optimizer=optimizer) as move:
            network.bias.sum().backward()
            optimizer.step()
        assert move.report.rolled_back == 1.0
        assert len(optimizer.state_dict()["state"]) == steps
        shift(network, 0.0)
        optimizer.step()  # so that it has a state


def test_several_optimizers_are_restored() -> None:
    network = made()
    optimizers = [torch.optim.SGD([weight], lr=1.0, momentum=0.9) for weight in network.parameters()]
    limit = KLLimit(at_most(1e-6), on_overshoot="rollback")
    with limit.update(lambda: policy(network), list(network.parameters()), optimizer=optimizers) as move:
        policy(network).log_prob(torch.ones(6, 3)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert move.report.rolled_back == 1.0
    assert not any(optimizer.state_dict()["state"] for optimizer in optimizers)


def test_weights_that_are_not_the_policys_are_refused_where_they_cannot_hold_it() -> None:
    for rule in ("rollback", "project"):
        network = made()
        others = [weight.detach().clone() for weight in network.parameters()]
        move = KLLimit(at_most(0.01), on_overshoot=rule).begin(lambda: policy(network), others)  # type: ignore[arg-type]  # noqa: B023
        shift(network, 1.0)
        with pytest.raises(ValueError, match="depends on more than the weights that were given"):
            move.end()


def test_weights_that_turned_nan_are_taken_back_before_the_update_is_refused() -> None:
    network = made()
    move = KLLimit(at_most(0.01), on_overshoot="project").begin(lambda: policy(network), list(network.parameters()))
    shift(network, math.nan)
    with pytest.raises(ValueError, match=r"nan|Normal"):
        move.end()
    assert bool(network.bias.isfinite().all())


def test_what_does_not_have_one_value_per_state_is_refused_at_the_beginning() -> None:
    limit, categorical = KLLimit(at_most(0.01)), td.Categorical(logits=torch.zeros(6, 3))
    for given, message in (
        ({"actions": torch.zeros(6, 1, dtype=torch.int64)}, "log-probabilities of the actions must have one value"),
        ({"mask": torch.ones(6, 1, dtype=torch.bool)}, "mask must have one value per state"),
        ({"mask": torch.tensor([1, 1, 1, 0, 0, 0])}, r"mask must be bool, .* not torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            limit.begin(lambda: categorical, **given)
    with pytest.raises(ValueError, match=r"wrap it in joint"):
        limit.begin(lambda: td.Normal(torch.zeros(6, 2), 1.0))
    with pytest.raises(ValueError, match=r"a dimension of one state"):
        limit.begin(lambda: td.Categorical(logits=torch.zeros(3)))
    with pytest.raises(ValueError, match="limited from above"):
        KLLimit(at_least(0.1))
