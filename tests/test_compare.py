"""Two policies side by side: the divergences against hand-computed ones, the states, and what the command prints."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import klrl
from klrl.agents.ppo import PPO, PPOConfig
from klrl.agents.sac import SAC, SACConfig
from klrl.analysis.compare import draw, to_json, to_text
from klrl.analysis.comparison import CompareConfig, Comparison, compare_policies, divergences, summary
from klrl.analysis.visits import visit
from klrl.cli.main import main
from klrl.envs.make import EnvConfig, make_vector
from klrl.errors import NonFiniteError
from klrl.kl import js
from klrl.policies.distributions import DiagonalNormal, MultiCategorical
from klrl.training.load import LoadedPolicy, load_policy
from klrl.training.run import RunConfig

QUICK = CompareConfig(steps=40, episodes=2)
BOTH, LONG = "klrl/RewardByBoth-v0", "klrl/Truncation-v0"


def made(
    kind: Any, output: Any = None, env: str = BOTH, log_std: Any = None, seed: int = 0, **kwargs: Any
) -> LoadedPolicy:
    """A policy in a probe environment; with ``output`` it says the same at every state."""
    envs = make_vector(env, 1, EnvConfig(kwargs=kwargs))
    config = PPOConfig(hidden_sizes=(8,)) if kind is PPO else SACConfig(hidden_sizes=(8,), noise_correlation=0.5)
    agent = kind(envs.single_observation_space, envs.single_action_space, config, seed=seed)
    envs.close()
    with torch.no_grad():
        last = agent.policy.network.mlp.layers[-1]
        if output is not None:
            last.weight.zero_()
            last.bias.copy_(torch.as_tensor(output))
        else:
            last.weight.mul_(100)  # from the small initial differences between states to large ones
        if log_std is not None:
            agent.policy.head.log_std.copy_(torch.as_tensor(log_std))
    return LoadedPolicy("here", Path("here"), 7, agent, RunConfig(env=EnvConfig(kwargs=kwargs)), env)


def log(*probabilities: float) -> list[float]:
    return [math.log(p) if p else -math.inf for p in probabilities]


def everywhere(found: Comparison, expected: Any, tolerance: float = 1e-6) -> None:
    """All states, of both visitors, have the same forward KL, reverse KL and JS."""
    for part in found.visited:
        assert part.joint.shape == (3, QUICK.steps)
        for values, value in zip(part.joint, expected, strict=True):
            assert values.numpy() == pytest.approx(np.full(QUICK.steps, value), abs=tolerance)


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_categorical_divergences_are_those_by_hand() -> None:
    found = compare_policies(made(PPO, log(0.5, 0.25, 0.25)), made(PPO, log(0.8, 0.1, 0.1)), QUICK)
    forward = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.25 / 0.1)
    reverse = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.1 / 0.25)
    a = 0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.25 / 0.175)
    b = 0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.1 / 0.175)
    everywhere(found, (forward, reverse, (a + b) / 2))
    assert found.visited[0].js_stderr == 0
    assert found.states[0]["A"] == {"action": -1, "probability": pytest.approx(0.5)}  # the space starts at -1
    assert found.states[0]["B"] == {"action": -1, "probability": pytest.approx(0.8)}


def test_normal_divergences_are_those_by_hand_in_each_dimension() -> None:
    # The box of -1 to 3 has middle 1 and half width 2: an output 0.5 is the action 2.
    old = made(PPO, [0.0, 0.0], log_std=log(2.0, 2.0), action="box")
    new = made(PPO, [0.5, 0.0], log_std=log(2.0, 1.0), action="box")
    found = compare_policies(old, new, QUICK)
    by_hand = [(1 / 8, 1 / 8), (math.log(0.5) + 2 - 0.5, math.log(2) + 1 / 8 - 0.5)]
    for part in found.visited:
        for values, expected in zip(part.dimensions, by_hand, strict=True):
            assert values[:2].numpy() == pytest.approx(np.tile(np.array(expected)[:, None], QUICK.steps), abs=1e-6)
        assert part.dimensions[:, :2].sum(0).numpy() == pytest.approx(part.joint[:2].numpy())
        assert 0 < part.js_stderr < 0.01
    assert found.states[0]["B"] == {"action": [2.0, 1.0], "mean": [2.0, 1.0], "std": pytest.approx([2.0, 1.0])}


def test_squashed_policies_differ_as_their_normals_and_act_within_the_bounds() -> None:
    old, new = (made(SAC, [mean, 0.0, *log(0.5, 1.0)], action="box") for mean in (0.0, 1.0))
    found = compare_policies(old, new, QUICK)
    assert found.visited[1].joint[:2].numpy() == pytest.approx(np.full((2, QUICK.steps), 1 / (2 * 0.25)), abs=1e-5)
    assert found.states[0]["B"]["action"] == pytest.approx([1 + 2 * math.tanh(1), 1.0])
    assert found.states[0]["B"]["mean"] == [1.0, 0.0]


def test_a_product_of_categoricals_and_one_over_joint_actions_are_compared_jointly() -> None:
    first, second = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.9, 0.1])
    product = made(PPO, torch.cat([first, second]).log(), action="multidiscrete")
    same = made(SAC, torch.outer(first, second).flatten().log(), action="multidiscrete")
    everywhere(compare_policies(product, same, QUICK), (0, 0, 0))
    uniform = made(SAC, torch.zeros(6), action="multidiscrete")
    found = compare_policies(uniform, product, QUICK)
    expected = (-torch.log(6 * torch.outer(first, second))).mean()
    assert found.visited[0].joint[0].numpy() == pytest.approx(np.full(QUICK.steps, float(expected)), abs=1e-6)
    assert len(found.visited[0].dimensions) == 1
    assert found.states[0]["B"] == {"action": [0, 0], "probability": pytest.approx(0.45)}


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("action", ["discrete", "box", "multidiscrete", "multibinary"])
@pytest.mark.parametrize("observation", ["box", "dict", "discrete"])
def test_identical_policies_differ_by_exactly_nothing(kind: Any, action: str, observation: str) -> None:
    old, new = (made(kind, env=LONG, action=action, observation=observation) for _ in range(2))
    found = compare_policies(old, new, QUICK)
    for part in found.visited:
        assert float(part.joint.abs().max()) == float(part.dimensions.abs().max()) == part.js_stderr == 0
    assert found.returns[0] == found.returns[1]
    assert found.states == []
    assert to_text(found).endswith("they agree at every state")
    strict(to_json(found))


@pytest.mark.parametrize("kind", [PPO, SAC])
@pytest.mark.parametrize("action", ["discrete", "box", "multidiscrete", "multibinary"])
@pytest.mark.parametrize("observation", ["dict", "discrete"])
def test_swapping_the_policies_swaps_forward_and_reverse(kind: Any, action: str, observation: str) -> None:
    old, new = (made(kind, seed=seed, action=action, observation=observation) for seed in (0, 1))
    if kind is PPO and action == "box":  # of one width, normals have one KL both ways
        new.agent.policy.head.log_std.data -= 0.5
    found, swapped = compare_policies(old, new, QUICK), compare_policies(new, old, QUICK)
    assert found.returns == swapped.returns[::-1]
    for part, other in zip(found.visited, swapped.visited[::-1], strict=True):
        np.testing.assert_equal(part.obs, other.obs)
        assert torch.equal(part.joint[:2], other.joint[:2].flip(0))
        assert not torch.equal(part.joint[0], part.joint[1])
        assert part.dimensions[:, :2].sum(0).numpy() == pytest.approx(part.joint[:2].numpy())
        assert ((part.joint[2] > 0) & (part.joint[2] <= math.log(2) + 1e-6)).all()
        # One dimension's action tells less about who acted than the whole action does.
        excess = part.joint[2].mean() - part.dimensions[:, 2].mean(-1).max()
        assert excess > -6 * part.js_stderr - 1e-6


def test_sampled_js_of_normals_agrees_with_the_integral_within_its_standard_error() -> None:
    x = torch.linspace(-40, 40, 40_001, dtype=torch.float64)
    for shift, width in ((0.1, 1.0), (1.0, 0.5), (3.0, 2.0), (5.0, 1.0)):
        log_p, log_q = (torch.distributions.Normal(m, s).log_prob(x) for m, s in ((0.0, 1.0), (shift, width)))
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        exact = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum() * (x[1] - x[0])
        mean, log_std = torch.zeros(500, 1, dtype=torch.float64), torch.zeros(500, 1, dtype=torch.float64)
        values, stderr = divergences(
            DiagonalNormal(mean, log_std), DiagonalNormal(mean + shift, log_std + math.log(width))
        )
        assert 0 < stderr < 2e-3
        assert abs(float(values[2].mean()) - float(exact)) < 4 * stderr
        assert 0 <= float(values[2].min()) <= float(values[2].max()) <= math.log(2) + 1e-12


def test_js_of_more_joint_actions_than_can_be_written_out_is_sampled_and_agrees_with_the_exact_one() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 200, 17, 2, generator=generator, dtype=torch.float64)
    new[:, 3:] = old[:, 3:]  # 14 dimensions that tell nothing
    values, stderr = divergences(MultiCategorical(old), MultiCategorical(new))
    exact = js(MultiCategorical(old[:, :3]), MultiCategorical(new[:, :3])).mean()
    assert 0 < stderr < 5e-3
    assert abs(float(values[2].mean()) - float(exact)) < 4 * stderr
    assert torch.equal(values, divergences(MultiCategorical(old), MultiCategorical(new))[0])
    assert not torch.equal(values, divergences(MultiCategorical(old), MultiCategorical(new), seed=1)[0])


def test_an_action_that_only_one_policy_takes_is_an_infinite_kl_in_every_form(tmp_path: Path) -> None:
    found = compare_policies(made(PPO, log(0.5, 0.5, 0.0)), made(PPO, log(0.5, 0.0, 0.5)), QUICK)
    everywhere(found, (math.inf, math.inf, 0.5 * math.log(2)))
    content = strict(to_json(found))
    assert content["A"]["visited"]["forward"] == dict.fromkeys(("mean", "p5", "p50", "p95", "p99", "max"), "inf")
    assert content["disagreements"][0]["reverse"] == "inf"
    assert "inf" in to_text(found)
    figure = draw(found)
    assert [text.get_text() for text in figure.axes[1].texts] == ["inf", "inf"]
    figure.savefig(tmp_path / "figure.svg")


def test_quantiles_are_values_of_states_beside_infinite_ones() -> None:
    values = torch.tensor([*range(99), math.inf, math.inf], dtype=torch.float64)
    expected = {"mean": math.inf, "p5": 5.0, "p50": 50.0, "p95": 95.0, "p99": math.inf, "max": math.inf}
    assert summary(values) == expected


@pytest.mark.parametrize("kind", [PPO, SAC])
def test_visited_states_are_those_acted_on_and_the_agent_is_left_as_it_was(kind: Any) -> None:
    trained = made(kind, env=LONG, action="box")
    agent, envs = trained.agent, trained.make_envs(2)
    before, noise = agent.rng.bit_generator.state, getattr(agent, "noise", None)
    obs = visit(agent, envs, 24, seed=3).states
    # Episodes of five steps in each environment. Only the first state of each shows -1, and nobody acts on the final
    # one: that row resets.
    assert obs.shape == (24, 1)
    assert np.flatnonzero(obs == -1).tolist() == [0, 1, 10, 11, 20, 21]
    assert visit(agent, envs, 7, seed=3).states.tolist() == obs[:7].tolist()
    assert agent.rng.bit_generator.state == before
    assert getattr(agent, "noise", None) is noise
    assert getattr(noise, "last", None) is None


def test_visited_states_follow_from_the_seed_alone() -> None:
    trained = made(PPO, env="CartPole-v1")
    first, _, again, other = (visit(trained.agent, trained.make_envs(2), 20, seed).states for seed in (3, 5, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()
    trained.agent.rng.random()
    assert first.tolist() == visit(trained.agent, trained.make_envs(2), 20, 3).states.tolist()


def test_the_worst_states_are_distinct_sorted_and_say_who_visited_them() -> None:
    old, new = (made(PPO, seed=seed, observation="dict") for seed in (0, 1))
    states = compare_policies(old, new, QUICK).states
    assert sorted(state["obs"]["which"] for state in states) == [0, 1]
    assert states[0]["forward"] + states[0]["reverse"] > states[1]["forward"] + states[1]["reverse"]
    assert [state["visited_by"] for state in states] == [["A", "B"], ["A", "B"]]


def test_states_that_only_one_of_the_policies_reaches_are_told_apart() -> None:
    left, right = (made(PPO, logits, env="CartPole-v1") for logits in ([9.0, -9.0], [-9.0, 9.0]))
    found = compare_policies(left, right, QUICK)
    # All states differ alike, so those that A visited first come first: the first of each environment, which both saw.
    assert [state["visited_by"] for state in found.states] == [["A", "B"]] * 2 + [["A"]] * 8
    assert [state["step"] for state in found.states] == list(range(10))
    assert [state["obs"] for state in found.states] == found.visited[0].obs[:10].tolist()
    assert found.states[0]["forward"] == found.states[0]["reverse"] == pytest.approx(18 * math.tanh(9))


def test_a_policy_that_is_nan_is_named() -> None:
    with pytest.raises(NonFiniteError, match="new is a MultiCategorical with parameters that are nan"):
        compare_policies(made(PPO), made(PPO, [0.0, math.nan, 0.0]), QUICK)


def test_images_are_shown_by_their_shape() -> None:
    old, new = (made(PPO, seed=seed, observation="image") for seed in (0, 1))
    found = compare_policies(old, new, replace(QUICK, steps=8))
    assert strict(to_json(found))["disagreements"][0]["obs"] == {"shape": [36, 36, 1]}
    assert "shape 36 36 1" in to_text(found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Short runs, by name."""
    common = {
        "n_envs": 2,
        "eval_every": 0,
        "save_every": 32,
        "quiet": True,
        "run_dir": str(tmp_path_factory.mktemp("runs")),
    }
    ppo = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "hidden_sizes": (8,)}
    sac = {"learning_starts": 16, "hidden_sizes": (8,), "batch_size": 8, "buffer_size": 200, "kl": {"every": 32}}
    found = {}
    boxes = {"action": "box"}
    for name, agent, options, kwargs in (
        ("discrete", "ppo", ppo, {}),
        ("box", "ppo", ppo, boxes),
        ("dict", "ppo", ppo, {"observation": "dict"}),
        ("sac", "sac", sac, boxes),
    ):
        run = klrl.train(agent, LONG, total_timesteps=96, env={"kwargs": kwargs}, **options, **common)
        found[name] = str(run.folder)
    return found


