"""Run folders that somebody else filled: links, FIFOs, sparse files, absurd numbers, names that a terminal obeys."""

import json
import os
import re
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import QUICK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

import klrl
from klrl.analysis.figures import thinned
from klrl.analysis.report import ReportConfig, report
from klrl.analysis.tables import as_markdown
from klrl.cli.main import main
from klrl.console import printable
from klrl.errors import UsageError
from klrl.rundir import checkpoint
from klrl.rundir.history import read_history
from klrl.sweep.grid import expand

CONFIG = """agent = "ppo"
env_id = "CartPole-v1"
seed = 0
total_timesteps = 1000
[kl]
target = 0.02
direction = "forward"
"""
SHORT: dict[str, Any] = {**QUICK, "total_timesteps": 256, "eval_every": 0}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = klrl.train("ppo", "CartPole-v1", **SHORT, save_every=256, run_dir=str(tmp_path_factory.mktemp("runs")))
    return run.folder


@pytest.fixture
def run(sound: Path) -> Path:
    """A run that may be spoiled."""
    return Path(shutil.copytree(sound, "run"))


def written(name: str, lines: list[Any], config: str = CONFIG) -> Path:
    folder = Path("runs", name)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(text + "\n" for text in texts))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    return line


def test_only_step_and_twelve_digits_is_a_checkpoint_of_the_runs(run: Path) -> None:
    kept = run / "checkpoints"
    (own,) = checkpoint.steps(kept)
    names = ["step-backup", "step-1", "step-9999999999999", "step-99999999999x", ".writing-old-step-backup-1"]
    for name in names:
        shutil.copytree(own, kept / name)
    (kept / "step-999999999999").symlink_to(own.resolve())
    assert checkpoint.steps(kept) == [own]
    resumed = klrl.resume(run, total_timesteps=2500)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    klrl.resume(resumed.folder, total_timesteps=3000)
    again = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again[: len(steps)] == steps, "resumed from its own newest, it drops none of its rows"
    assert checkpoint.step_of(checkpoint.steps(kept)[-1]) == again[-1] > steps[-1]
    assert all((kept / name).is_dir() for name in names)
    assert (kept / "step-999999999999").is_symlink()


