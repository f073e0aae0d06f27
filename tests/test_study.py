"""The study of rules: every rule is a run that ``klrl train`` takes, and the table says what the lines hold."""

import json
import math
from types import ModuleType
from typing import Any

import pytest
from helpers import benchmark

from klrl.sweep.grid import expand


@pytest.fixture(scope="module")
def study() -> ModuleType:
    return benchmark("rules")


def line(env: str, rule: str, seed: int, score: float) -> dict[str, Any]:
    figures = {"kl_mean": 0.01, "kl_p95": 0.02, "kl_max": 0.1, "kl_largest": 0.3 + seed, "within": 0.5}
    return {"stage": "final", "env": env, "rule": rule, "seed": seed, "return": score, **figures}


def test_every_rule_is_a_run_of_its_own_on_every_task(study: ModuleType) -> None:
    for env in study.ENVS:
        settings = []
        for rule in study.RULES:
            agent, options = study.options_of(env, rule, 300_000)
            (setting,) = expand(agent, env, {name: [value] for name, value in options.items()})
            settings.append(json.dumps({**setting.options, "agent": agent}, sort_keys=True))
        same = study.ACTIONS[env] == 2  # TRPO at 0.02, and at 0.01 for each of two dimensions
        assert len(set(settings)) == len(study.RULES) - same
    assert study.options_of("Ant-v5", "trpo 0.01 a dimension", 1)[1]["kl.target"] == pytest.approx(0.08)
    assert study.options_of("Ant-v5", "mean, MDPO", 300_000)[1]["kl.anneal_over"] == 147
    assert study.options_of("Swimmer-v5", "clip", 1)[1]["gamma"] == 0.9999


def test_the_table_says_what_was_measured(study: ModuleType) -> None:
    lines = [line(env, "clip", seed, 100.0 + seed) for env in study.ENVS for seed in range(3)]
    lines += [line(env, "held", seed, 150.0 + seed) for env in study.ENVS[:2] for seed in range(3)]
    lines.append({**line("Ant-v5", "mean", 0, 9e9), "stage": "screen"})
    rows = study.table(lines, "final").splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| clip", "| held"], (
        "what has not run, and other stages, have no row"
    )
    assert "| held | 151 (3) | 151 (3) |  |" in rows[3]
    value, low, high = study.beside_clipping(lines, "held")
    assert value == pytest.approx(151 / 101)  # of the two tasks that both ran on
    assert 150 / 102 <= low < value < high <= 152 / 100
    assert "| 0.010 | 0.020 | 0.100 | 2.30 | 50% |" in rows[3]
    assert math.isnan(study.beside_clipping(lines, "spo")[0])
    assert len(study.figure(lines, "final", ["clip"]).axes) == 2
