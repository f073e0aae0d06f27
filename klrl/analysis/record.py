"""Videos of a trained policy: an mp4 for each episode, a frame for each state, on request with text on it."""

import contextlib
import ctypes.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from gymnasium.vector import SyncVectorEnv

from klrl.analysis.video import Frame, Video, draw_text, find_encoder
from klrl.config import Checked, Count, EnvCount, Range
from klrl.envs.make import Imports
from klrl.errors import UsageError, one_line
from klrl.kl import kl
from klrl.policies.distributions import MultiCategorical
from klrl.policies.observations import Observation
from klrl.rundir import checkpoint
from klrl.training.evaluation import evaluation_seed, run_episodes
from klrl.training.load import LoadedPolicy, load_policy
from klrl.training.loop import Envs


@dataclass(frozen=True)
class RecordConfig(Checked):
    episodes: EnvCount = 3
    """Episodes to record, an mp4 each: the ones that klrl eval runs when asked for as many."""
    output: str = ""
    """Folder for the videos, by default videos/ in the run's; those of the same name there are replaced."""
    overlay: bool = False
    """Write onto each frame the step and the return so far, and what the policy is at that state: its entropy,
    the most likely of discrete actions, and KL(before||this), before being the checkpoint that was kept before it."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of a run's checkpoints."""
    env_id: str = ""
    """Another environment with the same spaces; the run's own by default."""
    imports: Imports = ()
    stochastic: bool = False
    """Sample actions instead of taking the most likely ones."""
    seed: Count = 0
    """Another seed records other episodes."""
    max_steps: Annotated[int, Range(1, 27_000)] = 10_000
    """Steps after which an episode is cut off."""


def record(path: str, config: RecordConfig) -> list[Path]:
    """Record the policy of a run or checkpoint, at the environment's own speed, and return the videos' paths.

    They are named ``step-N-episode-I.mp4`` and have a frame for each state, the last one included: one more than the
    episode has steps. Raises UsageError where there is no such run, the extra "video" is missing, or the environment
    cannot be rendered, and OSError where a video cannot be written.
    """
    find_encoder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_display())
        trained = load_policy(path, config.checkpoint, config.imports)
        beside = trained.folder.parent
        folder = Path(config.output or (beside.parent if beside.name == "checkpoints" else beside) / "videos")
        if not config.output and folder.is_symlink():  # where a run's own folder is not the user's, nor is this
            raise UsageError(f"{folder} is a link: a run holds its own videos; --output names another folder")
        names = [f"{trained.folder.name}-episode-{i}.mp4" for i in range(config.episodes)]
        envs = stack.enter_context(contextlib.closing(_make_envs(trained, config)))
        fps = float(envs.metadata.get("render_fps") or 30)
        videos = [stack.enter_context(contextlib.closing(Video(folder / name, fps))) for name in names]
        overlay = Overlay(trained) if config.overlay and not trained.agent.policy.state_size else None

        def capture(obs: Observation, running: Any, returns: Any, step: int, first: int) -> None:
            lines = overlay.lines(obs) if overlay is not None else None
            for i, frame in _frames(envs, np.flatnonzero(running).tolist()):
                if lines is not None:
                    frame = draw_text(frame, [f"step {step}  return {returns[i]:.1f}", *lines[i]])
                videos[first + i].add(frame)
            for i in np.flatnonzero(~running).tolist():
                if first + i < len(videos):
                    videos[first + i].finish()

        seed = evaluation_seed("afterwards", trained.config.seed, config.seed)
        run_episodes(trained.agent, envs, seed, not config.stochastic, capture, config.max_steps, config.episodes)
        for video in videos:
            video.finish()
    return [video.path for video in videos]


class Overlay:
    """Lines about a policy at a state: its entropy, its likeliest action, and its KL from the checkpoint before."""

    def __init__(self, trained: LoadedPolicy) -> None:
        self.agent = trained.agent
        kept = checkpoint.steps(trained.folder.parent)
        earlier = [path for path in kept if checkpoint.step_of(path) < trained.step]
        self.before = load_policy(earlier[-1]) if earlier else None

    def lines(self, obs: Observation) -> list[list[str]]:
        """The lines to show for each of the states ``obs`` [B, *shape]."""
        policy = self.agent.distribution(obs)
        parts = [[f"entropy {entropy:.3f} nats" for entropy in policy.entropy().tolist()]]
        if isinstance(policy, MultiCategorical):
            actions = self.agent.env_action(policy.mode.numpy())
            chances = policy.log_probs.amax(-1).sum(-1).exp().tolist()
            parts.append([f"likeliest action {a}, p {p:.3f}" for a, p in zip(actions, chances, strict=True)])
        if self.before is not None:
            moved = kl(self.before.agent.distribution(obs), policy).tolist()
            parts.append([f"KL(step {self.before.step:,}||this) {x:.4f} nats" for x in moved])
        return [list(lines) for lines in zip(*parts, strict=True)]


def _frames(envs: Envs, running: list[int]) -> list[tuple[int, Frame]]:
    """A frame of each of the environments ``running``, with its index."""
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # Gymnasium's, of missing metadata
            sync = envs.unwrapped.envs if isinstance(envs.unwrapped, SyncVectorEnv) else None
            frames: Any = {i: sync[i].render() for i in running} if sync else envs.render()
            return [(i, np.asarray(frames[i], np.uint8)[:, :, :3]) for i in running]
    except Exception as problem:
        text = one_line(problem)
        # A renderer that was only half made complains when it is collected, which is now, and unheard.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        traceback.clear_frames(problem.__traceback__)
        sys.unraisablehook = hook
        needs = "; without a display, MuJoCo needs libEGL or libOSMesa" if "mujoco" in sys.modules else ""
        raise UsageError(f"the environment cannot be rendered here: {text}{needs}") from None


def _make_envs(trained: LoadedPolicy, config: RecordConfig) -> Envs:
    """Make the environments as evaluation does, but in this process and with frames."""
    here = replace(trained, config=replace(trained.config, env=replace(trained.config.env, vectorization="sync")))
    probe = here.make_envs(1, config.env_id)
    modes = probe.metadata.get("render_modes") or []
    probe.close()
    if "rgb_array" not in modes:
        offered = f"renders only as {', '.join(modes)}" if modes else "renders nothing"
        raise UsageError(f"{config.env_id or trained.env} cannot be recorded, which takes rgb_array: it {offered}")
    return here.make_envs(config.episodes, config.env_id, render_mode="rgb_array")


@contextlib.contextmanager
def _without_display() -> Iterator[None]:
    """Set what pygame and MuJoCo draw with where there is no display, unless that is set already.

    MuJoCo reads it when it is imported, Gymnasium when it draws.
    """
    before = dict(os.environ)
    if sys.platform == "linux" and not (before.get("DISPLAY") or before.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
        for library, backend in (("EGL", "egl"), ("OSMesa", "osmesa")):
            if ctypes.util.find_library(library):
                os.environ.setdefault("MUJOCO_GL", backend)
    try:
        yield
    finally:
        for name in {"SDL_VIDEODRIVER", "MUJOCO_GL"} - before.keys():
            os.environ.pop(name, None)
