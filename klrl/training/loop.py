"""The training loop of every agent: collect and learn until there is a report, then evaluate, log and save."""

import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from klrl.agents.base import Agent, UpdateResult
from klrl.agents.device import on_device
from klrl.config import flatten
from klrl.console import warn
from klrl.envs.make import EnvFactory
from klrl.envs.wrappers import RESTARTED, as_learned
from klrl.errors import (
    EnvironmentFailedError,
    Interrupted,
    NonFiniteError,
    RankLostError,
    SkippedUpdateError,
    UsageError,
)
from klrl.kl import Ranks
from klrl.rundir import checkpoint
from klrl.rundir.history import STOPPED_EARLY
from klrl.rundir.logger import Console, Logger
from klrl.training.callbacks import LiveRun, tell
from klrl.training.captured import captured
from klrl.training.compiled import compiled
from klrl.training.device import moved, rollouts_stay
from klrl.training.episodes import Episodes
from klrl.training.evaluation import NO_EPISODES, Evaluation, evaluation_seed
from klrl.training.evaluations import Evaluations
from klrl.training.meeting import Meetings, compare_weights
from klrl.training.options import RunConfig
from klrl.training.profile import Profile
from klrl.training.saving import save
from klrl.training.signals import Signals
from klrl.training.state import Progress, begin_episodes, state_of
from klrl.training.trackers import tracked

