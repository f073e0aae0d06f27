"""The training loop of every agent: collect and learn until there is a report, then evaluate, log and save."""

import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from klrl.agents.base import Agent, UpdateResult
from klrl.config import flatten
from klrl.console import warn
from klrl.envs.make import EnvFactory, can_replay
from klrl.envs.native import TorchVectorEnv
from klrl.envs.wrappers import RESTARTED, counted_from
from klrl.errors import (
    EnvironmentFailedError,
    Interrupted,
    NonFiniteError,
    SkippedUpdateError,
    UsageError,
)
from klrl.kl import Ranks
from klrl.policies import spaces
from klrl.rundir import checkpoint
from klrl.rundir.logger import Console, Logger
from klrl.training.compiled import compiled
from klrl.training.episodes import Episodes
from klrl.training.evaluation import NO_EPISODES, Evaluation, evaluation_seed
from klrl.training.evaluations import Evaluations
from klrl.training.meeting import Meetings, compare_weights
from klrl.training.options import RunConfig
from klrl.training.profile import Profile
from klrl.training.randomness import derived_seed, random_state, restore_random_state, scatter_random_state
from klrl.training.saving import deal_rows, of_rank, put_rows, save, saved_processes
from klrl.training.signals import Signals

_MOST_SKIPPED = 10
_SAVE_SECONDS = 60.0
Envs = VectorEnv[Any, Any, Any]


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
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        self.leads = self.ranks.rank == 0
        """Whether this rank writes, prints and decides by the clock."""
        self.progress = Progress()
        self.buffer = self.agent.new_buffer(self.config.n_envs)
        self.obs: Any = None
        self.signals = Signals()
        self.meetings = Meetings(
            self.ranks, self.signals, self.episodes, self.config.n_envs, self.config.total_timesteps
        )
        self.env_seed = self.config.seed
        self.resumed_at: int | None = None  # the step from which a restored loop logs
        self.saved_rows: list[dict[str, Any]] = []
        self.per_state: torch.Tensor | None = None  # KL of the last update, until it is logged
        self.provisional = False  # the figures are of an update that goes on if the run does
        self._saved_at, self._saved_time = 0, time.monotonic()
        self.evaluations = Evaluations(self.agent, self.env, self.config, self.meetings)

    def restore(self, source: Path, content: dict[str, Any]) -> None:
        """Go on from a checkpoint that ``_save`` wrote; ``episodes`` is restored, and ``envs`` made with its places.

        Raises UsageError where the environment has other spaces.
        """
        saved = content["state"]
        had = SimpleNamespace(**{key: spaces.from_json(saved[key]) for key in ("observation_space", "action_space")})
        spaces.check_same_spaces(self.agent, had, f"checkpoint {source}: its run's", "the environment's ")
        anew = saved_processes(saved) != self.ranks.size
        saved = of_rank(saved, 0 if anew else self.ranks.rank)
        self.agent.load_state_dict(saved["agent"])
        self.saved_rows, state = content["rows"], saved["loop"]
        self.progress, self.per_state = Progress(**state["progress"]), state["per_state"]
        self.env_seed = state.get("env_seed", self.config.seed)
        if anew:
            self._begin_anew(source, content)
        else:
            put_rows(self.buffer, source, content["rows"], self.ranks)
            self.buffer.load_state_dict(state["buffer"])
        self.obs = self._reset()
        if isinstance(self.envs.unwrapped, TorchVectorEnv) and state.get("envs") and not anew:
            self.obs = self.envs.unwrapped.load_state_dict(state["envs"])
        elif not (anew or can_replay(self.envs)):
            if self.leads:
                warn("this environment's episodes cannot be replayed: they begin anew")
            self.buffer.forget_unfinished()
            self.episodes.forget_unfinished()
        self.meetings.meet()
        self._saved_at = self.steps
        self.resumed_at = self.progress.logged + 1 if self.progress.figures is None else self.steps
        if not (anew and self.ranks.rank):
            restore_random_state(state["random"])

    def _begin_anew(self, source: Path, content: dict[str, Any]) -> None:
        """Go on with another number of ranks than saved the run, which have other environments."""
        saved = saved_processes(content["state"])
        if self.leads:
            warn(f"this run had {saved} ranks, and goes on with {self.ranks.size}: its episodes begin anew")
        deal_rows(self.buffer, source, content["state"], content["rows"], self.ranks)
        self.saved_rows = []
        self.agent.join(self.ranks)  # with noise of its own again, not rank 0's
        self.env_seed = derived_seed(self.config.seed, content["step"])
        if self.ranks.rank:
            scatter_random_state(self.env_seed, self.ranks.rank)

    def _reset(self) -> Any:
        """Begin the episodes of this rank's environments, which are numbered, and seeded, from those before it."""
        first = self.ranks.rank * self.config.n_envs
        if can_replay(self.envs):
            return self.envs.reset(seed=self.env_seed, options=counted_from(first))[0]
        return self.envs.reset(seed=derived_seed(self.env_seed, first) if first else self.env_seed)[0]

    def run(self, folder: Path) -> Evaluation:
        """Train until the steps are done, logging and saving in ``folder``; the final evaluation.

        Raises Interrupted after a signal, once saved.
        """
        config, progress, self.checkpoints = self.config, self.progress, folder / "checkpoints"
        self.ranks.timeout = config.rank_timeout
        self.console = Console(config.total_timesteps, config.quiet or not self.leads, config.verbose)
        logger: Any = Logger(folder, flatten(self.options), self.resumed_at) if self.leads else ExitStack()
        with (
            closing(self.console),
            closing(logger) as self.logger,
            closing(self.evaluations),
            self.signals,
            ExitStack() as self.opened,
        ):
            if self.obs is None:
                self.obs = self._reset()
            if config.compile:
                self.opened.enter_context(compiled(self.agent, config.quiet or not self.leads))
            if config.profile and self.leads:
                self.opened.enter_context(Profile().of(self))
            try:
                while True:
                    if progress.figures is None:
                        progress.figures = self._learn()
                    score = self._assess(progress.figures)
                    if self.finished:
                        return NO_EPISODES if score is None else score
                    progress.figures, progress.began = None, self.steps
            except (Interrupted, EnvironmentFailedError) as problem:
                if isinstance(problem, EnvironmentFailedError) and self.ranks.size > 1:  # the others are not here
                    raise EnvironmentFailedError(f"{problem}{self._kept()}") from None
                self._save(None)
                self.signals.check()  # which may have reached the workers, too
                done = f"saved after {self.steps:,} steps in {folder}, for klrl resume"
                raise EnvironmentFailedError(f"{problem}; {done}") from None
            except NonFiniteError as problem:
                raise NonFiniteError(f"{problem}, {self.steps} steps into the run{self._kept()}") from None

    def _kept(self) -> str:
        saved = checkpoint.steps(self.checkpoints)
        return f"; the last checkpoint is {saved[-1]}" if saved else ""

    @property
    def steps(self) -> int:
        """Environment steps, of all ranks."""
        return self.meetings.steps

    @property
    def finished(self) -> bool:
        return self.steps >= self.config.total_timesteps

    def _learn(self) -> dict[str, float]:
        """Step the environments and update the agent until it reports; the report's figures."""
        progress, start, waited = self.progress, time.perf_counter(), self.ranks.seconds
        try:
            report, learning = self._until_report()
            self.meetings.meet(check=False)  # this update is first to be counted
            compare_weights(self.ranks, self.agent, progress.updates + 1)
        finally:
            seconds = time.perf_counter() - start
            progress.training_time += seconds
        self.per_state = report.kl.per_state
        progress.updates += 1
        figures = self.episodes.figures(self.ranks)
        report.write(figures.__setitem__)
        (restarted,) = self.ranks.sum(self.episodes.restarted)
        if progress.skipped or restarted:
            figures["health/restarted_episodes"] = float(restarted)
            figures["health/skipped_updates"] = float(progress.skipped)
        progress.skipped = 0
        if not self.provisional:  # that update may yet be taken back
            progress.undone = progress.undone + 1 if report.kl.rolled_back == 1 else 0
        if progress.undone > 1 and report.kl.rolled_back == 1:
            figures["health/undone_in_a_row"] = float(progress.undone)
        figures["time/fps"] = self.steps / progress.training_time
        figures["time/collect_share"] = 1 - learning / seconds
        if self.ranks.size > 1:
            figures["time/reduce_share"] = (self.ranks.seconds - waited) / seconds
        return figures

    def _until_report(self) -> tuple[UpdateResult, float]:
        """Step and update until there is a report; it, and the seconds that the updates took."""
        progress, learning = self.progress, 0.0
        report: UpdateResult | None = None
        silent = False
        while report is None:
            self.meetings.step()
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
        config, progress, steps = self.config, self.progress, self.steps
        figures, score = dict(learned), None
        final = self.finished and config.final_episodes > 0
        self._find_folder()
        if final:
            self._save(None)  # an evaluation may fail, or take longer than anyone waits
            self.envs.close()  # of some tasks no two instances may exist
            self.evaluations.close()
            show = partial(self.console.evaluating, total=config.final_episodes)
            score = self.evaluations.run(config.final_episodes, evaluation_seed("final", config.seed), show)
        elif config.eval_every and progress.updates % config.eval_every == 0:
            score = self.evaluations.run(config.eval_episodes, evaluation_seed("during", config.seed))
        if score is not None:
            figures["eval/mean_reward"], figures["eval/std_reward"] = score.mean, score.std
            figures["eval/mean_ep_length"] = statistics.fmean(score.lengths)
            if final:
                figures["eval/final_return"] = score.mean
        if self.leads:
            self._log(steps, figures)
        improved = score is not None and score.mean > progress.best
        by_steps = 0 < config.save_every <= steps - self._saved_at
        by_time = config.save_every == 0 and time.monotonic() - self._saved_time >= _SAVE_SECONDS
        if self.ranks.any(self.finished or improved or by_steps or (by_time and self.leads)):
            self._save(score)
        progress.best = max(progress.best, score.mean) if score is not None else progress.best
        progress.logged = steps
        return score if final else None

    def _log(self, steps: int, figures: dict[str, float]) -> None:
        every = self.config.histogram_every
        self.logger.write(steps, figures)
        if self.per_state is not None and every and self.progress.updates % every == 0:
            # In logarithms: KLs spread over decades, and on a plain axis all but the largest are one bar.
            magnitudes = self.per_state.double().clamp(1e-12, 1e12).log10().cpu().numpy()
            self.logger.write_histogram(steps, "kl/log10_per_state", magnitudes)
        self.console.update(steps, figures)

    def _find_folder(self) -> None:
        """Raise OSError where the run's folder is gone, which saving would make again with nothing else in it."""
        if self.leads and not (folder := self.checkpoints.parent).is_dir():
            raise OSError(f"{folder} was moved or removed while the run trained, {self.steps} steps into it")

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
                "env_seed": self.env_seed,
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
        save(self.checkpoints, self.steps, state, mean, self.buffer, self.saved_rows, self.ranks)
        self._saved_at, self._saved_time = self.steps, time.monotonic()
