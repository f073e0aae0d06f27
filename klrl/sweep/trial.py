"""The trials of a sweep, one setting with one seed each, whose progress is read from the runs' folders.

While a process works on a trial, it holds the lock of a file that the sweep opened for it. So no trial is worked on
twice at once: not by two sweeps, and not after one was killed while its processes went on.
"""

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import tomli_w

from klrl.envs.make import module_of
from klrl.errors import UsageError
from klrl.policies.own import names_in
from klrl.rundir import checkpoint
from klrl.rundir.folder import in_use, replace_file, try_lock
from klrl.rundir.history import History, read_history, setting_of
from klrl.sweep.grid import Setting, file_name

Status = Literal["running", "elsewhere", "failed", "waiting", "stopped", "finished"]


class Trial:
    """One setting with one seed, and the process at work on it."""

    def __init__(self, setting: Setting, seed: int, folder: Path) -> None:
        """``folder``: the setting's, in which the run's own folder lies or will lie."""
        self.setting, self.seed, self.folder = setting, seed, folder
        self.stem = file_name(f"{setting.options['agent']}-{setting.options['env_id']}-{seed}")
        self.stopped = folder / f".{self.stem}.stopped"
        """A file that says why a scheduler stopped the trial early."""
        self.status: Status = "waiting"
        self.history: History | None = None
        self.problem = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None

    def read(self) -> bool:
        """Read what the trial's run has logged, if anything, and return whether the run is finished and saved.

        A run with other options does not belong to the trial.
        """
        wanted = setting_of(self.setting.options)
        found = []
        for path in self._runs():
            with contextlib.suppress(UsageError):  # it has not begun to log
                found.append(read_history(path))
        auto = {name: value for name, value in wanted.items() if value == "auto"}  # a run says what it became
        mine = [history for history in found if setting_of(history.options) | auto == wanted]
        self.history = last = max(mine, key=lambda history: history.steps, default=None)
        whole = last is not None and last.state == "finished" and _saved_at(last) >= last.steps
        if whole and self.process is None:
            self.status = "finished"
        elif self.stopped.exists():
            self.status, self.problem = "stopped", self.stopped.read_text(errors="replace")[:200].strip()
        return whole

    def look(self) -> None:
        """Update the status of a trial that another process may work on."""
        self.read()
        if self.status in ("waiting", "running"):
            self.status = "running" if any(map(in_use, self._runs())) else "waiting"

    def begin(self) -> bool:
        """Start the trial's process. It resumes the run, or begins it anew where there is no checkpoint yet.

        Where another process works on the trial, nothing is started, and its status is "elsewhere". False where the
        run is finished, and nobody works on it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with try_lock(self.folder / f".{self.stem}.lock") as lock:
            if lock is None or any(map(in_use, self._runs())):
                self.status, self.problem = "elsewhere", "another process is at work on it"
                return True
            self.problem = ""
            if self.read():
                return False
            # Modules, those of --import too, are looked up where the sweep itself does, which a mere ``-m klrl`` would
            # not do: it puts the current folder first, and a random.py there in place of Python's.
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in poll)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "klrl", *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path},
                pass_fds=[lock],
                start_new_session=True,  # so that a signal reaches it once, from the sweep
            )
            self.status = "running"
        return True

    def poll(self) -> None:
        """Update the status if the trial's process has ended."""
        if self.process is None or (code := self.process.poll()) is None:
            return
        with self._errors as file:
            file.seek(0)
            text = file.read().decode(errors="replace")
        self.process, self.status = None, "failed"
        if not self.read():
            self.problem = failure_reason(text, code)

    def _runs(self) -> list[Path]:
        return sorted(self.folder.glob(f"{glob.escape(self.stem)}-[0-9]*"))

    def _command(self) -> list[str]:
        """The arguments of klrl that resume the trial's run, or begin it; a run that cannot be resumed is removed."""
        stopped, options = self.history, self.setting.options
        # A run's own folder imports nothing: what the sweep was given is given again.
        packages = [*options["imports"], *map(module_of, names_in(options).values()), module_of(options["env_id"])]
        imports = [f"--import={package}" for package in dict.fromkeys(packages) if package]
        if stopped is not None and _saved_at(stopped) >= 0:
            return ["resume", str(stopped.folder), *imports]
        for path in self._runs():
            if (stopped is not None and path == stopped.folder) or not (path / "metrics.jsonl").exists():
                shutil.rmtree(path)
        self.history = None
        path = self.folder / "options.toml"
        replace_file(path, tomli_w.dumps(options))
        where = ["--config", str(path), "--run-dir", str(self.folder)]
        return ["train", options["agent"], options["env_id"], "--quiet", "--seed", str(self.seed), *where, *imports]


def _saved_at(run: History) -> int:
    """The step of the run's last checkpoint; -1 where it has none."""
    saved = checkpoint.steps(run.folder / "checkpoints")
    return checkpoint.step_of(saved[-1]) if saved else -1


def failure_reason(text: str, code: int) -> str:
    """Why a process ended with the exit code ``code``, from what it wrote to stderr."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line.removeprefix("klrl: ") for line in lines if line.startswith("klrl: ")]
    if code < 0 and not named:
        return f"ended by {signal.Signals(-code).name}"
    return (named or lines or [f"exit code {code}"])[-1]
