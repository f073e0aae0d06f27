"""One measurement: how many environment steps per second klrl or a peer collects and learns from.

Run by versus.py in a process of its own, as ``python tests/benchmarks/peers.py NAME WORK``, WORK one of versus.WORKS as
JSON. Imports, construction and a warm-up do not count. All have separate networks for policy and critic, 64x64 tanh for
PPO and TRPO and 256x256 relu for SAC, which has twin critics; float32 and one torch thread; room for a million
transitions; and environments that are stepped in this process, which for these is faster than worker processes (so
tianshou's DummyVectorEnv rather than its SubprocVectorEnv or ShmemVectorEnv). klrl writes its logs and its exact KL,
peers log nothing.
"""

import importlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode

Advance = Callable[[int], int]
"""Makes about that many environment steps, learning from them, and says how many."""


def timed(advance: Advance, warm_up: int, steps: int) -> float:
    """Steps per second after the warm-up."""
    advance(warm_up)
    start = time.perf_counter()
    done = advance(steps)
    return done / (time.perf_counter() - start)


def klrl(
    agent: str, env: str, warm_up: int, steps: int, klrl_options: dict[str, Any] | None = None, **options: Any
) -> float:
    """``klrl.train``, from the first logged update after the warm-up to the last but one.

    The last one's time has the final evaluation in it. Rows that only reset an environment are not steps.
    ``klrl_options``: what peers have no option for.
    """
    import klrl

    kl = {"ppo": {"stop": 0.0, "check": "update"}, "trpo": {}, "sac": {"every": 1000}}[agent]
    with tempfile.TemporaryDirectory() as folder:
        options |= {"run_dir": folder, "total_timesteps": warm_up + steps, "eval_every": 0, "quiet": True, "kl": kl}
        options |= klrl_options or {}
        run = klrl.train(agent, env, **options)
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last, _ = (row for row in rows if row["step"] >= warm_up)
    return float((last["step"] - first["step"]) / (last["wall"] - first["wall"]))


def sb3(agent: str, env: str, n_envs: int, **options: Any) -> Advance:
    """Stable-Baselines3's and sb3-contrib's ``learn``, with the networks that are their defaults."""
    from stable_baselines3.common.env_util import make_vec_env

    library = importlib.import_module("sb3_contrib" if agent == "trpo" else "stable_baselines3")
    model = getattr(library, agent.upper())("MlpPolicy", make_vec_env(env, n_envs), device="cpu", **options)

    def advance(steps: int) -> int:
        before = model.num_timesteps
        model.learn(steps, reset_num_timesteps=False)
        return int(model.num_timesteps - before)

    return advance


def skrl(agent: str, env: str, n_envs: int, batch_size: int, **options: Any) -> Advance:
    """skrl's sequential trainer, with models from its instantiators, which are as fast as ones written by hand.

    SAME_STEP autoreset, as skrl would take rows that only reset an environment for steps. SAC samples with replacement,
    as the others do and as is faster; its policy does less than the others': a clipped normal whose spread does not
    depend on the state.
    """
    from skrl.agents.torch.ppo import PPO
    from skrl.agents.torch.sac import SAC
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.trainers.torch import SequentialTrainer
    from skrl.utils.model_instantiators.torch import categorical_model, deterministic_model, gaussian_model

    logging.getLogger("skrl").setLevel(logging.ERROR)
    quiet = {"experiment": {"write_interval": 0, "checkpoint_interval": 0}}
    same_step = {"autoreset_mode": AutoresetMode.SAME_STEP}
    made: Any = gym.make(env) if n_envs == 1 else gym.make_vec(env, n_envs, "sync", vector_kwargs=same_step)
    envs = wrap_env(made, verbose=False)
    spaces = {"observation_space": envs.observation_space, "action_space": envs.action_space, "device": "cpu"}

    def layers(inputs: str, width: int, activation: str) -> dict[str, Any]:
        net = {"name": "net", "input": inputs, "layers": [width, width], "activations": activation}
        return {**spaces, "network": [net]}

    def ppo(n_steps: int, n_epochs: int) -> Any:
        net = layers("OBSERVATIONS", 64, "tanh")
        policy, value = categorical_model(**net, output="ACTIONS"), deterministic_model(**net, output="ONE")
        memory = RandomMemory(memory_size=n_steps, num_envs=n_envs, device="cpu")
        minibatches = n_envs * n_steps // batch_size
        config = {"rollouts": n_steps, "learning_epochs": n_epochs, "mini_batches": minibatches, "value_clip": 0.0}
        return PPO(models={"policy": policy, "value": value}, memory=memory, cfg={**config, **quiet}, **spaces)

    def sac(**_: Any) -> Any:
        output = f"{envs.action_space.high[0]} * tanh(ACTIONS)"
        models = {"policy": gaussian_model(**layers("OBSERVATIONS", 256, "relu"), clip_actions=True, output=output)}
        for name in ("critic_1", "critic_2", "target_critic_1", "target_critic_2"):
            net = layers("concatenate([OBSERVATIONS, ACTIONS])", 256, "relu")
            models[name] = deterministic_model(**net, output="ONE")
        memory = RandomMemory(memory_size=1_000_000, num_envs=n_envs, device="cpu", replacement=True)
        return SAC(models=models, memory=memory, cfg={"batch_size": batch_size, **quiet}, **spaces)

    learners: dict[str, Callable[..., Any]] = {"ppo": ppo, "sac": sac}
    learner = learners[agent](**options)
    trainer = SequentialTrainer(env=envs, agents=learner, cfg={"headless": True, "disable_progressbar": True})

    def advance(steps: int) -> int:
        trainer.cfg.timesteps = steps // n_envs
        trainer.train()
        return steps // n_envs * n_envs

    return advance


