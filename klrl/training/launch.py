"""The ranks of a run: started by torch's launcher, and joined to each other."""

import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from klrl.console import LAUNCH, SILENT, rank, say
from klrl.errors import LOST, STOP_SIGNALS, Interrupted, RankLostError, one_line
from klrl.kl import Ranks
from klrl.rundir import checkpoint
from klrl.rundir.folder import open_file, replace_file
from klrl.training.host import OVERDUE, on_one_machine

_RESTARTS, _MARK = "TORCHELASTIC_RESTART_COUNT", "launcher"
_MEETINGS = itertools.count()  # of this process with the other ranks
_SAVING = 60  # seconds that ranks have to end by themselves


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that this process was started as one of, or this process alone.

    On one machine they reduce through its memory; otherwise by gloo, and what lies on CUDA devices by NCCL.
    """
    if rank() is None and not dist.is_initialized():
        yield Ranks()
        return
    mine = not dist.is_initialized()
    near = os.environ.get("LOCAL_WORLD_SIZE", "") == os.environ.get("WORLD_SIZE")
    if mine:
        try:
            address: Any = _apart() if near and _RESTARTS in os.environ else {}
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **address)
        except RuntimeError as problem:
            raise RankLostError(f"the ranks did not find each other: {one_line(problem)}") from None
    ranks = Ranks()
    try:
        group = dist.group.WORLD
        assert group is not None
        if dist.get_world_size() > 1:
            ranks = on_one_machine(group) if near else Ranks(group)
        yield ranks
    finally:
        if mine:
            dist.destroy_process_group()
            # Gloo's threads end with the last that refers to the group. Left to the interpreter's end, one that then
            # waits for its lock aborts the process ("terminate called without an active exception").
            ranks.group = group = None
            gc.collect()


def _apart() -> dict[str, Any]:
    """Where ranks of torchrun meet: apart from where they, or those before a restart, met before, as torch 2.13 leaves
    the addresses there, which gloo then asks in vain."""
    stores: Any = dist
    size = int(os.environ["WORLD_SIZE"])
    store = stores.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, is_master=False)
    apart = stores.PrefixStore(f"klrl {os.environ[_RESTARTS]} {next(_MEETINGS)}", store)
    return {"store": apart, "rank": int(os.environ["RANK"]), "world_size": size}


def mark(folder: Path) -> None:
    """Write into a run's folder what its launcher is known by, for ``interrupted``."""
    if _RESTARTS in os.environ or LAUNCH in os.environ:
        replace_file(folder / _MARK, _launcher())


def interrupted(run_dir: str) -> str:
    """The folder of the run that torchrun (``--max-restarts``) or Ray restarted these ranks to go on with, or ""."""
    if not int(os.environ.get(_RESTARTS, LAUNCH in os.environ)):
        return ""
    for path in sorted(Path(run_dir).glob(f"*/{_MARK}"), key=lambda path: -path.lstat().st_mtime):
        with contextlib.suppress(OSError), open_file(path, 1000, links=False) as file:
            if file.read().decode(errors="replace") == _launcher() and checkpoint.steps(path.parent / "checkpoints"):
                return str(path.parent)
    return ""


def _launcher() -> str:
    run = os.environ.get(LAUNCH) or os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return f"{run} {socket.gethostname()} {os.getppid()}" if run == "none" else run


def launch(arguments: Sequence[str], processes: int) -> NoReturn:
    """Run ``klrl`` with these arguments as so many ranks on this machine, and exit as they did.

    One that fails ends the others, and a line says which and why. A stop signal goes to all.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # which has many words for an end
            logging.getLogger(name).setLevel(logging.CRITICAL)
    here: Any = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    heard = [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]  # nohup switches one off
    here["signals_to_handle"] = ",".join(s.name for s in heard)
    # Threads: the ranks set them themselves, as --threads says.
    told = {SILENT: "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    try:
        with tempfile.TemporaryDirectory(prefix="klrl-") as logs, _process_as_it_was(told):
            here["logs_specs"] = DefaultLogsSpecs(log_dir=logs)
            config = LaunchConfig(1, 1, processes, max_restarts=0, run_id="klrl", shutdown_timeout=_SAVING, **here)
            try:
                elastic_launch(config, sys.executable)("-m", "klrl", *arguments)
            except SignalException as stop:
                for path in Path(logs).rglob("error.json"):  # of a rank that could not save
                    say(f"klrl: {json.loads(path.read_text())['message']}", "stderr")
                    sys.exit(1)
                raise Interrupted(int(stop.sigval)) from None
    except ChildFailedError as problem:
        place, failure = min(problem.failures.items(), key=lambda item: (item[1].exitcode == LOST, item[1].timestamp))
        if failure.exitcode - 128 in STOP_SIGNALS:
            raise Interrupted(failure.exitcode - 128) from None
        if failure.exitcode == -OVERDUE:
            say(f"klrl: rank {place} did not come to where the others waited for it, and was ended", "stderr")
        elif failure.exitcode < 0:
            say(f"klrl: rank {place} was ended by {signal.Signals(-failure.exitcode).name}", "stderr")
        else:
            say(f"klrl: rank {place}: {failure.message}", "stderr")
        sys.exit(max(failure.exitcode, 1))
    sys.exit(0)


@contextlib.contextmanager
def _process_as_it_was(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for processes begun in the block, and put back these and the signals' handlers."""
    before, handlers = dict(os.environ), {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for signum, handler in handlers.items():
            if signal.getsignal(signum) is not handler:
                signal.signal(signum, handler)
