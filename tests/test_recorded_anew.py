"""CUDA graphs, where something beside their arguments changes: steps are recorded anew, or taken as they are."""

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import collect
from recording import BOX, Stand, by_torch, everything, ppo, sac

from klrl import PPO, PPOConfig, SACConfig
from klrl.agents.limits import OffPolicyKLConfig
from klrl.envs.make import EnvConfig, make_vector
from klrl.kl import at_most
from klrl.kl.state import without_looking
from klrl.training.captured import captured


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch(monkeypatch)


def _faster(agent: Any) -> None:
    agent.learning_rate = torch.tensor(1e-2)


def _firmer(agent: Any) -> None:
    agent.limit.influence = 0.5


def _tighter(agent: Any) -> None:
    agent.limit.penalty.bound = at_most(1e-6)


@pytest.mark.parametrize("change", [_faster, _firmer, _tighter])
def test_what_somebody_replaces_between_two_updates_is_recorded_anew(change: Any, as_on_a_gpu: None) -> None:
    rules = OffPolicyKLConfig(target=1e-3, every=40, stop=0.0, influence=2.0)
    stand, ended = Stand(), []
    for how in (without_looking(), captured):
        agent, buffer = sac(BOX, SACConfig(learning_starts=1, gradient_steps=40, batch_size=16, kl=rules))
        with captured(agent, stand) if how is captured else how:  # type: ignore[attr-defined]
            agent.update(buffer)
            change(agent)
            agent.update(buffer)
        ended.append(everything(agent))
    assert torch.equal(*ended)
    assert stand.recorded == 2


def test_a_network_that_somebody_hooked_into_is_not_recorded(
    as_on_a_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    env, calls = make_vector("CartPole-v1", 4, EnvConfig()), []
    agent, buffer = ppo(env, PPOConfig(n_steps=32, batch_size=64, n_epochs=3))
    with captured(agent, stand := Stand()):
        agent.critic.network.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
        agent.update(buffer)
    assert len(calls) >= 6
    assert stand.recorded == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "klrl: CUDA graphs: step goes on without: somebody hooked in, whose Python a graph would leave out"


def test_blocks_within_each_other_and_odd_results_do_no_harm(as_on_a_gpu: None) -> None:
    class Odd(PPO):
        Config = PPOConfig

        def _step(self, *args: Any) -> Any:
            return super()._step(*args), {1}

    env = make_vector("CartPole-v1", 4, EnvConfig())
    agent = Odd(env.single_observation_space, env.single_action_space, PPOConfig(n_steps=32))
    buffer = agent.new_buffer(4)
    collect(agent, env, buffer, env.reset(seed=0)[0])
    with captured(agent, Stand()), captured(agent, Stand()):
        assert agent._step(agent.make_batch(buffer), torch.tensor(0.1))[1] == {1}
    assert not set(agent.captures) & vars(agent).keys()


def test_what_a_step_was_recorded_with_is_not_freed(as_on_a_gpu: None) -> None:
    agent, buffer = sac(BOX, SACConfig(learning_starts=1, gradient_steps=40, batch_size=16))
    with captured(agent, Stand()):
        agent.update(buffer)
        kept = weakref.ref(agent.learning_rate)
        _faster(agent)
        agent.update(buffer)
        assert kept() is not None, "a graph reads it where it lies"
    gc.collect()
    assert kept() is None
