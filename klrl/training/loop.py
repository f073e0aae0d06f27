"""The training loop of every agent: collect and learn until there is a report, then evaluate, log and save."""

import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv

from klrl.agents.base import Agent, UpdateResult
from klrl.config import MOST_ENVS, Checked, Count, EnvCount, Form, PositiveInt, Range, Reads, Seed, flatten
from klrl.console import warn
from klrl.envs.make import EnvConfig, EnvFactory, Imports, can_replay, make_vector
from klrl.envs.native import TorchVectorEnv
from klrl.envs.wrappers import RESTARTED
from klrl.errors import EnvironmentFailedError, Interrupted, NonFiniteError, SkippedUpdateError, UsageError
from klrl.policies import spaces
from klrl.rundir import checkpoint
from klrl.rundir.logger import Console, Logger
from klrl.training.compiled import compiled
from klrl.training.episodes import Episodes
from klrl.training.evaluation import NO_EPISODES, Evaluation, evaluation_seed, run_episodes
from klrl.training.profile import Profile
from klrl.training.randomness import random_state, random_state_kept, restore_random_state
from klrl.training.signals import Signals

_MOST_SKIPPED = 10
_SAVE_SECONDS = 60.0
Envs = VectorEnv[Any, Any, Any]
DeviceName = Annotated[str, Reads(str), tyro.conf.arg(metavar="{auto,cpu,cuda,cuda:N}")]  # or a torch.device
DEVICES = Form("auto|cpu|cuda(:[0-9]+)?", "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class RunConfig(Checked):
    total_timesteps: PositiveInt = 1_000_000
    """Environment steps to train for; an on-policy run ends with the first whole rollout at or beyond this."""
    seed: Seed = 0
    """Seed of weights, environments and sampling."""
    n_envs: EnvCount = 8
    """Environments stepped side by side."""
    device: Annotated[DeviceName, DEVICES] = "auto"
    """Where the networks live; auto takes CUDA for image observations where there is one, else the CPU."""
    threads: Annotated[int, Range(1, 1024)] = 1
    """CPU threads of torch, at most this machine's cores; small networks are fastest with one."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """Of float32 products; medium rounds to bfloat16, which is faster where the processor has units for it."""
    run_dir: str = "runs"
    """The folder in which the run's own folder is made."""
    eval_every: Count = 20
    """Updates (off-policy: windows of kl.every steps) between two evaluations on separate environments; 0 never."""
    eval_episodes: EnvCount = 5
    """Episodes of each of those evaluations."""
    final_episodes: Annotated[int, Range(0, MOST_ENVS)] = 20
    """Episodes of the final evaluation, once everything is saved and the training environments are closed; 0 none."""
    save_every: Count = 0
    """Steps between two checkpoints; 0 saves about once a minute. The last two and the best are kept."""
    histogram_every: Count = 10
    """Updates (off-policy: windows) between two TensorBoard histograms of log10 KL over states; 0 none."""
    quiet: bool = False
    """Print only the final evaluation and where the run lies."""
    verbose: bool = False
    """Print a line for each update, not only for each tenth of the run."""
    profile: bool = False
    """Print at the end where the time went, part by part, and write a trace for Chrome or Perfetto, profile.json."""
    compile: bool = False
    """Learn by compiled gradients, of SAC and of PPO with a network of one's own: some seconds at first, then less time
    a step."""
    imports: Imports = ()
    network: str = ""
    """A network of one's own in place of hidden layers, module:Class: an nn.Module from inputs to features [B, F] that
    is made with the observation space."""
    env: EnvConfig = field(default_factory=EnvConfig)


@dataclass
class Progress:
    """Where the loop stands, beside what agent, buffer and environments know; saved with them."""

    updates: int = 0
    began: int = 0
    """Steps when the collection began whose report is awaited."""
    best: float = -float("inf")
    training_time: float = 0.0
    logged: int = -1
    """The step of the last logged row."""
    skipped: int = 0
    """Updates since the last whole one that met a nan or infinity."""
    undone: int = 0
    """Updates in a row up to the last one that were taken back whole."""
    figures: dict[str, float] | None = None
    """Those of an update that is not evaluated and logged yet."""


@dataclass
class Loop:
    """What a run consists of. ``run`` goes on from wherever it stands."""

    agent: Agent
    env: str | EnvFactory
    envs: Envs
    episodes: Episodes
    config: RunConfig
    options: dict[str, Any]
    """The run's ``config.toml``."""

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.buffer = self.agent.new_buffer(self.config.n_envs)
        self.obs: Any = None
        self.signals = Signals()
        self.resumed_at: int | None = None  # the step from which a restored loop logs
        self.saved_rows: list[dict[str, Any]] = []
        self.per_state: torch.Tensor | None = None  # KL of the last update, until it is logged
        self.provisional = False  # the figures are of an update that goes on if the run does
        self._saved_at, self._saved_time = 0, time.monotonic()
        self._evaluators: Envs | None = None

    def restore(self, source: Path, content: dict[str, Any]) -> None:
        """Go on from a checkpoint that ``_save`` wrote; ``episodes`` is restored, and ``envs`` made with its places.

        Raises UsageError where the environment has other spaces.
        """
        saved = content["state"]
        for key in ("observation_space", "action_space"):
            theirs, mine = spaces.from_json(saved[key]), getattr(self.agent, key)
            if theirs != mine:
                raise UsageError(f"checkpoint {source} is of a run with {key} {theirs}, but the environment has {mine}")
        self.agent.load_state_dict(saved["agent"])
        for start, rows in checkpoint.load_rows(source, content["rows"]):
            self.buffer.put_rows(start, rows)
        self.saved_rows, state = content["rows"], saved["loop"]
        self.progress, self.per_state = Progress(**state["progress"]), state["per_state"]
        self.buffer.load_state_dict(state["buffer"])
        self.obs, _ = self.envs.reset(seed=self.config.seed)
        if isinstance(self.envs.unwrapped, TorchVectorEnv) and state.get("envs"):
            self.obs = self.envs.unwrapped.load_state_dict(state["envs"])
        elif not can_replay(self.envs):
            warn("this environment's episodes cannot be replayed: they begin anew")
            self.buffer.forget_unfinished()
            self.episodes.forget_unfinished()
        self._saved_at = self.episodes.steps
        self.resumed_at = self.progress.logged + 1 if self.progress.figures is None else self.episodes.steps
        restore_random_state(state["random"])

    def run(self, folder: Path) -> Evaluation:
        """Train until the steps are done, logging and saving in ``folder``; the final evaluation.

        Raises Interrupted after a signal, once saved.
        """
        config, progress, self.checkpoints = self.config, self.progress, folder / "checkpoints"
        logger = Logger(folder, flatten(self.options), self.resumed_at)
        self.console = Console(config.total_timesteps, config.quiet, config.verbose)
        with closing(self.console), closing(logger) as self.logger, self.signals, ExitStack() as self.opened:
            if self.obs is None:
                self.obs, _ = self.envs.reset(seed=config.seed)
            if config.compile:
                self.opened.enter_context(compiled(self.agent, config.quiet))
            if config.profile:
                self.opened.enter_context(Profile().of(self))
            try:
                while True:
                    if progress.figures is None:
                        progress.figures = self._learn()
                    score = self._assess(progress.figures)
                    if self.finished:
                        return NO_EPISODES if score is None else score
                    progress.figures, progress.began = None, self.episodes.steps
            except (Interrupted, EnvironmentFailedError) as problem:
                self._save(None)
                self.signals.check()  # which may have reached the workers, too
                done = f"saved after {self.episodes.steps:,} steps in {folder}, for klrl resume"
                raise EnvironmentFailedError(f"{problem}; {done}") from None
            except NonFiniteError as problem:
                saved = checkpoint.steps(self.checkpoints)
                kept = f"; the last checkpoint is {saved[-1]}" if saved else ""
                raise NonFiniteError(f"{problem}, {self.episodes.steps} steps into the run{kept}") from None

    @property
    def finished(self) -> bool:
        return self.episodes.steps >= self.config.total_timesteps

    def _learn(self) -> dict[str, float]:
        """Step the environments and update the agent until it reports; the report's figures."""
        progress, start = self.progress, time.perf_counter()
        try:
            report, learning = self._until_report()
        finally:
            seconds = time.perf_counter() - start
            progress.training_time += seconds
        self.per_state = report.kl.per_state
        progress.updates += 1
        figures = self.episodes.figures()
        report.write(figures.__setitem__)
        if progress.skipped or self.episodes.restarted:
            figures["health/restarted_episodes"] = float(self.episodes.restarted)
            figures["health/skipped_updates"] = float(progress.skipped)
        progress.skipped = 0
        if not self.provisional:  # that update may yet be taken back
            progress.undone = progress.undone + 1 if report.kl.rolled_back == 1 else 0
        if progress.undone > 1 and report.kl.rolled_back == 1:
            figures["health/undone_in_a_row"] = float(progress.undone)
        figures["time/fps"] = self.episodes.steps / progress.training_time
        figures["time/collect_share"] = 1 - learning / seconds
        return figures

    def _until_report(self) -> tuple[UpdateResult, float]:
        """Step and update until there is a report; it, and the seconds that the updates took."""
        progress, learning = self.progress, 0.0
        report: UpdateResult | None = None
        silent = False
        while report is None:
            self.signals.check()
            if self.finished and (report := self.agent.finish_window(self.buffer)) is not None:
                self.provisional = report.kl.rolled_back == 0
                break
            if silent:
                raise UsageError(
                    f"{self.agent.name()}: neither update nor finish_window gave an UpdateResult at the end"
                )
            action = self.agent.act(self.obs)
            env_action = self.agent.env_action(action)
            try:
                # A copy, as an environment may change what it is given, and its replay takes what it was given.
                next_obs, reward, terminated, truncated, info = self.envs.step(env_action.copy())
            except Exception:
                self.buffer.check_finite()  # a nan that the environment showed may be what made it fail
                raise
            self.buffer.add(self.obs, action, reward, terminated, truncated, next_obs)
            self.episodes.add(env_action, reward, terminated | truncated)
            for reason in info[RESTARTED][info[f"_{RESTARTED}"]] if RESTARTED in info else ():
                warn(f"{reason}; the episode counts as truncated")
                self.episodes.restarted += 1
            self.obs = next_obs
            if self.agent.ready(self.buffer):
                due = time.perf_counter()
                try:
                    report = self.agent.update(self.buffer, progress.began / self.config.total_timesteps)
                    silent = report is None and self.finished
                except SkippedUpdateError as problem:
                    progress.skipped += 1
                    if progress.skipped >= _MOST_SKIPPED:
                        why = f"{_MOST_SKIPPED} updates in a row were skipped, the last as {problem}"
                        raise NonFiniteError(why) from None
                learning += time.perf_counter() - due
        return report, learning

    def _assess(self, learned: dict[str, float]) -> Evaluation | None:
        """Evaluate where it is time, log, and save; the score of the final evaluation."""
        config, progress, steps = self.config, self.progress, self.episodes.steps
        figures, score = dict(learned), None
        final = self.finished and config.final_episodes > 0
        self._find_folder()
        if final:
            self._save(None)  # an evaluation may fail, or take longer than anyone waits
            self.envs.close()  # of some tasks no two instances may exist
            if self._evaluators is not None:
                self._evaluators.close()
                self._evaluators = None
            score = self._evaluate(config.final_episodes, evaluation_seed("final", config.seed))
        elif config.eval_every and progress.updates % config.eval_every == 0:
            score = self._evaluate(config.eval_episodes, evaluation_seed("during", config.seed))
        if score is not None:
            figures["eval/mean_reward"], figures["eval/std_reward"] = score.mean, score.std
            figures["eval/mean_ep_length"] = statistics.fmean(score.lengths)
            if final:
                figures["eval/final_return"] = score.mean
        self.logger.write(steps, figures)
        if self.per_state is not None and config.histogram_every and progress.updates % config.histogram_every == 0:
            # In logarithms: KLs spread over decades, and on a plain axis all but the largest are one bar.
            magnitudes = self.per_state.double().clamp(1e-12, 1e12).log10().cpu().numpy()
            self.logger.write_histogram(steps, "kl/log10_per_state", magnitudes)
        self.console.update(steps, figures)
        improved = score is not None and score.mean > progress.best
        by_steps = 0 < config.save_every <= steps - self._saved_at
        by_time = config.save_every == 0 and time.monotonic() - self._saved_time >= _SAVE_SECONDS
        if self.finished or improved or by_steps or by_time:
            self._save(score)
        progress.best = max(progress.best, score.mean) if score is not None else progress.best
        progress.logged = steps
        return score if final else None

    def _evaluate(self, episodes: int, seed: int) -> Evaluation:
        """Episodes that leave the global generators as they were, so that training does not depend on them."""
        with random_state_kept():
            width = min(episodes, self.config.n_envs)
            if self._evaluators is None or self._evaluators.num_envs != width:
                if self._evaluators is not None:
                    self._evaluators.close()
                envs = make_vector(self.env, width, self.config.env)
                self._evaluators = self.opened.enter_context(closing(envs))

            def watch(obs: Any, running: Any, returns: Any, step: int, first: int) -> None:
                self.signals.check()
                if self.finished:
                    self.console.evaluating(min(first + len(running), episodes) - int(running.sum()), episodes)

            return run_episodes(self.agent, self._evaluators, seed, watch=watch, episodes=episodes)

    def _find_folder(self) -> None:
        """Raise OSError where the run's folder is gone, which saving would make again with nothing else in it."""
        if not (folder := self.checkpoints.parent).is_dir():
            raise OSError(f"{folder} was moved or removed while the run trained, {self.episodes.steps} steps into it")

    def _save(self, score: Evaluation | None) -> None:
        """Save everything, as it is between two updates or in the middle of collecting."""
        self._find_folder()
        progress = asdict(self.progress)
        if self.provisional:
            progress |= {"figures": None, "updates": self.progress.updates - 1}
        obs = self.agent.encoder.layout.arrays(self.obs)
        parts = obs if isinstance(obs, dict) else {"": obs}
        state = {
            **self.agent.description(),
            "options": self.options,
            "agent": self.agent.state_dict(),
            "loop": {
                "progress": progress,
                "episodes": self.episodes.state_dict(),
                "buffer": self.buffer.state_dict(),
                "obs": {key: torch.from_numpy(np.array(part)) for key, part in parts.items()},
                "random": random_state(),
                "envs": self.envs.unwrapped.state_dict() if isinstance(self.envs.unwrapped, TorchVectorEnv) else {},
                "per_state": None if progress["figures"] is None else self.per_state,
                "complete": self.finished and (score is not None or not self.config.final_episodes),
            },
        }
        mean = None if score is None else score.mean
        checkpoint.save(self.checkpoints, self.episodes.steps, state, mean, self.buffer, self.saved_rows)
        checkpoint.prune(self.checkpoints)
        self._saved_at, self._saved_time = self.episodes.steps, time.monotonic()
