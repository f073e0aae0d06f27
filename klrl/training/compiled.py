"""An agent's gradients under torch.compile, in place of its methods while it trains."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from klrl.agents.base import Agent
from klrl.console import say, warn
from klrl.errors import one_line


class Compiled:
    """A method under torch.compile, with fixed shapes; the method itself once that fails, which a line says."""

    def __init__(self, method: Callable[..., Any], quiet: bool) -> None:
        self.method, self.name, self.quiet = method, method.__name__.strip("_").replace("_", " "), quiet
        self.compiled: Callable[..., Any] | None = torch.compile(method, dynamic=False, fullgraph=True)
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            return self.method(*args)
        start, self.calls = time.perf_counter(), self.calls + 1
        try:
            result = self.compiled(*args)
        except _failures() as problem:
            self.compiled = None
            warn(f"--compile: {self.name} goes on uncompiled: {one_line(problem)[:200]}")
            return self.method(*args)
        if self.calls == 1 and not self.quiet:
            say(f"compiled    {self.name} in {time.perf_counter() - start:.1f} s")
        return result


@contextmanager
def compiled(agent: Agent, quiet: bool = False) -> Iterator[None]:
    """Let the agent learn with compiled gradients in the block; ``quiet``: without a line for each."""
    import torch._dynamo  # which takes a second

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        warn(f"--compile changed nothing: torch {torch.__version__} cannot compile gradients; 2.13 can")
        yield
        return
    methods = {name: Compiled(getattr(agent, name), quiet) for name in agent.compiles}
    # Each agent, number of rows and changed setting is compiled anew; torch's own limit is 8 in a process.
    with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=64, accumulated_recompile_limit=1024):
        vars(agent).update(methods)
        try:
            yield
        finally:
            for name in methods:
                delattr(agent, name)
    if not any(method.calls for method in methods.values()):
        why = "these gradients are written out by hand, which is faster" if methods else "this agent compiles nothing"
        warn(f"--compile changed nothing: {why}")


def _failures() -> tuple[type[Exception], ...]:
    """What is raised where a method cannot be compiled."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, FailOnRecompileLimitHit, InductorError