@pytest.mark.parametrize("fate", ["moved", "removed"])
def test_a_run_whose_folder_is_gone_ends_in_one_line(
    fate: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = klrl.PPO.update

    def and_go(self: Any, *rest: Any) -> Any:
        (folder,) = Path("runs").iterdir()
        if self.n_updates == 3:
            folder.rename("elsewhere") if fate == "moved" else shutil.rmtree(folder)
        return update(self, *rest)

    monkeypatch.setattr(klrl.PPO, "update", and_go)
    words = ["--n-envs=4", "--n-steps=64", "--total-timesteps=3000", "--eval-every=0", "--quiet"]
    line = refused(capsys, "train", "ppo", "CartPole-v1", *words, code=1)
    assert re.search(r"runs/ppo-CartPole.* was moved or removed while the run trained, \d+ steps into it", line)
    assert list(Path("runs").iterdir()) == []


def test_a_resumed_runs_events_come_last_whatever_the_clock_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.time
    for hours, total in ((1, 600), (5, 1000)):
        monkeypatch.setattr(time, "time", lambda hours=hours: clock() - 3600 * hours)
        klrl.resume(run, total_timesteps=total)
    files = sorted(str(path) for path in run.glob("events*"))
    assert len(files) == 3
    steps = [[event.step for event in EventFileLoader(name).Load() if event.step] for name in files]
    assert [part[0] for part in steps] == sorted(part[0] for part in steps)
    accumulated = EventAccumulator(str(run)).Reload().Scalars("kl/mean")
    assert [event.step for event in accumulated] == sorted({step for part in steps for step in part})


def test_a_video_is_written_through_no_link(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("precious").write_text("years of work")
    name = f"{checkpoint.resolve(run).name}-episode-0.mp4"
    (run / "videos").mkdir()
    for planted in (f".writing-{name}", name):
        (run / "videos" / planted).symlink_to(Path("precious").resolve())
    main(["record", str(run), "--episodes", "1", "--max-steps", "3"])
    assert Path("precious").read_text() == "years of work"
    assert not (run / "videos" / name).is_symlink()
    Path("mine").mkdir()
    shutil.rmtree(run / "videos")
    (run / "videos").symlink_to(Path("mine").resolve())
    assert "videos is a link: a run holds its own videos; --output" in refused(capsys, "record", str(run))
    assert list(Path("mine").iterdir()) == []
    main(["record", str(run), "--episodes", "1", "--max-steps", "3", "--output", str(run / "videos")])
    assert len(list(Path("mine").iterdir())) == 1


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "lock", "checkpoints/*/manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "sparse"])
@pytest.mark.timeout(20)
def test_fifos_devices_and_sparse_files_neither_hang_nor_fill_the_memory(
    name: str, kind: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = run.glob(name)
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 6 << 30)
    for words in (["report", str(run), "--format", "md"], ["eval", str(run), "--episodes", "1"], ["resume", str(run)]):
        try:
            main([*words, "--total-timesteps", "300"] if words[0] == "resume" else words)
        except SystemExit as stop:
            assert stop.code in (1, 2)  # noqa: PT017
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("klrl: ")
        if name == "metrics.jsonl" and words[0] == "eval":
            assert "over 1 episodes" in capsys.readouterr().out


def prepared(run: Path, **state: Any) -> str:
    """The run with a checkpoint whose sums fit and whose state says something else."""
    path = checkpoint.resolve(run)
    content = checkpoint.load(path)
    content["state"]["options"] |= state.pop("options", {})
    content["state"] |= state
    checkpoint.save(path.parent, content["step"], content["state"])
    return str(run)


ABSURD: list[tuple[dict[str, Any], str]] = [
    ({"options": {"n_envs": 10**9}}, "--n-envs must be at least 1 and at most 65536"),
    ({"options": {"hidden_sizes": [1] * 20_000}}, "--hidden-sizes must be at most 100 of them"),
    ({"options": {"hidden_sizes": [10**9]}}, "--hidden-sizes must be at least 1 and at most 16384"),
    ({"options": {"hidden_sizes": [16_000] * 15}}, "hidden layers of 3,584,000,000 weights, but"),
    ({"options": {"threads": 100_000}}, "--threads must be at least 1 and at most 1024"),
    ({"options": {"learning_rate": 1e300}}, "--learning-rate must be above 0 and at most 1e+38"),
    ({"options": {"total_timesteps": 10**400}}, "--total-timesteps must be at least 1 and at most 1e+15"),
    ({"options": {"kl": {"target": 10**400}}}, "--kl.target must be at least 0 and at most 1e+38"),
    ({"options": {"run_dir": "\udcff"}}, "--run-dir must be a text in UTF-8"),
]
VAST = {"type": "Box", "shape": [10**5, 10**5], "dtype": "float32", "low": 0.0, "high": 1.0}


@pytest.mark.parametrize(("state", "said"), ABSURD, ids=[said for _, said in ABSURD])
@pytest.mark.parametrize("command", ["eval", "resume"])
def test_absurd_sizes_are_refused_before_they_are_tried(
    command: str, state: dict[str, Any], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    more = ["--total-timesteps", "512"] if command == "resume" else []
    assert said in refused(capsys, command, prepared(run, **dict(state)), *more)
    assert time.perf_counter() - start < 5


def test_an_absurd_space_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a space of [100000, 100000] numbers" in refused(capsys, "eval", prepared(run, observation_space=VAST))


def test_what_no_memory_holds_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--n-steps", "1e12"], ["--n-steps", "1e15"]):
        assert "do not fit into memory" in refused(capsys, "train", "ppo", "CartPole-v1", "--run-dir", "r", *words)
    with pytest.raises(UsageError, match="--set gives 1,000,000 combinations: at most 10,000"):
        expand("ppo", "CartPole-v1", {"gamma": [0.9] * 1000, "seed": list(range(1000))})
    with pytest.raises(UsageError, match="1,021 environments make 1,021 processes, of at most 512"):
        klrl.train("ppo", "CartPole-v1", n_envs=1021, env={"vectorization": "async"})


def test_threads_are_at_most_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    klrl.train("ppo", "CartPole-v1", **SHORT, threads=1000)
    assert max(set_to) <= (os.cpu_count() or 1)


def test_control_characters_of_others_do_not_reach_the_terminal(
    sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    name = f"x{evil}"
    config = CONFIG.replace("CartPole-v1", "E\\u001b[31m-v0")
    written(name, [{"step": 10, "rollout/ep_rew_mean": 1.0, f"health/rejected_{evil}": 1.0}], config)
    capsys.readouterr()
    for form in ("md", "json"):
        main(["report", "runs", "--format", form])
        assert printable(out := capsys.readouterr().out) == out
    main(["report", f"runs/{name}"])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x1b" not in Path("runs", name, "report.html").read_text()
    copy = shutil.copytree(sound, evil)
    main(["compare", str(sound), str(copy), "--steps", "10", "--episodes", "1"])
    out = capsys.readouterr().out
    assert printable(out) == out
    for words in (["eval", "no\x1b[31m"], ["train", "ppo", "a\x1bb"], [evil], ["report", "a", f"--{evil}"]):
        assert "\\x1b" in refused(capsys, *words)


def test_an_environments_message_is_printed_without_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    Path("loud.py").write_text(
        "import gymnasium as gym\nfrom gymnasium.envs.classic_control import CartPoleEnv\n"
        "class Loud(CartPoleEnv):\n    def step(self, action):\n        raise RuntimeError('\\x1b[2J gone')\n"
        "gym.register('Loud-v0', entry_point=Loud)\n"
    )
    import importlib.util
    import sys

    spec: Any = importlib.util.spec_from_file_location("loud", "loud.py")
    sys.modules["loud"] = loud = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loud)
    words = ["train", "ppo", "Loud-v0", "--n-envs", "2", "--quiet"]
    assert "\\x1b[2J gone" in refused(capsys, *words, code=1)
    del sys.modules["loud"]


def test_markdown_carries_no_html_links_or_columns() -> None:
    (*_, line) = as_markdown(("a",), [("<img src=x onerror=y> ![p](http://t) a|b & `c`\nd",)])
    assert line == r"| &lt;img src=x onerror=y&gt; !\[p\](http://t) a\|b &amp; \`c\` d |"


def test_a_long_run_takes_little_memory_and_a_small_page() -> None:
    tags = [*(f"train/{i}" for i in range(12)), "rollout/ep_rew_mean", "kl/mean", "kl/p95", "kl/of_limit", "kl/coef"]
    numbers = np.random.default_rng(0).random((8_000, len(tags))).round(6).tolist()
    more = {"kl/stopped_at": 1.0, "eval/mean_reward": 1.0, "eval/std_reward": 0.1, "time/fps": 9.0}
    rows = [{"step": i + 1, "wall": i, **dict(zip(tags, row, strict=True)), **more} for i, row in enumerate(numbers)]
    folder = written("long", rows)
    size = (folder / "metrics.jsonl").stat().st_size
    tracemalloc.start()
    history = read_history(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(history["step"]) == 8_000
    assert peak < 1.5 * size
    assert Path(report([str(folder)], ReportConfig())).stat().st_size < 1_500_000


def test_a_thinned_curve_keeps_its_extremes() -> None:
    values = np.zeros(100_000)
    values[777], values[50_001], values[3::2] = 9.0, -9.0, np.nan
    values[777], values[50_001] = 9.0, -9.0
    kept = thinned(values)
    assert len(kept) <= 1000
    assert {777, 50_001} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert thinned(values[:500]).tolist() == list(range(500))


def test_a_run_that_cannot_be_read_does_not_stop_the_report_of_its_neighbours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    written("good", [{"step": 10, "rollout/ep_rew_mean": 1.0}])
    for name, config in {
        "infinite": CONFIG.replace("1000", "inf"),
        "text": CONFIG.replace("1000", "'many'"),
        "no table": CONFIG.replace("[kl]", "[kk]"),
        "coefficient": CONFIG + "coef = 'x'\n",
        "deeper": CONFIG + "a." * 30_000 + "b = 1\n",
        "long": CONFIG + f"a = '{300_000 * 'x'}'\n",
        "bytes": CONFIG,
    }.items():
        written(name, [], config)
    Path("runs/bytes/config.toml").write_bytes(b"\xff")
    main(["report", "runs", "--format", "md"])
    out, err = capsys.readouterr()
    assert "| good | 0 | stopped | 10 of 1,000 | 1.0 |" in out
    assert [line.split()[1] for line in sorted(err.splitlines())] == sorted(
        f"runs/{name}".split()[0] for name in ("infinite", "text", "no table", "coefficient", "deeper", "long", "bytes")
    )
    assert "is not a run's folder: config.toml" in refused(capsys, "report", "runs/text")


ODD = [None, 1e308, "inf"]
ODDER = ["-inf", "nan", "many", -1e308, 0, -1, [], {}, 10**400, True]
TAGS = [
    *("wall", "kl/mean", "kl/p95", "kl/limit", "kl/of_limit", "kl/coef", "kl/attempted", "kl/rolled_back"),
    *("rollout/ep_rew_mean", "eval/mean_reward", "eval/std_reward", "time/fps", "time/collect_share"),
    *("train/explained_variance", "train/ent_coef", "entropy/target", "entropy/mean", "health/skipped_updates"),
]


@pytest.mark.parametrize(
    "odd", [*ODD, *(pytest.param(odd, marks=pytest.mark.slow) for odd in ODDER)], ids=lambda odd: repr(odd)[:9]
)
def test_odd_numbers_in_a_run_are_no_traceback(odd: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sound = dict.fromkeys(TAGS, 0.5)
    rows = [{"step": i + 1, **sound, **(dict.fromkeys(TAGS, odd) if i % 3 else {})} for i in range(30)]
    folder = written("all", [*rows, {"step": odd, **sound}, {"step": 31, **sound}])
    main(["report", str(folder)])
    main(["report", str(folder), "--format", "json"])
    assert capsys.readouterr().err == ""


def test_a_folder_whose_name_is_no_utf_8(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"run-\xff-$\\frac$")
    shutil.copytree(sound, name)
    main(["report", name])
    main(["report", name, "--format", "md"])
    main(["eval", name, "--episodes", "1"])
    main(["resume", name, "--total-timesteps", "600"])
    main(["compare", name, str(sound), "--steps", "10", "--episodes", "1", "--figure", "c.svg"])
    assert "\\udcff" in capsys.readouterr().out
    assert "\\udcff" in refused(capsys, "eval", f"{name}-no")
