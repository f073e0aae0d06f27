"""An agent's gradients under torch.compile, in place of its methods while it trains."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from klrl.agents.base import Agent
from klrl.console import say, warn
from klrl.errors import UsageError, one_line


class Compiled:
    """A method under torch.compile, with fixed shapes; the method itself once that fails, which a line says."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.name = method, method.__name__.strip("_").replace("_", " ")
        self.compiled: Callable[..., Any] | None = torch.compile(method, dynamic=False, fullgraph=True)
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        if self.compiled is None:
            return self.method(*args)
        start, self.calls = time.perf_counter(), self.calls + 1
        try:
            result = self.compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as problem:
            self.compiled = None
            warn(f"--compile: {self.name} goes on uncompiled: {one_line(problem)[:200]}")
            return self.method(*args)
        if self.calls == 1:
            say(f"compiled    {self.name} in {time.perf_counter() - start:.1f} s")
        return result


@contextmanager
def compiled(agent: Agent) -> Iterator[None]:
    """Let the agent learn with compiled gradients in the block.

    Raises UsageError where this torch cannot compile gradients.
    """
    import torch._dynamo  # which takes a second
    import torch._inductor.exc

    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise UsageError(f"--compile: torch {torch.__version__} cannot compile gradients; 2.13 can")
    methods = {name: Compiled(getattr(agent, name)) for name in agent.compiles}
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        vars(agent).update(methods)
        try:
            yield
        finally:
            for name in methods:
                delattr(agent, name)
    if not any(method.calls for method in methods.values()):
        why = "these gradients are written out by hand, which is faster" if methods else "this agent compiles nothing"
        warn(f"--compile changed nothing: {why}")