def command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["compare", *words, "--steps", "30", "--episodes", "2"])
    return capsys.readouterr().out


def test_a_run_against_its_own_earlier_checkpoint(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    folders = sorted(str(path) for path in Path(runs["discrete"], "checkpoints").glob("step-*"))
    content = strict(command(capsys, folders[0], runs["discrete"], "--json"))
    assert content["A"]["step"] < content["B"]["step"] == load_policy(folders[-1]).step
    assert content["A"]["visited"]["forward"]["mean"] > 0
    assert content["A"]["return"]["returns"] == [5.0, 5.0]
    assert command(capsys, folders[0], runs["discrete"], "--json") == json.dumps(content) + "\n"
    text = command(capsys, folders[0], runs["discrete"]).splitlines()
    assert len(text) < 40
    assert text[0].startswith(f"A  {folders[0]}")
    assert sum(line.startswith("  KL(A||B)") for line in text) == 2
    same = strict(command(capsys, folders[-1], runs["discrete"], "--json"))
    assert {value for part in ("forward", "reverse", "js") for value in same["A"]["visited"][part].values()} == {0.0}


def test_a_figure_is_written_beside_the_text(runs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    earlier = min(str(path) for path in Path(runs["sac"], "checkpoints").glob("step-*"))
    assert "JS (sampled, mean +-" in command(capsys, earlier, runs["sac"], "--figure", "a.png")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    command(capsys, runs["discrete"], runs["discrete"], "--figure", "b.svg")
    assert "</svg>" in Path("b.svg").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("discrete", "box"), "action space is Box(-1.0, 3.0, (2,), float32), not"),
        (("discrete", "dict"), "observation space is Dict('number'"),
        (("box", "sac"), "no closed-form KL between a normal and a squashed normal policy"),
        (("discrete", "nowhere"), "no run or checkpoint at nowhere"),
        (("discrete", "discrete", "--env", "CartPole-v1"), ": CartPole-v1's observation space is Box("),
        (("discrete", "discrete", "--steps", "0"), "--steps must be at least 1 and at most 10000000, got 0"),
        (("discrete", "discrete", "--stps", "3"), "unknown option '--stps' (did you mean '--steps'?)"),
        (("discrete", "discrete", "--figure", "a.pdf"), "--figure a.pdf: must end in .png or .svg"),
        (("discrete", "discrete", "--figure", "no/a.png"), "--figure no/a.png: must end in .png or .svg and lie in"),
        (("discrete",), "compare needs two runs or checkpoints"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(
    runs: dict[str, str], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *(runs.get(word, word) for word in words)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err


def test_without_matplotlib_only_a_figure_is_refused(
    runs: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name == "klrl.analysis.plots"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "agree at every state" in command(capsys, runs["discrete"], runs["discrete"])
    with pytest.raises(SystemExit) as stop:
        main(["compare", runs["discrete"], runs["discrete"], "--figure", "a.png"])
    assert stop.value.code == 2
    assert 'pip install "klrl[plot]"' in capsys.readouterr().err
