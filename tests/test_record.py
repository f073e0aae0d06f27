"""Videos: a frame for each state, as the environment draws it, at its own speed; the overlay; and what is refused."""

import ctypes.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from gymnasium import spaces

import klrl
from klrl.agents.sac import SAC
from klrl.analysis.record import Overlay, RecordConfig, record
from klrl.analysis.video import draw_text
from klrl.cli.main import main
from klrl.envs.probes import OneStep
from klrl.kl import kl
from klrl.rundir import checkpoint
from klrl.training.evaluation import evaluation_seed, run_episodes
from klrl.training.load import LoadedPolicy, load_policy
from klrl.training.run import RunConfig

SMALL: dict[str, Any] = {"n_envs": 2, "n_steps": 64, "batch_size": 64, "n_epochs": 1, "quiet": True, "eval_every": 0}


class Drawn(OneStep):
    """Draws 21 x 33 pixels, and says nothing of its speed."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (Gymnasium's own declaration)
    how = "well"

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def render(self) -> Any:
        if self.how == "not":
            raise RuntimeError("no\npencil")
        return np.full((21, 33, 3), 100, np.uint8)


gym.register("Drawn-v0", entry_point=Drawn)


def train(folder: Path, env: str, steps: int) -> str:
    return str(klrl.train("ppo", env, total_timesteps=steps, save_every=256, run_dir=str(folder), **SMALL).folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run on CartPole that keeps two checkpoints."""
    folder = train(tmp_path_factory.mktemp("runs"), "CartPole-v1", 512)
    assert len(checkpoint.steps(Path(folder, "checkpoints"))) == 2
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> str:
    return train(tmp_path_factory.mktemp("runs"), "Drawn-v0", 128)


