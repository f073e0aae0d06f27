"""Wrappers that an option names: the usual preprocessing of Atari's games and of other pixels, by Gymnasium's own."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from klrl.console import say, warn
from klrl.envs.wrappers import LEARNED
from klrl.errors import UsageError
from klrl.policies.spaces import is_image, leaves
from klrl.spelling import suggest

Env = gym.Env[Any, Any]
Wrap = Callable[[Env], Env]
_FIRE = 1  # of ALE's actions, in games that have it
_MOST_PIXELS = 128  # of a side: what is larger is slow, and rarely helps


class AtariSignals(gym.Wrapper[Any, Any, Any, Any]):
    """What is usual to learn from on Atari, beside what happens: signs of rewards, and a lost life as an end.

    The game goes on, its rewards are its own, and LEARNED in the info says the others: returns are those of whole
    games. FIRE is pressed where a game or a life waits for it, in place of the agent's action. Source: Mnih et al.
    (2015), as OpenAI Baselines' ``FireResetEnv``, ``EpisodicLifeEnv`` and ``ClipRewardEnv``.
    """

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        game: Any = env.unwrapped
        self.ale, self.has_fire, self.fires = game.ale, game.get_action_meanings()[1:2] == ["FIRE"], False
        self.lives = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        if self.has_fire:
            obs, _, terminated, truncated, info = self.env.step(_FIRE)
            if terminated or truncated:
                obs, info = self.env.reset(options=options)
        self.lives, self.fires = self.ale.lives(), False
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(_FIRE if self.fires else action)
        lives = self.ale.lives()
        lost = 0 < lives < self.lives
        self.lives, self.fires = lives, lost and self.has_fire
        learned = np.array([np.sign(float(reward)), lost])
        return obs, reward, terminated, truncated, {**info, LEARNED: learned}


def atari(env: Env) -> Env:
    """The usual preprocessing (Machado et al. 2018): up to 30 no-ops at first, 4 frames a step of which the last two
    are merged, 84 x 84 grey, 4 of those stacked, and ``AtariSignals``."""
    from gymnasium.wrappers import AtariPreprocessing

    if not hasattr(env.unwrapped, "ale"):
        raise UsageError("--env.wrappers atari is for games of the Arcade Learning Environment, such as ALE/Pong-v5")
    return stack(AtariSignals(AtariPreprocessing(env)), 4)


def grayscale(env: Env) -> Env:
    """Images [H, W, 3] in grey, [H, W]."""
    from gymnasium.wrappers import GrayscaleObservation

    return GrayscaleObservation(env)


def resize(env: Env, size: int) -> Env:
    """Images of ``size`` x ``size`` pixels."""
    from gymnasium.wrappers import ResizeObservation

    return ResizeObservation(env, (size, size))


def stack(env: Env, count: int) -> Env:
    """The last ``count`` observations in one, the oldest first: [count, ...], or [H, W, count * C] of images
    [H, W, C]."""
    from gymnasium.wrappers import FrameStackObservation, TransformObservation

    inner, stacked = env.observation_space, FrameStackObservation(env, count)
    if not (isinstance(inner, spaces.Box) and len(inner.shape) == 3):
        return stacked
    low, high = (np.concatenate([bound] * count, axis=-1) for bound in (inner.low, inner.high))
    merged = spaces.Box(low, high, dtype=inner.dtype.type)
    return TransformObservation(stacked, lambda obs: np.concatenate(obs, axis=-1), merged)


_PLAIN: dict[str, Wrap] = {"atari": atari, "grayscale": grayscale}
_SIZED: dict[str, Callable[[Env, int], Env]] = {"resize": resize, "stack": stack}
WRAPPERS = "atari, grayscale, resize:PIXELS, stack:FRAMES or module:Wrapper"


def named_wrappers(names: Sequence[str]) -> list[Wrap]:
    """What the option's names stand for, in order. Raises UsageError for a name that is unknown, or not imported."""
    return [_named(name) for name in names]


def modules_of(names: Sequence[str]) -> list[str]:
    """The modules that wrappers of the form "module:Wrapper" come from."""
    return [name.rpartition(":")[0] for name in names if ":" in name and name.partition(":")[0] not in _SIZED]


def wrapped(factory: Callable[[], Env], wraps: Sequence[Wrap]) -> Env:
    """An environment of ``factory``'s, wrapped by each in turn."""
    env = factory()
    for wrap in wraps:
        env = wrap(env)
    return env


def _named(name: str) -> Wrap:
    if name in _PLAIN:
        return _PLAIN[name]
    first, colon, last = name.partition(":")
    if first in _SIZED:
        if not (last.isdecimal() and 0 < int(last) <= 4096):
            raise UsageError(f"--env.wrappers {name}: give a number, as in {first}:{84 if first == 'resize' else 4}")
        return partial(_SIZED[first], **{"size" if first == "resize" else "count": int(last)})
    if not colon:
        raise UsageError(f"--env.wrappers {name}{suggest(name, [*_PLAIN, *_SIZED])}: one of {WRAPPERS}")
    module, _, path = name.rpartition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, gym.Wrapper)):
        advice = f"one of {WRAPPERS}" if module in sys.modules else f"--import {module}, if you trust it"
        raise UsageError(f"wrapper {name!r} is no imported gymnasium.Wrapper class: {advice}")
    return found


def say_seen(space: spaces.Space[Any], names: Sequence[str], env_id: str, quiet: bool) -> None:
    """Say what the wrappers of a run make of an observation; warn where images are large and nothing wraps them."""
    parts = [part for _, part in leaves(space)]
    if names and not quiet:
        sizes = ", ".join(f"{' x '.join(map(str, part.shape or (1,)))} {part.dtype}" for part in parts)
        note = "; learns from rewards' signs and lost lives, returns are the game's" if "atari" in names else ""
        say(f"wrappers    {' '.join(names)}: shows {sizes}{note}; --env.wrappers takes others")
    for part in parts:
        if not names and is_image(part) and max(part.shape or ()) > _MOST_PIXELS:
            size = " x ".join(map(str, part.shape or ()))
            option = "atari" if env_id.startswith("ALE/") else "grayscale resize:84 stack:4"
            warn(f"{size} pixels are slow to learn from, and show no motion: --env.wrappers {option} mends both")
