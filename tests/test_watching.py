"""What one watches while a run goes on: histograms of KL, the time to go, lines on the terminal."""

import json
import math
import re

import pytest
from helpers import QUICK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import klrl
from klrl.rundir.logger import Pace


def test_every_few_updates_a_histogram_shows_how_kl_is_spread_over_states() -> None:
    run = klrl.train("ppo", "CartPole-v1", **QUICK, histogram_every=2)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run.folder), size_guidance={"histograms": 0}).Reload()
    histograms = events.Histograms("kl/log10_per_state")
    assert [event.step for event in histograms] == [line["step"] for line in lines[1::2]]
    for event, line in zip(histograms, lines[1::2], strict=True):
        shown = event.histogram_value
        assert sum(shown.bucket) == shown.num > 0
        assert 10**shown.max == pytest.approx(line["kl/max"], rel=1e-6)
        assert shown.sum / shown.num <= math.log10(line["kl/mean"]), "the mean of logarithms is below that of the mean"


def test_tensorboards_charts_show_both_kls_against_their_limits() -> None:
    reference = {"run": "uniform", "target": 1.0}
    run = klrl.train("ppo", "CartPole-v1", **QUICK, kl={"max_target": 1.0}, reference=reference)
    events = EventAccumulator(str(run.folder), size_guidance={"tensors": 0}).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart}
    assert charts["share of the limit"] == ["^kl/of_limit$", "^kl/max_of_limit$", "^reference/of_limit$"]
    assert charts["largest KL of a state"] == ["^kl/max$", "^kl/max_limit$"]
    logged = events.Tags()["scalars"]
    always = [
        tags
        for title, tags in charts.items()
        if title not in ("predicted and measured", "entropy", "distance from teachers")
    ]
    assert all(any(re.match(tag, name) for name in logged) for tags in always for tag in tags)


def test_the_time_to_go_is_that_of_the_last_minute_and_knows_nothing_of_before_the_first_update() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.seconds_left(10_000, 20_000) is None, "steps before the first update took no learning"
    for i in range(1, 11):
        now[0] += 10
        left = pace.seconds_left(10_000 + 100 * i, 20_000)
        assert left == pytest.approx((20_000 - 10_000 - 100 * i) / 10)
    for i in range(1, 8):  # it becomes ten times as slow
        now[0] += 10
        left = pace.seconds_left(11_000 + 10 * i, 20_000)
    assert left == pytest.approx((20_000 - 11_070) / 1)


def test_verbose_prints_a_line_for_each_update_and_quiet_none(capsys: pytest.CaptureFixture[str]) -> None:
    long = QUICK | {"total_timesteps": 5000, "eval_every": 0}
    run = klrl.train("ppo", "CartPole-v1", **long | {"quiet": False, "verbose": True})
    lines = [line for line in capsys.readouterr().out.splitlines() if " steps " in line]
    assert len(lines) == len((run.folder / "metrics.jsonl").read_text().splitlines()) > 15
    klrl.train("ppo", "CartPole-v1", **QUICK)
    assert " steps " not in capsys.readouterr().out
    with pytest.raises(klrl.UsageError, match="--quiet and --verbose contradict"):
        klrl.train("ppo", "CartPole-v1", **QUICK | {"verbose": True})
