"""The loop: what it writes, what it reads back, what it survives."""

import datetime
import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import QUICK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

import klrl
from klrl.agents import registry
from klrl.analysis.anomalies import find_anomalies
from klrl.cli.main import main
from klrl.envs.make import preset, presets
from klrl.envs.wrappers import next_step
from klrl.errors import NonFiniteError, UsageError
from klrl.rundir import checkpoint
from klrl.rundir.folder import make_folder
from klrl.rundir.history import read_history
from klrl.rundir.logger import Console
from klrl.training.episodes import Episodes
from klrl.training.run import Run, resolve

SB3_TAGS = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "train/value_loss",
    "train/explained_variance",
    "train/clip_fraction",
    "train/ent_coef",
    "time/fps",
    "eval/mean_reward",
}
KL_TAGS = {f"kl/{x}" for x in ("mean", "max", "p95", "reverse", "of_limit", "coef", "stopped_at", "rolled_back")}


@pytest.fixture
def run() -> Run:
    return klrl.train("ppo", "CartPole-v1", **QUICK)


def test_tensorboard_reads_back_what_metrics_jsonl_says(run: Run) -> None:
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= SB3_TAGS | KL_TAGS | {"entropy/mean"}
    assert any(tag.startswith("health/") for tag in tags)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for tag in ("kl/mean", "train/value_loss"):
        scalars = events.Scalars(tag)
        assert [event.step for event in scalars] == [line["step"] for line in lines]
        assert [event.value for event in scalars] == pytest.approx([line[tag] for line in lines], rel=1e-6)
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_each_update_is_one_event_and_layout_and_hparams_come_once(run: Run) -> None:
    events = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    stamps = {event.wall_time for tag in KL_TAGS for event in events.Scalars(tag)}
    assert len(stamps) == len(events.Scalars("kl/mean")), "all of an update's figures carry one time"
    assert events.Scalars("eval/final_return")[0].value == pytest.approx(run.score.mean)
    (layout,) = events.Tensors("custom_scalars__config__")
    charts = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    shown = {tag for category in charts.category for chart in category.chart for tag in chart.multiline.tag}
    assert {"^kl/mean$", "^kl/limit$"} <= shown
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["kl.target"].number_value == run.agent.config.kl.target  # type: ignore[attr-defined]


def test_the_written_config_reruns_the_same_run(run: Run) -> None:
    options = tomllib.loads((run.folder / "config.toml").read_text())
    assert options.pop("agent") == "ppo"
    assert options.pop("env_id") == "CartPole-v1"
    again = klrl.train("ppo", "CartPole-v1", **options)
    assert torch.equal(again.agent.policy_params.flat, run.agent.policy_params.flat)  # type: ignore[attr-defined]
    first, second = (
        [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()] for one in (run, again)
    )
    timed = {"wall", "time/fps", "time/collect_share"}
    assert [{k: v for k, v in line.items() if k not in timed} for line in first] == [
        {k: v for k, v in line.items() if k not in timed} for line in second
    ]
    assert again.score == run.score


def test_load_gives_the_agent_back_with_its_normaliser() -> None:
    run = klrl.train("ppo", "Pendulum-v1", **QUICK)
    for path in (run.folder, checkpoint.resolve(run.folder)):
        agent = klrl.load(path)
        assert torch.equal(agent.encoder.mean, run.agent.encoder.mean)
        assert float(agent.encoder.count) > 1000
        obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
        assert np.array_equal(agent.act(obs, deterministic=True), run.agent.act(obs, deterministic=True))
    loaded = replace(run, agent=klrl.load(run.folder))
    assert loaded.evaluate(episodes=4) == run.evaluate(episodes=4) != run.evaluate(episodes=4, seed=1)


def test_checkpoints_keep_the_last_and_the_best(run: Run) -> None:
    found = checkpoint.steps(run.folder / "checkpoints")
    assert 1 <= len(found) <= 2
    scores = [checkpoint.load(path)["score"] for path in found]
    assert scores[-1] == run.score.mean
    assert checkpoint.resolve(run.folder, "best") == found[scores.index(max(scores))]
    assert not list(run.folder.rglob("*.pkl"))
    names = {path.name for path in found[-1].iterdir()}
    assert names == {"manifest.json", "state.json", "tensors.safetensors"}


