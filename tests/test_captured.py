"""CUDA graphs: steps that are recorded and repeated are those that are taken, and wait for nothing.

On a CPU a stand-in does the operations again that it recorded, on the tensors that it recorded them with.
"""

import copy
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import collect
from recording import BOX, Stand, by_torch, everything, ppo, sac, to_meta, waits
from torch import distributions as td

from klrl import PPO, PPOConfig, SACConfig
from klrl.agents.limits import KLConfig, OffPolicyKLConfig
from klrl.agents.reference import ReferenceConfig
from klrl.envs.make import EnvConfig, make_vector
from klrl.kl import Clip, Ranks, kl
from klrl.kl.state import may_look, without_looking
from klrl.policies.distributions import MultiCategorical
from klrl.training.captured import captured, mapped
from klrl.training.randomness import random_state


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch(monkeypatch)


# What PPO's steps are made of; each with options that those of the others do not have.
STEPS: dict[str, dict[str, Any]] = {
    "clip": {"kl": KLConfig(stop=50.0)},
    "penalty": {"clip_range": 0.0, "kl": KLConfig(penalty="adaptive", influence=2.0, stop=50.0)},
    "gate": {"kl": KLConfig(per_state="gate", state_limit=1e-4, stop=50.0)},
    "project": {"clip_range": 0.0, "kl": KLConfig(per_state="project", state_limit=1e-3, stop=50.0)},
    "reverse": {
        "ent_coef": 0.01,
        "kl": KLConfig(per_state="reverse", state_limit=1e-3, direction="reverse", stop=50.0),
    },
    "spo": {"clip_rule": "spo", "clip_range_vf": 0.2, "clip_grads_apart": True, "critic": "bayesian"},
    "shared": {"share_network": True, "critic_learning_rate": 1e-3, "kl": KLConfig(stop=1e-9)},
    "beta": {"head": "beta", "kl": KLConfig(penalty="adaptive", stop=50.0)},
}