def tianshou(agent: str, env: str, n_envs: int, batch_size: int, **options: Any) -> Advance:
    """tianshou's collector and ``update`` in turn, as its trainers do.

    They do so a little more slowly for SAC, as they look for NaNs in the whole replay buffer after each step.
    """
    from tianshou.algorithm import PPO, SAC
    from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
    from tianshou.algorithm.modelfree.sac import AutoAlpha, SACPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
    from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
    from tianshou.utils.torch_utils import policy_within_training_step

    envs = DummyVectorEnv([partial(gym.make, env)] * n_envs)
    shape, actions, adam = envs.observation_space[0].shape, envs.action_space[0], AdamOptimizerFactory(lr=3e-4)

    def ppo(n_steps: int, n_epochs: int) -> tuple[Any, int, Callable[[], None]]:
        nets = [Net(state_shape=shape, hidden_sizes=[64, 64], activation=torch.nn.Tanh) for _ in range(2)]
        actor = DiscreteActor(preprocess_net=nets[0], action_shape=actions.n, softmax_output=False)
        policy, critic = DiscreteActorPolicy(actor=actor, action_space=actions), DiscreteCritic(preprocess_net=nets[1])
        learner = PPO(policy=policy, critic=critic, optim=adam, max_grad_norm=0.5, ent_coef=0.0)
        rows = n_envs * n_steps
        collector = Collector(learner, envs, VectorReplayBuffer(rows, n_envs))

        def update() -> None:
            learner.update(collector.buffer, batch_size, n_epochs)
            collector.reset_buffer(keep_statistics=True)

        return collector, rows, update

    def sac(**_: Any) -> tuple[Any, int, Callable[[], None]]:
        wide = {"state_shape": shape, "hidden_sizes": [256, 256]}
        head = {"action_shape": actions.shape, "unbounded": True, "conditioned_sigma": True}
        policy = SACPolicy(actor=ContinuousActorProbabilistic(preprocess_net=Net(**wide), **head), action_space=actions)
        nets = [Net(**wide, action_shape=actions.shape, concat=True) for _ in range(2)]
        first, second = (ContinuousCritic(preprocess_net=net) for net in nets)
        alpha = AutoAlpha(-float(actions.shape[0]), 0.0, adam)
        learner = SAC(policy=policy, policy_optim=adam, critic=first, critic_optim=adam, critic2=second, alpha=alpha)
        collector = Collector(learner, envs, VectorReplayBuffer(1_000_000, n_envs))
        return collector, n_envs, lambda: learner.update(collector.buffer, batch_size)

    learners: dict[str, Callable[..., tuple[Any, int, Callable[[], None]]]] = {"ppo": ppo, "sac": sac}
    collector, rows, update = learners[agent](**options)
    collector.reset()

    def advance(steps: int) -> int:
        before = collector.collect_step
        with policy_within_training_step(collector.policy):
            while collector.collect_step - before < steps:
                collector.collect(n_step=rows)
                update()
        return int(collector.collect_step - before)

    return advance


PEERS: dict[str, Callable[..., Advance]] = {
    "stable-baselines3": sb3,
    "sb3-contrib": sb3,
    "skrl": skrl,
    "tianshou": tianshou,
}


def speed(name: str, work: dict[str, Any]) -> float:
    """Steps per second of klrl or of a peer."""
    torch.set_num_threads(1)
    if name == "klrl":
        return klrl(**work)
    given = {key: value for key, value in work.items() if key not in ("warm_up", "steps", "klrl_options")}
    return timed(PEERS[name](**given), work["warm_up"], work["steps"])


if __name__ == "__main__":
    print(speed(sys.argv[1], json.loads(sys.argv[2])))
