"""Students: whom they learn from, what they see, where they end, and that they go on without their teachers."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import QUICK, SMALL_SAC, collect, rows
from test_resume import content, differences

import klrl
from klrl.agents.base import Agent
from klrl.agents.ppo import PPO
from klrl.agents.sac import SAC
from klrl.agents.student import Student
from klrl.envs.make import EnvConfig, make_vector
from klrl.kl import kl

QUICKLY: dict[str, Any] = {**QUICK, "n_epochs": 10, "learning_rate": 0.01, "teacher_updates": 2, "eval_every": 0}
FAMILIES = [("discrete", PPO), ("box", PPO), ("multibinary", PPO), ("box", SAC), ("multidiscrete", SAC)]
CORNERS = spaces.Dict({"far": spaces.Box(-1, 1, (2,)), "near": spaces.Dict({"x": spaces.Box(-1, 1, (1,))})})


def opinionated(agent: Any) -> Any:
    """The agent with an output layer so large that what it does depends on what it sees."""
    with torch.no_grad():
        agent.policy.network.mlp.layers[-1].weight.mul_(200 if isinstance(agent, PPO) else 4)
    return agent


def constant(folder: str, space: spaces.Space[Any], output: list[float], seed: int = 0) -> str:
    """A saved agent whose network's outputs are these everywhere."""
    agent: Any = PPO(spaces.Box(-1, 1, (1,)), space, {"hidden_sizes": (4,)}, seed=seed)
    with torch.no_grad():
        agent.policy.network.mlp.layers[-1].weight.zero_()
        agent.policy.network.mlp.layers[-1].bias.copy_(torch.tensor(output))
    return str(agent.save(folder))


def taught(teachers: tuple[str, ...], space: spaces.Space[Any], updates: int, **options: Any) -> Student:
    """A student after so many updates on random observations in -1 to 1, of episodes that never end."""
    options = {"n_steps": 32, "hidden_sizes": (8,), "learning_rate": 0.03, "max_grad_norm": 10.0, **options}
    student = Student(spaces.Box(-1, 1, (1,)), space, {"teachers": teachers, **options})
    buffer, rng, no = student.new_buffer(4), np.random.default_rng(0), np.zeros(4, bool)
    obs = rng.uniform(-1, 1, (4, 1)).astype(np.float32)
    for _ in range(updates * 32):
        following = rng.uniform(-1, 1, (4, 1)).astype(np.float32)
        buffer.add(obs, student.act(obs), np.zeros(4), no, no, following)
        obs = following
        if buffer.full:
            student.update(buffer)
    return student


@pytest.mark.parametrize(("kind", "of"), FAMILIES)
def test_a_student_comes_near_a_teacher_of_any_family(kind: Any, of: Any) -> None:
    def probe() -> Any:
        return gym.make("klrl/RewardByBoth-v0", action=kind, observation="dict")

    config = replace(SMALL_SAC, hidden_sizes=(8, 8)) if of is SAC else {"hidden_sizes": (8, 8)}
    teacher = opinionated(of(probe().observation_space, probe().action_space, config))
    head = {"box": "squashed"}.get(kind, "joint") if of is SAC else "plain"
    more = {**QUICKLY, "hidden_sizes": (6,), "head": head, "final_episodes": 0, "total_timesteps": 1000}
    run = klrl.train("student", probe, teachers=[teacher.save("teacher")], temperature=1.5, **more)
    logged = rows(run.folder)
    assert logged[0]["distill/kl_before"] > 0.1
    assert logged[-1]["distill/kl"] < 0.05 * logged[0]["distill/kl_before"]
    assert logged[-1]["kl/mean"] < logged[0]["kl/mean"]
    assert ("distill/agreement" in logged[-1]) == (kind != "box")
    obs = {"number": np.float32([[-1], [1]]), "which": np.array([0, 1])}
    exact = kl(teacher.distribution(obs), run.agent.distribution(obs))
    assert exact.max() < 0.1
    assert np.allclose(
        run.agent.predict(obs, deterministic=True)[0], teacher.predict(obs, deterministic=True)[0], atol=0.3
    )


