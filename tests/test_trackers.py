"""Logs by wandb, trackio and mlflow, without a network: what a run sends is what they keep, also once it is resumed."""

import json
import os
import sqlite3
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import QUICK

import klrl
from klrl.errors import UsageError

# What the libraries warn of is their own matter.
pytestmark = pytest.mark.filterwarnings("ignore")
LIBRARIES = ["wandb", "trackio", "mlflow"]
Logged = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of mlflow, which takes seconds to make one."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str) -> None:
    for name, value in {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": database,
        "MLFLOW_EXPERIMENT_NAME": tmp_path.name,
    }.items():
        monkeypatch.setenv(name, value)


def records(path: Path) -> Iterator[bytes]:
    """What a file of wandb's holds: LevelDB's log format, after seven bytes of its own."""
    data, whole, at = path.read_bytes(), b"", 7
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left  # a block's end, too short for a header
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + size > len(data):
            return
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def of_wandb(folder: Path) -> tuple[list[str], Logged]:
    """The ids of the runs in a folder's offline files, and what they hold."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, found = [], Logged()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        kept, until = list[Record](), time.monotonic() + 20
        while not any(record.HasField("exit") for record in kept) and time.monotonic() < until:
            time.sleep(0.1)  # wandb's own process goes on writing for a while after the run's end
            kept = [*map(Record.FromString, records(path))]
        for record in kept:
            if record.HasField("run"):
                ids.append(record.run.run_id)
                assert record.run.display_name == folder.name
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if items:
                found[record.history.step.num] = {tag: value for tag, value in items.items() if tag[0] != "_"}
    return ids, found


def of_trackio(folder: Path) -> tuple[list[str], Logged]:
    with sqlite3.connect(f"{os.environ['TRACKIO_DIR']}/klrl.db") as database:
        kept = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return sorted({name for name, _, _ in kept}), {step: json.loads(row) for _, step, row in kept}


def of_mlflow(folder: Path) -> tuple[list[str], Logged]:
    from mlflow import MlflowClient

    client, found = MlflowClient(), Logged()
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    for run in runs:
        assert run.info.run_name == folder.name
        assert run.info.status == "FINISHED"
        assert run.data.params["kl.target"] == "0.02"
        for tag in run.data.metrics:
            for metric in client.get_metric_history(run.info.run_id, tag):
                found.setdefault(metric.step, {})[tag] = metric.value
    return [run.info.run_id for run in runs], found


def plain(folder: Path) -> Logged:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line.pop("step"): {tag: float(value) for tag, value in line.items() if tag != "wall"} for line in lines}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_gets_every_row_and_goes_on_where_the_run_does(
    library: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(library)
    run = klrl.train("ppo", "CartPole-v1", **QUICK, kl={"target": 0.02}, log=library)
    first = plain(run.folder)
    klrl.resume(run.folder, total_timesteps=2500)
    assert "--log" not in capfd.readouterr().err
    ids, found = globals()[f"of_{library}"](run.folder)
    expected = plain(run.folder)
    assert len(expected) > len(first) > 4
    assert len(set(ids)) == 1
    assert json.loads((run.folder / "trackers.json").read_text()) == {library: ids[0]}
    assert found.keys() == expected.keys()
    for step, row in expected.items():
        last = step == max(first)  # which was logged twice: with the final evaluation, and then as one of many
        assert {tag: found[step][tag] for tag in row if not (last and tag.startswith("time/"))} == pytest.approx(
            {tag: value for tag, value in row.items() if not (last and tag.startswith("time/"))}
        )


def test_a_library_that_is_missing_is_refused_by_a_new_run_and_left_out_by_a_resumed_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r'--log wandb needs wandb: pip install "klrl\[wandb\]"'):
        klrl.train("ppo", "CartPole-v1", **QUICK, log=["mlflow", "wandb"])
    assert not Path("runs").exists()
    with pytest.raises(UsageError, match="--log must be one of wandb, trackio, mlflow"):
        klrl.train("ppo", "CartPole-v1", **QUICK, log="tensorboard")
    run = klrl.train("ppo", "CartPole-v1", **QUICK, log="mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert klrl.resume(run.folder, total_timesteps=2500).steps >= 2500
    assert capsys.readouterr().err == (
        'klrl: --log mlflow: UsageError: --log mlflow needs mlflow: pip install "klrl[mlflow]"; '
        "the run goes on, and logs to its folder\n"
    )


def test_a_library_that_fails_is_named_once_and_training_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    mlflow = pytest.importorskip("mlflow")

    class Deletes(klrl.Callback):
        def on_update(self, run: klrl.LiveRun, result: Any) -> None:
            if run.updates == 2:
                mlflow.MlflowClient().delete_run(json.loads((run.folder / "trackers.json").read_text())["mlflow"])

    run = klrl.train("ppo", "CartPole-v1", **QUICK, log="mlflow", callbacks=[Deletes()])
    assert len(plain(run.folder)) > 5
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("klrl: ")]
    assert line.startswith("klrl: --log mlflow: MlflowException: ")
    assert line.endswith("; the run goes on, and logs to its folder")


def test_a_library_that_does_not_begin_ends_a_new_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/mlflow.db")
    with pytest.raises(ConnectionError, match="--log mlflow: "):
        klrl.train("ppo", "CartPole-v1", **QUICK, log="mlflow")
