"""Runs on the Hugging Face Hub: written to and read from a stand-in for it, by the Hub's own client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hub
import numpy as np
import pytest
from helpers import QUICK
from huggingface_hub import ModelCard

import klrl
from klrl.analysis.push import PushConfig, files_of, push
from klrl.errors import UsageError
from klrl.rundir import checkpoint
from klrl.rundir.history import read_history

OBS = np.random.default_rng(0).normal(0, 0.3, (20, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is not its last."""
    options = {**QUICK, "seed": 5, "save_every": 256, "run_dir": str(tmp_path_factory.mktemp("runs"))}
    return klrl.train("ppo", "CartPole-v1", **options).folder


@pytest.fixture(scope="module")
def hostile(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Repositories that somebody prepared: one names code, one is damaged, one holds something else."""
    content = checkpoint.load(checkpoint.resolve(run))
    content["state"]["options"] |= {"network": "evil:Net", "imports": ["evil"]}
    saved = checkpoint.save(tmp_path_factory.mktemp("theirs"), content["step"], content["state"])
    files = {f"checkpoints/{saved.name}/{part.name}": part.read_bytes() for part in saved.iterdir()}
    evil = b"import pathlib\npathlib.Path('sprung').touch()\n"
    return {
        "they/evil": {**files, "evil.py": evil, f"checkpoints/{saved.name}/evil.pkl": evil},
        "they/broken": {name: part + b" " if name.endswith("state.json") else part for name, part in files.items()},
        "they/other": {"evil.py": evil},
    }


class Talk(NamedTuple):
    """What a process of its own did with the Hub, and printed."""

    server: hub.Hub
    results: Any
    said: list[str]
    errors: list[str]
    folder: Path


SCRIPT = """
import json, os, sys
import klrl
from klrl.cli.main import main

def command(*words):
    try:
        main(words)
    except SystemExit as stop:
        return stop.code
    return 0

push = "push", sys.argv[1], "me/cart", "--no-video"
obs = json.loads(sys.argv[2])
results = [command(*push, "--private"), command(*push, "--checkpoint", "best")]
results += [klrl.load(f"hf:me/cart{revision}").value(obs).tolist() for revision in ("", "@" + sys.argv[3])]
results += [command("eval", f"hf:{name}", "--episodes", "2", "--json") for name in ("me/cart", "me/none", "me/cart@v9")]
results += [command("eval", f"hf:they/{name}") for name in ("evil", "broken", "other")]
os.environ["HF_TOKEN"] = "another"
results += [command(*push)]
del os.environ["HF_TOKEN"]
results += [command(*push)]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def talk(run: Path, hostile: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talk]:
    """The client reads where the Hub is when it is imported: hence another process."""
    folder = tmp_path_factory.mktemp("here")
    words = [sys.executable, "-c", SCRIPT, str(run), json.dumps(OBS.tolist()), hub.sha_of("me/cart", 2)]
    with hub.serve() as server:
        for name, files in hostile.items():
            server.commit(name, files)
        about = {"HF_ENDPOINT": server.url, "HF_TOKEN": hub.TOKEN, "HF_HOME": "hub", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, **about}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        *said, results = done.stdout.splitlines()
        errors = [line for line in done.stderr.splitlines() if line.startswith("klrl: ")]
        yield Talk(server, json.loads(results), said, errors, folder)


def test_a_run_that_was_pushed_is_read_back_from_the_hub(run: Path, talk: Talk) -> None:
    best, last = (klrl.load(run, which).value(OBS).tolist() for which in ("best", "last"))
    assert best != last
    assert talk.results[:5] == [0, 0, best, last, 0]
    assert talk.said[:2] == [f"{talk.server.url}/me/cart"] * 2
    assert len(json.loads(talk.said[2])["returns"]) == 2
    assert talk.server.private == {"me/cart": True}
    first, second = talk.server.repositories["me/cart"][-2:]
    parts = ("manifest.json", "state.json", "tensors.safetensors")
    for files, which in ((first, "last"), (second, "best")):
        source = checkpoint.resolve(run, which)
        held = {f"checkpoints/{source.name}/{part}": (source / part).read_bytes() for part in parts}
        held |= {part: (run / part).read_bytes() for part in ("config.toml", "metrics.jsonl")}
        assert held.items() <= files.items()
        assert set(files) - set(held) == {"README.md", "kl.png"}, "another checkpoint's files are removed"
    assert first["kl.png"].startswith(b"\x89PNG")


def test_what_the_hub_refuses_is_named_in_one_line(talk: Talk) -> None:
    assert talk.results[5:7] == [2, 2]
    assert talk.errors[:2] == [
        "klrl: hf:me/none: no such repository on the Hugging Face Hub, or a private one of others",
        "klrl: hf:me/cart@v9: that repository has no revision v9",
    ]
    assert talk.results[-2:] == [1, 2]
    assert talk.errors[-2].startswith("klrl: me/cart cannot be written: ")
    assert "401" in talk.errors[-2]
    wanted = "klrl: the Hugging Face Hub wants a token: hf auth login, or the environment variable HF_TOKEN"
    assert talk.errors[-1] == wanted


def test_a_hostile_repository_runs_no_code(talk: Talk) -> None:
    assert talk.results[7:10] == [2, 2, 2]
    network, damaged, other = talk.errors[2:5]
    assert "network 'evil:Net' is no imported nn.Module class: --import evil, if you trust it" in network
    assert damaged.startswith("klrl: checkpoint hf:they/broken/checkpoints/step-")
    assert "is damaged: state.json" in damaged
    assert other == "klrl: hf:they/other is not a run folder: it has no checkpoints/step-N"
    assert not (talk.folder / "sprung").exists()
    fetched = {path.name for path in (talk.folder / "hub").rglob("*") if path.is_symlink()}
    assert fetched == {"manifest.json", "state.json", "tensors.safetensors"}


def test_a_card_has_the_score_in_the_form_that_the_hub_reads(run: Path) -> None:
    text = files_of(str(run), "me/cart", PushConfig(video=False))["README.md"].decode()
    front = ModelCard(text).data
    assert front.library_name == "klrl"
    assert {"CartPole-v1", "ppo", "reinforcement-learning"} <= set(front.tags)
    (score,) = front.eval_results
    history = read_history(run)
    mean, std = history.last("eval/mean_reward"), history.last("eval/std_reward")
    assert score.metric_value == f"{mean:.2f} +/- {std:.2f}"
    named = (score.task_type, score.dataset_name, score.metric_type)
    assert named == ("reinforcement-learning", "CartPole-v1", "mean_reward")
    assert 'agent = klrl.load("hf:me/cart")' in text
    assert "![KL of each update, against its limit](kl.png)" in text
    assert "| setting | runs | mean |" in text


def test_what_is_not_the_runs_own_is_not_pushed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "nobody's")
    for name in ("cart", "me/cart/pole", "me/", "-me/cart", "https://huggingface.co/me/cart"):
        with pytest.raises(UsageError, match="is no name of a repository: give it as user/name"):
            push(str(run), name, PushConfig())
    with pytest.raises(UsageError, match="nowhere is not a run's folder"):
        push("nowhere", "me/cart", PushConfig())
    Path("run").mkdir()
    for part in ("config.toml", "checkpoints"):
        os.symlink(run / part, Path("run", part))
    Path("run/metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    with pytest.raises(OSError, match=r"config\.toml"):  # a link to what may be anyone's secret
        push("run", "me/cart", PushConfig(video=False))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r'this needs huggingface_hub: pip install "klrl\[hub\]"'):
        push(str(run), "me/cart", PushConfig())
    with pytest.raises(UsageError, match=r"this needs huggingface_hub"):
        klrl.load("hf:me/cart")


@pytest.mark.slow
def test_a_video_goes_along_or_a_line_says_why_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert b"ftyp" in files_of(str(run), "me/cart", PushConfig())["replay.mp4"][:16]
    folder = klrl.train("ppo", "klrl.envs:klrl/Truncation-v0", **QUICK).folder
    capsys.readouterr()
    assert "replay.mp4" not in files_of(str(folder), "me/probe", PushConfig())
    assert capsys.readouterr().err.startswith("klrl: no video: ")