def test_the_teachers_act_in_turn_and_then_the_student() -> None:
    space = spaces.Discrete(3)
    teachers = (constant("a", space, [20.0, 0, 0]), constant("b", space, [0, 20.0, 0]))
    student: Any = Student(spaces.Box(-1, 1, (1,)), space, {"teachers": teachers, "teacher_updates": 3})
    with torch.no_grad():
        student.policy.network.mlp.layers[-1].bias.copy_(torch.tensor([0, 0, 20.0]))
    acted = []
    for student.n_updates in range(5):
        acted.append(set(student.act(np.zeros((50, 1), np.float32)).flatten().tolist()))
        assert student.predict(np.zeros(1), deterministic=True)[0] == 2, "the student's own, whoever acts"
        assert set(student.act(np.zeros((9, 1)), rng=np.random.default_rng(0)).flatten().tolist()) == {2}
    assert acted == [{0}, {1}, {0}, {2}, {2}]


def test_between_two_teachers_a_student_ends_at_their_mean() -> None:
    """The least mean of KL(teacher||student) is that to their mixture; of normals, with its mean and variance."""
    two = spaces.Discrete(2)
    odds = [torch.tensor(p).log().tolist() for p in ([0.9, 0.1], [0.3, 0.7])]
    student = taught((constant("a", two, odds[0]), constant("b", two, odds[1])), two, 12, temperature=1.0)
    obs = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    assert torch.allclose(student.distribution(obs).probs, torch.tensor([0.6, 0.4]), atol=0.02)
    box = spaces.Box(-4, 4, (1,))  # where an output of 1 is an action of 4, and the standard deviation is 4
    normal = taught((constant("c", box, [-1.0]), constant("d", box, [1.0])), box, 12).distribution(obs)
    assert torch.allclose(normal.mean, torch.tensor(0.0), atol=0.3)
    assert torch.allclose(normal.log_std, torch.tensor(4 * 2**0.5).log(), atol=0.05)


def test_a_student_begins_with_the_deviation_of_its_first_teacher() -> None:
    box = spaces.Box(-1, 1, (2,))
    teachers = [str(PPO(box, box, {"log_std_init": start}).save(f"at {start}")) for start in (-2.5, 1.0)]
    student: Any = Student(box, box, {"teachers": teachers, "hidden_sizes": (4,)})
    student.prepare()
    assert torch.equal(student.distribution(np.zeros((1, 2))).log_std, torch.full((1, 2), -2.5))


def test_the_temperature_decides_what_a_student_of_two_teachers_gives_up() -> None:
    """At a high one logits are matched, whose mean is another policy than the mixture."""
    two = spaces.Discrete(2)
    teachers = (constant("a", two, [4.0, -4.0]), constant("b", two, [0.0, 0.0]))
    odds = {}
    for temperature in (1.0, 100.0):
        logits = taught(teachers, two, 15, temperature=temperature).distribution(np.zeros((1, 1))).log_probs[0, 0]
        odds[temperature] = float(logits[0] - logits[1])
    assert odds[1.0] == pytest.approx(1.098, abs=0.05), "the mixture's 3 to 1, as the first is all but certain"
    assert odds[100.0] == pytest.approx(4.0, abs=0.1), "half way between 8 and 0"


class Corners(gym.Env[Any, Any]):
    """Observations drawn anew at every step, of which actions change nothing; an episode has 16 steps."""

    observation_space, action_space = CORNERS, spaces.Discrete(2)

    def __init__(self) -> None:
        self.steps = 0

    def observe(self) -> Any:
        self.steps += 1
        draw = lambda n: self.np_random.uniform(-1, 1, n).astype(np.float32)  # noqa: E731
        return {"far": draw(2), "near": {"x": draw(1)}}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        return self.observe(), 0.0, False, self.steps > 16, {}


