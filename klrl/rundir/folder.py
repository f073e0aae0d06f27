"""Run folders: a new one for each run, a lock that keeps it to one process, and files that are written whole."""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from klrl.errors import UsageError, refusals

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


def make_folder(parent: str, name: str, here: Path = Path()) -> Path:
    """A new folder ``parent/name-time`` seen from ``here``, numbered where that is taken.

    Raises UsageError where it cannot be made.
    """
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}".replace("/", "_").replace(":", "_")
    with refusals(f"--run-dir {parent}", "; choose a folder you can write to"):
        os.makedirs(here / parent, exist_ok=True)
        for number in range(1, 10_000):
            folder = here / parent / (stem if number == 1 else f"{stem}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    raise UsageError(f"--run-dir {parent}: 10,000 runs of this second lie there already")


def replace_file(path: Path, lines: Iterable[str]) -> None:
    """Write ``path``, a text or its lines, whole or not at all. A link there is replaced, and none is followed."""
    temporary = path.with_name(f".writing-{path.name}")
    with open(new_file(temporary), "w", encoding="utf-8") as file:
        file.writelines([lines] if isinstance(lines, str) else lines)
    os.replace(temporary, path)


def new_file(path: Path) -> int:
    """Open a file to write that is new: what has its name, a link that somebody laid there too, is removed first."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o644)


def open_file(path: Path, maximum: int, links: bool = True) -> BinaryIO:
    """Open a file to read.

    Raises OSError for what is none (a FIFO or device, which could keep a reader for ever), for more than ``maximum``
    bytes, and for a link unless ``links``.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0))
    handle = os.open(path, flags)
    about = os.fstat(handle)
    if stat.S_ISREG(about.st_mode) and about.st_size <= maximum:
        return open(handle, "rb")
    os.close(handle)
    problem = f"more than {maximum:,} bytes" if stat.S_ISREG(about.st_mode) else "not a regular file"
    raise OSError(errno.EINVAL, problem, str(path))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's lock.

    Raises UsageError where another process holds it, or where the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with refusals(str(folder), "; the run's folder must be writable"):
            # Ten times: ``in_use`` in another process holds it for an instant.
            handle = stack.enter_context(try_lock(folder / "lock", 10))
        if handle is None:
            with open_file(folder / "lock", 32) as file:
                owner = file.read().decode(errors="replace").strip()
            raise UsageError(f"{folder} is still running, in process {owner or 'unknown'}")
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield


@contextlib.contextmanager
def try_lock(path: Path, attempts: int = 1) -> Iterator[int | None]:
    """Lock the file: the handle, which a child process can inherit, or None where another process has the lock.

    The system frees it when the last process that has the handle ends, however it ends.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield handle if _acquire(handle, attempts) else None
    finally:
        os.close(handle)


def _acquire(handle: int, attempts: int = 1, shared: bool = False) -> bool:
    """Try to lock the open file, and return whether that succeeded."""
    for attempt in range(attempts):
        time.sleep(0.02 if attempt else 0.0)
        with contextlib.suppress(BlockingIOError):
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
            return True
    return False


def in_use(folder: Path) -> bool:
    """Whether a process holds the run's lock at this moment."""
    try:
        file = open_file(folder / "lock", 32, links=False)
    except OSError:
        return False
    with file:
        return not _acquire(file.fileno(), shared=True)