@pytest.mark.parametrize("step", STEPS)
def test_ppo_repeats_the_steps_that_it_would_take(
    step: str, as_on_a_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    env = make_vector("Pendulum-v1" if step in ("beta", "reverse", "spo") else "CartPole-v1", 4, EnvConfig())
    stand, ended = Stand(), []
    for how in (without_looking(), captured):
        agent, buffer = ppo(env, PPOConfig(n_steps=32, batch_size=28, n_epochs=3, **STEPS[step]))
        with captured(agent, stand) if how is captured else how:  # type: ignore[attr-defined]
            results = [agent.update(buffer) for _ in range(2)]  # 15 steps of two sizes each, from two old policies
        ended.append((everything(agent), [result.metrics for result in results]))
    assert torch.equal(ended[0][0], ended[1][0])
    assert ended[0][1] == ended[1][1]
    assert stand.recorded == (4 if step == "shared" else 2)  # where the critic goes on alone
    assert stand.repeated == 30
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("action", [spaces.Box(-1, 1, (2,)), spaces.Discrete(3)])
def test_sac_repeats_the_steps_that_it_would_take(
    action: spaces.Space[Any], layer_norm: bool, as_on_a_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stand, ended = Stand(), []
    rules = OffPolicyKLConfig(target=1e-4, every=40, stop=1.5, check="minibatch", per_state="gate")
    config = SACConfig(learning_starts=1, gradient_steps=40, batch_size=16, layer_norm=layer_norm, kl=rules)
    for how in (without_looking(), captured):
        agent, buffer = sac(action, config)
        with captured(agent, stand) if how is captured else how:  # type: ignore[attr-defined]
            result = agent.update(buffer)
        assert result is not None
        assert 0 < result.kl.stopped_at < 40
        ended.append((everything(agent), result.metrics))
    assert torch.equal(ended[0][0], ended[1][0])
    assert ended[0][1] == ended[1][1]
    assert (stand.recorded, stand.repeated) == (2, 40)  # with the policy, and once it has stopped without
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("step", ["clip", "gate", "reverse"])
def test_an_update_of_ppo_waits_once_an_epoch(step: str, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    env, found = make_vector("Pendulum-v1", 4, EnvConfig()), []
    for batch_size, n_epochs in ((64, 2), (16, 2), (16, 3)):
        agent, buffer = ppo(env, PPOConfig(n_steps=32, batch_size=batch_size, n_epochs=n_epochs, **STEPS[step]))
        learn = agent._learn

        def counted(*args: Any, _learn: Any = learn) -> Any:
            with waits(monkeypatch) as counts:
                trace = _learn(*args)
            found.append(counts.total())
            return trace

        with without_looking(), monkeypatch.context() as patch:
            patch.setattr(agent, "_learn", counted)
            agent.update(buffer)
    assert found[0] == found[1], "more minibatches, and as many waits"
    assert found[2] <= found[1] + 2, "for its rows' order and its KL, once an epoch"


@pytest.mark.parametrize("step", [*STEPS, "reference"])
def test_the_steps_of_ppo_look_at_no_number_and_stay_on_one_device(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = STEPS.get(step, {"reference": ReferenceConfig(run="uniform", target=0.5)})
    env = make_vector("Pendulum-v1" if step in ("beta", "reverse") else "CartPole-v1", 4, EnvConfig())
    agent, buffer = ppo(env, PPOConfig(n_steps=16, **more))
    batch = mapped(agent.make_batch(buffer), lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x)
    to_meta(agent, monkeypatch)
    with torch.no_grad(), without_looking():
        assert agent._step(batch, torch.empty((), device="meta")).is_meta
        agent._critic_step(batch, torch.empty(2, device="meta"))


@pytest.mark.parametrize("rule", ["none", "reverse", "project"])
@pytest.mark.parametrize("action", [spaces.Box(-1, 1, (2,)), spaces.Discrete(3)])
def test_the_steps_of_sac_look_at_no_number_and_stay_on_one_device(
    action: spaces.Space[Any], rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, buffer = sac(action, SACConfig(kl=OffPolicyKLConfig(target=1.0, per_state=rule), hidden_sizes=(8, 8)))
    agent._begin_window(buffer)
    given = buffer.sample(16, agent.rng, agent.device), agent.actions.draw_noise(agent.rng, 16), torch.zeros(())
    args = mapped(given, lambda x: x.to("meta"))
    to_meta(agent, monkeypatch)
    with torch.no_grad(), without_looking():
        for moves in (True, False):
            assert agent._step(*args, moves=moves).is_meta


FAMILIES: list[Callable[[torch.Tensor], td.Distribution]] = [
    lambda x: td.Normal(x, x.exp()),
    lambda x: td.Categorical(logits=40 * x),
    lambda x: td.Bernoulli(logits=x),
    lambda x: td.Beta(x.exp(), 1 + x.exp()),
    lambda x: MultiCategorical(x.unsqueeze(1)),
    lambda x: td.MultivariateNormal(x, scale_tril=torch.eye(5) * x.exp().unsqueeze(-1)),
]


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_a_kl_that_may_not_look_is_the_same(family: int, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0))
    looked, again = ([FAMILIES[family](x) for x in (first, first + 0.01 * second)] for _ in range(2))
    with without_looking(), waits(monkeypatch) as counts:
        found = kl(*again)
    assert not counts
    torch.testing.assert_close(found, kl(*looked), rtol=1e-6, atol=1e-12)


def test_waiting_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    with waits(monkeypatch) as counts:
        bool((x > 0).all()), float(x.sum()), x[x > 0], x.cpu(), x.tolist(), x[0], x[1:].sum(), torch.tensor(1)
    assert counts == {"_local_scalar_dense": 2, "index": 1, "cpu": 1, "tolist": 1, "lift_fresh": 1}


class Noisy(torch.nn.Linear):
    """Draws on the CPU, which no graph repeats."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.1 * torch.rand(len(x), 1)


def refusing(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    run()
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


@pytest.mark.parametrize(
    ("network", "record", "why"),
    [
        (Noisy(4, 8), Stand(), "RuntimeError: it draws random numbers on the CPU"),
        (torch.nn.Linear(4, 8), refusing, "RuntimeError: operation not permitted"),
    ],
)
def test_what_cannot_be_recorded_goes_on_as_it_was_and_says_so(
    network: torch.nn.Module, record: Any, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    env, ended = make_vector("CartPole-v1", 4, EnvConfig()), []
    for records in (False, True):
        torch.manual_seed(0)
        agent, buffer = ppo(env, PPOConfig(n_steps=32, batch_size=64), network=network)
        torch.manual_seed(0)
        with captured(agent, record) if records else without_looking():
            agent.update(buffer)
        ended.append(everything(agent))
    assert torch.equal(*ended)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"klrl: CUDA graphs: step goes on without: {why}")


def test_what_fails_without_a_graph_fails_in_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(PPO):
        Config = PPOConfig

        def _step(self, *args: Any) -> torch.Tensor:
            raise ZeroDivisionError("mine")

    env = make_vector("CartPole-v1", 4, EnvConfig())
    agent = Failing(env.single_observation_space, env.single_action_space, PPOConfig(n_steps=32))
    buffer = agent.new_buffer(4)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    with captured(agent, Stand()), pytest.raises(ZeroDivisionError, match="mine"):
        agent.update(buffer)
    assert capsys.readouterr().err == ""


def test_weights_that_are_frozen_and_options_that_change_are_recorded_anew(as_on_a_gpu: None) -> None:
    env, ended = make_vector("CartPole-v1", 4, EnvConfig()), []
    stand = Stand()
    for how in (without_looking(), captured):
        agent, buffer = ppo(env, PPOConfig(n_steps=32, batch_size=64, n_epochs=2))
        with captured(agent, stand) if how is captured else how:  # type: ignore[attr-defined]
            agent.update(buffer)
            next(agent.policy.parameters()).requires_grad_(False)
            agent.update(buffer)
            agent.update(buffer)
            agent.config = replace(agent.config, ent_coef=0.1)
            agent.update(buffer)
            agent.limit.rules[0] = Clip(0.01)
            agent.update(buffer)
        ended.append(everything(agent))
    assert torch.equal(*ended)
    assert stand.recorded == 4


def test_one_thread_that_may_not_look_leaves_others_alone() -> None:
    seen = []
    with without_looking():
        other = Thread(target=lambda: seen.append(may_look()))
        other.start()
        other.join()
        assert (seen, may_look()) == ([True], False)
    assert may_look()


def test_nothing_is_recorded_on_a_cpu_with_ranks_or_with_a_memory() -> None:
    agent = PPO(BOX, spaces.Discrete(2))
    with captured(agent):
        assert "_step" not in vars(agent)
    with captured(agent, Stand()):
        assert set(agent.captures) <= vars(agent).keys()
    assert not set(agent.captures) & vars(agent).keys()
    for options in ({"memory": "gru"}, {"bottleneck": {"size": 4}}):
        assert PPO(BOX, spaces.Discrete(2), options).captures == ()
    agent.ranks = Ranks()
    agent.ranks.size = 2
    with captured(agent, Stand()):
        assert agent._step.record is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
def test_a_copy_of_an_agent_that_learns_takes_its_own_steps(copied: Any, as_on_a_gpu: None) -> None:
    env = make_vector("CartPole-v1", 4, EnvConfig())
    agent, buffer = ppo(env, PPOConfig(n_steps=32, batch_size=64, n_epochs=2))
    with captured(agent, Stand()):
        agent.update(buffer)
        twin = copied(agent)
        before = everything(agent)
        twin.update(buffer)
        assert torch.equal(everything(agent), before)
        agent.update(buffer)
    assert torch.equal(everything(agent), everything(twin))


def test_a_recording_moves_no_generator(as_on_a_gpu: None) -> None:
    env = make_vector("CartPole-v1", 4, EnvConfig())
    agent, buffer = ppo(env, PPOConfig(n_steps=32, batch_size=128, n_epochs=1))

    def drawing(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        outputs = run()
        torch.rand(()), np.random.random(), random.random(), agent.rng.random()
        return (lambda: None), outputs

    with captured(agent, drawing):
        state, before, rng = random_state(), everything(agent), agent.rng.bit_generator.state
        batch = agent.make_batch(buffer)
        agent._step(batch, torch.tensor(0.1))
    assert torch.equal(random_state()["torch"], state["torch"])
    assert random_state()["numpy"] == state["numpy"]
    assert random_state()["python"] == state["python"]
    assert agent.rng.bit_generator.state == rng
    assert not torch.equal(everything(agent), before), "it was taken without a recording, once"
