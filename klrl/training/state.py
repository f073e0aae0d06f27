"""Where a loop stands, as a checkpoint holds it, and how a loop goes on from one."""

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from klrl.agents.base import State
from klrl.console import warn
from klrl.envs.make import can_replay
from klrl.envs.native import TorchVectorEnv
from klrl.envs.wrappers import counted_from
from klrl.policies import spaces
from klrl.training.randomness import derived_seed, random_state, restore_random_state, scatter_random_state
from klrl.training.saving import deal_rows, of_rank, put_rows, saved_processes


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
    stopped: bool = False
    """Whether a callback ended the run before its steps were done."""


def state_of(loop: Any, complete: bool) -> State:
    """All of this rank's loop that ``restore`` needs, between two updates or in the middle of collecting."""
    progress = asdict(loop.progress)
    if loop.provisional:
        progress |= {"figures": None, "updates": loop.progress.updates - 1}
    obs = loop.agent.encoder.layout.arrays(loop.obs)
    parts = obs if isinstance(obs, dict) else {"": obs}
    return {
        **loop.agent.description(),
        "options": loop.options,
        "agent": loop.agent.state_dict(),
        "loop": {
            "progress": progress,
            "env_seed": loop.env_seed,
            "episodes": loop.episodes.state_dict(),
            "buffer": loop.buffer.state_dict(),
            "obs": {key: torch.from_numpy(np.array(part)) for key, part in parts.items()},
            "random": random_state(),
            "envs": loop.envs.unwrapped.state_dict() if isinstance(loop.envs.unwrapped, TorchVectorEnv) else {},
            "per_state": None if progress["figures"] is None else loop.per_state,
            "complete": complete,
        },
    }


def restore(loop: Any, source: Path, content: dict[str, Any]) -> None:
    """Go on from a checkpoint of ``state_of``'s, whose ``episodes`` the loop has, and ``envs`` made with their places.

    Raises UsageError where the environment has other spaces.
    """
    saved = content["state"]
    had = SimpleNamespace(**{key: spaces.from_json(saved[key]) for key in ("observation_space", "action_space")})
    spaces.check_same_spaces(loop.agent, had, f"checkpoint {source}: its run's", "the environment's ")
    anew = saved_processes(saved) != loop.ranks.size
    saved = of_rank(saved, 0 if anew else loop.ranks.rank)
    loop.agent.load_state_dict(saved["agent"])
    loop.saved_rows, state = content["rows"], saved["loop"]
    loop.progress, loop.per_state = Progress(**state["progress"]), state["per_state"]
    loop.env_seed = state.get("env_seed", loop.config.seed)
    if anew:
        _begin_anew(loop, source, content)
    else:
        put_rows(loop.buffer, source, content["rows"], loop.ranks)
        loop.buffer.load_state_dict(state["buffer"])
    loop.obs = begin_episodes(loop)
    if isinstance(loop.envs.unwrapped, TorchVectorEnv) and state.get("envs") and not anew:
        loop.obs = loop.envs.unwrapped.load_state_dict(state["envs"])
    elif not (anew or can_replay(loop.envs)):
        if loop.leads:
            warn("this environment's episodes cannot be replayed: they begin anew")
        loop.buffer.forget_unfinished()
        loop.episodes.forget_unfinished()
    loop.meetings.meet()
    loop.saved_at = loop.steps
    loop.resumed_at = loop.progress.logged + 1 if loop.progress.figures is None else loop.steps
    if not (anew and loop.ranks.rank):
        restore_random_state(state["random"])


def _begin_anew(loop: Any, source: Path, content: dict[str, Any]) -> None:
    """Go on with another number of ranks than saved the run, which have other environments."""
    saved = saved_processes(content["state"])
    if loop.leads:
        warn(f"this run had {saved} ranks, and goes on with {loop.ranks.size}: its episodes begin anew")
    deal_rows(loop.buffer, source, content["state"], content["rows"], loop.ranks)
    loop.saved_rows = []
    loop.agent.join(loop.ranks)  # with noise of its own again, not rank 0's
    loop.env_seed = derived_seed(loop.config.seed, content["step"])
    if loop.ranks.rank:
        scatter_random_state(loop.env_seed, loop.ranks.rank)


def begin_episodes(loop: Any) -> Any:
    """Begin the episodes of this rank's environments, which are numbered, and seeded, from those before it."""
    first = loop.ranks.rank * loop.config.n_envs
    if can_replay(loop.envs):
        return loop.envs.reset(seed=loop.env_seed, options=counted_from(first))[0]
    return loop.envs.reset(seed=derived_seed(loop.env_seed, first) if first else loop.env_seed)[0]
