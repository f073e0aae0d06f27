"""An agent's steps as CUDA graphs, in place of its methods while it trains on a GPU.

A step of a small network is some hundred kernels, each of which takes longer to launch than to run. A graph is recorded
once for each form of a step's arguments, and launches them all at once, on tensors that stay where they are.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from klrl.agents.base import Agent
from klrl.agents.fused import hooked
from klrl.agents.reference import FrozenPolicy, Reference
from klrl.console import warn
from klrl.errors import one_line
from klrl.kl import KLLimit
from klrl.kl.parameters import map_parameters
from klrl.kl.state import without_looking
from klrl.policies.parameters import FlatParameters
from klrl.training.randomness import random_state, random_state_kept

Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]
"""Records what a function does: what repeats it, and the outputs, whose tensors each repetition writes anew."""
_MOST = 16  # recordings of a method; other forms of its arguments are not recorded
_WARM_UPS = 2


@contextmanager
def captured(agent: Agent, record: Recorder | None = None) -> Iterator[None]:
    """Let the agent take its steps (``agent.captures``) as CUDA graphs in the block, where it is on a GPU.

    With several ranks, whose steps wait for each other, they are taken as they are; in either case no KL looks at its
    numbers. ``record``: in place of CUDA's, which a test has for a CPU.
    """
    if record is None:
        if agent.device.type != "cuda":
            yield
            return
        record = partial(record_graph, agent.device)
    if agent.ranks.size > 1:
        record = None
    names = agent.captures
    before = {name: vars(agent)[name] for name in names if name in vars(agent)}
    vars(agent).update({name: Captured(agent, getattr(agent, name), record) for name in names})
    try:
        yield
    finally:
        for name in names:
            delattr(agent, name)
        vars(agent).update(before)


@dataclass
class Recording:
    """A method's work on arguments of one form."""

    inputs: list[Tensor]
    """Where it reads the arguments' tensors."""
    repeat: Callable[[], object]
    outputs: Any
    reads: list[Any]
    """What else it was recorded with, which is not to be freed."""


