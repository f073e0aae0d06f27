"""What an agent is: spaces and a config in, actions out, one result per update. No environment, logger or trainer."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from klrl.agents.actor import Actions, Actor
from klrl.buffers.protocol import Buffer
from klrl.config import Seed, build, convert, field_types, to_dict
from klrl.errors import UsageError, one_line
from klrl.kl import ALONE, KLLimit, KLReport, NoClosedFormError, Ranks, concatenate, freeze
from klrl.kl.parameters import parameters_of
from klrl.policies.encoder import Inputs
from klrl.policies.memory import SEQUENCE
from klrl.policies.networks import Array, OwnNetwork, name_of_network, named_network
from klrl.policies.observations import Observation
from klrl.policies.parameters import FlatParameters
from klrl.policies.spaces import check_action_space, check_same_spaces, from_json, to_json
from klrl.rundir import checkpoint

State = dict[str, Any]
Tensors = tuple[Tensor, ...]
_SMALL = 2**22  # weights that are made in no time
CHUNK = 2048  # rows of a batched pass: their activations stay in cache


@dataclass(frozen=True)
class UpdateResult:
    """What one update did."""

    kl: KLReport
    metrics: dict[str, float] = field(default_factory=dict)

    def write(self, record: Callable[[str, float], object]) -> None:
        """Call ``record(tag, value)`` for every metric."""
        for tag, value in self.metrics.items():
            record(tag, value)
        self.kl.write(record)


class Agent(Actor):
    """A policy for one pair of spaces, with what it needs to act, to be saved and to learn.

    A subclass names its dataclass of options as ``Config``, makes its parts in ``setup`` and learns in ``update``.
    """

    Config: ClassVar[type[Any]]
    compiles: tuple[str, ...] = ()
    """Methods that torch.compile may be asked to compile: gradients, from tensors to tensors."""
    captures: tuple[str, ...] = ()
    """Methods that a GPU may repeat as a CUDA graph: they change weights and optimizers alone, all in place, by tensors
    that they are given or that stay where they are. What else one does happens only when it is recorded, so that a
    subclass whose own does more leaves its name out."""
    takes_masks: ClassVar[bool] = False
    """Whether policies obey action masks; where not, ``--env.action-masks auto`` leaves them out."""
    network_options: ClassVar[tuple[str, ...]] = ()
    """Options that do nothing beside a network of one's own."""
    ranks = ALONE

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        config: Any = None,
        device: str | torch.device = "cpu",
        seed: int | None = 0,
        network: str | OwnNetwork | None = None,
    ) -> None:
        """``config``: an instance of ``Config``, or its fields as a dict. ``network``: one's own, from encoded
        observations to features [B, F], or what makes it for a space, or its "module:Class". ``seed``: None draws one.

        Raises UsageError for spaces, options, devices, seeds and networks that do not fit.
        """
        check_action_space(action_space)
        self.observation_space, self.action_space = observation_space, action_space
        options = to_dict(config) if is_dataclass(config) else config or {}
        self.config: Any = build(self.Config, options)
        network = named_network(network) if isinstance(network, str) else network
        self.device = _usable(device)
        seed = convert(Seed, seed, "seed")
        self.rng = np.random.default_rng(seed)
        self.network_name = "" if network is None else name_of_network(network)
        self.n_updates = 0
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # which parts of one's own may draw from
            self.setup(torch.Generator().manual_seed(seed), network)

    def join(self, ranks: Ranks) -> None:
        """Learn together with agents made alike, on ``ranks``: with noise of its own, and the same updates."""
        self.ranks = self.encoder.ranks = ranks
        for part in vars(self).values():
            limit = part if isinstance(part, KLLimit) else getattr(part, "limit", None)
            if isinstance(limit, KLLimit):
                limit.ranks = ranks
        if ranks.size > 1:
            words = [*self.rng.integers(2**32, size=4).tolist(), ranks.rank]
            self.rng.bit_generator.state = np.random.default_rng(words).bit_generator.state

    def total(self, compute: Callable[[], Tensors], losses: int, *groups: FlatParameters) -> Tensors:
        """``compute``'s losses, and the gradient in the weights of ``groups``, summed over all ranks; of several, all
        nan where the policy of one has no KL (ValueError), as its outputs overflow."""
        try:
            return self.ranks.total(*compute())
        except ValueError as problem:
            if self.ranks.size == 1 or isinstance(problem, UsageError | NoClosedFormError):
                raise
            parts = [torch.full((losses,), math.nan, device=self.device), *(group.flat * math.nan for group in groups)]
            (flat,) = self.ranks.total(torch.cat(parts))
            return *flat[:losses], *([flat[losses:]] if groups else [])

    @classmethod
    def name(cls) -> str:
        """What runs and the command line call this agent: its class in lower case."""
        return cls.__name__.lower()

    def prepare(self) -> None:
        """Read what the options name, before a new run begins; by default nothing."""

    @abstractmethod
    def setup(self, init: torch.Generator, network: OwnNetwork | None) -> None:
        """Make encoder, policy and whatever else learns; random weights are drawn with ``init``."""

    def act(
        self, obs: Observation, deterministic: bool = False, rng: Any = None, state: Array | None = None
    ) -> Actions:
        """Actions [N, d] for a batch of observations [N, *shape], in the form that buffers hold.

        Give ``env_action(action)`` to the environment: a sample may lie outside a Box's bounds, and its density is
        that of the sample, not of the clipped action. ``rng``: a generator to sample with, in place of the agent's.
        Lists and tensors do for arrays, and an image may have its channels at either end; UsageError for other shapes.

        ``state``: what a recurrent policy remembers, [N, S], as ``initial_state`` gives it, moved on in place; None
        where each observation is an episode's first.
        """
        remembered = () if state is None else (state,)  # a policy of one's own need not know of any
        return self.policy.act(obs, None if deterministic else self.rng if rng is None else rng, *remembered)

    def collect(self, obs: Observation, buffer: Any) -> Actions:
        """``act`` for a step that ``buffer`` takes next: with what the policy remembers of its environments."""
        return self.act(obs)

    def distribution(self, obs: Observation) -> Any:
        """The policy at observations [B, *shape], as data: no gradients, no view of the weights; with a memory, where
        each is an episode's first."""
        return self.policy_at(self.encoder(obs))

    @torch.no_grad()
    def policy_at(self, inputs: Inputs) -> Any:
        """``distribution`` at observations that are encoded already."""
        return freeze(concatenate([self.policy(chunk) for chunk in chunks(inputs)]))

    @abstractmethod
    def value(self, obs: Observation) -> Tensor:
        """What the agent expects of states, [B], from observations [B, *shape]."""

    def critic_reward(self, reward: npt.NDArray[np.float64], obs: Observation) -> npt.NDArray[np.float64]:
        """What ``value`` adds up: the rewards [B] of steps from observations [B, *shape], scaled, or with a bonus."""
        return reward

    @abstractmethod
    def new_buffer(self, n_envs: int, autoreset: AutoresetMode | str = AutoresetMode.NEXT_STEP) -> Buffer:
        """An empty buffer of the kind that ``update`` takes, for environments that reset as ``autoreset`` says."""

    def ready(self, buffer: Any) -> bool:
        """Whether it is time for ``update``: by default, once the buffer is full."""
        return bool(buffer.full)

    @abstractmethod
    def update(self, buffer: Any, progress: float = 0.0) -> UpdateResult | None:
        """Learn from a buffer that is ready. ``progress``: the fraction of training that is done, for schedules.

        None where there is nothing to report yet: an off-policy agent reports once for many small updates.
        """

    def finish_window(self, buffer: Any) -> UpdateResult | None:
        """The result of an update that the end of training cuts short; None where updates are never cut short."""
        return None

    @abstractmethod
    def state_dict(self) -> State:
        """Everything that decides what happens next, as nested dicts of tensors and JSON values."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Continue from ``state_dict``'s result. Raises ValueError where it does not fit this agent."""

    def modules(self) -> dict[str, nn.Module]:
        """The networks that ``load_policy`` takes over, by name: "policy" first."""
        return {"policy": self.policy}

    @torch.no_grad()
    def load_policy(self, other: "Agent") -> list[str]:
        """Take over another agent's policy, its statistics of observations, and its critics where their form is the
        same; what else an agent has stays as it is. The names of what was taken.

        Raises UsageError where the spaces or the policies' networks differ, or one alone normalises observations.
        """
        if not isinstance(other, Agent):
            raise UsageError(f"load_policy takes an agent, such as klrl.load(path), not {other!r}")
        check_same_spaces(self, other, "the policy's")
        if (sees := list(other.encoder.parts)) != list(self.encoder.parts):
            raise UsageError(f"the policy sees {', '.join(sees)} alone, but this agent {', '.join(self.encoder.parts)}")
        if self.encoder.normalize != other.encoder.normalize:
            seen = "normalised observations" if other.encoder.normalize else "observations as they are"
            raise UsageError(f"the policy takes {seen}, and this agent's does not")
        if not all(weight.isfinite().all() for weight in other.policy.parameters()):
            raise UsageError("the policy has weights that are not finite")
        before = [weight.clone() for weight in self.policy.parameters()]
        taken = [name for name, module in self.modules().items() if _take_over(module, other.modules().get(name))]
        if "policy" not in taken or not _equal(*(agent.policy(agent.encoder.probe()) for agent in (self, other))):
            for weight, own in zip(self.policy.parameters(), before, strict=True):
                weight.copy_(own)
            options = "--hidden-sizes, --activation, --layer-norm, --head, --network, --memory, --bottleneck.size"
            raise UsageError(f"the policy has another network, or other actions: {options}")
        self.encoder.load_state_dict(other.encoder.state_dict())
        return [*taken, *(["statistics of observations"] if self.encoder.normalize else [])]

    def description(self) -> State:
        """What it takes to make this agent again, beside ``state_dict``: its name, options and spaces, as JSON."""
        return {
            "options": {"agent": self.name(), "network": self.network_name, **to_dict(self.config)},
            "observation_space": to_json(self.observation_space),
            "action_space": to_json(self.action_space),
        }

    def save(self, path: str | Path) -> Path:
        """Write the agent to folder ``path``, to be read by ``load``; an earlier one there is replaced as a whole."""
        return checkpoint.write(Path(path), {**self.description(), "agent": self.state_dict()})

    @classmethod
    def load(
        cls,
        path: str | Path,
        which: Literal["last", "best"] = "last",
        device: str | torch.device = "cpu",
        network: OwnNetwork | None = None,
    ) -> Self:
        """The agent that ``save`` wrote, or that a run's folder holds.

        ``network``: the one that it was made with, where that is no class in a module that is imported already.
        Raises UsageError where there is none, where a file is damaged, and where it was another class's.
        """
        source, content = checkpoint.newest(Path(path), which)
        with checkpoint.refusing_misfits(source):
            name = content["state"]["options"]["agent"]
            if name != cls.name():
                raise UsageError(f"{path} holds an agent {name!r}, not a {cls.__name__}")
            return cls.from_state(content["state"], device, network)

    @classmethod
    def from_state(cls, state: State, device: str | torch.device = "cpu", network: OwnNetwork | None = None) -> Self:
        """The agent of a checkpoint's state, as ``load``."""
        agent = cls.from_description(state, state["agent"], device, network)
        agent.load_state_dict(state["agent"])
        return agent

    @classmethod
    def from_description(
        cls, about: State, saved: State, device: str | torch.device = "cpu", network: OwnNetwork | None = None
    ) -> Self:
        """An agent as ``description`` has it, with new weights: of the form that ``saved`` tensors have."""
        if network is None and about["options"]["network"]:
            network = named_network(about["options"]["network"])
        options = {key: value for key, value in about["options"].items() if key in field_types(cls.Config)}
        check_widths(options, saved)
        observation_space, action_space = (from_json(about[key]) for key in ("observation_space", "action_space"))
        return cls(observation_space, action_space, build(cls.Config, options), device, 0, network)