def test_every_truncation_and_bit_flip_is_detected(run: Run) -> None:
    path = checkpoint.resolve(run.folder)
    rng = np.random.default_rng(0)
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        whole = (path / name).read_bytes()
        for _ in range(10):
            broken = bytearray(whole)
            if rng.random() < 0.5:
                del broken[int(rng.integers(len(whole))) :]
            else:
                broken[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
            (path / name).write_bytes(bytes(broken))
            with pytest.raises(UsageError, match=r"damaged|missing"):
                checkpoint.load(path)
        (path / name).write_bytes(whole)
    checkpoint.load(path)


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, {"x": torch.ones(3)})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, {"x": torch.zeros(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]
    assert torch.equal(checkpoint.load(checkpoint.steps(tmp_path)[-1])["state"]["x"], torch.ones(3))


def test_a_link_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "run", 1, {"x": 1})
    (path / "state.json").rename(tmp_path / "elsewhere")
    (path / "state.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is a link"):
        checkpoint.load(path)


class Broken(gym.Wrapper[Any, Any, Any, Any]):
    """CartPole that shows a nan after so many steps of one environment."""

    def step(self, action: Any) -> Any:
        obs, *rest = super().step(action)
        self.steps = getattr(self, "steps", 0) + 1
        return (obs * np.nan if self.steps == 150 else obs, *rest)


def test_a_nan_from_the_environment_stops_the_run_and_keeps_the_last_good_checkpoint() -> None:
    made: list[gym.Env[Any, Any]] = []

    def factory() -> gym.Env[Any, Any]:
        env = gym.make("CartPole-v1")
        made.append(env)
        return Broken(env) if len(made) == 2 else env

    options = {**QUICK, "save_every": 100, "eval_every": 0}
    with pytest.raises(
        NonFiniteError, match=r"observation is nan in env 1 at step \d+ of the rollout, .*checkpoint is"
    ):
        klrl.train("ppo", factory, **options)
    (folder,) = Path("runs").iterdir()
    agent = klrl.load(folder)
    assert bool(torch.isfinite(agent.policy_params.flat).all())  # type: ignore[attr-defined]


def test_a_factory_trains_and_its_checkpoint_loads() -> None:
    run = klrl.train("ppo", lambda: gym.make("CartPole-v1"), **QUICK)
    assert klrl.load(run.folder).observation_space == gym.make("CartPole-v1").observation_space


def test_options_are_layered_default_preset_given() -> None:
    assert preset("ppo", "CartPole-v1")["n_epochs"] == 10
    assert preset("ppo", "somewhere:CartPole-v1") == preset("ppo", "CartPole-v1")
    assert preset("ppo", "Unheard-v0") == {}
    run, agent = resolve(registry.find("ppo"), "CartPole-v1", {"n_envs": 3, "kl": {"target": 0.5}})
    assert (run.n_envs, agent.kl.target, agent.n_epochs) == (3, 0.5, 10)
    for env_id, tables in presets().items():
        for name in tables:
            resolve(registry.find(name), env_id, {})


def test_steps_and_returns_leave_out_rows_that_only_reset() -> None:
    episodes = Episodes(2)
    no, yes = np.array([False, False]), np.array([True, False])
    for ended in (no, yes, no, no):  # env 0: two steps, end, a reset row, one step
        reward = np.array([0.0 if episodes.steps == 4 and ended is no and episodes.done else 1.0, 1.0])
        episodes.add(np.array([episodes.steps, 0]), reward, ended)
    assert episodes.steps == 7
    assert list(episodes.done) == [(2.0, 2)]
    first, second = Episodes(2).load_state_dict(episodes.state_dict(), np.zeros(2))
    assert (first.episode, list(first.actions), first.ended) == (1, [5], False), "the reset row's action is not one"
    assert (second.episode, list(second.actions), second.ended) == (0, [0, 0, 0, 0], False)


def test_a_same_step_environment_is_seen_as_next_step() -> None:
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    def make(mode: AutoresetMode) -> Any:
        return SyncVectorEnv([lambda: gym.make("klrl.envs:klrl/Truncation-v0")] * 2, autoreset_mode=mode)

    adapted, native = next_step(make(AutoresetMode.SAME_STEP), "x"), make(AutoresetMode.NEXT_STEP)
    shown, expected = [], []
    for env, into in ((adapted, shown), (native, expected)):
        env.reset(seed=0)
        for _ in range(6):
            obs, reward, _, truncated, _ = env.step(env.action_space.sample())
            into.append((obs.tolist(), reward.tolist(), truncated.tolist()))
    assert shown[:5] == expected[:5], "including the true final observation"
    assert shown[5][1] == expected[5][1] == [0.0, 0.0]
    with pytest.raises(UsageError, match="autoreset disabled"):
        next_step(make(AutoresetMode.DISABLED), "x")


