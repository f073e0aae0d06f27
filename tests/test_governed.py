"""The governor: never further from the reference than kappa, the agent's own policy where that is within."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import klrl
from klrl import PPO, SAC, Governed
from klrl.agents.governed import govern_categorical, govern_categoricals, govern_normal, govern_normals
from klrl.errors import UsageError
from klrl.kl import kl, project_states, reverse_kl
from klrl.policies.distributions import DiagonalNormal, MultiCategorical

SEEN = spaces.Box(-1.0, 1.0, (3,))
RNG = np.random.default_rng(0)


def pair(space: spaces.Space[Any], kind: Any = PPO) -> tuple[Any, Any]:
    """Two agents of different policies."""
    agents = [kind(SEEN, space, {"hidden_sizes": (8,)}, seed=seed) for seed in (1, 2)]
    for seed, agent in enumerate(agents):
        agent.policy_params.flat.add_(
            0.7 * torch.randn(agent.policy_params.flat.shape, generator=torch.manual_seed(seed))
        )
    return agents[0], agents[1]


@pytest.mark.parametrize("kappa", [1e-6, 1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_categoricals_are_within_kappa_and_the_nearest(kappa: float, scale: float) -> None:
    logits, reference = (scale * RNG.standard_normal((500, 2, 4)).astype(np.float32) for _ in range(2))
    logits[:, 1, 3] = reference[:, 1, 3] = -np.inf
    (found,) = govern_categoricals(logits, reference, kappa)
    governed, old, new = (MultiCategorical(torch.from_numpy(x).double()) for x in (found, reference, logits))
    reached, wanted = reverse_kl(old, governed), reverse_kl(old, new)
    assert float(reached.max()) <= kappa * (1 + 1e-6) + 1e-12
    within = wanted <= kappa
    assert (kl(new, governed)[within] == 0).all()
    if scale < 20:  # where rounding of the numbers is not in the way
        assert (reached[~within] >= kappa * (1 - 1.01e-3)).all()
    by_torch = project_states(old, new, kappa, "reverse")
    assert torch.allclose(governed.probs, by_torch.probs, atol=2e-3)


@pytest.mark.parametrize("kappa", [1e-6, 1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_normals_are_within_kappa_and_the_nearest(kappa: float, scale: float) -> None:
    mean, log_std, mean_reference, log_std_reference = (
        scale * RNG.standard_normal((500, 3)).astype(np.float32) for _ in range(4)
    )
    found = govern_normals(mean, log_std, mean_reference, log_std_reference, kappa)
    governed, old, new = (
        DiagonalNormal(*(torch.as_tensor(x).double() for x in numbers))
        for numbers in (found, (mean_reference, log_std_reference), (mean, log_std))
    )
    reached, wanted = reverse_kl(old, governed), reverse_kl(old, new)
    assert float(reached.max()) <= kappa * (1 + 1e-6) + 1e-6
    within = wanted <= kappa
    assert (kl(new, governed)[within] == 0).all()
    assert (reached[~within] >= kappa * (1 - 1.01e-3) - 1e-9).all()


@pytest.mark.parametrize("kappa", [1e-6, 0.1, 30.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_one_state_is_governed_as_many(kappa: float, scale: float) -> None:
    rows = [scale * RNG.standard_normal((50, 2, 4)).astype(np.float32) for _ in range(2)]
    rows[0][7, 0, 1] = -np.inf
    numbers = [np.minimum(scale, 5) * RNG.standard_normal((50, 3)).astype(np.float32) for _ in range(4)]
    (together,) = govern_categoricals(*rows, kappa)
    means, log_stds = govern_normals(*numbers, kappa)
    for i in range(50):
        (alone,) = govern_categorical(*(x[i : i + 1] for x in rows), kappa)
        both = (MultiCategorical(torch.from_numpy(x).double()).probs for x in (alone, together[i : i + 1]))
        assert torch.allclose(*both, atol=1e-3)  # both within the last thousandth of kappa
        mean, log_std = govern_normal(*(x[i : i + 1] for x in numbers), kappa)
        assert np.allclose(mean, means[i], rtol=1e-3, atol=1e-3)
        assert np.allclose(log_std, log_stds[i], atol=1e-3)


def test_it_is_the_nearest_by_a_search_over_all_policies() -> None:
    logits, reference, kappa = np.float32([[[2.0, 0.0, -1.0]]]), np.float32([[[0.0, 0.5, 0.0]]]), 0.1
    (found,) = govern_categoricals(logits, reference, kappa)
    grid = torch.linspace(1e-3, 1 - 1e-3, 400, dtype=torch.float64)
    a, b = torch.meshgrid(grid, grid, indexing="ij")
    keep = a + b < 1 - 1e-3
    probs = torch.stack([a[keep], b[keep], 1 - a[keep] - b[keep]], -1)
    log_agent, log_reference = (torch.log_softmax(torch.from_numpy(x[0, 0]).double(), -1) for x in (logits, reference))
    to_reference, to_agent = ((probs * (probs.log() - log)).sum(-1) for log in (log_reference, log_agent))
    best = float(to_agent[to_reference <= kappa].min())
    governed = torch.softmax(torch.from_numpy(found[0, 0]), -1)
    assert float((governed * (governed.log() - log_agent)).sum()) <= best * (1 + 1e-2)
    assert float((governed * (governed.log() - log_reference)).sum()) == pytest.approx(kappa, rel=1e-3)


def test_what_one_of_the_two_forbids() -> None:
    never = np.float32(-np.inf)
    (found,) = govern_categoricals(np.float32([[[0, 0, 0]]]), np.array([[[0, 0, never]]], np.float32), 0.5)
    assert np.isneginf(found[0, 0, 2]), "the reference's support is not left"
    assert found[0, 0, 0] == found[0, 0, 1]
    # The agent forbids what the reference takes half of the time: leaving that out costs log 2, more than kappa.
    (found,) = govern_categoricals(np.array([[[0, never]]], np.float32), np.float32([[[0, 0]]]), 0.5)
    assert found.tolist() == [[[0.0, 0.0]]]
    (found,) = govern_categoricals(np.array([[[0, never]]], np.float32), np.float32([[[0, 0]]]), 0.7)
    assert found[0, 0, 1] == never


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (spaces.Discrete(3), PPO),
        (spaces.MultiDiscrete([2, 4, 3]), PPO),
        (spaces.Box(-2.0, 6.0, (2,)), PPO),
        (spaces.Box(-2.0, 6.0, (2,)), SAC),
        (spaces.MultiBinary(2), SAC),
    ],
    ids=str,
)
def test_a_governed_agent_acts_by_its_distribution(space: Any, kind: Any) -> None:
    agent, reference = pair(space, kind)
    governed = Governed(agent, reference, 0.05)
    obs = np.repeat(np.float32([[0.3, -0.2, 0.5]]), 20_000, 0)
    policy = governed.distribution(obs[:1])
    assert float(reverse_kl(reference.distribution(obs[:1]), policy)) == pytest.approx(0.05, rel=2e-3)
    assert float(reverse_kl(reference.distribution(obs[:1]), agent.distribution(obs[:1]))) > 0.05
    actions = torch.as_tensor(governed.act(obs, rng=np.random.default_rng(1)))
    log_prob = policy.map_parameters(lambda p: p.expand(len(actions), *p.shape[1:])).log_prob(actions)
    entropy = float(policy.entropy())
    assert float(-log_prob.mean()) == pytest.approx(entropy, abs=5 * float(log_prob.std()) / len(actions) ** 0.5 + 1e-6)
    mode = governed.act(obs[:1], deterministic=True)
    assert torch.allclose(torch.as_tensor(mode).double(), policy.mode.double(), atol=5e-3)
    one, _ = governed.predict(obs[0], deterministic=True)
    assert space.contains(one)
    wide = Governed(agent, reference, 1e6)
    assert np.array_equal(wide.act(obs[:9], deterministic=True), agent.act(obs[:9], deterministic=True))


@pytest.mark.parametrize("space", [spaces.MultiDiscrete([2, 4, 3]), spaces.MultiBinary(2)], ids=str)
def test_uniform_is_a_reference_of_discrete_actions(space: Any) -> None:
    agent, _ = pair(space)
    governed = Governed(agent, "uniform", 0.02)
    obs = np.repeat(np.float32([[0.3, -0.2, 0.5]]), 20_000, 0)
    policy = governed.distribution(obs[:1])
    assert float(policy.entropy()) == pytest.approx(math.log(24 if space.shape == (3,) else 4) - 0.02, abs=1e-5)
    for rows, draws in ((1, 4000), (20_000, 20_000)):
        actions = torch.as_tensor(np.concatenate([governed.act(obs[:rows]) for _ in range(draws // rows)]))
        log_prob = policy.map_parameters(lambda p, draws=draws: p.expand(draws, *p.shape[1:])).log_prob(actions)
        error = float(log_prob.std()) / math.sqrt(draws)
        assert float(-log_prob.mean()) == pytest.approx(float(policy.entropy()), abs=5 * error)
    with pytest.raises(UsageError, match="only discrete actions"):
        Governed(pair(spaces.Box(-1.0, 1.0, (2,)))[0], "uniform", 0.1)


def test_bad_governors_are_refused() -> None:
    agent, reference = pair(spaces.Discrete(3))
    for kappa in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="kappa must be"):
            Governed(agent, reference, kappa)
    for odd in (("a", reference, 0.1), (agent, Governed(agent, reference, 0.1), 0.1), (agent, reference, "much")):
        with pytest.raises(UsageError):
            Governed(*odd)  # type: ignore[arg-type]
    broken = pair(spaces.Discrete(3))[0]
    broken.policy_params.flat.fill_(math.nan)
    with pytest.raises(UsageError, match="cannot be governed"):
        Governed(agent, broken, 0.1)
    with pytest.raises(UsageError, match="action space is"):
        Governed(agent, pair(spaces.Discrete(2))[0], 0.1)
    box = spaces.Box(-1.0, 1.0, (2,))
    with pytest.raises(UsageError, match="a governor mixes two"):
        Governed(pair(box)[0], pair(box, SAC)[0], 0.1)


def test_the_command_evaluates_a_governed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from helpers import QUICK

    from klrl.cli.main import main

    trained = klrl.train("ppo", "CartPole-v1", **{**QUICK, "total_timesteps": 6000}, run_dir=str(tmp_path))
    new = PPO(trained.agent.observation_space, trained.agent.action_space).save(tmp_path / "new")
    scores = []
    capsys.readouterr()
    (checkpoint, *_) = (trained.folder / "checkpoints").glob("step-*")
    for reference, kappa in ((new, "1e-4"), ("uniform", "1e-4"), (checkpoint, "1e-4"), (new, "100")):
        words = ["--govern", str(reference), "--kappa", kappa, "--episodes", "10", "--stochastic"]
        main(["eval", str(trained.folder), *words])
        scores.append(float(capsys.readouterr().out.split()[0]))
    assert max(scores[:2]) < min(scores[2:]), "near a policy that knows nothing, it does little"
    for wrong in (["--govern", str(tmp_path / "none")], ["--kappa", "0.5"]):
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(trained.folder), *wrong])
        assert stop.value.code == 2
    assert "--kappa does nothing without --govern" in capsys.readouterr().err