def test_a_student_sees_some_keys_and_its_teacher_all() -> None:
    teacher: Any = opinionated(PPO(CORNERS, spaces.Discrete(2), {"hidden_sizes": (8,)}))
    with torch.no_grad():  # it looks at x alone
        teacher.policy.network.mlp.layers[0].weight[:, :2] = 0
    path = str(teacher.save("teacher"))
    ends, options = {}, {**QUICKLY, "teachers": [path], "final_episodes": 0, "total_timesteps": 1000}
    for keys in (["far"], ["far", "near.x"], ["near"]):
        run = klrl.train("student", Corners, observation_keys=keys, **options)
        ends["+".join(keys)] = rows(run.folder)[-1]["distill/kl"]
    assert ends["near"] < 0.05
    assert ends["far+near.x"] < 0.05
    assert ends["far"] > 5 * ends["near"], "what it does not see it cannot follow"
    agent, near = klrl.load(run.folder), {"near": {"x": np.float32([[0.5]])}}
    policies = [agent.distribution({"far": np.float32([[v, v]]), **near}).logits for v in (-1, 1)]
    assert torch.equal(*policies)
    resumed = klrl.resume(run.folder, Corners, total_timesteps=1500)
    assert rows(resumed.folder)[-1]["step"] >= 1500


def test_what_sees_less_is_no_agents_beginning_nor_its_reference() -> None:
    student = Student(CORNERS, spaces.Discrete(2), {"observation_keys": ("near",), "hidden_sizes": (8,)}).save("less")
    other = PPO(CORNERS, spaces.Discrete(2), {"hidden_sizes": (8,)})
    with pytest.raises(klrl.UsageError, match=r"the policy sees near\.x alone, but this agent far, near\.x"):
        other.load_policy(klrl.load(student))
    reference = {"run": str(student), "target": 0.1}
    with pytest.raises(klrl.UsageError, match=r"--reference.run .*less: it sees near\.x alone"):
        PPO(CORNERS, spaces.Discrete(2), {"reference": reference}).prepare()


def test_what_cannot_teach_is_refused_in_one_line_and_nothing_is_written() -> None:
    box, two = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
    a, wide = constant("a", two, [0.0, 0.0]), constant("b", spaces.Discrete(3), [0.0, 0.0, 0.0])
    squashed = str(SAC(box, spaces.Box(-1, 1, (1,)), SMALL_SAC).save("c"))
    cases: list[tuple[Any, str]] = [
        ((two, {"teachers": (a, wide)}), r"teacher .*b: its action space is Discrete\(3\), not Discrete\(2\)"),
        ((two, {}), "a student learns from --teachers RUN"),
        ((two, {"teachers": ("nowhere",)}), "nowhere"),
        ((spaces.Box(-1, 1, (1,)), {"teachers": (squashed,)}), "no closed-form KL .*; --head squashed"),
        ((two, {"head": "squashed"}), "--head squashed makes no policy over the actions Discrete"),
        ((box, {"head": "joint"}), "--head joint makes no policy over the actions Box"),
        ((two, {"observation_keys": ("x",)}), "--observation-keys: the observation has no part 'x': it is no Dict"),
        ((two, {"temperature": 0.0}), "--temperature must be above 0"),
    ]
    for (space, options), message in cases:
        with pytest.raises(klrl.UsageError, match=message):
            Student(box, space, options).prepare()
    with pytest.raises(klrl.UsageError, match=r"no part 'fa': its parts are far, near\.x"):
        Student(CORNERS, two, {"observation_keys": ("fa",)})
    with pytest.raises(klrl.UsageError, match="its observation space is"):
        klrl.train("student", "CartPole-v1", teachers=[a])
    assert not Path("runs").exists()


def teacher_of(env_id: str, **more: Any) -> Path:
    return klrl.train("ppo", env_id, **{**QUICK, "final_episodes": 0, "run_dir": "teachers", **more}).folder


