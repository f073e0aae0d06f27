"""What an environment's reset and step returned, checked: what is not as Gymnasium wants it is named in one line."""

from typing import Any

import numpy as np
from gymnasium import spaces

Step = tuple[Any, float, bool, bool, dict[str, Any]]


def check_reset(space: spaces.Space[Any], answer: Any) -> tuple[Any, dict[str, Any]]:
    """The observation and info that ``reset`` returned. Raises ValueError that says what is wrong with them."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(f"reset returned {_kind(answer)}, not obs, info")
    obs, info = answer
    check_observation(space, obs)
    return obs, _info(info)


def check_step(space: spaces.Space[Any], answer: Any) -> Step:
    """The five things that ``step`` returned; a number or truth value may be an array of one element.

    Raises ValueError that says what is wrong with them.
    """
    if type(answer) is not tuple or len(answer) != 5:
        raise ValueError(f"step returned {_kind(answer)}, not obs, reward, terminated, truncated, info")
    obs, reward, terminated, truncated, info = answer
    if type(obs) is not np.ndarray or obs.shape != space.shape or obs.dtype != space.dtype:
        check_observation(space, obs)
    if type(reward) is not float:
        reward = float(_one("reward", reward, "fiub", "a number"))
    if type(terminated) is not bool:
        terminated = _flag("terminated", terminated)
    if type(truncated) is not bool:
        truncated = _flag("truncated", truncated)
    return obs, reward, terminated, truncated, _info(info)


def check_observation(space: spaces.Space[Any], obs: Any, name: str = "observation") -> None:
    """Raise ValueError where an observation has not the shape of its space, or holds what it does not.

    Bounds of a Box are not looked at: many environments overstep theirs, and nothing depends on them.
    """
    if isinstance(space, spaces.Dict):
        if not isinstance(obs, dict):
            raise ValueError(f"its {name} is {_kind(obs)}, not a dict of {', '.join(map(str, space.spaces))}")
        for key, part in space.spaces.items():
            if key not in obs:
                raise ValueError(f"its {name} has no {key!r}, only {', '.join(map(str, obs))}")
            check_observation(part, obs[key], f"{name} {key!r}")
    elif isinstance(space, spaces.Box):
        if type(obs) is np.ndarray and obs.dtype == space.dtype and obs.shape == space.shape:
            return
        array = np.asarray(obs)
        if array.shape != space.shape:
            raise ValueError(f"its {name} has shape {array.shape}, its space {space.shape}")
        if not np.can_cast(array.dtype, space.dtype, "same_kind"):
            raise ValueError(f"its {name} is of type {array.dtype}, its space of {space.dtype}")
    elif not space.contains(obs):
        raise ValueError(f"its {name} {obs!r} lies outside of its space {space}")


def _flag(name: str, value: Any) -> bool:
    found = _one(name, value, "biuf", "True or False")
    if found not in (0, 1):
        raise ValueError(f"its {name} is {value!r}, not True or False")
    return bool(found)


def _one(name: str, value: Any, kinds: str, wanted: str) -> Any:
    """The one number of a scalar or an array of one element."""
    if isinstance(value, int | np.floating | np.integer | np.bool_):
        return value
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in kinds:
        shown = repr(value) if array.size < 10 else f"of shape {array.shape}"
        raise ValueError(f"its {name} is {shown}, not {wanted}")
    return array.item()


def _info(info: Any) -> dict[str, Any]:
    if not isinstance(info, dict):
        raise ValueError(f"its info is {_kind(info)}, not a dict")
    return info


def _kind(value: Any) -> str:
    return (
        f"{len(value)} values" if isinstance(value, tuple) else "None" if value is None else f"a {type(value).__name__}"
    )