def _take_over(mine: nn.Module, theirs: nn.Module | None) -> bool:
    """Copy the weights where both have parameters of the same names and shapes; whether they have."""
    if theirs is None or _shapes(mine) != _shapes(theirs):
        return False
    for into, source in zip(mine.parameters(), theirs.parameters(), strict=True):
        into.copy_(source)
    return True


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def _equal(one: Any, other: Any) -> bool:
    """Whether two distributions are the same, parameter by parameter, but for another device's rounding."""
    pairs = zip_longest(parameters_of(one), parameters_of(other))
    return type(one) is type(other) and all(torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5) for a, b in pairs)


def _usable(device: str | torch.device) -> torch.device:
    """The device, if this torch has it. Raises UsageError otherwise."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as problem:
        raise UsageError(f"--device {device} cannot be used: {one_line(problem)}") from None


def check_widths(options: Mapping[str, Any], saved: State) -> None:
    """Raise ValueError where the hidden layers that ``options`` ask for cannot be those whose weights are saved, before
    they are made: what a prepared file asks for may take all memory, or hours."""
    widths, code = options.get("hidden_sizes", ()), options.get("bottleneck", {}).get("size", 0)
    critics = options.get("critic_hidden_sizes") or widths
    weights = max(sum(a * b for a, b in pairwise(part)) for part in (widths, critics))
    weights += 2 * code * max([1, *widths[-1:]])
    weights += max([0, *critics[-1:]]) ** 2 if options.get("critic") == "bayesian" else 0
    weights += 6 * options.get("memory_size", 0) ** 2 if options.get("memory", "none") != "none" else 0
    held = sum(part.numel() for part in tree_leaves(saved) if isinstance(part, Tensor))
    if weights > max(held, _SMALL):
        raise ValueError(f"hidden layers of {weights:,} weights, but {held:,} numbers are saved")


def chunks(inputs: Inputs) -> list[Inputs]:
    """Encoded observations in pieces of at most 2048 rows; those of sequences in one."""
    if SEQUENCE in inputs:
        return [inputs]
    first = next(iter(inputs.values()))
    return [{k: v[i : i + CHUNK] for k, v in inputs.items()} for i in range(0, len(first), CHUNK)]
