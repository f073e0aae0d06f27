"""One training loop for every agent: collect, update, log, evaluate, save."""

import gc
import os
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import tomli_w
import torch
import tyro
from gymnasium.vector import VectorEnv

from klrl import agents, checkpoint, spaces
from klrl.config import Count, PositiveInt, Seed, build, hints, merge, suggest, to_dict
from klrl.envs.make import EnvConfig, EnvFactory, env_name, import_module, make_vector, preset
from klrl.errors import NonFiniteError, UsageError
from klrl.evaluation import EVAL_SEED, FINAL_SEED, FRESH_SEED, Evaluation, run_episodes
from klrl.logger import Console, Logger
from klrl.protocol import Agent, Report

_FINAL_EPISODES = 20


@dataclass(frozen=True)
class RunConfig:
    total_timesteps: PositiveInt = 1_000_000
    """Environment steps to train for; an on-policy run ends with the first whole rollout at or beyond this."""
    seed: Seed = 0
    """Seed of weights, environments and sampling."""
    n_envs: PositiveInt = 8
    """Environments stepped side by side."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the networks live; auto takes CUDA for image observations where there is one, else the CPU."""
    threads: PositiveInt = 1
    """CPU threads of torch; small networks are fastest with one."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 products; medium rounds to bfloat16, which is faster where the processor has units for it."""
    run_dir: str = "runs"
    """The folder in which the run's own folder is made."""
    eval_every: Count = 20
    """Updates (off-policy: blocks of kl.every steps) between two evaluations on separate environments; 0 never."""
    eval_episodes: PositiveInt = 5
    """Episodes of each of those evaluations; the final one has 20."""
    save_every: Count = 100_000
    """Steps between two checkpoints; 0 saves only at evaluations that are the best so far, and at the end."""
    quiet: bool = False
    """Print only the final evaluation and where the run lies."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Packages to import first, for the environments they register."""
    env: EnvConfig = field(default_factory=EnvConfig)


@dataclass(frozen=True)
class Run:
    """A finished training run."""

    agent: Agent
    folder: Path
    env: str | EnvFactory
    config: RunConfig
    score: Evaluation
    """The final evaluation, 20 episodes."""

    def evaluate(self, episodes: int = 20, deterministic: bool = True, seed: int = 0) -> Evaluation:
        """Episodes with the trained agent that are not those of the final evaluation; another seed gives others."""
        envs = make_vector(self.env, episodes, self.config.env)
        try:
            return run_episodes(self.agent, envs, self.config.seed + FRESH_SEED + seed, deterministic)
        finally:
            envs.close()


def train(agent: str, env: str | EnvFactory, /, **config: Any) -> Run:
    """Train ``agent`` ("ppo") on ``env`` and return the run.

    env: a Gymnasium id, or a function that returns a new environment. ``config``: the command line's options as
    keywords, groups as dicts: ``train("ppo", "CartPole-v1", n_envs=8, kl={"target": 0.02})``. An id's preset applies
    underneath them.

    Raises UsageError (a ValueError) for bad input, before anything is written, and NonFiniteError where training met
    a nan or infinity; the run's checkpoints then stay.
    """
    run_config, agent_config = resolve(agent, env, config)
    return run_training(agent, env, run_config, agent_config)


def resolve(agent: str, env: str | EnvFactory | None, options: Mapping[str, Any]) -> tuple[RunConfig, Any]:
    """Defaults, then the preset, then ``options``: the run's config and the agent's."""
    _, config_class = agents.find(agent)
    flat = merge({} if env is None else preset(agent, env), options)
    mine, theirs = hints(RunConfig), hints(config_class)
    for key in flat:
        if key not in mine and key not in theirs:
            raise UsageError(f"unknown option {key!r}{suggest(key, [*mine, *theirs])}")
    run_config = build(RunConfig, {k: v for k, v in flat.items() if k in mine})
    return run_config, build(config_class, {k: v for k, v in flat.items() if k in theirs})


