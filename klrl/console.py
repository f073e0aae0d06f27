"""What is printed for whoever watches a run: a convenience, without which the run goes on."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal

Stream = Literal["stdout", "stderr"]
LAUNCH = "KLRL_LAUNCH"
"""What a launch is known by whose ranks may be started again."""
FOLLOW = "KLRL_FOLLOW_PARENT"
"""Set for a run that is to save and end where the process that started it is gone."""
SILENT = "KLRL_SILENT_RANKS"
"""Set for ranks whose last words their launcher prints."""


def printable(text: str) -> str:
    """The text with its line breaks, and every other character that a terminal would obey, not show, as an escape.

    Names and messages of others may hold such; a file's name also what is no UTF-8.
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def say(line: str, to: Stream = "stdout") -> None:
    """Print a line, if anybody can read it; what the stream's encoding does not have is escaped."""

    def show() -> None:
        stream = getattr(sys, to)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = printable(line).encode(encoding, "backslashreplace").decode(encoding)
        stream.write(f"{text}\n")  # at once, as several processes may print
        stream.flush()

    attempt(show, to)


def warn(text: str) -> None:
    """Print a line on stderr, even where a run is quiet."""
    say(f"klrl: {text}", "stderr")


def rank() -> int | None:
    """Which rank torchrun, or klrl's own launcher, started this process as; None where it was started otherwise."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["RANK"]) if all(name in os.environ for name in names) else None


def fail(line: str) -> None:
    """Print an error of one line on stderr; of a rank, leave it to whoever started that."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": line, "timestamp": int(time.time())}, file)
    if SILENT not in os.environ:
        say(f"klrl: {line}" if rank() is None else f"klrl: rank {rank()}: {line}", "stderr")


def attempt(show: Callable[[], object], to: Stream = "stdout") -> None:
    """Call ``show``, which prints to the stream; where that fails, all that follows there goes nowhere.

    It fails once a pipe's reader or the terminal has gone, and on a full disk. A stream may also be closed from the
    beginning.
    """
    if not is_open(to):
        return
    try:
        show()
    except (OSError, ValueError) as problem:  # ValueError: a stream that was closed meanwhile
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it may become the stream)
        try:
            os.dup2(nowhere.fileno(), getattr(sys, to).fileno())
            nowhere.close()
        except (OSError, ValueError, AttributeError):  # a stream of somebody's own, without a file
            setattr(sys, to, nowhere)
        if to == "stdout":
            say(f"klrl: stdout: {getattr(problem, 'strerror', problem)}; the run goes on without it", "stderr")


def is_open(name: Stream) -> bool:
    """Whether the stream is there to be printed to."""
    stream = getattr(sys, name)
    return stream is not None and not getattr(stream, "closed", False)


def is_terminal(name: Stream = "stdout") -> bool:
    """Whether the stream is there, and a terminal; one of somebody's own may not even know."""
    return is_open(name) and bool(getattr(getattr(sys, name), "isatty", lambda: False)())


class TerminalLine:
    """A line that rich writes anew."""

    def __init__(self) -> None:
        from rich.progress import Progress, TextColumn
        from rich.table import Column

        column = TextColumn("{task.description}", table_column=Column(no_wrap=True))
        self._progress = Progress(column, auto_refresh=False)  # by a thread, which a closed terminal would end
        self._task = self._progress.add_task("")
        attempt(self._progress.start)

    def show(self, line: str) -> None:
        attempt(partial(self._progress.update, self._task, description=line, refresh=True))

    def close(self) -> None:
        """Leave the line as it is and give the terminal back."""
        attempt(self._progress.stop)


class NotebookLine:
    """A line of a cell's output that Jupyter's front end writes anew."""

    def __init__(self) -> None:
        display: Any = import_module("IPython.display").display
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, line: str) -> None:
        self._handle.update({"text/plain": line}, raw=True)

    def close(self) -> None:
        pass


def live_line() -> TerminalLine | NotebookLine | None:
    """A line to write anew, where somebody watches: on a terminal, or in a notebook."""
    if in_notebook():
        return NotebookLine()
    return TerminalLine() if is_terminal() else None


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def keep_standard_files() -> None:
    """Open on nothing what is closed of stdin, stdout and stderr.

    A run's own file would otherwise get the number of one, and in it what a library prints by that number.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
