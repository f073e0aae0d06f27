"""How far visited states shift: known divergences, the floor where nothing shifts, and the option of the command."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_compare import QUICK, command, made, strict
from torch.distributions import Categorical, MultivariateNormal, kl_divergence

import klrl
from klrl.agents.ppo import PPO
from klrl.analysis.compare import draw, to_json, to_text
from klrl.analysis.comparison import CompareConfig, compare_policies
from klrl.analysis.shift import shift
from klrl.analysis.visits import Visits, visit
from klrl.cli.main import main
from klrl.errors import NonFiniteError
from klrl.kl import js
from klrl.policies.encoder import ObservationEncoder


def visited(obs: Any, length: int = 1) -> Visits:
    """The states [S, ...], one environment's, in episodes of ``length``."""
    steps = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)

    def shown(part: Any) -> Any:
        return np.concatenate([part, part[-1:]])[:, None]

    ended = (np.arange(steps) % length == length - 1)[:, None]
    every = np.ones_like(ended)
    whole = {key: shown(part) for key, part in obs.items()} if isinstance(obs, dict) else shown(obs)
    return Visits(whole, np.zeros((steps, 1)), ended, ~every, every, steps)


def encoder_of(space: spaces.Space[Any]) -> ObservationEncoder:
    return ObservationEncoder(space, torch.device("cpu"), normalize=False)


def box(size: int) -> ObservationEncoder:
    return encoder_of(spaces.Box(-np.inf, np.inf, (size,)))


def test_the_shift_between_two_normals_is_their_kl_within_its_error() -> None:
    mean, covariance = torch.tensor([1.0, -0.5]).double(), torch.tensor([[2.0, 0.8], [0.8, 0.5]]).double()
    old, new = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double()), MultivariateNormal(mean, covariance)
    torch.manual_seed(0)
    found = shift(*(visited(dist.sample((3000,)).numpy()) for dist in (old, new)), box(2))
    assert found.covariance == "full"
    for name, pair in (("forward", (old, new)), ("reverse", (new, old))):
        exact, value = float(kl_divergence(*pair)), found.normal[name]
        assert 0 < value.stderr < 0.1 * exact
        assert abs(value.value - exact) < 4 * value.stderr
        assert value.floor < 0.005  # 5 parameters, 3000 states
    # Scaling a dimension changes no divergence, nor does one that never varies.
    scaled = [visited((dist.sample((2000,)) * torch.tensor([1e4, 1e-4])).numpy()) for dist in (old, new)]
    assert shift(*scaled, box(2)).normal["forward"].value == pytest.approx(float(kl_divergence(old, new)), rel=0.1)


