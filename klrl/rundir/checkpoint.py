"""Checkpoints that are either whole or not there: a folder of safetensors and JSON with a manifest of SHA-256 sums.

A checkpoint is written to a temporary folder, synced and renamed, so a crash leaves the one before. Loading verifies
every file against the manifest before it reads one, and never runs code: there is no pickle anywhere. A replay buffer's
rows are written once, beside the checkpoints: each manifest names the files that hold those it needs.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from klrl.console import warn
from klrl.errors import EnvironmentFailedError, UsageError, refusals
from klrl.rundir.folder import new_file, open_file
from klrl.rundir.hub import PREFIX, downloaded
from klrl.rundir.trees import join, split

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_MAX_JSON_BYTES = 64 * 1024 * 1024
_TEMPORARY = ".writing-"
_FORMAT = 2
_WRITERS = {1: "klrl 0.1.0, whose runs this version does not read: use that one, or train anew"}
# What reading altered files raises.
_DAMAGE = (
    OSError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SafetensorError,
    TypeError,
    ValueError,
)
_ROWS_FILE = re.compile(r"rows-[0-9]{1,20}-[0-9a-f]{16}\.safetensors")
_UNFINISHED = re.compile(rf"{re.escape(_TEMPORARY)}(?:(?:old-)?(step-[0-9]{{12}})-[0-9]+|{_ROWS_FILE.pattern})")


class Rows(Protocol):
    """A replay buffer as a checkpoint sees it: rows numbered from the first ever written, the last ones kept."""

    size: int
    written: int

    def rows(self, start: int) -> dict[str, Tensor]: ...


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    score: float | None = None,
    rows: Sequence[Rows] = (),
    saved_rows: list[dict[str, Any]] | None = None,
) -> Path:
    """Write ``state`` (nested dicts of tensors and JSON values) to ``folder/step-N`` and return its path.

    ``score``: the evaluation's mean return at this step, by which the best checkpoint is known. An existing
    checkpoint of the same step is replaced. ``rows``: those of each rank. ``saved_rows``: the entries of the files that
    already hold some of them; brought up to date. Raises OSError where the disk does not take it; others stay valid.
    """
    entries = [
        {**entry, "rank": rank}
        for rank, part in enumerate(rows)
        for entry in _save_rows(folder, part, rows_of(rank, saved_rows or []))
    ]
    target = folder / f"step-{step:012d}"
    _write_folder(target, {"step": step, "score": score, "state": state}, entries)
    if saved_rows is not None:
        saved_rows[:] = entries
    return target


def write(target: Path, state: dict[str, Any]) -> Path:
    """Write ``state`` alone to the folder ``target``, which is new or was written so. Raises UsageError otherwise."""
    if target.exists() and not (target / _MANIFEST).is_file():
        raise UsageError(f"{target} exists and was not written by klrl: name a new folder")
    shutil.rmtree(_write_folder(target, {"step": 0, "score": None, "state": state}, []), ignore_errors=True)
    return target


def _write_folder(target: Path, content: dict[str, Any], entries: list[dict[str, Any]]) -> Path:
    """Write a checkpoint's files beside ``target`` and rename them into place; where what was there was set aside."""
    temporary, aside = (target.with_name(f"{_TEMPORARY}{old}{target.name}-{os.getpid()}") for old in ("", "old-"))
    tensors: dict[str, Tensor] = {}
    plain = {**content, "state": split(content["state"], "", tensors)}
    files = {_TENSORS: save_tensors(tensors), _STATE: json.dumps(plain).encode()}
    sums = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    files[_MANIFEST] = _sealed({"format": _FORMAT, "files": sums, "rows": entries})
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            _write(temporary / name, data)
        _sync(temporary)
        if target.exists():
            os.rename(target, aside)
        os.rename(temporary, target)
        _sync(target.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return aside


def rows_of(rank: int, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of the files that hold a rank's rows."""
    return [entry for entry in entries if entry.get("rank", 0) == rank]


def first_unsaved(rows: Rows, saved: list[dict[str, Any]]) -> int:
    """The first of the rows that no file of ``saved`` holds."""
    return max([rows.written - rows.size, *(entry["end"] for entry in saved)])


def _save_rows(folder: Path, rows: Rows, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of the files that hold the rows: those of ``saved`` that are still needed, and one for what is new."""
    entries = [entry for entry in saved if entry["end"] > rows.written - rows.size]
    start = first_unsaved(rows, entries)
    if start == rows.written:
        return entries
    data = save_tensors(rows.rows(start))
    digest = hashlib.sha256(data).hexdigest()
    name = f"rows-{start}-{digest[:16]}.safetensors"
    temporary = folder / f"{_TEMPORARY}{name}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _write(temporary, data)
        os.replace(temporary, folder / name)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return [*entries, {"name": name, "start": start, "end": rows.written, "sha256": digest, "bytes": len(data)}]


def load(path: Path, with_rows: bool = False) -> dict[str, Any]:
    """The content of one checkpoint: {"step", "score", "state", "rows"}, tensors in their places on the CPU.

    ``with_rows``: verify the files of "rows", too, for ``load_rows``. Raises UsageError naming the file where anything
    is missing, truncated or altered.
    """
    try:
        raw = _read(path / _MANIFEST, _MAX_JSON_BYTES)
        manifest = json.loads(raw)
        if _sealed(manifest) != raw:
            raise UsageError(f"checkpoint {path} is damaged: {_MANIFEST} is not as it was written")
        if manifest["format"] != _FORMAT:
            raise UsageError(f"checkpoint {path} was written by {_WRITERS.get(manifest['format'], 'a later klrl')}")
        sums = {name: manifest["files"][name] for name in (_TENSORS, _STATE)}
        if sums[_STATE]["bytes"] > _MAX_JSON_BYTES:
            raise UsageError(f"checkpoint {path} is damaged: {_STATE} is said to have {sums[_STATE]['bytes']} bytes")
        data = {name: _verified(path / name, entry) for name, entry in sums.items()}
        content = json.loads(data[_STATE])
        content["state"] = join(content["state"], load_tensors(data[_TENSORS]))
        content["rows"] = manifest["rows"]
        if with_rows:
            for _ in load_rows(path, content["rows"]):
                pass
    except FileNotFoundError as problem:
        raise UsageError(f"{path} is not a klrl checkpoint: {Path(str(problem.filename)).name} is missing") from None
    except UsageError:
        raise
    except _DAMAGE as problem:
        raise UsageError(f"checkpoint {path} is damaged: {type(problem).__name__} while reading it") from None
    return content


def load_rows(path: Path, entries: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The replay rows that the checkpoint at ``path`` needs, file by file, each with the number of its first row."""
    for entry in entries:
        if not _ROWS_FILE.fullmatch(entry["name"]):
            raise UsageError(f"checkpoint {path} is damaged: it names a file {entry['name']!r}")
        yield int(entry["start"]), load_tensors(_verified(path.parent / entry["name"], entry))


def newest(path: Path, which: str = "last", with_rows: bool = False) -> tuple[Path, dict[str, Any]]:
    """Load what ``resolve`` names; where a run's checkpoint is damaged, the one before it, and say so on stderr."""
    if (name := str(path)).startswith(PREFIX):
        with downloaded(name) as folder:
            source, content = newest(folder, which, with_rows)
            return name.removeprefix(PREFIX) / source.relative_to(folder), content
    first = resolve(path, which)
    if first == path:
        return path, load(path, with_rows)
    complaint: UsageError | None = None
    for candidate in [first, *(p for p in reversed(steps(path / "checkpoints")) if p != first)]:
        try:
            content = load(candidate, with_rows)
        except UsageError as problem:
            complaint = complaint or problem
            continue
        if complaint is not None:
            warn(f"{complaint}; {candidate.name} is used instead")
        return candidate, content
    assert complaint is not None
    raise complaint


@contextlib.contextmanager
def refusing_misfits(source: Path) -> Iterator[None]:
    """Raise UsageError where a checkpoint's content, used in the block, is not what this version writes."""
    try:
        yield
    except (UsageError, EnvironmentFailedError):
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as problem:
        raise UsageError(f"checkpoint {source} does not fit this version of klrl: {problem}") from None


def clean(folder: Path) -> None:
    """Remove what a process that was killed while it saved had not finished, and restore what it had set aside.

    Raises UsageError where ``folder`` is a link: what lies elsewhere is not this run's.
    """
    if folder.is_symlink():
        raise UsageError(f"{folder} is a link: a run holds its own checkpoints")
    for path in steps(folder):
        if (match := _UNFINISHED.fullmatch(path.name)) is not None:
            os.rename(path, folder / match[1])
    for path in folder.glob(f"{_TEMPORARY}*"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if _is_folder(path) else path.unlink()


def steps(folder: Path) -> list[Path]:
    """The checkpoints below ``folder``, oldest first; unfinished ones are not among them.

    They are called step- and twelve digits; whatever else lies there, a link too, is somebody else's.
    One that was set aside for a newer one of the same step counts, where a kill kept the newer from its place.
    """
    if not folder.is_dir():
        return []
    found = {path.name: path for path in folder.glob("step-" + 12 * "[0-9]") if _is_folder(path)}
    for path in folder.glob(f"{_TEMPORARY}old-*"):
        if (match := _UNFINISHED.fullmatch(path.name)) is not None and _is_folder(path):
            found.setdefault(match[1], path)
    return [found[name] for name in sorted(found)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def step_of(path: Path) -> int:
    """The step of a checkpoint that ``steps`` names."""
    return int(path.name.rpartition("step-")[2].partition("-")[0])


def resolve(path: Path, which: str = "last") -> Path:
    """The checkpoint that a run folder or checkpoint path means: itself, or the run's "last" or "best".

    The best has the highest evaluation; without any evaluation it is the last. Raises UsageError where there is none.
    """
    with refusals(str(path)):
        if (path / _MANIFEST).exists() or (path.name.startswith("step-") and not (path / "checkpoints").exists()):
            return path
        is_folder = path.is_dir()
    if not is_folder:
        raise UsageError(f"no run or checkpoint at {path}")
    found = steps(path / "checkpoints")
    if not found:
        raise UsageError(f"{path} is not a run folder: it has no checkpoints/step-N")
    return max(found, key=_rank) if which == "best" else found[-1]


def prune(folder: Path) -> None:
    """Remove all checkpoints but the last two and the best, and the rows that none of them needs."""
    found = steps(folder)
    if not found:
        return
    kept = {*found[-2:], max(found, key=_rank)}
    for path in found:
        if path not in kept:
            shutil.rmtree(path)
    files = [path for path in folder.glob("rows-*") if _ROWS_FILE.fullmatch(path.name)]
    needed = {entry["name"] for path in kept if files for entry in _rows_of(path)}
    for path in files:
        if path.name not in needed:
            path.unlink()
    clean(folder)


def _rows_of(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(_read(path / _MANIFEST, _MAX_JSON_BYTES))["rows"]
    except _DAMAGE:
        return []  # damaged: load says so if it is wanted


def _rank(path: Path) -> tuple[float, str]:
    try:
        score = float(json.loads(_read(path / _STATE, _MAX_JSON_BYTES))["score"])
    except _DAMAGE:
        score = float("-inf")  # none, or damaged: load says so if it is the one that is wanted
    return score, path.name


def _verified(path: Path, entry: dict[str, Any]) -> bytes:
    """A file's bytes, verified against the size and SHA-256 sum of its ``entry`` in the manifest."""
    data = _read(path, entry["bytes"])
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise UsageError(f"checkpoint {path.parent} is damaged: {path.name} does not match its manifest")
    return data


def _read(path: Path, maximum: int) -> bytes:
    """A regular file's bytes. Raises UsageError for a link, and for a file of more than ``maximum`` bytes."""
    if path.is_symlink():
        raise UsageError(f"{path} is a link: a checkpoint holds its own files")
    try:
        with open_file(path, maximum, links=False) as file:
            return file.read(maximum)
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
        raise UsageError(f"checkpoint {path.parent} is damaged: {path.name} is {problem.strerror}") from None


def _write(path: Path, data: bytes) -> None:
    with open(new_file(path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The manifest as bytes, its own SHA-256 sum at the end."""
    content = {key: part for key, part in manifest.items() if key != "seal"}
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "seal": seal}, indent=1).encode()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
