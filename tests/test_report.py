"""The report: what is read back from runs, how seeds are taken together, which anomalies are found, what is written."""

import json
import math
import re
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import klrl
from klrl.analysis.anomalies import find_anomalies
from klrl.analysis.figures import kl_over_states
from klrl.analysis.report import ReportConfig, report
from klrl.analysis.scores import group_runs, iqm, score_of
from klrl.cli.main import main
from klrl.errors import UsageError
from klrl.rundir.folder import locked
from klrl.rundir.history import read_history

OPTIONS = """agent = "ppo"
env_id = "CartPole-v1"
seed = {seed}
total_timesteps = 1000
[kl]
target = {target}
coef = 1.0
direction = "forward"
"""


def written(name: str, rows: list[dict[str, Any]], seed: int = 0, target: float = 0.02) -> Path:
    """A run's folder with these rows."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(OPTIONS.format(seed=seed, target=target))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def curve(values: list[float], tag: str = "rollout/ep_rew_mean", final: float | None = None) -> list[dict[str, Any]]:
    figures = {"kl/mean": 0.01, "kl/p95": 0.02, "time/fps": 50.0, "time/collect_share": 0.5}
    rows = [{"step": 100 * (i + 1), "wall": 3 * i, **figures, tag: value} for i, value in enumerate(values)]
    if final is not None:
        rows[-1] |= {"step": 1000, "eval/mean_reward": final, "eval/std_reward": 0.0}
    return rows


def test_a_history_is_read_while_it_is_written_and_after_a_kill() -> None:
    folder = written("a", [{"step": 10, "x": 1.0}, {"step": 20, "x": "inf", "y": 2.0}])
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 30, "x"')  # as a kill, or a reader that comes too early, finds it
    run = read_history(folder)
    assert run.columns["step"].tolist() == [10, 20]
    assert run["x"].tolist() == [1.0, math.inf]
    assert math.isnan(run["y"][0])
    assert run["y"][1] == 2.0
    assert np.isnan(run["never logged"]).all()
    assert run.state == "stopped"
    with locked(folder):
        code = f"from klrl.rundir.history import read_history; print(read_history({str(folder)!r}).state)"
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "running"
    assert read_history(written("b", curve([1.0], final=5.0))).state == "finished"


@pytest.mark.parametrize("missing", ["config.toml", "metrics.jsonl"])
def test_what_is_no_run_is_refused(missing: str) -> None:
    folder = written("a", [])
    (folder / missing).unlink()
    with pytest.raises(UsageError, match=f"is not a run's folder: .*{missing}"):
        read_history(folder)


def test_groups_are_runs_that_differ_by_seed_alone_and_are_named_by_what_tells_them_apart() -> None:
    runs = [read_history(written(f"{t}-{s}", curve([1.0]), s, t)) for t in (0.02, 0.05) for s in (1, 0)]
    groups = group_runs(runs)
    assert [group.name for group in groups] == ["PPO CartPole-v1 kl.target=0.02", "PPO CartPole-v1 kl.target=0.05"]
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1], [0, 1]]
    assert [group.letter for group in groups] == ["A", "B"]


def test_scores_by_hand() -> None:
    assert iqm(np.array([0.0, 10, 20, 100])) == 15  # one of four is cut at either end
    assert iqm(np.array([0.0, 10, 20])) == 10
    finals = [0.0, 10.0, 20.0, 100.0]
    (group,) = group_runs([read_history(written(str(i), curve([1.0], final=f), i)) for i, f in enumerate(finals)])
    score = score_of(group.runs)
    assert score is not None
    assert (score.mean, score.iqm) == (32.5, 15)
    assert score.std == pytest.approx(np.std(finals))
    assert 0 <= score.low < 15 < score.high <= 100


def test_a_curve_is_the_mean_over_runs_while_more_than_half_go_on() -> None:
    long, other, short = curve([0.0, 2.0, 4.0, 6.0]), curve([0.0, 2.0, 4.0]), curve([3.0, 5.0])
    (group,) = group_runs([read_history(written(str(i), rows, i)) for i, rows in enumerate((long, other, short))])
    drawn = group.curve("rollout/ep_rew_mean", points=4)
    assert drawn is not None
    steps, mean, low, high = drawn
    assert steps.tolist() == [100, 200, 300], "at step 400, one of three is left"
    assert mean.tolist() == [1, 3, 4]
    assert low.tolist() == [0, 2, 4]
    assert high.tolist() == [3, 5, 4]
    assert group.curve("nobody logs it") is None
    late = [{**row, "step": row["step"] + 5000} for row in short]
    (apart,) = group_runs([read_history(written(f"apart {i}", rows, i)) for i, rows in enumerate((short, late))])
    assert apart.curve("rollout/ep_rew_mean") is None


STEADY = {"kl/of_limit": 0.8, "train/explained_variance": 0.5, "kl/coef": 1.0}
ANOMALIES = {
    "KL was over its limit after 2 of 40 updates .5%., at most 3 times it": {"kl/of_limit": {3: 3.0, 9: 1.5}},
    "a single state's KL was over its limit after 1 of 2 updates .50%., at most 1.5 times it": {
        "kl/max_of_limit": {3: 1.5, 9: 0.9}
    },
    "half of the updates reach under 0.1 of it": {"kl/of_limit": dict.fromkeys(range(40), 0.1)},
    "the temperature was at its bound after 4 of 40 updates": {"train/ent_coef": dict.fromkeys(range(4), 1e-6)},
    "coefficient is at its upper bound in 50% of the later": {"kl/coef": dict.fromkeys(range(30, 40), 1e4)},
    "3 of 40 TRPO steps were rejected .kl 2, curvature 1.": {
        "health/rejected_kl": {1: 1.0, 2: 1.0},
        "health/rejected_curvature": {3: 1.0},
    },
    "explained variance below 0 in 25% of the later updates": {
        "train/explained_variance": dict.fromkeys(range(35, 40), -1.0)
    },
    "7 updates met a nan or infinity and were skipped": {"health/skipped_updates": {4: 3.0, 8: 4.0}},
    "the return fell late: from 100 to 10": {
        "rollout/ep_rew_mean": dict.fromkeys(range(10, 30), 100.0) | dict.fromkeys(range(30, 40), 10.0)
    },
    "6 updates in a row were taken back: nothing moves": {
        "health/undone_in_a_row": {11 + i: 2.0 + i for i in range(5)} | {30: 2.0}
    },
    "2 episodes were cut off": {"health/restarted_episodes": {39: 2.0}},
}


@pytest.mark.parametrize("said", ANOMALIES)
def test_each_anomaly_is_found_and_advised_on_and_no_other(said: str) -> None:
    agent = "sac" if "temperature" in said else "trpo" if "TRPO" in said else "ppo"
    rows: list[dict[str, Any]] = [{"step": 100 * (i + 1), "rollout/ep_rew_mean": i / 100, **STEADY} for i in range(40)]
    for tag, values in ANOMALIES[said].items():
        for i, value in values.items():
            rows[i][tag] = value
    if agent == "sac":
        rows = [{"train/ent_coef": 0.1, "entropy/target": -1.0, **row} for row in rows]
    folder = written("a", rows)
    (folder / "config.toml").write_text((folder / "config.toml").read_text().replace("ppo", agent))
    (found,) = find_anomalies(read_history(folder))
    assert re.search(said, found.what)
    assert found.advice


def test_a_steady_run_and_an_empty_one_have_no_anomalies() -> None:
    rows = [{"step": 100 * (i + 1), "rollout/ep_rew_mean": i, **STEADY} for i in range(40)]
    assert find_anomalies(read_history(written("a", rows))) == []
    assert find_anomalies(read_history(written("b", []))) == []
    within_the_band = [row | {"kl/of_limit": 0.26} for row in rows]  # where --lr-schedule kl leaves its rate alone
    assert find_anomalies(read_history(written("c", within_the_band))) == []


PPO = {"n_envs": 2, "n_steps": 64, "batch_size": 64, "n_epochs": 2, "eval_every": 2, "quiet": True}


def test_the_page_needs_nothing_else_and_holds_every_figure() -> None:
    run = klrl.train("ppo", "CartPole-v1", total_timesteps=1024, kl={"penalty": "adaptive"}, **PPO)
    path = report([str(run.folder)], ReportConfig())
    more = ["Coefficient of the KL penalty", "Learning rate"]
    assert path == str(run.folder / "report.html")
    page = Path(path).read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|url\(|@import|<script", page)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    wanted = ["Return", "KL of each update", "KL over the states of each update", "KL as a share of its limit"]
    assert captions == [*wanted, *more, "Entropy", "Clip fraction", "Explained variance", "Where time went"]
    assert page.count("<p>The largest KL of a state was ") == 1
    assert "kl.target" in page
    assert f"{run.score.mean:.1f}" in page


def test_several_runs_of_three_agents_and_a_broken_name() -> None:
    trpo = {key: value for key, value in PPO.items() if key != "n_epochs"}
    klrl.train("ppo", "CartPole-v1", total_timesteps=256, **PPO)
    klrl.train("ppo", "CartPole-v1", total_timesteps=256, **PPO | {"seed": 1})
    klrl.train("trpo", "CartPole-v1", total_timesteps=256, **trpo)
    sac = {"n_envs": 2, "learning_starts": 64, "batch_size": 32, "hidden_sizes": [16], "kl": {"every": 50}}
    klrl.train("sac", "Pendulum-v1", total_timesteps=300, quiet=True, **sac)
    written("<b>&", [])
    page = Path(report(["runs"], ReportConfig("all.html"))).read_text()
    assert "<h2>CartPole-v1</h2>" in page
    assert "<h2>Pendulum-v1</h2>" in page
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    text = report(["runs"], ReportConfig(format="md"))
    assert len(re.findall(r"^\| (?:ppo|trpo|sac)-", text, re.MULTILINE)) == 4
    data = json.loads(report(["runs"], ReportConfig(format="json")))
    assert sorted(len(group["runs"]) for group in data["groups"]) == [1, 1, 1, 2]


SPREAD = {"kl/mean": 0.02, "kl/p50": 0.01, "kl/p95": 0.05, "kl/p99": 0.1, "kl/max": 0.2, "kl/limit": 0.03}
HELD = SPREAD | {"kl/max_limit": 0.1, "kl/max_of_limit": 2.0, "kl/held_states": 0.125}
SAID = {
    "The largest KL of a state was 0.34 nats, 17 times its update's mean.": [SPREAD, SPREAD | {"kl/max": 0.34}, SPREAD],
    "The largest KL of a state was 0.2 nats, 10 times its update's mean; the KL of single states reached at most 2 "
    "times its limit of 0.1; the rules held back 12.5% of the states in the last update.": [HELD],
    "The largest KL of a state was 0.2 nats; the rules held back 0% of the states in the last update.": [
        {"kl/max": 0.2, "kl/held_states": 0.5},
        {"kl/held_states": 0.0},
    ],
    "The largest KL of a state was infinite.": [SPREAD, SPREAD | {"kl/max": "inf"}],
    "The largest KL of a state was 0 nats.": [dict.fromkeys(SPREAD, 0.0)],
    "": [{"kl/mean": 0.02}],  # an old run
}


@pytest.mark.parametrize("said", SAID)
def test_what_kl_did_in_single_states_is_said_in_words_and_drawn_from_whatever_was_logged(said: str) -> None:
    folder = written("a", [{"step": 100 * (i + 1), **row} for i, row in enumerate(SAID[said])])
    run = read_history(folder)
    text = report([str(folder)], ReportConfig(format="md"))
    assert ("# KL over states" in text) == bool(said)
    assert (f"\n- a: {said}\n" in text) == bool(said)
    states = json.loads(report([str(folder)], ReportConfig(format="json")))["groups"][0]["runs"][0]["kl"]["states"]
    assert (states or {}).get("in_words", "") == said
    page = Path(report([str(folder)], ReportConfig("a.html"))).read_text()
    assert (f"<p>{escape(said)}</p></figure>" in page) == bool(said)
    figure = kl_over_states(run)
    assert (figure is not None) == bool(said)
    if figure is not None:
        assert len(figure.axes) == 1 + run.has("kl/held_states")
        for line in (line for axes in figure.axes for line in axes.lines):
            assert line.get_marker() == "o" or np.isfinite(line.get_ydata()).sum() > 1, "one point alone shows nothing"


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_spread_is_drawn_against_each_limit_and_says_what_that_is_of(direction: str) -> None:
    folder = written("a", [{"step": i, **HELD} for i in (100, 200)])
    options = (folder / "config.toml").read_text().replace("forward", direction)
    (folder / "config.toml").write_text(options + 'of = "p95"\n')
    figure = kl_over_states(read_history(folder))
    assert figure is not None
    upper, lower = figure.axes
    of = ", of KL(new || old)" if direction == "reverse" else ""
    heights = {line.get_label(): line.get_ydata()[0] for line in upper.lines}
    limits = {f"limit of the 95th percentile{of}": 0.03, f"limit of every state{of}": 0.1}
    spread = {"largest": 0.2, "99th percentile": 0.1, "95th percentile": 0.05, "median": 0.01, "mean": 0.02}
    assert heights == spread | limits
    bottom, top = upper.get_ylim()
    assert upper.get_yscale() == "log"
    assert bottom < 0.01 < 0.2 < top
    assert lower.lines[0].get_ydata().tolist() == [0.125, 0.125]
    ((words,),) = [
        [run["kl"]["states"]["in_words"] for run in group["runs"]]
        for group in json.loads(report([str(folder)], ReportConfig(format="json")))["groups"]
    ]
    assert ("the reverse KL of single states" in words) == (direction == "reverse")


def test_how_much_the_critic_explained_is_the_median_of_the_later_half_of_what_was_logged() -> None:
    rows = [{"step": i, "train/explained_variance": x} for i, x in enumerate((0.0, 0.1, "nan", 0.8, 0.9))]
    folders = [str(written("a", rows)), str(written("b", curve([1.0])))]
    runs = json.loads(report(folders, ReportConfig(format="json")))["groups"][0]["runs"]
    assert [run["critic"]["explained_variance"] for run in runs] == [pytest.approx(0.85), None]
    text = report(folders, ReportConfig(format="md"))
    assert [line.split(" | ")[-1] for line in text.splitlines() if line[:4] in ("| a ", "| b ")] == ["0.85 |", "- |"]


def test_figures_are_the_same_bytes_each_time() -> None:
    folder = written("a", curve([1.0, 2.0, 3.0], final=3.0))
    first = Path(report([str(folder)], ReportConfig("a.html"))).read_bytes()
    assert Path(report([str(folder)], ReportConfig("b.html"))).read_bytes() == first


def test_the_command_prints_where_the_report_lies(capsys: pytest.CaptureFixture[str]) -> None:
    folder = written("a", curve([1.0, 2.0]))
    main(["report", str(folder), "-o", "r.html"])
    assert capsys.readouterr().out == "r.html\n"
    main(["report", str(folder), "--format", "md"])
    assert "| a | 0 | stopped | 200 of 1,000 | 2.0 |" in capsys.readouterr().out
    for words, said in (
        (["report"], "report needs run folders"),
        (["report", "nowhere"], "nowhere is not a run's folder, and holds none"),
        (["report", str(folder), "--output", "no/such/r.html"], "--output no/such/r.html: No such file"),
        (["report", str(folder), "--format", "pdf"], "pdf"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