class Captured:
    """A method that is recorded, and then repeated on copies of its arguments; the method itself, once that fails,
    which a line says."""

    def __init__(self, agent: Agent, method: Callable[..., Any], record: Recorder | None) -> None:
        """``record``: None takes the method as it is."""
        self.agent, self.method, self.record = agent, method, record
        self.__name__ = method.__name__
        self.recordings: dict[Any, Recording] = {}
        self.said = False

    def __reduce__(self) -> Any:
        return self.method.__reduce__()  # a copy of the agent takes its steps as they are

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with without_looking():
            if self.record is None:
                return self.method(*args, **kwargs)
            if any(hooked(module) for each in self.agent.modules().values() for module in each.modules()):
                self._say("somebody hooked in, whose Python a graph would leave out")
                return self.method(*args, **kwargs)
            try:
                recording, tensors = self._recorded((args, kwargs), self.record)
            except Exception as problem:  # whatever CUDA refuses to record, or a network of one's own
                self.record, self.recordings = None, {}
                result = self.method(*args, **kwargs)  # which raises what has nothing to do with recording
                self._say(one_line(problem)[:200])
                return result
            if recording is None:
                self._say(f"it has more than {_MOST} forms")
                return self.method(*args, **kwargs)
            for mine, given in zip(recording.inputs, tensors, strict=True):
                mine.copy_(given)
            recording.repeat()
            return mapped(recording.outputs, _cloned)

    def _say(self, why: str) -> None:
        if not self.said:
            self.said = True
            warn(f"CUDA graphs: {self.__name__.strip('_').replace('_', ' ')} goes on without: {why}")

    def _recorded(self, arguments: Any, record: Recorder) -> tuple[Recording | None, list[Tensor]]:
        """The recording for arguments of this form, and their tensors; None where there are too many."""
        tensors: list[Tensor] = []
        form: list[Any] = []

        def note(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                tensors.append(leaf)
            form.append((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf)
            return leaf

        mapped(arguments, note)
        groups, settings = _groups(self.agent), _settings(self.agent)
        learns = [p.requires_grad for group in groups for p in group.parameters.values()]
        key = (*form, *learns, *(x if isinstance(x, str | float) else id(x) for x in settings))
        if key not in self.recordings and len(self.recordings) < _MOST:
            inputs = [_cloned(tensor) for tensor in tensors]

            def run() -> Any:
                # Made anew each time: what a distribution remembers of its parameters is of their numbers then.
                own = iter(inputs)
                args, kwargs = mapped(arguments, lambda leaf: next(own) if isinstance(leaf, Tensor) else leaf)
                return self.method(*args, **kwargs)

            with _undone(self.agent):
                repeat, outputs = record(run)
            mapped(outputs, _cloned)  # which raises for what no tensors and constants are
            self.recordings[key] = Recording(inputs, repeat, outputs, [*settings, *(group.frozen for group in groups)])
        return self.recordings.get(key), tensors


def record_graph(device: torch.device, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    """Record ``run`` as a CUDA graph, after a few warm-up runs, which leave what they changed.

    What it draws from the device's default generator, each repetition draws anew; another torch.Generator would have to
    be registered with the graph (``register_generator_state``). Raises RuntimeError where it waits for the device.
    """
    now, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    side.wait_stream(now)
    with torch.cuda.device(device), torch.cuda.stream(now):  # which a capture that fails does not go back to
        try:
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    run()
                with waiting_raises():  # here, as in a capture it would be an error of CUDA's
                    run()
        finally:
            now.wait_stream(side)  # before anything that these runs changed is put back
        gc.disable()  # a tensor that it frees meanwhile would break the capture
        try:
            with torch.cuda.graph(graph, stream=side):
                outputs = run()
        finally:
            if collects:
                gc.enable()
    return graph.replay, outputs


@contextmanager
def waiting_raises() -> Iterator[None]:
    """Let whatever waits for the GPU raise RuntimeError in the block."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch does not find every such operation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _undone(agent: Agent) -> Iterator[None]:
    """Put weights, optimizers and random generators back after the block.

    Raises RuntimeError where it drew random numbers on the CPU, which its repetitions would not.
    """
    groups, random = _groups(agent), agent.rng.bit_generator.state
    before = [group.state_dict() for group in groups]
    try:
        with random_state_kept():
            drawn = _drawn(agent)
            yield
            if _drawn(agent) != drawn:
                raise RuntimeError("it draws random numbers on the CPU")
    finally:
        agent.rng.bit_generator.state = random
        for group, state in zip(groups, before, strict=True):
            group.load_state_dict(state)


def _drawn(agent: Agent) -> list[Any]:
    """Where the generators on the CPU stand."""
    state = random_state()
    return [state["torch"].tolist(), state["numpy"], state["python"], agent.rng.bit_generator.state]


def _groups(agent: Agent) -> list[FlatParameters]:
    return [part for part in vars(agent).values() if isinstance(part, FlatParameters)]


def _settings(agent: Agent) -> list[Any]:
    """What steps go by beside their arguments: objects that are replaced, and do not change or change in place."""
    parts = list(vars(agent).values())
    parts += [each for part in parts if isinstance(part, Reference) for each in vars(part).values()]
    limits = [part for part in parts if isinstance(part, KLLimit)]
    rules = [each for x in limits for each in (x.direction, x.influence, x.beta, x.penalty.bound, *x.rules)]
    return [agent.config, *rules, *(part for part in parts if isinstance(part, Tensor | FrozenPolicy))]


def _cloned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """``x`` with every tensor and constant in its containers, dataclasses and distributions replaced by ``function`` of
    it. Raises ValueError for what is none of these."""
    if x is None or isinstance(x, Tensor | bool | int | float | str):
        return function(x)
    if isinstance(x, dict):
        return {key: mapped(value, function) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return type(x)([mapped(item, function) for item in x])
    if is_dataclass(x) and not isinstance(x, type):
        return type(x)(**{field.name: mapped(getattr(x, field.name), function) for field in fields(x)})
    return map_parameters(x, function)