def test_few_states_are_fitted_by_a_diagonal_and_a_constant_dimension_is_left_out() -> None:
    rng = np.random.default_rng(0)
    here, there = rng.normal(size=(2, 60, 8))
    there[:, 0] += 2.0
    here[:, 7] = there[:, 7] = 3.0
    found = shift(visited(here), visited(there), box(8))
    assert found.covariance == "diagonal"
    (m, s), (n, t) = ((x[:, :7].mean(0), x[:, :7].std(0)) for x in (here, there))
    by_hand = (np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum()
    assert found.normal["forward"].value == pytest.approx(by_hand, rel=1e-4)
    assert float(found.by_dimension[2, 7]) == 0
    assert int(found.by_dimension[2].argmax()) == 0


def test_the_ridge_makes_a_dimension_that_varies_in_one_environment_alone_finite() -> None:
    rng = np.random.default_rng(0)
    here, there = np.zeros((500, 1)), rng.normal(size=(500, 1))
    found = shift(visited(here), visited(there), box(1))
    assert 1e4 < found.normal["reverse"].value < 1e7


def test_categories_are_compared_as_by_hand_with_half_a_count_added_for_kl_and_none_for_js() -> None:
    here, there = np.array([0, 0, 0, 2] * 5), np.array([0, 2, 2, 2] * 5)
    found = shift(visited(here), visited(there), encoder_of(spaces.Discrete(4)))
    assert found.normal == {}
    p, q = torch.tensor([15.5, 5.5]).double() / 21, torch.tensor([5.5, 15.5]).double() / 21
    assert found.categories["forward"].value == pytest.approx(float((p * (p / q).log()).sum()))
    raw = [Categorical(torch.tensor(x).double()) for x in ([0.75, 0.25], [0.25, 0.75])]
    assert found.categories["js"].value == pytest.approx(float(js(*raw)), rel=1e-6)
    apart = shift(visited(np.zeros(20, int)), visited(np.ones(20, int)), encoder_of(spaces.Discrete(4)))
    assert apart.categories["forward"].value == pytest.approx(20 / 21 * math.log(41))
    assert apart.categories["js"].value == pytest.approx(math.log(2), rel=1e-6)


def test_categories_see_what_normals_do_not() -> None:
    rng = np.random.default_rng(0)
    here, there = rng.normal(size=(1000, 1)), rng.choice([-1.0, 1.0], size=(1000, 1))
    found = shift(visited(here), visited(there), box(1))
    assert found.normal["forward"].value < 0.02 < 0.2 < found.categories["js"].value


@pytest.mark.parametrize("length", [1, 20])
def test_where_nothing_shifts_a_value_is_at_its_floor_within_its_error_however_long_episodes_are(length: int) -> None:
    rng, off = np.random.default_rng(0), []
    for _ in range(12):
        # Each episode has a level of its own, so that states of one are all but one state.
        states = [
            np.repeat(rng.normal(size=(40, 2)), length, 0) + 0.3 * rng.normal(size=(40 * length, 2)) for _ in "ab"
        ]
        found = shift(*(visited(part, length) for part in states), box(2))
        assert found.episodes == (40, 40)
        both = (found.normal["forward"], found.categories["js"])
        off.append([(part.value - part.floor) / part.stderr for part in both])
    assert np.abs(np.mean(off, axis=0)).max() < 1
    assert np.abs(off).max() < 4


def test_parts_are_named_images_left_out_and_infinite_states_refused() -> None:
    parts = {
        "at": spaces.Box(-1, 1, (2,)),
        "eye": spaces.Box(0, 255, (36, 36, 1), np.uint8),
        "on": spaces.MultiBinary(1),
    }
    obs = {
        "at": np.ones((4, 2), np.float32),
        "eye": np.zeros((4, 36, 36, 1), np.uint8),
        "on": np.eye(4, 1, dtype=np.int8),
    }
    found = shift(visited(obs), visited(obs), encoder_of(spaces.Dict(parts)))
    assert (found.names, found.left_out) == (["at 0", "at 1", "on 0"], ["eye"])
    assert found.categories["js"].value == 0
    only = shift(visited(obs["eye"]), visited(obs["eye"]), encoder_of(parts["eye"]))
    assert (only.normal, only.categories, only.names, only.left_out) == ({}, {}, [], ["the image"])
    with pytest.raises(NonFiniteError, match="not finite"):
        shift(visited(np.full((4, 1), np.inf)), visited(np.zeros((4, 1))), box(1))


def test_more_gravity_shifts_a_pendulums_states_and_other_episodes_do_not() -> None:
    trained, visits = made(PPO, env="Pendulum-v1"), []
    for seed, g in enumerate((10.0, 10.0, 20.0, 40.0)):
        envs = trained.make_envs(1, g=g)
        visits.append(visit(trained.agent, envs, 4000, seed))
        envs.close()
    same, more, most = (shift(visits[0], there, trained.agent.encoder) for there in visits[1:])
    for of in ("normal", "categories"):
        a, b, c = (getattr(found, of)["forward"] for found in (same, more, most))
        assert abs(a.value - a.floor) < 3 * a.stderr
        assert b.value > b.floor + 3 * b.stderr
        assert c.value > b.value


@pytest.mark.parametrize("observation", ["box", "dict", "image", "discrete"])
def test_every_space_is_shown(observation: str) -> None:
    both = [made(PPO, seed=seed, observation=observation) for seed in (0, 1)]
    config = CompareConfig(steps=QUICK.steps, episodes=2, states_of="klrl/Truncation-v0")
    found = compare_policies(*both, config)
    text = to_text(found)
    assert "at 40 states that B visited on klrl/Truncation-v0" in text
    assert ("too many dimensions" in text) == (observation == "image")
    assert ("categories" in text) == (observation != "image")
    assert "B's 8 episodes" not in text
    content = strict(to_json(found))["elsewhere"]
    assert content["env"] == "klrl/Truncation-v0"
    assert len(content["A"]["shift"]["by_dimension"]) == {"box": 1, "dict": 2, "image": 0, "discrete": 1}[observation]
    # Where an episode goes on it shows 1; in the probe that ends at once, either.
    if observation != "image":
        assert content["B"]["shift"]["categories"]["js"]["value"] > 0.01
    draw(found).savefig("figure.svg")
    assert "</svg>" in Path("figure.svg").read_text()


def test_the_command_takes_the_other_environments_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"n_envs": 2, "n_steps": 16, "batch_size": 16, "n_epochs": 1, "hidden_sizes": (8,)}
    run = str(klrl.train("ppo", "Pendulum-v1", total_timesteps=64, quiet=True, final_episodes=0, **options).folder)
    text = command(capsys, run, run, "--states-of", "Pendulum-v1", "--env.kwargs", "g=30")
    assert "from Pendulum-v1 to Pendulum-v1 g=30" in text
    assert "A's 2 episodes tell errors but roughly: take more --steps" in text
    content = strict(command(capsys, run, run, "--json", "--states-of", "Pendulum-v1", "--env.kwargs", "g=30"))
    assert content["elsewhere"]["kwargs"] == {"g": 30}
    assert "elsewhere" not in strict(command(capsys, run, run, "--json"))
    for words, said in (
        (["--env.kwargs", "g=30"], "--env.kwargs goes with --states-of ENV, whose arguments they are"),
        (["--states-of", "Pendulum-v1", "--env.kwargs", "gee=3"], "does not fit Pendulum-v1"),
        (["--states-of", "Pendulum-v1", "--env.kwargs", "env=3", "count=4"], "does not fit Pendulum-v1"),
        (["--states-of", "Pendulum-v1", "--env.kwargs", "g"], "not of the form name=value"),
        (["--states-of", "Pendulm-v1"], "unknown env 'Pendulm-v1'"),
        (["--states-of", "CartPole-v1"], "CartPole-v1's observation space is Box("),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", run, run, *words, "--steps", "30", "--episodes", "2"])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
