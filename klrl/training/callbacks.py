"""Callbacks: a user's own code that is told how a run goes on, logs into it, and may stop it."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from klrl.agents.base import Agent, UpdateResult
from klrl.errors import UsageError
from klrl.training.evaluation import Evaluation
from klrl.training.options import RunConfig

_HOOKS = ("on_update", "on_evaluation", "on_end")
_ENOUGH = 20  # episodes of which a mean return says something


class LiveRun:
    """A run as its callbacks see it while it goes on. With several ranks each has its own callbacks and LiveRun."""

    def __init__(self, loop: Any, folder: Path) -> None:
        self._loop, self._pending = loop, dict[str, float]()
        self.folder = folder
        self.agent: Agent = loop.agent
        self.config: RunConfig = loop.config
        """The run's options; the agent's are ``agent.config``."""
        self.rank: int = loop.ranks.rank
        """0 for the one that writes; a run of one process has no other."""
        self.figures: dict[str, float] = {}
        """What will be logged of the last update, value by tag: ``figures["rollout/ep_rew_mean"]``."""

    @property
    def steps(self) -> int:
        """Environment steps so far, of all ranks."""
        return int(self._loop.steps)

    @property
    def updates(self) -> int:
        """Updates so far (off-policy: windows), which are the same in every run of a setting, as its steps are not."""
        return int(self._loop.progress.updates)

    @property
    def episodes(self) -> int:
        """How many training episodes rollout/ep_rew_mean is of: the last 100 of each rank, or as many as there were."""
        return int(self._loop.episodes.counted)

    def log(self, tag: str, value: float) -> None:
        """Put a number of one's own into the run's next row: from on_update and on_evaluation, that of this update.

        Raises UsageError for "step" and "wall", which every row has; another tag of klrl's is replaced.
        """
        if tag in ("step", "wall"):
            raise UsageError(f"log({tag!r}, ...): each row has that already; choose another tag")
        self._pending[tag] = float(value)

    def into(self, figures: dict[str, float]) -> None:
        """Move what was logged into a row."""
        figures |= self._pending
        self._pending = {}


class Callback:
    """What a run calls: subclass it, or pass any object that has some of these methods."""

    def on_update(self, run: LiveRun, result: UpdateResult) -> bool | None:
        """After an update (off-policy: a window of kl.every steps), before it is logged. True stops the run."""
        return None

    def on_evaluation(self, run: LiveRun, evaluation: Evaluation) -> bool | None:
        """After an evaluation, the final one included, before it is logged. True stops the run."""
        return None

    def on_end(self, run: LiveRun) -> None:
        """Once the run is at its end, all logged and saved; not after a signal or an error."""


class StopAtReturn(Callback):
    """Stops a run at a mean return: of its last training episodes, at least 20, or of an evaluation."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.__name__ = f"--stop-at-return {target:g}"

    def on_update(self, run: LiveRun, result: UpdateResult) -> bool:
        return run.episodes >= _ENOUGH and run.figures["rollout/ep_rew_mean"] >= self.target

    def on_evaluation(self, run: LiveRun, evaluation: Evaluation) -> bool:
        return evaluation.mean >= self.target


def callbacks_of(given: Iterable[object], config: RunConfig) -> list[object]:
    """The callbacks of a run, with those of its options. Raises UsageError for what is none."""
    if not isinstance(given, Iterable):
        raise UsageError(f"callbacks takes a list of callbacks, got {given!r}")
    callbacks = list(given)
    for one in callbacks:
        if isinstance(one, type) or not any(callable(getattr(one, hook, None)) for hook in _HOOKS):
            raise UsageError(f"callbacks: {one!r} is no object with a method {', '.join(_HOOKS[:-1])} or {_HOOKS[-1]}")
    return [*callbacks, *([StopAtReturn(config.stop_at_return)] if config.stop_at_return < math.inf else [])]


def tell(callbacks: Iterable[object], hook: str, *about: Any) -> str:
    """Call a hook of all that have it; the name of one that returned True, or ""."""
    stop = ""
    for one in callbacks:
        if hasattr(one, hook) and getattr(one, hook)(*about):
            stop = getattr(one, "__name__", type(one).__name__)
    return stop
