"""Where a run's time goes, part by part: a table at its end, and a trace for Chrome's about:tracing or Perfetto."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from klrl.console import say
from klrl.kl import Move

_MOST_EVENTS = 200_000  # of a trace: some 20 MB
# The calls that are timed, by the part of the run's time that they are. What a part calls of another is that one's.
_OF_AGENT = {
    "act": "acting",
    "collect": "acting",
    "env_action": "acting",
    "make_batch": "values and advantages",
    "_learn": "minibatches",
    "_linearize": "minibatches",
    "_natural_step": "minibatches",
    "_fit_critic": "minibatches",
    "_step": "minibatches",
    "update": "rest of the update",
}
_OF_KL = ("excess", "check", "end")


class Profile:
    """Seconds and calls of each part, and the calls themselves as events of a trace."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.events: list[tuple[str, float, float]] = []
        self._inner: list[float] = []  # of each call under way, the time that went into other parts
        self._start = time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time counted as ``part``'s but for what timed functions take that it calls."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken, inner = time.perf_counter() - begun, self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken
                self.seconds[part] = self.seconds.get(part, 0.0) + taken - inner
                self.calls[part] = self.calls.get(part, 0) + 1
                if len(self.events) < _MOST_EVENTS:
                    self.events.append((part, begun - self._start, taken))

        return call

    @contextmanager
    def of(self, loop: Any) -> Iterator[None]:
        """Time what ``loop`` does in the block, print the table, and write profile.json beside its checkpoints."""
        watched = [(loop.envs, "step", "environment"), (loop.buffer, "add", "buffer")]
        own = [(name, part) for name, part in _OF_AGENT.items() if callable(getattr(loop.agent, name, None))]
        watched += [(loop.agent, name, part) for name, part in own]
        watched += [(loop, "_save", "saving"), (loop.evaluations, "run", "evaluation"), (loop, "_assess", "logging")]
        watched += [(loop.ranks, name, "between processes") for name in ("_reduced", "_gathered")]
        watched += [(Move, name, "KL") for name in _OF_KL]
        before = [(owner, name, vars(owner).get(name)) for owner, name, _ in watched]
        for owner, name, part in watched:
            setattr(owner, name, self.timed(part, getattr(owner, name)))
        self._start = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - self._start
            for owner, name, was in before:
                if was is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, was)
            for line in self.table(whole):
                say(line)
            say(f"trace       {self.write(loop.checkpoints.parent / 'profile.json')}")

    def table(self, whole: float) -> list[str]:
        """The lines of a table of the parts, the largest first, with what is left of the ``whole`` seconds."""
        rows = sorted(self.seconds.items(), key=lambda row: -row[1])
        rows.append(("everything else", max(whole - sum(self.seconds.values()), 0.0)))
        lines = [f"{'part':22}{'seconds':>9}{'share':>8}{'calls':>11}{'us a call':>11}"]
        for part, seconds in rows:
            calls = self.calls.get(part, 0)
            each = f"{calls:>11,}{1e6 * seconds / calls:>11,.0f}" if calls else ""
            lines.append(f"{part:22}{seconds:>9.2f}{seconds / whole:>8.1%}{each}")
        return lines

    def write(self, path: Path) -> Path:
        """Write the events as a trace in Chrome's format, times in microseconds."""
        events = [
            {"name": part, "ph": "X", "ts": round(1e6 * begun, 1), "dur": round(1e6 * taken, 1), "pid": 0, "tid": 0}
            for part, begun, taken in self.events
        ]
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        return path
