"""A run on the Hugging Face Hub: its checkpoint, options and metrics, and a card with its scores. Needs ``hub``."""

import io
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from klrl.analysis import tables
from klrl.analysis.record import RecordConfig, record
from klrl.analysis.report import as_markdown, summary
from klrl.analysis.scores import group_runs
from klrl.config import Checked
from klrl.console import printable, warn
from klrl.envs.make import Imports
from klrl.errors import UsageError, needs, one_line
from klrl.rundir.folder import open_file
from klrl.rundir.history import History, read_history
from klrl.rundir.hub import no_progress_bars
from klrl.training.load import load_policy

_MOST = 1 << 31  # bytes of a file
_WRITTEN = r"checkpoints/step-[0-9]+/.*|kl\.png|replay\.mp4"  # what a push that lacks it removes


@dataclass(frozen=True)
class PushConfig(Checked):
    private: bool = False
    """Make the repository private, where it is a new one."""
    checkpoint: Literal["last", "best"] = "last"
    """Which of the run's checkpoints."""
    video: bool = True
    """Add a video of an episode, where one can be recorded."""
    imports: Imports = ()


def push(run: str, name: str, config: PushConfig) -> str:
    """Write the run in a folder to the repository ``user/name`` of the Hugging Face Hub, and return its address.

    klrl.load("hf:user/name") reads it. A repository that is there gets a new commit. Raises UsageError where there is
    no such run, the extra "hub" or a token is missing, or the name is none, and OSError where the Hub refuses it.
    """
    with needs("hub", "huggingface_hub"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise UsageError(f"{name!r} is no name of a repository: give it as user/name")
    if get_token() is None:
        raise UsageError("the Hugging Face Hub wants a token: hf auth login, or the environment variable HF_TOKEN")
    files = files_of(run, name, config)
    api = HfApi(library_name="klrl")
    try:
        with no_progress_bars():
            api.create_repo(name, private=config.private or None, exist_ok=True)
            before = [path for path in api.list_repo_files(name) if re.fullmatch(_WRITTEN, path) and path not in files]
            operations: list[Any] = [CommitOperationDelete(path) for path in before]
            operations += [CommitOperationAdd(path, data) for path, data in files.items()]
            api.create_commit(name, operations, commit_message="Written by klrl push")
    except Exception as problem:  # the client's own, and those of the HTTP library that it has at present
        raise OSError(f"{name} cannot be written: {one_line(problem.__cause__ or problem)}") from problem
    return f"{api.endpoint}/{name}"


def files_of(run: str, name: str, config: PushConfig) -> dict[str, bytes]:
    """What a repository holds, by path: a run's folder with one checkpoint, a card, a figure of its KL and a video.

    Where the last two cannot be made, a line on stderr says why.
    """
    history = read_history(run)
    trained = load_policy(run, config.checkpoint, config.imports)
    files = {part: _read(history.folder / part) for part in ("config.toml", "metrics.jsonl")}
    for part in ("manifest.json", "state.json", "tensors.safetensors"):
        files[f"checkpoints/{trained.folder.name}/{part}"] = _read(trained.folder / part)
    try:
        if (figure := _figure(history)) is not None:
            files["kl.png"] = figure
    except UsageError as problem:
        warn(f"no figure of the KL: {problem}")
    if config.video:
        try:
            with tempfile.TemporaryDirectory() as folder:
                shown = RecordConfig(1, output=folder, checkpoint=config.checkpoint, imports=config.imports)
                files["replay.mp4"] = record(run, shown)[0].read_bytes()  # the name that the Hub looks for
        except (UsageError, OSError) as problem:
            warn(f"no video: {problem}")
    return {"README.md": card(history, trained.step, name, "kl.png" in files).encode(), **files}


def card(run: History, step: int, name: str, figure: bool) -> str:
    """The repository's README.md: the score as the Hub's tables want it, how to use the policy, what the run logged."""
    from huggingface_hub import EvalResult, ModelCardData

    env, agent = printable(run.env), printable(run.agent)
    known = np.flatnonzero(np.isfinite(run["eval/mean_reward"]) & (run["step"] <= step))
    results = []
    if len(known):
        mean, std = (float(run[f"eval/{part}_reward"][known[-1]]) for part in ("mean", "std"))
        kind, metric = "reinforcement-learning", "mean_reward"
        results = [EvalResult(kind, env, env, metric, f"{mean:.2f} +/- {std:.2f}", task_name=kind, metric_name=metric)]
    tags = [env, agent, "reinforcement-learning", "deep-reinforcement-learning", "klrl"]
    front = ModelCardData(library_name="klrl", tags=tags, model_name=agent.upper(), eval_results=results or None)
    packages = [package for package in run.options.get("imports", []) if re.fullmatch(r"[\w.]+", str(package))]
    given = f", imports={packages!r}" if packages else ""
    words = "".join(f" --import {package}" for package in packages)
    report = as_markdown(summary(group_runs([run]))).replace("\n# ", "\n## ")
    return f"""---
{front.to_yaml()}
---

# {tables.markdown(f"{agent.upper()} on {env}")}

Trained with klrl for {step:,} steps; `config.toml` holds its options.

```python
import klrl

agent = klrl.load("hf:{name}"{given})
action, _ = agent.predict(obs, deterministic=True)
```

```console
$ pip install "klrl[hub]"
$ klrl eval hf:{name}{words}
```

{"![KL of each update, against its limit](kl.png)" if figure else ""}

#{report}
"""


def _figure(run: History) -> bytes | None:
    with needs("plot", "matplotlib"):
        from klrl.analysis.figures import kl_trajectory
    if (figure := kl_trajectory(run)) is None:
        return None
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _read(path: Path) -> bytes:
    """A file's bytes; not a link's, as what lies elsewhere may be nobody else's to see."""
    with open_file(path, _MOST, links=False) as file:
        return file.read()
