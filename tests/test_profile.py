"""What --profile prints and writes."""

import json
from typing import Any

import pytest

import klrl
from klrl.errors import EnvironmentFailedError


@pytest.mark.parametrize("agent", ["ppo", "trpo", "sac"])
def test_a_profile_says_where_the_time_went(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"ppo": {"n_steps": 64, "n_epochs": 2}, "trpo": {"n_steps": 64}, "sac": {"learning_starts": 250}}[agent]
    run = klrl.train(agent, "Pendulum-v1", total_timesteps=300, n_envs=2, profile=True, final_episodes=1, **more)
    out = capsys.readouterr().out
    table = out[out.index("part  ") :].splitlines()[1:]
    rows = {line[:22].strip(): line[22:].split() for line in table[: [line[:5] for line in table].index("trace")]}
    assert {"environment", "acting", "minibatches", "KL", "buffer", "saving", "logging", "evaluation"} <= rows.keys()
    assert sum(float(row[1].rstrip("%")) for row in rows.values()) == pytest.approx(100, abs=1)
    assert int(rows["buffer"][2].replace(",", "")) == int(rows["environment"][2].replace(",", "")) > 100
    trace = json.loads((run.folder / "profile.json").read_text())["traceEvents"]
    assert {event["name"] for event in trace} == rows.keys() - {"everything else"}
    assert all(event["dur"] >= 0 and event["ph"] == "X" for event in trace)
    assert "update" not in vars(run.agent), "what was watched is as it was"
    assert "make_batch" not in vars(run.agent)


def test_a_profile_leaves_numbers_alone_and_survives_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    class Counting(klrl.PPO):
        def setup(self, *args: Any) -> None:
            super().setup(*args)
            self._fit_critic = 0  # the name of a method of TRPO's

        def update(self, buffer: Any, progress: float = 0.0) -> Any:
            self._fit_critic += 1
            if self._fit_critic == 3:
                raise EnvironmentFailedError("made to")
            return super().update(buffer, progress)

        Config = klrl.PPOConfig

    with pytest.raises(EnvironmentFailedError):
        klrl.train(Counting, "CartPole-v1", total_timesteps=9999, n_envs=2, n_steps=64, profile=True)
    out = capsys.readouterr().out
    assert "\npart  " in out
    assert "profile.json" in out
