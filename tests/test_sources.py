"""What tutorials on KL teach, and the mistakes in them: where each lives in klrl, with the value that is right.

| in the sources | in klrl | test |
|---|---|---|
| KL of discrete and of normal distributions, in nats and bits | ``klrl.kl.kl`` | test_kl_of_tables_and_normals |
| forward and reverse KL of a bimodal target | ``klrl plot fit`` | tests/test_plots.py |
| a check that an update stayed within max_kl | ``track`` | test_a_check_sees_every_state_and_builds_no_graph |
| PPO's penalty, TRPO's constraint | ``policy_loss``, ``KLLimit``; ``line_search`` | tests/test_limit.py, test_trpo.py |
| discrete soft actor-critic | ``EnumeratedActions`` | test_the_discrete_soft_loss_sums_over_actions |
| annealed and cyclical weights | ``Annealed`` | test_a_schedule_of_one_step |
| distillation at a temperature | ``klrl distill`` | tests/test_student.py, test_divergence_at_a_temperature |
| generation held near a reference | ``Governed`` | test_a_mixture_with_a_reference_stays_within_kappa |
| beta-VAE and information bottleneck | ``--bottleneck`` | tests/test_bottleneck.py |
| Bayesian layers | ``--critic bayesian`` | tests/test_bottleneck.py |
| calibration by a temperature | ``temperature_scale``, ``klrl compare`` | tests/test_calibration.py |
| shift between domains | ``klrl compare --states-of`` | tests/test_shift.py |
| KL to a uniform prior | ``--reference.run uniform`` | tests/test_reference.py |
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as td
from torch import nn

from klrl.agents.governed import govern_categoricals
from klrl.agents.sac_discrete import EnumeratedActions
from klrl.kl import Annealed, Dual, KLLimit, at_least, at_most, joint, kl, kl_estimate, mc_kl, track
from klrl.policies.distributions import MultiCategorical


def table(*probs: float) -> td.Categorical:
    return td.Categorical(probs=torch.tensor([probs], dtype=torch.float64))


def test_kl_of_tables_and_normals() -> None:
    old, new = table(0.5, 0.25, 0.25), table(0.25, 0.25, 0.5)
    assert float(kl(old, new)) == pytest.approx(0.25 * math.log(2))
    assert float(kl(old, new, "bits")) == pytest.approx(0.25)
    assert float(kl(td.Normal(1.0, 2.0), td.Normal(0.0, 1.0))) == pytest.approx(0.5 * (4 + 1 - 1) - math.log(2))


def test_a_support_mismatch_is_infinite_and_no_number() -> None:
    # With an epsilon of 1e-10 inside the logarithms the sources read 5.2 here, and 10.8 where the truth is 49.3.
    assert float(kl(table(0.5, 0.5), table(1.0, 0.0))) == math.inf
    far = kl(td.Categorical(logits=torch.tensor([[0.0, -0.0]])), td.Categorical(logits=torch.tensor([[0.0, -100.0]])))
    assert float(far) == pytest.approx(0.5 * (100 - 2 * math.log(2)), rel=1e-6)  # 49.3
    guarded = 0.5 * math.log(0.5 / (1 + 1e-10)) + 0.5 * math.log(0.5 / (math.exp(-100) + 1e-10))
    assert guarded == pytest.approx(10.8, abs=0.05)


def test_a_probability_of_zero_is_no_nan_and_a_policy_is_0_from_itself() -> None:
    assert float(kl(table(1.0, 0.0), table(0.5, 0.5))) == pytest.approx(math.log(2))
    for policy in (table(1.0, 0.0), table(0.3, 0.7), table(1e-30, 1 - 1e-30)):
        assert float(kl(policy, policy)) == 0.0


def test_a_clip_that_does_nothing_in_float32_is_not_relied_on() -> None:
    assert float(torch.tensor(1.0).clamp(1e-10, 1 - 1e-10)) == 1.0, "the sources' guard"
    sure = td.Bernoulli(logits=torch.tensor([40.0]))
    assert float(kl(sure, td.Bernoulli(logits=torch.tensor([41.0])))) == pytest.approx(math.exp(-40) * 0.3679, rel=1e-3)


def test_full_covariances_of_200_dimensions_do_not_overflow() -> None:
    scale = torch.eye(200, dtype=torch.float64) * 1e-2
    assert torch.linalg.det(scale @ scale) == 0.0, "the sources' det/det"
    means = (torch.full((200,), mean, dtype=torch.float64) for mean in (0.0, 1e-3))
    old, new = (td.MultivariateNormal(mean, scale_tril=scale) for mean in means)
    assert float(kl(old, new)) == pytest.approx(200 * 0.5 * (1e-3 / 1e-2) ** 2, rel=1e-9)


def test_the_discrete_soft_loss_sums_over_actions() -> None:
    actions = EnumeratedActions(spaces.Discrete(3), 0.3)
    logits, q, alpha = torch.tensor([[[1.0, 0.0, -1.0]]]), torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor(0.5)
    value, entropy = actions.soft_value(MultiCategorical(logits), lambda _: q.expand(2, 1, 3), {}, alpha, q)
    probs = torch.softmax(logits[0, 0], -1)
    expected = (probs * (q[0] - 0.5 * probs.log())).sum()
    assert float(value) == pytest.approx(float(expected)), "the mean over actions is a third of it"
    assert float(entropy) == pytest.approx(float(-(probs * probs.log()).sum()))


def test_masked_actions_have_no_nan() -> None:
    logits = torch.tensor([[[1.0, 0.0, -math.inf]]], requires_grad=True)
    policy = MultiCategorical(logits)
    (policy.entropy().sum() + kl(policy, MultiCategorical(torch.tensor([[[0.0, 0.0, -math.inf]]]))).sum()).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_a_temperature_moves_in_its_logarithm_and_stays_positive() -> None:
    alpha = Dual(0.1, rate=1.0, minimum=1e-6)
    for _ in range(1000):  # an entropy far above its target
        alpha.adapt(100.0, at_least(1.0))
    assert alpha.value == pytest.approx(1e-6)


def test_a_check_sees_every_state_and_builds_no_graph() -> None:
    net = nn.Linear(2, 3)
    obs = torch.eye(2)
    with track(lambda: td.Categorical(logits=net(obs)), at_most(0.02)) as update, torch.no_grad():
        net.weight[0, 1] += 3.0  # the second state moves, the first does not
    report = update.report
    assert type(report.of_limit) is float
    assert report.per_state is not None
    assert not report.per_state.requires_grad
    assert float(report.per_state[0]) == 0.0
    assert report.max > 2 * report.mean * 0.99, "the mean alone hides the state that moved"


def test_a_schedule_of_one_step() -> None:
    schedule = Annealed(0.0, 1.0, 1)
    assert schedule.value == 0.0
    schedule.adapt(0.0, at_most(1.0))
    assert schedule.value == 1.0


def test_torchs_kl_div_takes_the_logarithm_of_the_second_policy_and_its_mean_is_no_kl() -> None:
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.2, 0.5, 0.3]])
    exact = float(kl(td.Categorical(probs=p), td.Categorical(probs=q)))
    assert float(nn.functional.kl_div(q.log(), p, reduction="batchmean")) == pytest.approx(exact, rel=1e-6)
    with pytest.warns(UserWarning, match="batchmean"):
        mean = float(nn.functional.kl_div(q.log(), p, reduction="mean"))
    assert mean == pytest.approx(exact / 3, rel=1e-6), "a third: it averages over actions too"


def test_divergence_at_a_temperature_keeps_its_gradient_only_times_t_squared() -> None:
    teacher, student = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.1, 0.0, 0.2]], requires_grad=True)
    norms = []
    for t in (10.0, 100.0):
        divergence = kl(td.Categorical(logits=teacher / t), td.Categorical(logits=student / t)).sum()
        norms.append(t * t * torch.autograd.grad(divergence, student)[0].norm())
    assert float(norms[0] / norms[1]) == pytest.approx(1.0, abs=0.1), "without T^2 it falls a hundredfold"


def test_a_sampled_kl_comes_with_its_error() -> None:
    old, new = td.Normal(torch.zeros(1, 1), 1.0), td.Normal(torch.full((1, 1), 0.5), 1.0)
    found = mc_kl(joint(old), joint(new), 4000)
    assert abs(float(found.value) - 0.125) < 4 * float(found.stderr)
    one = kl_estimate(new.log_prob(x := old.sample((500,))).flatten() - old.log_prob(x).flatten(), "k1")
    assert one.stderr is not None


def test_a_mixture_with_a_reference_stays_within_kappa() -> None:
    logits, reference = np.float32([[[4.0, 0.0, -2.0]]]), np.float32([[[0.0, 0.0, 0.0]]])
    (governed,) = govern_categoricals(logits, reference, 0.2)
    found, base = (MultiCategorical(torch.as_tensor(x).double()) for x in (governed, reference))
    assert float(kl(found, base)) <= 0.2
    # The sources' linear mixture with weight kappa / KL is within too, as KL is convex, and further from the policy.
    wanted = MultiCategorical(torch.from_numpy(logits).double())
    share = 0.2 / float(kl(wanted, base))
    linear = MultiCategorical((share * wanted.probs + (1 - share) * base.probs).log())
    assert float(kl(linear, base)) <= 0.2
    assert float(kl(found, wanted)) < float(kl(linear, wanted))


def test_what_is_checked_is_what_acts() -> None:
    # Clipping a distribution's logits after its KL was checked would make another policy: a limit measures what is.
    limit: Any = KLLimit(at_most(1e-4), on_overshoot="project", penalty="none")
    net = nn.Linear(1, 2)
    obs = torch.ones(1, 1)
    with limit.update(lambda: td.Categorical(logits=net(obs)), list(net.parameters())) as move, torch.no_grad():
        net.weight += torch.tensor([[2.0], [-2.0]])
    after = td.Categorical(logits=net(obs).detach())
    assert float(kl(move.old, after)) == pytest.approx(move.report.mean, rel=1e-4)
    assert move.report.mean <= 1e-4
