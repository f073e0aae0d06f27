"""Learning on real tasks, the penalty over a whole run, and what a run costs. The minutes-long ones are slow."""

import json
import subprocess
import sys
from statistics import fmean

import pytest
from helpers import benchmark

import klrl


def test_cartpole_is_solved_and_every_update_is_within_its_limit() -> None:
    run = klrl.train("ppo", "CartPole-v1", seed=0, quiet=True)
    assert run.score.mean >= 475
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] <= 100_000
    assert all(row["kl/of_limit"] <= 1 for row in rows)
    assert len({row["train/learning_rate"] for row in rows}) > 3, "it follows the KL"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_cartpole_is_solved_on_every_seed(seed: int) -> None:
    run = klrl.train("ppo", "CartPole-v1", seed=seed, quiet=True)
    assert run.score.mean >= 475
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["kl/of_limit"] <= 1 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_penalty_settles_on_the_target(seed: int) -> None:
    kl = {"target": 0.02, "penalty": "adaptive", "stop": 1.5, "on_overshoot": "keep"}
    run = klrl.train("ppo", "CartPole-v1", seed=seed, quiet=True, clip_range=0.0, lr_schedule="constant", kl=kl)
    assert run.score.mean >= 475
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert 0.5 <= fmean(row["kl/of_limit"] for row in rows[len(rows) // 2 :]) <= 1.5
    assert len({row["kl/coef"] for row in rows}) > 3, "beta moves"


def test_trpo_solves_cartpole_and_its_kl_is_within_the_limit_after_every_update() -> None:
    run = klrl.train("trpo", "CartPole-v1", seed=0, quiet=True)
    assert run.score.mean >= 475
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] <= 100_000
    assert all(row["kl/of_limit"] <= 1.0 for row in rows)
    assert fmean(row["train/accepted"] for row in rows) > 0.95
    assert fmean(row["kl/of_limit"] for row in rows) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_trpo_solves_cartpole_on_every_seed(seed: int) -> None:
    assert klrl.train("trpo", "CartPole-v1", seed=seed, quiet=True).score.mean >= 475


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("env_id", "needed"), [("Pendulum-v1", -250), ("LunarLander-v3", 200), ("Hopper-v5", 2500), ("Swimmer-v5", 200)]
)
def test_trpo_presets_reach_their_scores_over_three_seeds(env_id: str, needed: float) -> None:
    scores = []
    for seed in range(3):
        run = klrl.train("trpo", env_id, seed=seed, quiet=True)
        rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        assert all(row["kl/of_limit"] <= 1.0 for row in rows)
        scores.append(run.score.mean)
    assert fmean(scores) >= needed


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("env_id", "needed"),
    [("Pendulum-v1", -250), ("LunarLander-v3", 200), ("HalfCheetah-v5", 2000), ("Hopper-v5", 2000)],
)
def test_presets_reach_their_scores_over_three_seeds(env_id: str, needed: float) -> None:
    assert fmean(klrl.train("ppo", env_id, seed=seed, quiet=True).score.mean for seed in range(3)) >= needed


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("env_id", "needed", "seeds"),
    [
        ("Pendulum-v1", -200, 5),
        ("CartPole-v1", 450, 3),
        ("MountainCarContinuous-v0", 90, 3),
        ("HalfCheetah-v5", 4000, 2),
    ],
)
def test_sac_presets_reach_their_scores_on_every_seed(env_id: str, needed: float, seeds: int) -> None:
    for seed in range(seeds):
        assert klrl.train("sac", env_id, seed=seed, quiet=True).score.mean >= needed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_temperature_recovers_from_any_start() -> None:
    options = {"total_timesteps": 6000, "eval_every": 0, "kl": {"every": 500}, "quiet": True}
    last = {}
    for ent_coef in (1e-3, 1.0, 1e3):
        run = klrl.train("sac", "Pendulum-v1", ent_coef=ent_coef, **options)
        last[ent_coef] = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    usual = last[1.0]["train/ent_coef"]
    for row in last.values():
        assert usual / 4 <= row["train/ent_coef"] <= 4 * usual
        assert row["entropy/sampled"] == pytest.approx(-1.0, abs=0.5)


def test_peak_memory_of_the_cartpole_run() -> None:
    code = (
        "import klrl; klrl.train('ppo', 'CartPole-v1', total_timesteps=20_000, quiet=True);"
        # Not getrusage's: a new process has that from the one it was forked from.
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(done.stdout.split()[-1]) < 600 * 1024  # kilobytes


@pytest.mark.slow
def test_measuring_the_exact_kl_stays_cheap() -> None:
    shares = benchmark("kl_cost").shares()
    assert shares["once"] <= 0.05
    assert shares["after each epoch"] <= 0.15