def watch(path: Path) -> tuple[tuple[Any, ...], Any]:
    """A video's codec, pixel format, width, height and frames per second, and its frames [T, H, W, 3], as ffmpeg has
    them."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, check=True, capture_output=True)
    found = re.search(rb"Video: (\w+).*?, (yuv\w+).*?, (\d+)x(\d+).*?, ([\d.]+) fps", done.stderr)
    assert found is not None
    codec, pixels, width, height, fps = (word.decode() for word in found.groups())
    frames = np.frombuffer(done.stdout, np.uint8).reshape(-1, int(height), int(width), 3)
    return (codec, pixels, int(width), int(height), float(fps)), frames.astype(np.int16)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["record", *words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_video_has_a_frame_for_each_state_as_the_environment_draws_it(run: str) -> None:
    paths = record(run, RecordConfig(episodes=2))
    last = checkpoint.resolve(Path(run)).name
    assert paths == [Path(run, "videos", f"{last}-episode-{i}.mp4") for i in range(2)]
    assert sorted(Path(run, "videos").iterdir()) == paths
    trained = load_policy(run)
    envs = trained.make_envs(2, render_mode="rgb_array")
    expected: list[Any] = []

    def draw(*_: Any) -> None:
        expected.append(envs.render())

    score = run_episodes(trained.agent, envs, evaluation_seed("afterwards", trained.config.seed), watch=draw)
    envs.close()
    for i, path in enumerate(paths):
        about, frames = watch(path)
        assert len(frames) == score.lengths[i] + 1
        assert imageio_ffmpeg.count_frames_and_secs(path)[0] == len(frames)
        assert about == ("h264", "yuv420p", 600, 400, 50.0)
        for t in range(score.lengths[i] + 1):
            assert np.abs(frames[t] - expected[t][i]).mean() < 0.5
        assert max(np.abs(frame - frames[0]).mean() for frame in frames) > 0.5, "more than a frame may be off"


def test_an_overlay_is_written_in_the_corner_and_nowhere_else(run: str) -> None:
    (plain,) = record(run, RecordConfig(episodes=1, output="plain", max_steps=5))
    (written,) = record(run, RecordConfig(episodes=1, output="written", max_steps=5, overlay=True))
    assert str(plain).startswith("plain")
    (_, before), (_, after) = watch(plain), watch(written)
    assert len(before) == len(after) == 6
    difference = np.abs(after - before).mean((0, 3))
    assert difference[:60, :150].mean() > 50
    assert difference[110:].mean() < 0.5
    assert difference[:, 350:].mean() < 0.5


def test_the_overlay_shows_entropy_action_and_kl_from_the_checkpoint_before(run: str) -> None:
    before, this = (load_policy(path) for path in checkpoint.steps(Path(run, "checkpoints")))
    obs = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    old, new = (trained.agent.distribution(obs) for trained in (before, this))
    for i, (entropy, action, moved) in enumerate(Overlay(this).lines(obs)):
        best = int(new.logits[i, 0].argmax())
        assert entropy == f"entropy {new.entropy()[i]:.3f} nats"
        assert action == f"likeliest action {best}, p {new.logits.softmax(-1)[i, 0, best]:.3f}"
        assert moved == f"KL(step {before.step}||this) {kl(old, new)[i]:.4f} nats"
    assert [len(lines) for lines in Overlay(before).lines(obs)] == [2, 2, 2]


def test_the_entropy_of_a_squashed_policy_is_that_of_its_actions() -> None:
    space = spaces.Box(-1, 1, (2,), np.float32)
    agent = SAC(spaces.Box(-1, 1, (3,), np.float32), space)
    overlay = Overlay(LoadedPolicy("x", Path("x/step-1"), 1, agent, RunConfig(), "X-v0"))
    obs = np.zeros((1, 3), np.float32)
    state = torch.get_rng_state()
    (first,), (again,) = overlay.lines(obs), overlay.lines(obs)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    policy = agent.distribution(obs)
    assert first[0] == f"entropy {policy.entropy().item():.3f} nats"
    (normal,) = policy.base.entropy().tolist()
    assert float(first[0].split()[1]) < min(normal, space.shape[0] * np.log(2))
    sampled = -policy.log_prob(policy.sample((20_000,))).mean()
    assert float(first[0].split()[1]) == pytest.approx(float(sampled), abs=0.03)


def test_small_odd_frames_are_made_even_and_text_fits_on_them(drawn: str) -> None:
    paths = record(drawn, RecordConfig(episodes=2))
    about, frames = watch(paths[0])
    assert (*about[2:], len(frames)) == (34, 22, 30.0, 2)
    assert np.abs(frames - 100).max() < 5
    large = draw_text(np.zeros((21, 33, 3), np.uint8), ["entropy 0.123 nats"])
    assert large.shape == (210, 330, 3)
    assert large[:40].max() == 255
    assert large[60:].max() == 0


def test_other_seeds_and_sampled_actions_are_other_episodes(run: str) -> None:
    configs: list[dict[str, Any]] = [{}, {"seed": 1}, {"stochastic": True}, {"checkpoint": "best"}, {"max_steps": 3}]
    short: dict[str, Any] = {"episodes": 1, "max_steps": 10}
    videos = [record(run, RecordConfig(output=str(i), **{**short, **c})) for i, c in enumerate(configs)]
    data = [path.read_bytes() for (path,) in videos]
    assert data[0] not in (data[1], data[2], data[4])
    assert data[0] == data[3]  # without evaluations, the best is the last
    assert len(watch(videos[4][0])[1]) == 4


def test_what_cannot_be_recorded_is_named_in_one_line(
    run: str, drawn: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no run or checkpoint at nowhere" in refused(capsys, "nowhere")
    assert "CartPole-v1: Acrobot-v1's observation space is" in refused(capsys, run, "--env-id", "Acrobot-v1")
    assert "--max-steps must be at least 1 and at most 27000, got 0" in refused(capsys, run, "--max-steps", "0")
    Path("file").write_text("")
    assert "--output file: File exists" in refused(capsys, run, "--output", "file")
    blind = train(Path(), "klrl.envs:klrl/Truncation-v0", 128)
    capsys.readouterr()
    assert "cannot be recorded, which takes rgb_array: it renders nothing" in refused(capsys, blind)
    monkeypatch.setattr(Drawn, "how", "not")
    assert refused(capsys, drawn, "--output", "x").startswith(
        "klrl: the environment cannot be rendered here: RuntimeError: no pencil"
    )
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert refused(capsys, run) == 'klrl: this needs imageio_ffmpeg: pip install "klrl[video]"'
    assert not Path("x").exists()


def test_a_video_that_is_not_whole_does_not_get_its_name(drawn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(imageio_ffmpeg, "count_frames_and_secs", lambda path: (1, 0.0))
        with pytest.raises(OSError, match=r"episode-0\.mp4 cannot be written: 1 of 2 frames arrived"):
            record(drawn, RecordConfig(episodes=2, output="x"))
    assert list(Path("x").iterdir()) == []
    assert len(record(drawn, RecordConfig(output="x"))) == 3


def test_what_draws_without_a_display_is_chosen_where_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDL_VIDEODRIVER", "mine")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "lib" if name == "OSMesa" else None)
    seen: dict[str, str] = {}
    monkeypatch.setattr("klrl.analysis.record.load_policy", lambda path, which, imports: seen.update(os.environ))
    with pytest.raises(AttributeError):
        record("nowhere", RecordConfig())
    assert (seen["MUJOCO_GL"], seen["SDL_VIDEODRIVER"]) == ("osmesa", "mine")
    assert "MUJOCO_GL" not in os.environ
    assert os.environ["SDL_VIDEODRIVER"] == "mine"


@pytest.mark.slow
@pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="without libEGL, MuJoCo needs a display")
def test_mujoco_is_recorded_without_a_display() -> None:
    folder = train(Path("runs"), "HalfCheetah-v5", 128)
    words = ["record", folder, "--episodes", "2", "--max-steps", "10", "--overlay", "--output", "."]
    code = "import os, sys; os.environ.pop('DISPLAY', 0); from klrl.cli.main import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    videos = [watch(Path(name)) for name in done.stdout.split()]
    assert [(*about[2:], len(frames)) for about, frames in videos] == [(480, 480, 20.0, 11)] * 2
    assert np.abs(videos[0][1] - videos[1][1]).mean() > 0.1
    assert videos[0][1].std() > 20