_MOST_SKIPPED = 10
_SAVE_SECONDS = 60.0
Envs = VectorEnv[Any, Any, Any]


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
    callbacks: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.leads = self.ranks.rank == 0
        """Whether this rank writes, prints and decides by the clock."""
        self.progress = Progress()
        self.buffer: Any
        every, self.stays = 1, rollouts_stay(self.agent, self.envs, self.ranks)
        if self.stays:
            self.envs, self.buffer, self.episodes = moved(self.agent, self.envs, self.episodes)
            every = self.buffer.n_steps - 1  # before a rollout's last step: an update that is due comes first
        else:
            self.buffer = self.agent.new_buffer(self.config.n_envs)
        self.obs: Any = None
        self.signals = Signals()
        self.meetings = Meetings(
            self.ranks, self.signals, self.episodes, self.config.n_envs, self.config.total_timesteps, every
        )
        self.env_seed = self.config.seed
        self.resumed_at: int | None = None  # the step from which a restored loop logs
        self.saved_rows: list[dict[str, Any]] = []
        self.per_state: torch.Tensor | None = None  # KL of the last update, until it is logged
        self.provisional = False  # the figures are of an update that goes on if the run does
        self.stopped_by = ""
        self.saved_at, self._saved_time = 0, time.monotonic()
        self.evaluations = Evaluations(self.agent, self.env, self.config, self.meetings)

    def run(self, folder: Path) -> Evaluation:
        """Train until the steps are done, or a callback stops; log and save in ``folder``; the final evaluation.

        Raises Interrupted after a signal, and what a callback raises, once saved.
        """
        config, progress, self.checkpoints = self.config, self.progress, folder / "checkpoints"
        self.ranks.timeout = config.rank_timeout
        self.live, self.listened = LiveRun(self, folder), self.ranks.any(bool(self.callbacks))
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
                self.obs = begin_episodes(self)
            resumed, names = self.resumed_at is not None, config.log if self.leads else ()
            self.track = self.opened.enter_context(tracked(names, folder, self.options, resumed, config.quiet))
            quiet = config.quiet or not self.leads
            self.opened.enter_context(compiled(self.agent, quiet) if config.compile else captured(self.agent))
            if self.stays:
                self.opened.enter_context(on_device(self.agent))
            if config.profile and self.leads:
                self.opened.enter_context(Profile().of(self))
            try:
                while True:
                    if progress.figures is None:
                        result = self._learn()
                        assert progress.figures is not None
                        self._tell("on_update", progress.figures, result)
                    score = self._assess(progress.figures)
                    if self.finished:
                        tell(self.callbacks, "on_end", self.live)
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
        return self.progress.stopped or self.steps >= self.config.total_timesteps

    def _learn(self) -> UpdateResult:
        """Step the environments and update the agent until it reports; the report, whose figures are progress's."""
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
        progress.figures = figures
        return report

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
            action = self.agent.collect(self.obs, self.buffer)
            env_action = self.agent.env_action(action)
            try:
                # A copy, as an environment may change what it is given, and its replay takes what it was given.
                given = env_action if self.stays else env_action.copy()
                next_obs, reward, terminated, truncated, info = self.envs.step(given)
            except Exception:
                self.buffer.check_finite()  # a nan that the environment showed may be what made it fail
                raise
            learned = as_learned(reward, terminated, info)
            self.buffer.add(self.obs, action, *learned, truncated, next_obs)
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
        self._find_folder()
        due = config.eval_every and progress.updates % config.eval_every == 0
        if due and not (self.finished and config.final_episodes):
            score = self.evaluations.run(config.eval_episodes, evaluation_seed("during", config.seed))
            self._add_score(figures, score)  # of which a callback may say that it is enough
        final = self.finished and config.final_episodes > 0
        if final:
            self._save(None)  # an evaluation may fail, or take longer than anyone waits
            self.envs.close()  # of some tasks no two instances may exist
            self.evaluations.close()
            show = partial(self.console.evaluating, total=config.final_episodes)
            score = self.evaluations.run(config.final_episodes, evaluation_seed("final", config.seed), show)
            self._add_score(figures, score)
            figures["eval/final_return"] = score.mean
        if progress.stopped:
            figures[STOPPED_EARLY] = 1.0
        if self.leads:
            self._log(steps, figures)
        improved = score is not None and score.mean > progress.best
        by_steps = 0 < config.save_every <= steps - self.saved_at
        by_time = config.save_every == 0 and time.monotonic() - self._saved_time >= _SAVE_SECONDS
        if self.ranks.any(self.finished or improved or by_steps or (by_time and self.leads)):
            self._save(score)
        progress.best = max(progress.best, score.mean) if score is not None else progress.best
        progress.logged = steps
        return score if final else None

    def _add_score(self, figures: dict[str, float], score: Evaluation) -> None:
        figures["eval/mean_reward"], figures["eval/std_reward"] = score.mean, score.std
        figures["eval/mean_ep_length"] = statistics.fmean(score.lengths)
        self._tell("on_evaluation", figures, score)

    def _tell(self, hook: str, figures: dict[str, float], *about: Any) -> None:
        """Call the callbacks and put what they log into ``figures``; where one on any rank returns True, the run stops.

        Raises what one raises, once all ranks have saved the run.
        """
        if not self.listened:
            return
        self.live.figures, by, problem = figures, "", None
        try:
            by = tell(self.callbacks, hook, self.live, *about)
        except Exception as raised:
            problem = raised
        self.live.into(figures)
        with self.ranks.patient():
            stops, problems = self.ranks.sum(float(bool(by)), float(problem is not None))
        if problems:
            self._save(None)
            if problem is None:
                raise RankLostError("a callback of another rank failed")
            problem.add_note(f"saved after {self.steps:,} steps in {self.live.folder}, for klrl resume")
            raise problem
        if stops and not self.finished:
            self.progress.stopped, self.stopped_by = True, by or "another rank"

    def _log(self, steps: int, figures: dict[str, float]) -> None:
        every = self.config.histogram_every
        self.logger.write(steps, figures)
        self.track(steps, figures)
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
        mean = None if score is None else score.mean
        complete = self.finished and (score is not None or not self.config.final_episodes)
        state = state_of(self, complete)
        save(self.checkpoints, self.steps, state, mean, self.buffer, self.saved_rows, self.ranks)
        self.saved_at, self._saved_time = self.steps, time.monotonic()
