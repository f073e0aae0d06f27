"""Policies under action masks: probabilities, KL, entropy and gradients of what remains, exactly."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from masked import Picky
from torch import Tensor

import klrl
from klrl import PPO, TRPO, ActionMasks, Governed, UsageError
from klrl.agents.fused import FusedPolicy, Rows, suits
from klrl.agents.on_policy import Batch
from klrl.agents.ppo import policy_loss
from klrl.envs.make import EnvConfig, make_vector
from klrl.kl import Clip, Gate, KLLimit, at_most, fisher_vector_product, freeze, kl, reverse_kl
from klrl.kl.parameters import parameters_of
from klrl.policies.encoder import ObservationEncoder
from klrl.policies.jacobian import jacobian
from klrl.policies.parameters import gradients
from klrl.policies.spaces import mask_sizes

SEEN = spaces.Box(-np.inf, np.inf, (3,), np.float32)
SIZES = {"one": [6], "padded": [2, 4, 3], "even": [3, 3]}


def spaces_of(sizes: list[int]) -> tuple[Any, Any]:
    actions = spaces.Discrete(sizes[0]) if len(sizes) == 1 else spaces.MultiDiscrete(sizes)
    return spaces.Dict({"observation": SEEN, "action_mask": spaces.MultiBinary(sum(sizes))}), actions


def seen(sizes: list[int], rows: int) -> dict[str, Any]:
    """Random observations, whose masks leave each categorical something."""
    rng = np.random.default_rng(0)
    mask, start = rng.random((rows, sum(sizes))) < 0.5, 0
    for n in sizes:
        mask[np.arange(rows), start + rng.integers(n, size=rows)] = True
        start += n
    return {"observation": rng.normal(size=(rows, 3)).astype(np.float32), "action_mask": mask.astype(np.int8)}


def agent_of(sizes: list[int], kind: Any = PPO, seed: int = 0, **options: Any) -> Any:
    agent = kind(*spaces_of(sizes), {"hidden_sizes": (8,), **options}, seed=seed)
    agent.policy_params.flat.add_(torch.randn(agent.policy_params.flat.shape, generator=torch.manual_seed(seed)))
    return agent


def set_logits(agent: Any, *logits: float) -> None:
    """Let all weights be zero, and the last biases ``logits``."""
    agent.policy_params.flat.zero_()
    agent.policy_params.flat[-len(logits) :] = torch.tensor(logits)


def test_kl_and_entropy_of_what_is_allowed_by_hand() -> None:
    old, new = agent_of([4]), agent_of([4])
    set_logits(old, 0.0, 9.0, math.log(3), 0.0)
    set_logits(new, 0.0, -7.0, 0.0, 0.0)
    obs = {"observation": np.zeros((1, 3), np.float32), "action_mask": np.array([[1, 0, 1, 0]])}
    before, after = (agent.distribution(obs) for agent in (old, new))
    assert before.probs[0, 0].tolist() == pytest.approx([0.25, 0, 0.75, 0])
    assert before.probs[0, 0, [1, 3]].tolist() == [0, 0], "exactly"
    assert after.probs[0, 0].tolist() == pytest.approx([0.5, 0, 0.5, 0])
    assert float(after.entropy()) == pytest.approx(math.log(2))
    assert float(before.entropy()) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert float(kl(before, after)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert float(reverse_kl(before, after)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))
    assert float(kl(before, before)) == 0


def test_what_allows_nothing_allows_all_and_one_allowed_action_is_certain() -> None:
    agent = agent_of([2, 3])
    obs = {"observation": np.zeros((2, 3)), "action_mask": np.array([[0, 0, 0, 1, 0], [1, 1, 1, 1, 1]])}
    policy, free = agent.distribution(obs).probs
    assert torch.equal(policy[0], free[0])
    assert policy[1].tolist() == [0, 1, 0]
    assert set(agent.act({key: part[[0] * 200] for key, part in obs.items()})[:, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_actions_obey_on_every_way_to_them(sizes: list[int]) -> None:
    obs = seen(sizes, 400)
    allowed = np.split(obs["action_mask"], np.cumsum(sizes)[:-1], axis=-1)
    images = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    other = PPO(spaces.Dict({"seen": images, "action_mask": spaces.MultiBinary(sum(sizes))}), spaces_of(sizes)[1])
    assert not other.encoder.plain
    pictures = {"seen": np.zeros((50, 40, 40, 3), np.uint8), "action_mask": obs["action_mask"][:50]}
    plain = agent_of(sizes, TRPO, normalize_observation=False)
    for agent, shown in ((agent_of(sizes), obs), (plain, obs), (other, pictures)):
        for deterministic in (False, True):
            actions = agent.act(shown, deterministic)
            for action, mask in zip(actions.T, allowed, strict=True):
                assert mask[np.arange(len(action)), action].all()
        outputs = torch.from_numpy(agent.policy.outputs(shown))
        assert torch.allclose(agent.policy.head(outputs).probs, agent.distribution(shown).probs, atol=1e-6)
        assert (agent.distribution(shown).sample((20,)) >= 0).all()


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradients_by_hand_are_autograds(sizes: list[int], direction: Any) -> None:
    agent, rows = agent_of(sizes), 40
    agent.policy.double()
    params = type(agent.policy_params)(agent.policy, "policy")
    inputs = agent.encoder(seen(sizes, rows))
    inputs["vector"] = inputs["vector"].double()
    with torch.no_grad():
        old = freeze(agent.policy(inputs))
        action = old.sample()
        for weight in agent.policy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, dtype=weight.dtype, generator=torch.manual_seed(1)))
    rng = np.random.default_rng(3)
    advantage, zero = torch.from_numpy(rng.normal(size=rows)), torch.zeros(rows, dtype=torch.float64)
    weight = torch.full((rows,), 1 / rows, dtype=torch.float64)
    batch = Batch(inputs, old, action, old.log_prob(action), zero, advantage, zero, weight)
    limit = KLLimit(at_most(0.02), direction=direction, coef=2.0, rules=[Clip(0.2), Gate(0.05)])
    assert suits(agent.policy, params)
    loss, surrogate = policy_loss(agent.policy(inputs), batch, limit, ent_coef=0.3)
    found, gradient = FusedPolicy(agent.policy).gradient(Rows.of(batch), limit, 0.3)
    wanted = gradients(loss, params)
    assert wanted.isfinite().all()
    assert wanted.abs().max() > 1e-3
    assert torch.allclose(found, surrogate.detach(), rtol=1e-9)
    assert torch.allclose(gradient, wanted, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_natural_gradients_products_are_finite_and_autograds(sizes: list[int]) -> None:
    agent = agent_of(sizes, TRPO)
    inputs, params = agent.encoder(seen(sizes, 40)), agent.policy_params
    policy, push, pull = FusedPolicy(agent.policy).linearize(inputs, params)
    same = agent.policy(inputs)
    push_by_autograd, pull_by_autograd = jacobian(parameters_of(same), params)
    direction = torch.randn(params.flat.shape, generator=torch.manual_seed(0))
    products = []
    for dist, forth, back in ((policy, push, pull), (same, push_by_autograd, pull_by_autograd)):
        moved = [part.detach() for part in fisher_vector_product(dist, *forth(direction))]
        products.append(back(moved))
        assert (moved[0][parameters_of(dist)[0] == -math.inf] == 0).all()
    assert products[0].isfinite().all()
    assert torch.allclose(*products, rtol=1e-4, atol=1e-5)


OPTIONS: dict[str, Any] = {
    "penalty": {"kl": {"penalty": "adaptive", "direction": "reverse"}},
    "gate": {"kl": {"per_state": "gate", "state_limit": 1e-3}},
    "project": {"kl": {"per_state": "project", "state_limit": 1e-3}},
    "spo": {"clip_rule": "spo"},
    "uniform": {"reference": {"run": "uniform", "target": 0.01}},
    "forward": {"reference": {"run": "uniform", "target": 0.01, "direction": "forward"}},
    "bottleneck": {"bottleneck": {"size": 2}},
    "bayesian": {"critic": "bayesian"},
    "trpo": {},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sizes", [[6], [4, 2]], ids=["one", "padded"])
def test_every_rule_learns_and_holds(name: str, sizes: list[int]) -> None:
    env = make_vector(lambda: Picky(sizes), 4, EnvConfig())
    kind: Any = TRPO if name == "trpo" else PPO
    options = {"n_steps": 64, "hidden_sizes": (8,), **OPTIONS[name]}
    agent = kind(env.single_observation_space, env.single_action_space, options)
    buffer, results = agent.new_buffer(4), []
    obs, _ = env.reset(seed=0)
    while len(results) < 3:
        action, last = agent.act(obs), obs
        obs, reward, terminated, truncated, _ = env.step(agent.env_action(action))
        buffer.add(last, action, reward, terminated, truncated, obs)
        results += [agent.update(buffer)] if buffer.full else []
    for result in results:
        assert all(math.isfinite(figure) for figure in result.metrics.values())
        assert 0 < result.kl.mean <= agent.config.kl.target
    assert not any(result.metrics.get("reference/kl", 0) > 0.01 for result in results)


def test_a_network_that_is_shared_obeys() -> None:
    agent = agent_of([6], share_network=True)
    inputs = agent.encoder(seen([6], 20))
    shared, whole = agent.policy(agent.critic.seen(inputs)), agent.policy(inputs)
    assert torch.equal(shared.logits, whole.logits)
    assert (shared.probs == 0).any()


def test_predict_takes_masks_that_could_be_an_environments() -> None:
    agent, masks = agent_of([3]), np.eye(3, dtype=np.int8)
    shown = np.zeros((3, *agent.encoder.space.shape), np.float32)
    assert agent.predict(shown, action_masks=masks)[0].tolist() == [0, 1, 2]
    for wrong, says in ((masks * 0, "no action is allowed"), (masks * 0.5, "expected 0 or 1"), (masks[:, :2], "of 3")):
        with pytest.raises(UsageError, match=says):
            agent.predict(shown, action_masks=wrong)
    with pytest.raises(UsageError, match="may be given to predict as action_masks="):
        agent.predict(shown)


def test_a_reference_a_governor_and_a_student_obey() -> None:
    quick: dict[str, Any] = {"total_timesteps": 500, "n_envs": 4, "n_steps": 64, "eval_every": 0, "quiet": True}
    first = klrl.train("ppo", "Picky-v0", **quick, hidden_sizes=(8,))
    Picky.crimes = 0
    reference = {"run": str(first.folder), "target": 0.1}
    for agent in ("ppo", "trpo"):
        other = klrl.train(agent, "Picky-v0", **quick, reference=reference, init_from=str(first.folder))
    student = klrl.distill(first.folder, hidden_sizes=(4,), **quick)
    assert Picky.crimes == 0
    obs = seen([6], 200)
    governed = Governed(other.agent, first.agent, 1e-4)
    for one in (governed, Governed(other.agent, "uniform", 1e-4)):
        for rows in (slice(None), slice(1)):
            some = {key: part[rows] for key, part in obs.items()}
            assert np.take_along_axis(some["action_mask"], one.act(some), 1).all()
    assert float(reverse_kl(first.agent.distribution(obs), governed.distribution(obs)).max()) < 1.01e-4
    assert (student.agent.distribution(obs).probs[:, 0][torch.from_numpy(obs["action_mask"]) == 0] == 0).all()


@pytest.mark.parametrize("few", [1, 50])
def test_thousands_of_actions_of_which_few_are_allowed(few: int) -> None:
    agent, rng = agent_of([5000], n_steps=16, batch_size=64, n_epochs=2), np.random.default_rng(0)
    buffer, no = agent.new_buffer(8), np.zeros(8, bool)

    def show() -> dict[str, Any]:
        mask = np.zeros((8, 5000), np.int8)
        mask[:, rng.choice(5000, few, replace=False)] = 1
        return {"observation": rng.normal(size=(8, 3)).astype(np.float32), "action_mask": mask}

    obs = show()
    assert float(agent.distribution(obs).entropy().max()) <= math.log(few) + 1e-5
    while not buffer.full:
        action, last, obs = agent.act(obs), obs, show()
        assert np.take_along_axis(last["action_mask"], action, 1).all()
        buffer.add(last, action, rng.normal(size=8), no, no, obs)
    result = agent.update(buffer)
    assert math.isfinite(result.metrics["health/grad_norm"])
    assert result.kl.mean == 0 if few == 1 else 0 < result.kl.mean <= 0.02


def test_what_is_a_mask() -> None:
    observation, actions = spaces_of([2, 3])
    assert mask_sizes(observation, actions) == [2, 3]
    assert mask_sizes(observation, spaces.MultiBinary(3)) == []
    assert mask_sizes(observation, spaces.Box(-1, 1, (5,))) == []
    assert mask_sizes(SEEN, actions) == []
    assert mask_sizes(ActionMasks(Picky()).observation_space, spaces.Discrete(6)) == [6]
    encoder = ObservationEncoder(observation, torch.device("cpu"), normalize=True, sizes=[2, 3])
    assert encoder.features == 3
    assert encoder.space == SEEN
    inputs = encoder.probe()
    assert inputs["action_mask"].all()
    assert set(inputs) == {"vector", "action_mask"}
    with pytest.raises(UsageError, match="is but an action mask"):
        ObservationEncoder(spaces.Dict({"action_mask": observation["action_mask"]}), torch.device("cpu"), True, (), [5])


def test_hidden_from_networks_and_kept_with_the_parts_that_a_student_sees() -> None:
    parts = spaces.Dict({"a": SEEN, "b": SEEN, "action_mask": spaces.MultiBinary(6)})
    student = klrl.Student(parts, spaces.Discrete(6), {"observation_keys": ("a",)})
    obs = {"a": np.zeros((4, 3)), "b": np.zeros((4, 3)), "action_mask": np.eye(6)[:4]}
    assert student.predict(obs)[0].tolist() == [0, 1, 2, 3]
    agent = agent_of([6])
    one, other = seen([6], 5), seen([6], 5)
    other["action_mask"] = 1 - other["action_mask"]
    values: list[Tensor] = [agent.value(obs) for obs in (one, other)]
    assert torch.equal(*values)
