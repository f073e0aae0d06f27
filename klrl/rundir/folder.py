"""Run folders: a new one for each run, a lock that keeps it to one process, and files that are written whole."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from klrl.errors import UsageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


def make_folder(parent: str, name: str) -> Path:
    """A new folder ``parent/name-time``, numbered where that is taken. Raises UsageError where it cannot be made."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}".replace("/", "_").replace(":", "_")
    try:
        os.makedirs(parent, exist_ok=True)
        for number in range(1, 10_000):
            folder = Path(parent) / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
    except OSError as problem:
        raise UsageError(
            f"--run-dir {parent}: {problem.strerror or problem}; choose a folder you can write to"
        ) from None
    raise UsageError(f"--run-dir {parent}: 10,000 runs of this second lie there already")


def replace_file(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all. A link there is replaced, and none is followed."""
    temporary = path.with_name(f".writing-{path.name}")
    temporary.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(temporary, flags, 0o644), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock; the system frees it when the process ends, however it ends.

    Raises UsageError where another process holds it, or where the folder cannot be written.
    """
    try:
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as problem:
        raise UsageError(f"{folder}: {problem.strerror or problem}; the run's folder must be writable") from None
    try:
        if not _acquire(handle):
            owner = os.read(handle, 32).decode(errors="replace").strip()
            raise UsageError(f"{folder} is still running, in process {owner or 'unknown'}")
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)


def _acquire(handle: int) -> bool:
    """Try to lock the open file, and return whether that succeeded."""
    for _ in range(10):  # ``in_use`` in another process holds it for an instant
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
    return False


def in_use(folder: Path) -> bool:
    """Whether a process holds the run's lock at this moment."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder / "lock", os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False