def run_training(name: str, env: str | EnvFactory, config: RunConfig, agent_config: Any) -> Run:
    """Train as configured: ``train`` after its options were resolved."""
    agent_class, _ = agents.find(name)
    for package in config.imports:
        import_module(package, f"--import {package}")
    device = pick_device(config.device, lambda: images_of(env, config.env))
    options = {"agent": name, "env_id": env_name(env), **to_dict(config), **to_dict(agent_config)}
    try:
        toml = tomli_w.dumps(options)
    except TypeError as problem:
        raise UsageError(f"--env.kwargs holds a value that a config file cannot: {problem}") from None
    envs = make_vector(env, config.n_envs, config.env)
    evaluator: VectorEnv[Any, Any, Any] | None = None
    threads_before, precision_before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    frozen_before = gc.get_freeze_count()
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision(config.matmul_precision)
    # glibc gives freed memory back to the system beyond twice the largest array freed so far, and fetching it anew
    # costs as much as the arithmetic on it. After one array of 30 MB, never touched, it keeps what an update frees.
    torch.empty(30_000_000, dtype=torch.uint8)
    try:
        spaces.check_observation_space(envs.single_observation_space)
        agent = agent_class(envs.single_observation_space, envs.single_action_space, agent_config, device, config.seed)
        buffer = agent.new_buffer(config.n_envs)
        folder = make_folder(config.run_dir, f"{name}-{env_name(env)}-{config.seed}")
        (folder / "config.toml").write_text(toml)
        if config.eval_every:
            evaluator = make_vector(env, config.eval_episodes, config.env)
        gc.collect()
        gc.freeze()  # what was imported until here lives as long as the process: the collector need not walk it
        score = _loop(agent, buffer, env, envs, evaluator, config, folder, options)
        print(f"evaluation  {score.mean:.1f} +- {score.std:.1f} over {len(score.returns)} episodes")
        print(f"run         {folder}")
        print(f"watch       tensorboard --logdir {config.run_dir}", flush=True)
    finally:
        if not frozen_before:
            gc.unfreeze()
        torch.set_num_threads(threads_before)
        torch.set_float32_matmul_precision(precision_before)
        envs.close()
        if evaluator is not None:
            evaluator.close()
    return Run(agent, folder, env, config, score)


def _loop(
    agent: Agent,
    buffer: Any,
    env: str | EnvFactory,
    envs: VectorEnv[Any, Any, Any],
    evaluator: VectorEnv[Any, Any, Any] | None,
    config: RunConfig,
    folder: Path,
    options: dict[str, Any],
) -> Evaluation:
    """Collect and update until the steps are done, logging and saving along the way; the final evaluation."""
    obs, _ = envs.reset(seed=config.seed)
    episodes = Episodes(envs.num_envs)
    logger, console = Logger(folder, _hparams(options)), Console(config.total_timesteps, config.quiet)
    updates, saved_at, best, training_time = 0, 0, -float("inf"), 0.0
    try:
        while True:
            start, steps_before, learning = time.perf_counter(), episodes.steps, 0.0
            report: Report | None = None
            while report is None:
                action = agent.act(obs)
                try:
                    next_obs, reward, terminated, truncated, _ = envs.step(agent.env_action(action))
                except Exception:
                    buffer.check_finite()  # a nan that the environment showed may be what made it fail
                    raise
                buffer.add(obs, action, reward, terminated, truncated, next_obs)
                episodes.add(reward, terminated | truncated)
                obs = next_obs
                if agent.due(buffer):
                    due = time.perf_counter()
                    report = agent.update(buffer, steps_before / config.total_timesteps)
                    learning += time.perf_counter() - due
                if report is None and episodes.steps >= config.total_timesteps:
                    report = agent.flush(buffer)
            updates += 1
            now = time.perf_counter()
            training_time += now - start
            figures = episodes.figures()
            report.write(figures.__setitem__)
            figures["time/fps"] = episodes.steps / training_time
            figures["time/collect_share"] = 1 - learning / (now - start)

            finished, score = episodes.steps >= config.total_timesteps, None
            if finished:
                final = make_vector(env, _FINAL_EPISODES, config.env)
                score = run_episodes(agent, final, config.seed + FINAL_SEED)
                final.close()
            elif evaluator is not None and updates % config.eval_every == 0:
                score = run_episodes(agent, evaluator, config.seed + EVAL_SEED)
            if score is not None:
                figures["eval/mean_reward"], figures["eval/std_reward"] = score.mean, score.std
                figures["eval/mean_ep_length"] = statistics.fmean(score.lengths)
            logger.write(episodes.steps, figures)
            console.update(episodes.steps, figures)
            improved = score is not None and score.mean > best
            if finished or improved or 0 < config.save_every <= episodes.steps - saved_at:
                saved_at = episodes.steps
                _save(folder, agent, options, score, episodes.steps)
            best = max(best, score.mean) if score is not None else best
            if finished and score is not None:
                return score
    except NonFiniteError as problem:
        saved = checkpoint.steps(folder / "checkpoints")
        kept = f"; the last checkpoint is {saved[-1]}" if saved else ""
        raise NonFiniteError(f"{problem}, {episodes.steps} steps into the run{kept}") from None
    finally:
        console.close()
        logger.close()