def test_a_run_goes_on_as_a_whole_one_when_its_teachers_are_gone() -> None:
    teachers = [str(teacher_of("CartPole-v1", seed=seed, total_timesteps=300)) for seed in (0, 1)]
    options = {**QUICKLY, "teachers": teachers, "eval_every": 2, "final_episodes": 2, "seed": 3, "teacher_updates": 3}
    options["lr_schedule"] = "constant"  # a linear one depends on the total
    whole = klrl.train("student", "CartPole-v1", **{**options, "total_timesteps": 1200, "run_dir": "whole"})
    half = klrl.train("student", "CartPole-v1", **{**options, "total_timesteps": 500, "run_dir": "half"})
    shutil.rmtree("teachers")
    resumed = klrl.resume(half.folder, total_timesteps=1200)
    assert not differences(content(whole.folder), content(resumed.folder))
    assert not differences(dict(enumerate(rows(whole.folder))), dict(enumerate(rows(resumed.folder))))
    loaded = klrl.load(resumed.folder)
    obs = np.random.default_rng(0).normal(size=(5, 4))
    assert torch.equal(loaded.distribution(obs).logits, whole.agent.distribution(obs).logits)


def test_ppo_trains_a_student_further_and_a_student_teaches_another() -> None:
    short = {**QUICKLY, "final_episodes": 0, "total_timesteps": 256}
    first = klrl.distill(teacher_of("Pendulum-v1", total_timesteps=256), hidden_sizes=(6,), **short)
    further = klrl.train("ppo", "Pendulum-v1", init_from=str(first.folder), **{**QUICK, "total_timesteps": 256})
    assert further.agent.config.hidden_sizes == (6,)
    began = (further.folder / "from.toml").read_text()
    assert all(part in began for part in ('"policy"', '"critic"', '"statistics of observations"', '"scale of rewards"'))
    again = klrl.distill(first.folder, hidden_sizes=(5,), **short)
    shutil.rmtree(first.folder)
    assert klrl.load(again.folder).config.hidden_sizes == (5,)


def test_an_update_that_meets_a_nan_is_undone_and_a_limit_on_its_kl_holds() -> None:
    two = spaces.Discrete(2)
    student = taught((constant("a", two, [3.0, -3.0]),), two, 1, kl={"target": 1e-3})
    buffer = student.new_buffer(4)
    env = make_vector(lambda: gym.wrappers.TimeLimit(One(), 9), 4, EnvConfig())
    collect(student, env, buffer, env.reset(seed=0)[0])
    report = student.update(buffer).kl
    assert report.attempted > 2e-3
    assert 5e-4 < report.mean <= 1e-3
    before = student.state_dict()
    teacher: Agent = student.teachers[0].agent
    torch.nn.init.constant_(next(teacher.policy.parameters()), torch.nan)
    with pytest.raises(klrl.errors.SkippedUpdateError):
        student.update(buffer)
    for name in ("policy", "critic", "reward_scale", "n_updates"):
        assert not differences(before[name], student.state_dict()[name])


def test_the_loss_is_the_mean_over_states_whatever_the_minibatches() -> None:
    two = spaces.Discrete(2)
    still = {"learning_rate": 1e-12, "temperature": 1.0, "n_epochs": 1, "batch_size": 50}  # of 128 rows
    student = taught((constant("a", two, [1.0, -1.0]),), two, 0, **still)
    buffer, env = student.new_buffer(4), make_vector(One, 4, EnvConfig())
    collect(student, env, buffer, env.reset(seed=0)[0])
    figures = student.update(buffer).metrics
    assert figures["train/distillation_loss"] == pytest.approx(figures["distill/kl_before"], rel=1e-5)
    assert figures["distill/kl_before"] == pytest.approx(0.3279, abs=0.02), (
        "to a coin from odds of e^2 to 1, but for 0.01"
    )


class One(gym.Env[Any, Any]):
    """One observation, two actions."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.zeros(1, np.float32), 1.0, False, False, {}


def test_a_student_predicts_by_itself_whoever_takes_the_steps(tmp_path: Path) -> None:
    seen, actions = spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(3)
    teacher = klrl.PPO(seen, actions, {"hidden_sizes": (8,)})
    teacher.policy.network.mlp.layers[-1].bias.data.copy_(torch.tensor([50.0, 0.0, 0.0]))
    run = str(teacher.save(tmp_path / "teacher"))
    student = klrl.Student(seen, actions, {"hidden_sizes": (4,), "teachers": (run,)})
    obs = np.zeros((300, 3), np.float32)
    assert (student.act(obs) == 0).all(), "the teacher takes the steps of training"
    assert (student.predict(obs)[0] != 0).any()
    assert student.n_updates == 0
