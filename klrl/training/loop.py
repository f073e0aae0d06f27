"""The training loop of every agent: collect and learn until there is a report, then evaluate, log and save."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from klrl.agents.base import Agent, State, UpdateResult
from klrl.buffers.protocol import Buffer
from klrl.envs.make import can_replay
from klrl.errors import EnvironmentFailedError, Interrupted, NonFiniteError, SkippedUpdateError
from klrl.rundir import checkpoint
from klrl.rundir.logger import Console, Logger
from klrl.training.episodes import Episodes
from klrl.training.evaluation import EVAL_SEED, FINAL_SEED, Evaluation, run_episodes
from klrl.training.signals import Signals

_FINAL_EPISODES = 20
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
    figures: dict[str, float] | None = None
    """Those of an update that is not evaluated and logged yet."""


@dataclass
class Loop:
    """What a run consists of. ``run`` goes on from wherever it stands."""

    agent: Agent
    buffer: Buffer
    envs: Envs
    episodes: Episodes
    make_envs: Callable[[int], Envs]
    """Makes that many environments for an evaluation."""
    folder: Path
    options: dict[str, Any]
    seed: int
    total: int
    eval_every: int
    eval_episodes: int
    save_every: int
    histogram_every: int
    console: Console
    logger: Logger

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.obs: Any = None
        self.signals = Signals()
        self.saved_rows: list[dict[str, Any]] = []
        self.per_state: torch.Tensor | None = None  # KL of the last update, until it is logged
        self.provisional = False  # the figures are of an update that goes on if the run does
        self._saved_at, self._saved_time = 0, time.monotonic()
        self._evaluator: Envs | None = None

    def restore(self, state: State) -> None:
        """Go on from the "loop" that ``_save`` wrote; ``episodes`` is restored, and ``envs`` made with its places."""
        self.progress = Progress(**state["progress"])
        self.per_state = state["per_state"]
        self.buffer.load_state_dict(state["buffer"])
        self.obs, _ = self.envs.reset(seed=self.seed)
        if not can_replay(self.envs):
            self.console.warn("this environment's episodes cannot be replayed: they begin anew")
            self.buffer.forget_unfinished()
            self.episodes.forget_unfinished()
        self._saved_at = self.episodes.steps
        _restore_random(state["random"])

    def run(self) -> Evaluation:
        """Train until the steps are done; the final evaluation. Raises Interrupted after a signal, once saved."""
        progress = self.progress
        if self.obs is None:
            self.obs, _ = self.envs.reset(seed=self.seed)
        try:
            with self.signals:
                while True:
                    try:
                        if progress.figures is None:
                            progress.figures = self._learn()
                        score = self._assess(progress.figures)
                    except Interrupted:
                        self._save(None)
                        raise
                    except EnvironmentFailedError:
                        if self.signals.signum:  # the signal reached the workers, too
                            self._save(None)
                            self.signals.check()
                        raise
                    if score is not None and self.finished:
                        return score
                    progress.figures, progress.began = None, self.episodes.steps
        except NonFiniteError as problem:
            saved = checkpoint.steps(self.folder / "checkpoints")
            kept = f"; the last checkpoint is {saved[-1]}" if saved else ""
            raise NonFiniteError(f"{problem}, {self.episodes.steps} steps into the run{kept}") from None
        finally:
            self._close_evaluator()

    @property
    def finished(self) -> bool:
        return self.episodes.steps >= self.total

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
        figures["time/fps"] = self.episodes.steps / progress.training_time
        figures["time/collect_share"] = 1 - learning / seconds
        return figures

    def _until_report(self) -> tuple[UpdateResult, float]:
        """Step and update until there is a report; it, and the seconds that the updates took."""
        progress, learning = self.progress, 0.0
        report: UpdateResult | None = None
        while report is None:
            self.signals.check()
            if self.finished and (report := self.agent.finish_window(self.buffer)) is not None:
                self.provisional = report.kl.rolled_back == 0
                break
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
            if "restarted" in info:
                self._warn(info["restarted"][info["_restarted"]])
            self.obs = next_obs
            if self.agent.ready(self.buffer):
                due = time.perf_counter()
                try:
                    report = self.agent.update(self.buffer, progress.began / self.total)
                except SkippedUpdateError as problem:
                    self._skip(str(problem))
                learning += time.perf_counter() - due
        return report, learning

    def _skip(self, why: str) -> None:
        self.progress.skipped += 1
        if self.progress.skipped >= _MOST_SKIPPED:
            raise NonFiniteError(f"{_MOST_SKIPPED} updates in a row were skipped, the last as {why}")

    def _warn(self, reasons: Any) -> None:
        for reason in reasons:
            self.console.warn(f"{reason}; the episode counts as truncated")
        self.episodes.restarted += len(reasons)

    def _assess(self, learned: dict[str, float]) -> Evaluation | None:
        """Evaluate where it is time, log, and save; the evaluation's score."""
        progress, steps, figures, score = self.progress, self.episodes.steps, dict(learned), None
        if self.finished:
            score = self._evaluate(_FINAL_EPISODES, FINAL_SEED)
        elif self.eval_every and progress.updates % self.eval_every == 0:
            score = self._evaluate(self.eval_episodes, EVAL_SEED)
        if score is not None:
            figures["eval/mean_reward"], figures["eval/std_reward"] = score.mean, score.std
            figures["eval/mean_ep_length"] = statistics.fmean(score.lengths)
            if self.finished:
                figures["eval/final_return"] = score.mean
        self.logger.write(steps, figures)
        if self.per_state is not None and self.histogram_every and progress.updates % self.histogram_every == 0:
            # In logarithms: KLs spread over decades, and on a plain axis all but the largest are one bar.
            magnitudes = self.per_state.double().clamp(1e-12, 1e12).log10().cpu().numpy()
            self.logger.write_histogram(steps, "kl/log10_per_state", magnitudes)
        self.console.update(steps, figures)
        improved = score is not None and score.mean > progress.best
        by_steps = 0 < self.save_every <= steps - self._saved_at
        by_time = self.save_every == 0 and time.monotonic() - self._saved_time >= _SAVE_SECONDS
        if self.finished or improved or by_steps or by_time:
            self._save(score)
        progress.best = max(progress.best, score.mean) if score is not None else progress.best
        progress.logged = steps
        return score

    def _evaluate(self, episodes: int, seed: int) -> Evaluation:
        """Episodes that leave the global generators as they were, so that training does not depend on them."""
        before = _random_state()
        try:
            if self._evaluator is None or self._evaluator.num_envs != episodes:
                self._close_evaluator()
                self._evaluator = self.make_envs(episodes)
            return run_episodes(self.agent, self._evaluator, self.seed + seed, check=self.signals.check)
        finally:
            _restore_random(before)

    def _close_evaluator(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
            self._evaluator = None

    def _save(self, score: Evaluation | None) -> None:
        """Save everything, as it is between two updates or in the middle of collecting."""
        progress = asdict(self.progress)
        if self.provisional:
            progress |= {"figures": None, "updates": self.progress.updates - 1}
        state = {
            **self.agent.description(),
            "options": self.options,
            "agent": self.agent.state_dict(),
            "loop": {
                "progress": progress,
                "episodes": self.episodes.state_dict(),
                "buffer": self.buffer.state_dict(),
                "obs": {key: torch.from_numpy(np.array(part)) for key, part in _parts(self.obs)},
                "random": _random_state(),
                "per_state": None if progress["figures"] is None else self.per_state,
                "complete": self.finished and score is not None,
            },
        }
        folder = self.folder / "checkpoints"
        checkpoint.save(
            folder, self.episodes.steps, state, None if score is None else score.mean, self.buffer, self.saved_rows
        )
        checkpoint.prune(folder)
        self._saved_at, self._saved_time = self.episodes.steps, time.monotonic()


def resume_step(state: State) -> int:
    """The step from which a loop that is restored from ``state`` logs."""
    progress = state["progress"]
    return int(progress["logged"]) + 1 if progress["figures"] is None else int(state["episodes"]["steps"])


def _parts(obs: Any) -> list[tuple[str, Any]]:
    return list(obs.items()) if isinstance(obs, dict) else [("", obs)]


def _random_state() -> State:
    """The global generators', which an environment or the user's code may draw from; an agent has its own."""
    kind, keys, *rest = np.random.get_state()  # a tuple, as set_state takes it back
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "python": [version, list(words), gauss],
    }


def _restore_random(state: State) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(tuple(state["numpy"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
