"""Checkpoints that are either whole or not there: a folder of safetensors and JSON with a manifest of SHA-256 sums.

A checkpoint is written to a temporary folder, synced and renamed, so a crash leaves the one before. Loading verifies
every file against the manifest before it reads one, and never runs code: there is no pickle anywhere.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from klrl.errors import UsageError

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_MOST_JSON = 64 * 1024 * 1024


def save(folder: Path, step: int, state: dict[str, Any], score: float | None = None) -> Path:
    """Write ``state`` (nested dicts of tensors and JSON values) to ``folder/step-N`` and return its path.

    ``score``: the evaluation's mean return at this step, by which the best checkpoint is known. An existing
    checkpoint of the same step is replaced. Raises OSError where the disk does not take it; others stay valid.
    """
    target = folder / f"step-{step:012d}"
    temporary = folder / f".writing-{target.name}-{os.getpid()}"
    tensors: dict[str, Tensor] = {}
    plain = _split(state, "", tensors)
    files = {
        _TENSORS: save_tensors(tensors),
        _STATE: json.dumps({"step": step, "score": score, "state": plain}).encode(),
    }
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    files[_MANIFEST] = json.dumps({"format": 1, "files": sums}, indent=1).encode()
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            with open(temporary / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _sync(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        _sync(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def load(path: Path) -> dict[str, Any]:
    """The content of one checkpoint: {"step", "score", "state"}, tensors in their places on the CPU.

    Raises UsageError naming the file where anything is missing, truncated or altered.
    """
    try:
        manifest = json.loads(_read(path / _MANIFEST, _MOST_JSON))
        sums = {name: manifest["files"][name] for name in (_TENSORS, _STATE)}
        data = {name: _read(path / name, int(entry["bytes"])) for name, entry in sums.items()}
        for name, entry in sums.items():
            if hashlib.sha256(data[name]).hexdigest() != entry["sha256"]:
                raise UsageError(f"checkpoint {path} is damaged: {name} does not match its manifest")
        content = json.loads(data[_STATE])
        content["state"] = _join(content["state"], load_tensors(data[_TENSORS]))
    except FileNotFoundError as problem:
        raise UsageError(f"{path} is not a klrl checkpoint: {Path(str(problem.filename)).name} is missing") from None
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as problem:
        raise UsageError(f"checkpoint {path} is damaged: {type(problem).__name__} while reading it") from None
    result: dict[str, Any] = content
    return result


def steps(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first; unfinished ones are not among them."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def find(path: Path, which: str = "last") -> Path:
    """The checkpoint that a run folder or checkpoint path means: itself, or the run's "last" or "best".

    The best has the highest evaluation; without any evaluation it is the last. Raises UsageError where there is none.
    """
    if (path / _MANIFEST).exists() or path.name.startswith("step-"):
        return path
    if not path.is_dir():
        raise UsageError(f"no run or checkpoint at {path}")
    found = steps(path / "checkpoints")
    if not found:
        raise UsageError(f"{path} is not a run folder: it has no checkpoints/step-N")
    return max(found, key=_rank) if which == "best" else found[-1]


def prune(folder: Path) -> None:
    """Remove all checkpoints but the last and the best."""
    found = steps(folder)
    if found:
        best = max(found, key=_rank)
        for path in found[:-1]:
            if path != best:
                shutil.rmtree(path)


def _rank(path: Path) -> tuple[float, str]:
    try:
        score = json.loads((path / _STATE).read_bytes()).get("score")
    except (OSError, ValueError, AttributeError):
        score = None  # damaged: load says so if it is the one that is wanted
    return (float("-inf") if score is None else float(score), path.name)


def _read(path: Path, most: int) -> bytes:
    """A regular file's bytes, refused where it is a link or larger than its manifest says."""
    if path.is_symlink():
        raise UsageError(f"{path} is a link: a checkpoint holds its own files")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise UsageError(f"checkpoint {path.parent} is damaged: {path.name} is longer than its manifest says")
    return data


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` with every tensor moved to ``tensors`` and replaced by a reference to it."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"$tensor": path}
    if isinstance(value, dict):
        return {key: _split(part, f"{path}.{key}" if path else key, tensors) for key, part in value.items()}
    return value


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {key: _join(part, tensors) for key, part in value.items()}
    return value