class Episodes:
    """Counts steps and keeps the last 100 episodes' returns and lengths, under NEXT_STEP autoreset."""

    def __init__(self, n_envs: int) -> None:
        self.steps = 0
        self._returns, self._lengths = np.zeros(n_envs), np.zeros(n_envs, np.int64)
        self._resetting = 0
        self.done: deque[tuple[float, int]] = deque(maxlen=100)

    def add(self, reward: np.ndarray[Any, Any], ended: np.ndarray[Any, Any]) -> None:
        """One step of all environments; a row that only resets its environment is not a step."""
        self.steps += len(reward) - self._resetting
        self._returns += reward
        self._lengths += 1
        self._resetting = 0
        if ended.any():
            rows = np.flatnonzero(ended)
            self._resetting = len(rows)
            self.done.extend(zip(self._returns[rows].tolist(), self._lengths[rows].tolist(), strict=True))
            self._returns[rows] = 0.0
            self._lengths[rows] = -1  # the row that resets brings it to 0

    def figures(self) -> dict[str, float]:
        """Means over the last 100 episodes; empty before the first has ended."""
        if not self.done:
            return {}
        returns, lengths = zip(*self.done, strict=True)
        return {
            "rollout/ep_rew_mean": statistics.fmean(returns),
            "rollout/ep_len_mean": statistics.fmean(lengths),
        }


def load(path: str | Path, which: Literal["last", "best"] = "last") -> Agent:
    """The agent of a run folder or checkpoint, with its normaliser, on the CPU.

    Raises UsageError where ``path`` is neither, or where a file is missing, truncated or altered.
    """
    return load_with_options(path, which)[0]


def load_with_options(path: str | Path, which: str = "last") -> tuple[Agent, dict[str, Any]]:
    """The agent and the options that its run was made with."""
    source = checkpoint.find(Path(path), which)
    content = checkpoint.load(source)
    try:
        options, state = content["state"]["options"], content["state"]["agent"]
        run_config, agent_config = config_of(options)
        agent_class, _ = agents.find(options["agent"])
        observation_space, action_space = (
            spaces.from_json(content["state"][key]) for key in ("observation_space", "action_space")
        )
        agent: Agent = agent_class(observation_space, action_space, agent_config, "cpu", run_config.seed)
        agent.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as problem:
        raise UsageError(f"checkpoint {source} does not fit this version of klrl: {problem}") from None
    return agent, options


def config_of(options: Mapping[str, Any]) -> tuple[RunConfig, Any]:
    """The run's and the agent's config from the options in a checkpoint."""
    return resolve(options["agent"], None, {k: v for k, v in options.items() if k not in ("agent", "env_id")})


def _save(folder: Path, agent: Agent, options: dict[str, Any], score: Evaluation | None, step: int) -> None:
    state = {
        "options": options,
        "observation_space": spaces.to_json(agent.observation_space),
        "action_space": spaces.to_json(agent.action_space),
        "agent": agent.state_dict(),
    }
    checkpoint.save(folder / "checkpoints", step, state, None if score is None else score.mean)
    checkpoint.prune(folder / "checkpoints")


def make_folder(parent: str, name: str) -> Path:
    """A new folder ``parent/name-time``, numbered where that is taken. Raises UsageError where it cannot be made."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}".replace("/", "_").replace(":", "_")
    try:
        os.makedirs(parent, exist_ok=True)
        for number in range(1, 10_000):
            folder = Path(parent) / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as problem:
        raise UsageError(
            f"--run-dir {parent}: {problem.strerror or problem}; choose a folder you can write to"
        ) from None
    raise UsageError(f"--run-dir {parent}: 10,000 runs of this second lie there already")


def pick_device(wanted: str, has_images: Any) -> str:
    """The device to use. Raises UsageError for CUDA where there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is available to this torch; use --device cpu")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and has_images() else "cpu"
    return wanted


def images_of(env: str | EnvFactory, config: EnvConfig) -> bool:
    """Whether the environment shows images, for which a GPU pays off."""
    probe = make_vector(env, 1, config)
    space = probe.single_observation_space
    probe.close()
    parts = space.spaces.values() if isinstance(space, gym.spaces.Dict) else [space]
    return any(spaces.is_image(part) for part in parts)


def _hparams(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The options flattened to ``kl.target`` and the like."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _hparams(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
