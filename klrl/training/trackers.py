"""Other libraries that a run logs by beside TensorBoard: a row for each, begun, written to and closed as it is used."""

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from klrl.config import flatten
from klrl.console import warn
from klrl.errors import UsageError, one_line
from klrl.rundir.folder import open_file, replace_file

_IDS = "trackers.json"
_MOST_FAILED = 3  # rows in a row, before a library is left alone: each may take a minute
Row = Mapping[str, float]


class Tracker(NamedTuple):
    """A run in a library."""

    id: str
    """By which the library knows the run, to go on with it."""
    write: Callable[[int, Row], object]
    close: Callable[[bool], object]
    """Told whether the run came to its end."""


def _wandb(folder: Path, options: dict[str, Any], id: str | None) -> Tracker:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "klrl")
    run: Any = wandb.init(
        project=project, name=folder.name, id=id, resume="allow", dir=str(folder), reinit="create_new",
        settings=wandb.Settings(console="off"),
    )  # fmt: skip
    run.config.update(options, allow_val_change=True)
    return Tracker(run.id, lambda step, row: run.log(dict(row), step=step), lambda whole: run.finish(not whole))


def _trackio(folder: Path, options: dict[str, Any], id: str | None) -> Tracker:
    import trackio

    project, name = os.environ.get("TRACKIO_PROJECT", "klrl"), id or folder.name
    run = trackio.init(project=project, name=name, config=options, resume="allow" if id else "never", embed=False)
    return Tracker(run.name, lambda step, row: run.log(dict(row), step=step), lambda whole: run.finish())


def _mlflow(folder: Path, options: dict[str, Any], id: str | None) -> Tracker:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client, name = MlflowClient(), os.environ.get("MLFLOW_EXPERIMENT_NAME", "klrl")
    if id is None:
        found = client.get_experiment_by_name(name)
        experiment = client.create_experiment(name) if found is None else found.experiment_id
        id = str(client.create_run(experiment, run_name=folder.name).info.run_id)
        client.log_batch(id, params=[Param(key, str(value)[:500]) for key, value in flatten(options).items()])
    else:
        client.update_run(id, status="RUNNING")

    def write(step: int, row: Row) -> None:
        now = int(1000 * time.time())
        client.log_batch(id, metrics=[Metric(tag, value, now, step) for tag, value in row.items()])

    return Tracker(id, write, lambda whole: client.set_terminated(id, "FINISHED" if whole else "KILLED"))


_LIBRARIES: dict[str, Callable[[Path, dict[str, Any], str | None], Tracker]] = {
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def check_installed(names: Iterable[str]) -> None:
    """Raise UsageError where a library is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UsageError(f'--log {name} needs {name}: pip install "klrl[{name}]"')


@contextlib.contextmanager
def tracked(
    names: Iterable[str], folder: Path, options: dict[str, Any], resumed: bool, quiet: bool
) -> Iterator[Callable[[int, Row], None]]:
    """In the block, all the libraries log what is called with a step and a row; a ``resumed`` run goes on in them.

    Raises ConnectionError where one does not take a new run. Otherwise one that fails is named once on stderr, and
    training goes on.
    """
    ids, trackers, failed = _read_ids(folder), dict[str, Tracker](), dict[str, int]()

    def attempt(name: str, what: Callable[[], object], fatal: bool = False) -> None:
        try:
            with _silence() if quiet else contextlib.nullcontext():
                what()
        except Exception as problem:
            if fatal:
                raise ConnectionError(f"--log {name}: {one_line(problem)}") from problem
            if name not in failed:
                warn(f"--log {name}: {one_line(problem)}; the run goes on, and logs to its folder")
            failed[name] = failed.get(name, 0) + 1
        else:
            if name in failed:
                failed[name] = 0

    def begin(name: str) -> None:
        check_installed([name])
        trackers[name] = _LIBRARIES[name](folder, options, ids.get(name))

    def write(step: int, row: Row) -> None:
        for name, tracker in trackers.items():
            if failed.get(name, 0) < _MOST_FAILED:
                attempt(name, partial(tracker.write, step, row))

    whole = False
    try:
        for name in dict.fromkeys(names):
            attempt(name, partial(begin, name), fatal=not resumed)
        if trackers:
            replace_file(folder / _IDS, json.dumps({**ids, **{name: tracker.id for name, tracker in trackers.items()}}))
        yield write
        whole = True
    finally:
        for name, tracker in trackers.items():
            attempt(name, partial(tracker.close, whole))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _read_ids(folder: Path) -> dict[str, str]:
    """What the libraries know the run in a folder by."""
    try:
        with open_file(folder / _IDS, 10_000, links=False) as file:
            return {name: str(id) for name, id in json.load(file).items() if name in _LIBRARIES}
    except (OSError, ValueError, AttributeError):
        return {}