def test_an_episode_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klrl.training.evaluation._MOST_EVAL_STEPS", 50)
    run = klrl.train("ppo", lambda: gym.make("Pendulum-v1", max_episode_steps=10**9), **QUICK)
    assert run.score.lengths == [50] * 20


def test_one_step_episodes_of_a_same_step_environment_are_seen() -> None:
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    factory = [lambda: gym.make("klrl.envs:klrl/OneStep-v0")]
    env = next_step(SyncVectorEnv(factory, autoreset_mode=AutoresetMode.SAME_STEP), "x")
    env.reset(seed=0)
    ended = [bool(env.step(np.array([0]))[2][0]) for _ in range(4)]
    assert ended == [True, False, True, False]


def test_training_gives_back_what_it_borrowed() -> None:
    torch.set_num_threads(2)
    for unsaved in (None, datetime.date(2026, 1, 1)):
        with pytest.raises(UsageError, match="config file or checkpoint cannot"):
            klrl.train("ppo", "CartPole-v1", env={"kwargs": {"render_mode": unsaved}})
    with pytest.raises(UsageError, match="unknown env"):
        klrl.train("ppo", "nope-v0")
    precisions: set[str] = set()

    class Noting(gym.Wrapper):  # type: ignore[type-arg]
        def reset(self, **kwargs: Any) -> Any:
            precisions.add(torch.get_float32_matmul_precision())
            return super().reset(**kwargs)

    klrl.train("ppo", lambda: Noting(gym.make("CartPole-v1")), matmul_precision="medium", **QUICK)
    assert precisions == {"medium"}
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == 2
    assert len(list(Path("runs").iterdir())) == 1


def test_worker_processes_train_the_same_agent() -> None:
    in_process, in_workers = (
        klrl.train("ppo", "CartPole-v1", **{**QUICK, "total_timesteps": 500}, env={"vectorization": kind})
        for kind in ("sync", "async")
    )
    assert torch.equal(in_process.agent.policy_params.flat, in_workers.agent.policy_params.flat)  # type: ignore[attr-defined]


def test_folders_never_collide() -> None:
    folders = {make_folder("runs", "ppo-ns/Env:v0-0") for _ in range(5)}
    assert len(folders) == 5
    assert all(folder.parent == Path("runs") for folder in folders)


def test_plain_lines_show_kl_against_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(100, quiet=False)
    for step in (50, 55):  # the second within the same tenth
        console.update(step, {"time/fps": 1234.0, "kl/mean": 0.0123, "kl/limit": 0.02, "kl/coef": 0.5})
    assert capsys.readouterr().out.split() == [
        "50%",
        "50",
        "steps",
        "1,234/s",
        "KL",
        "0.0123",
        "of",
        "0.02",
        "coef",
        "0.5",
    ]


def test_a_run_that_takes_every_update_back_says_that_nothing_moves(capsys: pytest.CaptureFixture[str]) -> None:
    kl = {"target": 1e-12, "penalty": "none", "on_overshoot": "rollback"}
    run = klrl.train("ppo", "CartPole-v1", **QUICK | {"kl": kl, "quiet": False, "verbose": True})
    history = read_history(run.folder)
    rows = history["health/undone_in_a_row"].tolist()
    assert rows[1:] == list(range(2, len(rows) + 1))
    said = [found for found in find_anomalies(history) if "in a row were taken back: nothing moves" in found.what]
    assert [found.what.split()[0] for found in said] == [str(len(rows))]
    assert "--kl.penalty" in said[0].advice
    lines = capsys.readouterr().out.splitlines()
    assert "undone" not in lines[3]
    assert "5 undone: nothing moves" in lines[4]


def test_a_run_of_0_1_0_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run = klrl.train("ppo", "CartPole-v1", **QUICK)
    for path in checkpoint.steps(run.folder / "checkpoints"):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_bytes(checkpoint._sealed({**manifest, "format": 1}))
    for words in (
        ["eval", str(run.folder)],
        ["resume", str(run.folder)],
        ["compare", str(run.folder), str(run.folder)],
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert "was written by klrl 0.1.0, whose runs this version does not read" in line
